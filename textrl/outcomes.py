"""What the episodes that end in one step of a vector environment bring: their scores and the columns of `info`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .rows import Row
from .task import FAULT, Task

REMEMBERED = 2**16
"""A task with at most so many pairs of row and response has its outcomes remembered."""

Episodes = Callable[[NDArray[np.intp]], tuple[list[Row], list[list[int]]]]
"""Indices of environments -> their rows and responses."""


class Outcomes:
    """The ends of the episodes of N environments.

    A small task whose score is `deterministic` is asked once for each row and response; after that an end is a lookup.
    The code of an episode is `first + index of its row`, and with every token `code * V + token`: `first` is so large
    that no two episodes, of whatever lengths, have one code.

    Args:
        task: what is played.
        num_envs: N.
        num_rows: how many rows the task draws evenly from; None for a task with a `sample` of its own.
    """

    not_saved: ClassVar = ("_where", "_last", "_columns")  # what the task said, and says again when it is asked

    def __init__(self, task: Task, num_envs: int, num_rows: int | None) -> None:
        self._task, self._num_envs = task, num_envs
        self._codes: NDArray[np.int64] | None = None
        if num_rows is None or not task.deterministic_score:
            return
        self._base = np.array(task.vocab_size)  # an array, because numpy is slow with Python's numbers
        first = -(-num_rows // max(1, task.vocab_size - 1))
        size = (first + num_rows) * task.vocab_size**task.max_new_tokens
        if size <= REMEMBERED:
            self._codes = np.zeros(num_envs, dtype=np.int64)
            self._first = np.array(first)
            self._where = np.full(size, size)  # code -> its place in the columns: itself, or outside while not known
            self._where[0] = 0  # no episode's code: nothing ended
            self._last = np.zeros(size)
            self._columns: list[tuple[str, str, NDArray[Any]]] = []  # key, _key, values

    def start(self, indices: NDArray[np.intp], which: NDArray[np.int64] | None) -> None:
        """New episodes begin in these environments; `which` row each plays, None for rows from outside the task."""
        if self._codes is not None:
            if which is None:
                self._codes = None
            else:
                self._codes[indices] = which + self._first

    def append(self, actions: NDArray[np.int64]) -> None:
        """Every environment has written a token."""
        if self._codes is not None:
            self._codes *= self._base
            self._codes += actions

    def of(self, ended: NDArray[np.bool_], episodes: Episodes) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """What the environments that `ended` (N,) bring.

        Returns:
            (N,) what the last token is paid, and the columns of info, (N,), each with its mask under `_key`; 0 or None
            where nothing ended.
        """
        infos: dict[str, Any] = {}
        if self._codes is None:
            last, columns = self._ask(ended.nonzero()[0], episodes)
            for key, values in columns.items():
                infos[key], infos[f"_{key}"] = values, ended.copy()
            return last, infos
        codes = self._codes * ended
        failed: NDArray[np.int64] | None = None
        try:
            where = self._where.take(codes)
            last = self._last.take(where)
        except IndexError:
            failed, faults = self._learn(codes, episodes)
            where = codes
            last = self._last.take(where)
            if len(failed):
                infos[FAULT] = np.array([faults.get(code) for code in codes.tolist()], dtype=object)
                infos[f"_{FAULT}"] = ended.copy()
        for key, mask, values in self._columns:
            infos[key], infos[mask] = values.take(where), ended.copy()
        if failed is not None:
            self._where[failed] = len(self._where)  # asked about again the next time
        return last, infos

    def _ask(self, over: NDArray[np.intp], episodes: Episodes) -> tuple[NDArray[np.float64], dict[str, NDArray[Any]]]:
        """The same from the task itself, for the environments `over`."""
        scores, columns = self._task.finish(*episodes(over))
        last = np.zeros(self._num_envs)
        last[over] = scores.last
        spread = {}
        for key, values in columns.items():
            text = isinstance(values, list)
            spread[key] = np.empty(self._num_envs, dtype=object) if text else np.zeros(self._num_envs)
            spread[key][over] = np.array(values, dtype=object) if text else values
        return last, spread

    def _learn(self, codes: NDArray[np.int64], episodes: Episodes) -> tuple[NDArray[np.int64], dict[int, str]]:
        """Asks the task for the outcomes among `codes` (N,) that are not known yet; those that failed, and how."""
        unknown = (self._where[codes] == len(self._where)).nonzero()[0]
        new, first = np.unique(codes[unknown], return_index=True)
        over = unknown[first]
        last, columns = self._ask(over, episodes)
        faults = columns.pop(FAULT, None)  # not there every time
        self._last[new] = last[over]
        if not self._columns:
            size = len(self._where)
            self._columns = [
                (key, f"_{key}", np.full(size, None if values.dtype == object else 0.0, values.dtype))
                for key, values in columns.items()
            ]
        if {key for key, _, _ in self._columns} != set(columns):
            here = sorted(columns.keys() ^ {key for key, _, _ in self._columns})
            raise ValueError(f"describe must give the same columns of every response; {here} come and go")
        for key, _, known in self._columns:
            known[new] = columns[key][over]
        self._where[new] = new
        said = {} if faults is None else dict(zip(new.tolist(), faults[over].tolist(), strict=True))
        failed = {code: fault for code, fault in said.items() if fault is not None}
        return np.array(list(failed), dtype=np.int64), failed
