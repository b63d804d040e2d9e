"""Every public preference format gives the same prompt / chosen / rejected."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from textrl.preferences import read_preferences
from textrl.symbols import symbol_tokenizer

USER = {"role": "user", "content": "2+2?"}
HH = "\n\nHuman: 2+2?\n\nAssistant:"


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def triples(data: Any, **options: Any) -> list[tuple[str, str, str]]:
    pairs = read_preferences(data, **options)
    return list(zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, ("2+2=", "4", "5")),
        ({"prompt": "", "chosen": "4", "rejected": "5"}, ("", "4", "5")),
        ({"prompt": "2+2=", "chosen": "2+2=4", "rejected": "2+2=5"}, ("2+2=", "4", "5")),
        ({"prompt": "ab", "chosen": "ab", "rejected": "aba"}, ("ab", "ab", "aba")),  # a copy, not a repeated prompt
        ({"chosen": "It is true.", "rejected": "It is trash."}, ("It is", " true.", " trash.")),
        ({"chosen": "yes", "rejected": "no"}, ("", "yes", "no")),
        ({"chosen": HH + " 4.", "rejected": HH + " 5."}, (HH, " 4.", " 5.")),
        ({"chosen": HH + " 4. Yes.", "rejected": HH + " 4. No."}, (HH, " 4. Yes.", " 4. No.")),
        ({"question": "2+2?", "response_j": "4", "response_k": "5"}, ("2+2?", "4", "5")),
        ({"instruction": "Add.", "input": "2 2", "chosen": "4", "rejected": "5"}, ("Add.\n\n2 2", "4", "5")),
        ({"instruction": "Add.", "input": "", "chosen": "4", "rejected": "5"}, ("Add.", "4", "5")),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, ("q", "a", "b")),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}, ("q", "b", "a")),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 1}, ("q", "b", "a")),
        ({"chosen": [USER, say("4")], "rejected": [USER, say("5")]}, (HH, " 4", " 5")),
        ({"prompt": [USER], "chosen": [say("4")], "rejected": [say("5")]}, (HH, " 4", " 5")),
        ({"prompt": "2+2?", "chosen": [say("4")], "rejected": [say("5")]}, (HH, " 4", " 5")),
        ({"prompt": "2+2?", "chosen": [USER, say("4")], "rejected": [USER, say("5")]}, (HH, " 4", " 5")),
        ({"prompt": [USER], "chosen": "4", "rejected": "5"}, (HH, "4", "5")),
        (
            {"chosen": [USER, say("4"), USER, say("4")], "rejected": [USER, say("4"), USER, say("5")]},
            (HH + " 4" + HH, " 4", " 5"),
        ),
    ],
)
def test_every_format(row: dict[str, Any], expected: tuple[str, str, str]) -> None:
    assert triples([row]) == [expected]


def test_the_chat_template_of_a_tokenizer_renders_the_messages() -> None:
    tokenizer = symbol_tokenizer("ab")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    row = {"chosen": [USER, say("4")], "rejected": [USER, say("5")]}
    assert triples([row], tokenizer=tokenizer) == [("<user>2+2?<me>", "4", "5")]


def test_one_row_whose_answers_do_not_repeat_the_prompt_keeps_all_as_they_are() -> None:
    rows = [
        {"prompt": "a", "chosen": "ab", "rejected": "ac"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    assert triples(rows) == [("a", "ab", "ac"), ("a", "b", "c")]


def test_other_columns_stay_beside_their_rows() -> None:
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "x", "margin": 0.0},
        {"prompt": "a", "chosen": "x", "rejected": "y", "margin": 2.5},
    ]
    with pytest.warns(UserWarning, match="dropped 1 of 2 pairs: chosen equals rejected"):
        pairs = read_preferences(Dataset.from_list(rows))
    assert pairs.to_list() == [rows[1]]


def test_duplicates_are_evidence_unless_dropped() -> None:
    pair = {"prompt": "a", "chosen": "x", "rejected": "y"}
    rows = [pair, {**pair, "chosen": "z"}, pair, pair]
    pairs = read_preferences(rows)
    assert pairs.to_list() == rows
    with pytest.warns(UserWarning, match="dropped 2 of 4 pairs: duplicates"):
        assert read_preferences(rows, drop_duplicates=True).to_list() == rows[:2]


def test_sources(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "u", "rejected": "v"}]
    dataset = Dataset.from_list(rows)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset.to_csv(tmp_path / "pairs.csv")
    dataset.save_to_disk(tmp_path / "folder")
    DatasetDict({"test": dataset}).save_to_disk(tmp_path / "dict")
    expected = triples(rows)
    assert expected[1] == ("b", "u", "v")
    assert triples(str(tmp_path / "pairs.jsonl")) == expected
    assert triples(tmp_path / "pairs.csv") == expected
    assert triples(tmp_path / "folder") == expected
    assert triples(tmp_path / "dict", split="test") == expected
    with pytest.raises(ValueError, match=r"split must be one of \['test'\]; got 'train'"):
        read_preferences(tmp_path / "dict")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "text": "b"}], r"data must have the columns chosen and rejected; or .*\['prompt', 'text'\]"),
        ([], "at least one row"),
        ([{"prompt": "a", "chosen": "b", "rejected": None}], "row 0, column 'rejected' must be a text"),
        ([{"prompt": None, "chosen": "b", "rejected": "c"}], "row 0, column 'prompt' must be a text"),
        (
            [{"chosen": "a b", "rejected": "a c"}, {"chosen": "b", "rejected": None}],
            "row 1, column 'rejected' must be a text",
        ),
        ([{"prompt": "a", "response_0": "a", "response_1": "b", "better_response_id": 2}], "must be 0 or 1; got 2"),
        ([{"chosen": [{"role": "user"}], "rejected": [USER]}], "row 0, column 'chosen' must be messages"),
        ([{"chosen": [say("a"), USER], "rejected": [say("b"), USER]}], "column 'chosen' must end with one message of"),
        ("nowhere.jsonl", "data must be a file that exists; got 'nowhere.jsonl'"),
        (__file__, r"a file that ends in one of .json, .*; got '.*.py', a file of another kind$"),
        (7, "data must be a datasets.Dataset"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}],
            r"data row 1, column 'rejected' is missing; got the columns \['prompt', 'chosen'\]",
        ),
        ([{"Prompt": "a", "Chosen": "b", "Rejected": "c"}], "; did you mean 'Chosen' to be 'chosen'?"),
        ([{"prompt": "a", "chosen": "b", " rejected": "c"}], "; did you mean ' rejected' to be 'rejected'?"),
    ],
)
def test_errors_name_row_and_column(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_preferences(rows)


def test_a_models_folder_is_not_searched_for_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data must be a file that ends in .*, a folder of a model"):
        read_preferences(tmp_path)


def test_all_pairs_alike_is_an_error() -> None:
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="a pair whose chosen and rejected differ"):
        read_preferences([{"prompt": "a", "chosen": "x", "rejected": "x"}])


def test_columns_of_other_formats_do_not_replace_what_was_read() -> None:
    rows = [{"question": "q", "response_j": "good", "response_k": "bad", "chosen": "X", "note": 1}]
    pairs = read_preferences(rows)
    assert (pairs[0]["chosen"], pairs[0]["rejected"], pairs[0]["note"]) == ("good", "bad", 1)


def test_a_turn_that_prompt_and_chats_share_is_said_once() -> None:
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "u"}
    for prompt in ([system, user], [system]):
        row = {"prompt": prompt}
        for side in ("chosen", "rejected"):
            row[side] = [user, {"role": "assistant", "content": side}]
        assert read_preferences([row])[0]["prompt"] == "S\n\nHuman: u\n\nAssistant:"
