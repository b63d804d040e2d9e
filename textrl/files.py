"""Rows from files, read whole or not at all; every fault is named by file, line and column."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from .cells import text_of
from .formats import FILE_OF_ROWS, READERS, Broken
from .rows import Row
from .scores import shorten

T = TypeVar("T")

LISTED = 20
"""So many of the rows that were left out are listed; the rest is counted."""


class InputError(ValueError):
    """Data that is not as it should be; the message names file, line and column, and says what would be right."""


class SkippedRows(UserWarning):
    """Rows were left out, or look like a mistake: how many, and which."""


class Rows(Sequence[Row]):
    """Rows that remember where they stand, so that whoever finds a fault in one can say where.

    Args:
        rows: the rows.
        places: of each, "pairs.jsonl, line 3"; default: "row 0" and so on.
        source: the file, or what they are called.
        skip: leave rows with a fault out, and count and list them in a `SkippedRows` warning, in place of an error.
        strict: from a file, where what is odd (an empty text) is a mistake.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        places: Sequence[str] | None = None,
        source: str = "data",
        skip: bool = False,
        strict: bool = False,
    ) -> None:
        self.rows = [dict(row) for row in rows]
        self.places = [f"row {i}" for i in range(len(self.rows))] if places is None else list(places)
        self.source, self.skip, self.strict = source, skip, strict

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self.rows[index]

    @property
    def columns(self) -> list[str]:
        """Every column that some row has, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def each(self, read: Callable[[Row], T], faults: Collection[str] = ()) -> list[T]:
        """What `read` makes of every row; rows in which it finds a fault are left out from here on, or raised.

        Args:
            read: raises a `ValueError` that begins with what is wrong ("column 'x' must be ...").
            faults: of rows that were left out before, to be reported with these.

        Raises:
            InputError: with the row's place; or for data in which no row is left.
        """
        found, kept, wrong, total = [], [], list(faults), len(self.rows) + len(faults)
        for i, row in enumerate(self.rows):
            try:
                found.append(read(row))
                kept.append(i)
            except ValueError as error:
                message = f"{self.places[i]}, {error}"
                if not self.skip:
                    raise InputError(message) from None
                wrong.append(message)
        if wrong:
            if not kept:
                raise InputError(f"{self.source} has no good row left: {wrong[0]}")
            self.rows, self.places = [self.rows[i] for i in kept], [self.places[i] for i in kept]
            warn(f"{self.source}: skipped {len(wrong)} of {total} rows", wrong)
        return found

    def repeated(self) -> list[str]:
        """Which rows repeat an earlier row in every column: "line 7 repeats line 3"."""
        seen: dict[str, str] = {}
        out = []
        for row, place in zip(self.rows, self.places, strict=True):
            key = json.dumps(row, sort_keys=True, default=repr)
            first = seen.setdefault(key, place)
            if first != place:
                out.append(f"{place} repeats {first.rpartition(', ')[2]}")
        return out


def warn(message: str, places: Sequence[str]) -> None:
    """A `SkippedRows` warning that lists places."""
    listed = "; ".join(places[:LISTED]) + (f"; and {len(places) - LISTED} more" if len(places) > LISTED else "")
    warnings.warn(f"{message}: {listed}", SkippedRows, stacklevel=3)


# ---- files ---------------------------------------------------------------------------------------------------


def is_file_name(data: Any) -> bool:
    """Whether this names a file of rows: it ends as one."""
    return isinstance(data, (str, Path)) and Path(data).suffix.lower() in READERS


def found_at(name: str | Path) -> str:
    """A name that should be that of a file of rows, and what there is of that name."""
    what = "a folder" if os.path.isdir(name) else "and no such file"
    if os.path.isfile(name):
        what = "a file of another kind"
    return f"{shorten(str(name), 300)}, {what}"


def read_rows(
    file: str | Path,
    texts: Sequence[str] = (),
    *,
    numbers: Sequence[str] = (),
    skip_bad_rows: bool = False,
    called: str = "file",
) -> Rows:
    """All rows of a JSON (lines), CSV or Parquet file, in UTF-8.

    Args:
        file: its name says by its end what it is; `.json` holds a list of objects, or one object a line.
        texts: columns that every row must have, texts that are not empty.
        numbers: columns whose cells in a CSV file, where all else is text, are JSON: numbers and lists.
        skip_bad_rows: leaves rows with a fault out and says in a `SkippedRows` warning how many and which; a fault
            of the file as a whole is an error all the same.
        called: the argument that the file is, for messages.

    Raises:
        InputError: naming file, line and column, and what would be right. Parquet has rows in place of lines,
            counted from 0.
    """
    path = Path(file)
    reader = READERS.get(path.suffix.lower())
    shown = shorten(str(path), 300)
    if reader is None:
        raise InputError(f"{called} must be {FILE_OF_ROWS}; got {found_at(path)}")
    name = str(path) if str(path).isprintable() else ascii(str(path))
    rows, places, faults = [], [], []
    try:
        if not path.is_file():
            what = ", a folder" if path.is_dir() else ""
            raise InputError(f"{called} must be a file that exists; got {shown}{what}")
        for place, row in reader(path, numbers):
            if not isinstance(row, ValueError):
                rows.append(row)
                places.append(f"{name}, {place}")
            elif skip_bad_rows:
                faults.append(f"{name}, {place}: {row}")
            else:
                raise InputError(f"{name}, {place}: {row}")
    except Broken as error:
        raise InputError(f"{name}{error}") from None
    except OSError as error:
        raise InputError(f"{called} {shown} cannot be read: {error.strerror or error}") from None
    if not rows:
        raise InputError(f"{name} must have at least one row; got none" + (f": {faults[0]}" if faults else ""))
    table = Rows(rows, places, name, skip_bad_rows, strict=True)
    table.each(lambda row: [text_of(row, column, empty=False) for column in texts], faults)
    return table


def prompt_rows(prompts: Any, skip_bad_rows: bool) -> Rows:
    """Prompts in any form as rows.

    Raises:
        ValueError: for what is neither texts nor rows, saying what would be right.
    """
    if is_file_name(prompts):
        rows = read_rows(prompts, ["prompt"], skip_bad_rows=skip_bad_rows, called="prompts")
        if repeated := rows.repeated():
            warn(
                f"{rows.source}: {len(repeated)} of {len(rows)} rows repeat another (it is drawn more often)", repeated
            )
        return rows
    if isinstance(prompts, (str, Path)):
        raise ValueError(f"prompts must be a list of texts, a dataset or {FILE_OF_ROWS}; got {found_at(prompts)}")
    ordered = hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")
    table = hasattr(prompts, "columns")  # of pandas, which gives its columns' names one by one
    if isinstance(prompts, (bytes, Mapping)) or not ordered or table:
        right = "a list of texts, a dataset or a file of them"
        raise ValueError(f"prompts must be {right}; got {shorten(prompts)}{_way_out(prompts)}")
    names = getattr(prompts, "column_names", None)
    if names is not None and "prompt" not in names:
        raise ValueError(f'prompts must have a column "prompt"; got the columns {names}')
    for i, row in enumerate(prompts):
        if not isinstance(row, (str, dict)):
            raise ValueError(f'prompts must be texts or dicts with a "prompt"; got {shorten(row)} at place {i}')
    if len(prompts) == 0:
        raise ValueError("prompts is empty: a task needs at least one prompt")
    found = [{"prompt": row} if isinstance(row, str) else row for row in prompts]
    return Rows(found, [f"prompts, row {i}" for i in range(len(found))], "prompts", skip_bad_rows)


def dataset_rows(data: Any, read: Callable[[str | Path], Rows], called: str = "dataset") -> Rows:
    """What somebody gave to learn from, as rows: a file, a `datasets.Dataset` or a list of dicts.

    Args:
        data: any of these.
        read: reads a file.
        called: the argument that it is, for messages.

    Raises:
        ValueError: for anything else, or no rows at all.
    """
    if isinstance(data, Rows):
        return data
    return read(data) if isinstance(data, (str, Path)) else listed_rows(data, called)


def listed_rows(data: Any, called: str, skip: bool = False) -> Rows:
    """A `datasets.Dataset` or a list of dicts as rows.

    Raises:
        InputError: for anything else, or no rows at all.
    """
    ordered = hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, (bytes, Mapping))
    hint = "" if isinstance(data, Rows) else _way_out(data)
    rows = list(data) if ordered and not hint else []
    if not rows:
        right = "a datasets.Dataset, a list of dicts or a file, with at least one row"
        raise InputError(f"{called} must be {right}; got {shorten(data)}{hint}")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputError(f"{called} row {i} must be a dict with a value for each column; got {shorten(row)}")
    return Rows(rows, [f"{called} row {i}" for i in range(len(rows))], called, skip)


def _way_out(data: Any) -> str:
    """What makes a list of data that is none."""
    if hasattr(data, "columns"):  # of pandas, which gives its columns' names one by one
        return "; its .to_dict('records') is one"
    return "; list(...) makes one of it" if isinstance(data, Iterable) and not hasattr(data, "__len__") else ""


def all_or_none(known: int, total: int, what: str) -> None:
    """Refuses data of which only some rows have a column.

    Raises:
        ValueError: with the numbers.
    """
    if known not in (0, total):
        raise ValueError(f"dataset must have {what} in every row or in none; {known} of {total} have it")
