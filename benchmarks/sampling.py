"""Sampling: textrl against transformers' `generate` with a dynamic cache, and the cost of a token as the batch grows.

python benchmarks/sampling.py [--only tiny small early scaling] [--rounds 5] [--out FILE]
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _harness import (
    BATCH,
    EARLY,
    END,
    NEW,
    PAD,
    PROMPT,
    SIZES,
    finish,
    interleaved,
    model_of,
    options,
    summary,
    wanted,
)

from textrl.generation import generate
from textrl.policy import CausalPolicy


def contestants(size: str, batch: int = BATCH, new: int = NEW, end: float = 1e-9) -> dict[str, Any]:
    """The same weights and prompts, sampled by both."""
    model = model_of(size, end)
    policy = CausalPolicy(model, int(SIZES[size]["vocab_size"]))
    prompts = torch.randint(2, policy.vocab_size, (batch, PROMPT))
    arrays = [np.asarray(prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(0)

    def theirs() -> None:
        with torch.no_grad():
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, do_sample=True, top_k=0,
                pad_token_id=PAD, eos_token_id=END,
            )  # fmt: skip

    return {"transformers": theirs, "textrl": lambda: generate(policy, arrays, new, [END], generator=generator)}


def main() -> None:
    """Runs the rows asked for."""
    flags = options(str(__doc__)).parse_args()
    rows: dict[str, Any] = {}
    for name, size, end in (("tiny", "tiny", 1e-9), ("small", "small", 1e-9), ("small, early", "small", EARLY)):
        if wanted(name, flags.only):
            rows[name] = summary(interleaved(contestants(size, end=end), flags.rounds), "transformers")
    if wanted("scaling", flags.only):
        for size in ("tiny", "small"):
            runs = {f"{batch}": contestants(size, batch)["textrl"] for batch in (8, 32, 128)}
            found = summary(interleaved(runs, flags.rounds), "8")["milliseconds"]
            microseconds = {batch: round(1000 * taken / int(batch) / NEW, 1) for batch, taken in found.items()}
            rows[f"scaling, {size}, microseconds a token by batch"] = microseconds
            runs = {f"{new}": contestants(size, new=new)["textrl"] for new in (16, 48, 128, 256)}
            found = summary(interleaved(runs, flags.rounds), "16")["milliseconds"]
            microseconds = {new: round(1000 * taken / int(new) / BATCH, 1) for new, taken in found.items()}
            rows[f"scaling, {size}, microseconds a token by new tokens"] = microseconds
    finish(rows, flags.out)


if __name__ == "__main__":
    main()
