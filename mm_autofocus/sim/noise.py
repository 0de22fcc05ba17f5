"""Random fields and random objects that are fixed to the specimen, however it is looked at.

Everything is computed from a hash of integer coordinates and a seed, so a point of the
unbounded slide has the same value in every tile that contains it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import cv2
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]
    Coordinates: TypeAlias = npt.NDArray[np.floating[Any]]

__all__ = ["cell_rng", "lattice", "noise", "noise_at", "smoothstep", "warped_noise"]

# Standard deviation of cubic B-spline noise of uniform values in [-1, 1]: sqrt(1/3)·151/315.
_SD = math.sqrt(1 / 3) * 151 / 315


def _mix(h: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Finish a 32-bit hash (the last steps of MurmurHash3)."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def lattice(seed: int, ix: npt.NDArray[np.int64], iy: npt.NDArray[np.int64]) -> Real:
    """Uniform values in [-1, 1) at the integer points `iy` × `ix`, ``(len(iy), len(ix))``."""
    salt = np.uint32((seed * 0x9E3779B1) & 0xFFFFFFFF)
    hx = _mix(ix.astype(np.uint32) * np.uint32(0xCC9E2D51) ^ salt)
    hy = _mix(iy.astype(np.uint32) * np.uint32(0x1B873593) + salt)
    h = _mix(hx[None, :] ^ (hy[:, None] * np.uint32(5) + np.uint32(0xE6546B64)))
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2 / 2**24) - np.float32(1)


def _weights(t: Coordinates) -> list[Real]:
    """Weights of the four control points of a cubic B-spline at the fraction `t`."""
    t2, t3 = t * t, t * t * t
    parts = ((1 - t) ** 3, 3 * t3 - 6 * t2 + 4, -3 * t3 + 3 * t2 + 3 * t + 1, t3)
    return [(p / 6).astype(np.float32) for p in parts]


def noise(seed: int, scale_um: float, x: Coordinates, y: Coordinates) -> Real:
    """Smooth noise of mean 0 and standard deviation 1 on the grid `y` × `x`.

    Parameters
    ----------
    seed : int
        Another seed, another field.
    scale_um : float
        Distance between the points of its lattice; its finest detail. Detail that the
        grid cannot carry fades out.
    x, y : numpy.ndarray
        ``(X,)`` and ``(Y,)`` coordinates in µm, rising.

    Returns
    -------
    numpy.ndarray
        ``(Y, X)`` float32.
    """
    pitch = abs(float(x[1] - x[0])) if len(x) > 1 else 0.0
    gain = min(max((scale_um / pitch - 1.0) / 0.6, 0.0), 1.0) if pitch else 1.0
    if gain == 0:
        return np.zeros((len(y), len(x)), np.float32)
    gx, gy = x / scale_um, y / scale_um
    ix, iy = np.floor(gx).astype(np.int64), np.floor(gy).astype(np.int64)
    values = lattice(
        seed, np.arange(ix.min() - 1, ix.max() + 3), np.arange(iy.min() - 1, iy.max() + 3)
    )
    jx, jy = ix - ix.min(), iy - iy.min()
    rows = np.zeros((values.shape[0], len(x)), np.float32)
    for b, w in enumerate(_weights(gx - ix)):
        rows += values[:, jx + b] * w
    out = np.zeros((len(y), len(x)), np.float32)
    for a, w in enumerate(_weights(gy - iy)):
        out += rows[jy + a] * w[:, None]
    out *= np.float32(gain / _SD)
    return out


def noise_at(seed: int, scale_um: float, x: float, y: float) -> float:
    """Evaluate :func:`noise` at one point (in plain integers: arrays cost ten times more)."""
    gx, gy = x / scale_um, y / scale_um
    ix, iy = math.floor(gx), math.floor(gy)
    wx, wy = _scalar_weights(gx - ix), _scalar_weights(gy - iy)
    salt = seed * 0x9E3779B1 & _32
    hx = [_scalar_mix((ix + k) * 0xCC9E2D51 & _32 ^ salt) for k in range(-1, 3)]
    total = 0.0
    for k, w in zip(range(-1, 3), wy, strict=True):
        hy = _scalar_mix(((iy + k) * 0x1B873593 & _32) + salt & _32)
        row = hy * 5 + 0xE6546B64 & _32
        total += w * sum(
            v * ((_scalar_mix(h ^ row) >> 8) * (2 / 2**24) - 1)
            for v, h in zip(wx, hx, strict=True)
        )
    return total / _SD


_32 = 0xFFFFFFFF


def _scalar_mix(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B & _32
    h ^= h >> 13
    h = h * 0xC2B2AE35 & _32
    return h ^ (h >> 16)


def _scalar_weights(t: float) -> tuple[float, float, float, float]:
    t2, t3 = t * t, t * t * t
    return (
        (1 - t) ** 3 / 6,
        (3 * t3 - 6 * t2 + 4) / 6,
        (-3 * t3 + 3 * t2 + 3 * t + 1) / 6,
        t3 / 6,
    )


def warped_noise(seed: int, u: Coordinates, v: Coordinates) -> Real:
    """Noise at the lattice coordinates `u`, `v` given for each pixel.

    The lattice is refined four times by its own spline and then sampled, which costs a
    tenth of evaluating the spline at each pixel and differs by less than 0.5 %.
    """
    fine = 4
    low_u, low_v = math.floor(float(u.min())) - 1, math.floor(float(v.min())) - 1
    nu = fine * (math.ceil(float(u.max())) + 2 - low_u)
    nv = fine * (math.ceil(float(v.max())) + 2 - low_v)
    table = noise(seed, 1.0, low_u + np.arange(nu) / fine, low_v + np.arange(nv) / fine)
    map_x = ((u - low_u) * fine).astype(np.float32)
    map_y = ((v - low_v) * fine).astype(np.float32)
    return cast("Real", cv2.remap(table, map_x, map_y, cv2.INTER_CUBIC))


def cell_rng(seed: int, tag: int, i: int, j: int) -> np.random.Generator:
    """Random numbers for the objects of the cell (i, j) of the layer of objects `tag`."""
    return np.random.Generator(np.random.PCG64([seed, tag, i + (1 << 31), j + (1 << 31)]))


def smoothstep(a: float, b: float, v: Any) -> Any:
    """Rise smoothly from 0 at `a` to 1 at `b`; with a > b, fall."""
    t = np.clip((v - a) / (b - a), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)
