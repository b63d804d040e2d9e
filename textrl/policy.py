"""Logits, log-probabilities and values of a causal language model, only where they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from .flat import flat_of, states_at
from .tabular import register_tabular
from .trunk import states_above

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_BYTES = 32 * 2**20
"""Float32 logits are made at most this many bytes at a time."""

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
) -> PreTrainedModel:
    """A causal language model from a `PreTrainedModel`, a folder or a hub name, without dropout.

    Args:
        model: what to load; a `PreTrainedModel` is taken as it is, not copied.
        tokenizer: checked against the model's vocabulary.
        frozen: no parameter requires a gradient.
        dtype: None keeps the dtype of the weights.
        device: None leaves the model where it is.

    Raises:
        ValueError: for a folder or name that holds no causal language model, or a vocabulary too small.
    """
    if isinstance(model, (str, Path)):
        model = _from_pretrained(str(model), dtype)
    elif not isinstance(model, nn.Module):
        raise ValueError(f"model must be a transformers PreTrainedModel, a folder or a hub name; got {model!r}")
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    model = without_dropout(model).to(device=device, dtype=dtype)
    if frozen:
        model.requires_grad_(False)
    return model


def _from_pretrained(name: str, dtype: torch.dtype | None) -> PreTrainedModel:
    from .checkpoint import verify_if_ours

    verify_if_ours(Path(name))
    register_tabular()
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto")  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {name!r} is neither a folder with a causal language model nor a hub name in reach ({first})"
        ) from None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuses a tokenizer that can name tokens the model has no embedding for.

    Raises:
        ValueError: with both sizes.
    """
    size = model.get_input_embeddings().weight.shape[0] if model.get_input_embeddings() is not None else None
    if size is not None and len(tokenizer) > size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens but the model's vocabulary only {size}:"
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
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    if not 0 < layers <= len(blocks):
        raise ValueError(f"trainable_layers must be from 1 to the model's {len(blocks)}; got {layers}")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    for block in list(blocks)[: len(blocks) - layers]:
        block.requires_grad_(False)


@contextmanager
def few_threads(model: nn.Module) -> Iterator[None]:
    """One CPU thread for a small model: its matrices are so small that threads wait longer than they work."""
    before = torch.get_num_threads()
    small = sum(p.numel() for p in model.parameters()) < 2_000_000
    if small and next(model.parameters()).device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CausalPolicy:
    """A causal language model seen as a policy over V tokens: softmax(logits[:V] / temperature), in float32.

    Args:
        model: the language model; only its forward is used.
        vocab_size: V, the tokenizer's; a model may have more rows in its head (padding), which are never used.
        temperature: divides the logits.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, temperature: float = 1.0) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.frozen_blocks = 0
        """Lower blocks whose states `hidden` may be given as `below`."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def hidden(
        self, tokens: Tensor, rows: Tensor, columns: Tensor, below: Tensor | None = None, **forward: Any
    ) -> Tensor:
        """What the head reads at the places (rows, columns): (B, S) -> (n, d).

        For a model whose head is not a plain matrix this is already the logits, (n, V). `below`, (B, S, d), is what
        the `frozen_blocks` made of the tokens, where that is known.
        """
        first = self.frozen_blocks if below is not None else 0
        flat = flat_of(self.model) if len(rows) and not forward and head_of(self.model) is not None else None
        if flat is not None:
            return states_at(flat, tokens, rows, columns, below if first else None, first)
        if below is not None and first:
            return states_above(self.model, below, first)[rows, columns]
        if head_of(self.model) is None:
            return self.model(input_ids=tokens, **forward).logits[rows, columns]  # type: ignore[no-any-return]
        states = self.model.base_model(input_ids=tokens, **forward).last_hidden_state  # (B, S, d)
        return states[rows, columns]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in float32, not yet divided by the temperature: (n, d) -> (n, V)."""
        head = head_of(self.model)
        logits = hidden if head is None else head(hidden)
        return logits[..., : self.vocab_size].float()  # type: ignore[no-any-return]

    def logprobs(
        self, hidden: Tensor, targets: Tensor, allowed: Tensor | None = None, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the targets, and the entropies where asked for, without holding (n, V) at once.

        Args:
            hidden: (n, d), from `hidden`.
            targets: (n,) token ids.
            allowed: (n, V) bool; the distribution is renormalised over these tokens.
            entropy: whether to give the entropies.

        Returns:
            (n,) and (n,) or None, float32. The chunks are recomputed in the backward pass.
        """
        size = max(1, CHUNK_BYTES // (4 * self.vocab_size))
        several = len(targets) > size and torch.is_grad_enabled() and hidden.requires_grad
        parts = []
        for start in range(0, max(len(targets), 1), size):
            piece = slice(start, start + size)
            mask = None if allowed is None else allowed[piece]
            arguments = (hidden[piece], targets[piece], mask, entropy)
            parts.append(
                checkpoint(self._chunk, *arguments, use_reentrant=False) if several else self._chunk(*arguments)
            )
        entropies = torch.cat([part[1] for part in parts if part[1] is not None]) if entropy else None
        return torch.cat([part[0] for part in parts]), entropies

    def _chunk(
        self, hidden: Tensor, targets: Tensor, allowed: Tensor | None, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.logits(hidden) / self.temperature  # (n, V)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        normaliser = logits.logsumexp(-1)  # (n,)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        # H = log Z - sum_a p(a) z(a)
        return logprobs, normaliser - (logits.softmax(-1) * logits).sum(-1) if entropy else None


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The output embedding, when the logits are exactly it times the last hidden state; else None."""
    config = model.config
    scaled = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    if model.base_model is model or any(getattr(config, name, None) not in (None, 1, 1.0) for name in scaled):
        return None
    return model.get_output_embeddings()  # type: ignore[no-any-return]


def alike(lengths: Sequence[int], tokens_at_once: int, device: torch.device, width: int = 1) -> list[list[int]]:
    """The indices of texts in parts of like length, the longest first: a forward over a part has little padding.

    Args:
        lengths: tokens of each text.
        tokens_at_once: bound on the tokens of a part, padding too; a part holds at least one text.
        device: a part ends where padding would cost more than one more forward: a GPU takes a lot at once.
        width: texts that stand behind each length.
    """
    padding = 1024 if device.type == "cpu" else 8192  # tokens that cost less than matrix products over few rows lose
    parts: list[list[int]] = []
    longest = wasted = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        wasted += width * (longest - lengths[i])
        if not parts or wasted > padding or width * longest * (len(parts[-1]) + 1) > tokens_at_once:
            parts.append([])
            longest, wasted = lengths[i], 0
        parts[-1].append(i)
    return parts


def value_model(model: PreTrainedModel, seed: int = 0, std: float = 0.0) -> PreTrainedModel:
    """A copy of a language model's trunk with a scalar head: a critic (std 0) or a reward model before training.

    It is the `AutoModelForSequenceClassification` of the same architecture with one label, so it saves and loads with
    `save_pretrained` and `from_pretrained`.

    Args:
        model: a causal language model, or such a scalar model itself; its trunk's weights are copied.
        seed: of the head's weights.
        std: their standard deviation; 0 starts every value at zero.
    """
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    if config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id if isinstance(config.eos_token_id, int) else 0
    with torch.random.fork_rng(devices=[]):
        scalar = AutoModelForSequenceClassification.from_config(config)
    scalar.base_model.load_state_dict(model.base_model.state_dict())
    scalar = without_dropout(scalar).to(device=model.device, dtype=model.dtype)
    weight = scalar.score.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return scalar  # type: ignore[no-any-return]


def values_at(
    model: PreTrainedModel, tokens: Tensor, rows: Tensor, columns: Tensor, below: Tensor | None = None, blocks: int = 0
) -> Tensor:
    """The scalar head at the places (rows, columns): (B, S) -> (n,) float32.

    `below`, (B, S, d), is what the first `blocks` blocks made of the tokens, where that is known.
    """
    flat = flat_of(model) if len(rows) else None
    if flat is not None:
        chosen = states_at(flat, tokens, rows, columns, below if blocks else None, blocks)
    elif below is not None and blocks:
        chosen = states_above(model, below, blocks)[rows, columns]
    else:
        chosen = model.base_model(input_ids=tokens).last_hidden_state[rows, columns]
    head = model.score  # (n, d) -> (n, 1)
    if isinstance(head, nn.Linear):  # in float32: below it, neighbouring scores would round to one
        return nn.functional.linear(chosen.float(), head.weight.float())[..., 0]
    return head(chosen)[..., 0].float()  # type: ignore[no-any-return]


def trainable(*modules: nn.Module | None) -> Iterator[nn.Parameter]:
    """The parameters of these modules that learn, each once."""
    seen: set[int] = set()
    for module in modules:
        for parameter in module.parameters() if module is not None else ():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
