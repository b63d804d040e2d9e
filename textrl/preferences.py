"""Preference data: the public formats, each to one `datasets.Dataset` with the texts prompt, chosen and rejected."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cells import check_kinds, did_you_mean, text_of, value_of
from .chats import ASSISTANT, DIALOGUES, ChatFormat, chat_texts
from .files import InputError, Rows, found_at, is_file_name, listed_rows, read_rows, warn
from .formats import FILE_OF_ROWS
from .scores import reason, shorten

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

_PROMPTS = ("prompt", "question", "instruction", "query", "history")
_PAIRS = (("chosen", "rejected"), ("response_j", "response_k"))  # the second: Stack Exchange, j is the better answer
_LABELLED = {  # two answers and a label: the columns, and which label says that the first is the better one
    ("human_ref_A", "human_ref_B", "labels"): 1,  # Stanford Human Preferences
    ("response_0", "response_1", "better_response_id"): 0,  # PKU-SafeRLHF
}
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""What the reference says of the two responses, where a file brings it along."""
_NUMBERS = (*(label for *_, label in _LABELLED), *REFERENCE_COLUMNS, "chosen_ids", "rejected_ids")
_SOURCES = f"must be {FILE_OF_ROWS}, a folder that save_to_disk wrote, or the name of a hub dataset in reach"


def read_preferences(
    data: Dataset | Sequence[Mapping[str, Any]] | str | Path,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    split: str = "train",
    drop_duplicates: bool = False,
    skip_bad_rows: bool = False,
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

    Every other column is kept as it is. A pair that occurs several times is kept several times, because repeated labels
    are evidence (two annotators agreed), unless `drop_duplicates`; rows of a file that repeat another in every column
    are named in a warning. A pair whose texts are alike says nothing: in a file it is an error, like an empty text; of
    other data it is dropped, with a warning that counts them.

    Args:
        data: a dataset, rows, a JSON (lines), CSV or Parquet file, a folder that `Dataset.save_to_disk` wrote, or the
            hub name of a dataset.
        tokenizer: its chat template turns messages into text, which a task and a reward model read right with their
            `special_tokens=True`; without one they become HH dialogues.
        split: which part of a folder or hub dataset.
        drop_duplicates: keep only the first of rows with the same three texts.
        skip_bad_rows: leave rows with a fault out; a `textrl.files.SkippedRows` warning counts and lists them.

    Raises:
        InputError: (a ValueError) for columns of no known format, or a value that is not what its column should hold,
            naming file and line, or the row, and the column.
    """
    from datasets import Dataset

    pairs = read_pairs(data, ChatFormat(tokenizer), split, drop_duplicates, skip_bad_rows)
    try:
        return Dataset.from_dict(_by_column(pairs))
    except (TypeError, ValueError, OverflowError):
        kinds: dict[Any, str] = {}
        pairs.each(lambda row: check_kinds(row, kinds))  # names the row, or leaves it out
    try:
        return Dataset.from_dict(_by_column(pairs))
    except (TypeError, ValueError, OverflowError) as error:
        said = " ".join(str(error).split())
        raise InputError(f"{pairs.source} must have columns that each hold values of one type ({said})") from None


def _by_column(rows: Rows) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in rows.columns}


def read_pairs(
    data: Dataset | Sequence[Mapping[str, Any]] | str | Path,
    written: ChatFormat = DIALOGUES,
    split: str = "train",
    drop_duplicates: bool = False,
    skip_bad_rows: bool = False,
    called: str = "data",
) -> Rows:
    """The pairs of `read_preferences` as rows that know where they stand."""
    table = _load(data, split, skip_bad_rows, called)
    names = set(table.columns)
    columns = _answers(table.source, names)
    prompts = next((name for name in _PROMPTS if name in names), None)
    repeated = table.repeated() if table.strict and not drop_duplicates else []
    rows = table.each(lambda row: _row(row, prompts, columns, written, table.strict))
    if prompts is not None and all(p and all(t.startswith(p) and t != p for t in (c, r)) for p, c, r in rows):
        rows = [(p, c[len(p) :], r[len(p) :]) for p, c, r in rows]
    keep = [i for i, (_, chosen, rejected) in enumerate(rows) if chosen != rejected]
    if len(keep) < len(rows):
        warnings.warn(f"dropped {len(rows) - len(keep)} of {len(rows)} pairs: chosen equals rejected", stacklevel=3)
    if drop_duplicates:
        kept = list({rows[i]: i for i in reversed(keep)}.values())[::-1]
        if len(kept) < len(keep):
            warnings.warn(f"dropped {len(keep) - len(kept)} of {len(rows)} pairs: duplicates", stacklevel=3)
        keep = sorted(kept)
    if not keep:
        right = "a pair whose chosen and rejected differ"
        raise InputError(f"{table.source} must have {right}; got {len(rows)} pairs, all alike")
    if repeated:
        said = f"{table.source}: {len(repeated)} of {len(table)} rows repeat another"
        warn(f"{said} (each counts; read_preferences(..., drop_duplicates=True) drops them)", repeated)
    used = {*columns, prompts} | ({"input"} if prompts == "instruction" else set())
    others = [{key: value for key, value in row.items() if key not in used} for row in table]
    texts = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    places = [table.places[i] for i in keep]
    return Rows([others[i] | texts[i] for i in keep], places, table.source, skip_bad_rows, table.strict)


def _load(data: Any, split: str, skip: bool, called: str) -> Rows:
    from datasets import DatasetDict, load_from_disk

    if is_file_name(data):
        return read_rows(data, numbers=_NUMBERS, skip_bad_rows=skip, called=called)
    if isinstance(data, (str, Path)):
        path = Path(data)
        if path.is_dir() and ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
            data = load_from_disk(os.fspath(path))
        elif path.is_file() or (path / "config.json").exists():
            raise InputError(f"{called} {_SOURCES}; got {found_at(path)}" + (" of a model" if path.is_dir() else ""))
        else:
            data = _from_hub(str(data), split, called)
    if isinstance(data, DatasetDict):
        if split not in data:
            raise InputError(f"split must be one of {sorted(data)}; got {split!r}")
        data = data[split]
    return listed_rows(data, called, skip)


def _from_hub(name: str, split: str, called: str) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # whatever the loader and the network may raise
        raise InputError(f"{called} {_SOURCES}; got {found_at(name)} ({reason(error)})") from None


def _answers(source: str, names: set[str]) -> tuple[str, str, str | None]:
    """The columns of the two answers, and of the label where the first is not always the better one."""
    for first, second in _PAIRS:
        if {first, second} <= names:
            return first, second, None
    for columns in _LABELLED:
        if set(columns) <= names:
            return columns
    known = [" and ".join(pair) for pair in _PAIRS] + [", ".join(columns) for columns in _LABELLED]
    hint = next((said for name in _PAIRS[0] if name not in names and (said := did_you_mean(name, names))), "")
    raise InputError(f"{source} must have the columns {'; or '.join(known)}; got {shorten(sorted(names), 200)}{hint}")


def _row(
    row: Mapping[str, Any],
    prompts: str | None,
    columns: tuple[str, str, str | None],
    written: ChatFormat,
    strict: bool,
) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of one row, as texts.

    Raises:
        ValueError: naming the column; with `strict` for empty texts and answers that are alike too.
    """
    first, second, label = columns
    if label is not None:
        if value_of(row, label) not in (0, 1):
            raise ValueError(f"column {label!r} must be 0 or 1; got {shorten(row[label])}")
        if row[label] != _LABELLED[first, second, label]:
            first, second = second, first
    prompt, chosen, rejected = _texts(row, prompts, first, second, written)
    if strict:
        for column, text in ((prompts, prompt), (first, chosen), (second, rejected)):
            value = row.get(column or "")
            if column == prompts and value == "":  # whether it may be empty hangs on the task
                continue
            if column is not None and not (value if isinstance(value, str) else text).strip():
                raise ValueError(f"column {column!r} must be a text that is not empty; got {shorten(value)}")
        if chosen == rejected:
            raise ValueError(f"columns {first!r} and {second!r} must differ; both are {shorten(chosen)}")
    return prompt, chosen, rejected


def _texts(
    row: Mapping[str, Any], prompts: str | None, first: str, second: str, written: ChatFormat
) -> tuple[str, str, str]:
    if (texts := chat_texts(row, prompts, (first, second), written)) is not None:
        before, chosen, rejected = texts
        return before, chosen, rejected
    chosen, rejected = (_text(row, name) for name in (first, second))
    if prompts is None:
        return _split(chosen, rejected)
    prompt = _text(row, prompts)
    if prompts == "instruction" and row.get("input"):
        prompt = f"{prompt}\n\n{_text(row, 'input')}"
    return prompt, chosen, rejected


def _text(row: Mapping[str, Any], column: str) -> str:
    value = value_of(row, column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be a text or a list of messages; got {shorten(value)}")
    return text_of(row, column)


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
