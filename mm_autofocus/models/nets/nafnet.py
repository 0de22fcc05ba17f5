"""A two-shot net of today's blocks: at half the resolution, gated, told which shot is lower.

Blocks after Chen, Chu, Zhang, Sun, *Simple Baselines for Image Restoration*, ECCV 2022
(NAFNet): no activation but a product of two halves. Their channel attention takes a mean over
the whole frame; it is left out, for a frame must give the same in tiles. What differs from the
published two-shot net: the first step folds 2 × 2 pixels into channels (Shi et al., CVPR
2016), so that nothing is computed at the full resolution; where the paths meet at each scale,
the features of the other shot come in through a gate that sees both; and the net is told which
shot is the lower one, because phase in the specimen makes the two sides of focus differ.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mm_autofocus.models.nets.base import AnyOptions, NetContext
from mm_autofocus.models.nets.refocus import RefocusNet, RefocusOptions, Where

__all__ = ["NafNet", "NafNetOptions"]

_SCALES = 3
_Counts = Annotated[tuple[int, ...], Field(min_length=_SCALES, max_length=_SCALES)]


class NafNetOptions(RefocusOptions):
    """Options of `NafNet`.

    Attributes
    ----------
    width : int
        Channels at half the resolution; each further scale has twice as many.
    down : tuple of int
        Blocks of the paths that go down, at 1/2, 1/4, 1/8.
    up : tuple of int
        Blocks where the paths have met, at 1/2, 1/4, 1/8.
    """

    width: Annotated[int, Field(ge=4, le=128)] = 40
    down: _Counts = (1, 1, 2)
    up: _Counts = (1, 1, 3)


class ChannelNorm(nn.Module):
    """Each pixel's channels less their mean, over their standard deviation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        return y.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Two residual steps: depthwise 3 × 3 and gate, then pointwise and gate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.ModuleList((ChannelNorm(width), ChannelNorm(width)))
        self.wide = nn.ModuleList(nn.Conv2d(width, 2 * width, 1) for _ in range(2))
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.narrow = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(2))
        self.scale = nn.ParameterList(torch.full((1, width, 1, 1), 0.1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        for k in range(2):
            y = self.wide[k](self.norm[k](x))
            if not k:
                y = self.depthwise(y)
            a, b = y.chunk(2, 1)
            x = x + self.scale[k] * self.narrow[k](a * b)
        return x


class Meet(nn.Module):
    """The other shot's features, through a gate that sees both and which is the lower one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * width, 2 * width, 1)
        self.side = nn.Parameter(torch.zeros(1, 2 * width, 1, 1))

    def forward(self, one: Tensor, two: Tensor, side: Tensor) -> Tensor:
        """``(N, width, H, W)`` twice and ``(N,)`` to the same shape."""
        both = self.mix(torch.cat((one, two), 1)) + self.side * side[:, None, None, None]
        gate, value = both.chunk(2, 1)
        out: Tensor = one + gate.sigmoid() * value
        return out


class NafNet(RefocusNet):
    """See the module."""

    Options: ClassVar[type[AnyOptions]] = NafNetOptions

    def __init__(self, context: NetContext, options: NafNetOptions) -> None:
        super().__init__(context, options)
        c = context.channels
        widths = [options.width * 2**k for k in range(_SCALES)]
        self.stem = nn.Conv2d(4 * c, widths[0], 3, padding=1)
        self.downs = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, stride=2) for w in widths[:-1])
        self.paths = nn.ModuleList(
            nn.Sequential(*(Block(w) for _ in range(n)))
            for w, n in zip(widths, options.down, strict=True)
        )
        self.meets = nn.ModuleList(Meet(w) for w in widths)
        self.ups = nn.ModuleList(nn.Conv2d(2 * w, 4 * w, 1) for w in widths[:-1])
        self.after = nn.ModuleList(
            nn.Sequential(*(Block(w) for _ in range(n)))
            for w, n in zip(widths, options.up, strict=True)
        )
        self.last = nn.Conv2d(widths[0], 4 * c, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    @property
    def halo_px(self) -> int:
        """Margin that a tile loses; see the test of it for what a pixel sees."""
        radius = 2 + 2  # stem and last
        for k in range(_SCALES):
            step = 2 ** (k + 1)
            radius += step * (self._options.down[k] + self._options.up[k]) + step
        return -(-radius // self.multiple) * self.multiple

    @property
    def _options(self) -> NafNetOptions:
        assert isinstance(self.options, NafNetOptions)
        return self.options

    def recover(self, shots: Tensor, where: Where) -> Tensor:
        """Of two shots."""
        c = self.context.channels
        n = shots.shape[0]  # not len, which the export would take for a constant
        # both shots go through the same path, as one batch
        x = F.pixel_unshuffle(torch.cat((shots[:, :c], shots[:, c:])), 2)
        x = self.stem(x)
        met = []
        for k in range(_SCALES):
            x = self.paths[k](x)
            met.append(self.meets[k](x[:n], x[n:], where.side))
            if k < _SCALES - 1:
                x = self.downs[k](x)
        y = self.after[-1](met[-1])
        for k in reversed(range(_SCALES - 1)):
            y = self.after[k](F.pixel_shuffle(self.ups[k](y), 2) + met[k])
        return F.pixel_shuffle(self.last(y), 2)
