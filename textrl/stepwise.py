"""A language model that follows a batch of episodes one token at a time, each row at its own position."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .policy import CausalPolicy, load_model

if TYPE_CHECKING:
    from .task import Task


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, (B, H, W, D): token i of a row stands in column i."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates all columns at once."""
        shape = (self.slots.batch, key_states.shape[1], self.slots.width)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes new keys and values, (b, H, q, D), where `slots` says, and gives those to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        slots = self.slots
        if slots.prefill is not None:  # whole prompts of some rows: they attend to themselves alone
            self.keys[slots.prefill, :, : key_states.shape[2]] = key_states
            self.values[slots.prefill, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        if isinstance(slots.column, int):  # every row writes the same column
            self.keys[:, :, slots.column : slots.column + 1] = key_states
            self.values[:, :, slots.column : slots.column + 1] = value_states
        else:
            self.keys[slots.every_row, :, slots.column] = key_states[:, :, 0]
            self.values[slots.every_row, :, slots.column] = value_states[:, :, 0]
        return self.keys[:, :, : slots.used], self.values[:, :, : slots.used]

    def keep(self, rows: Tensor) -> None:
        """Drops every other row."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns attended to, and the first of them."""
        return self.slots.used, 0

    def get_seq_length(self) -> int:
        """Columns in use before this forward."""
        return 0 if self.slots.prefill is not None else self.slots.used - 1

    def get_max_length(self) -> int:
        """All columns."""
        return self.slots.width


class Slots:
    """A preallocated KV cache for B rows of at most W tokens, and the two ways to run a model over it."""

    def __init__(self, policy: CausalPolicy, batch: int, width: int) -> None:
        self.policy, self.batch, self.width = policy, batch, width
        self.every_row = torch.arange(batch, device=policy.device)
        self.prefill: Tensor | None = None
        self.column: int | Tensor = 0
        self.used = 0
        layers: int = policy.model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[SlotLayer(self) for _ in range(layers)])

    def read(self, tokens: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Starts rows anew: (b, S) left-aligned tokens -> next-token logits (b, V) float32."""
        self.prefill, self.used = rows, tokens.shape[1]
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        each = torch.arange(len(tokens), device=tokens.device)
        hidden = self.policy.hidden(
            tokens,
            each,
            lengths - 1,
            past_key_values=self.cache,
            position_ids=positions.expand(len(tokens), -1),
            use_cache=True,
        )
        self.prefill = None
        return self.policy.logits(hidden)

    def step(self, tokens: Tensor, columns: Tensor, column: int | None = None) -> Tensor:
        """Writes one token a row: (B,) tokens at (B,) columns -> next-token logits (B, V) float32.

        Args:
            tokens: the newest token of each row.
            columns: where it stands in its row.
            column: the same as one number where all rows agree: no mask is needed then.
        """
        self.used = int(columns.max()) + 1 if column is None else column + 1
        self.column = columns if column is None else column
        mask = None  # no mask: every column in use is attended to
        if column is None:
            mask = torch.arange(self.used, device=columns.device)[None] <= columns[:, None]  # (B, W)
            mask = additive(mask[:, None, None], self.policy.model)  # (B, 1, 1, W)
        hidden = self.policy.hidden(
            tokens[:, None],
            self.every_row,
            torch.zeros_like(self.every_row),
            past_key_values=self.cache,
            position_ids=columns[:, None],
            attention_mask=mask,
            use_cache=True,
        )
        return self.policy.logits(hidden)

    def keep(self, rows: Tensor) -> None:
        """Drops every row but these."""
        self.batch = len(rows)
        self.every_row = self.every_row[: len(rows)]
        for layer in self.cache.layers:
            layer.keep(rows)


def additive(mask: Tensor, model: PreTrainedModel) -> Tensor:
    """A bool mask as the model's attention wants it: bool for SDPA, else 0 and the smallest number."""
    if model.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


def cacheable(model: PreTrainedModel, width: int) -> bool:
    """Whether a model takes a KV cache of ours: plain full attention over at most `width` tokens."""
    if model.base_model is model or getattr(model, "_is_stateful", False):
        return False
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    return model.config._attn_implementation in ("sdpa", "eager") and (window is None or window >= width)


class StepwiseLM:
    """Next-token logits for a batch of observations, remembering what it has read.

    A row that grew by one token costs one token; a row that is as it was costs nothing when all are; any other row
    (a new episode, a restored snapshot) is read again from its start, the others are not. The model's forward runs
    once a step for the batch.

    Args:
        policy: the language model.
        fill: the number that stands in an observation where nothing is written (V).
    """

    def __init__(self, policy: CausalPolicy, fill: int) -> None:
        self.policy = policy
        self.fill = fill
        self._slots: Slots | None = None
        self._seen: NDArray[np.int64] | None = None
        self._lengths: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._logits: Tensor | None = None

    def forget(self) -> None:
        """Drops what was read: the weights have changed."""
        self._seen = self._slots = self._logits = None

    @torch.no_grad()
    def __call__(self, observations: NDArray[np.int64]) -> Tensor:
        """Observations (B, L) int64 -> next-token logits (B, V) float32."""
        lengths = (observations != self.fill).sum(1)  # (B,)
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
        clean = np.where(observations == self.fill, 0, observations)
        ends = torch.from_numpy(lengths).to(device)
        if not cacheable(policy.model, width):
            tokens = torch.from_numpy(clean[:, : lengths.max()]).to(device)
            return policy.logits(policy.hidden(tokens, torch.arange(batch, device=device), ends - 1))
        if self._slots is None:
            self._slots = Slots(policy, batch, width)
            self._logits = torch.zeros(batch, policy.vocab_size, device=device)
        logits = self._logits
        assert logits is not None
        if grown.any():  # rows that did not grow read their last token again, to the same effect
            newest = torch.from_numpy(clean[np.arange(batch), lengths - 1]).to(device)
            column = int(lengths[0]) - 1 if (lengths == lengths[0]).all() else None
            logits = self._slots.step(newest, ends - 1, column)
        if fresh.any():
            rows = np.flatnonzero(fresh)
            where = torch.from_numpy(rows).to(device)
            tokens = torch.from_numpy(clean[rows, : lengths[rows].max()]).to(device)
            logits = logits.clone()
            logits[where] = self._slots.read(tokens, ends[where], where)
        return logits


def frozen_reference(reference: PreTrainedModel | str | Path, task: Task) -> tuple[PreTrainedModel, StepwiseLM]:
    """An environment's reference model, frozen, and the stepper that asks it."""
    model = load_model(reference, task.tokenizer, frozen=True)
    return model, StepwiseLM(CausalPolicy(model, task.vocab_size), task.vocab_size)
