"""Absorption spectra of stains, and the wavelengths of a colour camera.

A spectrum is the optical density of a unit amount of stain, as a sum of Gaussians in
wavelength. At the wavelengths of the camera they come near to the vectors of A. C. Ruifrok,
D. A. Johnston, *Anal. Quant. Cytol. Histol.* 23 (2001) 291-299: haematoxylin
0.65/0.70/0.29 and eosin 0.07/0.99/0.11 for red/green/blue (eosin a little more in the
blue, as in sections that look pink rather than magenta).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["LN10", "RGB_UM", "Spectrum", "band", "eosin", "haematoxylin"]

LN10 = math.log(10)
"""Absorbance (natural logarithm) per optical density."""

RGB_UM = (0.61, 0.54, 0.46)
"""Wavelengths that stand for the bands of a colour camera, in µm."""

Spectrum: TypeAlias = Callable[[float], float]


def _gaussian(wavelength_um: float, centre: float, width: float) -> float:
    return math.exp(-0.5 * ((wavelength_um - centre) / width) ** 2)


def haematoxylin(wavelength_um: float) -> float:
    """Optical density of haematoxylin-alum relative to its unit amount."""
    return 0.75 * _gaussian(wavelength_um, 0.578, 0.055) + 0.25 * _gaussian(
        wavelength_um, 0.45, 0.06
    )


def eosin(wavelength_um: float) -> float:
    """Optical density of eosin Y relative to its unit amount."""
    return (
        _gaussian(wavelength_um, 0.527, 0.026)
        + 0.12 * _gaussian(wavelength_um, 0.57, 0.04)
        + 0.40 * _gaussian(wavelength_um, 0.47, 0.045)
    )


def band(channel: int) -> Spectrum:
    """Interpolate linearly between camera bands: 1 at band `channel`, 0 at the others."""

    def value(wavelength_um: float) -> float:
        w = min(max(wavelength_um, RGB_UM[2]), RGB_UM[0])
        if w >= RGB_UM[1]:
            t = (w - RGB_UM[1]) / (RGB_UM[0] - RGB_UM[1])
            return (t, 1 - t, 0.0)[channel]
        t = (RGB_UM[1] - w) / (RGB_UM[1] - RGB_UM[2])
        return (0.0, 1 - t, t)[channel]

    return value
