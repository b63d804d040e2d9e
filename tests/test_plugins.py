"""Agents of other packages, found by the entry-point group `textrl.agents`; rewards by their names."""

import sys

import gymnasium as gym
import pytest

import textrl
from textrl import cli
from textrl.agents import PPO
from textrl.models import small_model
from textrl.plugins import agent_class, agent_classes
from textrl.rewards import RewardModel

CODE = '''"""Waits: learns nothing (Nobody 2026)."""

import textrl


class Waits(textrl.Agent):
    def update(self, rollout):
        return {"train/seen": float(len(rollout))}
'''


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with an agent, as pip would leave it: the module and its metadata on the path."""
    site = tmp_path / "site"
    (site / "waiting-1.0.dist-info").mkdir(parents=True)
    (site / "waiting.py").write_text(CODE)
    (site / "waiting-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: waiting\nVersion: 1.0\n")
    (site / "waiting-1.0.dist-info/entry_points.txt").write_text("[textrl.agents]\nWaits = waiting:Waits\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "waiting", raising=False)
    monkeypatch.chdir(tmp_path)


def test_an_installed_agent_is_listed_and_trains_by_its_name(installed, tmp_path, capsys):
    assert agent_classes()["Waits"] is agent_class("waits") is agent_class("waiting:Waits")
    assert cli.main(["agents"]) == 0
    assert "waits        Waits: learns nothing (Nobody 2026)." in capsys.readouterr().out
    command = "train waits --env textrl/Copy-v0 --total-timesteps 10 --batch-size 4 --log-dir run --quiet"
    assert cli.main(command.split()) == 0
    assert cli.main(["evaluate", "run", "--episodes", "5"]) == 0
    assert (tmp_path / "run/final/agent.json").exists()


def test_without_the_package_the_agent_is_unknown(capsys):
    assert "Waits" not in agent_classes()
    assert cli.main(["train", "waits", "--env", "textrl/Copy-v0"]) == 2
    assert "unknown agent 'waits'" in capsys.readouterr().err


def test_a_package_that_breaks_is_named_and_the_others_work(installed, tmp_path, capsys):
    (tmp_path / "site/waiting.py").write_text("raise RuntimeError('out of order')\n")
    assert cli.main(["agents"]) == 0
    found = capsys.readouterr()
    assert "ppo " in found.out and "waits" not in found.out
    assert "warning: agent 'waiting:Waits' cannot be imported: out of order" in found.err
    assert cli.main(["train", "waits", "--env", "textrl/Copy-v0"]) == 2
    assert capsys.readouterr().err == "textrl: error: agent 'waiting:Waits' cannot be imported: out of order\n"


def test_a_package_does_not_take_the_place_of_an_agent_of_ours(installed, tmp_path, capsys):
    (tmp_path / "site/waiting-1.0.dist-info/entry_points.txt").write_text("[textrl.agents]\nppo = waiting:Waits\n")
    assert agent_class("ppo") is PPO
    assert cli.main(["agents"]) == 0
    found = capsys.readouterr()
    assert found.out.count("ppo ") == 1
    assert "warning: agent 'waiting:Waits' of another package is called 'ppo' as one of textrl is" in found.err


def test_a_reward_is_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_rewards.py").write_text(
        "def long(prompts, completions, **_):\n    return list(map(len, completions))\n"
    )
    run = "train reinforce --env textrl/Text-v0 --total-timesteps 30 --batch-size 4 --quiet --env-arg max_new_tokens=5"
    assert cli.main([*run.split(), "--env-arg", "reward=mine_rewards:long", "--log-dir", "run"]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "run", "--episodes", "5"]) == 0
    assert "mine_rewards" in (tmp_path / "run/run.json").read_text()
    for wrong, said in (
        (
            "mine_rewards:short",
            "reward 'mine_rewards:short' cannot be imported: module 'mine_rewards' has no attribute",
        ),
        ("nowhere_at_all:long", "reward 'nowhere_at_all:long' cannot be imported: No module named 'nowhere_at_all'"),
        (str(tmp_path), "holds no reward model"),
        ("7", "reward must be a function of prompts and completions, or name one: module:function, the folder of a"),
    ):
        capsys.readouterr()
        assert cli.main([*run.split(), "--env-arg", f"reward={wrong}", "--log-dir", "other"]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_the_folder_of_a_reward_model_names_a_reward(tmp_path):
    tokenizer = textrl.symbol_tokenizer("ab")
    scorer = RewardModel.from_language_model(small_model(3, 32), tokenizer, seed=1)
    scorer.save(tmp_path / "scorer")
    env = gym.make("textrl/Text-v0", tokenizer=tokenizer, prompts=["a"], reward=tmp_path / "scorer", max_new_tokens=2)
    task = env.unwrapped.task
    (score,) = task.score(["a"], ["b"], completion_ids=[[2, 0]])
    assert score == pytest.approx(scorer(["a"], ["b"])[0], abs=1e-6)
