import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # a GPU's kernels, one operation after another on the CPU


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are so small that threads would wait longer than they work."""
    torch.set_num_threads(1)


def benchmark(name: str) -> Any:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
