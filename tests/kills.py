"""Runs of every agent killed with SIGKILL at random moments and resumed: `PYTHONPATH=. python tests/kills.py`.

A run is `textrl train` in a process of its own, forked from one that has imported everything, so that it is killed
where it works and not where it imports. What must come out is what the run would have written had nobody killed it: the
same weights and the same rows, byte for byte, with every checkpoint on the way readable.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from textrl import cli
from textrl.folders import verify
from textrl.plugins import agent_classes
from textrl.runs import Checkpoints

ROWS = [{"prompt": a + b, "completion": b + a, "score": (a < b) / 2} for a in "abc" for b in "abc"]
PAIRS = [{"prompt": a + b, "chosen": a + b, "rejected": b + "c"} for a in "abc" for b in "ab"]
DATASETS = {"sft": ROWS, "bpo": ROWS, "dpo": PAIRS}
FLAGS = ["--env", "textrl/Copy-v0", "--batch-size", "8", "--checkpoint-every", "1", "--quiet"]
TIMESTEPS = {"rest": 1200}
MORE = {"rest": ["--grow-batches", "2"], "bestofn": ["--n", "4"], "nlpo": ["--mask-interval", "2"]}


def start(arguments, errors):
    """Forks a `textrl` with these arguments; its stderr goes to a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(file, 2)
        code = cli.main(arguments)
    finally:
        os._exit(code)


def finish(pid):
    """The exit code of a forked run, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(run):
    """What a finished run wrote that must not depend on interruptions."""
    files = [*sorted((run / "final").rglob("*.safetensors")), run / "progress.csv"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def arguments_of(agent, folder):
    """The command line of a small run."""
    arguments = ["train", agent, *FLAGS, *MORE.get(agent, [])]
    arguments += ["--total-timesteps", str(TIMESTEPS.get(agent, 160))]
    if agent in DATASETS:
        file = folder / f"{agent}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in DATASETS[agent]), encoding="utf-8")
        arguments += ["--dataset", str(file)]
    return arguments


def begun_or_resumed(arguments, run):
    """The command line that begins a run, or goes on with it once it has begun."""
    begun = (run / "run.json").exists()
    return ["train", "--resume", str(run), "--quiet"] if begun else [*arguments, "--log-dir", str(run)]


def unreadable(run):
    """Checkpoints of a killed run that are not whole; leftovers under names with a dot are none."""
    found = []
    for step in Checkpoints(run, 2).steps():
        try:
            verify(Checkpoints(run, 2).path(step))
        except ValueError as error:
            found.append(str(error))
    return found


def kill_runs(agent, runs, folder, seed=0):
    """Kills `runs` runs of an agent, each up to three times; returns counts, and what went wrong."""
    rng = random.Random(f"{agent} {seed}")
    arguments = arguments_of(agent, folder)
    errors = folder / f"{agent}.err"
    began = time.monotonic()
    code = finish(start([*arguments, "--log-dir", str(folder / f"{agent}-whole")], errors))
    length = time.monotonic() - began
    if code:
        raise RuntimeError(f"{agent} does not run: {errors.read_text()}")
    right = outcome(folder / f"{agent}-whole")
    kills = resumed = 0
    wrong = []
    for number in range(runs):
        run = folder / f"{agent}-{number}"
        killed = 0
        while not killed:  # one that was done before it could be killed does not count
            shutil.rmtree(run, ignore_errors=True)
            for _ in range(rng.randint(1, 3)):
                pid = start(begun_or_resumed(arguments, run), errors)
                time.sleep(rng.uniform(0.1, 1.0) * length)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                killed += finish(pid) == -signal.SIGKILL
                wrong += [f"run {number}: {each}" for each in unreadable(run)]
        kills += killed
        resumed += bool(Checkpoints(run, 2).steps())
        code = finish(start(begun_or_resumed(arguments, run), errors))
        if code or outcome(run) != right:
            wrong.append(f"run {number}: exit code {code}, other bytes")
    said = errors.read_text() if errors.exists() else ""
    if said:
        wrong.append(f"stderr: {said[:500]}")
    return {"agent": agent, "runs": runs, "kills": kills, "from a checkpoint": resumed, "wrong": wrong}


def main():
    """Prints a line for each agent; exits with 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="runs of each agent")
    parser.add_argument("--agents", nargs="*", default=sorted(name.lower() for name in agent_classes()))
    options = parser.parse_args()
    cli.quiet_libraries()
    failed = False
    for agent in options.agents:
        with tempfile.TemporaryDirectory() as folder:
            found = kill_runs(agent, options.kills, Path(folder))
        print(json.dumps(found), flush=True)
        failed |= bool(found["wrong"])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
