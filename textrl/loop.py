"""The one learning loop: collect, update, log, save, until enough tokens have been learned from."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from . import checkpoint
from .asking import AllDropped
from .config import AgentConfig, as_path, check, check_type
from .failures import ask_as_configured, note_skips, stop_if_broken, stop_if_dropping, stop_if_stuck
from .generation import NotFinite
from .logging import RunLog
from .memory import explained
from .models import few_threads
from .rollout import Rollout
from .runs import Checkpoints, Due, Signals, alone
from .scores import shorten
from .state import forget_caches
from .watch import Watch

if TYPE_CHECKING:
    from .agent import Agent

Callback = Callable[["Agent", dict[str, float]], bool | None]
"""Called with the agent and the metrics after every update; returning False ends the loop."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How one call of `Agent.learn` logs and saves; see there."""

    log_dir: str | Path | None = None
    progress_bar: bool = False
    callback: Callback | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges."""
        every = self.checkpoint_every
        for name, kind in (("checkpoint_every", "int | None"), ("keep", "int"), ("resume", "bool")):
            check_type(name, getattr(self, name), kind)
        check("callback", self.callback, self.callback is None or callable(self.callback), "a function or None")
        if self.log_dir is not None:
            folder = as_path("log_dir", self.log_dir)
            check("log_dir", self.log_dir, folder.is_dir() or not folder.exists(), "a folder, or the name of a new one")
        check("checkpoint_every", every, every is None or every >= 1, "at least 1")
        check("keep", self.keep, self.keep >= 1, "at least 1")
        for name in ("checkpoint_every", "resume"):
            check(
                name,
                getattr(self, name),
                self.log_dir is not None or not getattr(self, name),
                "left out without log_dir",
            )


def learn(agent: Agent, total_timesteps: int | None, run: Run) -> None:
    """Collects and updates until `total_timesteps` more tokens have been learned from; see `Agent.learn`."""
    if "optimizer" not in vars(agent):
        name = type(agent).__name__
        raise ValueError(f"agent {name} must call super().__init__(env, model, config, **settings) in its __init__")
    total = total_timesteps
    check_type("total_timesteps", total, "int | float | None")
    check("total_timesteps", total, total is None or total > 0, "above 0")
    folder = None if run.log_dir is None else Path(run.log_dir)
    with alone(folder):
        _learn(agent, total, run, folder)


def _learn(agent: Agent, total: int | None, run: Run, folder: Path | None) -> None:
    saved = None if folder is None else Checkpoints(folder, run.keep)
    if run.resume and saved is not None:
        saved.go_on(lambda found: checkpoint.restore(agent, found))
    elif saved is not None and agent.num_updates == 0:
        saved.refuse()
    call = agent.call = _this_call(agent, total)
    due = None if run.checkpoint_every is None else _due(agent, run.checkpoint_every, saved)
    start, goal = call["start"], call["start"] + call["total"]
    dtype = str(agent.model.dtype).removeprefix("torch.")
    log = RunLog(
        folder,
        run.progress_bar,
        call["total"],
        f"{type(agent).__name__} ({dtype} on {agent.device})",
        after=agent.num_updates,
        timesteps=agent.num_timesteps,
    )
    if run.resume:
        log.compare(call.get("log"))
    watch = Watch(agent)
    ask_as_configured(agent)
    stop = False
    with few_threads(agent.model), log, Signals(due is not None) as signals:
        while agent.num_timesteps < goal and not stop:
            metrics, dropped, asked = _iterate(agent, goal, call["total"], watch)
            log.write(metrics, agent.num_timesteps, agent.num_updates, agent.num_timesteps - start)
            stop = run.callback is not None and _is_false(run.callback(agent, metrics))
            stop_if_stuck(agent, metrics, saved)
            stop_if_dropping(agent, dropped, asked, saved)
            if due is None or saved is None:
                continue
            if "rollout/score" in metrics and not agent.needs_dataset:  # there is no best where scores are given data
                due.note(metrics["rollout/score"])
            if due.due(agent.num_timesteps, last=agent.num_timesteps >= goal) or signals.caught or stop:
                stop_if_broken(agent, saved)
                call["log"], call["due"] = log.sync(), dataclasses.asdict(due)
                signals.leave(saved.write(agent.num_timesteps, agent.save, due.best))
    if agent.num_timesteps >= goal:
        agent.call = None
    agent.anneal(1.0)
    agent.score_weight.reset(rising=False)


def _this_call(agent: Agent, total: int | None) -> dict[str, Any]:
    """The call of `learn` that a restored agent was in, where that is the one to finish; else a new one."""
    call, resumed, agent.resumed = agent.call, agent.resumed, None
    if resumed is not None and call is not None:
        left = call["start"] + call["total"] - agent.num_timesteps
        if total in (None, call["total"], left):
            resumed.take_up()
            return call
    check("total_timesteps", total, total is not None, "given, unless a call of learn that was interrupted is to go on")
    return {"total": total, "start": agent.num_timesteps, "log": None, "due": None}


def _due(agent: Agent, every: int, saved: Checkpoints | None) -> Due:
    """When the checkpoints of this call of `learn` are due: as noted in the one it goes on from."""
    noted = (agent.call or {})["due"] or {"next": agent.num_timesteps + every}
    due = Due(**{**noted, "every": every})
    if due.best is not None and saved is not None and not saved.path(due.best).is_dir():
        due.best, due.best_value = None, -math.inf  # it goes on elsewhere, or that one is gone
    return due


def _is_false(said: Any) -> bool:
    return isinstance(said, (bool, np.bool_)) and not said


def _numbers(agent: Agent, found: Any) -> dict[str, float]:
    """What an agent's `update` returned, each number by its name; a name without a group is one of "train/".

    Raises:
        ValueError: for anything else.
    """
    what = f"{type(agent).__name__}.update must return a dict of numbers by their names"
    if not isinstance(found, Mapping):
        raise ValueError(f"{what}; got {shorten(found)}")
    numbers: dict[str, float] = {}
    for name, value in found.items():
        single = isinstance(value, (Tensor, np.ndarray, np.generic)) and len(value.reshape(-1)) == 1
        number = value.item() if single else value
        if not isinstance(name, str) or not name or not isinstance(number, (int, float)):
            raise ValueError(f"{what}; got {shorten(value)} for {name!r}")
        numbers[name if "/" in name else f"train/{name}"] = float(number) if isinstance(number, bool) else number
    return numbers


def _iterate(agent: Agent, goal: int, total: int, watch: Watch) -> tuple[dict[str, float], list[str], int]:
    """One batch collected and learned from: its numbers, what was wrong with dropped episodes, all episodes."""
    agent.progress_remaining = (goal - agent.num_timesteps) / total
    agent.score_weight.reset(rising=goal == total)  # in the first call
    began = time.perf_counter()
    skipped = agent.optimizer.skipped
    with explained(agent.config):
        rollout, dropped, metrics = _collect(agent)
        collected = time.perf_counter()
        if rollout is not None:
            left = (goal - agent.num_timesteps - rollout.num_tokens) / total
            agent.anneal(_share_of_rate(agent.config, agent.progress_remaining, left))
            metrics = {**rollout.metrics(), **_numbers(agent, agent.update(rollout))}
            if agent.score_weight.asked:
                metrics["train/score_weight"] = agent.score_weight.value
    agent.stepper.forget()
    forget_caches(agent.env)
    tokens = 0 if rollout is None else rollout.num_tokens
    agent.num_timesteps += tokens
    agent.num_updates += 1
    note_skips(agent, metrics, skipped)
    asked = len(dropped) + (0 if rollout is None else len(rollout))
    if agent.config.on_score_error == "drop":
        metrics["rollout/dropped"] = len(dropped)
        watch.dropped(dropped, asked)
    if rollout is not None:
        watch.see(rollout, metrics)
    now = time.perf_counter()
    metrics["time/tokens_per_second"] = tokens / (now - began)
    metrics["time/collect_seconds"], metrics["time/update_seconds"] = collected - began, now - collected
    return metrics, dropped, asked


def _share_of_rate(config: AgentConfig, left: float, left_after: float) -> float:
    """The share of the learning rate in an iteration, by what is left of `learn` before and after it."""
    rise = (1 - left_after) / config.warmup if config.warmup > 0 else 1.0
    fall = left / config.cooldown if config.cooldown > 0 else 1.0
    return min(1.0, rise, fall)


def _collect(agent: Agent) -> tuple[Rollout | None, list[str], dict[str, float]]:
    """A batch, what was wrong with the scores of dropped episodes, and where there is no batch its numbers."""
    try:
        rollout = agent.collect()
    except AllDropped as error:
        return None, error.faults, {}
    except NotFinite:
        return None, [], {"train/loss": math.nan}
    return rollout, rollout.dropped, {}
