"""A critic with a tokenizer of its own: it reads the text so far, where the policy reads tokens."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .policy import values_at
from .rollout import Rollout
from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

REMEMBERED = 8192
"""Texts whose tokens are kept: the epochs over a batch read the same ones again."""


class TextCritic:
    """The value of the state before each of the policy's tokens, from a model with another tokenizer.

    A state is worth what the critic says at the last of its own tokens that lies wholly inside the text so far, so it
    never reads ahead; where its tokens are longer than the policy's it may be some letters behind.

    Args:
        model: a scalar model.
        tokenizer: its own.
        task: whose tokenizer the policy has.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._begin: int = begin
        self._known: dict[tuple[tuple[int, ...], int], tuple[list[int], list[int]]] = {}

    def __call__(self, batch: Rollout) -> Tensor:
        """(B, T) float32, differentiable; 0 outside the agent's tokens."""
        lengths, starts = batch.response_lengths.tolist(), batch.prompt_lengths.tolist()
        read = [
            self._read(tuple(row[: start + length]), start)
            for row, start, length in zip(batch.tokens.tolist(), starts, lengths, strict=True)
        ]
        tokens = torch.zeros(len(read), max(len(ids) for ids, _ in read), dtype=torch.int64)
        places = torch.zeros(batch.action_mask.shape, dtype=torch.int64)  # (B, T) columns in `tokens`
        for i, (ids, columns) in enumerate(read):
            tokens[i, : len(ids)] = torch.tensor(ids)
            places[i, : len(columns)] = torch.tensor(columns)
        rows, steps = batch.action_mask.nonzero(as_tuple=True)
        device = self.model.device
        return batch.spread(values_at(self.model, tokens.to(device), rows, places.to(device)[rows, steps]))

    def _read(self, ids: tuple[int, ...], start: int) -> tuple[list[int], list[int]]:
        """The critic's tokens of a text, and where it stands before each of the policy's from `start` on."""
        key = (ids, start)
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            *before, whole = self.task.decode([ids[:end] for end in range(start, len(ids) + 1)], alone=True)
            said = self.tokenizer(
                whole, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
            )
            ends = [end for _, end in said["offset_mapping"]]
            columns = [bisect_right(ends, shared(text, whole)) for text in before]
            self._known[key] = [self._begin, *said["input_ids"]], columns
        return self._known[key]


def shared(one: str, other: str) -> int:
    """How many letters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def same_tokenizer(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers give the same ids for every text."""
    return one is other or one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
