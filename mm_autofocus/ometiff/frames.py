"""What is known of each frame, and how it travels in the file.

Every page of the file carries its own :class:`FrameRecord` in a private tag, the first
page a :class:`Header` too. These are enough to write the OME-XML, so a file that was
never closed can be finished later from itself alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeAlias

__all__ = [
    "DERIVED",
    "NAMESPACE",
    "PAGE_TAG",
    "REVISED",
    "Focus",
    "FrameRecord",
    "Header",
    "ImageKey",
    "finite",
    "image_key",
    "to_json",
]

NAMESPACE = "mm_autofocus"
"""Namespace of the annotations; those with other content append ``.name`` to it."""

DERIVED = f"{NAMESPACE}.refocus"
"""Namespace of what a file says of how its images were computed."""

PAGE_TAG = 65126
"""Private TIFF tag (ASCII, JSON) of every page. 65000 and above are free for private use."""

REVISED = "revised"
"""Key of an autofocus record that counts its changes after it was made."""

FORMAT = 1
"""Version of the JSON in the private tag."""

ImageKey: TypeAlias = tuple[tuple[str, int], ...]
"""Which OME Image a frame belongs to: ``(("p", 3), ("g", 0))``."""

Focus: TypeAlias = dict[str, Any]
"""The autofocus record of a frame, JSON values only."""

_PLANE_AXES = ("t", "c", "z", "cam")


def image_key(index: Mapping[str, int]) -> ImageKey:
    """All axes of `index` that are no axes of one image, position first."""
    others = [axis for axis in index if axis not in _PLANE_AXES]
    others.sort(key=lambda axis: ("pg".find(axis) % 3, axis))
    return tuple((axis, int(index[axis])) for axis in others)


def finite(value: Any) -> float | None:
    """`value` as a float, or None where there is none or it is not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays, pydantic models and the rest, for `json`."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)


# made once: json.dumps would make one for each frame
_ENCODER = json.JSONEncoder(default=_plain, separators=(",", ":"), allow_nan=False)


def _no_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _no_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(v) for v in value]
    return value


def to_json(value: Any) -> str:
    """Strict, compact, pure ASCII JSON; NaN and infinity become null."""
    try:
        return _ENCODER.encode(value)
    except ValueError:  # NaN is rare: only then pay for a second pass
        plain = json.loads(json.dumps(value, default=_plain))
        return _ENCODER.encode(_no_nan(plain))


@dataclass(slots=True)
class FrameRecord:
    """One frame: where it belongs and how it was taken.

    Attributes
    ----------
    index : dict
        Index of the useq event: any of t, p, g, c, z, and cam.
    name, channel, camera : str
        Of the position, of the channel preset, of the camera device.
    time_s, exposure_ms, x_um, y_um, z_um, pixel_size_um : float | None
        Since the start of the run; the stage as really reached.
    focus : dict | None
        The autofocus record. Complete where `focus_id` occurs first in the file, later
        only what may differ from frame to frame: focus_id, status, age_s. Where the record
        was revised in between, all but its looks and pictures again; it holds for the frames
        before, too.
    bits : int | None
        Significant bits of its pixels; None: all, or as the header says.
    recovery : dict | None
        Of an image that was computed: from what, and how much it is to be trusted (see
        `mm_autofocus.ometiff.record.RecoveryRecord`).
    shape : tuple of int
        ``(Y, X)`` or ``(Y, X, 3)``.
    dtype : str
        NumPy name.
    page : int
        Index of its page; -1 for a frame that was not taken.
    tag_page : int
        Index of the page whose private tag has this record: its own, or for a frame
        that was not taken the next one.
    """

    index: dict[str, int]
    name: str = ""
    channel: str = ""
    camera: str = ""
    time_s: float | None = None
    exposure_ms: float | None = None
    x_um: float | None = None
    y_um: float | None = None
    z_um: float | None = None
    pixel_size_um: float | None = None
    focus: Focus | None = None
    bits: int | None = None
    recovery: dict[str, Any] | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""
    page: int = -1
    tag_page: int = -1

    @property
    def key(self) -> ImageKey:
        """The image it belongs to."""
        return image_key(self.index)

    def at(self, axis: str) -> int:
        """Index along `axis`, 0 where it has none."""
        return int(self.index.get(axis, 0))

    def to_dict(self) -> dict[str, Any]:
        """Give what is written to the page: nothing that the page itself says."""
        out: dict[str, Any] = {"index": {k: int(v) for k, v in self.index.items()}}
        for name in _WRITTEN:
            value = getattr(self, name)
            if value is not None and value != "":
                out[name] = value
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FrameRecord:
        """Inverse of `to_dict`; ignores what a later version may have added."""
        index = {str(k): int(v) for k, v in data["index"].items()}
        return cls(index=index, **{k: data[k] for k in _WRITTEN if k in data})


_WRITTEN = tuple(
    f.name
    for f in fields(FrameRecord)
    if f.name not in ("index", "shape", "dtype", "page", "tag_page")
)


@dataclass(slots=True)
class Header:
    """What holds for all frames of a file; in the private tag of its first page.

    Attributes
    ----------
    created : str
        Start of the run, ISO 8601 with the offset from UTC.
    uuid : str
        Of this file.
    creator : str
        Program that wrote it.
    n_cameras : int
        Frames of one event.
    frames_planned : int | None
        In this file; None where the plan does not know.
    plan : dict | None
        The useq sequence.
    settings : dict | None
        The autofocus settings.
    optics : dict
        Fields of `mm_autofocus.types.Optics`.
    versions : dict
        Of the programs that took part.
    pixel_size_um : float | None
        Where a frame does not say it.
    summary : dict | None
        The state of the microscope, as pymmcore-plus reports it.
    only : dict | None
        Index that all frames of this file share (``{"p": 3}`` if split by position).
    significant_bits : int | None
        Of the camera, where they are fewer than those of the pixel type.
    derived : dict | None
        Of a file whose images were computed: from which file, and by what. It may be
        completed until the file is finished.
    """

    created: str
    uuid: str
    creator: str = "mm_autofocus"
    n_cameras: int = 1
    frames_planned: int | None = None
    plan: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    optics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    pixel_size_um: float | None = None
    summary: dict[str, Any] | None = None
    only: dict[str, int] | None = None
    significant_bits: int | None = None
    derived: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Header:
        """Inverse of `to_dict`; ignores what a later version may have added."""
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in data.items() if k in known})
