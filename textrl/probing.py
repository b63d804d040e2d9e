"""What a model does, found out by asking it once: neither its class nor its config always says."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

T = TypeVar("T")


def once(question: Callable[[PreTrainedModel], T]) -> Callable[[PreTrainedModel], T]:
    """The same function, which asks each model once, without gradients and in eval mode.

    What is asked is the code of the model, and not its weights, which may change.
    """
    answers: WeakKeyDictionary[PreTrainedModel, T] = WeakKeyDictionary()

    @functools.wraps(question)
    def ask(model: PreTrainedModel) -> T:
        if model not in answers:
            learning = model.training
            with torch.no_grad():
                answers[model] = question(model.eval())
            model.train(learning)
        return answers[model]

    return ask


def attempt(trial: Callable[[], bool]) -> bool:
    """Whether a trial succeeds; one that raises does not, whatever it is: it runs somebody else's code.

    Raises:
        MemoryError, torch.OutOfMemoryError: which say nothing about the model.
    """
    try:
        return trial()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:
        return False


def longest_text(model: PreTrainedModel) -> int:
    """How many tokens a model reads at most; a huge number where it does not say."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if limit is None or limit < 1 else int(limit)


def some_tokens(model: PreTrainedModel, rows: int, columns: int) -> Tensor:
    """Token ids that a model knows, no more a row than it reads: (rows, columns at most)."""
    size: int = model.config.get_text_config().vocab_size
    columns = min(columns, longest_text(model))
    return (torch.arange(1, rows * columns + 1, device=model.device) % size).view(rows, columns)


def agree(found: Tensor, right: Tensor, low: float = 5e-2) -> bool:
    """Whether two ways to compute the same numbers differ by rounding alone.

    Args:
        found: any shape.
        right: the same shape; what is far below 0 is a ban, and only has to be one in both.
        low: how far they may be apart, relative to the largest, where the dtype is below float32.
    """
    if found.shape != right.shape:
        return False
    counts = right > -1e4
    if not torch.equal(found > -1e4, counts):
        return False
    found, right = found[counts], right[counts]
    if right.dtype in (torch.bfloat16, torch.float16):
        tolerance = low
    else:
        tolerance = 1e-4 if right.device.type == "cpu" else 5e-3  # a GPU may multiply in TF32
    return bool((found - right).abs().max() <= tolerance * right.abs().max()) if len(right) else True


@once
def _takes_use_cache(model: PreTrainedModel) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "use_cache" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def unremembered(model: PreTrainedModel) -> dict[str, Any]:
    """What a forward is to be called with, so that it fills no cache of keys and values that nobody asked for."""
    return {"use_cache": False} if _takes_use_cache(model) else {}


@once
def looks_ahead(model: PreTrainedModel) -> bool:
    """Whether what a model says of a token changes with those after it, as in a BERT that is no decoder."""
    tokens = some_tokens(model, 1, 4).repeat(3, 1)
    tokens[2, -1] = (tokens[2, -1] + 1) % model.config.get_text_config().vocab_size
    first, again, other = model(input_ids=tokens, **unremembered(model)).logits[:, :-1]
    return agree(first, again, 1e-2) and not agree(first, other, 1e-2)  # one that never says the same is another fault
