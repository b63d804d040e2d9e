"""Disks that fill up and files that are not what was written: one line that names them, and the run goes on."""

import os
import resource
import shutil
import subprocess
import sys

import pytest

from textrl import cli
from textrl.folders import MANIFEST, CheckpointError, verify
from textrl.models import load_model
from textrl.rewards import RewardModel
from textrl.runs import Checkpoints
from textrl.symbols import symbol_tokenizer

FLAGS = ["--env", "textrl/Copy-v0", "--batch-size", "16", "--total-timesteps", "300", "--checkpoint-every", "60"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and its last checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(["train", "reinforce", *FLAGS, "--log-dir", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def unfinished(run, tmp_path):
    """The same, as it was before it ended."""
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run/final")
    return tmp_path / "run"


def files_of(folder):
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_a_cut_at_every_tenth_and_a_flip_of_any_bit_is_named(run, tmp_path):
    shutil.copytree(run / "final", tmp_path / "a")
    for file in files_of(tmp_path / "a"):
        whole = file.read_bytes()
        damaged = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
        for place in range(0, len(whole), max(1, len(whole) // 7)):
            damaged.append(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        for content in damaged:
            file.write_bytes(content)
            with pytest.raises(CheckpointError, match=file.name) as caught:
                verify(tmp_path / "a")
            assert "\n" not in str(caught.value)
        file.write_bytes(whole)
    verify(tmp_path / "a")


@pytest.mark.parametrize("newest", [True, False], ids=["the newest", "all"])
def test_a_run_goes_on_from_the_checkpoint_before(newest, run, unfinished, capsys):
    checkpoints = Checkpoints(unfinished, 2)
    steps = checkpoints.steps()[:1] if newest else checkpoints.steps()
    for step in steps:
        file = checkpoints.path(step) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    assert cli.main(["train", "--resume", str(unfinished), "--quiet"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(steps)
    assert all("model.safetensors' is damaged" in line for line in said)
    for file in ("progress.csv", "final/model.safetensors"):
        assert (unfinished / file).read_bytes() == (run / file).read_bytes()


def test_nothing_damaged_is_used_silently(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    file = tmp_path / "run/final/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    flags = ["train", "reinforce", *FLAGS, "--model", str(file.parent), "--log-dir", str(tmp_path / "b"), "--quiet"]
    for arguments in (["evaluate", str(tmp_path / "run")], flags):
        assert cli.main(arguments) == 2
        assert "model.safetensors' is damaged: its content is not what was written" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_reward_model_that_is_damaged(run, tmp_path):
    model = RewardModel.from_language_model(load_model(run / "final"), symbol_tokenizer("abc"))
    model.save(tmp_path / "r")
    assert RewardModel.load(tmp_path / "r")(["a"], ["b"]) == model(["a"], ["b"])
    file = tmp_path / "r/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 16
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors' is damaged"):
        RewardModel.load(tmp_path / "r")


@pytest.mark.slow
def test_a_disk_that_is_full_is_one_line_and_the_run_goes_on_later(run, tmp_path):
    """The disk takes no file above so many bytes: the checkpoint's tensors, later the model too, then nearly all."""
    for limit in (600_000, 200_000, 100):
        folder = tmp_path / str(limit)
        arguments = [sys.executable, "-m", "textrl.cli", "train", "reinforce", *FLAGS, "--quiet"]
        ended = subprocess.run(
            [*arguments, "--log-dir", str(folder)], capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),  # noqa: B023
        )  # fmt: skip
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert str(folder) in ended.stderr
        assert not [step for step in Checkpoints(folder, 2).steps() if not (folder / MANIFEST).exists()]
        again = ["train", "--resume", str(folder), "--quiet"]
        if not (folder / "run.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            again = ["train", "reinforce", *FLAGS, "--log-dir", str(folder), "--quiet"]
        assert cli.main(again) == 0
        for file in ("progress.csv", "final/model.safetensors"):
            assert (folder / file).read_bytes() == (run / file).read_bytes()


def test_a_copy_of_a_run_in_which_the_link_is_a_folder_goes_on(run, unfinished, tmp_path, capsys):
    shutil.copytree(unfinished, tmp_path / "copy")
    assert (tmp_path / "copy/best").is_dir() and not (tmp_path / "copy/best").is_symlink()
    shutil.rmtree(tmp_path / "copy/checkpoints" / sorted(os.listdir(tmp_path / "copy/checkpoints"))[-1])
    assert cli.main(["train", "--resume", str(tmp_path / "copy"), "--quiet"]) == 0, capsys.readouterr().err
    assert (tmp_path / "copy/best").is_symlink()
    assert (tmp_path / "copy/progress.csv").read_bytes() == (run / "progress.csv").read_bytes()


def test_a_manifest_that_is_a_list_and_a_changed_number_of_the_run_are_named(unfinished, capsys):
    newest = Checkpoints(unfinished, 2).path(Checkpoints(unfinished, 2).steps()[0])
    (newest / MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify(newest)
    told = unfinished / "run.json"
    told.write_text(told.read_text().replace('"total_timesteps": 300', '"total_timesteps": 301'))
    assert cli.main(["train", "--resume", str(unfinished), "--quiet"]) == 2
    assert "run.json' is damaged: its content is not what was written" in capsys.readouterr().err


def test_a_folder_of_ones_own_is_not_taken_for_a_copy(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best/notes.txt").write_text("mine")
    flags = ["train", "reinforce", *FLAGS, "--log-dir", str(tmp_path), "--quiet"]
    assert cli.main(flags) == 2
    assert (tmp_path / "best/notes.txt").read_text() == "mine"
