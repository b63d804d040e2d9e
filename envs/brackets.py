"""Brackets: close what was opened."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task

CLOSER = {"(": ")", "[": "]"}
DEEPEST = 13
"""2 ** 13 prompts."""


class Brackets(Task):
    """Close every bracket in the right order, and use the room there is.

    Description: the prompt opens `depth` brackets of two kinds; prompt and response together must be balanced. New
    brackets may be opened on the way, and the more brackets the better.
    Observation: the prompt and the brackets so far, token ids.
    Actions: the end token and "(", ")", "[", "]". The mask advises tokens after which a balanced text is still
    possible; where none is any more, the end token.
    Score: brackets said, divided by `length`, if the whole is balanced; else 0.
    Episode end: the end token, or `length` tokens.
    What it teaches: dependencies over a distance, and action masks: with them every response is balanced.
    Optimum: 1, any balanced text that is as long as the horizon allows.

    Args:
        depth: brackets that a prompt opens; there are 2 ** depth prompts.
        length: the horizon, in tokens; as even or odd as `depth`, and not below it.
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, depth: int = 2, length: int = 6) -> None:
        if not 1 <= depth <= DEEPEST:
            raise ValueError(f"depth must be from 1 to {DEEPEST}; got {depth!r}")
        if length < depth or (length - depth) % 2:
            raise ValueError(f"length must be depth={depth} (at least 1) or 2, 4, ... more; got {length!r}")
        self.depth = depth
        super().__init__(tokenizer=symbol_tokenizer("()[]"), max_new_tokens=length)
        # By token id: (1, )2, [3, ]4; 0 is the end.
        self.change = np.array([0, 1, -1, 1, -1, 0])  # of the depth; the last is for "nothing written yet"
        self.kind = np.array([0, 1, 1, 2, 2, 0])

    def prompts(self) -> list[Row]:
        """Every string of `depth` opening brackets."""
        return [{"prompt": "".join(each)} for each in itertools.product("([", repeat=self.depth)]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The length of a balanced response, as a share of the horizon."""
        room = self.max_new_tokens
        return [
            len(text) / room if balanced(prompt + text) else 0.0
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    def allowed_tokens(self, rows: Sequence[Row], responses: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The tokens that keep a balanced text possible: (B, T) -> (B, V)."""
        prompts = [self.encode(row)[1:] for row in rows]
        opened = np.full((len(rows), max(map(len, prompts))), self.vocab_size)  # (B, P), from the left
        for each, prompt in zip(opened, prompts, strict=True):
            each[: len(prompt)] = prompt
        tokens = np.concatenate([opened, responses], 1)
        each = np.arange(len(tokens))
        depth = np.zeros(len(tokens), dtype=np.int64)
        broken = np.zeros(len(tokens), dtype=np.bool_)
        stack = np.zeros((len(tokens), tokens.shape[1] + 1), dtype=np.int64)  # kinds; what is open stands at depth - 1
        for column in tokens.T:
            change, kind = self.change[column], self.kind[column]
            broken |= (change < 0) & (stack[each, depth - 1] != kind)  # at depth 0 this looks at the last, always 0
            stack[each[change > 0], depth[change > 0]] = kind[change > 0]
            depth = np.where(broken, 0, depth + change)
        room = self.max_new_tokens - (responses != self.vocab_size).sum(1)
        broken |= depth > room
        depth = np.where(broken, 0, depth)
        top = stack[each, depth - 1]
        allowed = np.zeros((len(tokens), self.vocab_size), dtype=np.bool_)
        allowed[:, 0] = depth == 0
        allowed[:, 1] = allowed[:, 3] = depth + 1 <= room - 1
        allowed[:, 2], allowed[:, 4] = (depth > 0) & (top == 1), (depth > 0) & (top == 2)
        allowed[broken, 1:] = False
        return allowed


def balanced(text: str) -> bool:
    """Whether every bracket is closed by its kind, the last opened first."""
    expected: list[str] = []
    for bracket in text:
        if bracket in CLOSER:
            expected.append(CLOSER[bracket])
        elif not expected or expected.pop() != bracket:
            return False
    return not expected
