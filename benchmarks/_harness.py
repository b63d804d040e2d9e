"""What the speed benchmarks share: models, a task, the floor of the machine, interleaved timing, JSON out."""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from textrl.envs.text import Text

SIZES = {
    "tiny": {"n_layer": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024},
    "small": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 8192},
    "wide": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 50_257},
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50_257},
}
BATCH, PROMPT, NEW = 32, 16, 48
END, PAD = 0, 1
EARLY = 0.0445
"""The chance of the end token at each step that makes the mean length 20 of 48: (1 - (1 - p)^48) / p = 20."""


def tokenizer_of(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words w2, w3, ...; the end token is 0, the padding 1; there is no begin token."""
    vocab = {"<end>": END, "<pad>": PAD, **{f"w{i}": i for i in range(2, vocab_size)}}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="w2")


def model_of(size: str, end: float = 1e-9, seed: int = 0, length: int = 320) -> GPT2LMHeadModel:
    """Random weights, no dropout, and a chance of the end token that is nearly `end` after every text.

    The last norm's bias is large in one dimension, which only the end token's embedding reads.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        **SIZES[size], n_positions=length, bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    embedding = model.transformer.wte.weight
    with torch.no_grad():
        embedding[:, 0] = 0.0
        embedding[END] = 0.0
        model.transformer.ln_f.weight[0] = 0.0
        model.transformer.ln_f.bias[0] = 10.0
        tokens = torch.randint(2, config.vocab_size, (8, PROMPT))
        others = float(model(tokens).logits[..., 1:].logsumexp(-1).mean())
        embedding[END, 0] = (others + math.log(end / (1 - end))) / 10.0
    return model


def texts(count: int, words: int | list[int], vocab_size: int, seed: int = 0) -> list[str]:
    """Texts of so many random words."""
    generator = torch.Generator().manual_seed(seed)
    each = [words] * count if isinstance(words, int) else words
    return [" ".join(f"w{i}" for i in torch.randint(2, vocab_size, (n,), generator=generator).tolist()) for n in each]


def reward(completions: list[str], **_: Any) -> list[float]:
    """A cheap function of the text."""
    return [text.count("1") / 48 for text in completions]


def task_of(size: str, new: int = NEW) -> Text:
    """256 prompts of 16 tokens."""
    vocab_size = int(SIZES[size]["vocab_size"])
    prompts = texts(256, PROMPT, vocab_size)
    return Text(tokenizer=tokenizer_of(vocab_size), prompts=prompts, reward=reward, max_new_tokens=new)


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each, in turn A B A B; the first `warm` rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warm + rounds):
        for name, run in runs.items():
            synchronise()
            start = time.perf_counter()
            run()
            synchronise()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def between(runs: dict[str, Callable[[], Any]], warm: int = 1) -> tuple[Any, dict[str, list[float]]]:
    """A callback for a trainer of transformers that runs something of ours after each of its steps, and both times.

    Theirs stands under "trl": from the end of our runs to the end of their next step, the loading of data included.
    """
    seconds: dict[str, list[float]] = {"trl": [], **{name: [] for name in runs}}

    class Between(transformers.TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.turn, self.since = 0, time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            synchronise()
            found = {"trl": time.perf_counter() - self.since}
            for name, run in runs.items():
                start = time.perf_counter()
                with torch.enable_grad():
                    run()
                synchronise()
                found[name] = time.perf_counter() - start
            self.turn += 1
            if self.turn > warm:
                for name, taken in found.items():
                    seconds[name].append(taken)
            self.since = time.perf_counter()

    return Between(), seconds


def floor() -> dict[str, float]:
    """What the machine gives in this run: matrix products in float32 and bfloat16, and copying memory."""
    out = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for rows in (32, 2048):
            a, b = torch.randn(rows, 1536, dtype=dtype), torch.randn(1536, 1536, dtype=dtype)
            taken = _best(lambda a=a, b=b: a @ b)  # type: ignore[misc]
            out[f"matmul_{name}_{rows}_rows_gflops"] = 2 * rows * 1536**2 / taken / 1e9
    source = torch.zeros(64 * 2**20 // 4)
    target = torch.zeros_like(source)
    out["copy_gigabytes_per_second"] = 2 * 64 * 2**20 / _best(lambda: target.copy_(source)) / 1e9
    return {name: round(value, 1) for name, value in out.items()}


def _best(run: Callable[[], Any], seconds: float = 0.25) -> float:
    run()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def summary(seconds: dict[str, list[float]], against: str) -> dict[str, Any]:
    """Median milliseconds of each, and how many times as long the one compared with took."""
    medians = {name: statistics.median(values) for name, values in seconds.items() if values}
    return {
        "milliseconds": {name: round(1000 * value, 1) for name, value in medians.items()},
        "times_as_fast": {
            name: round(medians[against] / value, 2) for name, value in medians.items() if name != against
        }
        if against in medians
        else {},
        "rounds": min(len(values) for values in seconds.values()),
    }


def options(about: str) -> argparse.ArgumentParser:
    """The flags that all of these have."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more comes first")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name contains one of these texts")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    return parser


def wanted(name: str, only: list[str]) -> bool:
    """Whether a row is asked for."""
    return not only or any(part.lower() in name.lower() for part in only)


def finish(rows: dict[str, Any], out: Path | None) -> None:
    """Prints the rows and the machine as JSON, and writes them."""
    machine = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **floor(),
    }
    text = json.dumps({"machine": machine, "rows": rows}, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
