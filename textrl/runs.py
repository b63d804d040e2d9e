"""The checkpoints in a run's folder: writing one, keeping the last few and the best, finding the newest whole one."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from .disk import sync
from .folders import MANIFEST, CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN, FOLDER, BEST, FINAL = "run.json", "checkpoints", "best", "final"
"""In a run's folder: what it was told, as JSON; the checkpoints; a link to the best of them; the agent at the end."""


_held: dict[Path, int] = {}  # the folders that this process keeps to itself, and the open file of each


@contextmanager
def alone(run: Path | None) -> Iterator[None]:
    """Keeps every other process from writing into a run's folder, as long as this lasts; None: there is no folder.

    The lock goes with the process that has it, however that ends; inside it the same process may ask again. Where there
    are no such locks nothing is kept.

    Raises:
        ValueError: where another process has it.
    """
    if run is None or fcntl is None or run.absolute() in _held:
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = _held[run.absolute()] = os.open(run, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"log_dir must be a folder that can be written; got {str(run)!r} ({error.strerror})") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            more = "wait for its end, or give another folder"
            raise ValueError(f"log_dir must not be in use; another process writes to {str(run)!r}: {more}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        if run.absolute() in _held:
            os.close(_held.pop(run.absolute()))


def _let_go() -> None:
    """In a process that was forked off: the locks stay its parent's alone."""
    while _held:
        os.close(_held.popitem()[1])


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


class Checkpoints:
    """`RUN/checkpoints/step-000001000` and so on, and `RUN/best`, a link to the best of them.

    Args:
        run: the run's folder.
        keep: how many of the newest stay; the best one stays too.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.keep = run, keep
        self.folder = run / FOLDER

    def write(self, step: int, save: Callable[[Path], None], best: int | None = None) -> Path:
        """Writes one, and removes those that are not kept any more.

        Args:
            step: its number: timesteps so far.
            save: writes into a folder that does not exist yet, whole or not at all.
            best: the number of the best one so far.
        """
        target = self.path(step)
        self._remove(target)  # a run that goes on from an earlier one comes by here again
        save(target)
        if best is not None and self.path(best).is_dir():
            link = self.run / f".{BEST}"
            link.unlink(missing_ok=True)
            link.symlink_to(Path(FOLDER) / self.path(best).name)
            self._remove_copy()
            link.replace(self.run / BEST)
        for old in self.steps()[self.keep :]:
            if old != best:
                self._remove(self.path(old))
        return target

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"step-{step:09d}"

    def steps(self) -> list[int]:
        """The numbers of all checkpoints, the newest first."""
        names = [each.name.removeprefix("step-") for each in self.folder.glob("step-*")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def go_on(self, restore: Callable[[Path], None]) -> None:
        """Restores the newest checkpoint that is whole, if there is one.

        Those that are damaged are named on stderr; they and leftovers of a run that was killed are removed.
        """
        for leftover in self.folder.glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for step in self.steps():
            folder = self.path(step)
            try:
                restore(folder)
                return
            except CheckpointError as error:
                sys.stderr.write(f"textrl: {error}; going on from the checkpoint before it\n")
                self._remove(folder)

    def refuse(self) -> None:
        """Lets no other run begin where there are some.

        Raises:
            ValueError: naming the folder.
        """
        if self.steps():
            raise ValueError(
                f"log_dir must be a folder without another run's checkpoints; got {str(self.run)!r}: resume=True goes"
                f" on with that run, or remove {str(self.folder)!r}"
            )

    def clear(self) -> None:
        """Removes all of them: what they were for is done."""
        if self.folder.exists():
            self._remove_copy()
            (self.run / BEST).unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def _remove_copy(self) -> None:
        """Removes the copy of a checkpoint that a copy of the run, its links followed, made of the link.

        Raises:
            ValueError: for a folder that is none.
        """
        best = self.run / BEST
        if best.is_symlink() or not best.is_dir():
            return
        manifests = [self.path(step) / MANIFEST for step in self.steps()]
        told = (best / MANIFEST).read_bytes() if (best / MANIFEST).is_file() else None
        if told not in [each.read_bytes() for each in manifests if each.is_file()]:
            raise ValueError(f"{str(best)!r} is a folder of something else: give it another name")
        shutil.rmtree(best)

    def _remove(self, folder: Path) -> None:
        if folder.exists():
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}-old")))
            sync(self.folder)


@dataclass
class Due:
    """When a checkpoint is due, and which is the best: neither depends on interruptions.

    The best is the one with the highest mean value since the one before it.
    """

    every: int  # steps from one to the next
    next: int  # the step at which the next is due
    best: int | None = None  # the step of the best
    best_value: float = -math.inf
    total: float = 0.0  # of the values since the last one
    count: int = 0

    def note(self, value: float) -> None:
        """Takes a value down, the higher the better."""
        self.total, self.count = self.total + value, self.count + 1

    def due(self, step: int, last: bool) -> bool:
        """Whether one is due at this step, which may be the last."""
        if step < self.next and not last:
            return False
        while self.next <= step:
            self.next += self.every
        if self.count and self.total / self.count > self.best_value:
            self.best, self.best_value = step, self.total / self.count
        self.total, self.count = 0.0, 0
        return True


class Signals:
    """Makes SIGINT and SIGTERM wait for a good moment: `caught` says which came. A second one exits at once.

    Args:
        active: whether to do anything; only the main thread can.
    """

    def __init__(self, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Takes the signals over."""
        if self.active:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is not None:
            os._exit(128 + number)
        self.caught = number
        sys.stderr.write("textrl: stopping with a checkpoint after this iteration; once more to stop at once\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives them back."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def leave(self, checkpoint: Path) -> None:
        """Ends the program as the signal would have, if one came.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: 143, for SIGTERM.
        """
        if self.caught == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped; {checkpoint} holds the run as it stands")
        if self.caught == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM)
