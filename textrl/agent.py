"""`Agent`: a policy that acts in an environment and learns from rollouts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import checkpoint, loop
from .config import AgentConfig as AgentConfig
from .config import check as check
from .config import make_config
from .files import read_rows
from .generation import Sampling, draw, generate, stop_at
from .loop import Callback
from .memory import halving
from .optim import Optimizer
from .policy import (
    CausalPolicy,
    load_model,
    pick_device,
    pick_dtype,
    recompute_blocks,
    small_model,
    train_last_layers,
    trainable,
)
from .rollout import Rollout, both_masks, collect_sampled, microbatches
from .stepping import AnyEnv as AnyEnv
from .stepping import base_env as base_env
from .stepping import collect_stepped
from .stepping import is_bare as is_bare
from .stepwise import StepwiseLM
from .task import Task
from .trunk import frozen_blocks

Loss = Callable[[Rollout], tuple[Tensor, dict[str, Tensor]]]
"""A batch -> the mean loss () and numbers to report, each () and a mean of the same kind."""


class Agent:
    """A policy that acts and learns. A subclass defines `update`; the rest is here.

    Args:
        env: a textrl environment, single or vector. One that somebody wrapped is stepped, token by token; one that
            nobody wrapped is sampled whole, to the same effect and faster.
        model: a `PreTrainedModel`, a folder or hub name of one, or None for a small GPT-2 with random weights.
        config: an instance of the agent's config class.
        settings: single fields of the config, as keywords; they win over `config`.

    Attributes:
        model: the policy, a `PreTrainedModel`.
        config: the settings in force.
        num_timesteps: tokens learned from so far.
        num_updates: calls of `update` so far.
        progress_remaining: share of this call of `learn` that is to come, from 1 to 0, for what follows a schedule.
        schedule: the share of the learning rate in force, from 1 to 0 in the course of `learn`.
    """

    config_class: ClassVar[type[AgentConfig]] = AgentConfig
    group_size = 1
    """Samples of each prompt in a rollout; an agent that compares samples of one prompt sets it."""
    not_saved: ClassVar[tuple[str, ...]] = ("learning_rate", "group_size", "env", "base", "task", "tokenizer")
    """Attributes that follow from the arguments. All others that are numbers, tensors, generators, lists of these or
    have a `state_dict` are in a checkpoint; a subclass names those of its own that should not be."""

    def __init__(
        self,
        env: AnyEnv,
        model: PreTrainedModel | str | Path | None = None,
        config: AgentConfig | None = None,
        **settings: Any,
    ) -> None:
        self.config = make_config(self.config_class, config, settings)
        self.env = env
        self.base = base_env(env)
        self.task: Task = self.base.task
        self.tokenizer = self.task.tokenizer
        if env.unwrapped is self.base and env.observation_space.shape != self.base.observation_space.shape:
            raise ValueError(
                f"env must give token ids as textrl does, {self.base.observation_space}; got {env.observation_space}"
            )
        self.device = pick_device(self.config.device)
        self.rng = np.random.default_rng([self.config.seed, 1])  # prompts
        self.generator = torch.Generator().manual_seed(self.config.seed)  # tokens, minibatches
        self.learning_rate = self.config.learning_rate or (1e-3 if model is None else 1e-5)
        self.model = self._load(model)
        train_last_layers(self.model, self.config.trainable_layers)
        self.policy = CausalPolicy(self.model, self.task.vocab_size, self.base.temperature)
        self.policy.frozen_blocks = frozen_blocks(self.model)
        self.stepper = StepwiseLM(self.policy, self.task.vocab_size)
        self.modules: dict[str, nn.Module] = {"policy": self.model}
        self.num_timesteps = self.num_updates = 0
        self.stuck = 0  # iterations in a row that nothing could be learned from
        self.call: dict[str, Any] | None = None  # of `learn`: how far it goes, and what it has saved
        self.resumed: checkpoint.Resumed | None = None
        self.progress_remaining = 1.0
        self.schedule = 1.0
        self.halved = False  # whether memory has not sufficed once
        self.state_value: Callable[[Tensor], Tensor] | None = None  # `build` may set one, asked while sampling
        if self.base.reference is not None and next(self.base.reference.parameters()).device != self.device:
            self.base.reference.to(self.device)
        self.build()
        if self.config.activation_checkpointing:
            for module in self.modules.values():
                if isinstance(module, PreTrainedModel):
                    recompute_blocks(module)
        self.optimizer = Optimizer(
            trainable(*self.modules.values()),
            self.learning_rate,
            self.config.max_grad_norm,
            self.config.weight_decay,
        )

    def _load(self, model: PreTrainedModel | str | Path | None) -> PreTrainedModel:
        length = self.task.max_prompt_tokens + self.task.max_new_tokens
        if model is None:
            dtype = pick_dtype(self.config.dtype, self.device)
            return small_model(self.task.vocab_size, length, self.config.seed).to(self.device, dtype)
        loaded = load_model(model, self.tokenizer)
        if loaded is self.base.reference:
            raise ValueError("model and the environment's reference are one object: pass copy.deepcopy(model) as one")
        limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and limit < length:
            raise ValueError(
                f"model reads at most {limit} tokens, but the task's prompt and response need {length}:"
                " lower max_prompt_tokens or max_new_tokens"
            )
        parameters = sum(p.numel() for p in loaded.parameters())
        return loaded.to(device=self.device, dtype=pick_dtype(self.config.dtype, self.device, parameters))

    # ---- what an agent's author writes -----------------------------------------------------------------------

    def build(self) -> None:
        """Makes what the agent has beside the policy (a critic) and adds it to `modules`; nothing by default."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learns from one batch of episodes; returns numbers to log."""
        raise NotImplementedError(f"{type(self).__name__} must define update(rollout)")

    @classmethod
    def read_dataset(cls, file: str | Path, skip_bad_rows: bool = False) -> Any:
        """What `textrl train --dataset FILE` hands to the constructor as `dataset`: by default rows as they are.

        Raises:
            ValueError: for an agent that takes no dataset.
        """
        if "dataset" not in inspect.signature(cls).parameters:
            raise ValueError(f"--dataset is for agents that learn from given data; {cls.__name__} learns from its own")
        return read_rows(file, skip_bad_rows=skip_bad_rows, called="--dataset")

    def collect(self) -> Rollout:
        """The next batch to learn from: by default `batch_size` fresh episodes of the environment."""
        size = -(-self.config.batch_size // self.group_size) * self.group_size
        if is_bare(self.env):
            return collect_sampled(
                self.base,
                self.policy,
                size,
                rng=self.rng,
                generator=self.generator,
                group_size=self.group_size,
                tokens_at_once=self.config.max_tokens_per_microbatch,
                narrow=self.narrow if self.narrows else None,
                value=self.state_value,
            )
        if self.group_size > 1:
            raise ValueError(
                f"{type(self).__name__} draws {self.group_size} responses to each prompt, which a wrapped environment"
                " cannot be asked for: pass the environment itself"
            )
        attached = self.env.unwrapped is self.base
        if attached:
            self.base.policy = self.stepper
        seed = int(self.rng.integers(2**31)) if self.num_updates == 0 else None
        missing = 0.0 if attached or self.base.reference is None else self.base.kl_coef
        return collect_stepped(
            self.env, self.task, self._act, size, device=self.device, seed=seed, missing_penalty=missing
        )

    def narrow(self, observations: NDArray[np.int64]) -> NDArray[np.bool_]:
        """The tokens that an agent with masks of its own draws from, within the task's: (N, L) -> (N, V) bool."""
        return np.ones((len(observations), self.task.vocab_size), dtype=np.bool_)

    @property
    def narrows(self) -> bool:
        """Whether this agent has a mask of its own."""
        return type(self).narrow is not Agent.narrow

    # ---- what an update is made of ---------------------------------------------------------------------------

    def logprobs(self, batch: Rollout) -> Tensor:
        """Log-probabilities of the agent's tokens under the policy as it is now: (B, T) float32, differentiable."""
        rows, columns, targets = batch.places()
        hidden = self.policy.hidden(batch.tokens, rows, columns, batch.below)
        return batch.spread(self.policy.logprobs(hidden, targets, allowed_at(batch))[0])

    def minimise(self, loss: Loss, batch: Rollout, mean_over: str = "tokens") -> dict[str, float]:
        """One optimiser step on the mean loss over a batch, in microbatches of bounded memory.

        Args:
            loss: a batch -> its mean loss over tokens, and numbers to report.
            batch: the episodes of this step.
            mean_over: "tokens", or "groups" for a loss that is a mean over groups of `batch.group_size` episodes next
                to each other (pairs): a group is never split, and weighs the same whatever its length.

        Returns:
            the numbers, averaged likewise, and `loss` and `grad_norm`.
        """
        check("mean_over", mean_over, mean_over in ("tokens", "groups"), '"tokens" or "groups"')
        by_group = mean_over == "groups"
        size = batch.group_size if by_group else 1
        total = len(batch) if by_group else max(1, batch.num_tokens)

        def accumulate(tokens_at_once: int) -> dict[str, float]:
            out: dict[str, float] = {}
            for part in microbatches(batch, tokens_at_once, size):
                piece = batch.select(part, size)
                share = (len(piece) if by_group else piece.num_tokens) / total
                value, numbers = loss(piece)
                torch.autograd.backward(value * share)
                for key, number in {"loss": value, **numbers}.items():
                    out[key] = out.get(key, 0.0) + float(number.detach()) * share
            return out

        limit = self.config.max_tokens_per_microbatch
        if self.halved:
            out = accumulate(limit)
        else:
            out, now = halving(accumulate, limit, batch.tokens.numel(), self.optimizer.zero_grad)
            if now != limit:
                self.config, self.halved = replace(self.config, max_tokens_per_microbatch=now), True
        out["grad_norm"] = self.optimizer.step()
        return out

    def cool_down(self, share: float) -> None:
        """Sets the step size of an update: constant, and falling linearly to zero over the last `share` of `learn`."""
        left = self.progress_remaining / share if share > 0 else 1.0
        self.optimizer.learning_rate = self.learning_rate * min(1.0, left)

    def shuffled(self, size: int, parts: int) -> list[Tensor]:
        """`parts` random minibatches of the indices below `size`, each on the device."""
        order = torch.randperm(size, generator=self.generator).to(self.device)
        return [part for part in order.chunk(parts) if len(part)]

    # ---- the loop --------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int | None = None,
        *,
        log_dir: str | Path | None = None,
        progress_bar: bool = False,
        callback: Callback | None = None,
        checkpoint_every: int | None = None,
        keep: int = 2,
        resume: bool = False,
    ) -> Self:
        """Collects and updates until `total_timesteps` more tokens have been learned from.

        An agent that was saved in the middle of a call of `learn` and loaded goes on with that call when asked for the
        same `total_timesteps`, for what is left of it, or for None; it ends as if it had never been interrupted.

        Args:
            total_timesteps: tokens.
            log_dir: where `progress.csv`, TensorBoard's files and checkpoints go; None logs nothing. Rows beyond the
                agent's iterations are dropped.
            progress_bar: shows a bar with the time left, and a row of the main numbers for every iteration.
            callback: called with the agent and the metrics after every update; returning False ends the loop.
            checkpoint_every: tokens between checkpoints in `log_dir/checkpoints`. With it, SIGINT and SIGTERM end the
                iteration and leave a checkpoint too, and `log_dir/best` is the one with the best scores before it.
            keep: so many of the newest checkpoints stay, and the best.
            resume: goes on from the newest whole checkpoint in `log_dir`, if there is one.

        Returns:
            the agent.

        Raises:
            TrainingError: when loss or gradient are not finite three times in a row.
        """
        run = loop.Run(
            log_dir=log_dir,
            progress_bar=progress_bar,
            callback=callback,
            checkpoint_every=checkpoint_every,
            keep=keep,
            resume=resume,
        )
        loop.learn(self, total_timesteps, run)
        return self

    def anneal(self, schedule: float) -> None:
        """Sets the share of the learning rate in force."""
        self.schedule = schedule
        self.optimizer.learning_rate = self.learning_rate * schedule

    # ---- acting ----------------------------------------------------------------------------------------------

    def act(self, observations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draws one token for each observation: (N, L) int64 -> (N,) int64."""
        return self._act(observations)[0]

    def _act(
        self, observations: NDArray[np.int64], greedy: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_] | None]:
        logits = self.stepper(observations)
        masks = None
        if type(self.task).allowed_tokens is not Task.allowed_tokens:
            masks = np.atleast_2d(
                self.env.get_wrapper_attr("action_masks")()
                if isinstance(self.env, gym.Env)
                else self.base.action_masks()
            )
        if self.narrows:
            masks = both_masks(masks, self.narrow(observations))
        uniforms = torch.rand(len(observations), generator=self.generator).to(logits.device)
        forbidden = None if masks is None else ~torch.from_numpy(masks).to(logits.device)
        tokens, logprobs = draw(logits, uniforms, Sampling(self.base.temperature, greedy=greedy), forbidden)
        return tokens.cpu().numpy(), logprobs.cpu().numpy(), masks

    def predict(
        self,
        observation: NDArray[np.int64],
        state: None = None,
        episode_start: None = None,
        deterministic: bool = False,
    ) -> tuple[Any, None]:
        """The action for an observation, (L,) or (N, L), as in Stable-Baselines3: (action, None)."""
        observations = np.atleast_2d(np.asarray(observation))
        stepper = StepwiseLM(self.policy, self.task.vocab_size)
        logits = stepper(observations)
        uniforms = torch.rand(len(observations), generator=self.generator).to(logits.device)
        tokens, _ = draw(logits, uniforms, Sampling(self.base.temperature, greedy=deterministic))
        actions = tokens.cpu().numpy()
        return (actions if np.ndim(observation) == 2 else actions[0]), None

    def generate(
        self,
        prompts: list[str],
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_new_tokens: int = 0,
        stop_strings: Sequence[str] = (),
        deterministic: bool = False,
    ) -> list[str]:
        """One response to each prompt, as text.

        Args:
            prompts: B texts.
            max_new_tokens: default: the task's.
            temperature: default: the environment's.
            top_k: only the k most probable tokens (0: all).
            top_p: only the most probable tokens that reach p together.
            min_new_tokens: neither the end token nor a stop string ends a response before this many tokens.
            stop_strings: a response ends with the token that completes one of these texts.
            deterministic: the most probable token always.
        """
        check("prompts", prompts, isinstance(prompts, list) and len(prompts) > 0, "a list of at least one text")
        sampling = Sampling(temperature or self.base.temperature, top_k, top_p, min_new_tokens, deterministic)
        sampled = generate(
            self.policy,
            [self.task.encode({"prompt": prompt}) for prompt in prompts],
            max_new_tokens or self.task.max_new_tokens,
            [self.task.eos_token_id],
            sampling=sampling,
            generator=self.generator,
            stop=stop_at(stop_strings, self.task.decode) if stop_strings else None,
        )
        lengths = sampled.lengths.tolist()
        return self.task.decode([r[:n] for r, n in zip(sampled.responses.tolist(), lengths, strict=True)])

    # ---- saving ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes the policy (loadable with `from_pretrained`), the tokenizer, every other module and the settings."""
        checkpoint.save_agent(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, env: AnyEnv, **settings: Any) -> Self:
        """An agent as `save` left it, on an environment; `settings` change single fields of its config.

        Raises:
            ValueError: for a folder without an agent of this class.
        """
        return checkpoint.load_agent(cls, Path(folder), env, settings)


def allowed_at(batch: Rollout) -> Tensor | None:
    """The action masks of the n agent tokens, (n, V), or None."""
    return None if batch.allowed is None else batch.allowed[batch.action_mask]
