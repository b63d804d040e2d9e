"""A2C: advantage actor-critic, one update per batch (Mnih 2016).

    loss = -(1 / N) * sum_t A_t * log pi(a_t | s_t) + vf_coef * (1 / 2N) * sum_t (V(s_t) - R_t)^2 - ent_coef * mean H

A: advantages by GAE, which take no gradient; R: advantages plus old values. PPO with one epoch, one minibatch, no
clip and `whiten_floor=0` has the same policy gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from textrl.agent import Agent
from textrl.config import AgentConfig, check
from textrl.critic import Critic, value_loss, with_advantages
from textrl.rollout import Rollout

from .reinforce import policy_gradient_loss


@dataclass(frozen=True, kw_only=True)
class A2CConfig(AgentConfig):
    """Settings of A2C."""

    warmup: float = 0.1  # the first steps of Adam are large, and only noise tells them where to
    adam_beta2: float = 0.95  # few steps: at 0.999 the gradients at the end are measured by the small ones before
    row_clocks: bool = False  # one step a batch: by the far first steps of seldom used rows these come along
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95  # lambda of GAE
    whiten_advantages: bool = True  # to mean 0, variance 1 over the batch

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        for name in ("gamma", "gae_lambda"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        check("vf_coef", self.vf_coef, self.vf_coef >= 0, "at least 0")


class A2C(Agent):
    """Actor-critic with one step a batch."""

    config: A2CConfig
    config_class: ClassVar[type[AgentConfig]] = A2CConfig

    def build(self) -> None:
        """Adds the critic."""
        self.value = Critic(self.policy, self.model, self.config.trainable_layers)
        self.critic = self.modules["critic"] = self.value.model

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One step of actor and critic."""
        config, at_once = self.config, self.config.max_tokens_per_microbatch
        estimator = (config.gamma, config.gae_lambda, config.whiten_advantages)
        rollout, known = with_advantages(self.tempered(rollout), self.value, at_once, *estimator)
        numbers = self.minimise(self._loss, rollout)
        numbers["explained_variance"] = known
        return numbers

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.advantages is not None and batch.returns is not None
        rows, columns, targets = batch.places()
        hidden = self.policy.hidden(batch.tokens, rows, columns, batch.below)  # (n, d)
        flat, entropy = self.policy.logprobs(hidden, targets, batch.token_masks, entropy=True)
        assert entropy is not None
        numbers = {
            "policy_loss": policy_gradient_loss(batch.spread(flat), batch.advantages, batch.action_mask),
            "value_loss": value_loss(self.value(batch), batch.returns, batch.action_mask),
            "entropy": entropy.mean(),
        }
        bonus = self.config.ent_coef * numbers["entropy"]
        return numbers["policy_loss"] + self.config.vf_coef * numbers["value_loss"] - bonus, numbers
