"""ResNet-18 and -34 as regressors of defocus.

Sources: He et al., *CVPR* 2016; as a focus regressor, Jiang et al., *Biomed. Opt. Express* 9
(2018) 1601–1612. A baseline: it looks at a patch of the frame, and the median over the grid
is the answer.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from mm_autofocus.models.nets.base import (
    AnyOptions,
    DefocusNet,
    NetContext,
    NetOptions,
    Output,
    Standardise,
)
from mm_autofocus.models.nets.heads import make_head

__all__ = ["ResNet", "ResNetOptions"]

_DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class ResNetOptions(NetOptions):
    """Options of `ResNet`.

    Attributes
    ----------
    depth : {18, 34}
        Layers.
    width : int
        Channels of the first stage; each further one has twice as many.
    """

    standardise: Literal["concat", "only", "none"] = "none"
    head: Literal["bins", "gaussian"] = "gaussian"
    depth: Literal[18, 34] = 18
    width: int = 64


class Basic(nn.Module):
    """Two 3 × 3 convolutions and a way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or before != width:
            self.around = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, before, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        out: Tensor = self.relu(self.branch(x) + self.around(x))
        return out


class ResNet(DefocusNet):
    """A regressor on a ResNet."""

    Options: ClassVar[type[AnyOptions]] = ResNetOptions

    def __init__(self, context: NetContext, options: ResNetOptions) -> None:
        super().__init__(context, options)
        width = options.width
        self.standardise = Standardise(options.standardise, context.in_channels)
        layers: list[nn.Module] = [
            nn.Conv2d(self.standardise.out_channels, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        before = width
        for stage, depth in enumerate(_DEPTHS[options.depth]):
            wide = width * 2**stage
            for k in range(depth):
                layers.append(Basic(before, wide, 2 if stage and not k else 1))
                before = wide
        self.stages = nn.Sequential(*layers)
        self.head = make_head(before, context, options)

    def forward(self, patches: Tensor) -> Output:
        """Predict the defocus of patches ``(N, C, P, P)``."""
        output: Output = self.head(self.stages(self.standardise(patches)).mean((2, 3)))
        return output

    def losses(self, output: Output, defocus_um: Tensor) -> dict[str, Tensor]:
        """Parts of the loss."""
        return self.head.losses(output, defocus_um)
