"""Muon, for processors.

`torch.optim.Muon` makes the whole of a matrix orthogonal, in bfloat16: for the matrices that
read spectra, on a core that does not know bfloat16, the most of a step. In blocks of rows, each
by itself, it costs a fraction, and they learn as well (`benchmarks/muon_cost.py`). Matrices
divided among devices are taught so in most of their steps (Khaled et al., 2025, "MuonBP").
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["BlockMuon", "orthogonal"]

_ROWS = 128  # of a block
_QUINTIC = (3.4445, -4.775, 2.0315)  # of Jordan et al.: singular values to 0.7 … 1.2 in 5 steps
_STEPS = 5
_TINY = 1e-7


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring all singular values near 1 by Newton-Schulz steps.

    Parameters
    ----------
    matrix : Tensor
        ``(M, N)`` float32.

    Returns
    -------
    Tensor
        Of the same shape, singular values between about 0.7 and 1.2, but for those that were
        some hundred times smaller than the largest, and remain small.
    """
    a, b, c = _QUINTIC
    x: Tensor = matrix / (matrix.norm() + _TINY)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.mT
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class BlockMuon(torch.optim.Optimizer):
    """Momentum whose steps are of one length in all directions, by blocks of 128 rows.

    All else as in `torch.optim.Muon` (Jordan et al., 2024): Nesterov momentum, decoupled
    weight decay, longer steps for tall matrices.

    Parameters
    ----------
    params : iterable of Tensor
        Matrices.
    lr : float
        Length of a step.
    momentum : float
        Of the gradient.
    weight_decay : float
        By which part of `lr` weights shrink in a step.

    Raises
    ------
    ValueError
        A parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"not a matrix: {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            momentum, lr = group["momentum"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                kept = state["momentum_buffer"]
                kept.lerp_(p.grad, 1 - momentum)
                ahead = p.grad.lerp(kept, momentum)
                step = torch.cat([orthogonal(rows) for rows in ahead.split(_ROWS)])
                rows, columns = p.shape
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(step, alpha=-lr * max(1.0, rows / columns) ** 0.5)
