"""What the spectra of a frame can tell of the defocus at the best, whatever net reads them.

The Cramér-Rao bound for the very spectra that the nets are shown (means over rings of the power
and of the cross spectra, whose scatter is that of Wishart's distribution), under the theory
that they are taught by (`mm_autofocus.training.spectra_theory`). Lens and condenser are alike
for all patches of a frame, each patch has a specimen of its own: two stains and a texture of
phase, whose strengths, spectra, colours and phases are not known, either, beyond what they are
drawn from. Each frequency counts once, at the coarsest scale that holds it. What edges and
shapes tell comes on top.

A second table is of specimens made of photographs, near focus: the lens that took one has
blurred its colours, each by an amount that is not known, and moved them aside, which looks
like the axial colour that tells the side; or it was a little out of focus itself.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from mm_autofocus.models.nets.base import NetContext
from mm_autofocus.optics import REFERENCE_UM
from mm_autofocus.training.options import TheoryOptions
from mm_autofocus.training.spectra_theory import SpectraByTheory, _texture
from torch import Tensor

from _training_stacks import THEORY
from _virtual_stacks import DOF_UM, PIXEL_UM

NA = 0.75
NEAR_UM = (-1.0, -0.5, 0.5, 1.0)
AT_UM = (-22.0, -17.0, -12.0, -7.0, -3.0, 3.0, 7.0, 12.0, 17.0, 22.0)
LOOKS_UM = {
    "one look": (0.0,),
    "looks at 0 and +4": (0.0, 4.0),
    "looks at -8 and +8": (-8.0, 8.0),
}
# (what, share of a patch that is filled, patches of a frame)
FIELDS = (
    ("dense, 512²", 1.0, 4),
    ("sparse, 512²", 0.2, 4),
    ("extremely sparse, 512²", 0.05, 2),
    ("dense, 2016²", 1.0, 81),
)
CONTRAST = 0.2  # rms of the amount of stain where there is specimen
LENSES = 12
BANDS = 10  # into which the unknown spectrum of a texture is divided
# of photographs, as the theory draws them: what each colour has of its own, over the common;
# blur (mean and standard deviation) and move of each colour, in µm
OWN_COLOUR, BLUR_UM, ASIDE_UM = 0.2, (0.125, 0.1), 0.15
SCANNED_UM = 0.25  # how far out of focus another microscope took one

# as the theory calls what it draws from the ranges of `THEORY`, in their order
_LENS = ("sigma", "spherical", "astigmatism", "axial", "thickness")
_SCANNER = ("scanner out", *(f"scanner {key}" for key in _LENS))


@dataclass(frozen=True)
class Unknown:
    """What is not known beforehand.

    Attributes
    ----------
    of, index : str, tuple
        Which of the quantities of the theory; ``()``: all of it, of each lens its own.
    step : float
        By which it is changed; a factor's logarithm if `factor`.
    sd : float
        Of what is known of it beforehand.
    bump : numpy.ndarray | None
        Of a spectrum: the frequencies that are changed.
    """

    of: str
    index: tuple[Any, ...]
    step: float
    sd: float
    factor: bool = False
    bump: Any = None


def run(args: argparse.Namespace) -> str:
    """Make the text of the section."""
    del args
    lines = [
        "Least standard deviation of the defocus of a frame, µm, by the Cramér-Rao bound for "
        "the spectra that the nets are shown, under the theory that they are taught by; lens "
        "and slide drawn from the ranges of `mm_autofocus/sim/draws.py`, median of "
        f"{LENSES} lenses and specimens. In brackets: if the aperture of the condenser were "
        "known. Of several patches in a frame each has a specimen of its own. Behind them what "
        "that is over ± 25 µm, if errors are normal: the mean absolute error, and how many "
        f"frames lie within the depth of field of {DOF_UM} µm.",
        "",
        f"| looks | field | {' | '.join(f'{d:+g}' for d in AT_UM)} | MAE | ≤ DoF |",
        "|---" * (len(AT_UM) + 4) + "|",
    ]
    for name, looks in LOOKS_UM.items():
        for field, filled, patches in FIELDS:
            bounds = [_bound(looks, d, filled, patches) for d in AT_UM]
            cells = [f"{free:.2f} ({known:.2f})" for free, known in bounds]
            # of a normal error; the distances stand for the whole range
            sds = [np.array(sd) for sd in zip(*bounds, strict=True)]
            means = [math.sqrt(2 / math.pi) * sd.mean() for sd in sds]
            shares = [np.mean([math.erf(DOF_UM / s / math.sqrt(2)) for s in sd]) for sd in sds]
            cells += [
                "{:.2f} ({:.2f})".format(*means),
                "{:.1%} ({:.1%})".format(*shares).replace("%", " %"),
            ]
            lines.append(f"| {name} | {field} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    lines += [
        "",
        "One look at specimens made of photographs, near focus. A photograph has been through "
        f"a lens before. Blurred: it blurred each colour ({BLUR_UM[0]} ± {BLUR_UM[1]} µm, "
        f"Gaussian) and moved it aside (± {ASIDE_UM} µm), by amounts that are not known. "
        "Scanned: it is a section photographed by another microscope of the same NA, whose "
        f"lens and condenser are not known, {SCANNED_UM:g} µm out of focus, which is known to "
        f"± {DOF_UM / math.sqrt(12):.2f} µm (anywhere in the depth of field). In brackets: if "
        "the lens that looks at it now were known. Half an µm off, the direction is right "
        "while the error is less than that.",
        "",
        f"| photograph | field | {' | '.join(f'{d:+g}' for d in NEAR_UM)} |",
        "|---" * (len(NEAR_UM) + 2) + "|",
    ]
    for name, kind in (("blurred", _Photograph), ("scanned", _Scanned)):
        for field, filled, patches in FIELDS[:3]:
            bounds = [_bound((0.0,), d, filled, patches, kind) for d in NEAR_UM]
            cells = [f"{free:.2f} ({known:.2f})" for free, known in bounds]
            lines.append(f"| {name} | {field} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


@cache  # frames of several sizes ask for the same
def _information(
    looks: tuple[float, ...], defocus_um: float, filled: float, kind: type[_Theory]
) -> tuple[list[Unknown], Tensor]:
    """What is unknown, and what one patch tells of it: ``(lenses, unknown, unknown)``."""
    theory = kind(looks, filled)
    unknown = list(theory.unknown())
    (scales, free), slopes = theory.rings(defocus_um), []
    for one in unknown:
        up, down = (theory.rings(defocus_um, one, side)[0] for side in (1, -1))
        slopes.append([(a - b) / (2 * one.step) for a, b in zip(up, down, strict=True)])
    information: Tensor = torch.zeros(())
    for k, expected in enumerate(scales):
        use = theory.counts(k)
        inverse = torch.linalg.inv(expected[:, use])
        each = torch.stack([inverse @ slope[k][:, use] for slope in slopes], 1)
        information = information + torch.einsum(
            "bpraq,bsrqa,br->bps", each, each, free[k][:, use]
        )
    return unknown, information


def _bound(
    looks: tuple[float, ...],
    defocus_um: float,
    filled: float,
    patches: int,
    kind: type[_Theory] | None = None,
) -> tuple[float, float]:
    """Least standard deviation of the defocus: the condenser unknown, and known.

    Of a photograph: the lens unknown, and known.
    """
    unknown, information = _information(looks, defocus_um, filled, kind or _Theory)
    before = torch.diag(torch.tensor([1 / one.sd**2 for one in unknown]).double())
    # what all patches have in common, and what each has for itself
    shared = ("defocus", *_LENS, "blur", "aside", *_SCANNER)
    common = [k for k, one in enumerate(unknown) if one.of in shared]
    own = [k for k in range(len(unknown)) if k not in common]

    def part(rows: list[int], columns: list[int]) -> Tensor:
        return information[:, rows][:, :, columns]

    left = torch.linalg.inv(part(own, own) + before[own][:, own])
    told = part(common, common) - part(common, own) @ left @ part(own, common)
    total = patches * told + before[common][:, common]
    of_lens = _LENS[:-1] if kind else ("sigma",)
    known = [k for k, at in enumerate(common) if unknown[at].of not in of_lens]
    found = (total, total[:, known][:, :, known])
    return tuple(float(torch.linalg.inv(i)[:, 0, 0].sqrt().median()) for i in found)


class _Theory(SpectraByTheory):
    """The theory, with one thing changed at a time."""

    def __init__(self, looks: tuple[float, ...], filled: float) -> None:
        context = NetContext(
            looks_um=looks, channels=3, na=NA, wavelength_um=REFERENCE_UM,
            pixel_size_um=PIXEL_UM,
        )  # fmt: skip
        super().__init__(context, TheoryOptions(patches=1, **THEORY), 5)
        self._dice(5)
        lens, specimen = self._lens(LENSES), self._specimen(LENSES)
        specimen["rms"] *= CONTRAST / specimen["rms"].square().sum(1, keepdim=True).sqrt()
        specimen["filled"] = torch.full((LENSES,), filled)
        self.everywhere = np.concatenate([self._frequency, self._edges])
        drawn = [_texture(self._rng, LENSES, self.everywhere) for _ in range(3)]
        self.given = {**lens, **specimen, "spectra": torch.tensor(np.stack(drawn, 1)).float()}
        self.given["alike"].clamp_(0.05, 0.95)  # a step aside is one, too
        self.camera = self._camera(LENSES)

    def _dice(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._torch = torch.Generator().manual_seed(seed)

    def unknown(self) -> Iterator[Unknown]:
        """The defocus first."""
        yield Unknown("defocus", (), 0.05, 1e3)
        yield from self._lens_unknown(_LENS)
        for stain in range(2):
            yield Unknown("path", (stain,), 0.05, 0.45, factor=True)
            for colour in range(3):
                yield Unknown("absorbance", (stain, colour), 0.03, 0.1, factor=True)
        for texture in range(3):
            yield Unknown("alike", (texture,), 0.05, 1 / math.sqrt(12))
        yield from self._texture_unknown(range(3))

    def _lens_unknown(self, names: Iterable[str]) -> Iterator[Unknown]:
        """What lenses are drawn by, under these names."""
        for name, (low, high) in zip(names, THEORY.values(), strict=True):
            yield Unknown(name, (), 0.03 * (high - low), (high - low) / math.sqrt(12))

    def _texture_unknown(self, textures: Iterable[int]) -> Iterator[Unknown]:
        """Their strengths and spectra."""
        at = np.log(self.everywhere)
        middles, apart = np.linspace(math.log(0.006), math.log(1.2), BANDS, retstep=True)
        for texture in textures:
            yield Unknown("rms", (texture,), 0.05, 1.0, factor=True)
            for middle in middles:
                bump = np.exp(-0.5 * ((at - middle) / (0.7 * apart)) ** 2)
                yield Unknown("spectra", (texture,), 0.05, 0.5, factor=True, bump=bump)

    def counts(self, scale: int) -> Tensor:
        """Which rings of a scale count: none twice, and none that a coarser one holds."""
        nyquist = 0.49 / (self._pixel * np.array([*self._scales, math.inf]))
        f = self._spectra.rings.frequency / (self._pixel * self._scales[scale])
        return torch.tensor((f > 0.8 * nyquist[scale + 1]) & (f <= 0.8 * nyquist[scale]))

    def _changed(self, change: Unknown | None, side: int) -> dict[str, Tensor]:
        """What is given, one of it a step up or down."""
        given = {k: v.clone() for k, v in self.given.items()}
        if change is not None and change.of != "defocus":
            value, step = given[change.of], side * change.step
            at = value[(slice(None), *change.index)]  # a view: changed in place
            if change.factor:
                at *= torch.as_tensor(
                    np.exp(step * (1 if change.bump is None else change.bump))
                )
            else:
                at += step
        return given

    def rings(
        self, defocus_um: float, change: Unknown | None = None, side: int = 0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Expected covariance of each scale, and its independent waves."""
        given = self._changed(change, side)
        lens = {**{k: given[k] for k in _LENS}, "turned": given["turned"]}
        spectra, count = given.pop("spectra"), len(self._frequency)
        self._dice(3)
        focus = self._focus(lens, given, spectra[:, :, count:])
        moved = side * change.step if change is not None and change.of == "defocus" else 0.0
        z = (focus + defocus_um + moved)[:, None]
        given = {**given, "textures": spectra[:, :, :count], **self.camera}
        covariance = self._covariance(lens, given, z, self._looks, self._frequency, 4)
        found, _ = self._rings(covariance, given)
        return [mean.double() for mean, _ in found], [free.double() for _, free in found]


class _Photograph(_Theory):
    """Slides such as `SpectraByTheory._photographed` makes them, all of them."""

    def __init__(self, looks: tuple[float, ...], filled: float) -> None:
        super().__init__(looks, filled)
        n, given, colours = LENSES, self.given, 3
        own = {
            "absorbance": 0.6 * math.log(10) * torch.eye(colours).expand(n, -1, -1),
            "path": torch.full((n, colours), 0.025),
            "rms": torch.full((n, colours), OWN_COLOUR * CONTRAST),
            "spectra": torch.tensor(_texture(self._rng, n, self.everywhere)).float()[:, None],
        }
        own["spectra"] = own["spectra"].expand(-1, colours, -1)
        self.given |= {k: torch.cat([given[k], v], 1) for k, v in own.items()}
        self.given["alike"] = torch.ones(n, 3 + colours)
        self.given["blur"] = torch.full((n, colours), BLUR_UM[0])
        aside = self._rng.normal(0, ASIDE_UM, (n, colours, 2))
        self.given["aside"] = torch.tensor(aside).float()

    def _changed(self, change: Unknown | None, side: int) -> dict[str, Tensor]:
        """What is given, and how far apart the colours are."""
        given = super()._changed(change, side)
        aside = given.pop("aside")
        given["apart"] = (aside[:, :, None] - aside[:, None]).square().sum(3).sqrt()
        return given

    def unknown(self) -> Iterator[Unknown]:
        """That of any slide, but that all layers are alike, and what the photograph brings."""
        for one in super().unknown():
            if one.of != "alike":
                yield one
        for colour in range(3):
            yield Unknown("blur", (colour,), 0.02, BLUR_UM[1])
            for axis in range(2):
                yield Unknown("aside", (colour, axis), 0.02, ASIDE_UM)
        yield from self._texture_unknown(range(3, 6))


class _Scanned(_Theory):
    """Sections that another microscope has photographed, some way out of focus."""

    def __init__(self, looks: tuple[float, ...], filled: float) -> None:
        self._scanner: dict[str, Tensor] = {}
        super().__init__(looks, filled)
        self.given["alike"] = torch.ones(LENSES, 3)
        for key, value in self._lens(LENSES).items():
            self.given[f"scanner {key}"] = value
        self.given["scanner out"] = torch.full((LENSES,), SCANNED_UM)

    def _changed(self, change: Unknown | None, side: int) -> dict[str, Tensor]:
        """What is given of lens and slide; what is of the scanner is set aside."""
        given = super()._changed(change, side)
        for key in [k for k in given if k.startswith("scanner ")]:
            self._scanner[key.removeprefix("scanner ")] = given.pop(key)
        return given

    def _transfer(
        self, frequency: Tensor, defocus_um: Tensor, lens: Any, wave_um: float, angles: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """That of the lens, of what the scanner left of absorption."""
        out = self._scanner["out"][:, None]
        left = super()._transfer(frequency, out, self._scanner, wave_um, angles)
        scanned = torch.stack([real for real, _ in left]).mean(0)
        scanned = scanned.repeat_interleave(defocus_um.shape[1], 0)
        found = super()._transfer(frequency, defocus_um, lens, wave_um, angles)
        return [(real * scanned, imaginary * scanned) for real, imaginary in found]

    def unknown(self) -> Iterator[Unknown]:
        """That of a slide whose layers are alike, and the scanner's."""
        for one in super().unknown():
            if one.of != "alike":
                yield one
        yield Unknown(_SCANNER[0], (), 0.02, DOF_UM / math.sqrt(12))
        yield from self._lens_unknown(_SCANNER[1:])
