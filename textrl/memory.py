"""Gradients in bounded memory; when an allocation fails, half as many tokens at once, then which options to turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch import Rollout, microbatches
from .config import AgentConfig
from .scores import reason, shorten

Loss = Callable[[Rollout], tuple[Tensor, Mapping[str, Tensor | float]]]
"""A batch -> the mean loss () and numbers to report, each a number or () and a mean of the same kind."""


class OutOfMemory(ValueError):
    """A batch that does not fit, and the options that make it smaller."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an allocator, a GPU's or the CPU's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def accumulate_gradients(
    loss: Loss, batch: Rollout, tokens_at_once: int, by_group: bool = False, scale: float = 1.0
) -> dict[str, float]:
    """Adds the gradients of the mean loss over a batch, a microbatch at a time.

    Args:
        loss: as `Agent.minimise` takes it.
        batch: the episodes.
        tokens_at_once: bound on the tokens of a microbatch.
        by_group: the mean is over groups of `batch.group_size` episodes, which stay whole; else over tokens.
        scale: of the gradients, `Optimizer.scale`.

    Returns:
        the mean loss and its numbers.
    """
    size = batch.group_size if by_group else 1
    total = len(batch) if by_group else max(1, batch.num_tokens)
    reports: list[tuple[float, dict[str, Tensor | float]]] = []
    if batch.tokens.numel() <= tokens_at_once:
        pieces = iter([replace(batch, group_size=size)])
    else:
        pieces = (batch.select(part, size) for part in microbatches(batch, tokens_at_once, size))
    for piece in pieces:
        share = (len(piece) if by_group else piece.num_tokens) / total
        value, numbers = _checked(loss(piece))
        torch.autograd.backward(value * (share * scale))
        said = {"loss": value, **numbers}.items()
        reports.append((share, {key: n.detach() if isinstance(n, Tensor) else n for key, n in said}))
    out: dict[str, float] = {}
    for share, report in reports:  # only now: to read a number is to wait for a GPU
        for key, number in report.items():
            out[key] = out.get(key, 0.0) + float(number) * share
    return out


def _checked(found: Any) -> tuple[Tensor, Mapping[str, Tensor | float]]:
    """What a loss gave, if it is its mean and numbers to report.

    Raises:
        ValueError: otherwise.
    """
    value: Any
    value, numbers = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    fine = isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad
    if not fine or not isinstance(numbers, Mapping):
        right = "a function of a batch that gives (mean, numbers): a tensor () with a gradient, and a dict to report"
        kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and not fine else shorten(found)
        grad = " without a gradient" if isinstance(value, Tensor) and not value.requires_grad else ""
        raise ValueError(f"loss must be {right}; got {kind}{grad}")
    value = value.reshape(())
    return value, numbers


def mean_of(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over some steps, of which all have the same; at least one step."""
    return {key: sum(step[key] for step in steps) / len(steps) for key in steps[0]}


def halving(
    run: Callable[[int], dict[str, float]], tokens_at_once: int, largest: int, undo: Callable[[], None]
) -> tuple[dict[str, float], int]:
    """Runs once more with half the tokens at once where memory did not suffice.

    Args:
        run: tokens at once -> a result.
        tokens_at_once: the bound to begin with.
        largest: the tokens of the largest microbatch under that bound.
        undo: called between the two.

    Returns:
        the result, and the bound in force from now on.
    """
    try:
        return run(tokens_at_once), tokens_at_once
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    half = max(1, min(tokens_at_once, largest) // 2)  # outside of `except`: its traceback holds the memory
    undo()
    warnings.warn(
        f"out of memory in the update: max_tokens_per_microbatch is {half} from now on (it was {tokens_at_once})",
        RuntimeWarning,
        stacklevel=3,
    )
    return run(half), half


@contextmanager
def explained(config: AgentConfig) -> Iterator[None]:
    """Turns an allocator's error into one line that names the options to turn.

    Raises:
        OutOfMemory: in its place.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"out of memory: lower max_tokens_per_microbatch (now {config.max_tokens_per_microbatch}) for less in a"
            f" forward and backward pass, batch_size (now {config.batch_size}) for less while sampling, or"
            f" trainable_layers (now {config.trainable_layers}) for a smaller optimizer ({reason(error)})"
        ) from error
