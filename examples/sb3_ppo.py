"""Stable-Baselines3 on a toy environment: PPO, A2C and DQN with its own small networks.

python examples/sb3_ppo.py [TIMESTEPS]
"""

import sys

import gymnasium as gym
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import textrl
from textrl.wrappers import OneHotObservation


def main(timesteps: int = 2_000) -> dict[str, float]:
    """Trains each and gives its mean score over 100 episodes."""
    env = Monitor(OneHotObservation(gym.make("textrl/Vowels-v0", length=3)))
    agents = {
        "PPO": PPO("MlpPolicy", env, n_steps=256, batch_size=64, gamma=1.0, seed=0, device="cpu"),
        "A2C": A2C("MlpPolicy", env, n_steps=16, gamma=1.0, seed=0, device="cpu"),
        "DQN": DQN(
            "MlpPolicy", env, 1e-3, learning_starts=100, target_update_interval=100, gamma=1.0, seed=0, device="cpu"
        ),
    }
    reached = {}
    for name, agent in agents.items():
        agent.learn(timesteps)
        reached[name] = float(evaluate_policy(agent, env, 100)[0])
        print(f"{name}: score {reached[name]:.2f} of {textrl.solve(env.unwrapped.task).score:.2f}")
    return reached


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
