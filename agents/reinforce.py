"""REINFORCE: the policy gradient with a baseline (Williams 1992).

    loss = -(1 / N) * sum_t (G - b) * log pi(a_t | s_t)

G is the return of the whole response, the score and all KL penalties: the response counts as one action (Ahmadian
2024). `reward_to_go` counts from token t on instead: less noise where rewards come early. The baseline b takes no
gradient and changes only the variance:

    none           0
    mean           the running mean of the returns; in the first batch the mean of the other responses
    prompt_mean    the mean of the prompt's other samples in the batch and, as one sample more, of the running mean
    leave_one_out  the mean of the other samples of the same prompt, `group_size` of each     (RLOO; Kool 2019)
    value          a learned value of the state, which asks for the reward to go

At the optimum of score - kl_coef * KL the return G is the same for every response to a prompt: with a baseline of the
prompt's own the noise of the gradient dies out as the policy gets there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from textrl.agent import Agent
from textrl.batch import prompt_groups
from textrl.config import AgentConfig, check
from textrl.critic import Critic, batched_values, bootstrapped, value_loss
from textrl.returns import discounted_returns, leave_one_out, masked_mean, masked_var, mean_of_others
from textrl.rollout import Rollout

BASELINES = ("none", "mean", "prompt_mean", "leave_one_out", "value")


@dataclass(frozen=True, kw_only=True)
class REINFORCEConfig(AgentConfig):
    """Settings of REINFORCE."""

    warmup: float = 0.1  # the first steps of Adam are large, and only noise tells them where to
    cooldown: float = 0.5  # full steps for longer: there is one a batch
    adam_beta2: float = 0.95  # few steps: at 0.999 the gradients at the end are measured by the small ones before
    row_clocks: bool = False  # one step a batch: by the far first steps of seldom used rows these come along
    baseline: str = "prompt_mean"  # "none", "mean" (running), "prompt_mean", "leave_one_out", "value" (learned)
    reward_to_go: bool = False  # G counts from token t on; always so with "value"
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
        check("vf_coef", self.vf_coef, self.vf_coef >= 0, "at least 0")


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
        self.value: Critic | None = None
        if self.config.baseline == "leave_one_out":
            self.group_size = self.config.group_size
        if self.config.baseline == "value":
            self.value = Critic(self.policy, self.model, self.config.trainable_layers)
            self.modules["critic"] = self.value.model

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One step along the policy gradient."""
        rollout = self.tempered(rollout)
        if self.value is not None:
            rollout = bootstrapped(rollout, self.value, self.config.gamma)
        returns = discounted_returns(rollout.rewards, rollout.action_mask, self.config.gamma)
        advantages = self.advantages(rollout, returns)
        numbers = self.minimise(self._loss, replace(rollout, returns=returns, advantages=advantages))
        numbers["advantage_std"] = float(masked_var(advantages, rollout.action_mask).sqrt())
        return numbers

    def advantages(self, rollout: Rollout, returns: Tensor) -> Tensor:
        """Returns (B, T), of the whole response or to go, minus the baseline: (B, T), 0 outside the mask."""
        mask = rollout.action_mask
        if self.value is not None:
            values = batched_values(self.value, rollout, self.config.max_tokens_per_microbatch)
            return returns - values
        whole = returns.gather(1, mask.int().argmax(1, keepdim=True))  # (B, 1), from the first of the agent's tokens
        baseline: Tensor | float = 0.0
        if self.config.baseline == "leave_one_out":
            baseline = whole - leave_one_out(whole[:, 0], rollout.grouping)[:, None]
        elif self.config.baseline != "none":
            mean, decay = float(whole.mean()), self.config.baseline_decay
            if self.running_mean is None:  # at first the others' mean: with its own return in it there is a bias
                before = (whole.sum() - whole) / max(len(whole) - 1, 1)
                self.running_mean = mean
            else:
                before = torch.full_like(whole, self.running_mean)  # (B, 1)
                self.running_mean = decay * self.running_mean + (1 - decay) * mean
            baseline = before
            if self.config.baseline == "prompt_mean":
                baseline = mean_of_others(whole[:, 0], prompt_groups(rollout), before[:, 0])[:, None]
        return torch.where(mask, (returns if self.config.reward_to_go else whole) - baseline, 0.0)

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.advantages is not None and batch.returns is not None
        loss = policy_gradient_loss(self.logprobs(batch), batch.advantages, batch.action_mask)
        numbers = {"policy_loss": loss}
        if self.value is not None:
            numbers["value_loss"] = value_loss(self.value(batch), batch.returns, batch.action_mask)
            loss = loss + self.config.vf_coef * numbers["value_loss"]
        return loss, numbers
