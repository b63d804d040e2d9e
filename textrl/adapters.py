"""LoRA and its like: models that share one copy of the base weights and differ in small adapters (Hu 2021; peft).

A policy with an adapter, its reference and its critic are modules of their own over the same tensors: nothing is
switched on or off between forwards, and the reference, a plain model, keeps the fast forward. peft makes the layers
and names the files, so `AutoPeftModelForCausalLM.from_pretrained` reads what an agent saves.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from .config import check

if TYPE_CHECKING:
    from peft import PeftConfig

BASE = "base"
"""In an agent's folder: the base model, where it lies nowhere else."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def import_peft() -> Any:
    """The package peft.

    Raises:
        ImportError: with what to install.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"adapters need peft ({error}): pip install 'gymnasium-textrl[lora]'") from None
    return peft


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has adapter layers."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def plain_module(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, adapter and all; any other model as it is."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    configs = model.peft_config
    if len(configs) > 1 or any(config.is_prompt_learning for config in configs.values()):
        raise ValueError(f"model must have one adapter, and in its layers; got {sorted(configs)}: {configs}")
    inner = model.get_base_model()
    inner._hf_peft_config_loaded, inner.peft_config = True, configs
    return inner


def is_adapter(model: PreTrainedModel, name: str) -> bool:
    """Whether the parameter of this name belongs to the model's adapter."""
    if not has_adapter(model):
        return False
    prefixes = import_peft().mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    marks = [prefixes[config.peft_type] for config in model.peft_config.values()]
    return any(mark in name for mark in [*marks, "modules_to_save."])


def base_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that are not the adapter's, by the names they have without one."""
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): parameter
        for name, parameter in model.named_parameters()
        if not is_adapter(model, name)
    }


def merged_weights(trunk: nn.Module) -> dict[str, Tensor]:
    """The state of a trunk with adapter layers as one without: each base weight with what its adapter makes of it."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    layers = {
        name: module
        for name, module in trunk.named_modules()
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))
    }
    inside = tuple(f"{name}." for name in layers)
    merged = {name: value.clone() for name, value in trunk.state_dict().items() if not name.startswith(inside)}
    for name, layer in layers.items():
        if isinstance(layer, BaseTunerLayer):
            alone: Any = copy.deepcopy(layer)  # merging writes into the base
            alone.merge()
            whole = alone.get_base_layer()
        else:
            whole = layer.modules_to_save[layer.active_adapters[0]]
        merged.update({f"{name}.{key}": value.clone() for key, value in whole.state_dict().items()})
    return merged


# ---- one copy of the weights -----------------------------------------------------------------------------------------


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model again over the same base weights and buffers; an adapter's weights are copied."""
    shared: list[Tensor] = [*base_weights(model).values(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def add_adapter(model: PreTrainedModel, config: PeftConfig, seed: int = 0) -> PreTrainedModel:
    """A twin of a model with a new adapter, which is what learns.

    Args:
        model: without one.
        config: peft's, of an adapter in layers.
        seed: of the adapter's weights.

    Raises:
        ValueError: for what is no config of an adapter in layers, or a model that has an adapter.
    """
    peft = import_peft()
    if not isinstance(config, peft.PeftConfig) or config.is_prompt_learning:
        raise ValueError(f"peft_config must be a config of peft for adapters in layers (LoraConfig); got {config!r}")
    _check_kind(config)
    if has_adapter(model):
        raise ValueError(
            "peft_config must be left out for a model that has an adapter: that one learns on, and as it was at the"
            " start it is the reference"
        )
    adapted, config = twin(model), copy.deepcopy(config)
    config.task_type = config.task_type or "CAUSAL_LM"  # by which peft's auto classes know what they read
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted.add_adapter(config)
    return learn_adapter(adapted).eval()  # no dropout in the new layers


def _check_kind(config: PeftConfig) -> None:
    """Refuses adapters that change the base weights, which others share, or are not only in layers of their own.

    Raises:
        ValueError: naming the field.
    """
    start = getattr(config, "init_lora_weights", True)
    changes = isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq"))
    for name, fine, right in (
        ("peft_type", str(config.peft_type).rpartition(".")[2] != "RANDLORA", "one whose weights can be saved"),
        ("task_type", config.task_type in (None, "CAUSAL_LM"), '"CAUSAL_LM"'),
        ("init_lora_weights", not changes, "one that leaves the base weights as they are (True)"),
        ("bias", getattr(config, "bias", "none") == "none", '"none"'),
        ("layer_replication", getattr(config, "layer_replication", None) is None, "None"),
        ("trainable_token_indices", getattr(config, "trainable_token_indices", None) is None, "None"),
    ):
        check(f"peft_config.{name}", getattr(config, name, None), fine, right)


def learn_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Sets the adapter's weights, and no others, to learn; returns the model."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(model, name))
    return model


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that does not learn; where a model has an adapter only that is copied."""
    return (twin(model) if has_adapter(model) else copy.deepcopy(model)).requires_grad_(False)


def share_base(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Lets `other` use the base weights of `model`, where all of them are equal; says whether they are."""
    mine, theirs = base_weights(model), base_weights(other)
    same = mine.keys() == theirs.keys() and all(
        weight.shape == theirs[name].shape and torch.equal(weight, theirs[name].to(weight))
        for name, weight in mine.items()
    )
    if same:
        for name, weight in mine.items():
            theirs[name].data = weight.data
    return same


def new_scalar(config: PreTrainedConfig) -> PreTrainedModel:
    """A scalar model of an architecture, with random weights.

    Raises:
        ValueError: for an architecture of which transformers has none, or one that does not read from left to right.
    """
    try:
        scalar = AutoModelForSequenceClassification.from_config(config)
        if hasattr(scalar, "score"):
            return scalar
    except ValueError:
        pass
    raise ValueError(
        f"model must be of an architecture whose AutoModelForSequenceClassification has a score for every token, for a"
        f" critic or reward model with a trunk of its own; got {config.model_type!r} (PPO's"
        ' critic="shared" needs none)'
    )


def adapted_critic(policy: PreTrainedModel, start: PreTrainedModel) -> PreTrainedModel:
    """A scalar model over the base weights of `start`, with an adapter of its own and a head that starts at zero.

    Args:
        policy: a model with an adapter; the critic's is a copy of it, or a new one of its kind for another `start`.
        start: the policy, or a causal or scalar model whose trunk the critic is to have.
    """
    trunk_owner = start if has_adapter(start) else add_adapter(start, *policy.peft_config.values())
    config = copy.deepcopy(start.config)
    config.num_labels = 1
    with torch.device("meta"):  # a shell without weights
        scalar = new_scalar(config)
    head = nn.Linear(scalar.score.in_features, 1, bias=False, device=start.device, dtype=start.dtype)
    nn.init.zeros_(head.weight)
    trunk = twin(trunk_owner).base_model
    setattr(scalar, scalar.base_model_prefix, trunk)
    scalar.score = head
    scalar._hf_peft_config_loaded, scalar.peft_config = True, trunk_owner.peft_config
    learn_adapter(scalar).score.requires_grad_(True)
    return scalar.eval()


# ---- on disk ---------------------------------------------------------------------------------------------------------


def lies_at(model: PreTrainedModel, name: str | Path) -> bool:
    """Whether a folder, or a hub name that was fetched, holds a model's base weights; one tensor is read at a time."""
    folder, weights = _folder(name), base_weights(model)
    left = set(weights)
    for file in sorted(folder.glob("model*.safetensors")) if folder is not None else ():
        with safe_open(file, "pt") as stored:
            for key in left & set(stored.keys()):
                if not torch.equal(stored.get_tensor(key).to(weights[key]), weights[key]):
                    return False
                left.remove(key)
    return not left


def _folder(name: str | Path) -> Path | None:
    """Where a folder or a fetched hub name lies."""
    from transformers.utils import cached_file

    if Path(name).is_dir() or not str(name):
        return Path(name) if str(name) else None
    try:
        return Path(cached_file(str(name), "config.json", local_files_only=True)).parent
    except (OSError, TypeError, ValueError):
        return None


def load_adapted(folder: Path, reference: PreTrainedModel | None = None) -> PreTrainedModel:
    """The causal model with an adapter that was saved in a folder.

    Args:
        folder: with `adapter_config.json`, and the base model in `base` or under the name that the config gives.
        reference: a model that is at hand: its weights are used where they are those of the base.
    """
    import_peft()
    own = folder / BASE
    base = str(own) if own.is_dir() else json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    if reference is not None and not has_adapter(reference) and base and lies_at(reference, base):
        model = twin(reference)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model.load_adapter(str(folder), is_trainable=True)
    load_adapter_weights(model, folder)  # of some kinds transformers leaves a part out
    return model


def save_adapter(model: PreTrainedModel, folder: Path, final: Path) -> None:
    """Writes the adapter as peft does, and the base model too unless it lies on disk already.

    Args:
        model: a causal model with an adapter.
        folder: where the files are written.
        final: what the folder will be called in the end.
    """
    model.save_pretrained(folder)
    name = str(model.config._name_or_path or "")
    replaced = final.resolve() in (Path(name).resolve(), *Path(name).resolve().parents)  # by what is written here
    if not name or Path(name).name == BASE or replaced or not lies_at(model, name):
        base = _without_adapter(model)
        base.save_pretrained(folder / BASE)
        name = str(final.resolve() / BASE)
    elif Path(name).is_dir():
        name = str(Path(name).resolve())
    content = json.loads((folder / CONFIG).read_text())
    content |= {"base_model_name_or_path": name}
    if "init_lora_weights" in content:  # the base is as it is now: nothing is to be made of it again
        content["init_lora_weights"] = True
    (folder / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True))


def _without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind over the same base weights, without the adapter."""
    with torch.device("meta"):
        plain = type(model)(copy.deepcopy(model.config)).requires_grad_(False)
    plain.load_state_dict(base_weights(model), strict=False, assign=True)
    plain.tie_weights()
    return plain


def load_adapter_weights(model: PreTrainedModel, folder: Path) -> None:
    """Puts the weights of an adapter that `save_adapter` wrote into a model with an adapter of the same form."""
    weights = {key.removeprefix("base_model.model."): value for key, value in load_file(folder / WEIGHTS).items()}
    found = import_peft().set_peft_model_state_dict(model, weights)
    if found.unexpected_keys:
        raise ValueError(f"{str(folder)!r} holds the adapter of another model: {found.unexpected_keys[:3]}")


def own_weights(module: nn.Module, policy: nn.Module) -> dict[str, Tensor]:
    """The parameters of a module that the policy does not hold too: what is to be saved beside it."""
    held = {parameter.data_ptr() for parameter in policy.parameters()}
    return {name: p.detach() for name, p in module.named_parameters() if p.data_ptr() not in held}
