"""The camera: from light to grey values, with the faults of a real one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["CAMERA_RANGES", "Camera", "CameraSettings"]

FULL_SCALE = 0.85
"""What a blank field fills of the range at :data:`EXPOSURE_MS` and half of the lamp."""
EXPOSURE_MS = 5.0

CAMERA_RANGES: dict[str, tuple[float, float]] = {
    "full_well_e": (100, 1e6),
    "read_noise_e": (0, 1000),
    "offset": (0, 0.5),
    "gain": (0.01, 100),
    "vignetting": (0, 1),
    "dust": (0, 500),
    "crosstalk": (0, 0.3),
    "camera_seed": (0, 2**31 - 1),
}
"""Allowed range of each number in the settings."""


@dataclass(frozen=True, slots=True)
class CameraSettings:
    """The camera.

    Attributes
    ----------
    full_well_e : float
        Electrons that fill a pixel; they set the shot noise.
    read_noise_e : float
        Standard deviation of the read noise in electrons.
    offset : float
        Grey value without light, as a fraction of the range.
    gain : float
        Factor on the signal after the noise.
    vignetting : float
        How much darker the corners are.
    dust : int
        Number of motes in front of the sensor: they stay where they are when the slide
        moves, and as sharp as they are when it is refocused.
    crosstalk : float
        Part of each colour that leaks into each of the other two.
    camera_seed : int
        Another seed: other noise and other dust.
    """

    full_well_e: float = 12000.0
    read_noise_e: float = 4.0
    offset: float = 0.008
    gain: float = 1.0
    vignetting: float = 0.06
    dust: int = 9
    crosstalk: float = 0.0
    camera_seed: int = 1

    def __post_init__(self) -> None:
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), CAMERA_RANGES[f.name]
            if not (isinstance(value, int | float) and low <= value <= high):
                raise InputError(f"{f.name}: {value!r} is not between {low:g} and {high:g}")


@lru_cache(maxsize=8)
def _shading(settings: CameraSettings, sensor: tuple[int, int]) -> Real:
    """Flat field and dust of a sensor, ``(Y, X)``, 1 at its brightest."""
    ny, nx = sensor
    rng = np.random.default_rng([settings.camera_seed, 71])
    cy, cx = 0.5 + rng.uniform(-0.06, 0.06, 2)
    y = (np.arange(ny, dtype=np.float32)[:, None] + 0.5) / ny
    x = (np.arange(nx, dtype=np.float32)[None, :] + 0.5) / nx
    flat = 1 - np.float32(2 * settings.vignetting) * ((y - cy) ** 2 + (x - cx) ** 2)
    for _ in range(int(settings.dust)):
        py, px = rng.uniform(0, 1, 2) * (ny, nx)
        radius, depth, ring = rng.uniform(3, 11), rng.uniform(0.01, 0.05), rng.uniform(0.3, 0.9)
        i0, i1 = max(int(py - 3 * radius), 0), min(int(py + 3 * radius), ny)
        j0, j1 = max(int(px - 3 * radius), 0), min(int(px + 3 * radius), nx)
        r = np.hypot(np.arange(i0, i1)[:, None] - py, np.arange(j0, j1)[None, :] - px) / radius
        # A disc out of focus, with the bright rim that diffraction gives it.
        mote = depth * (
            1 / (1 + np.exp(8 * (r - 1))) - ring * 0.3 * np.exp(-((r - 1.1) ** 2) * 60)
        )
        flat[i0:i1, j0:j1] *= (1 - mote).astype(np.float32)
    return np.asarray(flat, np.float32)


class Camera:
    """Turns light into frames; the n-th frame has the same noise at each run.

    Parameters
    ----------
    settings : CameraSettings
        The camera.
    """

    def __init__(self, settings: CameraSettings | None = None) -> None:
        self.settings = settings or CameraSettings()

    def expose(
        self,
        light: Real,
        *,
        dose: float,
        frame: int | None,
        bit_depth: int,
        sensor: tuple[int, int],
        roi: tuple[int, int, int, int],
        binning: int = 1,
    ) -> npt.NDArray[Any]:
        """Expose one frame.

        Parameters
        ----------
        light : numpy.ndarray
            ``(Y, X)`` or ``(Y, X, 3)``, 1 where a blank field is.
        dose : float
            Exposure times lamp, 1 for what :data:`FULL_SCALE` refers to; 0: dark.
        frame : int | None
            Number of the frame; it seeds the noise. None: without noise, all else as ever.
        bit_depth : int
            8 to 16.
        sensor : tuple of int
            Rows and columns of the sensor, not binned.
        roi : tuple of int
            x, y, width, height on the binned sensor.
        binning : int
            Pixels along one axis that are averaged.

        Returns
        -------
        numpy.ndarray
            uint8 or uint16, of the shape of `light`.
        """
        s = self.settings
        x, y, w, h = roi
        binned = (sensor[0] // binning, sensor[1] // binning)
        shading = _shading(s, sensor)
        if binning > 1:
            even = shading[: binned[0] * binning, : binned[1] * binning]
            shading = np.asarray(
                cv2.resize(even, binned[::-1], interpolation=cv2.INTER_AREA), np.float32
            )
        shading = shading[y : y + h, x : x + w]
        signal = light * (shading if light.ndim == 2 else shading[..., None])
        if s.crosstalk and light.ndim == 3:
            mean = signal.sum(axis=-1, keepdims=True)
            signal = signal * np.float32(1 - 3 * s.crosstalk) + np.float32(s.crosstalk) * mean
        electrons = signal * np.float32(FULL_SCALE * s.full_well_e * dose)
        if frame is not None:
            rng = np.random.Generator(np.random.SFC64([s.camera_seed, frame]))
            noise = rng.standard_normal(electrons.shape, dtype=np.float32)
            # Photons as a normal distribution: at more than some ten a pixel it is one.
            noise *= np.sqrt(np.maximum(electrons, 0) + np.float32(s.read_noise_e**2)) / binning
            electrons += noise
        top = float(2**bit_depth - 1)
        scale = np.float32(s.gain * top / s.full_well_e)
        values = np.minimum(electrons, np.float32(s.full_well_e)) * scale
        values += np.float32(s.offset * top + 0.5)
        np.clip(values, 0, top, out=values)
        return np.asarray(values, np.uint8 if bit_depth <= 8 else np.uint16)
