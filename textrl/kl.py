"""The divergence between two policies, estimated or in full, and the coefficient of its penalty."""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Log pi - log pi_ref: unbiased for KL(pi || pi_ref) under samples of pi, may be negative. Any shape."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2: biased, never negative; its gradient is that of the KL. Any shape."""
    return (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = log pi_ref - log pi: unbiased and never negative (Schulman 2020). Any shape."""
    d = ref_logprobs - logprobs
    return d.exp() - 1 - d


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || pi_ref) summed over the whole vocabulary: (..., V), (..., V) -> (...)."""
    logprobs, ref_logprobs = logits.float().log_softmax(-1), ref_logits.float().log_softmax(-1)
    terms = logprobs.exp() * (logprobs - ref_logprobs)
    return terms.where(logprobs.exp() > 0, 0.0).sum(-1)


def adapted(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """kl_coef * (1 + clip(KL / target - 1, -0.2, 0.2) * min(n / horizon, 1)) (Ziegler 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(episodes / horizon, 1.0))
