"""An agent that a `textrl train` left in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym

from .agent import Agent
from .flags import agent_class, check_env_id
from .folders import verify


def trained_agent(final: Path, run: dict[str, Any], seed: int, critic: bool = False) -> Agent:
    """The policy of a run, under the plain `Agent` where its class acts as that does: the rest is left on disk.

    Args:
        final: where it was saved, in the run's folder.
        run: what `read_run` says of the run.
        seed: of prompts and samples.
        critic: whether an agent that has a critic is loaded whole, so that it can be asked for values.
    """
    cls = agent_class(run["agent"])
    env = gym.make_vec(check_env_id(run["env"]), num_envs=1, **run["env_kwargs"])
    manifest = verify(final)
    own = cls.narrow is not Agent.narrow or cls.respond is not Agent.respond
    if own or (critic and any(file.startswith(("critic", "value_head")) for file in manifest["files"])):
        return cls.load(final, env, seed=seed)
    if manifest["agent"] != cls.__name__:
        raise ValueError(f"folder {str(final)!r} holds a {manifest['agent']}, not a {cls.__name__}")
    return Agent(env, str(final), seed=seed, dtype=manifest["config"]["dtype"])
