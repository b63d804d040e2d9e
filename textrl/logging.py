"""A run's log: CSV and TensorBoard files, a bar and a table through rich."""

from __future__ import annotations

import csv
import math
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .disk import file_hash, writing
from .files import InputError
from .scores import shorten

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

PROGRESS = "progress.csv"
ITERATION, TIMESTEPS = "time/iteration", "time/timesteps"
COLUMNS = {
    "score": "rollout/score",
    "return": "rollout/return",
    "kl(ref)": "rollout/kl_reference",
    "length": "rollout/response_length",
    "stopped": "rollout/stopped",
    "entropy": "train/entropy",
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "tok/s": "time/tokens_per_second",
}
"""The columns of the table on the terminal; those a run does not have are left out."""


class ProgressFile:
    """`progress.csv`: a row for every iteration, and nothing in it that another run of the same seed would not write.

    A column that is new in a later row is added to the whole file. A row is in the file whole or not at all as far as
    a reader can tell: a torn last line is dropped when the file is opened again.

    Args:
        file: where. Its rows up to iteration `after` stay, later ones go.
        after: how many iterations there have been.
    """

    def __init__(self, file: Path, after: int = 0) -> None:
        self.path = file
        rows = _rows_until(file, after) if after else []
        self.names = [name for name in rows[0] if any(row[name] for row in rows)] if rows else []
        self.file: TextIO | None = None
        self._rewrite([[row[name] for name in self.names] for row in rows])

    def _rewrite(self, rows: list[list[str]]) -> None:
        """Replaces the file by one with the columns as they are now."""
        if self.file is not None:
            self.file.close()
        part = self.path.with_name(self.path.name + ".part")
        with writing(self.path):
            with part.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerows([self.names, *rows] if self.names else [])
            part.replace(self.path)
        self.file = self.path.open("a", newline="", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row."""
        if new := [name for name in row if name not in self.names]:
            before = [[*each.values(), *[""] * len(new)] for each in read_progress(self.path)]
            self.names += new
            self._rewrite(before)
        assert self.file is not None
        with writing(self.path):
            csv.writer(self.file, lineterminator="\n").writerow([written(row.get(name)) for name in self.names])
            self.file.flush()

    def sync(self) -> None:
        """Returns once the rows so far are on the disk."""
        assert self.file is not None
        with writing(self.path):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file."""
        assert self.file is not None
        self.file.close()


def _rows_until(file: Path, iteration: int) -> list[dict[str, str]]:
    """The rows of the iterations up to one; of a damaged file those that can be read."""
    try:
        rows = read_progress(file)
    except (UnicodeDecodeError, csv.Error):
        return []
    whole = [row for row in rows if None not in row and None not in row.values()]
    return [row for row in whole if row.get(ITERATION, "").isdecimal() and int(row[ITERATION]) <= iteration]


def read_progress(file: Path) -> list[dict[str, str]]:
    """The whole rows of a `progress.csv`, as texts; none where there is no file."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(whole.splitlines()))


def read_numbers(file: Path, x: str = TIMESTEPS) -> list[dict[str, float]]:
    """The same as numbers; a row holds the columns that have one in it, and always `x`.

    Raises:
        InputError: naming file, line and column of what is not as a run writes it.
    """
    try:
        rows = read_progress(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file} must be a CSV file of numbers, in UTF-8; {error}") from None
    return [_numbers(f"{file}, line {line}", row, x) for line, row in enumerate(rows, 2)]


def _numbers(place: str, row: dict[str, str], x: str) -> dict[str, float]:
    if None in row or None in row.values():
        raise InputError(f"{place}, must have as many cells as the header; got {'more' if None in row else 'fewer'}")
    found: dict[str, float] = {}
    for name, cell in row.items():
        try:
            found |= {name: float(cell)} if cell else {}
        except ValueError:
            raise InputError(f"{place}, column {name!r} must be a number; got {shorten(cell)}") from None
    if not math.isfinite(found.get(x, math.nan)):
        raise InputError(f"{place}, column {x!r} must be a finite number; got {shorten(row.get(x))}")
    return found


def written(value: Any) -> str:
    """A number as it stands in `progress.csv`: every digit, so that it can be read back."""
    return "" if value is None else str(value) if isinstance(value, (int, str)) else repr(float(value))


class RunLog:
    """Where the numbers of a run go.

    Args:
        log_dir: folder of `progress.csv` and TensorBoard's event file; None writes no files.
        progress_bar: whether to show a bar and a table row for every iteration.
        total: timesteps to go.
        title: beside the bar.
        unit: what the bar counts.
        after: iterations that are in the log already and stay; what is logged beyond them goes.
        timesteps: at that iteration.
    """

    def __init__(
        self,
        log_dir: str | Path | None,
        progress_bar: bool,
        total: int,
        title: str,
        unit: str = "tokens",
        after: int = 0,
        timesteps: int = 0,
    ) -> None:
        self.total = total
        self.file: ProgressFile | None = None
        self.board: SummaryWriter | None = None
        if log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            Path(log_dir).mkdir(parents=True, exist_ok=True)
            self.file = ProgressFile(Path(log_dir) / PROGRESS, after)
            self.board = SummaryWriter(str(log_dir), purge_step=timesteps + 1 if after else None)
        self.progress: Progress | None = None
        if progress_bar:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(highlight=False, soft_wrap=True),
            )
            self.bar = self.progress.add_task(title, total=total)
        self.header: list[str] | None = None

    def __enter__(self) -> Self:
        """Starts the bar."""
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files and the bar, whatever happened."""
        if self.file is not None and self.board is not None:
            self.file.close()
            self.board.close()
        if self.progress is not None:
            self.progress.stop()

    def write(self, metrics: dict[str, float], timesteps: int, iteration: int, fresh: int) -> None:
        """One iteration's numbers.

        Args:
            metrics: by name, "group/name". What starts with "time/" differs from run to run and stays out of the CSV.
            timesteps: tokens learned from so far.
            iteration: updates so far.
            fresh: timesteps of this call of `learn`.
        """
        if self.file is not None and self.board is not None:
            numbers = {key: value for key, value in metrics.items() if not key.startswith("time/")}
            self.file.write({ITERATION: iteration, TIMESTEPS: timesteps, **numbers})
            for key, value in {ITERATION: iteration, **metrics}.items():
                self.board.add_scalar(key, value, timesteps)
            self.board.flush()
        if self.progress is not None:
            if self.header is None:
                self.header = [name for name, key in COLUMNS.items() if key in metrics]
                self._print(["iter", *self.header])
            self._print([str(iteration), *(_number(metrics.get(COLUMNS[name])) for name in self.header)])
            self.progress.update(self.bar, completed=min(fresh, self.total))

    def sync(self) -> str | None:
        """Returns once the rows so far are on the disk: their SHA-256."""
        if self.file is None:
            return None
        self.file.sync()
        return file_hash(self.file.path)

    def compare(self, hash: str | None) -> None:
        """Says so where the rows that were kept are not those that `sync` gave this hash of."""
        if self.file is not None and hash is not None and file_hash(self.file.path) != hash:
            sys.stderr.write(
                f"textrl: {str(self.file.path)!a} is damaged: its rows are not what was written;"
                " going on with those that can be read\n"
            )

    def _print(self, cells: list[str]) -> None:
        assert self.progress is not None
        self.progress.console.print(" ".join(cell.rjust(5 if i == 0 else 9) for i, cell in enumerate(cells)))


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
