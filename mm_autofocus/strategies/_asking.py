"""One search of a learned strategy: looks in one approach, an answer, and when to ask again.

A model is shown the looks of its card and says the defocus of the present z. It is asked
again nearer to focus only where the first answer cannot be relied on and a nearer look can be
expected to know more: beyond the range that it was trained on, or not within the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mm_autofocus.types import FocusRequest, FocusResult, Look, Looking

if TYPE_CHECKING:
    from mm_autofocus.strategies.learned import Learned

__all__ = ["Answer", "Asking", "too_unsure"]

# Looks are repeated where the last answer points to so often at most.
_AGAIN = 2
# From nearer than this, in tolerances, a further look would show the same again.
_SAME_VIEW = 2.0
# Looks may stand off their offsets by this part of the span of the looks.
_SPACING = 0.1


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model said of one set of looks.

    Attributes
    ----------
    base_um : float
        z of which the defocus was asked, in µm.
    z_um : float | None
        Where focus is by it, in µm; None if it could not tell.
    expected_error_um : float | None
        Standard deviation of that, as the model expects it.
    reasons : tuple of str
        Why not to trust it.
    clipped : bool
        The prediction was beyond the range of the training; `z_um` is at its end.
    foreign : bool
        The looks are unlike those of the training; more of them would be, too.
    details : dict
        For the record, JSON values only.
    """

    base_um: float
    z_um: float | None
    expected_error_um: float | None
    reasons: tuple[str, ...]
    clipped: bool
    foreign: bool
    details: dict[str, Any]


class Asking:
    """One search of a learned strategy."""

    def __init__(self, owner: Learned, request: FocusRequest, *, downwards: bool) -> None:
        self.owner, self.request = owner, request
        self.tolerance_um = owner.tolerance_um(request)
        offsets = owner.card.looks_um
        self.order = sorted(range(len(offsets)), key=offsets.__getitem__, reverse=downwards)
        self.offsets = offsets
        self.left = request.max_looks

    def run(self) -> Looking:
        base = self._within(self.request.z_start_um)
        if base is None:
            low, high = self.request.z_min_um, self.request.z_max_um
            return self._failed(
                f"the limits {low:.6g} … {high:.6g} µm leave no room for looks at "
                f"{', '.join(f'{o:+g}' for o in self.offsets)} µm",
                [],
            )
        if self.left < len(self.offsets):
            return self._failed(
                f"max_looks: {self.left} are fewer than the model's {len(self.offsets)} looks",
                [],
            )
        answers = [(yield from self._look(base))]
        while (base := self._again(answers)) is not None:
            answers.append((yield from self._look(base)))
        return self._finish(answers)

    def _within(self, z_um: float) -> float | None:
        """The z nearest to `z_um` from which all looks are within the limits; None: no room."""
        low = self.request.z_min_um - min(self.offsets)
        high = self.request.z_max_um - max(self.offsets)
        return None if low > high else min(max(z_um, low), high)

    def _look(self, base_um: float) -> Generator[float, Look, Answer]:
        """Take the looks, from one end to the other, and ask the model."""
        looks: dict[int, Look] = {}
        for k in self.order:
            looks[k] = yield base_um + self.offsets[k]
            self.left -= 1
        stood = [looks[k].z_um - offset for k, offset in enumerate(self.offsets)]
        base_um = sum(stood) / len(stood)  # where the stage really went
        answer = self.owner.ask([looks[k] for k in range(len(looks))], base_um, self.request)
        if len(stood) == 1:
            return answer
        span = max(self.offsets) - min(self.offsets)
        apart = max(looks[k].z_um for k in looks) - min(looks[k].z_um for k in looks)
        off = max(abs(z - base_um) for z in stood)
        if off <= max(_SPACING * span, 2 * self.request.z_sd_um):
            return answer
        why = f"the looks are {apart:.3g} µm apart, the model is used to {span:.3g} µm"
        return replace(answer, reasons=(*answer.reasons, why), foreign=True)

    def _again(self, answers: Sequence[Answer]) -> float | None:
        """From where to look again, in µm; None if that would be of no use."""
        last = answers[-1]
        if last.z_um is None or last.foreign or len(answers) > _AGAIN:
            return None
        if self.left < len(self.offsets) or not self._unsure(last):
            return None
        base = self._within(last.z_um)
        assert base is not None
        near = _SAME_VIEW * (self.tolerance_um or 0.0)
        near = max(near, 2 * self.request.z_sd_um, last.expected_error_um or 0.0)
        return base if abs(base - last.base_um) > near else None

    def _unsure(self, answer: Answer) -> bool:
        error, tolerance = self._error_um(answer), self.tolerance_um
        return bool(answer.reasons) or (
            tolerance is not None and error is not None and error > tolerance
        )

    def _error_um(self, answer: Answer) -> float | None:
        """Expected error of a frame at the answer: the model's and the stage's."""
        error = answer.expected_error_um
        return None if error is None else math.hypot(error, self.request.z_sd_um)

    def _finish(self, answers: Sequence[Answer]) -> FocusResult:
        last = answers[-1]
        if last.z_um is None:
            where = "" if len(answers) == 1 else f"at {last.base_um:.6g} µm: "
            return self._failed(where + "; ".join(last.reasons), answers)
        doubts = list(last.reasons)
        low, high = self.request.z_min_um, self.request.z_max_um
        z_um, error = min(max(last.z_um, low), high), self._error_um(last)
        if z_um != last.z_um:
            doubts.append(
                f"focus is expected at {last.z_um:.6g} µm, beyond the limit of the search, "
                f"{z_um:.6g} µm"
            )
            error = None if error is None else math.hypot(error, last.z_um - z_um)
        elif error is None:
            doubts.append("the model does not tell its error")
        elif not doubts and self._unsure(last):
            doubts.append(too_unsure(error, self.tolerance_um or 0.0))
        return FocusResult(
            z_um,
            "low-confidence" if doubts else "ok",
            expected_error_um=error,
            reason="; ".join(dict.fromkeys(doubts)),
            strategy=self.owner.name,
            details=self._details(answers),
        )

    def _failed(self, reason: str, answers: Sequence[Answer]) -> FocusResult:
        return FocusResult(
            None,
            "failed",
            reason=reason,
            strategy=self.owner.name,
            details=self._details(answers),
        )

    def _details(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {**self.owner.identity, "predictions": [a.details for a in answers]}


def too_unsure(error_um: float, tolerance_um: float) -> str:
    """Say that an expected error is larger than the tolerance; both in µm."""
    return (
        f"the expected error of {error_um:.3f} µm is larger than the tolerance of "
        f"{tolerance_um:.3f} µm"
    )
