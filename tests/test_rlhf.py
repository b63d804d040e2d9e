"""The whole road on a tiny model and made-up ratings: killed in the middle, started again, and its report."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from textrl import agents, cli, reward_training
from textrl.agents.rlhf import RLHFConfig, _Run
from textrl.agents.rlhf_report import ratio

END = "<|endoftext|>"
GOOD, BAD = ["fine", "lovely", "great", "superb"], ["dull", "awful", "weak", "boring"]


def sentences(n):
    """Texts with the mean of their ratings: the more good words, the better."""
    rng = random.Random(0)
    for _ in range(n):
        good = rng.randrange(4)
        words = [rng.choice(GOOD) for _ in range(good)] + [rng.choice(BAD) for _ in range(3 - good)]
        rng.shuffle(words)
        subject = f"{rng.randrange(1000)} {rng.choice(['films', 'plots', 'casts'])}"
        yield f"{subject} were {' '.join(words)}", good - 1.5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and, as the cache, ratings in the format of the real files."""
    root = tmp_path_factory.mktemp("rlhf")
    ratings = root / "cache/vader-ratings"
    ratings.mkdir(parents=True)
    rows = list(enumerate(sentences(1600)))
    for file in ("movieReviewSnippets", "amazonReviewSnippets"):
        (ratings / f"{file}_GroundTruth.txt").write_text("".join(f"{i}\t{m}\t{file[0]} {t}\n" for i, (t, m) in rows))
        lists = [(i, [round(m + 0.5), round(m - 0.5), round(2 * m)]) for i, (_, m) in rows]
        (ratings / f"{file}_anonDataRatings.txt").write_text("".join(f"{i}\t0\t0\t{values}\n" for i, values in lists))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(
        [text for _, (text, _) in rows],
        trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer = Fast(tokenizer_object=backend, eos_token=END, bos_token=END, pad_token=END)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return root


def start(place, *arguments):
    flags = "--minutes 0.5 --trainable-layers 2 --eval-episodes 16 --eval-groups 4 --ppo-batch-size 32 --device cpu"
    environment = {**os.environ, "TEXTRL_CACHE": str(place / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "textrl.cli", "rlhf", "--model", str(place / "model"), *flags.split(), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--pair-gap 9", "pair_gap, reward_group_size and max_words must leave pairs of sentences: gap is 9.0;"),
        ("--reward-group-size 5000", "must leave pairs of sentences: size is 5000; there are not so many sentences"),
        ("--opening-words 60", "opening_words must leave openings of sentences: words is 60; no sentence has 3 more"),
    ],
)
def test_settings_that_leave_nothing_to_learn_from_are_refused_at_once(
    flags, said, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TEXTRL_CACHE", str(place / "cache"))
    run = tmp_path / "run"
    assert cli.main(["rlhf", "--model", str(place / "model"), "--log-dir", str(run), *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert said in err and "step 1" not in out and not run.exists()


def test_a_run_longer_than_the_sentences_last_reads_them_again(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTRL_CACHE", str(place / "cache"))

    def data(minutes):
        run = _Run(RLHFConfig(model=str(place / "model"), log_dir=str(tmp_path / "run"), minutes=minutes))
        shutil.rmtree(tmp_path / "run")
        return run.reward_epochs, len(set(run.pairs["group"]))

    once, most = data(2.0), data(100.0)
    assert once == (1, 13)
    assert most[1] > 13 and most[0] == round(650 / most[1]) > 1
    assert data(200.0)[1] == most[1]


def test_measures_that_cannot_be_compared_are_none():
    assert ratio(1.0, 2.0) == 0.5 and ratio(0.3, 0.0) is None


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_after_its_last_whole_step_and_ends_with_a_report(place):
    run = place / "run"
    process = start(place, "--log-dir", str(run))
    while not (run / "logs/reward_model").exists():  # step 1 is whole, step 2 has begun
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = (run / "sft/model.safetensors").stat().st_mtime_ns
    out, _ = (again := start(place, "--log-dir", str(run))).communicate()
    assert again.returncode == 0, out
    assert "step 1 of 3, sft: done already" in out
    assert (run / "sft/model.safetensors").stat().st_mtime_ns == kept
    report = json.loads((run / "report.json").read_text())
    assert report["reward_model"]["accuracy"] > 0.6, "it has learned which words are good"
    assert 0.9 < report["reward_model"]["human_ceiling"] <= 1
    for when in ("before", "after"):
        assert {"score", "vader", "kl", "response_length", "distinct_2"} <= set(report[when])
    assert report["before"]["kl"] == pytest.approx(0, abs=1e-3)
    assert len(report["samples"]) == 8
    assert all(sample["prompt"] in (run / "report.html").read_text() for sample in report["samples"])
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == page, "textrl report writes the same page again"
    AutoModelForCausalLM.from_pretrained(run / "sft")
    AutoModelForCausalLM.from_pretrained(run / "ppo")
    assert AutoModelForSequenceClassification.from_pretrained(run / "reward_model").config.num_labels == 1
    assert not list(run.glob(".*")), "nothing half-written is left"
    other, _ = (refused := start(place, "--log-dir", str(run), "--seed", "1")).communicate()
    assert refused.returncode == 2
    assert "holds a run with another seed" in other


@pytest.mark.slow
def test_a_run_stopped_within_each_step_goes_on_within_it_and_ends_the_same(place, tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTRL_CACHE", str(place / "cache"))
    flags = "--minutes 0.5 --trainable-layers 2 --eval-episodes 16 --eval-groups 2 --ppo-batch-size 16 --device cpu"
    arguments = ["rlhf", "--model", str(place / "model"), *flags.split(), "--log-dir"]
    stops = {signal.SIGTERM: 0, signal.SIGINT: 0}
    methods = {(agents.SFT, "update"): signal.SIGTERM, (reward_training._Training, "step"): signal.SIGINT}
    methods[agents.PPO, "update"] = signal.SIGTERM

    def stopping(learn, number):
        calls = []

        def wrapped(*given):
            calls.append(1)
            if len(calls) == 2:
                stops[number] += 1
                os.kill(os.getpid(), number)
            return learn(*given)

        return wrapped

    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    for (cls, name), number in methods.items():
        monkeypatch.setattr(cls, name, stopping(getattr(cls, name), number))
    for step, code in (("sft", 143), ("reward_model", 130), ("ppo", 143), ("", 0)):
        try:
            assert cli.main([*arguments, str(tmp_path / "stopped")]) == code
        except SystemExit as left:
            assert left.code == code
        assert len(list((tmp_path / "stopped").glob("logs/*/checkpoints/step-*"))) == bool(step)
        assert not step or list((tmp_path / f"stopped/logs/{step}/checkpoints").iterdir())
    assert stops == {signal.SIGTERM: 2, signal.SIGINT: 1}
    written = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*")]
    kept = [path for path in written if path.suffix in (".safetensors", ".csv")]
    assert len(kept) == 9
    for path in kept:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "stopped" / path).read_bytes(), path
