"""A token's attention over the cache, and the draw from its logits, as one kernel each, for a GPU.

While sampling, a GPU reads the weights, the cache and the logits, and computes little: what counts is that each is read
once, and no more of the cache than is written. The kernels are written in Triton, which comes with PyTorch for GPUs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import runs

TILE = 16
"""Places of the cache that are read at a time."""
BLOCK = 2048
"""Logits that are read at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    Q, K, V, columns, keys, values, out, q_stride, k_stride, v_stride, scale, H, G,
    D: tl.constexpr, LANES: tl.constexpr, W: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One head of one row: its query to the keys before its column and to its own, softmax in one pass."""
    row, head = tl.program_id(0) // H, tl.program_id(0) % H
    group = head // (H // G)
    lanes = tl.arange(0, LANES)
    wide = lanes < D
    column = tl.load(columns + row)
    q = tl.load(Q + row * q_stride + head * D + lanes, mask=wide, other=0.0).to(tl.float32) * scale
    own_key = tl.load(K + row * k_stride + group * D + lanes, mask=wide, other=0.0)
    own_value = tl.load(V + row * v_stride + group * D + lanes, mask=wide, other=0.0)
    cache = (row * G + group).to(tl.int64) * W * D
    top = tl.sum(q * own_key.to(tl.float32), 0)
    total = top * 0.0 + 1.0  # sum exp(score - top)
    mixed = own_value.to(tl.float32)  # sum exp(score - top) value
    for start in range(0, W, TILE):
        if start < column:
            places = start + tl.arange(0, TILE)
            before = places < column
            cells = cache + places[:, None] * D + lanes[None, :]
            here = before[:, None] & wide[None, :]
            scores = tl.sum(tl.load(keys + cells, mask=here, other=0.0).to(tl.float32) * q[None, :], 1)
            scores = tl.where(before, scores, -1e30)
            higher = tl.maximum(top, tl.max(scores, 0))
            shrink, p = tl.exp(top - higher), tl.exp(scores - higher)
            total = total * shrink + tl.sum(p, 0)
            mixed = mixed * shrink + tl.sum(
                tl.load(values + cells, mask=here, other=0.0).to(tl.float32) * p[:, None], 0
            )
            top = higher
    if head % (H // G) == 0:
        tl.store(keys + cache + column * D + lanes, own_key, mask=wide)
        tl.store(values + cache + column * D + lanes, own_value, mask=wide)
    tl.store(out + row * H * D + head * D + lanes, (mixed / total).to(out.dtype.element_ty), mask=wide)


@triton.jit  # type: ignore[untyped-decorator]
def _draw(  # type: ignore[no-untyped-def]
    Z, stride, uniforms, tokens, logprobs, scale, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row of logits: the first token whose cumulative weight exceeds u times the whole, and its log p."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), -1e30, tl.float32)  # of each lane, as the sum is
    total = tl.zeros((BLOCK,), tl.float32)  # sum exp(z - top)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(Z + row * stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32) * scale
        higher = tl.maximum(top, z)
        total, top = total * tl.exp(top - higher) + tl.exp(z - higher), higher
    highest = tl.max(top, 0)
    whole = tl.sum(total * tl.exp(top - highest), 0)
    point = tl.load(uniforms + row) * whole
    below = point * 0.0  # the weight of the blocks before
    token = tl.load(tokens + row) * 0
    last = token
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(Z + row * stride + columns, mask=columns < V, other=-float("inf")).to(tl.float32) * scale
        p = tl.exp(z - highest)
        cumulative = below + tl.cumsum(p, 0)
        token += tl.sum(((cumulative <= point) & (columns < V)).to(tl.int64), 0)
        last = tl.maximum(last, tl.max(tl.where(p > 0, columns, 0), 0).to(tl.int64))
        below += tl.sum(p, 0)
    token = tl.minimum(token, last)  # a point that rounding put at the end
    tl.store(tokens + row, token)
    z = tl.load(Z + row * stride + token).to(tl.float32) * scale
    tl.store(logprobs + row, z - highest - tl.log(whole))


def attend(q: Tensor, k: Tensor, v: Tensor, columns: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Writes a token's key and value into the cache and attends to all up to it.

    Args:
        q: (B, H, D).
        k: (B, G, D).
        v: (B, G, D).
        columns: (B,) int64, where the token stands in its row.
        keys: (B, G, W, D), contiguous; what is before `columns` has been written.
        values: (B, G, W, D), likewise.

    Returns:
        (B, H, D).
    """
    (batch, heads, dim), groups = q.shape, k.shape[1]
    q, k, v = (x if x.stride()[1:] == (dim, 1) else x.contiguous() for x in (q, k, v))
    out = q.new_empty(batch, heads, dim)
    _attend[(batch * heads,)](
        q, k, v, columns, keys, values, out, q.stride(0), k.stride(0), v.stride(0), dim**-0.5, heads, groups,
        D=dim, LANES=triton.next_power_of_2(dim), W=keys.shape[2], TILE=TILE, num_warps=1,
    )  # fmt: skip
    return out


def draw_plainly(logits: Tensor, vocab_size: int, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token a row from softmax(logits[:, :V] / temperature) by the inverse of the cumulative distribution.

    Args:
        logits: (B, V or more), any float dtype.
        vocab_size: V.
        uniforms: (B,) float32 in [0, 1).
        temperature: divides the logits.

    Returns:
        tokens (B,) int64 and their log-probabilities (B,) float32.
    """
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(len(logits), device=logits.device)
    _draw[(len(logits),)](
        logits, logits.stride(0), uniforms, tokens, logprobs, 1 / temperature, V=vocab_size, BLOCK=BLOCK, num_warps=8
    )
    return tokens, logprobs


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels compile and run on this device; where they do not, a warning says why."""

    def both() -> Any:
        one, cache = torch.ones(1, 1, 16, device=device), torch.zeros(2, 1, 1, 1, 16, device=device)
        attend(one, one, one, torch.zeros(1, dtype=torch.int64, device=device), cache[0], cache[1])
        return draw_plainly(one[0], 16, torch.zeros(1, device=device), 1.0)

    return runs(both, "sampling takes")
