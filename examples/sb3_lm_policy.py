"""PPO of Stable-Baselines3 fine-tunes a causal language model, over our batched environment.

python examples/sb3_lm_policy.py [TIMESTEPS]
"""

import sys

import gymnasium as gym
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

import textrl
from textrl.models import small_model
from textrl.sb3 import CausalLMPolicy, TextVecEnv


def main(timesteps: int = 2_560) -> float:
    """Trains a small GPT-2 and gives its exact expected score."""
    envs = gym.make_vec("textrl/Vowels-v0", num_envs=32, length=3, autoreset_mode="SAME_STEP")
    task = envs.unwrapped.task
    model = small_model(task.vocab_size, task.max_prompt_tokens + task.max_new_tokens)
    agent = PPO(
        CausalLMPolicy,
        VecMonitor(TextVecEnv(envs)),
        learning_rate=1e-3,
        n_steps=8,
        batch_size=64,
        n_epochs=4,
        gamma=1.0,
        policy_kwargs={"model": model},
        seed=0,
        device="cpu",
    )
    before = textrl.evaluate_exact(task, model).score
    agent.learn(timesteps)
    score = textrl.evaluate_exact(task, model).score
    print(f"score {before:.2f} -> {score:.2f} of {textrl.solve(task).score:.2f}")
    return score


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
