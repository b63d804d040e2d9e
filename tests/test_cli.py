"""The command line: what it prints, what it leaves, and one line for what the user got wrong."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import gymnasium as gym
import pytest

from textrl import agents, cli
from textrl.agents import BestOfN
from textrl.cli_flags import field_comments
from textrl.models import small_model
from textrl.plugins import agent_classes
from textrl.registration import registered


def run(capsys, *arguments):
    code = cli.main(list(arguments))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_envs_lists_every_id(capsys):
    code, out, _ = run(capsys, "envs")
    assert code == 0
    assert all(id in out for id in registered() if id.startswith("textrl/"))
    line = next(line for line in out.splitlines() if "textrl/Copy-v0" in line)
    assert re.search(r"\s4\s+4\s+121\s", line), "vocabulary, horizon, responses"


def test_agents_lists_every_agent_with_its_paper(capsys):
    code, out, _ = run(capsys, "agents")
    assert code == 0
    assert re.search(r"ppo +PPO: .*Schulman 2017", out)
    assert all(name.lower() in out for name in agent_classes())


def test_the_page_of_an_environment_and_of_an_agent(capsys, tmp_path, monkeypatch):
    code, out, _ = run(capsys, "envs", "textrl/Copy-v0")
    assert code == 0 and out.startswith("textrl/Copy-v0\n\nRepeat the prompt") and "What it teaches: credit" in out
    assert "symbols: the alphabet" in out
    code, out, _ = run(capsys, "agents", "ppo")
    assert code == 0 and "ratio  = pi(a | s) / pi_old(a | s)" in out
    (tmp_path / "paged.py").write_text(
        'import textrl\nfrom textrl.envs.copy import Copy\nclass Paged(Copy):\n    """What it says."""\n'
        "textrl.register('test/Paged-v0', Paged)\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "envs", "paged:test/Paged-v0")  # which is not registered before
    assert code == 0 and out == "paged:test/Paged-v0\n\nWhat it says.\n"
    for command in ("envs", "agents"):
        code, out, err = run(capsys, command, "Cooopy")
        assert (code, out) == (2, "") and err.startswith(f"textrl: error: unknown {command[:-1]} 'Cooopy'; ")


def test_places_that_cannot_be_folders_are_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.json").write_text("{}")
    train = ["train", "ppo", *COPY, "--log-dir"]
    collect = ["collect", *COPY, "--episodes", "2", "--dataset"]
    places = [(train, "file"), (train, "file/x")]
    if importlib.util.find_spec("minari"):
        places += [(collect, "file"), (collect, "full")]
    if importlib.util.find_spec("gguf"):
        places.append((["rlhf", "--log-dir"], "file"))
    for command, place in places:
        code, out, err = run(capsys, *command, str(tmp_path / place))
        assert (code, out) == (2, "") and re.match(r"textrl: error: (--log-dir|dataset|log_dir) must be a", err), err
        assert err.count("\n") == 1


def test_an_agent_with_another_constructor_is_told_what_is_called(capsys, tmp_path, monkeypatch):
    (tmp_path / "odd.py").write_text(
        "import textrl\nclass Odd(textrl.Agent):\n    def __init__(self, env, model=None, *, decay=0.9, **settings):\n"
        "        super().__init__(env, model, **settings)\n    def update(self, rollout):\n        return {}\n"
    )
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, "train", "odd:Odd", *COPY)
    assert code == 2 and err.startswith(
        "textrl: error: agent odd:Odd must be made as Odd(env, model, config, **settings)"
    )


def test_a_reader_who_has_read_enough_is_no_error():
    command = [sys.executable, "-c", "import sys; from textrl.cli import main; sys.exit(main(['agents', 'ppo']))"]
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (found.returncode, found.stderr) == (0, "")


def test_train_then_evaluate(capsys, tmp_path):
    folder = str(tmp_path / "run")
    flags = ["--env", "textrl/Copy-v0", "--env-arg", "length=2", "--env-arg", "symbols=ab", "--batch-size", "16"]
    train = ["train", "ppo", *flags, "--total-timesteps", "300", "--log-dir", folder, "--clip-coef", "0.1"]
    code, out, err = run(capsys, *train)
    assert (code, err) == (0, "")
    assert "iter" in out
    assert json.loads((tmp_path / "run/final/agent.json").read_text())["config"]["clip_coef"] == 0.1
    assert {"run.json", "progress.csv", "final"} <= {p.name for p in (tmp_path / "run").iterdir()}
    code, out, _ = run(capsys, "evaluate", folder, "--episodes", "50", "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["episodes"] == 50
    assert 0 <= figures["score"] <= 1
    code, _, err = run(capsys, *train)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds a run already" in err


def test_an_agent_that_acts_in_a_way_of_its_own_is_scored_as_it_acts(capsys, tmp_path):
    folder = str(tmp_path / "run")
    flags = ["--env", "textrl/Bandit-v0", "--batch-size", "64", "--n", "8", "--total-timesteps", "100", "--quiet"]
    assert run(capsys, "train", "bestofn", *flags, "--log-dir", folder)[0] == 0
    best = json.loads(run(capsys, "evaluate", folder, "--json")[1])
    agent = BestOfN.load(f"{folder}/final", gym.make_vec("textrl/Bandit-v0", num_envs=1), n=1)
    single = agent.respond([agent.task.sample(agent.rng) for _ in range(1000)])
    assert best["score"] > float(single.scores.mean()) + 0.2


def test_a_setting_of_several_numbers(capsys, tmp_path):
    flags = ["--env", "textrl/Bandit-v0", "--batch-size", "8", "--total-timesteps", "10", "--quiet"]
    folder = str(tmp_path / "run")
    assert run(capsys, "train", "rest", *flags, "--log-dir", folder, "--quantiles", "0.2", "0.6")[0] == 0
    assert json.loads((tmp_path / "run/final/agent.json").read_text())["config"]["quantiles"] == [0.2, 0.6]
    assert run(capsys, "evaluate", folder)[0] == 0


def test_a_best_score_of_zero_has_no_share(capsys, tmp_path):
    folder = str(tmp_path / "run")
    flags = ["--env", "textrl/Bandit-v0", "--env-arg", "payoffs=[-1, -2]", "--batch-size", "8"]
    flags += ["--total-timesteps", "10", "--quiet"]
    assert run(capsys, "train", "ppo", *flags, "--log-dir", folder)[0] == 0
    code, out, _ = run(capsys, "evaluate", folder, "--json")
    assert code == 0 and "share_of_best" not in json.loads(out)


def test_an_agent_of_ones_own(capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import textrl\n"
        "class Nothing(textrl.Agent):\n"
        "    def update(self, rollout):\n"
        "        return {'train/seen': float(len(rollout))}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    code, _, err = run(
        capsys, "train", "mine:Nothing", "--env", "textrl/Vowels-v0", "--total-timesteps", "10", "--quiet"
    )
    assert (code, err) == (0, "")
    assert (tmp_path / "runs/vowels-v0-nothing-0/final/agent.json").exists()


COPY = ["--env", "textrl/Copy-v0"]
BAD = {
    "unknown env 'textrl/Copi-v0'; did you mean textrl/Copy-v0": ["train", "ppo", "--env", "textrl/Copi-v0"],
    "unknown agent 'poo'; did you mean ppo": ["train", "poo", *COPY],
    "--env is missing": ["train", "ppo"],
    "agent 'nowhere:X' cannot be imported": ["train", "nowhere:X", *COPY],
    "agent must be a subclass of textrl.Agent": ["train", "textrl.task:Task", *COPY],
    "model must be a folder that exists, or a hub name; got 'no/such/folder'": [
        "train",
        "ppo",
        *COPY,
        "--model",
        "no/such/folder",
    ],
    "model 'no/such' is neither a folder nor a hub name in reach": ["train", "ppo", *COPY, "--model", "no/such"],
    "reference must be a folder that exists, or a hub name; got 'no/such/folder'": [
        "train",
        "ppo",
        *COPY,
        "--reference",
        "no/such/folder",
    ],
    "kl_coef=0.1 needs a reference": ["train", "ppo", *COPY, "--kl-coef", "0.1"],
    "--total-timesteps must be at least 1; got 0": ["train", "ppo", *COPY, "--total-timesteps", "0"],
    "--env-arg must be NAME=VALUE; got 'length'": ["train", "ppo", *COPY, "--env-arg", "length"],
    "Copy got an unexpected keyword argument 'lengh'": ["train", "ppo", *COPY, "--env-arg", "lengh=3"],
    "clip_coef must be above 0 and below 1; got 3.0": ["train", "ppo", *COPY, "--clip-coef", "3"],
    "dataset must be a file that exists": ["train", "sft", *COPY, "--dataset", "absent.jsonl"],
    "--resume must be the --log-dir of a textrl train; 'absent' has no run.json": ["train", "--resume", "absent"],
    "--resume takes everything from the run: leave out ppo\n": ["train", "ppo", "--resume", "absent"],
    "--resume takes everything from the run: leave out --total-timesteps --clip-coef 0.1": [
        *("train", "--resume", "absent", "--total-timesteps", "5", "--clip-coef", "0.1"),
    ],
    "--skip-bad-rows must be left out without --prompts": ["train", "ppo", *COPY, "--skip-bad-rows"],
    "--env-arg prompts must be left out with --prompts": [
        *("train", "ppo", "--env", "textrl/Text-v0", "--prompts", "p.jsonl"),
        *("--env-arg", 'prompts=["a"]'),
    ],
    "AGENT is missing": ["train", *COPY],
    "--keep must be at least 1; got 0": ["train", "ppo", *COPY, "--keep", "0"],
    "RUN must be the --log-dir of a textrl train": ["evaluate", "absent"],
    "minutes must be above 0; got 0.0": ["rlhf", "--minutes", "0"],
    "model must be a folder that exists, or a hub name; got './absent'": ["rlhf", "--model", "./absent"],
    "minutes must be a finite number; got inf": ["rlhf", "--minutes", "inf"],
    "temperature must be above 0; got -1.0": ["rlhf", "--temperature", "-1"],
    "ppo_learning_rate must be at least 0; got -1.0": ["rlhf", "--ppo-learning-rate", "-1"],
    "ppo_epochs must be from 1 to 1,000,000,000; got 0": ["rlhf", "--ppo-epochs", "0"],
    "log_dir must be a path; got ''": ["rlhf", "--log-dir", ""],
    "--dataset must be given for SFT to learn": ["train", "sft", *COPY],
    "--dataset must be given for DPO to learn": ["train", "dpo", *COPY],
    "--env-arg kl_coef is a flag of its own: --kl-coef": ["train", "ppo", *COPY, "--env-arg", "kl_coef=nan"],
    "--env-arg id is a flag of its own: --env": ["train", "ppo", *COPY, "--env-arg", "id=x"],
    "--env-arg task is not to be given": ["train", "ppo", *COPY, "--env-arg", "task=textrl.envs.vowels:Vowels"],
    "--env-arg vector_kwargs is not to be given": ["train", "ppo", *COPY, "--env-arg", "vector_kwargs=3"],
    "--env-arg num_envs is not to be given": ["train", "ppo", *COPY, "--env-arg", "num_envs=3"],
    "--env-arg length is JSON too deeply nested": ["train", "ppo", *COPY, "--env-arg", "length=" + "[" * 100_000],
    "length must be from 1 to 1,000; got 1000000000": ["train", "ppo", *COPY, "--env-arg", "length=1000000000"],
    "agent 'textrl.agent:Agent' must define update(rollout)": ["train", "textrl.agent:Agent", *COPY],
    "num_envs must be a whole number from 1 to 1,000,000,000": ["train", "ppo", *COPY, "--batch-size", "9" * 30],
    "got 'meta' (it holds no numbers)": ["train", "ppo", *COPY, "--device", "meta"],
    "--settings lists settings and takes none; got 'x'": ["train", "ppo", "--settings", "x"],
    "dataset must be a path; got ''": ["collect", *COPY, "--dataset", ""],
    "unknown env ''": ["play", ""],
    "--log-dir must be a path; got ''": ["train", "ppo", *COPY, "--log-dir", ""],
    "model must be a folder or hub name; got ''": ["rlhf", "--model", ""],
}


@pytest.mark.parametrize("message", BAD)
def test_what_the_user_got_wrong_is_one_line_and_writes_nothing(message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(capsys, *BAD[message])
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["nope"], ["train"], ["train", "ppo", *COPY, "--clip-coef", "x"], ["envs", "--x"]]
)
def test_wrong_usage_exits_with_2_and_one_line(arguments, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert capsys.readouterr().err.count("\n") == 1


RUNS = [["train", "--resume"], ["evaluate"], ["report"], ["play", "--run"], ["collect", "--dataset", "new"]]


@pytest.mark.parametrize("command", RUNS, ids=" ".join)
def test_files_that_no_run_wrote_are_one_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/run.json").write_text("[" * 100_000)
    code, _, err = run(capsys, *command, "deep")
    assert (code, err.count("\n")) == (2, 1)
    assert "deep" in err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "run.json"]


def test_a_file_of_prompts_that_leads_nowhere_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    code, _, err = run(capsys, "train", "ppo", "--env", "textrl/Text-v0", "--prompts", "loop.jsonl")
    assert (code, err.count("\n")) == (2, 1), err
    assert "prompts must be a file that exists" in err


@pytest.mark.parametrize("command", [["train", "bpo"], ["ope"]], ids=" ".join)
def test_a_folder_that_is_no_dataset_is_one_line(command, capsys, tmp_path):
    pytest.importorskip("minari")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/main_data.hdf5").write_text("junk")
    (tmp_path / "data/metadata.json").write_text("{}")
    code, _, err = run(capsys, *command, *COPY, "--dataset", str(tmp_path))
    assert (code, err.count("\n")) == (2, 1), err
    assert "cannot be read as a Minari dataset" in err


def test_a_run_of_relative_paths_is_loaded_from_anywhere(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    env = ["--env", "textrl/Text-v0", "--prompts", "p.jsonl", "--env-arg", "max_new_tokens=3"]
    first = ["train", "reinforce", *env, "--batch-size", "4", "--total-timesteps", "10", "--quiet"]
    assert run(capsys, *first, "--log-dir", "one")[0] == 0
    given = ["--model", "one/final", "--reference", "one/final"]
    assert run(capsys, *first, *given, "--log-dir", "two")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, err = run(capsys, "evaluate", str(tmp_path / "two"))
    assert (code, err) == (0, "") and "score" in out


def test_the_name_of_a_run_cannot_write_to_the_terminal(capsys, tmp_path):
    folder = str(tmp_path / "run\x1b[31m\u202e")
    few = ["--total-timesteps", "10", "--batch-size", "4", "--quiet"]
    for arguments in (["train", "ppo", *COPY, *few, "--log-dir", folder], ["train", "--resume", folder]):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        assert r"run\x1b[31m" in out
        assert not {"\x1b", "\u202e"} & set(out)


def test_an_environment_keeps_the_reference_that_it_was_registered_with(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    small_model(4, 16).save_pretrained(tmp_path / "M")
    (tmp_path / "penalised.py").write_text(
        "import textrl\n"
        "from textrl.envs.copy import Copy\n"
        f"textrl.register('test/Penalised-v0', Copy, reference={str(tmp_path / 'M')!r}, kl_coef=0.5)\n"
    )
    (tmp_path / "broken.py").write_text("nothing\n")
    flags = ["--env", "penalised:test/Penalised-v0", "--batch-size", "8", "--quiet", "--total-timesteps"]
    assert run(capsys, "train", "reinforce", *flags, "40", "--log-dir", "run")[0] == 0
    assert "rollout/kl_reference" in (tmp_path / "run/progress.csv").read_text()
    assert json.loads((tmp_path / "run/final/agent.json").read_text())["kl_coef"] == 0.5
    assert run(capsys, "train", "reinforce", *flags, "40", "--kl-coef", "0.1", "--log-dir", "other")[0] == 0
    assert json.loads((tmp_path / "other/final/agent.json").read_text())["kl_coef"] == 0.1
    assert "no reference" not in run(capsys, "doctor", "penalised:test/Penalised-v0")[1]
    code, _, err = run(capsys, "train", "reinforce", "--env", "broken:test/Broken-v0")
    assert code == 2 and "env 'broken:test/Broken-v0' cannot be imported: NameError: name 'nothing'" in err
    assert "test/Penalised-v0" in run(capsys, "envs")[1]


def test_one_episode_has_no_standard_error(capsys, tmp_path):
    flags = ["--total-timesteps", "20", "--log-dir", str(tmp_path / "run"), "--quiet"]
    assert run(capsys, "train", "reinforce", *COPY, *flags)[0] == 0
    for episodes, known in (("1", False), ("2", True)):
        out = json.loads(run(capsys, "evaluate", str(tmp_path / "run"), "--episodes", episodes, "--json")[1])
        assert ("score_standard_error" in out) == known


def test_a_run_that_failed_at_once_does_not_stand_in_the_way(capsys, tmp_path):
    folder = str(tmp_path / "run")
    flags = [
        "--env",
        "textrl/Dice-v0",
        "--env-arg",
        "spreads=[1, 1]",
        "--total-timesteps",
        "20",
        "--quiet",
        "--log-dir",
        folder,
    ]
    assert run(capsys, "train", "reinforce", *flags, "--env-arg", 'means=[0.1, "x"]')[0] == 2
    assert run(capsys, "train", "reinforce", *flags, "--env-arg", "means=[0.1, 0.2]")[0] == 0
    code, _, err = run(capsys, "train", "reinforce", *flags, "--env-arg", "means=[0.1, 0.2]")
    assert code == 2 and "holds a run already" in err


@pytest.mark.parametrize("name", agents.__all__)
def test_every_setting_of_an_agent_has_its_comment_as_help(name):
    config_class = getattr(agents, name).config_class
    comments = field_comments(config_class)
    assert [field.name for field in dataclasses.fields(config_class) if not comments.get(field.name)] == []


FAULTY = '''import textrl
from textrl.envs.copy import Copy


class Faulty(Copy):
    """No score for what begins with b."""

    deterministic = False

    def score(self, prompts, completions, **columns):
        return [float("nan") if text.startswith("b") else 1.0 for text in completions]


class Needs(Copy):
    def __init__(self, x):
        super().__init__()


textrl.register("faulty/Faulty-v0", Faulty)
textrl.register("faulty/Needs-v0", Needs)
'''


def test_dropped_episodes_are_not_counted_when_a_run_is_evaluated(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faulty.py").write_text(FAULTY)
    for agent in ("reinforce", "bestofn"):
        command = f"train {agent} --env faulty:faulty/Faulty-v0 --total-timesteps 60 --batch-size 16 --quiet"
        command += f" --on-score-error drop --max-dropped-share 1 --log-dir {agent}"
        assert run(capsys, *command.split())[0] == 0
        code, out, _ = run(capsys, "evaluate", agent, "--episodes", "200", "--json")
        found = json.loads(out)
        assert code == 0 and found["dropped"] > 0 and found["score"] == 1.0
        assert agent == "bestofn" or found["episodes"] + found["dropped"] == 200  # that drops samples of an episode


def test_a_task_that_needs_an_argument_is_told(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faulty.py").write_text(FAULTY)
    code, _, err = run(capsys, "train", "ppo", "--env", "faulty:faulty/Needs-v0", "--log-dir", "run")
    assert code == 2 and "Needs cannot be made with {}: missing a required argument: 'x'" in err


def test_a_run_under_a_time_limit_is_evaluated_under_it(capsys, tmp_path):
    command = "train reinforce --env textrl/Vowels-v0 --env-arg max_episode_steps=2 --total-timesteps 60 --quiet"
    assert run(capsys, *command.split(), "--log-dir", str(tmp_path / "run"))[0] == 0
    code, out, _ = run(capsys, "evaluate", str(tmp_path / "run"), "--episodes", "50", "--json")
    assert code == 0 and 0 < json.loads(out)["response_length"] <= 2


def test_numbers_and_folders_that_cannot_be_are_told(capsys):
    code, _, err = run(capsys, "train", "ppo", "--env", "textrl/Copy-v0", "--log-dir", "/proc/none")
    assert code == 2 and "log_dir must be a folder that can be written; got '/proc/none'" in err
    with pytest.raises(SystemExit):
        run(capsys, "train", "ppo", "--env", "textrl/Copy-v0", "--total-timesteps", "1e400000")
    assert "must be below 1e19; got" in capsys.readouterr().err
