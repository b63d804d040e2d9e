"""TorchRL: its own checks on our environment, and a random rollout.

python examples/torchrl_env.py
"""

from torchrl.envs import GymEnv, set_gym_backend
from torchrl.envs.utils import check_env_specs

import textrl  # noqa: F401  (registers the environments)


def main() -> float:
    """Checks the specs and gives the mean score of some random episodes."""
    with set_gym_backend("gymnasium"):
        env = GymEnv("textrl/Copy-v0")
    check_env_specs(env)
    env.set_seed(0)
    rewards = [float(env.rollout(10)["next", "reward"].sum()) for _ in range(50)]
    mean = sum(rewards) / len(rewards)
    print(f"specs are right; random tokens score {mean:.2f}")
    return mean


if __name__ == "__main__":
    main()
