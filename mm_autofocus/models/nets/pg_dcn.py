"""Physics-guided deep cascade: which way first, then how far on that side.

After *Learning to autofocus in whole slide imaging via physics-guided deep cascade networks*
(Li et al., *Opt. Express* 30 (2022)). A classifier decides on the direction; one regressor
answers for the negative, another for the positive side. Both are always computed and one is
selected, so that the net is one graph.

What the physics-guided part is here: `physics.OtfMatch`, built from the numerical aperture,
wavelength and pixel size of the dataset, compares the power spectrum of the patch with what
the optical transfer function predicts for each of a grid of hypotheses of defocus. Its
answers feed the classifier and both regressors beside learned features, and a loss of its
own holds it to the label. It was derived from the theory, not from the paper's text. Where
the optics are not known, nominal ones stand in, and the learned spectrum makes up for it
in part.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_autofocus.models.nets.base import (
    AnyOptions,
    DefocusNet,
    NetContext,
    Output,
    full_precision,
)
from mm_autofocus.models.nets.heads import laplace_nll
from mm_autofocus.models.nets.physics import OtfMatch
from mm_autofocus.models.nets.sparsefocus import Dpn, SparseFocusOptions

__all__ = ["PgDcn", "PgDcnOptions"]


class PgDcnOptions(SparseFocusOptions):
    """Options of `PgDcn`: those of the trunk, and of the cascade.

    Attributes
    ----------
    shared : bool
        One trunk for the classifier and both regressors, instead of three.
    physics : bool
        Whether the power spectrum is compared with the theory.
    physics_weight : float
        Of the loss that holds this comparison to the label.
    """

    head: Literal["gaussian"] = "gaussian"
    shared: bool = True
    physics: bool = True
    physics_weight: float = 0.1


class PgDcn(DefocusNet):
    """Direction classifier and two side regressors."""

    Options: ClassVar[type[AnyOptions]] = PgDcnOptions

    def __init__(self, context: NetContext, options: PgDcnOptions) -> None:
        super().__init__(context, options)
        self.match = OtfMatch(context) if options.physics else None
        trunks = [Dpn(context, options) for _ in range(1 if options.shared else 3)]
        self.trunks = nn.ModuleList(trunks)
        width = trunks[0].features + (self.match.features if self.match else 0)
        self.direction = _mlp(width, 1)
        self.below, self.above = _mlp(width, 2), _mlp(width, 2)
        low, high = context.range_um
        self.reach = max(-low, high, 1e-6)

    def forward(self, patches: Tensor) -> Output:
        """Predict the defocus of patches ``(N, C, P, P)``."""
        seen = [trunk(patches).float() for trunk in self.trunks]
        with full_precision(patches):
            return self._answer(seen, patches)

    def _answer(self, seen: list[Tensor], patches: Tensor) -> Output:
        """From features of the trunks: the direction, both sides, the one selected."""
        extra: dict[str, Tensor] = {}
        if self.match is not None:
            physical, extra["hypotheses"] = self.match(patches)
            seen = [torch.cat((x, physical), 1) for x in seen]
        direction = self.direction(seen[0]).squeeze(1)
        sides = [
            self._side(regressor, seen[k % len(seen)])
            for k, regressor in enumerate((self.below, self.above), start=1)
        ]
        (below, below_sd), (above, above_sd) = sides
        p = direction.sigmoid()
        up = direction > 0
        defocus = torch.where(up, above, -below)
        # of the two answers together, about the one selected
        variance = p * (above_sd**2 + (above - defocus).square())
        variance = variance + (1 - p) * (below_sd**2 + (-below - defocus).square())
        extra |= {
            "direction": direction,
            "below": below,
            "above": above,
            "below_sd": below_sd,
            "above_sd": above_sd,
        }
        return Output(defocus, 0.5 * variance.log(), extra)

    def _side(self, regressor: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (N,) and its standard deviation (N,), in µm."""
        distance, log_sd = regressor(x).unbind(1)
        # about 0.7 of a tenth of the reach to begin with; never negative
        distance = F.softplus(distance) * self.reach / 4
        bound = (math.log(0.02), math.log(4 * self.reach))
        return distance, (log_sd + math.log(self.reach / 4)).clamp(*bound).exp()

    def losses(self, output: Output, defocus_um: Tensor) -> dict[str, Tensor]:
        """Parts of the loss."""
        extra = output.extra
        up = (defocus_um > 0).to(defocus_um.dtype)
        # in focus, either direction is as good as the other
        weight = (defocus_um.abs() / (0.04 * self.reach)).clamp(max=1.0)
        direction = F.binary_cross_entropy_with_logits(
            extra["direction"], up, weight=weight, reduction="mean"
        )
        chosen = torch.where(defocus_um > 0, extra["above"], extra["below"])
        sd = torch.where(defocus_um > 0, extra["above_sd"], extra["below_sd"])
        error = (chosen - defocus_um.abs()) / self.reach * 4
        side = Output(chosen, sd.log(), {})
        parts = {
            "direction": direction,
            "regression": F.smooth_l1_loss(error, torch.zeros_like(error)),
            "uncertainty": 0.1 * laplace_nll(side, defocus_um.abs()).mean(),
        }
        if self.match is not None:
            grid: Tensor = self.match.hypotheses  # type: ignore[assignment]
            step = grid[1] - grid[0]
            off = (grid - defocus_um.unsqueeze(1)) / step
            label = torch.exp(-0.5 * off.square())
            if self.match.looks == 1:
                # one look cannot tell the side: either is right
                mirrored = ((-grid - defocus_um.unsqueeze(1)) / step).square()
                label = label + torch.exp(
                    -0.5 * mirrored
                )  # nothing where it is not in the grid
            label = label / label.sum(1, keepdim=True).clamp(min=1e-6)
            physics = F.cross_entropy(extra["hypotheses"], label)
            parts["physics"] = self.options.physics_weight * physics  # type: ignore[attr-defined]
        return parts


def _mlp(features: int, out: int) -> nn.Sequential:
    last = nn.Linear(64, out)
    nn.init.zeros_(last.bias)
    nn.init.normal_(last.weight, std=0.01)
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(inplace=True), last)
