"""The command line: `textrl envs | agents | train | evaluate | report | collect | ope | play | doctor | rlhf`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import cli_logged
from .cli_doctor import doctor_parser
from .cli_flags import Parser, parse_config
from .cli_list import list_agents, list_envs
from .cli_play import play_parser
from .cli_train import train_parser
from .config import USER_ERRORS
from .render import one_line
from .runs import FINAL
from .trained import finished_run, played, trained_agent


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: default: those of the process.

    Returns:
        0; 1 where `doctor` finds a fault; or 2 with one line on stderr for what the user got wrong.
    """
    parser = Parser(prog="textrl", description="Text generation as reinforcement learning.")
    parser.add_argument("--version", action="version", version=version("gymnasium-textrl"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    envs = commands.add_parser("envs", help="list the environments, or show the page of one")
    envs.add_argument("id", metavar="ID", nargs="?", help="whose page; default: the list")
    envs.set_defaults(run=list_envs)
    agents = commands.add_parser("agents", help="list the agents, or show what one of them does")
    agents.add_argument("agent", metavar="AGENT", nargs="?", help="which; default: the list")
    agents.set_defaults(run=list_agents)
    train_parser(commands)
    evaluate = commands.add_parser("evaluate", help="score a trained agent on fresh episodes")
    evaluate.add_argument("folder", metavar="RUN", help="the --log-dir of a run")
    evaluate.add_argument("--episodes", type=int, default=1000, help="how many (default: %(default)s)")
    evaluate.add_argument("--seed", type=int, default=12345, help="of prompts and samples (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=evaluate_run)
    report = commands.add_parser("report", help="write RUN/report.html, the page of a run, and print its main figures")
    report.add_argument("folder", metavar="RUN", help="the --log-dir of a run, of train or of rlhf")
    report.set_defaults(run=report_run)
    cli_logged.add_parsers(commands)
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


# ---- evaluate ------------------------------------------------------------------------------------------------


def evaluate_run(options: argparse.Namespace) -> None:
    """Prints the mean score of a run's agent, and its share of the best possible where that is known."""
    from .models import few_threads

    if options.episodes < 1:
        raise ValueError(f"--episodes must be at least 1; got {options.episodes}")
    folder = Path(options.folder)
    agent = trained_agent(folder / FINAL, finished_run("RUN", folder), options.seed, options.episodes)
    with few_threads(agent.model):
        rollout = played(agent)
    out = {key.removeprefix("rollout/"): value for key, value in rollout.metrics().items()}
    if len(rollout) > 1:
        out["score_standard_error"] = out["score_std"] / (len(rollout) - 1) ** 0.5
    out["episodes"] = len(rollout)
    if rollout.dropped:
        out["dropped"] = len(rollout.dropped)
    if (best := agent.task.best_score) is not None:
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
