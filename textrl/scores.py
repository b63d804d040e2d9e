"""What a score said of a batch of responses, checked; and how a reward function is called."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = {int, float, np.float64, np.float32}
LARGEST = float(np.finfo(np.float32).max)


class ScoreError(ValueError):
    """A score raised, took too long, or gave what is no score; the message names the prompt and the response."""


class ScoreUnavailable(ScoreError):
    """Raised by a score that can say nothing about any response now, so that it is not asked about each alone."""


@dataclass(frozen=True)
class Scores:
    """What a task's score said of a batch of responses.

    Attributes:
        totals: (B,) float64, the score of each response; NaN where it failed and was let pass.
        tokens: one float64 array per response when the score was given token by token, else None.
        faults: by the place of a response in the batch, what was wrong with its score.
    """

    totals: NDArray[np.float64]
    tokens: list[NDArray[np.float64]] | None = None
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def last(self) -> NDArray[np.float64]:
        """(B,) what the last token of each response is paid; 0 where the score failed."""
        if self.tokens is not None:
            return np.array([values[-1] for values in self.tokens])
        return np.nan_to_num(self.totals) if self.faults else self.totals

    def without_faults(self) -> Scores:
        """The scores that did not fail."""
        kept = [i for i in range(len(self.totals)) if i not in self.faults]
        return Scores(self.totals[kept], None if self.tokens is None else [self.tokens[i] for i in kept])


def check_scores(given: Any, prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> Scores:
    """Turns what a score function gave into `Scores`.

    Args:
        given: a sequence of B numbers, or of B sequences of numbers, one for each token.
        prompts: B prompts, for the message.
        completions: B responses, for the message.
        completion_ids: B responses as token ids, for their lengths.

    Raises:
        ScoreError: for a wrong length, a value that is not a number, NaN or infinity.
    """
    first = f"; the first is for {about(prompts[0], completions[0])}" if prompts else ""
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise ScoreError(
            f"score must return a list of {len(prompts)} numbers, one a completion; got {shorten(given)}{first}"
        )
    if len(given) != len(prompts):
        raise ScoreError(
            f"score must return {len(prompts)} numbers, one a completion; got {len(given)}: {shorten(given)}{first}"
        )
    try:  # the common case, quickly: plain numbers of a sum that float32 holds
        if set(map(type, given)) <= NUMBERS and sum(map(abs, given)) <= LARGEST:
            return Scores(np.array(given, dtype=np.float64))
    except OverflowError:
        pass
    if not (len(given) > 0 and isinstance(given[0], (list, tuple, np.ndarray))):
        return Scores(np.array([_number(x, prompts[i], completions[i]) for i, x in enumerate(given)]))
    tokens = []
    for i, values in enumerate(given):
        if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != len(completion_ids[i]):
            column = isinstance(values, (list, tuple, np.ndarray)) and len(values) == 1
            flat = ", or one number a completion in a flat list (squeeze(-1) makes one of a column)" if column else ""
            raise ScoreError(
                f"score must give a number for each of the {len(completion_ids[i])} tokens of a completion{flat};"
                f" got {shorten(values)} for {about(prompts[i], completions[i])}"
            )
        tokens.append(np.array([_number(x, prompts[i], completions[i]) for x in values], dtype=np.float64))
    totals = [values.sum() for values in tokens]
    return Scores(np.array([_number(x, prompts[i], completions[i]) for i, x in enumerate(totals)]), tokens)


def _number(value: Any, prompt: str, completion: str) -> float:
    where = f"for {about(prompt, completion)}"
    if hasattr(value, "item") and (value.numel() if hasattr(value, "numel") else getattr(value, "size", 1)) == 1:
        value = value.item()
    if not isinstance(value, (int, float)):
        more = ", or a list for a number a token (tolist() makes one)" if getattr(value, "ndim", 0) == 1 else ""
        raise ScoreError(f"score must be a number{more}; got {shorten(value)} {where}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST:
        what = "finite in float32" if math.isfinite(number) else "finite"
        raise ScoreError(f"score must be {what}; got {shorten(value)} {where}")
    return number


def about(prompt: str, completion: str) -> str:
    """The words by which a message says which response it is about."""
    return f"prompt {shorten(prompt)}, completion {shorten(completion)}"


def shorten(value: Any, limit: int = 80) -> str:
    """The repr of a value, at most `limit` characters, on one line."""
    text = repr(value)
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """The first line of what an error says; of one that says nothing, its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of coroutines, in a thread of its own: the caller's may have one, as a notebook's has."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="textrl coroutines", daemon=True).start()
    return loop


def call_score(fn: Callable[..., Any], prompts: list[str], completions: list[str], columns: dict[str, Any]) -> Any:
    """Calls a reward function by keyword, with those columns its signature takes (all, where it has **kwargs).

    One that is a coroutine function is run to its end.
    """
    arguments = {"prompts": prompts, "completions": completions, **columns}
    parameters: Mapping[str, inspect.Parameter] | None
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        parameters = None
    if parameters is not None and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    given = fn(**arguments)
    if inspect.iscoroutine(given):
        return asyncio.run_coroutine_threadsafe(given, _loop(os.getpid())).result()
    return given
