"""One GPU, bfloat16: sampling against transformers' `generate`, and a PPO iteration against the floor of the machine.

    python benchmarks/gpu.py [--size gpt2 llama] [--batch 256] [--prompt 32] [--new 128] [--rounds 5] [--out FILE]

The floor is counted, not run: the operations of the matrix products and of the attention at the rate of a large matrix
product, and where these take longer the bytes of weights, cache and optimizer at the rate of a copy, both measured in
the same run. It has no elementwise work, no softmax, no sampling, no padding and nothing computed twice. Without a GPU
the same runs on the CPU in float32, for `--size tiny`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _harness import END, PAD, SIZES, finish, interleaved, model_of, options, reward, summary, texts, tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import textrl
from textrl.agents import PPO
from textrl.envs.text import Text
from textrl.generation import generate
from textrl.policy import CausalPolicy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
EPOCHS, MINIBATCHES = 4, 4
LLAMA = dict(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=END, eos_token_id=END, pad_token_id=PAD,
)  # fmt: skip
"""1.1 billion parameters."""


@dataclass(frozen=True)
class Work:
    """The shape of a batch."""

    batch: int
    prompt: int
    new: int


def build(size: str, seed: int = 0) -> PreTrainedModel:
    """Random weights; the end token is about as probable as any other, so nearly all responses have full length."""
    if size != "llama":
        return model_of(size, seed=seed, length=1024).to(DEVICE, DTYPE)
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return LlamaForCausalLM(LlamaConfig(**LLAMA)).to(DTYPE).eval()


def vocab_of(size: str) -> int:
    """How many tokens there are."""
    return int(LLAMA["vocab_size"] if size == "llama" else SIZES[size]["vocab_size"])


def sampling(size: str, work: Work) -> dict[str, Callable[[], Any]]:
    """The same weights and prompts, sampled by both."""
    model = build(size)
    policy = CausalPolicy(model, vocab_of(size))
    prompts = torch.randint(2, policy.vocab_size, (work.batch, work.prompt), device=DEVICE)
    arrays = [np.asarray(prompt) for prompt in prompts.cpu()]
    generator = torch.Generator().manual_seed(0)

    def theirs() -> None:
        with torch.no_grad():
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=work.new, do_sample=True, top_k=0,
                pad_token_id=PAD, eos_token_id=END,
            )  # fmt: skip

    return {"transformers": theirs, "textrl": lambda: generate(policy, arrays, work.new, [END], generator=generator)}


def iteration(size: str, work: Work, critic: str) -> Callable[[], Any]:
    """One PPO iteration."""
    task = Text(
        tokenizer=tokenizer_of(vocab_of(size)),
        prompts=texts(256, work.prompt, vocab_of(size)),
        reward=reward,
        max_new_tokens=work.new,
    )
    env = textrl.TextEnv(task, reference=build(size), kl_coef=0.05)
    settings = {"epochs": EPOCHS, "minibatches": MINIBATCHES, "target_kl": None, "learning_rate": 1e-6}
    agent = PPO(env, build(size), batch_size=work.batch, critic=critic, device=DEVICE.type, **settings)
    return lambda: agent.update(agent.collect())


def rates() -> tuple[float, float]:
    """What the machine gives in this run: operations a second of a matrix product, bytes a second of a copy."""
    side, room = (8192, 2**32) if DEVICE.type == "cuda" else (1024, 2**26)
    a, b = (torch.randn(side, side, device=DEVICE, dtype=DTYPE) for _ in range(2))
    source = torch.zeros(room, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return 2 * side**3 / best(lambda: a @ b), 2 * room / best(lambda: target.copy_(source))


def best(run: Callable[[], Any], times: int = 10) -> float:
    """The least seconds of some runs."""
    found = []
    for _ in range(times):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        found.append(time.perf_counter() - start)
    return min(found)


def synchronise() -> None:
    """Waits for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def floor_of(model: PreTrainedModel, work: Work, critic: str, operations: float, bandwidth: float) -> dict[str, float]:
    """Seconds that the counted work of a PPO iteration, and of its sampling, takes at these rates."""
    config = model.config
    layers, width, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
    heads = config.num_attention_heads
    keys = width * (getattr(config, "num_key_value_heads", None) or heads) // heads
    trunk = model.base_model
    inner = trunk.h if hasattr(trunk, "h") else trunk.layers
    blocks = sum(p.numel() for p in inner.parameters() if p.ndim == 2)  # in the blocks' matrix products
    size = torch.finfo(DTYPE).bits // 8
    length = work.prompt + work.new
    tokens, drawn = work.batch * length, work.batch * work.new
    # a token's query and its weighted values: 4 * width operations for every token it sees, half of them on average
    body = tokens * (2 * blocks + layers * 4 * width * length / 2)
    head = 2 * drawn * width * vocab
    step = []
    for seen in range(work.prompt, length):
        count = work.batch * (2 * blocks + 4 * layers * width * seen + 2 * width * vocab)
        read = size * (blocks + width * vocab + 2 * layers * work.batch * keys * seen)
        step.append(max(count / operations, read / bandwidth))
    sampled = work.batch * work.prompt * 2 * blocks / operations + sum(step)
    separate = critic == "separate"
    asked = body + head + (body if separate else 0)  # reference, and the values where they have a trunk of their own
    updates = EPOCHS * 3 * (body + head + (body if separate else 0))
    moved = (blocks + width * vocab) * (2 if separate else 1) * (6 * 4 + 2 * size)  # weights, two moments; gradient
    adam = EPOCHS * MINIBATCHES * moved / bandwidth
    return {"sampling": sampled, "iteration": sampled + (asked + updates) / operations + adam}


def main() -> None:
    """Runs the rows asked for."""
    flags = options(str(__doc__))
    flags.add_argument("--size", nargs="*", default=["gpt2"], choices=[*SIZES, "llama"])
    for name, default in (("batch", 256), ("prompt", 32), ("new", 128)):
        flags.add_argument(f"--{name}", type=int, default=default)
    asked = flags.parse_args()
    work = Work(asked.batch, asked.prompt, asked.new)
    rows: dict[str, Any] = {}
    with torch.no_grad():
        operations, bandwidth = rates()
    rows["machine"] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
        "teraflops": round(operations / 1e12, 2),
        "gigabytes_per_second": round(bandwidth / 1e9, 1),
    }
    for size in asked.size:
        rows[f"sampling, {size}"] = summary(interleaved(sampling(size, work), asked.rounds), "transformers")
        for critic in ("shared", "separate"):
            floor = floor_of(build(size), work, critic, operations, bandwidth)
            found = summary(interleaved({"textrl": iteration(size, work, critic)}, asked.rounds), "textrl")
            taken = found["milliseconds"]["textrl"]
            rows[f"PPO iteration, {size}, {critic}"] = {
                "milliseconds": taken,
                "floor_milliseconds": {name: round(1000 * seconds, 1) for name, seconds in floor.items()},
                "times_the_floor": round(taken / (1000 * floor["iteration"]), 2),
            }
            if DEVICE.type == "cuda":
                rows[f"PPO iteration, {size}, {critic}"]["peak_gibibytes"] = round(
                    torch.cuda.max_memory_allocated() / 2**30, 1
                )
                torch.cuda.reset_peak_memory_stats()
    finish(rows, asked.out)


if __name__ == "__main__":
    main()
