"""Scores that misbehave: named with prompt and response, or dropped and counted, and no other episode lost."""

import asyncio
import re
import subprocess
import sys
import threading
import time
import warnings

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
import torch

import textrl
from textrl.agents import GRPO, PPO, REINFORCE, BestOfN, ReST
from textrl.asking import AllDropped, Asking
from textrl.envs.copy import Copy
from textrl.failures import TrainingError
from textrl.returns import group_normalised, leave_one_out
from textrl.rewards import weighted_sum
from textrl.scores import ScoreError
from textrl.watch import TrainingWarning

TOKENIZER = textrl.symbol_tokenizer("ab")


def text_env(reward, num_envs=None, **more):
    options = {"tokenizer": TOKENIZER, "prompts": ["a", "b"], "max_new_tokens": 4, "reward": reward, **more}
    if num_envs is None:
        return gym.make("textrl/Text-v0", **options)
    return gym.make_vec("textrl/Text-v0", num_envs=num_envs, **options)


def fails(text):
    """A share of the texts that no two of our tests choose alike: those that begin with "ba"."""
    return text.startswith("ba")


def hang():
    threading.Event().wait(60)


def failing(kind):
    """A score that is wrong, in one of many ways, for a batch with a text that `fails`."""

    def score(prompts, completions, **columns):
        values = [float(len(text)) for text in completions]
        for i, text in enumerate(completions):
            if fails(text):
                if kind == "raises":
                    raise RuntimeError(f"no score for\nthis: {text}")
                if kind == "hangs":
                    hang()
                values[i] = {"nan": float("nan"), "inf": -float("inf"), "text": "good", "none": None}.get(kind, 0.0)
                if kind == "short":
                    return values[:i]
                if kind == "string":
                    return "great"
                if kind == "scalar":
                    return 1.0
        return values

    return score


KINDS = ["raises", "hangs", "nan", "inf", "text", "none", "short", "string", "scalar"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_message_names_the_prompt_and_the_response(kind):
    task = text_env(failing(kind)).unwrapped.task
    task.asking = Asking(timeout=0.1)
    rows, ids = [{"prompt": "a"}, {"prompt": "b"}], [[2, 1, 0], [1, 1, 0]]
    with pytest.raises(ScoreError, match=r"prompt 'a', completion 'ba'") as caught:
        task.evaluate(rows, ids)
    assert "\n" not in str(caught.value)
    assert {"raises": "RuntimeError: no score for", "hangs": "no answer within 0.1 s"}.get(kind, "score must") in str(
        caught.value
    )
    with pytest.raises(ScoreError, match=r"prompt 'b', completion 'bab'"):
        task.evaluate([{"prompt": "a"}, {"prompt": "b"}], [[1, 0], [2, 1, 2, 0]]) if kind in (
            "raises", "hangs", "nan", "inf", "text", "none",
        ) else task.evaluate([{"prompt": "b"}], [[2, 1, 2, 0]])  # fmt: skip


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


@pytest.mark.parametrize("value", [3.5e38, -1e308, Unspeakable()])
def test_scores_that_float32_does_not_hold_and_errors_without_words_are_faults(value):
    def score(prompts, completions):
        if isinstance(value, Exception):
            raise value
        return [value] * len(completions)

    task = text_env(score).unwrapped.task
    said = "score raised Unspeakable for prompt 'a'" if isinstance(value, Exception) else "must be finite in float32"
    with pytest.raises(ScoreError, match=said):
        task.evaluate([{"prompt": "a"}], [[1, 0]])
    task.asking = Asking(drop=True)
    assert task.evaluate([{"prompt": "a"}], [[1, 0]]).faults.keys() == {0}


def test_an_error_of_the_batch_alone_names_its_first_response():
    def score(prompts, completions):
        if len(prompts) > 1:
            raise ValueError("one at a time")
        return [1.0]

    task = text_env(score).unwrapped.task
    with pytest.raises(ScoreError, match=r"one at a time for prompt 'a', completion '', the first of 2"):
        task.evaluate([{"prompt": "a"}] * 2, [[0], [1, 0]])
    task.asking = Asking(drop=True)
    assert task.evaluate([{"prompt": "a"}] * 2, [[0], [1, 0]]).totals.tolist() == [1, 1]


def test_a_good_batch_is_asked_once_and_a_bad_one_once_more_for_each():
    sizes = []

    def score(completions):
        sizes.append(len(completions))
        if any(fails(text) for text in completions):
            raise RuntimeError
        return [0.0] * len(completions)

    task = text_env(score).unwrapped.task
    task.asking = Asking(drop=True)
    task.evaluate([{"prompt": "a"}] * 3, [[0], [1, 0], [2, 0]])
    assert sizes == [3]
    scores = task.evaluate([{"prompt": "a"}] * 3, [[0], [2, 1, 0], [2, 0]])
    assert sizes == [3, 3, 1, 1, 1]
    assert list(scores.faults) == [1]
    np.testing.assert_array_equal(scores.totals, [0, np.nan, 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stepped", [False, True], ids=["sampled", "stepped"])
def test_drop_leaves_out_those_episodes_and_no_other(kind, stepped):
    """The same seed with a score that never fails says which episodes there were."""

    def collect(reward, **settings):
        env = text_env(reward, num_envs=4)
        if stepped:
            env = gym.wrappers.vector.RecordEpisodeStatistics(env)
        return REINFORCE(env, batch_size=24, seed=3, **settings).collect()

    whole = collect(failing("never"))
    left = collect(failing(kind), on_score_error="drop", score_timeout=0.05 if kind == "hangs" else None)
    good = [i for i, text in enumerate(whole.completions) if not fails(text)]
    assert 0 < len(good) < len(whole) == 24
    assert left.completions == [whole.completions[i] for i in good]
    assert len(left.dropped) == 24 - len(good)
    assert all(re.search(r"prompt '[ab]', completion 'ba", message) for message in left.dropped)
    torch.testing.assert_close(left.scores, whole.scores[good])
    torch.testing.assert_close(left.rewards.sum(1), whole.rewards.sum(1)[good])
    assert [row["prompt"] for row in left.rows] == [whole.rows[i]["prompt"] for i in good]


def test_scores_for_every_token_are_dropped_likewise():
    def score(completions, completion_ids):
        if any(fails(text) for text in completions):
            raise RuntimeError
        return [[0.5] * len(ids) for ids in completion_ids]

    def never(completions, completion_ids):
        return [[0.5] * len(ids) for ids in completion_ids]

    for wrap in (lambda env: env, gym.wrappers.vector.RecordEpisodeStatistics):
        whole = REINFORCE(wrap(text_env(never, 4)), batch_size=24).collect()
        left = REINFORCE(wrap(text_env(score, 4)), batch_size=24, on_score_error="drop").collect()
        good = [i for i, text in enumerate(whole.completions) if not fails(text)]
        assert left.completions == [whole.completions[i] for i in good]
        torch.testing.assert_close(left.rewards.sum(1), whole.rewards.sum(1)[good])


AGENTS = {
    "PPO": lambda env, **k: PPO(env, batch_size=32, **k),
    "REINFORCE": lambda env, **k: REINFORCE(env, batch_size=32, **k),
    "RLOO": lambda env, **k: REINFORCE(env, batch_size=32, baseline="leave_one_out", group_size=4, **k),
    "GRPO": lambda env, **k: GRPO(env, batch_size=32, group_size=4, **k),
    "ReST": lambda env, **k: ReST(env, batch_size=8, grow_batches=4, group_size=4, **k),
    "BestOfN": lambda env, **k: BestOfN(env, batch_size=8, n=4, **k),
}


@pytest.mark.parametrize("name", AGENTS)
def test_a_run_with_a_score_that_raises_and_hangs_ends_and_counts_right(name):
    """Raises for 1 text of 20, hangs for 1 of 200, by the text's own number: every failure is known."""
    seen, bad = [], set()

    def score(prompts, completions, completion_ids, **columns):
        out = []
        for prompt, text, ids in zip(prompts, completions, completion_ids, strict=True):
            number = len(seen)
            key = (prompt, tuple(ids), number)
            if len(prompts) > 1:
                seen.append(key)
                if number % 20 == 7:
                    bad.add((prompt, tuple(ids)))
            if (prompt, tuple(ids)) in bad:
                if len(bad) % 10 == 0:
                    hang()
                raise RuntimeError("no")
            out.append(float(len(text)))
        return out

    rows = []

    def note(agent, metrics):
        rows.append((metrics["rollout/dropped"], agent.num_timesteps))

    agent = AGENTS[name](
        text_env(score, 1, max_new_tokens=6), on_score_error="drop", score_timeout=0.05, max_dropped_share=1.0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        agent.learn(400, callback=note)
    assert agent.num_timesteps >= 400
    assert sum(dropped for dropped, _ in rows) > 0
    assert all(torch.isfinite(p).all() for p in agent.model.parameters())


def test_a_run_that_drops_more_than_its_share_stops(tmp_path):
    def score(completions):
        raise ConnectionError("nobody there")

    agent = REINFORCE(text_env(score, 1), batch_size=8, on_score_error="drop", max_dropped_share=0.2)
    with warnings.catch_warnings(record=True) as said, pytest.raises(TrainingError) as caught:
        warnings.simplefilter("always")
        agent.learn(10_000, log_dir=tmp_path)
    assert re.search(r"8 of the last 8 episodes, more than max_dropped_share=0.2 .*nobody there", str(caught.value))
    assert [w.category for w in said] == [TrainingWarning], "said once"
    assert "left out" in str(said[0].message)
    with pytest.raises(AllDropped, match="all 8 responses"):
        agent.collect()


def test_some_failures_are_let_pass_and_their_share_is_of_the_latest_episodes():
    calls = []

    def score(completions):
        calls.append(len(completions))
        late = len(calls) > 60
        return [float("nan") if late or i % 10 == 0 else 1.0 for i in range(len(completions))]

    agent = REINFORCE(text_env(score, 1), batch_size=20, on_score_error="drop", max_dropped_share=0.25)
    with warnings.catch_warnings(), pytest.raises(TrainingError, match=r"of the last 10\d\d episodes"):
        warnings.simplefilter("ignore")
        agent.learn(100_000_000)
    assert 60 < len(calls) < 72, "8 batches of 20 and the tenths of those before are a quarter of the last 1,000"


def test_nobody_waits_for_a_hung_score_when_a_program_ends():
    program = (
        "import gymnasium, time, textrl\n"
        "from textrl.agents import REINFORCE\n"
        "env = gymnasium.make('textrl/Text-v0', reward=lambda completions: time.sleep(100), max_new_tokens=2)\n"
        "REINFORCE(env, batch_size=2, score_timeout=0.1).learn(10)\n"
    )
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ScoreError: score gave no answer within 0.1 s" in ended.stderr
    assert time.monotonic() - began < 90


def test_other_errors_are_as_they_were():
    class Stop(BaseException):
        pass

    def score(completions):
        raise Stop

    task = text_env(score).unwrapped.task
    for asking in (Asking(), Asking(timeout=5), Asking(drop=True)):
        task.asking = asking
        with pytest.raises(Stop):
            task.evaluate([{"prompt": "a"}], [[0]])


def test_groups_that_lost_samples_by_hand():
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 7.0, 9.0])
    groups = torch.tensor([0, 0, 0, 2, 3, 3])
    assert leave_one_out(scores, groups).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, -2, 2]
    whole = torch.arange(6) // 3
    torch.testing.assert_close(leave_one_out(scores, whole), leave_one_out(scores, 3))
    torch.testing.assert_close(group_normalised(scores, whole), group_normalised(scores, 3))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"on_score_error": "ignore"}, r"on_score_error must be one of \['raise', 'drop'\]; got 'ignore'"),
        ({"max_dropped_share": 1.5}, "max_dropped_share must be from 0 to 1; got 1.5"),
        ({"score_timeout": 0.0}, "score_timeout must be a number above 0 and at most [0-9]+, or None; got 0.0"),
        ({"score_timeout": 1e300}, "score_timeout must be .* got 1e.300"),
        ({"warn_kl": 0.0}, "warn_kl must be above 0; got 0.0"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        REINFORCE(text_env(lambda completions: [0.0] * len(completions)), **setting)


# ---- what a score is given -----------------------------------------------------------------------------------


def test_a_column_that_some_rows_lack_is_given_whatever_the_order():
    rows = [{"prompt": "a"}, {"prompt": "b", "bonus": 5.0}]

    def reward(prompts, completions, bonus):
        return [each or 0.0 for each in bonus]

    def paid(env):
        return {info["prompt"]: info["score"] for _ in range(20) for info in [last_info(env)]}

    def last_info(env):
        env.reset()
        return env.step(0)[-1]

    env = text_env(reward, prompts=rows)
    assert paid(env) == {"a": 0.0, "b": 5.0}
    for order in (rows, rows[::-1]):
        expected = [row.get("bonus", 0.0) for row in order]
        assert env.unwrapped.task.evaluate(order, [[0], [0]]).totals.tolist() == expected


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "self"])
def test_a_column_cannot_take_the_place_of_what_was_said(name):
    with pytest.raises(ValueError, match=f"a row must have no column '{name}', which is what a score is given"):
        text_env(lambda completions: [0.0] * len(completions), prompts=[{"prompt": "a", name: "bb"}])


def test_the_name_of_a_column_is_a_text():
    with pytest.raises(ValueError, match="row 0, a row must have texts as the names of its columns; got 3"):
        text_env(lambda completions: [0.0] * len(completions), prompts=[{"prompt": "a", 3: "bb"}])


def test_a_score_that_edits_what_it_is_given_changes_nothing():
    def reward(prompts, completions, completion_ids):
        for ids in completion_ids:
            ids.clear()
        size = len(completions)
        for values in (prompts, completions, completion_ids):
            values.clear()
        return [0.0] * size

    env = text_env(reward)
    env.reset()
    assert env.step(0)[-1]["finish_reason"] == "stop"


def test_prompts_of_pandas_are_refused():
    table = pd.DataFrame({"prompt": ["a", "b"]})
    with pytest.raises(ValueError, match="prompts must be a list of texts, a dataset or a file of them"):
        text_env(lambda completions: [0.0], prompts=table)


def test_the_best_of_n_names_a_prompt_all_of_whose_scores_failed():
    class Picky(Copy):
        def score(self, prompts, completions, **columns):
            return [float("nan") if prompt == "bbb" else 1.0 for prompt in prompts]

    agent = BestOfN(textrl.TextEnv(Picky()), n=3, device="cpu", on_score_error="drop")
    assert len(agent.generate(["aaa", "ccc"])) == 2
    with pytest.raises(ScoreError, match=r"score failed for all 3 responses to prompt 'bbb', the first: score .* nan"):
        agent.generate(["aaa", "bbb"])


@pytest.mark.parametrize("column", [torch.ones(2, 1), np.ones((2, 1)), [[1.0], [1.0]]], ids=lambda x: type(x).__name__)
def test_a_column_of_scores_is_told_to_be_squeezed(column):
    task = text_env(lambda completions: column).unwrapped.task
    with pytest.raises(
        ScoreError, match=r"each of the 3 tokens .*flat list \(squeeze\(-1\).*; got \[1.0\] for prompt 'a'"
    ):
        task.evaluate([{"prompt": "a"}] * 2, [[1, 2, 0], [1, 0]])


def test_a_tensor_of_a_number_a_token_is_told_to_be_a_list():
    task = text_env(lambda completion_ids: [torch.ones(len(ids)) for ids in completion_ids]).unwrapped.task
    with pytest.raises(ScoreError, match=r"or a list for a number a token \(tolist\(\) makes one\); got tensor"):
        task.evaluate([{"prompt": "a"}], [[1, 2, 0]])


def test_a_score_may_be_a_coroutine_inside_a_loop_of_its_callers_too():
    async def score(completions, **_):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    both = weighted_sum([(score, 1.0), (score, 2.0)])

    async def asked(reward):
        return text_env(reward).unwrapped.task.evaluate([{"prompt": "a"}], [[1, 2, 0]]).totals.tolist()

    assert asyncio.run(asked(score)) == [2] and asyncio.run(asked(both)) == [6]


def test_a_coroutine_keeps_its_event_loop_and_nobody_waits_for_one_that_hangs():
    loops = []

    async def score(completions, **_):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(60 * (len(loops) > 2))
        return [0.0] * len(completions)

    task = text_env(score).unwrapped.task
    task.asking = Asking(timeout=1.0)
    for _ in range(2):
        task.evaluate([{"prompt": "a"}], [[1, 2, 0]])
    assert loops[0] is loops[1]
    with pytest.raises(ScoreError, match="no answer within 1 s"):
        task.evaluate([{"prompt": "a"}], [[1, 0]])
