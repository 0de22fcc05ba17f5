"""Files whose writer was killed: what is in them, and how they are completed."""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import tifffile

from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.ometiff.annotations import FileFacts
from mm_autofocus.ometiff.finish import finish
from mm_autofocus.ometiff.frames import (
    NAMESPACE,
    PAGE_TAG,
    FrameRecord,
    Header,
    ImageKey,
    image_key,
)
from mm_autofocus.ometiff.layout import Plan
from mm_autofocus.ometiff.pages import COMPRESSIONS, PageWriter

__all__ = [
    "FileInfo",
    "Scan",
    "description_root",
    "link_of",
    "open_tiff",
    "read_info",
    "repair",
    "scan",
]

logger = logging.getLogger(__name__)

# what tifffile raises on bytes that are no page
_BROKEN = (
    tifffile.TiffFileError,
    struct.error,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    OSError,
    RuntimeError,
)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a file is, in short.

    Attributes
    ----------
    path : Path
        The file.
    complete : bool
        It was closed (or repaired). False: its writer was killed, or still writes.
    repaired : bool
        It was completed by `repair`.
    frames : int
        Frames really taken and readable.
    frames_planned : int | None
        None where the plan did not know.
    error : str
        The fault that ended the writing, "" if none.
    """

    path: Path
    complete: bool
    repaired: bool
    frames: int
    frames_planned: int | None
    error: str = ""

    @property
    def frames_missing(self) -> int:
        """Planned but not in the file, skipped ones included."""
        return max(0, (self.frames_planned or self.frames) - self.frames)


@dataclass(slots=True)
class Scan:
    """What the pages of a file say.

    Attributes
    ----------
    header : Header
        From the first page.
    frames, skipped : list of FrameRecord
        Real pages, and frames left out.
    blanks : dict
        Image → its page of zeros.
    end : int
        Where the last whole page ends, in bytes.
    link : int
        Where the last whole page says what follows it, in bytes.
    torn : bool
        Something follows that is no whole page.
    compression : str | None
        Of the pages.
    """

    header: Header
    frames: list[FrameRecord] = field(default_factory=list)
    skipped: list[FrameRecord] = field(default_factory=list)
    blanks: dict[ImageKey, int] = field(default_factory=dict)
    end: int = 0
    link: int = 0
    torn: bool = False
    compression: str | None = None


def open_tiff(path: str | os.PathLike[str]) -> tifffile.TiffFile:
    """Open a TIFF file to read.

    Raises
    ------
    InputError
        No such file, or not a TIFF with at least one page.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        tif = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        raise InputError(f"{path}: this is not a TIFF file") from None
    except _BROKEN as e:
        raise InputError(f"{path}: this file cannot be read ({e})") from None
    try:
        _ = tif.pages.first
    except _BROKEN:
        tif.close()
        raise InputError(f"{path}: there is not one complete frame in this file") from None
    return tif


def description_root(tif: tifffile.TiffFile) -> ET.Element | None:
    """Root of the OME-XML, or None if there is none that can be read."""
    tag = tif.pages.first.tags.get(270)
    if tag is None:
        return None
    try:
        return ET.fromstring(tag.value)
    except (ET.ParseError, TypeError, ValueError):
        return None


def annotation_maps(root: ET.Element | None) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield the map annotations as ``(id, namespace, content)``."""
    if root is None:
        return
    for element in root.iterfind("{*}StructuredAnnotations/{*}MapAnnotation"):
        pairs = element.iterfind("{*}Value/{*}M")
        content = {m.get("K", ""): m.text or "" for m in pairs}
        yield element.get("ID", ""), element.get("Namespace", ""), content


def find_map(root: ET.Element | None, namespace: str) -> dict[str, str] | None:
    """Content of the first map annotation in `namespace`."""
    return next((c for _id, ns, c in annotation_maps(root) if ns == namespace), None)


def is_complete(root: ET.Element | None) -> bool:
    """Whether this OME-XML is ours and final."""
    return (
        find_map(root, f"{NAMESPACE}.file") is not None
        and find_map(root, f"{NAMESPACE}.incomplete") is None
    )


def page_content(page: Any) -> dict[str, Any] | None:
    """What the private tag of a page says; None if it is not ours."""
    tag = page.tags.get(PAGE_TAG)
    if tag is None or not isinstance(tag.value, str):
        return None
    try:
        content = json.loads(tag.value)
    except ValueError:
        return None
    return content if isinstance(content, dict) and "mm_autofocus" in content else None


def not_ours(path: Path | str) -> InputError:
    """Make the error for a file of another program."""
    return InputError(f"{path}: this TIFF was not written by mm_autofocus; it has no record")


def scan(tif: tifffile.TiffFile) -> Scan:
    """Read the private tags of all pages, up to the first page that is not whole.

    Raises
    ------
    InputError
        The file is not ours.
    """
    content = page_content(tif.pages.first)
    if content is None or "header" not in content:
        raise not_ours(tif.filehandle.path)
    found = Scan(Header.from_dict(content["header"]))
    code = int(tif.pages.first.compression)
    found.compression = next((name for name, v in COMPRESSIONS.items() if v == code), None)
    size = tif.filehandle.size
    index = 0
    while True:
        try:
            page = tif.pages[index]
            content = page_content(page)
            end = _end_of(page, size)
        except IndexError:
            return found
        except _BROKEN:
            content = end = None
        if content is None or end is None:
            found.torn = True
            return found
        _take(found, page, content, index)
        found.end = max(found.end, end)
        found.link = link_of(tif.filehandle, tif.tiff, page.offset)
        index += 1


def _take(found: Scan, page: Any, content: dict[str, Any], index: int) -> None:
    for data in content.get("skipped", ()):
        left = FrameRecord.from_dict(data)
        left.tag_page = index
        found.skipped.append(left)
    if "frame" not in content:
        found.blanks[image_key(content.get("blank_of", {}))] = index
        return
    frame = FrameRecord.from_dict(content["frame"])
    frame.shape, frame.dtype = tuple(page.shape), page.dtype.name
    frame.page = frame.tag_page = index
    found.frames.append(frame)


def _end_of(page: Any, size: int) -> int | None:
    """Where `page` ends in the file; None if part of it is not there."""
    counts = page.databytecounts
    if page.dtype is None or not counts or len(counts) != len(page.dataoffsets):
        return None
    ends = [o + n for o, n in zip(page.dataoffsets, counts, strict=True)]
    if min(counts) <= 0 or max(ends) > size:
        return None
    for tag in page.tags:
        end = tag.valueoffset + tag.valuebytecount
        if tag.code == 270:
            end = min(end, size)  # a torn OME-XML is written anew
        ends.append(end)
    return None if max(ends) > size else max(ends)


def link_of(file: Any, tiff: tifffile.TiffFormat, offset: int) -> int:
    """Where the IFD at `offset` of an open file holds the offset of the next one."""
    file.seek(offset)
    (count,) = struct.unpack(tiff.tagnoformat, file.read(tiff.tagnosize))
    return offset + int(tiff.tagnosize) + int(count) * int(tiff.tagsize)


def read_info(path: str | os.PathLike[str]) -> FileInfo:
    """Say what is in a file; for one that was not closed, by looking at its pages.

    Raises
    ------
    InputError
        There is no such file, it is no TIFF, or it is not ours.
    """
    with open_tiff(path) as tif:
        root = description_root(tif)
        facts = find_map(root, f"{NAMESPACE}.file")
        if facts is not None and is_complete(root):
            planned = facts.get("frames_planned", "")
            return FileInfo(
                Path(path),
                complete=True,
                repaired=bool(facts.get("repaired")),
                frames=int(facts.get("frames", 0)),
                frames_planned=int(planned) if planned else None,
                error=facts.get("error", ""),
            )
        found = scan(tif)
    return FileInfo(
        Path(path),
        complete=False,
        repaired=False,
        frames=len(found.frames),
        frames_planned=found.header.frames_planned,
    )


def plan_of(header: Header) -> Plan | None:
    """The frames that the plan in the header asks for; None if it cannot be read."""
    if header.plan is None:
        return None
    import useq
    from pydantic import ValidationError

    try:
        sequence = useq.MDASequence.model_validate(header.plan)
    except ValidationError as e:
        logger.warning("the plan in the file cannot be read: %s", e)
        return None
    plan = Plan.from_sequence(sequence, header.n_cameras)
    return None if plan is None else plan.only(header.only)


def repair(path: str | os.PathLike[str]) -> FileInfo:
    """Complete a file whose writer was killed; one that is complete stays as it is.

    Bytes after the last whole page are cut off, and the OME-XML is written from what the
    pages say. No frame is touched.

    Raises
    ------
    InputError
        There is no such file, it is no TIFF, it is not ours, or it holds no frame.
    HardwareError
        It cannot be written to.
    """
    path = Path(path)
    with open_tiff(path) as tif:
        if is_complete(description_root(tif)):
            return read_info(path)
        found = scan(tif)
        zero = b"\0" * tif.tiff.offsetsize
    if not found.frames:
        raise InputError(f"{path}: there is not one complete frame in this file")
    facts = FileFacts(repaired=datetime.now(UTC).isoformat(timespec="seconds"))
    try:
        with path.open("r+b", buffering=0) as file:
            file.seek(found.link)
            file.write(zero)
            file.truncate(found.end)
        finish(
            PageWriter(
                path,
                mode="append",
                compression=found.compression,
                pages=len(found.frames) + len(found.blanks),
            ),
            found.header,
            found.frames,
            skipped=found.skipped,
            plan=plan_of(found.header),
            facts=facts,
            blanks=found.blanks,
        )
    except OSError as e:
        raise HardwareError(f"{path}: cannot be repaired: {e}") from e
    return read_info(path)
