"""SFT: supervised fine-tuning, the cross-entropy of given responses and nothing else.

    loss = -(1 / N) * sum_t log pi(y_t | x, y_<t)      over the N response tokens; prompts are read, not learned

The first step of RLHF (Ouyang 2022, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from textrl.agent import Agent, AgentConfig, AnyEnv, check
from textrl.returns import masked_mean
from textrl.rollout import Rollout, pad_responses

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
        dataset: rows with "prompt" and "completion", texts. Longer responses are cut at the horizon.
        settings: as for every agent.
    """

    config: SFTConfig
    config_class: ClassVar[type[AgentConfig]] = SFTConfig

    def __init__(
        self,
        env: AnyEnv,
        model: PreTrainedModel | str | Path | None = None,
        config: AgentConfig | None = None,
        *,
        dataset: Dataset | Sequence[dict[str, Any]],
        **settings: Any,
    ) -> None:
        super().__init__(env, model, config, **settings)
        check("dataset", dataset, len(dataset) > 0, "a dataset with at least one row")
        names = set(dataset[0])
        check("dataset", sorted(names), {"prompt", "completion"} <= names, 'rows with "prompt" and "completion"')
        self._examples = [self._encode(row["prompt"], row["completion"]) for row in dataset]
        self._order: list[int] = []

    def _encode(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Prompt and response as token ids, tokenised together so that the seam is as in running text."""
        first = self.task.encode({"prompt": prompt}).tolist()
        whole = self.tokenizer(prompt + completion, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        begin = len(first) - len(self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        whole = first[:begin] + whole
        if whole[: len(first)] == first:
            response = whole[len(first) :]
        else:
            response = self.tokenizer(completion, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.config.end_token:
            response = [*response, self.task.eos_token_id]
        return first, response[: self.task.max_new_tokens] or [self.task.eos_token_id]

    def collect(self) -> Rollout:
        """The next `batch_size` examples, in an order shuffled anew each epoch."""
        while len(self._order) < self.config.batch_size:
            self._order += torch.randperm(len(self._examples), generator=self.generator).tolist()
        chosen, self._order = self._order[: self.config.batch_size], self._order[self.config.batch_size :]
        prompts, responses = zip(*(self._examples[i] for i in chosen), strict=True)
        tokens, prompt_lengths, mask = pad_responses(prompts, responses, self.device)
        zeros = torch.zeros(mask.shape, device=self.device)
        last = torch.tensor([r[-1] == self.task.eos_token_id for r in responses], device=self.device)
        return Rollout(tokens, prompt_lengths, mask, zeros, zeros, zeros[:, 0], last)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One step on the cross-entropy."""
        numbers = self.minimise(self._loss, rollout)
        return {"train/loss": numbers["loss"], "train/grad_norm": numbers["grad_norm"]}

    def _loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        return cross_entropy(self.logprobs(batch), batch.action_mask), {}
