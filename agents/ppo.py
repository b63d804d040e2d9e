"""PPO: proximal policy optimisation, actor and critic, on text (Schulman 2017; Ziegler 2019; Zheng 2023).

    ratio  = pi(a | s) / pi_old(a | s)
    loss   = mean max(-A * ratio, -A * clip(ratio, 1 - eps, 1 + eps))
             + vf_coef * mean max((V - R)^2, (clip(V, V_old - eps_v, V_old + eps_v) - R)^2) / 2
             - ent_coef * mean H(pi(. | s))

A: advantages by GAE, whitened over the batch; R: unwhitened advantages plus old values. The score is paid at the last
token, a KL penalty to the reference at every token (the environment's part); here its coefficient may follow a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn
from transformers import PreTrainedModel

from textrl.agent import Agent
from textrl.attaching import paid_scores, penalty_weight
from textrl.config import AgentConfig, check
from textrl.critic import with_advantages
from textrl.heads import head_of
from textrl.kl import adapted, k3
from textrl.memory import mean_of
from textrl.returns import masked_mean, masked_var, whiten
from textrl.rewards import RewardModel
from textrl.rollout import Rollout
from textrl.scalars import load_scalar
from textrl.textcritic import separate_critic
from textrl.wrappers import AnyEnv

_CRITICS = '"separate", "shared", a RewardModel or a scalar model'


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AgentConfig):
    """Settings of PPO."""

    adam_beta2: float = 0.95  # many small batches: at 0.999 a weight seldom used is thrown far
    epochs: int = 4  # passes over each batch
    minibatches: int = 4  # steps a pass
    clip_coef: float = 0.2  # eps of the ratio
    clip_value: float = 0.2  # eps_v of the value; 0: not clipped
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95  # lambda of GAE
    whiten_advantages: bool = True  # to mean 0, variance 1 over the batch
    whiten_floor: float = 0.1  # least standard deviation to divide by: once all scores agree, what is left is noise
    whiten_scores: bool = False  # scores to variance 1 over the batch, the mean kept
    clip_score: float | None = None  # scores are clipped to [-clip_score, clip_score]
    missing_end_penalty: float = 0.0  # taken off the score of a response that did not stop by itself
    target_kl: float | None = 0.05  # no further epochs once KL(old || new), nats a token, is above this
    kl_target: float | None = None  # the KL coefficient follows this KL(policy || reference) per response, in nats
    kl_horizon: float = 10_000.0  # episodes over which it may change by about e^0.2
    critic: str = "separate"  # "separate": a trunk of its own; "shared": a head on the policy's trunk

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        for name in ("epochs", "minibatches"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("critic", self.critic, self.critic in ("separate", "shared"), _CRITICS)
        check("clip_coef", self.clip_coef, 0 < self.clip_coef < 1, "above 0 and below 1")
        for name in ("gamma", "gae_lambda"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        penalty = self.missing_end_penalty
        check("missing_end_penalty", penalty, 0 <= penalty < math.inf, "a finite number from 0 up")
        for name in ("clip_value", "vf_coef", "whiten_floor"):
            check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        check("kl_horizon", self.kl_horizon, 0 < self.kl_horizon < math.inf, "a finite number above 0")
        for name in ("clip_score", "target_kl", "kl_target"):
            check(name, value := getattr(self, name), value is None or value > 0, "above 0")


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, mask: Tensor, clip_coef: float) -> Tensor:
    """Masked mean of max(-A * ratio, -A * clip(ratio)) (Schulman 2017, eq. 7): (B, T) three times -> ()."""
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_value: float) -> Tensor:
    """Half the masked mean of the larger of the squared errors, clipped and not: (B, T) four times -> ()."""
    errors = (values - returns) ** 2
    if clip_value > 0:
        clipped = old_values + (values - old_values).clamp(-clip_value, clip_value)
        errors = torch.maximum(errors, (clipped - returns) ** 2)
    return 0.5 * masked_mean(errors, mask)


class PPO(Agent):
    """Actor-critic PPO.

    Args:
        env: as for every agent.
        model: as for every agent.
        config: as for every agent.
        critic: the setting "separate" or "shared"; or what a separate critic's trunk starts from in place of the
            policy's: a `RewardModel`, which keeps its own tokenizer, or a scalar model that reads the policy's tokens.
            Its head starts at zero.
        settings: fields of `PPOConfig`, as keywords.
    """

    config: PPOConfig
    config_class: ClassVar[type[AgentConfig]] = PPOConfig

    def __init__(
        self,
        env: AnyEnv,
        model: PreTrainedModel | str | Path | None = None,
        config: AgentConfig | None = None,
        *,
        critic: RewardModel | PreTrainedModel | str | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(critic, str):
            settings["critic"], critic = critic, None
        check("critic", critic, critic is None or isinstance(critic, (RewardModel, PreTrainedModel)), _CRITICS)
        self._critic_from = critic
        super().__init__(env, model, config, **settings)
        del self._critic_from

    @classmethod
    def saved_arguments(cls, folder: Path) -> dict[str, Any]:
        """A separate critic that lies whole in the folder, with its tokenizer where it has one of its own."""
        critic = folder / "critic"
        if not critic.is_dir():
            return {}
        return {"critic": RewardModel.load(critic) if (critic / "tokenizer.json").is_file() else load_scalar(critic)}

    def build(self) -> None:
        """Adds the critic: a scalar model of its own, or a head on the policy's trunk; both start at zero."""
        self.critic: PreTrainedModel | None = None
        self.value: Callable[[Rollout], Tensor] = self._head_values
        self.value_head: nn.Linear | None = None
        if self.config.critic == "shared":
            check("critic", self._critic_from, self._critic_from is None, 'None with critic="shared"')
            model, head = type(self.model).__name__, head_of(self.model)
            width: int | None = getattr(self.model.config.get_text_config(), "hidden_size", None)
            width = getattr(head, "in_features", width)  # of what the head reads
            readable = width is not None and head is not None
            check("critic", "shared", readable, f'"separate" for {model}, whose states below the head cannot be read')
            assert width is not None
            self.value_head = nn.Linear(width, 1).to(device=self.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            self.modules["value_head"] = self.value_head
            self.state_value = self._of_state
        else:
            made = separate_critic(self.policy, self._critic_from, self.task, self.config.trainable_layers)
            self.value, self.critic = made.value, made.model
            self.modules["critic"] = made.model
            if made.tokenizer is not None:
                self.tokenizers["critic"] = made.tokenizer
        if self.config.kl_target is not None:
            penalised = self.base.reference is not None and self.base.kl_coef > 0  # what is 0 cannot follow
            check("kl_target", self.config.kl_target, penalised, "None without a reference and a kl_coef above 0")
            one = not isinstance(self.env.unwrapped, SyncVectorEnv)  # each of its environments has a coefficient
            check("kl_target", self.config.kl_target, one, "None for a SyncVectorEnv")

    # ---- one batch -------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout) -> dict[str, float]:
        """A few epochs of clipped steps on one batch."""
        config, mask = self.config, rollout.action_mask
        shaped, at_once = self._shaped(rollout), config.max_tokens_per_microbatch
        if config.kl_target is None:  # a coefficient that follows a target has a course of its own
            shaped = self.tempered(shaped)
        rollout, known = with_advantages(shaped, self.value, at_once, config.gamma, config.gae_lambda, False)
        assert rollout.advantages is not None
        if config.whiten_advantages:
            spread = float(masked_var(rollout.advantages, mask).sqrt())
            rollout.advantages = whiten(rollout.advantages, mask) * min(1.0, spread / max(config.whiten_floor, 1e-8))
        steps: list[dict[str, float]] = []
        for _ in range(config.epochs):
            for indices in self.shuffled(len(rollout), config.minibatches):
                steps.append(self._step(rollout.select(indices)))
            if config.target_kl is not None and steps[-1]["kl_old_new"] > config.target_kl:
                break
        numbers = mean_of(steps)
        numbers["first_ratio_error"] = steps[0]["ratio_error"]
        del numbers["ratio_error"]
        numbers["steps"] = len(steps)
        numbers["explained_variance"] = known
        if config.kl_target is not None and (log_ratios := rollout.log_ratios) is not None:
            kl = float(log_ratios.sum(1).mean())
            self.base.kl_coef = adapted(self.base.kl_coef, kl, config.kl_target, len(rollout), config.kl_horizon)
        numbers["kl_coef"] = penalty_weight(self.env)
        return numbers

    def _shaped(self, rollout: Rollout) -> Rollout:
        """The same with its scores, and with them its rewards, clipped, whitened and taken off for a missing end."""
        config, scores = self.config, paid_scores(rollout, self.env)
        new = scores - config.missing_end_penalty * (~rollout.stopped)
        if config.clip_score is not None:
            new = new.clamp(-config.clip_score, config.clip_score)
        if config.whiten_scores:
            new = whiten(new, torch.ones_like(rollout.stopped), keep_mean=True)
        last = (rollout.response_lengths - 1)[:, None]
        return replace(rollout, scores=new, rewards=rollout.rewards.scatter_add(1, last, (new - scores)[:, None]))

    def _head_values(self, batch: Rollout, hidden: Tensor | None = None) -> Tensor:
        """The shared critic's values, (B, T), from the trunk's states (n, d) where they are at hand."""
        if hidden is None:
            rows, columns, _ = batch.places()
            hidden = self.policy.hidden(batch.tokens, rows, columns, batch.below)
        return batch.spread(self._of_state(hidden))

    def _of_state(self, hidden: Tensor) -> Tensor:
        """The shared critic's values of the trunk's states: (n, d) -> (n,)."""
        assert self.value_head is not None
        return self.value_head(hidden.float())[:, 0]

    def _step(self, batch: Rollout) -> dict[str, float]:
        """One step of the policy, and of a separate critic after it: memory never holds the gradients of both."""
        numbers = self.minimise(self._loss, batch)
        if self.critic is not None:
            apart = self.minimise(self._value_loss, batch)
            numbers["value_loss"] = apart["value_loss"]
            numbers["loss"] += apart["loss"]
            numbers["grad_norm"] = math.hypot(numbers["grad_norm"], apart["grad_norm"])
        return numbers

    def _value_loss(self, batch: Rollout, values: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The value's part of the loss, of these values (B, T) or the critic's."""
        assert batch.returns is not None and batch.values is not None
        values = self.value(batch) if values is None else values
        loss = clipped_value_loss(values, batch.values, batch.returns, batch.action_mask, self.config.clip_value)
        return self.config.vf_coef * loss, {"value_loss": loss}

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's part of the loss, and the value's where they share a trunk."""
        assert batch.advantages is not None
        config, mask = self.config, batch.action_mask
        rows, columns, targets = batch.places()
        hidden = self.policy.hidden(batch.tokens, rows, columns, batch.below)  # (n, d), a shared critic's too
        flat, entropy = self.policy.logprobs(hidden, targets, batch.token_masks, entropy=True)
        assert entropy is not None
        logprobs = batch.spread(flat)
        ratio = (logprobs - batch.logprobs).exp()
        policy_loss = clipped_policy_loss(ratio, batch.advantages, mask, config.clip_coef)
        loss, numbers = policy_loss, {"policy_loss": policy_loss}
        if self.critic is None:
            value_loss, more = self._value_loss(batch, self._head_values(batch, hidden))
            loss, numbers = loss + value_loss, {**numbers, **more}
        if config.ent_coef != 0:
            loss = loss - config.ent_coef * entropy.mean()
        with torch.no_grad():
            numbers |= {
                "entropy": entropy.mean(),
                "kl_old_new": masked_mean(k3(batch.logprobs, logprobs), mask),
                "clip_fraction": masked_mean(((ratio - 1).abs() > config.clip_coef).float(), mask),
                "ratio_error": masked_mean((ratio - 1).abs(), mask),
            }
        return loss, numbers
