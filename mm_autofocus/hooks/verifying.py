"""The frame that is saved anyway is the proof of a focus, and may correct it.

The model that focused looks at the first frame of the tile, which costs no light. If the frame
is off by more than the tolerance, z is corrected and the frame exposed again; the better one
is kept, and later frames of the tile, and the surface for later tiles, follow it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.drive import THERE_UM
from mm_autofocus.strategies._asking import too_unsure
from mm_autofocus.strategies.learned import Learned, error_of_frame
from mm_autofocus.types import FocusRequest, Verdict, Verifies

if TYPE_CHECKING:
    import useq

    from mm_autofocus.hooks.ledger import Ledger, Place
    from mm_autofocus.hooks.rig import CoreRig

__all__ = ["Pending", "Verification", "Watching", "why_not"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pending:
    """A focus whose first frame is still to come.

    Attributes
    ----------
    request : FocusRequest
        Of the search.
    record : dict
        Of the search.
    channel : str | None
        Preset in which the looks were taken, if it is known.
    judge : Verifies
        Who judges the frame: who focused, or who watches.
    """

    request: FocusRequest
    record: dict[str, Any]
    channel: str | None
    judge: Verifies

    def leave(self, ledger: Ledger, place: Place, why: str) -> None:
        """Write down why the frame is not judged."""
        details = {**self.record["details"], "verification": {"why_not": why}}
        ledger.revise(place, verified=None, details=details)


def why_not(pending: Pending, rig: CoreRig, event: useq.MDAEvent, *, sequenced: bool) -> str:
    """Why this first frame cannot be judged by what judged the looks; ``""`` if it can."""
    if sequenced:
        return "the frames are hardware-sequenced: several are on their way at once"
    channel = event.channel.config if event.channel else None
    if None not in (pending.channel, channel) and pending.channel != channel:
        looks = pending.channel
        return f"the first frame is in channel {channel!r}, the looks were in {looks!r}"
    if rig.settings.binning is not None and rig.binning_ratio() != 1:
        return "the looks were binned otherwise than the frames"
    return ""


@dataclass(slots=True)
class _Taken:
    payloads: list[Any]
    target_um: float
    verdict: Verdict

    @property
    def misses_um(self) -> float:
        """How far off it is; infinite where that is not to be trusted."""
        v = self.verdict
        return np.inf if v.defocus_um is None or v.reason else abs(v.defocus_um)


@dataclass(slots=True)
class Verification:
    """The frames taken at one focus until one is good, and which is the best.

    Parameters
    ----------
    pending : Pending
        The focus.
    place : Place
        Where.
    ledger, rig : Ledger, CoreRig
        The books, and what moves.
    target_um : float
        Where the first frame is taken, in µm.
    """

    pending: Pending
    place: Place
    ledger: Ledger
    rig: CoreRig
    target_um: float
    taken: list[_Taken] = field(default_factory=list)
    _focus_um: float = field(init=False)

    def __post_init__(self) -> None:
        self._focus_um = self.ledger.focus_um(self.place)

    @property
    def offset_um(self) -> float:
        """Where the plan wants the frame, relative to focus, in µm."""
        return self.target_um - self._focus_um

    def add(self, payloads: list[Any], target_um: float) -> bool:
        """Judge a frame that was taken at `target_um`; False if it cannot be judged."""
        image = np.asarray(payloads[0][0])
        look = self.rig.as_look(image, self.rig.position_um())
        try:
            verdict = self.pending.judge.verify(look, self.pending.request, self.offset_um)
        except Exception as e:  # it must not cost the frame
            logger.warning("%s: its frame could not be judged", self.place.name, exc_info=True)
            verdict = Verdict(None, reason=f"the frame could not be judged: {e}")
        if verdict is None:
            return False
        # some cameras lend out the memory that the next frame is written to
        kept = [(np.array(p[0]), *p[1:]) for p in payloads] if verdict.off else payloads
        self.taken.append(_Taken(kept, target_um, verdict))
        return True

    def next_um(self) -> float | None:
        """Where to take the frame again, in µm; None if the last is good, or nothing helps."""
        last = self.taken[-1]
        most = self.ledger.settings.max_corrections
        if not last.verdict.off or len(self.taken) > most:
            return None
        assert last.verdict.defocus_um is not None
        request, offset = self.pending.request, self.offset_um
        focus = last.target_um - offset - last.verdict.defocus_um
        target = min(max(focus, request.z_min_um), request.z_max_um) + offset
        return target if abs(target - last.target_um) > THERE_UM else None

    def conclude(self) -> list[Any]:
        """Keep the better frame, and write down what it teaches; return its payloads."""
        k = min(range(len(self.taken)), key=lambda i: self.taken[i].misses_um)
        best, record = self.taken[k], self.pending.record
        shift = best.target_um - self.taken[0].target_um
        verdict = best.verdict
        before = {key: record[key] for key in ("status", "reason", "expected_error_um")}
        before["z_after_um"] = record["z_after_um"]
        changes: dict[str, Any] = {
            "verified": verdict.good,
            "corrections": len(self.taken) - 1,
            "details": {
                **record["details"],
                "verification": {
                    "frames": [_told(t) for t in self.taken],
                    "kept": k,
                    "before": before,
                },
            },
        }
        if verdict.defocus_um is not None and not verdict.reason:
            changes |= self._status(k)
        self.ledger.revise(self.place, shift_um=shift, **changes)
        return best.payloads

    def _status(self, k: int) -> dict[str, Any]:
        """Status and expected error of the focus, now that its frame was seen."""
        verdict = self.taken[k].verdict
        assert verdict.defocus_um is not None
        expected: float | None = self.pending.record["expected_error_um"]
        if k > 0:  # it was sent there by the verdict on the frame before
            expected = self.taken[k - 1].verdict.expected_error_um
            if expected is not None:
                expected = float(np.hypot(expected, self.pending.request.z_sd_um))
        error = error_of_frame(expected, verdict.defocus_um, verdict.expected_error_um)
        tolerance = verdict.tolerance_um
        if not verdict.good:
            reason = f"by its frame, the tile is {verdict.defocus_um:+.2g} µm out of focus"
        elif error is None:
            return {}
        elif tolerance is not None and error > tolerance:
            reason = too_unsure(error, tolerance)
        else:
            reason = ""
        status = "low-confidence" if reason else "ok"
        return {"status": status, "reason": reason, "expected_error_um": error}


class Watching(Verification):
    """A shadow of the hardware's autofocus: it looks at the frame, and that is all."""

    def next_um(self) -> float | None:
        """Nothing is taken again for the sake of a shadow."""
        return None

    def conclude(self) -> list[Any]:
        """Write down by how much it disagrees."""
        (taken,), judge = self.taken, self.pending.judge
        assert isinstance(judge, Learned)
        verdict, record = taken.verdict, self.pending.record
        told: dict[str, Any] = {
            "strategy": judge.name,
            **judge.identity,
            "status": "low-confidence" if verdict.reason else "ok",
            "z_look_um": taken.target_um,
            "z_um": None,
            "expected_error_um": verdict.expected_error_um,
            "reason": verdict.reason,
        }
        if verdict.defocus_um is None:
            told["status"] = "failed"
        else:
            told["z_um"] = self._focus_um - verdict.defocus_um
            told |= {"disagreement_um": -verdict.defocus_um, "same_way": None}
        details = {**record["details"], "shadow": told}
        self.ledger.revise(self.place, details=details)
        return taken.payloads


def _told(taken: _Taken) -> dict[str, Any]:
    return {
        "z_um": taken.target_um,
        "defocus_um": taken.verdict.defocus_um,
        "expected_error_um": taken.verdict.expected_error_um,
        "reason": taken.verdict.reason,
    }
