"""Trains discrete CQL, from d3rlpy, on a batch of episodes that textrl logged as a Minari dataset.

    pip install "gymnasium-textrl[offline]" colorama dataclasses-json scikit-learn structlog
    pip install --no-deps d3rlpy gym gym-notices
    python examples/d3rlpy_cql.py

A random language model plays `textrl/Vowels-v0`; d3rlpy sees only what lies on disk. What it learned then plays
the environment by itself, token by token. (d3rlpy asks for an old Gymnasium, but runs with this one.)
"""

import sys
import tempfile

import d3rlpy
import gymnasium as gym
import minari
import numpy as np
from numpy.typing import NDArray

import textrl
from textrl.collecting import collect
from textrl.models import small_model


def one_hot(observations: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """Token ids (N, L), V where nothing is written -> (N, L * (V + 1)): a network cannot add token ids up."""
    return np.eye(width, dtype=np.float32)[observations].reshape(len(observations), -1)


def to_mdp_dataset(dataset: minari.MinariDataset) -> d3rlpy.dataset.MDPDataset:
    """A Minari dataset of token episodes as d3rlpy's, without the last observations: every episode terminates."""
    width = int(dataset.observation_space.high.flat[0]) + 1
    episodes = list(dataset.iterate_episodes())
    return d3rlpy.dataset.MDPDataset(
        observations=np.concatenate([one_hot(e.observations[:-1], width) for e in episodes]),
        actions=np.concatenate([e.actions for e in episodes])[:, None],
        rewards=np.concatenate([e.rewards for e in episodes])[:, None],
        terminals=np.concatenate([e.terminations for e in episodes]).astype(np.float32)[:, None],
        action_space=d3rlpy.ActionSpace.DISCRETE,
        action_size=int(dataset.action_space.n),
    )


def play(env: gym.Env, algo: d3rlpy.algos.QLearningAlgoBase, episodes: int) -> float:
    """The mean score of the greedy policy."""
    width, scores = env.action_space.n + 1, []
    for seed in range(episodes):
        observation, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            action = int(algo.predict(one_hot(observation[None], width))[0])
            observation, _, ended, _, info = env.step(action)
        scores.append(info["score"])
    return float(np.mean(scores))


def main(steps: int = 1500) -> float:
    """Logs, trains, plays; gives the mean score of what was learned."""
    d3rlpy.seed(0)
    env = gym.make("textrl/Vowels-v0")
    task = env.unwrapped.task
    model = small_model(task.vocab_size, env.observation_space.shape[0])
    with tempfile.TemporaryDirectory() as folder:
        logged = collect(env, model, 1000, f"{folder}/random")
        dataset = to_mdp_dataset(logged)
        behaviour = textrl.read_episodes(logged).scores.mean().item()
    config = d3rlpy.algos.DiscreteCQLConfig(
        gamma=1.0, learning_rate=1e-3, batch_size=64, alpha=0.1, target_update_interval=100
    )
    algo = config.create(device="cpu")
    algo.fit(
        dataset,
        n_steps=steps,
        n_steps_per_epoch=steps,
        show_progress=False,
        logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
    )
    score = play(env, algo, 20)
    print(f"mean score: {behaviour:.3f} of the policy that was logged, {score:.3f} after CQL")
    return score


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
