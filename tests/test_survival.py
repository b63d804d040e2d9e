"""Runs at the command line that are stopped by signals, and training that goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import textrl
from textrl.failures import TrainingError
from textrl.runs import Checkpoints

FLAGS = ["--env", "textrl/Copy-v0", "--batch-size", "16", "--total-timesteps", "1500", "--checkpoint-every", "60"]


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "textrl.cli", "train", *arguments, "--quiet"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.slow
def test_signals_end_the_iteration_and_the_run_goes_on(tmp_path):
    """SIGTERM, SIGINT and SIGKILL one after the other; then to the end."""
    whole = start("reinforce", *FLAGS, "--log-dir", str(tmp_path / "whole"))
    assert whole.wait() == 0
    run = tmp_path / "run"
    process = start("reinforce", *FLAGS, "--log-dir", str(run))
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = max(Checkpoints(run, 2).steps(), default=0)
        while max(Checkpoints(run, 2).steps(), default=0) <= before:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == code
        assert "Traceback" not in process.stderr.read()
        process = start("--resume", str(run))
    assert process.wait() == 0
    for file in ("progress.csv", "final/model.safetensors"):
        assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_if_nobody_had_killed_them():
    """A few of what `python tests/kills.py` does for every agent."""
    harness = [sys.executable, str(Path(__file__).with_name("kills.py")), "--kills", "2"]
    ended = subprocess.run([*harness, "--agents", "ppo", "trpo", "dpo"], capture_output=True, text=True)
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [each["wrong"] for each in found] == [[], [], []], ended.stderr
    assert ended.returncode == 0
    assert sum(each["kills"] for each in found) > 0


class Broken(textrl.Agent):
    """Its loss is NaN from the third update on."""

    def update(self, rollout):
        factor = float("nan") if self.num_updates >= 2 else 1.0

        def loss(batch):
            return self.logprobs(batch).mean() * factor, {}

        return self.minimise(loss, rollout)


def test_a_loss_that_is_not_finite_stops_the_run_after_three(tmp_path):
    env = textrl.TextEnv(textrl.registration.make_task("textrl.envs.copy:Copy"))
    agent = Broken(env, batch_size=4)
    with pytest.raises(TrainingError, match=r"3 iterations in a row .*the last good checkpoint is .*step-0") as caught:
        agent.learn(10_000, log_dir=tmp_path, checkpoint_every=1)
    assert "\n" not in str(caught.value)
    assert agent.num_updates == 5
    assert agent.optimizer.skipped == 3
    assert all(torch.isfinite(p).all() for p in agent.model.parameters())


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), 3e38], ids=["nan", "inf", "finite weights"])
def test_weights_that_a_step_has_spoilt_are_not_saved(tmp_path, spoilt):
    env = textrl.TextEnv(textrl.registration.make_task("textrl.envs.copy:Copy"))
    agent = textrl.agents.REINFORCE(env, batch_size=4)

    def spoil(agent, metrics):
        if agent.num_updates == 3:
            with torch.no_grad():
                agent.model.transformer.ln_f.weight.fill_(spoilt)
                agent.model.transformer.wte.weight.fill_(2.0)

    with pytest.raises(TrainingError, match=r"not finite after 3 iterations; the last good checkpoint is .*step-0"):
        agent.learn(10_000, log_dir=tmp_path, checkpoint_every=1, callback=spoil)
    for folder in (tmp_path / "checkpoints").iterdir():
        assert textrl.agents.REINFORCE.load(folder, env).generate(["a"])


def test_a_token_that_is_never_said_is_not_taken_for_broken_weights(tmp_path):
    task = textrl.registration.make_task("textrl.envs.copy:Copy")
    model = textrl.tabular_model(task)
    with torch.no_grad():
        model.lm_head.weight[1] = -torch.inf
    agent = textrl.agents.REINFORCE(textrl.TextEnv(task), model, batch_size=4, learning_rate=0.1)
    assert agent.learn(100, log_dir=tmp_path, checkpoint_every=20).num_timesteps >= 100
