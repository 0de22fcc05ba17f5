"""Procedural smears: cells spread on glass, stained (blood) or fluorescent (culture)."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from mm_autofocus.sim.canvas import Canvas, Nucleus
from mm_autofocus.sim.noise import cell_rng, noise, noise_at, smoothstep, warped_noise
from mm_autofocus.sim.tissue import BARE, DENSE, zone, zone_at

__all__ = ["paint_cells", "paint_smear"]

SITE_UM = 8.6
PATCH_UM = 43.0
CULTURE_UM = 34.0


def _density(seed: int, region_um: float, x: float, y: float) -> float:
    """Chance that a site is taken: 0 on bare glass to 0.9 in the thick of the smear."""
    z = zone_at(seed, region_um, x, y)
    if z < BARE:
        return 0.0
    return float(0.006 + 0.90 * smoothstep(BARE + 0.45, DENSE + 0.35, z))


@lru_cache(maxsize=4096)
def _smear_patch(seed: int, region_um: float, i: int, j: int) -> tuple[tuple[float, ...], ...]:
    """Cells of a patch: ``(x, y, kind, size, angle, u, v)``."""
    rng = cell_rng(seed, 41, i, j)
    n = round(PATCH_UM / SITE_UM)
    p = _density(seed, region_um, (i + 0.5) * PATCH_UM, (j + 0.5) * PATCH_UM)
    out = []
    for b in range(n):
        for a in range(n):
            x = i * PATCH_UM + (a + 0.5 + rng.uniform(-0.33, 0.33)) * SITE_UM
            y = j * PATCH_UM + (b + 0.5 + rng.uniform(-0.33, 0.33)) * SITE_UM
            draw, kind = rng.uniform(), rng.uniform()
            rest = rng.normal(0, 1, 4)
            if draw < p:
                out.append((x, y, kind, *map(float, rest)))
    return tuple(out)


def _leucocyte(canvas: Canvas, cell: tuple[float, ...]) -> None:
    x, y, kind, size, turn, u, _ = cell
    lymphocyte = kind < 0.012
    r = (4.2 if lymphocyte else 6.0) * math.exp(0.07 * size)
    found = canvas.window(x, y, 1.4 * r)
    if found is None:
        return
    where, dx, dy = found
    mid, coarse = canvas.chromatin[1][where], canvas.chromatin[2][where]
    fine = canvas.chromatin[0][where]
    d = np.sqrt(dx * dx + dy * dy) / r * (1 + 0.06 * coarse)
    body = smoothstep(1 + 0.4 / r, 1 - 0.4 / r, d)
    granules = np.maximum(fine + 0.4 * mid, 0) * (0.02 if lymphocyte else 0.07)
    tone = body * (0.11 + granules)
    canvas.add(
        where,
        0.0,
        e=tone,
        h=body * (0.14 if lymphocyte else 0.06),
        opd=0.07 * body + 0.1 * tone,
    )
    if lymphocyte:
        nucleus = Nucleus(x, y, 0.80 * r, 0.76 * r, turn, 0.85, 0.8, 0.0)
    else:
        lobes = ((0.9, 0.55, 0.85), (0.35, 1.45, 0.8)) if u > -0.6 else ((1.1, 0.5, 0.95),)
        nucleus = Nucleus(x - 1.2, y - 1.4, 2.3, 2.1, 0.5 * turn, 0.95, 0.8, 0.0, (), lobes)
    canvas.nucleus(nucleus, phase=0.05)


def paint_smear(canvas: Canvas, region_um: float) -> None:
    """Paint a piece of a stained blood smear: red cells with pallor, white cells, platelets."""
    margin = 12.0
    rows = range(
        math.floor((canvas.y[0] - margin) / PATCH_UM),
        math.ceil((canvas.y[-1] + margin) / PATCH_UM),
    )
    columns = range(
        math.floor((canvas.x[0] - margin) / PATCH_UM),
        math.ceil((canvas.x[-1] + margin) / PATCH_UM),
    )
    white = []
    for j in rows:
        for i in columns:
            for cell in _smear_patch(canvas.seed, region_um, i, j):
                x, y, kind, size, turn, u, v = cell
                if kind < 0.035:
                    white.append(cell)
                    continue
                platelet = kind > 0.95
                r = (1.1 if platelet else 3.55) * math.exp(0.06 * size)
                found = canvas.window(x, y, 1.3 * r + 0.5)
                if found is None:
                    continue
                where, dx, dy = found
                c, s = math.cos(turn), math.sin(turn)
                stretch = 1 + 0.06 * abs(u)
                p, q = (c * dx + s * dy) / (r * stretch), (c * dy - s * dx) * stretch / r
                d = np.sqrt(p * p + q * q)
                edge = canvas.soften(0.3) / r
                body = smoothstep(1 + edge, 1 - edge, d)
                if platelet:
                    fleck = body * (1 + 0.3 * canvas.chromatin[0][where])
                    canvas.add(where, 0.0, h=0.16 * fleck, e=0.06 * fleck, opd=0.03 * fleck)
                    continue
                pallor = min(max(0.66 + 0.12 * v, 0.2), 0.9)
                thick = body * (1 - pallor * np.exp(-((d / 0.5) ** 2)) + 0.15 * d)
                canvas.add(where, 0.0, e=0.30 * thick, opd=0.075 * thick)
    for cell in white:
        _leucocyte(canvas, cell)
    z = zone(canvas.seed, region_um, canvas.x, canvas.y)
    film = np.float32(0.008) * smoothstep(BARE + 0.3, DENSE, z)  # plasma between the cells
    canvas.e += film * (1 + np.float32(0.3) * noise(canvas.seed + 43, 12, canvas.x, canvas.y))


def paint_cells(canvas: Canvas, region_um: float) -> None:
    """Paint adherent cells: `h` is DNA (blue emission), `e` filaments (green emission)."""
    margin = 36.0
    s = canvas.seed
    x32, y32 = canvas.x.astype(np.float32)[None, :], canvas.y.astype(np.float32)[:, None]
    bend = 18 * noise(s + 51, 60.0, canvas.x, canvas.y)
    filaments = warped_noise(s + 52, (x32 + bend) / 20, (y32 + bend) / 1.1)
    grain = noise(s + 53, 1.2, canvas.x, canvas.y)
    outline = noise(s + 54, 13.0, canvas.x, canvas.y)
    for j in range(
        math.floor((canvas.y[0] - margin) / CULTURE_UM),
        math.ceil((canvas.y[-1] + margin) / CULTURE_UM),
    ):
        for i in range(
            math.floor((canvas.x[0] - margin) / CULTURE_UM),
            math.ceil((canvas.x[-1] + margin) / CULTURE_UM),
        ):
            rng = cell_rng(s, 55, i, j)
            x, y = (
                (i + rng.uniform(0.2, 0.8)) * CULTURE_UM,
                (j + rng.uniform(0.2, 0.8)) * CULTURE_UM,
            )
            z = zone_at(s, region_um, x, y)
            keep = 0.85 * smoothstep(BARE + 0.3, DENSE + 0.1, z) + (0.03 if z > BARE else 0)
            u = rng.normal(0, 1, 6)
            spots = rng.uniform(-0.45, 0.45, (3, 2))
            if rng.uniform() > keep:
                continue
            angle, long = float(0.5 + 0.5 * u[0] + noise_at(s + 56, 150, x, y)), 1.45
            r = 13.5 * math.exp(0.15 * u[1])
            found = canvas.window(x, y, 2.0 * r)
            if found is not None:
                where, dx, dy = found
                c, n = math.cos(angle), math.sin(angle)
                p, q = (c * dx + n * dy) / (r * long), (c * dy - n * dx) * long / r / 1.25
                d = np.sqrt(p * p + q * q) * (1 + 0.16 * outline[where])
                body = smoothstep(1.06, 0.94, d)
                dome = body * np.sqrt(np.maximum(1 - 0.9 * d * d, 0.05))
                strands = np.maximum(filaments[where], 0) * (0.4 + d)
                glow = dome * (0.22 + 0.05 * grain[where]) + 0.30 * body * strands
                canvas.add(where, -0.1, e=glow, opd=0.06 * dome)
            a, b = 5.6 * math.exp(0.1 * u[2]), 4.2 * math.exp(0.1 * u[3])
            dark = tuple((float(v[0]), float(v[1])) for v in spots[: 1 + int(u[5] > 0)])
            canvas.nucleus(
                Nucleus(x, y, a, b, angle, 0.8 * math.exp(0.15 * u[4]), 0.7, 0.1, dark),
                phase=0.05,
            )
