"""`textrl collect` and `textrl ope`, and agents that learn from what they wrote."""

import json

import gymnasium as gym
import pytest
import torch

import textrl
from textrl import cli
from textrl.agents import BPO, ReST
from textrl.episodes import as_episodes, read_episodes, take_in
from textrl.models import small_model
from textrl.ope import ope

minari = pytest.importorskip("minari")

COPY = ["--env", "textrl/Copy-v0", "--env-arg", "length=2", "--env-arg", "symbols=ab"]


def run(capsys, *arguments):
    code = cli.main([str(each) for each in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def logged(tmp_path, capsys, monkeypatch):
    """Episodes of a random model, written by the command into a folder of the current one."""
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "collect", *COPY, "--episodes", 300, "--dataset", "logged")
    assert (code, err) == (0, "") and "wrote 300 episodes" in out
    return tmp_path / "logged"


def test_collect_writes_what_minari_reads(logged):
    dataset = minari.MinariDataset(logged / "data")
    assert dataset.total_episodes == 300
    rollout = read_episodes(logged)
    assert not rollout.logprobs.isnan().any() and not rollout.scores.isnan().any()
    assert {row["prompt"] for row in rollout.rows} == {"aa", "ab", "ba", "bb"}


def test_a_run_plays_and_is_evaluated(logged, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = [*COPY, "--total-timesteps", 200, "--batch-size", 16, "--log-dir", folder, "--quiet"]
    assert run(capsys, "train", "reinforce", *flags)[0] == 0
    code, out, err = run(capsys, "ope", folder, "--dataset", logged, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert set(found["estimates"]) == {"is", "wis", "pdis", "dr"} and found["episodes"] == 300
    assert found["logged"] == pytest.approx(float(read_episodes(logged).scores.mean()), abs=1e-5)
    code, out, _ = run(capsys, "collect", folder, "--episodes", 20, "--dataset", tmp_path / "own")
    assert code == 0
    code, out, _ = run(capsys, "ope", folder, "--dataset", tmp_path / "own")
    assert code == 0
    assert "20.0  of 20" in out and "cannot tell" in out  # its own episodes all count, but they are few


@pytest.mark.parametrize("agent", ["bpo", "rest"])
def test_train_reads_the_folder(agent, logged, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*COPY, "--dataset", "logged", "--total-timesteps", 2000, "--batch-size", 32, "--quiet"]
    code, _, err = run(capsys, "train", agent, *flags, "--learning-rate", "3e-3", "--log-dir", "run")
    assert (code, err) == (0, "")
    code, out, _ = run(capsys, "evaluate", "run", "--episodes", 300, "--json")
    assert json.loads(out)["score"] > float(read_episodes(logged).scores.mean()) + 0.1
    assert json.loads((tmp_path / "run/run.json").read_text())["dataset"] == str(tmp_path / "logged")


def test_the_first_batch_of_rest_is_the_logged_one(logged):
    env = gym.make_vec("textrl/Copy-v0", num_envs=1, length=2, symbols="ab")
    agent = ReST(env, dataset=logged, batch_size=16, learning_rate=1e-3, device="cpu")
    first = agent.collect()
    assert first.tokens.tolist() == read_episodes(logged).tokens.tolist()
    assert first.rewards.sum(1).tolist() == first.scores.tolist()
    agent.update(first)
    agent.num_updates += 1
    assert len(agent.collect()) == 16 * agent.config.grow_batches


def test_what_logged_episodes_are_worth_counts_the_penalty():
    """score - kl_coef * (log mu - log pi_ref), whoever reads them."""
    model, reference = small_model(4, 8, seed=1), small_model(4, 8, seed=2)
    env = gym.make_vec("textrl/Copy-v0", num_envs=1, reference=reference, kl_coef=0.5)
    rows = [{"prompt": "a", "completion": "ab", "score": 1.0, "logprobs": [-1.0, -2.0, -0.5]}]
    ids = torch.tensor([[0, 1, 1, 2, 0]])
    with torch.no_grad():
        logs = reference(ids).logits.log_softmax(-1)[0]
    total = sum(float(logs[i, ids[0, i + 1]]) for i in (1, 2, 3))
    worth = 1.0 - 0.5 * (-3.5 - total)
    assert float(take_in(as_episodes(rows, env.task, torch.device("cpu")), env, 1000)) == pytest.approx(worth, abs=1e-5)
    first = ReST(env, model, dataset=rows, device="cpu").collect()
    assert float(first.rewards.sum()) == pytest.approx(worth, abs=1e-5)
    for kind in (BPO, ReST):
        found = kind(env, model, dataset=rows, device="cpu").collect().ref_logprobs
        assert float(found[0].sum()) == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("either RUN or --env must be given", ["collect", "--dataset", "x"]),
        ("either RUN or --env must be given", ["ope", "absent", *COPY, "--dataset", "x"]),
        ("--kl-coef goes with --env; a RUN has its own", ["ope", "absent", "--kl-coef", "1", "--dataset", "x"]),
        ("--kl-coef goes with --env; a RUN has its own", ["collect", "absent", "--kl-coef", "0", "--dataset", "x"]),
        ("RUN must be the --log-dir of a textrl train", ["collect", "absent", "--dataset", "x"]),
        ("episodes must be at least 1; got 0", ["collect", *COPY, "--episodes", "0", "--dataset", "x"]),
        ("dataset must be a Minari dataset's folder or id", ["ope", *COPY, "--dataset", "absent"]),
        ("confidence must be above 0 and below 1; got 2.0", ["ope", *COPY, "--dataset", "x", "--confidence", "2"]),
    ],
)
def test_what_is_wrong_is_one_line(message, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_is_not_written_over(logged, capsys):
    code, _, err = run(capsys, "collect", *COPY, "--dataset", logged)
    assert code == 2 and "dataset must be a new folder" in err


def test_episodes_of_a_shorter_horizon_are_no_episodes_of_a_longer_one(logged, capsys):
    longer = ["--env", "textrl/Copy-v0", "--env-arg", "symbols=ab", "--env-arg", "length=4"]
    code, _, err = run(capsys, "ope", *longer, "--dataset", logged)
    assert code == 2 and "dataset must be" in err


def test_episodes_that_stop_short_are_refused_or_warned_of():
    env = gym.make("textrl/Vowels-v0", length=3)
    rows = [{"prompt": "", "completion_ids": [1, 2], "score": 1.0, "logprobs": [-1.0, -1.0]}] * 4
    said = r"dataset must be episodes that end with the end token or after max_new_tokens=3 tokens; got '4 of 4"
    with pytest.raises(ValueError, match=said):
        ope(rows, small_model(env.unwrapped.task.vocab_size, 16), env)
    with pytest.warns(UserWarning, match="4 of 4 logged episodes end before the end token and before max_new_tokens=3"):
        BPO(env, dataset=rows)


def test_a_reference_has_a_weight_where_none_is_given(logged, tmp_path, capsys):
    task = gym.make("textrl/Copy-v0", length=2, symbols="ab").unwrapped.task
    textrl.tabular_model(task, std=1.0, seed=3).save_pretrained(tmp_path / "reference")
    flags = ["--reference", tmp_path / "reference", "--dataset", logged, "--penalised", "--json"]
    found = [
        json.loads(run(capsys, "ope", *COPY, *flags, *more)[1]) for more in ([], ["--kl-coef", 0.1], ["--kl-coef", 0])
    ]
    default, given, none = (each["estimates"]["wis"]["value"] for each in found)
    assert default == given != none
