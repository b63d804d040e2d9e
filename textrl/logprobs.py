"""Log-probabilities of tokens under a plain head, a chunk of rows at a time, with a backward pass of its own.

With z = W h / temperature and log p = z - log sum exp z, only log p is ever made, and its gradient is written over it:

    d log p(t) / dz = onehot(t) - p,      dH / dz = -p * (log p + H)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kernels import kernels_for

CHUNK_BYTES = 16 * 2**20
"""Float32 logits are made at most this many bytes at a time: so much fits a cache, and is reused by an allocator."""
KEEP_BYTES = 128 * 2**20
"""As many bytes of them at most wait for the backward pass; beyond that they are made again."""
GPU_CHUNK, GPU_KEEP = 1 / 64, 1 / 16
"""The same on a GPU, as shares of its memory: small matrix products leave it idle."""
NEVER = -1e30
"""A logit whose probability is zero, and which a gradient may multiply without becoming infinite."""


class TokenLogprobs(torch.autograd.Function):
    """Hidden states and targets -> log-probabilities and entropies; see `token_logprobs`."""

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
        """(n, d), (V, d), (n,), (n, V) or None -> (n,), (n,) or None; `keep`: for the backward pass."""
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        entropies = torch.empty_like(logprobs) if entropy else None
        kept = torch.empty(len(targets), len(weight), device=hidden.device) if keep else None
        chunks = pieces(len(targets), len(weight), weight.device)
        work = workspace(chunks, hidden, weight, 1 if keep else 2)
        for piece in chunks:
            logits = work[0, : piece.stop - piece.start]
            table = work[1, : len(logits)] if kept is None else kept[piece]
            log_softmax(hidden[piece], weight, temperature, None if allowed is None else allowed[piece], logits, table)
            logprobs[piece] = table.gather(-1, targets[piece, None])[:, 0]
            if entropies is not None:
                entropies[piece] = -torch.exp(table, out=logits).mul_(table).sum(-1)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets, allowed, entropies)
        ctx.temperature, ctx.kept = temperature, kept
        return logprobs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> Any:
        """The gradients of the hidden states and of the head."""
        hidden, weight, targets, allowed, entropies = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # it is written over: a second backward pass makes it again
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad = torch.zeros_like(targets, dtype=torch.float32) if grad is None else grad
        chunks = pieces(len(targets), len(weight), weight.device)
        work = workspace(chunks, hidden, weight, (kept is None) + (kept is None or grad_entropy is not None))
        for piece in chunks:
            if kept is None:
                mask, table = None if allowed is None else allowed[piece], work[1, : piece.stop - piece.start]
                log_softmax(hidden[piece], weight, ctx.temperature, mask, work[0, : len(table)], table)
            else:
                table = kept[piece]
            here = grad[piece, None]
            if grad_entropy is None:
                table.exp_().mul_(-here)
            else:
                p = torch.exp(table, out=work[0, : len(table)])
                table.add_(entropies[piece, None]).mul_(-grad_entropy[piece, None]).sub_(here).mul_(p)
            table.scatter_add_(-1, targets[piece, None], here)
            if ctx.temperature != 1:
                table.div_(ctx.temperature)
            table = table.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(table, weight, out=grad_hidden[piece])
            if grad_weight is not None:
                grad_weight.addmm_(table.t(), hidden[piece])
        return grad_hidden, grad_weight, None, None, None, None, None


def budget(device: torch.device) -> tuple[int, int]:
    """Bytes of logits that are made at a time, and that may wait for the backward pass."""
    if device.type != "cuda":
        return CHUNK_BYTES, KEEP_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return int(GPU_CHUNK * memory), int(GPU_KEEP * memory)


def pieces(count: int, vocab_size: int, device: torch.device) -> list[slice]:
    """The rows of each chunk."""
    size = max(1, budget(device)[0] // (4 * vocab_size))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def aligned(weight: Tensor) -> Tensor:
    """The rows of a head, (V, d), and zeros up to a multiple of 64: a GPU multiplies 50,257 rows 7 times as slowly."""
    return nn.functional.pad(weight, (0, 0, 0, -len(weight) % 64)) if len(weight) % 64 else weight


def workspace(chunks: list[slice], hidden: Tensor, weight: Tensor, tables: int) -> Tensor:
    """Room for some tables of one chunk, (tables, n, V) float32: made once, because large memory is slow to get."""
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    return torch.empty(tables, rows, len(weight), device=hidden.device)


def log_softmax(
    hidden: Tensor, weight: Tensor, temperature: float, allowed: Tensor | None, logits: Tensor, out: Tensor
) -> None:
    """Log-probabilities of all tokens, over the allowed ones: (n, d), (V, d), (n, V) or None -> `out` (n, V) float32.

    `logits`, (n, V) float32, is written over.
    """
    if hidden.dtype == logits.dtype:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(torch.mm(hidden, weight.t()))
    if temperature != 1:
        logits.div_(temperature)
    if allowed is not None:
        logits.masked_fill_(~allowed, NEVER)
    torch.log_softmax(logits, -1, out=out)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    allowed: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the targets under softmax(hidden @ weight.T / temperature), in float32, differentiable once.

    Args:
        hidden: (n, d).
        weight: (V, d).
        targets: (n,) token ids.
        allowed: (n, V) bool; the distribution is renormalised over these tokens.
        temperature: divides the logits.
        entropy: whether to give the entropies; they cost a backward pass only where a loss has them.

    Returns:
        (n,) and (n,) or None.
    """
    backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = backward and 4 * len(targets) * len(weight) <= budget(weight.device)[1]
    arguments = (hidden, weight, targets, allowed, temperature, entropy, keep)
    return function_for(hidden, weight).apply(*arguments)


def function_for(hidden: Tensor, weight: Tensor) -> Any:
    """The fused kernels on a GPU where they run, else `TokenLogprobs`: the same numbers."""
    fused = kernels_for("fused", hidden.device) if hidden.dtype == weight.dtype else None
    return TokenLogprobs if fused is None else fused.FusedLogprobs
