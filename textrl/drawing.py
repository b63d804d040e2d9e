"""One token a row from logits: temperature, truncation, and the inverse of the cumulative distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import check, check_types


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits.
        top_k: only the k most probable tokens (0: all).
        top_p: only the most probable tokens whose probabilities reach p together (1: all).
        min_new_tokens: the end token cannot come before this many tokens.
        deterministic: the most probable token in place of a drawn one.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges."""
        check_types(self)
        check("temperature", self.temperature, 0 < self.temperature < math.inf, "a number above 0")
        check("top_k", self.top_k, self.top_k >= 0, "a whole number of at least 0")
        check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_new_tokens", self.min_new_tokens, self.min_new_tokens >= 0, "a whole number of at least 0")

    @property
    def plain(self) -> bool:
        """Whether every token can be drawn, with its own probability."""
        return self.top_k == 0 and self.top_p == 1 and not self.deterministic


def within_top_p(logits: Tensor, top_p: float) -> Tensor:
    """The fewest most probable tokens whose probabilities reach `top_p` together: (..., V) -> (..., V) bool."""
    ordered, order = logits.sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    within = probabilities.cumsum(-1) - probabilities < top_p
    return torch.zeros_like(within).scatter(-1, order, within)


def draw(
    logits: Tensor, uniforms: Tensor, sampling: Sampling, forbidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draws one token a row by the inverse of the cumulative distribution.

    Args:
        logits: (B, V) float32.
        uniforms: (B,) in [0, 1), one random number a row: a row's draw depends on no other row.
        sampling: temperature and truncation.
        forbidden: (B, V) bool, tokens that cannot come.

    Returns:
        tokens (B,) and their log-probabilities (B,) under the truncated, renormalised distribution.
    """
    scaled = logits if sampling.temperature == 1 else logits / sampling.temperature
    if forbidden is not None:
        scaled = scaled.masked_fill(forbidden, -torch.inf)
    if sampling.top_k and sampling.top_k < scaled.shape[-1]:
        best = scaled.topk(sampling.top_k, -1)
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, best.indices, best.values)
    if sampling.top_p < 1:
        scaled = scaled.masked_fill(~within_top_p(scaled, sampling.top_p), -torch.inf)
    probabilities = scaled.softmax(-1)
    if sampling.deterministic:
        tokens = scaled.argmax(-1)
    else:
        cumulative = probabilities.cumsum(-1)  # (B, V)
        total = cumulative[:, -1:]
        point = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=scaled.shape[-1] - 1)  # for NaN
    return tokens, probabilities.gather(-1, tokens[:, None])[:, 0].log()
