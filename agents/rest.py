"""ReST: reinforced self-training: grow a batch of samples, keep the good ones, fit them, again (Gulcehre 2023).

    grow      y ~ mu = pi as it is, R = score - kl_coef * (log mu - log pi_ref)
    improve   for each of some rising quantiles q: w = min(1, exp((R - tau) / kl_coef)), tau so that mean w = 1 - q,
              loss = -mean w(y) log pi(y_t | x, y_<t) / mean w

Without a KL penalty the filter is hard, as in the paper: the best 1 - q are kept, ties at the threshold by the share
that there is room for. With one it is rejection sampling (Liu 2024, RSO) with the chance to be kept as a weight, which
is less noisy than a draw: mu exp(R / kl_coef) is pi_ref exp(score / kl_coef), so that for a high threshold the weights
are those of the optimum, and at the optimum R is the same for every response and so is w: it is where the iteration
rests. That a share is kept, and not all above a quantile of R, tells a rare success from failures that all score the
same. A batch is large, because what is fitted is the sample and not mu: its noise stays in the policy. The first batch
may be a logged one, from whatever mu. A score that is drawn (noise, hidden columns) is fitted at its luckiest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from textrl import acting
from textrl.agent import Agent
from textrl.attaching import penalty_weight
from textrl.batch import prompt_groups
from textrl.config import AgentConfig, check, is_number
from textrl.episodes import as_episodes, episodes_digest, logged_source, take_in
from textrl.memory import mean_of
from textrl.returns import masked_mean
from textrl.rollout import Rollout
from textrl.task import Task
from textrl.wrappers import AnyEnv

if TYPE_CHECKING:
    from minari import MinariDataset
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ReSTConfig(AgentConfig):
    """Settings of ReST."""

    batch_size: int = 64  # episodes a step of the fit
    grow_batches: int = 32  # so many batches are sampled at once
    group_size: int = 8  # samples of each prompt: thresholds are quantiles within a prompt
    quantiles: tuple[float, ...] = (0.5, 0.7, 0.9)  # 1 - the share that each improve step keeps, rising
    epochs: int = 1  # passes over what each threshold kept

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        for name in ("grow_batches", "group_size", "epochs"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        given = isinstance(self.quantiles, (tuple, list)) and all(is_number(each) for each in self.quantiles)
        check("quantiles", self.quantiles, given, "a tuple of numbers from 0 to 1")
        rising = [0.0, *self.quantiles, 1.0]
        check("quantiles", self.quantiles, len(rising) > 2 and rising == sorted(rising), "rising numbers from 0 to 1")


NOTHING = 0.05
"""Responses of less than this share of the mean weight are left out of a fit: they cost as much as others."""


def keep_weights(returns: Tensor, groups: Tensor, quantile: float, kl_coef: float) -> Tensor:
    """min(1, exp((R - tau) / kl_coef)), tau so that their mean over a prompt is 1 - quantile: (B,), (B,) -> (B,).

    At least one response's weight is left to each prompt. Without a penalty they are 1 above tau, 0 below it, and for
    ties at tau in between.
    """
    kept = torch.zeros(len(returns), dtype=torch.float64, device=returns.device)
    for group in set(groups.tolist()):
        members = (groups == group).nonzero()[:, 0]
        room = max(1.0, (1 - quantile) * len(members))  # the sum of the weights
        found, which = torch.unique(returns[members].double(), return_inverse=True)
        counts = torch.bincount(which).double()
        found, counts = found.flip(0), counts.flip(0)  # (n,) falling
        above = counts.cumsum(0) - counts
        if kl_coef == 0:
            weights = ((room - above) / counts).clamp(0, 1)
        else:  # tau if those `above` have a weight of 1: the others' exp((R - tau) / kl_coef) sum to room - above
            logits = found / kl_coef
            rest = (logits + counts.log()).flip(0).logcumsumexp(0).flip(0)
            taus = rest - (room - above).clamp(min=1e-9).log()
            may = (above < room).nonzero()[:, 0]
            fits = may[taus[may] >= logits[may]]
            tau = taus[fits[0] if len(fits) else may[-1]]  # the last always fits, but for rounding
            weights = (logits - tau).clamp(max=0).exp()
        kept[members] = weights.flip(0)[which]
    return kept.float()


class ReST(Agent):
    """Samples, filters and fits by turns.

    Args:
        env: as for every agent.
        model: as for every agent.
        config: as for every agent.
        dataset: logged episodes to begin with, as for `BPO`; all prompts should have several. None: its own samples.
        settings: fields of `ReSTConfig`, as keywords.
    """

    config: ReSTConfig
    config_class: ClassVar[type[AgentConfig]] = ReSTConfig
    not_saved: ClassVar[tuple[str, ...]] = ("_logged",)

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
        self._logged = None if dataset is None else as_episodes(dataset, self.task, self.device)
        self._taken = ""  # the digest of the data that were begun with
        if self._logged is not None:
            self.dataset_digest = episodes_digest(self._logged)

    @classmethod
    def read_dataset(cls, file: str | Path, skip_bad_rows: bool = False, task: Task | None = None) -> Any:
        """The logged episodes of a file; a Minari dataset's folder is read later."""
        return logged_source(file, skip_bad_rows)

    def collect(self) -> Rollout:
        """Grow: `grow_batches * batch_size` fresh episodes, `group_size` a prompt; first those that were given."""
        if self._logged is not None and self._taken != self.dataset_digest:
            self._taken = self.dataset_digest
            returns = take_in(self._logged, self.base, self.config.max_tokens_per_microbatch)
            last = (self._logged.response_lengths - 1)[:, None]
            rewards = torch.zeros_like(self._logged.rewards).scatter(1, last, returns[:, None])
            return replace(self._logged, rewards=rewards)
        return acting.collect(self, self.config.grow_batches * self.config.batch_size, self.config.group_size)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve: fits what each of the rising thresholds keeps."""
        returns, groups = rollout.rewards.sum(1), prompt_groups(rollout)
        steps: list[dict[str, float]] = []
        size = 0.0
        for quantile in self.config.quantiles:
            weights = keep_weights(returns, groups, quantile, penalty_weight(self.env))
            chosen = (weights >= NOTHING * weights.mean()).nonzero()[:, 0]
            size += float(weights.sum() ** 2 / (weights**2).sum()) / len(self.config.quantiles)
            weights = torch.where(rollout.action_mask, (weights / weights[chosen].mean())[:, None], 0.0)  # (B, T)
            rollout = replace(rollout, advantages=weights)
            for _ in range(self.config.epochs):
                for part in self.shuffled(len(chosen), -(-len(chosen) // self.config.batch_size)):
                    steps.append(self.minimise(self._loss, rollout.select(chosen[part])))
        numbers = mean_of(steps)
        numbers["effective_sample_size"] = size
        return numbers

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of the episodes, by their weights."""
        assert batch.advantages is not None
        return masked_mean(-self.logprobs(batch) * batch.advantages, batch.action_mask), {}
