"""The agents, one file each: `from textrl.agents import PPO`."""

if __name__ == "agents":
    raise ImportError("import this package as textrl.agents")

from .a2c import A2C
from .dpo import DPO
from .grpo import GRPO
from .nlpo import NLPO
from .ppo import PPO
from .reinforce import REINFORCE
from .sft import SFT
from .trpo import TRPO

__all__ = ["A2C", "DPO", "GRPO", "NLPO", "PPO", "REINFORCE", "SFT", "TRPO"]
