"""The model an agent starts from: checked against the task, on the device, with an adapter where one is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .adapters import CONFIG, add_adapter, has_adapter, learn_adapter, lies_at, load_adapted, share_base, twin
from .config import AgentConfig, check
from .env import TextEnv
from .models import DTYPES, cast, load_model, pick_dtype, small_model, train_last_layers
from .stepwise import check_positions
from .vector import TextVectorEnv

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


def keep_dtype(config: AgentConfig, model: PreTrainedModel) -> AgentConfig:
    """The dtype "auto" settled as that of a model that gets an adapter: its weights are its owner's, too."""
    own = str(model.dtype).removeprefix("torch.")
    return replace(config, dtype=own) if config.dtype == "auto" and own in DTYPES else config


def starting_model(
    model: PreTrainedModel | str | Path | None,
    base: TextEnv | TextVectorEnv,
    config: AgentConfig,
    device: torch.device,
    peft_config: PeftConfig | None = None,
) -> PreTrainedModel:
    """The policy as it is before the first update, its parameters set to learn or not.

    Where it has an adapter, the environment's reference uses its base weights, if they are the same.

    Args:
        model: a model, a folder or hub name of one, or None for a small GPT-2 with random weights.
        base: the environment, without its wrappers.
        config: the agent's settings.
        device: where the model goes.
        peft_config: of an adapter to add; then nothing else learns.

    Raises:
        ValueError: for a model that is the environment's reference, has too short a context, or does not fit the rest.
    """
    task, reference = base.task, base.reference
    if model is None:
        loaded = small_model(task.vocab_size, task.max_prompt_tokens + task.max_new_tokens, config.seed)
    else:
        loaded = load_model(_at_hand(model, reference, peft_config is not None), task.tokenizer)
    check_positions("model", loaded, task)
    if peft_config is not None:
        loaded = add_adapter(loaded, peft_config, config.seed)
    elif reference is not None and loaded is reference:
        if not has_adapter(loaded):
            raise ValueError("model and the environment's reference are one object: pass copy.deepcopy(model) as one")
        loaded = twin(loaded)  # the reference keeps the adapter as it is now
    parameters = 0 if model is None else sum(p.numel() for p in loaded.parameters())
    loaded = cast(loaded, pick_dtype(config.dtype, device, parameters), device)
    if reference is not None and reference.device != device:
        reference.to(device)
    if not has_adapter(loaded):
        train_last_layers(loaded, config.trainable_layers)
        return loaded
    layers = config.trainable_layers
    check("trainable_layers", layers, layers is None, "None for a model with an adapter: that alone learns")
    if reference is not None:
        share_base(loaded, reference)
    return learn_adapter(loaded)


def _at_hand(
    model: PreTrainedModel | str | Path, reference: PreTrainedModel | None, adapted: bool
) -> PreTrainedModel | str | Path:
    """What to load; where that would be the reference's own weights once more for an adapter, the reference."""
    if not isinstance(model, (str, Path)):
        return model
    if (Path(model) / CONFIG).is_file():
        return load_adapted(Path(model), reference)
    here = adapted and reference is not None and not has_adapter(reference) and lies_at(reference, model)
    return reference if here and reference is not None else model
