"""What an environment author writes: prompts, a score, a tokenizer and a horizon."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]
"""One prompt and the columns that the score wants: `{"prompt": "2+2=", "answer": "4"}`."""

DEFAULT_MAX_PROMPT_TOKENS = 64
_CACHED_PROMPTS = 100_000


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

    names = list(symbols)
    if not names or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"symbols must be different, non-empty strings, at least one; got {names!r}")
    end = "<end>"
    if end in names:
        raise ValueError(f"symbols must not contain {end!r}, the name of the end token; got {names!r}")
    import re

    longest_first = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    backend = Tokenizer(models.WordLevel(vocab={end: 0, **{name: i + 1 for i, name in enumerate(names)}}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        bos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Scores:
    """What a task's score said of a batch of responses.

    Attributes:
        totals: (B,) float64, the score of each response.
        tokens: one float64 array per response when the score was given token by token, else None.
    """

    totals: NDArray[np.float64]
    tokens: list[NDArray[np.float64]] | None = None


class Task:
    """A text-generation task: what to say next, and how good what was said is.

    A subclass defines `score` and either `prompts` (finitely many rows: the exact optimum can then be computed)
    or `sample` (a row from a generator). It holds no episode state and no torch model, so one task may serve
    any number of environments at once.

    Args:
        tokenizer: a Hugging Face fast tokenizer with an end-of-sequence token.
        max_new_tokens: T, the horizon: the longest response in tokens, the end token counted.
        max_prompt_tokens: P, the longest prompt in tokens, the begin token counted. Default: the longest of
            `prompts()`, or 64 for a task that only samples.

    Raises:
        ValueError: for a horizon below 1 or a tokenizer without an end token.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        max_new_tokens: int,
        max_prompt_tokens: int | None = None,
    ) -> None:
        if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a whole number of at least 1; got {max_new_tokens!r}")
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(
                f"tokenizer must have an end-of-sequence token (tokenizer.eos_token); got {type(tokenizer).__name__}"
                " without one"
            )
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.vocab_size: int = len(tokenizer)
        self.eos_token_id: int = tokenizer.eos_token_id
        self.token_scores: bool | None = None
        """Whether `score` gives a list per text; None until a score has been seen."""
        self._bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._encoded: dict[str, NDArray[np.int64]] = {}
        self._rows: list[Row] | None = None
        self._max_prompt_tokens = max_prompt_tokens

    # ---- what an author writes -------------------------------------------------------------------------------

    def prompts(self) -> list[Row] | None:
        """All rows of a task with finitely many prompts, or None (the default) for a task that samples."""
        return None

    def sample(self, rng: np.random.Generator) -> Row:
        """Draws one row; by default evenly from `prompts()`."""
        rows = self.rows
        if rows is None:
            raise NotImplementedError(f"{type(self).__name__} must define prompts() or sample(rng)")
        return rows[int(rng.integers(len(rows)))]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> Sequence[Any]:
        """Scores a batch of responses, in the calling convention of TRL's reward functions.

        Args:
            prompts: B prompts, as the rows gave them.
            completions: B responses as text, without special tokens.
            columns: `completion_ids`, B lists of token ids with the end token where there was one, and every
                other column of the rows as a list of B.

        Returns:
            B floats; or B lists, a reward for every token of each response (the one at token t may depend only
            on the tokens up to t, because a stepped environment pays it there and then).
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(prompts, completions, **columns)")

    def allowed_tokens(self, rows: Sequence[Row], responses: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """The action masks, or None (the default) for a task that advises no tokens.

        A mask is advice: agents that read it sample inside it; the environment still takes any token and leaves
        the verdict to the score. At least one token of every row must be allowed.

        Args:
            rows: B rows.
            responses: (B, T) the tokens so far, and `vocab_size` where nothing is written yet.

        Returns:
            (B, V) bool.
        """
        return None

    # ---- what the rest of the core asks ----------------------------------------------------------------------

    @property
    def rows(self) -> list[Row] | None:
        """`prompts()`, called once and checked."""
        if self._rows is None:
            rows = self.prompts()
            if rows is None:
                return None
            if len(rows) == 0:
                raise ValueError("prompts is empty: a task needs at least one prompt")
            self._rows = [check_row(row) for row in rows]
        return self._rows

    @property
    def max_prompt_tokens(self) -> int:
        """P: the longest prompt, in tokens, the begin token counted."""
        if self._max_prompt_tokens is None:
            rows = self.rows
            if rows is None:
                self._max_prompt_tokens = DEFAULT_MAX_PROMPT_TOKENS
            else:
                self._max_prompt_tokens = max(len(self._encode(row["prompt"])) for row in rows)
        return self._max_prompt_tokens

    def encode(self, row: Row) -> NDArray[np.int64]:
        """The token ids of a row's prompt, the begin token first: (p,) with 1 <= p <= P.

        Special-token strings inside a prompt are text, not special tokens.

        Raises:
            ValueError: for a prompt that is too long, has no tokens, or has text the tokenizer does not know.
        """
        ids = self._encode(check_row(row)["prompt"])
        if len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt is {len(ids)} tokens long, longer than max_prompt_tokens={self.max_prompt_tokens}:"
                f" {shorten(row['prompt'])}; shorten it or raise max_prompt_tokens"
            )
        return ids

    def _encode(self, prompt: str) -> NDArray[np.int64]:
        cached = self._encoded.get(prompt)
        if cached is not None:
            return cached
        try:
            tokens = self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        except Exception as error:
            raise ValueError(f"prompt has text that the tokenizer does not know: {shorten(prompt)} ({error})") from None
        ids = np.array(self._bos + list(tokens), dtype=np.int64)
        if len(ids) == 0:
            raise ValueError("prompt is empty, and the tokenizer has no begin token to start from: give it some text")
        if len(self._encoded) >= _CACHED_PROMPTS:
            self._encoded.clear()
        self._encoded[prompt] = ids
        return ids

    def decode(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """The text of each response, without special tokens."""
        backend = self.tokenizer.backend_tokenizer
        return list(backend.decode_batch([list(ids) for ids in completion_ids], skip_special_tokens=True))

    def evaluate(
        self, rows: Sequence[Row], completion_ids: Sequence[Sequence[int]], completions: list[str] | None = None
    ) -> Scores:
        """Calls `score` once for a batch and checks what it gave.

        Args:
            rows: B rows.
            completion_ids: B responses as token ids, the end token counted.
            completions: their text, where it is at hand already.

        Raises:
            ValueError: for a wrong number of scores, or one that is not a finite number, naming prompt and response.
        """
        if completions is None:
            completions = self.decode(completion_ids)
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "prompt"} if rows else {}
        prompts = [row["prompt"] for row in rows]
        ids = [list(map(int, response)) for response in completion_ids]
        given = self.score(prompts=prompts, completions=completions, completion_ids=ids, **columns)
        scores = check_scores(given, prompts, completions, [len(response) for response in ids])
        self.token_scores = scores.tokens is not None
        return scores


def check_row(row: Any) -> Row:
    """Returns `row` if it is a dict with a string under "prompt".

    Raises:
        ValueError: otherwise, saying what it is.
    """
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return row
    raise ValueError(f'a row must be a dict with a string under "prompt"; got {shorten(row)}')


def check_scores(given: Any, prompts: list[str], completions: list[str], lengths: list[int]) -> Scores:
    """Turns what a score function gave into `Scores`.

    Args:
        given: a sequence of B numbers, or of B sequences of numbers, one for each token.
        prompts: B prompts, for the message.
        completions: B responses, for the message.
        lengths: B numbers of tokens.

    Raises:
        ValueError: for a wrong length, a value that is not a number, NaN or infinity.
    """
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, (str, bytes)) or not isinstance(given, (Sequence, Mapping)) or isinstance(given, Mapping):
        raise ValueError(
            f"score must return a list of {len(prompts)} numbers, one a completion; got {shorten(given)}"
        )
    if len(given) != len(prompts):
        raise ValueError(
            f"score must return {len(prompts)} numbers, one a completion; got {len(given)}: {shorten(given)}"
        )
    per_token = len(given) > 0 and isinstance(given[0], (list, tuple, np.ndarray))
    if not per_token:
        try:  # the common case in one call
            totals = np.array(given, dtype=np.float64)
            if totals.shape == (len(prompts),) and not any(isinstance(x, (str, bool)) for x in given):
                if np.isfinite(totals).all():
                    return Scores(totals)
        except (TypeError, ValueError):
            pass
        return Scores(np.array([_number(x, prompts[i], completions[i]) for i, x in enumerate(given)]))
    tokens = []
    for i, values in enumerate(given):
        if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != lengths[i]:
            raise ValueError(
                f"score must give a number for each of the {lengths[i]} tokens of a completion; got {shorten(values)}"
                f" for prompt {shorten(prompts[i])}, completion {shorten(completions[i])}"
            )
        tokens.append(np.array([_number(x, prompts[i], completions[i]) for x in values], dtype=np.float64))
    return Scores(np.array([values.sum() for values in tokens]), tokens)


def _number(value: Any, prompt: str, completion: str) -> float:
    where = f"for prompt {shorten(prompt)}, completion {shorten(completion)}"
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (int, float)):
        raise ValueError(f"score must be a number; got {shorten(value)} {where}")
    if not math.isfinite(value):
        raise ValueError(f"score must be finite; got {value} {where}")
    return float(value)


def shorten(value: Any, limit: int = 80) -> str:
    """The repr of a value, at most `limit` characters, on one line."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def call_score(fn: Callable[..., Any], prompts: list[str], completions: list[str], columns: dict[str, Any]) -> Any:
    """Calls a reward function by keyword, with those columns its signature takes (all, where it has **kwargs)."""
    arguments = {"prompts": prompts, "completions": completions, **columns}
    try:
        parameters = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return fn(**arguments)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    return fn(**arguments)
