"""From features to defocus with its uncertainty, and the loss that teaches both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_autofocus.models.nets.base import (
    NetContext,
    NetOptions,
    Output,
    count_of,
    full_precision,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BinsHead", "GaussianHead", "make_head"]

_LEAST_SD_UM = 0.02
_MODE_BINS = 7.0  # half width of what counts to the peak, in bins
_BLUR_BINS = 0.75  # standard deviation of a soft label, in bins


class GaussianHead(nn.Module):
    """A mean and the logarithm of a standard deviation.

    The loss is a smooth L1 of the mean, which learns from the first step on, plus the
    likelihood of the error under the standard deviation with the mean held fixed: so the
    uncertainty describes the error, and a net cannot trade one for the other (compare
    Seitzer et al., *ICLR* 2022).
    """

    def __init__(self, features: int, context: NetContext) -> None:
        super().__init__()
        low, high = context.range_um
        self.middle, self.span = (low + high) / 2, max((high - low) / 2, 1e-6)
        self.linear = nn.Linear(features, 2)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Output:
        """Features ``(N, F)`` to defocus."""
        with full_precision(x):
            mean, log_sd = self.linear(x.float()).unbind(1)
        usual = math.log(self.span / 2)
        # bounded: a standard deviation of 0 or of infinity has no gradient
        log_sd = (log_sd + usual).clamp(math.log(_LEAST_SD_UM), math.log(4 * self.span))
        return Output(mean * self.span + self.middle, log_sd, {})

    def losses(self, output: Output, defocus_um: Tensor) -> dict[str, Tensor]:
        """Parts of the loss."""
        error = (output.defocus - defocus_um) / self.span * 4
        return {
            "regression": F.smooth_l1_loss(error, torch.zeros_like(error)),
            "uncertainty": 0.1 * laplace_nll(output, defocus_um).mean(),
        }


class BinsHead(nn.Module):
    """A distribution over bins of defocus.

    Taught by cross-entropy with labels blurred over neighbouring bins (Imani & White,
    *ICML* 2018), which keeps both answers of a net that is unsure of the sign, and a small
    smooth L1 on the value that is read out.
    """

    def __init__(self, features: int, context: NetContext, options: NetOptions) -> None:
        super().__init__()
        low, high = context.range_um
        n = count_of(context.range_um, options.bin_um) + 4  # room for labels at the ends
        self.step = options.bin_um
        self.readout = options.readout
        middle = (low + high) / 2
        centres = middle + (torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * self.step
        self.register_buffer("centres", centres)
        self.linear = nn.Linear(features, n)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Output:
        """Features ``(N, F)`` to defocus."""
        centres: Tensor = self.centres  # type: ignore[assignment]
        with full_precision(x):  # 8 bits do not tell 20.0 from 20.1 µm
            logits = self.linear(x.float())
        p = logits.softmax(1)
        if self.readout == "mean":
            defocus = (p * centres).sum(1)
        else:
            top = centres[p.argmax(1)].unsqueeze(1)
            near = p * ((centres - top).abs() < _MODE_BINS * self.step)
            defocus = (near * centres).sum(1) / near.sum(1)
        variance = (p * (centres - defocus.unsqueeze(1)).square()).sum(1)
        log_sd = 0.5 * (variance + _LEAST_SD_UM**2).log()
        return Output(defocus, log_sd, {"logits": logits})

    def losses(self, output: Output, defocus_um: Tensor) -> dict[str, Tensor]:
        """Parts of the loss."""
        centres: Tensor = self.centres  # type: ignore[assignment]
        off = (centres - defocus_um.unsqueeze(1)) / (self.step * _BLUR_BINS)
        label = (-0.5 * off.square()).softmax(1)
        error = (output.defocus - defocus_um) / (4 * self.step)
        return {
            "bins": F.cross_entropy(output.extra["logits"], label),
            "regression": 0.2 * F.smooth_l1_loss(error, torch.zeros_like(error)),
        }


def laplace_nll(output: Output, defocus_um: Tensor) -> Tensor:
    """Negative log-likelihood ``(N,)`` of the errors, whose mean is held fixed.

    Laplace's distribution, not Gauss's: a few wrong signs are no reason to distrust all.
    """
    error = (output.defocus.detach() - defocus_um).abs()
    return math.sqrt(2) * error * torch.exp(-output.log_sd) + output.log_sd


def make_head(
    features: int, context: NetContext, options: NetOptions
) -> GaussianHead | BinsHead:
    """The head that the options name."""
    make: dict[str, Callable[[], GaussianHead | BinsHead]] = {
        "gaussian": lambda: GaussianHead(features, context),
        "bins": lambda: BinsHead(features, context, options),
    }
    return make[options.head]()
