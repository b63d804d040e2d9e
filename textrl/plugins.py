"""Agents and environments by their names, ours and those of other packages; errors have the nearest names."""

from __future__ import annotations

import difflib
import importlib
import sys
import warnings
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from .registration import registered

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
