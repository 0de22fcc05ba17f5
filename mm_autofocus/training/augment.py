"""Changes to patches that leave the physics of defocus alone.

Geometry is limited to flips and right-angle turns: neither changes how far out of focus a
patch is, while a scaling would. Intensity is changed by monotone maps, the same for all
pixels and looks of a sample. Channels are never exchanged, dropped or shifted in hue: axial
colour, one of the things by which one side of focus is told from the other, lives between
them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["AugmentOptions", "allowed_turn", "augment", "change_intensity", "turn"]

_TABLE = 1 << 20

_Range = Annotated[tuple[float, float], Field()]


class AugmentOptions(BaseModel):
    """How far a sample may be changed.

    Attributes
    ----------
    turns : {"all", "half", "none"}
        Flips and right-angle turns, half turns only, or nothing. On a microscope whose sign of
        defocus is told by astigmatism alone, a flip or a quarter turn makes one side look
        like the other: half turns are all that it bears.
    brightness, contrast, saturation : tuple of float
        Ranges of factors; those of the SparseFocus paper. Brightness is kept below
        saturation; contrast is about the mean of the sample.
    offset : float
        Largest value that is added or subtracted, in parts of the full scale.
    noise : float
        Largest standard deviation of the noise added, in parts of the full scale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    turns: Literal["all", "half", "none"] = "all"
    brightness: _Range = (0.9, 1.4)
    contrast: _Range = (0.8, 1.5)
    saturation: _Range = (0.8, 1.5)
    offset: Annotated[float, Field(ge=0, le=0.5)] = 0.02
    noise: Annotated[float, Field(ge=0, le=0.5)] = 0.01

    @field_validator("turns", mode="before")
    @classmethod
    def _yes_or_no(cls, value: object) -> object:
        return {True: "all", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("brightness", "contrast", "saturation")
    @classmethod
    def _rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two factors above 0, the smaller first")
        return value


def turn(sample: Real, which: int) -> Real:
    """One of the eight flips and turns, 0 … 7, of the last two axes; a view."""
    if which & 1:
        sample = sample[..., ::-1]
    if which & 2:
        sample = sample[..., ::-1, :]
    return np.swapaxes(sample, -1, -2) if which & 4 else sample


def allowed_turn(options: AugmentOptions, which: int) -> int:
    """Of the eight turns, `which` if it is allowed, or what takes its place."""
    if options.turns == "half":
        return 3 * (which & 1)  # both flips at once: half a turn
    return which if options.turns == "all" else 0


def change_intensity(
    sample: Real, *, gain: float, contrast: float, saturation: float, offset: float, looks: int
) -> Real:
    """Change intensity in place, alike in all looks, and clip to 0 … 1.

    Parameters
    ----------
    sample : numpy.ndarray
        ``(looks · channels, Y, X)`` float32 in 0 … 1.
    gain, contrast, saturation : float
        Factors: of all; about the mean of all; about the grey of each pixel (colour only).
    offset : float
        Added last.
    looks : int
        How many looks the channels belong to.
    """
    channels = len(sample) // looks
    if channels > 1 and saturation != 1:
        for k in range(looks):
            look = sample[k * channels : (k + 1) * channels]
            grey = look.mean(0)
            look *= np.float32(saturation)
            look += np.float32(1 - saturation) * grey
    mean = float(sample.mean())
    sample *= np.float32(gain * contrast)
    sample += np.float32(gain * (1 - contrast) * mean + offset)
    return np.clip(sample, 0, 1, out=sample)


def augment(
    sample: Real, options: AugmentOptions, rng: np.random.Generator, looks: int
) -> Real:
    """Change one sample at random.

    Parameters
    ----------
    sample : numpy.ndarray
        ``(looks · channels, Y, X)`` float32 in 0 … 1; may be changed in place.
    options : AugmentOptions
        How far.
    rng : numpy.random.Generator
        Decides; as many numbers are drawn whatever the options.
    looks : int
        How many looks the channels belong to.

    Returns
    -------
    numpy.ndarray
        Contiguous, of the same shape if it was square.
    """
    which = allowed_turn(options, int(rng.integers(8)))
    u = rng.random(5)
    if which:
        sample = np.ascontiguousarray(turn(sample, which))
    # a camera set brighter would saturate; a specimen would not
    room = max(1.0, 1 / max(float(sample.max()), 1e-3))
    low, high = options.brightness
    sample = change_intensity(
        sample,
        gain=low + u[0] * (max(low, min(high, room)) - low),
        contrast=_between(options.contrast, u[1]),
        saturation=_between(options.saturation, u[2]),
        offset=(2 * u[3] - 1) * options.offset,
        looks=looks,
    )
    if options.noise:
        sample += _noise(sample.shape, int(rng.integers(_TABLE))) * np.float32(
            u[4] * options.noise
        )
    return sample


@cache
def _table() -> Real:
    return np.random.default_rng(0).standard_normal(2 * _TABLE, np.float32)


def _noise(shape: tuple[int, ...], start: int) -> Real:
    """White noise, from a long table: to draw it takes longer than all else together."""
    size = math.prod(shape)
    part = _table()[start : start + size]
    return np.resize(part, shape) if len(part) < size else part.reshape(shape)


def _between(bounds: tuple[float, float], part: float) -> float:
    return bounds[0] + part * (bounds[1] - bounds[0])
