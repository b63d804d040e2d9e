"""Text to token ids and back, the way an environment wants it: a text's special tokens are text unless asked for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .scores import shorten
from .symbols import symbols_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRIED = 1000
"""Tokens that are tried, about, to see how a tokenizer decodes."""
REMEMBERED = 20_000
"""Prompts whose ids are kept at most."""


def plain_ids(
    tokenizer: PreTrainedTokenizerFast, text: str, called: str, special_tokens: bool = False, shown: str | None = None
) -> list[int]:
    """The token ids of a text alone, no begin token before it; special tokens written out in it are text.

    Args:
        tokenizer: a fast one.
        text: the text.
        called: the argument that the text is, for the message.
        special_tokens: whether those are read as such.
        shown: what the message shows, where that is a part of the text.

    Raises:
        ValueError: for text that the tokenizer does not know.
    """
    try:
        return ids_of(tokenizer, [text], special_tokens)[0]
    except Exception as error:  # a tokenizer raises what it likes
        what = shorten(text if shown is None else shown)
        raise ValueError(f"{called} has text that the tokenizer does not know: {what} ({error})") from None


def ids_of(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], special_tokens: bool = False) -> list[list[int]]:
    """The token ids of texts alone; special tokens written out in them are text, or else read as such.

    A tokenizer of words looks them up as it does any word, and one of pieces as any piece, whatever it is told: there
    such a text is read in parts, cut behind the first character of each special token.
    """
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=not special_tokens)[
        "input_ids"
    ]
    if special_tokens:
        return found
    marks = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    meant = set(tokenizer.convert_tokens_to_ids(marks))
    for i, text in enumerate(texts):
        if meant.isdisjoint(found[i]):
            continue
        read = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        places = zip(read["input_ids"], read["offset_mapping"], strict=True)
        cuts = [start + 1 for token, (start, end) in places if token in meant and end - start > 1]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        each = tokenizer(parts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        found[i] = list(chain.from_iterable(each))
    return found


class Codec:
    """A tokenizer for prompts and responses.

    Args:
        tokenizer: a fast tokenizer.
        special_tokens: whether special tokens that are written out in a prompt are read as such, as a chat template
            means them; it is then taken as it is written, with a begin token or without.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special_tokens: bool = False) -> None:
        self._tokenizer, self._special_tokens = tokenizer, special_tokens
        self._symbols = symbols_of(tokenizer)
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._known: dict[str, NDArray[np.int64]] = {}
        self._before = [] if self._symbols is not None else self._needed_before()
        self._lead = len(self._decoded([self._before])[0])  # characters of it

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """The token ids of a prompt: (p,).

        The begin token comes first where there is one, unless prompts write out their special tokens.

        Raises:
            ValueError: for a prompt without tokens, or text that the tokenizer does not know.
        """
        if (ids := self._known.get(prompt)) is not None:
            return ids.copy()
        if not self._special_tokens and self._tokenizer.chat_template:
            self._warn_of_special_tokens(prompt)
        tokens = plain_ids(self._tokenizer, prompt, "prompt", self._special_tokens)
        begin = [] if self._special_tokens and tokens else self._bos
        ids = np.array(begin + tokens, dtype=np.int64)
        if len(ids) == 0:
            raise ValueError("prompt is empty, and the tokenizer has no begin token to start from: give it some text")
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[prompt] = ids
        return ids.copy()

    def _warn_of_special_tokens(self, prompt: str) -> None:
        """Says, once, that what a chat template wrote is about to be read as text."""
        written = [token for token in self._tokenizer.all_special_tokens if token in prompt]
        if written:
            said = f"prompts have special tokens written out ({written[0]!r}), which are read as text"
            warnings.warn(f"{said}; special_tokens=True reads what a chat template wrote as it means it", stacklevel=4)

    def decode(self, completion_ids: Sequence[Sequence[int]], alone: bool = False) -> list[str]:
        """The text of each response as it stands after a prompt (`alone`: at the start of a text)."""
        responses = completion_ids.tolist() if isinstance(completion_ids, np.ndarray) else completion_ids
        if self._symbols is not None:
            symbol = self._symbols.__getitem__
            return ["".join(map(symbol, response)) for response in responses]
        before, lead = ([], 0) if alone else (self._before, self._lead)
        return [text[lead:] for text in self._decoded([[*before, *response] for response in responses])]

    def _decoded(self, ids: list[list[int]]) -> list[str]:
        return list(self._tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True))

    def _needed_before(self) -> list[int]:
        """A word's token to decode a response after, where the first token of a text loses its space; else none.

        SentencePiece and WordPiece are so: "the movie" and the tokens of " was" would become "the moviewas".
        """
        size = len(self._tokenizer)
        others = (self._decoded([[i]])[0] for i in range(0, size, max(1, size // TRIED)))
        for word in chain("aexo1", others):
            try:
                ids = list(self._tokenizer(word, add_special_tokens=False)["input_ids"])
            except Exception:  # a vocabulary without this word
                continue
            if word.isalnum() and ids and self._decoded([ids[-1:]]) == [word]:
                return ids[-1:] if self._loses_space(ids[-1:]) else []
        return []

    def _loses_space(self, before: list[int]) -> bool:
        """Whether some token says another thing at the start of a text than after a letter."""
        size = len(self._tokenizer)
        some = range(0, size, max(1, size // TRIED))
        alone, after = self._decoded([[i] for i in some]), self._decoded([[*before, i] for i in some])
        (lead,) = self._decoded([before])
        return any(lead + one != both for one, both in zip(alone, after, strict=True))
