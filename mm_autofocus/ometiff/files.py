"""The files of one run, as the writer thread sees them: begin, write, finish."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mm_autofocus.ometiff.annotations import FileFacts
from mm_autofocus.ometiff.finish import finish, page_tag
from mm_autofocus.ometiff.frames import REVISED, Focus, FrameRecord, Header
from mm_autofocus.ometiff.layout import Plan
from mm_autofocus.ometiff.pages import PageWriter
from mm_autofocus.ometiff.preliminary import first_description

__all__ = ["SUFFIXES", "FileSet", "Naming"]

logger = logging.getLogger(__name__)

SUFFIXES = (".ome.tif", ".ome.tiff")

_CLASSIC_BYTES = int(3.9 * 2**30)
"""Above this, and where the length is not known, the file is a BigTIFF."""

_MOST_OPEN = 128
"""Files kept open at once, if split by position; systems allow about 1000 in all."""

_VARYING = ("focus_id", "status", "age_s")
_ONCE = ("curve", "thumbnail", "thumbnail_xy")


@dataclass(frozen=True, slots=True)
class Naming:
    """Which files a run writes.

    Attributes
    ----------
    path : Path
        As the user gave it.
    split : bool
        One file per position.
    """

    path: Path
    split: bool = False

    def file(self, position: int | None) -> Path:
        """Path of the file with this position; None: of the only file."""
        if position is None:
            return self.path
        stem, suffix = self._parts()
        return self.path.with_name(f"{stem}_p{position:04d}{suffix}")

    def part(self, frame: FrameRecord) -> int | None:
        """Position whose file takes `frame`; None: the only file."""
        return frame.at("p") if self.split else None

    def existing(self) -> list[Path]:
        """Files that are there now and that a run could overwrite or be mixed with."""
        if not self.split:
            return [self.path] if self.path.exists() else []
        stem, suffix = self._parts()
        start, end = f"{stem}_p", len(suffix)
        return [
            p
            for p in sorted(self.path.parent.iterdir())
            if p.name.startswith(start)
            and p.name.endswith(suffix)
            and p.name[len(start) : -end].isdigit()
        ]

    def _parts(self) -> tuple[str, str]:
        name = self.path.name
        suffix = next(s for s in SUFFIXES if name.lower().endswith(s))
        return name[: -len(suffix)], name[-len(suffix) :]


@dataclass(slots=True)
class _File:
    """One file under way. The first `said` of `skipped` are recorded in its pages."""

    path: Path
    header: Header
    plan: Plan | None
    writer: PageWriter
    frames: list[FrameRecord] = field(default_factory=list)
    skipped: list[FrameRecord] = field(default_factory=list)
    said: int = 0
    focus_ids: dict[Any, int] = field(default_factory=dict)


class FileSet:
    """Writes frames to the files of a run.

    Parameters
    ----------
    naming : Naming
        Of the files.
    header : Header
        Of the run; each file gets a copy of its own.
    plan : Plan | None
        Of the run.
    overwrite : bool
        Remove what is there, when the first frame arrives.
    compression : str | None
        Of the pages.
    bigtiff : bool | None
        None: as needed.
    frames : int | None
        How many there will be, where there is no plan that says it.
    """

    def __init__(
        self,
        naming: Naming,
        header: Header,
        plan: Plan | None,
        *,
        overwrite: bool,
        compression: str | None,
        bigtiff: bool | None,
        frames: int | None = None,
    ) -> None:
        self._naming = naming
        self._header = header
        self._plan = plan
        self._overwrite = overwrite
        self._compression = compression
        self._bigtiff = bigtiff
        self._frames = frames
        self._files: dict[int | None, _File] = {}
        self._homeless: list[FrameRecord] = []  # skipped before their file was begun

    @property
    def paths(self) -> list[Path]:
        """Files begun, in that order."""
        return [file.path for file in list(self._files.values())]

    def skip(self, frame: FrameRecord) -> None:
        """Note a frame that is left out; the next page will say so."""
        file = self._files.get(self._naming.part(frame))
        (self._homeless if file is None else file.skipped).append(frame)

    def write(self, image: npt.NDArray[Any], frame: FrameRecord) -> None:
        """Write one frame; it is with the operating system on return.

        Raises
        ------
        OSError
            It is not in the file; all before it are.
        """
        part = self._naming.part(frame)
        file = self._files.get(part)
        header, description = None, None
        if file is None:
            file = self._begin(part, image.nbytes)
            header = file.header
            description = first_description(header, frame, header.frames_planned)
        unsaid = file.skipped[file.said :]
        focus_ids = dict(file.focus_ids)
        for record in (frame, *unsaid):
            record.focus = _once(record.focus, focus_ids)
        frame.page = file.writer.add(
            image,
            page_tag(frame, header=header, skipped=unsaid),
            description=description,
            pixel_size_um=frame.pixel_size_um or file.header.pixel_size_um,
        )
        for record in (frame, *unsaid):
            record.tag_page = frame.page
            if record.focus is not None and record.focus.get("thumbnail"):
                record.focus["thumbnail"] = True  # the page has it; memory is bounded
        file.focus_ids, file.said = focus_ids, len(file.skipped)
        file.frames.append(frame)
        if self._naming.split:
            self._close_others(file)

    def finish(self, error: str = "") -> OSError | None:
        """Complete all files.

        Parameters
        ----------
        error : str
            The fault that ended the writing, if one did.

        Returns
        -------
        OSError | None
            Why a file could not be completed.
        """
        if self._files:
            for position in sorted({frame.at("p") for frame in self._homeless}):
                path = self._naming.file(position)
                logger.warning("%s: there is no such file: all frames were skipped", path)
        unfinished: OSError | None = None
        for part, file in list(self._files.items()):
            if not file.frames:  # its first page failed: there is nothing in it
                file.writer.close()
                file.path.unlink()
                del self._files[part]
                continue
            try:
                finish(
                    file.writer,
                    file.header,
                    file.frames,
                    skipped=file.skipped,
                    unsaid=file.skipped[file.said :],
                    plan=file.plan,
                    facts=FileFacts(error=error),
                )
            except OSError as e:
                unfinished = unfinished or e
        return unfinished

    def abandon(self) -> None:
        """Close and remove all files."""
        for file in self._files.values():
            file.writer.close()
            file.path.unlink(missing_ok=True)
        self._files.clear()

    def _begin(self, part: int | None, frame_bytes: int) -> _File:
        if self._overwrite and not self._files:
            for old in self._naming.existing():
                old.unlink()
        only = {**(self._header.only or {}), **({} if part is None else {"p": part})} or None
        plan = None if self._plan is None else self._plan.only(only)
        planned = self._frames if plan is None else len(plan)
        header = replace(
            self._header, uuid=f"urn:uuid:{uuid.uuid4()}", frames_planned=planned, only=only
        )
        big = self._bigtiff
        if big is None:
            big = planned is None or planned * (frame_bytes + 4096) > _CLASSIC_BYTES
        path = self._naming.file(part)
        writer = PageWriter(path, bigtiff=big, compression=self._compression)
        file = self._files[part] = _File(path, header, plan, writer)
        file.skipped = [s for s in self._homeless if self._naming.part(s) == part]
        self._homeless = [s for s in self._homeless if self._naming.part(s) != part]
        return file

    def _close_others(self, current: _File) -> None:
        """Keep the number of open files bounded; one that is needed again is reopened."""
        opened = [f for f in self._files.values() if f.writer.is_open]
        for file in opened[: max(0, len(opened) - _MOST_OPEN)]:
            if file is not current:
                file.writer.close()


def _once(focus: Focus | None, seen: dict[Any, int]) -> Focus | None:
    """`focus` whole where it is new to `seen`, else only what may vary by frame.

    One that was revised since it was seen is told again, but for its pictures and looks.
    """
    if focus is None:
        return None
    focus_id, revised = focus["focus_id"], int(focus.get(REVISED) or 0)
    told = seen.get(focus_id)
    if told == revised:
        return _varying(focus)
    seen[focus_id] = revised
    if told is None:
        return dict(focus)
    return {k: v for k, v in focus.items() if k not in _ONCE}


def _varying(focus: Mapping[str, Any]) -> Focus:
    return {k: focus[k] for k in _VARYING if k in focus}
