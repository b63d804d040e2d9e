"""Resident memory of environments after 10% of the steps and after all of them, as JSON: it should not grow.

    python benchmarks/env_memory.py [--steps 1000000] [--id textrl/Copy-v0]

Each environment takes so many steps with random actions: a single one, one with pictures, and a batch of 64, of which a
step counts once. With --rows the steps of the batch are counted once a row.
"""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

import textrl  # noqa: F401  (registers the environments)


def peak() -> int:
    """The most memory this process has held so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def single(env: gym.Env[Any, Any]) -> Callable[[], None]:
    """One step of an environment that starts again at every end."""
    actions = np.random.default_rng(0).integers(env.action_space.n, size=10_000).tolist()
    env.reset(seed=0)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        _, _, terminated, truncated, _ = env.step(actions[count % 10_000])
        if terminated or truncated:
            env.reset()

    return step


def batched(envs: gym.vector.VectorEnv[Any, Any, Any]) -> Callable[[], None]:
    """One step of a vector environment."""
    actions = np.random.default_rng(0).integers(envs.single_action_space.n, size=(1_000, envs.num_envs))
    envs.reset(seed=0)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        envs.step(actions[count % 1_000])

    return step


def grown(step: Callable[[], None], steps: int) -> dict[str, int]:
    """Peaks in KiB after a tenth of the steps and after all."""
    for _ in range(steps // 10):
        step()
    early = peak()
    for _ in range(steps - steps // 10):
        step()
    return {"after_a_tenth": early, "after_all": peak(), "grown": peak() - early}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--id", default="textrl/Copy-v0")
    parser.add_argument("--rows", action="store_true")
    options = parser.parse_args()
    report = {
        "single": grown(single(gym.make(options.id)), options.steps),
        "single_ansi": grown(single(gym.make(options.id, render_mode="ansi")), options.steps),
        "native_64": grown(
            batched(gym.make_vec(options.id, num_envs=64)), options.steps // 64 if options.rows else options.steps
        ),
    }
    print(json.dumps({"id": options.id, "steps": options.steps, "KiB": report}, indent=2))


if __name__ == "__main__":
    main()
