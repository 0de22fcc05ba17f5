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

from mm_autofocus.ometiff.frames import NAMESPACE, Focus, FrameRecord, Header, finite, to_json
from mm_autofocus.ometiff.layout import Gap, ImageLayout, PlaneIndex

__all__ = ["FileFacts", "Links", "link", "structured_annotations", "text"]

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

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
    """

    uses: list[_FocusUse]
    gap_ids: dict[Gap, str]
    status_ids: dict[str, str]
    _by_plane: dict[tuple[int, int, int, int], str] = field(default_factory=dict)

    def of_image(self, i: int, image: ImageLayout) -> list[str]:
        """Annotations of image number `i`."""
        reasons = dict.fromkeys(why for why, _record in image.gaps.values())
        uses = [use.id for use in self.uses if i in use.images]
        return uses + [self.gap_ids[why] for why in reasons]

    def of_plane(
        self, i: int, at: PlaneIndex, record: FrameRecord | None, gap: Gap | None = None
    ) -> list[str]:
        """Annotations of plane `at` in image number `i`."""
        refs = [] if gap is None else [self.gap_ids[gap]]
        if (use := self._by_plane.get((i, *at))) is not None:
            refs.append(use)
        if record is not None and record.focus is not None:
            status = record.focus.get("status")
            if isinstance(status, str) and status in self.status_ids:
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


def link(images: Sequence[ImageLayout]) -> Links:
    """Find the focus events of `images` and what else there is to annotate."""
    uses = _focus_uses(images)
    reasons = [why for image in images for why, _record in image.gaps.values()]
    statuses = {p[4] for use in uses for p in use.planes if p[4] and p[4] != "ok"}
    return Links(
        uses,
        {why: f"Annotation:gap-{why.replace(' ', '-')}" for why in dict.fromkeys(reasons)},
        {status: f"Annotation:status-{i}" for i, status in enumerate(sorted(statuses))},
        {(p[0], p[1], p[2], p[3]): use.id for use in uses for p in use.planes},
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
        elif len(focus) > len(use.record):
            use.record = focus
        age = finite(focus.get("age_s"))
        status = focus.get("status")
        use.planes.append((i, t, c, z, None if status is None else str(status), age))
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
    record["page"] = use.first.tag_page
    record["thumbnail"] = bool(use.record.get("thumbnail"))
    record["frames"] = use.planes
    plain = {k: v for k, v in record.items() if not isinstance(v, dict | list | tuple)}
    return _map(use.id, NAMESPACE, {**plain, "record": to_json(record)})


def structured_annotations(
    header: Header, images: Sequence[ImageLayout], links: Links, facts: FileFacts
) -> ome.StructuredAnnotations:
    """Build all annotations of a file."""
    maps = [_focus_annotation(use, facts) for use in links.uses]
    maps += [
        _map(ref, f"{NAMESPACE}.missing", {"reason": why, "note": _GAP_NOTES[why]})
        for why, ref in links.gap_ids.items()
    ]
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
    if header.settings is not None:
        settings = {**header.settings, "json": to_json(header.settings)}
        notes.append(_map("Annotation:settings", f"{NAMESPACE}.settings", settings))
    if header.summary is not None and not facts.brief:
        content = {"summary_metadata_json": to_json(header.summary)}
        notes.append(_map("Annotation:summary", "pymmcore_plus", content))
    return notes
