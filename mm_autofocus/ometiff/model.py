"""The OME-XML of a file, built with ome-types from the header and the layout."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ome_types.model as ome

from mm_autofocus.ometiff.frames import NAMESPACE, Focus, FrameRecord, Header, finite, to_json
from mm_autofocus.ometiff.layout import Gap, ImageLayout, PlaneIndex
from mm_autofocus.ometiff.pages import DTYPES

__all__ = ["FileFacts", "build_ome", "xml_bytes"]

_DECLARATION = b'<?xml version="1.0" encoding="UTF-8"?>\n'
_END = b"</OME>"
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_GAP_NOTES: dict[Gap, str] = {
    "skipped": "Left out on purpose; zero-filled, not data.",
    "missing": "Planned but never taken; zero-filled, not data.",
    "not planned": "The plan has no frame here; zero-filled, not data.",
}

Blanks = Mapping[tuple[tuple[int, ...], str], int]
"""``(shape, dtype)`` → page of zeros that stands for the planes without data."""


@dataclass(slots=True)
class FileFacts:
    """What is said of the file as a whole.

    Attributes
    ----------
    incomplete : bool
        The file is still being written, or its writer was killed.
    repaired : str
        When it was repaired, ISO 8601; "" if it never was.
    error : str
        The fault that ended the writing; "".
    brief : bool
        Leave out what needs most room (focus curves, the state of the microscope);
        the pages keep it.
    """

    incomplete: bool = False
    repaired: str = ""
    error: str = ""
    brief: bool = False


@dataclass(slots=True)
class _FocusUse:
    """A focus record and the planes that stand on it."""

    number: int
    record: Focus
    first: FrameRecord
    planes: list[tuple[int, int, int, int, str | None, float | None]] = field(
        default_factory=list
    )
    images: set[int] = field(default_factory=set)

    @property
    def id(self) -> str:
        return f"Annotation:focus-{self.number}"


def _text(value: Any) -> str:
    """`value` as a string that XML can hold."""
    if value is None:
        return ""
    if isinstance(value, dict | list | tuple):
        return to_json(value)
    return _NOT_XML.sub("\ufffd", str(value))


def _map(annotation_id: str, namespace: str, content: Mapping[str, Any]) -> ome.MapAnnotation:
    pairs = [ome.Map.M(k=_text(k), value=_text(v)) for k, v in content.items()]
    return ome.MapAnnotation(id=annotation_id, namespace=namespace, value=ome.Map(ms=pairs))


def build_ome(
    header: Header,
    images: Sequence[ImageLayout],
    blanks: Blanks,
    facts: FileFacts,
) -> ome.OME:
    """Build the OME model.

    Parameters
    ----------
    header : Header
        Of the file.
    images : sequence of ImageLayout
        One per OME Image.
    blanks : mapping
        Pages of zeros. A plane without data and without a blank page gets no TiffData:
        readers fill it with zeros themselves.
    facts : FileFacts
        What to say of the file.
    """
    uses = _focus_uses(images)
    by_frame = {(i, t, c, z): use for use in uses for (i, t, c, z, _status, _age) in use.planes}
    gap_ids: dict[Gap, str] = {}
    for image in images:
        for reason, _record in image.gaps.values():
            gap_ids.setdefault(reason, f"Annotation:gap-{reason.replace(' ', '-')}")
    status_ids = {
        status: f"Annotation:status-{i}"
        for i, status in enumerate(
            sorted(
                {p[4] for use in uses for p in use.planes if p[4] not in (None, "ok")}, key=str
            )
        )
    }
    cameras = sorted({camera for image in images for camera in image.cameras if camera})
    detectors = {camera: f"Detector:{i}" for i, camera in enumerate(cameras)}
    objective = _objective(header)

    ome_images = []
    for i, image in enumerate(images):
        refs = [use.id for use in uses if i in use.images]
        pixels = _pixels(i, image, header, blanks, by_frame, gap_ids, status_ids, detectors)
        ome_images.append(
            _image(i, image, header, facts, pixels, refs, objective is not None, gap_ids)
        )

    maps = [_focus_annotation(use, facts) for use in uses]
    maps += [
        _map(
            annotation_id,
            f"{NAMESPACE}.missing",
            {"reason": reason, "note": _GAP_NOTES[reason]},
        )
        for reason, annotation_id in gap_ids.items()
    ]
    maps += _file_annotations(header, images, facts)
    tags = [
        ome.TagAnnotation(
            id=annotation_id, namespace=f"{NAMESPACE}.status", value=_text(status)
        )
        for status, annotation_id in status_ids.items()
    ]
    instrument: dict[str, Any] = {}
    if detectors or objective is not None:
        instrument["instruments"] = [
            ome.Instrument(
                id="Instrument:0",
                detectors=[ome.Detector(id=d, model=_text(c)) for c, d in detectors.items()],
                objectives=[objective] if objective is not None else [],
            )
        ]
    return ome.OME(
        uuid=header.uuid,
        creator=_text(header.creator),
        images=ome_images,
        structured_annotations=ome.StructuredAnnotations(
            map_annotations=maps, tag_annotations=tags
        ),
        **instrument,
    )


def xml_bytes(model: ome.OME, *, at_least: int = 0) -> bytes:
    """Serialise; white space before the end tag makes it `at_least` so many bytes long."""
    xml = _DECLARATION + model.to_xml(indent=0).strip().encode("utf-8")
    if len(xml) < at_least and xml.endswith(_END):
        pad = b" " * (at_least - len(xml))
        xml = xml[: -len(_END)] + pad + _END
    return xml


def _focus_uses(images: Sequence[ImageLayout]) -> list[_FocusUse]:
    found: dict[Any, _FocusUse] = {}
    planes: list[tuple[FrameRecord, int, PlaneIndex]] = []
    for i, image in enumerate(images):
        planes += [(frame, i, at) for at, frame in image.frames.items() if frame.focus]
        planes += [(r, i, at) for at, (_why, r) in image.gaps.items() if r and r.focus]
    # the page that comes first has the whole record; skipped frames have no page
    planes.sort(key=lambda item: (item[0].page < 0, item[0].page))
    for frame, i, (t, c, z) in planes:
        focus = frame.focus or {}
        use = found.get(focus.get("focus_id"))
        if use is None:
            use = _FocusUse(len(found), focus, frame)
            found[focus.get("focus_id")] = use
        elif len(focus) > len(use.record):
            use.record = focus
        age = finite(focus.get("age_s"))
        use.planes.append((i, t, c, z, focus.get("status"), age))
        use.images.add(i)
    return list(found.values())


def _focus_annotation(use: _FocusUse, facts: FileFacts) -> ome.MapAnnotation:
    record = {k: v for k, v in use.record.items() if k != "thumbnail"}
    if facts.brief:
        record.pop("curve", None)
    record["position"] = record.get("position") or use.first.name
    for axis in ("x_um", "y_um"):
        if record.get(axis) is None:
            record[axis] = getattr(use.first, axis)
    record["page"] = use.first.page
    record["frames"] = use.planes
    plain = {k: v for k, v in record.items() if not isinstance(v, dict | list | tuple)}
    return _map(use.id, NAMESPACE, {**plain, "record": to_json(record)})


def _file_annotations(
    header: Header, images: Sequence[ImageLayout], facts: FileFacts
) -> list[ome.MapAnnotation]:
    gaps = [reason for image in images for reason, _record in image.gaps.values()]
    file = {
        "frames_planned": header.frames_planned,
        "frames": sum(len(image.frames) for image in images),
        "skipped": gaps.count("skipped"),
        "missing": gaps.count("missing"),
        "not_planned": gaps.count("not planned"),
        "repaired": facts.repaired,
        "error": facts.error,
        **{f"version {k}": v for k, v in header.versions.items()},
    }
    notes = [_map("Annotation:file", f"{NAMESPACE}.file", file)]
    if header.plan is not None:
        notes.append(_map("Annotation:plan", f"{NAMESPACE}.plan", {"useq": header.plan}))
    if header.settings is not None:
        settings = {**header.settings, "json": to_json(header.settings)}
        notes.append(_map("Annotation:settings", f"{NAMESPACE}.settings", settings))
    if header.summary is not None and not (facts.brief or facts.incomplete):
        content = {"summary_metadata_json": to_json(header.summary)}
        notes.append(_map("Annotation:summary", "pymmcore_plus", content))
    if facts.incomplete:
        content = {
            "note": "This file was not closed: only its first frame is described here. "
            "`mm-autofocus inspect --repair` completes it from its own pages."
        }
        notes.append(_map("Annotation:incomplete", f"{NAMESPACE}.incomplete", content))
    return notes


def _objective(header: Header) -> ome.Objective | None:
    na = finite(header.optics.get("na"))
    magnification = finite(header.optics.get("magnification"))
    if na is None and magnification is None:
        return None
    known = {"lens_na": na, "nominal_magnification": magnification}
    return ome.Objective(id="Objective:0", **{k: v for k, v in known.items() if v is not None})


def _image(
    i: int,
    image: ImageLayout,
    header: Header,
    facts: FileFacts,
    pixels: ome.Pixels,
    refs: list[str],
    objective: bool,
    gap_ids: Mapping[Gap, str],
) -> ome.Image:
    name = image.name
    if facts.incomplete:
        name += " (incomplete: see mm-autofocus inspect --repair)"
    refs = refs + [gap_ids[r] for r in dict.fromkeys(why for why, _ in image.gaps.values())]
    first = min(image.frames.values(), key=lambda f: f.page, default=None)
    options: dict[str, Any] = {}
    if first is not None:
        stage = {"x": first.x_um, "y": first.y_um, "z": first.z_um}
        known = {k: v for k, v in stage.items() if v is not None}
        if known:
            units = {f"{k}_unit": ome.UnitsLength.MICROMETER for k in known}
            options["stage_label"] = ome.StageLabel(name=_text(image.name), **known, **units)
    if pixels.channels and any(ch.detector_settings for ch in pixels.channels) or objective:
        options["instrument_ref"] = ome.InstrumentRef(id="Instrument:0")
    if objective:
        index = finite(header.optics.get("refractive_index"))
        settings = {"refractive_index": index} if index else {}
        options["objective_settings"] = ome.ObjectiveSettings(id="Objective:0", **settings)
    return ome.Image(
        id=f"Image:{i}",
        name=_text(name),
        acquisition_date=header.created,
        pixels=pixels,
        annotation_refs=[ome.AnnotationRef(id=ref) for ref in refs],
        **options,
    )


def _pixels(
    i: int,
    image: ImageLayout,
    header: Header,
    blanks: Blanks,
    by_frame: Mapping[tuple[int, int, int, int], _FocusUse],
    gap_ids: Mapping[Gap, str],
    status_ids: Mapping[str, str],
    detectors: Mapping[str, str],
) -> ome.Pixels:
    samples = image.shape[2] if len(image.shape) == 3 else 1
    channels = []
    for c in range(image.size_c):
        known: dict[str, Any] = {}
        if image.channels[c]:
            known["name"] = _text(image.channels[c])
        if image.cameras[c]:
            known["detector_settings"] = ome.DetectorSettings(id=detectors[image.cameras[c]])
        channels.append(ome.Channel(id=f"Channel:{i}:{c}", samples_per_pixel=samples, **known))
    blocks, planes = [], []
    for at, frame in sorted(image.frames.items(), key=lambda item: item[1].page):
        blocks.append(_tiff_data(at, frame.page))
        refs = []
        if (use := by_frame.get((i, *at))) is not None:
            refs.append(use.id)
            status = (frame.focus or {}).get("status")
            if status is not None and status in status_ids:
                refs.append(status_ids[status])
        planes.append(_plane(at, frame, refs))
    blank = blanks.get((image.shape, image.dtype))
    for at, (reason, record) in image.gaps.items():
        if blank is not None:
            blocks.append(_tiff_data(at, blank))
        refs = [gap_ids[reason]]
        if record is not None and (use := by_frame.get((i, *at))) is not None:
            refs.append(use.id)
        planes.append(_plane(at, None, refs))
    first = next(iter(image.frames.values()), None)
    size = (first.pixel_size_um if first else None) or header.pixel_size_um
    sizes: dict[str, Any] = {}
    if size:
        sizes = {"physical_size_x": size, "physical_size_y": size}
    if step := _z_step(image):
        sizes["physical_size_z"] = step
    return ome.Pixels(
        id=f"Pixels:{i}",
        # T outermost: tifffile and napari then see (T, C, Z, Y, X)
        dimension_order=ome.Pixels_DimensionOrder.XYZCT,
        type=DTYPES[image.dtype],
        big_endian=False,
        interleaved=samples > 1,
        size_x=image.shape[1],
        size_y=image.shape[0],
        size_z=image.size_z,
        size_c=image.size_c * samples,
        size_t=image.size_t,
        channels=channels,
        tiff_data_blocks=blocks,
        planes=planes,
        **sizes,
    )


def _tiff_data(at: PlaneIndex, page: int) -> ome.TiffData:
    t, c, z = at
    return ome.TiffData(ifd=page, first_t=t, first_c=c, first_z=z, plane_count=1)


def _plane(at: PlaneIndex, frame: FrameRecord | None, refs: list[str]) -> ome.Plane:
    t, c, z = at
    known: dict[str, Any] = {}
    if frame is not None:
        if frame.time_s is not None:
            known["delta_t"] = frame.time_s
        if frame.exposure_ms is not None:
            known["exposure_time"] = frame.exposure_ms / 1000
        for axis in "xyz":
            if (value := getattr(frame, f"{axis}_um")) is not None:
                known[f"position_{axis}"] = value
                # the schema's default is "reference frame", which means nothing
                known[f"position_{axis}_unit"] = ome.UnitsLength.MICROMETER
    if refs:
        known["annotation_refs"] = [ome.AnnotationRef(id=ref) for ref in refs]
    return ome.Plane(the_t=t, the_c=c, the_z=z, **known)


def _z_step(image: ImageLayout) -> float | None:
    """Median distance between the planes of the stacks, in µm, as really reached."""
    steps = [
        abs(upper.z_um - frame.z_um)
        for (t, c, z), frame in image.frames.items()
        if (upper := image.frames.get((t, c, z + 1))) is not None
        and upper.z_um is not None
        and frame.z_um is not None
    ]
    return statistics.median(steps) or None if steps else None
