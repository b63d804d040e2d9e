"""Every example is run, with the budget it has by itself, and reaches something."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# example -> the library it needs, a small budget, and the score it must reach (random tokens score far less)
CASES = {
    "write_an_env": (None, 3_000, 0.55),
    "cleanrl_ppo": (None, 15_000, 0.6),
    "sb3_lm_policy": ("stable_baselines3", 2_560, 0.8),
    "sb3_ppo": ("stable_baselines3", 2_000, 0.6),
    "maskable_ppo": ("sb3_contrib", 1_024, 0.8),
    "tianshou_dqn": ("tianshou", 1, 0.3),
    "d3rlpy_cql": ("d3rlpy", 500, 0.7),
    "torchrl_env": ("torchrl", None, 0.05),
    "rllib_ppo": ("ray", 6, 0.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_example(name, monkeypatch):
    library, budget, least = CASES[name]
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"examples/{name}.py needs {library}, which is not installed")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # so that what it registers can be imported
    spec.loader.exec_module(module)
    reached = module.main() if budget is None else module.main(budget)
    for score in reached.values() if isinstance(reached, dict) else [reached]:
        assert score >= least
