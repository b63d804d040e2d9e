"""Off-policy evaluation: what another policy would score, from a logged batch alone, and whether the batch can tell.

With mu the policy that was logged, pi the one to evaluate, w_t = prod_{k <= t} pi(a_k | s_k) / mu(a_k | s_k), w = w_T,
r_t the score of a token where the batch holds such (else the whole of it is the last one's), and G the return:

    is      mean_i w_i G_i                                                     (importance sampling; Precup 2000)
    wis     sum_i w_i G_i / sum_i w_i                                          (weighted: biased, consistent, calmer)
    pdis    mean_i sum_t w_it r_it                                             (per decision; Precup 2000)
    dr      mean_i sum_t [w_it r_it - (w_it Q(s_it, a_it) - w_i,t-1 V(s_it))]  (doubly robust; Jiang 2016)

Q is any estimate, V(s) = sum_a pi(a | s) Q(s, a): "dr" is unbiased whatever Q is, and the calmer the better Q is. The
effective sample size, (sum w)^2 / sum w^2, says how many of the episodes count: where it is small, a batch
cannot tell, whatever the intervals say. Nor can it where the mean of w is below 1, its expectation: the rest of what
pi says is in no episode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .acting import evaluated_policy
from .agent import Agent
from .attaching import base_env, is_bare, penalty_weight
from .batch import batched_logprobs, microbatches
from .config import check
from .episodes import as_episodes, check_whole, unfinished
from .logprobs import NEVER
from .policy import CausalPolicy
from .returns import discounted_returns
from .rollout import Rollout, masks_along, policy_in
from .wrappers import AnyEnv

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from minari import MinariDataset
    from transformers import PreTrainedModel

FEW = 30
"""Fewer effective episodes than this cannot tell."""
COVERED = 0.9
"""Nor can episodes in which less than this share of the policy's responses lies."""
TOKENS_AT_ONCE = 16384


@dataclass(frozen=True)
class Estimate:
    """One estimator's answer.

    Attributes:
        value: of the mean return.
        std_error: its standard error.
        low: lower end of the confidence interval.
        high: upper end.
    """

    value: float
    std_error: float
    low: float
    high: float


@dataclass(frozen=True)
class OffPolicyEvaluation:
    """What a logged batch says about another policy.

    Attributes:
        estimates: by name: "is", "wis", "pdis" and "dr".
        effective_sample_size: how many of the episodes count, from 1 to `episodes`.
        largest_weight: the share of the largest weight in their sum.
        mean_weight: the mean of w, which is 1 but for noise where the batch holds all that the policy says.
        episodes: in the batch.
        logged: the mean return of the policy that was logged, on the batch.
    """

    estimates: dict[str, Estimate]
    effective_sample_size: float
    largest_weight: float
    mean_weight: Estimate
    episodes: int
    logged: float

    @property
    def can_tell(self) -> bool:
        """Whether the intervals mean something: enough episodes count (30), and what the policy says is among them."""
        return self.effective_sample_size >= FEW and self.covered

    @property
    def covered(self) -> bool:
        """Whether the mean weight is at least 0.9, three standard errors allowed for."""
        return self.mean_weight.value + 3 * self.mean_weight.std_error >= COVERED


def ope(
    dataset: Rollout | MinariDataset | str | Path | Sequence[Mapping[str, Any]],
    model: Agent | PreTrainedModel | str | Path,
    env: AnyEnv,
    *,
    penalised: bool = False,
    q: Callable[[Rollout], Tensor] | None = None,
    confidence: float = 0.95,
) -> OffPolicyEvaluation:
    """Evaluates a policy on logged episodes, without a step in the environment.

    Args:
        dataset: episodes with scores and logged log-probabilities, as `textrl.collect` writes them, or a `Rollout`.
        model: the policy, inside the task's action masks: an agent (for NLPO inside its own too; for BestOfN what draws
            its samples), a language model, its folder or name.
        env: whose task, temperature, reference and KL coefficient hold.
        penalised: evaluates score - kl_coef * KL(pi || pi_ref) in place of the score.
        q: for "dr", a rollout -> estimates of Q(s_t, .), (B, T, V). Default: the mean return of each token at each
            place, from the half of the batch that the episode is not in, so that "dr" stays unbiased.
        confidence: of the intervals, which take the estimates to be normal: where the policies differ much, and some
            response that is hardly ever logged has a large weight, they hold the truth less often than they say.

    Raises:
        ValueError: for episodes without log-probabilities or scores, or fewer than four.
    """
    check("confidence", confidence, 0 < confidence < 1, "above 0 and below 1")
    base = base_env(env)
    policy, narrow = evaluated_policy(model, base)
    logged = as_episodes(dataset, base.task, policy.device)
    logged = replace(logged, allowed=masks_along(base.task, logged, narrow))  # those of the policy, whoever was logged
    check_whole(logged)
    cut = unfinished(logged, base.task)
    right = f"episodes that end with the end token or after max_new_tokens={base.task.max_new_tokens} tokens"
    check("dataset", f"{cut} of {len(logged)} that end before", cut == 0 or not is_bare(env), right)
    check("dataset", f"{len(logged)} episodes", len(logged) >= 4, "at least 4 episodes")
    for name in ("logprobs", "scores"):
        known = not bool(getattr(logged, name).isnan().any())
        check("dataset", f"episodes without {name}", known, f"episodes with {name}")
    mask = logged.action_mask
    new = batched_logprobs(policy, logged, TOKENS_AT_ONCE, masked=True).double()
    rewards = score_by_token(logged, penalty_weight(env))
    old_rewards = rewards.clone()
    if penalised:
        check("penalised", penalised, base.reference is not None, "False without a reference")
        assert base.reference is not None
        reference = policy_in(base, base.reference)
        ref = batched_logprobs(reference, logged, TOKENS_AT_ONCE).double()
        possible = mask if logged.allowed is None else mask & (new > NEVER / 2)  # the others have a weight of 0
        rewards -= torch.where(possible, base.kl_coef * (new - ref), 0.0)
        old_rewards -= base.kl_coef * (logged.logprobs.double() - ref) * mask
    log_weights = ((new - logged.logprobs.double()) * mask).cumsum(1)  # (B, T)
    chosen, states = _q_and_v(policy, logged, rewards, q)
    values = estimators(rewards, log_weights, mask, chosen, states)
    spread = NormalDist().inv_cdf(0.5 + confidence / 2)

    def estimate(parts: Tensor) -> Estimate:
        value, error = float(parts.mean()), float(parts.std() / len(parts) ** 0.5)
        return Estimate(value, error, value - spread * error, value + spread * error)

    shares = weight_shares(log_weights[:, -1])
    return OffPolicyEvaluation(
        {name: estimate(parts) for name, parts in values.items()},
        float(1 / (shares**2).sum()),
        float(shares.max()),
        estimate(log_weights[:, -1].exp()),
        len(logged),
        float(old_rewards.sum(1).mean()),
    )


def score_by_token(logged: Rollout, kl_coef: float) -> Tensor:
    """The score as it was paid, (B, T) float64: each token's own where the rewards tell it, else all at the last.

    They do where they add up to the score in every episode, once the KL penalty of this weight is taken off: those of
    rows from a file are not known, and those of another penalty or a wrapper are others.
    """
    mask, scores, paid = logged.action_mask, logged.scores.double(), logged.rewards.double()
    if logged.ref_logprobs is not None:
        paid = paid + kl_coef * (logged.logprobs.double() - logged.ref_logprobs.double())
    paid = torch.where(mask, paid, 0.0)
    rest = scores - paid.sum(1)  # rounding
    if not bool((rest.abs() < 1e-4 * (1 + scores.abs())).all()):
        paid, rest = torch.zeros_like(paid), scores
    return paid.scatter_add(1, logged.response_lengths[:, None] - 1, rest[:, None])


def weight_shares(log_weights: Tensor) -> Tensor:
    """w_i / sum w, (B,) -> (B,), though w itself be too small or too large to be a number; NaN where all w are 0."""
    if float(log_weights.max()) < NEVER / 2:
        return torch.full_like(log_weights, torch.nan)
    return log_weights.softmax(0)


def estimators(rewards: Tensor, log_weights: Tensor, mask: Tensor, q: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The estimators, each as B numbers whose mean is the estimate.

    For "wis" they are u + w_i (G_i - u) / mean w with u the estimate, whose deviations give the standard error by the
    delta method.

    Args:
        rewards: (B, T).
        log_weights: (B, T), log w_t; past the end of a response its last.
        mask: (B, T) bool.
        q: (B, T), Q of what was done.
        v: (B, T), V of where it was done.
    """
    returns, weights, shares = (rewards * mask).sum(1), log_weights.exp(), weight_shares(log_weights[:, -1])
    before = torch.cat([torch.ones_like(weights[:, :1]), weights[:, :-1]], 1)
    weighted = (shares * returns).sum()
    return {
        "is": weights[:, -1] * returns,
        "wis": weighted + len(shares) * shares * (returns - weighted),
        "pdis": (weights * rewards * mask).sum(1),
        "dr": ((weights * rewards - (weights * q - before * v)) * mask).sum(1),
    }


def token_means(rewards: Tensor, tokens: Tensor, mask: Tensor, vocab_size: int) -> Tensor:
    """The mean return-to-go after each token at each place, drawn to the place's mean as if by one more: (T, V)."""
    returns = discounted_returns(rewards, mask)
    steps = mask.shape[1]
    places = torch.arange(steps, device=mask.device).expand_as(tokens)[mask]
    counts = torch.zeros(steps, vocab_size, dtype=torch.float64, device=mask.device)
    sums = torch.zeros_like(counts)
    counts.index_put_((places, tokens[mask]), torch.ones_like(returns[mask]), accumulate=True)
    sums.index_put_((places, tokens[mask]), returns[mask], accumulate=True)
    means = sums.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1)
    return (sums + means) / (counts + 1)


@torch.no_grad()
def _q_and_v(
    policy: CausalPolicy, logged: Rollout, rewards: Tensor, q: Callable[[Rollout], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Q of each token taken and V of the state it was taken in, under the policy: (B, T) twice."""
    responses, half = logged.responses, torch.arange(len(logged), device=logged.tokens.device) % 2
    tables = []
    for side in (0, 1):  # each half's Q comes from the other
        other = half != side
        tables.append(token_means(rewards[other], responses[other], logged.action_mask[other], policy.vocab_size))
    both = torch.stack(tables)  # (2, T, V)
    chosen, states = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for part in microbatches(logged, TOKENS_AT_ONCE):
        batch = logged.select(part)
        rows, columns, targets = batch.places()
        steps = columns + 1 - batch.prompt_lengths[rows]
        if q is None:
            values = both[half[part][rows], steps]  # (n, V)
        else:
            asked, shape = q(batch), (*batch.action_mask.shape, policy.vocab_size)
            check("q", tuple(asked.shape), asked.shape == shape, f"a function of a rollout that gives {shape}")
            values = asked[rows, steps].double()
        logits = policy.logits(policy.hidden(batch.tokens, rows, columns)).double() / policy.temperature
        if (allowed := batch.token_masks) is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        width = batch.action_mask.shape[1]
        chosen[part, :width] = batch.spread(values.gather(1, targets[:, None])[:, 0])
        states[part, :width] = batch.spread((logits.softmax(-1) * values).sum(-1))
    return chosen, states
