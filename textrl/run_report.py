"""`textrl report`: the page of a training run, from what lies in its folder, and its figures for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import USER_ERRORS
from .files import InputError
from .folders import CheckpointError, read_manifest
from .logging import COLUMNS, ITERATION, PROGRESS, TIMESTEPS, read_numbers
from .models import few_threads
from .render import escape
from .report import PAGE, Section, curves, settings, write_report
from .runs import BEST, FINAL, RUN, Checkpoints
from .trained import played, read_run, trained_agent

SHOWN = 8
"""Responses on the page."""
SEED = 12345
"""Of their prompts and tokens."""
GROUPS = {"rollout": "Responses while training", "train": "Learning"}
"""Headings for the curves by the first part of their names."""


def report_training(folder: Path) -> str:
    """Writes `report.html` into the folder of a run, finished or not.

    Args:
        folder: a `--log-dir` or `log_dir`, with `progress.csv` and whatever else the run has left so far.

    Returns:
        the main figures, for the terminal.

    Raises:
        ValueError: for a folder that is no run's, or a log that is empty or not as a run writes it.
        OSError: where the page cannot be written; nothing is then.
    """
    if not any((folder / name).exists() for name in (RUN, PROGRESS)):
        what = f"has neither {RUN} nor {PROGRESS}" if folder.is_dir() else "is no folder"
        raise ValueError(f"RUN must be the --log-dir of a textrl train or a textrl rlhf; {str(folder)!r} {what}")
    run = read_run("RUN", folder) if (folder / RUN).exists() else None
    rows = read_numbers(folder / PROGRESS)
    if not rows:
        raise InputError(f"run {str(folder)!r} has nothing to show yet: {folder / PROGRESS} has no iteration")
    saved = saved_agents(folder)
    title = "A training run" if run is None else f"{run['agent']} on {run['env']}"
    far = how_far(folder, run, rows)
    shown = responses(saved, run)
    sections = [shown, *drawn(folder / PROGRESS, rows), numbers(rows), settings(settings_in_force(saved, run))]
    write_report(folder / PAGE, title, far, [each for each in sections if each.text or each.rows or each.curves])
    last = latest(rows)
    lines = [f"{title}: {far}", *(f"{name:<22} {last[key]:.4g}" for name, key in COLUMNS.items() if key in last)]
    if not shown.rows:
        lines.append(shown.text)
    return "\n".join(escape(line) for line in [*lines, f"see {folder / PAGE}"])


def saved_agents(folder: Path) -> list[Path]:
    """Where agents lie in a run's folder: that of the end, then the checkpoints, the newest first."""
    checkpoints = Checkpoints(folder, 1)
    places = [folder / FINAL, *map(checkpoints.path, checkpoints.steps())]
    return [place for place in places if place.is_dir()]


def how_far(folder: Path, run: Mapping[str, Any] | None, rows: Sequence[Mapping[str, float]]) -> str:
    """How far the run is, in a sentence."""
    goal = "" if run is None else f" of {run['total_timesteps']:,}"
    best = f"; best checkpoint: {(folder / BEST).resolve().name}" if (folder / BEST).is_dir() else ""
    end = ", finished" if (folder / FINAL).is_dir() else "" if run is None else ", not finished"
    return f"{rows[-1][TIMESTEPS]:,.0f}{goal} tokens in {len(rows):,} iterations{end}{best}"


def responses(saved: Sequence[Path], run: Mapping[str, Any] | None) -> Section:
    """A few responses of the newest agent that is whole, with their scores; or in a sentence why there are none."""
    title, faults = "Responses", []
    if run is None:
        return Section(title, f"No responses: without {RUN} it is not known in which environment the agent acts.")
    for place in saved:
        try:
            agent = trained_agent(place, dict(run), SEED, SHOWN)
            with few_threads(agent.model):
                rollout = played(agent)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        except USER_ERRORS as error:
            return Section(title, f"No responses: {error}")
        episodes = zip(rollout.rows, rollout.completions, rollout.scores, rollout.stopped, strict=True)
        table = [(row["prompt"], text, f"{score:.4g}", "stop" if s else "length") for row, text, score, s in episodes]
        text = f"Sampled for this page from {place.name}; the environment's score of each, and why it ended."
        return Section(title, text, ("prompt", "response", "score", "finish reason"), table)
    return Section(title, f"No responses: {'; '.join(faults) or 'the run has saved no agent yet'}")


def latest(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last number of every column, in the order of the columns."""
    return {name: value for row in rows for name, value in row.items()}


def columns(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The columns of a log, without those that say how far it is."""
    return [name for name in latest(rows) if name not in (ITERATION, TIMESTEPS)]


def numbers(rows: Sequence[Mapping[str, float]]) -> Section:
    """The first and the last number of every column."""
    first, last = latest(rows[::-1]), latest(rows)
    table = [(name, f"{first[name]:.4g}", f"{last[name]:.4g}") for name in columns(rows)]
    return Section("First and last numbers", header=("", "first", "last"), rows=table)


def drawn(progress: Path, rows: Sequence[Mapping[str, float]]) -> list[Section]:
    """Every column as a curve, in groups."""
    groups: dict[str, dict[str, str]] = {}
    for column in columns(rows):
        group, _, name = column.rpartition("/")
        groups.setdefault(group, {})[column] = name.replace("_", " ")
    return [
        Section(GROUPS.get(group, group or "Others"), "Against tokens learned from.", curves=curves(progress, names))
        for group, names in groups.items()
    ]


def settings_in_force(saved: Sequence[Path], run: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the run was told, and the agent's settings: as they were saved with it, where it was."""
    out: dict[str, Any] = {}
    if run is not None:
        out = {name: value for name, value in run.items() if name not in ("config", "env_kwargs")}
        out |= {f"env: {name}": value for name, value in run["env_kwargs"].items()} | run["config"]
    for place in saved:
        try:
            return out | read_manifest(place)["config"]
        except CheckpointError:
            continue
    return out
