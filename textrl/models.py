"""Models before anything is asked of them: which device and dtype, loading, freezing, scalar heads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from .adapters import CONFIG, load_adapted, plain_module
from .config import check
from .flat import flat_of
from .folders import verify_if_ours
from .hub import check_source
from .probing import longest_text, looks_ahead, unremembered
from .scores import reason, shorten
from .symbols import load_tokenizer
from .tabular import PrefixTable, register_tabular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KEPT = re.compile("inv_freq|embed_positions")
"""Buffers of rotary positions."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """The named device; "auto" is the GPU where there is one.

    Raises:
        ValueError: for a device torch does not know or does not have.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f'device must be "auto", "cpu" or a device torch has; got {device!r} ({error})') from None
    return chosen


def pick_dtype(dtype: str = "auto", device: torch.device | None = None, parameters: int = 0) -> torch.dtype:
    """The named dtype; "auto" is float32 for small models, else bfloat16 where the hardware multiplies it fast.

    Raises:
        ValueError: for a name other than "auto", "float32", "bfloat16" and "float16".
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {['auto', *DTYPES]}; got {dtype!r}")
        return DTYPES[dtype]
    if parameters < 20_000_000:
        return torch.float32
    if device is not None and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def small_model(vocab_size: int, max_length: int, seed: int = 0, **changes: Any) -> GPT2LMHeadModel:
    """The default policy: a GPT-2 of 2 layers and width 64 with random weights, for toy vocabularies.

    Args:
        vocab_size: V.
        max_length: the longest text, prompt and response, in tokens.
        seed: of the weights.
        changes: fields of `GPT2Config` to change.
    """
    fields = {
        "vocab_size": vocab_size,
        "n_positions": max_length,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return without_dropout(GPT2LMHeadModel(GPT2Config(**{**fields, **changes})))


def cast(model: Any, dtype: torch.dtype | None, device: torch.device | None = None) -> Any:
    """The same model with its weights in a dtype, on a device; None leaves them.

    The frequencies of rotary positions stay as they are, as in `from_pretrained`: rounded to bfloat16 they would turn
    far places another way.
    """
    kept = [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items() if KEPT.search(name)]
    model = model.to(device=device, dtype=dtype)
    for module, name, buffer in kept:
        module._buffers[name] = None if buffer is None else buffer.to(device=device)
    return model


def without_dropout(model: PreTrainedModel) -> Any:
    """The same model, in eval mode and with every dropout at 0: RLHF wants the same answer twice."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def load_model(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    frozen: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    called: str = "model",
) -> PreTrainedModel:
    """A causal language model from a `PreTrainedModel`, a folder or a hub name, without dropout.

    Args:
        model: what to load; a `PreTrainedModel` is taken as it is, not copied.
        tokenizer: checked against the model's vocabulary.
        frozen: no parameter requires a gradient.
        dtype: None keeps the dtype of the weights.
        device: None leaves the model where it is.
        called: the argument that it is, for messages.

    Raises:
        ValueError: for a folder or name that holds no causal language model, or a vocabulary too small.
    """
    source = model
    model = plain_module(model)
    if isinstance(model, (str, Path)):
        model = _from_pretrained(str(model), dtype, called)
    elif not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{called} must be a transformers PreTrainedModel, a folder or a hub name; got {shorten(model)}"
        )
    if tokenizer is not None:
        check_vocabulary(model, tokenizer, called)
        if strange := strange_tokenizer(source, tokenizer, called):
            warnings.warn(strange, stacklevel=3)
    model = cast(without_dropout(model), dtype, device)
    if frozen:
        model.requires_grad_(False)
    return model


def strange_tokenizer(source: Any, tokenizer: PreTrainedTokenizerFast, called: str) -> str:
    """What is wrong where a folder holds a tokenizer by which the texts would be other tokens than by this one."""
    if not isinstance(source, (str, Path)) or not (Path(source) / "tokenizer.json").is_file():
        return ""
    try:
        own, given = load_tokenizer(str(source)).get_vocab(), tokenizer.get_vocab()
    except ValueError as error:
        return f"{called} {str(source)!r}: {error}; that of the task is used"
    if own.items() <= given.items():
        return ""
    what = f"{called} {str(source)!r} was saved with another tokenizer ({len(own)} tokens) than the task's"
    mend = f"a task that takes a tokenizer can be given its own, {str(source)!r}"
    return f"{what} ({len(given)}): texts are other tokens to it; {mend}"


def _from_pretrained(name: str, dtype: torch.dtype | None, called: str) -> PreTrainedModel:
    register_tabular()
    check_source(name, called)
    verify_if_ours(Path(name))
    if (Path(name) / CONFIG).is_file():
        return load_adapted(Path(name))
    try:
        model, report = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{called} {name!r} holds no causal language model ({reason(error)})") from None
    check_whole(name, report)
    return model


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Refuses a text that a model cannot read.

    Raises:
        ValueError: with both lengths.
    """
    if tokens > longest_text(model):
        raise ValueError(
            f"model reads at most {longest_text(model)} tokens, but prompt and response may have {tokens}:"
            " shorten the prompt or lower max_new_tokens"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, called: str = "model") -> None:
    """Refuses a model that is no causal language model, and a tokenizer whose tokens it does not all know.

    Raises:
        ValueError: with what it does, or both sizes.
    """
    check_vocabulary_size(model, tokenizer, called)
    if wrong := _not_causal(model):
        raise ValueError(
            f"{called} must be a causal language model, such as AutoModelForCausalLM loads;"
            f" {type(model).__name__} {wrong}"
        )


def _not_causal(model: PreTrainedModel) -> str:
    """What a model does that a causal language model does not; "" where it is one."""
    padding = getattr(model.config, "pad_token_id", None)  # alone it draws a warning
    other = torch.tensor([[int(padding == 0)]], device=model.device)
    try:
        with torch.no_grad():
            logits = getattr(model(input_ids=other, **unremembered(model)), "logits", None)
    except (TypeError, ValueError) as error:  # of one that wants more than tokens
        return f"gives no logits for one token ({reason(error)})"
    if logits is None or logits.ndim != 3:
        return f"gives {'no logits' if logits is None else f'logits of shape {tuple(logits.shape)}'} for one token"
    return "reads both ways: what it says at a token changes with those after it" if looks_ahead(model) else ""


def check_vocabulary_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, called: str = "model") -> None:
    """Refuses a tokenizer whose tokens a model does not all know.

    Raises:
        ValueError: with both sizes.
    """
    size = model.get_input_embeddings().weight.shape[0] if model.get_input_embeddings() is not None else None
    if size is not None and len(tokenizer) > size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens but the {called}'s vocabulary only {size}:"
            " use the tokenizer the model was trained with, or model.resize_token_embeddings(len(tokenizer))"
        )


def train_last_layers(model: nn.Module, layers: int | None) -> None:
    """Freezes everything below the last `layers` blocks (embeddings too); the final norm and an untied head learn.

    None trains every parameter.

    Raises:
        ValueError: for more layers than the model has.
    """
    model.requires_grad_(True)
    if layers is None:
        return
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
    if not 0 < layers <= len(blocks):
        raise ValueError(f"trainable_layers must be from 1 to the model's {len(blocks)}; got {layers}")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    for block in list(blocks)[: len(blocks) - layers]:
        block.requires_grad_(False)


def recompute_blocks(model: PreTrainedModel) -> None:
    """Has every block run again in the backward pass: less memory, about a third more time.

    Raises:
        ValueError: for an architecture that does not have a flat forward.
    """
    known = flat_of(model) is not None
    right = "False for a model that is no plain GPT-2 or Llama, or has an adapter"
    check("activation_checkpointing", True, known, right)
    model.base_model.gradient_checkpointing = True


@contextmanager
def few_threads(model: nn.Module) -> Iterator[None]:
    """One CPU thread for a small model: its matrices are so small that threads wait longer than they work."""
    before = torch.get_num_threads()
    small = sum(p.numel() for p in model.parameters()) < 500_000
    if small and next(model.parameters()).device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_whole(name: str, report: dict[str, Any]) -> None:
    """Refuses what transformers had to fill with random numbers: a model of another kind, without this one's head.

    Raises:
        ValueError: naming weights that are missing.
    """
    missing = sorted(report["missing_keys"])
    others = sorted(name for name in report["unexpected_keys"] if name.startswith("score."))
    if others:
        raise ValueError(f"{name!r} has a head for scores ({others[0]}): it is a model of another kind")
    if missing:
        raise ValueError(f"{name!r} has no weights for {', '.join(missing[:3])}: it is a model of another kind")


def trainable(*modules: nn.Module | None) -> Iterator[nn.Parameter]:
    """The parameters of these modules that learn, each once."""
    seen: set[int] = set()
    for module in modules:
        for parameter in module.parameters() if module is not None else ():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter


def tables(*modules: nn.Module) -> list[nn.Parameter]:
    """Those parameters of these modules that are tables of prefixes, of which a batch uses few rows."""
    return [part.weight for module in modules for part in module.modules() if isinstance(part, PrefixTable)]
