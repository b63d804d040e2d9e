"""Files of rows: the four formats read alike, every fault is named by file, line and column, nothing is half-read."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

import textrl
from textrl.agents import BPO, DPO, SFT
from textrl.envs.text import Text
from textrl.episodes import as_episodes
from textrl.files import LISTED, InputError, SkippedRows, prompt_rows, read_rows

ROWS = [{"prompt": "a b", "completion": "c"}, {"prompt": "naïve 日本", "completion": 'line\nbreak "quoted", comma'}]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        cells = [[str(v).replace('"', '""') for v in row.values()] for row in rows]
        lines = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row) for row in cells)]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("end", ["json", "jsonl", "csv", "parquet"])
def test_the_formats_read_alike(end: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"x.{end}", ROWS)
    rows = read_rows(file, ["prompt", "completion"])
    assert rows.rows == ROWS
    assert list(rows) == ROWS and len(rows) == 2
    assert rows.columns == ["prompt", "completion"]


def test_places_are_lines_as_an_editor_counts_them(tmp_path: Path) -> None:
    csv = write(tmp_path / "x.csv", [*ROWS, ROWS[0]])
    assert [p.rpartition(", ")[2] for p in read_rows(csv).places] == ["line 2", "line 3", "line 5"]
    listed = write(tmp_path / "x.json", ROWS)
    assert [p.rpartition(", ")[2] for p in read_rows(listed).places] == ["line 2", "line 6"]
    lines = tmp_path / "x.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [p.rpartition(", ")[2] for p in read_rows(lines).places] == ["line 1", "line 3"]
    lines.rename(tmp_path / "y.json")  # one object a line under the other name
    assert [row["prompt"] for row in read_rows(tmp_path / "y.json")] == ["a", "b"]


GOOD = b'{"prompt": "a", "completion": "b"}\n'
LONG = json.dumps({"prompt": "x" * 10_000_000, "completion": "b"}).encode()
BAD_LINES = {
    b'{"prompt": "a", "completion": "b"': r"line 2: is not whole JSON: .* at character",
    b'["a", "b"]': r"line 2: must be an object with a value for each column",
    b"7": "line 2: must be an object",
    b'{"prompt": "a", "prompt": "b", "completion": "c"}': "line 2: column 'prompt' stands there twice",
    b'{"prompt": "a", "completion": NaN}': "line 2: NaN is not JSON; a number must be finite",
    b'{"prompt": "a", "completion": "b", "x": 1e999}': "line 2: 1e999 is no number that a computer holds",
    b'{"promt": "a", "completion": "b"}': r"line 2, column 'prompt' is missing; .*did you mean 'promt'",
    b'{"prompt": 5, "completion": "b"}': "line 2, column 'prompt' must be a text; got 5",
    b'{"prompt": null, "completion": "b"}': "line 2, column 'prompt' must be a text; got None",
    b'{"prompt": ["a"], "completion": "b"}': r"line 2, column 'prompt' must be a text; got \['a'\]",
    b'{"prompt": "a", "completion": ""}': "line 2, column 'completion' must be a text that is not empty; got ''",
    b'{"prompt": " \\n", "completion": "b"}': "line 2, column 'prompt' must be a text that is not empty",
    b'{"prompt": "a\\u0000b", "completion": "b"}': "line 2, column 'prompt' must be text; got NUL at character 2",
    b'{"prompt": "ab\\ud83d", "completion": "b"}': r"'prompt' must be text; got half of a .*\\ud83d, at character 3",
    b'{"prompt": "a\xff", "completion": "b"}': r"line 2: byte 14 of the line is not UTF-8 \(0xff\); save the file as",
    b'{"prompt": "\xed\xa0\x80", "completion": "b"}': "line 2: byte 13 of the line is not UTF-8",
    LONG: "column 'prompt' must be a text of at most 1,000,000 characters; got 10,000,000",
    b'{"prompt": ' + b"[" * 100_000 + b'"a"' + b"]" * 100_000 + b"}": "line 2: is JSON too deeply nested",
    b'{"prompt": ' + b"9" * 5000 + b"}": "line 2: Exceeds the limit",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:30])
def test_a_bad_line_is_named_or_skipped(line: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(GOOD + line + b"\n" + GOOD)
    with pytest.raises(InputError, match=BAD_LINES[line]) as error:
        read_rows(file, ["prompt", "completion"])
    assert str(error.value).startswith(f"{file}, line 2")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    with pytest.warns(SkippedRows, match=f"skipped 1 of 3 rows: .*{BAD_LINES[line]}"):
        rows = read_rows(file, ["prompt", "completion"], skip_bad_rows=True)
    assert [place.rpartition(", ")[2] for place in rows.places] == ["line 1", "line 3"]
    assert len(rows) == 2


BAD_FILES = {
    "x.jsonl": [
        (b"", "must have at least one row; got none"),
        (b"\n\n", "must have at least one row"),
        ('{"prompt": "a"}'.encode("utf-16"), "line 1: is UTF-16; save the file as UTF-8"),
        (b"nonsense\n", "line 1: is not whole JSON"),
    ],
    "x.json": [
        (b"[]", "must have at least one row"),
        (b'[{"prompt": "a"},\n', "line 2: is not whole JSON"),
        (b'[{"prompt": "a"}\n{"prompt": "b"}]', "line 2: is not whole JSON: a comma or the end of the list is missing"),
        (b'[{"prompt": "a"},]', "line 1: is not JSON: a comma before the end of the list"),
        (b'[{"prompt": "a"}]\n[]', "line 1: something follows the end of the list"),
        (b'[{"prompt": "a"},\n\n{"prompt": 1}]', "line 3, column 'prompt' must be a text; got 1"),
        (b'[{"prompt": "a"},\n"b"]', "line 2: must be an object"),
        (b'[\n{"prompt": "\xff"}]', "line 2: byte 13 of the line is not UTF-8"),
        (b"[" * 100_000, "line 1: is JSON too deeply nested"),
        (b'{\n "data": [{"prompt": "a"}]\n}', "line 1: must be one object a line, or begin a list of them; got '{'"),
        (b'{"data": [\n{"prompt": "a"}]}', "line 1: must be one object a line"),
        (b'{"prompt": "a', "is not whole JSON: Unterminated string starting at character 12"),
        (b'{"data": [{"prompt": "a"}]}', "line 1, column 'prompt' is missing; got the columns"),
    ],
    "x.csv": [
        (b"", "must have a header and at least one row; got nothing"),
        (b"prompt\n", "must have at least one row"),
        (b"prompt,prompt\na,b\n", "line 1: must be a header, a different name for each column"),
        (b"prompt,\na,b\n", "line 1: must be a header"),
        (b"prompt,x\na,b\na\n", r"line 3: must have 2 cells, .*got 1"),
        (b"prompt,x\na,b\na,b,c\n", "line 3: must have 2 cells, .*got 3"),
        (b'prompt,x\n"a"b,c\n', "line 2: is not CSV: ',' expected after '\"'; write a quotation mark inside quotes tw"),
        (b'prompt,x\na,b\n"a,b\nc,d\n', "line 3: a quotation mark opens here and is never closed"),
        (b"prompt,x\na,b\n\xe9,c\n", r"line 3: byte 1 of the line is not UTF-8 \(0xe9\)"),
        (b"pr\xe9mpt,x\na,b\n", "line 1: byte 3 of the line is not UTF-8"),
        (b'prompt,x\n"a\n\xe9",c\n', "line 2: byte 1 of the line is not UTF-8"),
        (b"prompt,x\na\x00,b\n", "line 2, column 'prompt' must be text; got NUL at character 2"),
        (b"prompt,x\n,b\n", "line 2, column 'prompt' must be a text that is not empty"),
        (b"text,x\na,b\n", "line 2, column 'prompt' is missing; got the columns"),
        ("prompt\na\n".encode("utf-16"), "line 1: is UTF-16"),
    ],
    "x.parquet": [
        (b"", "is not a whole Parquet file"),
        (b"PAR1 and nonsense PAR1", "is not a whole Parquet file"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"), [(n, c, m) for n, cases in BAD_FILES.items() for c, m in cases]
)
def test_a_bad_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_rows(tmp_path / name, ["prompt"])
    assert str(error.value).startswith(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_parquet_faults(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": pa.array(["a", None])}), file)
    with pytest.raises(InputError, match=r"x.parquet, row 1, column 'prompt' must be a text; got None"):
        read_rows(file, ["prompt"])
    pq.write_table(pa.table({"prompt": pa.array([b"a", b"\xff"])}), file)
    with pytest.raises(InputError, match=r"row 0, column 'prompt' must be a text; got b'a'"):
        read_rows(file, ["prompt"])
    broken = pa.array([b"a", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"prompt": broken}), file)
    with pytest.raises(InputError, match=r"row 1: has text that is not UTF-8"):
        read_rows(file, ["prompt"])
    whole = write(file, ROWS).read_bytes()
    for tenth in range(10):
        file.write_bytes(whole[: len(whole) * tenth // 10])
        with pytest.raises(InputError, match="is not a whole Parquet file"):
            read_rows(file)


def test_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "there.txt").touch()
    for name, message in {
        "absent.jsonl": "file must be a file that exists; got",
        "folder.jsonl": "folder.jsonl', a folder",
        "x.txt": "must be a file that ends in one of .json, .jsonl, .csv, .parquet; got .*x.txt', and no such file",
        "there.txt": "there.txt', a file of another kind",
        "a\0b.jsonl": "must be a file that exists",
        "x" * 400 + ".jsonl": "cannot be read: File name too long",
    }.items():
        with pytest.raises(InputError, match=message):
            read_rows(tmp_path / name)


def test_prompts_that_are_one_name_say_what_is_taken_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "p.txt").touch()
    kinds = ".json, .jsonl, .csv, .parquet"
    taken = f"prompts must be a list of texts, a dataset or a file that ends in one of {kinds}; got "
    for name, there in {
        str(tmp_path / "p.txt"): "a file of another kind",
        str(tmp_path): "a folder",
        "The movie was": "and no such file",
        "x" * 5000: "and no such file",
    }.items():
        with pytest.raises(ValueError) as caught:
            prompt_rows(name, False)
        assert str(caught.value).startswith(taken)
        assert str(caught.value).endswith(f", {there}")
    with pytest.raises(InputError, match=r"prompts must be a file that exists; got 'absent.jsonl'$"):
        prompt_rows("absent.jsonl", False)


@pytest.mark.skipif(os.name != "posix", reason="names of files")
def test_the_name_of_a_file_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    file = tmp_path / "\x1b[31m\n.jsonl"
    file.write_text("x")
    with pytest.raises(InputError) as error:
        read_rows(file)
    assert str(error.value).isprintable()


def test_only_so_many_are_listed_and_none_left_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": 1}\n' * 50 + '{"prompt": "a"}\n')
    with pytest.warns(SkippedRows) as caught:
        read_rows(file, ["prompt"], skip_bad_rows=True)
    message = str(caught[0].message)
    assert f"skipped 50 of 51 rows: {file}, line 1, column 'prompt' must be a text; got 1; " in message
    assert message.count("column 'prompt'") == LISTED and message.endswith(f"; and {50 - LISTED} more")
    file.write_text('{"prompt": 1}\n' * 3)
    with pytest.raises(InputError, match=r"has no good row left: .*line 1, column 'prompt'"):
        read_rows(file, ["prompt"], skip_bad_rows=True)


# ---- where files go -------------------------------------------------------------------------------------------


def test_prompts_of_the_text_environment(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [{"prompt": "The", "answer": 1}, {"prompt": "A film", "answer": 2}])
    task = Text(prompts=str(file))
    assert task.rows == [{"prompt": "The", "answer": 1}, {"prompt": "A film", "answer": 2}]
    write(file, [{"prompt": "The"}, {"prompt": "naïve"}, {"prompt": "The"}])
    with pytest.raises(ValueError, match=r"p.jsonl, line 2, prompt has text that the tokenizer does not know: 'naïve'"):
        Text(prompts=file)
    with pytest.warns(SkippedRows) as caught:
        task = Text(prompts=file, skip_bad_rows=True)
    assert [row["prompt"] for row in task.rows or []] == ["The", "The"]
    assert "1 of 3 rows repeat another" in str(caught[0].message)
    assert "line 3 repeats line 1" in str(caught[0].message)
    with pytest.raises(ValueError, match=r"p.jsonl, line 1, prompt is 4 tokens long, longer than max_prompt_tokens=3"):
        Text(prompts=file, max_prompt_tokens=3)


class Letters(textrl.Task):
    def __init__(self) -> None:
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=4)

    def prompts(self) -> list[dict[str, Any]]:
        return [{"prompt": p} for p in ("a", "abc")]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [float(text.count("a")) for text in completions]


EXAMPLE = {"prompt": "a", "completion": "bc"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LEARNERS = [
    (SFT, EXAMPLE, {"completion": 7}, "column 'completion' must be a text; got 7"),
    (SFT, EXAMPLE, {"completion": ""}, "column 'completion' must be a text that is not empty"),
    (SFT, EXAMPLE, {"prompt": ""}, "column 'prompt' must be a text that is not empty"),
    (SFT, EXAMPLE, {"completion": "x"}, "text that the tokenizer does not know: 'x'"),
    (SFT, EXAMPLE, {"prompt": "abcabc"}, "prompt is 7 tokens long, longer than max_prompt_tokens=4"),
    (DPO, PAIR, {"chosen": "c"}, "columns 'chosen' and 'rejected' must differ; both are 'c'"),
    (DPO, PAIR, {"chosen": ""}, "column 'chosen' must be a text that is not empty"),
    (DPO, PAIR, {"prompt": ""}, "column 'prompt' must be a text that is not empty"),
    (DPO, PAIR, {"chosen": "x"}, "text that the tokenizer does not know: 'x'"),
    (BPO, EXAMPLE, {"completion": ""}, "column 'completion' must be a text that is not empty"),
    (BPO, EXAMPLE, {"prompt": " "}, "column 'prompt' must be a text that is not empty"),
    (BPO, EXAMPLE | {"score": 1.0}, {"score": "high"}, "column 'score' must be a finite number; got 'high'"),
    (BPO, EXAMPLE | {"completion_ids": [1]}, {"completion_ids": [9]}, "column 'completion_ids' must be 1 to 4 token"),
    (BPO, EXAMPLE | {"logprobs": [-1.0] * 3}, {"logprobs": [-1.0]}, "'logprobs' must be a list of 3 finite numbers"),
]


@pytest.mark.parametrize(("cls", "good", "change", "message"), LEARNERS, ids=str)
def test_agents_that_learn_from_a_file(cls: Any, good: Any, change: Any, message: str, tmp_path: Path) -> None:
    env = textrl.TextEnv(Letters())
    file = write(tmp_path / "d.jsonl", [good, {**good, "prompt": "ab"}])
    cls(env, dataset=file, batch_size=2).learn(4)
    write(file, [good, {**good, **change}, {**good, "prompt": "ab"}])
    with pytest.raises(InputError, match=rf"d.jsonl, line 2, .*{message}"):
        cls(env, dataset=str(file))
    with pytest.warns(SkippedRows, match=r"skipped 1 of 3 rows: .*line 2, "):
        cls(env, dataset=cls.read_dataset(file, skip_bad_rows=True), batch_size=2).learn(4)


def test_labels_and_scores_of_a_csv_are_numbers_and_all_else_is_text(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text("prompt,response_0,response_1,better_response_id,margin\n1,2,3,1,4\n")
    assert textrl.read_preferences(file).to_list() == [{"prompt": "1", "chosen": "3", "rejected": "2", "margin": "4"}]
    file.write_text('prompt,completion,score,logprobs\na,bc,0.5,"[-1, -2, -3]"\n')
    BPO(textrl.TextEnv(Letters()), dataset=file)
    file.write_text("prompt,response_0,response_1,better_response_id\na,b,c,first\n")
    with pytest.raises(InputError, match="line 2: column 'better_response_id' must be a number or a list of them"):
        textrl.read_preferences(file)


def test_repeated_pairs_of_a_file_are_named_and_kept(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [PAIR, {**PAIR, "prompt": "b"}, PAIR])
    with pytest.warns(SkippedRows, match=r"1 of 3 rows repeat another \(.*drop_duplicates=True\) .*line 3 repeats"):
        assert len(textrl.read_preferences(file)) == 3
    write(file, [{**PAIR, "annotator": 1}, {**PAIR, "annotator": 2}])  # not a mistake: two people agreed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(textrl.read_preferences(file)) == 2


def test_a_value_that_does_not_go_with_those_above_is_named_or_skipped(tmp_path: Path) -> None:
    for values, line, message in (
        ([1, ["a"], 2.5], 2, r"column 'extra' must be a number, as above; got \['a'\]"),
        ([None, "a", True], 3, "column 'extra' must be a text, as above; got True"),
        ([{"a": 1}, {"b": "x"}, {"b": 2}], 3, "column 'extra' must be a text, as above; got 2"),
        ([1, 2**70, 2], 2, "column 'extra' must be a whole number of at most 64 bits; got 1180591620717411303424"),
        (["a", "b", "\ud800"], 3, "column 'extra' must be text; got half of a surrogate pair"),
    ):
        file = write(tmp_path / "p.jsonl", [{**PAIR, "extra": value} for value in values])
        with pytest.raises(InputError, match=rf"p.jsonl, line {line}, {message}"):
            textrl.read_preferences(file)
        with pytest.warns(SkippedRows, match=rf"skipped 1 of 3 rows: .*line {line}, {message}"):
            assert len(textrl.read_preferences(file, skip_bad_rows=True)) == 2


def test_data_that_is_no_list_of_rows_says_what_makes_one() -> None:
    env, row = textrl.TextEnv(Letters()), {**PAIR, "completion": "b"}
    for cls in (SFT, DPO, BPO):
        for data, message in (
            ([row, "x"], "dataset row 1 must be a dict with a value for each column; got 'x'"),
            ((each for each in [row]), r"dataset must be .*; list\(...\) makes one of it$"),
            (Dataset.from_list([row]).to_iterable_dataset(), r"; list\(...\) makes one of it$"),
            (pandas.DataFrame([row]), r"; its .to_dict\('records'\) is one$"),
            ("absent.jsonl", "dataset must be a file that exists; got 'absent.jsonl'"),
        ):
            with pytest.raises(InputError, match=message):
                cls(env, dataset=data)


def test_numbers_of_numpy_are_numbers() -> None:
    row = {"prompt": "a", "completion": "b", "score": np.float32(2), "logprobs": [np.float32(-1), np.float64(-1)]}
    logged = as_episodes([row, {**row, "score": np.int64(3)}], Letters(), torch.device("cpu"))
    assert logged.scores.tolist() == [2, 3] and logged.logprobs.tolist() == [[-1, -1]] * 2
