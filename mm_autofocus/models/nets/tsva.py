"""Two-shot virtual autofocusing, and the single-shot U-Net beside it.

Source: Li, Liu, Han, Guo, Ji, Wu, *Rapid Whole Slide Imaging via Learning-based Two-shot
Virtual Autofocusing*. Two contracting paths that share their weights, the sharper shot first;
their deepest features side by side; one expansive path that sees the features of both at
every scale; what it gives is added to the sharper shot. Drawn with both paths the net has 27
convolutions: 2 × 8 going down over four scales, one where the paths meet, 3 upwards, 6 beside
the skips and the last one. The text gives neither the number of scales nor the channels; four
scales are the reading with which its count comes out. The channels of the figure would
make a net beyond what is shipped, `width` sets them.

Beyond the paper, by choice (`TsvaOptions.told`): the expansive path is told how far each shot
lies from focus. The distance of the shots is known, and the net estimates where between them
focus lies anyway; with it, how much of each spatial frequency is left in which of them is no
longer a guess.

U-Net: Ronneberger, Fischer, Brox, *MICCAI* 2015, with the same widths and the same residual,
shown one shot alone: the paper's baseline. A scanner that exposes once cannot know whether its
shot is the sharper one of two that it might have taken (`UNetOptions.shot`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mm_autofocus.models.nets.base import AnyOptions, NetContext
from mm_autofocus.models.nets.refocus import RefocusNet, RefocusOptions, Where

__all__ = ["Gates", "PathOptions", "Tsva", "TsvaOptions", "UNet", "UNetOptions"]

_SCALES = 4
_TOLD_HIDDEN = 32
_NO_GATES: tuple[None, ...] = (None,) * _SCALES


class PathOptions(RefocusOptions):
    """Options of the paths of `Tsva` and `UNet`.

    Attributes
    ----------
    width : int
        Channels of the first scale; each further one has twice as many.
    norm : {"batch", "none"}
        After each 3 × 3 convolution.
    """

    width: Annotated[int, Field(ge=4, le=128)] = 16
    norm: Literal["batch", "none"] = "batch"


class TsvaOptions(PathOptions):
    """Options of `Tsva`.

    Attributes
    ----------
    told : bool
        Whether the expansive path is told the defocus of both shots, as far as known; not as
        published.
    """

    told: bool = False


class UNetOptions(PathOptions):
    """Options of `UNet`.

    Attributes
    ----------
    shot : {"sharper", "either"}
        Which one it learns from: always the sharper one of the two, or either of them, by lot,
        as a single exposure beside focus would be.
    """

    shot: Literal["sharper", "either"] = "sharper"


def _block(before: int, width: int, norm: str) -> nn.Sequential:
    """Two 3 × 3 convolutions, each with its norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (before, width):
        layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class _Down(nn.Module):
    """The contracting path: features of each scale, the finest first."""

    def __init__(self, channels: int, options: PathOptions) -> None:
        super().__init__()
        widths = [options.width * 2**k for k in range(_SCALES)]
        self.blocks = nn.ModuleList(
            _block(a, b, options.norm)
            for a, b in zip([channels, *widths], widths, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(N, C, H, W)`` to four of ``(N, width · 2^k, H / 2^k, W / 2^k)``."""
        found = []
        for k, block in enumerate(self.blocks):
            x = block(F.max_pool2d(x, 2) if k else x)
            found.append(x)
        return found


class _Up(nn.Module):
    """The expansive path: from the deepest features and those beside it to the image."""

    def __init__(self, channels: int, options: PathOptions, paths: int) -> None:
        super().__init__()
        widths = [options.width * 2**k for k in reversed(range(_SCALES - 1))]
        deep = [2 * w for w in widths]
        # 2 x 2, as published: padded below and to the right, so that the size stays
        self.ups = nn.ModuleList(nn.Conv2d(d, w, 2) for d, w in zip(deep, widths, strict=True))
        self.blocks = nn.ModuleList(_block((1 + paths) * w, w, options.norm) for w in widths)
        self.last = nn.Conv2d(widths[-1], channels, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(
        self,
        x: Tensor,
        skips: list[tuple[Tensor, ...]],
        gates: Sequence[Tensor | None],
    ) -> Tensor:
        """Deepest features and, coarsest first, those of each path beside it, and gates."""
        layers = zip(self.ups, self.blocks, skips, gates, strict=True)
        for k, (up, block, beside, gate) in enumerate(layers, 1):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = up(F.pad(x, (0, 1, 0, 1)))
            x = block(_gated(torch.cat((x, *beside), 1), gate, 2**k))
        out: Tensor = self.last(x)
        return out


class Gates(nn.Module):
    """How much of each channel is taken where, by how far either shot lies from focus.

    Parameters
    ----------
    channels : list of int
        Of what is gated.
    """

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(6, _TOLD_HIDDEN, 1)
        gates = [nn.Conv2d(_TOLD_HIDDEN, c, 1) for c in channels]
        for parameter in (p for gate in gates for p in gate.parameters()):
            nn.init.zeros_(parameter)  # it begins as the published net
        self.gates = nn.ModuleList(gates)

    def forward(self, where: Where) -> list[Tensor]:
        """What is added to 1: each ``(N, channels, H / 8, W / 8)``."""
        side = where.side[:, None, None].expand_as(where.toward)
        beyond = 2 * where.half_um[:, None, None] - where.toward  # of the other shot
        known = (side, where.toward, beyond, side * where.toward, side * beyond, where.log_sd)
        x = F.relu(self.hidden(torch.stack(known, 1)))
        return [gate(x) for gate in self.gates]


def _gated(x: Tensor, gate: Tensor | None, step: int) -> Tensor:
    """``(N, C, H, W)``, more or less of each by a gate of one value for `step` pixels."""
    if gate is None:
        return x
    share = 1 + gate  # added while it is small: at full resolution each step takes its time
    if step > 1:
        share = F.interpolate(share, scale_factor=float(step), mode="nearest")
    return x * share


class Tsva(RefocusNet):
    """The published network."""

    Options: ClassVar[type[AnyOptions]] = TsvaOptions

    def __init__(self, context: NetContext, options: TsvaOptions) -> None:
        super().__init__(context, options)
        deepest = options.width * 2 ** (_SCALES - 1)
        self.down = _Down(context.channels, options)
        meet: list[nn.Module] = [
            nn.Conv2d(2 * deepest, deepest, 3, padding=1, bias=options.norm == "none")
        ]
        meet += [nn.BatchNorm2d(deepest)] if options.norm == "batch" else []
        self.meet = nn.Sequential(*meet, nn.ReLU(inplace=True))
        self.up = _Up(context.channels, options, paths=2)
        self.gates: Gates | None = None
        if options.told:
            widths = [options.width * 2**k for k in reversed(range(_SCALES - 1))]
            self.gates = Gates([2 * deepest, *(3 * w for w in widths)])

    @property
    def halo_px(self) -> int:
        """Margin that a tile loses: a pixel sees up to 66 others to each side.

        What gates are made of lies up to 72 beyond the 8 × 8 pixels that share a gate, and
        tiles begin and end with these.
        """
        return 72

    def recover(self, shots: Tensor, where: Where) -> Tensor:
        """Of two shots; where they are taken it is told by choice alone."""
        c = self.context.channels
        one, two = self.down(shots[:, :c]), self.down(shots[:, c:])
        first, *gates = _NO_GATES if self.gates is None else self.gates(where)
        deep = self.meet(_gated(torch.cat((one[-1], two[-1]), 1), first, 1))
        skips = list(zip(one[-2::-1], two[-2::-1], strict=True))
        out: Tensor = self.up(deep, skips, gates)
        return out


class UNet(RefocusNet):
    """The single-shot U-Net: the first of the shots alone, the sharper one at run time."""

    Options: ClassVar[type[AnyOptions]] = UNetOptions
    shots: ClassVar[int] = 1

    def __init__(self, context: NetContext, options: UNetOptions) -> None:
        super().__init__(context, options)
        self.either = options.shot == "either"
        self.down = _Down(context.channels, options)
        self.up = _Up(context.channels, options, paths=1)

    @property
    def halo_px(self) -> int:
        """Margin that a tile loses: a pixel sees up to 58 others to each side."""
        return 64

    def recover(self, shots: Tensor, where: Where) -> Tensor:
        """Of the first shot."""
        features = self.down(shots[:, : self.context.channels])
        skips = [(f,) for f in features[-2::-1]]
        out: Tensor = self.up(features[-1], skips, _NO_GATES[1:])
        return out

    def losses_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """As of any such net, of the shots that it learns from."""
        return super().losses_of(_either(batch) if self.either else batch)


def _either(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put either shot first, by lot; what is told of the first one follows."""
    shots, side, toward = batch["shots"], batch["side"], batch["toward_um"]
    other = torch.rand(len(shots), device=shots.device) < 0.5
    swapped = torch.cat(shots.chunk(2, 1)[::-1], 1)
    return {
        **batch,
        "shots": torch.where(other[:, None, None, None], swapped, shots),
        "side": torch.where(other, -side, side),
        "toward_um": torch.where(other, 2 * batch["half_um"] - toward, toward),
    }
