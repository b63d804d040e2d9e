"""What `textrl doctor` asks of a model: each check says what it saw, or raises a `Fault`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .generation import NotFinite
from .kl import full_kl, k1, k3
from .patient import Fault, Patient
from .rollout import policy_in


def finite(patient: Patient) -> str:
    """The model gives numbers at all."""
    fault = Fault("the model's logits are not finite", 'other weights, or dtype="float32"')
    try:
        logits = patient.logits(patient.policy, 1.0)
    except NotFinite:  # nothing could be sampled
        raise fault from None
    if not bool(logits.isfinite().all()):
        raise fault
    return f"{logits.shape[0]} states, logits from {float(logits.min()):.3g} to {float(logits.max()):.3g}"


def ratio(patient: Patient) -> str:
    """Sampling and the first update agree on every log-probability."""
    error = patient.largest((patient.logprobs(patient.rollout) - patient.rollout.logprobs).exp() - 1)
    if not error < patient.near:
        raise Fault(
            f"the first minibatch's ratios differ from 1 by up to {error:.2g}",
            'a model without dropout or other randomness in its forward, in eval mode; or dtype="float32"',
        )
    return f"1 to {error:.1g}"


def padding(patient: Patient) -> str:
    """A row alone, and the same row with padding after it, have the same log-probabilities."""
    device, some = patient.agent.device, range(min(4, len(patient.rollout)))
    alone = [patient.rollout.select(torch.tensor([i], device=device)) for i in some]
    error = 0.0
    for batch in (patient.rollout, *alone):
        empty = batch.tokens.new_full((len(batch), 5), patient.task.eos_token_id)
        longer = replace(batch, tokens=torch.cat([batch.tokens, empty], 1), below=None)
        apart = (patient.logprobs(longer) - patient.logprobs(batch)) * batch.action_mask
        error = max(error, float(apart.abs().max()))
    if not error < patient.near:
        raise Fault(
            f"padding changes log-probabilities by up to {error:.2g}",
            "a causal language model (one whose tokens see only what stands before them), with full attention",
        )
    return f"the same to {error:.1g}"


def order(patient: Patient) -> str:
    """A row's result does not depend on where in the batch it stands, or beside which."""
    batch, here = patient.rollout, patient.logprobs(patient.rollout)
    turned = torch.arange(len(batch) - 1, -1, -1, device=batch.tokens.device)
    error = patient.largest(patient.logprobs(batch.select(turned))[turned] - here)
    for i in range(min(4, len(batch))):  # alone, as wide as it is beside the others
        one = batch.select(turned.new_tensor([i]))
        wide = replace(one, tokens=batch.tokens[i : i + 1], below=None)
        apart = (patient.logprobs(wide)[0] - here[i, : one.action_mask.shape[1]]) * one.action_mask[0]
        error = max(error, float(apart.abs().max()))
    if not error < patient.near:
        raise Fault(
            f"the order of a batch, or who is in it, changes log-probabilities by up to {error:.2g}",
            "a model whose rows do not see each other: layer norm in place of batch norm",
        )
    return f"the same to {error:.1g}"


def temperature(patient: Patient) -> str:
    """The log-probabilities of sampling are those of the environment's temperature."""
    asked, used = patient.agent.base.temperature, patient.policy.temperature
    logits, allowed = patient.logits(patient.policy, asked), patient.rollout.token_masks
    if allowed is not None:
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    right = logits.log_softmax(-1).gather(-1, patient.rollout.places()[2][:, None])[:, 0]
    error = patient.apart(right - patient.rollout.logprobs[patient.rollout.action_mask])
    if used == asked and not error < patient.near:
        raise Fault(
            f"sampling and the model's own forward differ in log-probabilities by {error:.2g}, at one temperature",
            "a model that says the same of a text token by token and as a whole",
        )
    if used != asked:
        raise Fault(
            f"tokens are drawn at temperature {used:g} and scored by the environment at {asked:g}: log-probabilities"
            f" differ by {error:.2g}",
            "the same temperature in both, as gym.make(..., temperature=...) sets it",
        )
    return f"{used:g} in sampling and scoring"


def kl(patient: Patient) -> str:
    """The penalty is -kl_coef * (log pi - log pi_ref), and its estimators mean the KL summed over the vocabulary."""
    base, rollout = patient.agent.base, patient.rollout
    if base.reference is None:
        return "no reference, no penalty"
    reference = policy_in(base, base.reference)
    here, there = patient.logits(patient.policy, base.temperature), patient.logits(reference, base.temperature)
    logprobs, ref_logprobs = here.log_softmax(-1), there.log_softmax(-1)  # (n, V)
    full = full_kl(here, there)
    for name, estimator in (("k1", k1), ("k3", k3)):
        mean = (logprobs.exp() * estimator(logprobs, ref_logprobs)).sum(-1)
        if not float((mean - full).abs().max()) < patient.near * (1 + float(full.max())):
            raise Fault(
                f"{name} has the mean {float(mean.mean()):.3g}, the sum over the vocabulary {float(full.mean()):.3g}",
                "a reference that gives every token of the policy some probability",
            )
    chosen = rollout.places()[2][:, None]
    every = -base.kl_coef * (logprobs - ref_logprobs).gather(-1, chosen)[:, 0]
    for how, paid in (("sampled", rollout.rewards[rollout.action_mask]), ("stepped", _penalties(patient))):
        if paid is None or rollout.allowed is not None:
            continue
        right = every[: len(paid)]
        if len(paid) and float((paid - right).abs().max()) < patient.near:
            continue
        turned = float((paid + right).abs().max()) < patient.near
        what = "has the wrong sign" if turned else f"is off by up to {float((paid - right).abs().max()):.2g}"
        raise Fault(
            f"the KL penalty of a {how} episode {what}",
            "a reward of -kl_coef * (log pi - log pi_ref) at every token, from a reference that always says the same",
        )
    return (
        f"{float(full.mean()):.3g} nats a token, paid with the right sign; k1 and k3 mean the sum over the vocabulary"
    )


def _penalties(patient: Patient) -> Tensor | None:
    """What the environment pays beside the score for each token of the first episodes; None if it scores them all."""
    plain, stepper = patient.plain, patient.agent.stepper
    before, plain.policy = plain.policy, stepper
    try:
        paid = [reward for rewards, _, _ in patient.stepped() for reward in rewards]
    finally:
        plain.policy = before
        stepper.forget()
    return None if patient.task.token_scores else torch.tensor(paid, device=patient.agent.device)


def gradients(patient: Patient) -> str:
    """Every trainable parameter learns; no frozen one does, nor the reference."""
    agent, model = patient.agent, patient.agent.model
    mine = {p.data_ptr() for p in model.parameters()}
    reference = agent.base.reference
    shared = [] if reference is None else [name for name, p in reference.named_parameters() if p.data_ptr() in mine]
    if shared:
        raise Fault(
            f"the reference shares weights with the policy ({shared[0]}): training would move both",
            "copy.deepcopy(model) as one of them",
        )
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    known = {id(p) for p in agent.optimizer.parameters}
    if lost := [name for name, p in learning.items() if id(p) not in known]:
        raise Fault(f"{lost[0]} is trainable but not in the optimizer", "freeze and thaw before the agent is made")
    if patient.rollout.tokens.shape[1] < 3:
        return "texts are too short to tell"
    dead = _without_gradient(patient, learning)
    if dead:  # weights behind a zero (an adapter that starts at nothing) learn only once that has moved
        before = {name: p.detach().clone() for name, p in learning.items()}
        generator = torch.Generator(device=agent.device).manual_seed(0)
        try:
            with torch.no_grad():
                for p in learning.values():
                    p += 0.01 * torch.randn(p.shape, generator=generator, device=p.device).to(p.dtype)
            dead = [name for name in _without_gradient(patient, learning) if name in dead]
        finally:
            with torch.no_grad():
                for name, p in learning.items():
                    p.copy_(before[name])
    if dead:
        raise Fault(
            f"{len(dead)} of {len(learning)} trainable parameters get no gradient, {dead[0]} among them",
            "requires_grad_(False) for what is not to learn, or a forward that uses it and does not detach it",
        )
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return f"{len(learning)} parameters learn, {len(frozen)} are frozen"


def _without_gradient(patient: Patient, learning: dict[str, Any]) -> list[str]:
    """The names of trainable parameters that a loss over the rollout gives no gradient; checks the frozen ones."""
    agent, rollout = patient.agent, patient.rollout
    models = [agent.model, *([agent.base.reference] if agent.base.reference is not None else [])]
    frozen = [(name, p) for model in models for name, p in model.named_parameters() if not p.requires_grad]
    agent.model.zero_grad()
    try:
        agent.logprobs(rollout)[rollout.action_mask].square().mean().backward()  # type: ignore[no-untyped-call]
        if moved := [name for name, p in frozen if p.grad is not None]:
            raise Fault(f"{moved[0]} is frozen but gets a gradient", "requires_grad_(False)")
        return [name for name, p in learning.items() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    finally:
        agent.model.zero_grad()
