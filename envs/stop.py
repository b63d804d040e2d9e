"""Stop: when to end."""

from __future__ import annotations

from typing import Any

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task


class Stop(Task):
    """Go as far as the prompt allows, and end in time.

    Description: the prompt is a limit of n strokes. Every stroke said is worth 1/n, up to the limit; going over it, or
    never saying the end token, is worth nothing.
    Observation: the prompt and the strokes so far, token ids.
    Actions: the end token and the stroke.
    Score: strokes / n for a response that ended by itself with at most n strokes; else 0.
    Episode end: the end token, or `longest` + 2 tokens.
    What it teaches: the value of the end token, and length bias: an objective that averages over tokens, or a
    penalty on each, moves the place where the policy stops.
    Optimum: 1, exactly n strokes and the end token.

    Args:
        longest: limits go from 1 to this.
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, longest: int = 6) -> None:
        if longest < 1:
            raise ValueError(f"longest must be at least 1; got {longest!r}")
        self.longest = longest
        super().__init__(tokenizer=symbol_tokenizer("|"), max_new_tokens=longest + 2)

    def prompts(self) -> list[Row]:
        """One limit a prompt."""
        return [{"prompt": "|" * n} for n in range(1, self.longest + 1)]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The share of the limit that was used."""
        stopped = (ids[-1] == self.eos_token_id for ids in columns["completion_ids"])
        return [
            len(text) / len(prompt) if stop and len(text) <= len(prompt) else 0.0
            for prompt, text, stop in zip(prompts, completions, stopped, strict=True)
        ]
