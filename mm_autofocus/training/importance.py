"""Where in a field the specimen is: from its sharpest plane, by what blur takes away.

What the paper calls content richness. A window of 8 × 8 pixels carries specimen if its
variance in focus is above the camera's noise, as `mm_autofocus.training.label` measures it
for a whole field, and is larger than out of focus: dust on the camera is as sharp there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np

from mm_autofocus.measure import FocusMeasure, noise_variance
from mm_autofocus.training.label import LEAST_NOISE, local_variance
from mm_autofocus.training.stack import Stack

if TYPE_CHECKING:
    import numpy.typing as npt

    Mask: TypeAlias = npt.NDArray[np.bool_]
    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["WINDOW", "content_map", "content_maps", "importance_of", "share"]

WINDOW = 8
"""Edge of a window of the map, in pixels."""

_SHARPER = 1.3  # variance in focus over that at the ends

_HALF = 0.002  # share of a patch at which its importance is 1/2


def content_map(stack: Stack, measure: FocusMeasure | None = None) -> Mask:
    """Which windows of a field carry specimen, ``(Y // 8, X // 8)``.

    Nothing of a blank field does, and nothing is known of one without a label but blank.
    """
    rows, columns = stack.shape[1] // WINDOW, stack.shape[2] // WINDOW
    if not stack.labelled:
        return np.zeros((rows, columns), bool)
    measure = measure or FocusMeasure()
    order = np.argsort(stack.z_um)
    best = int(np.abs(stack.defocus_um).argmin())
    variance, noise = [], np.inf
    for k in (best, int(order[0]), int(order[-1])):
        grey = measure.grey(stack.plane(k)).astype(np.float32)
        root = np.sqrt(np.maximum(grey, 0))
        variance.append(local_variance(root))
        noise = min(noise, noise_variance(root))
    sharp, ends = variance[0], np.minimum(variance[1], variance[2])
    mask = (sharp > max(noise, LEAST_NOISE)) & (sharp > _SHARPER * ends)
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    return np.asarray(closed, bool)


def content_maps(
    stacks: Iterable[Stack], cache: Path | None = None, threads: int = 2
) -> dict[tuple[Any, ...], Mask]:
    """Maps of many stacks by their key, from `cache` (an ``.npz``) as far as it has them."""
    stacks = list(stacks)
    names = {s.key: "|".join(map(str, s.key)) for s in stacks}
    known: Mapping[str, npt.NDArray[np.uint8]] = {}
    if cache is not None and cache.is_file():
        with np.load(cache) as data:
            known = dict(data)
    todo = [s for s in stacks if names[s.key] not in known]
    with ThreadPoolExecutor(threads) as pool:
        new = dict(zip((s.key for s in todo), pool.map(content_map, todo), strict=True))
    maps: dict[tuple[Any, ...], Mask] = {}
    for s in stacks:
        shape = (s.shape[1] // WINDOW, s.shape[2] // WINDOW)
        if s.key in new:
            maps[s.key] = new[s.key]
        else:
            bits = np.unpackbits(known[names[s.key]], count=shape[0] * shape[1])
            maps[s.key] = bits.astype(bool).reshape(shape)
    if cache is not None and new:
        packed = {names[key]: np.packbits(mask) for key, mask in maps.items()}
        np.savez_compressed(cache, **packed)  # type: ignore[arg-type]
    return maps


def share(mask: Mask, corners: npt.NDArray[np.intp], patch_px: int) -> Real:
    """Part of each patch that carries specimen, ``(N,)``, for corners ``(N, 2)`` of y, x."""
    total = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    total[1:, 1:] = mask.cumsum(0).cumsum(1)
    corners = np.asarray(corners).reshape(-1, 2)
    low = np.minimum(np.rint(corners / WINDOW).astype(int), np.array(mask.shape) - 1)
    high = np.rint((corners + patch_px) / WINDOW).astype(int)
    high = np.maximum(np.minimum(high, mask.shape), low + 1)
    (y0, x0), (y1, x1) = low.T, high.T
    inside = total[y1, x1] - total[y0, x1] - total[y1, x0] + total[y0, x0]
    return np.asarray(inside / ((y1 - y0) * (x1 - x0)), np.float32)


def importance_of(content: Real) -> Real:
    """Importance of patches of which this part carries specimen: ``c / (c + 0.002)``.

    0.8, the threshold at which a patch is looked at, is reached by 0.8 % of it, one cell in a
    patch of 224 pixels; from there it rises slowly, so that of many the richest come first. So
    little decides between nothing and something that a net, which is never quite sure of the
    share, still puts all but the emptiest patches above the threshold.
    """
    content = np.asarray(content, np.float32)
    return np.asarray(content / (content + np.float32(_HALF)), np.float32)
