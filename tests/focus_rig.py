"""A rig whose focus curve and camera noise are known: a texture of contrast c(z)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from mm_autofocus.errors import HardwareError
from mm_autofocus.types import Look
from scipy.ndimage import gaussian_filter

_TEXTURE = gaussian_filter(np.random.default_rng(5).normal(size=(128, 128)), 1.0)
_TEXTURE /= _TEXTURE.std()

SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gauss": lambda u: np.exp2(-(u**2)),
    "lorentz": lambda u: 1 / (1 + u**2),
    "plateau": lambda u: 1 / (1 + np.abs(u) ** 8),
    "two peaks": lambda u: np.maximum(
        np.exp2(-((u - 1.6) ** 2)), 0.97 * np.exp2(-((u + 1.6) ** 2))
    ),
    "slope": lambda u: np.clip(0.5 + 0.2 * u, 0, None),
    "none": lambda u: 0 * u,
    "even": lambda u: 1 + 0 * u,
}


class FocusRig:
    """Image = level + contrast(z) · texture, times the lamp, plus camera noise.

    `curve` is Brenner's measure of the texture alone, at most 1.
    """

    def __init__(
        self,
        shape: str = "gauss",
        focus_um: float = 0.0,
        width_um: float = 4.0,
        z_um: float = 0.0,
        amplitude: float = 100.0,
        noise: float = 5.0,
        level: float = 500.0,
        lamp: Callable[[int], float] = lambda k: 1.0,
        seed: int = 0,
        max_value: float | None = 65535.0,
        breaks_at_look: int | None = None,
        z_sd_um: float = 0.0,
    ) -> None:
        self.z_sd_um, self.off_um = z_sd_um, 0.0
        self.shape, self.focus_um, self.width_um = shape, focus_um, width_um
        self.amplitude, self.noise, self.level, self.lamp = amplitude, noise, level, lamp
        self.rng = np.random.default_rng(seed)
        self.max_value = max_value
        self.breaks_at_look = breaks_at_look
        self.z_um = z_um
        self.visited = [z_um]
        self.looks = 0
        self.prepared = 0
        self.restored = 0

    def curve(self, z_um: float) -> float:
        return float(SHAPES[self.shape](np.asarray((z_um - self.focus_um) / self.width_um)))

    @property
    def true_um(self) -> float:
        """Where the stage really stands; `z_sd_um` is the spread of it about its reading."""
        return self.z_um + self.off_um

    def position_um(self) -> float:
        return self.z_um

    def move_to(self, z_um: float) -> None:
        if z_um != self.z_um and self.z_sd_um:
            self.off_um = float(self.rng.normal(0, self.z_sd_um))
        self.z_um = float(z_um)
        self.visited.append(self.z_um)

    def look(self) -> Look:
        if self.breaks_at_look == self.looks:
            raise HardwareError("the camera has gone")
        image = self.level + self.amplitude * np.sqrt(self.curve(self.true_um)) * _TEXTURE
        image = image * self.lamp(self.looks) + self.rng.normal(0, self.noise, image.shape)
        self.looks += 1
        return Look(self.z_um, np.rint(image).clip(0, 65535).astype(np.uint16), self.max_value)

    @contextmanager
    def looking(self) -> Iterator[None]:
        self.prepared += 1
        try:
            yield
        finally:
            self.restored += 1
