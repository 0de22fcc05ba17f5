"""What nets that recover the sharp image share: what they are shown, what they return."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_autofocus.models.nets.base import (
    AnyOptions,
    Net,
    NetContext,
    full_precision,
)

__all__ = ["Recovered", "RefocusNet", "RefocusOptions", "TowardHead", "Where"]

_LEVELS = 4  # of detail: at 1, 2, 4 and 8 pixels
_WINDOW = 9  # places of 8 pixels about which detail is averaged
_HIDDEN = 48
_LEAST_ENERGY = 1e-6
_LEAST_SD_UM = 0.05
_MOST_SD_UM = 10.0
_LEAST_SQUARE = 1e-6
_LEAST_GRAIN = 1e-4
"""Added to the square of errors of the image: 1 % of the range, squared. A field without
specimen is noise, and would else count for nothing or for everything."""


class RefocusOptions(AnyOptions):
    """Options that every one of them has.

    Attributes
    ----------
    loss : {"mse", "psnr", "charbonnier"}
        Of the image: mean square (as published); the logarithm of that of each sample, so
        that easy fields count as much as difficult ones (as NAFNet is trained); or nearly the
        mean absolute error, which blurs less.
    toward_weight : float
        Weight of the loss of the distance to focus beside that of the image.
    """

    loss: Literal["mse", "psnr", "charbonnier"] = "mse"
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


class Where(NamedTuple):
    """Where the shots lie, as far as a net may know.

    Attributes
    ----------
    side : Tensor
        ``(N,)``: +1 where the sharper shot is the lower one, else -1.
    half_um : Tensor
        ``(N,)``: half of their distance.
    toward, log_sd : Tensor
        ``(N, H / 8, W / 8)`` as in `Recovered`; no gradient flows back through them, for they
        are to tell the distance and nothing else.
    """

    side: Tensor
    half_um: Tensor
    toward: Tensor
    log_sd: Tensor


class TowardHead(nn.Module):
    """How far focus lies from the sharper shot towards the other one, by what blur took away.

    Both shots show the same specimen, so that what differs between the energies of their
    detail, scale by scale and colour by colour, is blur; with the distance of the shots, which
    is known, it tells where between them focus lies. It stands beside the net for the image
    and does not touch it, and it is local like that: energies are taken over `_WINDOW` places
    of 8 pixels, not over the frame.

    Parameters
    ----------
    channels, shots : int
        Of a shot; 1 or 2 of them.
    """

    def __init__(self, channels: int, shots: int) -> None:
        super().__init__()
        features = channels * shots * _LEVELS + 2
        self.layers = nn.Sequential(
            nn.Conv2d(features, _HIDDEN, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(_HIDDEN, _HIDDEN, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(_HIDDEN, 2, 1),
        )

    def forward(self, shots: Tensor, side: Tensor, half_um: Tensor) -> tuple[Tensor, Tensor]:
        """Shots ``(N, shots · C, H, W)`` to the distance and the logarithm of its sd."""
        with full_precision(shots):
            found, x = [], shots.float()
            for k in range(_LEVELS):
                found.append(_detail(x, 2 ** (_LEVELS - 1 - k)))
                x = F.avg_pool2d(x, 2)
            known = [v.float()[:, None, None, None] for v in (side, half_um)]
            plane = torch.ones_like(found[0][:, :1])
            x = torch.cat([*found, *(plane * v for v in known)], 1)
            toward, log_sd = self.layers(x).unbind(1)
        return toward, log_sd.clamp(math.log(_LEAST_SD_UM), math.log(_MOST_SD_UM))


def _detail(x: Tensor, step: int) -> Tensor:
    """Logarithm of the energy of differences of neighbours about each place of `step` pixels.

    In units in which camera noise is about 0 and full contrast about 3.
    """
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    here = x[..., :-1, :-1]
    energy = (x[..., :-1, 1:] - here).square() + (x[..., 1:, :-1] - here).square()
    energy = F.avg_pool2d(energy, step)
    energy = F.avg_pool2d(energy, _WINDOW, 1, _WINDOW // 2, count_include_pad=False)
    return (energy + _LEAST_ENERGY).log10() + 4


class RefocusNet(Net):
    """Base of the nets that recover the sharp image.

    A subclass sets `Options` and `shots`, and implements `recover`; where focus lies, `toward`
    tells for all of them. The frame may have any size that is a multiple of `multiple`; all
    parts of a net are local, and what lies more than `halo_px` inside a frame does not depend
    on where the frame ends.
    """

    Options: ClassVar[type[AnyOptions]] = RefocusOptions
    task = "refocus"
    shots: ClassVar[int] = 2
    multiple: ClassVar[int] = 8

    def __init__(self, context: NetContext, options: RefocusOptions) -> None:
        super().__init__(context, options)
        self.options: RefocusOptions = options
        self.toward = TowardHead(context.channels, self.shots)

    @property
    def halo_px(self) -> int:
        """Margin that a tile loses, a multiple of `multiple`."""
        raise NotImplementedError

    def recover(self, shots: Tensor, where: Where) -> Tensor:
        """Return what is to be added to the sharper shot."""
        raise NotImplementedError

    def forward(self, shots: Tensor, side: Tensor, half_um: Tensor) -> Recovered:
        """Recover the sharp image.

        Parameters
        ----------
        shots : Tensor
            ``(N, shots · C, H, W)`` float32 in 0 … 1; the sharper one (Brenner) first.
        side : Tensor
            ``(N,)``: +1 where the sharper shot is the lower one, else -1.
        half_um : Tensor
            ``(N,)``: half of their distance.
        """
        toward, log_sd = self.toward(shots, side, half_um)
        where = Where(side, half_um, toward.detach(), log_sd.detach())
        change = self.recover(shots, where)
        # in full precision: half of it would round what needs no change at all
        image = shots[:, : self.context.channels].float() + change.float()
        return Recovered(image, toward, log_sd)

    def losses_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parts of the loss, weighted, of a batch of `training.pairs.PairSource`."""
        shots = batch["shots"][:, : self.shots * self.context.channels]
        out = self(shots, batch["side"], batch["half_um"])
        error = out.image - batch["truth"].float()
        if self.options.loss == "mse":
            # in parts of a square error that is usual: the clip of gradients is absolute
            image = 1000 * error.square().mean()
        elif self.options.loss == "psnr":
            # about as steep as the former at 37 dB, and 0 at 60
            image = 0.5 * (error.square().mean((1, 2, 3)) + _LEAST_SQUARE).log10().mean() + 3
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
