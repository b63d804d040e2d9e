"""Checks of the values in a row, which name the column; the caller knows the row."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .config import check, is_number
from .scores import shorten

MAX_CHARACTERS = 1_000_000
"""A longer text in a file is taken for a mistake."""


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """A row's value.

    Raises:
        ValueError: where there is none.
    """
    if column not in row:
        hint = did_you_mean(column, row)
        raise ValueError(f"column {column!r} is missing; got the columns {shorten(list(row))}{hint}")
    return row[column]


def did_you_mean(column: str, names: Iterable[Any]) -> str:
    """Which of these names may be meant, for a message."""
    near = difflib.get_close_matches(column, map(str, names), 1)
    return f"; did you mean {near[0]!r} to be {column!r}?" if near else ""


def text_of(row: Mapping[str, Any], column: str, empty: bool = True) -> str:
    """A row's text, checked: no half of a surrogate pair, no NUL, not endless.

    Args:
        row: the row.
        column: which column.
        empty: whether it may be empty or blank.

    Raises:
        ValueError: naming the column and what would be right.
    """
    value = value_of(row, column)
    if not isinstance(value, str):
        chat = isinstance(value, list) and any(isinstance(each, Mapping) and "role" in each for each in value)
        more = " (a tokenizer's chat template makes one of messages)" if chat else ""
        raise ValueError(f"column {column!r} must be a text{more}; got {shorten(value)}")
    check_text(f"column {column!r}", value)
    if not empty and not value.strip():
        raise ValueError(f"column {column!r} must be a text that is not empty; got {shorten(value)}")
    return value


def check_text(name: str, value: str) -> None:
    """Refuses what no tokenizer takes.

    Raises:
        ValueError: for a lone surrogate, a NUL, or more than `MAX_CHARACTERS`.
    """
    if len(value) > MAX_CHARACTERS:
        raise ValueError(f"{name} must be a text of at most {MAX_CHARACTERS:,} characters; got {len(value):,}")
    if value.isascii():
        place = value.find("\0")
    else:
        found = re.search("[\0\ud800-\udfff]", value)
        place = found.start() if found else -1
    if place >= 0:
        what = "NUL" if value[place] == "\0" else f"half of a surrogate pair, \\u{ord(value[place]):04x},"
        raise ValueError(f"{name} must be text; got {what} at character {place + 1}: {shorten(value[:60])}")


def number_of(row: Mapping[str, Any], column: str) -> float:
    """A row's number.

    Raises:
        ValueError: for anything else, NaN and infinity too.
    """
    value = row[column]
    try:
        fine = is_number(value) and math.isfinite(value)
    except OverflowError:
        fine = False
    if not fine:
        raise ValueError(f"column {column!r} must be a finite number; got {shorten(value)}")
    return float(value)


def check_kinds(row: Mapping[str, Any], kinds: dict[Any, str]) -> None:
    """Refuses a value that does not go into a column with those of the rows before.

    Args:
        row: the row.
        kinds: by the place of a value in a row, what stood there in the rows before.

    Raises:
        ValueError: naming the column.
    """
    found: dict[Any, str] = {}
    rest: list[tuple[Any, Any]] = [((name,), value) for name, value in row.items()]
    for place, value in rest:  # it grows by what is inside
        if value is None:
            continue
        column, kind = f"column {place[0]!r}", f"a {type(value).__name__}"
        if is_number(value):
            kind = "a number"
            fits = not isinstance(value, numbers.Integral) or -(2**63) <= int(value) < 2**64
            check(column, value, fits, "a whole number of at most 64 bits")
        elif isinstance(value, str):
            kind = "a text"
            check_text(column, value)
        elif isinstance(value, Mapping):
            kind = "an object"
            rest += [((*place, key), each) for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            kind = "a list"
            rest += [((*place, None), each) for each in value]
        above = kinds.get(place) or found.setdefault(place, kind)
        check(column, value, kind == above, f"{above}, as above")
    kinds.update(found)
