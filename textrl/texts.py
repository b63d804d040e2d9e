"""The texts of N episodes, in one buffer that grows by a token a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .rows import Row


class Texts:
    """The rows, prompts and responses of N episodes.

    Args:
        num_envs: N.
        width: L, of an observation.
        fill: what stands where nothing is written (V).

    Attributes:
        rows: (N,) the rows of the task that are played; None before the first.
    """

    def __init__(self, num_envs: int, width: int, fill: int) -> None:
        self._fill = fill
        self._buffer = np.full((num_envs, width + 1), fill, dtype=np.int64)  # the last column takes what is thrown away
        self._offsets = np.arange(num_envs) * (width + 1)  # where each row begins in the flat buffer,
        self._starts = self._offsets.copy()  # where its response begins,
        self._places = self._offsets.copy()  # and where the next token goes
        self._one = np.array(1)  # an array without axes: NumPy is half as fast with numbers of Python's
        self.rows: NDArray[Any] = np.full(num_envs, None, dtype=object)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(N, L) the observations, not copied."""
        return self._buffer[:, :-1]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) of the responses, in tokens."""
        return self._places - self._starts

    def start(
        self, indices: NDArray[np.intp], rows: NDArray[Any], tokens: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        """New episodes in these n places: their rows (n,), observations (n, L) and prompt lengths (n,)."""
        self.rows[indices] = rows
        self._buffer[indices, :-1] = tokens
        self._starts[indices] = self._places[indices] = self._offsets[indices] + lengths

    def append(self, actions: NDArray[np.int64]) -> None:
        """A token for every row, (N,); a row that is full must start anew before the next."""
        self._buffer.reshape(-1)[self._places] = actions
        self._places += self._one

    def episodes(self, indices: NDArray[np.intp]) -> tuple[list[Row], list[list[int]]]:
        """The rows and the responses in these places."""
        offsets = self._offsets[indices]
        starts, ends = (self._starts[indices] - offsets).tolist(), (self._places[indices] - offsets).tolist()
        texts = self.tokens[indices].tolist()
        responses = [text[start:end] for text, start, end in zip(texts, starts, ends, strict=True)]
        return self.rows[indices].tolist(), responses

    def responses(self, indices: NDArray[np.intp], horizon: int) -> NDArray[np.int64]:
        """(n, T) the responses in these places, and the fill where nothing is written."""
        places = self._starts[indices, None] + np.arange(horizon)
        return np.where(places < self._places[indices, None], self._buffer.take(places), self._fill)
