"""Fitting a reward model to preferences, with checkpoints."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import checkpoint, state
from .cells import text_of, value_of
from .chats import ChatFormat, as_texts
from .config import check, check_types, make_config
from .failures import SKIPS_IN_A_ROW, TrainingError, last_good, spoilt
from .files import Rows, dataset_rows
from .folders import SCORER_IN_TRAINING, verify, whole_folder, write_manifest
from .logging import RunLog
from .loop import Run
from .models import tables, train_last_layers, trainable
from .optim import Optimizer
from .preferences import read_pairs
from .rows import Row
from .runs import Checkpoints, Due, Signals, alone
from .scores import shorten

if TYPE_CHECKING:
    from datasets import Dataset

    from .rewards import RewardModel


TEXTS = ("prompt", "chosen", "rejected")


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(r(chosen) - r(rejected)) (Bradley-Terry; Stiennon 2020, section 3.4): (B,), (B,) -> ()."""
    return -logsigmoid(chosen - rejected).mean()


def _groups(pairs: Dataset) -> list[NDArray[np.int64]]:
    """The rows of each group of pairs; every row is its own where there is no column "group"."""
    if "group" not in pairs.column_names:
        return list(np.arange(len(pairs))[:, None])
    groups = np.asarray(pairs["group"])
    order = groups.argsort(kind="stable")
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Settings of reward-model training."""

    learning_rate: float = 1e-4  # step size of AdamW, falling linearly to zero
    batch_size: int = 16  # groups of pairs a step; without a column "group" each pair is one
    epochs: int = 1  # passes over the pairs
    seed: int = 0  # of the order of the groups
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    weight_decay: float = 0.0  # of AdamW
    trainable_layers: int | None = None  # only the last so many blocks learn; None: all

    def __post_init__(self) -> None:
        """Checks types and ranges."""
        check_types(self)
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if field.type == "float":
                check(name, value, math.isfinite(value) and value >= 0, "a finite number from 0 up")
        for name in ("batch_size", "epochs"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("seed", self.seed, self.seed >= 0, "at least 0")


@dataclass
class _Progress:
    """How far a training is: what of it is in a checkpoint beside weights and optimizer."""

    step: int = 0  # batches learned from
    seen: int = 0  # pairs learned from
    due: dict[str, Any] | None = None  # when the next checkpoint is, in pairs
    log: str | None = None  # hash of the rows logged up to a checkpoint
    stuck: int = 0  # steps in a row that were not taken because a number was not finite


class _Training:
    """A reward model, its optimizer, and how far it is."""

    def __init__(self, reward_model: RewardModel, pairs: Dataset, config: RewardModelConfig) -> None:
        self.reward_model, self.pairs, self.config = reward_model, pairs, config
        train_last_layers(reward_model.model, config.trainable_layers)
        self.optimizer = Optimizer(
            trainable(reward_model.model),
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            weight_decay=config.weight_decay,
            eps=1e-8,
            tables=tables(reward_model.model),
        )
        rng = np.random.default_rng(config.seed)
        self.members = _groups(pairs)
        order = np.concatenate([rng.permutation(len(self.members)) for _ in range(config.epochs)])
        self.batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        self.now = _Progress()

    def step(self) -> dict[str, float]:
        """Learns from the next batch."""
        now, optimizer = self.now, self.optimizer
        optimizer.learning_rate = self.config.learning_rate * (1 - now.step / len(self.batches))
        rows = np.concatenate([self.members[group] for group in self.batches[now.step]])
        chosen, rejected = self.reward_model.pair_scalars(self.pairs[rows])
        loss = preference_loss(chosen, rejected)
        scale = optimizer.scale
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        skipped = optimizer.skipped
        metrics = {
            "train/loss": float(loss.detach()),
            "train/accuracy": float((chosen > rejected).float().mean()),
            "train/grad_norm": optimizer.step(scale),
        }
        now.stuck = now.stuck + 1 if optimizer.skipped > skipped else 0
        if optimizer.skipped:
            metrics["train/skipped_steps"] = optimizer.skipped
        now.step, now.seen = now.step + 1, now.seen + len(rows)
        return metrics

    def facts(self) -> dict[str, Any]:
        """What must be the same for a training to go on."""
        content = {name: list(self.pairs[name]) for name in sorted(self.pairs.column_names)}
        digest = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
        config = dataclasses.asdict(self.config)
        return {"agent": SCORER_IN_TRAINING, "config": config, "options": self.reward_model.options, "pairs": digest}

    def save(self, folder: Path) -> None:
        """Writes a checkpoint, whole or not at all."""
        with whole_folder(folder, scorer=True) as part:
            self.reward_model.write(part)
            tensors: state.Tensors = {}
            told = {"optimizer": self.optimizer, "progress": dataclasses.asdict(self.now)}
            content = {name: state.pack(each, tensors) for name, each in told.items()}
            checkpoint.save_state(part, content, tensors)
            write_manifest(part, self.facts())

    def restore(self, folder: Path) -> None:
        """Goes back to a checkpoint.

        Raises:
            CheckpointError: for one that is damaged.
            ValueError: for one of another training.
        """
        manifest, facts = verify(folder), self.facts()
        if other := [name for name, value in facts.items() if manifest.get(name) != value]:
            raise ValueError(f"folder {str(folder)!r} holds a training with another {', '.join(other)}")
        checkpoint.load_module(self.reward_model.model, folder, "")
        content, tensors = checkpoint.load_state(folder)
        device = self.reward_model.model.device
        state.unpack(content["optimizer"], tensors, device, self.optimizer)
        self.now = _Progress(**state.unpack(content["progress"], tensors, device))


def pairs_of(pairs: Any, reward_model: RewardModel) -> Rows:
    """Pairs from wherever they are, as rows with the texts prompt, chosen and rejected.

    Raises:
        ValueError: naming the row, or file and line, and the column.
    """
    written = ChatFormat.of(reward_model)
    rows = dataset_rows(pairs, partial(read_pairs, written=written, called="pairs"), "pairs")
    texts = rows.each(lambda row: as_texts(row, TEXTS[1:], written))
    rows = Rows(texts, rows.places, rows.source, rows.skip, rows.strict)
    rows.each(lambda row: [text_of(row, name) for name in TEXTS])
    return rows


def _to_learn_from(rows: Rows) -> Dataset:
    """The pairs that differ, in the columns that are read.

    Raises:
        ValueError: where there is none, or for a group that is no number.
    """
    from datasets import Dataset

    names = [*TEXTS, "group"] if "group" in rows.columns else TEXTS
    if "group" in names:
        rows.each(_check_group)
    kept = [row for row in rows if row["chosen"] != row["rejected"]]
    if not kept:
        raise ValueError(f"pairs must have one whose chosen and rejected differ; got {len(rows)} pairs, all alike")
    if len(kept) < len(rows):
        what = f"dropped {len(rows) - len(kept)} of {len(rows)} pairs"
        warnings.warn(f"{what}: chosen equals rejected", stacklevel=3)
    return Dataset.from_dict({name: [row[name] for row in kept] for name in names})


def _check_group(row: Row) -> None:
    group = value_of(row, "group")
    fine = isinstance(group, numbers.Integral) and not isinstance(group, bool) and -(2**63) <= int(group) < 2**63
    check("column 'group'", group, fine, "a whole number of at most 64 bits")


def _warn_of_cut_texts(reward_model: RewardModel, pairs: Dataset) -> None:
    """Says how many texts are so long that they lose their beginning."""
    texts = {p + text for side in ("chosen", "rejected") for p, text in zip(pairs["prompt"], pairs[side], strict=True)}
    cut = sum(len(ids) >= reward_model.max_length for ids in reward_model.encode(list(texts)))
    if cut:
        what = f"{cut} of {len(texts)} texts reach max_length={reward_model.max_length} tokens of the reward model"
        warnings.warn(f"{what}: longer ones lose their beginning", stacklevel=3)


def _learn(training: _Training, run: Run) -> None:
    """Takes every step of a training, or those that are left of it."""
    folder = None if run.log_dir is None else Path(run.log_dir)
    saved = None if folder is None else Checkpoints(folder, run.keep)
    if run.resume and saved is not None:
        saved.go_on(training.restore)
    elif saved is not None:
        saved.refuse()
    training.reward_model.mean, training.reward_model.std = 0.0, 1.0  # those were of other weights
    now = training.now
    due = None
    if run.checkpoint_every is not None:
        due = Due(**{"next": run.checkpoint_every, **(now.due or {}), "every": run.checkpoint_every})
    log = RunLog(
        folder,
        run.progress_bar,
        training.config.epochs * len(training.pairs),
        "reward model",
        unit="pairs",
        after=now.step,
        timesteps=now.seen,
    )
    log.compare(now.log)
    with log, Signals(due is not None) as signals:
        while now.step < len(training.batches):
            metrics = training.step()
            log.write(metrics, now.seen, now.step, now.seen)
            if now.stuck >= SKIPS_IN_A_ROW:
                raise TrainingError(
                    f"loss or gradient of the reward model was not finite in {SKIPS_IN_A_ROW} steps in a row;"
                    f" {last_good(saved)}; a lower learning_rate usually mends it"
                )
            if saved is None or due is None:
                continue
            due.note(-metrics["train/loss"])
            if due.due(now.seen, last=now.step == len(training.batches)) or signals.caught:
                if spoilt(training.reward_model.model.parameters()):
                    raise TrainingError(
                        f"the reward model's weights are not finite after {now.step} steps; {last_good(saved)}; a lower"
                        " learning_rate usually mends it"
                    )
                now.log, now.due = log.sync(), dataclasses.asdict(due)
                signals.leave(saved.write(now.seen, training.save, due.best))


def train_reward_model(
    reward_model: RewardModel,
    pairs: Dataset | Sequence[Mapping[str, Any]] | str | Path,
    config: RewardModelConfig | None = None,
    *,
    log_dir: str | Path | None = None,
    progress_bar: bool = False,
    checkpoint_every: int | None = None,
    keep: int = 2,
    resume: bool = False,
    **settings: Any,
) -> None:
    """Fits a reward model to preference pairs in place; its scores are then the raw scalars, until `standardise`.

    Args:
        reward_model: to be trained.
        pairs: a `Dataset`, or a list of rows, with the columns "prompt", "chosen" and "rejected", texts, or a file that
            `read_preferences` reads; and "group", whole numbers, where comparisons of the same few texts belong in one
            step: each text is then read once for all of them (Ouyang 2022, section 3.5). Pairs whose texts are alike
            are dropped, with a warning that counts them.
        config: settings.
        log_dir: where `progress.csv`, TensorBoard's files and checkpoints go.
        progress_bar: shows a bar and a row a step.
        checkpoint_every: pairs between checkpoints in `log_dir/checkpoints`. With it, SIGINT and SIGTERM end the step
            and leave a checkpoint too, and `log_dir/best` is the one with the lowest mean loss before it.
        keep: so many of the newest checkpoints stay, and the best.
        settings: fields of `RewardModelConfig`, as keywords.
        resume: goes on from the newest whole checkpoint in `log_dir`, if there is one. On the CPU the result is that of
            a training that was never stopped, to the last bit.

    Raises:
        ValueError: for pairs that are none, or all alike, or a folder that holds another run's checkpoints.
        TrainingError: when loss or gradient are not finite three times in a row.
    """
    if not hasattr(reward_model, "pair_scalars"):
        raise ValueError(f"reward_model must be a RewardModel; got {shorten(reward_model)}")
    data = _to_learn_from(pairs_of(pairs, reward_model))
    run = Run(log_dir=log_dir, progress_bar=progress_bar, checkpoint_every=checkpoint_every, keep=keep, resume=resume)
    config = make_config(RewardModelConfig, config, settings)
    _warn_of_cut_texts(reward_model, data)
    training = _Training(reward_model, data, config)
    with alone(None if log_dir is None else Path(log_dir)):
        _learn(training, run)
    reward_model.model.requires_grad_(False)
