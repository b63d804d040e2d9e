"""All responses of a small task as a tree, level by level: their scores, and a policy's log-probabilities of them.

Level t holds the (V - 1)^t prefixes of t tokens without the end token, in the order of their digits to the base
V - 1. A response is closed by the end token or by the horizon.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from .adapters import plain_module
from .config import check
from .generation import NotFinite
from .heads import head_of
from .models import load_model
from .penalty import Policy, policy_logits
from .policy import CausalPolicy
from .rows import Row
from .tabular import finite_rows, in_words
from .task import Task

AnyPolicy: TypeAlias = PreTrainedModel | str | Path | Policy
"""A model (a `PeftModel` too), the name or folder of one, or a callable: observations (B, L) int64 -> next-token logits
(B, V)."""

MAX_RESPONSES = 2_000_000
"""A prompt with more responses than this is refused."""
_TOKENS_AT_ONCE = 65_536
_TEXTS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Tree:
    """All responses to one prompt.

    Attributes:
        prompt: (P,) token ids.
        rows: the rows with this prompt.
        weight: their share of all rows.
        ends: for each level below the last (n,), the score when the end token comes next; for the last (n, V), the
            score whichever token comes next.
    """

    prompt: NDArray[np.int64]
    rows: list[Row]
    weight: float
    ends: list[Tensor]


def join(task: Task, ends: Tensor, deeper: Tensor | None) -> Tensor:
    """What each token leads to, (n, V): the end's (n,) and, for the others, the next level's values (n * (V - 1),)."""
    if deeper is None:
        return ends
    values, end = deeper.view(len(ends), -1), task.eos_token_id
    return torch.cat([values[:, :end], ends[:, None], values[:, end:]], 1)


def grow_trees(task: Task, horizon: int, apart: bool = False) -> list[Tree]:
    """One tree a prompt (or a row, kept apart where masks may tell them apart), scored."""
    rows, go_on = finite_rows(task), task.vocab_size - 1
    count = sum(go_on**t for t in range(horizon - 1)) + go_on ** (horizon - 1) * task.vocab_size
    if count > MAX_RESPONSES:
        raise ValueError(
            f"task must have at most {MAX_RESPONSES:,} responses to a prompt for an exact answer; this one has"
            f" {in_words(count)} ({task.vocab_size} tokens, max_new_tokens={horizon})"
        )
    groups: dict[Any, list[Row]] = {}
    for i, row in enumerate(rows):
        groups.setdefault((tuple(task.encode(row).tolist()), i if apart else 0), []).append(row)
    trees = []
    for (prompt, _), members in groups.items():
        ends = [_scores(task, members, t, horizon) for t in range(horizon)]
        trees.append(Tree(np.array(prompt, dtype=np.int64), members, len(members) / len(rows), ends))
    return trees


def prefixes(task: Task, prompt: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """All texts of the prompt and `length` further tokens, none of them the end token: ((V - 1)^length, P + length)."""
    go_on = task.vocab_size - 1
    index = np.arange(go_on**length)
    digits = index[:, None] // go_on ** np.arange(length)[::-1] % go_on
    return np.concatenate([np.tile(prompt, (len(index), 1)), digits + (digits >= task.eos_token_id)], 1)


def _scores(task: Task, rows: list[Row], level: int, horizon: int) -> Tensor:
    """The mean over rows of the scores of the responses that end here: (n,), or (n, V) at the last level."""
    before = prefixes(task, np.zeros(0, dtype=np.int64), level)
    last = np.arange(task.vocab_size) if level == horizon - 1 else np.array([task.eos_token_id])
    ids = np.concatenate([np.repeat(before, len(last), 0), np.tile(last, len(before))[:, None]], 1)
    out = np.zeros(len(ids))
    for start in range(0, len(ids), _TEXTS_AT_ONCE):
        part = ids[start : start + _TEXTS_AT_ONCE].tolist()
        texts = task.decode(part)
        for row in rows:
            out[start : start + len(part)] += task.evaluate([row] * len(part), part, texts).totals / len(rows)
    scores = torch.from_numpy(out)
    return scores.view(len(before), -1) if level == horizon - 1 else scores


def asker(
    task: Task, model: AnyPolicy | None, temperature: float, masked: bool = False
) -> Callable[[Tree], list[Tensor]]:
    """A function from a tree to the log-probabilities of every level, (n, V) float64 each."""
    model = plain_module(model)
    if isinstance(model, (str, Path, PreTrainedModel)):
        loaded = load_model(model, task.tokenizer)
        twin = loaded if loaded.dtype == torch.float64 else copy.deepcopy(loaded).double()
        raw = partial(_model_logits, task, CausalPolicy(twin, task.vocab_size))
    else:
        right = "a language model, its name, or a function observations -> logits"
        check("model or reference", model, model is None or callable(model), right)
        raw = partial(_callable_logits, task, model)

    def ask(tree: Tree) -> list[Tensor]:
        levels = [logits.double().cpu() / temperature for logits in raw(tree.prompt)]
        if masked:
            levels = _masked(task, tree, levels)
        found = [logits.log_softmax(-1) for logits in levels]
        if any(logprobs.isnan().any() for logprobs in found):
            raise NotFinite
        return found

    return ask


def _model_logits(task: Task, policy: CausalPolicy, prompt: NDArray[np.int64]) -> list[Tensor]:
    """The logits of every prefix from forwards over the longest alone: a model reads left to right."""
    levels, go_on, head = task.max_new_tokens, task.vocab_size - 1, head_of(policy.model)
    texts = torch.from_numpy(prefixes(task, prompt, levels - 1))
    parts: list[list[Tensor]] = [[] for _ in range(levels)]
    size = max(1, _TOKENS_AT_ONCE // texts.shape[1])
    for start in range(0, len(texts), size):
        tokens = texts[start : start + size].to(policy.device)
        # a prefix of t tokens is read off the first text that begins with it
        firsts = [(-start % go_on ** (levels - 1 - t), go_on ** (levels - 1 - t)) for t in range(levels)]
        rows = [torch.arange(min(first, len(tokens)), len(tokens), every) for first, every in firsts]
        columns = [torch.full_like(row, len(prompt) - 1 + t) for t, row in enumerate(rows)]
        hidden = policy.hidden(tokens, torch.cat(rows).to(policy.device), torch.cat(columns).to(policy.device))
        logits = hidden if head is None else head(hidden)  # (n, V or more) float64
        for t, part in enumerate(logits[:, : task.vocab_size].split([len(row) for row in rows])):
            parts[t].append(part)
    return [torch.cat(part) for part in parts]


def _callable_logits(task: Task, policy: Policy | None, prompt: NDArray[np.int64]) -> list[Tensor]:
    """The logits of every prefix from a callable, asked level by level; None: all tokens alike."""
    levels = []
    for t in range(task.max_new_tokens):
        texts = prefixes(task, prompt, t)
        if policy is None:
            levels.append(torch.zeros(len(texts), task.vocab_size))
            continue
        observations = np.full((len(texts), task.max_prompt_tokens + task.max_new_tokens), task.vocab_size)
        observations[:, : texts.shape[1]] = texts
        parts = (observations[i : i + _TEXTS_AT_ONCE] for i in range(0, len(texts), _TEXTS_AT_ONCE))
        levels.append(torch.cat([policy_logits(policy, part, task.vocab_size) for part in parts]))
    return levels


def _masked(task: Task, tree: Tree, levels: list[Tensor]) -> list[Tensor]:
    """The logits inside the task's masks, which it is asked for where they let a response get."""
    reached, out = np.ones(1, dtype=np.bool_), []
    for level, logits in enumerate(levels):
        before = prefixes(task, np.zeros(0, dtype=np.int64), level)[reached]
        responses = np.full((len(before), task.max_new_tokens), task.vocab_size)
        responses[:, :level] = before
        mask = np.ones(logits.shape, dtype=np.bool_)
        mask[reached] = task.masks([tree.rows[0]] * len(before), responses)
        out.append(logits.masked_fill(~torch.from_numpy(mask), -torch.inf))
        reached = (reached[:, None] & np.delete(mask, task.eos_token_id, 1)).reshape(-1)
    return out
