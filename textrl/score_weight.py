"""What the score weighs against the KL penalty: little in the first updates of an agent, then all it has."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

FIRST_SPREAD, E_FOLD, LONGEST = 0.4, 0.15, 0.6


def first_weight(kl_coef: float, spread: float) -> float:
    """The weight of scores of this standard deviation under which the optimum is still near the reference, at most 1.

    There the log-ratio of the optimum, pi_ref exp(weight * score / kl_coef), to pi_ref has a deviation of 0.4. (Where
    prompts differ in their mean score, `spread` is larger than it is for any of them, and the weight smaller.)
    """
    return min(1.0, FIRST_SPREAD * kl_coef / spread)


def risen(start: float, done: float) -> float:
    """The weight when a share `done` of the training is over: start * e^(done / 0.15), at most 1.

    A `start` so small that it would not be 1 at 0.6 rises faster, and is. The optimum of weight * score - kl_coef * KL,
    pi_ref exp(weight * score / kl_coef), moves away from the reference as the weight rises, and the policy follows it.
    Under the full score at once a softmax policy soon draws nothing but the first good responses it met, and its
    gradient hardly leads away from them again (Mei 2020). The score rises where the penalty could fall: Adam would go
    on for long with the small steps that suit the large gradients of a large penalty.
    """
    if start >= 1:
        return 1.0
    length = min(LONGEST, -E_FOLD * math.log(start))  # of the rise
    return start ** max(0.0, 1 - done / length)


class ScoreWeight:
    """The weight of the score as it rises in an agent's first call of `learn`.

    Args:
        start: what it begins with, above 0 and at most 1; None: by the spread of the first scores that have one.

    Attributes:
        value: the weight in force.
        first: what it began with, where `start` is None; None before there was a spread.
        rising: whether it is on its way.
        asked: whether an update asked for it since `reset`.
    """

    not_saved: ClassVar = ("start",)

    def __init__(self, start: float | None) -> None:
        self.start, self.value, self.rising, self.asked = start, 1.0, False, False
        self.first: float | None = None

    def reset(self, rising: bool) -> None:
        """The whole score again, until an update asks."""
        self.value, self.rising, self.asked = 1.0, rising, False

    def weigh(self, scores: Tensor, kl_coef: float, done: float) -> float:
        """Sets and returns the weight for an update that learns from these scores.

        Args:
            scores: (B,).
            kl_coef: of the penalty they stand against, above 0.
            done: the share of `learn` that is over.
        """
        self.asked = True
        if not self.rising:
            return self.value
        start = self.first if self.start is None else self.start
        if start is None:
            spread = float(scores.std(unbiased=False))
            if not spread > 1e-5 * float(scores.abs().max()):  # all are the same, but for rounding
                return self.value
            start = self.first = first_weight(kl_coef, spread)
        self.value = risen(start, done)
        return self.value
