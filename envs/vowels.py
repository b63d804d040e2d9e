"""Vowels: say nothing else."""

from __future__ import annotations

from typing import Any

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task

VOWELS = "aeiou"


class Vowels(Task):
    """Say vowels.

    Description: the prompt is empty; every vowel said is worth a share of the score.
    Observation: what was said so far, token ids, after the begin token.
    Actions: the end token and the letters.
    Score: vowels said, divided by `length`.
    Episode end: the end token, or `length` tokens.
    What it teaches: the smallest sequence task: any vowel will do, stopping early costs.
    Optimum: 1, `length` vowels and no end token.

    Args:
        letters: the alphabet, one character a symbol.
        length: the horizon, in tokens.
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, letters: str = "abcde", length: int = 6) -> None:
        super().__init__(tokenizer=symbol_tokenizer(letters), max_new_tokens=length)
        self.best_score = float(any(letter in VOWELS for letter in letters))

    def prompts(self) -> list[Row]:
        """The empty prompt."""
        return [{"prompt": ""}]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The number of vowels, as a share of the horizon."""
        return [sum(letter in VOWELS for letter in text) / self.max_new_tokens for text in completions]
