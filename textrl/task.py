"""What an environment author writes: prompts, a score, a tokenizer and a horizon."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .answers import check_column, check_masks
from .asking import Asking, ask
from .codec import Codec
from .config import check, check_type, is_count
from .rows import Row, check_row, columns_of, filled
from .scores import ScoreError, Scores, ScoreUnavailable, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_MAX_PROMPT_TOKENS = 64
FAULT = "score_fault"  # in the `info` of episodes whose score failed and was let pass: what was wrong


def check_task(task: Any) -> None:
    """Refuses what is no task, or one that its author has not finished.

    Raises:
        ValueError: naming what is missing.
    """
    check("task", task, isinstance(task, Task), "an instance of a subclass of textrl.Task")
    name = type(task).__name__
    names = ("score", "prompts", "sample")
    missing = {each for each in names if getattr(task, each) == MethodType(vars(Task)[each], task)}
    if "_codec" not in vars(task):
        raise ValueError(f"task {name} must call super().__init__(tokenizer=..., max_new_tokens=...) in its __init__")
    if "score" in missing:
        raise ValueError(f"task {name} must define score(prompts, completions, **columns)")
    if {"prompts", "sample"} <= missing:
        raise ValueError(f"task {name} must define prompts() or sample(rng)")


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
        special_tokens: whether special tokens written out in a prompt are special tokens, as
            `tokenizer.apply_chat_template(messages, tokenize=False)` means them, and not text; a prompt is then taken
            as it is written, and no begin token is put before it unless it is empty.

    Attributes that a subclass may set:
        best_score: the best expected score, where it is known; of the class, with the default arguments. A run near it
            is no longer warned that it has stopped to learn.
        deterministic: whether the `score` and `describe` of this very class always say the same of the same row and
            response. A vector environment then remembers what they said of a small task's responses, and is several
            times as fast.

    Raises:
        ValueError: for a horizon below 1 or a tokenizer without an end token.
    """

    best_score: float | None = None
    deterministic: ClassVar[bool] = False

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        max_new_tokens: int,
        max_prompt_tokens: int | None = None,
        special_tokens: bool = False,
    ) -> None:
        check("max_new_tokens", max_new_tokens, is_count(max_new_tokens), "a whole number of at least 1")
        limit = max_prompt_tokens
        check("max_prompt_tokens", limit, limit is None or is_count(limit), "a whole number of at least 1, or None")
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(
                f"tokenizer must have an end-of-sequence token (tokenizer.eos_token); got {type(tokenizer).__name__}"
                " without one"
            )
        ids = tokenizer.get_vocab().values()
        right = f"one of {len(tokenizer)} tokens with the ids 0 to {len(tokenizer) - 1}"
        check("tokenizer", f"ids up to {max(ids)}", max(ids) + 1 == len(tokenizer), right)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self.vocab_size: int = len(tokenizer)
        self.eos_token_id: int = tokenizer.eos_token_id
        self.token_scores: bool | None = None
        """Whether `score` gives a list per text: None before it was seen, False too where it cannot judge parts."""
        self._unjudged: str | None = None  # what was wrong with the score of a part
        self.asking = Asking()  # how `score` is asked: how long it may take, and what happens when it fails
        check_type("special_tokens", special_tokens, "bool")
        self.special_tokens = special_tokens
        self._codec = Codec(tokenizer, special_tokens)
        self._rows: list[Row] | None = None
        self._max_prompt_tokens = self._prompt_limit = max_prompt_tokens

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
            on the tokens up to t, because a stepped environment pays it there and then). Which of the two it is, is
            found out by its first answer: a stepped environment asks it about the first token of its first episode.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score(prompts, completions, **columns)")

    def describe(self, prompts: list[str], completions: list[str], **columns: Any) -> Mapping[str, Sequence[Any]]:
        """Extra columns for the `info` at the end of an episode; none by default.

        Called as `score` is, with finished responses only. Each column has B numbers (float64 in `info`) or B texts.
        """
        return {}

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
    def deterministic_score(self) -> bool:
        """Whether `deterministic` was said where `score` and `describe` were written: another `score` says anew."""
        written = [next(c for c in type(self).__mro__ if name in vars(c)) for name in ("score", "describe")]
        return not {"score", "describe"} & set(vars(self)) and all(
            cls is Task or vars(cls).get("deterministic", False) for cls in written
        )

    @property
    def masked(self) -> bool:
        """Whether the task may advise tokens: whether `allowed_tokens` was written."""
        return type(self).allowed_tokens is not Task.allowed_tokens

    def masks(self, rows: Sequence[Row], responses: NDArray[np.int64]) -> NDArray[np.bool_]:
        """What `allowed_tokens` says, checked; all tokens where it says nothing. (B, T) -> (B, V).

        Raises:
            ValueError: for a mask of another shape or dtype, or a row of it without one allowed token.
        """
        found = self.allowed_tokens(rows, responses)
        if found is None:
            return np.ones((len(rows), self.vocab_size), dtype=np.bool_)
        return check_masks(found, rows, self.vocab_size)

    def row_of(self, prompt: str) -> Row:
        """The task's own row with this prompt; else one that has None in the columns of its rows."""
        rows = self.rows or [{}]
        return next((row for row in rows if row.get("prompt") == prompt), {**dict.fromkeys(rows[0]), "prompt": prompt})

    @property
    def rows(self) -> list[Row] | None:
        """`prompts()`, called once and checked."""
        if self._rows is None:
            rows = self.prompts()
            if rows is None:
                return None
            check("prompts", rows, hasattr(rows, "__len__") and not isinstance(rows, (str, Mapping)), "a list of rows")
            if len(rows) == 0:
                raise ValueError("prompts is empty: a task needs at least one prompt")
            self._rows = filled([check_row(row) for row in rows])
        return self._rows

    @property
    def max_prompt_tokens(self) -> int:
        """P: the longest prompt, in tokens, the begin token counted."""
        if self._max_prompt_tokens is None:
            rows = self.rows
            if rows is None:
                self._max_prompt_tokens = DEFAULT_MAX_PROMPT_TOKENS
            else:
                prompts = {row["prompt"] for row in rows}
                self._max_prompt_tokens = max(len(self._codec.encode(prompt)) for prompt in prompts)
        return self._max_prompt_tokens

    @property
    def prompt_limit_assumed(self) -> bool:
        """Whether `max_prompt_tokens` is the default of a task that only samples, and says nothing of its prompts."""
        return self._prompt_limit is None and self.rows is None

    def encode(self, row: Row, *, any_length: bool = False) -> NDArray[np.int64]:
        """The token ids of a row's prompt, the begin token first: (p,) with 1 <= p <= P.

        Special-token strings inside a prompt are text, not special tokens, unless `special_tokens` says so.

        Args:
            row: of the task.
            any_length: p may be above P, for a text that is not to be an observation.

        Raises:
            ValueError: for a prompt that is too long, has no tokens, or has text the tokenizer does not know.
        """
        ids = self._codec.encode(check_row(row)["prompt"])
        if not any_length and len(ids) > self.max_prompt_tokens:
            raise ValueError(
                f"prompt is {len(ids)} tokens long, longer than max_prompt_tokens={self.max_prompt_tokens}:"
                f" {shorten(row['prompt'])}; shorten it or raise max_prompt_tokens"
            )
        return ids

    def decode(self, completion_ids: Sequence[Sequence[int]], *, alone: bool = False) -> list[str]:
        """The text of each response, without special tokens, as it stands after a prompt or `alone`."""
        return self._codec.decode(completion_ids, alone)

    def evaluate(
        self, rows: Sequence[Row], completion_ids: Sequence[Sequence[int]], completions: list[str] | None = None
    ) -> Scores:
        """Calls `score` once for a batch and checks what it gave; once a response only where that fails.

        Args:
            rows: B rows.
            completion_ids: B responses as token ids, the end token counted.
            completions: their text, where it is at hand already.

        Raises:
            ScoreError: a `ValueError`, where the score raises, takes too long, gives a wrong number of scores or one
                that is not a finite number, naming prompt and response.
        """
        if completions is None:
            completions = self.decode(completion_ids)
        prompts = [row["prompt"] for row in rows]
        given = {**self._columns(rows, completion_ids), "prompts": prompts, "completions": completions}
        scores = ask(self.score, given, self.asking)
        if len(scores.faults) < len(rows):
            self.token_scores = scores.tokens is not None
        return scores

    def evaluate_parts(self, rows: Sequence[Row], completion_ids: Sequence[Sequence[int]]) -> Scores | None:
        """The scores of unfinished responses, where the score gives a reward for every token; else None.

        Whether it does is not known before the first score. One that cannot judge a part is taken to judge whole texts
        alone; if it then gives rewards for tokens, `finish` raises the error with the part.

        Raises:
            ScoreError: as `evaluate`, where the score is known to judge tokens, or could not be asked.
        """
        if self.token_scores is False:
            return None
        try:
            scores = self.evaluate(rows, completion_ids)
        except ScoreError as error:
            if self.token_scores or isinstance(error.__cause__, (ScoreUnavailable, OSError)):
                raise
            self._unjudged, self.token_scores = str(error), False
            return None
        return scores if self.token_scores else None

    def finish(self, rows: Sequence[Row], completion_ids: Sequence[Sequence[int]]) -> tuple[Scores, dict[str, Any]]:
        """What the end of B episodes brings: their scores, and the columns of `info`, each of length B.

        Columns of numbers are float64 arrays, all others lists.
        """
        completions = self.decode(completion_ids)
        scores = self.evaluate(rows, completion_ids, completions)
        if self.token_scores and self._unjudged is not None:
            unjudged, self._unjudged = self._unjudged, None
            raise ScoreError(unjudged)
        prompts = [row["prompt"] for row in rows]
        end = self.eos_token_id
        columns: dict[str, Any] = {
            "prompt": prompts,
            "completion": completions,
            "text": [prompt + text for prompt, text in zip(prompts, completions, strict=True)],
            "score": scores.totals,
            "finish_reason": ["stop" if response[-1] == end else "length" for response in completion_ids],
        }
        if scores.faults:
            columns[FAULT] = [scores.faults.get(i) for i in range(len(rows))]
        if type(self).describe is not Task.describe:
            given = self._columns(rows, completion_ids)
            described = self.describe(prompts=prompts, completions=completions, **given)
            check("describe", described, isinstance(described, Mapping), "a function that gives a dict of columns")
            for key, values in described.items():
                columns[key] = check_column(key, values, len(rows), columns)
        return scores, columns

    @staticmethod
    def _columns(rows: Sequence[Row], completion_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The keyword lists of a score beside prompts and completions."""
        names = [key for key in columns_of(rows) if key != "prompt"]
        columns: dict[str, Any] = {key: [row.get(key) for row in rows] for key in names}
        columns["completion_ids"] = [
            list(response) if type(response) is list else list(map(int, response)) for response in completion_ids
        ]
        return columns
