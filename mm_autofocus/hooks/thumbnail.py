"""A small picture of a look, so that a report can show before and after."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from mm_autofocus.types import Image

__all__ = ["thumbnail_png"]


def thumbnail_png(image: Image, size_px: int = 128) -> str:
    """Base64 of an 8-bit PNG of the centre of `image`, at its own resolution.

    Not scaled down, because sharpness is what it is to show. Grey values are stretched
    between the 0.5 and 99.5 percentiles.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``, any dtype.
    size_px : int, optional
        Largest side of the cut, in pixels.

    Returns
    -------
    str
        ASCII.
    """
    height, width = image.shape[:2]
    top, left = max(0, (height - size_px) // 2), max(0, (width - size_px) // 2)
    part = np.asarray(image[top : top + size_px, left : left + size_px])
    if part.dtype != np.uint8:
        grey = part.astype(np.float64)
        low, high = np.percentile(grey, (0.5, 99.5))
        scaled = (grey - low) / max(high - low, 1e-12)
        part = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    if part.ndim == 3:
        part = part[..., ::-1]  # OpenCV writes BGR
    ok, png = cv2.imencode(".png", np.ascontiguousarray(part))
    return base64.b64encode(png.tobytes()).decode() if ok else ""
