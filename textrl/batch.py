"""`Rollout`, a batch of episodes as tensors, and its parts of like length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .asking import AllDropped
from .policy import CausalPolicy, alike
from .returns import masked_mean
from .rows import Row
from .trunk import states_below


@dataclass
class Rollout:
    """A batch of B episodes, at most T response tokens each.

    Attributes:
        tokens: (B, S) int64, each row its prompt and then its response, from the left; 0 after the end.
        prompt_lengths: (B,) int64.
        action_mask: (B, T) bool, which tokens of the response region were the agent's.
        logprobs: (B, T) float32, of the agent's tokens under the policy that drew them; 0 elsewhere, as below. NaN,
            here and in `rewards` and `scores`, where texts were given and it is not known.
        rewards: (B, T) float32, as the environment paid them: the score and the KL penalty.
        scores: (B,) float32, the task's score of each response.
        stopped: (B,) bool, whether the response ended by itself (with the end token).
        truncated: (B,) bool, whether a wrapper's time limit cut the episode off, which is no end; None: nowhere.
        rows: B rows of the task.
        completions: B responses as text.
        ref_logprobs: (B, T), under the frozen reference, or None without one.
        allowed: (B, T, V) bool, the action masks that held when the tokens were drawn, or None.
        values: (B, T), the critic's, once an agent has asked it.
        advantages: (B, T), once an agent has computed them.
        returns: (B, T), likewise.
        below: (B, S, d), what the policy's frozen lower blocks make of the tokens, where it has such blocks.
        drift: mean distance of the log-probabilities of sampling from `logprobs`, where these were computed again
            because the dtype is below float32.
        group_size: samples of one prompt that stand next to each other.
        groups: (B,) int64, which of these each episode belongs to, where some were dropped; else None.
        dropped: what was wrong with the scores of episodes that were left out, one message each.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    action_mask: Tensor
    logprobs: Tensor
    rewards: Tensor
    scores: Tensor
    stopped: Tensor
    rows: list[Row] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    ref_logprobs: Tensor | None = None
    allowed: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    truncated: Tensor | None = None
    below: Tensor | None = None
    drift: float = 0.0
    group_size: int = 1
    groups: Tensor | None = None
    dropped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """B, the number of episodes."""
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        """The agent's tokens in the batch: its timesteps."""
        return int(self.action_mask.sum())

    @property
    def response_lengths(self) -> Tensor:
        """(B,) int64: tokens from the first of the response to the agent's last."""
        places = torch.arange(1, self.action_mask.shape[1] + 1, device=self.tokens.device)
        return (self.action_mask * places).amax(1)

    @property
    def responses(self) -> Tensor:
        """(B, T) int64: the response region, 0 outside the agent's tokens."""
        columns = self.prompt_lengths[:, None] + torch.arange(self.action_mask.shape[1], device=self.tokens.device)
        found = self.tokens.gather(1, columns.clamp(max=self.tokens.shape[1] - 1))
        return torch.where(self.action_mask, found, 0)

    @property
    def grouping(self) -> int | Tensor:
        """What `returns.leave_one_out` takes: how many samples a prompt has, or (B,) which of them are one prompt's."""
        return self.group_size if self.groups is None else self.groups

    @property
    def log_ratios(self) -> Tensor | None:
        """(B, T): log pi - log pi_ref of the agent's tokens, pi the policy that drew them; None without a reference."""
        return None if self.ref_logprobs is None else self.logprobs - self.ref_logprobs

    @property
    def token_masks(self) -> Tensor | None:
        """(n, V) bool: the action masks of the n agent tokens, or None."""
        return None if self.allowed is None else self.allowed[self.action_mask]

    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the n agent tokens stand: rows (n,), the columns (n,) that predict them, the tokens (n,)."""
        rows, steps = self.action_mask.nonzero(as_tuple=True)
        columns = self.prompt_lengths[rows] + steps
        return rows, columns - 1, self.tokens[rows, columns]

    def spread(self, flat: Tensor) -> Tensor:
        """(n,) numbers, one an agent token, back into (B, T), 0 elsewhere."""
        out = flat.new_zeros(self.action_mask.shape)
        return out.masked_scatter(self.action_mask, flat)

    def select(self, indices: Tensor, group_size: int = 1) -> Rollout:
        """The episodes with these indices, cut to the longest of them; `group_size` says how they belong together."""
        lengths = (self.prompt_lengths + self.response_lengths)[indices]
        width, steps = int(lengths.max()), max(1, int(self.response_lengths[indices].max()))
        changes: dict[str, Any] = {"group_size": group_size}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                part = value[indices]
                if each.name in ("tokens", "below"):
                    part = part[:, :width]
                elif part.ndim > 1:
                    part = part[:, :steps]
                changes[each.name] = part
            elif isinstance(value, list) and each.name != "dropped":
                changes[each.name] = [value[i] for i in indices.tolist()] if value else []
        return replace(self, **changes)

    def metrics(self) -> dict[str, float]:
        """What the batch says about the policy, before any update; what is not known (NaN) is left out."""
        lengths = self.action_mask.sum(1).float()
        out = {
            "rollout/score": self.scores.mean(),
            "rollout/score_std": self.scores.std(unbiased=False),
            "rollout/return": self.rewards.sum(1).mean(),
            "rollout/response_length": lengths.mean(),
            "rollout/stopped": self.stopped.float().mean(),
            "rollout/surprisal": -masked_mean(self.logprobs, self.action_mask),
        }
        if (log_ratios := self.log_ratios) is not None:
            out["rollout/kl_reference"] = log_ratios.sum(1).mean()
        if self.drift:
            out["rollout/logprob_drift"] = torch.tensor(self.drift)
        return {key: float(value) for key, value in out.items() if not value.isnan()}


def without(rollout: Rollout, faults: Mapping[int, str]) -> Rollout:
    """The episodes whose scores did not fail; `faults` says by their places which did, and why.

    Raises:
        AllDropped: where none is left.
    """
    if len(faults) == len(rollout):
        raise AllDropped(list(faults.values()))
    every = torch.arange(len(rollout), device=rollout.tokens.device)
    kept = every[[i not in faults for i in range(len(rollout))]]
    left = rollout.select(kept, rollout.group_size)
    return replace(left, groups=kept // rollout.group_size, dropped=list(faults.values()))


def pad_responses(
    prompts: Sequence[Sequence[int] | NDArray[np.int64]], responses: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Lays prompts and responses out as a `Rollout` does: tokens (B, S), prompt_lengths (B,), action_mask (B, T)."""
    prompt_lengths = torch.tensor([len(p) for p in prompts])
    lengths = torch.tensor([len(r) for r in responses])
    tokens = np.zeros((len(prompts), int((prompt_lengths + lengths).max())), dtype=np.int64)
    for row, prompt, response in zip(tokens, prompts, responses, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(response)] = response
    mask = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
    return torch.from_numpy(tokens).to(device), prompt_lengths.to(device), mask.to(device)


def prompt_groups(rollout: Rollout) -> Tensor:
    """Which prompt each episode has, by its tokens: (B,) int64, the same number for the same prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    tokens, lengths = rollout.tokens.tolist(), rollout.prompt_lengths.tolist()
    found = [numbers.setdefault(tuple(row[:n]), len(numbers)) for row, n in zip(tokens, lengths, strict=True)]
    return torch.tensor(found, device=rollout.tokens.device)


def batched_logprobs(policy: CausalPolicy, rollout: Rollout, tokens_at_once: int, masked: bool = False) -> Tensor:
    """A policy's log-probabilities of whole responses, in batched forwards: (B, T) float32; see `batched_readings`."""
    return batched_readings(policy, rollout, tokens_at_once, masked)[0]


@torch.no_grad()
def batched_readings(
    policy: CausalPolicy,
    rollout: Rollout,
    tokens_at_once: int,
    masked: bool = False,
    value: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A policy's log-probabilities of whole responses, and values from the same forwards: (B, T) float32 each.

    Args:
        policy: any policy over the same tokens.
        rollout: the responses.
        tokens_at_once: bound on the tokens of one forward.
        masked: whether the policy keeps inside the rollout's action masks (the reference does not).
        value: a critic on the policy's states, (n, d) -> (n,).
    """
    out = torch.zeros_like(rollout.logprobs)
    values = None if value is None else torch.zeros_like(out)
    for part in microbatches(rollout, tokens_at_once):
        batch = rollout.select(part)
        rows, columns, targets = batch.places()
        hidden = policy.hidden(batch.tokens, rows, columns, batch.below)
        steps = batch.action_mask.shape[1]
        out[part, :steps] = batch.spread(policy.logprobs(hidden, targets, batch.token_masks if masked else None)[0])
        if values is not None and value is not None:
            values[part, :steps] = batch.spread(value(hidden))
    return out, values


def lower_states(policy: CausalPolicy, rollout: Rollout, tokens_at_once: int) -> Tensor:
    """What the policy's frozen lower blocks make of a rollout's tokens: (B, S, d)."""
    batch, width = rollout.tokens.shape
    dim: int = policy.model.config.get_text_config().hidden_size
    out = torch.zeros(batch, width, dim, dtype=policy.model.dtype, device=policy.device)
    for part in microbatches(rollout, tokens_at_once):
        tokens = rollout.select(part).tokens
        out[part, : tokens.shape[1]] = states_below(policy.model, tokens, policy.frozen_blocks)
    return out


def microbatches(rollout: Rollout, tokens_at_once: int, group_size: int = 1) -> list[Tensor]:
    """Indices of the episodes, alike in length together, at most `tokens_at_once` tokens (padding too) a part.

    Groups of `group_size` episodes next to each other stay whole; a part holds at least one.
    """
    lengths = (rollout.prompt_lengths + rollout.response_lengths).cpu().view(-1, group_size)  # (B/k, k)
    members = torch.arange(lengths.numel()).view_as(lengths)
    device = rollout.tokens.device
    parts = alike(lengths.amax(1).tolist(), tokens_at_once, device, group_size)
    return [members[part].flatten().to(device) for part in parts]
