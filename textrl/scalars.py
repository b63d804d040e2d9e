"""Scalar models: a language model's trunk with one number at every place, a critic's or a reward model's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .adapters import has_adapter, merged_weights, new_scalar
from .config import check
from .models import cast, check_whole, without_dropout
from .tabular import register_tabular

SCORE_SETTINGS = ("score_mean", "score_std", "score_options")
"""What a `RewardModel` keeps in its model's config."""


def value_model(model: PreTrainedModel, seed: int = 0, std: float = 0.0) -> PreTrainedModel:
    """A copy of a language model's trunk with a scalar head: a critic (std 0) or a reward model before training.

    It is the `AutoModelForSequenceClassification` of the same architecture with one label, so it saves and loads with
    `save_pretrained` and `from_pretrained`.

    Args:
        model: a causal language model, or such a scalar model itself; its trunk's weights are copied, with what an
            adapter adds to them.
        seed: of the head's weights.
        std: their standard deviation; 0 starts every value at zero.
    """
    check("model", model, isinstance(model, PreTrainedModel), "a language model or a scalar model")
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    for name in SCORE_SETTINGS:  # of a reward model whose trunk this is to be
        if hasattr(config, name):
            delattr(config, name)
    if getattr(config, "pad_token_id", None) is None:
        end = getattr(config, "eos_token_id", None)
        config.pad_token_id = end if isinstance(end, int) else 0
    with torch.random.fork_rng(devices=[]):
        scalar = new_scalar(config)
    trunk = model.base_model
    scalar.base_model.load_state_dict(merged_weights(trunk) if has_adapter(model) else trunk.state_dict())
    scalar = with_padding_learned(cast(without_dropout(scalar), model.dtype, model.device))
    weight = scalar.score.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return scalar


def with_padding_learned(model: PreTrainedModel) -> PreTrainedModel:
    """The same with an embedding that learns every token: padding may be the end token, and is told by lengths."""
    embedding: Any = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None
    return model


def load_scalar(folder: str | Path) -> PreTrainedModel:
    """A sequence classifier with one label from a folder or a hub name, in the dtype that it was saved in."""
    register_tabular()
    settings: Any = {"dtype": "auto", "num_labels": 1, "output_loading_info": True}
    found, report = AutoModelForSequenceClassification.from_pretrained(str(folder), **settings)
    check_whole(str(folder), report)
    return with_padding_learned(found)
