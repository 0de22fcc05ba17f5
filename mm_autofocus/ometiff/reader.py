"""The record of a run, from its file alone."""

from __future__ import annotations

import base64
import binascii
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from mm_autofocus.errors import InputError
from mm_autofocus.ometiff.annotations import FileFacts
from mm_autofocus.ometiff.frames import DERIVED, NAMESPACE, finite
from mm_autofocus.ometiff.layout import PlaneIndex, lay_out
from mm_autofocus.ometiff.model import ome_xml
from mm_autofocus.ometiff.pages import DTYPES
from mm_autofocus.ometiff.record import (
    FileRecord,
    FocusRecord,
    FrameUse,
    ImageRecord,
    PlaneRecord,
    RecoveryRecord,
)
from mm_autofocus.ometiff.recovery import (
    annotation_maps,
    description_root,
    is_complete,
    not_ours,
    open_tiff,
    page_content,
    plan_of,
    scan,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    import tifffile

__all__ = ["read_plane", "read_record"]


def read_record(path: str | os.PathLike[str]) -> FileRecord:
    """Read the record of a run; also of a file that was not closed.

    Raises
    ------
    InputError
        There is no such file, it is no TIFF, or it was not written by mm_autofocus.
    """
    path = Path(path)
    with open_tiff(path) as tif:
        root = description_root(tif)
        complete = is_complete(root)
        if not complete:
            found = scan(tif)
            images = lay_out(found.frames, found.skipped, plan_of(found.header))
            root = ET.fromstring(ome_xml(found.header, images, found.blanks, FileFacts()))
        if root is None:
            raise not_ours(path)
        return _parse(path, root, complete, tif)


def read_plane(
    path: str | os.PathLike[str],
    image: int,
    t: int = 0,
    c: int = 0,
    z: int = 0,
    *,
    record: FileRecord | None = None,
) -> npt.NDArray[Any]:
    """Read one plane.

    Parameters
    ----------
    path : path
        The file.
    image, t, c, z : int
        Which plane.
    record : FileRecord | None
        Of the file, if it has been read already; saves time.

    Returns
    -------
    numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``.

    Raises
    ------
    InputError
        As `read_record`; there is no such plane, or it holds no data.
    """
    record = record or read_record(path)
    if not 0 <= image < len(record.images):
        raise InputError(f"{path}: image {image} is not one of 0 … {len(record.images) - 1}")
    plane = record.images[image].planes.get((t, c, z))
    where = f"{path}: image {image}, t={t}, c={c}, z={z}"
    if plane is None:
        raise InputError(f"{where}: outside the shape {record.images[image].shape}")
    if plane.gap or plane.page is None:
        raise InputError(f"{where}: this plane is {plane.gap or 'missing'}; it holds no data")
    with open_tiff(path) as tif:
        data: npt.NDArray[Any] = tif.pages[plane.page].asarray()
    return data


def _parse(path: Path, root: ET.Element, complete: bool, tif: tifffile.TiffFile) -> FileRecord:
    focus_maps: dict[str, dict[str, Any]] = {}
    gaps: dict[str, str] = {}
    others: dict[str, dict[str, str]] = {}
    recoveries: list[dict[str, Any]] = []
    for annotation_id, namespace, content in annotation_maps(root):
        if namespace == NAMESPACE and "record" in content:
            focus_maps[annotation_id] = json.loads(content["record"])
        elif namespace == f"{DERIVED}.pair":
            recoveries.append(json.loads(content["record"]))
        elif namespace == f"{NAMESPACE}.missing":
            gaps[annotation_id] = content["reason"]
        else:
            others[namespace] = content
    facts = others.get(f"{NAMESPACE}.file", {})
    indices = json.loads(facts.get("images") or "[]")
    images = tuple(
        _image(element, indices[i] if i < len(indices) else {}, gaps)
        for i, element in enumerate(root.iterfind("{*}Image"))
    )
    planned = facts.get("frames_planned")
    plan = others.get(f"{NAMESPACE}.plan", {}).get("useq")
    settings = others.get(f"{NAMESPACE}.settings", {}).get("json")
    derived = others.get(DERIVED)
    prefix = "version "
    return FileRecord(
        path=path,
        complete=complete,
        repaired=bool(facts.get("repaired")),
        error=facts.get("error", ""),
        created=root.findtext("{*}Image/{*}AcquisitionDate") or "",
        frames_planned=int(planned) if planned else None,
        frames=sum(image.frames for image in images),
        images=images,
        focus=tuple(_focus(record, tif) for record in focus_maps.values()),
        plan=json.loads(plan) if plan else None,
        settings=json.loads(settings) if settings else None,
        versions={k[len(prefix) :]: v for k, v in facts.items() if k.startswith(prefix)},
        derived=None if derived is None else _derived(derived),
        recoveries=tuple(map(_recovery, recoveries)),
    )


def _derived(content: dict[str, str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(content["json"])
    return {**told, "card": json.loads(content.get("card") or "null")}


def _recovery(told: dict[str, Any]) -> RecoveryRecord:
    z = told.get("z_shots_um")
    return RecoveryRecord(
        image=int(told["image"]),
        t=int(told["t"]),
        c=int(told["c"]),
        status=told.get("status", ""),
        reasons=tuple(told.get("reasons") or ()),
        kept=told.get("kept", ""),
        sharper=told.get("sharper", ""),
        z_shots_um=None if not z else (float(z[0]), float(z[1])),
        delta_um=float(told["delta_um"]),
        focus_um=finite(told.get("focus_um")),
        focus_sd_um=finite(told.get("focus_sd_um")),
        ood=finite(told.get("ood")),
    )


_NUMPY = {ome: name for name, ome in DTYPES.items()}


def _image(element: ET.Element, index: dict[str, int], gaps: dict[str, str]) -> ImageRecord:
    pixels = element.find("{*}Pixels")
    assert pixels is not None
    channels = pixels.findall("{*}Channel")
    samples = int(channels[0].get("SamplesPerPixel", 1)) if channels else 1
    size = {axis: int(pixels.get(f"Size{axis}", 1)) for axis in "TCZYX"}
    size["C"] //= samples
    pages = {
        _at(block, "First"): int(block.get("IFD", 0))
        for block in pixels.iterfind("{*}TiffData")
    }
    planes: dict[PlaneIndex, PlaneRecord] = {}
    for plane in pixels.iterfind("{*}Plane"):
        at = _at(plane, "The")
        refs = [ref.get("ID", "") for ref in plane.iterfind("{*}AnnotationRef")]
        planes[at] = PlaneRecord(
            page=pages.get(at),
            gap=next((gaps[ref] for ref in refs if ref in gaps), ""),
            time_s=finite(plane.get("DeltaT")),
            exposure_s=finite(plane.get("ExposureTime")),
            x_um=finite(plane.get("PositionX")),
            y_um=finite(plane.get("PositionY")),
            z_um=finite(plane.get("PositionZ")),
        )
    return ImageRecord(
        name=element.get("Name", ""),
        index=index,
        shape=(*size.values(), *([samples] if samples > 1 else [])),
        dtype=_NUMPY[pixels.get("Type", "")],
        channels=tuple(channel.get("Name", "") for channel in channels),
        pixel_size_um=finite(pixels.get("PhysicalSizeX")),
        planes=planes,
    )


def _at(element: ET.Element, prefix: str) -> PlaneIndex:
    t, c, z = (int(element.get(f"{prefix}{axis}", 0)) for axis in "TCZ")
    return t, c, z


def _focus(record: dict[str, Any], tif: tifffile.TiffFile) -> FocusRecord:
    frames = tuple(FrameUse(*use) for use in record.pop("frames", ()))
    page, has_thumbnail = record.pop("page", -1), record.pop("thumbnail", False)
    get = record.get
    return FocusRecord(
        focus_id=get("focus_id", ""),
        index=get("index") or {},
        position=get("position") or "",
        x_um=finite(get("x_um")),
        y_um=finite(get("y_um")),
        z_before_um=finite(get("z_before_um", get("z_start_um"))),
        z_after_um=finite(get("z_after_um", get("z_um"))),
        status=get("status") or "",
        strategy=get("strategy") or "",
        reason=get("reason") or "",
        looks=int(get("looks") or 0),
        moves=int(get("moves") or 0),
        score=finite(get("score")),
        expected_error_um=finite(get("expected_error_um")),
        curve=tuple((float(z), finite(score)) for z, score in get("curve") or ()),
        thumbnail=_thumbnail(tif, page, get("focus_id")) if has_thumbnail else None,
        frames=frames,
        record=record,
        verified=get("verified"),
        corrections=int(get("corrections") or 0),
        details=get("details") or {},
    )


def _thumbnail(tif: tifffile.TiffFile, page: int, focus_id: Any) -> bytes | None:
    """Read it from the private tag; None if another program saved the file anew."""
    if not page >= 0:
        return None
    try:
        content = page_content(tif.pages[page])
    except IndexError:
        return None
    if content is None:
        return None
    for data in (content.get("frame"), *content.get("skipped", ())):
        focus = (data or {}).get("focus") or {}
        if focus.get("focus_id") == focus_id and focus.get("thumbnail"):
            try:
                return base64.b64decode(focus["thumbnail"], validate=True)
            except (binascii.Error, TypeError, ValueError):
                return None
    return None
