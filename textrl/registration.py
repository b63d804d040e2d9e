"""Ids for tasks: `gym.make` and `gym.make_vec` reach every registered task, textrl's own and anybody's."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from .config import check, check_type
from .env import TextEnv
from .scores import shorten
from .symbols import load_tokenizer
from .task import Task
from .vector import TextVectorEnv

BUILT_IN = {
    "textrl/Bandit-v0": "textrl.envs.bandit:Bandit",
    "textrl/Copy-v0": "textrl.envs.copy:Copy",
    "textrl/Reverse-v0": "textrl.envs.reverse:Reverse",
    "textrl/Vowels-v0": "textrl.envs.vowels:Vowels",
    "textrl/Increasing-v0": "textrl.envs.increasing:Increasing",
    "textrl/Brackets-v0": "textrl.envs.brackets:Brackets",
    "textrl/Arithmetic-v0": "textrl.envs.arithmetic:Arithmetic",
    "textrl/Stop-v0": "textrl.envs.stop:Stop",
    "textrl/RandomWalk-v0": "textrl.envs.random_walk:RandomWalk",
    "textrl/ProxyGold-v0": "textrl.envs.proxy_gold:ProxyGold",
    "textrl/Refusal-v0": "textrl.envs.refusal:Refusal",
    "textrl/Dice-v0": "textrl.envs.dice:Dice",
    "textrl/Text-v0": "textrl.envs.text:Text",
    "textrl/Reviews-v0": "textrl.envs.reviews:Reviews",
}
"""Adding an environment is one file in envs/ and one line here."""


class BadArgument(TypeError, ValueError):
    """A task was given an argument that it does not take, or of the wrong type.

    A `TypeError` too, because clients probe for arguments so.
    """


ENTRY_POINT = "textrl.registration:make_env"


def register(id: str, task: type[Task] | str, **kwargs: Any) -> None:
    """Makes a task reachable under an id, for `gym.make` and `gym.make_vec`.

    Args:
        id: "namespace/Name-v0".
        task: the class, or "module:Class", which is imported when the first environment is made.
        kwargs: defaults of its constructor, and of `TextEnv` (reference, kl_coef, temperature). Of a task that is
            registered again, the last ones hold.

    Raises:
        ValueError: for something that is neither, or an id already taken by another task.
    """
    if isinstance(task, type) and issubclass(task, Task):
        named = f"{task.__module__}:{task.__qualname__}"
        where: str | type[Task] = task if "<locals>" in named else named
    elif isinstance(task, str) and task.count(":") == 1:
        where = task
    else:
        raise ValueError(f'task must be a subclass of textrl.Task or "module:Class"; got {task!r}')
    if not isinstance(id, str):
        raise ValueError(f'id must be a text, "namespace/Name-v0"; got {shorten(id)}')
    if id in gym.registry:
        if registered().get(id) != where:
            raise ValueError(f"id {id!r} is registered already; choose another name or a higher version")
        del gym.registry[id]  # the same task, perhaps with other arguments: the last ones hold
    gym.register(
        id,
        entry_point=ENTRY_POINT,
        vector_entry_point="textrl.registration:make_vector_env",
        kwargs={"task": where, **kwargs},
    )


def register_built_in() -> None:
    """Registers textrl's own environments; once is enough, twice does no harm."""
    for id, task in BUILT_IN.items():
        if id not in gym.registry:
            register(id, task)


def registered() -> dict[str, str | type[Task]]:
    """All ids registered through `register` in this process, with their tasks."""
    return {
        id: spec.kwargs["task"]
        for id, spec in gym.registry.items()
        if spec.entry_point == ENTRY_POINT and "task" in spec.kwargs
    }


def task_class(task: type[Task] | str) -> type[Task]:
    """The class behind "module:Class".

    Raises:
        ValueError: where there is no such class.
    """
    if isinstance(task, type):
        return task
    check("task", task, isinstance(task, str), 'a subclass of textrl.Task or "module:Class"')
    module, _, name = task.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"task {task!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f'task must be a subclass of textrl.Task or "module:Class"; {task!r} is {shorten(found)}')
    return found


def make_task(task: type[Task] | str, **kwargs: Any) -> Task:
    """An instance of a task.

    Raises:
        BadArgument: (a ValueError) for an argument its constructor does not take, naming those it does, or of the
            wrong type.
    """
    cls = task_class(task)
    parameters = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in kwargs:
            if name not in parameters:
                raise BadArgument(
                    f"{cls.__name__} got an unexpected keyword argument '{name}'; there are {list(parameters)}"
                )
    for name, value in kwargs.items():
        annotation = parameters[name].annotation if name in parameters else ""
        check_type(name, value, annotation if isinstance(annotation, str) else getattr(annotation, "__name__", ""))
    try:
        inspect.signature(cls).bind(**kwargs)
    except TypeError as error:
        raise BadArgument(f"{cls.__name__} cannot be made with {shorten(kwargs, 200)}: {error}") from error
    try:
        return cls(**kwargs)
    except TypeError as error:
        if not kwargs:
            raise
        raise BadArgument(f"{cls.__name__} cannot be made with {shorten(kwargs, 200)}: {error}") from error


def models_tokenizer(task: type[Task] | str, kwargs: Mapping[str, Any], model: Any) -> dict[str, str]:
    """The argument `tokenizer` for a task that takes names and was given none: that of a named model, if it has one."""
    parameter = inspect.signature(task_class(task)).parameters.get("tokenizer")
    takes = parameter is not None and parameter.default is None and "str" in str(parameter.annotation)
    if not takes or kwargs.get("tokenizer") is not None or not isinstance(model, (str, Path)):
        return {}
    folder = Path(model)
    if folder.is_dir():
        has = any((folder / f"tokenizer{end}.json").is_file() for end in ("", "_config"))
        return {"tokenizer": str(model)} if has else {}
    try:
        load_tokenizer(str(model))
    except ValueError:  # no hub name either: what is wrong with a model is said where that is loaded
        return {}
    return {"tokenizer": str(model)}


def make_env(
    task: type[Task] | str,
    *,
    reference: Any = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    render_mode: str | None = None,
    **kwargs: Any,
) -> TextEnv:
    """The single environment of a registered task; `kwargs` are the task's."""
    return TextEnv(
        make_task(task, **{**kwargs, **models_tokenizer(task, kwargs, reference)}),
        reference=reference,
        kl_coef=kl_coef,
        temperature=temperature,
        render_mode=render_mode,
    )


make_env.metadata = TextEnv.metadata  # type: ignore[attr-defined]  # by which gym.make knows of "ansi_list"


def make_vector_env(
    task: type[Task] | str,
    num_envs: int = 1,
    *,
    reference: Any = None,
    kl_coef: float = 0.0,
    temperature: float = 1.0,
    autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
    **kwargs: Any,
) -> TextVectorEnv:
    """The native vector environment of a registered task; `kwargs` are the task's."""
    return TextVectorEnv(
        make_task(task, **{**kwargs, **models_tokenizer(task, kwargs, reference)}),
        num_envs,
        reference=reference,
        kl_coef=kl_coef,
        temperature=temperature,
        autoreset_mode=autoreset_mode,
        max_episode_steps=max_episode_steps,
        render_mode=render_mode,
    )
