"""What an environment leaves behind: no process, no thread, no memory; and a state that a wrong call does not touch."""

import json
import multiprocessing
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

import textrl
from textrl.envs.copy import Copy
from textrl.models import small_model
from textrl.registration import registered

ROOT = Path(__file__).parent.parent
MODES = list(AutoresetMode)
SMALL = [id for id in registered() if id.startswith("textrl/") and id != "textrl/Reviews-v0"]


@pytest.fixture
def nothing_left():
    """No thread and no process more than before."""
    threads, processes = set(threading.enumerate()), set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= processes
    assert set(threading.enumerate()) <= threads


def make_async(**kwargs):
    return AsyncVectorEnv([lambda: gym.make("textrl/Copy-v0", **kwargs)] * 2, context="fork")


def test_close_ends_every_process(nothing_left):
    envs = make_async()
    envs.reset(seed=0)
    envs.step(np.array([1, 0]))
    assert len(multiprocessing.active_children()) >= 2
    envs.close()


def test_an_exception_in_a_worker_ends_every_process(nothing_left):
    envs = make_async()
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="action must be one integer token id from 0 to 3"):
        envs.step(np.array([1, 7]))
    envs.close()


def test_close_in_mid_step_ends_every_process(nothing_left):
    envs = make_async()
    envs.reset(seed=0)
    envs.step_async(np.array([1, 1]))
    envs.close(terminate=True)


def test_an_env_that_cannot_be_made_leaves_no_process(nothing_left):
    with pytest.raises(TypeError, match="unexpected keyword argument 'lengh'"):
        make_async(lengh=3)


@pytest.mark.parametrize("vector", [False, True])
def test_our_own_envs_start_nothing(vector, nothing_left):
    task = Copy()
    kwargs = {"reference": small_model(task.vocab_size, 8, n_embd=16, n_layer=1), "kl_coef": 0.1}
    env = textrl.TextVectorEnv(task, 4, **kwargs) if vector else textrl.TextEnv(task, **kwargs)
    env.reset(seed=0)
    env.step(np.ones(4, int) if vector else 1)
    with pytest.raises(ValueError, match="must be"):
        env.step(np.full(4, 9) if vector else 9)
    env.close()
    env.close()  # twice does no harm


@pytest.mark.slow
def test_memory_does_not_grow_over_a_million_steps():
    script = ROOT / "benchmarks" / "env_memory.py"
    command = [sys.executable, str(script), "--steps", "1000000", "--rows"]
    kib = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout)["KiB"]
    assert all(each["grown"] < 1024 for each in kib.values()), kib


# ---- wrong calls, through everything that may stand between ------------------------------------------------------

WRONG = [-1, 10**6, 1.0, np.float32(1), np.array([1]), np.array([[1]]), "a", None, [1], True, float("nan")]


def alike(one, other):
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1:4] == other[1:4]


@pytest.mark.parametrize("id", SMALL)
def test_wrong_actions_through_gym_make(id):
    env, twin = gym.make(id), gym.make(id)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    twin.reset(seed=0)
    for wrong in WRONG:
        with pytest.raises(ValueError, match="action must be one integer token id from 0 to"):
            env.step(wrong)
    alike(env.step(0), twin.step(0))
    for _ in range(2):
        with pytest.raises(gym.error.ResetNeeded, match="after the end of the episode"):
            env.step(0)
    alike((env.reset()[0], 0, 0, 0), (twin.reset()[0], 0, 0, 0))


def make_native(mode):
    return gym.make_vec("textrl/Brackets-v0", num_envs=3, autoreset_mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrong", [np.full(3, 9), np.array([0, -1, 0]), np.ones(3), np.ones(2, int), "abc", None])
def test_wrong_actions_leave_a_vector_env_as_it_was(mode, wrong):
    envs, twin = make_native(mode), make_native(mode)
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.zeros(3, int))
    envs.reset(seed=0)
    twin.reset(seed=0)
    rng, over = np.random.default_rng(0), np.zeros(3, bool)
    for _ in range(12):
        ignored = mode == AutoresetMode.NEXT_STEP and over[1] and np.shape(wrong) == (3,) and wrong[0] == 0
        if not ignored:  # else the wrong action is that of a row which only resets
            with pytest.raises(ValueError, match="actions must be"):
                envs.step(wrong)
        actions = rng.integers(5, size=3)
        one, other = envs.step(actions), twin.step(actions)
        over = one[2]
        for a, b in zip(one[:4], other[:4], strict=True):
            np.testing.assert_array_equal(a, b)
        assert one[4].keys() == other[4].keys()
        if mode == AutoresetMode.DISABLED and one[2].any():
            with pytest.raises(AssertionError, match="have ended"):
                envs.step(actions)
            mask = {"reset_mask": one[2]}
            np.testing.assert_array_equal(envs.reset(options=mask)[0], twin.reset(options=mask)[0])
