"""textrl: text generation as reinforcement learning, as real Gymnasium environments.

`import textrl` registers the environments and is quick; torch and transformers load with the first name that needs
them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .env import Snapshot, TextEnv
from .registration import register, register_built_in
from .symbols import symbol_tokenizer
from .task import Task
from .vector import TextVectorEnv

if TYPE_CHECKING:
    from .agent import Agent
    from .collecting import collect
    from .config import AgentConfig
    from .episodes import read_episodes
    from .exact import Evaluation, Solution, evaluate_exact, exact_gradient, solve
    from .preferences import read_preferences
    from .remote import RemoteScore
    from .reward_training import RewardModelConfig, train_reward_model
    from .rewards import RewardModel, weighted_sum
    from .rollout import Rollout
    from .tabular import TabularLM, tabular_model

__version__ = "0.1.0"

_LAZY = {
    "Agent": "agent",
    "AgentConfig": "config",
    "Evaluation": "exact",
    "RemoteScore": "remote",
    "RewardModel": "rewards",
    "RewardModelConfig": "reward_training",
    "Rollout": "rollout",
    "Solution": "exact",
    "TabularLM": "tabular",
    "collect": "collecting",
    "evaluate_exact": "exact",
    "exact_gradient": "exact",
    "read_episodes": "episodes",
    "read_preferences": "preferences",
    "solve": "exact",
    "tabular_model": "tabular",
    "train_reward_model": "reward_training",
    "weighted_sum": "rewards",
}

_MODULES = ("agents", "envs", "wrappers")
"""Reached as attributes without an import of their own."""

__all__ = [
    "Agent",
    "AgentConfig",
    "Evaluation",
    "RemoteScore",
    "RewardModel",
    "RewardModelConfig",
    "Rollout",
    "Snapshot",
    "Solution",
    "TabularLM",
    "Task",
    "TextEnv",
    "TextVectorEnv",
    "collect",
    "evaluate_exact",
    "exact_gradient",
    "read_episodes",
    "read_preferences",
    "register",
    "solve",
    "symbol_tokenizer",
    "tabular_model",
    "train_reward_model",
    "weighted_sum",
]

register_built_in()


def __getattr__(name: str) -> Any:
    """Loads what needs torch when it is first used (PEP 562)."""
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, those too that are not loaded yet."""
    return sorted([*__all__, *_MODULES])
