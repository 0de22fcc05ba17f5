"""From a piece of the slide and a defocus to the light on the camera, without noise."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

import cv2
import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.optics import (
    REFERENCE_UM,
    AbbeImager,
    FluorescenceImager,
    Lens,
    condenser,
    good_size,
    transmission,
)
from mm_autofocus.sim import spectra
from mm_autofocus.sim.slide import Layer, Slide

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["CHANNELS", "QUALITIES", "Field", "Quality", "Renderer", "View", "heights"]

Channel: TypeAlias = Literal["Brightfield", "DAPI", "FITC"]
CHANNELS: tuple[Channel, ...] = ("Brightfield", "DAPI", "FITC")

TILED_ABOVE = 1300
PART_SAMPLES = 700
PART_MARGIN_UM = 30.0

_EMISSION_UM = {"DAPI": 0.46, "FITC": 0.525}
_EMITTER = {"DAPI": 0, "FITC": 1}
_COLOUR_OF = {"DAPI": 2, "FITC": 1}


@dataclass(frozen=True, slots=True)
class Quality:
    """How finely an image is computed.

    Attributes
    ----------
    n_points : int
        Source points of the condenser.
    n_layers : int
        Layers of the specimen.
    oversample : int
        Samples per camera pixel along one axis.
    margin_um : float
        Specimen computed around the field; further light wraps around.
    planes : int
        At most so many planes are computed to let the defocus vary over the field (tilt,
        waves, field curvature); images between them are interpolated.
    lateral_colour : bool
        Whether the lens's lateral colour is shown.
    """

    n_points: int
    n_layers: int
    oversample: int
    margin_um: float
    planes: int
    lateral_colour: bool = True


QUALITIES: dict[str, Quality] = {
    "preview": Quality(4, 1, oversample=1, margin_um=6, planes=1, lateral_colour=False),
    "standard": Quality(n_points=8, n_layers=2, oversample=1, margin_um=10, planes=3),
    "fine": Quality(n_points=24, n_layers=3, oversample=2, margin_um=20, planes=5),
    "reference": Quality(n_points=60, n_layers=4, oversample=2, margin_um=30, planes=9),
}
"""Named qualities, fastest first. Their errors are measured in benchmarks/virtual_slide.py."""


@dataclass(frozen=True, slots=True)
class View:
    """Everything that the image of a field depends on, but the height of the stage.

    Attributes
    ----------
    x_um, y_um : float
        Point of the slide in the middle of the field.
    shape : tuple of int
        Rows and columns of camera pixels.
    pitch_um : float
        Pixel in the specimen.
    lens : Lens
        The objective.
    field_radius_um : float
        Radius of its field of view: where its field curvature and lateral colour are given.
    sigma : float
        Condenser aperture over objective aperture.
    channel : {"Brightfield", "DAPI", "FITC"}
        Kind of contrast.
    colour : bool
        Three bands, or one at the reference wavelength.
    quality : str
        One of :data:`QUALITIES`.
    off_axis_um : tuple of float
        x and y of the middle of the field relative to the optical axis (a region of
        interest that is not in the middle of the camera).
    """

    x_um: float
    y_um: float
    shape: tuple[int, int]
    pitch_um: float
    lens: Lens
    field_radius_um: float = 550.0
    sigma: float = 0.6
    channel: Channel = "Brightfield"
    colour: bool = True
    quality: str = "standard"
    off_axis_um: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise InputError(f"quality: {self.quality!r} is not one of {', '.join(QUALITIES)}")
        if self.channel not in CHANNELS:
            raise InputError(f"channel: {self.channel!r} is not one of {', '.join(CHANNELS)}")
        if min(self.shape) < 8 or max(self.shape) > 8192:
            raise InputError(f"shape: {self.shape} is not between 8 and 8192 pixels")

    @property
    def wavelengths_um(self) -> tuple[float, ...]:
        """Wavelength of each computed band."""
        if self.channel != "Brightfield":
            return (_EMISSION_UM[self.channel],)
        return spectra.RGB_UM if self.colour else (REFERENCE_UM,)

    @property
    def dof_um(self) -> float:
        """Depth of field of the optics alone: λ·n/NA²."""
        return REFERENCE_UM * self.lens.index / self.lens.na**2


def heights(slide: Slide, view: View) -> Real:
    """Stage z of best focus by geometry at each pixel, ``(Y, X)``.

    Topography and field curvature; the objective's parfocal offset is not in it.
    """
    ny, nx = view.shape
    dy = (np.arange(ny, dtype=np.float64) - (ny - 1) / 2) * view.pitch_um
    dx = (np.arange(nx, dtype=np.float64) - (nx - 1) / 2) * view.pitch_um
    z = slide.height_um(
        np.asarray(view.x_um + dx, np.float64), np.asarray(view.y_um + dy, np.float64)
    )
    bend = view.lens.aberrations.field_curvature_um
    if bend:
        ax, ay = dx + view.off_axis_um[0], dy + view.off_axis_um[1]
        r2 = (ax[None, :] ** 2 + ay[:, None] ** 2) / view.field_radius_um**2
        z = z + (bend * r2).astype(np.float32)
    return z


class Field:
    """One field of the slide, ready to be looked at from any height.

    Parameters
    ----------
    slide : Slide
        The slide.
    view : View
        What is seen of it.
    margin_um : float, optional
        Instead of that of the quality.
    cache_mb : float
        As in :class:`~mm_autofocus.optics.AbbeImager`.
    """

    def __init__(
        self,
        slide: Slide,
        view: View,
        *,
        margin_um: float | None = None,
        cache_mb: float = 128.0,
    ) -> None:
        self.view = view
        self._quality = q = QUALITIES[view.quality]
        self._cache_mb = cache_mb
        pitch = view.pitch_um / q.oversample
        margin = math.ceil((q.margin_um if margin_um is None else margin_um) / pitch)
        shape = [n * q.oversample for n in view.shape]
        padded = [good_size(n + 2 * margin) for n in shape]
        # The field is periodic to the transforms: let its end fade into its beginning.
        fade = min(margin, 48)
        axes = []
        self._crop = []
        for n, total, centre in zip(shape, padded, (view.y_um, view.x_um), strict=True):
            start = (total - n) // 2
            steps = np.arange(total + fade, dtype=np.float64) - start - (n - 1) / 2
            axes.append(np.asarray(centre + steps * pitch, np.float64))
            self._crop.append(slice(start, start + n))
        layers = [
            self._fold(layer, fade) for layer in slide.layers(axes[1], axes[0], q.n_layers)
        ]
        self._imagers = [self._imager(slide, layers, w, pitch) for w in view.wavelengths_um]
        self._height = heights(slide, view)

    @staticmethod
    def _fold(layer: Layer, fade: int) -> Layer:
        """Make a layer periodic: `fade` rows and columns shorter, ends joined smoothly."""
        t = np.linspace(0, 1, fade, dtype=np.float32)
        ramp = t * t * (3 - 2 * t)

        def fold(a: Real) -> Real:
            out = a[..., :-fade, :].copy()
            w = ramp[:, None]
            out[..., :fade, :] = w * out[..., :fade, :] + (1 - w) * a[..., -fade:, :]
            end = out[..., -fade:]
            out = out[..., :-fade].copy()
            out[..., :fade] = ramp * out[..., :fade] + (1 - ramp) * end
            return out

        return Layer(layer.z_um, fold(layer.stains), fold(layer.opd_um))

    def _imager(
        self, slide: Slide, layers: list[Layer], wavelength: float, pitch: float
    ) -> AbbeImager | FluorescenceImager:
        view = self.view
        heights = [layer.z_um for layer in layers]
        if view.channel != "Brightfield":
            index = min(_EMITTER[view.channel], len(slide.spectra) - 1)
            return FluorescenceImager(
                [layer.stains[index] for layer in layers],
                heights,
                pitch_um=pitch,
                wavelength_um=wavelength,
                lens=view.lens,
            )
        strength = [spectrum(wavelength) for spectrum in slide.spectra]
        planes = []
        for layer in layers:
            absorbance = np.zeros_like(layer.opd_um)
            for amount, k in zip(layer.stains, strength, strict=True):
                absorbance += np.float32(k) * amount
            planes.append(transmission(absorbance, layer.opd_um, wavelength))
        return AbbeImager(
            planes,
            heights,
            pitch_um=pitch,
            wavelength_um=wavelength,
            lens=view.lens,
            source=condenser(view.sigma, self._quality.n_points),
            cache_mb=self._cache_mb,
        )

    @property
    def height_um(self) -> Real:
        """Stage z of best focus at each pixel by geometry, ``(Y, X)``."""
        return self._height

    def image(self, z_um: float) -> Real:
        """Light on each camera pixel with the stage at `z_um`.

        Parameters
        ----------
        z_um : float
            True height of the stage, in µm.

        Returns
        -------
        numpy.ndarray
            ``(Y, X, 3)`` float32, or ``(Y, X)`` for a grey camera: relative to a blank
            field (brightfield) or in arbitrary units of emission.
        """
        low, high = float(self._height.min()), float(self._height.max())
        spacing = 0.5 * self.view.dof_um
        n = min(math.ceil((high - low) / spacing - 0.25), self._quality.planes)
        if n <= 1:
            bands = self._plane(z_um - float(self._height.mean()))
        else:
            # Planes at the middles of n slabs of height; between them, interpolate.
            heights = low + (np.arange(n) + 0.5) * (high - low) / n
            position = (self._height - heights[0]) / (heights[1] - heights[0])
            bands = [np.zeros(self.view.shape, np.float32) for _ in self._imagers]
            for k, height in enumerate(heights):
                weight = np.maximum(0, 1 - np.abs(np.clip(position, 0, n - 1) - k))
                planes = self._plane(z_um - float(height))
                for band, part in zip(bands, planes, strict=True):
                    np.add(band, weight.astype(np.float32) * part, out=band)
        if not self.view.colour:
            return bands[0]
        if self.view.channel == "Brightfield":
            return np.stack(bands, axis=-1)
        out = np.zeros((*self.view.shape, 3), np.float32)
        out[..., _COLOUR_OF[self.view.channel]] = bands[0]
        return out

    def _plane(self, defocus_um: float) -> list[Real]:
        """Bands of the camera image for one defocus over the whole field."""
        bands = []
        o = self._quality.oversample
        ny, nx = self.view.shape
        for imager, wavelength in zip(self._imagers, self.view.wavelengths_um, strict=True):
            fine = imager.image(defocus_um)
            if o == 1:
                # Integration over a pixel, to second order: a box of width 1 has variance
                # 1/12, and so has this kernel.
                a = 1 / 24
                kernel = np.array([a, 1 - 2 * a, a], np.float32)
                fine = cast("Real", cv2.sepFilter2D(fine, -1, kernel, kernel))
            stretch = self._stretch(wavelength) if self._quality.lateral_colour else 1.0
            rows, columns = self._crop
            if stretch == 1:
                fine = fine[rows, columns]
            else:
                # About the optical axis, which need not be in the middle of the field.
                my, mx = (
                    0.5 * (c.start + c.stop - 1) - off * o / self.view.pitch_um
                    for c, off in zip(self._crop, self.view.off_axis_um[::-1], strict=True)
                )
                tx, ty = mx * (1 - stretch) - columns.start, my * (1 - stretch) - rows.start
                turn = np.array([[stretch, 0, tx], [0, stretch, ty]])
                size = (columns.stop - columns.start, rows.stop - rows.start)
                fine = cast("Real", cv2.warpAffine(fine, turn, size, flags=cv2.INTER_CUBIC))
            if o > 1:
                fine = cast("Real", cv2.resize(fine, (nx, ny), interpolation=cv2.INTER_AREA))
            bands.append(fine)
        return bands

    def _stretch(self, wavelength_um: float) -> float:
        """Magnification at a wavelength relative to the reference (lateral colour)."""
        spread = self.view.lens.aberrations.lateral_colour_um / self.view.field_radius_um
        return 1 + spread * (wavelength_um - REFERENCE_UM) / 0.2


class Renderer:
    """Images of a slide; the last fields stay ready for a further look.

    A view of more than :data:`TILED_ABOVE` samples along an edge is made of parts, each
    with a margin wide enough for ± 25 µm of defocus at NA 0.75, so that memory does not grow
    with the frame.

    Parameters
    ----------
    slide : Slide
        The slide.
    keep_mb : float
        How much memory kept fields may take, roughly.
    """

    def __init__(self, slide: Slide, keep_mb: float = 500.0) -> None:
        self.slide = slide
        self._keep_mb = keep_mb
        self._fields: OrderedDict[View, tuple[Field, float]] = OrderedDict()

    def _keep(self, view: View, field: Field, size_mb: float) -> None:
        self._fields[view] = (field, size_mb)
        while (
            len(self._fields) > 1 and sum(v[1] for v in self._fields.values()) > self._keep_mb
        ):
            self._fields.popitem(last=False)

    def _field(self, view: View) -> Field:
        """Return the field of a view in one piece, computed or kept."""
        found = self._fields.get(view)
        if found is not None:
            self._fields.move_to_end(view)
            return found[0]
        field = Field(self.slide, view)
        q = QUALITIES[view.quality]
        samples = view.shape[0] * view.shape[1] * q.oversample**2
        copies = q.n_points + 2 * q.n_layers
        self._keep(view, field, samples * copies * len(view.wavelengths_um) * 8e-6)
        return field

    def image(self, view: View, z_um: float) -> Real:
        """Light on each camera pixel; see :meth:`Field.image`."""
        parts = _parts(view)
        if len(parts) == 1:
            return self._field(view).image(z_um)
        shape = (*view.shape, 3) if view.colour else view.shape
        out = np.empty(shape, np.float32)
        q = QUALITIES[view.quality]
        # Only a single layer is small enough to keep all the parts.
        size_mb = view.shape[0] * view.shape[1] * q.oversample**2 * 100e-6
        keep = q.n_layers == 1 and size_mb <= self._keep_mb
        for (rows, columns), part in parts:
            found = self._fields.get(part)
            if found is None:
                field = Field(self.slide, part, margin_um=PART_MARGIN_UM, cache_mb=0)
                if keep:
                    self._keep(part, field, size_mb / len(parts))
            else:
                field = found[0]
            out[rows, columns] = field.image(z_um)
        return out


def _parts(view: View) -> list[tuple[tuple[slice, slice], View]]:
    """Divide a large view: where each part goes, and its own view."""
    o = QUALITIES[view.quality].oversample
    ny, nx = view.shape
    if max(ny, nx) * o <= TILED_ABOVE:
        return [((slice(0, ny), slice(0, nx)), view)]
    edges = [
        np.linspace(0, n, math.ceil(n * o / PART_SAMPLES) + 1).round().astype(int)
        for n in (ny, nx)
    ]
    out = []
    for y0, y1 in pairwise(edges[0].tolist()):
        for x0, x1 in pairwise(edges[1].tolist()):
            dx = (0.5 * (x0 + x1) - nx / 2) * view.pitch_um
            dy = (0.5 * (y0 + y1) - ny / 2) * view.pitch_um
            part = replace(
                view,
                x_um=view.x_um + dx,
                y_um=view.y_um + dy,
                shape=(y1 - y0, x1 - x0),
                off_axis_um=(view.off_axis_um[0] + dx, view.off_axis_um[1] + dy),
            )
            out.append(((slice(y0, y1), slice(x0, x1)), part))
    return out
