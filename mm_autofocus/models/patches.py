"""From a frame to what a net is shown: a grid of patches, and a small mosaic of them.

Training and run time share this module, so that a net sees at night what it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["CELL_PX", "cut", "grid", "mosaic", "stack_looks", "starts"]

CELL_PX = 56
"""Edge of one patch in the mosaic."""


def starts(length: int, patch_px: int) -> npt.NDArray[np.intp]:
    """Where patches begin along an axis: as few as cover it all, evenly spaced."""
    if length < patch_px:
        raise InputError(f"frame: {length} pixels are less than one patch of {patch_px}")
    n = -(-length // patch_px)
    return np.linspace(0, length - patch_px, n).round().astype(np.intp)


def grid(shape: Sequence[int], patch_px: int) -> npt.NDArray[np.intp]:
    """Upper left corners of the patches that cover a frame.

    Neighbours overlap where the frame is no multiple of the patch, so that nothing at its
    rim is missed: 2016 pixels make 9 patches of 224 along an axis, 512 make 3.

    Parameters
    ----------
    shape : sequence of int
        ``(Y, X, ...)`` of the frame.
    patch_px : int
        Edge of a patch.

    Returns
    -------
    numpy.ndarray
        ``(rows, columns, 2)`` of y, x.

    Raises
    ------
    InputError
        The frame is smaller than one patch.
    """
    y, x = starts(shape[0], patch_px), starts(shape[1], patch_px)
    return np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1)


def stack_looks(images: Sequence[Image], max_value: float) -> Real:
    """Lay looks on top of each other as channels, look by look, scaled to 0 … 1.

    Parameters
    ----------
    images : sequence of numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)`` of equal shape, in the order of the model's looks.
    max_value : float
        Value at which the camera saturates.

    Returns
    -------
    numpy.ndarray
        ``(C, Y, X)`` float32.
    """
    planes: list[Real] = []
    for image in images:
        scaled = np.asarray(image, np.float32) * np.float32(1 / max_value)
        planes += [scaled] if scaled.ndim == 2 else list(np.moveaxis(scaled, -1, 0))
    return np.stack(planes)


def cut(frame: Real, corners: npt.NDArray[np.intp], patch_px: int) -> Real:
    """Cut patches ``(N, C, P, P)`` out of ``(C, Y, X)`` at corners ``(N, 2)`` of y, x."""
    out = np.empty((len(corners), frame.shape[0], patch_px, patch_px), np.float32)
    for k, (y, x) in enumerate(corners):
        out[k] = frame[:, y : y + patch_px, x : x + patch_px]
    return out


def mosaic(frame: Real, patch_px: int) -> Real:
    """Shrink the patches of a frame and lay them side by side as they lie in the grid.

    Where the frame is a multiple of the patch, it is the frame itself, shrunk by area.

    Parameters
    ----------
    frame : numpy.ndarray
        ``(C, Y, X)``, as from `stack_looks`.
    patch_px : int
        Edge of a patch.

    Returns
    -------
    numpy.ndarray
        ``(C, rows · CELL_PX, columns · CELL_PX)`` float32.
    """
    corners = grid(frame.shape[1:], patch_px)
    rows, columns = corners.shape[:2]
    out = np.empty((frame.shape[0], rows * CELL_PX, columns * CELL_PX), np.float32)
    whole = frame.shape[1:] == (rows * patch_px, columns * patch_px)
    for c, plane in enumerate(frame):
        if whole:
            size = (columns * CELL_PX, rows * CELL_PX)
            out[c] = cv2.resize(plane, size, interpolation=cv2.INTER_AREA)
            continue
        for i in range(rows):
            for j in range(columns):
                y, x = corners[i, j]
                patch = plane[y : y + patch_px, x : x + patch_px]
                out[c, i * CELL_PX : (i + 1) * CELL_PX, j * CELL_PX : (j + 1) * CELL_PX] = (
                    cv2.resize(patch, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA)
                )
    return out
