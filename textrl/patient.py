"""What `textrl doctor` looks at: an agent that has not learned yet, and some episodes of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor

from .agent import Agent
from .env import TextEnv
from .policy import CausalPolicy
from .rollout import Rollout, sample_episodes

EPISODES = 16
SMALL, FEW = 2_000_000, 4
"""A model of more parameters steps through so few episodes: each token costs a forward."""
LONGEST = 24
"""Responses are cut at so many tokens: what is looked for shows in the first ones, and a check takes seconds."""


class Fault(Exception):
    """What is wrong, and what mends it."""

    def __init__(self, wrong: str, fix: str) -> None:
        super().__init__(f"{wrong}; fix: {fix}")


class Patient:
    """What the checks look at: the agent, and some episodes of it whose score was not asked."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.task, self.policy = agent, agent.task, agent.policy
        self.exact = agent.model.dtype == torch.float32
        self.near = 1e-4 if self.exact else 0.1
        self.env = agent.env if isinstance(agent.env, gym.Env) else _single(agent)
        plain = self.env.unwrapped
        assert isinstance(plain, TextEnv)
        self.plain = plain
        large = sum(p.numel() for p in agent.model.parameters()) > SMALL
        self.stepped_episodes = FEW if large else EPISODES

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of the task."""
        return [self.task.sample(self.agent.rng) for _ in range(EPISODES)]

    @cached_property
    def rollout(self) -> Rollout:
        """Sampled episodes; their rewards are the KL penalty alone."""
        task, env = copy.copy(self.task), copy.copy(self.agent.base)
        task.max_new_tokens = min(task.max_new_tokens, LONGEST)
        task.score = lambda prompts, completions, **columns: [0.0] * len(prompts)  # type: ignore[method-assign]
        env.task = task
        return sample_episodes(env, self.policy, self.rows, generator=self.agent.generator)

    @torch.no_grad()
    def logprobs(self, batch: Rollout) -> Tensor:
        """The policy's log-probabilities as an update computes them, (B, T)."""
        return self.agent.logprobs(batch)

    @torch.no_grad()
    def logits(self, policy: CausalPolicy, temperature: float) -> Tensor:
        """A model's logits at every agent token, (n, V), plainly computed: the whole batch in one forward."""
        rows, columns, _ = self.rollout.places()
        logits: Tensor = policy.model(input_ids=self.rollout.tokens).logits[rows, columns, : policy.vocab_size]
        return logits.float() / temperature

    def stepped(self) -> Iterator[tuple[list[float], dict[str, Any], bool]]:
        """The first episodes of the rollout stepped: rewards beside the score, last info, whether it ended early."""
        rollout, few = self.rollout, self.stepped_episodes
        lengths = rollout.response_lengths[:few].tolist()
        for row, ids, n in zip(self.rows[:few], rollout.responses[:few].tolist(), lengths, strict=True):
            self.env.reset(options={"row": row})
            rewards: list[float] = []
            info: dict[str, Any] = {}
            over = False
            for token in ids[:n]:
                if over:
                    break
                _, reward, terminated, truncated, info = self.env.step(token)
                rewards.append(float(reward))
                over = bool(terminated) or bool(truncated)
            if "score" in info and self.task.token_scores is not True:
                rewards[-1] -= float(info["score"])
            yield rewards, info, len(rewards) < n

    def largest(self, difference: Tensor) -> float:
        """The largest of (B, T) numbers in size, at the agent's tokens."""
        return float((difference * self.rollout.action_mask).abs().max())

    def apart(self, difference: Tensor) -> float:
        """How far (n,) numbers are from those of another forward, to be held against `near`.

        The largest difference; below float32, where the two round single logits differently, the mean one.
        """
        return float(difference.abs().max() if self.exact else difference.abs().mean())


def _single(agent: Agent) -> TextEnv:
    base = agent.base
    return TextEnv(agent.task, reference=base.reference, kl_coef=base.kl_coef, temperature=base.temperature)
