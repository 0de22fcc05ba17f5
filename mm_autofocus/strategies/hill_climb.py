"""Hill climbing on a model of the focus curve: the default, and the fewest looks.

After each look the possible focus curves are narrowed down (see `_curve`), and the next
look is taken where it is expected to teach most about where the peak is: at first in long
strides, then across the peak, then near its top. It stops when the sharpness that it
expects to lose at its best z is small, or the expected error is within the tolerance; where
the tolerance is not the operator's but a third of the depth of field, after up to three looks
more.

The expected error is that of a frame taken at the answer: what the looks leave open, and
where the stage comes to rest about the z that it reports (`FocusRequest.z_sd_um`). Once the
looks know far better than the stage can go, more of them are of no use.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Final

import numpy as np

from mm_autofocus.measure import FocusMeasure
from mm_autofocus.settings import AutofocusSettings
from mm_autofocus.strategies._curve import CurvePosterior, Estimate
from mm_autofocus.strategies._looks import ScoredLooks
from mm_autofocus.types import FocusRequest, FocusResult, Look, Looking

__all__ = ["HillClimb"]

# Without a tolerance: sharpness that may be lost, in parts of the peak.
_LOSS = 0.016
# With one, a peak so flat that nothing is lost within it need not be known more closely.
_NO_LOSS = 0.003

# The answer must have a look near it (in half-widths) that is about as sharp as the best:
# a model can put its peak into the dip between two.
_NEAR = 0.2
_AS_SHARP = 0.97

# Sharpness that a peak beyond the limits may be expected to have over the answer; less,
# where it is more likely beyond them than within.
_BEYOND = 0.04
_LIKELY_BEYOND = 0.02

_FEWEST = 3
_CANDIDATES = 33

# A contrast that is still weak after so many looks is repeated before it is followed.
_CONFIRM_AFTER = 5

# The first stride, in parts of the span of the limits; a known curve needs no longer one
# than reaches its foot.
_STRIDE = 0.4
_KNOWN_STRIDE = 1.6

# Half-width of the focus curve of a thin specimen, in depths of field; a thick one's is
# larger, so the spread of its logarithm is not small.
_DOF_WIDTH = 1.6
_DOF_SPREAD = 0.7
_DOF_STRIDE = 6.0  # the first stride, where nothing else is known

# Without a tolerance of the operator's, a third of the depth of field may be called sure.
# Then so many more looks are taken at most, until the error is this part of it: of the tiles
# that it calls sure, 98 of 100 and not 95 are to lie within half the depth of field.
_VERIFYING = 3
_AIM = 0.4
# Looks that know the z to this part of what the stage does are enough, too: without any error
# of their own, the frame's would be a seventh less.
_BESIDE_STAGE = 0.6

# Looks that an even lattice over the limits takes until they are flat for certain.
_LATTICE = 7


class HillClimb:
    """Climb the focus curve with a model of its shape.

    Parameters
    ----------
    settings : AutofocusSettings, optional
        Focus measure and range; defaults if left out.

    Notes
    -----
    It remembers the width of the last focus curve and expects the next to be similar.
    """

    name: Final = "hill-climb"

    def __init__(self, settings: AutofocusSettings | None = None) -> None:
        self._settings = settings or AutofocusSettings()
        self.measure = FocusMeasure.from_settings(self._settings)
        self.known_width_um: float | None = None

    def focus(self, request: FocusRequest) -> Looking:
        """Begin the search that `request` describes."""
        return _Climb(self, request).run()

    def expected_width(self, request: FocusRequest) -> tuple[float, float]:
        """Half-width of the curve to be expected, in µm, and the spread of its logarithm."""
        if self.known_width_um is not None:
            return self.known_width_um, 0.5
        # An operator who chooses the range knows the curve a little.
        width = max(request.z_max_um - request.z_min_um, 1e-6) / 6
        dof = request.optics.dof_um
        if dof is not None:
            return min(width, _DOF_WIDTH * dof), _DOF_SPREAD
        return width, 1.0

    def learn_width(self, width_um: float) -> None:
        """Remember the width of a curve that was surely found."""
        self.known_width_um = width_um


class _Climb:
    """One search."""

    def __init__(self, owner: HillClimb, request: FocusRequest) -> None:
        self.owner = owner
        self.request = request
        self.looks = ScoredLooks(owner.measure, request)
        self.low, self.high = request.z_min_um, request.z_max_um
        self.sure_since = request.max_looks
        self.grain = 0.0  # how far the stage stood from where it was sent
        width, spread = owner.expected_width(request)
        self.posterior = CurvePosterior(
            self.low, self.high, width, spread, prior=request.prior, z_sd_um=request.z_sd_um
        )

    def run(self) -> Looking:
        request, looks = self.request, self.looks
        if not self.high > self.low:
            return (yield from self._no_room())
        first = request.z_start_um if request.prior is None else request.prior.z_um
        yield from self._look(first)
        while looks.left > 0:
            if len(looks) == 1:
                z = self._stride()
            elif looks.flat:
                missing = looks.next_in_lattice(self._resolved_um())
                if missing is None:
                    return looks.failed(looks.why_flat())
                z = missing
            else:
                if len(looks) >= _CONFIRM_AFTER and (reason := (yield from looks.confirm())):
                    return looks.failed(reason)
                estimate = self._learn()
                following = self._next(estimate)
                if following is None or looks.left < 1:
                    return (yield from self._finish(estimate))
                z = following
            yield from self._look(z)
        if looks.flat:
            return looks.failed(looks.why_flat())
        return (yield from self._finish(self._learn()))

    def _look(self, z_um: float) -> Generator[float, Look, None]:
        z_um = min(max(z_um, self.low), self.high)
        look = yield z_um
        self.looks.add(look)
        self.grain = max(self.grain, abs(look.z_um - z_um))

    def _learn(self) -> Estimate:
        looks = self.looks
        return self.posterior.update(looks.z, np.maximum(looks.scores, 0.0), looks.noise())

    def _no_room(self) -> Looking:
        yield from self._look(self.low)
        return self.looks.failed("the limits leave no room for a search")

    # -- where to look next ------------------------------------------------------------

    def _stride(self) -> float:
        """The second look, of which the first says nothing: towards the wider side."""
        here = self.looks.best.z_um
        step = self.request.step_um
        if step is None:
            step = _STRIDE * (self.high - self.low)
            if (dof := self.request.optics.dof_um) is not None:
                # not so short that the looks at a blank field fit no even lattice
                step = min(step, max(_DOF_STRIDE * dof, 2 * (self.high - self.low) / _LATTICE))
            if (known := self.owner.known_width_um) is not None:
                step = min(step, _KNOWN_STRIDE * known)
        up = self.high - here >= here - self.low
        return here + step if up else here - step

    def _next(self, estimate: Estimate) -> float | None:
        """Where to look next (µm); None if no look is needed, or none would teach anything."""
        if len(self.looks) >= _FEWEST and self._enough(estimate):
            if self._supported(estimate) or self._seen(estimate.z_um, estimate):
                return None
            return estimate.z_um
        return self._most_worth(estimate)

    def _sure(self, estimate: Estimate) -> bool:
        """Whether the looks tell the z as closely as is asked for, or as the stage can go."""
        if not self.looks.bracketed:
            return False
        tolerance, shaky = self.request.effective_tolerance_um, self.request.z_sd_um
        if tolerance is None:
            return estimate.loss <= _LOSS or estimate.sd_um <= shaky
        # what the tolerance leaves to the search: the rest is the stage's
        own = math.sqrt(max(tolerance**2 - shaky**2, 0.0))
        return estimate.sd_um <= max(own, shaky) or estimate.loss <= _NO_LOSS

    def _enough(self, estimate: Estimate) -> bool:
        """Whether it is sure, and another look would hardly make it surer."""
        if not self._sure(estimate):
            return False
        request, tolerance = self.request, self.request.effective_tolerance_um
        if request.tolerance_um is not None or tolerance is None:
            return True
        self.sure_since = min(self.sure_since, len(self.looks))
        return (
            len(self.looks) >= self.sure_since + _VERIFYING
            or self._error_um(estimate) <= _AIM * tolerance
            or estimate.sd_um <= _BESIDE_STAGE * request.z_sd_um
            or estimate.loss <= _NO_LOSS
        )

    def _error_um(self, estimate: Estimate) -> float:
        """Of a frame taken at the estimate: the stage comes to rest somewhere about it."""
        return math.hypot(estimate.sd_um, self.request.z_sd_um)

    def _too_coarse(self, estimate: Estimate) -> bool:
        """Whether the stage itself is what exceeds the tolerance."""
        tolerance = self.request.effective_tolerance_um
        # where it comes to rest beside a narrow peak, sharpness is lost that no look saves
        beside = (self.request.z_sd_um / estimate.width_um) ** 2
        return (
            tolerance is not None
            and self._error_um(estimate) > tolerance
            and estimate.loss + beside > _NO_LOSS
        )

    def _supported(self, estimate: Estimate) -> bool:
        best = self.looks.best.score
        # a stage of coarse steps cannot come nearer
        shaky = 2 * self.request.z_sd_um
        near = max(_NEAR * estimate.width_um, shaky, self._apart_um(estimate))
        as_sharp = _AS_SHARP - min((shaky / estimate.width_um) ** 2, 0.2)
        return any(
            look.score >= as_sharp * best and abs(look.z_um - estimate.z_um) <= near
            for look in self.looks.looks
        )

    def _seen(self, z_um: float, estimate: Estimate) -> bool:
        """Whether a look at `z_um` would show nothing that was not seen."""
        return bool(np.min(np.abs(self.looks.z - z_um)) <= self._apart_um(estimate))

    def _apart_um(self, estimate: Estimate) -> float:
        return max(0.1 * estimate.width_um, 1.2 * self.grain, 1e-3)

    def _most_worth(self, estimate: Estimate) -> float | None:
        near = 2 * estimate.sd_um
        candidates = np.concatenate(
            [
                np.linspace(self.low, self.high, _CANDIDATES),
                np.clip(
                    np.linspace(estimate.z_um - near, estimate.z_um + near, _CANDIDATES // 2),
                    self.low,
                    self.high,
                ),
            ]
        )
        distance = np.abs(candidates[:, None] - self.looks.z[None, :]).min(1)
        candidates = candidates[distance > self._apart_um(estimate)]
        if not candidates.size:
            return None
        worth = self.posterior.worth(candidates)
        return float(candidates[int(np.argmax(worth))])

    def _resolved_um(self) -> float:
        """Gap between flat looks in which no peak is expected to hide."""
        gap = (self.high - self.low) / _LATTICE
        dof = self.request.optics.dof_um
        if dof is not None:
            gap = min(gap, max(6 * dof, (self.high - self.low) / 16))
        return gap * 1.01

    # -- the answer --------------------------------------------------------------------

    def _finish(self, estimate: Estimate) -> Looking:
        looks = self.looks
        # One peak lies between the neighbours of the best look, whatever the model thinks.
        low, high = looks.neighbours
        z = min(max(estimate.z_um, low), high)
        error, score = self._error_um(estimate), estimate.score
        doubt = ""
        if not self._supported(estimate):
            z, score = looks.best.z_um, looks.best.score
            error = math.hypot(error, z - estimate.z_um)
            doubt = "the focus curve has not one peak; this is the best look"
        elif estimate.beyond > (_LIKELY_BEYOND if estimate.outside > 0.5 else _BEYOND):
            edge = self.low if z - self.low < self.high - z else self.high
            doubt = f"the peak may lie beyond the limit of the search, {edge:.6g} µm"
        elif not self._sure(estimate):
            if looks.left <= 0:
                doubt = f"the budget of {self.request.max_looks} looks ran out"
            else:
                doubt = "further looks would not bring it within the tolerance"
        elif self._too_coarse(estimate):
            doubt = (
                f"the stage's repeatability of {self.request.z_sd_um:g} µm leaves no room for "
                f"the tolerance of {self.request.effective_tolerance_um:.3g} µm"
            )
        result: FocusResult = yield from looks.answer(
            z,
            expected_error_um=error,
            score=score,
            doubt=doubt,
            width_um=round(estimate.width_um, 4),
            expected_loss=round(estimate.loss, 5),
        )
        if result.status == "ok":
            self.owner.learn_width(estimate.width_um)
        return result
