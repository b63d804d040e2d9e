"""The README's code runs as it stands, and its custom agent from the command line too."""

import copy
import io
import re
import sys
import types
from pathlib import Path

import pytest

import textrl
from textrl import cli
from textrl.envs.text import Text
from textrl.models import small_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take as given: a tokenizer, prompts, a reward function, a model."""
    monkeypatch.chdir(tmp_path)
    tokenizer = textrl.symbol_tokenizer("ab ")
    model = small_model(len(tokenizer), 64)
    (tmp_path / "path/or").mkdir(parents=True)
    model.save_pretrained(tmp_path / "path/or/name")
    module = types.ModuleType("readme")
    monkeypatch.setitem(sys.modules, "readme", module)  # so that what it registers can be imported
    module.tok, module.prompts, module.model = tokenizer, ["a", "ab ba"], copy.deepcopy(model)
    module.fn = lambda prompts, completions, **columns: [float(c.count("a")) for c in completions]
    return vars(module)


def test_the_readmes_python_runs(names, capsys):
    assert len(BLOCKS) == 6
    for block in BLOCKS:
        exec(compile(block.replace("100_000", "500"), "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert re.search(r"\['[ae]{5,6}'\]", said), "the agent of twenty lines has learned to say vowels"
    exact = re.search(r"^([\d.]+) ([\d.]+) ([\d.]+)$", said, re.MULTILINE)
    assert 0.9 < float(exact[3]) < 1 and float(exact[2]) < float(exact[1])
    assert re.search(r"Estimate\(value=.* True$", said, re.MULTILINE)
    assert Path("runs/a/final/model.safetensors").exists() and Path("runs/scorer/final/model.safetensors").exists()


def test_the_readmes_agent_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    agent = BLOCKS[1][: BLOCKS[1].index("agent = ")]
    assert agent.strip().count("\n") < 25
    (tmp_path / "mine.py").write_text(agent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    command = "train mine:Plain --env textrl/Copy-v0 --total-timesteps 500 --log-dir runs/mine --quiet"
    assert cli.main(command.split()) == 0
    assert cli.main(["evaluate", "runs/mine", "--episodes", "20"]) == 0
    assert "score" in capsys.readouterr().out


def test_the_readmes_commands_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    pytest.importorskip("minari")
    monkeypatch.chdir(tmp_path)
    task = Text()
    model = small_model(task.vocab_size, 64)
    model.save_pretrained(tmp_path / "M")
    task.tokenizer.save_pretrained(tmp_path / "M")
    block = re.search(r"```bash\n(textrl envs.*?)```", README, re.DOTALL)[1]
    commands = [line.partition("#")[0].split()[1:] for line in block.splitlines()]
    assert [
        command[0] for command in commands
    ] == "envs agents train evaluate report play collect ope doctor rlhf".split()
    smaller = {"50000": "500", "1000": "20"}
    for command in commands[:-1]:
        if command[0] == "ope":
            other = "train bpo --env textrl/Copy-v0 --dataset logged --total-timesteps 200 --log-dir other/run"
            assert cli.main(other.split()) == 0
        monkeypatch.setattr(sys, "stdin", io.StringIO("/go all\n"))
        assert cli.main([smaller.get(word, word) for word in command]) == 0, (command, capsys.readouterr())


def test_the_commands_in_the_readme_exist():
    commands = set(re.findall(r"^textrl (\w+)", README, re.MULTILINE))
    assert commands >= {"envs", "agents", "train", "evaluate", "collect", "ope", "rlhf"}
    for command in commands:
        with pytest.raises(SystemExit) as exit:
            cli.main([command, "--help"])
        assert exit.value.code == 0
