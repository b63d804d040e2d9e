"""Text: one's own prompts, score and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textrl.cells import text_of
from textrl.files import prompt_rows
from textrl.plugins import reward_function
from textrl.rows import Row
from textrl.scores import call_score
from textrl.symbols import load_tokenizer, symbol_tokenizer
from textrl.task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

PRINTABLE = "".join(chr(code) for code in range(32, 127))


def share_of_letters(completions: list[str]) -> list[float]:
    """The share of characters that are letters: what `Text` rewards when nothing else is said."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


class Text(Task):
    """Your own prompts, your own score, your own tokenizer.

    Description: a row is drawn evenly from `prompts`; the response is scored by `reward`. Without arguments it is a
    small demonstration over printable characters.
    Observation: the prompt and the response so far, token ids.
    Actions: the tokens of the tokenizer.
    Score: what `reward` says: any function in the calling convention of TRL's reward functions, or a `RewardModel`.
    Episode end: the end token, or `max_new_tokens`.
    What it teaches: nothing by itself; it is the door to real language models.
    Optimum: not known, unless the vocabulary and the horizon are small.

    Args:
        tokenizer: a Hugging Face fast tokenizer, or the folder or hub name of one; default: that of a reference which
            is named, else one symbol per printable ASCII character.
        prompts: texts, rows with a "prompt", a `datasets.Dataset` with a "prompt" column, or a JSON (lines), CSV or
            Parquet file of such rows; the columns of a CSV file are texts.
        reward: called with prompts, completions, completion_ids and every other column, as keyword lists; or its name:
            "module:function", the folder of a saved `RewardModel`, or the address of an HTTP endpoint, asked as
            `textrl.RemoteScore` says.
        max_new_tokens: the horizon.
        max_prompt_tokens: default: the longest prompt there is.
        special_tokens: whether special tokens written out in a prompt are meant as such: prompts made by
            `tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)`.
        skip_bad_rows: leave rows of a file that cannot be used out, with a warning that lists them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | str | None = None,
        prompts: Sequence[str] | Sequence[Row] | Dataset | str | Path = ("The movie was",),
        reward: Callable[..., Any] | str | Path = share_of_letters,
        max_new_tokens: int = 24,
        max_prompt_tokens: int | None = None,
        skip_bad_rows: bool = False,
        special_tokens: bool = False,
    ) -> None:
        if isinstance(tokenizer, (str, Path)):
            tokenizer = load_tokenizer(str(tokenizer))
        self._prompts, self.reward = prompt_rows(prompts, skip_bad_rows), reward_function(reward)
        super().__init__(
            tokenizer=symbol_tokenizer(PRINTABLE) if tokenizer is None else tokenizer,
            max_new_tokens=max_new_tokens,
            max_prompt_tokens=max_prompt_tokens,
            special_tokens=special_tokens,
        )
        longest_is_limit = max_prompt_tokens is None
        self._prompts.each(lambda row: (text_of(row, "prompt"), self.encode(row, any_length=longest_is_limit)))

    def prompts(self) -> list[Row]:
        """The rows, in order."""
        return list(self._prompts)

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> Any:
        """What `reward` says."""
        return call_score(self.reward, prompts, completions, columns)
