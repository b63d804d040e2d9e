"""Collecting a rollout by stepping an environment, whatever wraps it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from .asking import AllDropped
from .batch import pad_responses
from .drawing import Sampling, draw
from .env import TextEnv
from .formats import Row
from .generation import NotFinite
from .penalty import Policy
from .rollout import Narrow, Rollout, both_masks
from .scores import about
from .task import FAULT, Task
from .vector import TextVectorEnv
from .wrappers import AnyEnv, KLPenalty, VectorKLPenalty, check_taken

Act = Callable[[NDArray[np.int64]], tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_] | None]]
"""observations (N, L) -> actions (N,), their log-probabilities (N,), the action masks used (N, V) or None."""


def base_env(env: Any) -> TextEnv | TextVectorEnv:
    """The `TextEnv` or `TextVectorEnv` inside any wrappers (the first one of a `SyncVectorEnv`).

    Raises:
        ValueError: where there is none.
    """
    base = getattr(env, "unwrapped", env)
    if isinstance(base, gym.vector.SyncVectorEnv):
        base = base.envs[0].unwrapped
    if not isinstance(base, (TextEnv, TextVectorEnv)):
        raise ValueError(f"env must be a textrl environment, wrapped or not; got {base!r}")
    return base


def is_bare(env: AnyEnv) -> bool:
    """Whether nothing stands between the agent and the task's episodes but Gymnasium's own checks."""
    while isinstance(env, (gym.wrappers.PassiveEnvChecker, gym.wrappers.OrderEnforcing)):
        env = env.env
    return type(env) is TextEnv or (type(env) is TextVectorEnv and env.max_episode_steps is None)


def actor(
    env: AnyEnv, policy: Policy, temperature: float, generator: torch.Generator, narrow: Narrow | None = None
) -> Act:
    """Draws from a policy's logits, inside the action masks of environment and agent where there are any."""
    base = base_env(env)

    def act(
        observations: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_] | None]:
        masks = both_masks(action_masks(env) if base.task.masked else None, narrow, observations)
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
def attached(env: AnyEnv, policy: Policy, narrow: Narrow | None) -> Iterator[float]:
    """Lets an environment know who acts in it, as long as this lasts, so that it can pay the whole KL penalty.

    Args:
        env: wrapped or not.
        policy: observations (N, L) -> logits (N, V), without masks.
        narrow: the agent's own masks, if it has any.

    Yields:
        kl_coef, where the environment could not be told and leaves `-kl_coef * log pi` to the agent; else 0.
    """
    base = base_env(env)
    if env.unwrapped is not base:
        yield penalty_weight(env)
        return

    def inside(observations: NDArray[np.int64]) -> Tensor:
        """What tokens are drawn from: inside the masks that hold now."""
        logits: Tensor = policy(observations)
        masks = both_masks(np.atleast_2d(base.action_masks()) if base.task.masked else None, narrow, observations)
        return logits if masks is None else logits.masked_fill(~torch.from_numpy(masks).to(logits.device), -torch.inf)

    before, base.policy = base.policy, inside
    try:
        yield 0.0
    finally:
        base.policy = before  # whoever steps the environment next is another


def penalty_weight(env: Any) -> float:
    """The sum of the weights of all KL penalties that are paid, by an environment and by wrappers around it."""
    weight = 0.0
    while not isinstance(env, (TextEnv, TextVectorEnv)):
        if isinstance(env, (KLPenalty, VectorKLPenalty)):
            weight += env.kl_coef
        env = env.envs[0] if isinstance(env, gym.vector.SyncVectorEnv) else env.env
    return weight + (0.0 if env.reference is None else env.kl_coef)


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
    if rollout.ref_logprobs is not None:
        paid = paid + penalty_weight(env) * (rollout.logprobs - rollout.ref_logprobs).sum(1)
    return torch.where((paid - rollout.scores).abs() < 1e-4 * (1 + paid.abs()), rollout.scores, paid)  # rounding


@dataclass
class _Episode:
    prompt: NDArray[np.int64]
    row: Row
    actions: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    score: float = 0.0
    completion: str = ""
    fault: str | None = None
    truncated: bool = False

    def end(self, infos: dict[str, Any], i: int, task: Task, kl_coef: float) -> None:
        """Takes the score and the text from what the environment said of row i, or else from what was done.

        Without a score that is what was paid beside the KL penalty, whose weight is `kl_coef`.
        """
        known = "score" in infos and ("_score" not in infos or bool(infos["_score"][i]))  # of this row, not of another
        if known and "completion" in infos:  # a wrapper may leave texts out
            self.completion = infos["completion"][i]
        else:
            self.completion = task.decode([self.actions])[0]
        if known:
            self.score = float(infos["score"][i])
        else:
            pairs = zip(self.logprobs, self.ref_logprobs, strict=True) if self.ref_logprobs else ()
            self.score = sum(self.rewards) + kl_coef * sum(logprob - ref for logprob, ref in pairs)
        if math.isnan(self.score) or any(map(math.isnan, self.rewards)):
            said = infos[FAULT][i] if FAULT in infos else None
            self.fault = said or f"score failed for {about(self.row['prompt'], self.completion)}"


def collect_stepped(
    env: AnyEnv,
    task: Task,
    act: Act,
    batch_size: int,
    *,
    device: torch.device,
    seed: int | None = None,
    missing_penalty: float = 0.0,
) -> Rollout:
    """Steps an environment, whatever wraps it, until `batch_size` episodes are whole.

    Every row of a vector environment plays the same number of episodes, so that short ones are not preferred.

    Args:
        env: single or vector, with the observations of `TextEnv`.
        task: what the environment plays.
        act: the agent.
        batch_size: B; with a vector environment rounded up to a multiple of `num_envs`.
        device: where the tensors go.
        seed: for the first reset.
        missing_penalty: kl_coef, where the environment could not be told the policy and leaves `-kl_coef * log pi` to
            the agent; else 0.

    Raises:
        ValueError: for an environment whose wrapper changes actions: their log-probabilities are not known.
        NotFinite: where the agent's log-probabilities are not.
        AllDropped: where every score failed and was let pass.
    """
    return _stack(_played(env, task, act, batch_size, missing_penalty, seed), task, device)


def collect_groups(
    env: AnyEnv,
    task: Task,
    act: Act,
    rows: Sequence[Row],
    group_size: int,
    *,
    device: torch.device,
    seed: int | None = None,
    missing_penalty: float = 0.0,
) -> Rollout:
    """Steps an environment as `collect_stepped` does, for `group_size` episodes of each of these rows of the task.

    All rows of a vector environment play the same prompt at once, and one episode of it each.

    Args:
        env: as for `collect_stepped`.
        task: likewise.
        act: likewise.
        rows: the groups' rows.
        group_size: k; the episodes of a group are next to each other.
        device: as for `collect_stepped`.
        seed: likewise.
        missing_penalty: likewise.

    Raises:
        ValueError: likewise, and for a wrapper that does not hand on `reset(options={"row": ...})`.
    """
    episodes: list[_Episode] = []
    for row in rows:
        group: list[_Episode] = []
        while len(group) < group_size:
            group += _played(env, task, act, getattr(env, "num_envs", 1), missing_penalty, seed, {"row": row})
            seed = None
        if any(episode.row["prompt"] != row["prompt"] for episode in group):
            raise ValueError(f'env must hand options={{"row": ...}} on to the environment inside; got {env!r}')
        episodes += group[:group_size]
    return _stack(episodes, task, device, group_size)


def _played(
    env: AnyEnv,
    task: Task,
    act: Act,
    count: int,
    missing_penalty: float,
    seed: int | None,
    options: dict[str, Any] | None = None,
) -> list[_Episode]:
    """At least `count` episodes, as many in each row of a vector environment, from a reset with these options on."""
    vector = isinstance(env, gym.vector.VectorEnv)
    number: int = getattr(env, "num_envs", 1)
    mode = env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP) if vector else AutoresetMode.DISABLED
    quota, kl_coef = -(-count // number), penalty_weight(env)
    finished: list[list[_Episode]] = [[] for _ in range(number)]
    observations, infos = env.reset(seed=seed, options=options)
    observations = observations if vector else observations[None]
    running: list[_Episode | None] = [_begun(env, observations, i, task) for i in range(number)]
    while any(len(done) < quota for done in finished):
        actions, logprobs, masks = _finite(*act(observations))
        step = env.step(actions if vector else int(actions[0]))
        observations, rewards, terminated, truncated, infos = step if vector else _batched(*step)
        ended = np.asarray(terminated) | np.asarray(truncated)
        for i, episode in enumerate(running):
            if episode is None:  # NEXT_STEP: this step was the reset
                running[i] = _begun(env, observations, i, task)
                continue
            episode.actions.append(int(actions[i]))
            episode.logprobs.append(float(logprobs[i]))
            episode.rewards.append(float(rewards[i]) - missing_penalty * float(logprobs[i]))
            episode.masks.extend([] if masks is None else [masks[i]])
            _check_row(env, None if ended[i] else _written(observations[i], task), int(actions[i]))
            said = infos.get("final_info", infos) if ended[i] and mode == AutoresetMode.SAME_STEP else infos
            if "ref_logprob" in said:
                episode.ref_logprobs.append(float(said["ref_logprob"][i]))
            if ended[i]:
                episode.end(said, i, task, kl_coef)
                episode.truncated = bool(truncated[i]) and not bool(terminated[i])
                if len(finished[i]) < quota:
                    finished[i].append(episode)
                running[i] = None
        if mode == AutoresetMode.DISABLED and ended.any():
            observations = env.reset(options={"reset_mask": ended})[0] if vector else env.reset()[0][None]
        if mode != AutoresetMode.NEXT_STEP:
            for i in np.flatnonzero(ended).tolist():
                running[i] = _begun(env, observations, i, task)
    return [episode for done in finished for episode in done]


def _begun(env: Any, observations: NDArray[np.int64], i: int, task: Task) -> _Episode:
    """The episode that has just begun in row i, with the row of the task that is played there, whatever wraps it."""
    inner: Any = env.unwrapped
    if isinstance(inner, gym.vector.SyncVectorEnv):
        (row,) = inner.envs[i].unwrapped.rows  # type: ignore[attr-defined]
    else:
        row = inner.rows[i]
    return _Episode(_written(observations[i], task), row)


def _check_row(env: Any, text: NDArray[np.int64] | None, action: int) -> None:
    """That a text ends with the token that was given; None: it has ended, and is not seen any more."""
    if text is not None:
        check_taken(env, text[-1], action)


def _finite(actions: NDArray[np.int64], logprobs: NDArray[np.float32], masks: NDArray[np.bool_] | None) -> Any:
    """What an agent did, where it knew what it did."""
    if not np.isfinite(logprobs).all():
        raise NotFinite
    return actions, logprobs, masks


def _batched(observation: Any, reward: Any, terminated: Any, truncated: Any, info: dict[str, Any]) -> tuple[Any, ...]:
    return observation[None], [reward], [terminated], [truncated], {key: [value] for key, value in info.items()}


def _written(observation: NDArray[np.int64], task: Task) -> NDArray[np.int64]:
    written: NDArray[np.int64] = observation[observation != task.vocab_size]
    return written


def _stack(every: list[_Episode], task: Task, device: torch.device, group_size: int = 1) -> Rollout:
    """Episodes, `group_size` of a prompt next to each other, as a `Rollout`; those left out whose scores failed."""
    faults = [e.fault for e in every if e.fault is not None]
    kept = [i for i, e in enumerate(every) if e.fault is None]
    episodes = [every[i] for i in kept]
    if not episodes:
        raise AllDropped(faults)
    tokens, prompt_lengths, mask = pad_responses([e.prompt for e in episodes], [e.actions for e in episodes], device)
    rollout = Rollout(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        action_mask=mask,
        logprobs=torch.zeros(mask.shape, device=device),
        rewards=torch.zeros(mask.shape, device=device),
        scores=torch.tensor([e.score for e in episodes], device=device),
        stopped=torch.tensor([e.actions[-1] == task.eos_token_id for e in episodes], device=device),
        truncated=torch.tensor([e.truncated for e in episodes], device=device)
        if any(e.truncated for e in episodes)
        else None,
        rows=[e.row for e in episodes],
        completions=[e.completion for e in episodes],
        group_size=group_size,
        groups=torch.tensor(kept, device=device) // group_size if faults else None,
        dropped=faults,
    )

    def flat(name: str) -> Tensor:
        return rollout.spread(torch.tensor([x for e in episodes for x in getattr(e, name)], device=device))

    rollout.logprobs, rollout.rewards = flat("logprobs"), flat("rewards")
    if episodes[0].ref_logprobs:
        rollout.ref_logprobs = flat("ref_logprobs")
    if episodes[0].masks:
        allowed = torch.ones(*mask.shape, task.vocab_size, dtype=torch.bool)
        for i, episode in enumerate(episodes):
            allowed[i, : len(episode.masks)] = torch.from_numpy(np.stack(episode.masks))
        rollout.allowed = allowed.to(device)
    return rollout
