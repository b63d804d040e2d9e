"""`TextEnv`: one episode of a task, token by token, as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from .arguments import check_action, check_penalty, check_render_mode, chosen_row
from .config import check
from .penalty import Penalty, Policy
from .render import RENDER_MODES, Picture, Trace, draw, show
from .rows import Row
from .streams import RowStream
from .task import Task, check_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Value = Callable[[NDArray[np.int64]], Any]
"""observations (B, L) int64 -> values of these states (B,), a tensor or an array."""

Info = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """An episode at one moment, to be restored into the environment it came from, or another of its task."""

    task: str
    row: Row
    tokens: NDArray[np.int64]
    prompt_length: int
    length: int
    ended: bool
    rewards: tuple[float, ...]
    kls: tuple[float, ...]
    values: tuple[float, ...] = ()


def observation_space(task: Task) -> Any:
    """Token ids from the left, `V` where nothing is written: Box(0, V, (P + T,), int64).

    Raises:
        ValueError: for what is no task.
    """
    check_task(task)
    return gym.spaces.Box(0, task.vocab_size, (task.max_prompt_tokens + task.max_new_tokens,), np.int64)


class TextEnv(gym.Env[NDArray[np.int64], np.int64]):
    """Text generation as a Markov decision process: the state is the text so far, the action the next token.

    An episode ends with the end token or after `max_new_tokens` tokens; both are `terminated`, because the horizon
    is part of the task. The score of the text is paid at the last token. With a reference model each token costs
    `kl_coef * (log pi(a|s) - log pi_ref(a|s))`, where pi is `env.unwrapped.policy`; while that is None the
    environment pays `+kl_coef * log pi_ref(a|s)` and leaves the entropy bonus `-kl_coef * log pi(a|s)` to the agent.

    Args:
        task: what to say and how good it was.
        reference: a causal language model (or the name or folder of one) to stay close to. It is frozen, without
            dropout, in place: what is still to be trained elsewhere is passed as a copy.
        kl_coef: weight of the KL penalty, at least 0.
        temperature: divides the reference's and the policy's logits before the softmax.
        render_mode: None, "ansi", "human" or "rgb_array".

    Attributes:
        policy: None, or a callable observations (B, L) int64 -> logits (B, V).
        value: None, or a callable observations (B, L) int64 -> values (B,), for pictures: `critic.state_values(agent)`.
        kl_coef: may be changed between steps (an adaptive coefficient).
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": RENDER_MODES,
        "render_fps": 4,
    }

    def __init__(
        self,
        task: Task,
        *,
        reference: PreTrainedModel | str | None = None,
        kl_coef: float = 0.0,
        temperature: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        check_penalty(reference, kl_coef, temperature)
        check_render_mode(render_mode)
        self.task = task
        self.kl_coef = float(kl_coef)
        self.temperature = float(temperature)
        self.render_mode = render_mode
        self.policy: Policy | None = None
        self.value: Value | None = None
        self.observation_space = observation_space(task)
        self.action_space = gym.spaces.Discrete(task.vocab_size)
        self.penalty = None if reference is None else Penalty(reference, task)
        self.reference = None if self.penalty is None else self.penalty.reference
        width = task.max_prompt_tokens + task.max_new_tokens
        self._blank: NDArray[np.int64] = np.full(width, task.vocab_size, dtype=np.int64)  # (L,)
        self._stream: RowStream | None = None
        self._masked = task.masked
        self._row: Row = {}
        self._tokens = self._blank
        self._prompt_length = self._length = 0
        self._ended: bool | None = None  # None: never reset
        self._trace = Trace()

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The observation as it stands, (L,) int64, whatever a wrapper makes of it."""
        return self._tokens.copy()

    @property
    def running(self) -> bool:
        """Whether an episode runs: it has begun and not ended."""
        return self._ended is False

    @property
    def rows(self) -> list[Row]:
        """The row of the task that is played, not a copy, as a list of one; an empty row before the first reset."""
        return [self._row]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.int64], Info]:
        """Starts an episode with a new prompt.

        Args:
            seed: fixes the prompts from here on.
            options: `{"row": {...}}` or `{"prompt": "..."}` starts from that row, columns that it lacks being those of
                the task's own row with that prompt; other keys are left alone.

        Returns:
            observation (L,) int64 and info (`action_mask` where the task advises tokens).
        """
        if seed is not None:
            whole = isinstance(seed, (int, np.integer)) and seed >= 0
            check("seed", seed, whole, "None or a whole number from 0")
            seed = int(seed)
            super().reset(seed=seed)
            self._stream = RowStream(self.task, seed)
        elif self._stream is None:
            self._stream = RowStream(self.task, int(self.np_random.integers(2**63)))
        row = chosen_row(options, self.task)
        if row is None:
            row = next(self._stream)
        ids = self.task.encode(row)
        self._row = row
        self._tokens = self._blank.copy()
        self._tokens[: len(ids)] = ids
        self._prompt_length = self._length = len(ids)
        self._ended = False
        self._trace = Trace()
        if self.render_mode == "human":
            show([self.picture()])
        return self._tokens.copy(), self._mask_info() if self._masked else {}

    def step(self, action: Any) -> tuple[NDArray[np.int64], float, bool, bool, Info]:
        """Appends one token.

        Args:
            action: the token's id, a whole number from 0 to V - 1.

        Returns:
            observation (L,) int64, reward (float), terminated, truncated (always False) and info: `ref_logprob` where
            there is a reference, `kl` where a policy is attached too, and at the end `prompt`, `completion`, `text`,
            `score` and `finish_reason` ("stop" or "length").

        Raises:
            ValueError: for an action that is not a token.
            gym.error.ResetNeeded: before the first reset, and after the end of an episode.
        """
        if self._ended is not False:
            what = "before the first reset" if self._ended is None else "after the end of the episode"
            raise gym.error.ResetNeeded(f"step was called {what}: call reset() first")
        task = self.task
        token = check_action(action, task.vocab_size)
        info: Info = {}
        reward, value = 0.0, None
        if self.value is not None and self.render_mode is not None:
            value = self.value(self._tokens[None].copy())[0]
        if self.penalty is not None:
            reward += self._pay(token, info)
        self._tokens[self._length] = token
        self._length += 1
        terminated = token == task.eos_token_id or self._length - self._prompt_length == task.max_new_tokens
        if terminated:
            self._ended = True
            scores, columns = task.finish([self._row], [self._response()])
            info.update((key, values[0]) for key, values in columns.items())
            reward += float(scores.last[0])
        else:
            reward += self._token_score()
            if self._masked:
                info.update(self._mask_info())
        self._trace.add(reward, info.get("kl"), value)
        if self.render_mode == "human":
            show([self.picture()])
        return self._tokens.copy(), reward, terminated, False, info

    def _pay(self, token: int, info: Info) -> float:
        """The KL penalty of a token; fills `info`."""
        assert self.penalty is not None
        observation = self._tokens[None].copy()  # (1, L)
        paid, columns = self.penalty(observation, [token], self.kl_coef, self.temperature, self.policy)
        info.update((key, values[0]) for key, values in columns.items())
        return float(paid[0])

    def _response(self) -> list[int]:
        return self._tokens[self._prompt_length : self._length].tolist()

    def _token_score(self) -> float:
        """The reward of the token just written, where the score gives one for every token; else 0. NaN if it failed."""
        if self.task.token_scores is False:  # said here too: it is quicker than to read the response
            return 0.0
        scores = self.task.evaluate_parts([self._row], [self._response()])
        return 0.0 if scores is None else float("nan") if scores.faults else float(scores.last[0])

    def action_masks(self) -> NDArray[np.bool_]:
        """(V,) bool: the tokens that the task advises now (all, for a task without masks)."""
        if not self._masked or self._ended is not False:
            return np.ones(self.task.vocab_size, dtype=np.bool_)
        responses = self._blank[None, : self.task.max_new_tokens].copy()  # (1, T)
        responses[0, : self._length - self._prompt_length] = self._tokens[self._prompt_length : self._length]
        return self.task.masks([self._row], responses)[0]

    def _mask_info(self) -> Info:
        return {"action_mask": self.action_masks().astype(np.int8)}

    def snapshot(self) -> Snapshot:
        """The episode as it stands, to come back to: tree search, best of n from a prefix, advantages by rollout.

        Raises:
            gym.error.ResetNeeded: before the first reset.
        """
        if self._ended is None:
            raise gym.error.ResetNeeded("snapshot was called before the first reset: call reset() first")
        return Snapshot(
            task=type(self.task).__qualname__,
            row=dict(self._row),
            tokens=self._tokens.copy(),
            prompt_length=self._prompt_length,
            length=self._length,
            ended=self._ended,
            rewards=tuple(self._trace.rewards),
            kls=tuple(self._trace.kls),
            values=tuple(self._trace.values),
        )

    def restore(self, snapshot: Snapshot) -> NDArray[np.int64]:
        """Goes back (or sideways) to a snapshot of this task; returns the observation there, (L,) int64."""
        check("snapshot", snapshot, isinstance(snapshot, Snapshot), "what `snapshot` gave")
        if snapshot.task != (own := type(self.task).__qualname__):
            raise ValueError(f"snapshot is of an episode of {snapshot.task}, this environment's task is {own}")
        if snapshot.tokens.shape != self._blank.shape:
            raise ValueError(
                f"snapshot has an observation of shape {snapshot.tokens.shape}, this environment {self._blank.shape}"
            )
        written = snapshot.tokens[: snapshot.length]
        if written.max() >= self.task.vocab_size or (snapshot.tokens[len(written) :] != self.task.vocab_size).any():
            raise ValueError(f"snapshot is of a task with another vocabulary than these {self.task.vocab_size} tokens")
        self._row, self._tokens = dict(snapshot.row), snapshot.tokens.copy()
        self._prompt_length, self._length = snapshot.prompt_length, snapshot.length
        self._ended = snapshot.ended
        self._trace = Trace(list(snapshot.rewards), list(snapshot.kls), list(snapshot.values))
        return self._tokens.copy()

    def picture(self) -> Picture:
        """The episode as it stands, for the renderers."""
        return Picture.of(self.task, self._row.get("prompt", ""), self._response(), self._trace)

    def render(self) -> Any:
        """The prompt and the response so far: a string ("ansi") or an image (H, W, 3) uint8 ("rgb_array").

        "human" shows each step in the terminal by itself; None then, and without a render mode.
        """
        return draw(self.picture(), self.render_mode)
