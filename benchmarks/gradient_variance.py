"""Bias and variance of the agents' policy gradients, against the exact gradient of a tabular policy.

    python benchmarks/gradient_variance.py --batches 2000

Each agent's own `update` runs on fresh batches of its own; the gradient it hands to the optimiser is kept and no step
is taken. z: how far the mean is from the exact gradient in standard errors, root mean square over 64 random directions
(about 1 for an estimator without bias). Variance: the trace of the covariance of a batch's gradient, times the batch's
episodes, over the squared norm of the exact gradient.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch

import textrl
from textrl.agents import A2C, GRPO, PPO, REINFORCE, TRPO
from textrl.exact import exact_critic
from textrl.returns import gae

KL_COEF = 0.1
ESTIMATORS: dict[str, tuple[type[textrl.Agent], dict[str, Any], bool]] = {
    # name: agent, settings, whether its critic is the right one
    "REINFORCE, no baseline": (REINFORCE, {"baseline": "none"}, False),
    "REINFORCE, reward to go": (REINFORCE, {"baseline": "none", "reward_to_go": True}, False),
    "REINFORCE, running mean": (REINFORCE, {"baseline": "mean"}, False),
    "REINFORCE, prompt mean": (REINFORCE, {}, False),
    "REINFORCE, leave-one-out": (REINFORCE, {"baseline": "leave_one_out"}, False),
    "GRPO": (GRPO, {"scale": "none", "minibatches": 1}, False),
    "A2C, right value, lambda 1": (A2C, {"whiten_advantages": False, "gae_lambda": 1.0}, True),
    "A2C, right value, lambda 0.95": (A2C, {"whiten_advantages": False}, True),
    "A2C, right value, lambda 0": (A2C, {"whiten_advantages": False, "gae_lambda": 0.0}, True),
    "PPO, right value, lambda 0.95": (PPO, {"whiten_advantages": False, "epochs": 1, "minibatches": 1}, True),
    "TRPO, right value, lambda 0.95": (TRPO, {"whiten_advantages": False}, True),
}


class Letters(textrl.Task):
    """Three letters to say in two contexts: a point for each "a", two for ending in the prompt's own letter."""

    def __init__(self) -> None:
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=3)

    def prompts(self) -> list[dict[str, Any]]:
        """Two prompts."""
        return [{"prompt": "b"}, {"prompt": "c"}]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Depends on the whole response."""
        return [text.count("a") + 2.0 * text.endswith(p) for p, text in zip(prompts, completions, strict=True)]


class Recorder:
    """Stands in for an optimiser: keeps the table's gradient and moves nothing."""

    def __init__(self, agent: textrl.Agent) -> None:
        self.agent, self.gradients = agent, list[torch.Tensor]()
        self.learning_rate = 0.0

    def step(self) -> float:
        """Keeps the gradient."""
        weight = self.agent.model.lm_head.weight
        if weight.grad is not None:
            self.gradients.append(weight.grad.clone())
        self.zero_grad()
        return 0.0

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for module in self.agent.modules.values():
            module.zero_grad()


def sample(name: str, batches: int, batch_size: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the objective as an estimator sees them, (batches, p), and the exact one, (p,)."""
    kind, settings, right_critic = ESTIMATORS[name]
    task = Letters()
    reference, policy = textrl.tabular_model(task, std=1.0, seed=1), textrl.tabular_model(task, std=1.0, seed=2)
    exact = textrl.exact_gradient(task, policy, reference, KL_COEF)["lm_head.weight"]
    env = textrl.TextVectorEnv(task, num_envs=1, reference=reference, kl_coef=KL_COEF)
    agent = kind(env, copy.deepcopy(policy), batch_size=batch_size, seed=seed, **settings)
    if right_critic:
        agent.critic.load_state_dict(exact_critic(task, policy, reference, KL_COEF).state_dict())  # type: ignore[attr-defined]
    recorder = Recorder(agent)
    agent.optimizer = recorder  # type: ignore[assignment]
    found = []
    for _ in range(batches):
        rollout = agent.collect()
        if isinstance(agent, TRPO):
            values = agent.value(rollout).detach()
            advantages, _ = gae(rollout.rewards, values, rollout.action_mask)
            rollout.advantages = advantages
            gradient = agent._surrogate_gradient(rollout).view_as(exact)
        else:
            agent.update(rollout)
            gradient = -recorder.gradients.pop()
        found.append(gradient.flatten() * (rollout.num_tokens / len(rollout)))  # a mean over tokens -> over episodes
    return torch.stack(found).double(), exact.flatten()


def measure(name: str, batches: int, batch_size: int = 64, seed: int = 0) -> tuple[float, float]:
    """The z and the variance of an estimator, as the module's docstring says."""
    found, exact = sample(name, batches, batch_size, seed)
    directions = torch.randn(len(exact), 64, generator=torch.Generator().manual_seed(0)).double()
    along = found @ directions  # (batches, 64)
    error = (along.mean(0) - exact @ directions) / (along.std(0) / batches**0.5)
    return float(error.square().mean().sqrt()), float(found.var(0).sum() * batch_size / exact.square().sum())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=2000)
    arguments = parser.parse_args()
    print("| estimator | z | variance |\n| --- | --- | --- |")
    for name in ESTIMATORS:
        z, variance = measure(name, arguments.batches)
        print(f"| {name} | {z:.2f} | {variance:.1f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
