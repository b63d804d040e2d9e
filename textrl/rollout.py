"""Collecting a `Rollout` by sampling whole responses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .batch import Rollout as Rollout
from .batch import batched_logprobs, batched_readings, lower_states, pad_responses, without
from .config import check
from .drawing import Sampling
from .env import TextEnv
from .flat import flat_of
from .generation import generate
from .policy import CausalPolicy
from .returns import masked_mean
from .rows import Row
from .task import Task
from .trunk import same_blocks
from .vector import TextVectorEnv

Narrow = Callable[[NDArray[np.int64], NDArray[np.bool_] | None], NDArray[np.bool_]]
"""observations (N, L), and the task's masks there (N, V) or None -> an agent's own action masks (N, V)."""


def policy_in(env: TextEnv | TextVectorEnv, model: PreTrainedModel) -> CausalPolicy:
    """A model as it speaks in an environment, whoever's it is: over the task's tokens, at the one temperature."""
    return CausalPolicy(model, env.task.vocab_size, env.temperature)


def reference_beside(policy: CausalPolicy, env: TextEnv | TextVectorEnv, model: PreTrainedModel) -> CausalPolicy:
    """A frozen model that a policy is compared with, read in the policy's way where that would round otherwise.

    Below float32 two ways to compute the same differ by some hundredths of a nat, and a policy with an adapter takes
    another than its reference could: the KL of two that are equal would not be 0.
    """
    reference = policy_in(env, model)
    reference.own_forward = policy.model.dtype != torch.float32 and flat_of(policy.model) is None
    return reference


def both_masks(
    advised: NDArray[np.bool_] | None, narrow: Narrow | None, observations: NDArray[np.int64]
) -> NDArray[np.bool_] | None:
    """The tokens in the task's mask and in the agent's own, (N, V), at observations (N, L); None: all tokens.

    Where the two have none in common, those of the task.
    """
    if narrow is None:
        return advised
    own = narrow(observations, advised)
    if advised is None:
        return own
    both = advised.astype(np.bool_) & own
    return np.where(both.any(1, keepdims=True), both, advised.astype(np.bool_))


def allowed_after(
    task: Task,
    rows: Sequence[Row],
    prompts: Sequence[NDArray[np.int64]],
    narrow: Narrow | None = None,
    seen: list[NDArray[np.bool_]] | None = None,
) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None:
    """A function from responses (B, T) to the masks that hold next, kept in `seen`; None where there are none."""
    if narrow is None and not task.masked:
        return None
    observations = np.full((len(rows), task.max_prompt_tokens + task.max_new_tokens), task.vocab_size)
    for observation, prompt in zip(observations, prompts, strict=True):
        observation[: len(prompt)] = prompt
    columns = np.array([len(prompt) for prompt in prompts])[:, None] + np.arange(task.max_new_tokens)
    given = np.array([*rows, None], dtype=object)[:-1]  # rows are mappings, which numpy is not to look into

    def advised(responses: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The task's masks; all tokens after the end, about which it is not asked."""
        mask = np.ones((len(rows), task.vocab_size), dtype=np.bool_)
        goes_on = ~(responses == task.eos_token_id).any(1)
        mask[goes_on] = task.masks(given[goes_on].tolist(), responses[goes_on])
        return mask

    def allowed(responses: NDArray[np.int64]) -> NDArray[np.bool_]:
        if narrow is not None:
            np.put_along_axis(observations, columns, responses, 1)
        mask = both_masks(advised(responses) if task.masked else None, narrow, observations)
        assert mask is not None
        if seen is not None:
            seen.append(mask)
        return mask

    return allowed


def masks_along(task: Task, rollout: Rollout, narrow: Narrow | None = None) -> Tensor | None:
    """The masks that held at every token of given episodes: (B, T, V) bool, or None where there are none.

    Args:
        task: whose masks.
        rollout: episodes with their rows.
        narrow: an agent's own masks, if it has any.

    Raises:
        ValueError: for episodes without rows, from which the task's masks follow.
    """
    if narrow is None and not task.masked:
        return None
    rows, steps = rollout.rows, rollout.action_mask.shape[1]
    known = not task.masked or (len(rows) == len(rollout) and all("prompt" in row for row in rows))
    check("dataset", "episodes without rows", known, "episodes with their rows, from which the action masks follow")
    fits = steps <= task.max_new_tokens
    check("dataset", f"a response of {steps} tokens", fits, f"one with responses of at most {task.max_new_tokens}")
    lengths = rollout.prompt_lengths.tolist()
    prompts = [row[:n] for row, n in zip(rollout.tokens.cpu().numpy(), lengths, strict=True)]
    ask = allowed_after(task, rows or [{}] * len(rollout), prompts, narrow)
    assert ask is not None
    responses = torch.where(rollout.action_mask, rollout.responses, task.vocab_size).cpu().numpy()  # (B, T)
    written = np.full((len(rollout), task.max_new_tokens), task.vocab_size)
    out = np.ones((len(rollout), steps, task.vocab_size), dtype=np.bool_)
    for t in range(steps):
        out[:, t] = ask(written)
        written[:, t] = responses[:, t]
    return torch.from_numpy(out).to(rollout.tokens.device)


def collect_sampled(
    env: TextEnv | TextVectorEnv,
    policy: CausalPolicy,
    batch_size: int,
    *,
    rng: np.random.Generator,
    generator: torch.Generator,
    group_size: int = 1,
    tokens_at_once: int = 16384,
    narrow: Narrow | None = None,
    value: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Samples whole responses to prompts of the task.

    Args:
        env: an environment nobody has wrapped.
        policy: at the environment's temperature.
        batch_size: B, a multiple of group_size.
        rng: draws the prompts.
        generator: draws the tokens.
        group_size: samples of each prompt.
        tokens_at_once: bound on the tokens of one forward of the reference.
        narrow: the agent's own masks, if it has any.
        value: a critic on the policy's own states, (n, d) -> (n,), asked while sampling.
    """
    rows = [row for _ in range(batch_size // group_size) for row in [env.task.sample(rng)] * group_size]
    return sample_episodes(
        env,
        policy,
        rows,
        generator=generator,
        tokens_at_once=tokens_at_once,
        narrow=narrow,
        group_size=group_size,
        value=value,
    )


def sample_episodes(
    env: TextEnv | TextVectorEnv,
    policy: CausalPolicy,
    rows: Sequence[Row],
    *,
    generator: torch.Generator,
    tokens_at_once: int = 16384,
    narrow: Narrow | None = None,
    group_size: int = 1,
    value: Callable[[Tensor], Tensor] | None = None,
) -> Rollout:
    """Samples one whole response to each row; the reference and the score are asked once for the batch.

    The same observations, actions and rewards as stepping `env` with the policy attached, but faster.

    Args:
        env: an environment nobody has wrapped.
        policy: at the environment's temperature.
        rows: B rows of the task.
        generator: draws the tokens.
        tokens_at_once: bound on the tokens of one forward of the reference.
        narrow: the agent's own masks, if it has any.
        group_size: so many rows next to each other are the same.
        value: a critic on the policy's own states, (n, d) -> (n,), asked while sampling.

    Raises:
        ScoreError: where the score fails; where `task.asking` says to drop such responses, only if it fails for all.
    """
    rollout, ids = _sampled(env.task, policy, rows, generator, narrow, value)
    rollout.group_size = group_size
    rollout = _scored(env.task, rollout, ids)
    _read_whole(env, policy, rollout, tokens_at_once, value)
    return rollout


def _sampled(
    task: Task,
    policy: CausalPolicy,
    rows: Sequence[Row],
    generator: torch.Generator,
    narrow: Narrow | None,
    value: Callable[[Tensor], Tensor] | None,
) -> tuple[Rollout, list[list[int]]]:
    """A response to each row, not scored yet, and its token ids."""
    prompts = [task.encode(row) for row in rows]
    seen: list[NDArray[np.bool_]] = []
    sampled = generate(
        policy,
        prompts,
        task.max_new_tokens,
        [task.eos_token_id],
        sampling=Sampling(temperature=policy.temperature),
        generator=generator,
        allowed=allowed_after(task, rows, prompts, narrow, seen),
        value=value,
    )
    steps = int(sampled.lengths.max())
    mask = torch.arange(steps, device=policy.device) < sampled.lengths[:, None]
    ids = [r[:n] for r, n in zip(sampled.responses.tolist(), sampled.lengths.tolist(), strict=True)]
    tokens, prompt_lengths, _ = pad_responses(prompts, ids, policy.device)
    last = sampled.responses.gather(1, sampled.lengths[:, None] - 1)[:, 0]
    allowed = torch.from_numpy(np.stack(seen[:steps], 1)).to(policy.device) if seen else None  # (B, T, V)
    rollout = Rollout(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        action_mask=mask,
        logprobs=sampled.logprobs[:, :steps],
        rewards=torch.zeros(mask.shape, device=policy.device),
        scores=torch.zeros(len(rows), device=policy.device),
        stopped=last == task.eos_token_id,
        rows=list(rows),
        completions=task.decode(ids),
        allowed=allowed,
        values=None if sampled.values is None else sampled.values[:, :steps],
    )
    return rollout, ids


def _scored(task: Task, rollout: Rollout, ids: list[list[int]]) -> Rollout:
    """The same with the task's scores as rewards, without the episodes whose score failed and was let pass."""
    device, scores = rollout.tokens.device, task.evaluate(rollout.rows, ids, rollout.completions)
    rollout.scores = torch.from_numpy(scores.totals).float().to(device)
    if scores.faults:
        rollout = without(rollout, scores.faults)
        scores = scores.without_faults()
    if scores.tokens is None:
        rollout.rewards.scatter_(1, rollout.response_lengths[:, None] - 1, rollout.scores[:, None])
    else:
        rollout.rewards = rollout.spread(torch.from_numpy(np.concatenate(scores.tokens)).float().to(device))
    return rollout


def _read_whole(
    env: TextEnv | TextVectorEnv,
    policy: CausalPolicy,
    rollout: Rollout,
    tokens_at_once: int,
    value: Callable[[Tensor], Tensor] | None,
) -> None:
    """Adds what forwards over whole texts say: the frozen blocks' states, log-probabilities, the KL penalty."""
    if policy.frozen_blocks:
        rollout.below = lower_states(policy, rollout, tokens_at_once)
    if policy.model.dtype != torch.float32:  # one token at a time rounds otherwise than all at once
        batched, rollout.values = batched_readings(policy, rollout, tokens_at_once, masked=True, value=value)
        rollout.drift = float(masked_mean((batched - rollout.logprobs).abs(), rollout.action_mask))
        rollout.logprobs = batched
    if env.reference is not None:
        reference = reference_beside(policy, env, env.reference)
        if same_blocks(policy.model, env.reference, policy.frozen_blocks):
            reference.frozen_blocks = policy.frozen_blocks
        rollout.ref_logprobs = batched_logprobs(reference, rollout, tokens_at_once)
        rollout.rewards -= env.kl_coef * (rollout.logprobs - rollout.ref_logprobs)
