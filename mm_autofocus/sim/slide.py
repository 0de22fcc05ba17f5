"""The slide: what lies at x, y, how high it lies, and how it was stained.

Unbounded in x and y, and the same at each visit: every map is a function of the position
on the slide and the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import cv2
import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.sim import spectra
from mm_autofocus.sim.canvas import Canvas
from mm_autofocus.sim.noise import noise
from mm_autofocus.sim.smear import paint_cells, paint_smear
from mm_autofocus.sim.tissue import BARE, DENSE, SPARSE, cover, paint_tissue, zone, zone_at

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]
    Axis: TypeAlias = npt.NDArray[np.float64]

__all__ = [
    "KINDS",
    "SLIDE_RANGES",
    "SPARSITIES",
    "Layer",
    "Slide",
    "SlideSettings",
    "Sparsity",
    "load_picture",
    "read_picture",
]

KINDS = ("tissue", "smear", "cells", "picture")
Sparsity: TypeAlias = Literal["dense", "sparse", "extremely-sparse", "blank"]
SPARSITIES: tuple[Sparsity, ...] = ("dense", "sparse", "extremely-sparse", "blank")

SLIDE_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "region_um": (50, 1e6),
    "thickness_um": (0.1, 50),
    "z0_um": (-1000, 1000),
    "tilt_x_um_per_mm": (-50, 50),
    "tilt_y_um_per_mm": (-50, 50),
    "wave_um": (0, 10),
    "wave_length_mm": (0.2, 100),
    "fold_um": (0, 10),
    "phase": (0, 5),
    "stain": (0, 5),
    "picture_um_per_px": (0.02, 20),
}

_ZONES: dict[Sparsity, tuple[float, float]] = {
    "dense": (SPARSE, math.inf),
    "sparse": (BARE, DENSE + 0.3),
    "extremely-sparse": (BARE - 0.3, DENSE),
    "blank": (-math.inf, BARE + 0.3),
}


@dataclass(frozen=True, slots=True)
class SlideSettings:
    """What kind of slide it is.

    Attributes
    ----------
    kind : {"tissue", "smear", "cells", "picture"}
        A stained section; a stained blood smear; adherent cells for fluorescence; or any
        colour picture, repeated with mirrored tiles.
    seed : int
        Another seed, another slide.
    region_um : float
        Size of the dense, sparse, extremely sparse and blank regions.
    thickness_um : float
        Of the specimen.
    z0_um : float
        Height of the middle of the specimen at the origin, before waves.
    tilt_x_um_per_mm, tilt_y_um_per_mm : float
        Slope of the slide.
    wave_um, wave_length_mm : float
        Amplitude (the waves stay within ± this) and length of its waves.
    fold_um : float
        Height of folds, where the section also lies double; 0: none.
    phase : float
        Factor on the optical path differences; 0: a pure absorber.
    stain : float
        Factor on the amounts of stain.
    picture : str
        File of the picture; empty: ``skimage.data.immunohistochemistry()``.
    picture_um_per_px : float
        Size of its pixels on the slide.
    """

    kind: str = "tissue"
    seed: int = 1
    region_um: float = 900.0
    thickness_um: float = 4.0
    z0_um: float = 0.0
    tilt_x_um_per_mm: float = 1.5
    tilt_y_um_per_mm: float = -0.8
    wave_um: float = 2.0
    wave_length_mm: float = 2.5
    fold_um: float = 0.0
    phase: float = 1.0
    stain: float = 1.0
    picture: str = ""
    picture_um_per_px: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind: {self.kind!r} is not one of {', '.join(KINDS)}")
        for f in fields(self):
            if f.name not in SLIDE_RANGES:
                continue
            value = getattr(self, f.name)
            low, high = SLIDE_RANGES[f.name]
            if not (isinstance(value, int | float) and low <= value <= high):
                raise InputError(f"{f.name}: {value!r} is not between {low:g} and {high:g}")


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a piece of specimen.

    Attributes
    ----------
    z_um : float
        Height above the middle of the specimen.
    stains : numpy.ndarray
        ``(K, Y, X)`` amounts of the stains.
    opd_um : numpy.ndarray
        ``(Y, X)`` optical path difference.
    """

    z_um: float
    stains: Real
    opd_um: Real


def read_picture(path: str) -> npt.NDArray[np.uint8]:
    """Read a picture of 8 bits as ``(Y, X, RGB)`` uint8; a grey one is alike in all colours.

    Parameters
    ----------
    path : str
        A file that OpenCV reads, a slide scanner's (``.svs``) among them: its finest level;
        empty: the immunohistochemistry picture that comes with scikit-image.

    Raises
    ------
    InputError
        If it is no such picture of at least 16 × 16 pixels.
    """
    if not path:
        try:
            import skimage.data
        except ImportError as error:
            raise InputError(
                "picture: empty, which means the picture in scikit-image, and that is not "
                "installed; name a picture file or pip install scikit-image"
            ) from error
        pictures: Any = skimage.data
        return np.asarray(pictures.immunohistochemistry())
    if not Path(path).is_file():
        raise InputError(f"picture: {path!r} is no file; allowed: a picture")
    # of its own colours and depth: else OpenCV makes colours of 8 bits of whatever it reads
    bgr = cv2.imread(path, cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH)
    if bgr is None:
        raise InputError(f"picture: {path!r} is no picture (png, jpg, tif, ...)")
    if bgr.dtype != np.uint8:
        kind = " × ".join(map(str, bgr.shape))
        raise InputError(f"picture: {path!r} is {kind}, {bgr.dtype}; allowed: 8 bits")
    if bgr.ndim == 2:
        bgr = cv2.cvtColor(bgr, cv2.COLOR_GRAY2BGR)
    if min(bgr.shape[:2]) < 16:
        raise InputError(
            f"picture: {bgr.shape[1]} × {bgr.shape[0]} pixels; allowed: 16 or more"
        )
    return np.ascontiguousarray(bgr[..., ::-1])


@lru_cache(maxsize=4)
def load_picture(path: str) -> Real:
    """Read a colour picture as absorbance (natural logarithm) per band, ``(3, Y, X)``.

    Light that passes where nothing is, is taken to be each band's 99th percentile.

    Parameters
    ----------
    path : str
        As of `read_picture`.

    Raises
    ------
    InputError
        As `read_picture`.
    """
    rgb = read_picture(path)
    light = np.maximum(rgb.astype(np.float32), 1.0)
    white = np.percentile(light, 99, axis=(0, 1)).astype(np.float32)
    return np.ascontiguousarray(np.moveaxis(np.maximum(-np.log(light / white), 0), -1, 0))


class Slide:
    """A slide.

    Parameters
    ----------
    settings : SlideSettings
        What kind of slide.

    Attributes
    ----------
    settings : SlideSettings
        As given.
    spectra : tuple of callables
        For each stain: absorbance (natural logarithm) of a unit amount at a wavelength.
    """

    def __init__(self, settings: SlideSettings | None = None) -> None:
        self.settings = settings = settings or SlideSettings()
        if settings.kind == "picture":
            self._picture = load_picture(settings.picture)
            self.spectra: tuple[spectra.Spectrum, ...] = tuple(map(spectra.band, range(3)))
        else:
            # Living cells hardly absorb; their stains are emitters.
            weak = 0.04 if settings.kind == "cells" else 1.0
            self.spectra = (
                lambda w: weak * spectra.LN10 * spectra.haematoxylin(w),
                lambda w: weak * spectra.LN10 * spectra.eosin(w),
            )

    # --- shape -----------------------------------------------------------------------

    def height_um(self, x: Axis, y: Axis) -> Real:
        """Height of the middle of the specimen on the grid `y` × `x`, ``(Y, X)``, µm."""
        s = self.settings
        x32, y32 = np.asarray(x, np.float64)[None, :], np.asarray(y, np.float64)[:, None]
        z = s.z0_um + s.tilt_x_um_per_mm * 1e-3 * x32 + s.tilt_y_um_per_mm * 1e-3 * y32
        if s.wave_um:
            rng = np.random.default_rng([s.seed, 61])
            waves = np.zeros_like(z)
            for share in (0.5, 0.3, 0.2):
                k = 2 * math.pi / (s.wave_length_mm * 1e3) * rng.uniform(0.75, 1.3)
                angle, phase = rng.uniform(0, 2 * math.pi, 2)
                along = k * (math.cos(angle) * x32 + math.sin(angle) * y32) + phase
                waves += share * np.sin(along)
            z = z + s.wave_um * waves
        out = z.astype(np.float32)
        if s.fold_um:
            out = out + np.float32(s.fold_um) * self._fold(x, y)
        return out

    def height_at(self, x: float, y: float) -> float:
        """Height of the middle of the specimen at a point, µm."""
        return float(self.height_um(np.array([x]), np.array([y]))[0, 0])

    def _fold(self, x: Axis, y: Axis) -> Real:
        """How much of a fold lies at each point, 0 to 1."""
        n = noise(self.settings.seed + 62, 1400.0, x, y)
        wiggle = noise(self.settings.seed + 63, 90.0, x, y)
        out: Real = np.exp(-(((n + 0.02 * wiggle) / 0.045) ** 2)).astype(np.float32)
        return out

    # --- substance -------------------------------------------------------------------

    def layers(self, x: Axis, y: Axis, n_layers: int) -> list[Layer]:
        """What lies on the grid `y` × `x`, in layers of rising z.

        Parameters
        ----------
        x, y : numpy.ndarray
            Coordinates of columns and rows in µm, rising in equal steps.
        n_layers : int
            In how many layers the thickness is divided.

        Returns
        -------
        list of Layer
            Their heights are relative to :meth:`height_um`.
        """
        s = self.settings
        canvas = Canvas(s.seed, x, y, n_layers)
        if s.kind == "picture":
            return self._picture_layers(canvas)
        paint = {"tissue": paint_tissue, "smear": paint_smear, "cells": paint_cells}[s.kind]
        paint(canvas, s.region_um)
        canvas.h *= np.float32(s.stain)
        canvas.e *= np.float32(s.stain)
        canvas.opd *= np.float32(s.phase)
        if s.fold_um:
            double = 1 + np.float32(0.9) * self._fold(x, y)
            canvas.h *= double
            canvas.e *= double
            canvas.opd *= double
        # A drop of what would be negative: noise on thin stain.
        stains = np.maximum(np.stack([canvas.h, canvas.e], axis=1), 0)
        return [
            Layer(float(d * s.thickness_um), stains[k], canvas.opd[k])
            for k, d in enumerate(canvas.depths)
        ]

    def _picture_layers(self, canvas: Canvas) -> list[Layer]:
        """Mirror the picture without end, and split it evenly over the layers.

        A picture knows nothing of depth or phase and was blurred by the lens that took
        it; its phase is taken to follow its absorbance.
        """
        s = self.settings
        _, height, width = self._picture.shape

        def mirrored(v: Axis, n: int) -> Real:
            t = np.mod(v / s.picture_um_per_px, 2 * (n - 1))
            out: Real = np.minimum(t, 2 * (n - 1) - t).astype(np.float32)
            return out

        shape = (len(canvas.y), len(canvas.x))
        map_x = np.broadcast_to(mirrored(canvas.x, width)[None, :], shape)
        map_y = np.broadcast_to(mirrored(canvas.y, height)[:, None], shape)
        z = zone(s.seed, s.region_um, canvas.x, canvas.y)
        mask = cover(canvas, z)
        share = np.float32(1 / canvas.n_layers)
        stains = np.stack(
            [
                np.maximum(cv2.remap(band, map_x, map_y, cv2.INTER_CUBIC), 0) * mask
                for band in self._picture
            ]
        )
        opd = stains.mean(axis=0) * np.float32(0.045 * s.phase) * share
        stains *= np.float32(s.stain) * share
        return [Layer(float(d * s.thickness_um), stains, opd) for d in canvas.depths]

    # --- where to look -----------------------------------------------------------------

    def covered(self, x: float, y: float, field_um: tuple[float, float]) -> float:
        """Fraction of a field centred at x, y that holds specimen (on a 1.5 µm grid)."""
        return _covered(self.settings, round(x, 3), round(y, 3), field_um)

    def sparsity(self, x: float, y: float, field_um: tuple[float, float]) -> Sparsity:
        """Classify a field: dense ≥ 45 % > sparse ≥ 6 % > extremely sparse > 0 = blank."""
        part = self.covered(x, y, field_um)
        if part == 0:
            return "blank"
        return "dense" if part >= 0.45 else "sparse" if part >= 0.06 else "extremely-sparse"

    def _is(
        self, sparsity: Sparsity, x: float, y: float, field_um: tuple[float, float]
    ) -> bool:
        fleck = 0 < self.covered(x, y, field_um) < 0.002
        return not fleck and self.sparsity(x, y, field_um) == sparsity

    def find_fields(
        self,
        sparsity: Sparsity,
        n: int,
        field_um: tuple[float, float],
        *,
        start: tuple[float, float] = (0.0, 0.0),
        max_fields: int = 20000,
    ) -> list[tuple[float, float]]:
        """Find the first `n` fields of a sparsity on a spiral of adjacent fields.

        Fields that hold something, but on less than 0.2 % of their area, are passed over.

        Returns
        -------
        list of (x, y)
            Centres in µm.

        Raises
        ------
        InputError
            If `sparsity` is unknown or there are not that many within `max_fields`.
        """
        if sparsity not in SPARSITIES:
            raise InputError(f"sparsity: {sparsity!r} is not one of {', '.join(SPARSITIES)}")
        found: list[tuple[float, float]] = []
        i = j = 0
        di, dj, leg, step = 1, 0, 1, 0
        for _ in range(max_fields):
            x, y = start[0] + i * field_um[0], start[1] + j * field_um[1]
            # A glance before painting: what the middle of the field can be at all.
            middle = zone_at(self.settings.seed, self.settings.region_um, x, y)
            low, high = _ZONES[sparsity]
            if low < middle < high and self._is(sparsity, x, y, field_um):
                found.append((x, y))
                if len(found) == n:
                    return found
            i, j, step = i + di, j + dj, step + 1
            if step == leg:
                di, dj, step = -dj, di, 0
                leg += 1 if dj == 0 else 0
        raise InputError(f"n: only {len(found)} {sparsity} fields, not {n}, near the start")


@lru_cache(maxsize=8192)
def _covered(settings: Any, x: float, y: float, field_um: tuple[float, float]) -> float:
    pitch = 1.5
    nx, ny = (max(round(f / pitch), 4) for f in field_um)
    gx: Axis = x + (np.arange(nx, dtype=np.float64) - (nx - 1) / 2) * pitch
    gy: Axis = y + (np.arange(ny, dtype=np.float64) - (ny - 1) / 2) * pitch
    slide = Slide(settings)
    layers = slide.layers(gx, gy, 1)
    amount = layers[0].stains.sum(axis=0)
    return float((amount > 0.02).mean())
