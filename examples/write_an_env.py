"""An environment of one's own in ten lines, trained with one of our agents.

python examples/write_an_env.py [TIMESTEPS]
"""

import sys
from itertools import pairwise

import gymnasium as gym

import textrl
from textrl.agents import REINFORCE


class Alternate(textrl.Task):
    """Say "a" and "b" by turns. Score: the share of neighbours that differ."""

    def __init__(self, length: int = 6):
        super().__init__(tokenizer=textrl.symbol_tokenizer("ab"), max_new_tokens=length)

    def prompts(self):
        """What to go on from."""
        return [{"prompt": "a"}, {"prompt": "b"}]

    def score(self, prompts, completions, **columns):
        """One number a completion."""
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return [sum(a != b for a, b in pairwise(t)) / self.max_new_tokens for t in texts]


def main(timesteps: int = 6_000) -> float:
    """Trains and gives the exact expected score."""
    textrl.register("example/Alternate-v0", Alternate, length=6)
    envs = gym.make_vec("example/Alternate-v0", num_envs=8)
    agent = REINFORCE(envs, batch_size=32, seed=0)
    agent.learn(timesteps)
    score = textrl.evaluate_exact(agent.task, agent.model).score
    print(f"score {score:.2f} of {textrl.solve(agent.task).score:.2f}; {agent.generate(['a', 'b'])}")
    return score


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
