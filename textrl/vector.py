"""`TextVectorEnv`: N episodes of a task in one batch, stepped together, with one shared reference model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from .arguments import (
    as_autoreset_mode,
    check_actions,
    check_count,
    check_penalty,
    check_render_mode,
    chosen_row,
    row_seeds,
)
from .arguments import reset_mask as rows_to_reset
from .env import Info, Value, observation_space
from .outcomes import Outcomes
from .penalty import Penalty, Policy
from .render import RENDER_MODES, Picture, Trace, draw, show
from .rows import Row
from .streams import RowStreams
from .task import Task
from .texts import Texts

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
        max_episode_steps: truncates there, as Gymnasium's `TimeLimit` does: without a score.
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
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_penalty(reference, kl_coef, temperature)
        check_render_mode(render_mode)
        if max_episode_steps is not None:
            check_count("max_episode_steps", max_episode_steps)
        self.max_episode_steps = max_episode_steps
        self.task = task
        self.num_envs = check_count("num_envs", num_envs)
        self.kl_coef = float(kl_coef)
        self.temperature = float(temperature)
        self.render_mode = render_mode
        self.autoreset_mode = as_autoreset_mode(autoreset_mode)
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.policy: Policy | None = None
        self.value: Value | None = None  # of states, for pictures, as in `TextEnv`
        self.single_observation_space = observation_space(task)
        self.single_action_space = gym.spaces.Discrete(task.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.penalty = None if reference is None else Penalty(reference, task)
        self.reference = None if self.penalty is None else self.penalty.reference
        n, width = self.num_envs, task.max_prompt_tokens + task.max_new_tokens
        self._texts = Texts(n, width, task.vocab_size)
        # arrays without axes, because NumPy is half as fast with numbers of Python's
        self._horizon, self._end = np.array(task.max_new_tokens), np.array(task.eos_token_id)
        self._limit = np.array(self.max_episode_steps or task.max_new_tokens + 1)
        self._ended: Bools = np.ones(n, dtype=np.bool_)  # the texts that are finished,
        self._over: Bools = np.ones(n, dtype=np.bool_)  # and the rows to be reset: those, and what was truncated
        self._started = False
        self._streams: RowStreams | None = None
        self._masked = task.masked
        self._traces = [Trace() for _ in range(n)]  # for pictures, kept where there is a render mode

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The observations as they stand, (N, L) int64, whatever a wrapper makes of them."""
        return self._texts.tokens.copy()

    @property
    def rows(self) -> list[Row]:
        """The N rows of the task that are played, not copies; empty ones before the first reset."""
        return [row or {} for row in self._texts.rows.tolist()]

    @property
    def running(self) -> Bools:
        """(N,) bool: the rows whose episode goes on; the others are to be reset."""
        return ~self._over

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
        seeds, mask = row_seeds(seed, n), rows_to_reset(options, n)
        if not self._started and not mask.all():
            raise gym.error.ResetNeeded("the first reset must be of all rows: leave options['reset_mask'] away")
        super().reset(seed=seeds[0] if isinstance(seed, (int, np.integer)) else None)
        if self._streams is None:
            fresh = self.np_random.integers(2**63, size=n).tolist()
            self._streams = RowStreams(self.task, fresh, self._texts.tokens.shape[1])
            self._outcomes = Outcomes(self.task, n, self._streams.num_rows)
        for i in np.flatnonzero(mask).tolist():
            if (row_seed := seeds[i]) is not None:
                self._streams.seed(i, row_seed)
        self._restart(np.flatnonzero(mask), chosen_row(options, self.task))
        self._started = True
        self._show()
        return self._texts.tokens.copy(), self._mask_info(mask)

    def _restart(self, indices: NDArray[np.intp], row: Row | None = None) -> None:
        """A new prompt in each of these rows."""
        assert self._streams is not None
        if row is None:
            which, rows, tokens, lengths = self._streams.draw(indices)
        else:
            which, (rows, tokens, lengths) = None, self._streams.lay_out([row] * len(indices))
        self._texts.start(indices, rows, tokens, lengths)
        self._outcomes.start(indices, which)
        self._ended[indices] = self._over[indices] = False
        if self.render_mode is not None:
            for i in indices.tolist():
                self._traces[i] = Trace()

    # ---- step -----------------------------------------------------------------------------------------------

    def step(self, actions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64], Bools, Bools, Info]:
        """Appends one token to each row.

        Args:
            actions: (N,) integers from 0 to V - 1.

        Returns:
            observations (N, L) int64, rewards (N,) float64, terminations (N,), truncations (N,, where there is a
            `max_episode_steps`) and infos: arrays of length N, each with its mask `_key`, as `gymnasium.vector` says.

        Raises:
            ValueError: for actions that are not N tokens.
            gym.error.ResetNeeded: before the first reset.
            AssertionError: with autoreset DISABLED, for a row whose episode has ended.
        """
        if not self._started:
            raise gym.error.ResetNeeded("step was called before the first reset: call reset() first")
        again = self._over.nonzero()[0]
        actions = check_actions(actions, self.num_envs, self.task.vocab_size, again)
        if len(again) and self.autoreset_mode == AutoresetMode.DISABLED:
            raise AssertionError(f"rows {again.tolist()} have ended: reset them with options={{'reset_mask': ...}}")
        rewards = np.zeros(self.num_envs)
        values = None if self.value is None or self.render_mode is None else self.value(self._texts.tokens.copy())
        infos: Info = {}
        if self.penalty is not None and len(again) < self.num_envs:
            self._pay(actions, rewards, infos)
        self._texts.append(actions)
        self._outcomes.append(actions)
        lengths = self._texts.lengths
        ended, truncated = (lengths == self._horizon) | (actions == self._end), lengths >= self._limit
        if len(again):  # what was just written there goes
            ended[again] = truncated[again] = False
            self._restart(again)
        self._ended, self._over = ended.copy(), ended | truncated
        over = self._over.nonzero()[0]
        final: Info = {}
        if len(over) and ended.any():
            last, final = self._outcomes.of(ended, self._texts.episodes)
            rewards += last
        if self.task.token_scores is not False:
            self._token_scores(~ended, rewards)
        if self.render_mode is not None:
            self._trace(rewards, infos.get("kl"), values)
        if len(over) and self.autoreset_mode == AutoresetMode.SAME_STEP:
            self._into_final(infos, final)
            self._restart(over)
        else:
            infos.update(final)
        if self._masked and not self._ended.all():
            infos.update(self._mask_info(~self._ended))
        return self._texts.tokens.copy(), rewards, ended, truncated, infos

    def _pay(self, actions: NDArray[np.int64], rewards: NDArray[np.float64], infos: Info) -> None:
        """The KL penalty of a token, for every live row."""
        assert self.penalty is not None
        live, observations = self.running, self._texts.tokens.copy()
        paid, columns = self.penalty(observations, actions, self.kl_coef, self.temperature, self.policy, live)
        rewards[live] += paid[live]
        for key, values in columns.items():
            infos[key], infos[f"_{key}"] = np.where(live, values, np.float32(0)), live.copy()

    def _token_scores(self, running: Bools, rewards: NDArray[np.float64]) -> None:
        """The reward of the token just written, where the score gives one for every token."""
        indices = (running & (self._texts.lengths > 0)).nonzero()[0]
        scores = self.task.evaluate_parts(*self._texts.episodes(indices)) if len(indices) else None
        if scores is not None:
            rewards[indices] += scores.last
            rewards[indices[list(scores.faults)]] = np.nan

    def _into_final(self, infos: Info, final: Info) -> None:
        """SAME_STEP: what belongs to the episodes that are over moves into `final_obs` and `final_info`."""
        over, observations = self._over.copy(), np.full(self.num_envs, None, dtype=object)
        for i in over.nonzero()[0].tolist():
            observations[i] = self._texts.tokens[i].copy()
        for key in ("ref_logprob", "kl"):
            if key in infos:
                final[key] = np.where(over, infos[key], np.float32(0))
                final[f"_{key}"] = over.copy()
                infos[f"_{key}"] = infos[f"_{key}"] & ~over
                infos[key] = np.where(over, np.float32(0), infos[key])
                if not infos[f"_{key}"].any():
                    del infos[key], infos[f"_{key}"]
        if (cut := over & ~self._ended).any():
            final.update(self._mask_info(cut))
        infos["final_obs"], infos["_final_obs"] = observations, over.copy()
        infos["final_info"], infos["_final_info"] = final, over

    # ---- masks and pictures ---------------------------------------------------------------------------------

    def action_masks(self) -> Bools:
        """(N, V) bool: the tokens that the task advises now in each row (all, for a task without masks)."""
        if not self._masked or not self._started or self._ended.all():
            return np.ones((self.num_envs, self.task.vocab_size), dtype=np.bool_)
        running = (~self._ended).nonzero()[0]
        responses = self._texts.responses(running, self.task.max_new_tokens)  # (n, T)
        mask = np.ones((self.num_envs, self.task.vocab_size), dtype=np.bool_)
        mask[running] = self.task.masks(self._texts.rows[running].tolist(), responses)
        return mask

    def _mask_info(self, rows: Bools) -> Info:
        """`action_mask` (N, V) int8 for these rows, where the task advises tokens."""
        if not self._masked:
            return {}
        mask = np.where(rows[:, None], self.action_masks(), False).astype(np.int8)
        return {"action_mask": mask, "_action_mask": rows.copy()}

    def pictures(self) -> list[Picture]:
        """The episodes as they stand, for the renderers."""
        rows, responses = self._texts.episodes(np.arange(self.num_envs))
        return [
            Picture.of(self.task, row["prompt"] if row else "", ids, trace)
            for row, ids, trace in zip(rows, responses, self._traces, strict=True)
        ]

    def _trace(self, rewards: NDArray[np.float64], kls: Any, values: Any) -> None:
        """Keeps what a step brought, (N,) each or None, for the renderers."""
        for i in self._texts.lengths.nonzero()[0].tolist():
            kl, value = None if kls is None else kls[i], None if values is None else values[i]
            self._traces[i].add(float(rewards[i]), kl, value)
        self._show()

    def _show(self) -> None:
        if self.render_mode == "human":
            show(self.pictures())

    def render(self) -> tuple[Any, ...] | None:
        """One picture a row, as `TextEnv.render` draws it; None for "human" and without a render mode."""
        if self.render_mode in (None, "human"):
            return None
        return tuple(draw(picture, self.render_mode) for picture in self.pictures())
