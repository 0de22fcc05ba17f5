"""What the classic searches share: the scored looks, their noise, and what is no peak.

A search that knows the scores alone takes the highest of a blank field for its focus.
Here each look keeps the scores of its tiles, so that a rise from one look to another can
be compared with the noise of both, measured from them (see `metrics.compare_tiles`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.metrics import FocusMeasure, compare_tiles, noise_of_tiles
from mm_autofocus.types import FocusRequest, FocusResult, Look

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

    Floats = npt.NDArray[np.float64]

__all__ = ["SIGNIFICANT", "ScoredLook", "ScoredLooks"]

SIGNIFICANT = 6.0
"""The best look must exceed the worst by so many standard deviations of their noise.

The range of 20 looks that differ by noise alone is about 2.6 ± 0.5 in this unit."""

# A change of the lamp between two looks moves all tiles together, and no statistics over
# tiles can see it. Above this ratio of worst to best score it could explain the contrast.
_WEAK = 0.7

_DARK = 0.02
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
    _last: Image | None = None
    _ceiling: float | None = None

    def __len__(self) -> int:
        return len(self.looks)

    def add(self, look: Look) -> ScoredLook:
        """Score `look`, write the score into it, and keep it."""
        grey = self.measure.grey(look.image)
        look.score = self.measure.score(grey)
        scored = ScoredLook(look.z_um, look.score, self.measure.tile_scores(grey))
        self.looks.append(scored)
        self._last, self._ceiling = grey, look.max_value
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
    def worst(self) -> ScoredLook:
        """The look with the lowest score."""
        return min(self.looks, key=lambda look: look.score)

    @property
    def z(self) -> Floats:
        """z of the looks in µm, in the order taken."""
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
            noise_of_tiles(b.tiles - a.tiles) / np.sqrt(2.0) * _scale(a, b)
            for a, b in zip(ordered[:-1], ordered[1:], strict=True)
        ]
        return float(min(found, default=0.0))

    def significance(self) -> float:
        """By how many standard deviations of noise the best look exceeds the worst."""
        if len(self.looks) < 2:
            return 0.0
        return abs(compare_tiles(self.best.tiles, self.worst.tiles))

    @property
    def flat(self) -> bool:
        """Whether the looks differ by no more than their noise explains."""
        return self.best.score == self.worst.score or self.significance() < SIGNIFICANT

    @property
    def weak(self) -> bool:
        """Whether the contrast is so small that a flickering lamp could have made it."""
        best, worst = self.best.score, self.worst.score
        return best > 0 and worst > _WEAK * best

    def widest_gap(self) -> tuple[float, float]:
        """Middle and width (µm) of the widest part of the limits without a look.

        A part that ends at a limit counts twice: no look stands on its other side.
        """
        low, high = self.request.z_min_um, self.request.z_max_um
        z = np.unique(self.z)
        gaps = [((a + b) / 2, b - a) for a, b in zip(z[:-1], z[1:], strict=True)]
        gaps += [(low, 2 * (z[0] - low)), (high, 2 * (high - z[-1]))]
        return max(gaps, key=lambda gap: gap[1])

    def why_flat(self) -> str:
        """One clause that says what a flat curve most likely is."""
        first, *others = self.looks
        moved = len({look.z_um for look in self.looks}) > 1
        image = self._last
        if image is not None:
            ceiling = self._ceiling
            if ceiling is None and image.dtype.kind == "u":
                ceiling = float(np.iinfo(image.dtype).max)
            if ceiling:
                # `>=`: a grey value made of three colours is rounded
                saturated = float(np.mean(image >= ceiling * (1 - 1e-6)))
                if saturated > _SATURATED:
                    return f"saturated image: {saturated:.0%} of its pixels are at the maximum"
                if float(image.max()) <= _DARK * ceiling:
                    return "dark image: is the shutter open and the lamp on?"
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

    def found(
        self,
        z_um: float,
        *,
        expected_error_um: float | None,
        score: float | None = None,
        doubt: str = "",
        **details: Any,
    ) -> FocusResult:
        """The result for `z_um`: ``ok``, or ``low-confidence`` if there is a `doubt`."""
        low, high = self.request.z_min_um, self.request.z_max_um
        return FocusResult(
            z_um=float(min(max(z_um, low), high)),
            status="low-confidence" if doubt else "ok",
            expected_error_um=expected_error_um,
            score=self.best.score if score is None else score,
            reason=doubt,
            details=details,
        )

    def one_sided(self) -> str:
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


def _scale(a: ScoredLook, b: ScoredLook) -> float:
    """Score per mean tile score: some measures of a whole are no mean of their parts."""
    tiles = float(a.tiles.mean() + b.tiles.mean())
    return abs((a.score + b.score) / tiles) if tiles else 1.0
