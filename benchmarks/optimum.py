"""The share of the exact optimum that each agent reaches, by task, reference, KL coefficient and seed.

    python benchmarks/optimum.py --agents PPO GRPO --tasks places neighbours --kl-coefs 0.05 0.3 --set epochs=2

Five of five symbols, three prompts, the policy starts from the reference; seeds change the task, the reference and the
samples, and a cell has the share of each. Only the learning rate, the batch and the timesteps are given, and what
`--set` names. Share: (objective - the reference's) / (optimum - the reference's).
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import time
import warnings
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import textrl
from textrl import agents
from textrl.policy import CausalPolicy
from textrl.rollout import Rollout, collect_sampled

LETTERS, HORIZON = "abcd", 5
ON_POLICY = ("REINFORCE", "A2C", "PPO", "TRPO", "GRPO", "NLPO")
OTHERS = ("DPO", "BPO", "ReST")  # they fit what is given or was drawn, and have three times the timesteps
PAIRS, EPISODES = 4096, 8192  # what DPO and BPO are given


class Toy(textrl.Task):
    """Three prompts; the scores of some kind over the tokens of prompt and response."""

    def __init__(self, seed: int) -> None:
        super().__init__(tokenizer=textrl.symbol_tokenizer(LETTERS), max_new_tokens=HORIZON)
        self.rng = np.random.default_rng(seed)
        self.setup()

    def setup(self) -> None:
        """Draws what the score is made of."""

    def prompts(self) -> list[dict[str, Any]]:
        """Three of one letter."""
        return [{"prompt": letter} for letter in LETTERS[:3]]

    def score(self, prompts: list[str], completions: list[str], *, completion_ids: Any, **columns: Any) -> list[float]:
        """One number a response."""
        starts = [LETTERS.index(prompt) for prompt in prompts]
        return [self.value(p, [int(i) for i in ids]) for p, ids in zip(starts, completion_ids, strict=True)]

    def value(self, prompt: int, ids: list[int]) -> float:
        """The score of a response to the prompt-th prompt, which is the token prompt + 1."""
        raise NotImplementedError


class Target(Toy):
    """The share of places with the right letter, a text for each prompt: small scores."""

    def setup(self) -> None:
        """The right texts."""
        self.right = self.rng.integers(1, 5, size=(3, HORIZON))

    def value(self, prompt: int, ids: list[int]) -> float:
        """From 0 to 1."""
        return sum(float(a == b) for a, b in zip(ids, self.right[prompt], strict=False)) / HORIZON


class Places(Toy):
    """A random number for each letter at each place, summed."""

    def setup(self) -> None:
        """The numbers."""
        self.table = self.rng.normal(size=(3, HORIZON, 5)) / np.sqrt(HORIZON)

    def value(self, prompt: int, ids: list[int]) -> float:
        """Spread 1."""
        return float(sum(self.table[prompt, t, token] for t, token in enumerate(ids)))


class Neighbours(Toy):
    """A random number for every pair of neighbours, summed."""

    def setup(self) -> None:
        """The numbers."""
        self.table = self.rng.normal(size=(5, 5)) / np.sqrt(HORIZON)

    def value(self, prompt: int, ids: list[int]) -> float:
        """Spread 1; the prompt is a neighbour of the first letter."""
        return float(sum(self.table[a, b] for a, b in itertools.pairwise([prompt + 1, *ids])))


class Repeats(Toy):
    """A point for each letter that repeats the one before, half a point off for each that is used: many optima."""

    def value(self, prompt: int, ids: list[int]) -> float:
        """From -2.5 to 4.5."""
        return float(sum(a == b for a, b in itertools.pairwise([prompt + 1, *ids]))) - 0.5 * len(set(ids))


TASKS = {kind.__name__.lower(): kind for kind in (Target, Places, Neighbours, Repeats)}
REFERENCES = ("peaked", "plain", "table")
FEW_STEPS = ("REINFORCE", "A2C", "GRPO")  # a batch: with a table they get nowhere at the rate of the others


def learning_rate(kind: str, name: str) -> float:
    """That of an agent that starts from a reference of this kind."""
    if kind == "table":
        return 0.1 if name in FEW_STEPS else 0.03
    return 2e-3 if kind == "peaked" else 1e-3


def reference(kind: str, task: textrl.Task, seed: int) -> PreTrainedModel:
    """A GPT-2 with opinions of its own, one as GPT-2s begin, or a table of random logits for every prefix."""
    if kind == "table":
        return textrl.tabular_model(task, std=1.0, seed=seed)
    torch.manual_seed(seed)
    width, spread = (32, 0.3) if kind == "peaked" else (64, 0.02)
    sizes = {"vocab_size": task.vocab_size, "n_positions": 24, "n_embd": width, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=spread))


def drawn(env: textrl.TextEnv, model: PreTrainedModel, episodes: int, seed: int, group_size: int = 1) -> Rollout:
    """Episodes of a model."""
    return collect_sampled(
        env,
        CausalPolicy(model, env.task.vocab_size),
        episodes,
        rng=np.random.default_rng(seed),
        generator=torch.Generator().manual_seed(seed),
        group_size=group_size,
    )


def labelled(env: textrl.TextEnv, model: PreTrainedModel, pairs: int, seed: int) -> list[dict[str, str]]:
    """Pairs of the model's responses, labelled by Bradley-Terry on the score."""
    rollout = drawn(env, model, 2 * pairs, seed, group_size=2)
    first, second = rollout.scores.double().view(-1, 2).T.numpy()
    wins = np.random.default_rng(seed).random(pairs) < 1 / (1 + np.exp(second - first))
    texts = zip(rollout.rows[::2], rollout.completions[::2], rollout.completions[1::2], wins, strict=True)
    return [
        {"prompt": row["prompt"], "chosen": a if won else b, "rejected": b if won else a} for row, a, b, won in texts
    ]


def share(args: argparse.Namespace, name: str, task_name: str, kind: str, kl_coef: float, seed: int) -> float:
    """The share of the optimum that an agent reaches."""
    task = TASKS[task_name](seed)
    ref = reference(kind, task, seed)
    env = textrl.TextEnv(task, reference=ref, kl_coef=kl_coef)
    settings = {
        "learning_rate": args.learning_rate or learning_rate(kind, name),
        "batch_size": args.batch_size,
        "seed": seed,
    }
    settings |= args.settings
    if name == "DPO":
        settings["dataset"] = labelled(env, ref, PAIRS, seed)
    elif name == "BPO":
        settings["dataset"] = drawn(env, ref, EPISODES, seed)
    agent = getattr(agents, name)(env, copy.deepcopy(ref), **settings)
    agent.learn(3 * args.timesteps if name in OTHERS else args.timesteps)
    return textrl.evaluate_exact(task, agent.model, reference=ref, kl_coef=kl_coef).share


def value_of(text: str) -> Any:
    """A number, a truth value or None as Python writes them, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    """Prints a row for each task, reference and coefficient, and what a run of each agent took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", nargs="+", default=[*ON_POLICY, *OTHERS], choices=[*ON_POLICY, *OTHERS])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--references", nargs="+", default=list(REFERENCES), choices=REFERENCES)
    parser.add_argument("--kl-coefs", nargs="+", type=float, default=[0.05, 0.3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--timesteps", type=int, default=100_000, help=f"three times as many for {OTHERS}")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, help="default: by reference and agent")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the agents")
    args = parser.parse_args()
    args.settings = {name: value_of(text) for name, _, text in (pair.partition("=") for pair in args.set)}
    print("| task | reference | KL coefficient | " + " | ".join(args.agents) + " |")
    print("| --- " * (3 + len(args.agents)) + "|")
    taken = dict.fromkeys(args.agents, 0.0)
    rows = list(itertools.product(args.tasks, args.references, args.kl_coefs))
    for task, kind, kl_coef in rows:
        cells = []
        for name in args.agents:
            start = time.process_time()
            shares = [share(args, name, task, kind, kl_coef, seed) for seed in args.seeds]
            taken[name] += time.process_time() - start
            cells.append(" ".join(f"{each:.3f}" for each in shares))
        print(f"| {task} | {kind} | {kl_coef:g} | " + " | ".join(cells) + " |", flush=True)
    seconds = [f"{spent / len(rows) / len(args.seeds):.0f}" for spent in taken.values()]
    print("| CPU seconds a run | | | " + " | ".join(seconds) + " |")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
