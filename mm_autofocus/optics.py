"""Image formation: what a microscope makes of a thin object that is not in focus.

Theory, on one page
-------------------
**Object.** A stained layer multiplies the light that meets it by the complex amplitude
transmission ``t(x, y) = exp(-a/2 + 2πi·w/λ)``: ``a`` is the absorbance (natural logarithm;
Beer-Lambert: intensity falls by ``exp(-a)``) and ``w`` the optical path difference in µm,
thickness times the difference of index. Light travels towards +z and the time factor is
``exp(-iωt)``, so that a later wavefront has the larger phase, and free space of thickness
``d`` multiplies each plane wave of spatial frequency ``f`` by ``exp(i·kz(f)·d)`` with
``kz = 2π·sqrt((n/λ)² - |f|²)``: the exact angular spectrum, not the paraxial parabola
(Goodman, *Introduction to Fourier Optics*, 3rd ed., § 3.10).

**Layers.** A specimen of several layers is passed by the split-step (multi-slice, beam
propagation) method: multiply by one layer, propagate to the next one, multiply, ... It
keeps multiple forward scattering and neglects back scattering and the vector nature of
light. One layer is the thin-object (projection) approximation.

**Illumination.** Köhler illumination through a condenser of aperture ``σ·NA`` is a sum
of mutually incoherent plane waves, the source points (Abbe). For a wave of frequency
``s``, the lens passes the part of the exit spectrum that meets its pupil ``P``; the image is

    ``I(x; d) = 1/S · Σ_s |F⁻¹{ E_s(f) · P(f) · exp(i·[kz(f) - kz(0)]·d) }|²``

(Born & Wolf, *Principles of Optics*, 7th ed., § 10.6; Mertz, *Introduction to Optical
Microscopy*, 2nd ed., ch. 4 and 9). A blank field images to 1.
A sum of few source points shows separate ghosts far from focus. In the paraxial limit
the images of neighbouring points are copies of each other moved by ``d·tan θ``, hence the
sum over the patch that one point stands for is a convolution; we apply the mean patch as
a Gaussian of standard deviation ``|d|`` times the spread of ``tan θ`` in it. It vanishes
in focus and is what makes eight points enough.

**Fluorescence.** Emitters are mutually incoherent: the image of a layer is its density
convolved with ``|F⁻¹{P·exp(i·kz·d)}|²``, normalised so that light is neither made nor lost.

**Pupil.** ``P = exp(2πi·W/λ)`` inside ``|f| ≤ NA/λ``, 0 outside; ``W`` is a sum of
Zernike polynomials with Noll's normalisation, so a coefficient is the rms error in waves
(at :data:`REFERENCE_UM`). Apodisation is left out (scalar theory, below about NA 1).

**Sign.** Defocus is ``d = z_image - z_focus``: positive means that the stage stood above
focus. It is *this same number* that stands in ``exp(i·kz·d)``: raising the stage raises
the plane in which the lens is sharp, and light has travelled ``d`` beyond the object when it
gets there. With d > 0, a thicker (or denser) spot, a weak converging lens, is therefore
brighter than its surroundings: ``∂I/∂z = -(λ/2πn)·∇·(I∇φ)``, the transport-of-intensity
equation (Teague, J. Opt. Soc. Am. 73, 1434 (1983)).

Lengths are µm, frequencies cycles/µm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import cv2
import numpy as np
import scipy.fft

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]
    Complex: TypeAlias = npt.NDArray[np.complex64]
    RealLike: TypeAlias = npt.NDArray[np.floating[Any]]

__all__ = [
    "REFERENCE_UM",
    "AbbeImager",
    "Aberrations",
    "FluorescenceImager",
    "Lens",
    "Source",
    "condenser",
    "good_size",
    "transmission",
    "wavefront_um",
]

REFERENCE_UM = 0.55
"""Wavelength at which aberrations are given in waves, in µm."""

_RINGS = {
    1: (1,),
    4: (4,),
    6: (6,),
    8: (2, 6),
    12: (4, 8),
    16: (4, 12),
    24: (4, 8, 12),
    40: (4, 8, 12, 16),
    60: (4, 8, 12, 16, 20),
    112: (4, 8, 12, 16, 20, 24, 28),
}


def _within(key: str, value: float, low: float, high: float) -> None:
    """Raise InputError unless low ≤ value ≤ high."""
    if not (math.isfinite(value) and low <= value <= high):
        raise InputError(f"{key}: {value:g} is not between {low:g} and {high:g}")


@dataclass(frozen=True, slots=True)
class Aberrations:
    """What is not ideal about a lens.

    Attributes
    ----------
    spherical_waves, defocus_waves, astigmatism_waves, coma_waves : float
        Coefficients of the Zernike polynomials (4,0), (2,0), (2,2) and (3,1) in waves rms
        at :data:`REFERENCE_UM`. Either sign.
    astigmatism_deg, coma_deg : float
        Their orientation.
    axial_colour_um : float
        Focus of red (0.65 µm) minus focus of blue (0.45 µm), linear in wavelength and 0 at
        :data:`REFERENCE_UM`.
    lateral_colour_um : float
        Displacement of the red image outwards relative to the blue one at the edge of the
        field of view.
    field_curvature_um : float
        Focus at the edge of the field of view minus focus on the axis.
    """

    spherical_waves: float = 0.0
    defocus_waves: float = 0.0
    astigmatism_waves: float = 0.0
    astigmatism_deg: float = 0.0
    coma_waves: float = 0.0
    coma_deg: float = 0.0
    axial_colour_um: float = 0.0
    lateral_colour_um: float = 0.0
    field_curvature_um: float = 0.0

    def __post_init__(self) -> None:
        for key in ("spherical", "defocus", "astigmatism", "coma"):
            _within(f"{key}_waves", getattr(self, f"{key}_waves"), -2.0, 2.0)
        for key in ("axial_colour_um", "lateral_colour_um", "field_curvature_um"):
            _within(key, getattr(self, key), -20.0, 20.0)

    def focus_shift_um(self, wavelength_um: float) -> float:
        """Focus at a wavelength relative to :data:`REFERENCE_UM`, in µm (axial colour)."""
        return self.axial_colour_um * (wavelength_um - REFERENCE_UM) / 0.2


@dataclass(frozen=True, slots=True)
class Lens:
    """An objective.

    Attributes
    ----------
    na : float
        Numerical aperture, between 0.01 and the index of the immersion medium.
    index : float
        Refractive index of the immersion medium, 1 to 2.
    aberrations : Aberrations
        What is not ideal about it.
    """

    na: float
    index: float = 1.0
    aberrations: Aberrations = field(default_factory=Aberrations)

    def __post_init__(self) -> None:
        _within("index", self.index, 1.0, 2.0)
        if not (math.isfinite(self.na) and 0.01 <= self.na < self.index):
            raise InputError(
                f"na: {self.na:g} is not between 0.01 and the refractive index "
                f"{self.index:g} of the immersion medium"
            )


@dataclass(frozen=True, slots=True)
class Source:
    """A condenser as a set of source points.

    Attributes
    ----------
    points : numpy.ndarray
        ``(S, 2)``: y and x in units of the pupil radius, of equal weight. The set is
        even: with each point it holds the opposite one.
    patch : float
        Standard deviation along one axis of the part of the source that one point
        stands for, in units of the pupil radius.
    """

    points: RealLike
    patch: float


def condenser(sigma: float, n_points: int) -> Source:
    """Model a uniformly filled condenser as rings of source points of equal weight.

    Each ring has the radius whose square is the mean over the annulus it stands for, so
    the second moment of the source is exact for any number of points.

    Parameters
    ----------
    sigma : float
        Condenser aperture over objective aperture, 0.01 to 0.98.
    n_points : int
        1 (coherent, on axis), 4, 6, 8, 12, 16, 24, 40, 60 or 112.

    Returns
    -------
    Source
        The points.

    Raises
    ------
    InputError
        If either is not allowed.
    """
    _within("sigma", sigma, 0.01, 0.98)
    if n_points not in _RINGS:
        raise InputError(f"n_points: {n_points} is not one of {', '.join(map(str, _RINGS))}")
    if n_points == 1:
        return Source(np.zeros((1, 2)), 0.0)
    points = []
    done = 0
    for j, count in enumerate(_RINGS[n_points]):
        radius = sigma * math.sqrt((done + count / 2) / n_points)
        phi = 2 * math.pi * (np.arange(count) + 0.5 * (j % 2)) / count + 0.3
        points.append(radius * np.stack([np.sin(phi), np.cos(phi)], axis=1))
        done += count
    pts = np.concatenate(points)
    # The spread inside a patch: of a dense set of points about their nearest neighbour.
    i = np.arange(4000) + 0.5
    angle = math.pi * (1 + math.sqrt(5)) * i
    dense = sigma * np.sqrt(i / 4000)[:, None] * np.stack([np.sin(angle), np.cos(angle)], 1)
    nearest = ((dense[:, None] - pts[None]) ** 2).sum(-1).min(axis=1)
    return Source(pts, float(math.sqrt(nearest.mean() / 2)))


def transmission(absorbance: RealLike, opd_um: RealLike, wavelength_um: float) -> Complex:
    """Complex amplitude transmission of a thin layer.

    Parameters
    ----------
    absorbance : numpy.ndarray
        ``(Y, X)``, natural logarithm: the intensity falls by ``exp(-absorbance)``.
    opd_um : numpy.ndarray
        ``(Y, X)``, optical path difference to the mounting medium.
    wavelength_um : float
        Wavelength in vacuum.

    Returns
    -------
    numpy.ndarray
        ``(Y, X)`` complex64.
    """
    modulus = np.exp(np.float32(-0.5) * absorbance.astype(np.float32, copy=False))
    phase = np.float32(2 * math.pi / wavelength_um) * opd_um.astype(np.float32, copy=False)
    out = np.empty(modulus.shape, np.complex64)
    out.real = modulus * np.cos(phase)
    out.imag = modulus * np.sin(phase)
    return out


def wavefront_um(lens: Lens, rho: RealLike, theta: RealLike) -> RealLike:
    """Wavefront error in µm at the pupil coordinates `rho` (0 to 1) and `theta`.

    Source: R. J. Noll, J. Opt. Soc. Am. 66, 207 (1976).
    """
    ab = lens.aberrations
    r2 = rho * rho
    w = ab.spherical_waves * math.sqrt(5) * (6 * r2 * r2 - 6 * r2 + 1)
    w = w + ab.defocus_waves * math.sqrt(3) * (2 * r2 - 1)
    if ab.astigmatism_waves:
        turned = 2 * (theta - math.radians(ab.astigmatism_deg))
        w = w + ab.astigmatism_waves * math.sqrt(6) * r2 * np.cos(turned)
    if ab.coma_waves:
        turned = theta - math.radians(ab.coma_deg)
        w = w + ab.coma_waves * math.sqrt(8) * (3 * r2 - 2) * rho * np.cos(turned)
    return cast("RealLike", REFERENCE_UM * w)


def good_size(n: int) -> int:
    """Find the smallest even length ≥ n without prime factors above 5: fast to transform."""
    size = scipy.fft.next_fast_len(n, real=True)
    while size % 2:
        size = scipy.fft.next_fast_len(size + 1, real=True)
    return int(size)


class _Pupil:
    """The pupil on the frequency grid of a field, centred, cut to its bounding square.

    Intensity does not depend on where the origin of the spectrum is, so the square is
    never moved back to the corners of the transform: it stays centred.
    """

    def __init__(
        self, shape: tuple[int, int], pitch: float, wavelength: float, lens: Lens
    ) -> None:
        self.wavelength = wavelength
        self.lens = lens
        self.df = (1 / (shape[0] * pitch), 1 / (shape[1] * pitch))
        cut = lens.na / wavelength
        # An odd square: symmetric about 0 and without the Nyquist row, which has no twin.
        self.half = tuple(
            min(math.floor(cut / df), n // 2 - 1) for df, n in zip(self.df, shape, strict=True)
        )
        fy, fx = (np.arange(-h, h + 1) * df for h, df in zip(self.half, self.df, strict=True))
        f2 = fy[:, None] ** 2 + fx[None, :] ** 2
        self.inside = f2 <= cut**2
        self.shape = f2.shape
        kz = 2 * math.pi * np.sqrt(np.maximum((lens.index / wavelength) ** 2 - f2, 0))
        self._kz = (kz - 2 * math.pi * lens.index / wavelength).astype(np.float32)
        rho = (np.sqrt(f2) / cut).astype(np.float32)
        theta = np.arctan2(fy[:, None].astype(np.float32), fx[None, :].astype(np.float32))
        w = wavefront_um(lens, rho, theta) * (2 * math.pi / wavelength)
        self._aberration = np.broadcast_to(w, f2.shape).astype(np.float32)
        self._inside32 = self.inside.astype(np.float32)

    def at(self, defocus_um: float) -> Complex:
        """Pupil function ``(K, K')`` for a defocus, axial colour included."""
        d = defocus_um - self.lens.aberrations.focus_shift_um(self.wavelength)
        phase = self._kz * np.float32(d)
        phase += self._aberration
        out = np.empty(self.shape, np.complex64)
        np.multiply(np.cos(phase), self._inside32, out=out.real)
        np.multiply(np.sin(phase), self._inside32, out=out.imag)
        return out


def _dft(u: Complex, inverse: bool = False) -> Real:
    """Transform ``(Y, X)`` in its place, without normalisation.

    In place, so that no memory is fetched anew for each source point. OpenCV's is 2 to 3 times
    as fast as SciPy's on x86 (measured; telling it which rows are zero makes it 7 times
    slower).

    Returns
    -------
    numpy.ndarray
        ``(Y, 2X)`` float32: `u`, its real and imaginary parts side by side.
    """
    parts = u.view(np.float32)
    pairs = parts.reshape(*u.shape, 2)
    cv2.dft(pairs, dst=pairs, flags=cv2.DFT_INVERSE if inverse else 0)
    return parts


class AbbeImager:
    """Brightfield images of one field at one wavelength, at any defocus.

    What does not depend on the defocus is computed once; a further look costs one pupil and
    one inverse transform per source point. The field is periodic: what leaves at one
    edge comes in at the other, so give it a margin.

    Parameters
    ----------
    layers : sequence of numpy.ndarray
        Complex amplitude transmissions, ``(Y, X)`` each, in the order in which light meets
        them (rising z); Y and X even.
    z_um : sequence of float
        Height of each layer in the specimen, rising.
    pitch_um : float
        Sampling of the layers.
    wavelength_um : float
        In vacuum, 0.2 to 2 µm.
    lens : Lens
        The objective.
    source : Source
        The condenser.
    medium_index : float
        Index between the layers.
    smooth : bool
        Spread each source point over its patch when defocused.
    cache_mb : float
        Spectra are kept while they need no more than this; else they are computed anew
        for each image.

    Raises
    ------
    InputError
        If a number is outside of physics.
    """

    def __init__(
        self,
        layers: Sequence[Complex],
        z_um: Sequence[float],
        *,
        pitch_um: float,
        wavelength_um: float,
        lens: Lens,
        source: Source,
        medium_index: float = 1.52,
        smooth: bool = True,
        cache_mb: float = 128.0,
    ) -> None:
        _within("wavelength_um", wavelength_um, 0.2, 2.0)
        _within("pitch_um", pitch_um, 0.005, 20.0)
        _within("medium_index", medium_index, 1.0, 2.0)
        if len(layers) != len(z_um) or not layers or any(n % 2 for n in layers[0].shape):
            raise InputError("layers: one z_um each, and an even number of rows and columns")
        self._shape = (layers[0].shape[0], layers[0].shape[1])
        self._pitch = pitch_um
        self._wavelength = wavelength_um
        self._index = medium_index
        self._layers = list(layers)
        self._z = [float(z) for z in z_um]
        self._pupil = _Pupil(self._shape, pitch_um, wavelength_um, lens)
        # On the grid, so that a source point is a shift by whole samples.
        cut = lens.na / wavelength_um
        self._shifts = [
            tuple(int(v) for v in np.rint(p * cut / np.array(self._pupil.df)))
            for p in source.points
        ]
        mean_r2 = float((source.points**2).sum(axis=1).mean())
        cos2 = max(1 - (lens.na / lens.index) ** 2 * mean_r2, 0.05)
        self._spread = source.patch * lens.na / lens.index / cos2 if smooth else 0.0
        # A chequered sign moves frequency 0 of every transform to the middle.
        flip = np.ones(self._shape, np.float32)
        flip[0::2, 1::2] = flip[1::2, 0::2] = -1
        self._first = layers[0] * flip
        _dft(self._first)
        self._rest = list(layers[1:])
        self._steps: list[Complex] = []
        self._prepare_steps()
        self._spectra: list[Complex] = []
        size_mb = self._pupil.inside.size * 8e-6 * len(self._shifts)
        if size_mb <= cache_mb:
            self._spectra = [self._exit(shift) for shift in self._shifts]
            self._rest, self._steps = [], []
            self._first = self._back = np.zeros((0, 0), np.complex64)  # no longer needed

    @property
    def z_mean_um(self) -> float:
        """Height of the middle of the layers."""
        return 0.5 * (self._z[0] + self._z[-1])

    def _prepare_steps(self) -> None:
        """Tabulate propagation from layer to layer, wide enough for every source point."""
        if not self._rest:
            return
        k = self._index / self._wavelength
        self._reach = [max(abs(s[axis]) for s in self._shifts) for axis in (0, 1)]

        def table(half: Sequence[int], high: Sequence[int], dz: float) -> Complex:
            fy, fx = (
                np.arange(-a, b) * df
                for a, b, df in zip(half, high, self._pupil.df, strict=True)
            )
            left = np.float32(k * k) - (fy**2).astype(np.float32)[:, None]
            left = left - (fx**2).astype(np.float32)[None, :]
            phase = np.float32(2 * math.pi * dz) * np.sqrt(np.maximum(left, 0))
            out = np.empty(phase.shape, np.complex64)
            out.real, out.imag = np.cos(phase), np.sin(phase)
            out[left < 0] = 0  # evanescent
            return out

        wide = [n // 2 + r for n, r in zip(self._shape, self._reach, strict=True)]
        self._steps = [table(wide, wide, float(dz)) for dz in np.diff(self._z)]
        # Defocus 0 is the middle of the layers: go back there from the last one, through
        # the medium they lie in.
        half = self._pupil.half
        self._back = table(half, [h + 1 for h in half], self.z_mean_um - self._z[-1])

    def _cut(self, spectrum: Complex, shift: tuple[int, ...]) -> Complex:
        """Cut out what a source point brings before the pupil, of a centred spectrum."""
        out = np.zeros(self._pupil.shape, np.complex64)
        src, dst = [], []
        for n, half, s in zip(self._shape, self._pupil.half, shift, strict=True):
            low, high = n // 2 - half - s, n // 2 + half + 1 - s
            a, b = max(low, 1), min(high, n)  # row 0 is the Nyquist frequency
            src.append(slice(a, b))
            dst.append(slice(a - low, b - low))
        out[dst[0], dst[1]] = spectrum[src[0], src[1]]
        return out

    def _exit(self, shift: tuple[int, ...]) -> Complex:
        """Spectrum behind the last layer for a source point, before the pupil."""
        if not self._rest:
            return self._cut(self._first, shift)
        at = tuple(
            slice(r + s, r + s + n)
            for r, s, n in zip(self._reach, shift, self._shape, strict=True)
        )
        spectrum = self._first
        scale = np.float32(1 / spectrum.size)
        for layer, step in zip(self._rest, self._steps, strict=True):
            spectrum = spectrum * step[at]
            _dft(spectrum, inverse=True)
            spectrum *= layer
            spectrum *= scale
            _dft(spectrum)
        return self._cut(spectrum, shift) * self._back

    def image(self, defocus_um: float) -> Real:
        """Intensity at a defocus, relative to a blank field.

        Parameters
        ----------
        defocus_um : float
            ``z_image - z_focus`` of the middle of the layers, in µm of the stage.

        Returns
        -------
        numpy.ndarray
            ``(Y, X)`` float32, 1 where there is no specimen.
        """
        pupil = self._pupil.at(defocus_um)
        work = np.empty(self._shape, np.complex64)
        total = np.zeros((self._shape[0], 2 * self._shape[1]), np.float32)
        rows, columns = pupil.shape
        for i, shift in enumerate(self._shifts):
            spectrum = self._spectra[i] if self._spectra else self._exit(shift)
            np.multiply(spectrum, pupil, out=work[:rows, :columns])
            work[rows:] = 0
            work[:, columns:] = 0
            cv2.accumulateSquare(_dft(work, inverse=True), total)
        total *= np.float32(1.0 / (len(self._shifts) * (self._shape[0] * self._shape[1]) ** 2))
        image = total[:, 0::2] + total[:, 1::2]
        sd = abs(defocus_um) * self._spread / self._pitch
        if sd > 0.05:
            image = cast("Real", cv2.GaussianBlur(image, (0, 0), sd))
        return image


class FluorescenceImager:
    """Widefield fluorescence images of one field at one wavelength, at any defocus.

    Parameters
    ----------
    layers : sequence of numpy.ndarray
        Density of emitters, ``(Y, X)`` each, Y and X even, any unit.
    z_um : sequence of float
        Height of each layer in the specimen.
    pitch_um, wavelength_um, lens, medium_index
        As in :class:`AbbeImager`; the wavelength is that of the emission.
    """

    def __init__(
        self,
        layers: Sequence[Real],
        z_um: Sequence[float],
        *,
        pitch_um: float,
        wavelength_um: float,
        lens: Lens,
        medium_index: float = 1.52,
    ) -> None:
        _within("wavelength_um", wavelength_um, 0.2, 2.0)
        if len(layers) != len(z_um) or not layers or any(n % 2 for n in layers[0].shape):
            raise InputError("layers: one z_um each, and an even number of rows and columns")
        self._shape = (layers[0].shape[0], layers[0].shape[1])
        middle = 0.5 * (z_um[0] + z_um[-1])
        # Paraxially, a depth in the medium is this much of a move of the stage.
        self._depth = [(z - middle) * lens.index / medium_index for z in z_um]
        self._spectra = [
            scipy.fft.rfft2(layer.astype(np.float32), workers=1) for layer in layers
        ]
        # Twice as fine as the layers: the square of the amplitude has twice its band.
        fine = (2 * self._shape[0], 2 * self._shape[1])
        self._pupil = _Pupil(fine, pitch_um / 2, wavelength_um, lens)
        self._fine = fine

    def otf(self, defocus_um: float) -> Complex:
        """Transfer function ``(Y, X//2 + 1)`` for a defocus; 1 at frequency 0."""
        work = np.zeros(self._fine, np.complex64)
        pupil = self._pupil.at(defocus_um)
        work[: pupil.shape[0], : pupil.shape[1]] = pupil
        u = _dft(work, inverse=True)
        u *= u
        psf = u[:, 0::2] + u[:, 1::2]
        full = scipy.fft.rfft2(psf, workers=1)
        ny, nx = self._shape
        out = np.concatenate([full[: ny // 2], full[-ny // 2 :]])[:, : nx // 2 + 1]
        # The square of the field has no carrier: its origin is that of the point source.
        return cast("Complex", (out / full[0, 0].real).astype(np.complex64))

    def image(self, defocus_um: float) -> Real:
        """Emission at a defocus, ``(Y, X)`` float32, in the unit of the layers."""
        total = np.zeros_like(self._spectra[0])
        for spectrum, depth in zip(self._spectra, self._depth, strict=True):
            total += spectrum * self.otf(defocus_um - depth)
        image = scipy.fft.irfft2(total, s=self._shape, workers=1)
        return cast("Real", np.maximum(image, 0).astype(np.float32))
