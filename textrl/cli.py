"""The command line: `textrl envs | agents | train | evaluate | report | collect | ope | play | doctor | rlhf`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from . import logged
from .checkup import doctor_parser
from .config import as_path, check, make_config
from .disk import could_be_folder
from .files import is_file_name
from .flags import (
    FINAL,
    RUN,
    USER_ERRORS,
    Parser,
    agent_class,
    check_env_id,
    finished_run,
    own_tokenizer,
    parse_config,
    parse_env_args,
    read_run,
    training_penalty,
    whole,
)
from .listing import list_agents, list_envs
from .play import play_parser
from .render import escape

if TYPE_CHECKING:
    from .agent import Agent


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: default: those of the process.

    Returns:
        0; 1 where `doctor` finds a fault; or 2 with one line on stderr for what the user got wrong.
    """
    parser = Parser(prog="textrl", description="Text generation as reinforcement learning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    envs = commands.add_parser("envs", help="list the environments, or show the page of one")
    envs.add_argument("id", metavar="ID", nargs="?", help="whose page; default: the list")
    envs.set_defaults(run=list_envs)
    agents = commands.add_parser("agents", help="list the agents, or show what one of them does")
    agents.add_argument("agent", metavar="AGENT", nargs="?", help="which; default: the list")
    agents.set_defaults(run=list_agents)
    _train_parser(commands)
    evaluate = commands.add_parser("evaluate", help="score a trained agent on fresh episodes")
    evaluate.add_argument("folder", metavar="RUN", help="the --log-dir of a run")
    evaluate.add_argument("--episodes", type=int, default=1000, help="how many (default: %(default)s)")
    evaluate.add_argument("--seed", type=int, default=12345, help="of prompts and samples (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=evaluate_run)
    report = commands.add_parser("report", help="write RUN/report.html, the page of a run, and print its main figures")
    report.add_argument("folder", metavar="RUN", help="the --log-dir of a run, of train or of rlhf")
    report.set_defaults(run=report_run)
    logged.add_parsers(commands)
    play_parser(commands)
    doctor_parser(commands)
    _rlhf_parser(commands)
    options, rest = parser.parse_known_args(arguments)
    try:
        if rest and options.command not in ("train", "rlhf"):
            raise ValueError(f"unknown argument {rest[0]!r}; see textrl {options.command} --help")
        options.rest = rest
        if options.command not in ("envs", "agents"):
            quiet_libraries()
        with warnings.catch_warnings():
            warnings.showwarning = one_line_warning
            code = options.run(options)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        sys.stderr.write(f"textrl: error: {one_line(error)}\n")
        return 2
    except KeyboardInterrupt as error:
        sys.stderr.write(f"textrl: interrupted{f'; {one_line(error)}' if str(error) else ''}\n")
        return 130
    return code or 0


def one_line(message: object) -> str:
    """A message without line breaks and without control characters that a file or a model may have put there."""
    return escape(" ".join(str(message).split()))


def one_line_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Shows a warning without the line of code it comes from."""
    sys.stderr.write(f"textrl: warning: {one_line(message)}\n")


def quiet_libraries() -> None:
    """Leaves the terminal to us: no bars and no advice of transformers and datasets, errors only."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


# ---- train ---------------------------------------------------------------------------------------------------


def _train_parser(commands: Any) -> None:
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
    train.add_argument("--kl-coef", type=float, help="weight of the KL penalty (default: the environment's, or 0.1)")
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
    from .checkpoint import write_json

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
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN, run)
    finish_run(agent, run, folder, options.quiet)


def holds_run(folder: Path) -> bool:
    """Whether there is something in a folder that a run has done; one that failed at once has done nothing."""
    from .logging import PROGRESS
    from .runs import Checkpoints

    progress = folder / PROGRESS
    begun = bool(Checkpoints(folder, 1).steps()) or (progress.exists() and progress.stat().st_size > 0)
    return (folder / FINAL).exists() or ((folder / RUN).exists() and begun)


def named(given: str | None) -> str | None:
    """A file or folder by its whole path, so that a run can be resumed from anywhere; an id or a hub name as it is."""
    return os.path.realpath(given) if given and (Path(given).exists() or is_file_name(given)) else given


def make_agent(run: dict[str, Any]) -> Agent:
    """The agent of a run as it was when the run began."""
    cls = agent_class(run["agent"])
    config = make_config(cls.config_class, None, run["config"])
    env = gym.make_vec(check_env_id(run["env"]), num_envs=config.batch_size, **run["env_kwargs"])
    check("--dataset", None, not cls.needs_dataset or bool(run["dataset"]), f"given for {cls.__name__} to learn")
    extra = {"dataset": cls.read_dataset(run["dataset"], run["skip_bad_rows"])} if run["dataset"] else {}
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
    run = read_run("--resume", folder)
    if (folder / FINAL).is_dir():
        print(one_line(f"{folder} is finished; textrl evaluate {folder} scores it"))
        return
    finish_run(make_agent(run), run, folder, quiet)


# ---- evaluate ------------------------------------------------------------------------------------------------


def evaluate_run(options: argparse.Namespace) -> None:
    """Prints the mean score of a run's agent, and its share of the best possible where that is known."""
    from .policy import few_threads
    from .trained import trained_agent

    if options.episodes < 1:
        raise ValueError(f"--episodes must be at least 1; got {options.episodes}")
    folder = Path(options.folder)
    agent = trained_agent(folder / FINAL, finished_run("RUN", folder), options.seed)
    with few_threads(agent.model):
        rollout = agent.respond([agent.task.sample(agent.rng) for _ in range(options.episodes)])
    out = {key.removeprefix("rollout/"): value for key, value in rollout.metrics().items()}
    if options.episodes > 1:
        out["score_standard_error"] = out["score_std"] / (options.episodes - 1) ** 0.5
    out["episodes"] = options.episodes
    if (best := getattr(agent.task, "best_score", None)) is not None:
        out["best_score"] = best
        if best > 0:
            out["share_of_best"] = out["score"] / best
    if options.json:
        print(json.dumps(out, indent=2))
        return
    for key, value in out.items():
        print(f"{key:<22} {value:.4g}")


# ---- report --------------------------------------------------------------------------------------------------


def report_run(options: argparse.Namespace) -> None:
    """Writes the page of a run from what lies in its folder, and prints the main figures."""
    from textrl.agents.rlhf_report import is_rlhf, report_rlhf

    from .run_report import report_training

    folder = Path(options.folder)
    print(report_rlhf(folder) if is_rlhf(folder) else report_training(folder))


# ---- rlhf ----------------------------------------------------------------------------------------------------


def _rlhf_parser(commands: Any) -> None:
    rlhf = commands.add_parser(
        "rlhf", help="a real language model, real human ratings: SFT, reward model, PPO, report", add_help=False
    )
    rlhf.set_defaults(run=run_rlhf)


def run_rlhf(options: argparse.Namespace) -> None:
    """The three steps of RLHF on real data, and the report."""
    from textrl.agents.rlhf import RLHFConfig, rlhf

    rlhf(parse_config(RLHFConfig, options.rest, "textrl rlhf"))


if __name__ == "__main__":
    raise SystemExit(main())
