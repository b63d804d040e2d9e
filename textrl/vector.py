"""`TextVectorEnv`: N episodes of a task in one batch, stepped together, with one shared reference model."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from .env import Info, Policy, check_penalty, chosen_logprobs, chosen_row, observation_space
from .render import RENDER_MODES, Picture, draw, show
from .rows import RowStreams
from .task import Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Bools = NDArray[np.bool_]


class TextVectorEnv(VectorEnv[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]):
    """N episodes of one task, stepped in one batch: N `TextEnv`s stepped alike give the same, row by row.

    Args:
        task: what to say and how good it was.
        num_envs: N.
        reference: a causal language model (or the name or folder of one) to stay close to, asked once a step for the
            whole batch. It is frozen.
        kl_coef: weight of the KL penalty, at least 0.
        temperature: divides the reference's and the policy's logits before the softmax.
        autoreset_mode: what happens to a row whose episode has ended: NEXT_STEP (the next step resets it and ignores
            its action), SAME_STEP (reset at once; `final_obs` and `final_info` hold the end) or DISABLED (the caller
            resets with `reset(options={"reset_mask": mask})`).
        render_mode: None, "ansi", "human" or "rgb_array".
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": RENDER_MODES,
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        task: Task,
        num_envs: int = 1,
        *,
        reference: PreTrainedModel | str | None = None,
        kl_coef: float = 0.0,
        temperature: float = 1.0,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        check_penalty(reference, kl_coef, temperature)
        if not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise ValueError(f"num_envs must be a whole number of at least 1; got {num_envs!r}")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"render_mode must be one of {self.metadata['render_modes']} or None; got {render_mode!r}")
        self.task = task
        self.num_envs = int(num_envs)
        self.kl_coef = float(kl_coef)
        self.temperature = float(temperature)
        self.render_mode = render_mode
        self.autoreset_mode = as_autoreset_mode(autoreset_mode)
        self.metadata = {**copy(type(self).metadata), "autoreset_mode": self.autoreset_mode}
        self.policy: Policy | None = None
        self.single_observation_space = observation_space(task)
        self.single_action_space = gym.spaces.Discrete(task.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.reference: PreTrainedModel | None = None
        self._ref_logits: Policy | None = None
        if reference is not None:
            from .stepwise import frozen_reference

            self.reference, self._ref_logits = frozen_reference(reference, task)
        n, width = self.num_envs, task.max_prompt_tokens + task.max_new_tokens
        self._buffer = np.full((n, width + 1), task.vocab_size, dtype=np.int64)
        self._tokens = self._buffer[:, :width]  # (N, L); the column after it takes what is written past the end
        self._offsets = np.arange(n) * (width + 1)  # where the rows begin in the flat buffer
        self._prompt_lengths = np.zeros(n, dtype=np.int64)
        self._lengths = np.zeros(n, dtype=np.int64)
        self._ended: Bools = np.ones(n, dtype=np.bool_)
        self._started = False
        self._rows: list[Row] = [{} for _ in range(n)]
        self._streams: RowStreams | None = None
        self._masked = task.masked
        self._rewards = None if render_mode is None else np.zeros((n, task.max_new_tokens))  # (N, T), for pictures

    # ---- reset ----------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], Info]:
        """Starts new episodes, in every row or in those that `options["reset_mask"]` names.

        Args:
            seed: None, an int (row i gets seed + i) or a list of N.
            options: `reset_mask`, an (N,) bool array with at least one True; `row` or `prompt` for all of them.

        Returns:
            observations (N, L) int64 and infos.
        """
        n = self.num_envs
        first = None
        seeds: list[int | None] = [None] * n
        if isinstance(seed, (int, np.integer)):
            first = int(seed)
            seeds = [first + i for i in range(n)]
        elif seed is not None:
            seeds = list(seed)
        if len(seeds) != n:
            raise ValueError(f"seed must be None, an int or a list of num_envs={n}; got a list of {len(seeds)}")
        mask = reset_mask(options, n)
        if not self._started and not mask.all():
            raise gym.error.ResetNeeded("the first reset must be of all rows: leave options['reset_mask'] away")
        super().reset(seed=first)
        if self._streams is None:
            fresh = self.np_random.integers(2**63, size=n).tolist()
            self._streams = RowStreams(self.task, fresh, self._tokens.shape[1])
        for i in np.flatnonzero(mask).tolist():
            if (row_seed := seeds[i]) is not None:
                self._streams.seed(i, int(row_seed))
        self._restart(np.flatnonzero(mask), chosen_row(options))
        self._started = True
        self._show()
        return self._tokens.copy(), self._mask_info(mask)

    def _restart(self, indices: NDArray[np.intp], row: Row | None = None) -> None:
        """A new prompt in each of these rows."""
        assert self._streams is not None
        if row is None:
            rows, tokens, lengths = self._streams.draw(indices)
        else:
            rows = [row] * len(indices)
            tokens, lengths = self._streams.lay_out(rows)
        for i, each in zip(indices.tolist(), rows, strict=True):
            self._rows[i] = each
        self._tokens[indices] = tokens
        self._prompt_lengths[indices] = self._lengths[indices] = lengths
        self._ended[indices] = False
        if self._rewards is not None:
            self._rewards[indices] = 0

    # ---- step -----------------------------------------------------------------------------------------------

    def step(self, actions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64], Bools, Bools, Info]:
        """Appends one token to each row.

        Args:
            actions: (N,) integers from 0 to V - 1.

        Returns:
            observations (N, L) int64, rewards (N,) float64, terminations (N,), truncations (N,, always False) and
            infos: arrays of length N, each with its mask `_key`, as `gymnasium.vector` lays down.

        Raises:
            ValueError: for actions that are not N tokens.
            gym.error.ResetNeeded: before the first reset.
            AssertionError: with autoreset DISABLED, for a row whose episode has ended.
        """
        if not self._started:
            raise gym.error.ResetNeeded("step was called before the first reset: call reset() first")
        actions = check_actions(actions, self.num_envs, self.task.vocab_size)
        resetting = self._ended
        again = resetting.nonzero()[0]
        if self.autoreset_mode == AutoresetMode.DISABLED:
            assert len(again) == 0, f"rows {again.tolist()} have ended: reset them with options={{'reset_mask': ...}}"
        live = ~resetting
        rewards = np.zeros(self.num_envs)
        infos: Info = {}
        if self._ref_logits is not None and live.any():
            self._penalties(actions, live, rewards, infos)
        self._buffer.reshape(-1)[self._offsets + self._lengths] = actions
        self._lengths += live
        if len(again):  # what was just written there goes
            self._restart(again)
        generated = self._lengths - self._prompt_lengths
        ended = ((actions == self.task.eos_token_id) | (generated == self.task.max_new_tokens)) & live
        self._ended = ended.copy()
        over = ended.nonzero()[0]
        final = self._finish(over, ended, rewards) if len(over) else {}
        if self.task.token_scores is not False:
            self._token_scores(np.flatnonzero(live & ~ended), rewards)
        if self._rewards is not None:
            self._rewards[live, generated[live] - 1] = rewards[live]
        if len(over) and self.autoreset_mode == AutoresetMode.SAME_STEP:
            self._into_final(infos, final, ended)
            self._restart(over)
        else:
            infos.update(final)
        if self._masked and not self._ended.all():
            infos.update(self._mask_info(~self._ended))
        self._show()
        return self._tokens.copy(), rewards, ended, np.zeros(self.num_envs, dtype=np.bool_), infos

    def _penalties(self, actions: NDArray[np.int64], live: Bools, rewards: NDArray[np.float64], infos: Info) -> None:
        """`-kl_coef * (log pi - log pi_ref)`, or `+kl_coef * log pi_ref` without a policy, for every live row."""
        assert self._ref_logits is not None
        observations = self._tokens.copy()
        ref_logprobs = chosen_logprobs(self._ref_logits(observations), actions, self.temperature)
        infos["ref_logprob"], infos["_ref_logprob"] = np.where(live, ref_logprobs, np.float32(0)), live.copy()
        if self.policy is None:
            rewards[live] += self.kl_coef * ref_logprobs[live].astype(np.float64)
            return
        kl = chosen_logprobs(self.policy(observations), actions, self.temperature) - ref_logprobs
        infos["kl"], infos["_kl"] = np.where(live, kl, np.float32(0)), live.copy()
        rewards[live] += -self.kl_coef * kl[live].astype(np.float64)

    def _responses(self, indices: NDArray[np.intp]) -> list[list[int]]:
        texts = self._tokens[indices].tolist()
        starts, ends = self._prompt_lengths[indices].tolist(), self._lengths[indices].tolist()
        return [text[start:end] for text, start, end in zip(texts, starts, ends, strict=True)]

    def _token_scores(self, indices: NDArray[np.intp], rewards: NDArray[np.float64]) -> None:
        """The reward of the token just written, where the score gives one for every token."""
        if len(indices) == 0:
            return
        scores = self.task.evaluate([self._rows[i] for i in indices.tolist()], self._responses(indices))
        if scores.tokens is not None:
            rewards[indices] += scores.last

    def _finish(self, indices: NDArray[np.intp], ended: Bools, rewards: NDArray[np.float64]) -> Info:
        """Scores the episodes that ended and describes them: arrays of length N with their masks."""
        rows = [self._rows[i] for i in indices.tolist()]
        scores, columns = self.task.finish(rows, self._responses(indices))
        rewards[indices] += scores.last
        infos: Info = {}
        for key, values in columns.items():
            if isinstance(values, list):
                infos[key] = texts = np.empty(self.num_envs, dtype=object)  # None everywhere
                texts[indices] = np.array(values, dtype=object)
            else:
                infos[key] = np.zeros(self.num_envs)
                infos[key][indices] = values
            infos[f"_{key}"] = ended.copy()
        return infos

    def _into_final(self, infos: Info, final: Info, ended: Bools) -> None:
        """SAME_STEP: what belongs to the ended episodes moves into `final_obs` and `final_info`."""
        observations = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            observations[i] = self._tokens[i].copy()
        for key in ("ref_logprob", "kl"):
            if key in infos:
                final[key] = np.where(ended, infos[key], np.float32(0))
                final[f"_{key}"] = ended.copy()
                infos[f"_{key}"] = infos[f"_{key}"] & ~ended
                infos[key] = np.where(ended, np.float32(0), infos[key])
                if not infos[f"_{key}"].any():
                    del infos[key], infos[f"_{key}"]
        infos["final_obs"], infos["_final_obs"] = observations, ended.copy()
        infos["final_info"], infos["_final_info"] = final, ended.copy()

    # ---- masks and pictures ---------------------------------------------------------------------------------

    def action_masks(self) -> Bools:
        """(N, V) bool: the tokens that the task advises now in each row (all, for a task without masks)."""
        if not self._masked or not self._started or self._ended.all():
            return np.ones((self.num_envs, self.task.vocab_size), dtype=np.bool_)
        responses = np.full((self.num_envs, self.task.max_new_tokens), self.task.vocab_size, dtype=np.int64)  # (N, T)
        columns = self._prompt_lengths[:, None] + np.arange(self.task.max_new_tokens)
        written = columns < self._lengths[:, None]
        responses[written] = self._tokens[np.nonzero(written)[0], columns[written]]
        mask = np.ones((self.num_envs, self.task.vocab_size), dtype=np.bool_)
        running = np.flatnonzero(~self._ended)
        mask[running] = self.task.masks([self._rows[i] for i in running.tolist()], responses[running])
        return mask

    def _mask_info(self, rows: Bools) -> Info:
        """`action_mask` (N, V) int8 for these rows, where the task advises tokens."""
        if not self._masked:
            return {}
        mask = np.where(rows[:, None], self.action_masks(), False).astype(np.int8)
        return {"action_mask": mask, "_action_mask": rows.copy()}

    def pictures(self) -> list[Picture]:
        """The episodes as they stand, for the renderers."""
        responses = self._responses(np.arange(self.num_envs))
        paid = np.zeros((self.num_envs, self.task.max_new_tokens)) if self._rewards is None else self._rewards
        return [
            Picture.of(self.task, row.get("prompt", ""), response, rewards[: len(response)].tolist(), "reward", total)
            for row, response, rewards, total in zip(self._rows, responses, paid, paid.sum(1).tolist(), strict=True)
        ]

    def _show(self) -> None:
        if self.render_mode == "human":
            show(self.pictures())

    def render(self) -> tuple[Any, ...] | None:
        """One picture a row, as `TextEnv.render` draws it; None for "human" and without a render mode."""
        if self.render_mode in (None, "human"):
            return None
        return tuple(draw(picture, self.render_mode) for picture in self.pictures())


def as_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """The enum for a mode given as itself, its name or its value."""
    for known in AutoresetMode:
        if mode in (known, known.name, known.value):
            return known
    raise ValueError(f"autoreset_mode must be one of {[m.name for m in AutoresetMode]}; got {mode!r}")


def reset_mask(options: dict[str, Any] | None, num_envs: int) -> Bools:
    """The rows to reset: `options["reset_mask"]`, or all.

    Raises:
        TypeError, ValueError: as `SyncVectorEnv` does, for anything but an (N,) bool array with a True.
    """
    if options is None or "reset_mask" not in options:
        return np.ones(num_envs, dtype=np.bool_)
    mask = options["reset_mask"]
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask'] must be a numpy array of bool; got {mask!r}")
    if mask.shape != (num_envs,) or not mask.any():
        raise ValueError(f"options['reset_mask'] must have shape ({num_envs},) and at least one True; got {mask!r}")
    return mask.copy()


def check_actions(actions: Any, num_envs: int, vocab_size: int) -> NDArray[np.int64]:
    """The actions as (N,) int64.

    Raises:
        ValueError: for floats, another shape, or ids outside the vocabulary.
    """
    array = np.asarray(actions)
    if array.shape != (num_envs,) or array.dtype.kind not in "iu":
        raise ValueError(f"actions must be {num_envs} integer token ids; got shape {array.shape}, dtype {array.dtype}")
    outside = array.astype(np.uint64) >= vocab_size  # a negative id becomes a huge one
    if outside.any():
        bad = int(np.flatnonzero(outside)[0])
        raise ValueError(f"actions must be token ids from 0 to {vocab_size - 1}; got {array[bad]} in row {bad}")
    return array.astype(np.int64, copy=False)
