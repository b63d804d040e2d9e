"""A run stopped anywhere and taken up again ends as one that was never stopped, to the last bit."""

import csv
import json
import random

import gymnasium as gym
import numpy as np
import pytest
import torch

import textrl
from textrl import agents, state
from textrl.agents import REINFORCE, SFT
from textrl.checkpoint import restore
from textrl.envs.copy import Copy
from textrl.envs.proxy_gold import ProxyGold
from textrl.envs.text import Text
from textrl.folders import CheckpointError
from textrl.models import small_model
from textrl.returns import masked_mean
from textrl.runs import Checkpoints

ID = "textrl/Copy-v0"
TOTAL = 260


class Mine(textrl.Agent):
    """An agent of one's own, with state of several kinds that nobody declared."""

    def build(self):
        self._mean, self.recent, self.noise = 0.0, [], np.random.default_rng(3)
        self.scale = torch.ones(2)
        self.slow = torch.nn.Linear(1, 1)
        self.buffer = []

    def update(self, rollout):
        self._mean = 0.9 * self._mean + 0.1 * float(rollout.scores.mean())
        self.recent = [*self.recent, self._mean][-3:]
        self.scale = self.scale * 0.9 + self.noise.random()
        torch.nn.init.constant_(self.slow.weight, self._mean)
        self.buffer = [*self.buffer, rollout][-2:]  # learns from the batch before, too
        shift = sum(self.recent) + float(self.scale.sum()) + float(self.slow.weight.detach()) + random.random()
        old = self.buffer[0]
        old.advantages = (old.scores[:, None] - shift * 0.1).expand_as(old.rewards)

        def loss(batch):
            return masked_mean(-batch.advantages * self.logprobs(batch), batch.action_mask), {}

        return self.minimise(loss, old)


ROWS = [{"prompt": a + b, "completion": b + a} for a in "abc" for b in "abc"]
PAIRS = [{"prompt": a + b, "chosen": a + b, "rejected": b + "c"} for a in "abc" for b in "abc"]
LOGGED = [{**row, "score": i / 9} for i, row in enumerate(ROWS)]
PENALTY = {"kl_coef": 0.1}


def reference():
    return small_model(4, 16, 7)


def sampled(**k):
    return gym.make_vec(ID, num_envs=1, **k)


RUNS = {
    "PPO": lambda: agents.PPO(sampled(reference=reference(), **PENALTY), batch_size=16, kl_target=2.0),
    "PPO, shared critic": lambda: agents.PPO(sampled(), batch_size=16, critic="shared"),
    "PPO in bfloat16": lambda: agents.PPO(sampled(), batch_size=16, dtype="bfloat16"),
    "PPO, last layers": lambda: agents.PPO(sampled(), batch_size=16, trainable_layers=1),
    "REINFORCE": lambda: agents.REINFORCE(sampled(), batch_size=16),
    "REINFORCE, learned baseline": lambda: agents.REINFORCE(sampled(), batch_size=16, baseline="value"),
    "A2C": lambda: agents.A2C(sampled(), batch_size=16, cooldown=0.0),
    "TRPO": lambda: agents.TRPO(sampled(), batch_size=16),
    "GRPO": lambda: agents.GRPO(sampled(reference=reference(), **PENALTY), batch_size=16, group_size=4),
    "NLPO": lambda: agents.NLPO(sampled(), batch_size=16, mask_interval=2, top_p=0.9),
    "SFT": lambda: agents.SFT(sampled(), dataset=ROWS, batch_size=12),
    "DPO": lambda: agents.DPO(sampled(), dataset=PAIRS, batch_size=12),
    "BPO": lambda: agents.BPO(sampled(), dataset=LOGGED, batch_size=12),
    "BPO, tis": lambda: agents.BPO(
        sampled(),
        dataset=[{**row, "logprobs": [-1.0] * (len(row["completion"]) + 1)} for row in LOGGED],
        batch_size=6,
        weighting="tis",
    ),
    "ReST": lambda: agents.ReST(sampled(), batch_size=8, grow_batches=2, group_size=4),
    "BestOfN": lambda: agents.BestOfN(sampled(), batch_size=8, n=4),
    "Mine": lambda: Mine(sampled(), batch_size=16),
    "Mine, a single env": lambda: Mine(gym.wrappers.NormalizeReward(gym.make(ID)), batch_size=8),
}


class Killed(Exception):
    pass


def weights(agent):
    return {
        f"{name}.{key}": value.clone()
        for name, module in agent.modules.items()
        for key, value in module.state_dict().items()
    }


def same_weights(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[key], two[key]) for key in one)


def stop_after(updates):
    def callback(agent, metrics):
        if agent.num_updates == updates:
            raise Killed

    return callback


def learn(make, folder, total=TOTAL, **options):
    """As a script would: the global generators stand anywhere, but the same where the run begins."""
    agent = make()
    random.seed(11)
    return agent.learn(total, log_dir=folder, **options)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_twice_ends_as_one_never_stopped(name, tmp_path):
    whole = learn(RUNS[name], tmp_path / "whole", checkpoint_every=100)
    updates = whole.num_updates
    assert updates >= 4
    for stop in (2, updates - 1):
        with pytest.raises(Killed):
            learn(RUNS[name], tmp_path / "run", callback=stop_after(stop), checkpoint_every=50, resume=True)
        random.seed(stop)
    again = learn(RUNS[name], tmp_path / "run", checkpoint_every=50, resume=True)
    assert again.num_updates == updates
    assert same_weights(weights(again), weights(whole))
    assert (tmp_path / "run/progress.csv").read_bytes() == (tmp_path / "whole/progress.csv").read_bytes()


@pytest.mark.parametrize("name", ["PPO", "DPO"])
def test_a_loaded_agent_goes_on_with_the_call_it_was_saved_in(name, tmp_path):
    whole = learn(RUNS[name], tmp_path / "whole")
    half = learn(RUNS[name], tmp_path / "half", callback=lambda agent, metrics: agent.num_updates < 3)
    half.save(tmp_path / "saved")
    extra = {"dataset": PAIRS} if name == "DPO" else {}
    for total in (TOTAL, None, TOTAL - half.num_timesteps):
        loaded = type(half).load(tmp_path / "saved", RUNS[name]().env, **extra)
        loaded.learn(total, log_dir=tmp_path / "half")
        assert same_weights(weights(loaded), weights(whole))
        assert (tmp_path / "half/progress.csv").read_bytes() == (tmp_path / "whole/progress.csv").read_bytes()
    before = loaded.num_timesteps
    assert loaded.learn(TOTAL).num_timesteps >= before + TOTAL, "a call that ended is not gone on with"


def test_two_runs_of_one_seed_write_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        agents.PPO(sampled(), batch_size=16, seed=seed).learn(300, log_dir=tmp_path / name)
    a, b, c = ((tmp_path / name / "progress.csv").read_bytes() for name in "abc")
    assert a == b != c
    assert b"seconds" not in a


def test_checkpoints_keep_the_last_few_and_the_best(tmp_path):
    rows = []
    agent = RUNS["REINFORCE"]()
    agent.learn(
        TOTAL,
        log_dir=tmp_path,
        checkpoint_every=60,
        keep=2,
        callback=lambda agent, metrics: rows.append((agent.num_timesteps, metrics["rollout/score"])),
    )
    means, seen, due = {}, [], 60
    for timesteps, score in rows:
        seen.append(score)
        if timesteps >= due:
            means[timesteps], seen = np.mean(seen), []
            due += 60 * (1 + (timesteps - due) // 60)
    best = max(means, key=means.get)
    checkpoints = Checkpoints(tmp_path, 2)
    written = sorted({*means, agent.num_timesteps})
    assert set(checkpoints.steps()) == {best, *written[-2:]}
    assert (tmp_path / "best").resolve() == checkpoints.path(best)
    loaded = agents.REINFORCE.load(tmp_path / "best", sampled())
    assert loaded.num_timesteps == best


def test_numbers_of_numpy_come_back_as_they_were():
    tensors = {}
    packed = state.pack([np.float64(0.1), np.int64(3), 0.1, True], tensors)
    found = state.unpack(json.loads(json.dumps(packed)), tensors, torch.device("cpu"))
    assert found == [0.1, 3, 0.1, True] and [type(each).__name__ for each in found][2:] == ["float", "bool"]
    assert (np.float32(1) * found[0]).dtype == np.float64


@pytest.mark.parametrize("kind", ["SFT", "DPO", "BPO", "ReST"])
def test_a_run_does_not_go_on_with_other_data(kind, tmp_path):
    def made(answer):
        rows = [
            {"prompt": "abc", "completion": answer, "score": 1.0},
            {"prompt": "abc", "completion": "c", "score": 0.0},
        ]
        pairs = [{"prompt": "abc", "chosen": answer, "rejected": "c"}]
        cls = getattr(agents, kind)
        return cls(textrl.TextEnv(Copy()), dataset=pairs if kind == "DPO" else rows, batch_size=2, device="cpu")

    made("abc").learn(8, log_dir=tmp_path, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"holds an agent with another dataset$"):
        made("ab").learn(8, log_dir=tmp_path, checkpoint_every=1, resume=True)
    made("abc").learn(8, log_dir=tmp_path, checkpoint_every=1, resume=True)
    newest = max((tmp_path / "checkpoints").iterdir())
    getattr(agents, kind).load(newest, textrl.TextEnv(Copy()))


KINDS = {
    "one": lambda: gym.make("textrl/Copy-v0"),
    "bare": lambda: textrl.TextEnv(Copy()),
    "many": lambda: gym.make_vec("textrl/Copy-v0", num_envs=4),
    "more": lambda: gym.make_vec("textrl/Copy-v0", num_envs=6),
    "sync": lambda: gym.make_vec("textrl/Copy-v0", num_envs=3, vectorization_mode="sync"),
    "wrapped": lambda: gym.wrappers.RecordEpisodeStatistics(gym.make("textrl/Copy-v0")),
}


@pytest.mark.parametrize("first", KINDS)
def test_an_agent_is_loaded_on_any_kind_of_environment_and_resumed_on_its_own(first, tmp_path):
    agent = agents.REINFORCE(KINDS[first](), batch_size=12, device="cpu").learn(60)
    agent.save(tmp_path / "agent")
    for second, make in KINDS.items():
        again = agents.REINFORCE.load(tmp_path / "agent", make())
        again.learn(30)
        other = agents.REINFORCE(make(), batch_size=12, device="cpu")
        if second == first:
            restore(other, tmp_path / "agent")
        else:
            with pytest.raises(ValueError, match=r"env must be made as it was, .*, for a run to go on; got"):
                restore(other, tmp_path / "agent")


def test_a_loaded_agent_leaves_its_environment_as_it_is(tmp_path):
    agents.REINFORCE(textrl.TextEnv(Copy()), batch_size=8, device="cpu").learn(30).save(tmp_path / "agent")
    reference = small_model(4, 8, 3)
    env = textrl.TextEnv(Copy(), reference=reference, kl_coef=0.2, temperature=0.5)
    loaded = agents.REINFORCE.load(tmp_path / "agent", env)
    assert env.reference is reference and env.kl_coef == 0.2 and env.temperature == 0.5
    assert loaded.collect().ref_logprobs is not None
    longer = textrl.TextEnv(Copy(), reference=reference, kl_coef=0.2)
    longer.task.max_new_tokens = 3
    agents.REINFORCE.load(tmp_path / "agent", longer)
    assert longer.task.max_new_tokens == 3
    wrapped = lambda: gym.wrappers.RecordEpisodeStatistics(textrl.TextEnv(Copy()))  # noqa: E731
    first, second = (agents.REINFORCE.load(tmp_path / "agent", wrapped()).collect() for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)  # its prompts and tokens are those of the agent's seed


def test_a_loaded_agent_keeps_to_the_settings_and_prompts_of_its_new_environment(tmp_path):
    def wrapped(task, limit, **more):
        return gym.wrappers.TimeLimit(gym.wrappers.RecordEpisodeStatistics(textrl.TextEnv(task, **more)), limit)

    agents.REINFORCE(wrapped(ProxyGold(paid="proxy"), 2), batch_size=8, device="cpu").learn(30).save(tmp_path / "proxy")
    env = wrapped(ProxyGold(paid="gold"), 3)
    agents.REINFORCE.load(tmp_path / "proxy", env).learn(30)
    assert env.unwrapped.task.paid == "gold" and env._max_episode_steps == 3
    many, few = ([{"prompt": chr(97 + i)} for i in range(n)] for n in (12, 2))
    first = agents.REINFORCE(wrapped(Text(prompts=many, max_new_tokens=2), 2), batch_size=8, device="cpu")
    first.learn(30).save(tmp_path / "many")
    again = agents.REINFORCE.load(tmp_path / "many", wrapped(Text(prompts=few, max_new_tokens=2), 2))
    assert {row["prompt"] for row in again.collect().rows} == {"a", "b"}


def test_a_target_of_the_kl_is_that_of_the_loaded_agents_settings(tmp_path):
    def made(kl_coef):
        return textrl.TextEnv(Copy(), reference=small_model(4, 8, 3), kl_coef=kl_coef)

    agent = agents.PPO(made(0.1), kl_target=1.0, kl_horizon=16.0, batch_size=8, device="cpu").learn(60)
    agent.save(tmp_path / "agent")
    same = agents.PPO.load(tmp_path / "agent", made(0.1))
    assert same.base.kl_coef == agent.base.kl_coef < 0.09
    same.update(same.collect())
    assert same.base.kl_coef / agent.base.kl_coef == pytest.approx(0.9)  # half a horizon, far below the target
    assert agents.PPO.load(tmp_path / "agent", made(0.3), kl_target=None).base.kl_coef == 0.3
    other = agents.PPO.load(tmp_path / "agent", made(0.1), kl_target=3.0, kl_horizon=77.0)
    assert (other.config.kl_target, other.config.kl_horizon) == (3.0, 77.0)


class Two(agents.REINFORCE):
    name = "model_b"

    def build(self):
        super().build()
        self.modules[self.name] = self.other = torch.nn.Linear(2, 2)


def test_modules_of_an_authors_own_have_names_of_their_own(tmp_path, monkeypatch):
    agent = Two(sampled(), device="cpu")
    agent.save(tmp_path / "agent")
    assert torch.equal(Two.load(tmp_path / "agent", sampled()).other.weight, agent.other.weight)
    monkeypatch.setattr(Two, "name", "state")
    with pytest.raises(ValueError, match="modules must be modules under other names than those of the policy's files"):
        Two(sampled(), device="cpu").save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_no_pickle_and_nothing_left_over(tmp_path):
    agent = learn(RUNS["NLPO"], tmp_path, checkpoint_every=100)
    agent.save(tmp_path / "final")
    kinds = {file.suffix for file in tmp_path.rglob("*") if file.is_file() and "tfevents" not in file.name}
    assert kinds == {".json", ".safetensors", ".csv"}
    assert {each.name for each in tmp_path.iterdir()} >= {"checkpoints", "best", "final", "progress.csv"}
    assert not list(tmp_path.rglob(".*"))


@pytest.fixture(scope="module")
def damaged_run(tmp_path_factory):
    """A run with two checkpoints, and how it ends when it is never stopped."""
    folder = tmp_path_factory.mktemp("run")
    whole = learn(RUNS["PPO, shared critic"], folder / "whole", total=200)
    with pytest.raises(Killed):
        learn(RUNS["PPO, shared critic"], folder / "run", total=200, callback=stop_after(3), checkpoint_every=1)
    return folder, whole


FILES = ["agent.json", "model.safetensors", "state.json", "state.safetensors", "value_head.safetensors", "config.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damage_is_named_and_the_checkpoint_before_is_taken(file, damage, damaged_run, tmp_path, capsys):
    import shutil

    folder, whole = damaged_run
    shutil.copytree(folder / "run", tmp_path / "run", symlinks=True)
    newest = Checkpoints(tmp_path / "run", 2)
    assert len(newest.steps()) == 2
    target = newest.path(newest.steps()[0]) / file
    content = target.read_bytes()
    middle = len(content) // 2
    changed = {
        "cut": content[:middle],
        "flipped": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
    }
    target.unlink() if damage == "gone" else target.write_bytes(changed[damage])
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")) as caught:
        agents.PPO.load(target.parent, sampled())
    assert "\n" not in str(caught.value)
    again = learn(RUNS["PPO, shared critic"], tmp_path / "run", total=200, checkpoint_every=1, resume=True)
    assert file in capsys.readouterr().err
    assert same_weights(weights(again), weights(whole))
    assert (tmp_path / "run/progress.csv").read_bytes() == (folder / "whole/progress.csv").read_bytes()


def test_a_run_with_other_settings_is_refused(tmp_path):
    learn(RUNS["REINFORCE"], tmp_path, total=60, checkpoint_every=30)
    with pytest.raises(ValueError, match="another baseline_decay, seed"):
        agents.REINFORCE(sampled(), batch_size=16, seed=5, baseline_decay=0.5).learn(
            60, log_dir=tmp_path, checkpoint_every=30, resume=True
        )


def test_a_torn_last_row_is_no_row(tmp_path):
    learn(RUNS["REINFORCE"], tmp_path / "whole", total=200)
    with pytest.raises(Killed):
        learn(RUNS["REINFORCE"], tmp_path / "run", total=200, callback=stop_after(3), checkpoint_every=1)
    with (tmp_path / "run/progress.csv").open("a") as file:
        file.write("4,99")
    learn(RUNS["REINFORCE"], tmp_path / "run", total=200, resume=True)
    with (tmp_path / "run/progress.csv").open() as file:
        iterations = [int(row["time/iteration"]) for row in csv.DictReader(file)]
    assert iterations == list(range(1, len(iterations) + 1))
    assert (tmp_path / "run/progress.csv").read_bytes() == (tmp_path / "whole/progress.csv").read_bytes()


def test_a_new_column_is_added_to_the_whole_file(tmp_path):
    class Late(textrl.Agent):
        def update(self, rollout):
            return {"train/late": 1.5} if self.num_updates >= 2 else {}

    Late(sampled(), batch_size=4).learn(60, log_dir=tmp_path)
    with (tmp_path / "progress.csv").open() as file:
        late = [row["train/late"] for row in csv.DictReader(file)]
    assert late[:2] == ["", ""]
    assert set(late[2:]) == {"1.5"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": 10}, "checkpoint_every must be left out without log_dir; got 10"),
        ({"resume": True}, "resume must be left out without log_dir; got True"),
        ({"checkpoint_every": 0, "log_dir": "x"}, "checkpoint_every must be at least 1; got 0"),
        ({"keep": 0}, "keep must be at least 1; got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        agents.REINFORCE(sampled()).learn(10, **options)


def test_a_manifest_lists_every_file(tmp_path):
    agents.REINFORCE(sampled()).save(tmp_path / "a")
    manifest = json.loads((tmp_path / "a/agent.json").read_text())
    files = {file.name for file in (tmp_path / "a").iterdir()} - {"agent.json"}
    assert set(manifest["files"]) == files


def reward_pairs(**changes):
    from datasets import Dataset

    columns = {"prompt": ["a", "b", "c"] * 6, "chosen": ["ab", "ca", "bb"] * 6, "rejected": ["c", "bc", "ac"] * 6}
    return Dataset.from_dict({**columns, **changes})


def train_rewards(folder, stop_at=None, pairs=None, **options):
    from textrl import reward_training
    from textrl.reward_training import RewardModelConfig, train_reward_model
    from textrl.rewards import RewardModel

    model = RewardModel.from_language_model(small_model(4, 16, 3), textrl.symbol_tokenizer("abc"), seed=1)
    step = reward_training._Training.step

    def stopping(training):
        if training.now.step == stop_at:
            raise Killed
        return step(training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_training._Training, "step", stopping)
        config = RewardModelConfig(batch_size=2, epochs=2, learning_rate=1e-3)
        train_reward_model(model, pairs or reward_pairs(), config, log_dir=folder, **options)
    return model.model.state_dict()


def test_training_of_a_reward_model_goes_on_to_the_same_end(tmp_path):
    whole = train_rewards(tmp_path / "whole")
    for stop in (5, 7, 17):
        with pytest.raises(Killed):
            train_rewards(tmp_path / "run", stop, checkpoint_every=4, resume=True)
    newest = Checkpoints(tmp_path / "run", 2)
    assert newest.steps()[0] == 32
    damaged = newest.path(32) / "state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = train_rewards(tmp_path / "run", checkpoint_every=4, resume=True)
    assert same_weights(again, whole)
    assert (tmp_path / "run/progress.csv").read_bytes() == (tmp_path / "whole/progress.csv").read_bytes()
    assert len(newest.steps()) in (2, 3)
    assert (tmp_path / "run/best").exists()
    with pytest.raises(ValueError, match="another pairs"):
        train_rewards(tmp_path / "run", pairs=reward_pairs(chosen=["ba"] * 18), checkpoint_every=4, resume=True)


def test_training_of_a_reward_model_that_is_not_finite_stops(tmp_path):
    from textrl.failures import TrainingError
    from textrl.reward_training import RewardModelConfig, train_reward_model
    from textrl.rewards import RewardModel

    model = RewardModel.from_language_model(small_model(4, 16, 3), textrl.symbol_tokenizer("abc"))
    model.model.score.weight.data[:] = float("nan")
    with pytest.raises(TrainingError, match="3 steps in a row; there is no checkpoint"):
        train_reward_model(model, reward_pairs(), RewardModelConfig(batch_size=2), log_dir=tmp_path)


LOG_DAMAGE = {
    "garbage": lambda rows: b"\xff\x00garbage",
    "no header": lambda rows: b"".join(rows[1:]),
    "a row gone": lambda rows: b"".join(rows[:2] + rows[3:]),
    "a digit": lambda rows: b"".join(rows).replace(b"0.", b"1.", 1),
    "cells": lambda rows: b"".join([*rows[:2], rows[2].rstrip() + b",1\n", *rows[3:]]),
    "nothing": lambda rows: b"",
}


@pytest.mark.parametrize("damage", LOG_DAMAGE)
def test_a_damaged_log_is_named_and_the_run_goes_on(damage, tmp_path, capsys):
    make = RUNS["REINFORCE"]
    with pytest.raises(Killed):
        learn(make, tmp_path, checkpoint_every=40, callback=stop_after(4))
    capsys.readouterr()
    log = tmp_path / "progress.csv"
    rows = log.read_bytes().splitlines(keepends=True)
    assert len(rows) == 5
    log.write_bytes(LOG_DAMAGE[damage](rows))
    learn(make, tmp_path, checkpoint_every=40, resume=True)
    said = capsys.readouterr().err
    assert said.count("progress.csv' is damaged: its rows are not what was written") == 1


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    for name in (".a-textrl-part-0k_q9xyz", ".a-textrl-part-0k_q9xyz-old", ".a-snapshot", ".b-textrl-part-0k_q9xyz"):
        (tmp_path / name).mkdir()
    agents.REINFORCE(sampled()).save(tmp_path / "a")
    assert sorted(each.name for each in tmp_path.iterdir()) == [".a-snapshot", ".b-textrl-part-0k_q9xyz", "a"]


def test_what_was_saved_before_comes_back_where_the_new_cannot_take_its_place(tmp_path, monkeypatch):
    agents.REINFORCE(sampled(), seed=1).save(tmp_path / "a")
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    rename = type(tmp_path).rename

    def fails_for_the_new_one(self, target):
        if str(target) == str(tmp_path / "a") and not self.name.endswith("-old"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", fails_for_the_new_one)
    with pytest.raises(ValueError, match=r"could not be written: .*No space left"):
        agents.REINFORCE(sampled(), seed=2).save(tmp_path / "a")
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before


def test_a_learning_rate_given_to_load_is_in_force(tmp_path):
    env = textrl.TextEnv(Copy(length=2))
    REINFORCE(env, learning_rate=0.25).save(tmp_path / "agent")
    assert REINFORCE.load(tmp_path / "agent", env).optimizer.learning_rate == 0.25
    agent = REINFORCE.load(tmp_path / "agent", env, learning_rate=0.5)
    assert agent.learning_rate == 0.5
    assert agent.optimizer.learning_rate == pytest.approx(0.5)


def test_an_epoch_goes_on_after_loading(tmp_path):
    env = textrl.TextEnv(Copy(length=2))
    rows = [{"prompt": "ab", "completion": "ab"}, {"prompt": "ba", "completion": "ba"}] * 4
    agent = SFT(env, dataset=rows, batch_size=3)
    agent.collect()
    agent.save(tmp_path / "agent")
    loaded = SFT.load(tmp_path / "agent", env, dataset=rows)
    assert torch.equal(loaded._epochs._order, agent._epochs._order)
    assert loaded._epochs.take(5, 8).tolist() == agent._epochs.take(5, 8).tolist()


def test_a_new_run_does_not_begin_where_another_has_its_checkpoints(tmp_path):
    again = agents.REINFORCE(sampled(), small_model(4, 16, 1), batch_size=4, device="cpu")
    again.learn(120, log_dir=tmp_path, checkpoint_every=30)
    steps, progress = Checkpoints(tmp_path, 2).steps(), (tmp_path / "progress.csv").read_text()
    other = agents.REINFORCE(sampled(), small_model(4, 16, 2), batch_size=4, device="cpu")
    with pytest.raises(ValueError, match=r"log_dir must be a folder without another run's checkpoints"):
        other.learn(60, log_dir=tmp_path)
    assert (Checkpoints(tmp_path, 2).steps(), (tmp_path / "progress.csv").read_text()) == (steps, progress)
    again.learn(20, log_dir=tmp_path, checkpoint_every=1000)  # the same agent goes on: they are its own
    assert set(Checkpoints(tmp_path, 2).steps()) & set(steps)


def test_an_agent_that_knows_another_is_saved_without_it(tmp_path):
    agent = agents.REINFORCE(sampled(), small_model(4, 16, 1), batch_size=4, device="cpu")
    agent.other = agent
    agent.learn(20, log_dir=tmp_path, checkpoint_every=10)
    assert agents.REINFORCE.load(Checkpoints(tmp_path, 2).path(agent.num_timesteps), sampled()).num_updates > 0


def test_a_run_that_goes_on_elsewhere_has_a_best_of_its_own(tmp_path):
    agent = agents.REINFORCE(sampled(), small_model(4, 16, 1), batch_size=4, device="cpu")
    stop = iter([None] * 6 + [False])
    agent.learn(400, log_dir=tmp_path / "a", checkpoint_every=10, callback=lambda *_: next(stop))
    agent.call["due"]["best_value"] = 1e9
    agent.save(tmp_path / "agent")
    again = agents.REINFORCE.load(tmp_path / "agent", sampled())
    again.learn(400, log_dir=tmp_path / "b", checkpoint_every=10)
    assert (tmp_path / "b" / "best").is_dir()
