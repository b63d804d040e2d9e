"""A PPO iteration (4 epochs of 4 minibatches over 32 responses): textrl against TRL 1.12, the last with a PPOTrainer.

    pip install 'trl==1.12.*'
    python benchmarks/ppo.py [--only tiny small early bf16] [--rounds 5] [--out FILE]

TRL gets a reward model of one narrow layer, which costs next to nothing; textrl a function of the text. The bf16 row
has TRL at its own defaults (bfloat16 and recomputed activations) and textrl with `dtype="bfloat16"`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from _harness import (
    BATCH,
    EARLY,
    NEW,
    PAD,
    between,
    finish,
    model_of,
    options,
    summary,
    task_of,
    wanted,
)
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import textrl
from textrl.agents import PPO

ROWS = {
    "tiny": ("tiny", 1e-9, "float32"),
    "small": ("small", 1e-9, "float32"),
    "small, early": ("small", EARLY, "float32"),
    "small, bf16": ("small", 1e-9, "bfloat16"),
}


def iteration(size: str, end: float, dtype: str, critic: str) -> Callable[[], Any]:
    """One iteration of ours."""
    env = textrl.TextEnv(task_of(size), reference=model_of(size, end), kl_coef=0.05)
    agent = PPO(env, model_of(size, end), batch_size=BATCH, critic=critic, dtype=dtype, learning_rate=1e-6)
    return lambda: agent.update(agent.collect())


def trainer(size: str, end: float, dtype: str, callback: Any, steps: int) -> Any:
    """TRL's."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    task, model = task_of(size), model_of(size, end)
    rows = [{"input_ids": task.encode(row).tolist()} for row in task.prompts()]
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    value = AutoModelForSequenceClassification.from_config(config)
    value.base_model.load_state_dict(model.base_model.state_dict())
    narrow = GPT2Config(vocab_size=config.vocab_size, n_layer=1, n_embd=16, n_head=1, num_labels=1, pad_token_id=PAD)
    plain = {} if dtype == "bfloat16" else {"bf16": False, "gradient_checkpointing": False}
    arguments = PPOConfig(
        output_dir="runs/trl", per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=4,
        num_ppo_epochs=4, local_rollout_forward_batch_size=BATCH, response_length=NEW, stop_token="eos",
        temperature=1.0, total_episodes=steps * BATCH, num_sample_generations=0, kl_coef=0.05, learning_rate=1e-6,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=10_000, **plain,
    )  # fmt: skip
    return PPOTrainer(
        arguments, task.tokenizer, model, model_of(size, end), GPT2ForSequenceClassification(narrow),
        Dataset.from_list(rows), value, callbacks=[callback],
    )  # fmt: skip


def main() -> None:
    """Runs the rows asked for."""
    flags = options(str(__doc__)).parse_args()
    rows: dict[str, Any] = {}
    for name, (size, end, dtype) in ROWS.items():
        if not wanted(name, flags.only):
            continue
        runs = {critic: iteration(size, end, dtype, critic) for critic in ("separate", "shared")}
        callback, seconds = between(runs)
        trainer(size, end, dtype, callback, flags.rounds + 1).train()
        rows[name] = summary(seconds, "trl")
    finish(rows, flags.out)


if __name__ == "__main__":
    main()
