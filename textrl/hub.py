"""Folders and hub names of models: whether one can be had, asked once and quickly before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from .scores import reason

SECONDS = 10
"""The hub has this long to answer; transformers itself would retry for half a minute."""


def check_source(name: str, what: str) -> None:
    """Refuses what is neither a folder nor the name of a repository that is in the cache or that the hub knows.

    Args:
        name: folder or hub name.
        what: the argument, for the message.

    Raises:
        ValueError: in one line.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(name).is_dir():
        return
    file = Path(name).is_file()
    if file or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or not name:
        raise ValueError(
            f"{what} must be a folder that exists, or a hub name; got {name!r}{', a file' if file else ''}"
        )
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        HfApi().model_info(name, timeout=SECONDS)
    except Exception as error:  # whatever the client and the network may raise
        raise ValueError(f"{what} {name!r} is neither a folder nor a hub name in reach ({reason(error)})") from None
