"""What a net may be told of lens and condenser, in numbers that it is shown beside the patches.

One look tells defocus by what the lens does to it, and how far it lies off by that alone: what
two condenser apertures do to the same defocus differs by as much as some micrometres of it.
The microscope of a lab has one lens. So a net that reads spectra can be told of it: a few
numbers, each brought to -1 … 1 within its range, and behind them a 1; all zeros where nothing
is known. Nobody has to measure them: `mm_autofocus.training.lens_fit` finds those with which
the net is right on a stack or two of the microscope.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]
    Ranges: TypeAlias = Mapping[str, tuple[float, float]]

__all__ = ["LENS_NAMES", "code_of", "knows", "values_of"]

LENS_NAMES = ("sigma", "spherical_waves", "astigmatism_waves", "axial_colour_um")
"""Condenser aperture over that of the objective; aberrations in waves rms; focus of red minus
focus of blue, as in `mm_autofocus.optics.Aberrations`."""


def code_of(ranges: Ranges, values: Mapping[str, float] | None) -> Real:
    """Numbers that a net is shown.

    Parameters
    ----------
    ranges : mapping
        Name to the range that the net was taught.
    values : mapping | None
        What is known; if one of the names is missing, nothing is.

    Returns
    -------
    numpy.ndarray
        ``(len(ranges) + 1,)`` float32: -1 … 1 within the ranges, the last one whether they
        are known.
    """
    code = np.zeros(len(ranges) + 1, np.float32)
    if values is not None and knows(ranges, values):
        for k, (name, (low, high)) in enumerate(ranges.items()):
            code[k] = 2 * (values[name] - low) / (high - low) - 1
        code[-1] = 1
    return code


def knows(ranges: Ranges, values: Mapping[str, float] | None) -> bool:
    """Whether all that a net is told of is known."""
    return values is not None and all(name in values for name in ranges)


def values_of(ranges: Ranges, code: Real) -> dict[str, float]:
    """What a code ``(n + 1,)`` says, by name; of one that says nothing, nothing."""
    if not code[-1]:
        return {}
    return {
        name: float(low + (number + 1) / 2 * (high - low))
        for number, (name, (low, high)) in zip(code, ranges.items(), strict=False)
    }
