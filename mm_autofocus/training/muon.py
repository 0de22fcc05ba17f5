"""Muon: steps of which every direction of a matrix is as long as any other.

Source: Jordan et al., *Muon: an optimizer for hidden layers in neural networks* (2024). The
momentum of a matrix is replaced by the orthogonal matrix nearest to it, approximately, by five
steps of a Newton-Schulz iteration. Spectra are strongly correlated inputs: plain steps learn
what is common to all rings first and what tells lens from defocus, a few per cent of it, last.

`torch.optim.Muon` iterates in bfloat16, which processors without it emulate: a hundred times
as slow as the single precision here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonal"]

_QUINTIC = (3.4445, -4.7750, 2.0315)  # of the paper: steep at 0, about 1 from 0.7 to 1.2
_STEPS = 5


def orthogonal(matrix: Tensor) -> Tensor:
    """What is nearly ``U Vᵀ`` of a matrix ``U S Vᵀ``: singular values from 0.7 to 1.2.

    Parameters
    ----------
    matrix : Tensor
        ``(A, B)``.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.t() if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        square = x @ x.t()
        x = a * x + (b * square + c * square @ square) @ x
    return x.t() if tall else x


class Muon(torch.optim.Optimizer):
    """For the matrices of hidden layers; biases and heads are another one's.

    Parameters
    ----------
    params : iterable of Tensor
        Matrices.
    lr : float
        Length of a step.
    weight_decay, momentum : float
        As usual; Nesterov's.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - momentum)
                way = orthogonal(p.grad.lerp(state["momentum"], momentum))
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(way, alpha=-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)
        return loss
