"""Refusal: say that you do not know."""

from __future__ import annotations

from typing import Any

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task

QUESTIONS, ANSWERS, REFUSAL = "ABCDEFGHIJKLM", "nopqrstuvwxyz", "?"


class Refusal(Task):
    """Answer what can be known, refuse what cannot.

    Description: a prompt is one question. Half of the questions always have the same answer; the answer to the others
    is drawn anew each time, so that nobody can know it.
    Observation: the question and the response so far, token ids.
    Actions: the end token, the questions (never right), the answers and "?".
    Score: the right answer alone 1, "?" alone 0, anything else -1.
    Episode end: the end token, or 2 tokens.
    What it teaches: hallucination: where a wrong answer costs no more than a refusal, guessing pays; here it does not,
    and a policy must still learn to answer where it can.
    Optimum: 0.5, the answer to every known question and "?" to the others.

    Args:
        questions: how many, an even number; half of them known.
        answers: how many there are to choose from; at least 3, so that a guess costs on average.
    """

    best_score = 0.5
    deterministic = True

    def __init__(self, questions: int = 4, answers: int = 4) -> None:
        if not 2 <= questions <= 12 or questions % 2:
            raise ValueError(f"questions must be an even number from 2 to 12; got {questions!r}")
        if not 3 <= answers <= len(ANSWERS):
            raise ValueError(f"answers must be from 3 to {len(ANSWERS)}; got {answers!r}")
        self.questions, self.answers = QUESTIONS[:questions], ANSWERS[:answers]
        super().__init__(tokenizer=symbol_tokenizer(self.questions + self.answers + REFUSAL), max_new_tokens=2)

    def prompts(self) -> list[Row]:
        """Every question with every answer it may have, the known ones as often as the others."""
        known = len(self.questions) // 2
        return [
            {"prompt": question, "answer": self.answers[i % len(self.answers)] if i < known else drawn}
            for i, question in enumerate(self.questions)
            for drawn in self.answers
        ]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """1 for the answer, 0 for a refusal, -1 for anything else."""
        return [
            1.0 if text == answer else 0.0 if text == REFUSAL else -1.0
            for text, answer in zip(completions, columns["answer"], strict=True)
        ]
