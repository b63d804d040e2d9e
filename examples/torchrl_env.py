"""TorchRL: its own checks on our environments, one and many at once, and random rollouts.

    python examples/torchrl_env.py

`GymWrapper` takes the native vector environment, which steps all rows in one process; for processes of its own use
`ParallelEnv(4, lambda: GymEnv("textrl:textrl/Copy-v0"))`, whose ids import textrl in each. `GymEnv(ID, num_envs=4)` is
not for us: it cannot take the texts in `info`.
"""

import gymnasium as gym
from torchrl.envs import GymEnv, GymWrapper, set_gym_backend
from torchrl.envs.utils import check_env_specs

import textrl  # noqa: F401  (registers the environments)


def main() -> float:
    """Checks the specs and gives the mean score of some random episodes."""
    with set_gym_backend("gymnasium"):
        env = GymEnv("textrl/Copy-v0")
        check_env_specs(GymWrapper(gym.make_vec("textrl/Copy-v0", num_envs=3, autoreset_mode="SAME_STEP")))
    check_env_specs(env)
    env.set_seed(0)
    rewards = [float(env.rollout(10)["next", "reward"].sum()) for _ in range(50)]
    mean = sum(rewards) / len(rewards)
    print(f"specs are right; random tokens score {mean:.2f}")
    return mean


if __name__ == "__main__":
    main()
