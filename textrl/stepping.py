"""Collecting a rollout by stepping an environment, whatever wraps it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from torch import Tensor

from .arguments import check_observations
from .asking import AllDropped
from .attaching import Act, penalty_weight
from .batch import pad_responses
from .config import check
from .generation import NotFinite
from .rollout import Rollout
from .rows import Row
from .scores import about
from .task import FAULT, Task
from .wrappers import AnyEnv, check_taken, texts_after


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

    def __len__(self) -> int:
        return len(self.prompt) + len(self.actions)

    def end(self, infos: dict[str, Any], i: int, task: Task, kl_coef: float) -> None:
        """Takes the score and the text from what the environment said of row i, or else from what was done.

        Without a score, of an episode that was ended early, that is what was paid beside the KL penalty, whose weight
        is `kl_coef`.
        """
        known = "score" in infos and ("_score" not in infos or bool(infos["_score"][i]))  # of this row, not of another
        whole = self.actions[-1] == task.eos_token_id or len(self.actions) == task.max_new_tokens
        right = "handed on by every wrapper: it has the score of an episode that is over, and what the reference says"
        check("info", list(infos), known or not whole, right)
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
    observations = check_observations(env.reset(seed=seed, options=options)[0], task)
    running: list[_Episode | None] = [_begun(env, observations, i, task) for i in range(number)]
    while any(len(done) < quota for done in finished):
        actions, logprobs, masks = _finite(*act(observations))
        step = env.step(actions if vector else int(actions[0]))
        observations, rewards, terminated, truncated, infos = step if vector else _batched(*step)
        observations = np.asarray(observations, dtype=np.int64)
        check("infos", infos, isinstance(infos, dict), "a dict of columns, which no wrapper makes a list of")
        ended = np.asarray(terminated) | np.asarray(truncated)
        texts, known = texts_after(observations, ended, infos, mode)
        on = np.array([i for i, episode in enumerate(running) if episode is not None and known[i]], dtype=np.int64)
        lengths = np.array([len(running[i]) for i in on.tolist()], dtype=np.int64)
        check_taken(env, texts[on], lengths, actions[on], task.vocab_size)
        for i, episode in enumerate(running):
            if episode is None:  # NEXT_STEP: this step was the reset
                running[i] = _begun(env, observations, i, task)
                continue
            episode.actions.append(int(actions[i]))
            episode.logprobs.append(float(logprobs[i]))
            episode.rewards.append(float(rewards[i]) - missing_penalty * float(logprobs[i]))
            episode.masks.extend([] if masks is None else [masks[i]])
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
            fresh = env.reset(options={"reset_mask": ended})[0] if vector else env.reset()[0][None]
            observations = np.asarray(fresh, dtype=np.int64)
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
