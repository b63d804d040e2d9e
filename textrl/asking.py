"""Asking a score that may misbehave: raise, hang, answer nonsense. Which response it was about, and what follows."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .scores import ScoreError, Scores, ScoreUnavailable, about, check_scores, shorten


@dataclass(frozen=True)
class Asking:
    """How a score is asked.

    Attributes:
        timeout: seconds that one call may take; None waits. A call that takes longer is left behind in its thread,
            which keeps nobody from going on or ending.
        drop: a response whose score fails is marked (`Scores.faults`), in place of an error.
    """

    timeout: float | None = None
    drop: bool = False


class AllDropped(ScoreError):
    """The score failed for every response of a batch.

    Attributes:
        faults: what was wrong, one a response.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__(f"score failed for all {len(faults)} responses of a batch: {faults[0]}")
        self.faults = faults


Score = Callable[..., Any]
Columns = dict[str, list[Any]]
"""The keyword lists of a score, each of B: prompts, completions, completion_ids and the columns of the rows."""


def ask(score: Score, columns: Columns, asking: Asking) -> Scores:
    """What a score says of B responses, asked once for all of them; one by one only where that fails.

    Args:
        score: as `Task.score`.
        columns: its keyword lists.
        asking: what to do when it misbehaves.

    Raises:
        ScoreError: naming a prompt and a response, where the score misbehaves and `asking.drop` is not set. What is
            about no one response (a wrong length, an error that comes only with the whole batch) names the first.
    """
    size = len(columns["prompts"])
    try:
        given = _call(score, columns, asking.timeout)
    except ScoreError as error:
        if size == 1 or isinstance(error.__cause__, ScoreUnavailable):
            return _joined([error] * size, asking)
        found = _one_by_one(score, columns, asking)
        if not asking.drop and all(isinstance(each, Scores) for each in found):
            raise
        return _joined(found, asking)
    try:
        return _check(given, columns)
    except ScoreError as error:
        if not asking.drop:
            raise
        if size == 1:
            return _joined([error], asking)
        answers = given.tolist() if hasattr(given, "tolist") else given
        if isinstance(answers, (list, tuple)) and len(answers) == size:  # no need to ask again
            return _joined([_single(columns, i, partial(list, [each])) for i, each in enumerate(answers)], asking)
        return _joined(_one_by_one(score, columns, asking), asking)


def _one_by_one(score: Score, columns: Columns, asking: Asking) -> list[Scores | ScoreError]:
    """Each response asked about alone; without `drop` only up to the first fault."""
    found: list[Scores | ScoreError] = []
    for i in range(len(columns["prompts"])):
        found.append(_single(columns, i, partial(_call, score, _row(columns, i), asking.timeout)))
        if not asking.drop and isinstance(found[-1], ScoreError):
            break
    return found


def _single(columns: Columns, i: int, answer: Callable[[], Any]) -> Scores | ScoreError:
    """The score of response i alone, or what is wrong with it."""
    try:
        return _check(answer(), _row(columns, i))
    except ScoreError as error:
        return error


def _row(columns: Columns, i: int) -> Columns:
    return {name: values[i : i + 1] for name, values in columns.items()}


def _check(given: Any, columns: Columns) -> Scores:
    return check_scores(given, columns["prompts"], columns["completions"], columns["completion_ids"])


def _joined(found: list[Scores | ScoreError], asking: Asking) -> Scores:
    """Scores of single responses as those of a batch; NaN, and zeros for each token, where there is a fault."""
    whole = [each for each in found if isinstance(each, Scores)]
    by_token = bool(whole) and whole[0].tokens is not None
    totals, tokens, faults = np.full(len(found), np.nan), [np.zeros(1)] * len(found), {}
    for i, each in enumerate(found):
        if isinstance(each, Scores) and (each.tokens is not None) != by_token:
            each = ScoreError("score must give a list for every response or for none")
        if isinstance(each, ScoreError):
            if not asking.drop:
                raise each
            faults[i] = str(each)
            continue
        totals[i] = each.totals[0]
        if each.tokens is not None:
            tokens[i] = each.tokens[0]
    return Scores(totals, tokens if by_token else None, faults)


def _call(score: Score, columns: Columns, timeout: float | None) -> Any:
    """One call.

    Raises:
        ScoreError: for an exception, or no answer in time.
    """
    given = {  # a score may change what it is given
        name: [each.copy() if type(each) is list else each for each in values] for name, values in columns.items()
    }
    try:
        return score(**given) if timeout is None else _within(timeout, partial(score, **given))
    except _Late as late:
        raise ScoreError(f"score gave no answer within {timeout:g} s (score_timeout) for {_first(columns)}") from late
    except Exception as error:
        try:
            said = f": {shorten(str(error), 200)[1:-1]}" if str(error) else ""
        except Exception:  # of its own making
            said = ""
        raise ScoreError(f"score raised {type(error).__name__}{said} for {_first(columns)}") from error


def _first(columns: Columns) -> str:
    """Which response a call was about, or which was the first."""
    size = len(columns["prompts"])
    if size == 0:
        return "no prompt at all"
    return about(columns["prompts"][0], columns["completions"][0]) + (f", the first of {size}" if size > 1 else "")


class _Late(TimeoutError):
    """There was no answer in time."""


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns or raises, in a thread that is left alone after so many seconds."""
    box: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:  # handed on to whoever waits
            box.put((None, error))

    threading.Thread(target=work, name="textrl score", daemon=True).start()
    try:
        answer, error = box.get(timeout=seconds)
    except queue.Empty:
        raise _Late from None
    if error is not None:
        raise error
    return answer
