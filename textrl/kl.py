"""The divergence between two policies, estimated or in full, and the coefficient of its penalty."""

from __future__ import annotations

import math

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


FIRST_SPREAD, E_FOLD, LONGEST = 0.4, 0.15, 0.6


def first_weight(kl_coef: float, spread: float) -> float:
    """The weight of scores of this standard deviation under which the optimum is still near the reference, at most 1.

    There the log-ratio of the optimum, pi_ref exp(weight * score / kl_coef), to pi_ref has a deviation of 0.4. (Where
    prompts differ in their mean score, `spread` is larger than it is for any of them, and the weight smaller.)
    """
    return min(1.0, FIRST_SPREAD * kl_coef / spread)


def score_weight(start: float, done: float) -> float:
    """The weight of the score when a share `done` of the training is over: start * e^(done / 0.15), at most 1.

    A `start` so small that it would not be 1 at 0.6 rises faster, and is. The optimum of weight * score - kl_coef * KL,
    pi_ref exp(weight * score / kl_coef), moves away from the reference as the weight rises, and the policy follows it.
    Under the full score at once a softmax policy soon draws nothing but the first good responses it met, and its
    gradient hardly leads away from them again (Mei 2020). The score rises where the penalty could fall: Adam would go
    on for long with the small steps that suit the large gradients of a large penalty.
    """
    if start >= 1:
        return 1.0
    length = min(LONGEST, -E_FOLD * math.log(start))  # of the rise
    return start ** max(0.0, 1 - done / length)


def adapted(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """kl_coef * (1 + clip(KL / target - 1, -0.2, 0.2) * min(n / horizon, 1)) (Ziegler 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * min(episodes / horizon, 1.0))
