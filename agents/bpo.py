"""BPO: batch policy optimisation, from a fixed set of logged episodes and without interaction.

    awr      fit the episodes, drawn in proportion to w = min(exp((R - b) / beta), w_max)          (Peng 2019)
    filter   fit the best share of the episodes of each prompt                       (Chen 2021, "%BC"; Peters 2007)
    tis      loss = -mean min(pi / mu, c) * (R - b) * log pi(y | x), no gradient through the ratio  (Ionides 2008)

R is the return of an episode, score - kl_coef * (log mu - log pi_ref) with mu the policy that was logged, so that with
beta = kl_coef the fit of "awr" is mu exp(R / beta) / Z = pi_ref exp(score / beta) / Z, the optimum of the environment,
whatever mu was. Its b is the log-mean-exp of the returns of a prompt's episodes: the weights are relative to a mean of
1. In "tis" R is that of pi as it is now, and b the weighted mean of a minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from textrl.agent import Agent
from textrl.attaching import check_own_penalty
from textrl.batch import batched_logprobs, prompt_groups
from textrl.config import AgentConfig, check
from textrl.episodes import as_episodes, episodes_digest, logged_source, take_in
from textrl.offline import Epochs
from textrl.returns import masked_mean
from textrl.rollout import Rollout
from textrl.task import Task
from textrl.wrappers import AnyEnv

if TYPE_CHECKING:
    from minari import MinariDataset
    from transformers import PreTrainedModel

ROUNDING = 1e-6
"""Returns that differ by less, relative, are a tie."""


@dataclass(frozen=True, kw_only=True)
class BPOConfig(AgentConfig):
    """Settings of BPO."""

    cooldown: float = 0.2  # full steps for longer: every epoch sees the same episodes
    weighting: str = "awr"  # "awr", "filter" or "tis"
    beta: float | None = None  # temperature of "awr"; None: kl_coef, or where that is 0 the standard deviation of R
    max_weight: float = 1000.0  # w_max of "awr", against a mean of 1
    best_share: float = 0.1  # of the episodes of each prompt, for "filter"
    max_ratio: float = 5.0  # c of "tis"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        names = ("awr", "filter", "tis")
        check("weighting", self.weighting, self.weighting in names, f"one of {list(names)}")
        check("beta", self.beta, self.beta is None or 0 < self.beta < math.inf, "a finite number above 0")
        for name in ("max_weight", "max_ratio"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("best_share", self.best_share, 0 < self.best_share <= 1, "above 0 and at most 1")


def advantage_weights(returns: Tensor, groups: Tensor, beta: float, max_weight: float) -> Tensor:
    """min(exp(R / beta) / mean exp(R / beta), w_max), the mean over the episodes of one prompt: (B,), (B,) -> (B,).

    A prompt with one episode is measured against all episodes, for it cannot be against itself.
    """
    logits = returns.double() / beta
    means = torch.full_like(logits, float(logits.logsumexp(0)) - float(torch.tensor(len(logits)).log()))
    for group in set(groups.tolist()):
        members = groups == group
        if int(members.sum()) > 1:
            means[members] = logits[members].logsumexp(0) - members.sum().log()
    return (logits - means).exp().clamp(max=max_weight)


def best_of_each(returns: Tensor, groups: Tensor, share: float) -> Tensor:
    """1 for the best share of the episodes of each prompt (at least one), else 0; ties stay: (B,), (B,) -> (B,)."""
    kept = torch.zeros(len(returns), dtype=torch.float64, device=returns.device)
    for group in set(groups.tolist()):
        members = (groups == group).nonzero()[:, 0]
        least = returns[members].sort(descending=True).values[max(1, round(share * len(members))) - 1]
        kept[members] = (returns[members] >= least - ROUNDING * (1 + least.abs())).double()
    return kept


def truncated_advantages(logprobs: Tensor, old_logprobs: Tensor, returns: Tensor, max_ratio: float) -> Tensor:
    """min(pi / mu, c) * (R - b) of whole responses, b the mean of R by these weights: (B,), (B,), (B,) -> (B,)."""
    ratios = (logprobs - old_logprobs).exp().clamp(max=max_ratio)
    baseline = (ratios * returns).sum() / ratios.sum().clamp(min=1e-8)
    return ratios * (returns - baseline)


class BPO(Agent):
    """Learns from logged episodes alone.

    Args:
        env: whose task, reference and KL coefficient hold; it is never stepped.
        model: as for every agent.
        config: as for every agent.
        dataset: logged episodes: a Minari dataset that `textrl.collect` wrote, its id or folder, a `Rollout`,
            or rows (or a file of them) with "prompt" and "completion". May be left out for an agent that is loaded only
            to be used.
        settings: fields of `BPOConfig`, as keywords.
    """

    config: BPOConfig
    config_class: ClassVar[type[AgentConfig]] = BPOConfig
    not_saved: ClassVar[tuple[str, ...]] = ("_logged", "weights")
    needs_dataset = True

    def __init__(
        self,
        env: AnyEnv,
        model: PreTrainedModel | str | Path | None = None,
        config: AgentConfig | None = None,
        *,
        dataset: Rollout | MinariDataset | str | Path | Sequence[Mapping[str, Any]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(env, model, config, **settings)
        check_own_penalty(env)
        self._logged: Rollout | None = None
        self._epochs = Epochs(self.generator)
        if dataset is not None:
            self._read(as_episodes(dataset, self.task, self.device))

    @classmethod
    def read_dataset(cls, file: str | Path, skip_bad_rows: bool = False, task: Task | None = None) -> Any:
        """The logged episodes of a file; a Minari dataset's folder is read later."""
        return logged_source(file, skip_bad_rows)

    def _read(self, logged: Rollout) -> None:
        """Takes the logged episodes in: the reference's opinion of them, and how often each is to be drawn."""
        known = not bool(logged.logprobs.isnan().any())
        tis = self.config.weighting == "tis"
        check("dataset", "rows without them", known or not tis, 'episodes with logged log-probabilities for "tis"')
        returns = take_in(logged, self.base, self.config.max_tokens_per_microbatch)
        groups = prompt_groups(logged)
        weights = torch.ones(len(logged), dtype=torch.float64)
        if self.config.weighting == "awr":
            beta = self.config.beta or self.base.kl_coef or max(float(returns.std(unbiased=False)), 1e-8)
            weights = advantage_weights(returns, groups, beta, self.config.max_weight)
        elif self.config.weighting == "filter":
            weights = best_of_each(returns, groups, self.config.best_share)
        self.weights = weights.cpu() / weights.sum().cpu()  # (B,) how often each episode is drawn
        self._logged, self.dataset_digest = logged, episodes_digest(logged)

    def collect(self) -> Rollout:
        """The next `batch_size` logged episodes: by their weights, or for "tis" in a new order each epoch."""
        check("dataset", None, self._logged is not None, "given for BPO to learn")
        assert self._logged is not None
        if self.config.weighting == "tis":
            indices = self._epochs.take(self.config.batch_size, len(self._logged))
        else:
            indices = torch.multinomial(self.weights, self.config.batch_size, True, generator=self.generator)
        return self._logged.select(indices.to(self.device))

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One step on a minibatch of logged episodes."""
        if self.config.weighting == "tis":
            numbers = self._importance_step(rollout)
        else:
            numbers = self.minimise(self._fit, rollout)
        numbers["effective_sample_size"] = float(1 / (self.weights**2).sum())
        return numbers

    def _fit(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of episodes that were drawn by their weights."""
        return masked_mean(-self.logprobs(batch), batch.action_mask), {}

    def _importance_step(self, rollout: Rollout) -> dict[str, float]:
        """Asks what the policy thinks of the whole batch, of which b is a mean; then takes a step, in parts or not."""
        limit, c = self.config.max_tokens_per_microbatch, self.config.max_ratio
        logprobs = batched_logprobs(self.policy, rollout, limit, masked=True).sum(1)  # (B,)
        old, returns = rollout.logprobs.sum(1), rollout.scores
        if rollout.ref_logprobs is not None:
            returns = returns - self.base.kl_coef * (logprobs - rollout.ref_logprobs.sum(1))
        advantages = truncated_advantages(logprobs, old, returns, c)[:, None].expand_as(rollout.rewards)
        numbers = self.minimise(self._weighted_fit, replace(rollout, advantages=advantages), mean_over="groups")
        ratios = (logprobs - old).exp()
        return {**numbers, "ratio": float(ratios.mean()), "truncated": float((ratios > c).float().mean())}

    def _weighted_fit(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """-mean of min(pi / mu, c) * (R - b) * log pi(y) over whole responses."""
        assert batch.advantages is not None
        return -(batch.advantages[:, 0] * self.logprobs(batch).sum(1)).mean(), {}
