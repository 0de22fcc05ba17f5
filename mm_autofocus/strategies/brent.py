"""Bounded Brent search, as Micro-Manager's OughtaFocus does it."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Final

from mm_autofocus.measure import FocusMeasure
from mm_autofocus.settings import AutofocusSettings
from mm_autofocus.strategies._looks import ScoredLooks
from mm_autofocus.types import FocusRequest, Looking

__all__ = ["Brent", "bounded_brent"]

_TOLERANCE_UM = 1.0
"""OughtaFocus' default."""


class Brent:
    """Golden section and parabolas within the limits, without a look at the start.

    ``tolerance_um`` is where it stops, 1 µm by default.

    Parameters
    ----------
    settings : AutofocusSettings, optional
        Focus measure; defaults if left out.

    Notes
    -----
    It expects one peak within the limits and no noise. It is here for comparison, and for
    those who are used to it; ``hill-climb`` needs fewer looks.
    """

    name: Final = "brent"

    def __init__(self, settings: AutofocusSettings | None = None) -> None:
        self._measure = FocusMeasure.from_settings(settings or AutofocusSettings())

    def focus(self, request: FocusRequest) -> Looking:
        """Begin the search that `request` describes."""
        looks = ScoredLooks(self._measure, request)
        tolerance = request.tolerance_um or _TOLERANCE_UM
        search = bounded_brent(request.z_min_um, request.z_max_um, tolerance)
        z_um, doubt = next(search), ""
        while True:
            scored = looks.add((yield min(max(z_um, request.z_min_um), request.z_max_um)))
            try:
                z_um = search.send(-scored.score)
            except StopIteration as stop:
                best_um = float(stop.value)
                break
            if looks.left < 1:
                best_um = looks.best.z_um
                doubt = f"the budget of {request.max_looks} looks ran out"
                break
        return (
            yield from looks.answer(
                best_um, expected_error_um=tolerance, doubt=doubt, sides=True
            )
        )


def bounded_brent(low: float, high: float, tolerance: float) -> Generator[float, float, float]:  # noqa: PLR0912
    """Minimise a function within bounds; yields points, is sent values, returns the best.

    The points are those of ``scipy.optimize.minimize_scalar(method="bounded")`` with
    ``xatol=tolerance``, which calls the function and so cannot wait for a microscope.

    Source: R. P. Brent, *Algorithms for Minimization without Derivatives* (1973), ch. 5;
    G. E. Forsythe et al., *Computer Methods for Mathematical Computations* (1977), fmin.
    """
    golden = 0.5 * (3.0 - math.sqrt(5.0))
    eps = math.sqrt(2.2e-16)
    a, b = low, high
    # x: best point, w: second best, v: the one before
    x = w = v = a + golden * (b - a)
    fx = fw = fv = yield x
    step = before = 0.0
    while True:
        middle = 0.5 * (a + b)
        tol = eps * abs(x) + tolerance / 3.0
        if abs(x - middle) <= 2 * tol - 0.5 * (b - a):
            return x
        parabola = False
        if abs(before) > tol:
            r = (x - w) * (fx - fv)
            q = (x - v) * (fx - fw)
            p = (x - v) * q - (x - w) * r
            q = 2.0 * (q - r)
            if q > 0:
                p = -p
            q = abs(q)
            r, before = before, step
            if abs(p) < abs(0.5 * q * r) and q * (a - x) < p < q * (b - x):
                parabola = True
                step = p / q
                u = x + step
                if u - a < 2 * tol or b - u < 2 * tol:
                    step = math.copysign(tol, middle - x)
        if not parabola:
            before = (a if x >= middle else b) - x
            step = golden * before
        u = x + math.copysign(max(abs(step), tol), step)
        fu = yield u
        if fu <= fx:
            if u >= x:
                a = x
            else:
                b = x
            v, fv, w, fw, x, fx = w, fw, x, fx, u, fu
        else:
            if u < x:
                a = u
            else:
                b = u
            if fu <= fw or w == x:
                v, fv, w, fw = w, fw, u, fu
            elif fu <= fv or v in (x, w):
                v, fv = u, fu
