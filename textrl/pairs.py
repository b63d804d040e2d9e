"""Preference pairs as token ids: those that differ, what a reference says of them, and some held out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .cells import number_of, text_of
from .chats import ChatFormat, as_texts
from .config import check
from .files import Rows, all_or_none
from .offline import encode_response, prompt_of, token_ids
from .preferences import REFERENCE_COLUMNS
from .scores import shorten
from .task import Task

SIDES = ("chosen", "rejected")
FEWEST = 20
"""Fewer pairs than this are not held out: they could not tell."""

Pair = tuple[list[int], list[list[int]], list[float] | None]
"""Token ids of a prompt, of the chosen and the rejected response, and what the reference says of these."""


def encoded_pairs(task: Task, rows: Rows) -> tuple[list[Pair], Tensor | None]:
    """The pairs that differ within the horizon, and the reference's log-probabilities where the rows have them.

    Returns:
        N pairs, and (N, 2) or None.

    Raises:
        ValueError: for rows of another kind, reference columns that only some rows have, or no pair that differs.
    """
    every = rows.each(lambda row: _encode(task, row, rows.strict))
    pairs = [pair for pair in every if pair[1][0] != pair[1][1]]
    check("dataset", f"{len(every)} pairs that are alike", bool(pairs), "pairs that differ within the horizon")
    if len(pairs) < len(every):
        what = f"whose chosen and rejected are alike in max_new_tokens={task.max_new_tokens} tokens: they tell nothing"
        warnings.warn(f"dropped {len(every) - len(pairs)} of {len(every)} pairs {what}", stacklevel=3)
    known = [reference for _, _, reference in pairs if reference is not None]
    all_or_none(len(known), len(pairs), f"the columns {list(REFERENCE_COLUMNS)}")
    return pairs, torch.tensor(known) if known else None


def _encode(task: Task, row: Mapping[str, Any], strict: bool) -> Pair:
    row = as_texts(row, [side for side in SIDES if row.get(f"{side}_ids") is None], ChatFormat.of(task))
    if "prompt" not in row and all(isinstance(row.get(side), str) for side in SIDES):
        more = "read_preferences(rows) finds the prompt with which both texts of a row begin"
        raise ValueError(f"column 'prompt' is missing; got the columns {shorten(list(row))}; {more}")
    prompt = prompt_of(row, task, strict)
    responses = []
    for side in SIDES:
        if row.get(f"{side}_ids") is None:
            responses.append(encode_response(task, prompt, text_of(row, side), called=side)[1])
        else:
            responses.append(token_ids(row, f"{side}_ids", task))
    given = [name for name in REFERENCE_COLUMNS if row.get(name) is not None]
    if len(given) == 1:
        (missing,) = set(REFERENCE_COLUMNS) - set(given)
        raise ValueError(f"column {missing!r} must be given where {given[0]!r} is; got {row.get(missing)!r}")
    reference = [number_of(row, name) for name in REFERENCE_COLUMNS] if given else None
    return task.encode({"prompt": prompt}).tolist(), responses, reference


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Random places of the pairs that are held out, and of the others, shuffled; equal pairs stay together.

    Args:
        pairs: N.
        share: of them to hold out, at most; none are where that is fewer than `FEWEST`.
        seed: of the choice.
    """
    members: dict[Any, list[int]] = {}  # by prompt and both responses, whichever was chosen
    for i, (prompt, both, _) in enumerate(pairs):
        members.setdefault((tuple(prompt), frozenset(map(tuple, both))), []).append(i)
    every = list(members.values())
    shuffled = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = np.cumsum([len(every[number]) for number in shuffled], dtype=np.int64)
    held = round(share * len(pairs))
    held = int(ends[ends <= held].max(initial=0)) if held >= FEWEST else 0
    right = f"a share that leaves some of {len(pairs)} pairs to learn from"
    check("held_out", share, not held or held < len(pairs), right)
    order = torch.tensor([i for number in shuffled for i in every[number]], dtype=torch.int64)
    return order[:held], order[held:]


class AskedOnce:
    """What a reference says of the responses of N pairs; it is asked about a pair when that is first drawn.

    Args:
        pairs: by which these pairs are told apart from others.
        reference: by which the reference is; "" for the model as it starts.
        size: N.
        given: (N, 2), what the dataset says of it; None: the reference is asked.
    """

    not_saved: ClassVar = ("given", "whom", "size")

    def __init__(self, pairs: str, reference: str, size: int, given: Tensor | None = None) -> None:
        self.given, self.whom, self.size = given, (pairs, reference), size
        self.known = torch.full((size, 2), torch.nan) if given is None else given
        self.told_by = (pairs, reference if given is None else "columns")

    def about(self, indices: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """The log-probabilities of all pairs it was asked about, (N, 2), those at `indices` (n,) among them.

        Args:
            indices: of the pairs.
            ask: indices (m,) -> the reference's log-probabilities of both responses, (m, 2).
        """
        if self.given is not None:  # before what a loaded agent knew
            self.known, self.told_by = self.given, (self.whom[0], "columns")
        elif self.told_by[0] != self.whom[0] or (self.whom[1] and self.told_by != self.whom):
            self.known, self.told_by = torch.full((self.size, 2), torch.nan), self.whom
        unknown = indices[self.known[indices].isnan().any(1)]
        if len(unknown):
            self.known[unknown] = ask(unknown)
        return self.known


class HeldOut:
    """Pairs that are not learned from, and the weights that did best on them.

    Args:
        indices: (n,) of the pairs.
        measured: how: by which pairs, held out how, under which loss.
    """

    not_saved: ClassVar = ("indices", "measured")

    def __init__(self, indices: Tensor, measured: str) -> None:
        self.indices, self.measured = indices, measured
        self.best: list[Tensor] = []
        self.best_loss = self.loss = math.inf
        self.best_measured = measured

    def keep_if_alike(self, weights: Sequence[Tensor]) -> None:
        """Forgets a best that was measured otherwise, or that was of other weights than these."""
        fits = [tuple(kept.shape) for kept in self.best] == [tuple(each.shape) for each in weights]
        if self.best_measured != self.measured or (self.best and not fits):
            self.best, self.best_loss, self.best_measured = [], math.inf, self.measured

    def note(self, loss: float, weights: Callable[[], list[Tensor]]) -> None:
        """Takes a loss down, and the weights where it is the least so far."""
        self.loss = loss
        if loss < self.best_loss:
            self.best, self.best_loss = weights(), loss
