"""What the spectra of one look, or of two, can tell of the defocus, whatever net reads them.

The Cramér-Rao bound of a Gaussian texture (Whittle, *J. R. Stat. Soc. B* 15 (1953) 125) under
a thin-object model of the microscope: phase and absorption of one stain, a second stain of
another colour, the condenser's disc in full, exact defocus, spherical aberration, axial
colour. The texture's strength and slope, both stains' colours, the phase and every property
of the lens are unknown within the ranges that slides and lenses are drawn from. It bounds what
is read from means over rings of the spectra; what edges and shapes tell comes on top.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from mm_autofocus.optics import Aberrations, Lens, wavefront_um
from mm_autofocus.sim.draws import OPTICS, SLIDE
from mm_autofocus.sim.spectra import RGB_UM

from _virtual_stacks import PIXEL_UM

NA = 0.75
AT_UM = (-20.0, -10.0, -5.0, -2.0, 2.0, 5.0, 10.0, 20.0)
LOOKS_UM = {"one look": (0.0,), "looks at 0 and +4": (0.0, 4.0)}
CONTRAST = 0.2  # rms of a dense field, of the blank level
NOISE = 0.009  # of a pixel: 14,000 electrons at 85 %
SECOND = np.array([0.25, 1.0, 0.5])  # a stain of another colour, of a third of the power

# Fine along the wave of the texture, where coarse points would make ripples of their own.
_DISC = np.stack(np.meshgrid(np.linspace(-1, 1, 97), np.linspace(-1, 1, 13)), -1).reshape(-1, 2)
_DISC = _DISC[np.hypot(*_DISC.T) <= 1]

_LENS = (1, 2, 3)  # where condenser, spherical aberration and axial colour stand


def _known(ranges: dict[str, tuple[float, float]], key: str) -> tuple[float, float]:
    """Middle and standard deviation of a uniform range."""
    low, high = ranges[key]
    return (low + high) / 2, (high - low) / math.sqrt(12)


def run(args: argparse.Namespace) -> str:
    """Make the text of the section."""
    del args
    lines = [
        "Least standard deviation of the defocus, µm, by the Cramér-Rao bound for a Gaussian "
        "texture whose strength and slope are not known, under a lens drawn from the ranges of "
        "`mm_autofocus/sim/draws.py`; a thin-object model of the microscope, not its "
        "simulator. In brackets: if the lens and its condenser were known. It bounds what "
        "spectra over rings tell, of a dense field.",
        "",
        f"| looks | frame | {' | '.join(f'{d:+g}' for d in AT_UM)} | mean absolute error |",
        "|---" * (len(AT_UM) + 3) + "|",
    ]
    for name, looks in LOOKS_UM.items():
        for side in (224, 512, 2016):
            rows = [_bound(d, looks, side * PIXEL_UM) for d in AT_UM]
            cells = [f"{free:.2f} ({known:.2f})" for free, known in rows]
            # of a normal error; the distances stand for the whole range
            weights = np.gradient(np.array(AT_UM))
            mean = math.sqrt(2 / math.pi) * np.average([r[0] for r in rows], weights=weights)
            lines.append(f"| {name} | {side}² | {' | '.join(cells)} | {mean:.2f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def _bound(defocus_um: float, looks: tuple[float, ...], edge_um: float) -> tuple[float, float]:
    """Least standard deviation of the defocus: lens unknown, and lens known."""
    sigma, spherical = _known(OPTICS, "sigma"), _known(OPTICS, "spherical_waves")
    axial, thick = _known(OPTICS, "axial_colour_um"), _known(SLIDE, "thickness_um")
    table = [  # value, step, standard deviation before
        (defocus_um, 0.02, math.inf),
        (sigma[0], 0.002, sigma[1]),
        (spherical[0], 0.001, spherical[1]),
        (axial[0], 0.01, axial[1]),
        (0.5, 0.01, 0.15),  # phase over absorption
        (thick[0], 0.05, thick[1]),
        (0.0, 0.01, 1.0),  # logarithm of the texture's power, its slope, its bend
        (0.0, 0.01, 0.5),
        (0.0, 0.01, 0.3),
        (0.6, 0.01, 0.15),  # colour of the stain: red and blue beside green
        (0.8, 0.01, 0.15),
        (0.0, 0.01, 0.3),  # logarithm of the noise
    ]
    values = np.array([v for v, _, _ in table])
    nu = np.geomspace(1 / min(edge_um, 150.0), 1.5, 80)
    inverse = np.linalg.inv(_covariance(nu, values, looks))
    slopes = []
    for k, (_, step, _) in enumerate(table):
        up, down = values.copy(), values.copy()
        up[k] += step
        down[k] -= step
        change = _covariance(nu, up, looks) - _covariance(nu, down, looks)
        slopes.append(inverse @ (change / (2 * step)))
    modes = math.pi * nu * np.gradient(nu) * edge_um**2  # half of the plane: images are real
    information = np.array(
        [[(modes * np.einsum("fij,fji->f", a, b).real).sum() for b in slopes] for a in slopes]
    )
    information += np.diag([1 / sd**2 for _, _, sd in table])
    free = [k for k in range(len(table)) if k not in _LENS]
    known = np.linalg.inv(information[np.ix_(free, free)])
    return math.sqrt(np.linalg.inv(information)[0, 0]), math.sqrt(known[0, 0])


def _covariance(nu: Any, values: Any, looks: tuple[float, ...]) -> Any:
    """Of all planes, ``(F, looks · 3, looks · 3)``, of one mode at each frequency."""
    power, slope, bend = values[6:9]
    log = np.log(nu / 0.1)
    shape = (nu + 0.01) ** -2.6
    texture = CONTRAST**2 / np.trapezoid(2 * math.pi * nu * shape, nu) * shape
    texture = texture * np.exp(power - slope * log + bend * log**2)
    lens = Lens(
        NA, aberrations=Aberrations(spherical_waves=values[2], axial_colour_um=values[3])
    )
    transfer = [
        _transfer(nu, values[0] + look, values[1], lens, *values[4:6]) for look in looks
    ]
    first = np.array([values[9], 1.0, values[10]])
    total: Any = math.exp(values[11]) * (NOISE * PIXEL_UM) ** 2 * np.eye(3 * len(looks))
    for stain, part in ((first, 1.0), (SECOND, 0.3)):
        t = np.concatenate([stain[:, None] * one for one in transfer])
        total = total + part * texture[:, None, None] * np.einsum("cf,kf->fck", t, t.conj())
    return total


def _transfer(
    nu: Any, defocus_um: float, sigma: float, lens: Lens, phase: float, thickness_um: float
) -> Any:
    """Of weak absorption with `phase` times as much phase, ``(3, F)``: red, green, blue."""
    rows = []
    x, y = sigma * _DISC.T
    for wavelength in RGB_UM:
        shift = nu[:, None] * wavelength / NA
        total: Any = 0.0
        for part in (-0.35, 0.35):  # two layers
            d = defocus_um + part * thickness_um - lens.aberrations.focus_shift_um(wavelength)
            middle = _pupil(x, y, d, wavelength, lens)
            above = (_pupil(x + shift, y, d, wavelength, lens) * middle.conj()).mean(1)
            below = (_pupil(x - shift, y, d, wavelength, lens).conj() * middle).mean(1)
            total = total + 0.25 * (above + below + 1j * phase * (above - below))
        # a pixel takes the mean over itself
        rows.append(total * np.exp(-((math.pi * PIXEL_UM * nu) ** 2) / 6))
    return np.array(rows)


def _pupil(x: Any, y: Any, defocus_um: float, wavelength: float, lens: Lens) -> Any:
    r2 = x**2 + y**2
    rho = np.sqrt(np.minimum(r2, 1.0))
    path = defocus_um * (np.sqrt(1 - (NA * rho) ** 2) - 1)
    error = wavefront_um(lens, rho, np.zeros_like(rho))
    return np.where(r2 <= 1, np.exp(2j * math.pi / wavelength * (path + error)), 0)
