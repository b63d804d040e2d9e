"""SFT: supervised fine-tuning, the cross-entropy of given responses and nothing else.

    loss = -(1 / N) * sum_t log pi(y_t | x, y_<t)      over the N response tokens; prompts are read, not learned

The first step of RLHF (Ouyang 2022, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from textrl.agent import Agent
from textrl.config import AgentConfig, check
from textrl.files import Rows, dataset_rows, read_rows
from textrl.offline import Epochs, digest, example_ids, given_rollout
from textrl.returns import masked_mean
from textrl.rollout import Rollout
from textrl.task import Task
from textrl.wrappers import AnyEnv

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class SFTConfig(AgentConfig):
    """Settings of supervised fine-tuning."""

    end_token: bool = True  # whether each response is followed by the end token, so that the model learns to stop


def cross_entropy(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Masked mean of -log pi(y_t): (B, T) twice -> ()."""
    return masked_mean(-logprobs, mask)


class SFT(Agent):
    """Learns to say the given responses.

    Args:
        env: whose tokenizer, prompts and horizon hold.
        model: as for every agent.
        config: as for every agent.
        dataset: rows with "prompt" and "completion", texts or lists of messages, or with "messages", whose last one is
            learned; or a file of them. Longer responses are cut at the horizon. "completion_ids" go before a
            "completion" and are taken as they are. May be left out for an agent that is loaded only to be used.
        settings: fields of `SFTConfig`, as keywords.
    """

    config: SFTConfig
    config_class: ClassVar[type[AgentConfig]] = SFTConfig
    not_saved: ClassVar[tuple[str, ...]] = ("_examples",)
    needs_dataset = True

    def __init__(
        self,
        env: AnyEnv,
        model: PreTrainedModel | str | Path | None = None,
        config: AgentConfig | None = None,
        *,
        dataset: Dataset | Sequence[dict[str, Any]] | str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(env, model, config, **settings)
        self._examples: list[tuple[list[int], list[int]]] = []
        if dataset is not None:
            rows, end = dataset_rows(dataset, self.read_dataset), self.config.end_token
            self._examples = rows.each(lambda row: example_ids(self.task, row, end, rows.strict))
            self.dataset_digest = digest(self._examples)
        self._epochs = Epochs(self.generator)

    @classmethod
    def read_dataset(cls, file: str | Path, skip_bad_rows: bool = False, task: Task | None = None) -> Rows:
        """The examples of a file."""
        return read_rows(file, numbers=["completion_ids"], skip_bad_rows=skip_bad_rows, called="dataset")

    def collect(self) -> Rollout:
        """The next `batch_size` examples, in an order shuffled anew each epoch."""
        check("dataset", None, len(self._examples) > 0, "given for SFT to learn")
        examples = [self._examples[i] for i in self._epochs.take(self.config.batch_size, len(self._examples)).tolist()]
        prompts, responses = zip(*examples, strict=True)
        return given_rollout(self.task, prompts, responses, self.device)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One step on the cross-entropy."""
        return self.minimise(self._loss, rollout)

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(self.logprobs(batch), batch.action_mask), {}
