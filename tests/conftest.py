import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are so small that threads would wait longer than they work."""
    torch.set_num_threads(1)
