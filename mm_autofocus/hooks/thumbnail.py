"""A small picture of a look, so that a report can show before and after."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from mm_autofocus.types import Image

__all__ = ["SIZE_PX", "detail_at", "thumbnail_png"]

SIZE_PX = 128
"""Largest side of the cut, in pixels."""


def detail_at(image: Image) -> tuple[int, int]:
    """Find the part of an image that shows most, be it out of focus.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``, any dtype.

    Returns
    -------
    (int, int)
        Left and top of the square of `SIZE_PX` with the largest variance, in pixels; of
        the middle one where all are alike.
    """
    grey = np.asarray(image if image.ndim == 2 else image[..., 1], np.float32)
    height, width = grey.shape
    size = (min(SIZE_PX, width), min(SIZE_PX, height))
    mean = cv2.boxFilter(grey, cv2.CV_32F, size, anchor=(0, 0))
    square = cv2.boxFilter(grey * grey, cv2.CV_32F, size, anchor=(0, 0))
    variance = (square - mean * mean)[: height - size[1] + 1, : width - size[0] + 1]
    centre = variance.shape[0] // 2, variance.shape[1] // 2
    best = np.unravel_index(int(variance.argmax()), variance.shape)
    # noise alone differs a little from place to place
    top, left = best if variance[best] > 1.5 * variance[centre] else centre
    return int(left), int(top)


def thumbnail_png(image: Image, at: tuple[int, int]) -> str:
    """Base64 of an 8-bit PNG of a part of `image`, at its own resolution.

    Not scaled down, because sharpness is what it is to show. Grey values are stretched
    between the 0.5 and 99.5 percentiles.

    Parameters
    ----------
    image : numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``, any dtype.
    at : (int, int)
        Left and top of the part, in pixels.

    Returns
    -------
    str
        ASCII.
    """
    left, top = at
    part = np.asarray(image[top : top + SIZE_PX, left : left + SIZE_PX])
    if part.dtype != np.uint8:
        grey = part.astype(np.float64)
        low, high = np.percentile(grey, (0.5, 99.5))
        scaled = (grey - low) / max(high - low, 1e-12)
        part = (np.clip(scaled, 0, 1) * 255).astype(np.uint8)
    if part.ndim == 3:
        part = part[..., ::-1]  # OpenCV writes BGR
    ok, png = cv2.imencode(".png", np.ascontiguousarray(part))
    return base64.b64encode(png.tobytes()).decode() if ok else ""
