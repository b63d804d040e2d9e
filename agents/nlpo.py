"""NLPO: natural-language policy optimisation, PPO over a learned action mask (Ramamurthy 2023).

    M(s)       = the fewest tokens that reach probability top_p together under the mask policy
    pi_M(a|s)  = pi(a | s) / sum_{b in M(s)} pi(b | s)   for a in M(s), else 0

The mask policy is a copy of the policy, taken anew every `mask_interval` updates. Tokens are drawn from pi_M; their
log-probabilities, ratios and entropies are those of pi_M, with the masks that held when they were drawn; the loss is
PPO's. A token outside the mask gets no gradient and is never tried: where the best response is rare at first, a mask
that keeps 99% loses it for good. The default cuts off what would be drawn once in a thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from textrl.adapters import frozen_copy
from textrl.config import AgentConfig, check
from textrl.drawing import within_top_p
from textrl.rollout import Rollout, policy_in
from textrl.stepwise import StepwiseLM

from .ppo import PPO, PPOConfig


@dataclass(frozen=True, kw_only=True)
class NLPOConfig(PPOConfig):
    """Settings of NLPO: PPO's, and the mask's."""

    top_p: float = 0.999  # the mask keeps the most probable tokens that reach this together
    mask_interval: int = 10  # updates between two copies of the policy into the mask policy

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        check("mask_interval", self.mask_interval, self.mask_interval >= 1, "at least 1")


class NLPO(PPO):
    """PPO that draws from the top-p tokens of a slower policy."""

    config: NLPOConfig
    config_class: ClassVar[type[AgentConfig]] = NLPOConfig

    def build(self) -> None:
        """Adds the mask policy; it is saved and restored with the agent."""
        super().build()
        self.mask_model = self.modules["mask_policy"] = frozen_copy(self.model)
        self.mask_stepper = StepwiseLM(policy_in(self.base, self.mask_model))

    def narrow(self, observations: NDArray[np.int64], advised: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
        """The mask policy's top-p tokens at each observation, inside the task's masks."""
        logits = self.mask_stepper(observations) / self.base.temperature
        if advised is not None:
            logits = logits.masked_fill(~torch.from_numpy(advised.astype(np.bool_)).to(logits.device), -torch.inf)
        return within_top_p(logits, self.config.top_p).cpu().numpy()

    def update(self, rollout: Rollout) -> dict[str, float]:
        """PPO's update on the masked batch; now and then the mask policy catches up."""
        masks = rollout.token_masks
        assert masks is not None
        numbers = super().update(rollout)
        numbers["masked_share"] = 1 - float(masks.float().mean())
        if (self.num_updates + 1) % self.config.mask_interval == 0:
            with torch.no_grad():
                for slow, fast in zip(self.mask_model.parameters(), self.model.parameters(), strict=True):
                    slow.copy_(fast)
        self.mask_stepper.forget()
        return numbers
