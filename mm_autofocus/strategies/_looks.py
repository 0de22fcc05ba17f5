"""What the classic searches share: the scored looks, their noise, and what is no peak.

A search that knows the scores alone takes the highest of a blank field for its focus.
Here each look keeps the scores of its tiles, so that a rise from one look to another can
be compared with the noise of both, measured from them (see `measure.compare_tiles`).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.measure import FocusMeasure, compare_tiles, noise_of_tiles
from mm_autofocus.types import FocusRequest, FocusResult, Look, Looking

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

__all__ = ["SIGNIFICANT", "ScoredLook", "ScoredLooks", "parabola_top", "vertex"]

SIGNIFICANT = 6.0
"""The best look must exceed the worst by so many standard deviations of their noise.

The range of 20 looks that differ by noise alone is about 2.6 ± 0.5 in this unit."""

# A change of the lamp between two looks moves all tiles together, and no statistics over
# tiles can see it. Above this ratio of worst to best score it could explain the contrast.
_WEAK = 0.4

# A look repeated at the same z may differ by so much of the contrast.
_REPEATS = 0.35
_REPEATS_ON_FLANK = 0.5

# Tiles up to this quantile are taken to show no specimen where others do.
_FLOOR = 0.2
_MOSTLY_FLOOR = 0.15  # and their spread is then so small, in parts of the score

_SAME_UM = 1e-6

# The quietest of many pairs is quieter than their noise by about so much; with fewer than
# four looks there is no choice among pairs.
_QUIETEST = 1.5
_FEW = 4

# Looks above this part of the contrast stand on the peak.
_FOOT = 0.1
_ON_PEAK = 3

_FLICKER = 4.0
_DARK = 0.005
_DARK_LEVELS = 4.0
_SATURATED = 0.25


@dataclass(frozen=True, slots=True)
class ScoredLook:
    """One look: z in µm, its score, and the scores of its tiles."""

    z_um: float
    score: float
    tiles: Floats


@dataclass(slots=True)
class ScoredLooks:
    """The looks of one search so far.

    Attributes
    ----------
    measure : FocusMeasure
        What scores them.
    request : FocusRequest
        What was asked.
    """

    measure: FocusMeasure
    request: FocusRequest
    looks: list[ScoredLook] = field(default_factory=list)
    _last: npt.NDArray[Any] | None = None
    _ceiling: float | None = None
    _least: float = 0.0
    _confirmed: bool = False

    def __len__(self) -> int:
        return len(self.looks)

    def add(self, look: Look) -> ScoredLook:
        """Score `look`, write the score into it, and keep it."""
        grey = self.measure.grey(look.image)
        look.score = self.measure.score(grey)
        scored = ScoredLook(look.z_um, look.score, self.measure.tile_scores(grey))
        self.looks.append(scored)
        self._last, self._ceiling = grey, look.max_value
        if grey.dtype.kind in "bui":
            # two pixels of a tile that flicker by one grey level
            self._least = _FLICKER * scored.tiles.size / grey.size
        return scored

    @property
    def left(self) -> int:
        """How many looks the budget still holds."""
        return self.request.max_looks - len(self.looks)

    @property
    def best(self) -> ScoredLook:
        """The look with the highest score; of equal ones, the first."""
        return max(self.looks, key=lambda look: look.score)

    @property
    def neighbours(self) -> tuple[float, float]:
        """Where the looks next to the best were taken (µm), or the limits."""
        z, best = self.z, self.best.z_um
        below, above = z[z < best - _SAME_UM], z[z > best + _SAME_UM]
        return (
            float(below.max()) if below.size else self.request.z_min_um,
            float(above.min()) if above.size else self.request.z_max_um,
        )

    @property
    def worst(self) -> ScoredLook:
        """The look with the lowest score."""
        return min(self.looks, key=lambda look: look.score)

    @property
    def z(self) -> Floats:
        """Where the looks were taken, in µm, in their order."""
        return np.array([look.z_um for look in self.looks])

    @property
    def scores(self) -> Floats:
        """Scores in the order taken."""
        return np.array([look.score for look in self.looks])

    def noise(self) -> float:
        """Standard deviation of the noise of one score, estimated from pairs of looks.

        The specimen's change between two looks adds to what is seen, so the quietest pair
        of neighbours in z is nearest to the truth; it is an upper bound. 0 for one look.
        """
        ordered = sorted(self.looks, key=lambda look: look.z_um)
        found = [
            max(noise_of_tiles(b.tiles - a.tiles), self._least / np.sqrt(b.tiles.size))
            / np.sqrt(2.0)
            * _scale(a, b)
            for a, b in pairwise(ordered)
            if b.z_um - a.z_um > _SAME_UM
        ]
        tiles = float(min(found, default=0.0))
        # What all tiles share, a lamp's flicker, shows only where a look was repeated.
        apart = [
            b.score - a.score
            for a, b in combinations(self.looks, 2)
            if abs(a.z_um - b.z_um) <= _SAME_UM
        ]
        repeats = float(np.sqrt(np.mean(np.square(apart)) / 2)) if apart else 0.0
        return max(tiles, repeats)

    def significance(self) -> float:
        """By how many standard deviations of noise the best look exceeds the worst.

        Compared with the scatter between their own tiles, or with the noise of the
        quietest pair of looks: on a plateau the specimen itself changes from tile to tile,
        up in some and down in others, and that is no noise.
        """
        if len(self.looks) < 2:
            return 0.0
        best, worst = self.best, self.worst
        own = self._compare(best, worst)
        rise, noise = best.score - worst.score, _QUIETEST * np.sqrt(2.0) * self.noise()
        if rise <= 0 or len(self.looks) < _FEW:
            return own
        return max(own, rise / noise) if noise > 0 else own

    def _compare(self, a: ScoredLook, b: ScoredLook) -> float:
        return compare_tiles(a.tiles, b.tiles, least=self._least)

    @property
    def flat(self) -> bool:
        """Whether the looks differ by no more than their noise explains."""
        return self.best.score <= 0 or self.significance() < SIGNIFICANT

    @property
    def weak(self) -> bool:
        """Whether the contrast is so small that a flickering lamp could have made it.

        A lamp moves all tiles by one factor, and what they differ by, too. On a sparse field
        most tiles show the camera's noise alone, which hides how far the others rose.
        """
        best, worst = self.best, self.worst
        if not (best.score > 0 and worst.score > _WEAK * best.score):
            return False
        if _above_floor(worst.tiles) > _MOSTLY_FLOOR * worst.tiles.mean():
            return True
        return _above_floor(worst.tiles) > _WEAK * _above_floor(best.tiles)

    @property
    def bracketed(self) -> bool:
        """Whether three looks at different z stand on the peak, and not on its foot alone.

        One high look among low ones says that a peak is near, but not on which side.
        """
        scores = self.scores
        foot = scores.min() + _FOOT * (scores.max() - scores.min())
        return len(np.unique(self.z[scores >= foot])) >= _ON_PEAK

    def next_in_lattice(self, spacing_um: float) -> float | None:
        """Where a look is missing until none of the limits is far from one; None if none is.

        Parameters
        ----------
        spacing_um : float
            Looks may be so far apart, and half of it from a limit.
        """
        low, high = self.request.z_min_um, self.request.z_max_um
        z = np.unique(self.z)
        # A limit is a mirror: as far behind it stands the same look again.
        mirrored = np.concatenate([[2 * low - z[0]], z, [2 * high - z[-1]]])
        widest, middle = 0.0, None
        for a, b in pairwise(mirrored):
            missing = math.ceil((b - a) / spacing_um - 1e-3) - 1
            if missing < 1 or b - a <= widest:
                continue
            at_limit = a < low or b > high
            if at_limit and missing % 2:
                missing += 1  # an odd number would waste one on the limit itself
            places = np.linspace(a, b, missing + 2)[1:-1]
            places = places[(places >= low) & (places <= high)]
            widest, middle = b - a, float(places[(len(places) - 1) // 2])
        return middle

    def why_flat(self) -> str:
        """One clause that says what a flat curve most likely is."""
        first, *others = self.looks
        moved = len({look.z_um for look in self.looks}) > 1
        image = self._last
        if image is not None:
            # Where the camera's maximum is not known, that of the type is a guess: good
            # enough to see saturation by, but 12 bits in 16 always look dark.
            known, guess = self._ceiling, None
            if image.dtype.kind == "u":
                guess = float(np.iinfo(image.dtype).max)
            ceiling = guess if known is None else known
            if ceiling is not None:
                saturated = float(np.mean(image >= ceiling))
                if saturated > _SATURATED:
                    return f"saturated image: {saturated:.0%} of its pixels are at the maximum"
            top = float(image.max())
            if known is not None and top <= max(_DARK * known, _DARK_LEVELS):
                return (
                    f"dark image, at most {top:g} of {known:g}: is the shutter open and the "
                    "lamp on?"
                )
            if float(image.max()) == float(image.min()):
                return f"empty image: every pixel has the value {float(image.max()):g}"
        if moved and others and all(np.array_equal(first.tiles, o.tiles) for o in others):
            return "identical frames at different z (is live mode on, or the stage stuck?)"
        return "flat curve: no contrast beyond the noise at any z"

    def failed(self, reason: str, **details: Any) -> FocusResult:
        """The result that says that nothing was found."""
        return FocusResult(
            z_um=None,
            status="failed",
            score=self.best.score if self.looks else None,
            reason=reason,
            details=details,
        )

    def answer(
        self,
        z_um: float,
        *,
        expected_error_um: float | None,
        score: float | None = None,
        doubt: str = "",
        sides: bool = False,
        **details: Any,
    ) -> Looking:
        """End a search at `z_um`, if the looks bear it.

        A curve that is flat within its noise has failed; a weak contrast is repeated with
        two more looks first.

        Parameters
        ----------
        z_um : float
            Where the search would end, in µm.
        expected_error_um, score
            See `FocusResult`.
        doubt : str
            Clause that makes the result ``low-confidence``.
        sides : bool
            Doubt it, too, if nothing lower was seen on one side of the best look.
        **details
            For `FocusResult.details`.
        """
        if self.flat:
            return self.failed(self.why_flat())
        # before the repeats: they add no side
        doubt = doubt or (self._one_sided() if sides else "")
        if self.weak and not self._confirmed and self.left < 2:
            doubt = doubt or "weak contrast, and no looks left to repeat it"
        elif reason := (yield from self.confirm()):
            return self.failed(reason, **details)
        return FocusResult(
            z_um=float(min(max(z_um, self.request.z_min_um), self.request.z_max_um)),
            status="low-confidence" if doubt else "ok",
            expected_error_um=expected_error_um,
            score=self.best.score if score is None else score,
            reason=doubt,
            details=details,
        )

    def confirm(self) -> Generator[float, Look, str]:
        """Repeat a weak contrast, once; a clause if it does not repeat, else empty.

        A lamp that flickers, drifts or bleaches moves the whole image, and then gives the
        same z another score.
        """
        if self._confirmed or not self.weak or self.left < 2:
            return ""
        self._confirmed = True
        best, worst = self.best, self.worst
        again_best = self.add((yield best.z_um))
        again_worst = self.add((yield worst.z_um))
        low, high = worst.score, max(best.score, again_best.score)
        # On a flank the best look moves with the stage. A lamp would move the worst, too.
        most = _REPEATS * (best.score - low)
        most_of_best = _REPEATS_ON_FLANK * (high - low) if self.request.z_sd_um > 0 else most
        if (
            abs(again_worst.score - low) > most
            or abs(again_best.score - best.score) > most_of_best
        ):
            return (
                "the score changes by itself between looks at the same z "
                "(does the lamp flicker, drift or bleach?)"
            )
        # these two were not chosen for being the highest and the lowest
        if self._compare(again_best, again_worst) < SIGNIFICANT / 2:
            return self.why_flat()
        return ""

    def _one_sided(self) -> str:
        """A clause if nothing lower was seen on one side of the best look; else empty."""
        best = self.best
        below = [look for look in self.looks if look.z_um < best.z_um]
        above = [look for look in self.looks if look.z_um > best.z_um]
        for side, name, edge in (
            (below, "below", self.request.z_min_um),
            (above, "above", self.request.z_max_um),
        ):
            if not any(look.score < best.score for look in side):
                return (
                    f"the best look, at {best.z_um:.6g} µm, has none {name} it: the peak may "
                    f"lie beyond the limit of the search, {edge:.6g} µm"
                )
        return ""


def vertex(looks: ScoredLooks) -> float:
    """Top (z in µm) of the parabola through the best look and its two neighbours."""
    z, first = np.unique(looks.z, return_index=True)
    scores = looks.scores[first]
    k = int(scores.argmax())
    if not 0 < k < len(z) - 1:
        return float(z[k])
    return parabola_top(z[k - 1 : k + 2], scores[k - 1 : k + 2])


def parabola_top(z: Floats, q: Floats) -> float:
    """Top (z) of the parabola through three points of which the middle one is highest."""
    left, right = (q[1] - q[0]) / (z[1] - z[0]), (q[2] - q[1]) / (z[2] - z[1])
    bend = (right - left) / (z[2] - z[0])
    if not bend < 0:
        return float(z[1])
    top = 0.5 * (z[0] + z[1]) - left / (2 * bend)
    return float(min(max(top, z[0]), z[2]))


def _above_floor(tiles: Floats) -> float:
    """By how much the tiles exceed the emptiest of them, on average."""
    return float(tiles.mean() - np.quantile(tiles, _FLOOR))


def _scale(a: ScoredLook, b: ScoredLook) -> float:
    """Score per mean tile score: some measures of a whole are no mean of their parts."""
    tiles = float(a.tiles.mean() + b.tiles.mean())
    return abs((a.score + b.score) / tiles) if tiles else 1.0
