"""What the report of an RLHF run says: the policy before and after PPO on the same openings, and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textrl.report import Section, curves, distinct, visible
from textrl.rollout import Rollout

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


def compare(prompts: Sequence[str], before: Rollout, after: Rollout) -> dict[str, Any]:
    """The report's figures from one continuation of each prompt by the SFT model, and one after PPO.

    Returns:
        "before" and "after" (the keys of `MEASURES` and "score_std"), what changed, and the first "samples".
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    judge = SentimentIntensityAnalyzer()

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
        "score_gain_in_reference_stds": (last["score"] - first["score"]) / first["score_std"],
        "vader_gain": last["vader"] - first["vader"],
        "kl_per_response": last["kl"],
        "distinct_2_ratio": last["distinct_2"] / first["distinct_2"],
        "samples": [{"prompt": p, "before": b, "after": a} for p, b, a in texts],
    }


def sections(out: dict[str, Any], logs: Path) -> list[Section]:
    """The parts of the page.

    Args:
        out: `report.json`.
        logs: the folder with a log of each step.
    """
    rows = [(name, f"{out['before'][key]:.3f}", f"{out['after'][key]:.3f}") for key, name in MEASURES.items()]
    samples = [(s["prompt"], s["before"], s["after"]) for s in out["samples"]]
    reward = out["reward_model"]
    return [
        Section(
            "Before and after",
            f"{len(samples)} of {out['config']['eval_episodes']} openings of reviews that no step has seen; the same"
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
        Section("PPO", "Against tokens learned from.", curves=curves(logs / "ppo" / "progress.csv", PPO_CURVES)),
        Section("Reward model", "Against pairs.", curves=curves(logs / "reward_model" / "progress.csv", REWARD_CURVES)),
        Section("SFT", "Against tokens.", curves=curves(logs / "sft" / "progress.csv", SFT_CURVES)),
    ]


def print_summary(out: dict[str, Any], folder: Path) -> None:
    """The report's figures, on the terminal."""
    reward, before, after = out["reward_model"], out["before"], out["after"]
    print(
        f"\nreward model: {reward['accuracy']:.1%} of {reward['pairs']} held-out pairs"
        f" (one person: {reward['human_ceiling']:.1%})"
    )
    print(f"{'':<34}{'SFT':>9}{'PPO':>9}")
    for key, name in MEASURES.items():
        print(f"{name:<34}{before[key]:>9.3f}{after[key]:>9.3f}")
    for sample in out["samples"]:
        print(f"\n{visible(sample['prompt'])} ...")
        print(f"  SFT: {visible(sample['before'])}\n  PPO: {visible(sample['after'])}")
    print(f"\nall steps took {out['seconds']['all']:.0f} s; see {folder / 'report.html'} and {folder / 'report.json'}")
