"""What a `textrl train` left in its folder: what it was told, and its agent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from .disk import digest, read_json
from .plugins import agent_class, check_env_id
from .runs import FINAL, RUN

if TYPE_CHECKING:
    from .agent import Agent
    from .rollout import Rollout


def read_run(called: str, folder: Path, unchanged: bool = False) -> dict[str, Any]:
    """What `run.json` in a run's folder says; `called` is the argument that the folder is.

    Raises:
        ValueError: where there is none, it is of another kind, or it must be `unchanged` and is not.
    """
    try:
        run: dict[str, Any] = read_json(folder / RUN)
    except (OSError, ValueError) as error:
        what = f"{str(folder)!r} has no {RUN}" if isinstance(error, OSError) else f"{str(folder / RUN)!r} is no JSON"
        raise ValueError(f"{called} must be the --log-dir of a textrl train; {what}") from None
    right = run.pop("sha256", None) if isinstance(run, dict) else None
    if unchanged and right not in (None, digest(run)):
        said = "its content is not what was written; without its sha256 it is taken as it is"
        raise ValueError(f"{called}: {str(folder / RUN)!r} is damaged: {said}")
    if isinstance(run, dict) and "agent" not in run and "seconds" in run:  # those of its steps
        raise ValueError(f"{called} must be the --log-dir of a textrl train; {str(folder)!r} is one of textrl rlhf")
    kinds = {"agent": str, "env": str, "env_kwargs": dict, "config": dict, "total_timesteps": int, "keep": int}
    whole = isinstance(run, dict) and all(isinstance(run.get(name), kind) for name, kind in kinds.items())
    if not whole or not {"model", "dataset", "skip_bad_rows", "checkpoint_every"} <= run.keys():
        raise ValueError(f"{called} must be the --log-dir of a textrl train; {str(folder / RUN)!r} is of another kind")
    return run


def finished_run(called: str, folder: Path) -> dict[str, Any]:
    """The same of a run that has ended: its agent lies in `folder / FINAL`.

    Raises:
        ValueError: for one that has not.
    """
    run = read_run(called, folder)
    if not (folder / FINAL).is_dir():
        raise ValueError(
            f"run {str(folder)!r} has no agent in {folder / FINAL}: it did not end; textrl train --resume {folder} goes"
            " on with it"
        )
    return run


def trained_agent(
    final: Path, run: dict[str, Any], seed: int, batch_size: int | None = None, critic: bool = False
) -> Agent:
    """The policy of a run, under the plain `Agent` where its class acts as that does: the rest is left on disk.

    Args:
        final: where it was saved, in the run's folder.
        run: what `read_run` says of the run.
        seed: of prompts and samples.
        batch_size: episodes at a time; None: as it was trained.
        critic: whether an agent that has a critic is loaded whole, so that it can be asked for values.
    """
    from .agent import Agent
    from .checkpoint import manifest_of

    cls = agent_class(run["agent"])
    env = gym.make_vec(check_env_id(run["env"]), num_envs=1, **run["env_kwargs"])
    manifest = manifest_of(cls, final)
    own = cls.narrow is not Agent.narrow or cls.respond is not Agent.respond
    size = manifest["config"]["batch_size"] if batch_size is None else batch_size
    if own or (critic and any(file.startswith(("critic", "value_head")) for file in manifest["files"])):
        return cls.load(final, env, seed=seed, batch_size=size)
    kept = {name: manifest["config"][name] for name in ("dtype", "on_score_error", "score_timeout")}
    return Agent(env, str(final), seed=seed, batch_size=size, **kept)


def played(agent: Agent) -> Rollout:
    """A batch of fresh episodes of a trained agent, under the time limit of its run if it had one."""
    from .attaching import is_bare

    if is_bare(agent.env):
        return agent.respond([agent.task.sample(agent.rng) for _ in range(agent.config.batch_size)])
    return agent.collect()
