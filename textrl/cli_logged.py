"""`textrl collect` and `textrl ope`: logged episodes written by one policy, and what they say about another."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from .cli_flags import KL_HELP, own_tokenizer, parse_env_args, training_penalty
from .plugins import check_env_id
from .render import escape
from .runs import FINAL
from .trained import finished_run, trained_agent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .agent import Agent


def add_parsers(commands: Any) -> None:
    """Adds the two commands."""
    collect = commands.add_parser("collect", help="play episodes and write them as a Minari dataset")
    collect.add_argument("--dataset", required=True, metavar="NEW", help="folder or Minari id to write")
    collect.add_argument("--episodes", type=int, default=1000, help="how many (default: %(default)s)")
    collect.add_argument("--seed", type=int, default=0, help="of prompts and samples (default: %(default)s)")
    _policy_flags(collect, "who plays")
    collect.set_defaults(run=collect_episodes)
    ope = commands.add_parser("ope", help="evaluate a policy on logged episodes, without playing")
    ope.add_argument("--dataset", required=True, metavar="LOGGED", help="Minari folder or id, or a file of rows")
    ope.add_argument("--penalised", action="store_true", help="score - kl_coef * KL in place of the score")
    ope.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    ope.add_argument("--json", action="store_true", help="print JSON")
    _policy_flags(ope, "who is evaluated")
    ope.set_defaults(run=evaluate_logged)


def _policy_flags(parser: argparse.ArgumentParser, who: str) -> None:
    parser.add_argument("folder", metavar="RUN", nargs="?", help=f"{who}: the agent of a run's --log-dir; or")
    parser.add_argument("--env", metavar="ID", help="an environment, with")
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: a small random one)")
    parser.add_argument("--env-arg", action="append", default=[], metavar="NAME=VALUE", help="argument of --env")
    parser.add_argument("--reference", help="folder or hub name of the frozen reference")
    parser.add_argument("--kl-coef", type=float, help=KL_HELP)
    parser.add_argument("--prompts", metavar="FILE", help="json, jsonl, csv or parquet with a column prompt")


def env_and_model(options: argparse.Namespace) -> tuple[Any, Agent | PreTrainedModel | str]:
    """The environment and the policy that a user named: those of a run, or an id and a model.

    Raises:
        ValueError: for both, neither, or a run that is none or did not end.
    """
    from .attaching import base_env
    from .models import small_model

    if (options.folder is None) == (options.env is None):
        raise ValueError("either RUN or --env must be given, and not both; textrl envs lists the environments")
    if options.folder is None:
        kwargs = parse_env_args(options.env_arg, options.prompts is not None)
        if options.prompts is not None:
            kwargs["prompts"] = options.prompts
        id = check_env_id(options.env)
        kwargs |= training_penalty(options, id) | own_tokenizer(id, kwargs, options.model)
        env = gym.make_vec(id, num_envs=1, **kwargs)
        task = base_env(env).task
        length = task.max_prompt_tokens + task.max_new_tokens
        return env, options.model or small_model(task.vocab_size, length)
    for name in ("model", "env_arg", "reference", "kl_coef", "prompts"):
        if getattr(options, name) not in (None, []):
            raise ValueError(f"--{name.replace('_', '-')} goes with --env; a RUN has its own")
    folder = Path(options.folder)
    agent = trained_agent(folder / FINAL, finished_run("RUN", folder), seed=0)
    return agent.env, agent


def collect_episodes(options: argparse.Namespace) -> None:
    """Writes the dataset and says where it is."""
    from .collecting import collect

    env, model = env_and_model(options)
    dataset = collect(env, model, options.episodes, options.dataset, options.seed)
    print(escape(f"wrote {dataset.total_episodes} episodes, {dataset.total_steps} tokens: {options.dataset}"))


def evaluate_logged(options: argparse.Namespace) -> None:
    """Prints each estimator with its confidence interval, and whether the batch can tell."""
    from .episodes import logged_source
    from .ope import ope

    env, model = env_and_model(options)
    source = logged_source(options.dataset)
    found = ope(source, model, env, penalised=options.penalised, confidence=options.confidence)
    if options.json:
        estimates = {name: vars(each) for name, each in found.estimates.items()}
        numbers = {**vars(found), "estimates": estimates, "mean_weight": vars(found.mean_weight)}
        print(json.dumps(_finite({**numbers, "can_tell": found.can_tell}), indent=2))
        return
    print(f"{'logged policy':<22} {found.logged:8.4f}")
    for name, each in found.estimates.items():
        print(f"{name:<22} {each.value:8.4f}  [{each.low:.4f}, {each.high:.4f}]")
    print(f"{'effective sample size':<22} {found.effective_sample_size:8.1f}  of {found.episodes}")
    print(f"{'mean weight':<22} {found.mean_weight.value:8.4f}  of 1")
    if not found.covered:
        print("the mean weight is below 1: the policy says much that no episode holds, so this batch cannot tell")
    elif not found.can_tell:
        print("too few episodes count for these intervals to mean anything: this batch cannot tell")


def _finite(value: Any) -> Any:
    """The same numbers, None for those that JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
