"""What recorded focus curves tell of a microscope: depth of field, channel offsets, patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.training.label import middle_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.training.stack import Stack

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = [
    "SHARE",
    "Depth",
    "Offset",
    "Spread",
    "channel_offsets",
    "depth_of",
    "offset_of",
    "patch_errors",
    "spread",
]

SHARE = 0.8
"""Part of its height over the baseline at which a focus curve is as wide as its depth of
field. It is the quarter-wave criterion: where the path differs by λ/4 from the middle to the
rim of the pupil, the intensity on the axis has fallen to 80 %, and without aberrations that
is so at ± λ·n / (2·NA²) (M. Born, E. Wolf, *Principles of Optics*, 7th ed., § 8.8.2). A
focus measure falls faster or slower than that intensity, and a thick specimen widens it."""

_TOP = 0.5  # planes above this part of the height make the parabola
_CLASSES = ("dense", "sparse", "extremely-sparse", "blank")


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and how far single values lie from it.

    Attributes
    ----------
    median : float
    spread : float
        Robust standard deviation: 1.4826 times the median absolute deviation.
    n : int
    """

    median: float
    spread: float
    n: int


@dataclass(frozen=True, slots=True)
class Depth:
    """How deep the field is, in µm.

    Attributes
    ----------
    optics_um : float | None
        λ·n/NA² + n·e/(M·NA); None where the NA is not known.
    curve_um : Spread | None
        Full width of the focus curve at `SHARE` of its height, over stacks.
    curvature_um : Spread | None
        The same width of the parabola that touches the peak.
    width_um : Spread | None
        Full width at half height.
    by_sparsity : dict
        `curve_um` of each class of fields.
    """

    optics_um: float | None
    curve_um: Spread | None
    curvature_um: Spread | None
    width_um: Spread | None
    by_sparsity: dict[str, Spread]

    @property
    def um(self) -> float | None:
        """What is recommended: from optics where they are known, else from the curves."""
        if self.optics_um is not None:
            return self.optics_um
        return None if self.curve_um is None else self.curve_um.median

    @property
    def source(self) -> str:
        """Where `um` comes from."""
        return "optics" if self.optics_um is not None else "focus curve"

    def to_json(self) -> dict[str, Any]:
        """Numbers, with what is recommended first."""
        return {"um": self.um, "source": self.source, "share": SHARE, **asdict(self)}


@dataclass(frozen=True, slots=True)
class Offset:
    """How much higher one channel, or colour, is in focus than another.

    Attributes
    ----------
    channel, reference : str
        Their names.
    um : Spread
        ``focus(channel) - focus(reference)`` of the same field and time, over fields.
    error_um : float
        Standard error of the median.
    """

    channel: str
    reference: str
    um: Spread
    error_um: float

    def to_json(self) -> dict[str, Any]:
        """Flat."""
        return {
            "channel": self.channel,
            "reference": self.reference,
            "median_um": round(self.um.median, 3),
            "spread_um": round(self.um.spread, 3),
            "error_um": round(self.error_um, 3),
            "n": self.um.n,
        }


def spread(values: Sequence[float]) -> Spread | None:
    """Median and robust spread; None of nothing."""
    if not len(values):
        return None
    a = np.asarray(values, float)
    middle = float(np.median(a))
    return Spread(middle, 1.4826 * float(np.median(np.abs(a - middle))), len(a))


def depth_of(stacks: Sequence[Stack]) -> Depth:
    """Depth of field of labelled stacks, from their optics and their focus curves."""
    curve: list[float] = []
    curvature: list[float] = []
    width: list[float] = []
    classes: dict[str, list[float]] = {}
    optics = [d for s in stacks if (d := s.known_optics().dof_um) is not None]
    for s in stacks:
        order = np.argsort(s.z_um)
        z, score = np.asarray(s.z_um)[order], np.asarray(s.scores)[order]
        if (w := _width_at(z, score)) is not None:
            curve.append(w)
            classes.setdefault(s.sparsity, []).append(w)
        if (w := _touching(z, score)) is not None:
            curvature.append(w)
        if s.quality.get("width_um"):
            width.append(float(s.quality["width_um"]))
    sparsity = {k: v for k in _CLASSES if (v := spread(classes.get(k, ()))) is not None}
    return Depth(
        float(np.median(optics)) if optics else None,
        spread(curve),
        spread(curvature),
        spread(width),
        sparsity,
    )


def _parabola(z: Floats, score: Floats) -> tuple[float, float, float] | None:
    """Curvature, position and height of the peak's parabola."""
    k = int(score.argmax())
    level = score.min() + _TOP * (score[k] - score.min())
    i = j = k
    while i > 0 and (score[i - 1] >= level or k - i < 1):
        i -= 1
    while j < len(z) - 1 and (score[j + 1] >= level or j - k < 1):
        j += 1
    if j - i < 2:
        return None
    a, b, c = np.polyfit(z[i : j + 1] - z[k], score[i : j + 1], 2)
    if a >= 0:
        return None
    return float(a), float(z[k] - b / (2 * a)), float(c - b * b / (4 * a))


def _touching(z: Floats, score: Floats) -> float | None:
    """Width of the parabola about the peak at `SHARE` of its height."""
    top = _parabola(z, score)
    if top is None:
        return None
    height = top[2] - float(score.min())
    return 2 * math.sqrt((1 - SHARE) * height / -top[0]) if height > 0 else None


def _width_at(z: Floats, score: Floats) -> float | None:
    """Width of the curve, linear between planes, where it is above `SHARE` of its height."""
    k = int(score.argmax())
    base = float(score.min())
    top = float(score[k])
    if k not in (0, len(z) - 1) and (fit := _parabola(z, score)) is not None:
        top = min(max(top, fit[2]), 1.1 * top)  # between planes the peak is higher
    level = base + SHARE * (top - base)
    if score[k] <= level:
        return None
    sides = []
    for way in (-1, 1):
        i = k
        while 0 <= i + way < len(z) and score[i + way] >= level:
            i += way
        if not 0 <= i + way < len(z):
            return None
        part = (score[i] - level) / (score[i] - score[i + way])
        sides.append(z[i] + (z[i + way] - z[i]) * part)
    return float(sides[1] - sides[0])


def channel_offsets(stacks: Sequence[Stack]) -> list[Offset]:
    """Offsets of the labels of all channels from the first, same field and time."""
    names: dict[int, str] = {}
    together: dict[tuple[str, str, int], dict[int, float]] = {}
    for s in stacks:
        if s.focus_z_um is not None:
            names.setdefault(s.channel, s.channel_name or f"channel {s.channel}")
            place = together.setdefault((s.slide, s.field, s.time), {})
            place[s.channel] = s.focus_z_um
    if len(names) < 2:
        return []
    first = min(names)
    found = []
    for c in sorted(names)[1:]:
        apart = [p[c] - p[first] for p in together.values() if c in p and first in p]
        if (one := offset_of(names[c], names[first], apart)) is not None:
            found.append(one)
    return found


def offset_of(channel: str, reference: str, apart_um: Sequence[float]) -> Offset | None:
    """An offset from its values in single fields; None of nothing."""
    known = spread(apart_um)
    if known is None:
        return None
    # of the median of a normal distribution: 1.2533 times that of the mean
    return Offset(channel, reference, known, 1.2533 * known.spread / math.sqrt(known.n))


def patch_errors(
    z_um: Floats, tiles: Floats, counts: Sequence[int] = (8, 4, 2, 1)
) -> dict[int, float]:
    """How far the focus of single patches lies from that of the frame, by their number.

    Parameters
    ----------
    z_um : numpy.ndarray
        ``(Z,)``, ascending.
    tiles : numpy.ndarray
        ``(Z, 64)``: scores of 8 × 8 parts.
    counts : sequence of int
        Patches along an edge.

    Returns
    -------
    dict of int to float
        Patches along an edge → median distance, in µm, of the focus of the patches that
        hold as much detail as the frame does on average, or more.
    """
    found = {}
    # the middle of the curve: of a patch, the peak is not known as well
    middle, _ = middle_of(z_um, tiles.mean(1))
    cube = tiles.reshape(len(z_um), 8, 8)
    for n in counts:
        m = 8 // n
        score = cube.reshape(len(z_um), n, m, n, m).mean((2, 4)).reshape(len(z_um), -1)
        height = score.max(0) - score.min(0)
        off = [
            abs(middle_of(z_um, score[:, k])[0] - middle)
            for k in np.flatnonzero(height >= height.mean() * (1 - 1e-9))
        ]
        if off:
            found[n] = float(np.median(off))
    return found
