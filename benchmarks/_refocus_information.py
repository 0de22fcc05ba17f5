"""What one shot and two shots hold of the image in focus, whatever net looks at them.

For each pair of shots the best linear filter is computed, for all colours together, from the
noiseless spectra of this very field under this very lens, and with the camera's noise: nobody
who has to find out field, lens and defocus can know as much. How much better it does with two
shots than with the sharper one alone is what the second shot adds.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from mm_autofocus.metrics import brenner

from _refocus_virtual import HALVES_UM
from _virtual_stacks import Place, first_of, open_place, places, tried

MIDDLES = 4
FULL = 255.0


def run(args: argparse.Namespace) -> str:
    """Make the text of the section."""
    found: dict[float, list[tuple[float, ...]]] = {h: [] for h in HALVES_UM}
    number = 0
    for number, candidates in enumerate(tried(places(args.fields, args.data / "textures")), 1):
        for half, levels in first_of(candidates, lambda p: _levels(p, args.frame)):
            found[half].append(levels)
        print(f"  field {number}", flush=True)
    lines = [
        f"{number} fields of {args.frame}², {MIDDLES} pairs each at each ΔD, F off by N(0, 1) "
        "µm; PSNR to the noiseless image in focus, dB, of the best linear filter that knows "
        "the noiseless spectra of the field, the lens and the defocus. The lower shot is what "
        "is there if only one is taken; to know the sharper one takes both. Simulated.",
        "",
        "| ΔD µm | sharper shot as it is | of the lower shot | of the sharper one | of both "
        "| both over the lower | both over the sharper |",
        "|---" * 7 + "|",
    ]
    rows = [(f"{half:g}", np.array(levels)) for half, levels in found.items()]
    rows.append(("all", np.concatenate([levels for _, levels in rows])))
    for name, levels in rows:
        raw, low, one, two = levels.mean(0)
        cells = [*(f"{v:.2f}" for v in (raw, low, one, two))]
        cells += [f"+{two - v:.2f}" for v in (low, one)]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def _levels(place: Place, side: int) -> list[tuple[float, tuple[float, ...]]]:
    """For each pair: ΔD, and the PSNR of the sharper shot and of the filters."""
    there = open_place(place, side)
    rng = np.random.default_rng([place.seed, 13])
    truth = there.frame(0.0, None).astype(np.float64) / FULL
    noise = there.frame(0.0, 1).astype(np.float64) / FULL - truth
    spectra = _Spectra(side, noise.var(axis=(0, 1)))
    out = []
    for half in HALVES_UM:
        for middle in rng.normal(0, 1, MIDDLES).clip(-2.5, 2.5):
            shots = [
                there.frame(float(middle + s * half), None).astype(np.float64) / FULL
                for s in (-1, 1)
            ]
            lower = shots[:1]
            shots.sort(key=lambda shot: -brenner(shot.mean(-1)))
            raw = float(np.square(shots[0] + noise - truth).mean())
            errors = [raw, *(spectra.error(s, truth) for s in (lower, shots[:1], shots))]
            out.append((half, tuple(-10 * float(np.log10(e)) for e in errors)))
    return out


class _Spectra:
    """Spectra over rings of frequency."""

    def __init__(self, side: int, noise: Any) -> None:
        hann = np.hanning(side)
        self.window = np.outer(hann, hann)
        self.scale = np.sqrt(np.square(self.window).sum())
        frequency = np.fft.fftfreq(side)
        radius = np.hypot(frequency[:, None], frequency[None, :])
        self.ring = np.minimum((radius * side / 2).astype(int), side // 4).ravel()
        self.count = np.bincount(self.ring)
        self.noise = noise

    def _of(self, image: Any) -> list[Any]:
        planes = np.moveaxis(image - image.mean((0, 1)), -1, 0)
        return [np.fft.fft2(plane * self.window) / self.scale for plane in planes]

    def _mean(self, a: Any, b: Any) -> Any:
        """Cross spectrum, mean of each ring."""
        product = (a * b.conj()).ravel()
        real = np.bincount(self.ring, product.real)
        return (real + 1j * np.bincount(self.ring, product.imag)) / self.count

    def error(self, shots: list[Any], truth: Any) -> float:
        """Mean square error of the best linear filter of noisy shots."""
        given = [spectrum for shot in shots for spectrum in self._of(shot)]
        wanted = self._of(truth)
        noise = np.tile(self.noise, len(shots))
        c = np.array([[self._mean(a, b) for b in given] for a in given]).transpose(2, 0, 1)
        c = c + np.diag(noise)
        d = np.array([[self._mean(a, t) for t in wanted] for a in given]).transpose(2, 0, 1)
        weights = np.linalg.solve(c, d)
        explained = np.einsum("rkc,rkc->rc", d.conj(), weights).real
        power = np.array([self._mean(t, t).real for t in wanted]).T
        left = np.maximum(power - explained, 0).mean(1)
        return float((left * self.count).sum() / self.count.sum())
