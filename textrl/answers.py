"""What the functions of a task answered, checked; what `score` answers is checked in scores.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import Row
from .scores import shorten

OF_A_STEP = ("ref_logprob", "kl", "action_mask", "score_fault", "final_obs", "final_info", "episode")
"""Names in the `info` of a step that `describe` cannot give to columns of its own."""


def check_masks(found: Any, rows: Sequence[Row], vocab_size: int) -> NDArray[np.bool_]:
    """What `allowed_tokens` gave for B rows, as (B, V).

    Raises:
        ValueError: for another shape or dtype, or a row without one allowed token.
    """
    shape = (len(rows), vocab_size)
    mask = np.asarray(found)
    if mask.shape != shape or mask.dtype != np.bool_:
        raise ValueError(f"allowed_tokens must give a bool array of shape {shape}; got {mask.dtype}, {mask.shape}")
    if not mask.any(1).all():
        row = shorten(rows[int(np.flatnonzero(~mask.any(1))[0])])
        raise ValueError(f"allowed_tokens must allow at least one token; none is allowed for the row {row}")
    return mask


def check_column(key: Any, values: Any, size: int, others: Mapping[str, Any]) -> Any:
    """A column of `describe`, checked: a list of B texts, or (B,) float64.

    Raises:
        ValueError: for a name that is taken, or what are not B numbers or B texts.
    """
    free = isinstance(key, str) and key not in others and key not in OF_A_STEP and not key.startswith("_")
    try:
        column = list(values)
        found = column if all(isinstance(v, str) for v in column) else np.array(column, dtype=np.float64)
        fine = np.shape(found) == (size,) and not isinstance(values, str)
    except (TypeError, ValueError):
        fine = False
    if not free or not fine:
        taken = [*others, *OF_A_STEP]
        raise ValueError(
            f"describe must give columns of {size} numbers or {size} texts, with names of their own, not {taken};"
            f" got {key!r}: {shorten(values)}"
        )
    return found
