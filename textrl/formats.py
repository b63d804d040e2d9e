"""The formats of files of rows: a generator each, of every row with its place, or of what is wrong with it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .rows import Row
from .scores import reason, shorten

Found = Iterator[tuple[str, Row | ValueError]]
"""A place in the file ("line 3"), and the row there or the fault of it."""

MAX_CELL = 2**30
"""Characters of a CSV cell; csv's own limit, 131,072, is too low for texts, and its message says nothing."""


class Broken(Exception):
    """A fault after which nothing more can be read: ", line 3: ..."."""


# ---- JSON ----------------------------------------------------------------------------------------------------


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start + 1} of the line is not UTF-8 (0x{line[error.start]:02x}); save the file as UTF-8"
        ) from None


def _opening(line: bytes) -> bytes:
    """The first line of a file without a byte order mark."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Broken(", line 1: is UTF-16; save the file as UTF-8")
    return line.removeprefix(b"\xef\xbb\xbf")


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, each with its number; blank ones are left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = _opening(line)
            if line.strip():
                yield f"line {number}", line


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"column {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return row


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; a number must be finite")


def _finite(text: str) -> float:
    if math.isfinite(number := float(text)):
        return number
    raise ValueError(f"{text} is no number that a computer holds; a number must be finite")


SPACE = re.compile(r"[ \t\r\n]*")
DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)


def _object(text: str) -> Row:
    """One JSON object.

    Raises:
        ValueError: for anything else.
    """
    try:
        row = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not whole JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None
    return _as_row(row)


def _reason(error: Exception) -> str:
    return "is JSON too deeply nested" if isinstance(error, RecursionError) else str(error)


def _as_row(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f'must be an object with a value for each column, {{"prompt": "..."}}; got {shorten(row)}')
    return row


def json_lines(path: Path, numbers: Sequence[str] = ()) -> Found:
    """One object a line."""
    for place, line in _lines(path):
        try:
            yield place, _object(_decode(line))
        except ValueError as error:
            yield place, error


def json_list(path: Path, numbers: Sequence[str] = ()) -> Found:
    """A list of objects, each with the line it begins in; or one object a line."""
    place, first = next(_lines(path), ("", b""))
    if not first.lstrip().startswith(b"["):
        if first.rstrip().endswith((b"{", b"[")):
            got = shorten(first.strip().decode(errors="replace"))
            raise Broken(f", {place}: must be one object a line, or begin a list of them; got {got}")
        yield from json_lines(path)
        return
    text = _whole_text(path)
    at = _after_space(text, text.index("[") + 1)
    number, counted = 1 + text.count("\n", 0, at), at
    while text[at : at + 1] != "]":
        number, counted = number + text.count("\n", counted, at), at
        try:
            row, at = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise Broken(f", line {error.lineno}: is not whole JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise Broken(f", line {number}: {_reason(error)}") from None
        try:
            yield f"line {number}", _as_row(row)
        except ValueError as error:
            yield f"line {number}", error
        at = _after_comma(text, at)
    if text[at + 1 :].strip():
        raise Broken(f", line {_line_of(text, at)}: something follows the end of the list")


def _whole_text(path: Path) -> str:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            _decode(line)
        except ValueError as error:
            raise Broken(f", line {number}: {error}") from None
    return b"\n".join(lines).decode("utf-8")


def _after_comma(text: str, at: int) -> int:
    """Where the next object of a list begins, or the list ends."""
    at = _after_space(text, at)
    if text[at : at + 1] == ",":
        at = _after_space(text, at + 1)
        if text[at : at + 1] != "]":
            return at
        raise Broken(f", line {_line_of(text, at)}: is not JSON: a comma before the end of the list")
    if text[at : at + 1] != "]":
        raise Broken(f", line {_line_of(text, at)}: is not whole JSON: a comma or the end of the list is missing")
    return at


def _after_space(text: str, at: int) -> int:
    return SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too


def _line_of(text: str, at: int) -> int:
    return 1 + text.count("\n", 0, at)


# ---- CSV -----------------------------------------------------------------------------------------------------


def csv_records(path: Path, numbers: Sequence[str] = ()) -> Found:
    """Records below a header, all text but for the columns of numbers; a record may hold line breaks in quotes."""
    broken: dict[int, ValueError] = {}  # by line, what is not UTF-8
    before = csv.field_size_limit(MAX_CELL)
    try:
        with path.open("rb") as file:
            reader = csv.reader(_decoded(file, broken), strict=True)
            header = _header(reader, broken)
            number = reader.line_num + 1
            for cells in _cells(reader):
                wrong = next((broken[n] for n in range(number, reader.line_num + 1) if n in broken), None)
                if cells or wrong:
                    yield f"line {number}", wrong or _record(header, cells, numbers)
                number = reader.line_num + 1
    finally:
        csv.field_size_limit(before)


def _decoded(file: Iterable[bytes], broken: dict[int, ValueError]) -> Iterator[str]:
    """The lines of a file as text; what is not UTF-8 is noted, for the record it stands in."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = _opening(line)
        try:
            yield _decode(line)
        except ValueError as error:
            broken[number] = error
            yield line.decode("utf-8", errors="replace")


def _cells(reader: Any) -> Iterator[list[str] | ValueError]:
    while True:
        number = reader.line_num + 1
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise Broken(f", line {number}: a quotation mark opens here and is never closed") from None
            yield ValueError(f"is not CSV: {error}; write a quotation mark inside quotes twice")


def _header(reader: Any, broken: Mapping[int, ValueError]) -> list[str]:
    try:
        header: list[str] = next(reader)
    except StopIteration:
        raise Broken(" must have a header and at least one row; got nothing") from None
    except csv.Error as error:
        raise Broken(f", line 1: is not CSV: {error}") from None
    if broken:
        raise Broken(f", line 1: {next(iter(broken.values()))}")
    if not all(header) or len(set(header)) < len(header):
        raise Broken(f", line 1: must be a header, a different name for each column; got {shorten(header)}")
    return header


def _record(header: list[str], cells: list[str] | ValueError, numbers: Sequence[str]) -> Row | ValueError:
    if isinstance(cells, ValueError):
        return cells
    if len(cells) != len(header):
        return ValueError(
            f"must have {len(header)} cells, one a column of {header}; got {len(cells)}: {shorten(cells)}"
        )
    row: Row = dict(zip(header, cells, strict=True))
    for name in set(numbers) & set(header):
        try:
            row[name] = DECODER.decode(row[name])
        except (ValueError, RecursionError):
            return ValueError(f"column {name!r} must be a number or a list of them; got {shorten(row[name])}")
    return row


# ---- Parquet -------------------------------------------------------------------------------------------------


def parquet_rows(path: Path, numbers: Sequence[str] = ()) -> Found:
    """Rows, counted from 0."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
        names = table.column_names
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise Broken(f": is not a whole Parquet file: {reason(error)}") from None
    if len(set(names)) < len(names):
        raise Broken(f": must have a different name for each column; got {names}")
    try:
        yield from ((f"row {i}", row) for i, row in enumerate(table.to_pylist()))
    except (pyarrow.ArrowException, ValueError, OverflowError):  # some value has no counterpart in Python: which?
        yield from ((f"row {i}", _one(table, i)) for i in range(table.num_rows))


def _one(table: Any, i: int) -> Row | ValueError:
    try:
        row: Row = table.slice(i, 1).to_pylist()[0]
        return row
    except UnicodeDecodeError:
        return ValueError("has text that is not UTF-8")
    except (ValueError, OverflowError) as error:
        return ValueError(f"cannot be read: {' '.join(str(error).split())}")


READERS: dict[str, Callable[[Path, Sequence[str]], Found]] = {
    ".json": json_list,
    ".jsonl": json_lines,
    ".csv": csv_records,
    ".parquet": parquet_rows,
}
FILE_OF_ROWS = f"a file that ends in one of {', '.join(READERS)}"
