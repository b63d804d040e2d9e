"""GRPO: group-relative policy optimisation, no critic, the KL in the loss (Shao 2024).

    A_i    = (score_i - mean of the other samples of the prompt) / std
    ratio  = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss   = mean max(-A_i * ratio, -A_i * clip(ratio, 1 - eps, 1 + eps)) + (kl_coef / std) * mean ratio * (k3_t + K_t)
    k3_t   = pi_ref / pi - 1 - log(pi_ref / pi)
    K_t    = the sum of log(pi / pi_ref) over the other tokens of the response, minus the mean of the whole sum over the
             other samples of the prompt; it takes no gradient

What differs from the paper, so that the loss has its minimum where score - kl_coef * KL has its maximum: the KL carries
the ratio and the other tokens (the gradient of k3 alone is that of KL(pi_ref || pi), token by token; Tang and Munos
2025). The gradient of ratio * (k3_t + K_t) is then that of log pi(y_t) times log pi(y|x) / pi_ref(y|x), centred: at the
optimum this and the score cancel in every single response, and no noise is left. The mean leaves the sample itself out
(else the score counts (k - 1) / k); std is that of the whole batch and divides the KL as well. `scale="group"` is the
paper's division by the deviation of each group, which weighs easy and hard prompts up (Liu 2025).

The environment's penalty is taken out of its rewards first: the KL is paid once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from textrl.agent import Agent
from textrl.attaching import penalty_weight
from textrl.config import AgentConfig, check
from textrl.kl import k3
from textrl.memory import mean_of
from textrl.returns import group_normalised, leave_one_out, masked_mean
from textrl.rollout import Rollout

from .ppo import clipped_policy_loss

SCALES = ("batch", "group", "none")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(AgentConfig):
    """Settings of GRPO."""

    warmup: float = 0.1  # the first steps of Adam are large, and only noise tells them where to
    adam_beta2: float = 0.95  # many small batches: at 0.999 a weight seldom used is thrown far
    group_size: int = 8  # samples of each prompt
    epochs: int = 2  # passes over each batch
    minibatches: int = 2  # steps a pass
    clip_coef: float = 0.2  # eps of the ratio
    scale: str = "batch"  # whose standard deviation divides the scores: the "batch"'s, each "group"'s, or "none"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        check("group_size", self.group_size, self.group_size >= 2, "at least 2")
        for name in ("epochs", "minibatches"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("clip_coef", self.clip_coef, 0 < self.clip_coef < 1, "above 0 and below 1")
        check("scale", self.scale, self.scale in SCALES, f"one of {list(SCALES)}")


def kl_loss(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, usual: Tensor) -> Tensor:
    """Masked mean of ratio_t * (k3_t + K_t): its gradient is that of the KL of whole responses.

    Args:
        logprobs: (B, T), differentiable.
        old_logprobs: (B, T), of the policy that drew the tokens.
        ref_logprobs: (B, T), of the reference.
        mask: (B, T) bool.
        usual: (B, 1), the log-ratio of a response to the prompt that K is measured from.

    Returns:
        ().
    """
    log_ratio = (logprobs - ref_logprobs).detach() * mask
    others = log_ratio.sum(1, keepdim=True) - log_ratio - usual  # K, (B, T)
    return masked_mean((logprobs - old_logprobs).exp() * (k3(logprobs, ref_logprobs) + others), mask)


class GRPO(Agent):
    """Policy optimisation against the other samples of the same prompt."""

    config: GRPOConfig
    config_class: ClassVar[type[AgentConfig]] = GRPOConfig

    def build(self) -> None:
        """Asks for groups; there is no critic."""
        self.group_size = self.config.group_size

    def update(self, rollout: Rollout) -> dict[str, float]:
        """A few clipped steps on one batch."""
        config, mask, kl_coef = self.config, rollout.action_mask, penalty_weight(self.env)
        scores = rollout.rewards.sum(1)  # (B,)
        if (log_ratios := rollout.log_ratios) is not None:
            log_ratio = log_ratios.sum(1)  # (B,)
            scores = scores + kl_coef * log_ratio
            usual = (log_ratio - leave_one_out(log_ratio, rollout.grouping))[:, None]  # the mean of the others, (B, 1)
            rollout = replace(rollout, values=usual)
        spread = scores.std(unbiased=False) + 1e-4 if config.scale == "batch" else scores.new_ones(())
        if config.scale == "group":
            advantages = group_normalised(scores, rollout.grouping)
        else:
            advantages = leave_one_out(scores, rollout.grouping) / spread
        if rollout.ref_logprobs is not None and kl_coef > 0:
            advantages = self.weigh(advantages if config.scale == "group" else scores) * advantages
        self._kl_weight = kl_coef / float(spread)
        rollout = replace(rollout, advantages=torch.where(mask, advantages[:, None], 0.0))
        steps = [
            self.minimise(self._loss, rollout.select(indices))
            for _ in range(config.epochs)
            for indices in self.shuffled(len(rollout), config.minibatches)
        ]
        return mean_of(steps)

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.advantages is not None
        mask, logprobs = batch.action_mask, self.logprobs(batch)
        ratio = (logprobs - batch.logprobs).exp()
        loss = clipped_policy_loss(ratio, batch.advantages, mask, self.config.clip_coef)
        numbers = {"policy_loss": loss, "kl_old_new": masked_mean(k3(batch.logprobs, logprobs), mask)}
        if batch.ref_logprobs is not None and batch.values is not None and self._kl_weight > 0:
            kl = kl_loss(logprobs, batch.logprobs, batch.ref_logprobs, mask, batch.values)
            loss, numbers["kl_loss"] = loss + self._kl_weight * kl, kl
        return loss, numbers
