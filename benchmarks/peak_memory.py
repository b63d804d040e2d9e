"""Peak memory of a PPO iteration with a vocabulary of 50,257, 32 responses, 16 + 48 tokens: textrl against TRL 1.12.

    pip install 'trl==1.12.*'
    python benchmarks/peak_memory.py [--out FILE]

Each runs in a process of its own, two iterations; the peak is the process's largest resident set, in MiB, and stands
beside what was resident after imports and before any model.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from _harness import between, finish, options, wanted
from ppo import iteration, trainer

WORK: dict[str, Callable[[], Any]] = {
    "trl": lambda: trainer("wide", 1e-9, "float32", between({})[0], 2).train(),
    "trl, its defaults": lambda: trainer("wide", 1e-9, "bfloat16", between({})[0], 2).train(),
    "separate": lambda: twice(iteration("wide", 1e-9, "float32", "separate")),
    "shared": lambda: twice(iteration("wide", 1e-9, "float32", "shared")),
}


def twice(run: Callable[[], Any]) -> None:
    """Runs two iterations."""
    run()
    run()


def peak() -> float:
    """The largest resident set so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Runs one kind of work in this process, or each in a process of its own."""
    parser = options(str(__doc__))
    parser.add_argument("--one", choices=list(WORK), help="only this, here")
    flags = parser.parse_args()
    if flags.one:
        before = peak()
        WORK[flags.one]()
        print(json.dumps({"peak_mib": round(peak()), "after_imports_mib": round(before)}))
        return
    rows: dict[str, Any] = {}
    for name in WORK:
        if wanted(name, flags.only):
            command = [sys.executable, __file__, "--one", name]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows[name] = json.loads(printed.strip().splitlines()[-1])
    if "trl" in rows:
        for row in rows.values():
            row["share_of_trl"] = round(row["peak_mib"] / rows["trl"]["peak_mib"], 2)
    finish(rows, flags.out)


if __name__ == "__main__":
    main()
