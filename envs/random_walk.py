"""RandomWalk: the shortest path through a graph, told as text."""

from __future__ import annotations

import string
from collections import deque
from itertools import pairwise
from typing import Any

import numpy as np

from textrl.rows import Row
from textrl.symbols import symbol_tokenizer
from textrl.task import Task


class RandomWalk(Task):
    """Walk from a given node to the goal, in as few steps as there can be.

    Description: a fixed graph, drawn at random from `seed`. The prompt lists its edges and then the node to start from;
    the goal is the last letter. The response names the nodes on the way and stops at the goal.
    Observation: the prompt and the walk so far, token ids.
    Actions: the end token, the nodes, "," and ":" (which are never right).
    Score: steps of the shortest path / steps taken, for a walk along edges that ends at the goal; else 0.
    Episode end: the end token, or `max_new_tokens` tokens.
    What it teaches: offline data with good parts in bad wholes: `walks` draws random walks, from whose parts the best
    path can be put together (Chen 2021, Decision Transformer, section 1).
    Optimum: 1, a shortest path from every start.

    Args:
        nodes: of the graph, a, b, c, ...
        edges: drawn at random from each node, besides one on its way to the goal, which they may repeat.
        max_new_tokens: the horizon.
        seed: of the graph.
    """

    best_score = 1.0
    deterministic = True

    def __init__(self, nodes: int = 6, edges: int = 1, max_new_tokens: int = 5, seed: int = 0) -> None:
        if not 2 <= nodes <= 26:
            raise ValueError(f"nodes must be from 2 to 26; got {nodes!r}")
        for name, number in (("edges", edges), ("seed", seed)):
            if number < 0:
                raise ValueError(f"{name} must be at least 0; got {number!r}")
        self.nodes = string.ascii_lowercase[:nodes]
        self.goal = self.nodes[-1]
        rng = np.random.default_rng(seed)
        self.edges: set[tuple[str, str]] = set()
        order = [self.goal, *(self.nodes[i] for i in rng.permutation(nodes - 1))]
        for i, node in enumerate(order[1:]):  # each reaches one that reaches the goal
            others = [other for other in self.nodes if other != node]
            self.edges |= {(node, order[int(rng.integers(i + 1))])}
            self.edges |= {(node, others[int(j)]) for j in rng.integers(nodes - 1, size=edges)}
        self.distance = self._distances()
        farthest = max(self.distance.values())
        if max_new_tokens < farthest:
            raise ValueError(f"max_new_tokens must be at least {farthest}, the longest way; got {max_new_tokens!r}")
        super().__init__(tokenizer=symbol_tokenizer(self.nodes + ",:"), max_new_tokens=max_new_tokens)

    def _distances(self) -> dict[str, int]:
        """Steps from each node to the goal."""
        distance, queue = {self.goal: 0}, deque([self.goal])
        while queue:
            reached = queue.popleft()
            for start, stop in sorted(self.edges):
                if stop == reached and start not in distance:
                    distance[start] = distance[reached] + 1
                    queue.append(start)
        return distance

    def prompts(self) -> list[Row]:
        """The graph and every start but the goal."""
        told = ",".join(start + stop for start, stop in sorted(self.edges))
        return [{"prompt": f"{told}:{start}", "start": start} for start in self.nodes[:-1]]

    def score(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """The length of the shortest way over that of the way taken."""
        return [
            self.distance[start] / len(text) if text.endswith(self.goal) and self.is_walk(start + text) else 0.0
            for start, text in zip(columns["start"], completions, strict=True)
        ]

    def is_walk(self, path: str) -> bool:
        """Whether each step goes along an edge."""
        return all(step in self.edges for step in pairwise(path))

    def walks(self, n: int, seed: int = 0) -> list[Row]:
        """Random walks as offline data: n rows with prompt, completion and score."""
        rng, rows = np.random.default_rng(seed), self.prompts()
        out = []
        for _ in range(n):
            row = rows[int(rng.integers(len(rows)))]
            path: str = row["start"]
            while path[-1] != self.goal and len(path) <= self.max_new_tokens:
                ways = sorted(stop for start, stop in self.edges if start == path[-1])
                path += ways[int(rng.integers(len(ways)))]
            score = self.score([row["prompt"]], [path[1:]], start=[row["start"]])[0]
            out.append({"prompt": row["prompt"], "completion": path[1:], "score": score})
        return out
