"""The sampling loop: prompts are read once, then a token a step for the rows that still run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .drawing import Sampling, draw
from .kernels import kernels_for
from .models import check_length
from .policy import CausalPolicy
from .replay import CHECK_EVERY, RECORDERS, replay
from .slots import FlatSlots, slots_for

SHRINK_AT = 0.75
"""The batch is cut down once no more than this share of its rows still run."""
EAGER = 2
"""Tokens that a GPU draws, one of them freely, before the step is recorded: what a first call makes is made then."""


class NotFinite(ValueError):
    """A model's logits are NaN or infinite."""

    def __init__(self) -> None:
        super().__init__("model gives logits that are not finite: its weights are broken, or its dtype is too small")


Stop = Callable[[list[list[int]]], Sequence[bool]]
"""Responses so far, token ids -> which of them have come to their end."""


def stop_at(texts: Sequence[str], decode: Callable[[list[list[int]]], Sequence[str]]) -> Stop:
    """Ends a response with the token that completes one of these texts.

    Args:
        texts: what to stop at.
        decode: token ids -> text; only the last few tokens of a response are decoded, enough for the longest text.

    Raises:
        ValueError: for an empty text.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop_strings must be a list of texts that are not empty; got {texts!r}")
    tail = 4 * max((len(text) for text in texts), default=0) + 4  # a character is at most four tokens, its bytes

    def stop(responses: list[list[int]]) -> list[bool]:
        return [any(text in end for text in texts) for end in decode([ids[-tail:] for ids in responses])]

    return stop


@dataclass
class Generation:
    """Sampled responses.

    Attributes:
        responses: (B, T) int64, 0 after the end.
        lengths: (B,) int64, the end token counted.
        logprobs: (B, T) float32 under the distribution that was drawn from, 0 after the end.
        values: (B, T) float32, of the state before each token, where `value` was given.
    """

    responses: Tensor
    lengths: Tensor
    logprobs: Tensor
    values: Tensor | None = None


@torch.no_grad()
def generate(
    policy: CausalPolicy,
    prompts: Sequence[NDArray[np.int64]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    *,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    allowed: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None = None,
    value: Callable[[Tensor], Tensor] | None = None,
    stop: Stop | None = None,
) -> Generation:
    """Samples one response for each prompt.

    Args:
        policy: the language model.
        prompts: B arrays of token ids, each at least one long.
        max_new_tokens: T.
        eos_token_ids: tokens that end a response.
        sampling: default: the policy's temperature, no truncation.
        generator: on the CPU, for the (B, T) random numbers, all drawn at once.
        allowed: responses (B, T), V where unwritten -> (B, V) bool masks, in the order of the prompts.
        value: a critic that reads what the head reads, (b, d) -> (b,).
        stop: ends a response by what it says, from `min_new_tokens` tokens on; `stop_at` makes one from texts.

    Returns:
        the responses, in the order of the prompts.

    Raises:
        NotFinite: where the logits are not.
    """
    sampling = sampling or Sampling(temperature=policy.temperature)
    device, batch = policy.device, len(prompts)
    tokens, lengths = _left_aligned(prompts, max_new_tokens, device)
    check_length(policy.model, tokens.shape[1])
    width = tokens.shape[1] - max_new_tokens
    uniforms = torch.rand(batch, max_new_tokens, generator=generator).to(device)
    written = _Written(
        policy, sampling, uniforms, torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device), value
    )
    uniform_length = bool((lengths == width).all())
    stepper = slots_for(policy, batch, tokens.shape[1])
    fixed = isinstance(stepper, FlatSlots) and allowed is None and stop is None
    record = RECORDERS.get(device.type) if fixed else None
    hidden = stepper.read(tokens[:, :width], lengths, written.rows)  # (b, d)
    for t in range(max_new_tokens):
        drawn = written.draw(hidden, t, written.forbidden(t, allowed))
        if stop is not None and t + 1 >= sampling.min_new_tokens:
            ended = stop(written.responses[written.rows, : t + 1].tolist())
            written.running &= ~torch.tensor(ended, device=device)
        if t + 1 == max_new_tokens:
            break
        if record is not None and t + 1 >= max(EAGER, sampling.min_new_tokens + 1):
            times = range(t + 1, max_new_tokens)
            replay(stepper.step, written.draw, drawn, lengths, written.running, times, record)
            break
        if device.type == "cpu" or t % CHECK_EVERY == CHECK_EVERY - 1:
            alive = int(written.running.sum())
            if alive == 0:
                break
            if alive <= SHRINK_AT * len(written.rows) and record is None:
                keep = written.running.nonzero()[:, 0]
                drawn = drawn[keep]
                written.keep(keep)
                stepper.keep(keep)
        hidden = stepper.step(drawn, lengths[written.rows] + t, width + t if uniform_length else None)
    return _cut(Generation(written.responses, written.counts, written.logprobs, written.values))


class _Written:
    """What has been drawn so far for all B rows, and which b of them are still in the batch."""

    def __init__(
        self,
        policy: CausalPolicy,
        sampling: Sampling,
        uniforms: Tensor,
        ends: Tensor,
        value: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.logits, self.vocab_size = policy.sampler(), policy.vocab_size
        self.kernels = kernels_for("decoding", policy.device) if sampling.plain else None
        self.sampling, self.uniforms, self.ends, self.value = sampling, uniforms, ends, value
        self.responses = torch.zeros(uniforms.shape, dtype=torch.int64, device=uniforms.device)
        self.logprobs = torch.zeros_like(uniforms)
        self.values = None if value is None else torch.zeros_like(uniforms)
        self.counts = torch.zeros(len(uniforms), dtype=torch.int64, device=uniforms.device)
        self.running = torch.ones(len(uniforms), dtype=torch.bool, device=uniforms.device)  # (b,)
        self.rows = torch.arange(len(uniforms), device=uniforms.device)  # (b,), which prompt each of them answers

    def draw(self, hidden: Tensor, t: int | Tensor, forbidden: Tensor | None = None) -> Tensor:
        """Draws and writes the tokens at place t, a number or (1,): what the head reads, (b, d) -> tokens (b,)."""
        uniforms = self.uniforms[self.rows, t]
        logits = self.logits(hidden)  # (b, V or more)
        if self.kernels is not None and forbidden is None:
            found = self.kernels.draw_plainly(logits, self.vocab_size, uniforms, self.sampling.temperature)
        else:
            found = draw(logits[:, : self.vocab_size].float(), uniforms, self.sampling, forbidden)
        drawn: Tensor = found[0]
        self.responses[self.rows, t] = drawn
        self.logprobs[self.rows, t] = found[1]
        if self.values is not None and self.value is not None:
            self.values[self.rows, t] = self.value(hidden)
        self.counts[self.rows] += self.running
        self.running &= ~(drawn[:, None] == self.ends).any(1)
        return drawn

    def keep(self, rows: Tensor) -> None:
        """Drops every row of the batch but these."""
        self.rows, self.running = self.rows[rows], self.running[rows]

    def forbidden(self, t: int, allowed: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None) -> Tensor | None:
        """The tokens that cannot come at place t: (b, V) bool or None."""
        forbidden, device = None, self.responses.device
        if allowed is not None:
            seen = torch.arange(self.responses.shape[1], device=device) < self.counts[:, None]
            mask = allowed(torch.where(seen, self.responses, self.vocab_size).cpu().numpy())
            forbidden = ~torch.from_numpy(mask).to(device)[self.rows]
        if t < self.sampling.min_new_tokens:
            if forbidden is None:
                forbidden = torch.zeros(len(self.rows), self.vocab_size, dtype=torch.bool, device=device)
            longer = forbidden.clone()
            longer[:, self.ends] = True
            forbidden = torch.where(longer.all(1, keepdim=True), forbidden, longer)  # a mask may leave the end alone
        return forbidden


def _cut(sampled: Generation) -> Generation:
    """Zeroes what was written after the end of a row: it stays in the batch until enough others have ended too."""
    steps = torch.arange(sampled.responses.shape[1], device=sampled.responses.device)
    after = steps >= sampled.lengths[:, None]  # (B, T)
    for written in (sampled.responses, sampled.logprobs, sampled.values):
        if written is not None:
            written.masked_fill_(after, 0)
    if not bool(sampled.logprobs.isfinite().all()):
        raise NotFinite
    return sampled


def _left_aligned(prompts: Sequence[NDArray[np.int64]], room: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The prompts and `room` more columns, (B, P + room), and their lengths, (B,)."""
    lengths = [len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(lengths) + room, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.from_numpy(np.asarray(prompt))
    return tokens.to(device), torch.tensor(lengths, device=device)
