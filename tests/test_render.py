"""Pictures of episodes: what is told apart, what shades a token, and that a film can be made of them."""

import math
import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.wrappers import RecordVideo
from gymnasium.wrappers import vector as vector_wrappers

import textrl
from textrl.agents import A2C, PPO, REINFORCE
from textrl.critic import state_values
from textrl.envs.copy import Copy
from textrl.envs.increasing import Increasing
from textrl.envs.text import Text
from textrl.models import small_model
from textrl.render import CELL, COLUMNS, LINES, SCALE, Picture, Trace, ansi, colour, draw, frame

TOKEN = re.compile(r"\x1b\[97;48;2;(\d+);(\d+);(\d+)m(.*?)\x1b\[0m")


def tokens(text):
    """Each token that an ansi picture shows, with the colour behind it."""
    return [(piece, tuple(map(int, rgb))) for *rgb, piece in TOKEN.findall(text)]


def picture(numbers, meaning="reward", pieces="ab"):
    return Picture("p", list(pieces), numbers, meaning, 0.5)


@pytest.mark.parametrize("mode", ["ansi", "rgb_array"])
def test_a_number_that_failed_is_drawn_too(mode):
    picture = Picture("a", ["b", "c", "d"], [math.nan, 1.0, -0.5], "reward", math.nan)
    assert picture.shades()[1:] == [1.0, -0.5]
    assert draw(picture, mode) is not None


def test_prompt_and_response_are_told_apart():
    env = textrl.TextEnv(Copy(), render_mode="ansi")
    env.reset(options={"prompt": "abc"})
    assert env.render() == "\x1b[1mabc\x1b[0m >>   [reward +0.000, shaded by reward]"
    env.step(1)
    env.step(0)
    said = env.render()
    assert said.startswith("\x1b[1mabc\x1b[0m >> ") and said.endswith("  [reward +0.250, shaded by reward]")
    assert [piece for piece, _ in tokens(said)] == ["a", "<end>"]


def test_tokens_are_shaded_by_their_rewards():
    env = textrl.TextEnv(Increasing(), render_mode="ansi")
    env.reset()
    for action in (3, 2, 4):  # the second is not above the first: no reward
        env.step(action)
    shades = [shade for _, shade in tokens(env.render())]
    assert shades[0] == shades[2] == (30, 200, 30) and shades[1] == (60, 60, 60)


def test_colours_say_which_is_larger_and_which_is_bad():
    shades = [shade for _, shade in tokens(ansi(picture([1.0, 0.5])))]
    assert shades == [(30, 200, 30), (30, 130, 30)]
    assert [shade for _, shade in tokens(ansi(picture([-1.0, 0.0])))] == [(200, 30, 30), (60, 60, 60)]
    assert colour(1.0, "kl") == (200, 30, 30) and colour(1.0, "value") == (30, 200, 30)


def attached(vector, mode="ansi"):
    """An environment with a reference, an agent's policy and its values."""
    task = Copy()
    reference = small_model(task.vocab_size, 8, 1, n_embd=16, n_layer=1)
    kwargs = {"reference": reference, "kl_coef": 0.5, "render_mode": mode}
    env = textrl.TextVectorEnv(task, 2, **kwargs) if vector else textrl.TextEnv(task, **kwargs)
    agent = PPO(textrl.TextEnv(task), seed=3, batch_size=8).learn(64)
    env.policy = agent.stepper
    return env, agent


@pytest.mark.parametrize("vector", [False, True])
def test_tokens_are_shaded_by_kl_where_a_policy_is_attached(vector):
    env, _ = attached(vector)
    env.reset(seed=0)
    kls = []
    for action in (1, 2, 3):
        info = env.step(np.array([action, 1]) if vector else action)[4]
        kls.append(float(info["kl"][0] if vector else info["kl"]))
    said = env.render()[0] if vector else env.render()
    assert "shaded by kl" in said
    expected = [colour(kl / max(map(abs, kls)), "kl") for kl in kls]
    assert [shade for _, shade in tokens(said)] == expected


@pytest.mark.parametrize("vector", [False, True])
def test_tokens_are_shaded_by_value_where_values_are_attached(vector):
    env, agent = attached(vector)
    env.value = state_values(agent)
    observation = env.reset(seed=0)[0]
    values = []
    for action in (1, 2, 3):
        values.append(float(env.value(observation if vector else observation[None])[0]))
        observation = env.step(np.array([action, 1]) if vector else action)[0]
    said = env.render()[0] if vector else env.render()
    assert "shaded by value" in said and len(set(values)) == 3
    expected = [colour(value / max(map(abs, values)), "value") for value in values]
    assert [shade for _, shade in tokens(said)] == expected


def test_values_are_the_critics_own():
    task = Copy()
    for agent_class in (PPO, A2C):
        agent = agent_class(textrl.TextEnv(task), seed=3, batch_size=8).learn(64)
        rollout = agent.collect()
        rows = np.full((len(rollout), 8), task.vocab_size)
        for row, ids, length in zip(rows, rollout.tokens.numpy(), rollout.prompt_lengths.tolist(), strict=True):
            row[:length] = ids[:length]
        values = state_values(agent)
        np.testing.assert_allclose(values(rows), agent.value(rollout)[:, 0].detach().numpy(), atol=1e-5)
    shared = PPO(textrl.TextEnv(task), critic="shared")
    assert state_values(shared)(rows).tolist() == [0.0] * len(rows)
    assert state_values(REINFORCE(textrl.TextEnv(task))) is None


def test_a_policy_that_comes_and_goes_breaks_no_picture():
    env, agent = attached(False)
    env.reset(seed=0)
    env.policy = None
    env.step(1)
    env.policy, env.value = agent.stepper, state_values(agent)
    env.step(1)
    assert "shaded by reward" in env.render() and len(tokens(env.render())) == 2
    here = env.snapshot()
    env.step(1)
    env.restore(here)
    assert len(tokens(env.render())) == 2


def test_a_snapshot_keeps_what_shades_its_tokens():
    env, agent = attached(False)
    env.value = state_values(agent)
    env.reset(seed=0)
    env.step(1)
    here, said = env.snapshot(), env.render()
    env.step(2)
    env.restore(here)
    assert env.render() == said and len(here.kls) == len(here.values) == len(here.rewards) == 1


def test_without_a_render_mode_nobody_is_asked_for_values():
    env, _ = attached(False, mode=None)
    env.value = lambda observations: pytest.fail("asked")
    env.reset(seed=0)
    env.step(1)
    assert env.render() is None


def test_human_shows_each_step_as_it_happens(capsys):
    env = textrl.TextEnv(Copy(), render_mode="human")
    env.reset(options={"prompt": "abc"})
    env.step(1)
    assert env.render() is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and [len(tokens(line)) for line in lines] == [0, 1]
    envs = textrl.TextVectorEnv(Copy(), 3, render_mode="human")
    envs.reset(seed=0)
    envs.step(np.array([1, 2, 0]))
    assert len(capsys.readouterr().out.splitlines()) == 6 and envs.render() is None


@pytest.mark.parametrize("text", ["\x1b[2J", "\u202eabc", "a\rb\nc", "\x9b31m\x00"])
def test_hostile_text_is_written_out(text):
    said = ansi(Picture(text, [text], [1.0], "reward", 1.0))
    assert all(c.isprintable() for c in re.sub(r"\x1b\[[\d;]*m", "", said))
    assert frame(Picture(text, [text], [1.0], "reward", 1.0)).dtype == np.uint8


def test_frames_are_of_one_shape_whatever_the_text():
    shape = (LINES * CELL[0] * SCALE, COLUMNS * CELL[1] * SCALE, 3)
    for prompt, pieces in (("", []), ("p" * 1000, ["x"] * 3), ("p", ["long " * 30] * 40), ("日本", ["\U0001f600"])):
        image = frame(Picture(prompt, pieces, [1.0] * len(pieces), "reward", 0.0))
        assert image.shape == shape and image.dtype == np.uint8
    env = gym.make("textrl/Text-v0", render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    env.step(env.action_space.sample())
    second = env.render()
    assert first.shape == second.shape == shape and (first != second).any()


def test_the_newest_of_a_long_text_is_seen():
    long = Picture("p", ["x"] * (COLUMNS * LINES), [0.0] * (COLUMNS * LINES), "reward", 0.0)
    longer = Picture("p", ["x"] * (COLUMNS * LINES) + ["!"], [0.0] * (COLUMNS * LINES + 1), "reward", 0.0)
    assert (frame(long) != frame(longer)).any()


@pytest.mark.parametrize("vector", [False, True])
def test_a_film_is_made(vector, tmp_path):
    pytest.importorskip("moviepy", reason="RecordVideo needs moviepy")
    import imageio.v3 as imageio

    films = str(tmp_path / "films")
    if vector:
        env = vector_wrappers.RecordVideo(
            gym.make_vec("textrl/Copy-v0", num_envs=4, render_mode="rgb_array"), films, disable_logger=True
        )
        env.reset(seed=0)
        while not env.step(np.ones(4, dtype=int))[2].any():
            pass
    else:
        env = RecordVideo(gym.make("textrl/Copy-v0", render_mode="rgb_array"), films, disable_logger=True)
        env.reset(seed=0)
        while not env.step(1)[2]:
            pass
    env.close()
    (film,) = Path(films).glob("*.mp4")
    frames = np.stack(list(imageio.imiter(film)))  # (F, H, W, 3)
    assert len(frames) == 5  # the prompt and four tokens
    assert (np.abs(frames[0].astype(int) - frames[-1]).max(-1) > 60).any()


def test_traces_of_what_is_not_known():
    trace = Trace()
    trace.add(0.5, None, None)
    assert trace.shading() == ([0.5], "reward")
    trace.add(0.25, np.float32(1.0), 0.75)
    assert trace.shading() == ([0.5, 0.25], "reward")
    assert Picture.of(Text(), "p", [35, 0], trace).pieces == ["B", "<end>"]
    assert Picture.of(Text(), "p", [35, 35, 0], trace).numbers == [0.0, 0.5, 0.25]  # the first is older than the trace
