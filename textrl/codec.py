"""Text to token ids and back, the way an environment wants it: special tokens are never read out of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .scores import shorten
from .symbols import symbols_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REMEMBERED = 20_000
"""Prompts whose ids are kept at most."""


class Codec:
    """A tokenizer for prompts and responses.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._symbols = symbols_of(tokenizer)
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._known: dict[str, NDArray[np.int64]] = {}

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """The token ids of a prompt, the begin token first where there is one: (p,).

        Raises:
            ValueError: for a prompt without tokens, or text that the tokenizer does not know.
        """
        if (ids := self._known.get(prompt)) is not None:
            return ids
        try:
            tokens = self._tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        except Exception as error:
            raise ValueError(f"prompt has text that the tokenizer does not know: {shorten(prompt)} ({error})") from None
        ids = np.array(self._bos + list(tokens), dtype=np.int64)
        if len(ids) == 0:
            raise ValueError("prompt is empty, and the tokenizer has no begin token to start from: give it some text")
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[prompt] = ids
        return ids

    def decode(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each response, without special tokens."""
        responses = completion_ids.tolist() if isinstance(completion_ids, np.ndarray) else completion_ids
        if self._symbols is not None:
            symbol = self._symbols.__getitem__
            return ["".join(map(symbol, response)) for response in responses]
        backend = self._tokenizer.backend_tokenizer
        return list(backend.decode_batch([list(response) for response in responses], skip_special_tokens=True))
