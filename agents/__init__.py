"""The agents, one file each: `from textrl.agents import PPO`."""

if __name__ == "agents":
    raise ImportError("import this package as textrl.agents")

from .ppo import PPO
from .reinforce import REINFORCE
from .sft import SFT

__all__ = ["PPO", "REINFORCE", "SFT"]
