"""What environments are given by their callers, checked where it enters."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from .config import check, is_count, is_number
from .render import RENDER_MODES
from .rows import Row
from .scores import shorten
from .task import Task

MOST = 1_000_000_000
"""Of anything that is counted; a larger number is taken for a mistake."""


def check_penalty(reference: Any, kl_coef: float, temperature: float) -> None:
    """Refuses a KL penalty without a reference, a negative or non-finite coefficient, a temperature of 0.

    Raises:
        ValueError: saying which argument, its value and what would be right.
    """
    if not (is_number(kl_coef) and np.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef must be a number of at least 0; got {kl_coef!r}")
    if kl_coef > 0 and reference is None:
        raise ValueError(f"kl_coef={kl_coef} needs a reference to be close to: pass reference=model, or kl_coef=0")
    if not (is_number(temperature) and np.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a number above 0; got {temperature!r}")


def check_render_mode(render_mode: str | None) -> None:
    """Refuses a render mode there is not.

    Raises:
        ValueError: naming those there are.
    """
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode must be one of {RENDER_MODES} or None; got {render_mode!r}")


def check_count(name: str, count: Any) -> int:
    """A count as an int.

    Raises:
        ValueError: for anything but a whole number of at least 1, or one that no memory holds.
    """
    check(name, count, is_count(count), "a whole number of at least 1")
    check(name, count, count <= MOST, f"a whole number from 1 to {MOST:,}")
    return int(count)


def chosen_row(options: dict[str, Any] | None, task: Task) -> Row | None:
    """The row that `reset(options=...)` asks for, or None; what it lacks is as `Task.row_of` says.

    Raises:
        ValueError: for options that are no dict.
    """
    if options is None:
        return None
    check("options", options, isinstance(options, dict), "a dict or None")
    row = options.get("row", {"prompt": options["prompt"]} if "prompt" in options else None)
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):  # what is wrong with others is said later
        return {**task.row_of(row["prompt"]), **row}
    return row


def check_action(action: Any, vocab_size: int) -> int:
    """The action as an int.

    Raises:
        ValueError: for a float, a shape other than (), or an id outside the vocabulary.
    """
    try:
        token = operator.index(action)
        single = not isinstance(action, (bool, list)) and not getattr(action, "shape", ())
        if single and 0 <= token < vocab_size:
            return token
    except TypeError:
        pass
    raise ValueError(f"action must be one integer token id from 0 to {vocab_size - 1}; got {shorten(action)}")


def as_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """The enum for a mode given as itself, its name or its value."""
    for known in AutoresetMode:
        if mode in (known, known.name, known.value):
            return known
    raise ValueError(f"autoreset_mode must be one of {[m.name for m in AutoresetMode]}; got {mode!r}")


def reset_mask(options: dict[str, Any] | None, num_envs: int) -> NDArray[np.bool_]:
    """The rows to reset: `options["reset_mask"]`, or all.

    Raises:
        TypeError, ValueError: as `SyncVectorEnv` does, for anything but an (N,) bool array with a True.
    """
    check("options", options, options is None or isinstance(options, dict), "a dict or None")
    if options is None or "reset_mask" not in options:
        return np.ones(num_envs, dtype=np.bool_)
    mask = options["reset_mask"]
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError(f"options['reset_mask'] must be a numpy array of bool; got {shorten(mask)}")
    if mask.shape != (num_envs,) or not mask.any():
        raise ValueError(
            f"options['reset_mask'] must have shape ({num_envs},) and at least one True; got {shorten(mask)}"
        )
    return mask.copy()


def row_seeds(seed: Any, num_envs: int) -> list[int | None]:
    """The seed of each row: None, an int (row i gets seed + i) or a list of N ints and Nones.

    Raises:
        ValueError: for another number of seeds, or one that is no whole number of at least 0.
    """
    if isinstance(seed, (int, np.integer)):
        seeds: list[Any] = [int(seed) + i for i in range(num_envs)]
    else:
        seeds = [None] * num_envs if seed is None else list(seed) if np.iterable(seed) else [seed]
    if len(seeds) != num_envs or not all(s is None or (isinstance(s, (int, np.integer)) and s >= 0) for s in seeds):
        raise ValueError(
            f"seed must be None, a whole number from 0, or a list of num_envs={num_envs} such; got {shorten(seed)}"
        )
    return seeds


def check_actions(actions: Any, num_envs: int, vocab_size: int, ignored: NDArray[np.intp]) -> NDArray[np.int64]:
    """The actions as (N,) int64; of the rows `ignored` any whole number is taken, for 0.

    Raises:
        ValueError: for floats, another shape, or ids outside the vocabulary.
    """
    try:
        array = np.asarray(actions)
    except ValueError:
        said = f"actions must be {num_envs} integer token ids; got lists of different lengths, {shorten(actions)}"
        raise ValueError(said) from None
    if len(ignored) and array.shape == (num_envs,):
        array = array.copy()
        array[ignored] = 0
    if array.shape != (num_envs,) or array.dtype.kind not in "iu":
        raise ValueError(f"actions must be {num_envs} integer token ids; got shape {array.shape}, dtype {array.dtype}")
    ids = array if array.dtype == np.int64 else array.astype(np.int64)
    outside = (ids.view(np.uint64) >= _unsigned(vocab_size)).nonzero()[0]  # a negative id becomes a huge one
    if outside.size:
        bad = int(outside[0])
        raise ValueError(f"actions must be token ids from 0 to {vocab_size - 1}; got {array[bad]} in row {bad}")
    return ids


def check_observations(observations: Any, task: Task) -> NDArray[np.int64]:
    """Observations of a task as (N, L) int64, from (N, L) or (L,).

    Raises:
        ValueError: for another shape, what is no token id, or a row in which nothing is written, or something after a
            gap, or after the end token of a response.
    """
    width, vocab_size = task.max_prompt_tokens + task.max_new_tokens, task.vocab_size
    array = np.asarray(observations)
    fits = array.ndim in (1, 2) and array.shape[-1] == width and array.dtype.kind in "iu" and len(array) > 0
    if not fits:
        raise ValueError(
            f"observation must be integer token ids of shape ({width},) or (N, {width}), N from 1;"
            f" got shape {array.shape}, dtype {array.dtype}"
        )
    ids = np.atleast_2d(array).astype(np.int64)
    written = ids != vocab_size
    gaps = not written[:, 0].all() or (written[:, 1:] > written[:, :-1]).any()
    if ids.min() < 0 or ids.max() > vocab_size or gaps:
        raise ValueError(
            f"observation must be token ids from 0 to {vocab_size - 1}, from the left, and {vocab_size} where nothing"
            f" is written; got {shorten(array.tolist())}"
        )
    after = task.max_prompt_tokens  # before it, an end token may be the prompt's
    on = written[:, after + 1 :] & (ids[:, after:-1] == task.eos_token_id)
    if on.any():
        check("observation", array.tolist(), False, "texts in which nothing is written after the end token")
    return ids


@functools.cache
def _unsigned(number: int) -> NDArray[np.uint64]:
    """The number as an array without axes: NumPy compares that twice as fast as a number of Python's."""
    return np.array(number, dtype=np.uint64)
