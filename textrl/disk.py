"""Writing to a disk that may be full: a file is there whole or as it was, and an error names it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Names the file in an error of writing to it, such as a full disk, which does not name it by itself.

    Raises:
        OSError: with the file.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror or error}", str(file)) from error


def could_be_folder(path: Path) -> bool:
    """Whether a folder is at this path, or could be made there."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK)


def read_json(file: Path) -> Any:
    """The JSON in a file.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{str(file)!r} is JSON too deeply nested") from None


def write_json(file: Path, content: Any) -> None:
    """Writes JSON; the file is there whole or as it was."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a text beside and then renames it: the file is there whole or as it was.

    Raises:
        OSError: naming the file.
    """
    part = file.with_name(file.name + ".part")
    try:
        with writing(file):
            part.write_text(text, encoding="utf-8")
            sync(part)
            part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def digest(content: Any) -> str:
    """The SHA-256 of what is written as JSON."""
    read = json.loads(json.dumps(content))  # keys that are numbers are read as texts
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Returns once a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
