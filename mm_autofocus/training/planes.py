"""Parts of planes, straight from the disk: a patch is read without its stack."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.ometiff.recovery import open_tiff

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.training.stack import Stack
    from mm_autofocus.types import Image

__all__ = ["PlaneReader", "max_value_of"]

_OPEN_FILES = 256
_PLANES_HELD = 8  # of files that cannot be mapped


class PlaneReader:
    """Reads parts of the planes of many stacks.

    Uncompressed pages are mapped into memory, so that only the rows asked for are read. Of
    others the whole plane is decoded, and the last few are held.
    """

    def __init__(self) -> None:
        self._offsets: dict[tuple[str, tuple[int, ...]], list[int | None]] = {}
        self._maps: OrderedDict[str, npt.NDArray[np.uint8]] = OrderedDict()
        self._planes: OrderedDict[tuple[str, int], Image] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_offsets": self._offsets}  # a worker opens its own files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._offsets = state["_offsets"]

    def crop(self, stack: Stack, plane: int, y: int, x: int, height: int, width: int) -> Image:
        """Read ``(height, width[, 3])`` of one plane; a view, not to be written to.

        Raises
        ------
        InputError
            The file is missing or damaged.
        """
        part = (slice(y, y + height), slice(x, x + width))
        offset = self._pages(stack)[plane]
        if offset is None:
            return self._decoded(stack, plane)[part]
        path = str(stack.folder / stack.file)
        mapped = self._maps.get(path)
        if mapped is None:
            try:
                mapped = np.memmap(path, np.uint8, "r")
            except (OSError, ValueError) as e:
                raise InputError(f"{path}: cannot be read ({e})") from None
            self._maps[path] = mapped
            if len(self._maps) > _OPEN_FILES:
                self._maps.popitem(last=False)
        else:
            self._maps.move_to_end(path)
        dtype, shape = np.dtype(stack.dtype), stack.shape[1:]
        size = dtype.itemsize * int(np.prod(shape))
        data = mapped[offset : offset + size]
        if len(data) < size:
            raise InputError(f"{path}: plane {plane} cannot be read (the file is cut off)")
        image: Image = np.asarray(data).view(dtype).reshape(shape)
        return image[part]

    def _pages(self, stack: Stack) -> list[int | None]:
        """Where each plane lies in the file; None where it cannot be mapped."""
        path = stack.folder / stack.file
        key = (str(path), stack.pages)
        if key not in self._offsets:
            with open_tiff(path) as tif:
                pages: Any = tif.pages
                found: list[int | None] = []
                for k in stack.pages:
                    try:
                        page = pages[k]
                        shape, dtype = tuple(page.shape), page.dtype
                        mappable = bool(page.is_memmappable)
                    except Exception as e:  # noqa: BLE001  (a damaged file can raise anything)
                        raise InputError(f"{path}: page {k} cannot be read ({e})") from None
                    if shape != stack.shape[1:] or dtype != np.dtype(stack.dtype):
                        raise InputError(f"{path}: page {k} is not what the index says of it")
                    found.append(page.dataoffsets[0] if mappable else None)
            self._offsets[key] = found
        return self._offsets[key]

    def _decoded(self, stack: Stack, plane: int) -> Image:
        key = (str(stack.folder / stack.file), plane)
        if key not in self._planes:
            self._planes[key] = stack.plane(plane)
            if len(self._planes) > _PLANES_HELD:
                self._planes.popitem(last=False)
        return self._planes[key]


def max_value_of(stack: Stack) -> float:
    """Value at which the camera of a stack saturates; 1 for floating point."""
    dtype = np.dtype(stack.dtype)
    if dtype.kind == "f":
        return 1.0
    full = np.iinfo(dtype).max
    return float(min(2**stack.bit_depth - 1, full) if stack.bit_depth else full)
