"""Reverse: say the prompt backwards."""

from __future__ import annotations

from typing import Any

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task

from .copy import shares_right, strings


class Reverse(Task):
    """Say the prompt backwards, symbol by symbol, and stop.

    Description: the prompt is `length` symbols; the right response is the same symbols from the last to the first,
    and then the end token.
    Observation: the prompt and what was said so far, token ids.
    Actions: the end token and the `symbols`.
    Score: the share of the `length + 1` places (the symbols and the end) that are right, counted from the left.
    Episode end: the end token, or `length + 1` tokens.
    What it teaches: credit over a horizon, where the place to attend to moves against the place to write.
    Optimum: 1, the prompt backwards and the end token.

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
        targets = [prompt[::-1] for prompt in prompts]
        end = self.eos_token_id
        return shares_right(targets, completions, [ids[-1] == end for ids in columns["completion_ids"]])
