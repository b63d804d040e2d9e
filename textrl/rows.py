"""A row: one prompt, and the columns that a score wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .scores import shorten

Row = dict[str, Any]
"""Of a task: one prompt, and the columns that the score wants: `{"prompt": "2+2=", "answer": "4"}`. Of a file: any."""
OF_A_CALL = frozenset({"self", "prompts", "completions", "completion_ids"})
"""Names of a score's own arguments, which no column of a row can have."""


def check_row(row: Any) -> Row:
    """Returns `row` if it is a dict with a string under "prompt", whose columns a score can be called with.

    Raises:
        ValueError: otherwise, saying what it is.
    """
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f'a row must be a dict with a string under "prompt"; got {shorten(row)}')
    for name in row:
        if not isinstance(name, str):
            raise ValueError(f"a row must have texts as the names of its columns; got {name!r}")
        if name in OF_A_CALL:
            raise ValueError(f"a row must have no column {name!r}, which is what a score is given; got {shorten(row)}")
    return row


def columns_of(rows: Sequence[Row]) -> dict[str, None]:
    """The columns that any of the rows has, in order."""
    return dict.fromkeys(key for row in rows for key in row)


def filled(rows: list[Row]) -> list[Row]:
    """The same rows with None for what others have and they have not: a score gets every column of every row."""
    empty = columns_of(rows)
    return rows if all(len(row) == len(empty) for row in rows) else [{**empty, **row} for row in rows]
