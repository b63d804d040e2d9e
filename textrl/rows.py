"""Where an environment's prompts come from: an endless stream of a task's rows for each seed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .task import Row, Task

BLOCK = 64
"""Rows are drawn this many at a time: much quicker than one by one."""
_TABLE_ENTRIES = 4_000_000


class RowStream:
    """The rows that one environment plays.

    Args:
        task: whose rows.
        seed: fixes the stream; kept apart from the one that `action_space.seed(seed)` gives.
    """

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

    def __init__(self, task: Task, seeds: Iterable[int], width: int) -> None:
        self._task, self._width = task, width
        self._streams = [RowStream(task, seed) for seed in seeds]
        self._blocks = np.zeros((len(self._streams), BLOCK), dtype=np.int64)
        self._left = np.zeros(len(self._streams), dtype=np.int64)
        self._rows = even_rows(task)
        self._table: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        if self._rows is not None and len(self._rows) * width <= _TABLE_ENTRIES:
            self._table = self.lay_out(self._rows)

    def seed(self, index: int, seed: int) -> None:
        """Starts one stream anew."""
        self._streams[index] = RowStream(self._task, seed)
        self._left[index] = 0

    def draw(self, indices: NDArray[np.intp]) -> tuple[list[Row], NDArray[np.int64], NDArray[np.int64]]:
        """The next row of each of these n streams: the rows, their observations (n, L) and prompt lengths (n,)."""
        if self._rows is None or self._table is None:
            rows = [next(self._streams[i]) for i in indices.tolist()]
            return rows, *self.lay_out(rows)
        left = self._left[indices]
        for i in indices[left == 0].tolist():
            self._blocks[i] = self._streams[i].block()
        left = (left - 1) % BLOCK
        self._left[indices] = left
        which = self._blocks[indices, left]
        tokens, lengths = self._table
        return [self._rows[i] for i in which.tolist()], tokens.take(which, 0), lengths.take(which)

    def lay_out(self, rows: list[Row]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first observations of rows, (n, L), and the lengths of their prompts, (n,)."""
        tokens = np.full((len(rows), self._width), self._task.vocab_size, dtype=np.int64)
        lengths = np.zeros(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            ids = self._task.encode(row)
            tokens[i, : len(ids)] = ids
            lengths[i] = len(ids)
        return tokens, lengths


def even_rows(task: Task) -> list[Row] | None:
    """The rows of a task that draws evenly from `prompts()`, or None for one that has its own `sample`."""
    from .task import Task

    return task.rows if type(task).sample is Task.sample else None
