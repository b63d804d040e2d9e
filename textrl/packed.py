"""Whole texts of different lengths through a flat forward: one list of tokens, padded for the attention alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .flat import Flat, attention


class Pad(torch.autograd.Function):
    """(n, ...) -> (B * S, ...) by `source`. Padding has no gradient: the list's is picked out of it, not summed up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, real: Tensor) -> Tensor:
        """`source` (B * S,) in n, `real` (n,) in B * S."""
        ctx.save_for_backward(real)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """(B * S, ...) -> (n, ...)."""
        (real,) = ctx.saved_tensors
        return grad.index_select(0, real), None, None


class Packed:
    """B rows of different lengths as one list of n tokens, row after row, and their causal attention.

    Args:
        lengths: (B,) tokens of each row that count; those after them are left out.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.batch, self.width = len(lengths), int(lengths.max())
        real = torch.arange(self.width, device=lengths.device) < lengths[:, None]  # (B, S)
        self.full = bool(real.all())
        self.real = real.flatten().nonzero()[:, 0]  # (n,) places in (B * S)
        self.positions = self.real % self.width  # (n,)
        self.starts = lengths.cumsum(0) - lengths  # (B,)
        self.source = (real.flatten().cumsum(0) - 1).clamp(min=0)  # (B * S,) in n; padding repeats a real token

    def places(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where (rows, columns) stand in the list: (m,), (m,) -> (m,)."""
        return self.starts[rows] + columns

    def pack(self, x: Tensor) -> Tensor:
        """(B, S or more, ...) -> (n, ...)."""
        return x[:, : self.width].flatten(0, 1)[self.real]

    def pad(self, x: Tensor) -> Tensor:
        """(n, ...) -> (B, S, ...); padding, which comes last and is never attended to, holds other tokens' numbers."""
        if not self.full:
            x = Pad.apply(x, self.source, self.real)  # type: ignore[no-untyped-call]
        return x.view(self.batch, self.width, *x.shape[1:])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each row: (n, H, D), (n, G, D) twice -> (n, H * D)."""
        q, k, v = (self.pad(x).transpose(1, 2) for x in (q, k, v))  # (B, H or G, S, D)
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        out = attention(q, k, v, causal=True).transpose(1, 2).flatten(2).flatten(0, 1)  # (B * S, H * D)
        return out if self.full else out.index_select(0, self.real)


def states_at(
    flat: Flat, tokens: Tensor, rows: Tensor, columns: Tensor, below: Tensor | None = None, first: int = 0
) -> Tensor:
    """A trunk's last states at the places (rows, columns), all other padding left out: (B, S) -> (m, d).

    Args:
        flat: the trunk.
        tokens: (B, S), left-aligned.
        rows: (m,), at least one.
        columns: (m,).
        below: (B, S, d), what the block `first` reads, where it is known.
        first: the first block that runs, with `below`.
    """
    lengths = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)
    lengths = lengths.scatter_reduce(0, rows, columns + 1, "amax")  # nothing after the last place is read
    packed = Packed(lengths)
    x = flat.embed(packed.pack(tokens), packed.positions) if below is None else packed.pack(below)
    return flat.run(x, packed.positions, packed.attend, packed.places(rows, columns), first)
