"""What a file says beside its pixels: OME structured annotations.

========================  ==========================================================
namespace                 content
========================  ==========================================================
``mm_autofocus``          one focus event; linked from the images and planes it serves
``mm_autofocus.status``   a status other than ``ok``, linked from the planes that have it
``mm_autofocus.missing``  why a plane is no data, linked from these planes
``mm_autofocus.file``     counts of frames, versions of programs
``mm_autofocus.plan``     the useq sequence, as JSON
``mm_autofocus.settings`` the settings of the autofocus
``mm_autofocus.refocus``  of computed images: from which file, by which model; linked
                          from the images
``mm_autofocus.refocus.pair``  how one of them came about; linked from its plane
``mm_autofocus.incomplete``  only in a file that was not closed
``pymmcore_plus``         the state of the microscope
========================  ==========================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ome_types.model as ome

from mm_autofocus.ometiff.frames import (
    DERIVED,
    NAMESPACE,
    REVISED,
    Focus,
    FrameRecord,
    Header,
    finite,
    to_json,
)
from mm_autofocus.ometiff.layout import Gap, ImageLayout, PlaneIndex

__all__ = ["FileFacts", "Links", "link", "structured_annotations", "text"]

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_DERIVED_ID = "Annotation:refocus"

_GAP_NOTES: dict[Gap, str] = {
    "skipped": "Left out on purpose; zero-filled, not data.",
    "missing": "Planned but never taken; zero-filled, not data.",
    "not planned": "The plan has no frame here; zero-filled, not data.",
}


@dataclass(slots=True)
class FileFacts:
    """What is said of the file as a whole.

    Attributes
    ----------
    repaired : str
        When it was repaired, ISO 8601; "" if it never was.
    error : str
        The fault that ended the writing; "".
    brief : bool
        Leave out what needs most room (focus curves, the state of the microscope);
        the pages keep it.
    """

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


@dataclass(slots=True)
class Links:
    """Which annotations belong to which images and planes.

    Attributes
    ----------
    uses : list
        The focus events.
    gap_ids, status_ids : dict
        Annotation of each reason for a gap, and of each status but ``ok``.
    recoveries : dict of (image, t, c, z) → FrameRecord
        The planes that were computed.
    derived : bool
        Whether the file is computed from another.
    """

    uses: list[_FocusUse]
    gap_ids: dict[Gap, str]
    status_ids: dict[str, str]
    recoveries: dict[tuple[int, int, int, int], FrameRecord] = field(default_factory=dict)
    derived: bool = False
    _by_plane: dict[tuple[int, int, int, int], tuple[str, str | None]] = field(
        default_factory=dict
    )

    def of_image(self, i: int, image: ImageLayout) -> list[str]:
        """Annotations of image number `i`."""
        reasons = dict.fromkeys(why for why, _record in image.gaps.values())
        uses = [use.id for use in self.uses if i in use.images]
        whence = [_DERIVED_ID] if self.derived else []
        return whence + uses + [self.gap_ids[why] for why in reasons]

    def of_plane(self, i: int, at: PlaneIndex, gap: Gap | None = None) -> list[str]:
        """Annotations of plane `at` in image number `i`."""
        refs = [] if gap is None else [self.gap_ids[gap]]
        if (i, *at) in self.recoveries:
            refs.append(_recovery_id(i, *at))
        if (use := self._by_plane.get((i, *at))) is not None:
            focus_id, status = use
            refs.append(focus_id)
            if status in self.status_ids:
                refs.append(self.status_ids[status])
        return refs


def text(value: Any) -> str:
    """`value` as a string that XML can hold."""
    if value is None:
        return ""
    if isinstance(value, dict | list | tuple):
        return to_json(value)
    return _NOT_XML.sub("\ufffd", str(value))


def _map(annotation_id: str, namespace: str, content: Mapping[str, Any]) -> ome.MapAnnotation:
    pairs = [ome.Map.M(k=text(k), value=text(v)) for k, v in content.items()]
    return ome.MapAnnotation(id=annotation_id, namespace=namespace, value=ome.Map(ms=pairs))


def _recovery_id(i: int, t: int, c: int, z: int) -> str:
    return f"Annotation:pair-{i}-{t}-{c}-{z}"


def link(images: Sequence[ImageLayout], *, derived: bool = False) -> Links:
    """Find the focus events of `images` and what else there is to annotate."""
    uses = _focus_uses(images)
    reasons = [why for image in images for why, _record in image.gaps.values()]
    statuses = {p[4] for use in uses for p in use.planes if p[4] and p[4] != "ok"}
    return Links(
        uses,
        {why: f"Annotation:gap-{why.replace(' ', '-')}" for why in dict.fromkeys(reasons)},
        {status: f"Annotation:status-{i}" for i, status in enumerate(sorted(statuses))},
        {
            (i, *at): frame
            for i, image in enumerate(images)
            for at, frame in sorted(image.frames.items())
            if frame.recovery is not None
        },
        derived,
        {(p[0], p[1], p[2], p[3]): (use.id, p[4]) for use in uses for p in use.planes},
    )


def _focus_uses(images: Sequence[ImageLayout]) -> list[_FocusUse]:
    found: dict[Any, _FocusUse] = {}
    planes: list[tuple[FrameRecord, int, PlaneIndex]] = []
    for i, image in enumerate(images):
        planes += [(frame, i, at) for at, frame in image.frames.items() if frame.focus]
        planes += [(r, i, at) for at, (_why, r) in image.gaps.items() if r and r.focus]
    # the page that comes first has the whole record
    planes.sort(key=lambda item: (item[0].tag_page < 0, item[0].tag_page, item[0].page))
    for frame, i, (t, c, z) in planes:
        focus = frame.focus or {}
        use = found.get(focus.get("focus_id"))
        if use is None:
            use = _FocusUse(len(found), focus, frame)
            found[focus.get("focus_id")] = use
        elif focus.get(REVISED, 0) > use.record.get(REVISED, 0):
            # a later frame showed more, also of those before it
            use.record = {**use.record, **focus}
            use.planes = [(*p[:4], _status(focus), p[5]) for p in use.planes]
        elif len(focus) > len(use.record):
            use.record = focus
        use.planes.append((i, t, c, z, _status(focus), finite(focus.get("age_s"))))
        use.images.add(i)
    return list(found.values())


def _status(focus: Focus) -> str | None:
    status = focus.get("status")
    return None if status is None else str(status)


def _focus_annotation(use: _FocusUse, facts: FileFacts) -> ome.MapAnnotation:
    record = {k: v for k, v in use.record.items() if k != "thumbnail"}
    if facts.brief:
        record.pop("curve", None)
    record["position"] = record.get("position") or use.first.name
    for axis in ("x_um", "y_um"):
        if record.get(axis) is None:
            record[axis] = getattr(use.first, axis)
    record["page"] = use.first.tag_page
    record["thumbnail"] = bool(use.record.get("thumbnail"))
    record["frames"] = use.planes
    plain = {k: v for k, v in record.items() if not isinstance(v, dict | list | tuple)}
    return _map(use.id, NAMESPACE, {**plain, "record": to_json(record)})


def _recovery_annotation(
    at: tuple[int, int, int, int], frame: FrameRecord
) -> ome.MapAnnotation:
    told = frame.recovery or {}
    keys: tuple[str, ...] = ("status", "kept", "reasons")
    content = {k: told[k] for k in keys if k in told}
    record = {**told, "image": at[0], "t": at[1], "c": at[2], "z": at[3]}
    return _map(_recovery_id(*at), f"{DERIVED}.pair", {**content, "record": to_json(record)})


def structured_annotations(
    header: Header, images: Sequence[ImageLayout], links: Links, facts: FileFacts
) -> ome.StructuredAnnotations:
    """Build all annotations of a file."""
    maps = [_focus_annotation(use, facts) for use in links.uses]
    maps += [
        _map(ref, f"{NAMESPACE}.missing", {"reason": why, "note": _GAP_NOTES[why]})
        for why, ref in links.gap_ids.items()
    ]
    maps += [_recovery_annotation(at, frame) for at, frame in links.recoveries.items()]
    maps += _file_annotations(header, images, facts)
    tags = [
        ome.TagAnnotation(id=ref, namespace=f"{NAMESPACE}.status", value=text(status))
        for status, ref in links.status_ids.items()
    ]
    return ome.StructuredAnnotations(map_annotations=maps, tag_annotations=tags)


def _file_annotations(
    header: Header, images: Sequence[ImageLayout], facts: FileFacts
) -> list[ome.MapAnnotation]:
    gaps = [reason for image in images for reason, _record in image.gaps.values()]
    file = {
        "images": [dict(image.key) for image in images],
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
    if header.derived is not None:
        brief = {k: v for k, v in header.derived.items() if k != "card"}
        derived = {**header.derived, "json": to_json(brief)}
        notes.append(_map(_DERIVED_ID, DERIVED, derived))
    if header.settings is not None:
        settings = {**header.settings, "json": to_json(header.settings)}
        notes.append(_map("Annotation:settings", f"{NAMESPACE}.settings", settings))
    if header.summary is not None and not facts.brief:
        content = {"summary_metadata_json": to_json(header.summary)}
        notes.append(_map("Annotation:summary", "pymmcore_plus", content))
    return notes
