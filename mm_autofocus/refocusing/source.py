"""A recorded file of two planes: its pairs, whoever wrote it."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tifffile

from mm_autofocus.errors import InputError
from mm_autofocus.ometiff.following import Follower, PageAt, is_ours
from mm_autofocus.ometiff.frames import FrameRecord, Header, ImageKey
from mm_autofocus.ometiff.header import installed
from mm_autofocus.ometiff.layout import coordinate
from mm_autofocus.ometiff.recovery import open_tiff
from mm_autofocus.refocusing.pairs import Pair, Pairing

if TYPE_CHECKING:
    import ome_types.model as ome

__all__ = ["Planes", "Source", "left_out", "read_planes", "read_source", "record_sha256"]

_LENGTHS_UM = {
    "pm": 1e-6,
    "Å": 1e-4,
    "nm": 1e-3,
    "µm": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25400.0,
}
_TIMES_S = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(slots=True)
class Planes:
    """All planes of a file.

    Attributes
    ----------
    header : Header
        Of the file; of one by another program, what it says of the same.
    frames : list of (FrameRecord, PageAt)
        The real planes.
    skipped : list of FrameRecord
        Left out on purpose.
    steps_um : dict
        Image → distance of its planes, where it is said.
    sha256 : str
        Of its OME-XML.
    """

    header: Header
    frames: list[tuple[FrameRecord, PageAt]] = field(default_factory=list)
    skipped: list[FrameRecord] = field(default_factory=list)
    steps_um: dict[ImageKey, float] = field(default_factory=dict)
    sha256: str = ""


@dataclass(slots=True)
class Source:
    """What there is to recover in a file.

    Attributes
    ----------
    path : Path
        The file.
    header : Header
        Of the file.
    pairs : list of Pair
        In the order of the file.
    left : list of FrameRecord
        Of the lower plane, where there is no pair because a shot was left out.
    alone : int
        Shots without a partner.
    sha256 : str
        Of its OME-XML.
    """

    path: Path
    header: Header
    pairs: list[Pair]
    left: list[FrameRecord]
    alone: int
    sha256: str


def read_source(path: Path) -> Source:
    """Find the pairs of a file; no pixel is read.

    Raises
    ------
    InputError
        There is no such file, it is no OME-TIFF, its Z axis is not two planes, or these are
        in the wrong order or of unknown z.
    """
    planes = read_planes(path)
    pairing = Pairing(path, planes.header, planes.steps_um)
    depth = 1 + max((frame.at("z") for frame, _ in planes.frames), default=0)
    if depth != 2:
        derived = "; it is the result of a refocus already" if planes.header.derived else ""
        raise InputError(
            f"{path}: its Z axis has {depth} plane{'s' if depth > 1 else ''}, which is not "
            f"allowed: must be two, the shots at F - ΔD and F + ΔD{derived}"
        )
    added = (pairing.add(frame, at) for frame, at in planes.frames)
    pairs = [pair for pair in added if pair is not None]
    if not pairs:
        raise InputError(f"{path}: no tile of this file has both of its shots")
    alone = pairing.alone
    left = left_out(planes.skipped, alone)
    return Source(path, planes.header, pairs, left, len(alone), planes.sha256)


def left_out(skipped: list[FrameRecord], alone: list[FrameRecord]) -> list[FrameRecord]:
    """What the fused file says of pairs of which a shot was left out on purpose."""
    found = {}
    taken = {_above(frame) for frame in alone if frame.at("z") == 0}
    for frame in skipped:
        if frame.at("z") == 0:
            found[_above(frame)] = frame
        elif _above(frame) in taken:
            frame.index = {**frame.index, "z": 0}
            found[_above(frame)] = frame
    return list(found.values())


def _above(frame: FrameRecord) -> tuple[Any, ...]:
    key, t, c, _, cam = coordinate(frame.index)
    return key, t, c, cam


def read_planes(path: Path) -> Planes:
    """Read what a file says of its planes.

    Raises
    ------
    InputError
        There is no such file, or it is no OME-TIFF.
    """
    with open_tiff(path) as tif:
        sha256 = record_sha256(tif)
        if not is_ours(tif):
            planes = _foreign(path, tif)
            planes.sha256 = sha256
            return planes
    follower = Follower(path)
    return Planes(follower.header, list(follower.new()), follower.skipped, sha256=sha256)


def record_sha256(tif: tifffile.TiffFile) -> str:
    """Checksum of the OME-XML: which file it was, and in which state."""
    tag = tif.pages.first.tags.get(270)
    text = "" if tag is None else str(tag.value)
    return hashlib.sha256(text.rstrip("\0").encode("utf-8")).hexdigest()


# ------------------------------------------------------------------- other programs


def _foreign(path: Path, tif: tifffile.TiffFile) -> Planes:
    """The same from the OME-XML of another program."""
    import ome_types

    text = tif.ome_metadata
    if not text:
        raise InputError(
            f"{path}: this is no OME-TIFF; z, positions and ΔD must be in the file"
        )
    try:
        model = ome_types.from_xml(text)
        series = list(tif.series)
    except Exception as e:  # noqa: BLE001 -- the XML of another program can be anything
        why = " ".join(str(e).split())[:160]
        raise InputError(f"{path}: its OME-XML cannot be read ({why})") from None
    if len(series) != len(model.images):
        raise InputError(
            f"{path}: its OME-XML describes {len(model.images)} images, the file holds "
            f"{len(series)}"
        )
    planes = Planes(_header(model))
    for i, (image, one) in enumerate(zip(model.images, series, strict=True)):
        key = (("p", i),)
        step = _um(image.pixels.physical_size_z, image.pixels.physical_size_z_unit)
        if step:
            planes.steps_um[key] = step
        planes.frames += _frames(path, i, image, one)
    return planes


def _frames(
    path: Path, i: int, image: ome.Image, series: tifffile.TiffPageSeries
) -> Iterator[tuple[FrameRecord, PageAt]]:
    pixels = image.pixels
    axes = series.get_axes(squeeze=False)
    shape = series.get_shape(squeeze=False)
    sizes = {a: n for a, n in zip(axes, shape, strict=True) if a not in "YXS"}
    if unknown := set(sizes) - set("TCZ"):
        raise InputError(
            f"{path}: an axis {min(unknown)!r} in image {i} is not T, C, Z, Y or X"
        )
    extent = dict(zip(axes, shape, strict=True))
    samples = extent.get("S", 1)
    plane_shape = (extent["Y"], extent["X"], *([samples] if samples > 1 else []))
    told = {(p.the_t, p.the_c, p.the_z): p for p in pixels.planes}
    _check_rising(path, told)
    size_um = _um(pixels.physical_size_x, pixels.physical_size_x_unit)
    ranges = [[(a, k) for k in range(n)] for a, n in sizes.items()]
    for at, page in zip(itertools.product(*ranges), series.pages, strict=False):
        if page is None:
            continue
        index = {a.lower(): k for a, k in at}
        t, c, z = (index.get(a, 0) for a in "tcz")
        plane = told.get((t, c, z))
        channel = pixels.channels[c] if c < len(pixels.channels) else None
        frame = FrameRecord(
            index={"p": i, "t": t, "c": c, "z": z},
            name=image.name or "",
            channel=(channel.name or "") if channel else "",
            pixel_size_um=size_um or None,
            bits=pixels.significant_bits,
            shape=plane_shape,
            dtype=series.dtype.name,
        )
        if plane is not None:
            frame.time_s = _time(plane.delta_t, plane.delta_t_unit)
            exposure = _time(plane.exposure_time, plane.exposure_time_unit)
            frame.exposure_ms = None if exposure is None else 1000 * exposure
            frame.x_um = _um(plane.position_x, plane.position_x_unit)
            frame.y_um = _um(plane.position_y, plane.position_y_unit)
            frame.z_um = _um(plane.position_z, plane.position_z_unit)
        yield frame, PageAt(str(page.parent.filehandle.path), page.offset)


def _check_rising(path: Path, told: dict[tuple[int, int, int], ome.Plane]) -> None:
    """Refuse planes that fall, also where z has no unit that says how far."""
    for (t, c, z), plane in told.items():
        above = told.get((t, c, z + 1))
        low, high = plane.position_z, None if above is None else above.position_z
        if low is not None and high is not None and high < low:
            raise InputError(
                f"{path}: t={t}, c={c}: the planes are in the wrong order: PositionZ "
                f"{low:g} and {high:g}; the lower shot (F - ΔD) must come first"
            )


def _header(model: ome.OME) -> Header:
    when = next((im.acquisition_date for im in model.images if im.acquisition_date), None)
    created = when or datetime.now(UTC)
    created = created if created.tzinfo else created.replace(tzinfo=UTC)
    objective = next((o for inst in model.instruments for o in inst.objectives), None)
    optics: dict[str, Any] = {}
    if objective is not None:
        optics = {"na": objective.lens_na, "magnification": objective.nominal_magnification}
    return Header(
        created=created.isoformat(timespec="milliseconds"),
        uuid=model.uuid or "",
        creator=model.creator or "another program",
        optics={k: v for k, v in optics.items() if v},
        versions=dict(installed()),
    )


def _um(value: Any, unit: Any) -> float | None:
    return _scaled(value, unit, _LENGTHS_UM)


def _time(value: Any, unit: Any) -> float | None:
    return _scaled(value, unit, _TIMES_S)


def _scaled(value: Any, unit: Any, factors: dict[str, float]) -> float | None:
    """A value in our unit; None where it is not known, or its unit is none of length."""
    factor = factors.get(str(getattr(unit, "value", unit)))
    if value is None or factor is None or not math.isfinite(float(value)):
        return None
    return float(value) * factor
