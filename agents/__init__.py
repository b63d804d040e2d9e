"""The agents, one file each: `from textrl.agents import PPO`."""

if __name__ == "agents":
    raise ImportError("import this package as textrl.agents")

from .dpo import DPO
from .ppo import PPO
from .reinforce import REINFORCE
from .sft import SFT

__all__ = ["DPO", "PPO", "REINFORCE", "SFT"]
