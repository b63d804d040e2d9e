"""ProxyGold: a score that is right until it is pushed."""

from __future__ import annotations

from typing import Any

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task


class ProxyGold(Task):
    """Please a proxy, and see what becomes of the score that was meant.

    Description: the prompt is empty. The proxy counts praise (the first letter): the more the better. So does the gold
    score, up to half of the horizon; beyond that, praise is flattery and every further letter costs as much as the
    proxy pays. Near a uniform reference the two agree; far from it they part.
    Observation: what was said so far, token ids, after the begin token.
    Actions: the end token and the letters.
    Score: the one that `paid` names: "proxy" = praise / length, "gold" = the smaller of praise and length - praise,
    divided by length. Both are in the final `info`, as `proxy_score` and `gold_score`.
    Episode end: the end token, or `length` tokens.
    What it teaches: over-optimisation of a reward model, and what the KL penalty is for (Gao 2023): the gold score
    rises and then falls as the policy leaves the reference.
    Optimum: 1 for the proxy (praise alone; the gold score is then 0); 0.5 for gold.

    Args:
        letters: the alphabet; the first letter is praise.
        length: the horizon, in tokens.
        paid: "proxy" or "gold".
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, letters: str = "abcd", length: int = 6, paid: str = "proxy") -> None:
        if paid not in ("proxy", "gold"):
            raise ValueError(f'paid must be "proxy" or "gold"; got {paid!r}')
        super().__init__(tokenizer=symbol_tokenizer(letters), max_new_tokens=length)
        self.praise, self.paid = letters[0], paid
        self.best_score = 1.0 if paid == "proxy" else length // 2 / length

    def prompts(self) -> list[Row]:
        """The empty prompt."""
        return [{"prompt": ""}]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The score that is paid."""
        return self.both(completions)[self.paid]

    def describe(self, prompts: list[str], completions: list[str], **columns: Any) -> dict[str, list[float]]:
        """Both scores."""
        return {f"{name}_score": scores for name, scores in self.both(completions).items()}

    def both(self, completions: list[str]) -> dict[str, list[float]]:
        """The proxy's and the gold score of each completion."""
        counts, length = [text.count(self.praise) for text in completions], self.max_new_tokens
        return {
            "proxy": [count / length for count in counts],
            "gold": [min(count, length - count) / length for count in counts],
        }
