"""The report: numbers in place, and hostile text shown as text."""

import xml.dom.minidom

import pytest

from textrl.report import Section, curves, distinct, visible, write_report

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
