"""Which way imports point, and what `import textrl` does not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import textrl
import textrl.agents
import textrl.envs

ROOT = Path(__file__).parents[1]
FOLDERS = {"textrl": Path(textrl.__file__).parent, "agents": Path(textrl.agents.__file__).parent}
FOLDERS["envs"] = Path(textrl.envs.__file__).parent
FILES = [(name, file) for name, folder in FOLDERS.items() for file in sorted(folder.glob("*.py"))]
MAY_REACH_AGENTS = {"cli.py", "__init__.py"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


@pytest.mark.parametrize(("package", "file"), FILES, ids=lambda x: getattr(x, "name", x))
def test_imports_point_one_way(package, file):
    names = imported(file)
    if package == "envs":
        assert not {n for n in names if n.startswith("textrl.agents")}
    if package == "agents":
        assert not {n for n in names if n.startswith("textrl.envs")}
    if package == "textrl":
        assert not {n for n in names if n.startswith((".envs", "textrl.envs"))}
        if file.name not in MAY_REACH_AGENTS:
            assert not {n for n in names if n.startswith((".agents", "textrl.agents"))}
        assert not {n for n in names if n.startswith("textrl.") and not n.startswith("textrl.agents")}, "use relative"


def test_the_check_reads_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from textrl.agents.ppo import PPO\nimport a.b\nfrom . import c\n")
    assert imported(file) == {"textrl.agents.ppo", "a.b", "."}


def run(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)


def test_import_textrl_is_quick():
    code = "import sys, textrl; print([m for m in ('torch', 'transformers', 'datasets', 'rich') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_lazy_names_resolve_and_unknown_ones_do_not():
    assert all(getattr(textrl, name) is not None for name in textrl.__all__)
    assert set(textrl._LAZY) <= set(textrl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Agend'"):
        _ = textrl.Agend


@pytest.mark.parametrize("name", ["agents", "envs"])
def test_the_folders_refuse_their_bare_names(name):
    result = run(f"import {name}", cwd=ROOT)
    assert f"import this package as textrl.{name}" in result.stderr


def test_gym_make_imports_textrl_by_itself():
    result = run("import gymnasium as gym; print(gym.make('textrl:textrl/Copy-v0').reset(seed=0)[0].shape)")
    assert result.stdout.strip() == "(8,)", result.stderr


def test_the_package_is_its_command_line():
    result = subprocess.run([sys.executable, "-m", "textrl", "agents", "ppo"], capture_output=True, text=True)
    assert result.stdout.startswith("PPO") and result.returncode == 0, result.stderr
