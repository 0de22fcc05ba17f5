"""What is known of a run from its file: plain, frozen data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_autofocus.ometiff.layout import PlaneIndex

__all__ = [
    "FileRecord",
    "FocusRecord",
    "FrameUse",
    "ImageRecord",
    "PlaneRecord",
    "RecoveryRecord",
]


@dataclass(frozen=True, slots=True)
class FrameUse:
    """A plane that stands on a focus.

    Attributes
    ----------
    image, t, c, z : int
        Where it is in the file; c counts channels × cameras.
    status : str | None
        Of this plane.
    age_s : float | None
        Age of the focus when it was taken.
    """

    image: int
    t: int
    c: int
    z: int
    status: str | None = None
    age_s: float | None = None


@dataclass(frozen=True, slots=True)
class FocusRecord:
    """One focus event.

    Attributes
    ----------
    focus_id : int | str
        As the engine counted it.
    index : dict
        Of the event: ``{"t": 0, "p": 3}``.
    position : str
        Name of the position.
    x_um, y_um : float | None
        Stage.
    z_before_um, z_after_um : float | None
        Where the focus stage stood before and was left after; if no focus was found,
        that is where it went back to.
    status, strategy, reason : str
        As in `mm_autofocus.types.FocusResult`.
    looks, moves : int
        What it cost.
    score, expected_error_um : float | None
        As in `mm_autofocus.types.FocusResult`.
    curve : tuple of (z_um, score)
        The looks.
    thumbnail : bytes | None
        PNG.
    frames : tuple of FrameUse
        The planes that stand on it; for a skipped tile the planes that are not there.
    record : dict
        All that the engine said.
    verified : bool | None
        Whether its first frame was found to be in focus; None if it was not judged.
    corrections : int
        How often that frame was taken again.
    details : dict
        What the strategy told beside it: model, predictions, verification, shadow, ...
    """

    focus_id: int | str
    index: dict[str, int]
    position: str
    x_um: float | None
    y_um: float | None
    z_before_um: float | None
    z_after_um: float | None
    status: str
    strategy: str
    reason: str
    looks: int
    moves: int
    score: float | None
    expected_error_um: float | None
    curve: tuple[tuple[float, float | None], ...]
    thumbnail: bytes | None
    frames: tuple[FrameUse, ...]
    record: dict[str, Any]
    verified: bool | None = None
    corrections: int = 0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlaneRecord:
    """One plane.

    Attributes
    ----------
    page : int | None
        Index of its TIFF page; of a page of zeros, or None, where there is no data.
    gap : str
        "" for data; else ``skipped``, ``missing`` or ``not planned``.
    time_s, exposure_s, x_um, y_um, z_um : float | None
        How it was taken.
    """

    page: int | None
    gap: str = ""
    time_s: float | None = None
    exposure_s: float | None = None
    x_um: float | None = None
    y_um: float | None = None
    z_um: float | None = None


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One OME Image: a position, or a tile of its grid.

    Attributes
    ----------
    name : str
        Of the position.
    index : dict
        ``{"p": 3, "g": 0}``.
    shape : tuple of int
        ``(T, C, Z, Y, X)``, with ``3`` after it for RGB.
    dtype : str
        NumPy name.
    channels : tuple of str
        Names, "" where there is none.
    pixel_size_um : float | None
        In the specimen.
    planes : dict of (t, c, z) → PlaneRecord
        All planes, real or not.
    """

    name: str
    index: dict[str, int]
    shape: tuple[int, ...]
    dtype: str
    channels: tuple[str, ...]
    pixel_size_um: float | None
    planes: dict[PlaneIndex, PlaneRecord]

    @property
    def frames(self) -> int:
        """Real planes."""
        return sum(not plane.gap for plane in self.planes.values())

    @property
    def gaps(self) -> dict[str, int]:
        """Reason → number of planes without data."""
        return dict(Counter(p.gap for p in self.planes.values() if p.gap))


@dataclass(frozen=True, slots=True)
class RecoveryRecord:
    """One image that was recovered from two shots.

    Attributes
    ----------
    image, t, c : int
        Where it is in the file.
    status : str
        ``ok`` or ``low-confidence``.
    reasons : tuple of str
        Why not to trust it.
    kept : str
        ``recovered``, or ``sharper shot`` where that was kept instead.
    sharper : str
        ``lower`` or ``upper``: the shot that is the sharper one.
    z_shots_um : (float, float) | None
        Where the shots were taken; None: only their distance is known.
    delta_um : float
        Half of their distance.
    focus_um, focus_sd_um : float | None
        z of the recovered focus, as the model tells it (relative to the middle of the shots
        where their z is not known), and its standard deviation.
    ood : float | None
        How unlike the training's frames the shots look; 1 is the limit.
    """

    image: int
    t: int
    c: int
    status: str
    reasons: tuple[str, ...]
    kept: str
    sharper: str
    z_shots_um: tuple[float, float] | None
    delta_um: float
    focus_um: float | None
    focus_sd_um: float | None
    ood: float | None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """All that a file says of its run.

    Attributes
    ----------
    path : Path
        The file.
    complete : bool
        False: its writer was killed, or still writes; see `mm_autofocus.ometiff.repair`.
    repaired : bool
        It was completed by a repair.
    error : str
        The fault that ended the writing, "" if none.
    created : str
        Start of the run, ISO 8601.
    frames_planned : int | None
        None where the plan did not know.
    frames : int
        Frames really taken.
    images : tuple of ImageRecord
        In the order of the file.
    focus : tuple of FocusRecord
        In the order in which they happened.
    plan, settings : dict | None
        The useq sequence and the settings of the autofocus.
    versions : dict
        Program → version.
    derived : dict | None
        Of a file that was computed: ``source``, ``source_uuid``, ``source_sha256``,
        ``model``, ``model_sha256``, ``card``, ``delta_um``, ``pairs``, ``flagged``, ...
    recoveries : tuple of RecoveryRecord
        Of such a file: one per pair of shots.
    """

    path: Path
    complete: bool
    repaired: bool
    error: str
    created: str
    frames_planned: int | None
    frames: int
    images: tuple[ImageRecord, ...]
    focus: tuple[FocusRecord, ...]
    plan: dict[str, Any] | None
    settings: dict[str, Any] | None
    versions: dict[str, str] = field(default_factory=dict)
    derived: dict[str, Any] | None = None
    recoveries: tuple[RecoveryRecord, ...] = ()

    @property
    def flagged(self) -> tuple[RecoveryRecord, ...]:
        """Recovered images that are not to be trusted."""
        return tuple(r for r in self.recoveries if r.status != "ok")

    @property
    def frames_missing(self) -> int:
        """Planned but not in the file, skipped ones included."""
        return max(0, (self.frames_planned or self.frames) - self.frames)

    @property
    def positions(self) -> tuple[str, ...]:
        """Names of the images."""
        return tuple(image.name for image in self.images)
