"""Spectra of patches by theory: under thousands of lenses, and no image is made.

What is between the looks and the colours of a patch (`models.nets.physics.CrossSpectra`)
depends on the specimen little and on lens and defocus much. A net that has met few lenses
confuses both far from focus, and recorded stacks come slowly. Theory gives the *expected*
spectra of a weak specimen under partially coherent light at once, and statistics say how those
of one patch scatter about them. So lens, condenser, specimen and camera are drawn by lot, the
covariance of the planes of a patch is computed frequency by frequency, and a spectrum is drawn
from it.

**Light.** A weak object passes its absorbance ``a`` and its phase ``φ`` on linearly. With
``A(f) = mean over the source of P(s + f) P*(s)``, the pupil ``P`` with defocus, spherical
aberration, astigmatism and axial colour, an image is
``I₀ · (1 - F⁻¹{Re A · F a} - F⁻¹{2 Im A · F φ})``: Hopkins' theory for a weak object under a
symmetric source (Streibl, *J. Opt. Soc. Am. A* 2 (1985) 121). The source is that of
`optics.condenser`; the lens is a dry one.

**Specimen.** Two layers of three isotropic textures: two stains, each with phase of its own,
and one of phase only. Strength, colour, slope, bends and grain of each are drawn. In colour,
some specimens are what simulators make of photographs: there each colour has been blurred and
moved aside by a lens already, and has something of its own.

**Patch.** Means over rings of the power of windowed tiles: the expectation follows from the
covariance of the texture by the window's leakage, the scatter is that of Wishart's distribution
with as many degrees of freedom as a ring has independent waves. A specimen that fills a part
of the patch shows in fewer tiles. Camera noise, dust and shading come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from scipy.special import j1
from torch import Tensor, nn
from torch.utils.data import Dataset

from mm_autofocus.errors import InputError
from mm_autofocus.models.lens import code_of
from mm_autofocus.models.nets.physics import CrossSpectra, window_of
from mm_autofocus.optics import REFERENCE_UM, condenser
from mm_autofocus.training.label import peak_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.lens import Ranges
    from mm_autofocus.models.nets.base import NetContext
    from mm_autofocus.training.options import TheoryOptions

    Real: TypeAlias = npt.NDArray[np.float64]
    Lens: TypeAlias = dict[str, Tensor]

__all__ = ["SpectraByTheory", "check_optics"]

# names of `models.lens` to those that are used here
_SHORT = {
    "sigma": "sigma",
    "spherical_waves": "spherical",
    "astigmatism_waves": "astigmatism",
    "axial_colour_um": "axial",
}
_RGB_UM = (0.61, 0.54, 0.46)
_MEDIUM = 1.52  # between the layers
_SOURCE_POINTS = 8
_LENSES = 32  # at a time
_ANGLES, _LABEL_ANGLES = 4, 3
# optical densities of haematoxylin and of eosin, to which the colours of half of the slides
# are near (Ruifrok & Johnston, Anal. Quant. Cytol. Histol. 23 (2001) 291)
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.30]])
_LN10 = math.log(10)
_HANN_OVERLAP = 2.5  # waves of a ring that vary as one, behind the window
_ROUNDING = 1 / 12 / 255**2  # to 8 bits; of more, the other noise outweighs it
_DUST_PX = (3.0, 11.0)  # radii of its shadows, out of focus
_LEAST_FILLED = 0.02  # of a patch
_PHOTOGRAPHS = 0.3  # of the slides in colour
_LEAST_COHERENT = 2e-6  # what keeps a covariance positive in single precision
_NODES = np.geomspace(0.002, 2, 400)  # to norm textures, periods per µm


@dataclass(frozen=True)
class _Tile:
    """Of the rings of a windowed tile.

    Attributes
    ----------
    at : numpy.ndarray
        ``(U,)``: frequencies at which a spectrum has to be known, in periods per tile.
    leakage : numpy.ndarray
        ``(rings, U)``: what each contributes to the mean of a ring.
    waves : numpy.ndarray
        ``(rings,)``: how many there are in the half plane.
    """

    at: Real
    leakage: Real
    waves: Real


@lru_cache(maxsize=4)
def _tile(n: int) -> _Tile:
    """Leakage of the window of `physics.Rings`, with the mean of the tile taken away."""
    rings = (n + 1) // 2 - 1
    at = np.concatenate(
        [np.arange(0.25, 4, 0.25), np.arange(4, 10, 0.5), np.arange(10, rings + 6, 1.0)]
    )
    pixel = np.arange(n)
    step, reach = 0.25, rings + 7
    nu = (np.arange(-reach / step, reach / step) + 0.5) * step
    waves = np.arange(-rings, rings + 1)
    wave = np.exp(2j * np.pi * np.outer(nu, pixel) / n)
    back = np.exp(-2j * np.pi * np.outer(waves, pixel) / n) * window_of(n, unit=True)
    seen, still, mean = back @ wave.T, back.sum(1), wave.mean(1)
    radius = np.hypot(*np.meshgrid(nu, nu, indexing="ij")).ravel()
    low = np.clip(np.searchsorted(at, radius) - 1, 0, len(at) - 2)
    part = np.clip((radius - at[low]) / (at[low + 1] - at[low]), 0, 1)
    within = radius < at[-1]
    leakage, count = np.zeros((rings, len(at))), np.zeros(rings)
    for a, y in enumerate(waves):
        for b, x in enumerate(waves):
            ring = round(math.hypot(y, x))
            if x < 0 or not 1 <= ring <= rings:
                continue
            off = np.outer(mean, mean) * still[a] * still[b]
            power = np.square(np.abs(np.outer(seen[a], seen[b]) - off)).ravel()
            power *= within * (step / n) ** 2
            leakage[ring - 1] += np.bincount(low, power * (1 - part), len(at))
            leakage[ring - 1] += np.bincount(low + 1, power * part, len(at))
            count[ring - 1] += 1
    return _Tile(at, leakage / count[:, None], count)


def _shading(spectra: CrossSpectra) -> Tensor:
    """``(scales, rings)``: power of a parabola that falls by 1 to the corners of a patch."""
    x = torch.linspace(-1, 1, spectra.rings.tile * max(spectra.scales))
    bowl = -(x[:, None].square() + x.square())[None, None] / 2
    rows = []
    for scale in spectra.scales:
        real, imaginary = spectra.rings.transform(nn.functional.avg_pool2d(bowl, scale))
        rows.append(spectra.rings.means(real.square() + imaginary.square())[0, 0])
    return torch.stack(rows)


def check_optics(context: NetContext) -> None:
    """Check that theory has what it needs.

    Raises
    ------
    InputError
        Aperture or pixel size of the data are not known, or the lens is not a dry one.
    """
    for key in ("na", "pixel_size_um"):
        if getattr(context, key) is None:
            raise InputError(
                f"theory.patches: needs {key}, which the stacks of the dataset do not name or "
                "do not agree on; allowed without it: 0"
            )
    if context.na is not None and context.na >= 1:
        raise InputError(
            f"theory.patches: na {context.na:g} is that of an immersion lens, and the theory "
            "is of dry ones, below 1; allowed with it: 0"
        )


class SpectraByTheory(Dataset[tuple[Tensor, Tensor]]):
    """Draws spectra of patches at known defocus, some hundred at a time.

    Parameters
    ----------
    context : NetContext
        Looks, channels, range, and the optics, which must be known.
    ranges : TheoryOptions
        What is drawn from.
    seed : int
        Of everything.
    near : tuple of float
        ``(part, um)``: of `part` of the patches the defocus is drawn from within ± `um`.
    told : mapping
        What a net is told of the lens (`models.lens`): its code stands behind the spectra.

    Raises
    ------
    InputError
        As `check_optics`.
    """

    def __init__(
        self,
        context: NetContext,
        ranges: TheoryOptions,
        seed: int,
        near: tuple[float, float] = (0.0, 0.0),
        told: Ranges | None = None,
    ) -> None:
        check_optics(context)
        self._told = dict(told or {})
        assert context.na is not None
        assert context.pixel_size_um is not None
        self._looks, self._range, self._near = context.looks_um, context.range_um, near
        self._na, self._pixel = context.na, context.pixel_size_um
        mono = (context.wavelength_um or REFERENCE_UM,)
        self._waves_um = _RGB_UM if context.channels == 3 else mono
        self._ranges, self._seed = ranges, seed
        # of its own: that of a net may lie on another device than the processes that draw
        spectra = CrossSpectra(len(context.looks_um), context.channels, context.patch_px)
        n = spectra.rings.tile
        self._spectra, self._tile, self._scales = spectra, _tile(n), spectra.scales
        self._leakage = _tensor(self._tile.leakage)
        self._shading = _shading(spectra)
        self._frequency = np.concatenate(
            [self._tile.at / (n * scale * self._pixel) for scale in self._scales]
        )
        # where Brenner's measure looks for what is sharp
        self._edges = np.linspace(0.013, 0.49, 24) / self._pixel
        source = condenser(0.5, _SOURCE_POINTS)
        self._source, self._patch = _tensor(source.points / 0.5), source.patch / 0.5

    def __len__(self) -> int:
        """Draws that make up the patches asked for."""
        ranges = self._ranges
        return math.ceil(ranges.patches / (_LENSES * ranges.heights * ranges.each))

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Draw patches of some lenses, each with a slide and a camera of its own.

        Parameters
        ----------
        number : int
            The same one and the same seed: the same patches.

        Returns
        -------
        seen : Tensor
            ``(N, F)`` float32: what `Spectral.look` returns of images, and the code of the
            lens.
        defocus_um : Tensor
            ``(N,)``, by the focus measure as in `label`.
        """
        if not 0 <= number < len(self):
            raise IndexError(number)
        self._rng = np.random.default_rng([self._seed, number, 11])
        self._torch = torch.Generator().manual_seed(int(self._rng.integers(2**62)))
        with torch.inference_mode():
            return self._draw(_LENSES, self._ranges.heights, self._ranges.each)

    def _draw(self, lenses: int, heights: int, each: int) -> tuple[Tensor, Tensor]:
        lens, slide = self._lens(lenses), self._specimen(lenses)
        if len(self._waves_um) > 1:
            slide = self._photographed(slide)
        region = self._regions(slide, each)
        at = len(self._frequency)
        power = region.pop("textures") * region["rms"].square()[..., None]
        slide["rms"] = torch.ones_like(slide["rms"])  # it is in `power`, patch by patch
        # the label is that of the whole field
        focus = self._focus(lens, slide, power[..., at:].mean(1))
        defocus = _tensor(self._heights(lenses, heights))
        z = defocus + focus[:, None]
        by_texture = self._by_texture(lens, slide, z, self._looks, self._frequency, _ANGLES)
        covariance = torch.einsum(
            "lptf,lhftab->lhpfab",
            power[..., :at],
            by_texture.reshape(lenses, heights, *by_texture.shape[1:]),
        )
        patch = torch.arange(lenses * each).reshape(lenses, 1, each)
        patch = patch.expand(-1, heights, -1).flatten()
        given = {k: v.flatten(0, 1) for k, v in region.items()} | self._cameras(lenses, each)
        given = {k: v[patch] for k, v in given.items()}
        seen = self._patches(_lit(covariance.flatten(0, 2), given["level"]), given)
        if self._told:
            code = self._code(lens).repeat_interleave(heights * each, 0)
            seen = torch.cat((seen, code), 1)
        return seen, defocus.repeat_interleave(each, 1).flatten()

    # ------------------------------------------------------------------------- the lots

    def _lens(self, n: int) -> Lens:
        r = self._ranges

        def within(ends: tuple[float, float]) -> Tensor:
            return _tensor(self._rng.uniform(*ends, n))

        return {
            "sigma": within(r.sigma),
            "spherical": within(r.spherical_waves),
            "astigmatism": within(r.astigmatism_waves),
            "turned": within((0.0, math.pi)),
            "axial": within(r.axial_colour_um),
            "thickness": within(r.thickness_um),
        }

    def _code(self, lens: Lens) -> Tensor:
        """What is told of lenses, ``(n, numbers)``."""
        known = {name: lens[_SHORT[name]].tolist() for name in self._told}
        each = zip(*known.values(), strict=True)
        return _tensor(
            np.stack([code_of(self._told, dict(zip(known, v, strict=True))) for v in each])
        )

    def _specimen(self, n: int) -> Lens:
        """Two stains and a texture of phase, and how much of the patch they fill.

        ``absorbance`` ``(n, 3, C)``, by its natural logarithm; ``path`` ``(n, 3)`` in µm, for
        the same amount of it; ``rms`` ``(n, 3)``; ``level`` ``(n, C)``: of the mean light;
        ``mean``, ``filled`` ``(n,)``: amount in the mean over that of ``rms`` where there is
        any, and where that is; ``alike`` ``(n, 3)``: correlation of both layers.
        """
        rng, colours = self._rng, len(self._waves_um)
        other = rng.random(n) < 0.3
        if colours == 3:
            stains = _STAINS * _LN10 * np.exp(rng.normal(0, 0.1, (n, 2, 3)))
        else:
            stains = 0.6 * _LN10 * np.exp(rng.normal(0, 0.3, (n, 2, 1)))
        spread = np.array([0.25, 0.6])[None, :, None]
        any_colour = 0.6 * _LN10 * rng.uniform(0.3, 1.2, (n, 1, 1))
        any_colour = any_colour * np.exp(rng.normal(0, 1, (n, 2, colours)) * spread)
        absorbance = np.where(other[:, None, None], any_colour, stains)
        absorbance = np.concatenate([absorbance, np.zeros((n, 1, colours))], 1)
        strength = np.exp(rng.uniform(math.log(0.015), math.log(0.5), n))
        parts = [rng.uniform(0.1, 1, n), rng.uniform(0.1, 1, n) ** 1.5]
        parts.append(0.12 * rng.uniform(0, 1, n) * rng.uniform(0, 1, n))
        rms = strength[:, None] * np.stack(parts, 1)
        path = 0.1 * np.exp(rng.normal(0, 0.45, (n, 3))) * rng.uniform(0.6, 1.4, (n, 1))
        path[:, 2] = 1.0
        full = rng.random(n) < 0.4
        filled = np.exp(np.where(full, rng.uniform(-0.7, 0, n), rng.uniform(-3.9, 0, n)))
        mean = rng.uniform(0.3, 2, n)
        level = _level(rms, absorbance, mean * filled)
        return {
            "absorbance": _tensor(absorbance),
            "path": _tensor(path),
            "rms": _tensor(rms),
            "level": _tensor(level),
            "mean": _tensor(mean),
            "filled": _tensor(filled),
            "alike": _tensor(rng.uniform(0, 1, (n, 3))),
        }

    def _photographed(self, slide: Lens) -> Lens:
        """Make some of the slides such as photographs of tissue are.

        The lens that took one blurred its colours by different amounts and moved them aside,
        and its compression made what is fine alike in all colours and gave each something of
        its own; its depth is not known, so that all layers are alike.
        """
        rng, n, colours = self._rng, len(slide["rms"]), len(self._waves_um)
        photo = rng.random((n, 1)) < _PHOTOGRAPHS
        part = np.exp(rng.uniform(math.log(0.02), 0, (n, 1))) * photo
        strength = slide["rms"][:, :2].square().sum(1, keepdim=True).sqrt()
        uneven = rng.uniform(0.02, 0.12, (n, 1))
        blur = rng.uniform(0, 0.25, (n, 1)) + rng.normal(0, 1, (n, colours)) * uneven
        chroma = rng.uniform(0, 0.5, (n, 1)) * (rng.random((n, 1)) < 0.5)
        aside = rng.normal(0, 1, (n, colours, 2)) * rng.uniform(0, 0.25, (n, 1, 1))
        path = rng.uniform(0, 0.05, (n, 1)) * np.ones(colours)
        own = {
            "absorbance": 0.6 * _LN10 * torch.eye(colours).expand(n, -1, -1),
            "path": _tensor(path),
            "rms": (strength * _tensor(part)).expand(-1, colours),
            "alike": torch.ones(n, colours),
        }
        slide = slide | {k: torch.cat([slide[k], v], 1) for k, v in own.items()}
        slide["alike"] = torch.where(torch.from_numpy(photo), 1.0, slide["alike"])
        apart = np.linalg.norm(aside[:, :, None] - aside[:, None], axis=3)
        return slide | {
            "blur": _tensor(blur.clip(0) * photo),
            "chroma": _tensor(chroma * photo),
            "apart": _tensor(apart * photo[..., None]),
        }

    def _regions(self, slide: Lens, each: int) -> Lens:
        """Patches of slides: ``textures (n, each, T, F)``, ``rms``, ``filled``, ``level``.

        Each has textures of its own. How much there is of them varies more or less.
        """
        rng, n = self._rng, len(slide["rms"])
        everywhere = np.concatenate([self._frequency, self._edges])
        drawn = [_texture(rng, n * each, everywhere) for _ in range(3)]
        textures = np.stack(drawn, 1) * _grain(rng, n * each, everywhere)
        count = slide["rms"].shape[1]
        if count > 3:  # what each colour has for itself
            own = _texture(rng, n * each, everywhere)[:, None].repeat(count - 3, 1)
            textures = np.concatenate([textures, own], 1)
        rms = slide["rms"].numpy()[:, None]
        much = np.exp(rng.normal(0, 1, (n, each, count)) * rng.uniform(0, 0.6, (n, 1, 1)))
        rms = rms * much
        filled = slide["filled"].numpy()[:, None]
        filled = filled * np.exp(rng.normal(0, 1, (n, each)) * rng.uniform(0, 0.8, (n, 1)))
        filled = filled.clip(_LEAST_FILLED, 1)
        absorbance = slide["absorbance"].numpy()[:, None]
        level = _level(rms, absorbance, slide["mean"].numpy()[:, None] * filled)
        shape = (n, each, *textures.shape[1:])
        return {
            "textures": _tensor(textures.reshape(shape)),
            "rms": _tensor(rms),
            "filled": _tensor(filled),
            "level": _tensor(level),
        }

    def _cameras(self, n: int, each: int) -> Lens:
        """Of `n` cameras; what else is drawn for a patch, for `each` patches of each."""
        own = self._camera(n * each)
        alike = ("gain", "crosstalk", "per_light", "reading")
        return own | {k: own[k][::each].repeat_interleave(each, 0) for k in alike}

    def _camera(self, n: int) -> Lens:
        """Of the camera, and what else is drawn for a patch."""
        rng = self._rng
        frequency = self._frequency[None, :]
        radius = rng.uniform(*_DUST_PX, (n, 1)) * self._pixel
        motes = _disc(frequency * radius) * np.exp(-12 * (frequency * self._pixel) ** 2)
        motes /= _variance(_disc(_NODES[None, :] * radius))
        dust = np.exp(rng.uniform(math.log(3e-4), math.log(0.012), (n, 1)))
        dust *= rng.random((n, 1)) < 0.75
        full_well = rng.uniform(8000, 20000, n)
        return {
            "gain": _tensor(0.85 * rng.uniform(0.85, 1.1, n)),
            "crosstalk": _tensor(rng.uniform(0, 0.05, n)),
            "per_light": _tensor(1 / full_well),
            "reading": _tensor((rng.uniform(2, 8, n) / full_well) ** 2),
            "dust": _tensor(motes * dust**2),
            "shading": _tensor(rng.uniform(0, 0.1, n) * rng.choice([0.5, 1.0], n)),
            "independent": _tensor(np.exp(rng.uniform(math.log(0.3), 0, n))),
            "whole": _tensor(rng.uniform(0.4, 1, n)),
            "between": _tensor(rng.uniform(0.2, 0.8, n)),
        }

    def _heights(self, lenses: int, each: int) -> Real:
        part, um = self._near
        low, high = self._range
        d = self._rng.uniform(low, high, (lenses, each))
        near = self._rng.random(d.shape) < part
        if max(low, -um) < min(high, um):  # a range may lie off focus
            d[near] = self._rng.uniform(max(low, -um), min(high, um), int(near.sum()))
        return d

    # -------------------------------------------------------------------------- the light

    def _transfer(
        self, frequency: Tensor, defocus_um: Tensor, lens: Lens, wave_um: float, angles: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Real and imaginary part of A, each ``(B · K, angles, F)``, of either layer.

        Of `defocus_um` ``(B, K)``, K heights under each of B lenses.
        """
        cut = self._na / wave_um
        points = self._source[None] * lens["sigma"][:, None, None]  # (B, S, 2): y, x
        y0, x0 = points[:, :, 0, None, None], points[:, :, 1, None, None]
        x = x0 + frequency[None, :] * torch.cos(angles)[:, None] / cut
        y = y0 + frequency[None, :] * torch.sin(angles)[:, None] / cut
        path, error, inside = self._pupil(x, y, lens, wave_um)
        path0, error0, _ = self._pupil(x0, y0, lens, wave_um)
        path, error, inside = (
            (path - path0)[:, None],
            (error - error0)[:, None],
            inside[:, None],
        )
        # each point of the source stands for a patch of it: see `optics`
        sine2 = self._na**2 * points.square().sum(-1).mean(-1)
        spread = lens["sigma"] * self._patch * self._na / (1 - sine2).clamp(min=0.05)
        blur = (spread[:, None] * defocus_um)[..., None] * frequency
        box = (self._pixel * frequency).square() / 12
        gain = torch.exp(-2 * math.pi**2 * (blur.square() + box))[:, :, None, :]
        shift = lens["axial"] * (wave_um - REFERENCE_UM) / 0.2
        found = []
        for side in (-0.25, 0.25):
            d = defocus_um - (shift + lens["thickness"] * side / _MEDIUM)[:, None]
            phase = path * d[..., None, None, None] + error
            parts = (torch.cos(phase), torch.sin(phase))
            real, imaginary = ((part * inside).mean(2) * gain for part in parts)
            found.append((real.flatten(0, 1), imaginary.flatten(0, 1)))
        return found

    def _pupil(
        self, x: Tensor, y: Tensor, lens: Lens, wave_um: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Phase by 1 µm of defocus, phase of the aberrations, and whether it lets light by."""

        def of(key: str) -> Tensor:
            return lens[key][:, None, None, None]

        r2 = x.square() + y.square()
        inside = r2 <= 1
        r2 = r2.clamp(max=1.0)
        path = 2 * math.pi / wave_um * ((1 - self._na**2 * r2).sqrt() - 1)
        waves = of("spherical") * math.sqrt(5) * (6 * r2 * r2 - 6 * r2 + 1)
        along, across = x.square() - y.square(), 2 * x * y
        turned = 2 * of("turned")
        bent = along * torch.cos(turned) + across * torch.sin(turned)
        waves = waves + of("astigmatism") * math.sqrt(6) * bent
        return path, 2 * math.pi * REFERENCE_UM / wave_um * waves, inside

    def _covariance(
        self,
        lens: Lens,
        specimen: Lens,
        defocus_um: Tensor,
        looks: tuple[float, ...],
        frequency: Real,
        angles: int,
    ) -> Tensor:
        """Of the planes of all looks, ``(B · K, F, planes, planes)``, look by look, in µm²."""
        each = self._by_texture(lens, specimen, defocus_um, looks, frequency, angles)
        power = specimen["textures"] * specimen["rms"].square()[:, :, None]
        power = power.repeat_interleave(defocus_um.shape[1], 0)
        level = specimen["level"].repeat_interleave(defocus_um.shape[1], 0)
        return _lit(torch.einsum("btf,bftpq->bfpq", power, each), level)

    def _by_texture(
        self,
        lens: Lens,
        slide: Lens,
        defocus_um: Tensor,
        looks: tuple[float, ...],
        frequency: Real,
        angles: int,
    ) -> Tensor:
        """By one unit of each texture and of light, ``(B · K, F, T, planes, planes)``."""
        slide = _repeated(slide, defocus_um.shape[1])
        f = _tensor(frequency)
        absorbance = slide["absorbance"][..., None]  # (B, textures, colours, F or 1)
        if "chroma" in slide:
            grey = absorbance.mean(2, keepdim=True)
            absorbance = grey + (absorbance - grey) * _soft(slide["chroma"][..., None, None], f)
        turn = (torch.arange(angles) + float(self._rng.random())) * math.pi / angles
        planes = []
        for look in looks:
            for c, wave in enumerate(self._waves_um):
                absorbs = absorbance[:, :, c, None]
                delays = slide["path"][:, :, None, None] * 4 * math.pi / wave
                layers = self._transfer(f, defocus_um + look, lens, wave, turn)
                passed = [absorbs * re[:, None] + delays * im[:, None] for re, im in layers]
                seen = torch.stack(passed, 1)
                if "blur" in slide:
                    seen = seen * _soft(slide["blur"][:, c, None, None, None, None], f)
                planes.append(seen)
        one = torch.stack(planes, 1)  # (B · K, planes, layers, textures, angles, F)
        # what both layers have in common, and what they have not
        alike = slide["alike"][:, None, :, None, None]
        common = (one[:, :, 0] + one[:, :, 1]) * ((1 + alike) / 4).sqrt()
        own = (one[:, :, 0] - one[:, :, 1]) * ((1 - alike) / 4).sqrt()
        rows = torch.cat([common, own], 3).permute(0, 4, 2, 1, 3)
        product: Tensor = rows @ rows.transpose(3, 4) / angles
        if "apart" in slide:
            # mean of a wave's cosine over all directions
            apart = slide["apart"].repeat(1, len(looks), len(looks))[:, None] * f[:, None, None]
            product = product * torch.special.bessel_j0(2 * math.pi * apart)[:, :, None]
        return product

    def _focus(self, lens: Lens, specimen: Lens, textures: Tensor) -> Tensor:
        """Where Brenner's measure puts the focus of each lens, ``(B,)`` in µm.

        The peak of the curve, as in `label`.
        """
        dof = REFERENCE_UM / self._na**2
        z = torch.arange(-7, 7.01, 0.5) * dof
        n, count = len(z), len(textures)
        given = {**specimen, "textures": textures}
        everywhere = z.expand(count, n)
        covariance = self._covariance(
            lens, given, everywhere, (0.0,), self._edges, _LABEL_ANGLES
        )
        rgb = torch.tensor([0.299, 0.587, 0.114] if len(self._waves_um) == 3 else [1.0])
        power = torch.einsum("c,bfck,k->bf", rgb, covariance, rgb)
        angle = (np.arange(32) + 0.5) / 32 * np.pi
        step = 2 * np.pi * self._edges[:, None] * self._pixel * np.cos(angle)
        sees = np.square(np.sin(step)).mean(1) * self._edges
        curve = (power * _tensor(sees)).sum(1).reshape(count, n)
        at, scores = z.double().numpy(), curve.double().numpy()
        return torch.tensor([peak_of(at, one) for one in scores], dtype=torch.float32)

    # -------------------------------------------------------------------------- the patch

    def _patches(self, covariance: Tensor, given: Lens) -> Tensor:
        """Spectra ``(B, F)`` of patches of such a covariance, and the means of their planes."""
        rings, level = self._rings(covariance, given)
        told = [self._features(self._scattered(mean, free)) for mean, free in rings]
        return torch.cat([*told, level], 1)

    def _rings(
        self, covariance: Tensor, given: Lens
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What is expected of each scale, and how many independent waves there are of it.

        The first ``(B, rings, planes, planes)`` and ``(B, rings)`` at each scale; then the
        level of the planes, ``(B, planes)``.
        """
        colours, looks, count = len(self._waves_um), len(self._looks), len(self._tile.at)
        mixed = _mixing(given["gain"], given["crosstalk"], colours, looks)
        covariance = mixed[:, None] @ covariance @ mixed.transpose(1, 2)[:, None]
        level = given["level"] * given["gain"][:, None]
        noise = level * given["per_light"][:, None] + given["reading"][:, None] + _ROUNDING
        level, noise = level.repeat(1, looks), noise.repeat(1, looks)
        together = level[:, :, None] * level[:, None, :]
        waves = _tensor(self._tile.waves / _HANN_OVERLAP)
        parts = []
        for k, scale in enumerate(self._scales):
            here = slice(k * count, (k + 1) * count)
            px = scale * self._pixel
            # a pixel of a coarser scale is the mean of a square of them
            mean = _tensor(np.sinc(self._frequency[here] * px)) if scale > 1 else 1.0
            passed = mean**2 / px**2 * torch.ones(count)
            # the emptier the patch, the less of its power is left in larger tiles
            share = given["filled"].pow(
                0.0 if k == 0 else 1.0 if scale == self._scales[-1] else given["between"]
            )
            there = passed[:, None, None] * covariance[:, here]
            rings = torch.einsum("rf,bfpq->brpq", self._leakage, there)
            rings = rings * share[:, None, None, None]
            fixed = torch.einsum("rf,bf->br", self._leakage, passed * given["dust"][:, here])
            fixed = fixed + given["shading"].square()[:, None] * self._shading[k]
            rings = rings + fixed[:, :, None, None] * together[:, None]
            rings = rings + torch.diag_embed(noise / scale**2)[:, None]
            tiles = (self._scales[-1] // scale) ** 2
            if scale == self._scales[-1]:
                free = waves[None, :] * given["whole"][:, None]
            else:
                occupied = (2 * given["filled"]).clamp(1 / 16, 1)
                free = waves[None, :] * (tiles * occupied * given["independent"])[:, None]
            parts.append((rings, free.clamp(min=1.5)))
        return parts, level

    def _features(self, rings: Tensor) -> Tensor:
        """Logarithms of powers, and coherences, as `CrossSpectra` has them."""
        power = torch.diagonal(rings, dim1=2, dim2=3).transpose(1, 2)
        i, j = self._spectra.first, self._spectra.second
        cross = rings[:, :, i, j].transpose(1, 2) if i else None
        return self._spectra.told_by(power, cross).flatten(1)

    def _scattered(self, mean: Tensor, free: Tensor) -> Tensor:
        """Real part of means over `free` complex normal waves of this covariance.

        By Bartlett's decomposition of Wishart's distribution.
        """
        n = mean.shape[-1]
        sd = torch.diagonal(mean, dim1=2, dim2=3).sqrt()
        alike = (mean / sd[..., None] / sd[..., None, :]).double()
        alike = alike + _LEAST_COHERENT * torch.eye(n)
        root = torch.linalg.cholesky_ex(alike)[0].float() * sd[..., None]
        order = torch.arange(n)
        left = (free[..., None] - order).clamp(min=0.02)
        diagonal = _tensor(self._rng.standard_gamma(left.numpy())).sqrt()
        there = (free[..., None] > order).float()[..., None, :]

        def below() -> Tensor:
            normal = torch.randn(mean.shape, generator=self._torch)
            return normal.tril(-1) * math.sqrt(0.5) * there

        real, imaginary = root @ (below() + torch.diag_embed(diagonal)), root @ below()
        total = real @ real.transpose(2, 3) + imaginary @ imaginary.transpose(2, 3)
        scattered: Tensor = total / free[..., None, None]
        return scattered


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)


def _repeated(values: Lens, times: int) -> Lens:
    return {k: v.repeat_interleave(times, 0) for k, v in values.items()}


def _level(rms: Real, absorbance: Real, mean: Real) -> Real:
    """Mean light ``(..., C)`` behind stains of ``rms (..., T)``, `mean` times as much."""
    return np.asarray(np.exp(-(rms[..., None] * absorbance).sum(-2) * mean[..., None]))


def _lit(covariance: Tensor, level: Tensor) -> Tensor:
    """A covariance ``(B, F, planes, planes)`` under a mean light ``(B, C)``."""
    level = level.repeat(1, covariance.shape[-1] // level.shape[1])
    return covariance * (level[:, :, None] * level[:, None, :])[:, None]


def _mixing(gain: Tensor, crosstalk: Tensor, colours: int, looks: int) -> Tensor:
    """What a camera makes of colours, ``(B, planes, planes)``."""
    one = torch.eye(colours)[None].repeat(len(gain), 1, 1)
    if colours == 3:
        one = one * (1 - 3 * crosstalk)[:, None, None] + crosstalk[:, None, None]
    return torch.kron(torch.eye(looks)[None], one * gain[:, None, None])


def _soft(sd_um: Tensor, frequency: Tensor) -> Tensor:
    """What a Gaussian blur leaves of waves."""
    return torch.exp(-2 * math.pi**2 * (sd_um * frequency).square())


def _disc(x: Real) -> Real:
    """Power of a disc; `x` is radius times frequency."""
    a = np.maximum(2 * np.pi * x, 1e-9)
    return np.asarray(np.square(2 * j1(a) / a))


def _variance(spectrum: Real) -> Real:
    """Of an isotropic texture with this power at `_NODES`: ``(n, F)`` to ``(n, 1)``."""
    return np.asarray(np.trapezoid(2 * np.pi * _NODES * spectrum, _NODES, axis=1))[:, None]


def _texture(rng: np.random.Generator, n: int, frequency: Real) -> Real:
    """Power spectra of unit variance, ``(n, F)``: a bent slope, and discs of some size."""

    def within(low: float, high: float, *shape: int) -> Real:
        return rng.uniform(low, high, (n, *(shape or (1,))))

    slope, corner = within(2, 4.5), np.exp(within(math.log(0.005), math.log(0.15)))
    height = rng.normal(0, 0.7, (n, 3))
    middle, width = within(math.log(0.01), 0, 3), within(0.3, 0.9, 3)
    radius, spread = np.exp(within(math.log(1.2), math.log(5.5))), within(0.1, 0.3)
    part = within(0, 1) * (rng.random((n, 1)) < 0.7)

    def both(f: Real) -> tuple[Real, Real]:
        f = f[None, :]
        bent = (np.log(f)[:, None, :] - middle[:, :, None]) / width[:, :, None]
        bumps = (height[:, :, None] * np.exp(-0.5 * bent**2)).sum(1)
        smooth = (f**2 + corner**2) ** (-slope / 2) * np.exp(bumps)
        sizes = [1 + k * spread for k in (-1.2, 0.0, 1.2)]
        discs = sum(_disc(f * radius * size) * size**4 for size in sizes)
        return smooth, discs * np.exp(-2 * f**2)

    norms = [_variance(s) for s in both(_NODES)]
    smooth, discs = both(frequency)
    return np.asarray((1 - part) * smooth / norms[0] + part * discs / norms[1])


def _grain(rng: np.random.Generator, n: int, frequency: Real) -> Real:
    """Factors ``(n, 3, F)``: the few things in one patch have spectra of their own."""
    width = np.exp(rng.uniform(math.log(0.004), math.log(0.08), (n, 1, 1)))
    height = rng.uniform(0, 1.2, (n, 1, 1)) * (rng.random((n, 1, 1)) < 0.7)
    wave = rng.normal(0, 1, (n, 3, 24)) / width
    phase = rng.uniform(0, 2 * np.pi, (n, 3, 24))
    smooth = np.cos(wave[..., None] * frequency + phase[..., None]).sum(2) / math.sqrt(12)
    return np.asarray(np.exp(height * smooth - height**2 / 2))
