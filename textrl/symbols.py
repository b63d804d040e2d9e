"""Toy vocabularies: a tokenizer whose tokens are a handful of symbols."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .scores import reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def symbol_tokenizer(symbols: str | Sequence[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer for a toy vocabulary: the end token is id 0, then each symbol has one id, in order.

    The end token is also the begin token and the padding, as in GPT-2. Symbols may be longer than a character
    ("left", "right"); a text is read greedily, the longest symbol first, and decoded without spaces.

    Args:
        symbols: the symbols, each a non-empty string; no two alike.

    Raises:
        ValueError: for an empty list, an empty symbol, or a symbol given twice.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = list(symbols) if isinstance(symbols, (str, Sequence)) else []
    texts = all(isinstance(name, str) and name and not re.search("[\ud800-\udfff]", name) for name in names)
    if not names or not texts or len(set(names)) != len(names):
        raise ValueError(f"symbols must be different, non-empty strings, at least one; got {symbols!r}")
    end = "<end>"
    if end in names:
        raise ValueError(f"symbols must not contain {end!r}, the name of the end token; got {names!r}")
    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    backend = Tokenizer(models.WordLevel(vocab={end: 0, **{name: i + 1 for i, name in enumerate(names)}}))
    # any other character is a piece of its own, so that "<end>" in a text is text, which is not in the vocabulary
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{longest_first}|[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        bos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )


def symbols_of(tokenizer: PreTrainedTokenizerFast) -> list[str] | None:
    """The text of each token, where a text is nothing but its tokens' joined (`symbol_tokenizer`); else None."""
    from tokenizers import decoders, models

    backend = tokenizer.backend_tokenizer
    if not (isinstance(backend.model, models.WordLevel) and isinstance(backend.decoder, decoders.Fuse)):
        return None
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return ["" if i in special else name for i, name in enumerate(names)]


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, or under a hub name.

    Raises:
        ValueError: where there is none.
    """
    from transformers import AutoTokenizer

    from .hub import check_source

    check_source(name, "tokenizer")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever the loader may raise
        raise ValueError(f"tokenizer {name!r} holds no tokenizer ({reason(error)})") from None
