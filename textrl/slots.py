"""What a model has read of a batch of rows, each at its own position, and the ways to run it one token further."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from .flat import Attend, Flat, attention, flat_of
from .heads import head_of
from .kernels import kernels_for
from .packed import Packed
from .policy import CausalPolicy
from .probing import agree, attempt, once, some_tokens


class FlatSlots:
    """B rows of at most W tokens over a flat forward: keys and values (B, G, W, D) a layer, token i in column i."""

    def __init__(self, policy: CausalPolicy, flat: Flat, batch: int, width: int) -> None:
        self.flat, self.width = flat, width
        self.kernels = kernels_for("decoding", policy.device)
        self.every_row = torch.arange(batch, device=policy.device)
        shape = (2, flat.layers, batch, flat.groups, width, flat.head_dim)
        self.cache = torch.zeros(shape, dtype=policy.model.dtype, device=policy.device)

    def read(self, tokens: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Starts rows anew: (b, S) left-aligned tokens -> what the head reads after each row's last, (b, d)."""
        packed = Packed(lengths)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for part, new in ((0, k), (1, v)):
                cache = self.cache[part, layer]
                cache[rows, :, : packed.width] = packed.pad(new).transpose(1, 2).to(cache.dtype)
            return packed.attend(layer, q, k, v)

        x = self.flat.embed(packed.pack(tokens), packed.positions)
        last = packed.places(torch.arange(len(lengths), device=lengths.device), lengths - 1)
        return self.flat.run(x, packed.positions, attend, last)

    def step(self, tokens: Tensor, columns: Tensor, column: int | None = None) -> Tensor:
        """Writes one token a row: (B,) tokens at (B,) columns -> what the head reads, (B, d).

        Args:
            tokens: the newest token of each row.
            columns: where it stands in its row.
            column: the same as one number where all rows agree: no mask is needed then.
        """
        if self.kernels is not None:
            return self._run(tokens, columns, lambda *qkv: self._attend_fused(columns, *qkv))
        used, mask = self.width, None
        if column is not None:
            used = column + 1
        else:
            if columns.device.type == "cpu":  # elsewhere the shapes stay as they are, and nothing waits for a number
                used = int(columns.max()) + 1
            mask = (torch.arange(used, device=columns.device) <= columns[:, None])[:, None, None]  # (B, 1, 1, W)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[0, layer], self.cache[1, layer]
            for cache, new in ((keys, k), (values, v)):
                if column is None:
                    cache[self.every_row, :, columns] = new
                else:
                    cache[:, :, column] = new
            q = q.reshape(
                len(q), self.flat.groups, -1, self.flat.head_dim
            )  # (B, G, H / G, D): a group asks the same keys
            keys, values = keys[:, :, :used], values[:, :, :used]
            return attention(q, keys, values, mask).flatten(1)

        return self._run(tokens, columns, attend)

    def _run(self, tokens: Tensor, columns: Tensor, attend: Attend) -> Tensor:
        return self.flat.run(self.flat.embed(tokens, columns), columns, attend)

    def _attend_fused(self, columns: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """No mask, and no more of the cache than is written."""
        assert self.kernels is not None
        attended: Tensor = self.kernels.attend(q, k, v, columns, self.cache[0, layer], self.cache[1, layer])
        return attended.flatten(1)

    def keep(self, rows: Tensor) -> None:
        """Drops every row but these."""
        self.cache = self.cache[:, :, rows]
        self.every_row = self.every_row[: len(rows)]


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
    """B rows of at most W tokens over a model's own forward, as a `Cache` that transformers takes."""

    def __init__(self, policy: CausalPolicy, batch: int, width: int) -> None:
        self.policy, self.batch, self.width = policy, batch, width
        self.every_row = torch.arange(batch, device=policy.device)
        self.prefill: Tensor | None = None
        self.column: int | Tensor = 0
        self.used = 0
        layers: int = policy.model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[SlotLayer(self) for _ in range(layers)])

    def read(self, tokens: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Starts rows anew: (b, S) left-aligned tokens -> what the head reads after each row's last, (b, d)."""
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
        return hidden

    def step(self, tokens: Tensor, columns: Tensor, column: int | None = None) -> Tensor:
        """Writes one token a row: (B,) tokens at (B,) columns -> what the head reads, (B, d).

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
        return hidden

    def keep(self, rows: Tensor) -> None:
        """Drops every row but these."""
        self.batch = len(rows)
        self.every_row = self.every_row[: len(rows)]
        for layer in self.cache.layers:
            layer.keep(rows)


class WholeTexts:
    """B rows of at most W tokens, read whole again at every token, for models that take no cache of ours."""

    def __init__(self, policy: CausalPolicy, batch: int, width: int) -> None:
        self.policy = policy
        self.tokens = torch.zeros(batch, width, dtype=torch.int64, device=policy.device)
        self.every_row = torch.arange(batch, device=policy.device)

    def read(self, tokens: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """Starts rows anew: (b, S) left-aligned tokens -> what the head reads after each row's last, (b, d)."""
        self.tokens[rows, : tokens.shape[1]] = tokens
        return self.policy.hidden(tokens, self.every_row[: len(rows)], lengths - 1)

    def step(self, tokens: Tensor, columns: Tensor, column: int | None = None) -> Tensor:
        """Writes one token a row: (B,) tokens at (B,) columns -> what the head reads, (B, d)."""
        self.tokens[self.every_row, columns] = tokens
        return self.policy.hidden(self.tokens[:, : int(columns.max()) + 1], self.every_row, columns)

    def keep(self, rows: Tensor) -> None:
        """Drops every row but these."""
        self.tokens, self.every_row = self.tokens[rows], self.every_row[: len(rows)]


def additive(mask: Tensor, model: PreTrainedModel) -> Tensor:
    """A bool mask as the model's attention wants it: bool for SDPA, else 0 and the smallest number."""
    if model.config._attn_implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


def cacheable(model: PreTrainedModel, width: int) -> bool:
    """Whether a model takes a KV cache of ours: plain full attention over at most `width` tokens.

    Not one that counts places from the columns of a cache (local attention of GPT-Neo, ALiBi), nor one that turns all
    keys in another way once a text is long (longrope, dynamic): our rows stand in columns that are not their places.
    """
    if model.base_model is model or getattr(model, "_is_stateful", False):
        return False
    config = model.config.get_text_config()
    local = "local" in (getattr(config, "attention_layers", None) or ())
    window = getattr(config, "window_size" if local else "sliding_window", None)
    nested = getattr(config, "attn_config", None)  # of MPT
    alibi = config.model_type == "bloom" or getattr(config, "alibi", False) or getattr(nested, "alibi", False)
    rope = getattr(config, "rope_parameters", None) or {}
    if alibi or rope.get("rope_type") in ("longrope", "dynamic"):
        return False
    return model.config._attn_implementation in ("sdpa", "eager") and (not window or window >= width)


@once
def remembers(model: PreTrainedModel) -> bool:
    """Whether a model says the same of rows of two lengths that it reads token by token as of the whole texts."""
    policy = CausalPolicy(model, model.config.get_text_config().vocab_size)
    tokens, lengths, rows = some_tokens(model, 2, 6), torch.tensor([2, 4], device=model.device), torch.arange(2)

    def alike() -> bool:
        slots = Slots(policy, 2, 6)
        found = [slots.read(tokens[:, :4], lengths, rows)]
        found += [slots.step(tokens[rows, lengths + t], lengths + t) for t in range(2)]
        right = [policy.hidden(tokens, rows, lengths + t) for t in (-1, 0, 1)]
        return agree(torch.stack(found), torch.stack(right))

    return tokens.shape[1] == 6 and attempt(alike)


def slots_for(policy: CausalPolicy, batch: int, width: int) -> FlatSlots | Slots | WholeTexts:
    """The fastest way that a model takes to read B rows of at most W tokens one token at a time."""
    if not cacheable(policy.model, width):
        return WholeTexts(policy, batch, width)
    flat = flat_of(policy.model) if head_of(policy.model) is not None else None
    if flat is not None:
        return FlatSlots(policy, flat, batch, width)
    return (Slots if remembers(policy.model) else WholeTexts)(policy, batch, width)
