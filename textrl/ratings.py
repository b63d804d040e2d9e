"""Sentences rated by people: the human feedback of the full RLHF run.

The data of Hutto and Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
Media Text: 23,703 sentences from four sources, each rated from -4 (extremely negative) to 4 (extremely
positive) by 15 to 99 people. `textrl.fetch.vader_sources` brings the files.
"""

import hashlib
import html
import json
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from .fetch import vader_sources

FILES = {
    "movie": "movieReviewSnippets",
    "product": "amazonReviewSnippets",
    "editorial": "nytEditorialSnippets",
    "tweet": "tweets",
}
SPLITS = ("train",) * 8 + ("validation", "test")  # by the hash modulo 10


def load_ratings(
    sources: Sequence[str] = ("movie", "product", "editorial", "tweet"), folder: Path | None = None
) -> Dataset:
    """Read the rated sentences.

    A sentence belongs to "train" (80%), "validation" or "test" (10% each) by a hash of its text, so the split
    never changes and a sentence that occurs twice is in one split only. `mean` is the mean of `ratings`: for
    199 of the tweets the ground-truth file gives another figure, which the published ratings do not support.

    Args:
        sources: which of "movie", "product", "editorial" and "tweet".
        folder: the rating files; None fetches them.

    Returns:
        Columns id, source, text (str), mean (float), ratings (list of int), split (str).

    Raises:
        ValueError: an unknown source, a missing file, or a file without one good row.
    """
    if not sources or not set(sources) <= set(FILES):
        raise ValueError(f"sources is {list(sources)}; it must hold one or more of {list(FILES)}")
    folder = vader_sources() if folder is None else folder
    return Dataset.from_list([row for source in dict.fromkeys(sources) for row in _rows(source, folder)])


def rating_groups(ratings: Dataset, gap: float, n: int, size: int, seed: int = 0) -> Dataset:
    """All pairs among a few sentences at a time: more comparisons for each sentence that is read.

    Each group holds `size` sentences of one source; no sentence comes twice. A group without a pair is left out.

    Args:
        ratings: rows of `load_ratings`.
        gap: least difference of the means, above 0.
        n: number of groups; all, if there are fewer.
        size: sentences in a group.
        seed: the same seed gives the same groups.

    Returns:
        Columns prompt (empty), chosen, rejected (str), chosen_mean, rejected_mean (float), chosen_ratings,
        rejected_ratings (list of int), group (int).

    Raises:
        ValueError: `gap` is not positive, `size` is below 2, or there is no group or no pair.
    """
    if gap <= 0 or size < 2:
        raise ValueError(f"gap must be above 0 and size at least 2; got {gap} and {size}")
    rng = random.Random(seed)
    places: dict[str, list[int]] = {}
    for i, source in enumerate(ratings["source"]):
        places.setdefault(source, []).append(i)
    groups = []
    for members in places.values():
        rng.shuffle(members)
        groups += [members[i : i + size] for i in range(0, len(members) - size + 1, size)]
    if not groups:
        raise ValueError(f"size is {size}; there are not so many sentences of one source")
    mean = np.asarray(ratings["mean"], dtype=np.float64)  # (N,)
    drawn = [
        (number, better, worse)
        for number, members in enumerate(rng.sample(groups, min(n, len(groups))))
        for better in members
        for worse in members
        if mean[better] - mean[worse] >= gap - 1e-9
    ]
    if not drawn:
        raise ValueError(f"gap is {gap}; no group has two sentences whose means are so far apart")
    numbers, better, worse = (np.array(column) for column in zip(*drawn, strict=True))
    return _pairs(ratings, better, worse).add_column("group", numbers)


def _pairs(ratings: Dataset, better: NDArray[np.int64], worse: NDArray[np.int64]) -> Dataset:
    """Pairs of rows, given by their places (n,) and (n,)."""
    rejected, chosen = ratings.select(worse), ratings.select(better)
    return Dataset.from_dict(
        {
            "prompt": [""] * len(better),
            "chosen": chosen["text"][:],
            "rejected": rejected["text"][:],
            "chosen_mean": chosen["mean"][:],
            "rejected_mean": rejected["mean"][:],
            "chosen_ratings": chosen["ratings"][:],
            "rejected_ratings": rejected["ratings"][:],
        }
    )


def human_ceiling(pairs: Dataset, seed: int = 0) -> float:
    """How often one person agrees with the others on which sentence of a pair is better.

    For each sentence one rater is drawn at random and taken out; the two drawn ratings say which sentence is
    better, and so do the means of the ratings that are left. Where one side says "equal" the pair counts one
    half. It is the accuracy that a single, average rater would have as a reward model. The pairs were chosen
    by means that include the drawn rater, which favours the person very slightly.

    Args:
        pairs: rows of `rating_groups`.
        seed: of the drawn raters.

    Returns:
        The share of pairs on which they agree, from 0 to 1.
    """
    rng = np.random.default_rng(seed)

    def leave_one_out(ratings: list[int]) -> tuple[int, float]:
        one = ratings[rng.integers(len(ratings))]
        return one, (sum(ratings) - one) / (len(ratings) - 1)

    agreement = 0.0
    for chosen, rejected in zip(pairs["chosen_ratings"], pairs["rejected_ratings"], strict=True):
        (one_chosen, others_chosen), (one_rejected, others_rejected) = (
            leave_one_out(chosen),
            leave_one_out(rejected),
        )
        agreement += 0.5 + 0.5 * np.sign(one_chosen - one_rejected) * np.sign(others_chosen - others_rejected)
    return float(agreement / len(pairs))


def openings(ratings: Dataset, words: int = 4, n: int | None = None, seed: int = 0) -> Dataset:
    """The first words of the sentences, as prompts to be continued.

    Sentences with fewer than three words after the opening are left out, and no opening comes twice.

    Args:
        ratings: rows of `load_ratings`.
        words: length of an opening.
        n: how many, drawn at random; None takes all, in random order.
        seed: of the drawing.

    Returns:
        One column, prompt.

    Raises:
        ValueError: fewer than `n` openings, or none.
    """
    sentences = [text.split() for text in ratings["text"]]
    found = list(dict.fromkeys(" ".join(s[:words]) for s in sentences if len(s) >= words + 3))
    if not found:
        raise ValueError(f"words is {words}; no sentence has 3 more")
    n = len(found) if n is None else n
    if not 0 < n <= len(found):
        raise ValueError(f"n is {n}; it must be from 1 to {len(found)}, the number of openings there are")
    return Dataset.from_dict({"prompt": random.Random(seed).sample(found, n)})


def _rows(source: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The good rows of one source; how many were not is said in a warning."""
    texts = {row[0]: row[-1] for row in _lines(folder / f"{FILES[source]}_GroundTruth.txt")}
    lines = _lines(folder / f"{FILES[source]}_anonDataRatings.txt")
    ratings = {row[0]: _parse_ratings(row[-1]) for row in lines}
    good = 0
    for key, raw in texts.items():
        text = _clean(raw)
        if text and (values := ratings.get(key)):
            good += 1
            digest = hashlib.sha256(text.lower().encode()).digest()
            yield {
                "id": f"{source}-{key}",
                "source": source,
                "text": text,
                "mean": sum(values) / len(values),
                "ratings": values,
                "split": SPLITS[int.from_bytes(digest[:8], "big") % len(SPLITS)],
            }
    if not good:
        raise ValueError(f"{folder / FILES[source]}_*.txt hold no row with a text and its ratings")
    if broken := len(texts) - good:
        warnings.warn(f"{source}: {broken} of {len(texts)} rows have no text or no ratings; skipped", stacklevel=2)


def _lines(path: Path) -> list[list[str]]:
    """The tab-separated rows of a file: UTF-8, sometimes with a byte order mark, lines ending in CR LF."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the folder must hold the files of textrl.fetch.vader_sources()")
    return [line.split("\t") for line in path.read_text(encoding="utf-8-sig", errors="replace").split("\n") if line]


def _clean(text: str) -> str:
    """Undo what the collectors' tools did: HTML entities, some escaped twice, and '' for a quotation mark."""
    return " ".join(html.unescape(html.unescape(text)).replace("''", '"').split())


def _parse_ratings(text: str) -> list[int]:
    """The ratings, or an empty list where they are not two or more integers from -4 to 4."""
    try:
        values = json.loads(text)
    except ValueError:
        return []
    good = isinstance(values, list) and len(values) > 1 and all(type(v) is int and -4 <= v <= 4 for v in values)
    return values if good else []
