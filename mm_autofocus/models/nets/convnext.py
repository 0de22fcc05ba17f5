"""A ConvNeXt, the modern backbone beside the others.

Source: Liu et al., *CVPR* 2022, with the widths and depths of its smallest relative in timm
(atto). LayerNorm over channels and GELU as there; both cost time on a CPU.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_autofocus.models.nets.base import (
    AnyOptions,
    DefocusNet,
    NetContext,
    NetOptions,
    Output,
    Standardise,
)
from mm_autofocus.models.nets.heads import make_head

__all__ = ["ConvNeXt", "ConvNeXtOptions"]


class ConvNeXtOptions(NetOptions):
    """Options of `ConvNeXt`.

    Attributes
    ----------
    widths, depths : tuple of int
        Channels and blocks of each stage, at 1/4, 1/8, 1/16, ... of the resolution.
    activation : {"gelu", "relu"}
        Between the pointwise convolutions.
    """

    widths: tuple[int, ...] = (40, 80, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    activation: Literal["gelu", "relu"] = "gelu"


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(N, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return y.permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7 × 7, LayerNorm, two pointwise layers, scaled, and a way around them."""

    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = activation
        self.scale = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(self.activation(self.wide(y)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


class ConvNeXt(DefocusNet):
    """A regressor on a small ConvNeXt."""

    Options: ClassVar[type[AnyOptions]] = ConvNeXtOptions

    def __init__(self, context: NetContext, options: ConvNeXtOptions) -> None:
        super().__init__(context, options)
        self.standardise = Standardise(options.standardise, context.in_channels)
        widths = options.widths
        activation = nn.GELU() if options.activation == "gelu" else nn.ReLU()
        layers: list[nn.Module] = [
            nn.Conv2d(self.standardise.out_channels, widths[0], 4, stride=4),
            ChannelNorm(widths[0], eps=1e-6),
        ]
        before = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, options.depths, strict=True)):
            if stage:
                layers += [
                    ChannelNorm(before, eps=1e-6),
                    nn.Conv2d(before, width, 2, stride=2),
                ]
            layers += [Block(width, activation) for _ in range(depth)]
            before = width
        self.stages = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(before, eps=1e-6)
        self.head = make_head(before, context, options)

    def forward(self, patches: Tensor) -> Output:
        """Predict the defocus of patches ``(N, C, P, P)``."""
        x = self.stages(self.standardise(patches)).mean((2, 3))
        output: Output = self.head(self.norm(x))
        return output

    def losses(self, output: Output, defocus_um: Tensor) -> dict[str, Tensor]:
        """Parts of the loss."""
        return self.head.losses(output, defocus_um)
