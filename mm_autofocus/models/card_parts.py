"""The parts of a card: input, normalisation, outputs, importance, error."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mm_autofocus.models.lens import LENS_NAMES, code_of

if TYPE_CHECKING:
    from typing import Self

    import numpy.typing as npt

__all__ = [
    "Count",
    "Curve",
    "ErrorModel",
    "Floats",
    "Importance",
    "LensInput",
    "NonNegative",
    "Normalisation",
    "Outputs",
    "PatchInput",
    "Positive",
    "Share",
    "Shots",
    "Strict",
    "TopK",
]

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Floats = Annotated[tuple[float, ...], Field(strict=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Unknown keys, other types and numbers that are none are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )


class PatchInput(Strict):
    """The input that takes patches.

    Attributes
    ----------
    name : str
        Its name in the graph.
    layout : {"NCHW", "NHWC"}
        Order of its axes. Channels are laid look by look: ``(N, looks · channels, P, P)``.
    """

    name: str = "patches"
    layout: Literal["NCHW", "NHWC"] = "NCHW"


class Normalisation(Strict):
    """From grey values to what the net is shown: ``(value / scale - mean) / std``.

    Attributes
    ----------
    scale : {"max_value", "none"}
        Divide by the value at which the camera saturates, or not at all.
    mean, std : float or list
        One for all, one per channel, or one per channel and look.
    per_patch : bool
        Afterwards, subtract the mean of the patch over all looks and channels and divide by
        its standard deviation.
    """

    scale: Literal["max_value", "none"] = "max_value"
    mean: float | Floats = 0.0
    std: float | Floats = 1.0
    per_patch: bool = False

    @field_validator("std")
    @classmethod
    def _divides(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        if any(v <= 0 for v in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"std: {value} is not allowed: must be greater than 0")
        return value


class Outputs(Strict):
    """The outputs, each ``(N,)`` or ``(N, 1)``.

    Attributes
    ----------
    defocus : str
        Name of the output with the defocus of each patch.
    sd : str | None
        Name of the output with its standard deviation; None: the net gives none.
    um_per_unit : float
        Both are multiplied by it.
    sign : {1, -1}
        -1: the net answers ``z_focus - z_image``.
    """

    defocus: str = "defocus"
    sd: str | None = "sd"
    um_per_unit: Positive = 1.0
    sign: Literal[1, -1] = 1


class Shots(Strict):
    """What a model takes that recovers the sharp image, and what it returns.

    The input ``shots (N, count · channels, H, W)`` float32 is the sharper shot (Brenner), and
    behind it the other one; H and W are multiples of `multiple`. Two inputs the net need not
    have: ``side (N,)`` is 1 where the sharper shot is the lower one, else -1; ``half_um (N,)``
    is ΔD.

    Attributes
    ----------
    count : {1, 2}
        How many it is shown: both, or the sharper one alone.
    half_um : (float, float)
        Smallest and largest distance of a shot from the middle of both (ΔD).
    halo_px : int
        Margin of a tile that depends on what lies beyond it.
    multiple : int
        Of which the edges of a tile are.
    image : str
        Name of the output ``(N, channels, H, W)``.
    toward, toward_sd : str | None
        Names of the outputs ``(N, h, w)``, µm: how far focus lies from the sharper shot
        towards the other one (negative: beyond it, not enclosed), and its standard
        deviation. None: the net does not tell.
    sd_scale : float
        By which that standard deviation is multiplied to be right.
    """

    count: Literal[1, 2] = 2
    half_um: Annotated[tuple[float, float], Field(strict=False)]
    halo_px: Annotated[int, Field(ge=0)]
    multiple: Count = 8
    image: str = "image"
    toward: str | None = "toward"
    toward_sd: str | None = "toward_sd"
    sd_scale: Positive = 1.0

    @field_validator("half_um")
    @classmethod
    def _rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(
                f"half_um: {list(value)} is not allowed: two distances above 0, the smaller "
                "first"
            )
        return value


class TopK(Strict):
    """How many patches at most are looked at in a field of each class."""

    dense: Count = 31
    sparse: Count = 9
    extremely_sparse: Count = 3


class Importance(Strict):
    """The part of the net that says which patches are worth a look.

    Attributes
    ----------
    input, output : str
        Names in the same graph: the mosaic ``(1, looks · channels, rows · 56,
        columns · 56)``, normalised like patches (but not per patch), and the importance
        ``(1, rows, columns)``, 0 … 1.
    threshold : float
        A patch with at least so much carries content.
    k : TopK
        How many of them are looked at.
    """

    input: str = "mosaic"
    output: str = "importance"
    threshold: Share = 0.8
    k: TopK = Field(default_factory=TopK)


class LensInput(Strict):
    """What the net may be told of the lens, see `mm_autofocus.models.lens`.

    Attributes
    ----------
    input : str
        Its name in the graph, ``(1, numbers)``; what it is where nothing is given, the graph
        holds itself.
    ranges : dict
        Names of `mm_autofocus.models.lens.LENS_NAMES` with the ranges that the net was taught.
    values : dict | None
        What the graph holds; None: nothing is known.
    fitted : dict
        For which model and by which stacks these were found, and what they are worth.
    """

    input: str = "lens"
    ranges: dict[str, Annotated[tuple[float, float], Field(strict=False)]]
    values: dict[str, float] | None = None
    fitted: dict[str, Any] = Field(default_factory=dict)

    @field_validator("ranges")
    @classmethod
    def _known(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for name, (low, high) in value.items():
            if name not in LENS_NAMES:
                raise ValueError(
                    f"ranges: {name!r} is unknown; allowed: {', '.join(LENS_NAMES)}"
                )
            if not low < high:
                raise ValueError(f"ranges: {name}: {low:g} is not below {high:g}")
        return value

    def code(self) -> npt.NDArray[np.float32]:
        """What the graph holds, ``(numbers,)`` float32."""
        return code_of(self.ranges, self.values)


class Curve(Strict):
    """Calibration curve of a slide: from what the net says of a frame to its defocus.

    Between the knots a line, beyond them as far beside as at the last one.

    Attributes
    ----------
    said_um, defocus_um : list of float
        Knots: what the net says, rising strictly; and what that is, not falling.
    fitted : dict
        By which stacks it was found, and what it is worth.
    """

    said_um: Annotated[Floats, Field(min_length=2)]
    defocus_um: Annotated[Floats, Field(min_length=2)]
    fitted: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if len(self.said_um) != len(self.defocus_um):
            raise ValueError(
                f"defocus_um: {len(self.defocus_um)} numbers are not allowed: must be as many "
                f"as of said_um, {len(self.said_um)}"
            )
        if any(a >= b for a, b in pairwise(self.said_um)):
            raise ValueError("said_um: must rise strictly")
        if any(a > b for a, b in pairwise(self.defocus_um)):
            raise ValueError("defocus_um: must not fall")
        return self

    def of(self, said_um: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Defocus in µm, of what the net says."""
        said, knots = np.asarray(said_um, float), np.asarray(self.said_um)
        aside: npt.NDArray[np.float64] = np.interp(said, knots, self.defocus_um - knots)
        return said + aside


class ErrorModel(Strict):
    """From what the patches say to the standard deviation expected of the frame's defocus.

    ``hypot(sd_scale · raw, floor_um)``, with `raw` from `consensus.raw_error`.

    Attributes
    ----------
    sd_scale : float
        Fitted on fields that the training did not see.
    floor_um : float
        What remains however well the patches agree.
    disagreement_um : float | None
        Spread of the patches beyond which they are said to disagree; None: four times their
        own standard deviation, or the depth of field where the net gives none.
    """

    sd_scale: Positive = 1.0
    floor_um: NonNegative = 0.0
    disagreement_um: Positive | None = None
