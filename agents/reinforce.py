"""REINFORCE: the policy gradient with a baseline (Williams 1992).

    loss = -(1 / N) * sum_t (G_t - b) * log pi(a_t | s_t)

G_t is the return from token t on: what the score and the KL penalties still to come add up to. The baseline b takes no
gradient and does not change the mean, only the variance: nothing, the running mean of the returns, the mean of the
other samples of the same prompt (leave-one-out, RLOO; Kool 2019, Ahmadian 2024), or a learned value of the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from textrl.agent import Agent, AgentConfig, check
from textrl.policy import value_model, values_at
from textrl.returns import discounted_returns, leave_one_out, masked_mean, masked_var
from textrl.rollout import Rollout

BASELINES = ("none", "mean", "leave_one_out", "value")


@dataclass(frozen=True, kw_only=True)
class REINFORCEConfig(AgentConfig):
    """Settings of REINFORCE."""

    baseline: str = "mean"  # "none", "mean" (running), "leave_one_out" (group_size samples a prompt), "value" (learned)
    baseline_decay: float = 0.9  # of the running mean
    group_size: int = 4  # samples of each prompt, for "leave_one_out"
    gamma: float = 1.0  # discount per token
    vf_coef: float = 0.5  # weight of the value loss, for "value"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        check("baseline", self.baseline, self.baseline in BASELINES, f"one of {list(BASELINES)}")
        check("group_size", self.group_size, self.group_size >= 2, "at least 2")
        check("baseline_decay", self.baseline_decay, 0 <= self.baseline_decay < 1, "from 0 to below 1")
        check("gamma", self.gamma, 0 <= self.gamma <= 1, "from 0 to 1")


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Masked mean of -A_t * log pi(a_t | s_t): (B, T) three times -> ()."""
    return masked_mean(-advantages * logprobs, mask)


class REINFORCE(Agent):
    """The plain policy gradient, one update per batch."""

    config: REINFORCEConfig
    config_class: ClassVar[type[AgentConfig]] = REINFORCEConfig

    def build(self) -> None:
        """Adds the critic, where the baseline is a learned value."""
        self.running_mean: float | None = None
        self.critic = None
        if self.config.baseline == "leave_one_out":
            self.group_size = self.config.group_size
        if self.config.baseline == "value":
            self.critic = self.modules["critic"] = value_model(self.model)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One step along the policy gradient."""
        mask = rollout.action_mask
        returns = discounted_returns(rollout.rewards, mask, self.config.gamma)
        rollout = replace(rollout, returns=returns, advantages=self._advantages(rollout, returns))
        numbers = self.minimise(self._loss, rollout)
        numbers["advantage_std"] = float(masked_var(rollout.advantages, mask).sqrt())
        return {f"train/{key}": value for key, value in numbers.items()}

    def _advantages(self, rollout: Rollout, returns: Tensor) -> Tensor:
        """Returns minus the baseline: (B, T)."""
        mask = rollout.action_mask
        if self.config.baseline == "none":
            return returns
        if self.config.baseline == "leave_one_out":
            # the penalties still to come, and the score against the other samples' scores
            whole = returns[:, 0]
            return torch.where(mask, returns - (whole - leave_one_out(whole, rollout.group_size))[:, None], 0.0)
        if self.critic is not None:
            with torch.no_grad():
                rows, columns, _ = rollout.places()
                values = rollout.spread(values_at(self.critic, rollout.tokens, rows, columns))
            return torch.where(mask, returns - values, 0.0)
        mean = float(returns[:, 0].mean())
        decay = self.config.baseline_decay
        old = mean if self.running_mean is None else self.running_mean
        self.running_mean = decay * old + (1 - decay) * mean
        return torch.where(mask, returns - old, 0.0)

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.advantages is not None and batch.returns is not None
        mask = batch.action_mask
        loss = policy_gradient_loss(self.logprobs(batch), batch.advantages, mask)
        numbers = {"policy_loss": loss}
        if self.critic is not None:
            rows, columns, _ = batch.places()
            values = batch.spread(values_at(self.critic, batch.tokens, rows, columns))
            numbers["value_loss"] = masked_mean((values - batch.returns) ** 2, mask)
            loss = loss + self.config.vf_coef * numbers["value_loss"]
        return loss, numbers
