"""A language model that follows a batch of episodes one token at a time, each row at its own position."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .models import check_length, load_model
from .policy import CausalPolicy
from .probing import longest_text
from .slots import FlatSlots, Slots, WholeTexts, slots_for

if TYPE_CHECKING:
    from .task import Task


class StepwiseLM:
    """Next-token logits for a batch of observations, remembering what it has read.

    A row that grew by one token costs one token; a row that is as it was costs nothing when all are; any other row
    (a new episode, a restored snapshot) is read again from its start, the others are not. The model's forward runs
    once a step for the batch.

    Args:
        policy: the language model; V stands in an observation where nothing is written.
    """

    def __init__(self, policy: CausalPolicy) -> None:
        self.policy = policy
        self._slots: FlatSlots | Slots | WholeTexts | None = None
        self._seen: NDArray[np.int64] | None = None
        self._lengths: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._logits: Tensor | None = None
        self._parameters: list[Tensor] = []  # to walk over a model costs as much as a small step
        self._weights: Any = None

    def forget(self) -> None:
        """Drops what was read; weights that change in place are seen without it."""
        self._seen = self._slots = self._logits = None
        self._parameters = list(self.policy.model.parameters())

    def _stamp(self) -> Any:
        """What is another once weights were changed in place, moved, or given an adapter."""
        adapters = getattr(self.policy.model, "peft_config", None)
        return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self._parameters], bool(adapters)

    @torch.no_grad()
    def __call__(self, observations: NDArray[np.int64]) -> Tensor:
        """Observations (B, L) int64 -> next-token logits (B, V) float32."""
        lengths = (observations != self.policy.vocab_size).sum(1)  # (B,)
        if self._stamp() != self._weights:  # they have changed, whoever changed them
            self.forget()
            self._weights = self._stamp()
        if self._seen is None or self._seen.shape != observations.shape:
            self.forget()
            fresh = np.ones(len(observations), dtype=np.bool_)
            grown = ~fresh
        else:
            written = np.arange(observations.shape[1]) < self._lengths[:, None]  # (B, L)
            same = ((observations == self._seen) | ~written).all(1)
            grown = same & (lengths == self._lengths + 1)
            fresh = ~(same & (lengths == self._lengths)) & ~grown
        if grown.any() or fresh.any():
            self._logits = self._advance(observations, lengths, fresh, grown)
            self._seen, self._lengths = observations.copy(), lengths
        assert self._logits is not None
        return self._logits

    def _advance(self, observations: NDArray[np.int64], lengths: NDArray[np.int64], fresh: Any, grown: Any) -> Tensor:
        policy, device = self.policy, self.policy.device
        batch, width = observations.shape
        check_length(policy.model, int(lengths.max()))
        clean = np.where(observations == self.policy.vocab_size, 0, observations)
        ends = torch.from_numpy(lengths).to(device)
        if self._slots is None:
            self._slots = slots_for(policy, batch, width)
            self._logits = torch.zeros(batch, policy.vocab_size, device=device)
        logits = self._logits
        assert logits is not None
        if grown.any():  # rows that did not grow read their last token again, to the same effect
            newest = torch.from_numpy(clean[np.arange(batch), lengths - 1]).to(device)
            column = int(lengths[0]) - 1 if (lengths == lengths[0]).all() else None
            logits = policy.logits(self._slots.step(newest, ends - 1, column))
        if fresh.any():
            rows = np.flatnonzero(fresh)
            where = torch.from_numpy(rows).to(device)
            tokens = torch.from_numpy(clean[rows, : lengths[rows].max()]).to(device)
            logits = logits.clone()
            logits[where] = policy.logits(self._slots.read(tokens, ends[where], where))
        return logits


def check_positions(name: str, model: PreTrainedModel, task: Task) -> None:
    """Refuses a model that cannot read a task's longest text, where that is known: else the text itself is refused.

    Raises:
        ValueError: with both lengths.
    """
    length, limit = task.max_prompt_tokens + task.max_new_tokens, longest_text(model)
    if limit < length and not task.prompt_limit_assumed:
        raise ValueError(
            f"{name} reads at most {limit} tokens, but the task's prompt and response need {length}:"
            " lower max_prompt_tokens or max_new_tokens"
        )


def frozen_reference(reference: PreTrainedModel | str | Path, task: Task) -> tuple[PreTrainedModel, StepwiseLM]:
    """An environment's reference model, frozen, and the stepper that asks it."""
    model = load_model(reference, task.tokenizer, frozen=True, called="reference")
    check_positions("reference", model, task)
    return model, StepwiseLM(CausalPolicy(model, task.vocab_size))
