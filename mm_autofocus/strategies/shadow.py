"""A learned strategy that watches another one: it predicts, and moves nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm_autofocus.strategies._asking import Answer
from mm_autofocus.strategies.learned import Learned
from mm_autofocus.types import (
    FocusRequest,
    FocusResult,
    FrameFormat,
    Look,
    Looking,
    Prepares,
    Strategy,
    Verdict,
    Verifies,
)

__all__ = ["Shadow"]

# Two looks belong to each other if their distance is off by this part of the model's.
_SPACING = 0.1


class Shadow:
    """Run a strategy, and let a model say what it would have done with the same looks.

    No look is added and nothing is moved. A model of one look is shown the first look, as
    it would have been had it been in charge; a model of several looks the first of them
    that stand at its offsets, if there are any.

    Parameters
    ----------
    inner : Strategy
        Who is in charge.
    watcher : Learned
        Who watches.

    Notes
    -----
    ``details["shadow"]`` of the result: ``strategy``, ``model``, ``model_sha256``; ``z_um``
    where focus is by the model, ``z_look_um`` where it looked, its ``expected_error_um`` and
    ``status``; ``disagreement_um``, by how much it would have gone higher; ``same_way``,
    whether both went the same way, None where the way is within the tolerance; ``reason``.
    """

    def __init__(self, inner: Strategy, watcher: Learned) -> None:
        self.inner = inner
        self.watcher = watcher
        self.name = inner.name

    def prepare(self, frames: FrameFormat) -> None:
        """Prepare both."""
        if isinstance(self.inner, Prepares):
            self.inner.prepare(frames)
        self.watcher.prepare(frames)

    def verify(self, frame: Look, request: FocusRequest, offset_um: float) -> Verdict | None:
        """Let the strategy in charge judge a frame."""
        if not isinstance(self.inner, Verifies):
            return None
        return self.inner.verify(frame, request, offset_um)

    def focus(self, request: FocusRequest) -> Looking:
        """Begin the search that `request` describes."""
        seen: list[Look] = []
        wanted = 1 if not self.watcher.several else request.max_looks
        search = self.inner.focus(request)
        try:
            z_um = next(search)
            while True:
                look = yield z_um
                if len(seen) < wanted:
                    # the strategy in charge writes its score into its own
                    seen.append(replace(look))
                z_um = search.send(look)
        except StopIteration as stop:
            result: FocusResult = stop.value
        finally:
            search.close()
        shadow = self._compare(seen, request, result)
        return replace(result, details={**result.details, "shadow": shadow})

    def _compare(
        self, seen: Sequence[Look], request: FocusRequest, result: FocusResult
    ) -> dict[str, Any]:
        watcher = self.watcher
        told: dict[str, Any] = {"strategy": watcher.name, **watcher.identity}
        looks = _at_offsets(seen, watcher.card.looks_um)
        if looks is None:
            offsets = ", ".join(f"{o:+g}" for o in watcher.card.looks_um)
            return told | {
                "status": "no looks",
                "reason": f"none of the looks stand at {offsets} µm",
            }
        base = sum(z.z_um - o for z, o in zip(looks, watcher.card.looks_um, strict=True))
        answer = watcher.ask(looks, base / len(looks), request)
        told |= {
            "z_look_um": answer.base_um,
            "z_um": answer.z_um,
            "expected_error_um": answer.expected_error_um,
            "status": self._status(answer, request),
            "reason": "; ".join(answer.reasons),
            "prediction": answer.details,
        }
        if answer.z_um is None or not result.found or result.z_um is None:
            return told
        theirs, ours = result.z_um - answer.base_um, answer.z_um - answer.base_um
        tolerance = watcher.tolerance_um(request) or 0.0
        return told | {
            "disagreement_um": answer.z_um - result.z_um,
            "same_way": None if abs(theirs) <= tolerance else theirs * ours > 0,
        }

    def _status(self, answer: Answer, request: FocusRequest) -> str:
        if answer.z_um is None:
            return "failed"
        error, tolerance = answer.expected_error_um, self.watcher.tolerance_um(request)
        if answer.reasons or answer.clipped or error is None:
            return "low-confidence"
        if tolerance is not None and math.hypot(error, request.z_sd_um) > tolerance:
            return "low-confidence"
        return "ok"


def _at_offsets(seen: Sequence[Look], offsets: Sequence[float]) -> list[Look] | None:
    """The first looks that stand at `offsets` from one z; None if there are none."""
    if len(offsets) == 1:
        return list(seen[:1]) or None
    slack = _SPACING * (max(offsets) - min(offsets))
    for first in seen:
        base = first.z_um - offsets[0]
        found = [
            min(seen, key=lambda look, z=base + o: abs(look.z_um - z))  # type: ignore[misc]
            for o in offsets
        ]
        off = (abs(look.z_um - base - o) for look, o in zip(found, offsets, strict=True))
        if max(off) <= slack:
            return found
    return None
