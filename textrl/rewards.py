"""Reward functions: a reward model trained on preferences, and weighted sums of several."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from .adapters import has_adapter
from .codec import ids_of
from .config import check, is_count
from .folders import SCORER, verify_if_ours, whole_folder, write_manifest
from .hub import check_source
from .models import check_vocabulary_size, without_dropout
from .policy import alike, values_at
from .probing import longest_text
from .reward_training import TEXTS, pairs_of
from .reward_training import train_reward_model as train_reward_model
from .scalars import load_scalar, value_model, with_padding_learned
from .scores import call_score, reason, shorten

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

LEAST_SPREAD = 1e-6
"""Scores that differ by less are alike."""


class RewardModel:
    """A language model's trunk with a scalar on the last token, callable as a reward function.

    It reads text, so its tokenizer may differ from the policy's. A text is its prompt and completion, between the
    begin token (where the tokenizer has one) and the end token.

    Args:
        model: a decoder's `AutoModelForSequenceClassification` with one label (GPT-2, Llama), whose `score` reads the
            last token. One that reads the first, as BERT's does, is for a reward function of one's own.
        tokenizer: its own tokenizer.
        max_length: longer texts lose their beginning; at most what the model reads.
        tokens_at_once: bound on the tokens (padding too) of one forward.
        special_tokens: whether special tokens written out in a text are special tokens, as a chat template means them,
            and not text.

    Attributes:
        mean, std: scores are (scalar - mean) / std.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int = 512,
        tokens_at_once: int = 4096,
        special_tokens: bool = False,
    ) -> None:
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        if not isinstance(model, PreTrainedModel) or not hasattr(model, "score") or labels != 1:
            found = f"{type(model).__name__} with {labels} labels" if labels else shorten(model)
            right = "a sequence classifier with one label, and of a decoder, whose score reads the last token"
            raise ValueError(f"model must be {right} (GPT-2, Llama; not BERT); got {found}")
        check(
            "model", "a model with an adapter", not has_adapter(model), "a whole one, as from_language_model makes it"
        )
        named = getattr(tokenizer, "eos_token_id", None) is not None
        check("tokenizer", tokenizer, named, "a tokenizer with an end-of-sequence token")
        check_vocabulary_size(model, tokenizer)
        for name, value, least in (("max_length", max_length, 3), ("tokens_at_once", tokens_at_once, 1)):
            check(name, value, is_count(value) and value >= least, f"a whole number of at least {least}")
        self.model = with_padding_learned(without_dropout(model))
        self.tokenizer = tokenizer
        self.max_length, self.tokens_at_once = min(max_length, longest_text(model)), tokens_at_once
        self.special_tokens = special_tokens
        self.mean = float(getattr(model.config, "score_mean", 0.0))
        self.std = float(getattr(model.config, "score_std", 1.0))

    @classmethod
    def from_language_model(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **options: Any
    ) -> Self:
        """An untrained reward model on a copy of a language model's trunk; the head has std 1/sqrt(d + 1)."""
        width: int = model.config.get_text_config().hidden_size
        return cls(value_model(model, seed=seed, std=1 / math.sqrt(width + 1)), tokenizer, **options)

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> Self:
        """A reward model as `save` left it, or a decoder's sequence classifier with one label.

        Raises:
            ValueError: for a folder that holds none, or one that is damaged.
        """
        check_source(str(folder), "folder")
        verify_if_ours(Path(folder))
        try:
            model = load_scalar(folder)
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"folder {str(folder)!r} holds no reward model ({reason(error)})") from None
        return cls(model, tokenizer, **{**getattr(model.config, "score_options", {}), **options})

    def save(self, folder: str | Path) -> None:
        """Writes model, tokenizer and normalisation; loadable with `from_pretrained`.

        Raises:
            ValueError: for a folder that holds anything else than what this wrote.
        """
        with whole_folder(Path(folder), scorer=True) as part:
            self.write(part)
            write_manifest(part, {"agent": SCORER})

    def write(self, folder: Path) -> None:
        """The files of model and tokenizer, with what `load` is to know.

        transformers pools a text at its last token that is no padding: of an end token that is padding too it would
        take the token before, so the files name no padding then (and transformers takes one text at a time).
        """
        config = self.model.config
        padding = config.pad_token_id
        config.score_mean, config.score_std = self.mean, self.std
        config.score_options = self.options
        config.pad_token_id = None if padding == self.tokenizer.eos_token_id else padding
        try:
            self.model.save_pretrained(folder)
        finally:
            config.pad_token_id = padding
        self.tokenizer.save_pretrained(folder)

    @property
    def options(self) -> dict[str, Any]:
        """How texts are read."""
        return {"max_length": self.max_length, "special_tokens": self.special_tokens}

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Scores, normalised, in the calling convention of `Task.score`."""
        with torch.no_grad():
            scalars = self.scalars(_joined(prompts, completions))
        return ((scalars - self.mean) / self.std).tolist()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts, with the begin and the end token."""
        try:
            plain = ids_of(self.tokenizer, texts, self.special_tokens)
        except Exception as error:  # a toy vocabulary's tokenizer raises nothing more special
            raise ValueError(f"text has what the tokenizer does not know ({error}); got {shorten(texts)}") from None
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        if self.special_tokens:  # a chat template writes it where it should be
            plain = [ids[len(begin) :] if begin and ids[:1] == begin else ids for ids in plain]
        room = self.max_length - len(begin) - 1
        return [[*begin, *ids[-room:], self.tokenizer.eos_token_id] for ids in plain]

    def scalars(self, texts: Sequence[str]) -> Tensor:
        """The raw scalar of each text, (B,) float32, differentiable; texts of like length share a forward."""
        if not texts:
            return torch.zeros(0, device=self.model.device)
        ids, device = self.encode(texts), self.model.device
        parts = alike([len(one) for one in ids], self.tokens_at_once, device)
        pieces = []
        for part in parts:
            lengths = torch.tensor([len(ids[i]) for i in part])
            tokens = torch.zeros(len(part), int(lengths.max()), dtype=torch.int64)
            for row, i in zip(tokens, part, strict=True):
                row[: len(ids[i])] = torch.tensor(ids[i])
            rows = torch.arange(len(part), device=device)
            pieces.append(values_at(self.model, tokens.to(device), rows, (lengths - 1).to(device)))
        order = torch.tensor([i for part in parts for i in part], device=device)
        return torch.cat(pieces)[order.argsort()]

    def standardise(self, prompts: Sequence[str], completions: Sequence[str]) -> None:
        """Shifts and scales the scores to mean 0, standard deviation 1 on these samples (of the reference)."""
        texts = _joined(prompts, completions)
        check("completions", completions, len(texts) >= 2, "at least two texts")
        with torch.no_grad():
            scalars = self.scalars(texts)
        spread = float(scalars.std())
        check("completions", f"scores with a deviation of {spread}", math.isfinite(spread), "texts with finite scores")
        if spread < LEAST_SPREAD:
            warnings.warn(f"all {len(texts)} texts score alike: they are shifted, and not scaled", stacklevel=2)
            spread = 1.0
        self.mean, self.std = float(scalars.mean()), spread

    def accuracy(self, pairs: Dataset | Sequence[Mapping[str, Any]] | str | Path) -> float:
        """Share of the pairs whose chosen text scores above the rejected one; a tie counts half."""
        rows = pairs_of(pairs, self)
        with torch.no_grad():
            chosen, rejected = self.pair_scalars({name: [row[name] for row in rows] for name in TEXTS})
        return float((chosen > rejected).float().mean() + 0.5 * (chosen == rejected).float().mean())

    def pair_scalars(self, pairs: dict[str, list[str]]) -> tuple[Tensor, Tensor]:
        """The raw scalars of the chosen and the rejected texts, (B,) each; a text in many pairs is read once."""
        chosen, rejected = _whole(pairs)
        places = {text: i for i, text in enumerate(dict.fromkeys(chosen + rejected))}
        scalars = self.scalars(list(places))
        return scalars[[places[text] for text in chosen]], scalars[[places[text] for text in rejected]]


def _joined(prompts: Sequence[str], completions: Sequence[str]) -> list[str]:
    """Prompt and completion together.

    Raises:
        ValueError: for what are not as many texts of each.
    """
    for name, texts in (("prompts", prompts), ("completions", completions)):
        fine = isinstance(texts, Sequence) and not isinstance(texts, (str, bytes))
        if not fine or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} must be a list of texts; got {shorten(texts)}")
    if len(prompts) != len(completions):
        raise ValueError(f"completions must be as many as prompts, {len(prompts)}; got {len(completions)}")
    return [p + c for p, c in zip(prompts, completions, strict=True)]


def _whole(pairs: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Prompt and response together, the chosen and the rejected ones."""
    columns = zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True)
    chosen, rejected = zip(*((p + c, p + r) for p, c, r in columns), strict=True)
    return list(chosen), list(rejected)


def _listed(rewards: Any) -> list[Any]:
    listed = list(rewards) if isinstance(rewards, Sequence) and not isinstance(rewards, str) else []
    check("rewards", rewards, bool(listed), "a list of functions with their weights, at least one")
    return listed


def weighted_sum(rewards: Sequence[tuple[Callable[..., Any], float]]) -> Callable[..., list[float]]:
    """One reward function that adds several up.

    Args:
        rewards: functions in the calling convention of `Task.score`, each with its weight. None, as TRL has it, is no
            opinion and adds nothing.

    Raises:
        ValueError: for anything else.
    """
    rewards = [tuple(each) if isinstance(each, Sequence) else each for each in _listed(rewards)]
    for i, each in enumerate(rewards):
        fine = isinstance(each, tuple) and len(each) == 2 and callable(each[0])
        fine = fine and isinstance(each[1], numbers.Real) and math.isfinite(each[1])
        check(f"rewards[{i}]", each, fine, "a function and its weight, a finite number")

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        total = np.zeros(len(completions))
        for i, (fn, weight) in enumerate(rewards):
            given = call_score(fn, prompts, completions, columns)
            scores = (
                list(given) if isinstance(given, (list, tuple, np.ndarray, Tensor)) and np.ndim(given[:1]) == 1 else []
            )
            fine = len(scores) == len(total) and not any(isinstance(one, (str, bytes)) for one in scores)
            check(f"what rewards[{i}] returns", given, fine, f"a list of {len(total)} numbers")
            total += weight * np.array([0.0 if one is None else float(one) for one in scores])
        return total.tolist()

    return score
