"""How an agent acts: in its environment, on an observation, on prompts; always inside the action masks it can know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .arguments import check_count, check_observations
from .attaching import Act, Masks, actor, attached, draw_inside, is_bare, paid_scores, penalty_reference, penalty_weight
from .batch import batched_logprobs
from .cells import check_text
from .config import check
from .drawing import Sampling
from .generation import NotFinite, generate, stop_at
from .models import load_model
from .policy import CausalPolicy
from .probing import longest_text
from .returns import masked_mean
from .rollout import (
    Narrow,
    Rollout,
    allowed_after,
    both_masks,
    collect_sampled,
    policy_in,
    reference_beside,
    sample_episodes,
)
from .rows import Row
from .stepping import collect_groups, collect_stepped
from .stepwise import StepwiseLM
from .task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .agent import Agent
    from .env import TextEnv
    from .vector import TextVectorEnv


def collect(agent: Agent, episodes: int, group_size: int) -> Rollout:
    """Fresh episodes of an agent's environment, `group_size` of a prompt; a last group is made whole."""
    size = -(-episodes // group_size) * group_size
    if is_bare(agent.env):
        return collect_sampled(
            agent.base,
            agent.policy,
            size,
            rng=agent.rng,
            generator=agent.generator,
            group_size=group_size,
            tokens_at_once=agent.config.max_tokens_per_microbatch,
            narrow=agent.own_masks,
            value=agent.state_value,
        )
    rows = [agent.task.sample(agent.rng) for _ in range(size // group_size)] if group_size > 1 else None
    return step(agent, size, rows)


def step(agent: Agent, size: int, rows: Sequence[Row] | None) -> Rollout:
    """So many episodes of an environment that somebody wrapped, of its own prompts, or in even groups of these rows."""
    seed, agent.seeded = None if agent.seeded else int(agent.rng.integers(2**31)), True
    last: list[Masks] = []
    act = _actor(agent, last)
    with attached(agent.env, agent.stepper, last) as missing:
        settings: Any = {"device": agent.device, "seed": seed, "missing_penalty": missing}
        if rows is None:
            rollout = collect_stepped(agent.env, agent.task, act, size, **settings)
        else:
            rollout = collect_groups(agent.env, agent.task, act, rows, size // len(rows), **settings)
    agent.paid_otherwise |= not torch.equal(paid_scores(rollout, agent.env), rollout.scores)
    if agent.model.dtype != torch.float32:
        _read_again(agent, rollout)
    return rollout


def _read_again(agent: Agent, rollout: Rollout) -> None:
    """Puts the log-probabilities of whole texts in place of those of a token at a time, which rounds otherwise.

    The KL penalty that was paid follows them, where no wrapper changes rewards.
    """
    limit, paid = agent.config.max_tokens_per_microbatch, rollout.log_ratios
    again = batched_logprobs(agent.policy, rollout, limit, masked=True)
    rollout.drift = float(masked_mean((again - rollout.logprobs).abs(), rollout.action_mask))
    rollout.logprobs = again
    reference = penalty_reference(agent.env)
    if paid is None or reference is None:
        return
    rollout.ref_logprobs = batched_logprobs(reference_beside(agent.policy, agent.base, reference), rollout, limit)
    if not agent.paid_otherwise:
        assert rollout.log_ratios is not None
        rollout.rewards = rollout.rewards - penalty_weight(agent.env) * (rollout.log_ratios - paid)


def evaluated_policy(
    model: Agent | PreTrainedModel | str | Path, base: TextEnv | TextVectorEnv
) -> tuple[CausalPolicy, Narrow | None]:
    """Whoever plays or is judged, at the environment's temperature, and the masks of its own if it is such an agent."""
    from .agent import Agent

    owner = model if isinstance(model, Agent) else None
    lm = load_model(model, base.task.tokenizer) if owner is None else owner.model
    return policy_in(base, lm), None if owner is None else owner.own_masks


def respond(agent: Agent, rows: Sequence[Row]) -> Rollout:
    """One whole response to each row of the task, scored."""
    check("rows", rows, len(rows) > 0, "at least one row of the task")
    return sample_episodes(
        agent.base,
        agent.policy,
        rows,
        generator=agent.generator,
        tokens_at_once=agent.config.max_tokens_per_microbatch,
        narrow=agent.own_masks,
    )


def in_environment(agent: Agent, observations: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens for the observations the environment shows now: (N, L) -> (N,), or (L,) -> ()."""
    actions = _actor(agent)(check_observations(observations, agent.task))[0]
    return actions if np.ndim(observations) == 2 else actions[0]


def _actor(agent: Agent, last: list[Masks] | None = None) -> Act:
    return actor(agent.env, agent.stepper, agent.base.temperature, agent.generator, agent.own_masks, last)


def on_observation(
    agent: Agent, observation: NDArray[np.int64], deterministic: bool, action_masks: NDArray[Any] | None
) -> Any:
    """One token for an observation (L,), or one for each of (N, L), whatever the environment shows now."""
    observations = check_observations(observation, agent.task)
    shape = (len(observations), agent.task.vocab_size)
    masks = known_masks(agent.task, observations)
    if action_masks is not None:
        masks = np.atleast_2d(np.asarray(action_masks)).astype(np.bool_)
        check("action_masks", masks.shape, masks.shape == shape, f"of shape {shape}")
        check("action_masks", action_masks, bool(masks.any(1).all()), "masks with at least one token in each row")
    stepper = StepwiseLM(agent.policy)  # a new one: weights may have changed in ways that an old one does not see
    masks = both_masks(masks, agent.own_masks, observations)
    sampling = Sampling(agent.base.temperature, deterministic=deterministic)
    tokens, logprobs = draw_inside(stepper(observations), masks, sampling, agent.generator)
    if not logprobs.isfinite().all():
        raise NotFinite
    actions = tokens.cpu().numpy()
    return actions if np.ndim(observation) == 2 else actions[0]


def responses_to(
    agent: Agent,
    prompts: Sequence[str],
    max_new_tokens: int | None,
    sampling: Sampling,
    stop_strings: Sequence[str] = (),
) -> tuple[list[Row], list[list[int]]]:
    """The task's row of each prompt, and the token ids of one response to each."""
    check("prompts", prompts, all(isinstance(prompt, str) for prompt in prompts), "a list of texts")
    for prompt in prompts:
        check_text("prompts", prompt)
    task = agent.task
    steps = check_count("max_new_tokens", task.max_new_tokens if max_new_tokens is None else max_new_tokens)
    least = sampling.min_new_tokens
    check("min_new_tokens", least, least <= steps, f"at most max_new_tokens, {steps}")
    rows = [task.row_of(prompt) for prompt in prompts]
    encoded = [task.encode(row, any_length=True) for row in rows]
    lengths, limit = [len(ids) for ids in encoded], longest_text(agent.model)
    longest, room = max(lengths), limit - max(lengths)
    said = f"texts of less than {limit} tokens, which is what the model reads; one has {longest}"
    check("prompts", prompts[lengths.index(longest)], room > 0, said)
    check("max_new_tokens", steps, steps <= room, f"at most {room}: the model reads no longer text")
    sampled = generate(
        agent.policy,
        encoded,
        steps,
        [task.eos_token_id],
        sampling=sampling,
        generator=agent.generator,
        allowed=_masks_on(agent, rows, encoded, steps),
        stop=stop_at(stop_strings, task.decode) if stop_strings else None,
    )
    return rows, [r[:n] for r, n in zip(sampled.responses.tolist(), sampled.lengths.tolist(), strict=True)]


# ---- masks -----------------------------------------------------------------------------------------------------------


def known_masks(task: Task, observations: NDArray[np.int64]) -> Masks:
    """The task's masks at observations (N, L), where their tokens say which row and which response they are.

    An observation does not say where its prompt ends, nor what other columns its row has. Among finitely many prompts
    those that it begins with can be found; what all of them allow, or else any of them, is what is known.
    """
    if not task.masked or task.rows is None:
        return None
    prompts = [task.encode(row) for row in task.rows]
    masks = np.ones((len(observations), task.vocab_size), dtype=np.bool_)
    for i, observation in enumerate(observations):
        fitting = [k for k, ids in enumerate(prompts) if np.array_equal(observation[: len(ids)], ids)]
        responses = [_response(task, observation, len(prompts[k])) for k in fitting]
        kept = [(task.rows[k], each) for k, each in zip(fitting, responses, strict=True) if each is not None]
        if not kept:
            continue
        found = task.masks([row for row, _ in kept], np.stack([each for _, each in kept]))
        masks[i] = found.all(0) if found.all(0).any() else found.any(0)
    return masks


def _response(task: Task, observation: NDArray[np.int64], start: int) -> NDArray[np.int64] | None:
    """An unfinished response (T,) that begins at a column; None where the observation is none."""
    written = int((observation != task.vocab_size).sum()) - start
    response = observation[start : start + task.max_new_tokens]
    unfinished = written < task.max_new_tokens and task.eos_token_id not in response[:written]
    return response if unfinished else None


def _masks_on(
    agent: Agent, rows: Sequence[Row], prompts: Sequence[NDArray[np.int64]], steps: int
) -> Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None:
    """Responses (B, T) -> the masks that hold next: the agent's, and the task's for the rows that are its own."""
    task = agent.task
    fits = [len(ids) <= task.max_prompt_tokens and steps <= task.max_new_tokens for ids in prompts]
    own = [i for i, row in enumerate(rows) if fits[i] and (task.rows is None or row in task.rows)]
    after = allowed_after(task, [rows[i] for i in own], [prompts[i] for i in own]) if own else None
    if after is None and agent.own_masks is None:
        return None
    texts = np.full((len(rows), max(map(len, prompts)) + steps), task.vocab_size)  # (B, P + T)
    for text, prompt in zip(texts, prompts, strict=True):
        text[: len(prompt)] = prompt
    columns = np.array([len(prompt) for prompt in prompts])[:, None] + np.arange(steps)

    def allowed(responses: NDArray[np.int64]) -> NDArray[np.bool_]:
        masks = np.ones((len(rows), task.vocab_size), dtype=np.bool_)
        if after is not None:
            masks[own] = after(responses[own])
        np.put_along_axis(texts, columns, responses, 1)
        both = both_masks(masks, agent.own_masks, texts)
        assert both is not None
        return both

    return allowed
