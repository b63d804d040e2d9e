"""Human ratings: the files' quirks, the split, preference pairs and the human ceiling, on data made here."""

import itertools
from pathlib import Path

import pytest
from datasets import Dataset

from textrl.ratings import human_ceiling, load_ratings, openings, rating_groups


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources in the format of the real files: CR LF, a byte order mark, no newline at the end."""
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_bytes(
        b"1\t2.5\tA ''fine''  film &amp;amp; a  good one.\r\n2\t-1\tCaf\xc3\xa9 dull\r\n"
        b"3\t0\tno ratings here\r\n4\t1\t \r\n5\t1\tbad ratings"
    )
    (tmp_path / "movieReviewSnippets_anonDataRatings.txt").write_bytes(
        b"\xef\xbb\xbf1\t2.5\t0.5\t[2, 3]\r\n2\t-1\t0\t[-1, -1, -1]\r\n4\t1\t0\t[1, 1]\r\n5\t1\t0\t[1, 9]"
    )
    (tmp_path / "tweets_GroundTruth.txt").write_bytes(b"1\t9.9\tcaf\xc3\xa9 DULL\r\n")
    (tmp_path / "tweets_anonDataRatings.txt").write_bytes(b"1\t9.9\t0\t[0, 1]\r\n")
    return tmp_path


def rated(n: int = 40) -> Dataset:
    """Sentences of two sources with every mean from -4 to 4."""
    rows = [(source, i, [i % 9 - 4, (i // 3) % 9 - 4]) for source in ("movie", "tweet") for i in range(n)]
    return Dataset.from_list(
        [{"source": s, "text": f"{s} {i}", "mean": sum(r) / 2, "ratings": r} for s, i, r in rows],
    )


def test_the_files_quirks_are_undone_and_broken_rows_counted(folder: Path) -> None:
    with pytest.warns(UserWarning, match="movie: 3 of 5 rows"):
        rows = load_ratings(["movie"], folder)
    assert rows["text"][:] == ['A "fine" film & a good one.', "Café dull"]
    assert rows["ratings"][:] == [[2, 3], [-1, -1, -1]]
    assert rows["id"][:] == ["movie-1", "movie-2"]


def test_the_mean_is_that_of_the_ratings(folder: Path) -> None:
    assert load_ratings(["tweet"], folder)["mean"][:] == [0.5]


def test_the_split_is_fixed_about_80_10_10_and_the_same_for_the_same_text(tmp_path: Path) -> None:
    n = 2000
    texts = [f"sentence {i}" for i in range(n)] + [f"Sentence  {i} " for i in range(n)]
    (tmp_path / "tweets_GroundTruth.txt").write_text("".join(f"{i}\t0\t{text}\n" for i, text in enumerate(texts)))
    (tmp_path / "tweets_anonDataRatings.txt").write_text("".join(f"{i}\t0\t0\t[0, 0]\n" for i in range(2 * n)))
    split = load_ratings(["tweet"], tmp_path)["split"][:]
    assert split[5:10] == ["train", "validation", "train", "validation", "test"]
    assert split[:n] == split[n:]
    shares = {name: split.count(name) / len(split) for name in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.02)


@pytest.mark.parametrize("sources", [[], ["book"], ["movie", "book"]])
def test_an_unknown_source_names_the_right_ones(sources: list[str], folder: Path) -> None:
    with pytest.raises(ValueError, match=r"sources is .*'movie', 'product', 'editorial', 'tweet'"):
        load_ratings(sources, folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"amazonReviewSnippets_GroundTruth\.txt is missing"):
        load_ratings(["product"], folder)


def test_a_group_holds_all_pairs_of_its_few_sentences() -> None:
    ratings = rated(12)
    rows = {row["text"]: row for row in ratings}
    groups = rating_groups(ratings, 1.0, 3, 5)
    for row in groups:
        assert row["prompt"] == ""
        for side in ("chosen", "rejected"):
            of = rows[row[side]]
            assert (row[f"{side}_mean"], row[f"{side}_ratings"]) == (of["mean"], of["ratings"])
    assert groups.to_dict() == rating_groups(ratings, 1.0, 3, 5).to_dict()
    seen: set[str] = set()
    for number in set(groups["group"]):
        pairs = [(row["chosen"], row["rejected"]) for row in groups if row["group"] == number]
        texts = {text for pair in pairs for text in pair}
        assert len(texts) <= 5 and not texts & seen and len({rows[text]["source"] for text in texts}) == 1
        best = itertools.product(texts, texts)
        assert sorted(pairs) == sorted((a, b) for a, b in best if rows[a]["mean"] - rows[b]["mean"] >= 1.0)
        seen |= texts
    assert rating_groups(ratings, 1.0, 99, 5).to_dict() == rating_groups(ratings, 1.0, 100, 5).to_dict()
    with pytest.raises(ValueError, match="size is 99; there are not so many sentences of one source"):
        rating_groups(ratings, 1.0, 1, 99)
    with pytest.raises(ValueError, match="gap is 9; no group has two sentences whose means are so far apart"):
        rating_groups(ratings, 9, 1, 5)
    with pytest.raises(ValueError, match="gap must be above 0"):
        rating_groups(ratings, 0.0, 1, 5)


def test_means_of_one_decimal_reach_a_gap_of_one() -> None:
    ratings = Dataset.from_dict(
        {"source": ["a", "a"], "text": ["x", "y"], "mean": [0.4, 1.4], "ratings": [[0, 0], [1, 1]]}
    )
    assert rating_groups(ratings, 1.0, 1, 2)["chosen"][:] == ["y"]  # 1.4 - 0.4 is 0.99999...


@pytest.mark.parametrize(
    ("chosen", "rejected", "ceiling"),
    [
        ([2, 2, 2], [-1, -1, -1], 1.0),
        ([1, 1], [1, 1], 0.5),  # both say equal
        # one of four agrees for sure (2 over 0): by hand over the draws of (2, -2) and (0, 0), the rater who
        # said 2 leaves -2 as the others' mean and the one who said -2 leaves 2: always the contrary.
        ([2, -2], [0, 0], 0.0),
    ],
)
def test_the_human_ceiling_by_hand(chosen: list[int], rejected: list[int], ceiling: float) -> None:
    pairs = Dataset.from_dict({"chosen_ratings": [chosen] * 8, "rejected_ratings": [rejected] * 8})
    assert human_ceiling(pairs) == ceiling


def test_the_human_ceiling_of_raters_who_differ() -> None:
    """Of (3, 3, 3, -3) against (0, 0): the mean of any three is above 0, and three raters in four agree."""
    pairs = Dataset.from_dict({"chosen_ratings": [[3, 3, 3, -3]] * 4000, "rejected_ratings": [[0, 0]] * 4000})
    assert human_ceiling(pairs) == pytest.approx(0.75, abs=0.03)
    assert human_ceiling(pairs, seed=1) == human_ceiling(pairs, seed=1) != human_ceiling(pairs, seed=2)


def test_openings_are_unique_first_words_of_long_enough_sentences() -> None:
    texts = ["one two three four five six", "one two three", "a b c d e", "one two three seven eight nine"]
    prompts = openings(Dataset.from_dict({"text": texts}), words=2)["prompt"][:]
    assert sorted(prompts) == ["a b", "one two"]
    assert sorted(openings(Dataset.from_dict({"text": texts}), words=3)["prompt"][:]) == ["one two three"]


def test_openings_follow_the_seed_and_refuse_too_many() -> None:
    ratings = Dataset.from_dict({"text": [f"{i} b c d e f g" for i in range(50)]})
    assert openings(ratings, n=9, seed=3)["prompt"][:] == openings(ratings, n=9, seed=3)["prompt"][:]
    assert openings(ratings, n=9, seed=3)["prompt"][:] != openings(ratings, n=9, seed=4)["prompt"][:]
    with pytest.raises(ValueError, match="n is 51; it must be from 1 to 50"):
        openings(ratings, n=51)
