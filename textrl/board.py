"""What a player of `textrl play` sees: the text so far, and what policy, reference and critic make of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .config import check
from .render import ansi, escape, token_texts

if TYPE_CHECKING:
    from .agent import Agent
    from .env import TextEnv

SHOWN = 10
"""Tokens in a list of the most probable ones."""


class Board:
    """Prints an episode for a person; whatever in a text could move the cursor is written out.

    Args:
        env: where it is played, with the policy and its values attached.
        agent: the policy.
    """

    def __init__(self, env: TextEnv, agent: Agent) -> None:
        self.env, self.task = env, env.task
        width = None if sys.stdout.isatty() else 120
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)
        self.voices = {"policy": agent.stepper}
        if env.penalty is not None:
            self.voices["reference"] = env.penalty.stepper
        self.tops: dict[str, list[int]] = {}  # the lists as they were last shown

    def say(self, text: str) -> None:
        """Prints lines of text."""
        self.console.print("\n".join(escape(line) for line in text.split("\n")))

    def state(self, observation: NDArray[np.int64]) -> None:
        """The text so far, what it earned, what it is worth, and the tokens that may come next."""
        self._text()
        here = self.env.snapshot()
        value = "" if self.env.value is None else f", value {float(self.env.value(observation[None])[0]):.3f}"
        self.say(f"token {here.length - here.prompt_length + 1} of {self.task.max_new_tokens}{value}")
        shares = {name: self.probabilities(name, observation) for name in self.voices}
        self.tops = {name: each.topk(min(SHOWN, len(each))).indices.tolist() for name, each in shares.items()}
        self._lists(shares)

    def end(self, info: Mapping[str, Any]) -> None:
        """The text, and what its end brought."""
        self._text()
        named = ((key, value) for key, value in info.items() if key.endswith("score") and not isinstance(value, str))
        scores = ", ".join(f"{key} {float(value):.4g}" for key, value in named)
        kls = self.env.snapshot().kls
        kl = f", KL to the reference {sum(kls):.3f}" if kls else ""
        self.say(f"the end ({info['finish_reason']}): {scores}{kl}. /new, /restart, /back or /quit")

    def probabilities(self, voice: str, observation: NDArray[np.int64]) -> Tensor:
        """What the policy or the reference gives each token next: (L,) -> (V,)."""
        return (self.voices[voice](observation[None])[0] / self.env.temperature).softmax(-1).cpu()

    def listed(self, place: str) -> int:
        """The token at a place of the lists: "3" of the policy's, "r3" of the reference's.

        Raises:
            ValueError: for a place that is in no list.
        """
        top = self.tops.get("reference" if place.startswith("r") else "policy", [])
        number = place.removeprefix("r")
        fine = number.isdecimal() and 1 <= int(number) <= len(top)
        check("#", place, fine, f"a place from 1 to {len(top)} of a list" if top else "of a list that is shown")
        return top[int(number) - 1]

    def _text(self) -> None:
        self.console.print(Text.from_ansi(ansi(self.env.picture())))

    def _lists(self, shares: Mapping[str, Tensor]) -> None:
        """The most probable tokens of each voice, with what the other gives them."""
        allowed = self.env.action_masks()
        table = Table(box=None, header_style="bold", pad_edge=False)
        columns: list[tuple[str, list[str]]] = []
        for name, top in self.tops.items():
            texts = [_named(text) for text in token_texts(self.task, top)]
            said = [text + ("" if allowed[t] else " !") for text, t in zip(texts, top, strict=True)]
            columns += [
                ("#", [f"#{name[0] if name != 'policy' else ''}{i + 1}" for i in range(len(top))]),
                (name, said),
                *(
                    ("p" if other == name else f"{other}'s p", [f"{each[t]:.3f}" for t in top])
                    for other, each in self._first(shares, name)
                ),
            ]
        for heading, _ in columns:
            table.add_column(heading, justify="left" if heading in self.voices else "right", no_wrap=True)
        for cells in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*map(Text, cells))
        self.console.print(table)

    @staticmethod
    def _first(shares: Mapping[str, Tensor], name: str) -> list[tuple[str, Tensor]]:
        return sorted(shares.items(), key=lambda item: item[0] != name)


def _named(text: str) -> str:
    """A token's text for a list: in quotes where its edges would not be seen."""
    shown = escape(text)[:40]
    return shown if shown.strip() == shown != "" else f"'{shown}'"
