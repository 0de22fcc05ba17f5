"""Focus measures: how sharp is an image, as one number that is larger where it is sharper.

Each measure is a function ``(image (Y, X)) -> float`` and is named in
`mm_autofocus.registry.METRICS`; `mm_autofocus.measure` applies one of them as the settings
ask.

All take 8-, 16- and 32-bit integers and floating point, and compute without overflow.
Sums are kept in double precision.

Which to take
-------------
Measured by ``benchmarks/classic.py`` on 120 stained brain stacks (8 bits), a stained smear
and a fluorescent light-sheet stack; the table is in ``benchmarks/RESULTS.md``. On the smear
every measure only falls away from focus. On the others:

- `brenner`, the default, and `tenengrad` fall away from focus in fluorescence, too, and on
  the brain rise by at most 2 % of their span in 95 % of the stacks. `brenner` is by far the
  cheapest.
- `vollath_f4` and `mid_frequency` do the same with up to 4 % on the brain.
- `standard_deviation`, `normalized_variance` and `vollath_f5` are governed by coarse
  structure: smooth and monotonic, but their peak is 1.2 to 2.5 times as wide and lies up to
  three planes beside Brenner's.
- `variance_of_laplacian` is not monotonic: on 118 of the 120 brain stacks it rises again away
  from focus (by 11 % of its span in the median), and in fluorescence camera noise covers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = [
    "Metric",
    "as_plane",
    "brenner",
    "finite_score",
    "mid_frequency",
    "normalized_variance",
    "square_sum",
    "standard_deviation",
    "tenengrad",
    "variance_of_laplacian",
    "vollath_f4",
    "vollath_f5",
]

Metric: TypeAlias = "Callable[[Image], float]"

# The types that OpenCV computes with as they are; everything else becomes float64.
_NATIVE = frozenset(map(np.dtype, ("u1", "u2", "i2", "f4", "f8")))


def as_plane(image: Image, columns: int = 1, rows: int = 1) -> npt.NDArray[Any]:
    """Return `image` as OpenCV takes it, or raise `InputError` if there is no measuring it."""
    a = np.asarray(image)
    if a.ndim != 2:
        raise InputError(f"image: a focus measure takes (Y, X), not the shape {a.shape}")
    if a.shape[0] < rows or a.shape[1] < columns:
        raise InputError(
            f"image: {a.shape[1]} × {a.shape[0]} pixels are too few for this focus measure, "
            f"which needs at least {columns} × {rows}"
        )
    if a.dtype in _NATIVE:
        return a
    if a.dtype.kind not in "buif":
        raise InputError(f"image: pixels of type {a.dtype} are no grey values")
    return a.astype(np.float64)


def finite_score(score: float) -> float:
    """Return `score`, or raise `InputError` where the image held a NaN or an infinity."""
    # Every pixel enters every measure, so one NaN or infinity among them shows here, and
    # integer images pay nothing for the check.
    if not math.isfinite(score):
        raise InputError("image: it holds NaN or infinite values")
    return score


def _filter_depth(a: npt.NDArray[Any]) -> int:
    """Depth in which small integer kernels on `a` are exact."""
    if a.dtype == np.uint8:
        return cv2.CV_16S
    return cv2.CV_64F if a.dtype == np.float64 else cv2.CV_32F


def square_sum(a: npt.NDArray[Any]) -> float:
    """Sum of the squares, in double precision."""
    return float(cv2.norm(a, cv2.NORM_L2SQR))


def _square_sum_of_difference(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(cv2.norm(a, b, cv2.NORM_L2SQR))


def brenner(image: Image) -> float:
    """Mean squared difference of pixels two columns apart.

    ``F = mean((I[y, x + 2] - I[y, x])²)``. A constant offset does not change it; it grows
    with the square of the intensity. White camera noise of variance σ² adds ``2 σ²``.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``, X ≥ 3, integer or floating point.

    Returns
    -------
    float
        In squared grey values, ≥ 0.

    Raises
    ------
    InputError
        The image has another shape, is empty, or holds NaN or infinities.

    Notes
    -----
    It sees edges across x only; a specimen of horizontal lines needs another measure.

    Source: J. F. Brenner et al., *J. Histochem. Cytochem.* 24 (1976) 100–111.

    Examples
    --------
    >>> import numpy as np
    >>> brenner(np.array([[0, 0, 3, 4]], dtype=np.uint8))
    12.5
    """
    a = as_plane(image, columns=3)
    total = _square_sum_of_difference(a[:, 2:], a[:, :-2])
    return finite_score(total / (a.shape[0] * (a.shape[1] - 2)))


def tenengrad(image: Image) -> float:
    """Mean squared gradient by the 3 × 3 Sobel operators.

    ``F = mean(Sx² + Sy²)``. A constant offset does not change it; it grows with the square
    of the intensity. White noise of variance σ² adds ``24 σ²``.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``, at least 3 × 3.

    Returns
    -------
    float
        In squared grey values, ≥ 0.

    Raises
    ------
    InputError
        As `brenner`.

    Notes
    -----
    Source: J. M. Tenenbaum, *Accommodation in computer vision* (Stanford, 1970); E. Krotkov,
    *Int. J. Comput. Vis.* 1 (1988) 223–237, without his threshold.
    """
    a = as_plane(image, columns=3, rows=3)
    depth = _filter_depth(a)
    total = square_sum(cv2.Sobel(a, depth, 1, 0)) + square_sum(cv2.Sobel(a, depth, 0, 1))
    return finite_score(total / a.size)


def variance_of_laplacian(image: Image) -> float:
    """Variance of the Laplacian of four neighbours.

    ``F = var(I[y, x±1] + I[y±1, x] - 4 I[y, x])``. A constant offset does not change it;
    it grows with the square of the intensity. White noise of variance σ² adds ``20 σ²``,
    more than to any other measure here in proportion to what detail gives: in dim or
    compressed images it is not monotonic (see the head of this module).

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``, at least 3 × 3.

    Returns
    -------
    float
        In squared grey values, ≥ 0.

    Raises
    ------
    InputError
        As `brenner`.

    Notes
    -----
    Source: J. L. Pech-Pacheco et al., *Proc. ICPR* 3 (2000) 314–317.
    """
    a = as_plane(image, columns=3, rows=3)
    return finite_score(_variance(cv2.Laplacian(a, _filter_depth(a), ksize=1)))


def _mean_and_variance(a: npt.NDArray[Any]) -> tuple[float, float]:
    mean, deviation = cv2.meanStdDev(a)
    return float(mean[0, 0]), float(deviation[0, 0]) ** 2


def _variance(a: npt.NDArray[Any]) -> float:
    return _mean_and_variance(a)[1]


def standard_deviation(image: Image) -> float:
    """Standard deviation of the grey values.

    ``F = sqrt(var(I))``. A constant offset does not change it; it grows in proportion to
    the intensity. White noise of variance σ² adds σ² to its square.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``.

    Returns
    -------
    float
        In grey values, ≥ 0.

    Raises
    ------
    InputError
        As `brenner`.
    """
    return finite_score(math.sqrt(_variance(as_plane(image))))


def normalized_variance(image: Image) -> float:
    """Variance of the grey values divided by their mean.

    ``F = var(I) / mean(I)``; 0 where the mean is not positive. It grows in proportion to
    the intensity, and a constant offset (the camera's) *does* lower it. White noise of
    variance σ² adds ``σ² / mean``.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``.

    Returns
    -------
    float
        In grey values, ≥ 0.

    Raises
    ------
    InputError
        As `brenner`.

    Notes
    -----
    Source: F. C. A. Groen, I. T. Young, G. Ligthart, *Cytometry* 6 (1985) 81–91.
    """
    mean, variance = _mean_and_variance(as_plane(image))
    finite_score(variance)
    return variance / mean if mean > 0 else 0.0


def vollath_f4(image: Image) -> float:
    """Autocovariance along x at one pixel minus that at two.

    ``F = mean(J[y, x] (J[y, x + 1] - J[y, x + 2]))`` with ``J = I - mean(I)``. A constant
    offset does not change it; it grows with the square of the intensity. White noise adds
    nothing on average, which makes it the measure for dim images.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``, X ≥ 3.

    Returns
    -------
    float
        In squared grey values; a little below 0 is possible in blurred images.

    Raises
    ------
    InputError
        As `brenner`.

    Notes
    -----
    The mean is subtracted first, which in the source's formula only the border would feel.

    Source: D. Vollath, *J. Microsc.* 147 (1987) 279–288.
    """
    i = as_plane(image, columns=3)
    a, b, c = i[:, :-2], i[:, 1:-1], i[:, 2:]
    # Σ a (b - c) written in sums of squares, which are exact on integer images
    products = 0.5 * (
        square_sum(b)
        - square_sum(c)
        - _square_sum_of_difference(a, b)
        + _square_sum_of_difference(a, c)
    )
    # b and c share all columns but one each
    shift = float(np.sum(i[:, 1], dtype=np.float64) - np.sum(i[:, -1], dtype=np.float64))
    mean = float(cv2.mean(i)[0])
    return finite_score((products - mean * shift) / a.size)


def vollath_f5(image: Image) -> float:
    """Autocovariance along x at one pixel.

    ``F = mean(J[y, x] J[y, x + 1])`` with ``J = I - mean(I)``. A constant offset does not
    change it; it grows with the square of the intensity. White noise adds nothing on
    average.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``, X ≥ 2.

    Returns
    -------
    float
        In squared grey values.

    Raises
    ------
    InputError
        As `brenner`.

    Notes
    -----
    Source: D. Vollath, *J. Microsc.* 151 (1988) 133–146.
    """
    i = as_plane(image, columns=2)
    a, b = i[:, :-1], i[:, 1:]
    products = 0.5 * (square_sum(a) + square_sum(b) - _square_sum_of_difference(a, b))
    mean = float(cv2.mean(i)[0])
    sums = float(cv2.sumElems(a)[0] + cv2.sumElems(b)[0])
    return finite_score((products - mean * sums) / a.size + mean**2)


def mid_frequency(image: Image) -> float:
    """Mean squared response of the mid-frequency operator of the 4 × 4 cosine transform.

    ``F = mean((I * O)²)`` with ``O = v vᵀ``, ``v = (1, 1, -1, -1)``. A constant offset does
    not change it; it grows with the square of the intensity. White noise of variance σ²
    adds ``16 σ²``, little in proportion to what structures of about four pixels give.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``, at least 4 × 4.

    Returns
    -------
    float
        In squared grey values, ≥ 0.

    Raises
    ------
    InputError
        As `brenner`.

    Notes
    -----
    Source: S. Y. Lee et al., *IEEE Trans. Circuits Syst. Video Technol.* 18 (2008)
    1237–1246.
    """
    a = as_plane(image, columns=4, rows=4)
    kernel = np.array([1.0, 1.0, -1.0, -1.0])
    response = cv2.sepFilter2D(a, _filter_depth(a), kernel, kernel)
    return finite_score(square_sum(response) / a.size)
