"""What the report of an RLHF run says: the policy before and after PPO on the same openings, and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textrl.disk import read_json
from textrl.files import InputError
from textrl.logging import PROGRESS
from textrl.report import PAGE, Section, curves, distinct, settings, visible, write_report
from textrl.rollout import Rollout
from textrl.runs import RUN

REPORT, LOGS = "report.json", "logs"
"""In a run's folder: the figures of its end; the logs of its steps, a folder each."""
SHOWN = 8
"""Openings that are printed with their continuations."""
MEASURES = {
    "score": "reward model's score",
    "vader": "VADER (independent judge)",
    "kl": "KL to the SFT model, nats a response",
    "response_length": "response length, tokens",
    "stopped": "share that stopped by itself",
    "distinct_2": "distinct-2",
}
PPO_CURVES = {
    "rollout/score": "score",
    "rollout/kl_reference": "KL to the SFT model",
    "rollout/response_length": "response length",
    "train/entropy": "entropy",
    "train/explained_variance": "explained variance",
    "train/kl_coef": "KL coefficient",
}
REWARD_CURVES = {"train/loss": "loss", "train/accuracy": "accuracy"}
SFT_CURVES = {"train/loss": "cross-entropy"}
STEPS = {
    "ppo": ("PPO", "Against tokens learned from.", PPO_CURVES),
    "reward_model": ("Reward model", "Against pairs.", REWARD_CURVES),
    "sft": ("SFT", "Against tokens.", SFT_CURVES),
}
"""The folder of a step's log, its heading, what its curves are drawn against, and which they are."""


def second_judge() -> Any:
    """VADER, which learned from nothing here.

    Raises:
        ImportError: where it is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ImportError('the report needs vaderSentiment: pip install ".[rlhf]"') from None
    return SentimentIntensityAnalyzer()


def compare(prompts: Sequence[str], before: Rollout, after: Rollout) -> dict[str, Any]:
    """The report's figures from one continuation of each prompt by the SFT model, and one after PPO.

    Returns:
        "before" and "after" (the keys of `MEASURES` and "score_std"), what changed, and the first "samples".
    """
    judge = second_judge()

    def measures(rollout: Rollout) -> dict[str, float]:
        texts = [p + c for p, c in zip(prompts, rollout.completions, strict=True)]
        numbers = rollout.metrics()
        return {
            "score": numbers["rollout/score"],
            "score_std": numbers["rollout/score_std"],
            "vader": sum(judge.polarity_scores(text)["compound"] for text in texts) / len(texts),
            "kl": numbers["rollout/kl_reference"],
            "response_length": numbers["rollout/response_length"],
            "stopped": numbers["rollout/stopped"],
            "distinct_2": distinct(rollout.completions),
        }

    first, last = measures(before), measures(after)
    texts = list(zip(prompts, before.completions, after.completions, strict=True))[:SHOWN]
    return {
        "before": first,
        "after": last,
        "score_gain_in_reference_stds": ratio(last["score"] - first["score"], first["score_std"]),
        "vader_gain": last["vader"] - first["vader"],
        "kl_per_response": last["kl"],
        "distinct_2_ratio": ratio(last["distinct_2"], first["distinct_2"]),
        "samples": [{"prompt": p, "before": b, "after": a} for p, b, a in texts],
    }


def ratio(one: float, other: float) -> float | None:
    """One over the other; None where that is 0 (scores that are all alike, responses of one word)."""
    return one / other if other else None


def write_page(folder: Path, out: Mapping[str, Any]) -> str:
    """Writes the page of a run.

    Args:
        folder: of the run, with a log of each step.
        out: what `report.json` holds; of a run that has not ended only "config".

    Returns:
        the figures, for the terminal.

    Raises:
        InputError: where a log is not as a step writes it.
        OSError: where the page cannot be written.
    """
    steps = [step for step in learned(folder / LOGS) if step.curves]
    ended = "before" in out
    if not steps and not ended:
        raise InputError(f"run {str(folder)!r} has nothing to show yet: no step in {folder / LOGS} has logged anything")
    about = out["model"] if ended else "Not finished: no figures yet, only what its steps have logged."
    sections = [*(compared(out) if ended else []), *steps, settings(out["config"])]
    said = summary(out) if ended else unfinished(steps)
    write_report(folder / PAGE, "RLHF on movie reviews", about, sections)
    return f"{said}; see {folder / PAGE}"


def is_rlhf(folder: Path) -> bool:
    """Whether a folder is that of an RLHF run, and not of `textrl train`."""
    try:
        run = read_json(folder / RUN)
    except (OSError, ValueError):
        run = None
    return (folder / REPORT).exists() or (isinstance(run, dict) and "seconds" in run)


def report_rlhf(folder: Path) -> str:
    """Writes the page of a run again, from its `report.json` or, if it has not ended, from its settings and logs.

    Returns:
        the figures, for the terminal.

    Raises:
        ValueError: where these are not what a run wrote.
    """
    file = folder / (REPORT if (folder / REPORT).exists() else RUN)
    try:
        return write_page(folder, read_json(file))
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{str(file)!r} is not what textrl rlhf wrote ({said})") from None


def learned(logs: Path) -> list[Section]:
    """The curves of the steps; none for a step that has not begun."""
    return [
        Section(title, text, curves=curves(logs / name / PROGRESS, shown))
        for name, (title, text, shown) in STEPS.items()
    ]


def compared(out: Mapping[str, Any]) -> list[Section]:
    """What the end of a run, `report.json`, says about the policies and the reward model."""
    rows = [(name, f"{out['before'][key]:.3f}", f"{out['after'][key]:.3f}") for key, name in MEASURES.items()]
    samples = [(s["prompt"], s["before"], s["after"]) for s in out["samples"]]
    reward = out["reward_model"]
    return [
        Section(
            "Before and after",
            f"{len(samples)} of {out['openings']} openings of reviews that no step has seen; the same"
            " random numbers before and after.",
            ("opening", "SFT model", "after PPO"),
            samples,
        ),
        Section(
            "Means over all held-out openings",
            "The score is the reward model's, in standard deviations of the SFT model's own. VADER is an independent"
            " judge: nothing was trained on it.",
            ("", "SFT model", "after PPO"),
            rows,
        ),
        Section(
            "The reward model and people",
            f"On {reward['pairs']} held-out pairs whose mean ratings differ by at least {reward['pair_gap']:g}, the"
            f" reward model agrees with the mean of the raters on {reward['accuracy']:.1%}; one person drawn at random"
            f" agrees with the mean of the others on {reward['human_ceiling']:.1%}.",
        ),
    ]


def summary(out: Mapping[str, Any]) -> str:
    """The figures of a run that has ended."""
    reward, before, after = out["reward_model"], out["before"], out["after"]
    lines = [
        "",
        f"reward model: {reward['accuracy']:.1%} of {reward['pairs']:d} held-out pairs"
        f" (one person: {reward['human_ceiling']:.1%})",
        f"{'':<34}{'SFT':>9}{'PPO':>9}",
    ]
    lines += [f"{name:<34}{before[key]:>9.3f}{after[key]:>9.3f}" for key, name in MEASURES.items()]
    for sample in out["samples"]:
        lines += ["", f"{visible(sample['prompt'])} ..."]
        lines += [f"  SFT: {visible(sample['before'])}", f"  PPO: {visible(sample['after'])}"]
    return "\n".join([*lines, "", f"all steps took {out['seconds']['all']:.0f} s"])


def unfinished(steps: Sequence[Section]) -> str:
    """The last figures of the steps of a run that has not ended."""
    lines = [
        f"{step.title + ', ' + name:<34}{y[-1]:>9.3f}  at {x[-1]:.0f}" for step in steps for name, x, y in step.curves
    ]
    return "\n".join(["", *lines, "", "the run has not finished"])
