"""The KL penalty of a step, wherever it is paid: in an environment, or in a wrapper around one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .config import check

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .task import Task

Policy = Callable[[NDArray[np.int64]], Any]
"""observations (B, L) int64 -> next-token logits (B, V), a tensor or an array."""


class Penalty:
    """`-kl_coef * (log pi - log pi_ref)` of a token; `+kl_coef * log pi_ref` where the policy is not known.

    Args:
        reference: a causal language model, or the name or folder of one. It is frozen in place.
        task: what is played.

    Attributes:
        reference: the model.
        stepper: the model as a `Policy` that reads one token a step.
    """

    def __init__(self, reference: PreTrainedModel | str, task: Task) -> None:
        from .stepwise import frozen_reference

        self.vocab_size = task.vocab_size
        self.reference, self.stepper = frozen_reference(reference, task)

    def __call__(
        self,
        observations: NDArray[np.int64],
        actions: Any,
        kl_coef: float,
        temperature: float,
        policy: Policy | None,
        live: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float32]]]:
        """States (B, L), tokens (B,) -> what is added to the rewards (B,), and the columns of info, (B,) each.

        Of rows that are not `live`, (B,), whose texts have ended, nothing is asked and nobody reads the numbers.

        Raises:
            ValueError: for a policy that gives one of the tokens no finite log-probability.
        """
        if live is not None and not live.all():
            observations, actions = unasked(observations, ~live, self.vocab_size), np.where(live, actions, 0)
        ref_logprobs = chosen_logprobs(self.stepper(observations), actions, temperature)
        if policy is None:
            return kl_coef * ref_logprobs.astype(np.float64), {"ref_logprob": ref_logprobs}
        logprobs = chosen_logprobs(policy_logits(policy, observations, self.vocab_size), actions, temperature)
        lost = ~np.isfinite(logprobs) & (True if live is None else live)
        if lost.any():
            row = int(lost.argmax())
            token = int(np.asarray(actions)[row])
            right = f"a function whose logits give the token taken, {token}, a finite log-probability"
            check("policy", float(logprobs[row]), False, right)
        kl = logprobs - ref_logprobs
        return -kl_coef * kl.astype(np.float64), {"ref_logprob": ref_logprobs, "kl": kl}


def unasked(observations: NDArray[np.int64], rows: NDArray[np.bool_], vocab_size: int) -> NDArray[np.int64]:
    """The same with the last token of these rows taken off: the state that was asked about last, (B, L)."""
    out = observations.copy()
    (where,) = rows.nonzero()
    out[where, (observations[where] != vocab_size).sum(1) - 1] = vocab_size
    return out


def policy_logits(policy: Policy, observations: NDArray[np.int64], vocab_size: int) -> Tensor:
    """What a policy says of states, without what its vocabulary is padded with: (B, L) -> (B, V).

    Raises:
        ValueError: for what are no logits of these states.
    """
    import torch

    right = "a function observations (B, L) -> logits (B, V)"
    if isinstance(policy, torch.nn.Module) and hasattr(policy, "get_input_embeddings"):
        right += "; textrl.policy.CausalPolicy(model, vocab_size) in a textrl.stepwise.StepwiseLM is one of a model"
        check("policy", type(policy).__name__, False, right)
    check("policy", policy, callable(policy), right)
    logits: Any = policy(observations)
    try:
        logits = torch.as_tensor(logits)
        fine = logits.ndim == 2 and len(logits) == len(observations) and logits.shape[1] >= vocab_size
    except (TypeError, ValueError, RuntimeError):
        fine = False
    check("policy", logits, fine, f"a function that gives logits ({len(observations)}, {vocab_size})")
    return logits[:, :vocab_size]


def chosen_logprobs(logits: Tensor | NDArray[Any], tokens: Any, temperature: float) -> NDArray[np.float32]:
    """The log-softmax of logits / temperature at the chosen tokens, in float32: (B, V), (B,) -> (B,)."""
    import torch

    scaled = torch.as_tensor(logits).detach().float() / temperature  # (B, V)
    chosen = torch.as_tensor(np.asarray(tokens), device=scaled.device)[:, None]
    return scaled.log_softmax(-1).gather(-1, chosen)[:, 0].cpu().numpy()
