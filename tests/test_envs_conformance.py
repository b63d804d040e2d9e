"""Every registered environment, whatever it is: a new one is covered without touching this file."""

import json
import pickle
import re
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

import textrl
from textrl.envs.copy import Copy
from textrl.registration import registered, task_class

IDS = [
    pytest.param(
        id,
        marks=pytest.mark.skipif(
            not getattr(task_class(where), "at_hand", lambda: True)(),
            reason=f"{id} needs files that are not in the cache (textrl.fetch brings them), or the extra [rlhf]",
        ),
    )
    for id, where in registered().items()
]
every_id = pytest.mark.parametrize("id", IDS)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@every_id
def test_gymnasium_check_env(id):
    env = gym.make(id, disable_env_checker=True)
    check_env(env.unwrapped)


@every_id
def test_stable_baselines3_check_env(id):
    from stable_baselines3.common.env_checker import check_env as check_for_sb3

    check_for_sb3(gym.make(id).unwrapped, warn=True)


@every_id
def test_ids_work_in_every_form(id):
    env = gym.make(f"textrl:{id}")
    assert env.spec.id == id
    native = gym.make_vec(id, num_envs=2)
    assert isinstance(native.unwrapped, textrl.TextVectorEnv)
    assert native.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    sync = gym.make_vec(id, num_envs=2, vectorization_mode="sync")
    assert sync.observation_space == native.observation_space and sync.action_space == native.action_space
    mine, theirs = native.reset(seed=3), sync.reset(seed=3)
    np.testing.assert_array_equal(mine[0], theirs[0])
    assert mine[0].dtype == np.int64 and mine[0] in native.observation_space


@every_id
def test_specs_survive_json_and_pickling(id):
    spec = gym.make(id).spec
    again = gym.envs.registration.EnvSpec.from_json(spec.to_json())
    json.loads(spec.to_json())
    for each in (again, pickle.loads(pickle.dumps(spec))):
        np.testing.assert_array_equal(gym.make(each).reset(seed=1)[0], gym.make(id).reset(seed=1)[0])


@every_id
def test_an_env_survives_pickling_in_mid_episode(id):
    env = gym.make(id).unwrapped
    env.reset(seed=0)
    twin = pickle.loads(pickle.dumps(env))
    for _ in range(20):
        action = int(env.action_space.sample())
        one, other = env.step(action), twin.step(action)
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:4] == other[1:4]
        if one[2]:
            np.testing.assert_array_equal(env.reset()[0], twin.reset()[0])


@every_id
def test_async_gives_what_sync_gives(id):
    fns = [lambda: gym.make(id)] * 2
    one, other = AsyncVectorEnv(fns, context="fork"), SyncVectorEnv(fns)
    try:
        np.testing.assert_array_equal(one.reset(seed=5)[0], other.reset(seed=5)[0])
        one.action_space.seed(0)
        for _ in range(6):
            actions = one.action_space.sample()
            mine, theirs = one.step(actions), other.step(actions)
            for a, b in zip(mine[:4], theirs[:4], strict=True):
                np.testing.assert_array_equal(a, b)
    finally:
        one.close()


def test_async_spawn():
    envs = gym.make_vec(
        "textrl:textrl/Copy-v0", num_envs=2, vectorization_mode="async", vector_kwargs={"context": "spawn"}
    )
    try:
        observations, _ = envs.reset(seed=0)
        np.testing.assert_array_equal(observations, gym.make_vec("textrl/Copy-v0", num_envs=2).reset(seed=0)[0])
    finally:
        envs.close()


@every_id
def test_a_seed_fixes_everything_and_disturbs_nobody(id):
    before = np.random.get_state()[1].copy()

    def play(other=None):
        env = gym.make(id)
        env.action_space.seed(7)
        seen = [env.reset(seed=11)[0]]
        for _ in range(30):
            if other is not None:
                other.reset()
            observation, _, terminated, _, _ = env.step(env.action_space.sample())
            seen.append(env.reset()[0] if terminated else observation)
        return np.array(seen)

    other = gym.make(id)
    other.reset(seed=11)
    np.testing.assert_array_equal(play(), play(other))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@every_id
def test_masks_allow_a_token_and_say_the_same_everywhere(id):
    env, envs = gym.make(id), gym.make_vec(id, num_envs=1)
    masked = env.unwrapped.task.masked
    _, info = env.reset(seed=0)
    _, infos = envs.reset(seed=0)
    generator = np.random.default_rng(0)
    terminated = False
    while not terminated:
        mask = env.get_wrapper_attr("action_masks")()
        assert mask.dtype == bool and mask.shape == (env.action_space.n,) and mask.any()
        np.testing.assert_array_equal(envs.unwrapped.action_masks()[0], mask)
        assert ("action_mask" in info) == ("action_mask" in infos) == masked
        if masked:
            assert info["action_mask"].dtype == np.int8
            np.testing.assert_array_equal(info["action_mask"], mask)
            np.testing.assert_array_equal(infos["action_mask"][0], mask)
        action = generator.choice(np.flatnonzero(mask))
        _, _, terminated, _, info = env.step(action)
        _, _, _, _, infos = envs.step(np.array([action]))
    assert "action_mask" not in info and "action_mask" not in infos
    assert env.get_wrapper_attr("action_masks")().all()


@every_id
def test_types_that_clients_insist_on(id):
    env = gym.make(id)
    env.reset(seed=0)
    terminated = False
    while not terminated:
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert type(reward) is float and type(terminated) is bool and truncated is False
        assert observation.dtype == np.int64 and observation in env.observation_space
        assert not any(type(value) in (int, float, bool) for value in info.values())
    assert {"prompt", "completion", "text", "score", "finish_reason"} <= set(info)
    assert info["text"] == info["prompt"] + info["completion"]
    assert info["finish_reason"] in ("stop", "length") and np.isfinite(info["score"])
    assert "episode" not in info


@every_id
def test_the_page_is_whole(id):
    page = task_class(registered()[id]).__doc__
    parts = ["Description:", "Observation:", "Actions:", "Score:", "Episode end:", "What it teaches:", "Optimum:"]
    places = [page.find(part) for part in [*parts, "Args:"]]
    assert -1 not in places and places == sorted(places)


@every_id
def test_the_stated_optimum_is_the_exact_one(id):
    cls = task_class(registered()[id])
    if cls.best_score is None:
        assert "not known" in cls.__doc__ or "nothing by itself" in cls.__doc__
        return
    stated = re.search(r"Optimum:.*?(\d+(\.\d+)?)", cls.__doc__, re.DOTALL)
    assert float(stated[1]) == cls.best_score
    task = cls()
    assert task.vocab_size**task.max_new_tokens <= 100_000
    assert textrl.solve(task).score == pytest.approx(cls.best_score, abs=1e-9)


OTHERS = [
    ("Bandit", {"offset": 5.0}),
    ("Bandit", {"payoffs": (-2.0, -1.0)}),
    ("Dice", {"means": (0.1, 0.9), "spreads": (0.0, 1.0)}),
    ("Dice", {"means": (-0.1,), "spreads": (1.0,)}),
    ("ProxyGold", {"paid": "gold"}),
    ("ProxyGold", {"paid": "gold", "length": 5}),
    ("Vowels", {"letters": "xyz", "length": 4}),
    ("Vowels", {"letters": "ae", "length": 3}),
    ("Copy", {"symbols": "ab", "length": 2}),
    ("Reverse", {"symbols": "ab", "length": 2}),
    ("Increasing", {"numbers": 4, "length": 3}),
    ("Stop", {"longest": 3}),
    ("Brackets", {"depth": 1, "length": 5}),
    ("Refusal", {"questions": 2, "answers": 5}),
    ("Arithmetic", {"largest": 1, "max_new_tokens": 3}),
    ("RandomWalk", {"nodes": 4, "seed": 2}),
]


@pytest.mark.parametrize(("name", "arguments"), OTHERS, ids=str)
def test_the_best_score_with_other_arguments_is_the_exact_one(name, arguments):
    task = task_class(registered()[f"textrl/{name}-v0"])(**arguments)
    assert textrl.solve(task).score == pytest.approx(task.best_score, abs=1e-9)


def test_brackets_that_cannot_be_closed_any_more_leave_only_the_end():
    env = gym.make("textrl/Brackets-v0")
    env.reset(options={"prompt": "(("})
    for _ in range(4):
        _, _, _, _, info = env.step(1)
    assert info["action_mask"].tolist() == [1, 0, 0, 0, 0]  # six are open, two tokens are left


def test_the_ids_of_a_prompt_are_the_callers_own():
    task = gym.make("textrl/Copy-v0").unwrapped.task
    for _ in range(2):
        task.encode({"prompt": "abc"})[1] = 3
    assert task.encode({"prompt": "abc"}).tolist() == [0, 1, 2, 3]


def test_a_line_break_is_no_end():
    task = Copy(symbols="a\n", length=2)
    rows = [{"prompt": "aa"}] * 2
    assert task.evaluate(rows, [[1, 1, 2], [1, 1, 0]]).totals.tolist() == pytest.approx([2 / 3, 1.0])
