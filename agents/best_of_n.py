"""BestOfN: no learning; n samples of the model, and the one with the highest score (Stiennon 2020, section 4.4).

    y = argmax_i score(x, y_i),  y_i ~ pi,  i = 1..n            KL(y || pi) <= log n - (n - 1) / n     (Beirami 2024)

What another agent has to beat at the same KL. The bound holds for every model and score, and is nearly met while n
is small against the number of likely responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from textrl.acting import responses_to, step
from textrl.agent import Agent
from textrl.attaching import is_bare, paid_scores
from textrl.config import AgentConfig, check
from textrl.drawing import Sampling
from textrl.rollout import Rollout, sample_episodes
from textrl.rows import Row
from textrl.scores import ScoreError, shorten


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig(AgentConfig):
    """Settings of best-of-n sampling."""

    n: int = 16  # samples of each prompt

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        check("n", self.n, self.n >= 1, "at least 1")


def kl_bound(n: int) -> float:
    """The bound log n - (n - 1) / n: no best of n samples is further than this from the model, in nats."""
    return math.log(n) - (n - 1) / n


def best_of_groups(scores: Tensor, n: int | Tensor) -> Tensor:
    """The index of the highest score of each n next to each other, the first of ties: (B n,) -> (B,).

    In place of n may stand which samples belong together, (B n,), rising; a group without samples has no best.
    """
    if isinstance(n, Tensor):
        starts = [int((n == group).nonzero()[0, 0]) for group in sorted(set(n.tolist()))]
        best = [start + int(scores[n == n[start]].argmax()) for start in starts]
        return torch.tensor(best, device=scores.device)
    groups = scores.view(-1, n)
    return groups.argmax(1) + torch.arange(len(groups), device=scores.device) * n


class BestOfN(Agent):
    """The best of n samples, by the task's score.

    `generate` and `respond` give it; `act` and `predict`, which say one token at a time, are the model's own.
    """

    config: BestOfNConfig
    config_class: ClassVar[type[AgentConfig]] = BestOfNConfig

    def respond(self, rows: Sequence[Row]) -> Rollout:
        """The best of n responses to each row: B episodes. Their log-probabilities are the model's, for one sample."""
        repeated = [row for row in rows for _ in range(self.config.n)]
        size = self.config.n
        at_once = self.config.max_tokens_per_microbatch
        samples = sample_episodes(
            self.base, self.policy, repeated, generator=self.generator, group_size=size, tokens_at_once=at_once
        )
        return self._best(samples, samples.scores)

    def collect(self) -> Rollout:
        """The best of n responses to each of `batch_size` prompts of the task, by what a wrapped environment pays."""
        rows = [self.task.sample(self.rng) for _ in range(self.config.batch_size)]
        if is_bare(self.env):
            return self.respond(rows)
        samples = step(self, len(rows) * self.config.n, rows)
        return self._best(samples, paid_scores(samples, self.env))

    @staticmethod
    def _best(samples: Rollout, scores: Tensor) -> Rollout:
        best = samples.select(best_of_groups(scores, samples.grouping))
        return replace(best, ref_logprobs=None)  # log pi - log pi_ref of the best is no estimate of their KL

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learns nothing; says how far from the model the best of n is at most."""
        return {"kl_bound": kl_bound(self.config.n)}

    def _answers(
        self, prompts: Sequence[str], max_new_tokens: int | None, sampling: Sampling, stop_strings: Sequence[str]
    ) -> list[str]:
        """The best of n responses to each prompt, by the score of its row."""
        size = self.config.n
        repeated = [prompt for prompt in prompts for _ in range(size)]
        rows, ids = responses_to(self, repeated, max_new_tokens, sampling, stop_strings)
        texts = self.task.decode(ids)
        scores = self.task.evaluate(rows, ids, texts)
        kept = [i for i in range(len(rows)) if i not in scores.faults]
        groups = torch.tensor([i // size for i in kept])
        for i in set(range(len(prompts))) - set(groups.tolist()):
            what = f"score failed for all {size} responses to prompt {shorten(prompts[i])}"
            raise ScoreError(f"{what}, the first: {scores.faults[i * size]}")
        return [texts[kept[i]] for i in best_of_groups(torch.from_numpy(scores.totals)[kept], groups).tolist()]
