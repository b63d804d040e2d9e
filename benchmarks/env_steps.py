"""Environment steps a second, as JSON: textrl's environments beside Gymnasium's CartPole, in one run.

    python benchmarks/env_steps.py [--seconds 0.1] [--rounds 30] [--cpu-time] [--out FILE]

Every figure is the best of `rounds` runs of `seconds` each (short runs, so that one of them is left alone by whatever
else the machine does), with random actions drawn beforehand. With --cpu-time seconds are those of this thread, so that
other work on the machine counts less; that is right only with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

import textrl
from textrl.envs.copy import Copy
from textrl.models import small_model
from textrl.policy import CausalPolicy

Clock = Callable[[], float]
Run = Callable[[float, Clock], tuple[int, float]]
"""Seconds to run for and a clock -> steps, and the seconds they took."""


def best(run: Run, seconds: float, rounds: int, clock: Clock) -> float:
    """The best rate of several runs."""
    return max(steps / taken for steps, taken in (run(seconds, clock) for _ in range(rounds)))


def single(env: gym.Env[Any, Any]) -> Run:
    """Steps one environment, reset at every end."""
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(10_000)]

    def run(seconds: float, clock: Clock) -> tuple[int, float]:
        env.reset(seed=0)
        steps, start = 0, clock()
        while (taken := clock() - start) < seconds:
            for action in actions[:500]:
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()
            steps += 500
        return steps, taken

    return run


def batched(envs: gym.vector.VectorEnv[Any, Any, Any]) -> Run:
    """Steps a vector environment; a step counts once for every row."""
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(500)]

    def run(seconds: float, clock: Clock) -> tuple[int, float]:
        envs.reset(seed=0)
        steps, start = 0, clock()
        while (taken := clock() - start) < seconds:
            for action in actions[:20]:
                envs.step(action)
            steps += 20 * envs.num_envs
        return steps, taken

    return run


def whole_prefix(task: textrl.Task, policy: CausalPolicy) -> Run:
    """One environment whose reference reads the whole prefix again at every step: what the KV cache saves."""
    env = textrl.TextEnv(task)
    actions = np.random.default_rng(0).integers(1, task.vocab_size, 10_000).tolist()

    @torch.no_grad()
    def run(seconds: float, clock: Clock) -> tuple[int, float]:
        observation, _ = env.reset(seed=0)
        steps, start = 0, clock()
        while (taken := clock() - start) < seconds:
            for action in actions[:20]:
                tokens = torch.from_numpy(observation[observation != task.vocab_size])[None]
                row = torch.zeros(1, dtype=torch.int64)
                policy.logits(policy.hidden(tokens, row, row + tokens.shape[1] - 1)).log_softmax(-1)[0, action].item()
                observation, _, terminated, _, _ = env.step(action)
                if terminated:
                    observation, _ = env.reset()
            steps += 20
        return steps, taken

    return run


def with_reference(task: textrl.Task, model: Any, num_envs: int) -> Run:
    """A native vector environment with a reference; the end token is left out so that episodes are long."""
    envs = textrl.TextVectorEnv(task, num_envs, reference=model, kl_coef=0.1, autoreset_mode=AutoresetMode.SAME_STEP)
    actions = np.random.default_rng(0).integers(1, task.vocab_size, (500, num_envs))

    def run(seconds: float, clock: Clock) -> tuple[int, float]:
        envs.reset(seed=0)
        steps, start = 0, clock()
        while (taken := clock() - start) < seconds:
            for action in actions[:20]:
                envs.step(action)
            steps += 20 * num_envs
        return steps, taken

    return run


def main() -> None:
    """Measures, prints the JSON, and writes it to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    clock = time.thread_time if options.cpu_time else time.perf_counter
    copy, long = "textrl/Copy-v0", Copy(symbols="abcdefghijklmnopqrstuvwxyz", length=32)
    model = small_model(long.vocab_size, long.max_prompt_tokens + long.max_new_tokens, n_embd=128, n_layer=5)
    runs = {
        "cartpole_single": single(gym.make("CartPole-v1")),
        "copy_single": single(gym.make(copy)),
        "copy_sync_64": batched(gym.make_vec(copy, num_envs=64, vectorization_mode="sync")),
        "copy_native_64": batched(gym.make_vec(copy, num_envs=64)),
        "copy_native_1024": batched(gym.make_vec(copy, num_envs=1024)),
        "reference_whole_prefix": whole_prefix(long, CausalPolicy(model, long.vocab_size)),
        "reference_native_32": with_reference(long, model, 32),
    }
    figures = {name: round(best(run, options.seconds, options.rounds, clock)) for name, run in runs.items()}
    ratios = {
        "copy_single / cartpole_single": figures["copy_single"] / figures["cartpole_single"],
        "copy_native_64 / copy_sync_64": figures["copy_native_64"] / figures["copy_sync_64"],
        "reference_native_32 / reference_whole_prefix": figures["reference_native_32"]
        / figures["reference_whole_prefix"],
    }
    report = {
        "steps_per_second": figures,
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "reference_parameters": sum(p.numel() for p in model.parameters()),
        "torch_threads": torch.get_num_threads(),
        "seconds_of": "this thread" if options.cpu_time else "the wall",
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
