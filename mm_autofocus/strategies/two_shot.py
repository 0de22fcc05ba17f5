"""Two shots around one focus, for a whole region: by the name ``two-shot``.

Focus F is found at the first tile by another strategy. Every other tile is not focused at
all: it is exposed at F - ΔD and at F + ΔD, and both are data. There is nothing to search
here, so that the class only carries the name and the settings; who holds the core orders
the exposures (see `hooks.shots`).

Source: Q. Li et al., *Rapid Whole Slide Imaging via Learning-based Two-shot Virtual
Autofocusing* (2020).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import Field, field_validator, model_validator

from mm_autofocus.errors import InputError
from mm_autofocus.registry import STRATEGIES
from mm_autofocus.settings import AutofocusSettings

if TYPE_CHECKING:
    from typing import Self

    from mm_autofocus.types import FocusRequest, Looking

__all__ = ["DELTA_UM", "TwoShot", "TwoShotSettings", "default_delta_um"]

DELTA_UM = (0.5, 3.0)
"""Least and largest ΔD, in µm."""


class TwoShotSettings(AutofocusSettings):
    """Settings of ``two-shot``: those of all strategies, and these.

    What is said of a search (range, looks, escalation, policy, ...) is meant for the search
    for F. ``prior: surface`` lets F follow the surface through all that were found, instead
    of being that of the tile where it was found last.

    Attributes
    ----------
    find : str
        Strategy that finds F: a ``sweep`` is the full stack of the paper; a learned one
        takes its `model`.
    delta_um : float | None
        ΔD: half the distance of the two shots, 0.5 … 3 µm. None: that of the plan's z_plan;
        where it has none, `default_delta_um` of the depth of field and `flatness_um`. A plan
        without a z_plan is given the two planes.
    flatness_um : float
        Standard deviation of focus from tile to tile that is expected of the slide (where F
        follows the surface: of what the surface leaves). ``mm-autofocus calibrate`` tells it.
    region : {"position", "run"} | None
        For how many tiles one F stands: the grid of each position, or all. None: position
        where the plan has a grid, else run.
    refind_every : int | None
        Find F again at every n-th tile.
    refind_below : float
        Find F again at the next tile where the sharper shot's focus measure falls below this
        share of its running median. 0: never; such tiles are then ``stale``. Tiles that show
        nothing count for nothing, and where it was of no use it is tried ever more rarely.
    refind_above_um : float | None
        With ``prior: surface``: find F again where the surface is less sure than this
        (standard deviation). None: half of ΔD.
    """

    strategy: Annotated[str, Field(pattern="^two-shot$")] = "two-shot"
    find: str = "hill-climb"
    delta_um: Annotated[float, Field(ge=DELTA_UM[0], le=DELTA_UM[1])] | None = None
    flatness_um: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    region: Literal["position", "run"] | None = None
    refind_every: Annotated[int, Field(ge=1)] | None = None
    refind_below: Annotated[float, Field(ge=0, lt=1)] = 0.3
    refind_above_um: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def search(self) -> str:
        """Name of the strategy that searches."""
        return self.find

    @field_validator("find")
    @classmethod
    def _can_find(cls, value: str) -> str:
        if value == TwoShot.name:
            raise ValueError(
                "find: 'two-shot' finds nothing itself; name the strategy that finds F, for "
                "example hill-climb or sweep"
            )
        try:
            return STRATEGIES.check(value)
        except InputError as e:
            raise ValueError(str(e).replace("strategy:", "find:", 1)) from None

    @model_validator(mode="after")
    def _surface_is_asked(self) -> Self:
        if self.refind_above_um is not None and self.prior != "surface":
            raise ValueError(
                f"refind_above_um: {self.refind_above_um:g} is how unsure the focus surface "
                f"may be, and prior: {self.prior} asks none; set prior: surface"
            )
        return self


class TwoShot:
    """Marks a scan of two shots a tile; `TwoShotSettings.find` names who searches."""

    name: Final = "two-shot"
    Settings = TwoShotSettings

    def __init__(self, settings: AutofocusSettings | None = None) -> None:
        del settings

    def focus(self, request: FocusRequest) -> Looking:
        """Refuse: it is built nowhere, the strategy that finds F is."""
        raise InputError("strategy: 'two-shot' does not search; its find does")


def default_delta_um(dof_um: float, flatness_um: float) -> float:
    """ΔD that suits a depth of field and a slide, in µm: √((DoF/2)² + flatness²).

    The focus of a tile then lies between its two shots at two tiles of three, and on a slide
    that is flat they are half a depth of field off, nearer than which both would show the
    same. It is kept within `DELTA_UM`.

    Parameters
    ----------
    dof_um : float
        Depth of field.
    flatness_um : float
        Standard deviation of focus from tile to tile.

    Examples
    --------
    >>> round(default_delta_um(1.0, 1.0), 2)
    1.12
    >>> default_delta_um(0.3, 0.0), default_delta_um(1.0, 10.0)
    (0.5, 3.0)
    """
    low, high = DELTA_UM
    return min(max(math.hypot(dof_um / 2, flatness_um), low), high)
