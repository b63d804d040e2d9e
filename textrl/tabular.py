"""A language model with no approximation error: a row of logits for every prefix that a small task can reach.

The prefixes are a tree over tokens, kept as one table of children, so a text finds its rows by S lookups whatever its
prompts are. Lessons and tests use it where the answer must be exact; `save_pretrained`, `from_pretrained` and the Auto
classes work as for any other model, and `scalars.value_model` gives the table of values that goes with it.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutput,
    SequenceClassifierOutput,
)

from .config import check, check_type
from .task import Task, check_task

UNKNOWN, ROOT = 0, 1
"""Prefix 0 stands for every text outside the tree, prefix 1 for the empty text."""
MAX_PREFIXES = 2**24


class TabularConfig(PretrainedConfig):
    """Sizes of a tabular language model.

    Args:
        vocab_size: V.
        num_prefixes: rows of the table.
        max_position_embeddings: the longest text in the tree, in tokens.
        kwargs: as for every `PretrainedConfig`.
    """

    model_type = "textrl_tabular"

    def __init__(
        self, vocab_size: int = 2, num_prefixes: int = 2, max_position_embeddings: int = 1, **kwargs: Any
    ) -> None:
        self.vocab_size = vocab_size
        self.num_prefixes = num_prefixes
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


class PrefixTable(nn.Module):
    """A table of d numbers a prefix: indices (..., 1) int64 -> (..., d)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))

    def forward(self, index: Tensor) -> Tensor:
        """Looks the rows up."""
        return self.weight[index[..., 0]]


class TabularBase(PreTrainedModel):
    """What the three models share."""

    config_class = TabularConfig
    base_model_prefix = "tree"
    _is_stateful = True  # there is no KV cache to keep

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PrefixTable):
            nn.init.zeros_(module.weight)

    def get_input_embeddings(self) -> None:
        """None: tokens are not embedded."""
        return None


class PrefixTree(TabularBase):
    """The trunk: token ids (B, S) -> the prefix each position has reached, (B, S, 1) int64, as "hidden states"."""

    edges: Tensor  # the children of each prefix, 0 where a text leaves the tree

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.register_buffer("edges", torch.zeros(config.num_prefixes, config.vocab_size, dtype=torch.int64))
        self.register_buffer("anchor", torch.zeros(()))  # gives a model without weights a dtype
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        """Walks down the tree from the left."""
        prefix = torch.full_like(input_ids[:, 0], ROOT)
        walked = []
        for tokens in input_ids.unbind(1):
            prefix = self.edges[prefix, tokens]
            walked.append(prefix)
        return BaseModelOutput(last_hidden_state=torch.stack(walked, 1)[..., None])


class TabularLM(TabularBase):
    """A causal language model whose next-token logits are free in every prefix."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.tree = PrefixTree(config)
        self.lm_head = PrefixTable(config.num_prefixes, config.vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> PrefixTable:
        """The table."""
        return self.lm_head

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        """Token ids (B, S) -> logits (B, S, V)."""
        return CausalLMOutput(logits=self.lm_head(self.tree(input_ids).last_hidden_state))


class TabularScorer(TabularBase):
    """The scalar counterpart: a number for every prefix."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.tree = PrefixTree(config)
        self.score = PrefixTable(config.num_prefixes, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> SequenceClassifierOutput:
        """Token ids (B, S) -> the number at the last position, as `logits` (B, 1)."""
        return SequenceClassifierOutput(logits=self.score(self.tree(input_ids).last_hidden_state[:, -1]))


def tabular_model(task: Task, *, std: float = 0.0, seed: int = 0) -> TabularLM:
    """A tabular language model for a task with finitely many prompts.

    Args:
        task: whose prompts and responses are the tree.
        std: standard deviation of the logits; 0 makes every token equally likely.
        seed: of the logits.

    Raises:
        ValueError: for a task without `prompts()`, or with too many prefixes to hold.
    """
    check_type("std", std, "float")
    check("std", std, math.isfinite(std) and std >= 0, "a finite number from 0 up")
    check_type("seed", seed, "int")
    check("seed", seed, seed >= 0, "at least 0")
    children = prefix_tree(task)
    config = TabularConfig(
        vocab_size=task.vocab_size,
        num_prefixes=len(children),
        max_position_embeddings=task.max_prompt_tokens + task.max_new_tokens,
        bos_token_id=task.tokenizer.bos_token_id,
        eos_token_id=task.eos_token_id,
        pad_token_id=task.eos_token_id,
    )
    model: TabularLM = TabularLM(config).eval()
    model.tree.edges.copy_(torch.from_numpy(children))
    generator = torch.Generator().manual_seed(int(seed))
    with torch.no_grad():
        weight = model.lm_head.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
    return model


def finite_rows(task: Task) -> list[dict[str, Any]]:
    """The rows of a task with finitely many prompts.

    Raises:
        ValueError: for a task without `prompts()`.
    """
    check_task(task)
    if task.rows is None:
        raise ValueError(
            f"task must have finitely many prompts for an exact answer; {type(task).__name__} only samples:"
            " define prompts(), which returns the list of all rows, in place of sample()"
        )
    return task.rows


def in_words(count: int) -> str:
    """A number of any size, short: "1,024", "about 10^40"."""
    return f"{count:,}" if count < 10**15 else f"about 10^{math.log10(count):.0f}"


def prefix_tree(task: Task) -> NDArray[np.int64]:
    """The children of every prefix: (prefixes, V), 0 where a text leaves the tree."""
    prompts = {tuple(task.encode(row).tolist()) for row in finite_rows(task)}
    continues = np.array([token for token in range(task.vocab_size) if token != task.eos_token_id])
    size = len(prompts) * sum(len(continues) ** t for t in range(task.max_new_tokens))
    if size > MAX_PREFIXES:
        raise ValueError(f"task must have at most {MAX_PREFIXES:,} prefixes for a table; this one has {in_words(size)}")
    children = np.zeros((2, task.vocab_size), dtype=np.int64)
    for prompt in sorted(prompts):
        nodes = np.array([ROOT])
        for token in prompt:
            children, nodes = _grow(children, nodes, np.array([token]))
        for _ in range(task.max_new_tokens - 1):
            children, nodes = _grow(children, nodes, continues)
    return children


def _grow(
    children: NDArray[np.int64], nodes: NDArray[np.int64], tokens: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Makes sure that each of these nodes has a child for each of these tokens; gives the tree and the children."""
    found = children[nodes[:, None], tokens]  # (n, k)
    missing = found == UNKNOWN
    found[missing] = len(children) + np.arange(missing.sum())
    children[nodes[:, None], tokens] = found
    new = np.zeros((int(missing.sum()), children.shape[1]), dtype=np.int64)
    return np.concatenate([children, new]), cast("NDArray[np.int64]", found.reshape(-1))


def register_tabular() -> None:
    """Makes the Auto classes know these models; once is enough, twice does no harm."""
    AutoConfig.register(TabularConfig.model_type, TabularConfig, exist_ok=True)
    AutoModelForCausalLM.register(TabularConfig, TabularLM, exist_ok=True)
    AutoModelForSequenceClassification.register(TabularConfig, TabularScorer, exist_ok=True)


register_tabular()
