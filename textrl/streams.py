"""Where an environment's prompts come from: an endless stream of a task's rows for each seed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .rows import Row
from .task import Task

BLOCK = 64
"""Rows are drawn this many at a time: much quicker than one by one."""
WITH_END = BLOCK + 1
OUTSIDE = np.iinfo(np.int64).max
_TABLE_ENTRIES = 4_000_000


class RowStream:
    """The rows that one environment plays.

    Args:
        task: whose rows.
        seed: fixes the stream; kept apart from the one that `action_space.seed(seed)` gives.
    """

    not_saved: ClassVar = ("_rows",)  # the task's

    def __init__(self, task: Task, seed: int) -> None:
        self._task = task
        self._rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0x7E87,))))
        self._rows = even_rows(task)
        self._block: list[int] = []

    def block(self) -> NDArray[np.int64]:
        """(BLOCK,) indices of rows, to be used from the last to the first."""
        assert self._rows is not None
        return self._rng.integers(len(self._rows), size=BLOCK)

    def __next__(self) -> Row:
        """The next row."""
        if self._rows is None:
            return self._task.sample(self._rng)
        if not self._block:
            self._block = self.block().tolist()
        return self._rows[self._block.pop()]


class RowStreams:
    """The streams of N environments, drawn from in one go.

    Args:
        task: whose rows.
        seeds: N.
        width: L, of an observation.
    """

    not_saved: ClassVar = ("_table",)  # the task's rows, laid out

    def __init__(self, task: Task, seeds: Iterable[int], width: int) -> None:
        self._task, self._width = task, width
        self._streams = [RowStream(task, seed) for seed in seeds]
        self._blocks = np.full(len(self._streams) * WITH_END, OUTSIDE)  # each stream's next rows, and one outside
        self._next = np.arange(1, len(self._streams) + 1) * WITH_END - 1  # where each stream stands in them: at its end
        self._one = np.array(1)  # quicker than a number of Python's
        self._table: tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]] | None = None
        rows = even_rows(task)
        if rows is not None and len(rows) * width <= _TABLE_ENTRIES:
            self._table = self.lay_out(rows)

    @property
    def num_rows(self) -> int | None:
        """How many rows are drawn from evenly, where `draw` says which; else None."""
        return None if self._table is None else len(self._table[0])

    def seed(self, index: int, seed: int) -> None:
        """Starts one stream anew."""
        self._streams[index] = RowStream(self._task, seed)
        self._next[index] = (index + 1) * WITH_END - 1

    def draw(
        self, indices: NDArray[np.intp]
    ) -> tuple[NDArray[np.int64] | None, NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """The next row of each of these n streams.

        Returns:
            their indices among the task's rows (n,) (None for a task that samples), the rows (n,), their
            observations (n, L) and the lengths of their prompts (n,).
        """
        if self._table is None:
            return None, *self.lay_out([next(self._streams[i]) for i in indices.tolist()])
        rows, tokens, lengths = self._table
        places = self._next[indices]
        which = self._blocks.take(places)
        try:
            observations = tokens.take(which, 0)
        except IndexError:  # cheaper than to look each time whether a block is used up
            for i in indices[which == OUTSIDE].tolist():
                self._next[i] = i * WITH_END
                self._blocks[i * WITH_END : i * WITH_END + BLOCK] = self._streams[i].block()[::-1]
            places = self._next[indices]
            which = self._blocks.take(places)
            observations = tokens.take(which, 0)
        self._next[indices] = places + self._one
        return which, rows.take(which), observations, lengths.take(which)

    def lay_out(self, rows: list[Row]) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """Rows as an array (n,), their first observations (n, L), and the lengths of their prompts (n,)."""
        tokens = np.full((len(rows), self._width), self._task.vocab_size, dtype=np.int64)
        lengths = np.zeros(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            ids = self._task.encode(row)
            tokens[i, : len(ids)] = ids
            lengths[i] = len(ids)
        return np.array(rows, dtype=object), tokens, lengths


def even_rows(task: Task) -> list[Row] | None:
    """The rows of a task that draws evenly from `prompts()`, or None for one that has its own `sample`."""
    return task.rows if type(task).sample is Task.sample else None
