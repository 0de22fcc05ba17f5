"""Slides, lenses and cameras drawn by lot: what a learned focus is trained and judged on.

One table of ranges for both, so that nobody trains on one microscope and reports another. The
seeds keep them apart: training draws from :data:`TRAINING_SEEDS`, benchmarks from
:data:`BENCHMARK_SEEDS`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.sim.camera import Camera, CameraSettings
from mm_autofocus.sim.slide import KINDS, SlideSettings

if TYPE_CHECKING:
    from mm_autofocus.sim.microscope import Microscope

__all__ = [
    "BENCHMARK_SEEDS",
    "CAMERA",
    "OPTICS",
    "SLIDE",
    "TRAINING_SEEDS",
    "Draw",
    "OpticsDraw",
    "draw",
    "draw_camera",
    "draw_optics",
    "draw_slide",
]

TRAINING_SEEDS = range(0, 100_000)
BENCHMARK_SEEDS = range(900_000, 1_000_000)

OPTICS: dict[str, tuple[float, float]] = {
    "spherical_waves": (0.04, 0.10),
    "astigmatism_waves": (-0.03, 0.03),
    "astigmatism_deg": (0.0, 180.0),
    "axial_colour_um": (0.4, 0.8),
    "lateral_colour_um": (0.1, 0.4),
    "field_curvature_um": (0.0, 1.0),
    "sigma": (0.45, 0.75),
}
"""Uniform ranges of the 20x/0.75 lens and of its condenser.

The lens of ``virtual_slide.cfg`` (0.045, 0.015, 0.5, 0.3, 0.8; sigma 0.6) lies within. An
objective corrected for 0.17 mm of glass shows 0.02 waves rms more of spherical aberration for
each 10 µm of cover slip or mountant beyond; mounted sections nearly always lie under more,
so one sign. Those of the other sign would need a model of their own.
"""

SLIDE: dict[str, tuple[float, float]] = {
    "phase": (0.6, 1.4),
    "stain": (0.7, 1.3),
    "thickness_um": (3.0, 5.0),
    "tilt_x_um_per_mm": (-2.0, 2.0),
    "tilt_y_um_per_mm": (-2.0, 2.0),
    "wave_um": (0.5, 2.5),
    "wave_length_mm": (1.5, 4.0),
    "region_um": (700.0, 1200.0),
    "picture_um_per_px": (0.25, 0.5),
}
"""Uniform ranges of the slide; see `mm_autofocus.sim.slide.SlideSettings`."""

CAMERA: dict[str, tuple[float, float]] = {
    "full_well_e": (8000.0, 20000.0),
    "read_noise_e": (2.0, 8.0),
    "offset": (0.0, 0.02),
    "vignetting": (0.0, 0.10),
    "dust": (0, 15),
    "crosstalk": (0.0, 0.05),
    "dose": (0.85, 1.10),
}
"""Uniform ranges of the camera, and of the light: at ``dose`` 1 a blank field fills 85 % of
the range."""


@dataclass(frozen=True, slots=True)
class OpticsDraw:
    """A lens and its illumination.

    Attributes
    ----------
    aberrations : dict
        Keywords of `mm_autofocus.optics.Aberrations`.
    sigma : float
        Condenser aperture over objective aperture.
    """

    aberrations: dict[str, float]
    sigma: float

    @property
    def lens(self) -> dict[str, float]:
        """All of it, by the names of `mm_autofocus.models.lens`."""
        return {"sigma": self.sigma, **self.aberrations}


@dataclass(frozen=True, slots=True)
class Draw:
    """A slide under a lens in front of a camera.

    Attributes
    ----------
    seed : int
        What it was drawn with.
    slide : SlideSettings
    optics : OpticsDraw
    camera : CameraSettings
    dose : float
        Light, 1 for what fills the camera to its reference.
    """

    seed: int
    slide: SlideSettings
    optics: OpticsDraw
    camera: CameraSettings
    dose: float

    def apply(self, scope: Microscope) -> None:
        """Put slide, lens, condenser, camera and lamp into a virtual microscope.

        The lens keeps the aperture of the objective in use; the exposure stays as it is.
        """
        scope.set_slide(**asdict(self.slide))
        scope.set_lens(**self.optics.aberrations)
        scope.sigma = self.optics.sigma
        scope.camera = Camera(self.camera)
        scope.lamp_percent = 50.0 * self.dose

    def to_json(self) -> dict[str, Any]:
        """All that was drawn."""
        return asdict(self)


def _uniform(
    rng: np.random.Generator, ranges: dict[str, tuple[float, float]]
) -> dict[str, Any]:
    """One number of each range; whole ones where the range is of whole numbers."""
    return {
        name: int(rng.integers(low, high + 1))
        if isinstance(low, int) and isinstance(high, int)
        else round(float(rng.uniform(low, high)), 5)
        for name, (low, high) in ranges.items()
    }


def draw_optics(rng: np.random.Generator) -> OpticsDraw:
    """Draw a lens and a condenser from :data:`OPTICS`."""
    numbers = _uniform(rng, OPTICS)
    sigma = numbers.pop("sigma")
    return OpticsDraw(numbers, sigma)


def draw_slide(
    rng: np.random.Generator, kind: str = "tissue", *, seed: int = 1, picture: str = ""
) -> SlideSettings:
    """Draw a slide from :data:`SLIDE`.

    Parameters
    ----------
    rng : numpy.random.Generator
    kind : str
        As in `mm_autofocus.sim.slide.SlideSettings`.
    seed : int
        Of the slide's own maps.
    picture : str
        File, for the kind ``picture``; empty: the one that comes with scikit-image.
    """
    if kind not in KINDS:
        raise InputError(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
    return SlideSettings(kind=kind, seed=seed, picture=picture, **_uniform(rng, SLIDE))


def draw_camera(rng: np.random.Generator) -> tuple[CameraSettings, float]:
    """Draw a camera, with dust and noise of its own, and the dose, from :data:`CAMERA`."""
    numbers = _uniform(rng, CAMERA)
    dose = numbers.pop("dose")
    return CameraSettings(**numbers, camera_seed=int(rng.integers(2**31 - 1))), dose


def draw(seed: int, kind: str = "tissue", *, picture: str = "") -> Draw:
    """Draw everything; the same seed and kind give the same.

    Parameters
    ----------
    seed : int
        One of :data:`TRAINING_SEEDS` or of :data:`BENCHMARK_SEEDS`; it is also the slide's.
    kind, picture : str
        As in :func:`draw_slide`.

    Raises
    ------
    InputError
        The kind is unknown, or the seed neither of training nor of benchmarks.

    Examples
    --------
    >>> from mm_autofocus.sim.microscope import Microscope
    >>> scope = Microscope()
    >>> draw(7, "smear").apply(scope)
    >>> scope.slide_settings.kind, 0.45 <= scope.sigma <= 0.75
    ('smear', True)
    """
    if seed not in TRAINING_SEEDS and seed not in BENCHMARK_SEEDS:
        allowed = " or ".join(f"{r[0]} … {r[-1]}" for r in (TRAINING_SEEDS, BENCHMARK_SEEDS))
        raise InputError(f"seed: {seed} is not one of {allowed} (training or benchmarks)")
    rng = np.random.default_rng([seed, 101])
    optics = draw_optics(rng)
    camera, dose = draw_camera(rng)
    slide = draw_slide(rng, kind, seed=seed, picture=picture)
    return Draw(seed, slide, optics, camera, dose)
