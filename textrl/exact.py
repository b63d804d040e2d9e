"""The exact answer for tasks small enough to enumerate: the optimum, the value of any policy, its policy gradient.

Every response is a path in a tree: at each prefix V tokens, of which the end token closes the text and the others lead
on, until the horizon closes it. Level t holds the (V - 1)^t prefixes of t tokens. With Q the value of what a
token leads to, the objective J = E[score - kl_coef * KL(pi || pi_ref)] has its optimum by soft backward induction

    V(s) = kl_coef * log sum_a pi_ref(a | s) exp(Q(s, a) / kl_coef)      (max_a Q(s, a) for kl_coef = 0)
    pi*(a | s) = pi_ref(a | s) exp((Q(s, a) - V(s)) / kl_coef)

and the value of a given policy by the same recursion with its own mean (Ziebart 2010; Levine 2018). Everything is
float64. Rows with the same prompt are averaged: no policy can tell them apart. Where one prompt is the beginning of
another the optimum is taken for each alone, and a policy that sees only the text may not reach it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .arguments import check_penalty
from .codec import plain_ids
from .config import check
from .enumeration import AnyPolicy, Tree, asker, grow_trees, join, prefixes
from .scalars import value_model
from .tabular import TabularLM, TabularScorer, tabular_model
from .task import Task, check_task

_LOG_ZERO = -1e300  # in place of -inf, so that 0 * log 0 = 0


@dataclass(frozen=True)
class Solution:
    """The optimum of a task.

    Attributes:
        objective: E[score] - kl_coef * KL, in the units of the score.
        score: E[score] of the optimal policy.
        kl: E of the KL to the reference, summed over a response, in nats; 0 without a reference.
        temperature: what the logits are divided by.
    """

    objective: float
    score: float
    kl: float
    temperature: float
    _task: Task = field(repr=False)
    _logits: dict[tuple[int, ...], list[Tensor]] = field(repr=False)

    def logits(self, prompt: str, response: str | Sequence[int] = ()) -> Tensor:
        """The optimal policy's next-token logits: (V,) float64; -inf for tokens it never says.

        Args:
            prompt: one of the task's prompts.
            response: what has been said so far, as text or token ids.

        Raises:
            ValueError: for a prompt that is not the task's, or a response that is over.
        """
        task, levels = self._task, self._logits.get(tuple(self._task.encode({"prompt": prompt}).tolist()))
        if levels is None:
            raise ValueError(f"prompt must be one of the task's prompts(); got {prompt!r}")
        if isinstance(response, str):
            response = plain_ids(task.tokenizer, response, "response")
        check("response", response, isinstance(response, Iterable), "a text or token ids")
        ids = [int(token) for token in response]
        if task.eos_token_id in ids or len(ids) >= len(levels) or any(not 0 <= i < task.vocab_size for i in ids):
            raise ValueError(
                f"response must be at most {len(levels) - 1} token ids below {task.vocab_size} without the end token,"
                f" so that one more can follow; got {ids}"
            )
        index = 0
        for token in ids:
            index = index * (task.vocab_size - 1) + token - (token > task.eos_token_id)
        return levels[len(ids)][index]

    def model(self) -> TabularLM:
        """The optimal policy as a language model, exact but for float32 (tokens it never says get a logit of -1e4)."""
        model = tabular_model(self._task)
        with torch.no_grad():
            for prompt, levels in self._logits.items():
                for t, logits in enumerate(levels):
                    texts = prefixes(self._task, np.array(prompt), t)
                    where = model.tree(torch.from_numpy(texts)).last_hidden_state[:, -1, 0]
                    model.lm_head.weight[where] = logits.clamp(min=-1e4).float()
        return model


@dataclass(frozen=True)
class Evaluation:
    """The exact value of a policy; sums over a response, means over prompts and responses, nats.

    Attributes:
        objective: score - kl_coef * kl.
        score: E[score].
        kl: E of the KL to the reference; 0 without one.
        entropy: E of the entropies of the next token.
        share: (objective - start) / (optimum - start): 0 is the start, 1 the best there is. Where nothing can be gained
            it is 1 for a policy that loses nothing, and NaN for one that does.
        optimum: the best objective.
        start: the objective of the reference, or of evenly drawn tokens where there is none.
    """

    objective: float
    score: float
    kl: float
    entropy: float
    share: float
    optimum: float
    start: float


def solve(
    task: Task, reference: AnyPolicy | None = None, kl_coef: float = 0.0, *, temperature: float = 1.0
) -> Solution:
    """The optimum of score - kl_coef * KL(pi || reference) over all policies.

    Args:
        task: with finitely many prompts.
        reference: what to stay close to: a model, its name or folder, or a callable observations -> logits.
        kl_coef: weight of the KL, at least 0. At 0 the best response is said, tied tokens evenly.
        temperature: divides the logits of every policy, as in the environment.

    Raises:
        ValueError: for a task that is too large to enumerate, saying how large it is, or without `prompts()`.
    """
    check_penalty(reference, kl_coef, temperature)
    check_task(task)
    ask = asker(task, reference, temperature)
    totals = torch.zeros(3, dtype=torch.float64)
    optimal: dict[tuple[int, ...], list[Tensor]] = {}
    with torch.no_grad():
        for tree in grow_trees(task, task.max_new_tokens):
            ref = ask(tree)
            value, logprobs = _soft_induction(task, tree, ref, kl_coef)
            own = _induction(task, tree, logprobs, ref if reference is not None else None)[0][:, 0]
            totals += tree.weight * torch.stack([value, own[0], own[1]])
            optimal[tuple(tree.prompt.tolist())] = [level * temperature for level in logprobs]
    objective, score, kl = totals.tolist()
    return Solution(objective, score, _or_infinite(kl), temperature, task, optimal)


def evaluate_exact(
    task: Task,
    model: AnyPolicy,
    reference: AnyPolicy | None = None,
    kl_coef: float = 0.0,
    *,
    temperature: float = 1.0,
    masked: bool = False,
) -> Evaluation:
    """The exact value of a policy, by enumeration.

    Args:
        task: with finitely many prompts.
        model: the policy: a model, its name or folder, or a callable observations (B, L) -> logits (B, V).
        reference: as for `solve`.
        kl_coef: as for `solve`.
        temperature: as for `solve`.
        masked: the policy draws only from `task.allowed_tokens`, renormalised, as agents do. The optimum stays that
            over all tokens, for the environment takes any.

    Raises:
        ValueError: as `solve`.
    """
    check_penalty(reference, kl_coef, temperature)
    check_task(task)
    check("model", model, isinstance(model, (str, Path)) or callable(model), "a model, its name or a callable")
    ask, ask_reference = asker(task, model, temperature), asker(task, reference, temperature)
    totals, optimum, start = torch.zeros(3, dtype=torch.float64), 0.0, 0.0
    with torch.no_grad():
        for tree in grow_trees(task, task.max_new_tokens):
            ref = ask_reference(tree)  # without a reference all tokens alike
            optimum += tree.weight * float(_soft_induction(task, tree, ref, kl_coef)[0])
            start += tree.weight * float(_induction(task, tree, ref, None)[0][0, 0])  # its KL to itself is 0
            if not masked:
                known = ref if reference is not None else None
                totals += tree.weight * _induction(task, tree, ask(tree), known)[0][:, 0]
        if masked:  # each row has masks of its own
            totals = _value(task, model, reference, temperature, masked)
    score, kl, entropy = totals.tolist()
    kl = _or_infinite(kl)
    objective = score - kl_coef * kl if kl_coef > 0 else score
    gap = optimum - start
    if gap > 1e-12:
        share = (objective - start) / gap
    else:
        share = 1.0 if objective >= optimum - 1e-9 else float("nan")
    return Evaluation(objective, score, kl, entropy, share, optimum, start)


def exact_gradient(
    task: Task,
    model: PreTrainedModel,
    reference: AnyPolicy | None = None,
    kl_coef: float = 0.0,
    *,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The exact policy gradient: the objective's gradient, in float64, for each parameter that learns, by its name.

    Args:
        task: as for `solve`.
        model: the policy, tabular or not.
        reference: as for `solve`.
        kl_coef: as for `solve`.
        temperature: as for `solve`.
    """
    check_task(task)
    check_penalty(reference, kl_coef, temperature)
    check("model", model, isinstance(model, PreTrainedModel), "a language model")
    twin = copy.deepcopy(model).double()
    score, kl, _ = _value(task, twin, reference, temperature, False)
    named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(
        score - kl_coef * kl, list(named.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(named, gradients, strict=True))


def _or_infinite(kl: float) -> float:
    """A KL in which log 0 has a stand-in: the reference never says what the policy says."""
    return kl if kl < 1e30 else math.inf


@torch.no_grad()
def exact_critic(
    task: Task,
    model: PreTrainedModel,
    reference: AnyPolicy | None = None,
    kl_coef: float = 0.0,
    *,
    temperature: float = 1.0,
) -> TabularScorer:
    """The right critic of a policy: a table of what is still to come at each prefix, the score less the KL's cost.

    For scores that are paid at the end, and prompts of which none begins another.

    Args:
        task: as for `solve`.
        model: the policy.
        reference: as for `solve`.
        kl_coef: as for `solve`.
        temperature: as for `solve`.
    """
    check_penalty(reference, kl_coef, temperature)
    scorer = value_model(tabular_model(task))
    ask, ask_reference = asker(task, model, temperature), asker(task, reference, temperature)
    for tree in grow_trees(task, task.max_new_tokens):
        levels = _induction(task, tree, ask(tree), None if reference is None else ask_reference(tree))
        for t, (score, kl, _) in enumerate(levels):
            texts = torch.from_numpy(prefixes(task, tree.prompt, t))
            where = scorer.tree(texts).last_hidden_state[:, -1, 0]
            scorer.score.weight[where, 0] = (score - kl_coef * kl).float()
    return scorer


# ---- the recursions ------------------------------------------------------------------------------------------------


def _soft_induction(task: Task, tree: Tree, ref: list[Tensor], kl_coef: float) -> tuple[Tensor, list[Tensor]]:
    """The optimal value of the prompt () and the optimal log-probabilities of each level, (n, V)."""
    logprobs: list[Tensor] = []
    value: Tensor | None = None
    for level in reversed(range(len(ref))):
        q = join(task, tree.ends[level], value)  # (n, V)
        if kl_coef > 0:
            tilted = ref[level] + q / kl_coef
            value = kl_coef * tilted.logsumexp(-1)
            logprobs.append(tilted.log_softmax(-1))
        else:
            value = q.amax(-1)
            best = (q >= value[:, None]).double()
            logprobs.append((best / best.sum(-1, keepdim=True)).log())
    assert value is not None
    return value[0], logprobs[::-1]


def _induction(task: Task, tree: Tree, logprobs: list[Tensor], ref: list[Tensor] | None) -> list[Tensor]:
    """A policy's score, KL and entropy from each prefix on: (3, n) for each level."""
    score: Tensor | None = None
    kl = entropy = torch.zeros(0, dtype=torch.float64)
    levels = []
    for level in reversed(range(len(logprobs))):
        logs, last = logprobs[level], score is None
        p = logs.exp()
        finite = logs.clamp(min=_LOG_ZERO)
        zero = torch.zeros_like(tree.ends[level])
        own_kl = 0.0 if ref is None else (p * (finite - ref[level].clamp(min=_LOG_ZERO))).sum(-1)
        kl = own_kl + (p * join(task, zero, None if last else kl)).sum(-1)
        entropy = -(p * finite).sum(-1) + (p * join(task, zero, None if last else entropy)).sum(-1)
        score = (p * join(task, tree.ends[level], score)).sum(-1)
        levels.append(torch.stack([score, kl, entropy]))
    return levels[::-1]


def _value(
    task: Task, model: AnyPolicy | None, reference: AnyPolicy | None, temperature: float, masked: bool
) -> Tensor:
    """Score, KL and entropy of a policy (None: all tokens alike), averaged over the rows: (3,) float64."""
    ask, ask_reference = asker(task, model, temperature, masked), asker(task, reference, temperature)
    total = torch.zeros(3, dtype=torch.float64)
    for tree in grow_trees(task, task.max_new_tokens, apart=masked):
        ref = None
        if reference is not None:
            with torch.no_grad():
                ref = ask_reference(tree)
        total = total + tree.weight * _induction(task, tree, ask(tree), ref)[0][:, 0]
    return total
