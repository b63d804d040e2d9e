"""Which of our kernels for a GPU run here; `fused` and `decoding` hold them, written in Triton."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .scores import reason


def kernels_for(module: str, device: torch.device) -> Any | None:
    """A module of kernels, "fused" or "decoding", where they run on this device; else None."""
    if device.type != "cuda":
        return None
    try:
        kernels = importlib.import_module(f"textrl.{module}")
    except ImportError:  # no Triton
        return None
    return kernels if kernels.works(device) else None


def runs(kernels: Callable[[], Any], what: str) -> bool:
    """Whether kernels compile and run; where they do not, a warning says why, and `what` takes the slow way."""
    try:
        kernels()
    except Exception as error:  # of Triton, of a compiler that is missing, of the driver
        said = f"{what} the slow way: Triton's kernels do not run here ({reason(error)})"
        warnings.warn(said, RuntimeWarning, stacklevel=3)
        return False
    return True
