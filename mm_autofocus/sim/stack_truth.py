"""The truth about z-stacks that are collected on the virtual slide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import InputError
from mm_autofocus.sim.truth import measured_focus_um, microscope_of

if TYPE_CHECKING:
    from mm_autofocus.sim.microscope import Exposure, Microscope

__all__ = ["VirtualTruth", "truth_of"]


class VirtualTruth:
    """Tells a collection what the virtual microscope knows (a `training.collect.StackTruth`).

    Parameters
    ----------
    scope : Microscope
        The microscope.
    """

    def __init__(self, scope: Microscope) -> None:
        self._scope = scope

    def frame(self) -> Exposure:
        """What was true of the frame that was taken last."""
        return self._scope.exposures[-1]

    def defocus_um(self, frames: Sequence[Exposure]) -> list[float] | None:
        """True defocus, by the focus measure on noiseless images, of each frame of a stack.

        None on a blank field, and where the frames cannot be told apart (a sequence that
        the camera took by itself).
        """
        if len({e.frame for e in frames}) < len(frames):
            return None
        scope = self._scope
        focus = measured_focus_um(scope, view=frames[0].view)
        if focus is None:
            return None
        here = scope.objectives[scope.objective].parfocal_um
        return [e.z_um + here - e.parfocal_um - focus for e in frames]


def truth_of(core: Any) -> VirtualTruth | None:
    """The truth about the virtual microscope that `core` has loaded; None on a real one."""
    try:
        return VirtualTruth(microscope_of(core))
    except InputError:
        return None
