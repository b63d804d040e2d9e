"""The agents, one file each: `from textrl.agents import PPO`."""

if __name__ == "agents":
    raise ImportError("import this package as textrl.agents")

from .a2c import A2C
from .best_of_n import BestOfN
from .bpo import BPO
from .dpo import DPO
from .grpo import GRPO
from .nlpo import NLPO
from .ppo import PPO
from .reinforce import REINFORCE
from .rest import ReST
from .sft import SFT
from .trpo import TRPO

__all__ = ["A2C", "BPO", "DPO", "GRPO", "NLPO", "PPO", "REINFORCE", "SFT", "TRPO", "BestOfN", "ReST"]
