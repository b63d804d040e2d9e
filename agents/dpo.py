"""DPO: direct preference optimisation, from pairs and without a reward model (Rafailov 2023; IPO: Azar 2023).

    h        = [log pi(y_w|x) - log pi_ref(y_w|x)] - [log pi(y_l|x) - log pi_ref(y_l|x)]
    sigmoid  = mean -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)      (Rafailov 2023, eq. 7)
    ipo      = mean (h - 1 / (2 beta))^2                                           (Azar 2023, eq. 17)

y_w is the chosen response, y_l the rejected one, eps the label smoothing; log pi of a response is the sum over its
tokens. Where the labels follow Bradley-Terry on a score, the optimum of the sigmoid loss is
pi_ref exp(score / beta) / Z: that of the environment with kl_coef = beta, which is therefore what beta is by default.
Labels are noisy, and nothing in the loss keeps a policy from learning them by heart: with `held_out` a share of the
pairs is not learned from, and a call of `learn` that goes its whole way ends with the weights that did best on it.
Where pairs are few, to learn from all of them is worth more. An error in what the pairs say of a response is divided by
beta before it is exponentiated: with a small beta, and more responses than pairs can tell apart, even an exact fit of
all pairs may be worse than the reference. Then more pairs help, or a larger beta, and no longer training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from textrl.agent import Agent
from textrl.attaching import check_own_penalty
from textrl.batch import batched_logprobs, microbatches
from textrl.chats import DIALOGUES, ChatFormat
from textrl.config import AgentConfig, check
from textrl.files import Rows, dataset_rows
from textrl.offline import Epochs, digest, given_rollout
from textrl.pairs import SIDES, AskedOnce, HeldOut, Pair, encoded_pairs, hold_out
from textrl.preferences import REFERENCE_COLUMNS, read_pairs
from textrl.rollout import Rollout, reference_beside
from textrl.task import Task
from textrl.wrappers import AnyEnv

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

DEFAULT_BETA = 0.1


@dataclass(frozen=True, kw_only=True)
class DPOConfig(AgentConfig):
    """Settings of DPO."""

    batch_size: int = 128  # responses an update, two a pair
    cooldown: float = 0.2  # full steps for longer: every epoch sees the same pairs
    beta: float | None = None  # closeness to the reference; None: the environment's kl_coef, or 0.1 where that is 0
    loss: str = "sigmoid"  # "sigmoid" (DPO) or "ipo"
    held_out: float = 0.0  # share of pairs not learned from (none below 20): the weights that do best on them are kept
    label_smoothing: float = 0.0  # eps: the share of labels taken to be the wrong way round, for "sigmoid"

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        check("beta", self.beta, self.beta is None or 0 < self.beta < math.inf, "a finite number above 0")
        check("loss", self.loss, self.loss in ("sigmoid", "ipo"), '"sigmoid" or "ipo"')
        check("held_out", self.held_out, 0 <= self.held_out < 1, "from 0 to below 1")
        check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "from 0 to below 0.5")


def sigmoid_loss(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Mean of -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h): (B,) -> ()."""
    logits = beta * margins
    return (-(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)).mean()


def ipo_loss(margins: Tensor, beta: float) -> Tensor:
    """Mean of (h - 1 / (2 beta))^2: (B,) -> ()."""
    return ((margins - 1 / (2 * beta)) ** 2).mean()


def _fingerprint(reference: PreTrainedModel | None) -> str:
    """By which two references are told apart."""
    return "" if reference is None else str([float(p.detach().float().sum()) for p in reference.parameters()])


class DPO(Agent):
    """Learns from pairs which of two responses is the better one.

    `batch_size` counts responses, two a pair, as it counts episodes elsewhere, and `learn` the tokens of both: 4,096
    pairs of two times 5 tokens are seen once in 40,960 timesteps.

    The reference is the environment's, or else the model as it starts; it is asked once for every pair: the
    environment's when the pair is first drawn, the model for all pairs before the first update.

    Args:
        env: whose tokenizer, prompts, horizon and reference hold.
        model: as for every agent.
        config: as for every agent.
        dataset: rows with "prompt", "chosen" and "rejected", texts or lists of messages, or a file in any format that
            `textrl.read_preferences` reads. Token ids under "chosen_ids" and "rejected_ids" go before the texts and
            are taken as they are; the reference's summed log-probabilities under "ref_chosen_logps" and
            "ref_rejected_logps" are not computed again. May be left out for an agent that is loaded only to be used.
        settings: fields of `DPOConfig`, as keywords.
    """

    config: DPOConfig
    config_class: ClassVar[type[AgentConfig]] = DPOConfig
    not_saved: ClassVar[tuple[str, ...]] = ("_pairs", "_learned", "beta")
    needs_dataset = True

    def __init__(
        self,
        env: AnyEnv,
        model: PreTrainedModel | str | Path | None = None,
        config: AgentConfig | None = None,
        *,
        dataset: Dataset | Sequence[Mapping[str, Any]] | str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(env, model, config, **settings)
        check_own_penalty(env)
        self.beta = self.config.beta or self.base.kl_coef or DEFAULT_BETA
        given: Tensor | None = None  # (N, 2), what the dataset says of the reference
        self._pairs: list[Pair] = []
        if dataset is not None:
            rows = dataset_rows(dataset, partial(self.read_dataset, task=self.task))
            self._pairs, given = encoded_pairs(self.task, rows)
        self.dataset_digest = digest([pair[:2] for pair in self._pairs])
        self.reference = AskedOnce(self.dataset_digest, _fingerprint(self.base.reference), len(self._pairs), given)
        held, self._learned = hold_out(self._pairs, self.config.held_out, self.config.seed)
        measured = (self.config.held_out, self.config.seed, self.beta, self.config.loss, self.config.label_smoothing)
        self.held_out = HeldOut(held, f"{self.dataset_digest} {measured}")
        self._epochs = Epochs(self.generator)

    @classmethod
    def read_dataset(cls, file: str | Path, skip_bad_rows: bool = False, task: Task | None = None) -> Rows:
        """The pairs of a file, in any format that `read_preferences` knows; chats as the task reads what is written."""
        written = DIALOGUES if task is None else ChatFormat.of(task)
        return read_pairs(file, written, skip_bad_rows=skip_bad_rows, called="dataset")

    @property
    def _pairs_at_once(self) -> int:
        return -(-self.config.batch_size // 2)

    def collect(self) -> Rollout:
        """The next `batch_size` responses, the two of a pair next to each other; pairs are shuffled anew each epoch."""
        check("dataset", None, len(self._pairs) > 0, "given for DPO to learn")
        self.held_out.keep_if_alike(self.optimizer.masters)
        indices = self._learned[self._epochs.take(self._pairs_at_once, len(self._learned))]
        return self._rollout(indices, self._told(indices if self.base.reference else torch.arange(len(self._pairs))))

    def _told(self, indices: Tensor) -> Tensor:
        """What the reference says of the pairs it was asked about, (N, 2), those at `indices` among them."""
        return self.reference.about(indices, self._ask_reference)

    def _rollout(self, indices: Tensor, reference: Tensor) -> Rollout:
        pairs = [self._pairs[i] for i in indices.tolist()]
        rows = [{"ref_logprob": float(value)} for value in reference[indices].flatten()]
        prompts = [prompt for prompt, _, _ in pairs for _ in SIDES]
        responses = [response for _, both, _ in pairs for response in both]
        return given_rollout(self.task, prompts, responses, self.device, rows, group_size=2)

    def _ask_reference(self, indices: Tensor) -> Tensor:
        """The reference's log-probability of the responses of these n pairs: (n, 2)."""
        if self.base.reference is None and self.num_updates > 0:
            raise ValueError(
                "reference is not known any more: the run that is continued started from another model; pass that model"
                f" as the environment's reference, or its log-probabilities in the columns {list(REFERENCE_COLUMNS)}"
            )
        model = self.base.reference or self.model
        reference = reference_beside(self.policy, self.base, model)
        sums = []
        for start in range(0, len(indices), 1024):
            part = indices[start : start + 1024]
            rollout = self._rollout(part, torch.zeros(len(self._pairs), 2))
            logprobs = batched_logprobs(reference, rollout, self.config.max_tokens_per_microbatch)
            sums.append(logprobs.sum(1).view(-1, 2).cpu())
        return torch.cat(sums)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One step on a batch of pairs; four times an epoch or a little more often, a look at those held out."""
        numbers = self.minimise(self._loss, rollout, mean_over="groups")
        call = self.call
        last = call is not None and self.num_timesteps + rollout.num_tokens >= call["start"] + call["total"]
        if len(self.held_out.indices):
            interval = max(1, len(self._learned) // (4 * self._pairs_at_once))
            if last or self.num_updates % interval == 0:
                self._look()
            if last and self.held_out.best:
                self.optimizer.set_weights(self.held_out.best)
            numbers["held_out_loss"] = self.held_out.loss
        return numbers

    @torch.no_grad()
    def _look(self) -> None:
        """Measures the loss on the pairs held out, and keeps the weights if it is the least so far."""
        rollout, loss = self._rollout(self.held_out.indices, self._told(self.held_out.indices)), 0.0
        for part in microbatches(rollout, self.config.max_tokens_per_microbatch, 2):
            piece = rollout.select(part, 2)
            loss += float(self._loss(piece)[0]) * len(piece) / len(rollout)
        self.held_out.note(loss, self.optimizer.get_weights)

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        reference = torch.tensor([row["ref_logprob"] for row in batch.rows], device=self.device)
        ratios = (self.logprobs(batch).sum(1) - reference).view(-1, 2)  # (B/2, 2): log pi / pi_ref, chosen and rejected
        margins = ratios[:, 0] - ratios[:, 1]
        if self.config.loss == "ipo":
            loss = ipo_loss(margins, self.beta)
        else:
            loss = sigmoid_loss(margins, self.beta, self.config.label_smoothing)
        with torch.no_grad():
            numbers = {
                "accuracy": (margins > 0).float().mean(),
                "margin": self.beta * margins.mean(),
                "chosen_reward": self.beta * ratios[:, 0].mean(),
                "rejected_reward": self.beta * ratios[:, 1].mean(),
            }
        return loss, numbers
