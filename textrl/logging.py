"""A run's log: CSV and TensorBoard through Stable-Baselines3's logger, a bar and a table through rich."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.logger import Logger, configure

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


class RunLog:
    """Where the numbers of a run go.

    Args:
        log_dir: folder of `progress.csv` and TensorBoard's event file; None writes no files.
        progress_bar: whether to show a bar and a table row for every iteration.
        total: timesteps to go.
        title: beside the bar.
        unit: what the bar counts.
    """

    def __init__(
        self, log_dir: str | Path | None, progress_bar: bool, total: int, title: str, unit: str = "tokens"
    ) -> None:
        self.total = total
        self.logger: Logger | None = None
        if log_dir is not None:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            self.logger = configure(str(log_dir), ["csv", "tensorboard"])
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
        if self.logger is not None:
            self.logger.close()
        if self.progress is not None:
            self.progress.stop()

    def write(self, metrics: dict[str, float], timesteps: int, iteration: int, fresh: int) -> None:
        """One iteration's numbers.

        Args:
            metrics: by name, "group/name".
            timesteps: tokens learned from so far.
            iteration: updates so far.
            fresh: timesteps of this call of `learn`.
        """
        if self.logger is not None:
            self.logger.record("time/iteration", iteration)
            self.logger.record("time/timesteps", timesteps)
            for key, value in metrics.items():
                self.logger.record(key, value)
            self.logger.dump(timesteps)
        if self.progress is not None:
            if self.header is None:
                self.header = [name for name, key in COLUMNS.items() if key in metrics]
                self._print(["iter", *self.header])
            self._print([str(iteration), *(_number(metrics.get(COLUMNS[name])) for name in self.header)])
            self.progress.update(self.bar, completed=min(fresh, self.total))

    def _print(self, cells: list[str]) -> None:
        assert self.progress is not None
        self.progress.console.print(" ".join(cell.rjust(5 if i == 0 else 9) for i, cell in enumerate(cells)))


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
