"""The report: numbers in place, and hostile text shown as text."""

import json
import shutil
import xml.dom.minidom
from pathlib import Path

import pytest

from textrl import cli
from textrl.agents.rlhf_report import MEASURES
from textrl.report import POINTS, Drawing, Section, curves, distinct, outline, visible, write_report

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</style><img src=x onerror=alert(1)>",
    "\x1b[31mred\x1b[0m \x07 \x00 \x9b31m",
    "\u202eright to left\u202c \u2066isolate",
    "\ud800 lone",
    "{{ 7 * 7 }} &lt; \"'",
    "<svg onload=\"document.title='owned'\"> ]]><!--",
    "\u061c\u200e\u200f\ufeff marks",
    "\u202eabc</td></tr></table><h1>out</h1>",
]


def test_hostile_text_is_text(tmp_path):
    file = tmp_path / "report.html"
    section = Section("<b>title", HOSTILE[0], ("<i>",), [(text,) for text in HOSTILE], [("<u>", [0, 1], [2, 3])])
    write_report(file, HOSTILE[1], HOSTILE[2], [section])
    page = file.read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    for raw in (
        "<script",
        "<img",
        "</style",
        "<b>",
        "<i>",
        "<u>",
        "\x1b",
        "\x07",
        "\x00",
        "\x9b",
        "\u202e",
        "\u2066",
        "<svg o",
        "<!--",
        "\u200f",
        "\ufeff",
        "<h1>out",
    ):
        assert raw not in body
    assert "&lt;script&gt;" in body
    assert "{{ 7 * 7 }}" in body
    assert "script" not in page[: page.index("<body>")].replace("Content-Security", "").split("</title>")[1]
    assert list(tmp_path.iterdir()) == [file]
    xml.dom.minidom.parseString("<a>" + body[6:].split("</body>")[0].replace("&#34;", "") + "</a>")


def test_visible_keeps_plain_text_and_shows_the_rest():
    assert visible("naïve — 日本 🎬") == "naïve — 日本 🎬"
    assert visible("a\tb\x1b") == "a␉b␛"
    assert visible("\u202e") == "<U+202E>"


def test_distinct_by_hand():
    assert distinct(["a b c", "a b"]) == pytest.approx(2 / 3)
    assert distinct(["one"]) == 0.0


def test_curves_read_what_is_there(tmp_path):
    (tmp_path / "p.csv").write_text("time/timesteps,a,b\n10,1,\n20,nan,5\n30,3,6\n")
    found = curves(tmp_path / "p.csv", {"a": "A", "b": "B", "c": "C"})
    assert found == [("A", [10, 30], [1, 3]), ("B", [20, 30], [5, 6])]


def test_a_long_curve_keeps_its_extremes_and_its_end():
    x = [float(i) for i in range(10_000)]
    y = [0.0] * 10_000
    y[1234], y[7777], y[-1] = 5.0, -3.0, 1.0
    points = outline(list(zip(x, y, strict=True)))
    assert len(points) <= POINTS + 2
    assert {(1234.0, 5.0), (7777.0, -3.0), (9999.0, 1.0)} <= set(points)
    assert points == sorted(points)


def test_a_constant_curve_of_any_size_can_be_drawn():
    assert Drawing("c", [0, 1], [1e20, 1e20]).points == "62.0,89.0 308.0,89.0"


# ---- textrl report ---------------------------------------------------------------------------------------------------

PROMPTS = [text for text in HOSTILE if text.isascii() and text.isprintable()]
HEADER = "time/iteration,time/timesteps,rollout/score\n"


def report(capsys, folder):
    """Exit code, stdout, stderr, and the page without its head."""
    code = cli.main(["report", str(folder)])
    out = capsys.readouterr()
    file = folder / "report.html"
    page = file.read_text(encoding="utf-8").split("</head>")[1] if file.is_file() else ""
    assert not list(folder.glob("*.part"))
    return code, out.out, out.err, page


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the command line, on prompts that are up to no good."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    env = ["--env", "textrl/Text-v0", "--prompts", str(folder / "p.jsonl"), "--env-arg", "max_new_tokens=3"]
    length = ["--batch-size", "8", "--total-timesteps", "60", "--checkpoint-every", "20", "--quiet"]
    assert cli.main(["train", "reinforce", *env, *length, "--log-dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def table(page, title):
    """The cells of the table below a heading, row by row."""
    part = page.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]
    document = xml.dom.minidom.parseString(part[part.index("<table>") : part.index("</table>")] + "</table>")
    rows = document.getElementsByTagName("tr")
    return [["".join(n.data for n in cell.childNodes) for cell in row.getElementsByTagName("td")] for row in rows[1:]]


def test_the_page_of_a_finished_run(capsys, run):
    rows = (run / "progress.csv").read_text().splitlines()
    saved = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**saved, "model": HOSTILE[1]}))
    code, out, err, page = report(capsys, run)
    assert (code, err) == (0, "")
    last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert f"{int(last['time/timesteps'])} of 60 tokens in {len(rows) - 1} iterations, finished" in out
    assert f"{'score':<22} {float(last['rollout/score']):.4g}\n" in out
    assert out.endswith(f"see {run / 'report.html'}\n")
    shown = table(page, "Responses")
    assert len(shown) == 8
    assert {prompt for prompt, *_ in shown} <= set(PROMPTS)
    for _, response, score, reason in shown:
        share = sum(c.isalpha() for c in response) / max(1, len(response))
        assert float(score) == pytest.approx(share, abs=1e-4)
        assert reason == ("length" if len(response) == 3 else "stop")
    assert ["rollout/score", f"{float(last['rollout/score']):.4g}"] in [
        row[::2] for row in table(page, "First and last numbers")
    ]
    settings = dict(table(page, "Settings"))
    assert settings["batch_size"] == "8"
    assert settings["learning_rate"] == "0.001", "the one in force, where none was given"
    assert settings["env: max_new_tokens"] == "3"
    assert settings["model"] == HOSTILE[1]
    assert not [raw for raw in ("<script", "<img", "</style", "<svg o", "<!--") if raw in page]
    assert page.count("<svg viewBox") == len(last) - 2
    before = (run / "report.html").read_bytes()
    report(capsys, run)
    assert (run / "report.html").read_bytes() == before, "the same page from the same folder"


def test_an_unfinished_run_shows_what_is_there(capsys, run):
    shutil.rmtree(run / "final")
    with (run / "progress.csv").open("a") as file:
        file.write("9,99999,1")  # being written
    code, out, err, page = report(capsys, run)
    assert (code, err) == (0, "")
    assert "not finished" in out
    assert "99,999" not in out
    steps = sorted(each.name for each in (run / "checkpoints").iterdir())
    assert f"from {steps[-1]};" in page
    (run / "checkpoints" / steps[-1] / "model.safetensors").write_bytes(b"")
    assert f"from {steps[-2]};" in report(capsys, run)[3], "a damaged checkpoint is passed over"
    shutil.rmtree(run / "checkpoints")
    code, out, err, page = report(capsys, run)
    assert (code, err) == (0, "")
    assert "No responses: the run has saved no agent yet" in out
    assert "the run has saved no agent yet" in page
    assert dict(table(page, "Settings"))["batch_size"] == "8"


def test_an_agent_that_cannot_be_loaded_is_said_and_the_rest_is_shown(capsys, run):
    saved = json.loads((run / "run.json").read_text())
    saved["env_kwargs"]["prompts"] = "absent.jsonl"
    (run / "run.json").write_text(json.dumps(saved))
    code, out, err, page = report(capsys, run)
    assert (code, err) == (0, "")
    assert "No responses: prompts must be a file that exists; got 'absent.jsonl'" in out
    assert table(page, "First and last numbers")


def test_a_log_of_learn_alone_is_a_run(capsys, tmp_path):
    (tmp_path / "progress.csv").write_text(HEADER + "1,10,0.25\n2,20,nan\n")
    code, out, err, page = report(capsys, tmp_path)
    assert (code, err) == (0, "")
    assert "20 tokens in 2 iterations\n" in out
    assert table(page, "First and last numbers") == [["rollout/score", "0.25", "nan"]]


NO_RUN = "RUN must be the --log-dir of a textrl train or a textrl rlhf; "
WRONG = {
    "has neither run.json nor progress.csv": {},
    "run.json' is no JSON": {"run.json": "{", "progress.csv": HEADER + "1,10,1\n"},
    "run.json' is of another kind": {"run.json": "[]", "progress.csv": HEADER + "1,10,1\n"},
    "has nothing to show yet: ": {"progress.csv": ""},
    "progress.csv has no iteration": {"progress.csv": HEADER},
    "line 2, column 'rollout/score' must be a number; got 'x'": {"progress.csv": HEADER + "1,10,x\n"},
    "line 3, must have as many cells as the header; got fewer": {"progress.csv": HEADER + "1,10,1\n2,20\n"},
    "line 2, must have as many cells as the header; got more": {"progress.csv": HEADER + "1,10,1,1\n"},
    "line 2, column 'time/timesteps' must be a finite number; got 'inf'": {"progress.csv": HEADER + "1,inf,1\n"},
    "line 2, column 'time/timesteps' must be a finite number; got None": {"progress.csv": "prompt\n1\n"},
    "must be a CSV file of numbers, in UTF-8": {"progress.csv": "\udcff\n"},
    "report.json' is not what textrl rlhf wrote (JSONDecodeError": {"report.json": "{"},
    "report.json' is not what textrl rlhf wrote (TypeError": {
        "report.json": "[]",
        "logs/sft/progress.csv": "time/timesteps,train/loss\n1,1\n",
    },
    "no step in ": {"run.json": '{"config": {}, "seconds": {}}'},
    "ppo/progress.csv, line 2, column 'rollout/score' must be a number": {
        "run.json": '{"config": {}, "seconds": {}}',
        "logs/ppo/progress.csv": HEADER + "1,10,x\n",
    },
    "cannot be written": {"progress.csv": HEADER + "1,10,1\n", "report.html/in the way": ""},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_run_is_one_line_and_nothing_is_written(message, capsys, tmp_path):
    for name, content in WRONG[message].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8", errors="surrogateescape")
    before = sorted(tmp_path.rglob("*"))
    code, out, err, _ = report(capsys, tmp_path)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_no_folder_is_one_line(capsys, tmp_path):
    code, _, err, _ = report(capsys, tmp_path / "absent")
    assert code == 2
    assert err == f"textrl: error: {NO_RUN}{str(tmp_path / 'absent')!r} is no folder\n"


# ---- of an RLHF run --------------------------------------------------------------------------------------------------


@pytest.fixture
def rlhf(tmp_path):
    """What an RLHF run leaves, as far as the page needs it."""
    for step, column in {"sft": "train/loss", "reward_model": "train/accuracy", "ppo": "rollout/score"}.items():
        (tmp_path / "logs" / step).mkdir(parents=True)
        (tmp_path / "logs" / step / "progress.csv").write_text(
            f"time/iteration,time/timesteps,{column}\n1,10,0.5\n2,20,0.75\n"
        )
    figures = {name: 0.125 for name in MEASURES}
    out = {
        "model": "a model: 1M parameters",
        "openings": 16,
        "reward_model": {"pair_gap": 1.0, "pairs": 12, "accuracy": 0.75, "human_ceiling": 0.875},
        "before": figures,
        "after": {**figures, "score": 1.5},
        "samples": [{"prompt": text, "before": text, "after": text} for text in HOSTILE],
        "seconds": {"all": 7.0},
        "config": {"eval_episodes": 16, "seed": 3},
    }
    (tmp_path / "report.json").write_text(json.dumps(out))
    (tmp_path / "run.json").write_text(json.dumps({"config": out["config"], "seconds": {"sft": 1.0}}))
    return tmp_path


def test_the_page_of_an_rlhf_run(capsys, rlhf):
    code, out, err, page = report(capsys, rlhf)
    assert (code, err) == (0, "")
    assert "reward model: 75.0% of 12 held-out pairs (one person: 87.5%)" in out
    assert f"{'reward model' + chr(39) + 's score':<34}{'0.125':>9}{'1.500':>9}" in out
    assert out.endswith(f"all steps took 7 s; see {rlhf / 'report.html'}\n")
    assert not set("\x1b\x07\x00\x9b\u202e") & set(out)
    assert [row[0] for row in table(page, "Before and after")] == [visible(text) for text in HOSTILE]
    assert dict(table(page, "Settings")) == {"eval_episodes": "16", "seed": "3"}
    assert page.count("<svg viewBox") == 3
    assert not [raw for raw in ("<script", "<img", "</style", "<svg o", "<!--") if raw in page]


def test_an_rlhf_run_that_has_not_ended_shows_its_curves(capsys, rlhf):
    (rlhf / "report.json").unlink()
    shutil.rmtree(rlhf / "logs/ppo")
    (rlhf / "logs/reward_model/progress.csv").write_text("")  # has just begun
    code, out, err, page = report(capsys, rlhf)
    assert (code, err) == (0, "")
    assert "the run has not finished" in out
    assert f"{'SFT, cross-entropy':<34}{'0.750':>9}  at 20\n" in out
    assert "Not finished" in page
    assert page.count("<svg viewBox") == 1
    assert dict(table(page, "Settings"))["seed"] == "3"
