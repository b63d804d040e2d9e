"""What a user typed after flags, as arguments and settings; errors are one line."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn

import gymnasium as gym

from .registration import models_tokenizer, registered

KL_COEF = 0.1
"""The weight of the KL penalty in training to a reference for which none is given."""
KL_HELP = f"weight of the KL penalty (default: the environment's, or {KL_COEF} with a --reference)"

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


def whole(text: str) -> int:
    """A whole number, also as 1e6 or 1_000_000."""
    try:
        number = Decimal(text)
        if number.adjusted() >= 19 and number.is_finite() and number:
            raise argparse.ArgumentTypeError(f"must be below 1e19; got {text[:40]!r}")
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
