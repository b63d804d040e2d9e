"""What a user typed, as what it names: agents, environments, settings; errors of one line with the nearest names."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NoReturn

import gymnasium as gym

from .registration import models_tokenizer, registered

if TYPE_CHECKING:
    from .agent import Agent

KL_COEF = 0.1
"""The weight of the KL penalty in training to a reference for which none is given."""
KL_HELP = f"weight of the KL penalty (default: the environment's, or {KL_COEF} with a --reference)"
USER_ERRORS = (ValueError, OSError, gym.error.Error, ImportError, MemoryError, OverflowError)
"""What is raised where something that a user gave is wrong, or is not there."""


ELSEWHERE = {
    "kl_coef": "a flag of its own: --kl-coef",
    "reference": "a flag of its own: --reference",
    "num_envs": "not to be given: an agent has one environment for each episode of a batch",
    "render_mode": "not to be given: textrl play shows episodes",
    "id": "a flag of its own: --env",
    **dict.fromkeys(("task", "wrappers"), "not to be given: --env names the task as it is registered"),
    **dict.fromkeys(
        ("vectorization_mode", "vector_kwargs", "autoreset_mode", "disable_env_checker"),
        "not to be given: the native vector environment is what agents sample from",
    ),
}
"""Arguments of every environment that `--env-arg` does not set."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message on stderr and exits with 2."""
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise SystemExit(2)


def agent_classes() -> dict[str, type[Agent]]:
    """Our own agents and those that other packages name in the entry-point group `textrl.agents`.

    One that cannot be imported is left out with a warning.
    """
    agents = importlib.import_module("textrl.agents")
    found = {name: getattr(agents, name) for name in agents.__all__}
    for entry in entry_points(group="textrl.agents"):
        try:
            found[entry.name] = agent_at(entry.value)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    return found


def agent_at(place: str) -> type[Agent]:
    """The agent at "module:Class".

    Raises:
        ValueError: where there is none, or its module cannot be imported.
    """
    from .agent import Agent

    module, _, attribute = place.partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever somebody's module raises
        raise ValueError(f"agent {place!r} cannot be imported: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, Agent)):
        raise ValueError(f"agent must be a subclass of textrl.Agent; {place!r} is {cls!r}")
    if cls.update is Agent.update:
        raise ValueError(f"agent {place!r} must define update(rollout)")
    return cls


def agent_class(name: str) -> type[Agent]:
    """The agent called `name` (in any case), or "module:Class".

    Raises:
        ValueError: for a name nobody has, with the nearest.
    """
    if ":" in name:
        sys.path.insert(0, "")
        try:
            return agent_at(name)
        finally:
            sys.path.pop(0)
    for entry in entry_points(group="textrl.agents"):
        if entry.name.lower() == name.lower():
            return agent_at(entry.value)
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
        sys.path.insert(0, "")
        try:
            importlib.import_module(module)
        except Exception as error:  # a module may raise what it likes
            raise ValueError(f"env {id!r} cannot be imported: {type(error).__name__}: {error}") from None
        finally:
            sys.path.pop(0)
    known = list(registered())
    if plain not in known:
        raise ValueError(f"unknown env {plain!r}; {nearest(plain, known)}")
    return plain


def whole(text: str) -> int:
    """A whole number, also as 1e6 or 1_000_000."""
    try:
        number = Decimal(text)
        if number == int(number):
            return int(number)
    except (InvalidOperation, ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}")


def parse_env_args(pairs: list[str], prompts_given: bool = False) -> dict[str, Any]:
    """NAME=VALUE texts as keyword arguments; a value is JSON where it can be, else text.

    Raises:
        ValueError: for what is no such text, or has a flag: always, or, for prompts, where that flag is given.
    """
    out: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env-arg must be NAME=VALUE; got {pair!r}")
        try:
            out[name] = json.loads(value)
        except ValueError:  # no JSON, or a number of thousands of digits
            out[name] = value
        except RecursionError:
            raise ValueError(f"--env-arg {name} is JSON too deeply nested") from None
        if name in ELSEWHERE:
            raise ValueError(f"--env-arg {name} is {ELSEWHERE[name]}")
        if prompts_given and name in ("prompts", "skip_bad_rows"):
            raise ValueError(f"--env-arg {name} must be left out with --prompts")
    return out


def own_tokenizer(id: str, kwargs: Mapping[str, Any], model: str | None) -> dict[str, str]:
    """The argument `tokenizer` of an environment that takes one and was given none: that of `--model`."""
    return models_tokenizer(registered()[id], {**gym.registry[id].kwargs, **kwargs}, model)


def given_penalty(options: argparse.Namespace) -> dict[str, Any]:
    """The reference and the weight of the penalty, where they were given: an environment may have its own."""
    penalty = {name: getattr(options, name) for name in ("reference", "kl_coef")}
    return {name: value for name, value in penalty.items() if value is not None}


def training_penalty(options: argparse.Namespace, id: str) -> dict[str, Any]:
    """`given_penalty`; a reference that comes without a weight, from the environment neither, has `KL_COEF`."""
    penalty = given_penalty(options)
    missing = "reference" in penalty and not gym.registry[id].kwargs.get("kl_coef")
    return {"kl_coef": KL_COEF, **penalty} if missing else penalty


def parse_config(config_class: type[Any], arguments: list[str], prog: str) -> Any:
    """A config dataclass from command-line flags, one a field; the comment beside a field is its help."""
    parser = Parser(prog=prog, allow_abbrev=False, description=inspect.getdoc(config_class))
    comments = field_comments(config_class)
    for field in dataclasses.fields(config_class):
        flag = "--" + field.name.replace("_", "-")
        kinds = [kind for kind in ("bool", "int", "float", "str") if kind in str(field.type)]
        help = f"{comments.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        if kinds == ["bool"]:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=help)
        elif kinds:
            kind = {"bool": bool, "int": int, "float": float, "str": str}[kinds[0]]
            many = "+" if str(field.type).startswith("tuple") else None
            parser.add_argument(flag, type=kind, nargs=many, default=field.default, metavar=kinds[0].upper(), help=help)
    parsed = parser.parse_args(arguments)
    return config_class(**{name: tuple(x) if isinstance(x, list) else x for name, x in vars(parsed).items()})


def field_comments(config_class: type[Any]) -> dict[str, str]:
    """The comment beside each field of a dataclass, those it inherits too."""
    comments: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(cls):
            comments |= dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    return comments
