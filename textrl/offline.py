"""What agents that learn from given responses share: texts to token ids, examples to a `Rollout`, epochs."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import pad_responses
from .cells import text_of
from .chats import ChatFormat, as_texts
from .codec import plain_ids
from .rollout import Rollout
from .rows import Row
from .scores import shorten
from .task import Task


def encode_response(
    task: Task, prompt: str, completion: str, end_token: bool = True, called: str = "completion"
) -> tuple[list[int], list[int]]:
    """A prompt and a response given as texts, as the token ids an episode would hold.

    They are tokenised together where that leaves the prompt's tokens as they are, so that the seam is as in running
    text; not so after what a chat template wrote (`Task.special_tokens`). Special-token strings are text.

    Args:
        task: whose tokenizer and horizon hold.
        prompt: text.
        completion: text.
        end_token: whether the end token follows, so that a model learns to stop. A response is cut at the horizon (with
            a warning), and the end token with it: an episode of `max_new_tokens` tokens ends without one.
        called: what the completion is, for messages.

    Returns:
        the prompt's ids and the response's, at least one each.
    """

    def ids(text: str) -> list[int]:
        return plain_ids(task.tokenizer, text, called, shown=completion)

    first = task.encode({"prompt": prompt}).tolist()
    if task.special_tokens:
        response = ids(completion)
    else:
        whole = first[: len(first) - len(ids(prompt))] + ids(prompt + completion)  # the begin token, then both
        response = whole[len(first) :] if whole[: len(first)] == first else ids(completion)
    if end_token:
        response = [*response, task.eos_token_id]
    if len(response) > task.max_new_tokens + end_token:
        said = f"completions of more than max_new_tokens={task.max_new_tokens} tokens are cut there"
        warnings.warn(said, stacklevel=2)  # the same words every time: shown once
    return first, response[: task.max_new_tokens] or [task.eos_token_id]


def example_ids(
    task: Task, row: Mapping[str, Any], end_token: bool = True, strict: bool = False
) -> tuple[list[int], list[int]]:
    """The token ids of a row's "prompt" and of its response: of "completion_ids" where given, else of "completion".

    Both may be chats, or one chat stand under "messages": the last message is the response.

    Args:
        task: whose tokenizer and horizon hold.
        row: the row.
        end_token: whether the end token follows a "completion"; "completion_ids" are taken as they are.
        strict: refuse what is empty in a file written by hand: a "completion", and a prompt where the task has none.

    Raises:
        ValueError: naming the column.
    """
    known = row.get("completion_ids") is not None
    answer = "messages" if row.get("completion") is None and row.get("messages") is not None else "completion"
    row = as_texts(row, [] if known else [answer], ChatFormat.of(task))
    prompt = prompt_of(row, task, strict)
    if known:
        return task.encode({"prompt": prompt}).tolist(), token_ids(row, "completion_ids", task)
    return encode_response(task, prompt, text_of(row, answer, empty=not strict), end_token)


def prompt_of(row: Mapping[str, Any], task: Task, strict: bool) -> str:
    """A row's "prompt"; with `strict` not an empty one where the task has none.

    Raises:
        ValueError: naming the column.
    """
    prompt = text_of(row, "prompt")
    own = task.rows if strict and not prompt.strip() else None
    if own is not None and all(each["prompt"].strip() for each in own):
        text_of(row, "prompt", empty=False)
    return prompt


def token_ids(row: Mapping[str, Any], column: str, task: Task) -> list[int]:
    """A row's response given as token ids.

    Raises:
        ValueError: for an empty list, one longer than the horizon, or what is not a token of the task.
    """
    ids = row[column]
    fine = isinstance(ids, (list, tuple)) and all(type(i) is int and 0 <= i < task.vocab_size for i in ids)
    if fine and task.eos_token_id in ids[:-1]:
        raise ValueError(f"column {column!r} must end where the end token stands; got {shorten(ids)}")
    if not fine or not 0 < len(ids) <= task.max_new_tokens:
        raise ValueError(
            f"column {column!r} must be 1 to {task.max_new_tokens} token ids below {task.vocab_size};"
            f" got {shorten(ids)}"
        )
    return list(ids)


def given_rollout(
    task: Task,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    device: torch.device,
    rows: list[Row] | None = None,
    group_size: int = 1,
) -> Rollout:
    """Given responses as a batch of episodes; what is not known of them (log-probabilities, scores) is NaN.

    Args:
        task: whose end token says which of them stopped.
        prompts: B lists of token ids.
        responses: B lists of token ids, at least one long.
        device: where the tensors go.
        rows: B rows of the task, or anything else that should stay with the episodes.
        group_size: episodes that belong together and stand next to each other: 2 for pairs.
    """
    tokens, prompt_lengths, mask = pad_responses(prompts, responses, device)
    unknown = torch.where(mask, torch.nan, 0.0)
    return Rollout(
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        action_mask=mask,
        logprobs=unknown,
        rewards=unknown,
        scores=unknown[:, 0],
        stopped=torch.tensor([r[-1] == task.eos_token_id for r in responses], device=device),
        rows=rows or [],
        group_size=group_size,
    )


class Epochs:
    """Indices of examples, in an order shuffled anew for each pass over all of them.

    Args:
        generator: of the orders.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.size, self.generator = 0, generator
        self._order = torch.zeros(0, dtype=torch.int64)

    def take(self, count: int, size: int) -> Tensor:
        """The next `count` indices of `size` examples: (count,) int64. Another size than before begins anew."""
        if size != self.size:
            self.size, self._order = size, torch.zeros(0, dtype=torch.int64)
        while len(self._order) < count:
            self._order = torch.cat([self._order, torch.randperm(self.size, generator=self.generator)])
        taken, self._order = self._order[:count], self._order[count:]
        return taken


def digest(data: Any) -> str:
    """By which two sets of data of numbers and texts are told apart."""
    return hashlib.sha256(repr(data).encode()).hexdigest()
