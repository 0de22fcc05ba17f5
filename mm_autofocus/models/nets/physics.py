"""What the theory of defocus says of a patch: its power spectrum against each hypothesis.

Defocus multiplies the spectrum of a frame by the optical transfer function (OTF). Its
logarithm is therefore *added to* by a term that the optics alone decide:

``log S(f; d) = log S₀(f) + 2 log |OTF(f; d)|``

with the spectrum ``S₀`` of the specimen, which is not known but alike from patch to patch. For
each of a grid of hypotheses of defocus `OtfMatch` subtracts that term from the measured
spectrum and looks how well what is left agrees with a common ``S₀``, which is learned. Of
two looks it also compares the difference of the spectra, from which ``S₀`` drops out.

The OTF is that of an incoherent, aberration-free lens, in Stokseth's approximation
(*J. Opt. Soc. Am.* 59 (1969) 1314–1321). It is even in defocus: of a single look these
features say how far, never which way. For two looks they say both.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import j1
from torch import Tensor, nn

from mm_autofocus.errors import InputError
from mm_autofocus.models.nets.base import NetContext, count_of, full_precision

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = [
    "CrossSpectra",
    "OtfMatch",
    "RadialSpectrum",
    "Rings",
    "defocus_otf",
    "window_of",
]

_TILE = 32
_LEAST_POWER = 1e-8  # noise of a good camera, at 1 for white: some 1e-5
_COARSE_RINGS = 8  # where there still is something far from focus
_EMPTY = 0.02  # weight of the emptiest tile, in parts of that of the fullest
_COHERENT = 1 - 1e-5  # no two planes are more alike than that
_FLOOR = 1e-3  # of the OTF: behind its zeros noise and aberrations leave something


def defocus_otf(
    frequency: npt.NDArray[np.float64],
    defocus_um: npt.NDArray[np.float64],
    na: float,
    wavelength_um: float,
) -> npt.NDArray[np.float64]:
    """Modulus of the OTF of a defocused, incoherent, aberration-free lens.

    Parameters
    ----------
    frequency : numpy.ndarray
        ``(F,)``, in periods per µm in the specimen.
    defocus_um : numpy.ndarray
        ``(D,)``; only its modulus counts.
    na, wavelength_um : float
        Numerical aperture; wavelength in vacuum.

    Returns
    -------
    numpy.ndarray
        ``(D, F)`` in 0 … 1.
    """
    s = np.clip(frequency * wavelength_um / na, 0.0, 2.0)  # 2 at the cutoff
    perfect = (2 * np.arccos(s / 2) - np.sin(2 * np.arccos(s / 2))) / math.pi
    # path difference between the rim of the pupil and its middle, in wavelengths
    sine = min(na, 0.999)
    w20 = np.abs(defocus_um) * (1 - math.sqrt(1 - sine**2)) / wavelength_um
    a = 4 * math.pi * w20[:, None] * (s * (1 - s / 2))[None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        jinc = np.where(a > 1e-6, 2 * j1(a) / a, 1.0)
    out: npt.NDArray[np.float64] = np.abs(perfect * jinc)
    return out


def window_of(n: int, *, unit: bool) -> npt.NDArray[np.float64]:
    """Hann's window ``(n,)`` along one axis; `unit` as `Rings` takes it."""
    window = np.hanning(n + 2)[1:-1]
    return window / math.sqrt(np.square(window).mean() * n) if unit else window


class Rings(nn.Module):
    """Fourier transform of tiles, and means over rings of equal frequency.

    In an exported graph the transform is two products with constant matrices, which every
    runtime of ONNX knows.

    Parameters
    ----------
    tile : int
        Edge of a tile in pixels.
    unit : bool
        Whether the window is scaled so that white noise of variance v has power v.

    Attributes
    ----------
    frequency : numpy.ndarray
        ``(rings,)``, in periods per pixel: all but the mean and the highest.
    """

    def __init__(self, tile: int, *, unit: bool = False) -> None:
        super().__init__()
        n, half = tile, tile // 2 + 1
        at = np.arange(n)
        phase = 2 * math.pi * np.outer(np.arange(n), at) / n
        window = window_of(n, unit=unit)
        fy, fx = np.meshgrid(np.minimum(at, n - at) / n, np.arange(half) / n)
        ring = np.rint(np.hypot(fx, fy) * n).astype(int)
        rings = np.arange(1, (n + 1) // 2)
        masks = np.stack([(ring == r) / max((ring == r).sum(), 1) for r in rings])
        self.tile, self.frequency = tile, rings / n
        for name, value in (
            ("cosine", np.cos(phase)),
            ("sine", np.sin(phase)),
            ("window", np.outer(window, window)),
            ("masks", masks.reshape(len(rings), -1)),
        ):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, C, P, P)`` to real and imaginary parts, each ``(N, C, tiles, T // 2 + 1, T)``.

        P is cut to a multiple of the tile. Each tile loses its mean and is windowed.
        """
        n, c = x.shape[:2]
        size = self.tile
        rows, columns = x.shape[2] // size, x.shape[3] // size
        tiles = x[:, :, : rows * size, : columns * size].float()
        tiles = tiles.reshape(n, c, rows, size, columns, size).transpose(3, 4)
        count = rows * columns
        tiles = tiles.reshape(n, c, count, size, size)
        window: Tensor = self.window  # type: ignore[assignment]
        tiles = (tiles - tiles.mean((3, 4), keepdim=True)) * window
        if not torch.onnx.is_in_onnx_export():
            both = torch.fft.rfft2(tiles).transpose(3, 4)
            return both.real.contiguous(), both.imag.contiguous()
        return self.by_matrices(tiles)

    def by_matrices(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """The same of windowed tiles ``(N, C, tiles, T, T)``, as a graph can hold it.

        Four times as slow as the fast transform of torch, of which ONNX knows nothing that
        all its runtimes support.
        """
        n, c, count, size = tiles.shape[:4]
        half = size // 2 + 1
        cosine: Tensor = self.cosine  # type: ignore[assignment]
        sine: Tensor = self.sine  # type: ignore[assignment]
        # Plain matrices, and no -1 for their rows: ONNX Runtime takes an empty batch then.
        lines = tiles.reshape(n * c * count * size, size)

        def turned(along: Tensor) -> Tensor:
            along = along.reshape(n * c * count, size, half).transpose(1, 2)
            return along.reshape(n * c * count * half, size)

        along_cos = turned(lines @ cosine[:, :half])
        along_sin = turned(lines @ sine[:, :half])
        real = along_cos @ cosine - along_sin @ sine
        imaginary = -(along_sin @ cosine + along_cos @ sine)
        shape = (n, c, count, half, size)
        return real.reshape(shape), imaginary.reshape(shape)

    def means(self, power: Tensor) -> Tensor:
        """``(N, C, tiles, T // 2 + 1, T)`` to means ``(N, C, rings)`` over tiles and rings."""
        return self.each(power.mean(2, keepdim=True)).mean(2)

    def each(self, power: Tensor) -> Tensor:
        """``(N, C, tiles, T // 2 + 1, T)`` to means ``(N, C, tiles, rings)`` over rings."""
        n, c, tiles = power.shape[:3]
        masks: Tensor = self.masks  # type: ignore[assignment]
        # no -1: an empty batch would leave it open
        rings: Tensor = power.reshape(n, c, tiles, masks.shape[1]) @ masks.t()
        return rings


class RadialSpectrum(nn.Module):
    """Logarithm of the mean power spectrum of tiles, by rings of equal frequency.

    Frequencies in periods per pixel are in `frequency`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rings = Rings(_TILE)
        self.frequency = self.rings.frequency

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, P, P)`` to ``(N, C, rings)``; P is cut to a multiple of 32."""
        real, imaginary = self.rings.transform(x)
        return (self.rings.means(real.square() + imaginary.square()) + 1e-6).log()


class CrossSpectra(nn.Module):
    """What the planes of a patch say together, ring by ring, at three scales.

    Of the first plane the logarithm of the power, of each other one by how much its own is
    above that of the colour or of the look before it: of two looks a few per cent count, which
    a net would not see in the difference of two inputs that vary by factors. Of two planes of
    one look, or of one colour, the coherence: the real part of their cross spectrum over the
    root of both powers, -1 … 1. It is given by Fisher's z (the inverse hyperbolic tangent),
    whose scatter is the same at 0 and near 1, where looks are nearly alike and what little they
    differ by tells how far focus is.

    The zeros and ripples of the optical transfer function lie at frequencies that only
    defocus and aperture decide, whatever the specimen. Between colours and between looks the
    specimen drops out, and what is left knows the side of focus, too (axial colour, spherical
    aberration, phase).

    A quarter of a patch is a tile; at the coarsest scale, averaged over 4 × 4 pixels, the
    whole patch is one. Far from focus the ripples are finer than a small tile resolves, and
    lie at frequencies that the coarse scale still holds. Tiles with more in them count for
    more: of a single cell in a patch the rest is noise.

    Parameters
    ----------
    looks, channels : int
        A patch has `channels` planes of each look, look by look.
    patch_px : int
        Edge of a patch, at least 16.

    Attributes
    ----------
    features : int
        How many it returns.
    """

    scales = (1, 2, 4)

    def __init__(self, looks: int, channels: int, patch_px: int) -> None:
        super().__init__()
        self.patch_px, self.channels = patch_px, channels
        self.rings = Rings(patch_px // max(self.scales), unit=True)
        planes = looks * channels
        pairs = [
            (a, b)
            for a, b in combinations(range(planes), 2)
            if a // channels == b // channels or a % channels == b % channels
        ]
        self.first, self.second = [a for a, _ in pairs], [b for _, b in pairs]
        each = len(self.rings.frequency) * (planes + len(pairs))
        self.features = len(self.scales) * each

    def check(self, px: int) -> None:
        """Check the edge of the patches of a training.

        Raises
        ------
        InputError
            They are smaller than those of the run time.
        """
        if px < self.patch_px:
            raise InputError(
                f"train_px: {px} is less than patch_px, {self.patch_px}; "
                "spectra need whole patches (or set net.spectra=0)"
            )

    def forward(self, patches: Tensor) -> Tensor:
        """``(N, C, P, P)`` in 0 … 1 to ``(N, F)``; P as `check` allows it."""
        if not torch.onnx.is_in_onnx_export():
            self.check(min(patches.shape[2:]))
        with full_precision(patches):
            x = patches.float()
            n, each = x.shape[0], self.features // len(self.scales)
            return torch.cat([self._at(x, scale).reshape(n, each) for scale in self.scales], 1)

    def _at(self, x: Tensor, scale: int) -> Tensor:
        """``(N, planes + pairs, rings)`` at one scale."""
        image = nn.functional.avg_pool2d(x, scale) if scale > 1 else x
        size = self.rings.tile
        # few tiles overlap by half: what lies between two of them is not lost
        few = size + size // 2 <= min(image.shape[2:]) < 4 * size
        steps = (0, size // 2) if few else (0,)
        parts = [self.rings.transform(image[:, :, y:, at:]) for y in steps for at in steps]
        real = torch.cat([one for one, _ in parts], 2)
        imaginary = torch.cat([other for _, other in parts], 2)
        each = self.rings.each(real.square() + imaginary.square())
        weight = _content(each)
        power = (each * weight).sum(2)
        if not self.first:
            return self.told_by(power, None)
        i, j = self.first, self.second
        cross = real[:, i] * real[:, j] + imaginary[:, i] * imaginary[:, j]
        return self.told_by(power, (self.rings.each(cross) * weight).sum(2))

    def told_by(self, power: Tensor, cross: Tensor | None) -> Tensor:
        """Features of one scale, ``(N, planes + pairs, rings)``.

        Parameters
        ----------
        power : Tensor
            ``(N, planes, rings)``.
        cross : Tensor | None
            ``(N, pairs, rings)``: real part of the cross spectra; None of one plane.
        """
        logarithm = _apart((power + _LEAST_POWER).log(), self.channels)
        if cross is None:
            return logarithm
        root = (power[:, self.first] * power[:, self.second]).sqrt() + _LEAST_POWER
        return torch.cat((logarithm, _fisher_z(cross / root)), 1)


def _apart(logarithm: Tensor, channels: int) -> Tensor:
    """Of planes ``(N, planes, rings)``: the first one, and what the others differ by."""
    first, colours = logarithm[:, :1], logarithm[:, :channels]
    between = colours[:, 1:] - colours[:, :-1]
    return torch.cat((first, between, logarithm[:, channels:] - logarithm[:, :-channels]), 1)


def _fisher_z(coherence: Tensor) -> Tensor:
    """Inverse hyperbolic tangent of what may be 1: ± 6.1 at most.

    By logarithms: the exporter has no word for it.
    """
    x = _COHERENT * coherence.clamp(-1, 1)
    return 0.5 * ((1 + x).log() - (1 - x).log())


def _content(power: Tensor) -> Tensor:
    """Weights ``(N, 1, tiles, 1)`` of tiles, 1 in all, by what they hold at low frequencies.

    The emptiest tile tells how much of it is noise.
    """
    low = power[..., :_COARSE_RINGS].mean((1, 3))
    above = low - low.amin(1, keepdim=True)
    weight = above + _EMPTY * above.amax(1, keepdim=True) + _LEAST_POWER
    return (weight / weight.sum(1, keepdim=True))[:, None, :, None]


class OtfMatch(nn.Module):
    """How well each hypothesis of defocus explains the spectra of the looks.

    Attributes
    ----------
    features : int
        How many it returns: spectra at two scales, and one number per hypothesis.
    hypotheses : Tensor
        ``(H,)``, µm, signed.
    """

    def __init__(self, context: NetContext, step_um: float = 1.0) -> None:
        super().__init__()
        self.looks, self.channels = len(context.looks_um), context.channels
        self.scales = (1, 4)  # far from focus, what is left lies below one ring
        self.spectrum = RadialSpectrum()
        low, high = context.range_um
        n = count_of(context.range_um, step_um)
        grid = np.linspace(low, high, n)
        na = context.na or 0.5
        wavelength = context.wavelength_um or 0.55
        pixel = context.pixel_size_um or 0.25 * wavelength / na
        table = np.empty((len(self.scales), self.looks, n, len(self.spectrum.frequency)))
        for i, scale in enumerate(self.scales):
            f = self.spectrum.frequency / (pixel * scale)
            for j, offset in enumerate(context.looks_um):
                otf = defocus_otf(f, grid + offset, na, wavelength)
                table[i, j] = np.log(otf**2 + _FLOOR**2)
        self.register_buffer("hypotheses", torch.tensor(grid, dtype=torch.float32))
        self.register_buffer("table", torch.tensor(table, dtype=torch.float32))
        rings = table.shape[-1]
        self.specimen = nn.Parameter(torch.zeros(len(self.scales), rings))
        self.weight = nn.Parameter(torch.zeros(len(self.scales), rings))
        self.between = None
        if self.looks > 1:
            self.between = nn.Parameter(torch.zeros(len(self.scales), rings))
        self.sharpness = nn.Parameter(torch.zeros(()))
        self.features = len(self.scales) * self.looks * rings + n

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Match patches.

        Parameters
        ----------
        patches : Tensor
            ``(N, C, P, P)``; P at least 128.

        Returns
        -------
        features : Tensor
            ``(N, F)``.
        logits : Tensor
            ``(N, H)``: log-probability of each hypothesis, up to a constant.
        """
        with full_precision(patches):
            return self._match(patches.float())

    def _match(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        n, _, height, width = patches.shape
        grey = patches.reshape(n, self.looks, self.channels, height, width).mean(2)
        table: Tensor = self.table  # type: ignore[assignment]
        energy: Tensor | float = 0.0
        spectra = []
        for i, scale in enumerate(self.scales):
            image = nn.functional.avg_pool2d(grey, scale) if scale > 1 else grey
            measured = self.spectrum(image)  # (N, looks, rings)
            spectra.append(measured)
            left = measured.unsqueeze(2) - table[i] - self.specimen[i]  # (N, looks, H, rings)
            # the strength of the staining is no business of the optics
            left = left - left.mean((1, 3), keepdim=True)
            energy = energy + (left.square().mean(1) * self.weight[i].exp()).mean(-1)
            if self.between is not None:
                steps = left[:, 1:] - left[:, :-1]  # the specimen drops out
                energy = energy + (steps.square().mean(1) * self.between[i].exp()).mean(-1)
        logits = -self.sharpness.exp() * energy
        flat = torch.cat(spectra, 1).reshape(n, -1)
        flat = flat - flat.mean(1, keepdim=True)
        return torch.cat((flat, logits.log_softmax(1) / 4), 1), logits
