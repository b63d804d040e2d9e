"""RLlib: PPO on a toy environment, with its own small network.

pip install "ray[rllib]"  # it asks for one certain version of Gymnasium; textrl works with that one too
python examples/rllib_ppo.py [ITERATIONS]
"""

import sys
from typing import Any

import gymnasium as gym
import ray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.tune.registry import register_env

import textrl
from textrl.wrappers import OneHotObservation


def make(config: dict[str, Any]) -> gym.Env:
    """The environment; RLlib takes a flat array for a vector and anything else for a picture."""
    return gym.wrappers.FlattenObservation(OneHotObservation(gym.make("textrl:textrl/Vowels-v0", length=3)))


def main(iterations: int = 8) -> float:
    """Trains and gives the mean score of the last iteration's episodes."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    register_env("vowels", make)
    config = (
        PPOConfig()
        .environment("vowels")
        .env_runners(num_env_runners=0, num_envs_per_env_runner=8)
        .training(train_batch_size_per_learner=512, minibatch_size=128, num_epochs=4, lr=3e-3, gamma=1.0)
        .debugging(seed=0)
    )
    agent = config.build_algo()
    try:
        for _ in range(iterations):
            score = float(agent.train()["env_runners"]["episode_return_mean"])
        best = textrl.solve(make({}).unwrapped.task).score
        print(f"score {score:.2f} of {best:.2f}")
    finally:
        agent.stop()
        ray.shutdown()
    return score


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
