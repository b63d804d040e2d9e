"""A critic apart from the policy; one with a tokenizer of its own reads the text so far, not the policy's tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .codec import ids_of
from .config import check
from .critic import Critic
from .policy import CausalPolicy, values_at
from .probing import longest_text
from .rewards import RewardModel
from .rollout import Rollout
from .stepwise import check_positions
from .task import Task

REMEMBERED = 8192
"""Texts whose tokens are kept: the epochs over a batch read the same ones again."""


class TextCritic:
    """The value of the state before each of the policy's tokens, from a model with another tokenizer.

    A state is worth what the critic says at the end of the text so far, in its own tokens of that text alone: how a
    longer text is cut says what comes next, on which the value of a state must not depend. Where the tokens of the text
    so far begin those of a longer one, both are read at once. A text longer than the model reads loses its beginning.

    Args:
        model: a scalar model.
        tokenizer: its own.
        task: whose tokenizer the policy has.
        special_tokens: whether special tokens written out in a prompt are read as such, as a `RewardModel` may do.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: Task, special_tokens: bool = False
    ) -> None:
        self.model, self.tokenizer, self.task, self.special_tokens = model, tokenizer, task, special_tokens
        self._room = longest_text(model) - 1  # tokens after the first
        self._known: dict[tuple[tuple[int, ...], int], tuple[list[list[int]], list[tuple[int, int]]]] = {}

    def __call__(self, batch: Rollout) -> Tensor:
        """(B, T) float32, differentiable; 0 outside the agent's tokens."""
        lengths, starts = batch.response_lengths.tolist(), batch.prompt_lengths.tolist()
        texts: list[list[int]] = []
        places = torch.zeros(*batch.action_mask.shape, 2, dtype=torch.int64)  # (B, T, 2) rows and columns in `tokens`
        written = self.special_tokens and bool(batch.rows)
        prompts = [row["prompt"] for row in batch.rows] if written else [None] * len(batch)
        for i, (row, start, length) in enumerate(zip(batch.tokens.tolist(), starts, lengths, strict=True)):
            found, where = self._read(tuple(row[: start + length]), start, prompts[i])
            places[i, : len(where)] = torch.tensor(where) + torch.tensor([len(texts), 0])
            texts += found
        tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for line, ids in zip(tokens, texts, strict=True):
            line[: len(ids)] = torch.tensor(ids)
        device = self.model.device
        rows, columns = places.to(device)[batch.action_mask].T
        return batch.spread(values_at(self.model, tokens.to(device), rows, columns))

    def _read(
        self, ids: tuple[int, ...], start: int, prompt: str | None
    ) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """The critic's tokens of the texts before each of the policy's from `start` on, and where each of them ends.

        The prompt is taken as it was written where that is given, for its special tokens to count.
        """
        key = (ids, start)
        if key not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            if prompt is None:
                before = self.task.decode([ids[:end] for end in range(start, len(ids))], alone=True)
            else:
                said_so_far = self.task.decode([ids[start:end] for end in range(start, len(ids))])
                before = [prompt + text for text in said_so_far]
            said = ids_of(self.tokenizer, before, self.special_tokens)
            begin, end_token = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            first = [] if begin is None else [begin]
            if first and self.special_tokens:  # a chat template writes it where it should be
                said = [each[1:] if each[:1] == first else each for each in said]
            texts: list[list[int]] = []
            places: list[tuple[int, int]] = []
            for each in reversed(said):  # the longest first
                own = [*first, *each[-self._room :]] or [end_token]  # of no text at all
                row = next((i for i, text in enumerate(texts) if text[: len(own)] == own), len(texts))
                texts += [own] if row == len(texts) else []
                places.append((row, len(own) - 1))
            self._known[key] = texts, places[::-1]
        return self._known[key]


def same_tokenizer(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers give the same ids for every text."""
    return one is other or one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


class SeparateCritic(NamedTuple):
    """A critic of its own trunk: its values of a batch, its model, and its tokenizer where that is its own too."""

    value: Callable[[Rollout], Tensor]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None = None


def separate_critic(
    policy: CausalPolicy, start: RewardModel | PreTrainedModel | None, task: Task, trainable_layers: int | None
) -> SeparateCritic:
    """A critic that starts from a reward model, with its tokenizer where it is not the policy's, or another model.

    Args:
        policy: as for `Critic`.
        start: whose trunk is copied; None: the policy's.
        task: whose texts are read.
        trainable_layers: as for the policy.

    Raises:
        ValueError: for a model that cannot read the task's texts or does not know all tokens.
    """
    scalar = start.model if isinstance(start, RewardModel) else start
    critic = Critic(policy, scalar or policy.model, trainable_layers)
    if isinstance(start, RewardModel) and not same_tokenizer(start.tokenizer, task.tokenizer):
        critic.model.config.score_options = start.options  # for `load`
        value = TextCritic(critic.model, start.tokenizer, task, start.special_tokens)
        return SeparateCritic(value, critic.model, start.tokenizer)
    check_positions("critic", critic.model, task)
    known: int = critic.model.config.get_text_config().vocab_size
    check("critic", f"a model of {known} tokens", known >= task.vocab_size, f"one of {task.vocab_size}")
    return SeparateCritic(critic, critic.model)
