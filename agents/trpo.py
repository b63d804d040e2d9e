"""TRPO: trust-region policy optimisation (Schulman 2015).

    maximise  L(theta) = mean ratio_t * A_t     subject to  mean KL(pi_old(. | s_t) || pi(. | s_t)) <= max_kl

The step goes along F^-1 grad L, found by conjugate gradient on products with the Fisher matrix F, the Hessian of the KL
at theta_old: mean J' (diag p - p p') J with J the Jacobian of a state's logits. It is as long as the bound allows to
second order, and is halved back until the true KL, over the whole vocabulary at every state of the batch, is within the
bound and L has risen; if it never is, nothing moves. The bound follows the schedule of the learning rate, squared:
steps shrink in proportion. The critic learns by AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from textrl.agent import Agent
from textrl.batch import microbatches
from textrl.config import AgentConfig, check
from textrl.critic import Critic, value_loss, with_advantages
from textrl.kl import full_kl
from textrl.models import trainable
from textrl.rollout import Rollout

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(AgentConfig):
    """Settings of TRPO; `learning_rate` is the critic's."""

    cooldown: float = 0.5  # full steps for longer: there is one a batch
    max_kl: float = 0.01  # bound on KL(old || new), the mean over the batch's states, in nats
    cg_iterations: int = 10  # of conjugate gradient
    damping: float = 0.01  # added to F's diagonal
    fisher_episodes: int = 64  # F is that of so many episodes of the batch at most; the bound is checked on all
    backtrack_coef: float = 0.5  # factor of the step at each try of the line search
    backtracks: int = 10  # tries
    critic_epochs: int = 4  # passes of the critic over each batch
    minibatches: int = 2  # its steps a pass
    gamma: float = 1.0  # discount per token
    gae_lambda: float = 0.95  # lambda of GAE
    whiten_advantages: bool = True  # to mean 0, variance 1 over the batch

    def __post_init__(self) -> None:
        """Checks the ranges."""
        super().__post_init__()
        check("max_kl", self.max_kl, 0 < self.max_kl < math.inf, "a finite number above 0")
        check("damping", self.damping, self.damping >= 0, "at least 0")
        check("backtrack_coef", self.backtrack_coef, 0 < self.backtrack_coef < 1, "above 0 and below 1")
        for name in ("cg_iterations", "fisher_episodes", "backtracks", "critic_epochs", "minibatches"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("gamma", "gae_lambda"):
            check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "from 0 to 1")


def surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Mean of ratio * A (Schulman 2015, eq. 14): (n,) three times -> ()."""
    return ((logprobs - old_logprobs).exp() * advantages).mean()


def conjugate_gradient(product: Product, b: Tensor, iterations: int, tolerance: float = 1e-10) -> Tensor:
    """Solves A x = b for a positive definite A known by its products: (p,) -> (p,)."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    squared = residual @ residual
    for _ in range(iterations):
        if squared < tolerance:
            break
        along = product(direction)
        alpha = squared / (direction @ along)
        x += alpha * direction
        residual -= alpha * along
        new = residual @ residual
        direction = residual + new / squared * direction
        squared = new
    return x


class TRPO(Agent):
    """Natural-gradient steps inside a trust region, with a critic."""

    config: TRPOConfig
    config_class: ClassVar[type[AgentConfig]] = TRPOConfig

    def build(self) -> None:
        """Adds the critic."""
        check("dtype", str(self.model.dtype), self.model.dtype == torch.float32, '"float32": steps are small')
        self.value = Critic(self.policy, self.model, self.config.trainable_layers)
        self.critic = self.modules["critic"] = self.value.model
        self.weights = list(trainable(self.model))

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One step of the policy, a few of the critic."""
        config = self.config
        estimator = (config.gamma, config.gae_lambda, config.whiten_advantages)
        at_once = config.max_tokens_per_microbatch
        rollout, known = with_advantages(self.tempered(rollout), self.value, at_once, *estimator)
        numbers = self.step(rollout, config.max_kl * self.schedule**2)
        for _ in range(config.critic_epochs):
            for indices in self.shuffled(len(rollout), config.minibatches):
                numbers["value_loss"] = self.minimise(self._value_loss, rollout.select(indices))["loss"]
        numbers["explained_variance"] = known
        return numbers

    def _value_loss(self, batch: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        assert batch.returns is not None
        return value_loss(self.value(batch), batch.returns, batch.action_mask), {}

    def step(self, rollout: Rollout, max_kl: float) -> dict[str, float]:
        """The natural-gradient step of the policy: KL(old || new) is at most `max_kl` after it."""
        with torch.no_grad():
            old = [self._logits(part) for part, _ in self._parts(rollout)]  # (n, V) each
        before = parameters_to_vector(self.weights).detach().clone()
        gradient = self._surrogate_gradient(rollout)
        fisher = self._fisher(rollout)
        direction = conjugate_gradient(fisher, gradient, self.config.cg_iterations)
        curvature = direction @ fisher(direction)
        numbers = {"kl_old_new": 0.0, "improvement": 0.0, "step_size": 0.0, "grad_norm": float(gradient.norm())}
        if not (torch.isfinite(curvature) and curvature > 0):
            return numbers
        whole = direction * torch.sqrt(2 * max_kl / curvature)
        start, _ = self._measure(rollout, old)
        for attempt in range(self.config.backtracks):
            size = self.config.backtrack_coef**attempt
            vector_to_parameters(before + size * whole, self.weights)
            value, kl = self._measure(rollout, old)
            if kl <= max_kl and value > start:
                return {**numbers, "kl_old_new": kl, "improvement": value - start, "step_size": size}
        vector_to_parameters(before, self.weights)
        return numbers

    # ---- sums over the batch's states, in microbatches -------------------------------------------------------

    def _parts(self, rollout: Rollout) -> Iterator[tuple[Rollout, float]]:
        """Microbatches and their shares of the tokens."""
        for part in microbatches(rollout, self.config.max_tokens_per_microbatch):
            batch = rollout.select(part)
            yield batch, batch.num_tokens / rollout.num_tokens

    def _logits(self, batch: Rollout) -> Tensor:
        """The logits that tokens are drawn from, (n, V) float32."""
        rows, columns, _ = batch.places()
        logits = self.policy.logits(self.policy.hidden(batch.tokens, rows, columns, batch.below))
        logits, allowed = logits / self.policy.temperature, batch.token_masks
        return logits if allowed is None else logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)

    def _surrogate(self, batch: Rollout, logits: Tensor) -> Tensor:
        assert batch.advantages is not None
        logprobs = logits.log_softmax(-1).gather(-1, batch.places()[2][:, None])[:, 0]
        return surrogate(logprobs, batch.logprobs[batch.action_mask], batch.advantages[batch.action_mask])

    def _surrogate_gradient(self, rollout: Rollout) -> Tensor:
        total = torch.zeros((), device=self.device)
        for batch, share in self._parts(rollout):
            value = share * self._surrogate(batch, self._logits(batch))
            total = total + flat(torch.autograd.grad(value, self.weights))
        return total

    def _fisher(self, rollout: Rollout) -> Product:
        """The product with F + damping."""
        chosen = self.shuffled(len(rollout), 1)[0][: self.config.fisher_episodes]
        parts = list(self._parts(rollout.select(chosen)))
        kept = self._linear(parts[0][0]) if len(parts) == 1 else None  # one graph serves every product

        def product(vector: Tensor) -> Tensor:
            total = self.config.damping * vector
            for batch, share in parts:
                total = total + share * self._fisher_product(vector, kept or self._linear(batch))
            return total

        return product

    @sdpa_kernel(SDPBackend.MATH)  # the fused kernels have no second derivative
    def _linear(self, batch: Rollout) -> tuple[Tensor, Tensor, Tensor]:
        """The logits z (n, V), a stand-in u (n, V) for their gradient, and J'u (p,), J the Jacobian of z."""
        logits = self._logits(batch)
        stand_in = torch.zeros_like(logits, requires_grad=True)
        return logits, stand_in, flat(torch.autograd.grad(logits, self.weights, stand_in, create_graph=True))

    @sdpa_kernel(SDPBackend.MATH)  # where a block runs again, too
    def _fisher_product(self, vector: Tensor, linear: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """J' (diag p - p p') J v / n: (p,) -> (p,). J v is the derivative of v'J'u along u."""
        logits, stand_in, pulled = linear
        (moved,) = torch.autograd.grad(pulled @ vector, stand_in, retain_graph=True)  # J v, (n, V)
        p = logits.detach().softmax(-1)
        curved = p * (moved - (p * moved).sum(-1, keepdim=True)) / len(p)
        return flat(torch.autograd.grad(logits, self.weights, curved, retain_graph=True))

    @torch.no_grad()
    def _measure(self, rollout: Rollout, old: list[Tensor]) -> tuple[float, float]:
        """L and KL(old || new) at the weights as they are."""
        value = kl = 0.0
        for (batch, share), old_logits in zip(self._parts(rollout), old, strict=True):
            logits = self._logits(batch)
            value += share * float(self._surrogate(batch, logits))
            kl += share * float(full_kl(old_logits, logits).mean())
        return value, kl


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    """Tensors of any shape as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
