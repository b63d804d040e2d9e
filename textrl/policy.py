"""Logits, log-probabilities and values of a causal language model, only where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .flat import flat_of, touched
from .heads import head_of
from .logprobs import aligned, pieces, token_logprobs
from .packed import states_at
from .probing import unremembered
from .trunk import states_above


class CausalPolicy:
    """A causal language model seen as a policy over V tokens: softmax(logits[:V] / temperature), in float32.

    Args:
        model: the language model; only its forward is used.
        vocab_size: V, the tokenizer's; a model may have more rows in its head (padding), which are never used.
        temperature: divides the logits.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, temperature: float = 1.0) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.frozen_blocks = 0
        """Lower blocks whose states `hidden` may be given as `below`."""
        self.own_forward = False
        """Whether the model's own forward runs on whole texts, where there is a faster one."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.device
        return device

    def hidden(
        self, tokens: Tensor, rows: Tensor, columns: Tensor, below: Tensor | None = None, **forward: Any
    ) -> Tensor:
        """What the head reads at the places (rows, columns): (B, S) -> (n, d).

        For a model whose head cannot be told from its trunk this is already the logits, (n, V). `below`, (B, S, d), is
        what the `frozen_blocks` made of the tokens, where that is known.
        """
        if head_of(self.model) is None:
            return self.model(input_ids=tokens, **{**unremembered(self.model), **forward}).logits[rows, columns]
        own, blocks = self.own_forward, self.frozen_blocks
        return trunk_states(self.model, tokens, rows, columns, below, blocks, own, **forward)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in float32, not yet divided by the temperature: (n, d) -> (n, V)."""
        head = head_of(self.model)
        logits = hidden if head is None else head(hidden)
        return logits[..., : self.vocab_size].float()

    def sampler(self) -> Callable[[Tensor], Tensor]:
        """Logits for many calls without gradients while the weights stay: (n, d) -> (n, V or more), of any dtype.

        For a GPU the head is laid out once.
        """
        head = head_of(self.model)
        if self.device.type != "cuda" or type(head) is not nn.Linear or head.bias is not None or touched(head):
            return self.logits
        weight = aligned(head.weight[: self.vocab_size].detach())  # (W, d)
        return lambda hidden: torch.mm(hidden, weight.t())

    def logprobs(
        self, hidden: Tensor, targets: Tensor, allowed: Tensor | None = None, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the targets, and the entropies where asked for, without holding (n, V) at once.

        Args:
            hidden: (n, d), from `hidden`.
            targets: (n,) token ids.
            allowed: (n, V) bool; the distribution is renormalised over these tokens.
            entropy: whether to give the entropies.

        Returns:
            (n,) and (n,) or None, float32.
        """
        head = head_of(self.model)
        if type(head) is nn.Linear and head.bias is None and not touched(head):
            return token_logprobs(hidden, head.weight[: self.vocab_size], targets, allowed, self.temperature, entropy)
        parts = []
        for piece in pieces(max(len(targets), 1), self.vocab_size, hidden.device):
            mask = None if allowed is None else allowed[piece]
            arguments = (hidden[piece], targets[piece], mask, entropy)
            if torch.is_grad_enabled() and hidden.requires_grad:  # recomputed in the backward pass
                parts.append(checkpoint(self._chunk, *arguments, use_reentrant=False))
            else:
                parts.append(self._chunk(*arguments))
        entropies = torch.cat([part[1] for part in parts if part[1] is not None]) if entropy else None
        return torch.cat([part[0] for part in parts]), entropies

    def _chunk(
        self, hidden: Tensor, targets: Tensor, allowed: Tensor | None, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logits = self.logits(hidden) / self.temperature  # (n, V)
        if allowed is not None:
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        normaliser = logits.logsumexp(-1)  # (n,)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - normaliser
        # H = log Z - sum_a p(a) z(a)
        return logprobs, normaliser - (logits.softmax(-1) * logits).sum(-1) if entropy else None


def alike(lengths: Sequence[int], tokens_at_once: int, device: torch.device, width: int = 1) -> list[list[int]]:
    """The indices of texts in parts of like length, the longest first: a forward over a part has little padding.

    Args:
        lengths: tokens of each text.
        tokens_at_once: bound on the tokens of a part, padding too; a part holds at least one text.
        device: a part ends where padding would cost more than one more forward: a GPU takes a lot at once.
        width: texts that stand behind each length.
    """
    padding = 1024 if device.type == "cpu" else 8192  # tokens that cost less than matrix products over few rows lose
    parts: list[list[int]] = []
    longest = wasted = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        wasted += width * (longest - lengths[i])
        if not parts or wasted > padding or width * longest * (len(parts[-1]) + 1) > tokens_at_once:
            parts.append([])
            longest, wasted = lengths[i], 0
        parts[-1].append(i)
    return parts


def trunk_states(
    model: PreTrainedModel,
    tokens: Tensor,
    rows: Tensor,
    columns: Tensor,
    below: Tensor | None = None,
    blocks: int = 0,
    own_forward: bool = False,
    **forward: Any,
) -> Tensor:
    """The trunk's last states at the places (rows, columns): (B, S) -> (n, d); `below` as for `values_at`."""
    below = below if blocks else None
    flat = flat_of(model) if len(rows) and not forward and not own_forward else None
    if flat is not None:
        return states_at(flat, tokens, rows, columns, below, 0 if below is None else blocks)
    if below is not None:
        return states_above(model, below, blocks)[rows, columns]
    trunk = model.base_model
    return trunk(input_ids=tokens, **{**unremembered(trunk), **forward}).last_hidden_state[rows, columns]


def values_at(
    model: PreTrainedModel, tokens: Tensor, rows: Tensor, columns: Tensor, below: Tensor | None = None, blocks: int = 0
) -> Tensor:
    """The scalar head at the places (rows, columns): (B, S) -> (n,) float32.

    `below`, (B, S, d), is what the first `blocks` blocks made of the tokens, where that is known.
    """
    chosen = trunk_states(model, tokens, rows, columns, below, blocks)
    head = model.score  # (n, d) -> (n, 1)
    if type(head) is nn.Linear and not touched(head):  # in float32: below it, neighbouring scores would round to one
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(chosen.float(), head.weight.float(), bias)[..., 0]
    return head(chosen)[..., 0].float()
