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
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.special import j1
from torch import Tensor, nn

from mm_autofocus.models.nets.base import NetContext, count_of, full_precision

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["OtfMatch", "RadialSpectrum", "defocus_otf"]

_TILE = 32
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


class RadialSpectrum(nn.Module):
    """Logarithm of the mean power spectrum of tiles, by rings of equal frequency.

    The Fourier transform is two products with constant matrices, which every runtime of
    ONNX knows. Frequencies in periods per pixel are in `frequency`.
    """

    def __init__(self) -> None:
        super().__init__()
        n, half = _TILE, _TILE // 2 + 1
        at = np.arange(n)
        phase = 2 * math.pi * np.outer(np.arange(n), at) / n
        window = np.hanning(n + 2)[1:-1]
        fx, fy = np.meshgrid(np.arange(half) / n, np.minimum(at, n - at) / n)
        ring = np.rint(np.hypot(fx, fy) * n).astype(int)
        rings = np.arange(1, n // 2)
        masks = np.stack([(ring == r) / max((ring == r).sum(), 1) for r in rings])
        self.frequency = rings / n
        for name, value in (
            ("cosine", np.cos(phase)),
            ("sine", np.sin(phase)),
            ("window", np.outer(window, window)),
            ("masks", masks.reshape(len(rings), -1)),
        ):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, P, P)`` to ``(N, C, rings)``; P is cut to a multiple of 32."""
        n, c = x.shape[:2]
        rows, columns = x.shape[2] // _TILE, x.shape[3] // _TILE
        tiles = x[:, :, : rows * _TILE, : columns * _TILE].float()
        tiles = tiles.reshape(n, c, rows, _TILE, columns, _TILE).transpose(3, 4)
        tiles = tiles.reshape(n, c, rows * columns, _TILE, _TILE)
        window: Tensor = self.window  # type: ignore[assignment]
        tiles = (tiles - tiles.mean((3, 4), keepdim=True)) * window
        half = _TILE // 2 + 1
        cosine, sine = self.cosine, self.sine
        right_cos, right_sin = cosine[:, :half], sine[:, :half]  # type: ignore[index]
        along_cos, along_sin = tiles @ right_cos, tiles @ right_sin
        real = cosine @ along_cos - sine @ along_sin  # type: ignore[operator]
        imaginary = cosine @ along_sin + sine @ along_cos  # type: ignore[operator]
        power = (real.square() + imaginary.square()).mean(2)
        rings = power.reshape(n, c, -1) @ self.masks.t()  # type: ignore[operator]
        return (rings + 1e-6).log()


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
