"""A TIFF file that grows page by page and is whole after each of them.

tifffile writes the bytes. It links a page before it has written it; a process that is
killed in between would leave a link to nothing. :class:`PageFile` holds the link back
until the page is complete, so that at every moment the file is a valid TIFF of all the
pages committed so far.
"""

from __future__ import annotations

import errno
import functools
import importlib.util
import io
import math
import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tifffile

from mm_autofocus.ometiff.frames import PAGE_TAG

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

__all__ = [
    "COMPRESSIONS",
    "DTYPES",
    "PageFile",
    "PageWriter",
    "overwrite_description",
]

COMPRESSIONS: dict[str, int] = {"zlib": 8, "lzw": 5, "zstd": 50000}
"""Name → value of the TIFF tag."""

DTYPES: dict[str, str] = {
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "float32": "float",
    "float64": "double",
}
"""NumPy dtypes that OME knows → their OME names."""

_CLASSIC_LIMIT = 2**32 - 2**20
"""Classic TIFF counts bytes with 32 bits; keep room for the last tags and the OME-XML."""


class PageFile(io.FileIO):
    """File whose earlier part is changed only by `commit`, after the new part is there.

    Writes at or behind `committed` go straight to the operating system; writes before it
    (the link from the last page to the next) wait for `commit`, or are forgotten by
    `rollback`. Unbuffered: what was committed survives the death of the process.
    """

    def __init__(self, path: Path, mode: Literal["x+", "w+", "r+"]) -> None:
        super().__init__(path, mode)
        self.path = path
        self.committed = self.seek(0, os.SEEK_END)
        self._held: list[tuple[int, bytes]] = []

    def write(self, data: Buffer, /) -> int:
        """Write all of `data`, or hold it back if it changes what is committed."""
        view = memoryview(data).cast("B")
        position = self.tell()
        if position < self.committed:
            self._held.append((position, bytes(view)))
            self.seek(position + len(view))
        else:
            self._write_all(view)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        while len(view):
            view = view[super().write(view) or 0 :]

    def commit(self) -> None:
        """Make the pages written since the last commit part of the file."""
        end = self.seek(0, os.SEEK_END)
        for position, data in self._held:
            self.seek(position)
            self._write_all(memoryview(data))
        self._held.clear()
        self.committed = self.seek(end)

    def rollback(self) -> None:
        """Forget what was written since the last commit."""
        self._held.clear()
        self.truncate(self.committed)
        self.seek(self.committed)


class PageWriter:
    """Appends pages to one TIFF file; each is in the file when `add` returns.

    Parameters
    ----------
    path : Path
        The file.
    mode : {"new", "replace", "append"}
        ``append`` adds to an existing, whole TIFF.
    bigtiff : bool
        64-bit offsets. Ignored by ``append``.
    compression : str | None
        One of `COMPRESSIONS`.
    pages : int
        How many there are already, for ``append``.
    """

    def __init__(
        self,
        path: Path,
        *,
        mode: Literal["new", "replace", "append"] = "new",
        bigtiff: bool = False,
        compression: str | None = None,
        pages: int = 0,
    ) -> None:
        self.path = path
        self.pages = pages
        self._compression = compression
        self._open(mode, bigtiff)
        self.bigtiff = self._tiff.tiff.is_bigtiff

    def _open(self, mode: Literal["new", "replace", "append"], bigtiff: bool = False) -> None:
        modes: dict[str, Literal["x+", "w+", "r+"]] = {
            "new": "x+",
            "replace": "w+",
            "append": "r+",
        }
        self._file = PageFile(self.path, modes[mode])
        try:
            if mode == "append":
                self._file.seek(0)
                self._tiff = tifffile.TiffWriter(self._file, append="force", shaped=False)
            else:
                self._tiff = tifffile.TiffWriter(
                    self._file, bigtiff=bigtiff, ome=False, shaped=False
                )
            self._file.commit()
        except BaseException:
            self._file.close()
            if mode == "new":
                self.path.unlink()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it holds a file descriptor."""
        return not self._file.closed

    def add(
        self,
        image: npt.NDArray[Any],
        tag: str,
        *,
        description: bytes | None = None,
        pixel_size_um: float | None = None,
    ) -> int:
        """Append a page.

        Parameters
        ----------
        image : numpy.ndarray
            ``(Y, X)`` or ``(Y, X, 3)``.
        tag : str
            Value of the private tag, pure ASCII.
        description : bytes | None
            ImageDescription, UTF-8.
        pixel_size_um : float | None
            For the resolution tags.

        Returns
        -------
        int
            Index of the page.

        Raises
        ------
        OSError
            The disk is full or failed, or the file outgrew classic TIFF. The file is as
            it was before the call.
        """
        options: dict[str, Any] = {"description": description}
        if pixel_size_um:
            options["resolution"] = (_per_cm(pixel_size_um),) * 2
            options["resolutionunit"] = "CENTIMETER"
        return self._append(image, image.shape, image.dtype, tag, **options)

    def add_blank(self, shape: tuple[int, ...], dtype: str, tag: str) -> int:
        """Append a page of zeros; where the file system can, it takes no room.

        Raises
        ------
        OSError
            As `add`.
        """
        zeros = None
        if self._compression is not None:  # as the other pages: readers expect one way
            if importlib.util.find_spec("imagecodecs") is None:
                raise OSError(errno.ENOTSUP, "compressing needs the package imagecodecs")
            zeros = np.zeros(shape, dtype)
        return self._append(zeros, shape, np.dtype(dtype), tag)

    def _append(
        self,
        image: npt.NDArray[Any] | None,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        tag: str,
        **options: Any,
    ) -> int:
        if not self.is_open:
            self._open("append")
        size = math.prod(shape) * dtype.itemsize
        if not self.bigtiff and self._file.committed + size > _CLASSIC_LIMIT:
            raise OSError(
                errno.EFBIG, "a TIFF without bigtiff cannot grow beyond 4 GiB", str(self.path)
            )
        value = tag.encode("ascii") + b"\0"
        if image is None:
            options.update(shape=shape, dtype=dtype)  # tifffile leaves a hole in the file
        if self._compression is not None:
            options["compression"] = self._compression
            # differences compress better; readers agree on it only for small integers
            options["predictor"] = dtype in (np.dtype("u1"), np.dtype("u2"))
        if len(shape) == 3:
            options["planarconfig"] = "contig"
        done = False
        try:
            self._tiff.write(
                image,
                photometric="rgb" if len(shape) == 3 else "minisblack",
                metadata=None,
                software=False,
                contiguous=False,
                extratags=[(PAGE_TAG, 2, len(value), value, False)],
                **options,
            )
            self._file.commit()
            done = True
        finally:
            if not done:
                self._file.rollback()
        self.pages += 1
        return self.pages - 1

    def close(self) -> None:
        """Close the file; idempotent. The next `add` opens it again."""
        if self.is_open:
            self._tiff.close()
            self._file.close()


@functools.cache
def _per_cm(pixel_size_um: float) -> tuple[int, int]:
    """Pixels per centimetre as a fraction; tifffile would work it out for each page."""
    exact = Fraction(1e4 / pixel_size_um)
    most = 2**32 - 1  # both are 32-bit numbers in the file
    near = exact.limit_denominator(max(1, min(most, int(most / exact))))
    return near.numerator, near.denominator


def overwrite_description(path: Path, xml: bytes) -> None:
    """Give the first page of `path` another ImageDescription.

    In place where there is room, else at the end of the file. The tag points to the new
    text only when this is whole.

    Raises
    ------
    OSError
        There is no room for it. The old one is still there.
    """
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages.first.tags[270]
        layout = tif.byteorder + ("QQ" if tif.is_bigtiff else "II")
    value = xml + b"\0"
    with path.open("r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        where = tag.valueoffset if len(value) <= tag.count else size + size % 2
        done = False
        try:
            file.seek(where)
            view = memoryview(value)
            while view:
                view = view[file.write(view) :]
            done = True
        finally:
            if not done:
                file.truncate(size)
        file.seek(tag.offset + 4)  # behind the code and the type
        file.write(struct.pack(layout, len(value), where))
