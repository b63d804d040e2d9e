"""A run as one self-contained page: figures, tables and samples, every text escaped."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from .disk import write_text
from .logging import TIMESTEPS, read_numbers
from .render import CONTROLS

PAGE = "report.html"
"""The page's name in a run's folder."""
POINTS = 600
"""A curve is drawn with about so many points at most: two for every pixel across."""
LONGEST = 300
"""Characters of a setting that are shown."""

Curve = tuple[str, list[float], list[float]]
"""Title, x, y."""


@dataclass
class Section:
    """A part of a page.

    Attributes:
        title: its heading.
        text: a sentence or two.
        header: the columns of its table.
        rows: the table's cells, as text.
        curves: (name, x, y) each; drawn side by side.
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    curves: Sequence[Curve] = field(default_factory=list)


def write_report(file: Path, title: str, summary: str, sections: Sequence[Section]) -> None:
    """Writes a page that needs nothing beside itself: no script, no network.

    Args:
        file: where.
        title: of the page.
        summary: one sentence below it.
        sections: in order. Control characters in their texts are shown as their pictures, markup as text.

    Raises:
        OSError: where it cannot be written; what stood there before is as it was.
    """
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["visible"] = visible
    page.globals["drawing"] = Drawing
    template = page.from_string((files("textrl") / "report.html").read_text(encoding="utf-8"))
    write_text(file, template.render(title=title, summary=summary, sections=sections))


class Drawing:
    """One curve as the numbers of an SVG of 320 by 180: points, axis labels, the last value."""

    def __init__(self, name: str, x: list[float], y: list[float]) -> None:
        low, high = min(y), max(y)
        if high - low < 1e-9:
            margin = max(0.5, abs(high) / 2)
            low, high = low - margin, high + margin
        across = max(x[-1] - x[0], 1e-9)
        self.name = name
        self.low, self.high = f"{low:.3g}", f"{high:.3g}"
        self.first, self.end = f"{x[0]:.0f}", f"{x[-1]:.0f}"
        self.last = f"{y[-1]:.3g}"
        right = [62 + 246 * (a - x[0]) / across for a in x]
        down = [148 - 118 * (b - low) / (high - low) for b in y]
        places = list(zip(right, down, strict=True))
        self.points = " ".join(f"{a:.1f},{b:.1f}" for a, b in outline(places))
        self.dot = places[-1]


def outline(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of a curve; of a long one the lowest and the highest of every stretch, and the last."""
    if len(places) <= POINTS:
        return places
    stretch = -(-2 * len(places) // POINTS)
    out = []
    for i in range(0, len(places), stretch):
        part = sorted(places[i : i + stretch], key=lambda place: place[1])
        out += sorted([part[0], part[-1]])
    return [*out, places[-1]]


def settings(values: Mapping[str, Any]) -> Section:
    """The settings of a run as a part of its page."""
    rows = []
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=repr)
        rows.append((name, text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."))
    return Section("Settings", header=("", "value"), rows=rows)


def curves(progress: Path, names: Mapping[str, str], x: str = TIMESTEPS) -> list[Curve]:
    """The named columns of a run's `progress.csv` that are there, each as (title, x, y).

    Args:
        progress: the file.
        names: column -> title.
        x: the column of the x axis.

    Raises:
        InputError: for a file that no run wrote.
    """
    rows = read_numbers(progress, x)
    out = []
    for column, title in names.items():
        points = [(row[x], row[column]) for row in rows if math.isfinite(row.get(column, math.nan))]
        if points:
            out.append((title, [a for a, _ in points], [b for _, b in points]))
    return out


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams of words as a share of all in the texts together (Li 2016): a sign of collapse when low."""
    grams = [tuple(words[i : i + n]) for words in (text.split() for text in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def visible(text: object) -> str:
    """A text whose control characters, and those that turn the direction of writing, are shown as pictures."""
    out = []
    for char in str(text):
        code = ord(char)
        if code < 32:
            out.append(chr(0x2400 + code))
        elif code == 127:
            out.append("\u2421")
        elif unicodedata.category(char) in CONTROLS:
            out.append(f"<U+{code:04X}>")
        else:
            out.append(char)
    return "".join(out)
