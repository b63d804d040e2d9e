"""AdamW with float32 master weights, gradient clipping, and a refusal to step on gradients that are not finite.

Tables, of which a batch uses few rows, have an Adam of their own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

TABLE_BETA2 = 0.999
"""Decay of a table's mean of squared gradients: the usual one; of `RowAdam` over the steps that used the row."""

FLOAT16_SCALE = 1024.0


class RowAdam(torch.optim.Optimizer):
    """AdamW for tables (R, d), each row with moments and a clock of its own (Kingma 2015, algorithm 1, row by row).

    A row without a gradient stays as it is. One clock for all would move a row that was used once by
    1 / sqrt(1 - beta2) learning rates, whatever the size of its gradient.
    """

    def __init__(
        self, tables: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves the rows that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state["step"] = table.new_zeros(len(table), 1)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
                rows = table.grad.any(1).nonzero()[:, 0]
                gradient = table.grad[rows]
                step = state["step"][rows] + 1  # (n, 1)
                mean = state["exp_avg"][rows].lerp(gradient, 1 - beta1)  # (n, d)
                square = state["exp_avg_sq"][rows].lerp(gradient**2, 1 - beta2)
                state["step"][rows], state["exp_avg"][rows], state["exp_avg_sq"][rows] = step, mean, square
                scale = (square / (1 - beta2**step)).sqrt() + group["eps"]
                kept = (1 - group["lr"] * group["weight_decay"]) * table[rows]
                table[rows] = kept - group["lr"] * mean / (1 - beta1**step) / scale


class Optimizer:
    """AdamW for parameters of any dtype: those below float32 are updated through float32 copies.

    Args:
        groups: what learns, a model's parameters each; one that is in several counts in the first.
        learning_rate: the step size.
        max_grad_norm: the norm that the gradient of each group is clipped to, so that a critic's does not shrink the
            policy's; 0 does not clip.
        weight_decay: decoupled, as in AdamW.
        eps: 1e-5, as PPO wants it (Huang 2022, detail 3).
        beta2: the decay of the running mean of squared gradients. A weight that seldom has a gradient is moved by
            about learning_rate / sqrt(1 - beta2) each time it has one, however small: 32 learning rates at 0.999.
        tables: those of the parameters that are tables; their beta2 is `TABLE_BETA2`.
        row_clocks: whether `RowAdam` moves the tables, or AdamW like all else.

    Attributes:
        skipped: steps not taken because the gradient was not finite.
        scale: what losses may be multiplied by before `backward`, because float16 has no numbers below 6e-8
            (Micikevicius 2018); `step` is told. It is halved where a gradient was not finite; 1 without float16.
    """

    def __init__(
        self,
        *groups: Iterable[nn.Parameter],
        learning_rate: float,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.0,
        eps: float = 1e-5,
        beta2: float = 0.999,
        tables: Collection[nn.Parameter] = (),
        row_clocks: bool = True,
    ) -> None:
        self.parameters: list[nn.Parameter] = []
        self.groups: list[slice] = []
        for group in groups:
            known, start = set(self.parameters), len(self.parameters)
            self.parameters += [p for p in group if p not in known]
            self.groups.append(slice(start, len(self.parameters)))
        if not self.parameters:
            raise ValueError("model has no parameter that requires a gradient: nothing could be learned")
        self.masters: list[Tensor] = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in self.parameters
        ]
        apart = {id(parameter) for parameter in tables}
        common: dict[str, Any] = {"lr": learning_rate, "eps": eps, "weight_decay": weight_decay}
        self.adams: list[torch.optim.Optimizer] = []
        self.moved: list[list[int]] = []  # which masters each of them moves
        for of_tables in (False, True):
            moved = [i for i, parameter in enumerate(self.parameters) if (id(parameter) in apart) == of_tables]
            masters, betas = [self.masters[i] for i in moved], (0.9, TABLE_BETA2 if of_tables else beta2)
            if of_tables and row_clocks and moved:
                self.adams.append(RowAdam(masters, betas=betas, **common))
            elif moved:
                self.adams.append(torch.optim.AdamW(masters, betas=betas, fused=True, **common))
            self.moved += [moved] if moved else []
        self.max_grad_norm = max_grad_norm
        self.skipped = 0
        self.scale = FLOAT16_SCALE if any(p.dtype == torch.float16 for p in self.parameters) else 1.0
        self._written: list[int] = []
        self._note()

    @property
    def learning_rate(self) -> float:
        """The step size; may be set between steps (a schedule)."""
        return self.adams[0].param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for adam in self.adams:
            adam.param_groups[0]["lr"] = value

    def _note(self) -> None:
        """Takes down which state of the parameters the float32 copies belong to."""
        self._written = [parameter._version for parameter in self.parameters]

    @torch.no_grad()
    def _follow(self) -> None:
        """Takes weights that somebody else has set over into their float32 copies; those that say the same stay."""
        for parameter, master, written in zip(self.parameters, self.masters, self._written, strict=True):
            if parameter is not master and parameter._version != written:
                master.copy_(torch.where(master.to(parameter.dtype) == parameter, master, parameter.float()))

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, scale: float = 1.0) -> float:
        """Takes one step with the gradients at hand; returns the norm of all of them before clipping.

        A norm that is not finite takes no step, and is counted in `skipped` where it is no fault of a scale.

        Args:
            scale: what the gradients are divided by first.
        """
        self._follow()
        live = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p.grad is not None]
        low = [(p, m) for p, m in live if p is not m]
        if low:  # all at once: on a GPU a copy for each would cost more than the step
            wide = [torch.empty_like(master) for _, master in low]
            torch._foreach_copy_(wide, [p.grad for p, _ in low if p.grad is not None])
            for (_, master), gradient in zip(low, wide, strict=True):
                master.grad = gradient
        if scale != 1:
            torch._foreach_mul_([master.grad for _, master in live if master.grad is not None], 1 / scale)
        limit = self.max_grad_norm if self.max_grad_norm > 0 else math.inf
        taught = ([master for master in self.masters[group] if master.grad is not None] for group in self.groups)
        norms = [nn.utils.clip_grad_norm_(masters, limit) for masters in taught if masters]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        if math.isfinite(norm):
            for adam in self.adams:
                adam.step()
            torch.autograd.graph.increment_version([master for _, master in live])  # a fused step leaves it out
            if low:
                with torch.no_grad():
                    torch._foreach_copy_([parameter for parameter, _ in low], [master for _, master in low])
        else:
            self.skipped += scale == 1
            self.scale = max(1.0, self.scale / 2)
        self._note()
        self.zero_grad()
        for _, master in live:
            master.grad = None
        return norm

    def get_weights(self) -> list[Tensor]:
        """A copy of what learns, in float32."""
        self._follow()
        return [master.detach().clone() for master in self.masters]

    def set_weights(self, weights: list[Tensor]) -> None:
        """Puts back what `get_weights` gave."""
        with torch.no_grad():
            for parameter, master, weight in zip(self.parameters, self.masters, weights, strict=True):
                master.copy_(weight)
                if parameter is not master:
                    parameter.copy_(master)
        self._note()

    def state_dict(self) -> dict[str, Any]:
        """The moments, the float32 copies and the counts; not the settings."""
        self._follow()
        copies = [None if m is p else m.detach() for p, m in zip(self.parameters, self.masters, strict=True)]
        counts = {"skipped": self.skipped, "learning_rate": self.learning_rate, "scale": self.scale}
        moments = {i: adam.state[m] for i, m in enumerate(self.masters) for adam in self.adams if m in adam.state}
        return {"adam": moments, "masters": copies, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, for the same parameters.

        Raises:
            ValueError: for a state of other parameters.
        """
        by_row = {i for adam, moved in zip(self.adams, self.moved, strict=True) for i in moved if type(adam) is RowAdam}
        fits = len(state["masters"]) == len(self.masters) and all(
            self.masters[i].shape == moments["exp_avg"].shape
            and moments["step"].numel() == (len(self.masters[i]) if i in by_row else 1)
            for i, moments in state["adam"].items()
        )
        if not fits:
            raise ValueError(
                "the state of the optimizer is that of other parameters: keep trainable_layers, row_clocks and the"
                " version of textrl as they were"
            )
        for adam, moved in zip(self.adams, self.moved, strict=True):
            moments = {k: state["adam"][i] for k, i in enumerate(moved) if i in state["adam"]}
            adam.load_state_dict({"state": moments, "param_groups": adam.state_dict()["param_groups"]})
        with torch.no_grad():
            for parameter, master, copy in zip(self.parameters, self.masters, state["masters"], strict=True):
                if parameter is not master:
                    master.copy_(parameter if copy is None else copy)
        self._note()
        self.skipped, self.learning_rate = state["skipped"], state["learning_rate"]
        self.scale = state.get("scale", self.scale)
