"""SparseFocus: which patches matter, and how far out of focus they are.

Source: *SparseFocus: learning-based one-shot autofocus for microscopy with sparse content*.
A region importance network (RIN) weighs the patches of a frame from a small mosaic of them; a
defocus prediction network (DPN) looks at the heaviest ones; the median of its answers is the
answer. The paper names the parts (4 × 4 stem and BatchNorm, blocks of 7 × 7 convolutions,
downsampling, global max pooling, a linear layer), not their widths and depths: those are
chosen here for what two CPU cores can train in a night.

What differs from the paper: the 7 × 7 convolutions are depthwise (with pointwise ones behind
them, and ReLU: a third of the time of dense ones); the stem also sees standardised values;
mean pooling stands beside max pooling; the head may be a distribution; instead of the median
there is an estimate as robust that averages what agrees, and in which answers that the net is
sure of weigh more (`consensus.agreed`). If asked for, the spectra of the patch
(`physics.CrossSpectra`) stand beside what the convolutions find: where the optical transfer
function has its zeros tells how far focus is, whatever the specimen. What reads them may be
told of the lens (`models.lens`).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from mm_autofocus.models.lens import LENS_NAMES
from mm_autofocus.models.nets.base import (
    AnyOptions,
    DefocusNet,
    NetContext,
    NetOptions,
    Output,
    Standardise,
    full_precision,
)
from mm_autofocus.models.nets.heads import make_head
from mm_autofocus.models.nets.physics import CrossSpectra
from mm_autofocus.models.patches import CELL_PX

__all__ = ["Dpn", "Rin", "SparseFocus", "SparseFocusOptions", "Spectral"]


_LAYERS = 3  # of the perceptron behind the spectra
_DROPPED = 0.1  # there are more numbers in the spectra than some labs have fields
_LENS_WIDTH = 64  # of the layer between what is told of a lens and what that changes
_UNTOLD = 0.4  # of the patches are shown without it in training: both are to be learned


class SparseFocusOptions(NetOptions):
    """Options of `SparseFocus`.

    Attributes
    ----------
    widths, depths : tuple of int
        Channels and blocks of each stage; the first lies behind the stem at a quarter of
        the resolution, each further one at half of that before it.
    expand : int
        Channels between the two pointwise convolutions of a block, in widths.
    kernel : int
        Of the depthwise convolutions, odd.
    pool : {"max+mean", "max", "mean"}
        Over the patch.
    spectra : int
        Width of the perceptron that reads the spectra of the patch beside the convolutions
        (256 is a good one); 0: none, as published.
    lens : dict
        What it is told of the lens: names of `models.lens.LENS_NAMES` with their ranges; needs
        spectra. Empty: nothing.
    rin_widths : tuple of int
        Channels of the RIN at 1/2, 1/4 and 1/8 of the mosaic.
    """

    widths: tuple[int, ...] = (32, 64, 128, 192)
    depths: tuple[int, ...] = (1, 2, 3, 2)
    expand: int = 2
    kernel: int = 7
    pool: Literal["max+mean", "max", "mean"] = "max+mean"
    spectra: Annotated[int, Field(ge=0, le=2048)] = 0
    lens: dict[Literal[LENS_NAMES], tuple[float, float]] = Field(default_factory=dict)  # type: ignore[valid-type]
    rin_widths: tuple[int, int, int] = (16, 32, 64)

    @field_validator("lens")
    @classmethod
    def _rise(
        cls, value: dict[str, tuple[float, float]], info: ValidationInfo
    ) -> dict[str, tuple[float, float]]:
        if any(not low < high for low, high in value.values()):
            raise ValueError("of each range the smaller end comes first")
        if value and not info.data.get("spectra"):
            raise ValueError("needs net.spectra")
        return value


class Block(nn.Module):
    """Depthwise convolution, BatchNorm, two pointwise ones, and a way around them."""

    def __init__(self, width: int, expand: int, kernel: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, expand * width, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(expand * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        # a block begins as nothing but its way around: deep stages learn from the first step
        nn.init.zeros_(self.branch[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return torch.relu(x + self.branch(x))


class Pool(nn.Module):
    """Over the patch: ``(N, C, H, W)`` to ``(N, C)`` or ``(N, 2 C)``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.times = 2 if how == "max+mean" else 1

    def forward(self, x: Tensor) -> Tensor:
        """Global maximum, mean, or both."""
        parts = []
        if "max" in self.how:
            parts.append(x.amax((2, 3)))
        if "mean" in self.how:
            parts.append(x.mean((2, 3)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Usual(nn.BatchNorm1d):
    """Values less what is usual for each, ``(N, F)``.

    At rest by plain arithmetic: the exporter asks `BatchNorm1d` for a width it cannot see.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return super().forward(x) if self.training else self.less(x)

    def less(self, x: Tensor) -> Tensor:
        """By what is known by now."""
        mean: Tensor = self.running_mean  # type: ignore[assignment]
        variance: Tensor = self.running_var  # type: ignore[assignment]
        return (x - mean) * (variance + self.eps).rsqrt()


class LensCode(nn.Module):
    """What is known of the lens, as what it adds to the layers of a perceptron.

    Parameters
    ----------
    numbers : int
        Of a code, `models.lens.code_of`.
    layers, width : int
        Of the perceptron.
    """

    def __init__(self, numbers: int, layers: int, width: int) -> None:
        super().__init__()
        self.shape = (layers, width)
        self.inner = nn.Linear(numbers, _LENS_WIDTH)
        self.outer = nn.Linear(_LENS_WIDTH, layers * width)
        # nothing at first: a net that was taught without it goes on from where it stands
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, code: Tensor) -> Tensor:
        """``(N, numbers)`` to ``(N, layers, width)``; in training, many are lost."""
        if self.training:
            known = torch.rand(len(code), 1, device=code.device) >= _UNTOLD
            code = code * known
        y: Tensor = self.outer(torch.relu(self.inner(code)))
        return y.reshape(code.shape[0], *self.shape)


class Spectral(nn.Module):
    """Features of the spectra of a patch: a perceptron with ways around its layers.

    Attributes
    ----------
    features : int
        How many it returns.
    """

    def __init__(self, context: NetContext, width: int, told: int = 0) -> None:
        super().__init__()
        self.spectra = CrossSpectra(len(context.looks_um), context.channels, context.patch_px)
        before = self.spectra.features + context.in_channels
        # rings differ in what is usual for them by orders of magnitude
        self.usual = Usual(before, affine=False)
        self.first = nn.Linear(before, width)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.ReLU(inplace=True),
                nn.Dropout(_DROPPED),
                nn.Linear(width, width),
            )
            for _ in range(_LAYERS)
        )
        self.last = nn.LayerNorm(width)
        self.lens = LensCode(told + 1, _LAYERS + 1, width) if told else None
        self.told = told + 1 if told else 0
        self.features = width

    def forward(self, patches: Tensor, lens: Tensor | None = None) -> Tensor:
        """``(N, C, P, P)``, and the code of the lens ``(N or 1, told)``, to ``(N, F)``."""
        with full_precision(patches):
            return self.read(self.usual(self.look(patches)), lens)

    def look(self, patches: Tensor) -> Tensor:
        """``(N, C, P, P)`` to spectra and mean of each plane: nothing of it is learned."""
        return torch.cat((self.spectra(patches), patches.float().mean((2, 3))), 1)

    def read(self, x: Tensor, lens: Tensor | None = None) -> Tensor:
        """What `look` saw, less what is usual for it, to ``(N, F)``."""
        x = self.first(x)
        if self.lens is None:
            for layer in self.layers:
                x = x + layer(x)
        else:
            if lens is None:
                lens = x.new_zeros(1, self.told)
            change = self.lens(lens)
            x = x + change[:, 0]
            for k, layer in enumerate(self.layers, 1):
                norm, inner, *outer = cast("nn.Sequential", layer)
                inside = inner(norm(x)) + change[:, k]
                for part in outer:
                    inside = part(inside)
                x = x + inside
        y: Tensor = self.last(x)
        return y


class Dpn(nn.Module):
    """Features of patches: stem, stages, pooling; and beside these, of their spectra.

    Attributes
    ----------
    features : int
        How many it returns.
    """

    def __init__(self, context: NetContext, options: SparseFocusOptions) -> None:
        super().__init__()
        widths = options.widths
        self.standardise = Standardise(options.standardise, context.in_channels)
        layers: list[nn.Module] = [
            nn.Conv2d(self.standardise.out_channels, widths[0], 4, stride=4, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        ]
        before = widths[0]
        for stage, (width, depth) in enumerate(zip(widths, options.depths, strict=True)):
            if stage:
                layers += [
                    nn.Conv2d(before, width, 2, stride=2, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
            layers += [Block(width, options.expand, options.kernel) for _ in range(depth)]
            before = width
        self.stages = nn.Sequential(*layers)
        self.pool = Pool(options.pool)
        self.features = before * self.pool.times
        self.spectral = None
        if options.spectra:
            self.spectral = Spectral(context, options.spectra, len(options.lens))
            self.features += self.spectral.features

    def forward(self, patches: Tensor, lens: Tensor | None = None) -> Tensor:
        """``(N, C, P, P)``, and the code of the lens, to ``(N, F)``."""
        x = self.found(patches)
        if self.spectral is not None:
            x = torch.cat((x.float(), self.spectral(patches, lens)), 1)
        return x

    def found(self, patches: Tensor) -> Tensor:
        """What the convolutions find."""
        x: Tensor = self.pool(self.stages(self.standardise(patches)))
        return x


class Inverted(nn.Module):
    """MobileNetV3's block: widen, depthwise, squeeze, narrow; around it where it fits."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 3 * before
        self.around = stride == 1 and before == width
        self.wide = nn.Sequential(
            nn.Conv2d(before, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
        )
        self.narrow = nn.Sequential(
            nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, before, H, W)`` to ``(N, width, H / stride, W / stride)``."""
        y: Tensor = self.narrow(self.wide(x))
        return x + y if self.around else y


class Rin(nn.Module):
    """Importance of each patch of a mosaic, as logits.

    Convolutional, and each cell by itself: beside its neighbours in a frame of 9 × 9 patches
    a cell means what it meant alone in training, while padding that reaches from the rim of
    a mosaic into its cells would make the middle of large frames look like nothing that was
    learned. After MobileNetV3, without its squeeze-and-excitation.
    """

    def __init__(self, in_channels: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        a, b, c = widths
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, a, 3, 2, 1, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU(inplace=True),
            Inverted(a, b, 2),
            Inverted(b, b, 1),
            Inverted(b, c, 2),
            Inverted(c, c, 1),
            nn.Conv2d(c, c, 7, stride=7),
            nn.ReLU(inplace=True),
            nn.Conv2d(c, 1, 1),
        )

    def forward(self, mosaic: Tensor) -> Tensor:
        """``(M, C, rows · 56, columns · 56)`` to ``(M, rows, columns)``."""
        m, c, height, width = mosaic.shape
        rows, columns = height // CELL_PX, width // CELL_PX
        cells = mosaic.reshape(m, c, rows, CELL_PX, columns, CELL_PX)
        cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, CELL_PX, CELL_PX)
        x: Tensor = self.layers(cells)
        return x.reshape(m, rows, columns)


class SparseFocus(DefocusNet):
    """RIN and DPN; the top-k and the median are the run time's."""

    Options: ClassVar[type[AnyOptions]] = SparseFocusOptions

    def __init__(self, context: NetContext, options: SparseFocusOptions) -> None:
        super().__init__(context, options)
        self.dpn = Dpn(context, options)
        self.head = make_head(self.dpn.features, context, options)
        self.rin = Rin(context.in_channels, options.rin_widths)

    def forward(self, patches: Tensor, lens: Tensor | None = None) -> Output:
        """Predict the defocus of patches ``(N, C, P, P)``.

        The code of the lens, ``(N or 1, numbers)`` of `models.lens.code_of`, is only for nets
        that are told of it; without one they answer as of a lens that is not known.
        """
        output: Output = self.head(self.dpn(patches, lens))
        return output

    def losses(self, output: Output, defocus_um: Tensor) -> dict[str, Tensor]:
        """Parts of the loss."""
        return self.head.losses(output, defocus_um)

    @property
    def has_spectra(self) -> bool:
        """Whether it looks at spectra at all."""
        return self.dpn.spectral is not None

    @property
    def _spectral(self) -> Spectral:
        if self.dpn.spectral is None:
            raise ValueError("a net without spectra")
        return self.dpn.spectral

    @property
    def lens(self) -> dict[str, tuple[float, float]]:
        """Names and ranges of what it is told of the lens."""
        return dict(cast("SparseFocusOptions", self.options).lens)

    def seen(self, patches: Tensor, lens: Tensor | None = None) -> Tensor:
        """What it finds in patches ``(N, C, P, P)``, ``(N, S)``.

        That of the convolutions, the spectra, and behind them the code of the lens, if it is
        told of one.
        """
        parts = [self.dpn.found(patches).float(), self._spectral.look(patches)]
        if self._spectral.told:
            unknown = patches.new_zeros(len(patches), self._spectral.told)
            parts.append(unknown if lens is None else lens.float())
        return torch.cat(parts, 1)

    @property
    def knows_usual(self) -> bool:
        """Whether it has learned what spectra usually are."""
        return bool((self._spectral.usual.running_var != 1).any())  # type: ignore[union-attr]

    def learn_usual(self, seen: Tensor) -> None:
        """Learn what spectra usually are from what was `seen`, as `by_seen` takes it."""
        usual = self._spectral.usual
        x = self._parts(seen)[1].float()
        usual.running_mean.copy_(x.mean(0))  # type: ignore[union-attr]
        usual.running_var.copy_(x.var(0))  # type: ignore[union-attr]

    def by_seen(self, seen: Tensor) -> Output:
        """Predict from what was `seen`, ``(N, S)``, or from that less the convolutions'."""
        own = self._spectral
        found, spectra, lens = self._parts(seen)
        read = own.read(own.usual.less(spectra), lens if own.told else None)
        output: Output = self.head(torch.cat((found, read), 1))
        return output

    def _parts(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the convolutions found, the spectra, and the code of the lens."""
        count = self._spectral.usual.num_features
        if seen.shape[1] == count + self._spectral.told:
            seen = self.seen_of(seen)
        behind = self._found + count
        return seen[:, : self._found], seen[:, self._found : behind], seen[:, behind:]

    def seen_of(self, spectra: Tensor) -> Tensor:
        """Spectra ``(N, F)``, and the code, as if the convolutions had found nothing."""
        return torch.cat((spectra.new_zeros(len(spectra), self._found), spectra), 1)

    def reading_parameters(self) -> list[nn.Parameter]:
        """What `by_seen` depends on."""
        return [*self._spectral.parameters(), *self.head.parameters()]

    def reading_matrices(self) -> list[nn.Parameter]:
        """Of these the matrices of the perceptron; the head's is none."""
        return [p for p in self._spectral.parameters() if p.ndim == 2]

    @property
    def _found(self) -> int:
        """How many features are the convolutions'."""
        return self.dpn.features - self._spectral.features
