"""Memory over many iterations of PPO on a toy environment: `PYTHONPATH=. python benchmarks/memory.py [ITERATIONS]`.

Prints the resident memory after every tenth of the run, and the growth from the first tenth (warm-up) to the end. With
a log, checkpoints and a reference, as a long run has them.
"""

import gc
import sys
import tempfile

import gymnasium as gym

from textrl.agents import PPO
from textrl.models import small_model


def resident() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def main(iterations: int) -> None:
    """Runs, and prints."""
    env = gym.make_vec("textrl/Copy-v0", num_envs=1, reference=small_model(4, 8, 7), kl_coef=0.05)
    agent = PPO(env, batch_size=16, epochs=1, minibatches=2, cooldown=0.0)
    seen: list[int] = []

    def note(agent, metrics):
        if agent.num_updates % (iterations // 10) == 0:
            gc.collect()
            seen.append(resident())
            print(f"{agent.num_updates:>6} iterations  {seen[-1] / 2**20:8.2f} MiB", flush=True)
        return agent.num_updates < iterations

    with tempfile.TemporaryDirectory() as folder:
        agent.learn(10**9, log_dir=folder, checkpoint_every=10_000, callback=note)
    print(f"growth after warm-up: {100 * (seen[-1] / seen[0] - 1):.2f}%")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
