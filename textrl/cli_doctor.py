"""The command `textrl doctor`: what it takes, and what it prints."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import gymnasium as gym

from .cli_flags import KL_HELP, own_tokenizer, parse_env_args, training_penalty
from .plugins import check_env_id
from .render import escape


def doctor_parser(commands: Any) -> None:
    """Adds the command."""
    doctor = commands.add_parser("doctor", help="check an environment and a model before training")
    doctor.add_argument("env", metavar="ENV", help="see textrl envs")
    doctor.add_argument("--env-arg", action="append", default=[], metavar="NAME=VALUE", help="as for train")
    doctor.add_argument("--model", help="folder or hub name of a causal language model (default: a small random one)")
    doctor.add_argument("--reference", help="folder or hub name of the frozen reference")
    doctor.add_argument("--kl-coef", type=float, help=KL_HELP)
    doctor.add_argument("--prompts", metavar="FILE", help="as for train")
    doctor.add_argument("--trainable-layers", type=int, metavar="N", help="as for train")
    doctor.add_argument("--seed", type=int, default=0, help="of prompts and samples (default: %(default)s)")
    doctor.set_defaults(run=run_doctor)


def run_doctor(options: argparse.Namespace) -> int:
    """Prints what each check found; 1 if there is a fault."""
    from .agent import Agent
    from .doctor import Finding, diagnose
    from .models import few_threads, strange_tokenizer

    kwargs = parse_env_args(options.env_arg, options.prompts is not None)
    if options.prompts is not None:
        kwargs["prompts"] = options.prompts
    id = check_env_id(options.env)
    kwargs |= training_penalty(options, id)
    kwargs |= own_tokenizer(id, kwargs, options.model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was saved with another tokenizer")  # said below
        env = gym.make(id, disable_env_checker=True, **kwargs)
        agent = Agent(env, options.model, seed=options.seed, trainable_layers=options.trainable_layers)
    found = []
    for called in ("model", "reference"):
        if strange := strange_tokenizer(getattr(options, called), agent.tokenizer, called):
            found.append(Finding("tokenizer", False, strange))
    with few_threads(agent.model):
        found += diagnose(agent)
    for finding in found:
        print(escape(str(finding)))
    return int(not all(finding.fine for finding in found))
