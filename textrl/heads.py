"""What makes logits of the trunk's last states: one matrix for most models; caps, scales or more layers for others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from .flat import touched
from .probing import agree, attempt, once, some_tokens, unremembered

LOW = 1e-2
"""The same states through the same matrix differ by no more, relative, in bfloat16."""


class OwnHead(nn.Module):
    """A model's own forward over states that are given to it: whatever it does to them, this does."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        view = copy.copy(model)  # no weight is copied
        view._modules = {**model._modules, model.base_model_prefix: _Given()}
        self.__dict__["view"] = view  # not a part of this module

    def forward(self, states: Tensor) -> Tensor:
        """(n, d) -> (n, V)."""
        view: Any = self.__dict__["view"]
        view._modules[view.base_model_prefix].states = states[None]
        placeholder = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
        return view(input_ids=placeholder).logits[0]


class _Given(nn.Module):
    """In place of a trunk: gives the states that it was given, (1, n, d)."""

    states: Tensor

    @property
    def decoder(self) -> _Given:
        """Where a model calls a part of its trunk."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> _States:
        return _States(last_hidden_state=self.states)


class _States(BaseModelOutputWithPast):
    """Last states, and None for whatever else a trunk may have to say."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """What makes logits of the trunk's last states, (n, d) -> (n, V).

    It is the output embedding where the logits are exactly that, else the model's own forward above its trunk; None
    where they cannot be told apart from the trunk.
    """
    if model.base_model is model or touched(model):
        return None
    kind = _kind(model)
    if kind is None:
        return None
    return model.get_output_embeddings() if kind == "plain" else OwnHead(model)


@once
def _kind(model: PreTrainedModel) -> str | None:
    """Which of the three in `head_of` it is: "plain", "own" or None."""
    tokens, base, own = some_tokens(model, 1, 4), model.base_model, OwnHead(model)
    plain = model.get_output_embeddings()
    known: list[Tensor] = []

    def is_own() -> bool:
        """Each state by itself, wherever it stands."""
        states = base(input_ids=tokens, **unremembered(base)).last_hidden_state[0]  # (4, d)
        logits = model(input_ids=tokens, **unremembered(model)).logits[0]
        known.append(states)
        orders = (slice(None), torch.arange(len(states), device=states.device).flip(0), slice(-1, None))
        return all(agree(own(states[order]), logits[order], LOW) for order in orders)

    def is_plain() -> bool:
        """In large logits, where a cap would show; in those that are all 0 nothing does."""
        (states,) = known
        if states.is_floating_point():
            states = states * (100 / plain(states).abs().max())
        return agree(plain(states), own(states), LOW)

    if not attempt(is_own):
        return None
    return "plain" if isinstance(plain, nn.Module) and attempt(is_plain) else "own"
