"""Bandit: one token, and that is all."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

from textrl.config import is_number
from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task


class Bandit(Task):
    """Pull one arm.

    Description: the prompt is empty; each symbol is an arm with a payoff that never changes.
    Observation: the begin token, and then the arm that was pulled.
    Actions: the end token (no arm: payoff 0) and one letter an arm.
    Score: the payoff of the arm.
    Episode end: after one token.
    What it teaches: the softmax policy gradient alone: exploration, and what a baseline does (raise `offset`).
    Optimum: the largest payoff, 1.

    Args:
        payoffs: of the arms a, b, c, ...
        offset: added to every arm's payoff: the best arm stays the best, the variance of a gradient without a baseline
            grows.
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, payoffs: Sequence[float] = (0.2, 0.5, 1.0, 0.8, 0.0), offset: float = 0.0) -> None:
        letters = string.ascii_lowercase[: len(payoffs)]
        if not 1 <= len(payoffs) <= len(letters):
            raise ValueError(f"payoffs must have 1 to 26 numbers; got {len(payoffs)}")
        if not all(is_number(payoff) and math.isfinite(payoff) for payoff in payoffs):
            raise ValueError(f"payoffs must be finite numbers; got {payoffs!r}")
        if not (is_number(offset) and math.isfinite(offset)):
            raise ValueError(f"offset must be a finite number; got {offset!r}")
        super().__init__(tokenizer=symbol_tokenizer(letters), max_new_tokens=1)
        self.payoffs = {letter: payoff + offset for letter, payoff in zip(letters, payoffs, strict=True)}
        self.best_score = max(0.0, *self.payoffs.values())

    def prompts(self) -> list[Row]:
        """The empty prompt."""
        return [{"prompt": ""}]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The payoff of the arm; 0 for none."""
        return [self.payoffs.get(text, 0.0) for text in completions]
