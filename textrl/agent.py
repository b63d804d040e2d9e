"""`Agent`: a policy that acts in an environment and learns from rollouts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import acting, checkpoint, loop, state
from .attaching import base_env, penalty_weight
from .config import AgentConfig, as_path, check, make_config
from .drawing import Sampling
from .failures import ask_as_configured
from .files import read_rows
from .loop import Callback
from .memory import Loss, accumulate_gradients, halving
from .models import pick_device, recompute_blocks, tables, trainable
from .optim import Optimizer
from .rollout import Narrow, Rollout, policy_in
from .rows import Row
from .score_weight import ScoreWeight
from .starting import keep_dtype, starting_model
from .stepwise import StepwiseLM
from .task import Task
from .trunk import frozen_blocks
from .wrappers import AnyEnv

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerFast


class Agent:
    """A policy that acts and learns. A subclass defines `update`; the rest is here.

    Args:
        env: a textrl environment, single or vector. One that somebody wrapped is stepped, token by token; one that
            nobody wrapped is sampled whole, to the same effect and faster.
        model: a `PreTrainedModel`, a folder or hub name of one, or None for a small GPT-2 with random weights.
        config: an instance of the agent's config class.
        peft_config: of an adapter (`peft.LoraConfig`), which is then all that learns; a model that has an adapter goes
            on learning it. Where the environment's reference is the model as it starts, it holds no second copy of the
            base weights; `model` and reference may then be one object.
        settings: single fields of the config, as keywords; they win over `config`. `textrl train AGENT --settings` and
            the class of `config_class` list them.

    Attributes (those of an agent of one's own need other names):
        env, base: the environment as it was given, and the `TextEnv` or `TextVectorEnv` inside its wrappers.
        task, tokenizer: the environment's.
        policy, stepper: `model` as log-probabilities of whole texts, and token by token.
        device, rng, generator, modules, optimizer: where and how it learns; `modules` by name are saved and learn.
        model: the policy, a `PreTrainedModel`.
        config: the settings in force.
        num_timesteps: tokens learned from so far.
        num_updates: calls of `update` so far.
        progress_remaining: share of this call of `learn` that is to come, from 1 to 0, for what follows a schedule.
        schedule: the share of the learning rate in force in `update`: it rises in the first `warmup` of `learn` and
            falls to 0 in the last `cooldown`.
        score_weight: its `value` is what the score is multiplied by: from `score_start` to 1 in the first `learn`.
    """

    config_class: ClassVar[type[AgentConfig]] = AgentConfig
    group_size = 1
    """Samples of each prompt in a rollout; an agent that compares samples of one prompt sets it."""
    not_saved: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "group_size",
        "env",
        "base",
        "task",
        "tokenizer",
        "tokenizers",
        "dataset_digest",
    )
    """Attributes that follow from the arguments. All others that are numbers, tensors, generators, lists of these or
    have a `state_dict` are in a checkpoint; a subclass names those of its own that should not be."""

    def __init__(
        self,
        env: AnyEnv,
        model: PreTrainedModel | str | Path | None = None,
        config: AgentConfig | None = None,
        *,
        peft_config: PeftConfig | None = None,
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
        kind = torch.get_default_dtype()
        check("torch's default dtype", kind, kind == torch.float32, "torch.float32, as torch.set_default_dtype sets it")
        self.device = pick_device(self.config.device)
        self.rng = np.random.default_rng([self.config.seed, 1])  # prompts
        self.generator = torch.Generator().manual_seed(self.config.seed)  # tokens, minibatches
        rate = self.config.learning_rate
        self.learning_rate = (1e-3 if model is None else 1e-5) if rate is None else rate
        if peft_config is not None and isinstance(model, PreTrainedModel):
            self.config = keep_dtype(self.config, model)
        self.model = starting_model(model, self.base, self.config, self.device, peft_config)
        self.policy = policy_in(self.base, self.model)
        self.policy.frozen_blocks = frozen_blocks(self.model)
        self.stepper = StepwiseLM(self.policy)
        self.modules: dict[str, nn.Module] = {"policy": self.model}
        self.tokenizers: dict[str, PreTrainedTokenizerFast] = {}  # of modules that have one of their own
        self.dataset_digest = ""  # of the data given to learn from: a run goes on with the same alone
        self.paid_otherwise = False  # whether a wrapper was seen to change rewards
        self.seeded = False  # whether the environment that is stepped got its seed
        self.env_born = state.born(env)  # what it was like when the agent came to it
        self.num_timesteps = self.num_updates = 0
        self.stuck = 0  # iterations in a row that nothing could be learned from
        self.drops: list[list[int]] = []  # of the last iterations: episodes whose scores failed, all episodes
        self.call: dict[str, Any] | None = None  # of `learn`: how far it goes, and what it has saved
        self.resumed: checkpoint.Resumed | None = None
        self.progress_remaining = 1.0
        self.schedule = 1.0
        self.score_weight = ScoreWeight(self.config.score_start)
        self.halved = False  # whether memory has not sufficed once
        self.state_value: Callable[[Tensor], Tensor] | None = None  # `build` may set one, asked while sampling
        ask_as_configured(self)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)  # what is made there is the same in every run
            self.build()
        if self.config.activation_checkpointing:
            for module in self.modules.values():
                if isinstance(module, PreTrainedModel):
                    recompute_blocks(module)
        self.optimizer = Optimizer(
            *(trainable(module) for module in self.modules.values()),
            learning_rate=self.learning_rate,
            max_grad_norm=self.config.max_grad_norm,
            weight_decay=self.config.weight_decay,
            beta2=self.config.adam_beta2,
            tables=tables(*self.modules.values()),
            row_clocks=self.config.row_clocks,
        )

    # ---- what an agent's author writes -----------------------------------------------------------------------

    needs_dataset: ClassVar[bool] = False
    """Whether there is nothing to learn from without the constructor's `dataset`."""

    def build(self) -> None:
        """Makes what the agent has beside the policy (a critic) and adds it to `modules`; nothing by default."""

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Learns from one batch of episodes; returns numbers to log: "group/name", or a name of the group "train"."""
        raise NotImplementedError(f"{type(self).__name__} must define update(rollout)")

    @classmethod
    def read_dataset(cls, file: str | Path, skip_bad_rows: bool = False, task: Task | None = None) -> Any:
        """What `textrl train --dataset FILE` hands to the constructor as `dataset`: by default rows as they are.

        Args:
            file: the file.
            skip_bad_rows: whether rows with a fault are left out and listed, in place of an error.
            task: what is to be learned, for files that are read by its tokenizer.

        Raises:
            ValueError: for an agent that takes no dataset.
        """
        if "dataset" not in inspect.signature(cls).parameters:
            raise ValueError(f"--dataset is for agents that learn from given data; {cls.__name__} learns from its own")
        return read_rows(file, skip_bad_rows=skip_bad_rows, called="--dataset")

    def collect(self) -> Rollout:
        """The next batch to learn from: by default `batch_size` fresh episodes of the environment."""
        return acting.collect(self, self.config.batch_size, self.group_size)

    def narrow(self, observations: NDArray[np.int64], advised: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """The tokens that an agent with masks of its own draws from, (N, V) bool.

        Args:
            observations: (N, L).
            advised: (N, V), the task's masks there, within which the agent's hold; None: all tokens.
        """
        return np.ones((len(observations), self.task.vocab_size), dtype=np.bool_)

    @property
    def own_masks(self) -> Narrow | None:
        """`narrow`, where this agent's class defines one; else None."""
        return None if type(self).narrow is Agent.narrow else self.narrow

    # ---- what an update is made of ---------------------------------------------------------------------------

    def logprobs(self, batch: Rollout) -> Tensor:
        """Log-probabilities of the agent's tokens under the policy as it is now: (B, T) float32, differentiable."""
        rows, columns, targets = batch.places()
        hidden = self.policy.hidden(batch.tokens, rows, columns, batch.below)
        return batch.spread(self.policy.logprobs(hidden, targets, batch.token_masks)[0])

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
        scale = self.optimizer.scale if isinstance(self.optimizer, Optimizer) else 1.0  # one that somebody put there

        def accumulate(tokens_at_once: int) -> dict[str, float]:
            return accumulate_gradients(loss, batch, tokens_at_once, mean_over == "groups", scale)

        limit = self.config.max_tokens_per_microbatch
        if self.halved:
            out = accumulate(limit)
        else:
            out, now = halving(accumulate, limit, batch.tokens.numel(), self.optimizer.zero_grad)
            if now != limit:
                self.config, self.halved = replace(self.config, max_tokens_per_microbatch=now), True
        out["grad_norm"] = self.optimizer.step() if scale == 1 else self.optimizer.step(scale)
        return out

    def tempered(self, rollout: Rollout) -> Rollout:
        """A fresh rollout with the score in its rewards multiplied by its weight, and the KL penalty as it was.

        Where a wrapper changes rewards the two cannot be told apart, and all stays as it is.
        """
        kl_coef = penalty_weight(self.env)
        if (log_ratios := rollout.log_ratios) is None or kl_coef == 0 or self.paid_otherwise:
            return rollout
        if (weight := self.weigh(rollout.scores)) == 1:
            return rollout
        return replace(rollout, rewards=weight * rollout.rewards - (1 - weight) * (kl_coef * log_ratios))

    def weigh(self, scores: Tensor) -> float:
        """The weight of the score in an update under a KL penalty that learns from these scores, (B,)."""
        return self.score_weight.weigh(scores, penalty_weight(self.env), 1 - self.progress_remaining)

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
            checkpoint_every: tokens between checkpoints in `log_dir/checkpoints`. With it, the last iteration, SIGINT,
                SIGTERM and a callback that ends the loop leave a checkpoint too, and `log_dir/best` is the one with the
                best scores before it; none for an agent that learns from given data.
            keep: so many of the newest checkpoints stay, and the best.
            resume: goes on from the newest whole checkpoint in `log_dir`, if there is one.

        Returns:
            the agent.

        Raises:
            ValueError: for a setting that is not what it should be, or a `log_dir` with checkpoints that a new agent
                would mix its own with.
            ScoreError: when the score of a response fails, unless `on_score_error` is "drop".
            TrainingError: when loss or gradient are not finite three times in a row, or too many scores fail.
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
        """Draws a token for each observation that the environment shows now: (N, L) int64 -> (N,); (L,) -> ()."""
        return acting.in_environment(self, observations)

    def predict(
        self,
        observation: NDArray[np.int64],
        state: None = None,
        episode_start: None = None,
        deterministic: bool = False,
        action_masks: NDArray[Any] | None = None,
    ) -> tuple[Any, None]:
        """The action for an observation, (L,) or (N, L), as in Stable-Baselines3 and sb3-contrib: (action, None).

        Args:
            observation: of the agent's task, from any environment.
            state: not used.
            episode_start: not used.
            deterministic: the most probable token in place of a draw.
            action_masks: (V,) or (N, V), the tokens to choose from. None: the task's own masks where it has finitely
                many prompts, from which they follow.
        """
        return acting.on_observation(self, observation, deterministic, action_masks), None

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        min_new_tokens: int = 0,
        stop_strings: Sequence[str] = (),
        deterministic: bool = False,
    ) -> list[str]:
        """One response to each prompt, as text; for the task's own prompts and up to its horizon inside its masks.

        Args:
            prompts: B texts. One that is a prompt of the task brings the columns of its row to masks and score.
            max_new_tokens: default: the task's.
            temperature: default: the environment's.
            top_k: only the k most probable tokens (0: all).
            top_p: only the most probable tokens that reach p together.
            min_new_tokens: neither the end token nor a stop string ends a response before this many tokens.
            stop_strings: a response ends with the token that completes one of these texts.
            deterministic: the most probable token always.
        """
        listed = isinstance(prompts, (list, tuple)) and len(prompts) > 0
        check("prompts", prompts, listed, "a list of at least one text")
        sampling = Sampling(
            self.base.temperature if temperature is None else temperature, top_k, top_p, min_new_tokens, deterministic
        )
        return self._answers(prompts, max_new_tokens, sampling, stop_strings)

    def _answers(
        self, prompts: Sequence[str], max_new_tokens: int | None, sampling: Sampling, stop_strings: Sequence[str]
    ) -> list[str]:
        """What `generate` gives."""
        return self.task.decode(acting.responses_to(self, prompts, max_new_tokens, sampling, stop_strings)[1])

    def respond(self, rows: Sequence[Row]) -> Rollout:
        """One whole response to each row of the task, scored, whatever wraps the environment: B episodes."""
        return acting.respond(self, rows)

    # ---- saving ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Writes the policy (loadable with `from_pretrained`), the tokenizer, every other module and the settings."""
        checkpoint.save_agent(self, as_path("folder", folder))

    @classmethod
    def saved_arguments(cls, folder: Path) -> dict[str, Any]:
        """The constructor's arguments, beside settings, that `load` finds in what `save` wrote; by default none."""
        return {}

    @classmethod
    def load(cls, folder: str | Path, env: AnyEnv, **settings: Any) -> Self:
        """An agent as `save` left it, on an environment; `settings` change single fields of its config.

        Raises:
            ValueError: for a folder without an agent of this class.
        """
        return checkpoint.load_agent(cls, as_path("folder", folder), env, settings)
