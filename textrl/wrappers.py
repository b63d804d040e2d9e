"""Wrappers for token environments: other observations, and a KL penalty for an environment that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorObservationWrapper, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from .arguments import check_penalty
from .env import Info, TextEnv
from .penalty import Penalty, Policy
from .task import Task
from .vector import TextVectorEnv

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNKNOWN = "\ufffd"
AnyEnv = gym.Env[Any, Any] | VectorEnv[Any, Any, Any]


def task_of(env: AnyEnv) -> Task:
    """The task that a textrl environment plays, whatever wraps it.

    Raises:
        ValueError: for another environment.
    """
    task = getattr(env.unwrapped, "task", None)
    if not isinstance(task, Task):
        raise ValueError(f"env must be a textrl environment; got {env}")
    return task


class TextObservation(gym.ObservationWrapper[str, Any, NDArray[np.int64]], RecordConstructorArgs):
    """Observations as text: the prompt and the response so far, in one string.

    Characters that no single token holds (parts of them are spread over several tokens) are shown as U+FFFD, so that
    every observation lies in the `Text` space.

    Args:
        env: a single textrl environment.
    """

    def __init__(self, env: gym.Env[NDArray[np.int64], Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self.task = task_of(env)
        pieces = self.task.decode([[token] for token in range(self.task.vocab_size)])
        self._known = frozenset("".join(pieces)) | {UNKNOWN}
        length = self.task.max_prompt_tokens + self.task.max_new_tokens
        longest = max(1, *map(len, pieces)) * length
        self.observation_space = gym.spaces.Text(longest, min_length=0, charset=self._known)

    def observation(self, observation: NDArray[np.int64]) -> str:
        """Token ids (L,) -> text without special tokens."""
        text = self.task.decode([observation[observation != self.task.vocab_size].tolist()], alone=True)[0]
        return "".join(c if c in self._known else UNKNOWN for c in text)


class NumericInfo(gym.Wrapper[NDArray[np.int64], Any, NDArray[np.int64], Any], RecordConstructorArgs):
    """Leaves the texts out of `info`: Tianshou stores infos in arrays, and takes a text that is missing for a NaN.

    Args:
        env: a single environment.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)

    def step(self, action: Any) -> tuple[NDArray[np.int64], Any, bool, bool, Info]:
        """The step of the environment with the numbers of its info."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        numbers = {key: value for key, value in info.items() if not isinstance(value, str)}
        return observation, reward, terminated, truncated, numbers


def one_hot(observations: NDArray[np.int64], vocab_size: int) -> NDArray[np.float32]:
    """Token ids (..., L) -> (..., L, V): a one for each token, zeros where nothing is written."""
    return (observations[..., None] == np.arange(vocab_size)).astype(np.float32)


class OneHotObservation(gym.ObservationWrapper[NDArray[np.float32], Any, NDArray[np.int64]], RecordConstructorArgs):
    """Observations as (L, V) float32, one-hot; zeros where nothing is written.

    Args:
        env: a single textrl environment.
    """

    def __init__(self, env: gym.Env[NDArray[np.int64], Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self._vocab_size = task_of(env).vocab_size
        shape = (*(env.observation_space.shape or ()), self._vocab_size)
        self.observation_space = gym.spaces.Box(0, 1, shape, np.float32)

    def observation(self, observation: NDArray[np.int64]) -> NDArray[np.float32]:
        """(L,) -> (L, V)."""
        return one_hot(observation, self._vocab_size)


class VectorOneHotObservation(VectorObservationWrapper[Any, Any, Any, Any]):
    """`OneHotObservation` for a vector environment, in any autoreset mode but SAME_STEP: (N, L) -> (N, L, V).

    Args:
        env: a vector textrl environment.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(env)
        self._vocab_size = task_of(env).vocab_size
        shape = (*(env.single_observation_space.shape or ()), self._vocab_size)
        self.single_observation_space = gym.spaces.Box(0, 1, shape, np.float32)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def observations(self, observations: NDArray[np.int64]) -> NDArray[np.float32]:
        """(N, L) -> (N, L, V)."""
        return one_hot(observations, self._vocab_size)


def _check_unpaid(env: AnyEnv, reference: PreTrainedModel) -> None:
    """Refuses an environment that pays a penalty itself, or whose wrapper pays one to another reference."""
    base: Any = env.unwrapped
    layer: Any = env
    if isinstance(base, (TextEnv, TextVectorEnv)) and base.reference is not None and base.kl_coef > 0:
        raise ValueError(f"env must be one without a penalty of its own; got one with kl_coef={base.kl_coef:g}")
    while layer is not base:
        paid = isinstance(layer, (KLPenalty, VectorKLPenalty)) and layer.kl_coef > 0
        if paid and layer.penalty.reference is not reference:
            raise ValueError(f"env must be one without a penalty to another reference; got {layer}")
        layer = layer.env


def _temperature_of(env: AnyEnv, given: float | None) -> float:
    """The environment's, at which tokens are drawn.

    Raises:
        ValueError: for another one.
    """
    own: float = getattr(env.unwrapped, "temperature", 1.0)
    if given is not None and given != own:
        raise ValueError(
            f"temperature must be {own}, the environment's, at which tokens are drawn, or None; got {given!r}"
        )
    return own


def check_taken(
    env: Any, texts: NDArray[np.int64], lengths: NDArray[np.int64], given: NDArray[np.int64], vocab_size: int
) -> None:
    """Refuses an environment some wrapper of which changes actions or repeats them: nobody knows what the others cost.

    One that changes observations looks the same: a text then does not go on with the token that was given alone.

    Args:
        env: for the message.
        texts: (n, L) after a step, ended ones too.
        lengths: (n,) of the same texts before it.
        given: (n,) the tokens.
        vocab_size: V, what stands where nothing is written.

    Raises:
        ValueError: with both.
    """
    grown = (texts != vocab_size).sum(1) == lengths + 1
    same = grown & (np.take_along_axis(texts, lengths[:, None], 1)[:, 0] == given)
    if not same.all():
        first = int(np.flatnonzero(~same)[0])
        took = texts[first, lengths[first] :]
        said = f"{env} took {took[took != vocab_size].tolist()} in place of {int(given[first])}"
        why = "for their log-probabilities to be known"
        raise ValueError(f"env must take the tokens that it is given, {why}, and show them as they are; {said}")


def texts_after(
    texts: NDArray[np.int64], ended: NDArray[np.bool_], infos: dict[str, Any], mode: AutoresetMode
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The texts after a step of a vector environment, (N, L), ended ones as they ended; and which are known, (N,)."""
    if mode != AutoresetMode.SAME_STEP or not ended.any():
        return texts, np.ones(len(texts), dtype=np.bool_)
    last = infos.get("final_obs")
    if last is None or any(np.shape(last[i]) != texts.shape[1:] for i in np.flatnonzero(ended)):
        return texts, ~ended
    texts = texts.copy()
    texts[ended] = np.stack([last[i] for i in np.flatnonzero(ended)])
    return texts, np.ones(len(texts), dtype=np.bool_)


def _as_before(policy: Policy | None, before: NDArray[np.int64], begun: bool) -> Policy | None:
    """The policy as it speaks before a step, inside the masks that hold there; None while no episode runs."""
    if policy is None or not begun:
        return None
    logits = policy(before)
    return lambda _: logits


class KLPenalty(gym.Wrapper[NDArray[np.int64], Any, NDArray[np.int64], Any], RecordConstructorArgs):
    """Adds `-kl_coef * (log pi - log pi_ref)` to every reward, as `TextEnv` itself does when it has a reference.

    pi is `env.unwrapped.policy`; while that is None, `+kl_coef * log pi_ref` is added. A step that only resets
    (Gymnasium's `Autoreset`) pays nothing.

    Args:
        env: a single textrl environment without a reference.
        reference: a causal language model, or the name or folder of one.
        kl_coef: weight of the penalty.
        temperature: divides the logits of both. Default: the environment's, and no other.
    """

    def __init__(
        self,
        env: gym.Env[NDArray[np.int64], Any],
        reference: PreTrainedModel | str,
        kl_coef: float,
        temperature: float | None = None,
    ) -> None:
        settings = {"reference": reference, "kl_coef": kl_coef, "temperature": temperature}
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **settings)
        gym.Wrapper.__init__(self, env)
        check_penalty(reference, kl_coef, 1.0 if temperature is None else temperature)
        self.kl_coef, self.temperature = kl_coef, _temperature_of(env, temperature)
        self.penalty = Penalty(reference, task_of(env))
        _check_unpaid(env, self.penalty.reference)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Info]:
        """Appends a token and pays for it.

        Raises:
            ValueError: where a wrapper below took another action than the one given.
        """
        base: Any = self.env.unwrapped  # its own state: it may have been restored, and show other observations here
        before, live = base.tokens[None], base.running  # (1, L)
        policy = _as_before(base.policy, before, live)
        observation, reward, terminated, truncated, info = self.env.step(action)
        if not live:
            return observation, float(reward), terminated, truncated, info
        lengths = (before != self.penalty.vocab_size).sum(1)
        check_taken(self.env, base.tokens[None], lengths, np.array([action]), self.penalty.vocab_size)
        added, columns = self.penalty(before, [int(action)], self.kl_coef, self.temperature, policy)
        info = {**info, **{key: values[0] for key, values in columns.items()}}
        return observation, float(reward) + float(added[0]), terminated, truncated, info


class VectorKLPenalty(VectorWrapper[Any, Any, Any, Any, Any]):
    """`KLPenalty` for a vector environment, in any autoreset mode.

    In SAME_STEP mode the penalty of an episode's last token is in its reward and its columns in `final_info`.

    Args:
        env: a vector textrl environment without a reference.
        reference: as for `KLPenalty`.
        kl_coef: as for `KLPenalty`.
        temperature: as for `KLPenalty`.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        reference: PreTrainedModel | str,
        kl_coef: float,
        temperature: float | None = None,
    ) -> None:
        super().__init__(env)
        check_penalty(reference, kl_coef, 1.0 if temperature is None else temperature)
        self.kl_coef, self.temperature = kl_coef, _temperature_of(env, temperature)
        self.penalty = Penalty(reference, task_of(env))
        _check_unpaid(env, self.penalty.reference)
        self._mode = env.metadata["autoreset_mode"]

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Appends a token to each row and pays for it, except where the step only resets."""
        base: Any = self.env.unwrapped  # its own state, as above
        before, live = base.tokens, base.running
        policy = _as_before(base.policy, before, bool(live.any()))
        observations, rewards, terminations, truncations, infos = self.env.step(actions)
        ended = np.logical_or(terminations, truncations)
        lengths = (before != self.penalty.vocab_size).sum(1)
        after, known = texts_after(base.tokens, ended, infos, self._mode)
        on = (live & known).nonzero()[0]
        check_taken(self.env, after[on], lengths[on], np.asarray(actions)[on], self.penalty.vocab_size)
        added, columns = self.penalty(before, np.asarray(actions), self.kl_coef, self.temperature, policy, live)
        for into, rows in self._places(infos, live, ended):
            for key, values in columns.items():
                into[key], into[f"_{key}"] = np.where(rows, values, np.float32(0)), rows.copy()
        return observations, rewards + np.where(live, added, 0.0), terminations, truncations, infos

    def _places(self, infos: dict[str, Any], live: Any, ended: Any) -> list[tuple[dict[str, Any], Any]]:
        """The dicts to write to, each with the rows that belong there."""
        if self._mode != AutoresetMode.SAME_STEP or not ended.any():
            return [(infos, live)] if live.any() else []
        return [(infos["final_info"], ended)] + ([(infos, ~ended)] if not ended.all() else [])
