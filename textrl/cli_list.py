"""The tables of `textrl envs` and `textrl agents`, and the page of one of them, from its docstring."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import gymnasium as gym

from .plugins import agent_class, agent_classes, check_env_id
from .registration import make_task, registered, task_class

if TYPE_CHECKING:
    from .agent import Agent


def list_envs(options: argparse.Namespace) -> None:
    """Prints the table of registered environments, or the page of one."""
    if options.id is not None:
        print(f"{options.id}\n\n{env_page(options.id)}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("id", "vocabulary", "horizon", "responses", "best score", "teaches"):
        table.add_column(name, justify="left" if name in ("id", "teaches") else "right", no_wrap=name == "id")
    for id, where in registered().items():
        table.add_row(*env_cells(id, where))
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def env_page(id: str) -> str:
    """What the docstring of an environment's task says; `module:id` imports the module first.

    Raises:
        ValueError: for an id that is not registered.
    """
    known = check_env_id(id)  # which may register it
    return inspect.getdoc(task_class(registered()[known])) or "-"


def env_cells(id: str, where: Any) -> list[str]:
    """An environment's row of the table; dashes where its task cannot be made here and now (data not fetched yet)."""
    try:
        cls = task_class(where)
    except ValueError:
        return [id, *"----", ""]
    page = " ".join((inspect.getdoc(cls) or "").split())
    found = re.search(r"What it teaches: (.*?)(?: Optimum:|$)", page)
    teaches = found[1] if found else ""
    if not getattr(cls, "at_hand", lambda: True)():
        return [id, *"----", teaches]
    try:
        given = dict(gym.registry[id].kwargs)
        for name in ("reference", "kl_coef", "temperature"):
            given.pop(name, None)
        task = make_task(**given)
    except (ValueError, OSError, ImportError, TypeError):
        return [id, *"----", teaches]
    vocabulary, horizon = task.vocab_size, task.max_new_tokens
    # every string of tokens other than the end, ended or cut at the horizon
    responses = sum((vocabulary - 1) ** t for t in range(horizon)) + (vocabulary - 1) ** horizon
    best = task.best_score
    size = str(responses) if responses < 10**7 else f"1e{len(str(responses)) - 1}"
    return [id, str(vocabulary), str(horizon), size, "-" if best is None else f"{best:g}", teaches]


def list_agents(options: argparse.Namespace) -> None:
    """Prints every agent with the first line of its file, or all that its file says of itself."""
    if options.agent is not None:
        print(f"{agent_page(agent_class(options.agent))}\n\nSettings: textrl train {options.agent} --settings")
        return
    for name, cls in agent_classes().items():
        print(f"{name.lower():<12} {agent_page(cls).splitlines()[0]}")


def agent_page(cls: type[Agent]) -> str:
    """What an agent's file says it is: its loss, its paper."""
    module = inspect.getmodule(cls)
    return inspect.cleandoc((module.__doc__ if module else None) or cls.__doc__ or "-")
