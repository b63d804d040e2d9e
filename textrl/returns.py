"""Returns, advantages and whitening: pure functions of (B, T) tensors and a mask of the agent's tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the places where `mask` is True; 0 where there are none. Shapes alike -> ()."""
    _check_alike(x=x, mask=mask)
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance (divided by the count) of `x` over the places where `mask` is True: -> ()."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, keep_mean: bool = False) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the mask, 0 elsewhere; `keep_mean` adds the mean back (Ziegler 2019)."""
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    return torch.where(mask, white + mean if keep_mean else white, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns) over the mask: 1 for a perfect critic, 0 for a constant one."""
    return float(1 - masked_var(returns - values, mask) / masked_var(returns, mask).clamp(min=1e-8))


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma * G_{t+1} over the agent's tokens: (B, T) -> (B, T), 0 outside the mask.

    Places outside the mask between two of the agent's tokens (text that an environment added) are stepped over: they
    cost no discount, and a reward there counts for the token before.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, gae_lambda: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman 2016, eq. 16) over the agent's tokens; value 0 past the end.

    delta_t = r_t + gamma * V_{t+1} - V_t,  A_t = delta_t + gamma * lambda * A_{t+1}

    Args:
        rewards: (B, T).
        values: (B, T), V of the state before each token.
        mask: (B, T) bool, the agent's tokens; others are stepped over, and a reward there counts for the token before.
        gamma: discount per token.
        gae_lambda: lambda, 1 for Monte Carlo, 0 for one-step.

    Returns:
        advantages and returns (advantages + values), both (B, T), 0 outside the mask.
    """
    _check_sequences(gamma, gae_lambda, rewards=rewards, values=values, mask=mask)
    if rewards.device.type != "cpu":  # T small steps, each of which a GPU would take longer to start than to do
        found = gae(rewards.cpu(), values.cpu(), mask.cpu(), gamma, gae_lambda)
        return found[0].to(rewards.device), found[1].to(rewards.device)
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    value = torch.zeros_like(advantage)  # V_{t+1}: zero past the end
    between = torch.zeros_like(advantage)  # rewards at places that are not the agent's
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + between + gamma * value - values[:, t]
        advantage = torch.where(here, delta + gamma * gae_lambda * advantage, advantage)
        value = torch.where(here, values[:, t], value)
        between = torch.where(here, 0.0, between + rewards[:, t])
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def leave_one_out(scores: Tensor, group_size: int | Tensor) -> Tensor:
    """Score minus the mean score of the other samples of its prompt (RLOO; Kool 2019, Ahmadian 2024).

    Args:
        scores: (B,), samples of one prompt next to each other.
        group_size: k >= 2 samples a prompt, B is a multiple of it; or (B,) int64 which samples are one prompt's. A
            prompt's only sample is told nothing: 0.

    Returns:
        (B,).
    """
    if isinstance(group_size, Tensor):
        sums, counts = _group_sums(scores, group_size), _group_sums(torch.ones_like(scores), group_size)
        return torch.where(counts > 1, scores - (sums - scores) / (counts - 1).clamp(min=1), 0.0)
    groups = _samples(scores, group_size)  # (B/k, k)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).view(-1)


def mean_of_others(scores: Tensor, groups: Tensor, prior: Tensor) -> Tensor:
    """The mean over `prior` and the scores of the other samples of its group: (B,), (B,) int64, (B,) -> (B,).

    A baseline without bias wherever `prior` does not hang on the scores; that of a prompt's only sample is `prior`.
    """
    others = _group_sums(scores, groups) - scores
    return (prior + others) / _group_sums(torch.ones_like(scores), groups)


def group_normalised(scores: Tensor, group_size: int | Tensor) -> Tensor:
    """(score - mean) / (std + 1e-4) within the samples of a prompt (GRPO; Shao 2024): (B,) -> (B,)."""
    if isinstance(group_size, Tensor):
        counts = _group_sums(torch.ones_like(scores), group_size)
        centred = scores - _group_sums(scores, group_size) / counts
        std = (_group_sums(centred**2, group_size) / (counts - 1).clamp(min=1)).sqrt()
        return centred / (std + 1e-4)
    groups = _samples(scores, group_size)  # (B/k, k)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)


def _check_alike(**tensors: Tensor) -> None:
    """Refuses tensors of different shapes, which would be broadcast in silence."""
    if not all(isinstance(each, Tensor) for each in tensors.values()):
        raise ValueError(
            f"{' and '.join(tensors)} must be tensors; got {[type(each).__name__ for each in tensors.values()]}"
        )
    if len({each.shape for each in tensors.values()}) > 1:
        raise ValueError(
            f"{' and '.join(tensors)} must have one shape; got {[tuple(each.shape) for each in tensors.values()]}"
        )


def _check_sequences(gamma: float, gae_lambda: float, **tensors: Tensor) -> None:
    """Refuses what is no batch (B, T) of numbers and a mask, and discounts that are none."""
    _check_alike(**tensors)
    first, mask = tensors["rewards"], tensors["mask"]
    if first.ndim != 2 or not first.is_floating_point() or mask.dtype != torch.bool:
        raise ValueError(
            f"rewards must be floats and mask bools, (B, T); got {first.dtype} and {mask.dtype}, {tuple(first.shape)}"
        )
    for name, value in (("gamma", gamma), ("gae_lambda", gae_lambda)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1; got {value!r}")


def _samples(scores: Tensor, group_size: int) -> Tensor:
    """The scores of each prompt's samples: (B,) -> (B/k, k)."""
    if group_size < 2 or scores.ndim != 1 or len(scores) % group_size:
        raise ValueError(
            f"group_size must be at least 2 and divide the scores (B,), here {tuple(scores.shape)}; got {group_size}"
        )
    return scores.view(-1, group_size)


def _group_sums(values: Tensor, groups: Tensor) -> Tensor:
    """For each sample the sum over its group: (B,), (B,) -> (B,)."""
    sums = values.new_zeros(int(groups.max()) + 1).scatter_add(0, groups, values)
    return sums[groups]
