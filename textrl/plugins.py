"""Agents, environments and rewards by their names, ours and others'; errors have the nearest names."""

from __future__ import annotations

import difflib
import importlib
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .registration import registered
from .remote import RemoteScore
from .scores import reason, shorten

if TYPE_CHECKING:
    from .agent import Agent


def own_agents() -> dict[str, type[Agent]]:
    """Our own agents by name."""
    agents = importlib.import_module("textrl.agents")
    return {name: getattr(agents, name) for name in agents.__all__}


def agent_classes() -> dict[str, type[Agent]]:
    """Our own agents and those that other packages name in the entry-point group `textrl.agents`.

    One that cannot be imported, or is called as one of ours, is left out with a warning.
    """
    found = own_agents()
    taken = {name.lower() for name in found}
    for entry in entry_points(group="textrl.agents"):
        if entry.name.lower() in taken:
            said = f"agent {entry.value!r} of another package is called {entry.name!r} as one of textrl is: left out"
            warnings.warn(said, stacklevel=2)
            continue
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

    cls = _imported(place, "agent")
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
        with _working_folder():
            return agent_at(name)
    known = {key.lower(): cls for key, cls in own_agents().items()}
    if name.lower() in known:
        return known[name.lower()]
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
    near = near or [each for each in known if name and name.lower() in each.lower()][:3]
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"


def check_env_id(id: str) -> str:
    """The id, if it is registered (after importing its module, for "module:id").

    Raises:
        ValueError: otherwise, with the nearest ids.
    """
    module, _, plain = id.rpartition(":")
    if module:
        with _working_folder():
            try:
                importlib.import_module(module)
            except Exception as error:  # a module may raise what it likes
                raise ValueError(f"env {id!r} cannot be imported: {type(error).__name__}: {error}") from None
    known = list(registered())
    if plain not in known:
        raise ValueError(f"unknown env {plain!r}; {nearest(plain, known)}")
    return plain


def reward_function(reward: Any) -> Callable[..., Any]:
    """A reward function, itself or by its name: "module:function", a saved `RewardModel`'s folder, an HTTP address.

    Raises:
        ValueError: for anything else, or what cannot be imported or loaded.
    """
    if isinstance(reward, (str, Path)):
        name = str(reward)
        if name.startswith(("http://", "https://")):
            return RemoteScore(name)
        if name and Path(name).is_dir():
            from .rewards import RewardModel

            return RewardModel.load(name)
        if ":" in name:
            with _working_folder():
                reward = _imported(name, "reward")
    if callable(reward) and not isinstance(reward, type):
        return reward
    raise ValueError(
        "reward must be a function of prompts and completions, or name one: module:function, the folder of a reward"
        f" model, or an address (http://...); got {shorten(reward)}"
    )


def _imported(place: str, called: str) -> Any:
    """What "module:name" names.

    Raises:
        ValueError: where there is none, or its module cannot be imported.
    """
    module, _, name = place.partition(":")
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except Exception as error:  # whatever somebody's module raises
        raise ValueError(f"{called} {place!r} cannot be imported: {reason(error)}") from None


@contextmanager
def _working_folder() -> Iterator[None]:
    """Modules in the working folder are found too."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
