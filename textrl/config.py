"""Settings of agents: what all of them take, and checks that name the setting, its value and what would be right."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from .scores import shorten

USER_ERRORS = (ValueError, OSError, gym.error.Error, ImportError, MemoryError, OverflowError)
"""What is raised where something that a user gave is wrong, or is not there."""

ELSEWHERE = {"clip_range": "clip_coef", "clip_range_vf": "clip_value", "n_epochs": "epochs", "cliprange": "clip_coef"}
"""What settings are called in Stable-Baselines3 and TRL, and here."""


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What every agent takes."""

    learning_rate: float | None = None  # step size of AdamW; None: 1e-5 for a given model, 1e-3 for the small default
    warmup: float = 0.0  # the learning rate rises linearly from zero over this first share of `learn`; 0: not
    cooldown: float = 1.0  # the learning rate falls linearly to zero over this last share of `learn`; 0: constant
    batch_size: int = 64  # episodes an update; rounded up to whole groups where a prompt has several
    score_start: float | None = None  # under a KL penalty: the score's weight at first; None: by its spread
    seed: int = 0  # of the weights, the prompts and the samples
    device: str = "auto"  # "auto": the GPU where there is one
    dtype: str = "auto"  # of the weights: "float32", "bfloat16", "float16"; "auto": what the hardware does fast
    max_grad_norm: float = 1.0  # the gradient of each model is clipped to this norm; 0: not at all
    weight_decay: float = 0.0  # of AdamW
    adam_beta2: float = 0.999  # decay of AdamW's mean of squared gradients; a tabular model's is 0.999
    row_clocks: bool = True  # rows of a tabular model have moments and a clock each (`optim.RowAdam`)
    trainable_layers: int | None = None  # only the last so many blocks of the model learn; None: all of it
    max_tokens_per_microbatch: int = 16384  # bounds the memory of a forward and backward pass
    on_score_error: str = "raise"  # when the score of a response fails: "raise", or "drop" the episode and count it
    max_dropped_share: float = 0.25  # of the last 1,000 episodes: a run that drops more than this, or all, stops
    warn_kl: float = 25.0  # nats a response: a KL to the reference above this is warned of
    score_timeout: float | None = None  # seconds that a call of the score may take; None: as long as it likes
    activation_checkpointing: bool = False  # blocks run again in the backward pass: less memory, a third more time

    def __post_init__(self) -> None:
        """Checks the types of all settings and the ranges of those that all agents share."""
        check_types(self)
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float):
                fine = math.isfinite(value) or (math.isinf(value) and not each.name.endswith("_coef"))
                check(each.name, value, fine, "a finite number")
        check("seed", self.seed, 0 <= self.seed < 2**63, "from 0 to below 2**63")
        for name in ("batch_size", "max_tokens_per_microbatch"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        start = self.score_start
        check("score_start", start, start is None or 0 < start <= 1, "above 0 and at most 1, or None")
        rate = self.learning_rate
        check("learning_rate", rate, rate is None or (math.isfinite(rate) and rate >= 0), "a finite number from 0 up")
        for name in ("warmup", "cooldown"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")
        errors = ("raise", "drop")
        check("on_score_error", self.on_score_error, self.on_score_error in errors, f"one of {list(errors)}")
        check("max_dropped_share", self.max_dropped_share, 0 <= self.max_dropped_share <= 1, "from 0 to 1")
        check("warn_kl", self.warn_kl, self.warn_kl > 0, "above 0")
        seconds = self.score_timeout
        longest = int(threading.TIMEOUT_MAX)
        right = f"a number above 0 and at most {longest}, or None"
        check("score_timeout", seconds, seconds is None or 0 < seconds <= longest, right)
        check("adam_beta2", self.adam_beta2, 0 <= self.adam_beta2 < 1, "from 0 to below 1")
        check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a finite number from 0 up")
        check("max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0, "at least 0")


def check(name: str, value: Any, fine: bool, right: str) -> None:
    """Raises a `ValueError` that names an argument, its value and what would be right, unless it is fine."""
    if not fine:
        raise ValueError(f"{name} must be {right}; got {shorten(value, 300)}")


def check_type(name: str, value: Any, annotation: str) -> None:
    """Checks a setting against its annotation, a union of int, float, bool, str and None; others are let pass.

    Raises:
        ValueError: naming the setting, its value and what would be right.
    """
    words = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a text", "None": "None"}
    kinds = [kind.strip() for kind in annotation.split("|")]
    if not set(kinds) <= set(words):
        return
    truth = isinstance(value, (bool, np.bool_))
    fits = {
        "int": isinstance(value, numbers.Integral) and not truth,
        "float": isinstance(value, numbers.Real) and not truth,
        "bool": truth,
        "str": isinstance(value, str),
        "None": value is None,
    }
    told = [words[kind] for kind in kinds if kind != "int" or "float" not in kinds]
    check(name, value, any(fits[kind] for kind in kinds), " or ".join(told))


def check_types(config: Any) -> None:
    """Checks all settings of a config against their annotations; numbers of numpy become Python's, torch's names texts.

    Raises:
        ValueError: naming the setting, its value and what would be right.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic):  # torch and JSON do not take them
            object.__setattr__(config, field.name, value := value.item())
        if type(value).__module__ == "torch" and field.name in ("device", "dtype"):  # by their names
            object.__setattr__(config, field.name, value := str(value).removeprefix("torch."))
        kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)  # without postponed annotations
        check_type(field.name, value, kind)


def is_count(value: Any) -> bool:
    """Whether this is a whole number of at least 1."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number(value: Any) -> bool:
    """Whether this is a number, Python's or NumPy's."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def as_path(name: str, value: Any) -> Path:
    """A path given as one or as a text.

    Raises:
        ValueError: for anything else.
    """
    check(name, value, isinstance(value, (str, os.PathLike)) and str(value) != "" and "\0" not in str(value), "a path")
    return Path(value)


def make_config(config_class: type[Any], config: Any, settings: Mapping[str, Any]) -> Any:
    """A config from its class and keyword settings.

    Raises:
        ValueError: for a setting that does not exist, with the nearest name, or one of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(config_class)}
    for name in settings:
        if name not in known:
            near = [ELSEWHERE[name]] if ELSEWHERE.get(name) in known else difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {sorted(known)}"
            raise ValueError(f"{name!r} is not a setting of {config_class.__name__}{hint}")
    if config is None:
        return config_class(**settings)
    if not isinstance(config, config_class):
        raise ValueError(f"config must be a {config_class.__name__}; got {type(config).__name__}")
    return dataclasses.replace(config, **settings)
