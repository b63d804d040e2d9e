"""An environment inside whatever wraps it: which it is, what it pays, and an agent that acts in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import check
from .drawing import Sampling, draw
from .env import TextEnv
from .penalty import Policy
from .rollout import Narrow, Rollout, both_masks
from .vector import TextVectorEnv
from .wrappers import AnyEnv, KLPenalty, VectorKLPenalty

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Act = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_] | None]]
"""observations (N, L) -> actions (N,), their log-probabilities (N,), the action masks used (N, V) or None."""


def base_env(env: Any) -> TextEnv | TextVectorEnv:
    """The `TextEnv` or `TextVectorEnv` inside any wrappers (the first one of a `SyncVectorEnv`).

    Raises:
        ValueError: where there is none.
    """
    base = getattr(env, "unwrapped", env)
    if isinstance(base, gym.vector.AsyncVectorEnv):
        right = "one whose parts are in this process: a SyncVectorEnv, or gym.make_vec's own TextVectorEnv"
        raise ValueError(f"env must be {right}; got {base!r}")
    if isinstance(base, gym.vector.SyncVectorEnv):
        parts: list[Any] = [each.unwrapped for each in base.envs]
        if all(isinstance(part, TextEnv) for part in parts):
            kinds = sorted({(part.task.vocab_size, part.temperature) for part in parts})
            right = "one whose parts have the same vocabulary and temperature"
            check("env", f"{base!r} with {kinds}", len(kinds) == 1, right)
        base = parts[0]
    if not isinstance(base, (TextEnv, TextVectorEnv)):
        raise ValueError(f"env must be a textrl environment, wrapped or not; got {base!r}")
    return base


def is_bare(env: AnyEnv) -> bool:
    """Whether nothing stands between the agent and the task's episodes but Gymnasium's own checks."""
    while isinstance(env, (gym.wrappers.PassiveEnvChecker, gym.wrappers.OrderEnforcing)):
        env = env.env
    return type(env) is TextEnv or (type(env) is TextVectorEnv and env.max_episode_steps is None)


Masks = NDArray[np.bool_] | None
"""(N, V): the tokens to draw from; None: all."""


def actor(
    env: AnyEnv,
    policy: Policy,
    temperature: float,
    generator: torch.Generator,
    narrow: Narrow | None = None,
    last: list[Masks] | None = None,
) -> Act:
    """Draws from a policy's logits, inside the action masks of environment and agent, and notes these in `last`."""
    base = base_env(env)

    def act(
        observations: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_] | None]:
        masks = both_masks(action_masks(env) if base.task.masked else None, narrow, observations)
        if last is not None:
            last[:] = [masks]
        tokens, logprobs = draw_inside(policy(observations), masks, Sampling(temperature), generator)
        return tokens.cpu().numpy(), logprobs.cpu().numpy(), masks

    return act


def draw_inside(
    logits: Tensor, masks: NDArray[np.bool_] | None, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One token a row inside the masks (N, V), and its log-probability: (N, V) -> (N,) twice."""
    uniforms = torch.rand(len(logits), generator=generator).to(logits.device)
    forbidden = None if masks is None else ~torch.from_numpy(masks).to(logits.device)
    return draw(logits, uniforms, sampling, forbidden)


def action_masks(env: AnyEnv) -> NDArray[np.bool_]:
    """The masks that hold now, (N, V)."""
    inner: Any = env.unwrapped
    if isinstance(inner, gym.vector.SyncVectorEnv):
        return np.stack([each.get_wrapper_attr("action_masks")() for each in inner.envs])
    asked = env.get_wrapper_attr("action_masks") if isinstance(env, gym.Env) else inner.action_masks
    return np.atleast_2d(asked())


@contextmanager
def attached(env: AnyEnv, policy: Policy, last: list[Masks]) -> Iterator[float]:
    """Lets an environment know who acts in it, as long as this lasts, so that it can pay the whole KL penalty.

    Args:
        env: wrapped or not.
        policy: observations (N, L) -> logits (N, V), without masks.
        last: the masks of the last action, as the `actor` notes them; empty before the first.

    Yields:
        kl_coef, where the environment could not be told and leaves `-kl_coef * log pi` to the agent; else 0.
    """
    base = base_env(env)
    if env.unwrapped is not base:
        yield penalty_weight(env)
        return

    def inside(observations: NDArray[np.int64]) -> Tensor:
        """What the tokens were drawn from: inside the masks that held then."""
        logits: Tensor = policy(observations)
        masks = last[0] if last else None
        return logits if masks is None else logits.masked_fill(~torch.from_numpy(masks).to(logits.device), -torch.inf)

    before, base.policy = base.policy, inside
    try:
        yield 0.0
    finally:
        base.policy = before  # whoever steps the environment next is another


def penalty_weight(env: Any) -> float:
    """The sum of the weights of all KL penalties that are paid, by an environment and by wrappers around it.

    Raises:
        ValueError: for a `SyncVectorEnv` whose parts pay it with different weights.
    """
    weight = 0.0
    while not isinstance(env, (TextEnv, TextVectorEnv)):
        if isinstance(env, (KLPenalty, VectorKLPenalty)):
            weight += env.kl_coef
        if isinstance(env, gym.vector.SyncVectorEnv):
            weights = sorted({round(penalty_weight(each), 9) for each in env.envs})
            check("env", f"{env!r} with {weights}", len(weights) == 1, "one whose parts have the same kl_coef")
            return weight + weights[0]
        env = env.env
    return weight + (0.0 if env.reference is None else env.kl_coef)


def penalty_reference(env: Any) -> PreTrainedModel | None:
    """What the KL penalty of an environment or of a wrapper around it is measured against, if one is paid."""
    while not isinstance(env, (TextEnv, TextVectorEnv)):
        if isinstance(env, (KLPenalty, VectorKLPenalty)):
            return env.penalty.reference
        env = env.envs[0] if isinstance(env, gym.vector.SyncVectorEnv) else env.env
    return env.reference


def check_own_penalty(env: AnyEnv) -> None:
    """Refuses wrappers that pay a KL penalty: an agent that learns from given data goes by the environment's own.

    Raises:
        ValueError: for one of them.
    """
    own, paid = penalty_weight(base_env(env)), penalty_weight(env)
    right = "an environment with a reference and kl_coef of its own, and no wrapper that pays a KL penalty"
    check("env", env, own == paid, right)


def paid_scores(rollout: Rollout, env: AnyEnv) -> Tensor:
    """What an environment paid for each response beside the KL penalty: the scores, but where a wrapper changed them.

    Args:
        rollout: B episodes of the environment.
        env: wrapped or not.

    Returns:
        (B,).
    """
    if is_bare(env):
        return rollout.scores
    paid = rollout.rewards.sum(1)
    if (log_ratios := rollout.log_ratios) is not None:
        paid = paid + penalty_weight(env) * log_ratios.sum(1)
    return torch.where((paid - rollout.scores).abs() < 1e-4 * (1 + paid.abs()), rollout.scores, paid)  # rounding
