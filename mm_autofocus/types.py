"""The vocabulary: what a strategy is asked, what it is shown, and what it answers.

This module knows no other module of the package (but :mod:`mm_autofocus.errors`), no
microscope and no file. Lengths are micrometres (``_um``), times milliseconds (``_ms``) or
seconds (``_s``). Defocus is ``z_image - z_focus``: positive means that the stage stood
above focus, and the correction is its negative.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Image: TypeAlias = npt.NDArray[np.generic]

__all__ = [
    "CurvePoint",
    "FocusRequest",
    "FocusResult",
    "FrameFormat",
    "Look",
    "Looking",
    "Optics",
    "Prepares",
    "Prior",
    "Status",
    "Strategy",
    "Verdict",
    "Verifies",
]

Status = Literal["ok", "low-confidence", "stale", "failed"]
"""How far a z can be trusted.

``ok``: found, and the expected error is within the tolerance.
``low-confidence``: found, but the expected error is larger, or the budget ran out.
``stale``: the z stands on an older focus of this position.
``failed``: no focus was found; the stage is back where it started.
"""


@dataclass(frozen=True, slots=True)
class Optics:
    """What is known of the microscope's optics; unknown values are None.

    Attributes
    ----------
    na : float | None
        Numerical aperture of the objective.
    magnification : float | None
        Magnification from the specimen to the camera.
    wavelength_um : float
        Wavelength in vacuum, in µm.
    refractive_index : float
        Index of the immersion medium.
    pixel_size_um : float | None
        Size of a (binned) pixel in the specimen, in µm.
    """

    na: float | None = None
    magnification: float | None = None
    wavelength_um: float = 0.55
    refractive_index: float = 1.0
    pixel_size_um: float | None = None

    def __post_init__(self) -> None:
        if self.na is not None and not 0 < self.na < self.refractive_index:
            raise InputError(
                f"na: {self.na} is not between 0 and the refractive index "
                f"{self.refractive_index} of the immersion medium"
            )

    @property
    def dof_um(self) -> float | None:
        """Depth of field in µm: λ·n/NA² + n·e/(M·NA); None if the NA is not known.

        ``e/M``, the camera pixel in the specimen, is the pixel size; where it is not
        known, the second term is left out.

        Source: S. Inoué, K. Spring, *Video Microscopy*, 2nd ed. (1997), § 2.5.

        Examples
        --------
        >>> round(Optics(na=0.75, pixel_size_um=0.0).dof_um, 2)
        0.98
        """
        if self.na is None:
            return None
        n, na = self.refractive_index, self.na
        return self.wavelength_um * n / na**2 + n * (self.pixel_size_um or 0.0) / na


@dataclass(frozen=True, slots=True)
class Prior:
    """Where focus is expected before the first look: a normal distribution in z.

    Attributes
    ----------
    z_um : float
        Mean, in µm of the focus stage.
    sd_um : float
        Standard deviation in µm, greater than 0.
    source : str
        Where it comes from: ``"last"``, ``"surface"``, ...
    """

    z_um: float
    sd_um: float
    source: str = "last"


@dataclass(frozen=True, slots=True)
class FocusRequest:
    """One task for a strategy: find focus near ``z_start_um``.

    Attributes
    ----------
    z_start_um : float
        Where the stage stands, in µm.
    z_min_um, z_max_um : float
        The strategy may look only within these; they are the narrowest of the absolute
        limits of the stage and of the search range around the start.
    max_looks : int
        The budget; a further look is refused.
    tolerance_um : float | None
        Expected error at which the search may stop. None: a third of the depth of field
        where the optics are known, else what the width of the focus curve teaches.
    step_um : float | None
        First step, where the strategy has one; None: the strategy chooses.
    optics : Optics
        What is known of the optics.
    prior : Prior | None
        Where focus is expected, if anything is known.
    z_sd_um : float
        Standard deviation of where the stage really stands about the z that it reports;
        0: where it says.
    """

    z_start_um: float
    z_min_um: float
    z_max_um: float
    max_looks: int = 20
    tolerance_um: float | None = None
    step_um: float | None = None
    optics: Optics = field(default_factory=Optics)
    prior: Prior | None = None
    z_sd_um: float = 0.0

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.z_start_um, self.z_min_um, self.z_max_um))):
            raise InputError("z_start_um, z_min_um and z_max_um must be finite numbers")
        if not self.z_min_um <= self.z_start_um <= self.z_max_um:
            raise InputError(
                f"z_start_um: {self.z_start_um:g} is outside the limits "
                f"{self.z_min_um:g} … {self.z_max_um:g} µm"
            )
        if self.max_looks < 1:
            raise InputError(f"max_looks: {self.max_looks} is not at least 1")
        if not (math.isfinite(self.z_sd_um) and self.z_sd_um >= 0):
            raise InputError(f"z_sd_um: {self.z_sd_um} is not a number of at least 0")

    @property
    def effective_tolerance_um(self) -> float | None:
        """The tolerance, or a third of the depth of field, or None if neither is known."""
        if self.tolerance_um is not None:
            return self.tolerance_um
        dof = self.optics.dof_um
        return None if dof is None else dof / 3


@dataclass(slots=True)
class Look:
    """One exposure taken to focus. The strategy writes its score here.

    Attributes
    ----------
    z_um : float
        Where the stage really stood, in µm.
    image : numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``, as the camera gave it; not to be written to.
    max_value : float | None
        Value at which the camera saturates, if it is known.
    score : float | None
        Focus measure, filled in by strategies that use one.
    """

    z_um: float
    image: Image
    max_value: float | None = None
    score: float | None = None


CurvePoint: TypeAlias = tuple[float, float | None]
"""``(z_um, score)`` of one look; the score is None where none was computed."""


@dataclass(frozen=True, slots=True)
class FocusResult:
    """What a strategy answers; the loop that drives it fills in the counts.

    Attributes
    ----------
    z_um : float | None
        Focus, in µm of the stage; None if none was found.
    status : {"ok", "low-confidence", "stale", "failed"}
        How far it can be trusted.
    expected_error_um : float | None
        Standard deviation, as the strategy expects it, of the defocus of a frame taken at
        ``z_um``, in µm: the error of ``z_um`` and where the stage really comes to rest.
    score : float | None
        Focus measure at (or expected at) ``z_um``.
    reason : str
        One clause that says why it is not ``ok``; empty if it is.
    strategy : str
        Name of the strategy that found it.
    z_start_um : float | None
        Where the search began.
    looks, moves : int
        Exposures taken and commands sent to the focus stage.
    curve : tuple of (z_um, score)
        The looks, in the order in which they were taken.
    details : dict
        What a strategy wants to tell beside it (JSON values only).
    """

    z_um: float | None
    status: Status
    expected_error_um: float | None = None
    score: float | None = None
    reason: str = ""
    strategy: str = ""
    z_start_um: float | None = None
    looks: int = 0
    moves: int = 0
    curve: tuple[CurvePoint, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def found(self) -> bool:
        """Whether there is a z to go to."""
        return self.z_um is not None and self.status != "failed"


Looking: TypeAlias = Generator[float, Look, FocusResult]
"""A strategy at work: yields the z (µm) it wants to look at, is sent the look taken
there, and returns the result. A z outside the limits of the request, and a look beyond
its budget, end the search by an exception raised at the ``yield``."""


class Strategy(Protocol):
    """A way of finding focus. Built once per run, asked once per tile.

    It never sees a core, a stage or a camera. It may remember, from tile to tile, what
    it learned (the width of the focus curve, say), but must work without. It may also be
    able to check its looks before the run (`Prepares`) and to judge frames (`Verifies`).
    """

    name: str

    def focus(self, request: FocusRequest) -> Looking:
        """Begin the search that `request` describes."""
        ...


@dataclass(frozen=True, slots=True)
class FrameFormat:
    """What the looks will be like, as far as camera and settings tell before the first.

    Attributes
    ----------
    shape : tuple of int
        ``(Y, X)`` or ``(Y, X, 3)``.
    dtype : str
        NumPy name of the pixels' type.
    max_value : float | None
        Value at which the camera saturates, if it is known.
    optics : Optics
        What is known of the optics; the pixel size is that of the looks.
    """

    shape: tuple[int, ...]
    dtype: str
    max_value: float | None = None
    optics: Optics = field(default_factory=Optics)


@runtime_checkable
class Prepares(Protocol):
    """A strategy that can tell before the run whether it will work, and warm up."""

    def prepare(self, frames: FrameFormat) -> None:
        """Raise `InputError` if looks of this kind are none that it can work with."""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a strategy says of a frame that was taken at its focus.

    Attributes
    ----------
    defocus_um : float | None
        Defocus beyond the offset at which the frame was meant to be, in µm; positive above.
        None if nothing can be said.
    expected_error_um : float | None
        Standard deviation of that.
    tolerance_um : float | None
        Up to which a frame is good.
    reason : str
        One clause that says why the verdict is not to be trusted; empty if it is.
    """

    defocus_um: float | None
    expected_error_um: float | None = None
    tolerance_um: float | None = None
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether the frame is within the tolerance, as far as can be trusted."""
        if self.defocus_um is None or self.reason:
            return False
        return self.tolerance_um is None or abs(self.defocus_um) <= self.tolerance_um

    @property
    def off(self) -> bool:
        """Whether it is worth while to correct z and to take the frame again."""
        if self.defocus_um is None or self.reason or self.good:
            return False
        return abs(self.defocus_um) > (self.expected_error_um or 0.0)


@runtime_checkable
class Verifies(Protocol):
    """A strategy that can judge the frame that is saved anyway."""

    def verify(self, frame: Look, request: FocusRequest, offset_um: float) -> Verdict | None:
        """Judge a frame meant to be taken `offset_um` above focus; None if it cannot."""
        ...
