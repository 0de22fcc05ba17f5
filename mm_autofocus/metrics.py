"""Focus measures: how sharp is an image, as one number that is larger where it is sharper.

Each measure is a function ``(image (Y, X)) -> float`` and is named in
`mm_autofocus.registry.METRICS`. `FocusMeasure` applies one of them as the settings ask:
colour, region, tiles, normalisation, noise.

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
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np
from scipy.special import bdtrc, ndtri

from mm_autofocus.errors import InputError
from mm_autofocus.registry import METRICS
from mm_autofocus.settings import AutofocusSettings, MetricOptions

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = [
    "FocusMeasure",
    "Metric",
    "brenner",
    "compare_tiles",
    "mid_frequency",
    "noise_of_tiles",
    "noise_variance",
    "normalized_variance",
    "standard_deviation",
    "tenengrad",
    "variance_of_laplacian",
    "vollath_f4",
    "vollath_f5",
]

Metric: TypeAlias = "Callable[[Image], float]"

# The types that OpenCV computes with as they are; everything else becomes float64.
_NATIVE = frozenset(map(np.dtype, ("u1", "u2", "i2", "f4", "f8")))


def _plane(image: Image, columns: int = 1, rows: int = 1) -> npt.NDArray[Any]:
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


def _finite(score: float) -> float:
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


def _square_sum(a: npt.NDArray[Any]) -> float:
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
    a = _plane(image, columns=3)
    total = _square_sum_of_difference(a[:, 2:], a[:, :-2])
    return _finite(total / (a.shape[0] * (a.shape[1] - 2)))


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
    a = _plane(image, columns=3, rows=3)
    depth = _filter_depth(a)
    total = _square_sum(cv2.Sobel(a, depth, 1, 0)) + _square_sum(cv2.Sobel(a, depth, 0, 1))
    return _finite(total / a.size)


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
    a = _plane(image, columns=3, rows=3)
    return _finite(_variance(cv2.Laplacian(a, _filter_depth(a), ksize=1)))


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
    return _finite(math.sqrt(_variance(_plane(image))))


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
    mean, variance = _mean_and_variance(_plane(image))
    _finite(variance)
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
    i = _plane(image, columns=3)
    a, b, c = i[:, :-2], i[:, 1:-1], i[:, 2:]
    # Σ a (b - c) written in sums of squares, which are exact on integer images
    products = 0.5 * (
        _square_sum(b)
        - _square_sum(c)
        - _square_sum_of_difference(a, b)
        + _square_sum_of_difference(a, c)
    )
    # b and c share all columns but one each
    shift = float(np.sum(i[:, 1], dtype=np.float64) - np.sum(i[:, -1], dtype=np.float64))
    mean = float(cv2.mean(i)[0])
    return _finite((products - mean * shift) / a.size)


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
    i = _plane(image, columns=2)
    a, b = i[:, :-1], i[:, 1:]
    products = 0.5 * (_square_sum(a) + _square_sum(b) - _square_sum_of_difference(a, b))
    mean = float(cv2.mean(i)[0])
    sums = float(cv2.sumElems(a)[0] + cv2.sumElems(b)[0])
    return _finite((products - mean * sums) / a.size + mean**2)


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
    a = _plane(image, columns=4, rows=4)
    kernel = np.array([1.0, 1.0, -1.0, -1.0])
    response = cv2.sepFilter2D(a, _filter_depth(a), kernel, kernel)
    return _finite(_square_sum(response) / a.size)


@dataclass(frozen=True, slots=True)
class _Law:
    """How a measure answers to intensity and to white noise.

    It grows with intensity to the power `degree`; white noise of variance σ² adds
    ``noise · σ²`` to its power `of_power`, divided by the mean if `per_mean`.
    """

    degree: int = 2
    noise: float | None = None
    of_power: int = 1
    per_mean: bool = False


_LAWS: dict[str, _Law] = {
    "brenner": _Law(noise=2.0),
    "tenengrad": _Law(noise=24.0),
    "variance-of-laplacian": _Law(noise=20.0),
    "normalized-variance": _Law(degree=1, noise=1.0, per_mean=True),
    "vollath-f4": _Law(noise=0.0),
    "vollath-f5": _Law(noise=0.0),
    "standard-deviation": _Law(degree=1, noise=1.0, of_power=2),
    "mid-frequency": _Law(noise=16.0),
}

# Blocks of 16 pixels; the tenth percentile of the noise's block means lies lower than
# their mean by this factor (simulated with white noise, 10⁴ blocks).
_NOISE_BLOCK = 16
_NOISE_BIAS = 0.80


def noise_variance(image: Image) -> float:
    """Estimate the variance of the camera's white noise from one image.

    The image is filtered by ``(1, -2, 1)`` in x and in y, which removes what is smooth
    (J. Immerkær, *Comput. Vis. Image Underst.* 64 (1996) 300–302); the tenth percentile of
    the mean squares of blocks of 16 × 16 pixels keeps sharp detail out, as long as a tenth
    of the blocks hold none.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)``, at least 3 × 3.

    Returns
    -------
    float
        In squared grey values. Where all of the image is sharp detail, too large; where
        the noise grows with the intensity, that of the quietest tenth of the image.
    """
    a = _plane(image, columns=3, rows=3)
    kernel = np.array([1.0, -2.0, 1.0])
    depth = cv2.CV_64F if a.dtype == np.float64 else cv2.CV_32F
    r = cv2.sepFilter2D(a, depth, kernel, kernel)[1:-1, 1:-1]
    n = _NOISE_BLOCK
    rows, columns = r.shape[0] // n, r.shape[1] // n
    if rows * columns < 10:
        return _finite(_square_sum(r) / r.size / 36.0)
    r = np.ascontiguousarray(r[: rows * n, : columns * n])
    blocks = cv2.resize(cv2.multiply(r, r), (columns, rows), interpolation=cv2.INTER_AREA)
    return _finite(float(np.percentile(blocks, 10)) / 36.0 / _NOISE_BIAS)


def compare_tiles(a: Floats, b: Floats, least: float = 0.0) -> float:
    """By how many standard deviations of their noise `a` exceeds `b`.

    The tiles of two looks at the same field are compared one by one, so that the specimen,
    which both share, drops out; what is left scatters about 0 if the looks differ by
    noise alone. Two tests ask whether it does, and the surer one counts:

    - the mean difference in units of its standard error, from the median absolute
      deviation: one tile with the only object of the field stands out of such noise
      instead of adding to it;
    - the signs of the differences: a change that all tiles share is no noise, however
      different its size from tile to tile.

    Parameters
    ----------
    a, b : numpy.ndarray
        Scores of the same tiles in two looks, from `FocusMeasure.tile_scores`.
    least : float
        Scatter of one tile below which no estimate is believed: what a few pixels that
        change by one grey level make.

    Returns
    -------
    float
        About normal with mean 0 and a standard deviation a little above 1 if the looks
        differ by noise alone; infinite where they differ without any, 0 where they are
        equal.
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    mean = float(d.mean())
    if mean == 0.0:
        return 0.0
    error = max(noise_of_tiles(d), least / math.sqrt(d.size))
    by_size = abs(mean) / error if error > 0 else math.inf
    moved = d[np.abs(d) > least]
    agree = int(np.count_nonzero(np.sign(moved) == np.sign(mean)))
    # probability that so many of so many coins fall alike
    chance = float(bdtrc(agree - 1, moved.size, 0.5)) if agree else 1.0
    return math.copysign(max(by_size, -float(ndtri(chance))), mean)


def noise_of_tiles(d: Floats) -> float:
    """Standard error of the mean of tile differences `d`, from their scatter, robustly.

    Few tiles can agree by chance; the estimate is enlarged by ``1 + 200 / n²``, at most to
    ten times.
    """
    n = d.size
    if n < 2:
        return abs(float(d.sum()))
    scatter = 1.4826 * float(np.median(np.abs(d - np.median(d)))) / math.sqrt(n)
    return scatter * min(10.0, 1 + 200 / n**2)


@dataclass(frozen=True, slots=True)
class FocusMeasure:
    """A focus measure as the settings ask for it.

    Attributes
    ----------
    name : str
        Name in `mm_autofocus.registry.METRICS`.
    options : MetricOptions
        Colour, normalisation, noise, tiles, region.

    Examples
    --------
    >>> import numpy as np
    >>> measure = FocusMeasure.from_settings(AutofocusSettings(metric="brenner"))
    >>> measure(np.array([[0, 0, 3, 4]], dtype=np.uint8))
    12.5
    """

    name: str = "brenner"
    options: MetricOptions = field(default_factory=MetricOptions)
    _function: Metric = field(init=False, repr=False, compare=False)
    _law: _Law = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_function", METRICS.get(self.name))
        object.__setattr__(self, "_law", _LAWS.get(self.name, _Law()))
        if self.options.noise and self._law.noise is None:
            raise InputError(
                f"metric_options.noise: what noise adds to the metric {self.name!r} is not "
                "known; allowed: false"
            )

    @classmethod
    def from_settings(cls, settings: AutofocusSettings) -> FocusMeasure:
        """The measure that `settings` name.

        Raises
        ------
        InputError
            ``noise`` is asked of a measure whose answer to noise is not known.
        """
        return cls(settings.metric, settings.metric_options)

    def grey(self, image: Image) -> npt.NDArray[Any]:
        """The part of `image` that is measured, as ``(Y, X)`` grey values.

        Parameters
        ----------
        image : numpy.ndarray
            ``(Y, X)`` or ``(Y, X, 3)`` in the order red, green, blue.

        Raises
        ------
        InputError
            Another shape, or the region is not inside the image.
        """
        a: npt.NDArray[Any] = np.asarray(image)
        if a.ndim not in (2, 3) or (a.ndim == 3 and a.shape[2] != 3):
            raise InputError(f"image: (Y, X) or (Y, X, 3) is needed, not the shape {a.shape}")
        if a.size == 0:
            raise InputError(f"image: it is empty, of shape {a.shape}")
        if self.options.roi is not None:
            x, y, width, height = self.options.roi
            if x + width > a.shape[1] or y + height > a.shape[0]:
                raise InputError(
                    f"metric_options.roi: {list(self.options.roi)} is not inside the image "
                    f"of {a.shape[1]} × {a.shape[0]} pixels"
                )
            a = a[y : y + height, x : x + width]
        if a.ndim == 2:
            return a
        if self.options.colour == "green":
            return np.ascontiguousarray(a[..., 1])
        if a.dtype in (np.uint8, np.uint16, np.float32):
            return np.asarray(cv2.cvtColor(a, cv2.COLOR_RGB2GRAY))
        # the same weights, ITU-R BT.601
        grey: Floats = a.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
        return grey

    def __call__(self, image: Image) -> float:
        """Score `image`, ``(Y, X)`` or ``(Y, X, 3)``; larger is sharper.

        Raises
        ------
        InputError
            The image is empty, too small, of a wrong shape, or holds NaN or infinities.
        """
        return self.score(self.grey(image))

    def score(self, grey: Image) -> float:
        """Score what `grey` returned."""
        n = self.options.tiles
        if n > 1:
            return float(np.median([self._one(t) for t in _tiles(grey, n)]))
        return self._one(grey)

    def tile_scores(self, grey: Image, tiles: int = 8) -> Floats:
        """Score each of ``tiles × tiles`` parts of what `grey` returned.

        It is what `compare_tiles` compares to tell a change of focus from noise.

        Returns
        -------
        numpy.ndarray
            ``(tiles²,)``; fewer where the image is too small for so many.
        """
        # A tile below 8 pixels holds more border than image.
        n = max(1, min(tiles, grey.shape[0] // 8, grey.shape[1] // 8))
        return np.array([self._one(t) for t in _tiles(grey, n)])

    def _one(self, grey: Image) -> float:
        law, options = self._law, self.options
        score = self._function(grey)
        if options.noise and law.noise:
            noise = law.noise * noise_variance(grey)
            if law.per_mean:
                noise /= max(_mean(grey), 1e-12)
            score = max(0.0, score**law.of_power - noise) ** (1 / law.of_power)
        if options.normalize:
            # Divided by the mean to the power with which the measure grows: the square
            # for most. A look no brighter than the camera's offset shows nothing.
            mean = _mean(grey) - options.background
            return score / mean**law.degree if mean > 0 else 0.0
        return score


def _mean(grey: Image) -> float:
    a: npt.NDArray[Any] = grey
    return float(np.mean(a, dtype=np.float64))


def _tiles(grey: Image, n: int) -> list[Image]:
    """Cut ``(Y, X)`` into ``n × n`` parts that cover it."""
    if min(grey.shape) < n:
        raise InputError(
            f"metric_options.tiles: {n} × {n} tiles do not fit into an image of "
            f"{grey.shape[1]} × {grey.shape[0]} pixels"
        )
    rows = np.linspace(0, grey.shape[0], n + 1).astype(int)
    columns = np.linspace(0, grey.shape[1], n + 1).astype(int)
    return [
        grey[top:bottom, left:right]
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]
