"""What 4,096 noisy pairs tell of a score, at best: the share of the optimum for whoever knows the form of the score.

    python benchmarks/pairs_tell.py

The tasks of optimum.py whose score is a sum over places, and the pairs that DPO gets there. A number for each letter at
each place of each prompt is fitted to the pairs by logistic regression, under the very prior (mean 0, the spread of the
true numbers) that a learner from pairs does not have; the policy is the exact optimum of the fitted score, of which DPO
learns an approximation (Rafailov 2023, eq. 4).
"""

from __future__ import annotations

import itertools
import warnings
from functools import partial

import torch
from optimum import HORIZON, LETTERS, PAIRS, TASKS, Toy, labelled, reference
from torch import Tensor
from torch.nn.functional import logsigmoid

import textrl

SPREADS = {"target": 0.4 / HORIZON, "places": 1 / HORIZON**0.5}  # of the true numbers


class Fitted(Toy):
    """A task with the numbers that were fitted, (3, T, V)."""

    table: Tensor

    def value(self, prompt: int, ids: list[int]) -> float:
        """Their sum."""
        return float(sum(self.table[prompt, t, token] for t, token in enumerate(ids)))


def counts(task: Toy, prompt: str, response: str) -> Tensor:
    """Which number counts for a response: (3, T, V); the end token stands behind it where there is room."""
    ids = task.tokenizer(response, add_special_tokens=False)["input_ids"]
    out = torch.zeros(3, HORIZON, task.vocab_size, dtype=torch.float64)
    for t, token in enumerate([*ids, task.eos_token_id][:HORIZON]):
        out[LETTERS.index(prompt), t, token] = 1
    return out


def fitted(task: Toy, pairs: list[dict[str, str]], spread: float) -> Tensor:
    """The likeliest numbers under the pairs and the prior: (3, T, V) float64."""
    count = partial(counts, task)
    apart = torch.stack([count(row["prompt"], row["chosen"]) - count(row["prompt"], row["rejected"]) for row in pairs])
    table = torch.zeros(apart.shape[1:], dtype=torch.float64, requires_grad=True)
    newton = torch.optim.LBFGS([table], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        newton.zero_grad()
        value = -logsigmoid((apart * table).sum((1, 2, 3))).sum() + (table**2).sum() / (2 * spread**2)
        value.backward()
        return value

    newton.step(loss)
    return table.detach()


def main() -> None:
    """Prints a row for each task and coefficient, a share for each seed."""
    print("| task | KL coefficient | share |\n| --- | --- | --- |")
    for name, kl_coef in itertools.product(SPREADS, (0.1, 0.3)):
        shares = []
        for seed in (0, 1, 2):
            task = TASKS[name](seed)
            ref = reference("plain", task, seed)
            env = textrl.TextEnv(task, reference=ref, kl_coef=kl_coef)
            told = Fitted(seed)
            told.table = fitted(task, labelled(env, ref, PAIRS, seed), SPREADS[name])
            policy = textrl.solve(told, reference=ref, kl_coef=kl_coef).model()
            shares.append(textrl.evaluate_exact(task, policy, reference=ref, kl_coef=kl_coef).share)
        print(f"| {name} | {kl_coef} | {' '.join(f'{share:.3f}' for share in shares)} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
