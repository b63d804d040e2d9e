"""Preference data: the public formats, each to one `datasets.Dataset` with the texts prompt, chosen and rejected."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .task import shorten

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]
"""A chat: `[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]`."""

ASSISTANT = "\n\nAssistant:"
"""What opens an answer in dialogues of the form of Anthropic's HH data; `HUMAN` opens a question."""
HUMAN = "\n\nHuman:"

_PROMPTS = ("prompt", "question", "instruction", "query", "history")
_PAIRS = (("chosen", "rejected"), ("response_j", "response_k"))  # the second: Stack Exchange, j is the better answer
_LABELLED = {  # two answers and a label: the columns, and which label says that the first is the better one
    ("human_ref_A", "human_ref_B", "labels"): 1,  # Stanford Human Preferences
    ("response_0", "response_1", "better_response_id"): 0,  # PKU-SafeRLHF
}
_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read_preferences(
    data: Dataset | Sequence[Mapping[str, Any]] | str | Path,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    split: str = "train",
    drop_duplicates: bool = False,
) -> Dataset:
    r"""Reads preference pairs of any known format into columns prompt, chosen and rejected, all texts.

    | format | columns |
    | --- | --- |
    | plain | prompt, chosen, rejected |
    | prompt repeated | as plain, where every chosen and rejected text begins with its prompt |
    | implicit prompt | chosen, rejected: the prompt is what both begin with, up to a space |
    | HH | chosen, rejected: dialogues `\n\nHuman: ...\n\nAssistant: ...`, alike up to the last answer |
    | chat | chosen, rejected: lists of messages, with the prompt as their beginning or as a column of its own |
    | Stack Exchange | question, response_j (the better one), response_k |
    | Alpaca | instruction, input (may be empty), and the two answers |
    | SHP; SafeRLHF | history, human_ref_A, human_ref_B, labels; prompt, response_0, response_1, better_response_id |

    Every other column is kept as it is. A pair whose texts are alike says nothing and is dropped, with a warning that
    counts them. A pair that occurs several times is kept several times, because repeated labels are evidence (two
    annotators agreed), unless `drop_duplicates`.

    Args:
        data: a dataset, rows, a JSON (lines), CSV or Parquet file, a folder that `Dataset.save_to_disk` wrote, or the
            hub name of a dataset.
        tokenizer: its chat template turns messages into text; without one they become HH dialogues.
        split: which part of a file, folder or hub dataset.
        drop_duplicates: keep only the first of rows with the same three texts.

    Raises:
        ValueError: for columns of no known format, or a value that is not what its column should hold, naming both
            the row and the column.
    """
    from datasets import Dataset

    dataset = _load(data, split)
    names = set(dataset.column_names)
    if len(dataset) == 0:
        raise ValueError(f"data must have at least one row; got none, with the columns {sorted(names)}")
    first, second, label = _answers(names)
    prompts = next((name for name in _PROMPTS if name in names), None)
    template = tokenizer if getattr(tokenizer, "chat_template", None) else None
    rows = [_row(i, row, prompts, (first, second, label), template) for i, row in enumerate(dataset)]
    if prompts is not None and all(p and all(t.startswith(p) and t != p for t in (c, r)) for p, c, r in rows):
        rows = [(p, c[len(p) :], r[len(p) :]) for p, c, r in rows]
    keep = [i for i, (_, chosen, rejected) in enumerate(rows) if chosen != rejected]
    if len(keep) < len(rows):
        warnings.warn(f"dropped {len(rows) - len(keep)} of {len(rows)} pairs: chosen equals rejected", stacklevel=2)
    if drop_duplicates:
        kept = list({rows[i]: i for i in reversed(keep)}.values())[::-1]
        if len(kept) < len(keep):
            warnings.warn(f"dropped {len(keep) - len(kept)} of {len(rows)} pairs: duplicates", stacklevel=2)
        keep = sorted(kept)
    if not keep:
        raise ValueError(f"data must have a pair whose chosen and rejected differ; got {len(rows)} pairs, all alike")
    used = {first, second, label, prompts} | ({"input"} if prompts == "instruction" else set())
    others = {name: dataset[name][:] for name in dataset.column_names if name not in used}
    texts = {name: [rows[i][k] for i in keep] for k, name in enumerate(("prompt", "chosen", "rejected"))}
    return Dataset.from_dict(texts | {name: [values[i] for i in keep] for name, values in others.items()})


def count_duplicates(pairs: Dataset) -> int:
    """How many rows repeat an earlier row's prompt, chosen and rejected."""
    return len(pairs) - len(set(zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True)))


def _load(data: Any, split: str) -> Dataset:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            data = load_from_disk(os.fspath(path))
        elif path.suffix in _FILES:
            if not path.is_file():
                raise ValueError(f"data must be a file that exists; got {str(path)!r}")
            return load_dataset(_FILES[path.suffix], data_files={split: str(path)}, split=split)
        else:
            return load_dataset(str(data), split=split)
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"split must be one of {sorted(data)}; got {split!r}")
        return data[split]
    if isinstance(data, Dataset):
        return data
    if isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
        return Dataset.from_list([dict(row) for row in data])
    raise ValueError(f"data must be a datasets.Dataset, a list of dicts, a file or a name; got {shorten(data)}")


def _answers(names: set[str]) -> tuple[str, str, str | None]:
    """The columns of the two answers, and of the label where the first is not always the better one."""
    for first, second in _PAIRS:
        if {first, second} <= names:
            return first, second, None
    for columns in _LABELLED:
        if set(columns) <= names:
            return columns
    known = [" and ".join(pair) for pair in _PAIRS] + [", ".join(columns) for columns in _LABELLED]
    raise ValueError(f"data must have the columns {'; or '.join(known)}; got {sorted(names)}")


def _row(
    i: int,
    row: Mapping[str, Any],
    prompts: str | None,
    columns: tuple[str, str, str | None],
    tokenizer: PreTrainedTokenizerFast | None,
) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of one row, as texts."""
    first, second, label = columns
    if label is not None:
        if row[label] not in (0, 1):
            raise ValueError(f"row {i}, column {label!r} must be 0 or 1; got {shorten(row[label])}")
        if row[label] != _LABELLED[first, second, label]:
            first, second = second, first
    if isinstance(row[first], list):
        prompt = None if prompts is None else row[prompts]
        return _chat(i, prompt, (first, row[first]), (second, row[second]), tokenizer)
    chosen, rejected = (_text(i, name, row[name]) for name in (first, second))
    if prompts is None:
        return _split(chosen, rejected)
    if isinstance(row[prompts], list):
        return _render(_messages(i, prompts, row[prompts]), tokenizer), chosen, rejected
    prompt = _text(i, prompts, row[prompts])
    if prompts == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{_text(i, 'input', row['input'])}"
    return prompt, chosen, rejected


def _text(i: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"row {i}, column {column!r} must be a text or a list of messages; got {shorten(value)}")
    return value


def _split(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two whole texts -> their common beginning and the two ends; cut where an answer opens, or at a space."""
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    common = chosen[: next(differ, min(len(chosen), len(rejected)))]
    place = common.rfind(ASSISTANT)
    if place >= 0:
        place += len(ASSISTANT)
    elif len(common) < max(len(chosen), len(rejected)):  # the character after it differs: back to the last space
        place = max(common.rfind(" "), common.rfind("\n"), 0)
    else:
        place = len(common)
    return chosen[:place], chosen[place:], rejected[place:]


def _messages(i: int, column: str, messages: Any) -> Messages:
    """A list of messages, checked.

    Raises:
        ValueError: naming row and column.
    """
    fine = isinstance(messages, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not fine or not messages:
        raise ValueError(
            f'row {i}, column {column!r} must be messages, dicts with the texts "role" and "content"; got'
            f" {shorten(messages)}"
        )
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _chat(
    i: int,
    prompt: Any,
    first: tuple[str, Any],
    second: tuple[str, Any],
    tokenizer: PreTrainedTokenizerFast | None,
) -> tuple[str, str, str]:
    """A pair of chats. Their common messages are the prompt, after the messages of the prompt column, if any."""
    chosen, rejected = (_messages(i, column, messages) for column, messages in (first, second))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    before: Messages = chosen[:shared]
    if isinstance(prompt, list):
        opening = _messages(i, "prompt", prompt)
        before = before if before[: len(opening)] == opening else [*opening, *before]
    elif isinstance(prompt, str) and not any(m["role"] == "user" for m in before):
        before = [*before, {"role": "user", "content": prompt}]
    for column, rest in ((first[0], chosen[shared:]), (second[0], rejected[shared:])):
        if len(rest) != 1 or rest[0]["role"] != "assistant":
            raise ValueError(
                f"row {i}, column {column!r} must end with one message of the assistant after those that both chats"
                f" share; got {shorten(rest)}"
            )
    space = "" if tokenizer is not None else " "
    return _render(before, tokenizer), space + chosen[-1]["content"], space + rejected[-1]["content"]


def _render(messages: Messages, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """Messages as one text after which the assistant speaks: the chat template's, or an HH dialogue."""
    if tokenizer is not None:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    opens = {"user": f"{HUMAN} ", "assistant": f"{ASSISTANT} ", "system": ""}
    return "".join(opens.get(m["role"], f"\n\n{m['role'].capitalize()}: ") + m["content"] for m in messages) + ASSISTANT
