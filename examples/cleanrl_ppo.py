"""PPO in the style of CleanRL: one file, a small network, `gym.make_vec`, nothing of textrl's but the environment.

python examples/cleanrl_ppo.py [TIMESTEPS]
"""

import sys

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Categorical

import textrl  # noqa: F401  (registers the environments)

NUM_ENVS, NUM_STEPS, EPOCHS, MINIBATCHES, CLIP, LAMBDA = 32, 16, 4, 4, 0.2, 0.95


class Network(nn.Module):
    """Token ids -> one-hot -> logits and value."""

    def __init__(self, length: int, vocab_size: int) -> None:
        super().__init__()
        self.size = vocab_size + 1  # the value V stands where nothing is written
        self.trunk = nn.Sequential(nn.Linear(length * self.size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.actor, self.critic = nn.Linear(64, vocab_size), nn.Linear(64, 1)

    def forward(self, observations: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """(N, L) -> the policy over N rows, and values (N,)."""
        hidden = self.trunk(nn.functional.one_hot(observations, self.size).flatten(-2).float())
        return Categorical(logits=self.actor(hidden)), self.critic(hidden)[..., 0]


def main(timesteps: int = 25_000) -> float:
    """Trains and gives the mean score of the last 200 episodes."""
    torch.manual_seed(0)
    envs = gym.make_vec("textrl/Copy-v0", num_envs=NUM_ENVS, symbols="ab", length=2, autoreset_mode="SAME_STEP")
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    network = Network(envs.single_observation_space.shape[0], int(envs.single_action_space.n))
    optimizer = torch.optim.Adam(network.parameters(), lr=2.5e-3, eps=1e-5)
    observation, _ = envs.reset(seed=0)
    scores: list[float] = []
    for _ in range(timesteps // (NUM_ENVS * NUM_STEPS)):
        store: dict[str, list[torch.Tensor]] = {k: [] for k in ("obs", "action", "logprob", "value", "reward", "end")}
        for _ in range(NUM_STEPS):
            obs = torch.from_numpy(observation)
            with torch.no_grad():
                policy, value = network(obs)
                action = policy.sample()
            observation, reward, terminated, _, infos = envs.step(action.numpy())
            paid, ended = torch.from_numpy(reward).float(), torch.from_numpy(terminated)
            row = (obs, action, policy.log_prob(action), value, paid, ended)
            for key, each in zip(store, row, strict=True):
                store[key].append(each)
            if terminated.any():
                scores += infos["final_info"]["score"][terminated].tolist()
        batch = {key: torch.stack(values) for key, values in store.items()}  # (T, N, ...)
        with torch.no_grad():
            following = network(torch.from_numpy(observation))[1]
        advantages, running = torch.zeros_like(batch["value"]), torch.zeros(NUM_ENVS)
        for t in reversed(range(NUM_STEPS)):
            alive = (~batch["end"][t]).float()
            running = batch["reward"][t] + alive * following - batch["value"][t] + LAMBDA * alive * running
            advantages[t], following = running, batch["value"][t]
        flat = {key: values.flatten(0, 1) for key, values in batch.items()}
        flat["advantage"], flat["return"] = advantages.flatten(), (advantages + batch["value"]).flatten()
        for _ in range(EPOCHS):
            for part in torch.randperm(NUM_ENVS * NUM_STEPS).chunk(MINIBATCHES):
                policy, value = network(flat["obs"][part])
                ratio = (policy.log_prob(flat["action"][part]) - flat["logprob"][part]).exp()
                advantage = flat["advantage"][part]
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
                value_loss = ((value - flat["return"][part]) ** 2).mean()
                loss = -gain + 0.25 * value_loss - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 0.5)
                optimizer.step()
    score = float(np.mean(scores[-200:]))
    print(f"score {score:.2f} of 1.00 after {len(scores)} episodes")
    return score


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
