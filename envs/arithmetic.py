"""Arithmetic: a sum with an answer that can be checked."""

from __future__ import annotations

import itertools
from typing import Any

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task

LARGEST = 99
"""10,000 prompts."""


class Arithmetic(Task):
    """Work out a sum, in as many words as fit, and give the answer after "=".

    Description: the prompt is "a+b" with a and b from 0 to `largest`. The response may hold anything; what stands
    after its last "=" is the answer.
    Observation: the prompt and the response so far, token ids.
    Actions: the end token, the digits, "+" and "=".
    Score: 1 for the right answer, else 0.
    Episode end: the end token, or `max_new_tokens` tokens.
    What it teaches: a verifiable reward that looks at the outcome only; the tokens before the answer are free.
    Optimum: 1, for instance "=5" for 2+3.

    Args:
        largest: the largest number in a sum; there are (largest + 1) ** 2 prompts.
        max_new_tokens: the horizon.
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, largest: int = 3, max_new_tokens: int = 4) -> None:
        if not 0 <= largest <= LARGEST:
            raise ValueError(f"largest must be from 0 to {LARGEST}; got {largest!r}")
        if max_new_tokens < len(str(2 * largest)) + 1:
            raise ValueError(f'max_new_tokens must leave room for "=" and {2 * largest}; got {max_new_tokens!r}')
        self.largest = largest
        super().__init__(tokenizer=symbol_tokenizer("0123456789+="), max_new_tokens=max_new_tokens)

    def prompts(self) -> list[Row]:
        """Every sum, with its answer."""
        numbers = range(self.largest + 1)
        return [{"prompt": f"{a}+{b}", "answer": str(a + b)} for a, b in itertools.product(numbers, repeat=2)]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """1 where the text after the last "=" is the answer."""
        said = [text.rpartition("=") for text in completions]
        return [
            float(bool(equals) and after == answer)
            for (_, equals, after), answer in zip(said, columns["answer"], strict=True)
        ]
