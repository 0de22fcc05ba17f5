"""The only loop that moves Z to focus.

It stands between a strategy, which only thinks, and a rig, which only does: an engine's
core, a recorded stack, a virtual microscope. Limits, look budget, cancel and pause,
backlash, counting, and the way back after a fault are kept here and nowhere else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from mm_autofocus.errors import LimitError
from mm_autofocus.types import FocusRequest, FocusResult, Look, Strategy

__all__ = ["THERE_UM", "LookBudgetError", "Rig", "drive", "way_to"]

logger = logging.getLogger(__name__)

# Stages report rounded positions: a request this close to a limit is on it.
_EPSILON_UM = 1e-6
# Smaller moves may be lost in the rounding of a stage.
_PLAIN_MOVE_UM = 1.0
# Nearer than this the stage is there: less than any stage repeats.
THERE_UM = 0.005


class LookBudgetError(LimitError):
    """A strategy asked for more looks than it was given."""


class Rig(Protocol):
    """What `drive` needs of a microscope. All z in µm."""

    def position_um(self) -> float:
        """Where the focus stage stands."""
        ...

    def move_to(self, z_um: float) -> None:
        """Send the focus stage to `z_um` and wait until it has settled."""
        ...

    def look(self) -> Look:
        """Take one exposure where the stage stands."""
        ...

    def looking(self) -> AbstractContextManager[object]:
        """Prepare camera, channel and shutter for the looks; restore them on exit."""
        ...


@dataclass(slots=True)
class _Stage:
    """Counts the moves and keeps them within the limits and on the right side."""

    rig: Rig
    request: FocusRequest
    backlash_um: float
    moves: int = 0
    stayed: int = 0
    """Moves in a row after which the stage stood where it had stood before."""

    def follow(self, asked_um: float, stands_um: float, stood_um: float) -> str:
        """Say what is wrong if the stage does not follow, else return ""."""
        asked, moved = abs(asked_um - stood_um), abs(stands_um - stood_um)
        if asked < _PLAIN_MOVE_UM:
            return ""
        self.stayed = self.stayed + 1 if moved < 0.01 * asked else 0
        if self.stayed < 2:
            return ""
        return (
            f"the focus stage does not follow: it was sent to {asked_um:g} µm and stands at "
            f"{stands_um:g} µm (if that is the end of its travel, set z_min_um or z_max_um)"
        )

    def go(self, z_um: float, *, there_um: float = THERE_UM) -> float:
        """Go to `z_um`, unless within `there_um` of it; return where the stage stood, in µm."""
        low, high = self.request.z_min_um, self.request.z_max_um
        # written so that NaN is refused as well
        if not low - _EPSILON_UM <= z_um <= high + _EPSILON_UM:
            raise LimitError(
                f"z {z_um:g} µm is outside the limits {low:g} … {high:g} µm; "
                "the stage was not moved there"
            )
        stood_um = self.rig.position_um()
        z_um = min(max(z_um, low), high)
        limits = (low, high)
        for stop_um in way_to(z_um, stood_um, self.backlash_um, limits, there_um=there_um):
            self.rig.move_to(stop_um)
            self.moves += 1
        return stood_um

    def back(self) -> None:
        """Return to the start of the search, exactly: it is promised."""
        self.go(self.request.z_start_um, there_um=0.0)


def way_to(
    z_um: float,
    here_um: float,
    backlash_um: float,
    limits_um: tuple[float, float],
    *,
    there_um: float = THERE_UM,
) -> list[float]:
    """The moves that bring a stage to `z_um` from the side that is set, in µm.

    None at all where it stands there already: a stage sent a few nanometres back loses
    its backlash for it. Two where the way is in the wrong direction, as the gears are
    taken up only by travelling towards +z (`backlash_um` > 0) or -z: past it, and back.

    Parameters
    ----------
    z_um, here_um : float
        Where to, and where the stage stands.
    backlash_um : float
        From how far away to come, towards +z if positive. 0: from either side.
    limits_um : (float, float)
        Not to be left on the way.
    there_um : float, optional
        Nearer than this, or just there, no move is made.
    """
    if abs(z_um - here_um) <= there_um:
        return []
    past = min(max(z_um - backlash_um, limits_um[0]), limits_um[1])
    if (z_um - here_um) * backlash_um < 0 and past != z_um:
        return [past, z_um]
    return [z_um]


def drive(
    strategy: Strategy,
    request: FocusRequest,
    rig: Rig,
    *,
    backlash_um: float = 0.0,
    checkpoint: Callable[[], None] | None = None,
    on_look: Callable[[Look], None] | None = None,
) -> FocusResult:
    """Run one strategy on one rig, and leave the stage at focus or back at the start.

    Parameters
    ----------
    strategy : Strategy
        Who searches.
    request : FocusRequest
        Start, limits, look budget, optics and prior.
    rig : Rig
        What moves and exposes.
    backlash_um : float, optional
        Every z is approached travelling towards +z if positive, towards -z if negative,
        coming from at least so far away (within the limits). 0: from either side.
    checkpoint : callable, optional
        Called before each look; it may wait (pause), and raises `CancelledError` to stop.
    on_look : callable, optional
        Called with each look after the strategy has scored it.

    Returns
    -------
    FocusResult
        The strategy's result with looks, moves, start and curve filled in. If focus was
        found the stage stands there; if not, it stands at ``request.z_start_um``.

    Raises
    ------
    LimitError
        The strategy asked for a z outside the limits, or for a look beyond the budget.
    CancelledError
        From `checkpoint`.
    HardwareError
        From the rig. After any exception the stage has been sent back to the start
        (if it still moves), and the camera and the shutter have been restored.
    """
    stage = _Stage(rig, request, backlash_um)
    looks: list[Look] = []
    curve: list[tuple[float, float | None]] = []

    def report() -> None:
        look = looks.pop()
        curve.append((look.z_um, look.score))
        if on_look is not None:
            on_look(look)

    search = strategy.focus(request)
    result: FocusResult
    try:
        with rig.looking():
            try:
                z_um = next(search)
                while True:
                    if checkpoint is not None:
                        checkpoint()
                    if len(curve) >= request.max_looks:
                        raise LookBudgetError(
                            f"{strategy.name} asked for look {len(curve) + 1} of at most "
                            f"{request.max_looks}"
                        )
                    stood_um = stage.go(z_um)
                    looks.append(rig.look())
                    wrong = stage.follow(z_um, looks[-1].z_um, stood_um)
                    try:
                        z_um = search.send(looks[-1])
                    finally:
                        report()
                    if wrong:
                        result = FocusResult(None, "failed", reason=wrong)
                        break
            except StopIteration as stop:
                result = stop.value
        if result.found:
            assert result.z_um is not None
            stage.go(result.z_um)
        else:
            stage.back()
    except BaseException:
        _retreat(stage)
        raise
    finally:
        search.close()
    return replace(
        result,
        strategy=result.strategy or strategy.name,
        z_start_um=request.z_start_um,
        looks=len(curve),
        moves=stage.moves,
        curve=tuple(curve),
    )


def _retreat(stage: _Stage) -> None:
    """Go back to the start after a fault, without hiding the fault."""
    try:
        stage.back()
    except Exception:  # whatever broke first is what the caller must see
        z_um = stage.request.z_start_um
        logger.exception("after the fault the stage could not be sent back to %g µm", z_um)
