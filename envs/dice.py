"""Dice: a score that is a matter of luck."""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from typing import Any

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task

SIDES = 6


class Dice(Task):
    """Choose which die to roll.

    Description: the prompt is empty; each letter is a die with its own mean and spread. What the rolls will show is
    part of the row, hidden from the policy: the same response gets another score another time.
    Observation: the begin token and the dice so far, token ids.
    Actions: the end token and one letter a die.
    Score: the sum of what the dice show, divided by `throws`; a die shows mean + spread * (roll - 3.5) / 2.5, with a
    fair roll from 1 to 6 for each place.
    Episode end: the end token, or `throws` tokens.
    What it teaches: variance: the best die is the noisiest, and few samples say little about it.
    Optimum: the largest mean, 0.6.

    Args:
        means: of the dice a, b, c, ...
        spreads: of the same dice: how far above or below the mean they can come.
        throws: the horizon, in tokens.
    """

    best_score = 0.6
    deterministic = True

    def __init__(
        self, means: Sequence[float] = (0.4, 0.5, 0.6), spreads: Sequence[float] = (0.0, 1.0, 4.0), throws: int = 2
    ) -> None:
        letters = string.ascii_lowercase[: len(means)]
        if not 1 <= len(means) <= len(letters) or len(spreads) != len(means):
            raise ValueError(f"means and spreads must be 1 to 26 numbers, as many of each; got {means}, {spreads}")
        if not 1 <= throws <= 6:
            raise ValueError(f"throws must be from 1 to 6, for {SIDES} ** throws outcomes; got {throws!r}")
        super().__init__(tokenizer=symbol_tokenizer(letters), max_new_tokens=throws)
        self.dice = dict(zip(letters, zip(means, spreads, strict=True), strict=True))
        self.best_score = max(0.0, *means)

    def prompts(self) -> list[Row]:
        """The empty prompt with every outcome of the rolls."""
        sides = range(1, SIDES + 1)
        return [{"prompt": "", "rolls": rolls} for rolls in itertools.product(sides, repeat=self.max_new_tokens)]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The mean of what the dice show; a throw that was not made shows 0."""
        return [
            sum(map(self.shows, text, rolls)) / self.max_new_tokens
            for text, rolls in zip(completions, columns["rolls"], strict=True)
        ]

    def shows(self, die: str, roll: int) -> float:
        """What a die shows at a roll."""
        mean, spread = self.dice[die]
        return mean + spread * (roll - (SIDES + 1) / 2) / ((SIDES - 1) / 2)
