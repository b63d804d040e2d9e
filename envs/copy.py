"""Copy: repeat the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from operator import eq
from typing import Any

import numpy as np

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task

MOST_PROMPTS = 10_000
LONGEST = 1_000
END = "\U0010ffff"  # no character: no symbol either


def strings(symbols: str, length: int) -> list[str]:
    """Every string of `length` symbols; where there are more than 10,000, always the same 10,000 drawn at random.

    Raises:
        ValueError: for a length below 1, or above 1,000.
    """
    if not 1 <= length <= LONGEST:
        raise ValueError(f"length must be from 1 to {LONGEST:,}; got {length!r}")
    if len(symbols) ** length <= MOST_PROMPTS:
        return ["".join(each) for each in itertools.product(symbols, repeat=length)]
    drawn = np.random.default_rng(0).integers(len(symbols), size=(MOST_PROMPTS, length))
    return ["".join(symbols[i] for i in each) for each in drawn.tolist()]


def shares_right(targets: Iterable[str], completions: list[str], stopped: Iterable[bool]) -> list[float]:
    """The share of each target's places, and one more for the end right after it, that a completion has right."""
    return [
        sum(map(eq, target + END, text + END if stop else text)) / (len(target) + 1)
        for target, text, stop in zip(targets, completions, stopped, strict=True)
    ]


class Copy(Task):
    """Repeat the prompt, symbol by symbol, and stop.

    Description: the prompt is `length` symbols; the right response is the same symbols and then the end token.
    Observation: the prompt and what was said so far, token ids.
    Actions: the end token and the `symbols`.
    Score: the share of the `length + 1` places (the symbols and the end) that are right, counted from the left.
    Episode end: the end token, or `length + 1` tokens.
    What it teaches: credit over a horizon; a policy must attend to its prompt.
    Optimum: 1, the prompt and the end token (every prompt has one best response).

    Args:
        symbols: the alphabet, one character a symbol.
        length: symbols in a prompt; there are len(symbols) ** length prompts, of which at most 10,000 are used.
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, symbols: str = "abc", length: int = 3) -> None:
        self._prompts = strings(symbols, length)
        super().__init__(tokenizer=symbol_tokenizer(symbols), max_new_tokens=length + 1)

    def prompts(self) -> list[Row]:
        """The strings."""
        return [{"prompt": prompt} for prompt in self._prompts]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The share of places that are right; the end counts as a place."""
        end = self.eos_token_id
        return shares_right(prompts, completions, [ids[-1] == end for ids in columns["completion_ids"]])
