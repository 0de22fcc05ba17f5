"""How a focus stage repeats and how much play it has, seen through the camera.

The encoder of a stage says where the motor is, not where the specimen is; backlash is what
lies between them. So one field is swept through focus upwards and downwards in turn, and each
look is asked where in the sweep it really belongs: the images of all sweeps, pixel by pixel
smooth functions of z, are fitted, and the shift along z that explains a look best is its
displacement. The mean difference between the two directions is the backlash, their scatter
the repeatability. Stops with two exposures tell what of the scatter is the camera's.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np
from scipy.stats import chi2
from scipy.stats import t as student

from mm_autofocus.measure import FocusMeasure
from mm_autofocus.types import CurvePoint, FocusRequest, FocusResult, Look, Looking, Strategy

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]
    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["Estimate", "StagePlay", "StageSweeps", "Stop", "play_of"]

_STOPS = 9  # of a sweep
_SWEEPS = 6  # in each direction
_REGION = 160  # edge of the part of a look that is kept, in pixels
_DEGREE = 6  # of the polynomials in z
_MOST_ROUNDS = 40
_HALF = 0.45  # of a sweep, in widths of the focus curve
_SCOUTS = (0.5, 1.0, 2.0, 3.0, 4.5, 6.5, 10.0, 15.0, 22.0)
_TWICE = 3  # every so manieth stop is exposed twice


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % confidence interval, in µm."""

    um: float
    low_um: float
    high_um: float

    def to_json(self) -> dict[str, float]:
        """Rounded to a nanometre."""
        return {
            "um": round(self.um, 3),
            "low_um": round(self.low_um, 3),
            "high_um": round(self.high_um, 3),
        }


@dataclass(frozen=True, slots=True)
class StagePlay:
    """What the sweeps say.

    Attributes
    ----------
    backlash : Estimate
        How much further the stage has to travel after it turned; positive where a reading
        reached downwards stands for a higher stage than the same one reached upwards.
    repeatability : Estimate
        Standard deviation of where the stage really stands when it reports a z.
    camera_um : float
        Standard deviation of the displacement of two looks without a move between them,
        which has been taken off.
    stops, sweeps : int
        How many.
    approach_um : float
        From how far each sweep came: backlash beyond this cannot be seen.
    """

    backlash: Estimate
    repeatability: Estimate
    camera_um: float
    stops: int
    sweeps: int
    approach_um: float

    @property
    def has_backlash(self) -> bool:
        """Whether it surely has any."""
        return self.backlash.low_um > 0 or self.backlash.high_um < 0

    def to_json(self) -> dict[str, Any]:
        """As ``mm-autofocus calibrate --json`` prints it."""
        return {
            "backlash_um": self.backlash.um,
            "backlash": self.backlash.to_json(),
            "repeatability_um": self.repeatability.um,
            "repeatability": self.repeatability.to_json(),
            "camera_um": self.camera_um,
            "stops": self.stops,
            "sweeps": self.sweeps,
            "approach_um": self.approach_um,
        }


@dataclass(frozen=True, slots=True)
class Stop:
    """One look of a sweep.

    Attributes
    ----------
    z_um : float
        As the stage reported it.
    sweep : int
        Number of the sweep; the even ones go up.
    image : numpy.ndarray
        ``(Y, X)`` float32, of mean 1.
    again : bool
        Whether it is a second exposure without a move before it.
    """

    z_um: float
    sweep: int
    image: Real
    again: bool = False


@dataclass(slots=True)
class StageSweeps:
    """Finds focus, sweeps through it up and down, and goes back where it began.

    A strategy as any other, so that the one loop that moves z keeps its limits and its
    promise to come back. It returns no focus: the stops are in `stops`.

    Parameters
    ----------
    finder : Strategy
        Finds focus first.
    measure : FocusMeasure
        Makes grey images, and finds the part with most detail.
    half_um : float | None
        A sweep reaches so far below and above focus; None: by the width of the focus curve
        that the finder saw.
    approach_um : float
        Each begins so much further out.
    start_um : float, optional
        Where focus is expected; default: where the stage stands.
    range_um : float, optional
        The finder looks so far about it; the sweeps may go further, within the limits of
        the request.
    """

    finder: Strategy
    measure: FocusMeasure
    half_um: float | None
    approach_um: float
    start_um: float | None = None
    range_um: float = 20.0
    stops: list[Stop] = field(default_factory=list)
    _corner: tuple[int, int] | None = None

    name: str = "stage-sweeps"

    @property
    def looks(self) -> int:
        """Looks that it takes after the focus is found."""
        twice = -(-_STOPS // _TWICE)
        return 2 * _SWEEPS * (_STOPS + twice + 1) + 2 + len(_SCOUTS)

    @property
    def complete(self) -> bool:
        """Whether all sweeps were made."""
        return bool(self.stops) and self.stops[-1].sweep == 2 * _SWEEPS - 1

    def focus(self, request: FocusRequest) -> Looking:
        """Begin; the request's budget is that of the finder plus `looks`."""
        self.stops.clear()
        at = request.z_start_um if self.start_um is None else self.start_um
        search = replace(
            request,
            z_start_um=at,
            z_min_um=max(request.z_min_um, at - self.range_um),
            z_max_um=min(request.z_max_um, at + self.range_um),
            max_looks=max(request.max_looks - self.looks, 3),
        )
        found, curve = yield from _watched(self.finder.focus(search))
        if found.z_um is None:
            return FocusResult(None, "failed", reason=found.reason)
        focus = found.z_um
        half = self.half_um
        if half is None:
            half = _HALF * (yield from self._width(focus, curve, request.z_max_um))
        reach = half + self.approach_um
        low, high = request.z_min_um, request.z_max_um
        if focus - reach < low or focus + reach > high:
            return FocusResult(
                None,
                "failed",
                reason=f"the sweeps reach {reach:.3g} µm about {focus:.4g} µm, which is not "
                f"within the limits {low:g} … {high:g} µm",
            )
        sharp = yield focus
        self._corner = _most_detail(self.measure.grey(sharp.image))
        grid = focus + np.linspace(-half, half, _STOPS)
        for sweep in range(2 * _SWEEPS):
            up = sweep % 2 == 0
            # beyond the end and back: the play is taken up before the first stop
            yield float(focus - reach if up else focus + reach)
            for k, z in enumerate(grid if up else grid[::-1]):
                self._keep((yield float(z)), sweep)
                if k % _TWICE == 0:
                    self._keep((yield float(z)), sweep, again=True)
        return FocusResult(None, "failed", reason="measured")

    def _width(
        self, focus: float, curve: Sequence[CurvePoint], high: float
    ) -> Generator[float, Look, float]:
        """Full width at half height of the focus curve, by a few looks above focus."""
        top = self.measure((yield focus).image)
        base = min((s for _, s in curve if s is not None), default=0.0)
        half, inner, score = (top + base) / 2, 0.0, top
        for outer in _SCOUTS:
            if focus + outer > high:
                break
            before, score = score, self.measure((yield focus + outer).image)
            if score < half:
                return 2 * (inner + (outer - inner) * (before - half) / (before - score))
            inner = outer
        return 2 * inner

    def _keep(self, look: Look, sweep: int, *, again: bool = False) -> None:
        assert self._corner is not None
        y, x = self._corner
        grey = self.measure.grey(look.image)[y : y + _REGION, x : x + _REGION]
        image = grey.astype(np.float32)
        self.stops.append(Stop(look.z_um, sweep, image / max(float(image.mean()), 1e-6), again))


def _watched(search: Looking) -> Generator[float, Look, tuple[FocusResult, list[CurvePoint]]]:
    """Carry out a search and remember its curve."""
    curve: list[CurvePoint] = []
    try:
        z_um = next(search)
        while True:
            look = yield z_um
            try:
                z_um = search.send(look)
            finally:
                curve.append((look.z_um, look.score))
    except StopIteration as stop:
        return stop.value, curve


def _most_detail(grey: npt.NDArray[Any]) -> tuple[int, int]:
    """Corner of the region with the largest variance of detail."""
    size = [min(n, _REGION) for n in grey.shape]
    a = grey.astype(np.float32)
    fine = (a - cv2.GaussianBlur(a, (0, 0), 2.0)) ** 2
    # mean over windows of the region's size, by the integral image
    total = cv2.integral(fine)
    sums = (
        total[size[0] :, size[1] :]
        - total[: -size[0], size[1] :]
        - total[size[0] :, : -size[1]]
        + total[: -size[0], : -size[1]]
    )
    y, x = np.unravel_index(int(np.argmax(sums)), sums.shape)
    return int(y), int(x)


def play_of(stops: Sequence[Stop], approach_um: float) -> StagePlay:
    """Estimate backlash and repeatability from the stops of sweeps in both directions.

    Parameters
    ----------
    stops : sequence of Stop
        From `StageSweeps`.
    approach_um : float
        As there.
    """
    sweep = np.array([s.sweep for s in stops])
    again = np.array([s.again for s in stops])
    down = sweep % 2 == 1
    z = np.array([s.z_um for s in stops])
    u = _displacements(z, np.stack([s.image.ravel() for s in stops]), down)

    # two exposures of one stop: what is between them is the camera's
    second = np.flatnonzero(again)
    between = u[second] - u[second - 1]
    camera = float(np.sqrt(np.mean(between**2) / 2)) if second.size else 0.0
    u = u.copy()
    u[second - 1] = (u[second] + u[second - 1]) / 2
    single = np.ones(len(u))
    single[second - 1] = 0.5
    u, z, sweep, down, single = (a[~again] for a in (u, z, sweep, down, single))

    # sweep by sweep, as the stops of one may share an error; time is the sweeps' order
    names = np.unique(sweep)
    mean = np.array([u[sweep == k].mean() for k in names])
    design = np.stack([np.ones(len(names)), names % 2, names - names.mean()], axis=1)
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ mean
    rest = mean - design @ coefficients
    dof = len(names) - 3
    error = math.sqrt(float(rest @ rest) / dof * inverse[1, 1])
    backlash = float(coefficients[1])
    wide = float(student.ppf(0.975, dof)) * error

    # single stops about the drift and the mean of their kind, at one z from one side: what
    # the polynomials cannot follow is the same there in each sweep
    left = u - coefficients[2] * (sweep - names.mean())
    _, place = np.unique(2000 * np.round(z, 2) + down, return_inverse=True)
    left -= (np.bincount(place, left) / np.bincount(place))[place]
    free = len(u) - int(place.max()) - 2
    variance = float(left @ left) / free
    noise = camera**2 * float(single.mean())
    spread = math.sqrt(max(variance - noise, 0.0))
    low, high = (
        math.sqrt(max(variance * free / float(chi2.ppf(p, free)) - noise, 0.0))
        for p in (0.975, 0.025)
    )
    return StagePlay(
        Estimate(backlash, backlash - wide, backlash + wide),
        Estimate(spread, low, high),
        camera,
        len(u),
        len(names),
        approach_um,
    )


def _displacements(z: Floats, images: Real, down: npt.NDArray[np.bool_]) -> Floats:
    """How much higher each look was taken than reported, ``(N,)``, in µm.

    In turn: a polynomial in the true z for each pixel, by least squares; and for each look
    the shift along it that explains the look best (Gauss and Newton). The mean shift of the
    looks upwards is 0 by definition.
    """
    middle, scale = float(z.mean()), max(float(np.ptp(z)) / 2, 1e-9)
    x = (z - middle) / scale
    powers = np.arange(_DEGREE + 1)
    u = np.zeros(len(z))
    u[down] = _start(x, images, down)
    for _ in range(_MOST_ROUNDS):
        at = x + u
        basis = at[:, None] ** powers
        along = powers * at[:, None] ** np.maximum(powers - 1, 0)
        fitted = np.linalg.pinv(basis).astype(np.float32) @ images
        slope = along.astype(np.float32) @ fitted
        off = images - basis.astype(np.float32) @ fitted
        step = np.einsum("np,np->n", off, slope) / np.maximum(
            np.einsum("np,np->n", slope, slope), 1e-30
        )
        u = u + np.clip(step.astype(np.float64), -0.25, 0.25)
        # The polynomials would as well follow a stretched z; but the stage's is right.
        design = np.stack([x, down, ~down], axis=1).astype(np.float64)
        stretch, _, start = np.linalg.lstsq(design, u, rcond=None)[0]
        u = (x + u - start) / (1 + stretch) - x
        if float(np.abs(step).max()) < 1e-4:
            break
    return u * scale


def _start(x: Floats, images: Real, down: npt.NDArray[np.bool_]) -> float:
    """Shift between the directions by their focus curves, to begin with."""
    score = images.var(axis=1).astype(np.float64)
    tops = []
    for way in (~down, down):
        weight = np.maximum(score[way] - np.quantile(score[way], 0.5), 0)
        tops.append(float((x[way] * weight).sum() / max(weight.sum(), 1e-30)))
    return tops[0] - tops[1]
