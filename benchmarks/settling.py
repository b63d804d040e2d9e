"""What the weight of the score at first (`score_start`) does for the share of the exact optimum that agents reach.

    python benchmarks/settling.py

A random number for every pair of neighbours, summed over a response of five of five symbols; two prompts; the policy
starts from the reference, a GPT-2 with large random weights. Seeds change the task, the reference and the samples.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import textrl
from textrl.agents import A2C, GRPO, PPO, REINFORCE

KL_COEF = 0.1


class Neighbours(textrl.Task):
    """A random number for every pair of neighbours, summed."""

    def __init__(self, seed: int) -> None:
        super().__init__(tokenizer=textrl.symbol_tokenizer("abcd"), max_new_tokens=5)
        self._table = np.random.default_rng(seed).normal(size=(5, 5)) / np.sqrt(5)

    def prompts(self) -> list[dict[str, Any]]:
        """Two of one letter."""
        return [{"prompt": "a"}, {"prompt": "b"}]

    def score(self, prompts: list[str], completions: list[str], *, completion_ids: Any, **columns: Any) -> list[float]:
        """The sum over the pairs, the prompt's letter with the first."""
        texts = [["ab".index(p) + 1, *ids] for p, ids in zip(prompts, completion_ids, strict=True)]
        return [float(sum(self._table[a, b] for a, b in itertools.pairwise(t))) for t in texts]


def reference(seed: int) -> PreTrainedModel:
    """A GPT-2 with opinions of its own."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 5, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3))


def share(kind: type[textrl.Agent], score_start: float, seed: int, timesteps: int) -> float:
    """The share of the optimum that an agent reaches."""
    task, model = Neighbours(seed), reference(seed)
    envs = textrl.TextVectorEnv(task, num_envs=1, reference=model, kl_coef=KL_COEF)
    settings = {"learning_rate": 2e-3, "batch_size": 128, "seed": seed, "score_start": score_start}
    agent = kind(envs, copy.deepcopy(model), **settings).learn(timesteps)
    found = textrl.evaluate_exact(task, agent.model, reference=model, kl_coef=KL_COEF).objective
    start = textrl.evaluate_exact(task, model, reference=model, kl_coef=KL_COEF).objective
    best = textrl.solve(task, reference=model, kl_coef=KL_COEF).objective
    return (found - start) / (best - start)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=100_000)
    timesteps = parser.parse_args().timesteps
    print("| agent | the whole score at once | score_start = 0.1 |\n| --- | --- | --- |")
    for kind in (REINFORCE, A2C, GRPO, PPO):
        cells = [" ".join(f"{share(kind, start, s, timesteps):.3f}" for s in range(3)) for start in (1.0, 0.1)]
        print(f"| {kind.__name__} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
