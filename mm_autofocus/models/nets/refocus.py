"""What nets that recover the sharp image share: what they are shown, what they return."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from mm_autofocus.models.nets.base import (
    AnyOptions,
    Net,
    NetContext,
    full_precision,
)

__all__ = ["Recovered", "RefocusNet", "RefocusOptions", "TowardHead"]

_LEAST_SD_UM = 0.05
_MOST_SD_UM = 10.0
_LEAST_GRAIN = 1e-4
"""Added to the square of errors of the image: 1 % of the range, squared. A field without
specimen is noise, and would else count for nothing or for everything."""


class RefocusOptions(AnyOptions):
    """Options that every one of them has.

    Attributes
    ----------
    loss : {"mse", "charbonnier"}
        Of the image: mean square (as published), or nearly the mean absolute error, which
        blurs less.
    toward_weight : float
        Weight of the loss of the distance to focus beside that of the image.
    """

    loss: Literal["mse", "charbonnier"] = "mse"
    toward_weight: float = 0.1


class Recovered(NamedTuple):
    """What a net returns.

    Attributes
    ----------
    image : Tensor
        ``(N, C, H, W)`` float32, 0 … 1 and a little beyond.
    toward : Tensor
        ``(N, H / 8, W / 8)``, µm: how far focus lies from the sharper shot towards the
        other one. Negative: beyond the sharper one, so that the shots do not enclose it.
    log_sd : Tensor
        ``(N, H / 8, W / 8)``, natural logarithm of its standard deviation.
    """

    image: Tensor
    toward: Tensor
    log_sd: Tensor


class TowardHead(nn.Module):
    """From features at an eighth of the resolution to the distance to focus.

    It stays local, like everything in these nets: no mean over the frame is taken, so that
    a frame gives the same in tiles and as a whole.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(features, 2, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(N, F, h, w)`` to the distance and the logarithm of its sd."""
        with full_precision(x):
            toward, log_sd = F.conv2d(x.float(), self.conv.weight, self.conv.bias).unbind(1)
        return toward, log_sd.clamp(math.log(_LEAST_SD_UM), math.log(_MOST_SD_UM))


class RefocusNet(Net):
    """Base of the nets that recover the sharp image.

    A subclass sets `Options` and `shots`, and implements `recover`. The frame may have any
    size that is a multiple of `multiple`; all parts of a net are local, and what lies more
    than `halo_px` inside a frame does not depend on where the frame ends.
    """

    Options: ClassVar[type[AnyOptions]] = RefocusOptions
    task = "refocus"
    shots: ClassVar[int] = 2
    multiple: ClassVar[int] = 8

    def __init__(self, context: NetContext, options: RefocusOptions) -> None:
        super().__init__(context, options)
        self.options: RefocusOptions = options

    @property
    def halo_px(self) -> int:
        """Margin that a tile loses, a multiple of `multiple`."""
        raise NotImplementedError

    def recover(self, shots: Tensor, side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is to be added to the sharper shot, the distance, and its log sd."""
        raise NotImplementedError

    def forward(self, shots: Tensor, side: Tensor) -> Recovered:
        """Recover the sharp image.

        Parameters
        ----------
        shots : Tensor
            ``(N, shots · C, H, W)`` float32 in 0 … 1; the sharper one (Brenner) first.
        side : Tensor
            ``(N,)``: +1 where the sharper shot is the lower one, else -1.
        """
        change, toward, log_sd = self.recover(shots, side)
        # in full precision: half of it would round what needs no change at all
        image = shots[:, : self.context.channels].float() + change.float()
        return Recovered(image, toward, log_sd)

    def losses_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parts of the loss, weighted, of a batch of `training.pairs.PairSource`."""
        shots = batch["shots"][:, : self.shots * self.context.channels]
        out = self(shots, batch["side"])
        error = out.image - batch["truth"].float()
        if self.options.loss == "mse":
            # in parts of a square error that is usual: the clip of gradients is absolute
            image = 1000 * error.square().mean()
        else:
            image = 20 * (error.square() + _LEAST_GRAIN).sqrt().mean()
        target = batch["toward_um"][:, None, None].expand_as(out.toward)
        off = out.toward - target
        weight = self.options.toward_weight
        # as in heads.GaussianHead: the mean learns from the error, the sd describes it
        likelihood = out.log_sd + 0.5 * (off.detach() / out.log_sd.exp()).square()
        return {
            "image": image,
            "toward": weight * F.smooth_l1_loss(out.toward, target),
            "toward_sd": 0.1 * weight * likelihood.mean(),
        }
