"""The sampling loop as one step over fixed tensors, recorded once as a CUDA graph and replayed token after token.

A token's kernels are small: started one by one from Python, the GPU waits for the next most of the time. A graph starts
them all at once, but with the same shapes and memory each time: the batch is not cut down, the whole cache is attended
to behind a mask (by kernels of our own as far as it is written), and the token's place is a number on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .scores import reason

CHECK_EVERY = 8
"""Asking a GPU whether rows have ended stops it, so it is asked only every so many tokens."""

Step = Callable[[], None]
Record = Callable[[Step], Step]
"""A step over fixed tensors -> the same step, to be called again and again."""


def cuda_graph(step: Step) -> Step:
    """Records a step, which has run before on this device, without running it.

    Where it cannot be recorded, with a warning, the step itself: slower, and the same tokens.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a score may use the GPU in another thread
            step()
    except RuntimeError as error:
        said = f"the sampling step could not be recorded as a CUDA graph ({reason(error)})"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
        return step
    return graph.replay


RECORDERS: dict[str, Record] = {"cuda": cuda_graph}
"""How a step is made fast on a kind of device; elsewhere the loop cuts its batch down in place of this."""


def replay(
    read: Callable[[Tensor, Tensor], Tensor],
    write: Callable[[Tensor, Tensor], Tensor],
    drawn: Tensor,
    lengths: Tensor,
    running: Tensor,
    times: range,
    record: Record,
) -> None:
    """Draws the tokens at the places `times`, until no row runs.

    Args:
        read: the newest token of each row (B,) and the column where it stands (B,) -> what the head reads, (B, d).
        write: what the head reads, and the place t in the response, (1,) on the device -> the tokens drawn (B,). It
            writes them, and in place who runs, where it keeps them.
        drawn: the newest tokens, (B,).
        lengths: of the prompts, (B,).
        running: (B,) bool, which `write` keeps up to date.
        times: the places in the response that are still to come, at least one.
        record: how the step is made fast.
    """
    place, drawn = torch.tensor([times.start], device=drawn.device), drawn.clone()

    def step() -> None:
        hidden = read(drawn, lengths + place - 1)
        drawn.copy_(write(hidden, place))
        place.add_(1)

    again = record(step)
    for count, _ in enumerate(times, 1):
        again()  # the check after the last token waits for the GPU, so that a graph outlives its kernels
        if (count % CHECK_EVERY == 0 or count == len(times)) and not bool(running.any()):
            break
