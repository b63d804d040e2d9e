"""When a run must stop: loss or gradient not finite again and again, or a score that fails too often."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from .asking import Asking
from .runs import Checkpoints
from .state import layers
from .task import Task

if TYPE_CHECKING:
    from .agent import Agent

SKIPS_IN_A_ROW = 3
EPISODES_JUDGED = 1000
"""A score's failures are counted over so many of the latest episodes."""
FEWEST_JUDGED = 20
"""With fewer episodes than this so far, as many are taken to have been."""


class TrainingError(ValueError):
    """A run that cannot go on: what went wrong, and which checkpoint is the last good one."""


def ask_as_configured(agent: Agent) -> None:
    """Has the tasks of an agent's environment asked for scores as its settings say."""
    config = agent.config
    for layer in layers(agent.env):
        if isinstance(layer, Task):
            layer.asking = Asking(config.score_timeout, config.on_score_error == "drop")


def note_skips(agent: Agent, metrics: dict[str, float], skipped_before: int) -> None:
    """Counts an iteration from which nothing, or not all, could be learned because a number was not finite."""
    broken = not all(math.isfinite(metrics.get(name, 0.0)) for name in ("train/loss", "train/grad_norm"))
    if broken and agent.optimizer.skipped == skipped_before:  # a step of the agent's own making
        agent.optimizer.skipped += 1
    agent.stuck = agent.stuck + 1 if agent.optimizer.skipped > skipped_before else 0
    if agent.optimizer.skipped:
        metrics["train/skipped_steps"] = agent.optimizer.skipped


def stop_if_stuck(agent: Agent, metrics: dict[str, float], saved: Checkpoints | None) -> None:
    """Ends a run that has not learned for some iterations.

    Raises:
        TrainingError: naming the last checkpoint.
    """
    if agent.stuck >= SKIPS_IN_A_ROW:
        raise TrainingError(
            f"loss or gradient was not finite in {SKIPS_IN_A_ROW} iterations in a row (loss"
            f" {metrics.get('train/loss')}, gradient norm {metrics.get('train/grad_norm')}), so nothing was learned"
            f' from them; {last_good(saved)}; a lower learning_rate or dtype="float32" usually mends it'
        )


def spoilt(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether a weight that learns is NaN or infinite."""
    ends = [torch.aminmax(each.detach()) for each in parameters if each.requires_grad and each.numel()]
    extremes = torch.stack([end.float() for pair in ends for end in pair])
    return bool((extremes.isnan() | (extremes == torch.inf)).any())


@torch.no_grad()
def stop_if_broken(agent: Agent, saved: Checkpoints | None) -> None:
    """Ends a run whose weights a step has spoilt, before they are saved: no later step can mend them.

    Raises:
        TrainingError: naming the last checkpoint.
    """
    begin = torch.tensor([[agent.task.eos_token_id]], device=agent.device)
    logits = agent.model(input_ids=begin).logits[0, -1, : agent.task.vocab_size]  # -inf: a token that is never said
    said = bool(logits.softmax(-1).isfinite().all())
    if not said or spoilt(each for module in agent.modules.values() for each in module.parameters()):
        raise TrainingError(
            f"the model gives numbers that are not finite after {agent.num_updates} iterations; {last_good(saved)}; a"
            " lower learning_rate usually mends it"
        )


def stop_if_dropping(agent: Agent, dropped: list[str], asked: int, saved: Checkpoints | None) -> None:
    """Ends a run whose score fails for more episodes than `max_dropped_share`.

    Args:
        agent: keeps the counts of its last batches.
        dropped: what was wrong with those of this batch.
        asked: all episodes of this batch.
        saved: the run's checkpoints.

    Raises:
        TrainingError: with the last fault, and naming the last checkpoint.
    """
    if not asked:
        return
    agent.drops.append([len(dropped), asked])
    while sum(each[1] for each in agent.drops[1:]) >= EPISODES_JUDGED:
        del agent.drops[0]
    lost, of = (sum(numbers) for numbers in zip(*agent.drops, strict=True))
    share = agent.config.max_dropped_share
    if dropped and (lost > share * max(of, FEWEST_JUDGED) or lost == of >= EPISODES_JUDGED):
        raise TrainingError(
            f"the score failed for {lost} of the last {of} episodes, more than max_dropped_share={share:g} allows;"
            f" the last time: {dropped[-1]}; {last_good(saved)}"
        )


def last_good(saved: Checkpoints | None) -> str:
    """The words that name the newest checkpoint."""
    steps = saved.steps() if saved is not None else []
    return f"the last good checkpoint is {saved.path(steps[0])}" if saved and steps else "there is no checkpoint"
