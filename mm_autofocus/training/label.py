"""Where a recorded z-stack is in focus, how surely, and how much of it holds specimen.

Focus is defined by the focus measure that is used at run time, so that a model learns to go
where a search would have gone. The planes are met one by one and none is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import cv2
import numpy as np
from scipy.interpolate import CubicSpline
from scipy.signal import find_peaks

from mm_autofocus.errors import InputError
from mm_autofocus.measure import FocusMeasure, compare_tiles, noise_variance

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = [
    "LEAST_NOISE",
    "LEAST_PLANES",
    "SPARSITIES",
    "Label",
    "Sparsity",
    "StackMeter",
    "local_variance",
    "middle_of",
    "peak_of",
    "sparsity_of",
]

Sparsity = Literal["dense", "sparse", "extremely-sparse", "blank"]

SPARSITIES: tuple[Sparsity, ...] = ("dense", "sparse", "extremely-sparse", "blank")

LEAST_PLANES = 5
"""Fewer cannot show a peak and both its flanks."""

LEAST_NOISE = 1e-4
"""Variance of square roots of grey values that a camera without noise has by rounding."""

_DENSE, _SPARSE, _FLECK = 0.45, 0.06, 0.002

_SURE = 5.0  # standard deviations by which the peak exceeds the ends, tile by tile
_SMOOTH = 6.0  # height of the peak, in standard deviations of the scatter between planes
_FALL = 0.3  # part of the peak's height by which both sides must fall
_SECOND = 0.5  # a second peak so high, in parts of the first ...
_DIP = 0.25  # ... behind a valley so deep leaves two answers
_PARTS = 3.0  # of the frame that must make the curve, to tell its error by leaving one out
_MODEL = 0.05  # flanks that are not alike, in widths of the peak at half height
_SAMPLING = 0.3  # distance of the planes over the width of the peak, in such distances
_THIN = 4.0  # depths of field that the curve of a thin specimen is wide at half height, at most
_LIFT = 0.1  # of the height, so that the flanks hold no logarithm of nothing
_FINE = 401  # points between three planes


@dataclass(frozen=True, slots=True)
class Label:
    """The focus of a stack.

    Attributes
    ----------
    status : {"ok", "refused"}
        Whether the stack has a clear peak.
    reason : str
        One clause that says why not; empty if it has.
    focus_z_um : float | None
        z of the peak, between the planes, in µm; None if refused.
    expected_error_um : float | None
        Standard deviation expected of it: noise, specimen at several depths, flanks that are
        not alike, and distance of the planes.
    contrast : float
        ``(peak - baseline) / peak`` of the focus curve, 0 … 1.
    significance : float
        By how many standard deviations the sharpest plane exceeds the blurred ends, by
        `mm_autofocus.measure.compare_tiles`; at most 1000.
    width_um : float | None
        Full width of the peak at half its height over the baseline.
    planes_below, planes_above : int
        Planes on each side of the peak.
    """

    status: Literal["ok", "refused"]
    reason: str = ""
    focus_z_um: float | None = None
    expected_error_um: float | None = None
    contrast: float = 0.0
    significance: float = 0.0
    width_um: float | None = None
    planes_below: int = 0
    planes_above: int = 0


@dataclass(slots=True)
class StackMeter:
    """Measures the planes of one stack as they come; holds numbers, never a plane.

    Parameters
    ----------
    measure : FocusMeasure
        As at run time.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> texture = rng.normal(size=(64, 64))
    >>> meter = StackMeter()
    >>> for z in np.arange(-6.0, 7.0):
    ...     contrast = 40 * np.exp(-(((z - 0.4) / 3) ** 2))
    ...     meter.add(z, 100 + contrast * texture + rng.normal(size=(64, 64)))
    >>> label = meter.label()
    >>> label.status, abs(label.focus_z_um - 0.4) < 0.1
    ('ok', True)
    """

    measure: FocusMeasure = field(default_factory=FocusMeasure)
    z_um: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    _tiles: list[Floats] = field(default_factory=list)
    _noise: float = math.inf  # of the quietest plane
    _variance: Floats = field(default_factory=lambda: np.zeros((0, 0)))  # of the sharpest one

    def add(self, z_um: float, image: Image) -> None:
        """Measure one plane, ``(Y, X)`` or ``(Y, X, 3)``, taken at `z_um`.

        Raises
        ------
        InputError
            The z is not known, or the image is none that can be measured.
        """
        if z_um is None or not math.isfinite(z_um):
            raise InputError(f"z_um: plane {len(self.z_um)} of the stack has no z")
        grey = self.measure.grey(image)
        score = self.measure.score(grey)
        # its square root: shot noise is then alike in bright and dark parts
        root = np.sqrt(np.maximum(grey.astype(np.float32), 0))
        # a blurred plane shows the noise alone, a sharp one fine structure as well
        self._noise = min(self._noise, noise_variance(root))
        if score > max(self.scores, default=-math.inf):
            self._variance = local_variance(root)
        self.z_um.append(float(z_um))
        self.scores.append(score)
        self._tiles.append(self.measure.tile_scores(grey))

    @property
    def content(self) -> float:
        """Part of the sharpest plane whose local variance is above the noise, 0 … 1.

        Holes are closed: the inside of a nucleus is specimen, too.
        """
        if not self._variance.size:
            return 0.0
        # a quarter of the noise is left in pixels of 2 × 2; four times that is no noise
        mask = (self._variance > max(self._noise, LEAST_NOISE)).astype(np.uint8)
        kernel = np.ones((3, 3), np.uint8)
        return float(np.mean(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, kernel)))

    @property
    def sparsity(self) -> Sparsity:
        """Class of the field by its content.

        Dust on the camera stands out of the noise, too, but never comes into focus: where
        the focus curve is flat, little content is none.
        """
        label = self.label()
        flat = label.reason.startswith("flat") or label.significance < _SURE
        if self.content < _SPARSE and label.status == "refused" and flat:
            return "blank"
        return sparsity_of(self.content)

    def label(self, dof_um: float | None = None) -> Label:
        """Find the peak of the focus curve, or say why there is none.

        Parameters
        ----------
        dof_um : float, optional
            Depth of field; a peak less sure than half of it is refused. Unknown: the focus is
            the middle of the curve, as of thick specimen.

        Raises
        ------
        InputError
            Too few planes, or planes at the same z.
        """
        return _label(self.z_um, self.scores, self._tiles, dof_um)


def sparsity_of(content: float) -> Sparsity:
    """Class of a field: dense ≥ 45 % > sparse ≥ 6 % > extremely sparse ≥ 0.2 % > blank."""
    if content >= _DENSE:
        return "dense"
    if content >= _SPARSE:
        return "sparse"
    return "extremely-sparse" if content >= _FLECK else "blank"


def local_variance(image: npt.NDArray[np.float32]) -> Floats:
    """Variance in windows of 8 × 8 pixels, of pixels of 2 × 2; ``(Y / 8, X / 8)``."""
    rows, columns = image.shape[0] // 8, image.shape[1] // 8
    if not rows or not columns:
        return np.zeros((0, 0))
    half = cv2.resize(
        image[: rows * 8, : columns * 8], (columns * 4, rows * 4), interpolation=cv2.INTER_AREA
    )
    half = half - half.mean()  # the variance is a small difference of large squares
    mean = cv2.resize(half, (columns, rows), interpolation=cv2.INTER_AREA)
    square = cv2.resize(half * half, (columns, rows), interpolation=cv2.INTER_AREA)
    return np.asarray(np.maximum(square - mean * mean, 0) * (16 / 15), np.float64)


def _label(
    z_um: Sequence[float], scores: Sequence[float], tiles: Sequence[Floats], dof: float | None
) -> Label:
    if len(z_um) < LEAST_PLANES:
        raise InputError(
            f"a stack of {len(z_um)} planes is too short; at least {LEAST_PLANES} are needed"
        )
    order = np.argsort(z_um, kind="stable")
    z, s = np.asarray(z_um, float)[order], np.asarray(scores, float)[order]
    steps = np.diff(z)
    if steps.min() <= 0:
        raise InputError(f"z_um: two planes of the stack lie at {z[steps.argmin()]:g} µm")
    k = int(s.argmax())
    top, base = float(s[k]), float(s.min())
    height, last = top - base, len(z) - 1
    contrast = height / top if top > 0 else 0.0
    # The ends are what is most blurred; the one more alike to the peak must differ from it.
    ends = [tiles[order[i]] for i in {int(s[: k + 1].argmin()), k + int(s[k:].argmin())}]
    significance = min(
        (compare_tiles(tiles[order[k]], end) for end in ends if end is not tiles[order[k]]),
        default=0.0,
    )
    known: dict[str, Any] = {
        "contrast": contrast,
        "significance": float(np.clip(significance, -1000.0, 1000.0)),
        "planes_below": k,
        "planes_above": last - k,
    }

    reason = _why_not(z, s, k, significance)
    if reason:
        return Label("refused", reason, **known)
    focus, width, error = _focus(z, s, np.stack([tiles[i] for i in order]), dof)
    known |= {
        "width_um": width,
        "expected_error_um": error,
        "planes_below": int((z < focus).sum()),
        "planes_above": int((z > focus).sum()),
    }
    if min(known["planes_below"], known["planes_above"]) < 2:
        reason = "edge: fewer than two planes on one side of the peak"
    elif dof is not None and error > max(dof / 2, width / 4):
        reason = f"unsure: the peak is known to ± {error:.2g} µm only"
    return Label("refused" if reason else "ok", reason, None if reason else focus, **known)


def _why_not(z: Floats, s: Floats, k: int, significance: float) -> str:
    """Why the curve `s` with its largest value at `k` has no clear peak; "" if it has."""
    top, height = s[k], s[k] - s.min()
    if height <= 0 or height < _SMOOTH * _scatter(z, s, k):
        return "flat: the focus curve has no peak above its scatter"
    if k in (0, len(s) - 1) or min(top - s[:k].min(), top - s[k:].min()) < _FALL * height:
        return "edge: the focus curve does not fall on both sides of its peak"
    if significance < _SURE:
        return "flat: the sharpest plane differs from the blurred ones by noise alone"
    if _second(s, k, height):
        return "two peaks: the focus curve has another one of half the height or more"
    return ""


def _scatter(z: Floats, s: Floats, k: int) -> float:
    """Standard deviation of single scores about a smooth curve that rises to `k` and falls.

    A flank may bend between planes far apart, but does not turn: what counts is how far
    planes where the curve turns lie from the line through their neighbours.
    """
    part = (z[1:-1] - z[:-2]) / (z[2:] - z[:-2])
    off = s[1:-1] - (s[:-2] * (1 - part) + s[2:] * part)
    turns = (s[1:-1] - s[:-2]) * (s[2:] - s[1:-1]) < 0
    others = np.arange(1, len(s) - 1) != k
    # such a distance has 1.5 times the variance of a score
    return float(np.sqrt(np.mean((off * turns)[others] ** 2) / 1.5))


def _second(s: Floats, k: int, height: float) -> bool:
    """Whether another peak stands beside the one at `k`, behind a real valley."""
    padded = np.concatenate([[-np.inf], s, [-np.inf]])
    peaks, _ = find_peaks(padded, prominence=_DIP * height)
    others = [p - 1 for p in peaks if p - 1 != k]
    return any(s[p] - s.min() >= _SECOND * height for p in others)


def _focus(
    z: Floats, s: Floats, tiles: Floats, dof: float | None
) -> tuple[float, float, float]:
    """Focus, width at half height, and standard deviation expected of the focus, all in µm.

    The focus is the peak, where one can be told. A lens with spherical aberration makes one
    flank steep and the other gentle, and the middle of the curve then lies some tenths of a µm
    beside its peak. But in a thick section the top is a plateau with a shape of its own in each
    part of the frame, and its highest point jumps about; the middle is known much better
    (`benchmarks/learned.py --part labels`). So of a curve that is wider than a few depths of
    field, or where that is not known, the middle is taken. Of others it is left so far as all
    quarters of the frame agree that the peak lies beside it, by the shrinkage of James and
    Stein (*Proc. 4th Berkeley Symp.* 1 (1961) 361).

    The error is by leaving out a part of the frame at a time (jackknife): it holds the noise as
    well as that specimen at several depths is in focus at several places. Where one object
    alone makes the curve, leaving it out tells nothing, and the scatter of the scores must do.

    Parameters
    ----------
    z, s : numpy.ndarray
        ``(Z,)`` of the planes, ascending, and their scores; the largest is at neither end.
    tiles : numpy.ndarray
        ``(Z, tiles)``.
    dof : float | None
        Depth of field.
    """
    k, half = int(s.argmax()), (s.max() + s.min()) / 2
    middle, width = middle_of(z, s)
    scatter = _scatter(z, s, k)
    step, bend = (z[k + 1] - z[k - 1]) / 2, 2 * s[k] - s[k - 1] - s[k + 1]
    part = noise = 0.0
    if dof is not None and width < _THIN * dof:
        noise = math.sqrt(0.5) * scatter * step / bend if bend > 0 else width
        noise = math.hypot(noise, _quarters_differ(z, tiles))
        aside = peak_of(z, s) - middle
        part = max(0.0, 1 - (noise / aside) ** 2) if aside else 0.0

    def focus(of: Floats) -> float:
        known = middle_of(z, of)[0]
        return known + part * (peak_of(z, of) - known) if part else known

    i, j = _above(s, k, half)
    top = s[i : j + 1] - half
    lever = math.sqrt(float(np.square(z[i : j + 1] - middle).sum()))
    own = math.hypot((1 - part) * scatter * lever / float(top.sum()), part * noise)
    parts = _parts(tiles)
    rise = np.maximum(parts[k] - parts.min(0), 0)
    if rise.sum() ** 2 > _PARTS * np.square(rise).sum():
        each = np.array([focus(rest) for rest in (parts.sum(1)[:, None] - parts).T])
        own = max(own, math.sqrt((len(each) - 1) * float(each.var())))
    flanks, sampling = (1 - part) * _MODEL * width, _SAMPLING * step**2 / max(width, step)
    return focus(s), width, math.hypot(min(own, width), flanks, sampling)


def _quarters_differ(z: Floats, tiles: Floats) -> float:
    """By how much they do in how far aside of the middle the peak lies; standard deviation."""
    quarters = _sums(tiles, 2)
    height = quarters.max(0) - quarters.min(0)
    if height.sum() <= 0:
        return 0.0
    asides = np.array([peak_of(z, q) - middle_of(z, q)[0] for q in quarters.T])
    mean = np.average(asides, weights=height)
    return float(np.average((asides - mean) ** 2, weights=height) ** 0.5)


def middle_of(z: Floats, s: Floats) -> tuple[float, float]:
    """Middle of a focus curve that rises and falls, and its width at half height, both in µm.

    The centroid of what rises above half the height: the flanks decide, where the curve tells
    most.

    Parameters
    ----------
    z, s : numpy.ndarray
        ``(Z,)``: z of the planes in µm, ascending, and their scores.
    """
    k, base = int(s.argmax()), s.min()
    half = base + 0.5 * (s[k] - base)
    i, j = _above(s, k, half)
    width = _crossing(z, s, j, 1, half) - _crossing(z, s, i, -1, half)
    # a flank that the stack cuts off would pull it inwards: then from where both begin
    level = max(half, s[: k + 1].min(), s[k:].min())
    if level >= s[k]:  # one flank is not there at all: the curve is still rising where it ends
        return float(z[k]), width
    i, j = _above(s, k, level)
    ends = _crossing(z, s, i, -1, level), _crossing(z, s, j, 1, level)
    x = np.concatenate([ends[:1], z[i : j + 1], ends[1:]])
    y = np.concatenate([[0.0], s[i : j + 1] - level, [0.0]])
    # of the line from point to point: area and first moment of each piece
    step, low, high = np.diff(x), y[:-1], y[1:]
    area = step * (low + high) / 2
    moment = x[:-1] * area + step**2 * (low + 2 * high) / 6
    return float(moment.sum() / area.sum()), width


def peak_of(z: Floats, s: Floats) -> float:
    """Highest point of a focus curve, in µm, beside its sharpest plane.

    By a cubic spline through the logarithm of the scores, whose peak is more like a parabola.

    Parameters
    ----------
    z, s : numpy.ndarray
        As of `middle_of`.
    """
    k = int(s.argmax())
    height = s[k] - s.min()
    if not 0 < k < len(z) - 1 or height <= 0:
        return float(z[k])
    curve = CubicSpline(z, np.log((s - s.min()) / height + _LIFT))
    fine = np.linspace(z[k - 1], z[k + 1], _FINE)
    return float(fine[curve(fine).argmax()])


def _parts(tiles: Floats) -> Floats:
    """Sums of 2 × 2 tiles, ``(Z, parts)``: neighbours show the same specimen."""
    n = math.isqrt(tiles.shape[1])
    return _sums(tiles, (n + 1) // 2)


def _sums(tiles: Floats, count: int) -> Floats:
    """Sums of tiles in `count` × `count` blocks, ``(Z, count²)``; the last may be smaller."""
    n = math.isqrt(tiles.shape[1])
    m = -(-n // count)
    grid = tiles.reshape(len(tiles), n, n)
    grid = np.pad(grid, ((0, 0), (0, m * count - n), (0, m * count - n)))
    sums: Floats = grid.reshape(len(tiles), count, m, count, m).sum((2, 4))
    return sums.reshape(len(tiles), -1)


def _above(s: Floats, k: int, level: float) -> tuple[int, int]:
    """First and last of the planes about `k` that are all at `level` or above."""
    low = np.flatnonzero(s < level)
    below, above = low[low < k], low[low > k]
    return (
        int(below[-1]) + 1 if below.size else 0,
        int(above[0]) - 1 if above.size else len(s) - 1,
    )


def _crossing(z: Floats, s: Floats, i: int, way: int, level: float) -> float:
    """Where the curve falls to `level` beyond plane `i`, by a line; at the end, the end."""
    j = i + way
    if not 0 <= j < len(z):
        return float(z[i])
    fall = s[i] - s[j]
    return float(z[i] + (z[j] - z[i]) * ((s[i] - level) / fall if fall > 0 else 0.0))
