"""Signs that training goes wrong, each said once and in words, with the option that usually mends it."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

from .rollout import Rollout

if TYPE_CHECKING:
    from .agent import Agent

IN_A_ROW = 3
"""So many iterations in a row must show a sign before it is taken for one."""
COLLAPSED = 0.05
"""An entropy below this share of what it was in the first iteration has collapsed."""
NEAR_BEST = 0.9
"""A policy with this share of the best score, where that is known, may well be sure and say one thing only."""


class TrainingWarning(UserWarning):
    """Training looks as if it goes wrong; the message says why, and what usually mends it."""


class Watch:
    """Looks at every iteration of a call of `learn`, and warns of each sign once.

    Args:
        agent: whose settings are named.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.entropy: float | None = None  # of the first iteration: the mean surprisal of the tokens
        self.ended = False  # whether any response has ended by itself
        self.score: float | None = None  # the one that all responses of the last iterations had
        self.least = math.inf  # the lowest mean score of an iteration
        self.rows: dict[str, int] = {}  # by sign, how many iterations in a row have shown it

    def see(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Looks at a batch that was just learned from, if the agent said it: given texts say nothing of the agent."""
        if self.agent.needs_dataset:
            return
        config = self.agent.config
        kl = metrics.get("rollout/kl_reference", 0.0)
        self._sign(
            "KL",
            kl > config.warn_kl,
            f"KL to the reference is {kl:.3g} nats a response, above warn_kl={config.warn_kl:g}: the policy may have"
            f" left the texts that the score can judge; {self._any('a higher kl_coef', 'a kl_target')} usually mends"
            " it, or a lower learning_rate",
            1,
        )
        if rollout.completions and len(rollout) > 1 and not self._near_best(metrics):
            self._see_texts(rollout, metrics)

    def _near_best(self, metrics: dict[str, float]) -> bool:
        """Whether there is little left to learn."""
        best = self.agent.task.best_score
        return best is not None and best > 0 and metrics.get("rollout/score", 0.0) >= NEAR_BEST * best

    def _see_texts(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        entropy = max(0.0, metrics.get("rollout/surprisal", 0.0))  # never -0
        self.entropy = entropy if self.entropy is None else self.entropy
        self._sign(
            "entropy",
            entropy < COLLAPSED * self.entropy,
            f"entropy has collapsed: {entropy:.2g} nats a token, and {self.entropy:.2g} at first;"
            f" {self._any('a higher kl_coef', 'a higher ent_coef')} usually mends it, or a lower learning_rate",
        )
        responses = rollout.responses
        self._sign(
            "equal",
            bool((responses == responses[0]).all()),
            f"all responses of the last {IN_A_ROW} iterations are equal: {rollout.completions[0][:60]!r};"
            f" {self._any('a higher kl_coef', 'a higher ent_coef')} usually mends it, a higher temperature of the"
            " environment, or a lower learning_rate",
        )
        self.ended |= bool(rollout.stopped.any())
        self._sign(
            "end",
            not self.ended,
            "no response has ended by itself so far, all were cut off;"
            f" {self._any('a higher max_new_tokens', 'a missing_end_penalty')} usually mends it, or a tokenizer whose"
            f" end token ({self.agent.tokenizer.eos_token!r}) is the one that the model was trained with",
        )
        first = float(rollout.scores[0])
        constant = bool((rollout.scores == first).all())
        self._sign(
            "score",
            constant and self.score in (None, first) and not first > self.least,  # what was learned is no such sign
            f"score is {first:.4g} for every response of the last {IN_A_ROW} iterations, so nothing tells a good one"
            " from a bad one; unless that is the best there is (`best_score` of a task says so), check the reward"
            " function, or give prompts and a model that sometimes succeed",
        )
        self.score = first if constant else None
        self.least = min(self.least, first if constant else float(rollout.scores.mean()))

    def dropped(self, faults: list[str], asked: int) -> None:
        """Episodes were left out because their scores failed."""
        what = f"score failed for {len(faults)} of {asked} responses; they are left out, as on_score_error says: "
        self._sign("dropped", bool(faults), what + (faults[0] if faults else ""), 1)

    def _any(self, first: str, setting: str) -> str:
        """Either of two cures; the second only for an agent that has the setting, which is its last word."""
        return f"{first} or {setting}" if hasattr(self.agent.config, setting.split()[-1]) else first

    def _sign(self, name: str, shown: bool, message: str, enough: int = IN_A_ROW) -> None:
        """Warns once a sign was there often enough in a row; after that never again."""
        self.rows[name] = self.rows.get(name, 0) + 1 if shown or self.rows.get(name, 0) >= enough else 0
        if self.rows[name] == enough:
            warnings.warn(message, TrainingWarning, stacklevel=6)
