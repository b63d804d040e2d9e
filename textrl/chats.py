"""Chats, which are lists of messages, as texts: what was said before, and the answers of the assistant."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .cells import check_text, text_of, value_of
from .rows import Row
from .scores import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]
"""A chat: `[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]`."""

ASSISTANT = "\n\nAssistant:"
"""What opens an answer in dialogues of the form of Anthropic's HH data; `HUMAN` opens a question."""
HUMAN = "\n\nHuman:"


class Reader(Protocol):
    """What reads prompts: a task, a reward model."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast: ...  # noqa: D102
    @property
    def special_tokens(self) -> bool: ...  # noqa: D102


@dataclass(frozen=True)
class ChatFormat:
    """How chats are written: by the chat template of a tokenizer, or, where that has none, as HH dialogues.

    Attributes:
        tokenizer: whose chat template holds.
        hint: a warning for whoever has chats written.
    """

    tokenizer: PreTrainedTokenizerFast | None = None
    hint: str = ""

    @classmethod
    def of(cls, reader: Reader) -> ChatFormat:
        """The chat template, if it reads special tokens as one; else dialogues, which need none."""
        if reader.special_tokens or not reader.tokenizer.chat_template:
            return cls(reader.tokenizer)
        done = "chats are written as dialogues of Human and Assistant, not by the tokenizer's chat template"
        return cls(None, f"{done}, whose special tokens only special_tokens=True reads as such")

    @property
    def by_template(self) -> bool:
        """Whether it is a template's."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def before(self, messages: Messages) -> str:
        """What was said before an answer, up to where it begins.

        Raises:
            ValueError: for messages that the template does not take.
        """
        if self.hint:
            warnings.warn(self.hint, stacklevel=2)  # the same words every time: shown once
        if self.by_template:
            assert self.tokenizer is not None
            try:
                return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            except Exception as error:  # a template raises what it likes
                raise ValueError(
                    f"messages must be such as the chat template takes ({error}); got {shorten(messages)}"
                ) from None
        opens = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ", "system": ""}
        said = (opens.get(m["role"], f"\n\n{m['role'].capitalize()}: ") + m["content"] for m in messages)
        return "".join(said) + ASSISTANT

    def answer(self, message: dict[str, str]) -> str:
        """The answer."""
        return message["content"] if self.by_template else f" {message['content']}"


DIALOGUES = ChatFormat()


def chat_texts(
    row: Mapping[str, Any], prompt: str | None, answers: Sequence[str], written: ChatFormat
) -> tuple[str, ...] | None:
    """The texts of a row's prompt and answers where one of them is a chat; else None.

    Answers that are chats end with a message of the assistant each. The messages before it, which they share, are the
    prompt, after those of the prompt column, if any; a prompt that is a text is what the user asked first.

    Args:
        row: the row.
        prompt: its column of prompts, if it has one.
        answers: its columns of answers.
        written: how chats are.

    Raises:
        ValueError: naming the column.
    """
    opening = None if prompt is None else row.get(prompt)
    if not any(isinstance(row.get(name), list) for name in answers):
        if not isinstance(opening, list):
            return None
        texts = [text_of(row, name) for name in answers]
        return written.before(_messages(str(prompt), opening)), *texts
    chats = {name: _messages(name, value_of(row, name)) for name in answers}
    first, *others = chats.values()
    shared = 0
    while shared < min(map(len, chats.values())) - 1 and all(chat[shared] == first[shared] for chat in others):
        shared += 1
    for name, chat in chats.items():
        rest = chat[shared:]
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            after = " after those that both chats share" if others else ""
            raise ValueError(f"column {name!r} must end with one message of the assistant{after}; got {shorten(rest)}")
    before = _said_before(prompt, opening, first[:shared])
    return written.before(before), *(written.answer(chat[-1]) for chat in chats.values())


def as_texts(row: Mapping[str, Any], answers: Sequence[str], written: ChatFormat) -> Row:
    """The same row with texts where its "prompt" or these answers are chats.

    Raises:
        ValueError: naming the column.
    """
    texts = chat_texts(row, "prompt", answers, written)
    return {**row} if texts is None else {**row, **dict(zip(("prompt", *answers), texts, strict=True))}


def _said_before(column: str | None, opening: Any, shared: Messages) -> Messages:
    """The messages of a prompt, and those that the answers share and the prompt does not end with."""
    if isinstance(opening, list):
        prompt = _messages(str(column), opening)
        twice = next(n for n in range(len(prompt), -1, -1) if prompt[len(prompt) - n :] == shared[:n])
        return [*prompt, *shared[twice:]]
    if isinstance(opening, str) and not any(m["role"] == "user" for m in shared):
        check_text(f"column {column!r}", opening)
        return [*shared, {"role": "user", "content": opening}]
    return shared


def _messages(column: str, messages: Any) -> Messages:
    """A list of messages, checked.

    Raises:
        ValueError: naming the column.
    """
    fine = isinstance(messages, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not fine or not messages:
        raise ValueError(
            f'column {column!r} must be messages, dicts with the texts "role" and "content"; got {shorten(messages)}'
        )
    for message in messages:
        check_text(f"column {column!r}", message["role"] + message["content"])
    return [{"role": m["role"], "content": m["content"]} for m in messages]
