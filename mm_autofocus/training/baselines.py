"""What a learned focus has to beat: a search, and a plain median over the grid."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.models.patches import CELL_PX
from mm_autofocus.replay import replay
from mm_autofocus.settings import parse_settings
from mm_autofocus.training.judges import ModelJudge
from mm_autofocus.training.merit import Row

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.runtime import FocusModel
    from mm_autofocus.training.judges import Planes

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["HillClimb", "grid_median"]

_UNEVEN = 0.1  # of the distance of the planes


def grid_median(model: FocusModel) -> ModelJudge:
    """A model that looks at every patch of the grid, blank ones too, and takes the median.

    This is what the learned baselines of the SparseFocus paper do, but for the median: it is
    what patches agree on at run time (`consensus.agreed`), where sure ones weigh more. Of
    models of other kinds (a plug-in's), all patches that it looks at itself when it is asked
    for all.
    """
    plain = copy.copy(model)

    def all_alike(mosaic: npt.NDArray[np.float32], max_value: float) -> tuple[Any, float]:
        rows, columns = mosaic.shape[1] // CELL_PX, mosaic.shape[2] // CELL_PX
        return np.ones((rows, columns), np.float32), 0.5

    if hasattr(plain, "_worth"):
        # on this copy alone: importance is what the baseline does without
        plain.__dict__["_worth"] = all_alike
    return ModelJudge(plain, every_patch=True)


@dataclass
class HillClimb:
    """The classic search, replayed from some planes of each stack.

    Attributes
    ----------
    starts : int
        From how many planes of a stack, evenly spread over those it is asked about.
    settings : dict
        Settings beside strategy, range and optics.
    skipped : int
        Stacks whose planes are not evenly spaced, on which it cannot be replayed.
    """

    starts: int = 4
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0

    def __call__(
        self, number: int, stack: Planes, true_um: Floats, use: Sequence[int]
    ) -> list[Row]:
        """Search; a search without result is a row without prediction."""
        z = np.asarray(stack.z_um, np.float64)
        order = np.argsort(z, kind="stable")
        steps = np.diff(z[order])
        step = float(np.median(steps)) if len(steps) > 1 else 0.0
        if step <= 0 or np.ptp(steps) > _UNEVEN * step or not len(use):
            self.skipped += 1
            return []
        planes = stack.load()[order]
        by_z = sorted(use, key=lambda k: z[k])
        chosen = np.unique(
            np.linspace(0, len(by_z) - 1, min(self.starts, len(by_z))).round().astype(int)
        )
        rows = []
        for k in (by_z[i] for i in chosen.tolist()):
            start = float(np.flatnonzero(order == k)[0]) * step
            result = replay(
                planes, step_um=step, start_um=start, settings=self._settings(stack, z)
            )
            moved = None if result.z_um is None or not result.found else result.z_um - start
            reasons = () if result.status == "ok" else (f"{result.status}: {result.reason}",)
            rows.append(
                Row(
                    number,
                    stack.group,
                    stack.sparsity,
                    k,
                    float(true_um[k]),
                    None if moved is None else -moved,
                    result.expected_error_um,
                    reasons,
                    result.looks,
                )
            )
        return rows

    def _settings(self, stack: Planes, z: Floats) -> Any:
        optics = stack.known_optics()
        given: dict[str, Any] = {"strategy": "hill-climb", "range_um": float(np.ptp(z))}
        if optics.na is not None:
            given["na"] = optics.na
        if optics.magnification is not None:
            given["magnification"] = optics.magnification
        return parse_settings({**given, **self.settings}, where="hill-climb")
