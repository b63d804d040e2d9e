"""Folders that are written whole or not at all, with a manifest by which they are checked before they are used."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .disk import digest, file_hash, read_json, sync, write_json

MANIFEST = "agent.json"
SCORER, SCORER_IN_TRAINING = SCORERS = ("RewardModel", "reward model in training")
"""The kinds of saved things that are reward models, and no agents."""
PART = "textrl-part-"
"""In the names of folders that are written beside the one whose place they take."""


class CheckpointError(ValueError):
    """A saved agent that is not what was written, or could not be written."""


@contextmanager
def whole_folder(folder: Path, scorer: bool = False) -> Iterator[Path]:
    """A new folder to write into, renamed to `folder` at the end; what stood there before is replaced.

    Args:
        folder: where the result goes; it replaces things of its kind alone.
        scorer: whether that is a reward model, and no agent.

    Raises:
        ValueError: where `folder` holds something else.
        CheckpointError: where the disk is full or cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).exists())):
        raise ValueError(f"folder must be empty, new, or hold {MANIFEST}; {str(folder)!r} holds something else")
    check_kind(folder, scorer)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-{PART}", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"folder {str(folder)!r} could not be written: {error}") from error
    try:
        part.chmod(0o755)
        with _no_bars():
            yield part
        for each in [*part.rglob("*"), part]:
            sync(each)
        if folder.exists():
            old = folder.rename(part.with_name(part.name + "-old"))
        part.rename(folder)
        sync(folder.parent)
        _remove_leftovers(folder)  # not before: one of them may be all that a killed process left of the old content
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"folder {str(folder)!r} could not be written: {error}") from error
    finally:
        if old != part and not folder.exists():  # the new one could not take its place
            old.rename(folder)
        for each in (part, old):
            shutil.rmtree(each, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars that transformers shows for every model it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_kind(folder: Path, scorer: bool) -> None:
    """Refuses to replace an agent with a reward model, or the reverse.

    Raises:
        ValueError: naming what the folder holds.
    """
    if (kind := kind_in(folder)) is not None and (kind in SCORERS) != scorer:
        right = "a reward model" if scorer else "an agent"
        raise ValueError(f"folder must be empty, new, or hold {right}; {str(folder)!r} holds {kind!r}")


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed while they wrote to `folder` left beside it."""
    for each in folder.parent.glob(".*"):
        if re.fullmatch(rf"\.{re.escape(folder.name)}-{PART}[a-z0-9_]{{8}}(-old)?", each.name) and each.is_dir():
            shutil.rmtree(each, ignore_errors=True)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `agent.json`: facts, the sizes and hashes of all other files, and a hash of itself."""
    files = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": file_hash(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {**facts, "files": files}
    write_json(folder / MANIFEST, {**manifest, "sha256": digest(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `agent.json` in a folder says.

    Raises:
        CheckpointError: where there is none, or it is not as it was written.
    """
    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        right = manifest.pop("sha256", None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"folder must hold a saved agent ({MANIFEST}); {str(folder)!r} does not ({said})"
        ) from None
    if right != digest(manifest):
        raise CheckpointError(f"{str(folder / MANIFEST)!r} is damaged: its content is not what was written")
    return manifest


def kind_in(folder: Path) -> str | None:
    """What kind of thing was saved in a folder; None where nothing of ours is, or nothing whole."""
    try:
        return read_manifest(folder).get("agent")
    except CheckpointError:
        return None


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a folder all of whose files are as they were written.

    Raises:
        CheckpointError: naming the first file that is missing, cut short or changed.
    """
    manifest = read_manifest(folder)
    for name, right in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{str(file)!r} is missing")
        if (size := file.stat().st_size) != right["bytes"]:
            raise CheckpointError(f"{str(file)!r} is damaged: it has {size} bytes, not {right['bytes']}")
        if file_hash(file) != right["sha256"]:
            raise CheckpointError(f"{str(file)!r} is damaged: its content is not what was written")
    return manifest


def verify_if_ours(folder: Path) -> None:
    """Checks a folder that has a manifest; others, from elsewhere, are let pass.

    Raises:
        CheckpointError: where it is damaged.
    """
    if (folder / MANIFEST).is_file():
        verify(folder)
