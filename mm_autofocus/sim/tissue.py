"""Procedural sections of tissue, stained with haematoxylin and eosin.

A mucosa, roughly: glands of columnar epithelium around a lumen, goblet vacuoles, between
them stroma of wavy fibres with clefts, fibroblasts, lymphocytes and plasma cells, red
cells in groups; islands of it towards the edge, single shed cells beyond, then bare glass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mm_autofocus.sim.canvas import Canvas, Nucleus
from mm_autofocus.sim.noise import cell_rng, noise, noise_at, smoothstep, warped_noise

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["Gland", "cover", "paint_tissue", "zone", "zone_at"]

GLAND_UM = 112.0
CELL_UM = 44.0
SITE_UM = 8.8
DENSE, SPARSE, BARE = 0.20, -0.35, -0.90
"""Above DENSE the tissue is closed, above SPARSE it lies in islands, above BARE there are
single cells, below there is nothing."""


def zone(
    seed: int, region_um: float, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> Real:
    """Where on the slide we are, ``(Y, X)``; see :data:`DENSE`."""
    return noise(seed + 1, region_um, x, y) + np.float32(0.25) * noise(
        seed + 2, region_um / 4, x, y
    )


@lru_cache(maxsize=65536)
def zone_at(seed: int, region_um: float, x: float, y: float) -> float:
    """Evaluate :func:`zone` at one point."""
    return noise_at(seed + 1, region_um, x, y) + 0.25 * noise_at(seed + 2, region_um / 4, x, y)


def _bias(z: Real) -> Real:
    """How much tissue is favoured: from -1.4 where it ends to +2.2 in its middle."""
    t = (z - np.float32(SPARSE)) / np.float32(DENSE - SPARSE)
    return np.where(t > 0, np.float32(-1.4) + np.float32(2.6) * np.minimum(t, 1.4), -9)


def cover(canvas: Canvas, z: Real) -> Real:
    """Fraction 0 to 1 of each pixel that is tissue."""
    s, x, y = canvas.seed, canvas.x, canvas.y
    level = _bias(z) + 0.75 * noise(s + 3, 55.0, x, y) + 0.30 * noise(s + 4, 14.0, x, y)
    level += 0.08 * noise(s + 5, 4.0, x, y)
    out: Real = smoothstep(-0.06, 0.06, level).astype(np.float32)
    return out


@dataclass(frozen=True, slots=True)
class Gland:
    """A gland cut across: radius as a function of the angle, and its nuclei."""

    x: float
    y: float
    radius: float
    lumen: float
    waves: tuple[tuple[int, float, float], ...]
    stretch: tuple[float, float]
    tilt: float
    goblets: float
    seed: int

    def radius_at(self, phi: float) -> float:
        """Radius of the outline at an angle (in the gland's own, stretched frame)."""
        return self.radius * (1 + sum(c * math.cos(k * phi + p) for k, c, p in self.waves))

    def point(self, phi: float, r: float) -> tuple[float, float]:
        """Slide coordinates of a point of the gland's own frame."""
        u, v = r * math.cos(phi) * self.stretch[0], r * math.sin(phi) * self.stretch[1]
        c, s = math.cos(self.tilt), math.sin(self.tilt)
        return self.x + c * u - s * v, self.y + s * u + c * v


@lru_cache(maxsize=4096)
def _gland(seed: int, region_um: float, i: int, j: int) -> Gland | None:
    rng = cell_rng(seed, 7, i, j)
    x = (i + 0.5 * (j % 2) + rng.uniform(-0.16, 0.16)) * GLAND_UM
    y = (j * 0.87 + rng.uniform(-0.16, 0.16)) * GLAND_UM
    if zone_at(seed, region_um, x, y) < DENSE + 0.1:
        return None
    if noise_at(seed + 8, 420.0, x, y) < -0.35:
        return None
    radius = rng.uniform(27, 41)
    waves = tuple(
        (k, float(rng.normal(0, c)), float(rng.uniform(0, 6.3)))
        for k, c in ((2, 0.06), (3, 0.05), (5, 0.025))
    )
    stretch = float(rng.uniform(0.92, 1.32))
    return Gland(
        x,
        y,
        radius,
        float(rng.uniform(0.10, 0.42)),
        waves,
        (stretch, 1 / stretch),
        float(rng.uniform(0, math.pi)),
        float(rng.beta(1.2, 1.8)),
        int(rng.integers(1 << 31)),
    )


def glands_near(
    seed: int, region_um: float, x: tuple[float, float], y: tuple[float, float]
) -> list[Gland]:
    """Find the glands that may touch a rectangle."""
    out = []
    reach = 75.0
    for j in range(
        math.floor((y[0] - reach) / GLAND_UM / 0.87),
        math.ceil((y[1] + reach) / GLAND_UM / 0.87) + 1,
    ):
        for i in range(
            math.floor((x[0] - reach) / GLAND_UM) - 1, math.ceil((x[1] + reach) / GLAND_UM) + 1
        ):
            gland = _gland(seed, region_um, i, j)
            if gland is not None:
                out.append(gland)
    return out


def _flow(canvas: Canvas) -> tuple[Real, Real]:
    """Coordinates along and across the fibres, µm."""
    s, x, y = canvas.seed, canvas.x, canvas.y
    theta = 0.6 + (s % 7) * 0.35
    bend_u = 30 * noise(s + 11, 90.0, x, y)
    bend_v = 30 * noise(s + 12, 75.0, x, y) + 3.0 * noise(s + 13, 14.0, x, y)
    c, n = math.cos(theta), math.sin(theta)
    x32, y32 = x.astype(np.float32)[None, :], y.astype(np.float32)[:, None]
    along: Real = np.float32(c) * x32 + np.float32(n) * y32 + bend_u
    across: Real = np.float32(c) * y32 - np.float32(n) * x32 + bend_v
    return along, across


def _flow_angle(seed: int, x: float, y: float) -> float:
    """Direction of the fibres at a point."""
    theta = 0.6 + (seed % 7) * 0.35
    h = 4.0
    c, n = math.cos(theta), math.sin(theta)
    gx = (
        (noise_at(seed + 12, 75.0, x + h, y) - noise_at(seed + 12, 75.0, x - h, y)) * 30 / 2 / h
    )
    gy = (
        (noise_at(seed + 12, 75.0, x, y + h) - noise_at(seed + 12, 75.0, x, y - h)) * 30 / 2 / h
    )
    return math.atan2(n - gx, c + gy)


def _stroma(canvas: Canvas, mask: Real, gland: Real, muscle: Real) -> None:
    """Fibres, clefts and ground substance."""
    s = canvas.seed
    u, v = _flow(canvas)
    coarse = warped_noise(s + 14, u / 26, v / 3.4)
    fine = [warped_noise(s + 15 + k, u / 13, v / 1.35) for k in range(2)]
    cleft = warped_noise(s + 18, u / 34, v / 9.0)
    amount = noise(s + 19, 45.0, canvas.x, canvas.y)
    loose = 1 - muscle
    gap = smoothstep(0.9, 1.5, cleft + 0.25 * coarse + 0.35 * amount) * loose
    split = warped_noise(s + 17, u / 60, v / 4.5)
    gap = np.maximum(gap, 0.9 * smoothstep(1.2, 1.7, split) * muscle)
    solid = mask * (1 - gland) * (1 - 0.93 * gap)
    grain = noise(s + 20, 0.9, canvas.x, canvas.y)
    for layer, depth in enumerate(canvas.depths):
        texture = (0.5 - depth) * fine[0] + (0.5 + depth) * fine[1]
        fibre = 0.55 * coarse + 0.65 * texture + 0.18 * grain
        fibre = np.maximum(0.55 + 0.36 * fibre, 0.06)
        density = (0.21 + 0.14 * muscle + 0.04 * amount) * fibre
        canvas.e[layer] += (solid * density) / canvas.n_layers
        canvas.h[layer] += (solid * (0.030 + 0.012 * grain)) / canvas.n_layers
        canvas.opd[layer] += (solid * 0.055 * fibre) / canvas.n_layers


def _epithelium(canvas: Canvas, glands: list[Gland]) -> Real:
    """Cytoplasm, vacuoles and lumina of the glands; returns where glands are."""
    inside = np.zeros((len(canvas.y), len(canvas.x)), np.float32)
    s = canvas.seed
    grain = noise(s + 22, 1.1, canvas.x, canvas.y)
    slime = noise(s + 23, 6.0, canvas.x, canvas.y)
    for g in glands:
        found = canvas.window(g.x, g.y, 1.55 * g.radius)
        if found is None:
            continue
        where, dx, dy = found
        c, n = math.cos(g.tilt), math.sin(g.tilt)
        u = (c * dx + n * dy) / np.float32(g.stretch[0])
        v = (c * dy - n * dx) / np.float32(g.stretch[1])
        r = np.sqrt(u * u + v * v)
        phi = np.arctan2(v, u)
        outline = np.full_like(r, g.radius)
        for k, amplitude, shift in g.waves:
            outline += np.float32(g.radius * amplitude) * np.cos(k * phi + np.float32(shift))
        edge = r - outline  # µm, negative inside
        ragged = 1.6 * slime[where] + 0.5 * canvas.chromatin[2][where]
        inner = outline * np.float32(g.lumen) * (1 + 0.22 * np.cos(3 * phi + g.tilt)) + ragged
        soft = canvas.soften(0.5)
        body = smoothstep(soft, -soft, edge)
        lumen = smoothstep(soft, -soft, r - inner) * body
        membrane = np.exp(-((edge / 0.8) ** 2))
        cells = body - lumen
        # Lateral membranes between columnar cells.
        count = max(round(2 * math.pi * g.radius / 5.6), 8)
        lateral = np.abs(np.sin(0.5 * count * phi + 0.25 * slime[where])) * r * 2 / count
        lateral = (
            np.exp(-((lateral / canvas.soften(0.4)) ** 2))
            * cells
            * np.clip((r - inner) / 12, 0, 1)
        )
        apical = np.clip((-edge) / np.maximum(outline - inner, 1), 0, 1)
        vacuole = _vacuoles(g, count, dx, dy) * cells
        e = cells * (0.20 + 0.05 * apical) * (1 + 0.16 * grain[where]) * (1 - 0.85 * vacuole)
        e += 0.07 * lateral * (1 - 0.5 * vacuole) + 0.10 * membrane
        e += lumen * 0.05 * np.maximum(slime[where], 0) ** 2
        h = cells * (0.085 + 0.02 * grain[where]) * (1 - 0.35 * vacuole) + 0.03 * lateral
        opd = cells * (0.030 + 0.006 * grain[where]) * (1 - 0.6 * vacuole) + 0.02 * lateral
        free = 1 - inside[where]
        for layer in range(canvas.n_layers):
            at = (layer, *where)
            share = np.float32(1 / canvas.n_layers)
            canvas.e[at] += share * free * e
            canvas.h[at] += share * free * h
            canvas.opd[at] += share * free * opd
        inside[where] = np.maximum(inside[where], body)
    return inside


def _vacuoles(g: Gland, count: int, dx: Real, dy: Real) -> Real:
    """Mucin of the goblet cells among `count` cells of a gland; distances from its centre."""
    out = np.zeros((dy.shape[0], dx.shape[1]), np.float32)
    rng = cell_rng(g.seed, 24, 0, 0)
    for q in range(count):
        keep, depth, size = rng.uniform(), rng.uniform(0.50, 0.74), rng.uniform(0.7, 1.1)
        if keep > 0.75 * g.goblets:
            continue
        phi = (q + 0.5) * 2 * math.pi / count
        far, near = g.radius_at(phi), g.radius_at(phi) * g.lumen
        cx, cy = g.point(phi, far + (near - far) * depth)
        length = min(0.24 * (far - near), 7.0) * size
        turn = math.atan2(cy - g.y, cx - g.x)
        ct, st = math.cos(turn), math.sin(turn)
        px, py = dx - np.float32(cx - g.x), dy - np.float32(cy - g.y)
        along, across = (ct * px + st * py) / length, (ct * py - st * px) / (2.6 * size)
        out = np.maximum(out, smoothstep(1.12, 0.88, np.sqrt(along**2 + across**2)))
    return out


@lru_cache(maxsize=1024)
def _gland_nuclei(gland: Gland) -> tuple[Nucleus, ...]:
    rng = cell_rng(gland.seed, 25, 0, 0)
    out = []
    count = max(round(2 * math.pi * gland.radius / rng.uniform(4.4, 5.6)), 6)
    for q in range(count):
        phi = (q + rng.uniform(-0.22, 0.22)) * 2 * math.pi / count
        rim = gland.radius_at(phi)
        long = float(rng.lognormal(math.log(4.0), 0.13))
        wide = float(rng.lognormal(math.log(2.15), 0.12))
        r = rim - 1.2 - long * rng.uniform(0.95, 1.5)
        if rng.uniform() < 0.06 or r < 5:
            continue
        x, y = gland.point(phi, r)
        xo, yo = gland.point(phi, rim)
        out.append(
            Nucleus(
                x,
                y,
                min(long, 0.42 * rim),
                wide,
                math.atan2(yo - y, xo - x) + float(rng.normal(0, 0.13)),
                float(rng.lognormal(math.log(0.50), 0.22)),
                float(rng.uniform(0.5, 1.0)),
                float(rng.uniform(-0.5, 0.5)),
                tuple(
                    (float(rng.uniform(-0.4, 0.4)), float(rng.uniform(-0.35, 0.35)))
                    for _ in range(int(rng.integers(0, 3)))
                ),
            )
        )
    return tuple(out)


@lru_cache(maxsize=4096)
def _stroma_nuclei(seed: int, region_um: float, i: int, j: int) -> tuple[Nucleus, ...]:
    """Nuclei of the cell (i, j), wherever tissue is; those in glands are dropped later."""
    rng = cell_rng(seed, 26, i, j)
    n = round(CELL_UM / SITE_UM)
    out = []
    infiltrate = noise_at(seed + 27, 95.0, (i + 0.5) * CELL_UM, (j + 0.5) * CELL_UM)
    for b in range(n):
        for a in range(n):
            x = i * CELL_UM + (a + 0.5 + rng.uniform(-0.36, 0.36)) * SITE_UM
            y = j * CELL_UM + (b + 0.5 + rng.uniform(-0.36, 0.36)) * SITE_UM
            draw, kind = rng.uniform(), rng.uniform()
            u = rng.normal(0, 1, 6)
            depth = float(rng.uniform(-0.5, 0.5))
            if draw > 0.30 + 0.16 * min(max(infiltrate, -1), 2.2):
                continue
            spots = ((float(0.25 * u[4]), float(0.25 * u[5])),)
            if kind < 0.34 - 0.10 * infiltrate:  # fibroblast: a spindle along the fibres
                angle = _flow_angle(seed, x, y) + 0.18 * u[3]
                out.append(
                    Nucleus(x, y, 5.6 * math.exp(0.2 * u[0]), 1.35 * math.exp(0.15 * u[1]),
                            angle, 0.52 * math.exp(0.2 * u[2]), 0.5, depth)
                )  # fmt: skip
            elif kind < 0.80:  # lymphocyte: small, round, dark, clumped
                r = 2.75 * math.exp(0.10 * u[0])
                out.append(
                    Nucleus(x, y, r, r * math.exp(-abs(0.1 * u[1])), u[3],
                            0.74 * math.exp(0.15 * u[2]), 0.9, depth)
                )  # fmt: skip
            else:  # plasma cell, macrophage, endothelium: larger, paler, with a nucleolus
                r = 3.7 * math.exp(0.12 * u[0])
                out.append(
                    Nucleus(x, y, r, r * math.exp(-abs(0.28 * u[1])), u[3],
                            0.36 * math.exp(0.2 * u[2]), 0.9, depth, spots)
                )  # fmt: skip
    return tuple(out)


def _red_cells(canvas: Canvas, mask: Real) -> None:
    """Groups of red cells in small vessels: bright eosin discs."""
    cell = 150.0
    for j in range(math.floor(canvas.y[0] / cell) - 1, math.ceil(canvas.y[-1] / cell) + 1):
        for i in range(math.floor(canvas.x[0] / cell) - 1, math.ceil(canvas.x[-1] / cell) + 1):
            rng = cell_rng(canvas.seed, 28, i, j)
            x, y = (i + rng.uniform()) * cell, (j + rng.uniform()) * cell
            angle = rng.uniform(0, math.pi)
            for _ in range(int(rng.integers(4, 16))):
                along, across = rng.normal(0, 9), rng.normal(0, 2.6)
                px = x + along * math.cos(angle) - across * math.sin(angle)
                py = y + along * math.sin(angle) + across * math.cos(angle)
                r, depth = 2.9 * math.exp(rng.normal(0, 0.08)), rng.uniform(-0.5, 0.5)
                found = canvas.window(px, py, r + 1)
                if found is None:
                    continue
                where, dx, dy = found
                d = np.sqrt(dx * dx + dy * dy)
                disc = smoothstep(r + canvas.soften(0.3), r - canvas.soften(0.3), d)
                disc = disc * mask[where]
                canvas.e[(slice(None), *where)] *= 1 - 0.8 * disc
                canvas.add(where, depth, e=0.48 * disc, opd=0.05 * disc)


def _shed_cells(canvas: Canvas, region_um: float, mask: Real) -> None:
    """Single cells and flecks of debris on the bare glass around the tissue."""
    cell = 60.0
    for j in range(math.floor(canvas.y[0] / cell) - 1, math.ceil(canvas.y[-1] / cell) + 1):
        for i in range(math.floor(canvas.x[0] / cell) - 1, math.ceil(canvas.x[-1] / cell) + 1):
            rng = cell_rng(canvas.seed, 29, i, j)
            x, y = (i + rng.uniform()) * cell, (j + rng.uniform()) * cell
            z = zone_at(canvas.seed, region_um, x, y)
            if not BARE < z < DENSE or rng.uniform() > 0.10 + 0.35 * (z - BARE):
                continue
            for _ in range(int(rng.integers(1, 4))):
                px, py = x + rng.normal(0, 9), y + rng.normal(0, 9)
                r = rng.uniform(5.5, 9.0)
                found = (
                    None if _at(canvas, mask, px, py) > 0.5 else canvas.window(px, py, 1.6 * r)
                )
                depth = rng.uniform(-0.3, 0.3)
                nucleus = Nucleus(
                    px + rng.normal(0, 1),
                    py + rng.normal(0, 1),
                    rng.uniform(2.8, 3.8),
                    rng.uniform(2.2, 2.9),
                    rng.uniform(0, 3),
                    rng.uniform(0.5, 0.9),
                    0.9,
                    depth,
                )
                if found is None:
                    continue
                where, dx, dy = found
                d = np.sqrt(dx * dx + dy * dy) / r
                mid, coarse = canvas.chromatin[1][where], canvas.chromatin[2][where]
                body = smoothstep(1.08, 0.92, d * (1 + 0.13 * coarse))
                tone = body * (1 + 0.25 * mid)
                canvas.add(where, depth, e=0.22 * tone, h=0.03 * tone, opd=0.03 * tone)
                canvas.nucleus(nucleus)


def paint_tissue(canvas: Canvas, region_um: float) -> None:
    """Paint a piece of a stained section.

    Parameters
    ----------
    canvas : Canvas
        Where to paint; its seed is the slide's.
    region_um : float
        Size of the regions of dense, sparse and no tissue.
    """
    z = zone(canvas.seed, region_um, canvas.x, canvas.y)
    if float(z.max()) < BARE - 0.1:
        return
    mask = cover(canvas, z)
    if mask.any():
        span_x, span_y = (canvas.x[0], canvas.x[-1]), (canvas.y[0], canvas.y[-1])
        glands = glands_near(canvas.seed, region_um, span_x, span_y)
        inside = _epithelium(canvas, glands)
        band = noise(canvas.seed + 8, 420.0, canvas.x, canvas.y)
        _stroma(canvas, mask, inside, smoothstep(-0.7, -1.1, band))
        _red_cells(canvas, mask * (1 - inside))
        margin = 8.0
        for j in range(
            math.floor((canvas.y[0] - margin) / CELL_UM),
            math.ceil((canvas.y[-1] + margin) / CELL_UM),
        ):
            for i in range(
                math.floor((canvas.x[0] - margin) / CELL_UM),
                math.ceil((canvas.x[-1] + margin) / CELL_UM),
            ):
                for nucleus in _stroma_nuclei(canvas.seed, region_um, i, j):
                    tissue = _at(canvas, mask, nucleus.x, nucleus.y) > 0.5
                    if tissue and not _in_a_gland(glands, nucleus):
                        canvas.nucleus(nucleus)
        for gland in glands:
            for nucleus in _gland_nuclei(gland):
                canvas.nucleus(nucleus)
    _shed_cells(canvas, region_um, mask)


def _at(canvas: Canvas, mask: Real, x: float, y: float) -> float:
    """Value of a map at a point (outside of the painted piece: at its border)."""
    i = min(max(round((y - canvas.y[0]) / canvas.pitch), 0), len(canvas.y) - 1)
    j = min(max(round((x - canvas.x[0]) / canvas.pitch), 0), len(canvas.x) - 1)
    return float(mask[i, j])


def _in_a_gland(glands: list[Gland], n: Nucleus) -> bool:
    for g in glands:
        dx, dy = n.x - g.x, n.y - g.y
        if math.hypot(dx, dy) > 1.6 * g.radius + 6:
            continue
        c, s = math.cos(g.tilt), math.sin(g.tilt)
        u, v = (c * dx + s * dy) / g.stretch[0], (c * dy - s * dx) / g.stretch[1]
        if math.hypot(u, v) < g.radius_at(math.atan2(v, u)) + 2.6:
            return True
    return False
