"""A coarse sweep over the whole range, then a fine one around its best look."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from mm_autofocus.measure import FocusMeasure
from mm_autofocus.settings import AutofocusSettings
from mm_autofocus.strategies._looks import ScoredLooks, vertex
from mm_autofocus.types import FocusRequest, Looking

__all__ = ["Sweep"]

_COARSE = 11
_FINE = 6


class Sweep:
    """Sweep upwards through the range, then finely around the best look.

    Nothing is assumed of the focus curve but that the coarse steps do not miss its peak,
    and the stage travels towards +z throughout each sweep. ``step_um`` is the coarse
    step; without it there are eleven coarse looks, or as many as leave six for the fine
    sweep within the budget.

    Parameters
    ----------
    settings : AutofocusSettings, optional
        Focus measure; defaults if left out.
    """

    name: Final = "sweep"

    def __init__(self, settings: AutofocusSettings | None = None) -> None:
        self._measure = FocusMeasure.from_settings(settings or AutofocusSettings())

    def focus(self, request: FocusRequest) -> Looking:
        """Begin the search that `request` describes."""
        looks = ScoredLooks(self._measure, request)
        low, high = request.z_min_um, request.z_max_um
        budget = request.max_looks
        most = max(budget - _FINE, min(budget, 3))
        if request.step_um is None:
            count = min(_COARSE, most)
        else:
            # a step too small for the budget is made larger: the range is swept whole
            count = min(math.floor((high - low) / request.step_um + 1e-9) + 1, most)
        offset = 0.0
        if request.step_um is not None and count < most:
            offset = ((high - low) - (count - 1) * request.step_um) / 2
        coarse = np.linspace(low + offset, high - offset, count)
        for z in coarse:
            looks.add((yield float(z)))
        if looks.flat:
            return looks.failed(looks.why_flat())

        step = float(coarse[1] - coarse[0]) if count > 1 else high - low
        best = looks.best.z_um
        fine = np.linspace(best - step, best + step, min(_FINE, looks.left) + 3)[1:-1]
        fine = fine[np.argsort(np.abs(fine - best))][1:]  # the best itself is known
        fine = np.sort(fine[(fine >= low) & (fine <= high)])[: looks.left]
        for z in fine:
            looks.add((yield float(z)))
        spacing = 2 * step / (len(fine) + 2) if len(fine) else step
        z_um, doubt = vertex(looks), ""
        if request.tolerance_um is not None and spacing / 2 > request.tolerance_um:
            doubt = f"the fine step of {spacing:.3g} µm is coarser than the tolerance"
        return (
            yield from looks.answer(
                z_um, expected_error_um=spacing / 2, doubt=doubt, sides=True
            )
        )
