"""The frozen lower blocks of a model, run once for all the models that share them.

With `trainable_layers=8` a policy, its critic and its reference differ in their last 8 blocks alone: what the blocks
below make of a text is the same for all three, in every epoch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .heads import head_of
from .probing import agree, attempt, once, some_tokens


@once
def splittable(model: PreTrainedModel) -> bool:
    """Whether a model's trunk can be entered half-way: embeddings, blocks of one kind, and a norm."""
    modules = model.base_model._modules
    plain = {"embed_tokens", "layers", "norm", "rotary_emb"}
    if model.base_model is model or set(modules) != plain or not isinstance(modules["layers"], nn.ModuleList):
        return False
    if len(set(getattr(model.config, "layer_types", None) or ())) > 1:
        return False  # which kind a block is hangs on its place among all of them
    tokens = some_tokens(model, 1, 4)

    def whole() -> bool:
        states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return agree(states_above(model, states_below(model, tokens, 1), 1), states)

    return attempt(whole)


def frozen_blocks(model: PreTrainedModel) -> int:
    """How many blocks, from the first, do not learn (the embeddings neither); 0 for a model that cannot be split."""
    if head_of(model) is None or not splittable(model):
        return 0
    if any(p.requires_grad for p in model.base_model.embed_tokens.parameters()):
        return 0
    count = 0
    for block in model.base_model.layers:
        if any(p.requires_grad for p in block.parameters()):
            return count
        count += 1
    return 0  # nothing learns: nothing to share


def same_blocks(first: PreTrainedModel, second: PreTrainedModel, blocks: int) -> bool:
    """Whether the embeddings and the first `blocks` blocks of two models are equal to the bit."""
    if not (blocks and splittable(first) and splittable(second)):
        return False
    parts = []
    for model in (first, second):
        base = model.base_model
        parts.append([*base.embed_tokens.parameters(), *(p for b in base.layers[:blocks] for p in b.parameters())])
    return len(parts[0]) == len(parts[1]) and all(
        a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(*parts, strict=True)
    )


@torch.no_grad()
def states_below(model: PreTrainedModel, tokens: Tensor, blocks: int) -> Tensor:
    """What the first `blocks` blocks make of (B, S) tokens: (B, S, d)."""
    view = _view(model.base_model, slice(0, blocks))
    view._modules["norm"] = nn.Identity()
    return view(input_ids=tokens, use_cache=False).last_hidden_state


def states_above(model: PreTrainedModel, below: Tensor, blocks: int) -> Tensor:
    """The last hidden states from those below, differentiable: (B, S, d) -> (B, S, d)."""
    return _view(model.base_model, slice(blocks, None))(inputs_embeds=below, use_cache=False).last_hidden_state


def _view(trunk: PreTrainedModel, blocks: slice) -> PreTrainedModel:
    """A trunk of some of the blocks, which it shares; no weight is copied."""
    view = copy.copy(trunk)
    view._modules = dict(trunk._modules)
    view._modules["layers"] = nn.ModuleList(list(trunk.layers)[blocks])
    return view
