"""`Agent`: a policy that acts in an environment and learns from rollouts; the one learning loop."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import checkpoint
from .env import TextEnv
from .generation import Sampling, draw, generate
from .logging import RunLog
from .optim import Optimizer
from .policy import (
    CausalPolicy,
    few_threads,
    load_model,
    pick_device,
    pick_dtype,
    small_model,
    train_last_layers,
    trainable,
)
from .rollout import Rollout, both_masks, collect_sampled, microbatches
from .stepping import collect_stepped
from .stepwise import StepwiseLM
from .task import Task
from .trunk import frozen_blocks
from .vector import TextVectorEnv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AnyEnv = gym.Env[Any, Any] | gym.vector.VectorEnv[Any, Any, Any]
Loss = Callable[[Rollout], tuple[Tensor, dict[str, Tensor]]]
"""A batch -> the mean loss () and numbers to report, each () and a mean of the same kind."""
Callback = Callable[["Agent", dict[str, float]], bool | None]


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What every agent takes."""

    learning_rate: float | None = None  # step size of AdamW; None: 1e-5 for a given model, 1e-3 for the small default
    learning_rate_schedule: str = "linear"  # "linear": to zero over the timesteps of a call of learn; "constant"
    batch_size: int = 64  # episodes an update
    seed: int = 0  # of the weights, the prompts and the samples
    device: str = "auto"  # "auto": the GPU where there is one
    dtype: str = "auto"  # of the weights: "float32", "bfloat16", "float16"; "auto": what the hardware does fast
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: not at all
    weight_decay: float = 0.0  # of AdamW
    trainable_layers: int | None = None  # only the last so many blocks of the model learn; None: all of it
    max_tokens_per_microbatch: int = 16384  # bounds the memory of a forward and backward pass

    def __post_init__(self) -> None:
        """Checks the types of all settings and the ranges of those that all agents share."""
        for each in dataclasses.fields(self):
            check_type(each.name, getattr(self, each.name), str(each.type))
        for name in ("batch_size", "max_tokens_per_microbatch"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        rate = self.learning_rate
        check("learning_rate", rate, rate is None or (math.isfinite(rate) and rate >= 0), "a finite number from 0 up")
        schedules = ("linear", "constant")
        check(
            "learning_rate_schedule",
            self.learning_rate_schedule,
            self.learning_rate_schedule in schedules,
            f"one of {list(schedules)}",
        )
        check("max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0, "at least 0")


def check(name: str, value: Any, fine: bool, right: str) -> None:
    """Raises a `ValueError` that names an argument, its value and what would be right, unless it is fine."""
    if not fine:
        raise ValueError(f"{name} must be {right}; got {value!r}")


def check_type(name: str, value: Any, annotation: str) -> None:
    """Checks a setting against its annotation, a union of int, float, bool, str and None; others are let pass.

    Raises:
        ValueError: naming the setting, its value and what would be right.
    """
    words = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a text", "None": "None"}
    kinds = [kind.strip() for kind in annotation.split("|")]
    if not set(kinds) <= set(words):
        return
    truth = isinstance(value, (bool, np.bool_))
    fits = {
        "int": isinstance(value, numbers.Integral) and not truth,
        "float": isinstance(value, numbers.Real) and not truth,
        "bool": truth,
        "str": isinstance(value, str),
        "None": value is None,
    }
    check(name, value, any(fits[kind] for kind in kinds), " or ".join(words[kind] for kind in kinds))


def make_config(config_class: type[AgentConfig], config: AgentConfig | None, settings: Mapping[str, Any]) -> Any:
    """A config from its class and keyword settings.

    Raises:
        ValueError: for a setting that does not exist, with the nearest name, or one of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(config_class)}
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {sorted(known)}"
            raise ValueError(f"{name!r} is not a setting of {config_class.__name__}{hint}")
    if config is None:
        return config_class(**settings)
    if not isinstance(config, config_class):
        raise ValueError(f"config must be a {config_class.__name__}; got {type(config).__name__}")
    return dataclasses.replace(config, **settings)


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
    """Whether nothing stands between the agent and the environment but Gymnasium's own checks."""
    while isinstance(env, (gym.wrappers.PassiveEnvChecker, gym.wrappers.OrderEnforcing)):
        env = env.env
    return type(env) in (TextEnv, TextVectorEnv)


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
        self.progress_remaining = 1.0
        self.schedule = 1.0
        if self.base.reference is not None and next(self.base.reference.parameters()).device != self.device:
            self.base.reference.to(self.device)
        self.build()
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
        out: dict[str, float] = {}
        for part in microbatches(batch, self.config.max_tokens_per_microbatch, size):
            piece = batch.select(part, size)
            share = (len(piece) if by_group else piece.num_tokens) / total
            value, numbers = loss(piece)
            torch.autograd.backward(value * share)
            for key, number in {"loss": value, **numbers}.items():
                out[key] = out.get(key, 0.0) + float(number.detach()) * share
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
        total_timesteps: int,
        *,
        log_dir: str | Path | None = None,
        progress_bar: bool = False,
        callback: Callback | None = None,
    ) -> Self:
        """Collects and updates until `total_timesteps` more tokens have been learned from.

        Args:
            total_timesteps: tokens.
            log_dir: where `progress.csv` and TensorBoard's files go; None logs nothing.
            progress_bar: shows a bar with the time left, and a row of the main numbers for every iteration.
            callback: called with the agent and the metrics after every update; returning False ends the loop.

        Returns:
            the agent.
        """
        check("total_timesteps", total_timesteps, total_timesteps > 0, "above 0")
        start, goal = self.num_timesteps, self.num_timesteps + total_timesteps
        with few_threads(self.model), RunLog(log_dir, progress_bar, total_timesteps, type(self).__name__) as log:
            while self.num_timesteps < goal:
                if self.config.learning_rate_schedule == "linear":
                    self._anneal((goal - self.num_timesteps) / total_timesteps)
                began = time.perf_counter()
                self.progress_remaining = (goal - self.num_timesteps) / total_timesteps
                rollout = self.collect()
                collected = time.perf_counter()
                metrics = {**rollout.metrics(), **self.update(rollout)}
                self.stepper.forget()
                self.num_timesteps += rollout.num_tokens
                self.num_updates += 1
                now = time.perf_counter()
                metrics["time/tokens_per_second"] = rollout.num_tokens / (now - began)
                metrics["time/collect_seconds"], metrics["time/update_seconds"] = collected - began, now - collected
                log.write(metrics, self.num_timesteps, self.num_updates, self.num_timesteps - start)
                if callback is not None and callback(self, metrics) is False:
                    break
        self._anneal(1.0)
        return self

    def _anneal(self, schedule: float) -> None:
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
        deterministic: bool = False,
    ) -> list[str]:
        """One response to each prompt, as text.

        Args:
            prompts: B texts.
            max_new_tokens: default: the task's.
            temperature: default: the environment's.
            top_k: only the k most probable tokens (0: all).
            top_p: only the most probable tokens that reach p together.
            deterministic: the most probable token always.
        """
        check("prompts", prompts, isinstance(prompts, list) and len(prompts) > 0, "a list of at least one text")
        sampling = Sampling(temperature or self.base.temperature, top_k, top_p, greedy=deterministic)
        sampled = generate(
            self.policy,
            [self.task.encode({"prompt": prompt}) for prompt in prompts],
            max_new_tokens or self.task.max_new_tokens,
            [self.task.eos_token_id],
            sampling=sampling,
            generator=self.generator,
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
