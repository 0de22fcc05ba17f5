"""What a net that recovers the sharp image has to beat: five ways without learning.

``sharper``    the sharper shot (Brenner) as it is
``mean``       the mean of both shots
``wiener``     the sharper shot, sharpened by a Wiener filter for a defocus of the optics
``wavelet``    fusion of both by the larger stationary wavelet coefficients
``laplacian``  fusion of both by the energy of the Laplacian (`mm_autofocus.models.fusion.fuse`)

scikit-image and PyWavelets are needed for some of them and nowhere at run time; they are
imported when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.frames import saturation
from mm_autofocus.models.fusion import fuse, sharper_of
from mm_autofocus.optics import FluorescenceImager, Lens

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image, Optics

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = [
    "REFOCUS_BASELINES",
    "SHARPER",
    "Baseline",
    "TwoShots",
    "Wiener",
    "WienerSetting",
    "as_frame",
    "baselines_of",
    "mean_of_both",
    "need_images",
    "planes_of",
    "sharper_shot",
    "two_shots",
    "wavelet_fusion",
]

SHARPER = "sharper"
REFOCUS_BASELINES = (SHARPER, "mean", "wiener", "wavelet", "laplacian")
"""Baselines by name."""

_WAVELET, _LEVELS = "sym4", 4
_MARGIN_PX = 32
_PSF_PX = 64
_COLOURS_UM = (0.61, 0.55, 0.46)  # red, green and blue of a colour camera, about


def need_images() -> None:
    """Say how to get scikit-image and PyWavelets where they are missing.

    Raises
    ------
    InputError
        One of them is.
    """
    try:
        import pywt  # noqa: F401
        import skimage  # noqa: F401
    except ImportError as e:
        raise InputError(
            f"to judge recovered images needs {e.name}, which is not installed: "
            "pip install mm-autofocus[evaluate]"
        ) from None


@dataclass(frozen=True, slots=True)
class TwoShots:
    """Two shots as the baselines see them.

    Attributes
    ----------
    planes : numpy.ndarray
        ``(2, C, Y, X)`` float32 in 0 … 1, the sharper one first.
    side : {1, -1}
        1: the sharper one is the lower one.
    half_um : float
        Half of their distance.
    optics : Optics
        As far as known.
    """

    planes: Real = field(repr=False)
    side: int
    half_um: float
    optics: Optics


Baseline: TypeAlias = Callable[[TwoShots], "Real"]
"""From two shots to ``(C, Y, X)`` float32."""


def two_shots(
    lower: Image, upper: Image, half_um: float, optics: Optics, max_value: float | None = None
) -> TwoShots:
    """Shots as the camera gave them, ordered and scaled.

    Parameters
    ----------
    lower, upper : numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``.
    half_um, optics, max_value
        As in `TwoShots`; where the camera saturates.
    """
    limit = saturation(lower, max_value)
    planes = np.stack([planes_of(shot, limit) for shot in (lower, upper)])
    side = sharper_of(planes[0], planes[1])
    return TwoShots(planes if side > 0 else planes[::-1], side, half_um, optics)


def planes_of(shot: Image, limit: float) -> Real:
    """A frame as ``(C, Y, X)`` float32 in 0 … 1."""
    first: Any = shot[None] if shot.ndim == 2 else np.moveaxis(shot, -1, 0)
    return np.asarray(np.multiply(first, np.float32(1 / limit), dtype=np.float32))


def as_frame(image: Real, limit: float, dtype: str) -> npt.NDArray[Any]:
    """``(C, Y, X)`` in 0 … 1 as the camera would give it, rounded if that is of integers."""
    values = np.clip(image, 0, 1) * np.float32(limit)
    if np.dtype(dtype).kind in "iu":
        values = np.rint(values)
    return (values[0] if len(values) == 1 else np.moveaxis(values, 0, -1)).astype(dtype)


def sharper_shot(shots: TwoShots) -> Real:
    """The sharper shot as it is."""
    sharper: Real = shots.planes[0]
    return sharper


def mean_of_both(shots: TwoShots) -> Real:
    """The mean of both shots."""
    return np.asarray(shots.planes.mean(0), np.float32)


def laplacian_fusion(shots: TwoShots) -> Real:
    """Fusion by the energy of the Laplacian."""
    return fuse(shots.planes)


# ------------------------------------------------------------------------------- wavelets


def wavelet_fusion(shots: TwoShots) -> Real:
    """Extended depth of field by wavelets.

    Of each place, scale and shot the energy of the three detail bands in a neighbourhood of
    3² says which shot is sharp there; single places follow their neighbours (majority of
    3²: the consistency check), and a place follows its bands together, not one by one. The
    detail coefficients are taken from that shot, the coarsest scale is the mean. The
    transform is stationary (no decimation, so no grid shows). After Forster, Van De Ville,
    Berent, Sage and Unser, *Microsc. Res. Tech.* 65 (2004) 33-42, who take the modulus of
    complex wavelets and find the colours afterwards; here the energy stands for the modulus,
    and one choice, made on the mean of the channels, holds for all of them.
    """
    import pywt

    height, width = shots.planes.shape[2:]
    step = 2**_LEVELS
    pad = [(0, 0), (0, 0), *((_MARGIN_PX, _MARGIN_PX + -n % step) for n in (height, width))]
    planes = np.pad(shots.planes, pad, mode="symmetric")
    found = [
        [_transform(pywt, channel) for channel in shot] for shot in planes
    ]  # [shot][channel][level]
    channels = planes.shape[1]
    fused: list[list[Any]] = [
        [0.5 * (found[0][c][0] + found[1][c][0])] for c in range(channels)
    ]
    for level in range(1, _LEVELS + 1):
        energy = []
        for shot in found:
            bands = [np.mean([shot[c][level][b] for c in range(channels)], 0) for b in range(3)]
            energy.append(_around(np.square(bands).sum(0)))
        other = _around(energy[1] > energy[0]) > 0.5
        for c in range(channels):
            pairs = zip(found[0][c][level], found[1][c][level], strict=True)
            fused[c].append(tuple(np.where(other, b, a) for a, b in pairs))
    whole = np.stack([pywt.iswt2(parts, _WAVELET, norm=True) for parts in fused])
    y, x = slice(_MARGIN_PX, _MARGIN_PX + height), slice(_MARGIN_PX, _MARGIN_PX + width)
    return np.asarray(whole[:, y, x], np.float32)


def _around(values: npt.NDArray[Any]) -> Real:
    """Mean over a neighbourhood of 3²."""
    plane: Any = values.astype(np.float32)
    return np.asarray(cv2.blur(plane, (3, 3), borderType=cv2.BORDER_REFLECT), np.float32)


def _transform(pywt: Any, plane: Real) -> list[Any]:
    return list(pywt.swt2(plane, _WAVELET, _LEVELS, trim_approx=True, norm=True))


# --------------------------------------------------------------------------------- Wiener


@dataclass(frozen=True, slots=True)
class WienerSetting:
    """One setting of the filter.

    Attributes
    ----------
    blur : float
        Defocus of the point spread function, µm; where NA or pixel size is not known, the
        standard deviation of a Gaussian in pixels.
    balance : float
        Weight of the smoothness (square of the Laplacian) against the data.
    """

    blur: float
    balance: float


_GRID = [
    WienerSetting(b, n)
    for b, n in product((0.3, 0.6, 1.0, 1.5, 2.2), (0.003, 0.01, 0.03, 0.1, 0.3))
]


@dataclass(frozen=True, slots=True)
class Wiener:
    """Wiener filter of the sharper shot (scikit-image), channel by channel.

    The point spread function is that of the lens at a defocus (scalar, incoherent): how far
    the sharper shot is from focus the filter is not told, so that one setting holds for all
    pairs of the same distance.

    Attributes
    ----------
    settings : dict
        Half distance of the shots, µm → the setting for it; the nearest one is used. Empty:
        half of that distance for the defocus, and a balance of 0.1.
    """

    settings: dict[float, WienerSetting] = field(default_factory=dict)

    def setting(self, half_um: float) -> WienerSetting:
        """The setting for shots of a distance."""
        if not self.settings:
            return WienerSetting(0.5 * half_um, 0.1)
        return self.settings[min(self.settings, key=lambda known: abs(known - half_um))]

    def __call__(self, shots: TwoShots) -> Real:
        """Filter."""
        return filtered(shots.planes[0], shots.optics, self.setting(shots.half_um))

    @classmethod
    def fit(cls, pairs: Iterable[tuple[TwoShots, Real]], halves_um: Sequence[float]) -> Wiener:
        """Choose the setting for each distance by the mean PSNR, on data of no test.

        Parameters
        ----------
        pairs : iterable
            Shots and their truth ``(C, Y, X)``.
        halves_um : sequence of float
            Distances to choose for; a pair counts for the nearest.
        """
        scores: dict[float, list[list[float]]] = {half: [] for half in halves_um}
        for shots, truth in pairs:
            near = min(scores, key=lambda half: abs(half - shots.half_um))
            square = [
                float(np.square(filtered(shots.planes[0], shots.optics, s) - truth).mean())
                for s in _GRID
            ]
            scores[near].append([-10 * np.log10(max(v, 1e-10)) for v in square])
        best = {
            half: _GRID[int(np.mean(rows, 0).argmax())] for half, rows in scores.items() if rows
        }
        return cls(best)


def filtered(shot: Real, optics: Optics, setting: WienerSetting) -> Real:
    """Filter the channels of a shot ``(C, Y, X)``; its borders are mirrored."""
    from skimage import restoration

    wiener: Any = restoration.wiener
    pad = ((_MARGIN_PX, _MARGIN_PX), (_MARGIN_PX, _MARGIN_PX))
    inside = slice(_MARGIN_PX, -_MARGIN_PX)
    out = np.empty_like(shot)
    colours = _COLOURS_UM if len(shot) == 3 else (optics.wavelength_um,) * len(shot)
    for c, plane in enumerate(shot):
        psf = _psf(
            optics.na, optics.pixel_size_um, optics.refractive_index, colours[c], setting.blur
        )
        wide = np.pad(plane, pad, mode="symmetric")
        out[c] = wiener(wide, psf, setting.balance, clip=False)[inside, inside]
    return np.clip(out, 0, 1)


@lru_cache(maxsize=256)
def _psf(
    na: float | None, pixel_um: float | None, index: float, wavelength_um: float, blur: float
) -> Real:
    """Point spread function, odd edge, its sum 1."""
    n = _PSF_PX
    point = np.zeros((n, n), np.float32)
    point[n // 2, n // 2] = 1
    if na is None or not pixel_um:
        psf = cv2.GaussianBlur(point, (0, 0), max(blur, 0.1))
    else:
        imager = FluorescenceImager(
            [point], [0.0], pitch_um=pixel_um, wavelength_um=wavelength_um, lens=Lens(na, index)
        )
        psf = imager.image(blur)
    psf = psf[1:, 1:]  # the point is in its middle now
    return np.asarray(psf / psf.sum(), np.float32)


def baselines_of(names: Sequence[str], wiener: Wiener | None = None) -> dict[str, Baseline]:
    """Baselines by name, in the order of :data:`REFOCUS_BASELINES`; with the first, always."""
    known: dict[str, Baseline] = {
        SHARPER: sharper_shot,
        "mean": mean_of_both,
        "wiener": wiener or Wiener(),
        "wavelet": wavelet_fusion,
        "laplacian": laplacian_fusion,
    }
    return {name: known[name] for name in REFOCUS_BASELINES if name in names or name == SHARPER}
