"""GRPO, RLOO, DPO, SFT and reward-model steps: textrl against TRL 1.16's trainers.

    pip install 'trl==1.16.*'
    python benchmarks/trainers.py [--only grpo rloo dpo sft reward] [--rounds 5] [--out FILE]

32 responses or pairs a step, prompts of 16 tokens and responses of 48 (uneven: 4 to 48, short ones more often), float32
on both sides and without recomputed activations.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from _harness import (
    BATCH,
    NEW,
    PROMPT,
    SIZES,
    between,
    finish,
    model_of,
    options,
    reward,
    summary,
    task_of,
    texts,
    tokenizer_of,
    wanted,
)
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, GPT2LMHeadModel

import textrl
from textrl.agents import DPO, GRPO, REINFORCE, SFT
from textrl.reward_training import RewardModelConfig, train_reward_model
from textrl.rewards import RewardModel

COMMON: dict[str, Any] = {
    "output_dir": "runs/trl", "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "bf16": False,
    "gradient_checkpointing": False, "learning_rate": 1e-6, "report_to": "none", "save_strategy": "no", "use_cpu": True,
    "disable_tqdm": True, "logging_steps": 10_000,
}  # fmt: skip


def lengths(uneven: bool, count: int) -> list[int]:
    """Words of each response: with the end token at most 48."""
    if not uneven:
        return [NEW - 1] * count
    drawn = torch.empty(count).exponential_(1 / 12, generator=torch.Generator().manual_seed(1)) + 4
    return drawn.clamp(max=NEW - 1).long().tolist()


def pairs(size: str, uneven: bool, count: int = 256) -> list[dict[str, str]]:
    """Random pairs; a completion begins with a space."""
    vocab_size = int(SIZES[size]["vocab_size"])
    prompts = texts(count, PROMPT, vocab_size)
    sides = [texts(count, lengths(uneven, 2 * count)[side::2], vocab_size, side + 1) for side in (0, 1)]
    return [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in zip(prompts, *sides, strict=True)]


def groups(kind: str, size: str, rounds: int) -> dict[str, list[float]]:
    """GRPO and RLOO with 8 samples a prompt, one step a batch, and the KL to a reference."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    env = textrl.TextEnv(task_of(size), reference=model_of(size), kl_coef=0.05)
    common: dict[str, Any] = {"batch_size": BATCH, "learning_rate": 1e-6, "dtype": "float32", "group_size": 8}
    if kind == "grpo":
        agent: Any = GRPO(env, model_of(size), epochs=1, minibatches=1, **common)
    else:
        agent = REINFORCE(env, model_of(size), baseline="leave_one_out", **common)
    callback, seconds = between({"textrl": lambda: agent.update(agent.collect())})
    config, trainer = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[kind]
    arguments = config(
        **COMMON, num_generations=8, max_completion_length=NEW, beta=0.05, max_steps=rounds + 1, temperature=1.0
    )
    data = Dataset.from_list([{"prompt": row["prompt"]} for row in env.task.prompts()])
    with tempfile.TemporaryDirectory() as folder:  # the trainer loads its reference from where the model came from
        model_of(size).save_pretrained(folder)
        policy = GPT2LMHeadModel.from_pretrained(folder)
        made = trainer(policy, reward, arguments, data, processing_class=env.task.tokenizer, callbacks=[callback])
    made.train()
    return seconds


def dpo(size: str, uneven: bool, rounds: int) -> dict[str, list[float]]:
    """Two of ours: the reference asked for each new pair, and its log-probabilities given with the data."""
    from trl import DPOConfig, DPOTrainer

    rows = pairs(size, uneven)
    env = textrl.TextEnv(task_of(size), reference=model_of(size), kl_coef=0.1)
    known = [{**row, "ref_chosen_logps": -300.0, "ref_rejected_logps": -300.0} for row in rows]
    common: dict[str, Any] = {"batch_size": 2 * BATCH, "learning_rate": 1e-6, "dtype": "float32"}  # responses
    kept = DPO(env, model_of(size), dataset=known, **common)
    fresh = [0]

    def computed() -> None:
        if fresh[0] % len(rows) == 0:
            computing["agent"] = DPO(env, model_of(size), dataset=rows, **common)
        fresh[0] += BATCH
        computing["agent"].update(computing["agent"].collect())

    computing: dict[str, DPO] = {}
    computed()
    callback, seconds = between({"reference computed": computed, "reference kept": lambda: kept.update(kept.collect())})
    arguments = DPOConfig(**COMMON, beta=0.1, max_steps=rounds + 1)
    DPOTrainer(
        model_of(size), model_of(size), arguments, train_dataset=Dataset.from_list(rows),
        processing_class=env.task.tokenizer, callbacks=[callback],
    ).train()  # fmt: skip
    return seconds


def sft(size: str, rounds: int) -> dict[str, list[float]]:
    """Prompts are read, responses learned."""
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(size, False)]
    agent = SFT(
        textrl.TextEnv(task_of(size)), model_of(size), dataset=rows, batch_size=BATCH, learning_rate=1e-6,
        dtype="float32",
    )  # fmt: skip
    callback, seconds = between({"textrl": lambda: agent.update(agent.collect())})
    SFTTrainer(
        model_of(size), SFTConfig(**COMMON, max_steps=rounds + 1), train_dataset=Dataset.from_list(rows),
        processing_class=agent.tokenizer, callbacks=[callback],
    ).train()  # fmt: skip
    return seconds


def reward_model(size: str, rounds: int) -> dict[str, list[float]]:
    """`train_reward_model` on one batch of pairs a call, tokenised anew."""
    from trl import RewardConfig, RewardTrainer

    rows = pairs(size, False)
    tokenizer = tokenizer_of(int(SIZES[size]["vocab_size"]))
    model = RewardModel.from_language_model(model_of(size), tokenizer)
    data = Dataset.from_list(rows[:BATCH])
    settings = RewardModelConfig(batch_size=BATCH, learning_rate=1e-6)
    callback, seconds = between({"textrl": lambda: train_reward_model(model, data, settings)})
    config = copy.deepcopy(model_of(size).config)
    config.num_labels = 1
    theirs = AutoModelForSequenceClassification.from_config(config)
    RewardTrainer(
        theirs, RewardConfig(**COMMON, max_steps=rounds + 1), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[callback],
    ).train()  # fmt: skip
    return seconds


def main() -> None:
    """Runs the rows asked for."""
    flags = options(str(__doc__)).parse_args()
    work: dict[str, Callable[[int], dict[str, list[float]]]] = {}
    for size in ("tiny", "small"):
        work[f"grpo, {size}"] = lambda rounds, size=size: groups("grpo", size, rounds)  # type: ignore[misc]
        work[f"rloo, {size}"] = lambda rounds, size=size: groups("rloo", size, rounds)  # type: ignore[misc]
        work[f"dpo, {size}"] = lambda rounds, size=size: dpo(size, False, rounds)  # type: ignore[misc]
        work[f"dpo, {size}, uneven"] = lambda rounds, size=size: dpo(size, True, rounds)  # type: ignore[misc]
        work[f"sft, {size}"] = lambda rounds, size=size: sft(size, rounds)  # type: ignore[misc]
        work[f"reward model, {size}"] = lambda rounds, size=size: reward_model(size, rounds)  # type: ignore[misc]
    rows = {name: summary(run(flags.rounds), "trl") for name, run in work.items() if wanted(name, flags.only)}
    finish(rows, flags.out)


if __name__ == "__main__":
    main()
