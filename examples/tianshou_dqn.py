"""Tianshou: DQN on a toy environment through its high-level interface.

python examples/tianshou_dqn.py [EPOCHS]
"""

import sys

import gymnasium as gym
import torch
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, CollectStats, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net

import textrl  # noqa: F401  (registers the environments)
from textrl.wrappers import NumericInfo


def make() -> gym.Env:
    """The environment."""
    return NumericInfo(gym.make("textrl/Vowels-v0", length=3))


def main(epochs: int = 2) -> float:
    """Trains and gives the best mean score of a test."""
    torch.manual_seed(0)
    env = make()
    network = Net(state_shape=env.observation_space.shape, action_shape=env.action_space.n, hidden_sizes=[64, 64])
    policy = DiscreteQLearningPolicy(model=network, action_space=env.action_space, eps_training=0.2, eps_inference=0.0)
    algorithm = DQN(policy=policy, optim=AdamOptimizerFactory(lr=1e-3), gamma=1.0, target_update_freq=100)
    training = DummyVectorEnv([make for _ in range(8)])
    collector = Collector[CollectStats](algorithm, training, VectorReplayBuffer(10_000, 8), exploration_noise=True)
    test = Collector[CollectStats](algorithm, DummyVectorEnv([make for _ in range(4)]), exploration_noise=False)
    result = algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            test_collector=test,
            max_epochs=epochs,
            epoch_num_steps=1_500,
            collection_step_num_env_steps=8,
            test_step_num_episodes=40,
            batch_size=64,
            update_step_num_gradient_steps_per_sample=0.25,
            test_in_training=False,
            verbose=False,
            show_progress=False,
        )
    )
    score = float(result.best_reward)
    print(f"score {score:.2f} of 1.00")
    return score


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
