"""Copy: repeat the prompt."""

from __future__ import annotations

import itertools
from typing import Any

from textrl.task import Row, Task, symbol_tokenizer


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
        length: symbols in a prompt; there are len(symbols) ** length prompts.
    """

    def __init__(self, symbols: str = "abc", length: int = 3) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1; got {length!r}")
        super().__init__(tokenizer=symbol_tokenizer(symbols), max_new_tokens=length + 1)
        self.symbols, self.length = symbols, length

    def prompts(self) -> list[Row]:
        """Every string of `length` symbols."""
        return [{"prompt": "".join(p)} for p in itertools.product(self.symbols, repeat=self.length)]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The share of places that are right; the end counts as a place."""
        places = self.length + 1
        scores = []
        for prompt, text, ids in zip(prompts, completions, columns["completion_ids"], strict=True):
            right = sum(a == b for a, b in zip(prompt, text, strict=False))
            ended = len(ids) == places and ids[-1] == self.eos_token_id
            scores.append((right + ended) / places)
        return scores
