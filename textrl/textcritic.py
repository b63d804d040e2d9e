"""A critic with a tokenizer of its own: it reads the text so far, where the policy reads tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .models import longest_text
from .policy import values_at
from .rollout import Rollout
from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

REMEMBERED = 8192
"""Texts whose tokens are kept: the epochs over a batch read the same ones again."""


class TextCritic:
    """The value of the state before each of the policy's tokens, from a model with another tokenizer.

    A state is worth what the critic says at the end of the text so far, in its own tokens of that text alone: how a
    longer text is cut says what comes next, on which the value of a state must not depend. Where the tokens of the text
    so far begin those of a longer one, both are read at once. A text longer than the model reads loses its beginning.

    Args:
        model: a scalar model.
        tokenizer: its own.
        task: whose tokenizer the policy has.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._begin: int = begin
        self._room = longest_text(model) - 1  # tokens after the first
        self._known: dict[tuple[tuple[int, ...], int], tuple[list[list[int]], list[tuple[int, int]]]] = {}

    def __call__(self, batch: Rollout) -> Tensor:
        """(B, T) float32, differentiable; 0 outside the agent's tokens."""
        lengths, starts = batch.response_lengths.tolist(), batch.prompt_lengths.tolist()
        texts: list[list[int]] = []
        places = torch.zeros(*batch.action_mask.shape, 2, dtype=torch.int64)  # (B, T, 2) rows and columns in `tokens`
        for i, (row, start, length) in enumerate(zip(batch.tokens.tolist(), starts, lengths, strict=True)):
            found, where = self._read(tuple(row[: start + length]), start)
            places[i, : len(where)] = torch.tensor(where) + torch.tensor([len(texts), 0])
            texts += found
        tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for line, ids in zip(tokens, texts, strict=True):
            line[: len(ids)] = torch.tensor(ids)
        device = self.model.device
        rows, columns = places.to(device)[batch.action_mask].T
        return batch.spread(values_at(self.model, tokens.to(device), rows, columns))

    def _read(self, ids: tuple[int, ...], start: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """The critic's tokens of the texts before each of the policy's from `start` on, and where each of them ends."""
        key = (ids, start)
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            before = self.task.decode([ids[:end] for end in range(start, len(ids))], alone=True)
            said = self.tokenizer(before, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            texts: list[list[int]] = []
            places: list[tuple[int, int]] = []
            for own in ([self._begin, *each[-self._room :]] for each in reversed(said)):  # the longest first
                row = next((i for i, text in enumerate(texts) if text[: len(own)] == own), len(texts))
                texts += [own] if row == len(texts) else []
                places.append((row, len(own) - 1))
            self._known[key] = texts, places[::-1]
        return self._known[key]


def same_tokenizer(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers give the same ids for every text."""
    return one is other or one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
