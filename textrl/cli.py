"""The command line: `textrl envs | agents | train | evaluate | rlhf`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import gymnasium as gym

from .registration import make_task, registered, task_class

if TYPE_CHECKING:
    from .agent import Agent

RUN = "run.json"
"""In a run's folder: which agent, environment and seed it was."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message on stderr and exits with 2."""
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise SystemExit(2)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: default: those of the process.

    Returns:
        0, or 2 with one line on stderr for what the user got wrong.
    """
    parser = Parser(prog="textrl", description="Text generation as reinforcement learning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands.add_parser("envs", help="list the environments").set_defaults(run=list_envs)
    commands.add_parser("agents", help="list the agents").set_defaults(run=list_agents)
    _train_parser(commands)
    evaluate = commands.add_parser("evaluate", help="score a trained agent on fresh episodes")
    evaluate.add_argument("folder", metavar="RUN", help="the --log-dir of a run")
    evaluate.add_argument("--episodes", type=int, default=1000, help="how many (default: %(default)s)")
    evaluate.add_argument("--seed", type=int, default=12345, help="of prompts and samples (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=evaluate_run)
    _rlhf_parser(commands)
    options, rest = parser.parse_known_args(arguments)
    try:
        if rest and options.command not in ("train", "rlhf"):
            raise ValueError(f"unknown argument {rest[0]!r}; see textrl {options.command} --help")
        options.rest = rest
        if options.command in ("train", "evaluate", "rlhf"):
            quiet_libraries()
        options.run(options)
    except (ValueError, OSError, gym.error.Error, ImportError) as error:
        sys.stderr.write(f"textrl: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("textrl: interrupted\n")
        return 130
    return 0


def quiet_libraries() -> None:
    """Leaves the terminal to us: no bars and no advice of transformers and datasets, errors only."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


# ---- envs and agents -----------------------------------------------------------------------------------------


def list_envs(options: argparse.Namespace) -> None:
    """Prints the table of registered environments."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("id", "vocabulary", "horizon", "responses", "best score", "teaches"):
        table.add_column(name, justify="left" if name in ("id", "teaches") else "right")
    for id, where in registered().items():
        table.add_row(*env_cells(id, where))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def env_cells(id: str, where: Any) -> list[str]:
    """An environment's row of the table; dashes where its task cannot be made here and now (data not fetched yet)."""
    try:
        cls = task_class(where)
    except ValueError:
        return [id, *"----", ""]
    page = " ".join((inspect.getdoc(cls) or "").split())
    found = re.search(r"What it teaches: (.*?)(?: Optimum:|$)", page)
    teaches = found[1] if found else ""
    best = getattr(cls, "best_score", None)
    if not getattr(cls, "at_hand", lambda: True)():
        return [id, *"----", teaches]
    try:
        task = make_task(where)
    except (ValueError, OSError, ImportError):
        return [id, *"----", teaches]
    vocabulary, horizon = task.vocab_size, task.max_new_tokens
    # every string of tokens other than the end, ended or cut at the horizon
    responses = sum((vocabulary - 1) ** t for t in range(horizon)) + (vocabulary - 1) ** horizon
    size = str(responses) if responses < 10**7 else f"1e{len(str(responses)) - 1}"
    return [id, str(vocabulary), str(horizon), size, "-" if best is None else f"{best:g}", teaches]


def list_agents(options: argparse.Namespace) -> None:
    """Prints every agent with the first line of its file."""
    for name, cls in agent_classes().items():
        page = inspect.getmodule(cls).__doc__ or cls.__doc__ or ""  # type: ignore[union-attr]
        print(f"{name.lower():<12} {page.strip().splitlines()[0]}")


def agent_classes() -> dict[str, type[Agent]]:
    """Our own agents and those that other packages name in the entry-point group `textrl.agents`."""
    agents = importlib.import_module("textrl.agents")
    found = {name: getattr(agents, name) for name in agents.__all__}
    for entry in entry_points(group="textrl.agents"):
        found[entry.name] = entry.load()
    return found


def agent_class(name: str) -> type[Agent]:
    """The agent called `name` (in any case), or "module:Class".

    Raises:
        ValueError: for a name nobody has, with the nearest.
    """
    from .agent import Agent

    if ":" in name:
        module, _, attribute = name.partition(":")
        sys.path.insert(0, "")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"agent {name!r} cannot be imported: {error}") from None
        finally:
            sys.path.pop(0)
        if not (isinstance(cls, type) and issubclass(cls, Agent)):
            raise ValueError(f"agent must be a subclass of textrl.Agent; {name!r} is {cls!r}")
        return cls
    known = {key.lower(): cls for key, cls in agent_classes().items()}
    if name.lower() not in known:
        raise ValueError(f"unknown agent {name!r}; {nearest(name.lower(), list(known))}")
    return known[name.lower()]


def nearest(name: str, known: list[str]) -> str:
    """A question with the nearest names, or all there are."""
    near = difflib.get_close_matches(name, known, 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"


def check_env_id(id: str) -> str:
    """The id, if it is registered (after importing its module, for "module:id").

    Raises:
        ValueError: otherwise, with the nearest ids.
    """
    module, _, plain = id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"env {id!r} cannot be imported: {error}") from None
    known = list(registered())
    if plain not in known:
        raise ValueError(f"unknown env {plain!r}; {nearest(plain, known)}")
    return plain


# ---- train ---------------------------------------------------------------------------------------------------


def _train_parser(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train an agent on an environment",
        description="Trains an agent. Its settings are flags too: textrl train AGENT --settings lists them.",
        allow_abbrev=False,
    )
    train.add_argument("agent", metavar="AGENT", help="see textrl agents; or module:Class")
    train.add_argument("--settings", action="store_true", help="list the agent's own settings, and stop")
    train.add_argument("--env", metavar="ID", help="see textrl envs")
    train.add_argument(
        "--env-arg", action="append", default=[], metavar="NAME=VALUE", help="argument of the environment, JSON or text"
    )
    train.add_argument("--model", help="folder or hub name of a causal language model (default: a small random one)")
    train.add_argument("--reference", help="folder or hub name of the frozen reference")
    train.add_argument("--kl-coef", type=float, default=0.0, help="weight of the KL penalty (default: %(default)s)")
    train.add_argument("--dataset", metavar="FILE", help="jsonl, csv or parquet, for agents that learn from one")
    train.add_argument("--total-timesteps", type=int, default=50_000, help="tokens (default: %(default)s)")
    train.add_argument("--log-dir", metavar="RUN", help="where logs and the agent go (default: runs/ENV-AGENT-SEED)")
    train.add_argument("--quiet", action="store_true", help="no bar and no table")
    train.set_defaults(run=train_agent)


def train_agent(options: argparse.Namespace) -> None:
    """Trains an agent and saves it."""
    cls = agent_class(options.agent)
    rest = ["--help"] if options.settings else options.rest
    config = parse_config(cls.config_class, rest, f"textrl train {options.agent}")
    if options.env is None:
        raise ValueError("--env is missing; textrl envs lists the environments")
    id, kwargs = check_env_id(options.env), parse_env_args(options.env_arg)
    if options.total_timesteps < 1:
        raise ValueError(f"--total-timesteps must be at least 1; got {options.total_timesteps}")
    env_kwargs = {**kwargs, "reference": options.reference, "kl_coef": options.kl_coef}
    env = gym.make_vec(id, num_envs=config.batch_size, **env_kwargs)
    name = id.split("/")[-1].lower()
    folder = Path(options.log_dir or f"runs/{name}-{cls.__name__.lower()}-{config.seed}")
    if (folder / "final").exists() or (folder / RUN).exists():
        raise ValueError(f"--log-dir must be a new folder; {str(folder)!r} holds a run already")
    extra = {"dataset": read_rows(options.dataset)} if options.dataset else {}
    agent = cls(env, options.model, config, **extra)
    folder.mkdir(parents=True, exist_ok=True)
    run = {"agent": options.agent, "env": options.env, "env_kwargs": env_kwargs, "seed": config.seed}
    (folder / RUN).write_text(json.dumps(run, indent=2) + "\n")
    agent.learn(options.total_timesteps, log_dir=folder, progress_bar=not options.quiet)
    agent.save(folder / "final")
    print(f"saved {folder / 'final'}; textrl evaluate {folder} scores it")


def read_rows(path: str) -> Any:
    """A dataset from a jsonl, json, csv or parquet file."""
    import datasets

    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    kind = kinds.get(Path(path).suffix)
    if kind is None or not Path(path).is_file():
        raise ValueError(f"--dataset must be a file that ends in one of {sorted(kinds)}; got {path!r}")
    return datasets.load_dataset(kind, data_files=path, split="train")


def parse_env_args(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE texts as keyword arguments; a value is JSON where it can be, else text."""
    out: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env-arg must be NAME=VALUE; got {pair!r}")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


def parse_config(config_class: type[Any], arguments: list[str], prog: str) -> Any:
    """A config dataclass from command-line flags, one a field; the comment beside a field is its help."""
    parser = Parser(prog=prog, add_help=True, description=inspect.getdoc(config_class))
    comments = field_comments(config_class)
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        kinds = [kind for kind in ("bool", "int", "float", "str") if kind in str(field.type)]
        help = f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        if kinds == ["bool"]:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=help)
        elif kinds:
            kind = {"int": int, "float": float, "str": str}[kinds[0]]
            parser.add_argument(flag, type=kind, default=field.default, metavar=kinds[0].upper(), help=help)
    parsed = parser.parse_args(arguments)
    return config_class(**vars(parsed))


def field_comments(config_class: type[Any]) -> dict[str, str]:
    """The comment beside each field of a dataclass, those it inherits too."""
    comments: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(cls):
            comments |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    return comments


# ---- evaluate ------------------------------------------------------------------------------------------------


def evaluate_run(options: argparse.Namespace) -> None:
    """Prints the mean score of a run's agent, and its share of the best possible where that is known."""
    from .policy import few_threads
    from .rollout import collect_sampled

    if options.episodes < 1:
        raise ValueError(f"--episodes must be at least 1; got {options.episodes}")
    folder = Path(options.folder)
    try:
        run = json.loads((folder / RUN).read_text())
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"RUN must be the --log-dir of a textrl train; {str(folder)!r} has no {RUN}") from None
    if not (folder / "final").is_dir():
        raise ValueError(f"run {str(folder)!r} has no agent in {folder / 'final'}: it did not end")
    env = gym.make_vec(check_env_id(run["env"]), num_envs=1, **run["env_kwargs"])
    cls = agent_class(run["agent"])
    agent = load_for_evaluation(cls, folder / "final", env, options.seed)
    with few_threads(agent.model):
        rollout = collect_sampled(agent.base, agent.policy, options.episodes, rng=agent.rng, generator=agent.generator)
    out = {key.removeprefix("rollout/"): value for key, value in rollout.metrics().items()}
    out["score_standard_error"] = out["score_std"] / options.episodes**0.5
    out["episodes"] = options.episodes
    if (best := getattr(agent.task, "best_score", None)) is not None:
        out["best_score"] = best
        out["share_of_best"] = out["score"] / best
    if options.json:
        print(json.dumps(out, indent=2))
        return
    for key, value in out.items():
        print(f"{key:<22} {value:.4g}")


def load_for_evaluation(cls: type[Agent], folder: Path, env: Any, seed: int) -> Agent:
    """The saved policy under the plain `Agent`: what an agent needs only to learn is left on disk."""
    from .agent import Agent
    from .checkpoint import read_manifest

    manifest = read_manifest(folder)
    if manifest["agent"] != cls.__name__:
        raise ValueError(f"folder {str(folder)!r} holds a {manifest['agent']}, not a {cls.__name__}")
    return Agent(env, str(folder), seed=seed, dtype=manifest["config"]["dtype"])


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
