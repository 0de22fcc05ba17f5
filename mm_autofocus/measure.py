"""One focus measure, applied as the settings ask: colour, region, tiles, intensity, noise.

And what two looks at the same field tell of the noise of their scores, tile by tile: by it a
flat curve is told from a peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np
from scipy.special import bdtrc, ndtri

from mm_autofocus.errors import InputError
from mm_autofocus.metrics import Metric, as_plane, finite_score, square_sum
from mm_autofocus.registry import METRICS
from mm_autofocus.settings import AutofocusSettings, MetricOptions

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["FocusMeasure", "compare_tiles", "noise_of_tiles", "noise_variance"]


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
    a = as_plane(image, columns=3, rows=3)
    kernel = np.array([1.0, -2.0, 1.0])
    depth = cv2.CV_64F if a.dtype == np.float64 else cv2.CV_32F
    r = cv2.sepFilter2D(a, depth, kernel, kernel)[1:-1, 1:-1]
    n = _NOISE_BLOCK
    rows, columns = r.shape[0] // n, r.shape[1] // n
    if rows * columns < 10:
        return finite_score(square_sum(r) / r.size / 36.0)
    r = np.ascontiguousarray(r[: rows * n, : columns * n])
    blocks = cv2.resize(cv2.multiply(r, r), (columns, rows), interpolation=cv2.INTER_AREA)
    return finite_score(float(np.percentile(blocks, 10)) / 36.0 / _NOISE_BIAS)


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
