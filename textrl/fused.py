"""`TokenLogprobs` as two kernels for a GPU, which read the logits once and write their gradient over them once.

The logits stay in the dtype of the head, where the plain way goes ten times over a float32 table of them. The kernels
are written in Triton, which comes with PyTorch for GPUs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import runs
from .logprobs import NEVER, aligned, pieces

BLOCK = 2048
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _read(  # type: ignore[no-untyped-def]
    Z, stride, targets, allowed, mask_stride, logprobs, normalisers, entropies, scale, never,
    V: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of logits: log p of its target, log sum exp z, and H = log sum exp z - sum p z, in one pass."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full((BLOCK,), never, tl.float32)  # of each lane, as the two sums are
    total = tl.zeros((BLOCK,), tl.float32)  # sum exp(z - top)
    weighted = tl.zeros((BLOCK,), tl.float32)  # sum exp(z - top) z
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        z = tl.load(Z + row * stride + columns, mask=inside, other=0.0).to(tl.float32) * scale
        if MASKED:
            inside = inside & (tl.load(allowed + row * mask_stride + columns, mask=inside, other=0) != 0)
        z = tl.where(inside, z, never)
        higher = tl.maximum(top, z)
        shrink, p = tl.exp(top - higher), tl.where(inside, tl.exp(z - higher), 0.0)
        total, weighted, top = total * shrink + p, weighted * shrink + p * z, higher
    highest = tl.max(top, 0)
    shrink = tl.exp(top - highest)
    total, weighted = tl.sum(total * shrink, 0), tl.sum(weighted * shrink, 0)
    normaliser = highest + tl.log(total)
    column = tl.load(targets + row)
    target = tl.load(Z + row * stride + column).to(tl.float32) * scale
    if MASKED:
        target = tl.where(tl.load(allowed + row * mask_stride + column) != 0, target, never)
    tl.store(logprobs + row, target - normaliser)
    tl.store(normalisers + row, normaliser)
    tl.store(entropies + row, normaliser - weighted / total)


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    Z, stride, targets, allowed, mask_stride, normalisers, entropies, grads, entropy_grads, scale, never,
    V: tl.constexpr, W: tl.constexpr, MASKED: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's gradient over its logits, zero in the columns from V to W."""
    row = tl.program_id(0).to(tl.int64)
    normaliser, grad = tl.load(normalisers + row), tl.load(grads + row)
    target = tl.load(targets + row).to(tl.int32)
    if ENTROPY:
        entropy, entropy_grad = tl.load(entropies + row), tl.load(entropy_grads + row)
    for start in range(0, W, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < V
        logp = tl.load(Z + row * stride + columns, mask=inside, other=0.0).to(tl.float32) * scale - normaliser
        if MASKED:
            inside = inside & (tl.load(allowed + row * mask_stride + columns, mask=inside, other=0) != 0)
        logp = tl.where(inside, logp, never)
        out = -tl.exp(logp) * grad
        if ENTROPY:
            out -= tl.exp(logp) * entropy_grad * (logp + entropy)
        out = tl.where(columns == target, out + grad, out) * scale
        tl.store(Z + row * stride + columns, out.to(Z.dtype.element_ty), mask=columns < W)


class FusedLogprobs(torch.autograd.Function):
    """Hidden states and targets -> log-probabilities and entropies, as `TokenLogprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        allowed: Tensor | None,
        temperature: float,
        entropy: bool,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """(n, d), (V, d), (n,), (n, V) or None -> (n,), (n,) or None; `keep`: the logits, for the backward pass."""
        head = aligned(weight)  # (W, d)
        kept = hidden.new_empty(len(targets), len(head)) if keep else None
        logprobs, normalisers, entropies = torch.empty(3, len(targets), device=hidden.device)
        for piece in pieces(len(targets), len(head), hidden.device):
            table = torch.mm(hidden[piece], head.t(), out=None if kept is None else kept[piece])
            mask = None if allowed is None else allowed[piece]
            _launch(
                _read, table, targets[piece], mask, logprobs[piece], normalisers[piece], entropies[piece],
                1 / temperature, NEVER, V=len(weight), MASKED=mask is not None,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, allowed, normalisers, entropies)
        ctx.temperature, ctx.kept = temperature, kept
        return logprobs, entropies if entropy else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        """The gradients of the hidden states and of the head."""
        hidden, weight, targets, allowed, normalisers, entropies = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # it is written over: a second backward pass makes it again
        head = aligned(weight)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        grad = torch.zeros_like(normalisers) if grad is None else grad.contiguous()
        over = grad if grad_entropy is None else grad_entropy.contiguous()  # read only where there is one
        for piece in pieces(len(targets), len(head), hidden.device):
            table = torch.mm(hidden[piece], head.t()) if kept is None else kept[piece]
            mask = None if allowed is None else allowed[piece]
            _launch(
                _write, table, targets[piece], mask, normalisers[piece], entropies[piece], grad[piece], over[piece],
                1 / ctx.temperature, NEVER, V=len(weight), W=len(head), MASKED=mask is not None,
                ENTROPY=grad_entropy is not None,
            )  # fmt: skip
            if grad_hidden is not None:
                torch.mm(table, head, out=grad_hidden[piece])
            if grad_head is not None:
                grad_head.addmm_(table.t(), hidden[piece])
        return grad_hidden, None if grad_head is None else grad_head[: len(weight)], None, None, None, None, None


def _launch(
    kernel: Any, table: Tensor, targets: Tensor, mask: Tensor | None, *arguments: Any, **constants: int
) -> None:
    """A program for each row of a table."""
    if len(table):
        seen = table if mask is None else mask.view(torch.uint8)
        kernel[(len(table),)](
            table, table.stride(0), targets, seen, seen.stride(0), *arguments, BLOCK=BLOCK, num_warps=WARPS, **constants
        )  # fmt: skip


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels compile and run on this device; where they do not, a warning says why."""
    hidden, targets = torch.ones(1, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    arguments = (hidden, hidden, targets, None, 1.0, True, False)
    return runs(lambda: FusedLogprobs.apply(*arguments), "log-probabilities take")  # type: ignore[no-untyped-call]
