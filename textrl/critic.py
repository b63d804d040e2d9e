"""A critic with a trunk of its own, and values of whole batches in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import adapted_critic, has_adapter
from .batch import microbatches
from .models import cast, train_last_layers
from .offline import given_rollout
from .policy import CausalPolicy, values_at
from .returns import explained_variance, gae, masked_mean, whiten
from .rollout import Rollout
from .scalars import value_model
from .trunk import same_blocks

if TYPE_CHECKING:
    from .agent import Agent


class Critic:
    """The value of the state before each token, from a scalar model that starts at zero.

    Args:
        policy: whose device, dtype and frozen lower blocks hold.
        start: the model whose trunk is copied: the policy's own, or a reward model's. Where the policy has an adapter
            the critic has one too, over that trunk's own weights.
        trainable_layers: as for the policy.

    Attributes:
        model: the scalar model.
    """

    def __init__(self, policy: CausalPolicy, start: PreTrainedModel, trainable_layers: int | None = None) -> None:
        if has_adapter(policy.model):  # the base weights of its start, and an adapter of its own
            self.model = adapted_critic(policy.model, start).to(device=policy.device)
        else:
            self.model = cast(value_model(start), policy.model.dtype, policy.device)
            train_last_layers(self.model, trainable_layers)
        self.policy = policy
        self.compare()

    def compare(self) -> None:
        """Looks whether the policy's frozen blocks are its own too, which then run once for both; after each load."""
        blocks = self.policy.frozen_blocks
        self._blocks = blocks if same_blocks(self.policy.model, self.model, blocks) else 0

    def __call__(self, batch: Rollout) -> Tensor:
        """(B, T) float32, differentiable; 0 outside the agent's tokens."""
        rows, columns, _ = batch.places()
        return batch.spread(values_at(self.model, batch.tokens, rows, columns, batch.below, self._blocks))


@torch.no_grad()
def batched_values(critic: Callable[[Rollout], Tensor], rollout: Rollout, tokens_at_once: int) -> Tensor:
    """A critic's values of a whole rollout in microbatches, without gradients: (B, T)."""
    out = torch.zeros_like(rollout.rewards)
    for part in microbatches(rollout, tokens_at_once):
        batch = rollout.select(part)
        out[part, : batch.action_mask.shape[1]] = critic(batch)
    return out


def bootstrapped(rollout: Rollout, critic: Callable[[Rollout], Tensor], gamma: float) -> Rollout:
    """The rollout with gamma * V(s) in the last reward of an episode that a time limit cut off in the state s.

    Such an episode would have gone on; one that came to its end, or to the task's horizon, is worth nothing more.
    """
    if rollout.truncated is None or not bool(rollout.truncated.any()):
        return rollout
    cut = rollout.truncated.nonzero()[:, 0]
    part, last = rollout.select(cut), (rollout.response_lengths - 1)[cut, None]  # (b, 1)
    further = torch.zeros(len(cut), int(last.max()) + 2, dtype=torch.bool, device=last.device).scatter(
        1, last + 1, True
    )
    after = replace(part, tokens=nn.functional.pad(part.tokens, (0, 1)), action_mask=further, below=None)
    with torch.no_grad():
        values = critic(after).gather(1, last + 1)  # of the state before one more token
    return replace(rollout, rewards=rollout.rewards.index_put((cut[:, None], last), gamma * values, accumulate=True))


def with_advantages(
    rollout: Rollout,
    critic: Callable[[Rollout], Tensor],
    tokens_at_once: int,
    gamma: float,
    gae_lambda: float,
    whitened: bool,
) -> tuple[Rollout, float]:
    """The rollout with a critic's values, advantages by GAE, and returns, and how much of the returns the critic knew.

    The critic is asked where sampling has not brought its values along.

    The returns are the advantages, before whitening, plus the values.
    """
    rollout = bootstrapped(rollout, critic, gamma)
    values = batched_values(critic, rollout, tokens_at_once) if rollout.values is None else rollout.values
    mask = rollout.action_mask
    advantages, returns = gae(rollout.rewards, values, mask, gamma, gae_lambda)
    known = explained_variance(values, returns, mask)
    if whitened:
        advantages = whiten(advantages, mask)
    return replace(rollout, values=values, advantages=advantages, returns=returns), known


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Half the masked mean of the squared error: (B, T) three times -> ()."""
    return 0.5 * masked_mean((values - returns) ** 2, mask)


def state_values(agent: Agent) -> Callable[[NDArray[np.int64]], NDArray[np.float32]] | None:
    """An agent's critic as a function of states, observations (B, L) -> (B,); None for an agent without one.

    `env.unwrapped.value = state_values(agent)` shades the tokens of the environment's pictures by it.
    """
    critic: Callable[[Rollout], Tensor] | None = getattr(agent, "value", None)
    if critic is None:
        return None

    @torch.no_grad()
    def values(observations: NDArray[np.int64]) -> NDArray[np.float32]:
        written = [row[row != agent.task.vocab_size].tolist() for row in observations]
        anything = [[agent.task.eos_token_id]] * len(written)  # a critic speaks of the state before a token
        batch = given_rollout(agent.task, written, anything, agent.device)
        found: NDArray[np.float32] = critic(batch)[:, 0].cpu().numpy()
        return found

    return values
