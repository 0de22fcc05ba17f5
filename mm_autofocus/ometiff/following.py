"""The pages of a file of ours one by one, also while the file is still being written."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tifffile

from mm_autofocus.errors import InputError
from mm_autofocus.ometiff.frames import FrameRecord, Header
from mm_autofocus.ometiff.recovery import link_of, not_ours, open_tiff, page_content

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["Follower", "PageAt", "frame_of", "is_ours", "read_page"]


@dataclass(frozen=True, slots=True)
class PageAt:
    """Where the pixels of a plane are.

    Attributes
    ----------
    path : str
        The file.
    offset : int
        Of the page's directory in it, in bytes.
    """

    path: str
    offset: int


def is_ours(tif: tifffile.TiffFile) -> bool:
    """Whether a file was written by mm_autofocus and its pages still say so."""
    return "header" in (page_content(tif.pages.first) or {})


def frame_of(page: Any, content: dict[str, Any]) -> FrameRecord | None:
    """The record of a page; None of a page of zeros."""
    if "frame" not in content:
        return None
    frame = FrameRecord.from_dict(content["frame"])
    frame.shape, frame.dtype = tuple(page.shape), page.dtype.name
    return frame


class Follower:
    """Reads the pages of a file in their order, each once; none of them stays in memory.

    A page of ours is linked from the one before only when it is whole: what is found is
    there, whether or not the file is still being written.

    Parameters
    ----------
    path : path
        A file with at least one page.

    Attributes
    ----------
    header : Header
        Of the file.
    skipped : list of FrameRecord
        The frames left out, as far as the pages read so far say so.

    Raises
    ------
    InputError
        There is no such file, it is no TIFF, or it is not ours.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.skipped: list[FrameRecord] = []
        self._link: int | None = None
        with open_tiff(self.path) as tif:
            content = page_content(tif.pages.first)
            if content is None or "header" not in content:
                raise not_ours(self.path)
            self.header = Header.from_dict(content["header"])

    def new(self) -> Iterator[tuple[FrameRecord, PageAt]]:
        """Yield the frames that were written since the last call, and where they are."""
        with open_tiff(self.path) as tif:
            tiff, first = tif.tiff, tif.pages.first.offset
        # Unbuffered: a buffer would hold what follows a page as it was before it was written.
        # For the same reason the pages are read from a file that is opened after this.
        with self.path.open("rb", buffering=0) as file:
            offsets = list(self._linked(file, tiff, first))
        with open_tiff(self.path) as tif:
            for offset in offsets:
                page = _page_at(tif, offset)
                content = page_content(page)
                if content is None:
                    raise InputError(
                        f"{self.path}: another program has added pages to this file; they "
                        "have no record"
                    )
                for left in content.get("skipped", ()):
                    self.skipped.append(_light(FrameRecord.from_dict(left)))
                frame = frame_of(page, content)
                if frame is not None:
                    yield _light(frame), PageAt(str(self.path.absolute()), offset)

    def _linked(self, file: Any, tiff: tifffile.TiffFormat, first: int) -> Iterator[int]:
        """The pages that have been linked since, by where they are."""
        size, offset = int(tiff.offsetsize), first
        while True:
            if self._link is not None:
                file.seek(self._link)
                data = file.read(size)
                offset = struct.unpack(tiff.offsetformat, data)[0] if len(data) == size else 0
            if not offset:
                return
            self._link = link_of(file, tiff, offset)
            yield offset


def _light(frame: FrameRecord) -> FrameRecord:
    """Without the picture, which only the report of the raw file shows."""
    if frame.focus is not None:
        frame.focus = {k: v for k, v in frame.focus.items() if not k.startswith("thumbnail")}
    return frame


def _page_at(tif: tifffile.TiffFile, offset: int) -> tifffile.TiffPage:
    tif.filehandle.seek(offset)
    return tifffile.TiffPage(tif, index=0)


def read_page(at: PageAt) -> npt.NDArray[Any]:
    """Read the pixels of a page, ``(Y, X)`` or ``(Y, X, 3)``.

    Raises
    ------
    InputError
        The file is not there or cannot be read, or the page is something else.
    """
    with open_tiff(at.path) as tif:
        try:
            page = _page_at(tif, at.offset)
            data: npt.NDArray[Any] = page.asarray()
        except Exception as e:  # a codec can raise anything
            raise InputError(f"{at.path}: a plane of this file cannot be read ({e})") from e
    if page.axes == "SYX":
        data = data.transpose(1, 2, 0)
    if data.ndim not in (2, 3) or (data.ndim == 3 and data.shape[2] != 3):
        shape = " × ".join(map(str, data.shape))
        raise InputError(f"{at.path}: planes must be grey or RGB, not {shape}")
    return data
