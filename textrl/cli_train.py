"""The command `textrl train`: an agent on an environment, from the beginning or from where a run was stopped."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from .cli_flags import (
    KL_HELP,
    own_tokenizer,
    parse_config,
    parse_env_args,
    training_penalty,
    whole,
)
from .config import as_path, check, make_config
from .disk import could_be_folder, digest, write_json
from .files import is_file_name
from .plugins import agent_class, check_env_id
from .render import one_line
from .runs import FINAL, RUN, Checkpoints, alone
from .trained import read_run

if TYPE_CHECKING:
    from .agent import Agent


def train_parser(commands: Any) -> None:
    """Adds the command."""
    train = commands.add_parser(
        "train",
        help="train an agent on an environment",
        description="Trains an agent. Its settings are flags too: textrl train AGENT --settings lists them.",
        allow_abbrev=False,
    )
    train.add_argument("agent", metavar="AGENT", nargs="?", help="see textrl agents; or module:Class")
    train.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, and nothing else")
    train.add_argument("--settings", action="store_true", help="list the agent's own settings, and stop")
    train.add_argument("--env", metavar="ID", help="see textrl envs")
    train.add_argument(
        "--env-arg", action="append", default=[], metavar="NAME=VALUE", help="argument of the environment, JSON or text"
    )
    train.add_argument("--model", help="folder or hub name of a causal language model (default: a small random one)")
    train.add_argument("--reference", help="folder or hub name of the frozen reference")
    train.add_argument("--kl-coef", type=float, help=KL_HELP)
    train.add_argument(
        "--prompts", metavar="FILE", help="json, jsonl, csv or parquet with a column prompt, for Text-v0"
    )
    train.add_argument(
        "--dataset", metavar="FILE", help="json, jsonl, csv, parquet or what textrl collect wrote, to learn from"
    )
    train.add_argument("--skip-bad-rows", action="store_true", help="leave bad rows of these files out, and list them")
    train.add_argument("--total-timesteps", type=whole, default=50_000, help="tokens (default: %(default)s)")
    train.add_argument("--log-dir", metavar="RUN", help="where logs and the agent go (default: runs/ENV-AGENT-SEED)")
    train.add_argument("--checkpoint-every", type=whole, metavar="N", help="tokens (default: a tenth of all)")
    train.add_argument(
        "--keep", type=int, default=2, metavar="K", help="newest checkpoints kept (default: %(default)s)"
    )
    train.add_argument("--quiet", action="store_true", help="no bar and no table")
    train.set_defaults(run=train_agent)
    train.set_defaults(untouched=vars(train.parse_args([])))


def train_agent(options: argparse.Namespace) -> None:
    """Trains an agent and saves it, from the beginning or from where a run was stopped."""
    if options.resume is not None:
        changed = [name for name, value in options.untouched.items() if getattr(options, name) != value]
        flags = [f"--{name.replace('_', '-')}" for name in changed if name not in ("agent", "resume", "quiet")]
        if extra := [*flags, *options.rest, *([options.agent] if options.agent else [])]:
            raise ValueError(f"--resume takes everything from the run: leave out {' '.join(extra)}")
        resume_run(Path(options.resume), options.quiet)
        return
    if options.agent is None:
        raise ValueError("AGENT is missing; textrl agents lists them")
    if options.settings and options.rest:
        raise ValueError(f"--settings lists settings and takes none; got {options.rest[0]!r}")
    cls = agent_class(options.agent)
    rest = ["--help"] if options.settings else options.rest
    config = parse_config(cls.config_class, rest, f"textrl train {options.agent}")
    if options.env is None:
        raise ValueError("--env is missing; textrl envs lists the environments")
    id, kwargs = check_env_id(options.env), parse_env_args(options.env_arg, options.prompts is not None)
    files = options.prompts is not None or options.dataset is not None
    check("--skip-bad-rows", True, files or not options.skip_bad_rows, "left out without --prompts and --dataset")
    kwargs |= own_tokenizer(id, kwargs, named(options.model))
    kwargs |= {name: named(kwargs[name]) for name in ("prompts", "tokenizer") if isinstance(kwargs.get(name), str)}
    if options.prompts is not None:
        kwargs |= {"prompts": named(options.prompts), "skip_bad_rows": options.skip_bad_rows}
    for name in ("total_timesteps", "checkpoint_every", "keep"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    name = id.split("/")[-1].lower()
    given = f"runs/{name}-{cls.__name__.lower()}-{config.seed}" if options.log_dir is None else options.log_dir
    folder = as_path("--log-dir", given)
    if holds_run(folder):
        raise ValueError(
            f"--log-dir must be a new folder; {str(folder)!r} holds a run already (--resume {folder} goes on with it)"
        )
    options.reference = named(options.reference)
    run = {
        "agent": options.agent,
        "env": options.env,
        "env_kwargs": {**kwargs, **training_penalty(options, id)},
        "seed": config.seed,
        "config": dataclasses.asdict(config),
        "model": named(options.model),
        "dataset": named(options.dataset),
        "skip_bad_rows": options.skip_bad_rows,
        "total_timesteps": options.total_timesteps,
        "checkpoint_every": options.checkpoint_every or max(1, options.total_timesteps // 10),
        "keep": options.keep,
    }
    check("--log-dir", given, could_be_folder(folder), "a folder, or a new one in a folder that can be written")
    agent = make_agent(run)
    with alone(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN, {**run, "sha256": digest(run)})
        finish_run(agent, run, folder, options.quiet)


def holds_run(folder: Path) -> bool:
    """Whether there is something in a folder that a run has done; one that failed at once has done nothing."""
    from .logging import PROGRESS

    progress = folder / PROGRESS
    begun = bool(Checkpoints(folder, 1).steps()) or (progress.exists() and progress.stat().st_size > 0)
    return (folder / FINAL).exists() or ((folder / RUN).exists() and begun)


def named(given: str | None) -> str | None:
    """A file or folder by its whole path, so that a run can be resumed from anywhere; an id or a hub name as it is."""
    return os.path.realpath(given) if given and (Path(given).exists() or is_file_name(given)) else given


def make_agent(run: dict[str, Any]) -> Agent:
    """The agent of a run as it was when the run began."""
    from .attaching import base_env

    cls = agent_class(run["agent"])
    config = make_config(cls.config_class, None, run["config"])
    env = gym.make_vec(check_env_id(run["env"]), num_envs=config.batch_size, **run["env_kwargs"])
    check("--dataset", None, not cls.needs_dataset or bool(run["dataset"]), f"given for {cls.__name__} to learn")
    extra = {}
    if run["dataset"]:
        takes_task = "task" in inspect.signature(cls.read_dataset).parameters  # another package's may not
        told = {"task": base_env(env).task} if takes_task else {}
        extra["dataset"] = cls.read_dataset(run["dataset"], run["skip_bad_rows"], **told)
    try:
        inspect.signature(cls).bind(env, run["model"], config, **extra)
    except TypeError as error:
        takes = "(env, model, config, **settings), with settings of its own in its config_class"
        raise ValueError(f"agent {run['agent']} must be made as {cls.__name__}{takes} ({error})") from None
    return cls(env, run["model"], config, **extra)


def finish_run(agent: Agent, run: dict[str, Any], folder: Path, quiet: bool) -> None:
    """Learns from the newest checkpoint, or the beginning, to the end."""
    agent.learn(
        run["total_timesteps"],
        log_dir=folder,
        progress_bar=not quiet,
        checkpoint_every=run["checkpoint_every"],
        keep=run["keep"],
        resume=True,
    )
    agent.save(folder / FINAL)
    print(one_line(f"saved {folder / FINAL}; textrl evaluate {folder} scores it"))


def resume_run(folder: Path, quiet: bool) -> None:
    """Goes on with a run that was stopped."""
    run = read_run("--resume", folder, unchanged=True)
    if (folder / FINAL).is_dir():
        print(one_line(f"{folder} is finished; textrl evaluate {folder} scores it"))
        return
    with alone(folder):
        finish_run(make_agent(run), run, folder, quiet)
