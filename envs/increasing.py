"""Increasing: numbers in rising order."""

from __future__ import annotations

from typing import Any

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task


class Increasing(Task):
    """Say numbers, each larger than the one before.

    Description: the prompt is empty. The first number counts, and every later one that is larger than the one right
    before it. With as many numbers as tokens, starting high leaves no room: the early choices decide.
    Observation: the begin token and the numbers so far, token ids.
    Actions: the end token and the numbers from 0 up.
    Score: numbers that count, divided by `length`; paid at each token (`dense`), or all of it at the end.
    Episode end: the end token, or `length` tokens.
    What it teaches: dense against final reward on one and the same score; greedy choices that cost later.
    Optimum: 1, at the default size 0, 1, 2, 3, 4 and nothing else.

    Args:
        numbers: how many there are.
        length: the horizon, in tokens.
        dense: whether the reward comes with each token.
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, numbers: int = 5, length: int = 5, dense: bool = True) -> None:
        if not 1 <= length <= numbers:
            raise ValueError(f"length must be from 1 to numbers={numbers}; got {length!r}")
        super().__init__(tokenizer=symbol_tokenizer([f"{i} " for i in range(numbers)]), max_new_tokens=length)
        self.dense = dense

    def prompts(self) -> list[Row]:
        """The empty prompt."""
        return [{"prompt": ""}]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float] | list[list[float]]:
        """The share of numbers that rise: token by token when `dense`, else the sum."""
        rewards = [self.rises(ids) for ids in columns["completion_ids"]]
        return rewards if self.dense else [sum(each) for each in rewards]

    def rises(self, ids: list[int]) -> list[float]:
        """1 / length for each number above the one before it, else 0."""
        share = 1 / self.max_new_tokens
        end = self.eos_token_id  # below every number, and before the first
        return [share if here > before else 0.0 for before, here in zip([end, *ids], ids, strict=False)]
