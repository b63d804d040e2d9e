"""Reviews: go on with the opening of a movie review."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textrl.fetch import cache_dir, smollm2
from textrl.plugins import reward_function
from textrl.rows import Row
from textrl.scores import call_score
from textrl.symbols import load_tokenizer
from textrl.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Reviews(Task):
    """Write on from the opening of a movie review, so that the review is liked.

    Description: a prompt is the first words of a sentence from a movie review; the response continues it. The sentences
    are those of Hutto and Gilbert (2014); they and the default tokenizer are fetched on first use.
    Observation: the prompt and the continuation so far, token ids.
    Actions: the tokens of the tokenizer.
    Score: what `reward` says; by default the compound sentiment of VADER for prompt and response, from -1 to 1
    (needs the package vaderSentiment). A `RewardModel` trained on people's ratings is the one to use in earnest.
    Episode end: the end token, or `max_new_tokens`.
    What it teaches: a real language model, real prompts, and how easily a lexicon is pleased.
    Optimum: not known.

    Args:
        reward: a reward function or its name, as for `Text`.
        tokenizer: or the folder or hub name of one; default: SmolLM2-135M's.
        sources: of the openings: "movie", "product", "editorial", "tweet".
        words: length of an opening.
        n: how many openings; None: all there are.
        max_new_tokens: the horizon.
        seed: of the choice of openings.
    """

    def __init__(
        self,
        reward: Callable[..., Any] | str | Path | None = None,
        tokenizer: PreTrainedTokenizerFast | str | None = None,
        sources: Sequence[str] = ("movie",),
        words: int = 4,
        n: int | None = None,
        max_new_tokens: int = 24,
        seed: int = 0,
    ) -> None:
        if reward is None:
            _analyzer()  # what is missing is said before anything is fetched
        self.reward = compound_sentiment if reward is None else reward_function(reward)
        from textrl.ratings import load_ratings, openings

        self._prompts: list[str] = openings(load_ratings(sources), words, n, seed)["prompt"][:]
        chosen = str(smollm2()) if tokenizer is None else tokenizer
        super().__init__(
            tokenizer=load_tokenizer(chosen) if isinstance(chosen, str) else chosen, max_new_tokens=max_new_tokens
        )

    @classmethod
    def at_hand(cls) -> bool:
        """Whether what the defaults need is here: the files in the cache, so that nothing is fetched, and VADER."""
        files = all((cache_dir() / name).is_dir() for name in ("SmolLM2-135M-Instruct", "vader-ratings"))
        return files and find_spec("vaderSentiment") is not None

    def prompts(self) -> list[Row]:
        """The openings."""
        return [{"prompt": prompt} for prompt in self._prompts]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> Any:
        """What `reward` says."""
        return call_score(self.reward, prompts, completions, columns)


def compound_sentiment(prompts: list[str], completions: list[str]) -> list[float]:
    """VADER's compound score of each whole text, from -1 to 1."""
    analyzer = _analyzer()
    return [
        float(analyzer.polarity_scores(prompt + text)["compound"])
        for prompt, text in zip(prompts, completions, strict=True)
    ]


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ImportError(
            "the default reward needs vaderSentiment (pip install vaderSentiment); or pass reward="
        ) from None
    return SentimentIntensityAnalyzer()
