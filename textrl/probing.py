"""What a model does, found out by asking it once: neither its class nor its config always says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .models import longest_text

T = TypeVar("T")


def once(question: Callable[[PreTrainedModel], T]) -> Callable[[PreTrainedModel], T]:
    """The same function, which asks each model once, without gradients; weights that change do not matter."""
    answers: WeakKeyDictionary[PreTrainedModel, T] = WeakKeyDictionary()

    @functools.wraps(question)
    def ask(model: PreTrainedModel) -> T:
        if model not in answers:
            with torch.no_grad():
                answers[model] = question(model)
        return answers[model]

    return ask


def some_tokens(model: PreTrainedModel, rows: int, columns: int) -> Tensor:
    """Token ids that a model knows, no more a row than it reads: (rows, columns at most)."""
    size: int = model.config.get_text_config().vocab_size
    columns = min(columns, longest_text(model))
    return (torch.arange(1, rows * columns + 1, device=model.device) % size).view(rows, columns)


def agree(found: Tensor, right: Tensor) -> bool:
    """Whether two ways to compute the same numbers differ by rounding alone."""
    coarse = right.dtype in (torch.bfloat16, torch.float16)
    if found.shape != right.shape:
        return False
    return bool((found - right).abs().max() <= (5e-2 if coarse else 1e-4) * right.abs().max())


def unremembered(model: PreTrainedModel) -> dict[str, Any]:
    """What a forward is to be called with, so that it fills no cache of keys and values that nobody asked for."""
    return {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
