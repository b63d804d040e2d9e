"""MaskablePPO of sb3-contrib on Brackets: the environment's `action_masks` is all it needs.

python examples/maskable_ppo.py [TIMESTEPS]
"""

import sys

import gymnasium as gym
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import textrl


def main(timesteps: int = 1_024) -> float:
    """Trains and gives the mean score over 100 episodes."""
    env = Monitor(gym.make("textrl:textrl/Brackets-v0"))
    agent = MaskablePPO("MlpPolicy", env, n_steps=256, batch_size=64, gamma=1.0, seed=0, device="cpu")
    agent.learn(timesteps)
    score = float(evaluate_policy(agent, env, 100)[0])
    print(f"score {score:.2f} of {textrl.solve(env.unwrapped.task).score:.2f}")
    return score


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
