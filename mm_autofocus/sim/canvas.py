"""The sheet of glass on which specimens are painted: layers of stain and of phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.sim.noise import noise, smoothstep

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["Canvas", "Nucleus"]


@dataclass(frozen=True, slots=True)
class Nucleus:
    """A nucleus: an ellipse with chromatin, a membrane and nucleoli.

    Attributes
    ----------
    x, y : float
        Centre, µm.
    a, b : float
        Half axes, µm.
    angle : float
        Of axis a, radian.
    density : float
        Optical density of haematoxylin at its middle, in unit amounts.
    clumping : float
        0: even; 1: coarse clumps.
    depth : float
        -0.5 (bottom of the section) to 0.5 (top).
    nucleoli : tuple
        ``(dx, dy)`` of each in units of the half axes.
    lobes : tuple
        ``(dx, dy, radius)`` of further bodies joined to it (granulocytes), in units of a.
    """

    x: float
    y: float
    a: float
    b: float
    angle: float
    density: float
    clumping: float
    depth: float
    nucleoli: tuple[tuple[float, float], ...] = ()
    lobes: tuple[tuple[float, float, float], ...] = ()


class Canvas:
    """Maps of a piece of the slide: unit amounts of stains and optical path, per layer.

    Parameters
    ----------
    seed : int
        Seed of the slide.
    x, y : numpy.ndarray
        Coordinates of columns and rows, µm.
    n_layers : int
        Number of layers in depth.

    Attributes
    ----------
    h, e : numpy.ndarray
        ``(L, Y, X)`` amounts of the two stains (haematoxylin and eosin, or emitters).
    opd : numpy.ndarray
        ``(L, Y, X)`` optical path difference in µm.
    """

    def __init__(
        self, seed: int, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], n_layers: int
    ) -> None:
        self.seed = seed
        self.x, self.y = x, y
        self.pitch = float(x[1] - x[0])
        shape = (n_layers, len(y), len(x))
        self.h = np.zeros(shape, np.float32)
        self.e = np.zeros(shape, np.float32)
        self.opd = np.zeros(shape, np.float32)
        self._chromatin: tuple[Real, Real, Real] | None = None
        self._depths = (np.arange(n_layers) + 0.5) / n_layers - 0.5

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self._depths)

    @property
    def depths(self) -> npt.NDArray[np.float64]:
        """Depth of each layer, -0.5 (bottom) to 0.5 (top) of the thickness."""
        return self._depths

    @property
    def chromatin(self) -> tuple[Real, Real, Real]:
        """Noise of three scales (0.7, 1.5 and 3 µm) that nuclei share."""
        if self._chromatin is None:
            s = self.seed
            self._chromatin = (
                noise(s + 31, 0.7, self.x, self.y),
                noise(s + 32, 1.5, self.x, self.y),
                noise(s + 33, 3.0, self.x, self.y),
            )
        return self._chromatin

    def shares(self, depth: float) -> npt.NDArray[np.float64]:
        """Shares ``(L,)`` of the layers in an object at a depth; they sum to 1."""
        if self.n_layers == 1:
            return np.ones(1)
        spacing = 1 / self.n_layers
        inside = min(max(depth, self._depths[0]), self._depths[-1])
        return np.asarray(np.maximum(0, 1 - np.abs(self._depths - inside) / spacing))

    def window(
        self, x: float, y: float, radius: float
    ) -> tuple[tuple[slice, slice], Real, Real] | None:
        """Slices around a point and the distances from it ``(1, X)``, ``(Y, 1)``, or None."""
        i0 = max(math.ceil((y - radius - self.y[0]) / self.pitch), 0)
        i1 = min(math.floor((y + radius - self.y[0]) / self.pitch) + 1, len(self.y))
        j0 = max(math.ceil((x - radius - self.x[0]) / self.pitch), 0)
        j1 = min(math.floor((x + radius - self.x[0]) / self.pitch) + 1, len(self.x))
        if i0 >= i1 or j0 >= j1:
            return None
        dx = (self.x[j0:j1] - x).astype(np.float32)[None, :]
        dy = (self.y[i0:i1] - y).astype(np.float32)[:, None]
        return (slice(i0, i1), slice(j0, j1)), dx, dy

    def soften(self, width_um: float) -> float:
        """Width of an edge, µm: `width_um`, or what the grid carries without aliasing."""
        return max(width_um, 0.7 * self.pitch)

    def add(self, where: tuple[slice, slice], depth: float, **maps: Any) -> None:
        """Add maps to the layers of a depth: ``h=``, ``e=``, ``opd=``."""
        for share, layer in zip(self.shares(depth), range(self.n_layers), strict=True):
            if share > 0:
                for name, values in maps.items():
                    getattr(self, name)[(layer, *where)] += np.float32(share) * values

    def nucleus(self, n: Nucleus, *, phase: float = 0.035) -> None:
        """Paint a nucleus, pushing the eosin aside."""
        reach = 1.25 * max(n.a, n.b) + 0.8 + (1.2 * n.a if n.lobes else 0)
        found = self.window(n.x, n.y, reach)
        if found is None:
            return
        where, dx, dy = found
        cos, sin = np.float32(math.cos(n.angle)), np.float32(math.sin(n.angle))
        p = (cos * dx + sin * dy) / np.float32(n.a)
        q = (cos * dy - sin * dx) / np.float32(n.b)
        fine, mid, coarse = (c[where] for c in self.chromatin)
        r = np.sqrt(p * p + q * q)
        for lx, ly, lr in n.lobes:
            r = np.minimum(r, np.sqrt((p - lx) ** 2 + (q - ly) ** 2) / lr)
        r = r * (1 + np.float32(0.07) * coarse) + np.float32(0.015) * mid
        small = min(n.a, n.b)
        edge = self.soften(0.28) / small
        body = smoothstep(1 + edge, 1 - edge, r)
        dome = np.sqrt(np.maximum(1 - r * r, 0.0))
        clumps = 1 + n.clumping * (0.30 * fine + 0.30 * mid)
        membrane = np.exp(-(((r - 0.88) * small / self.soften(0.35)) ** 2))
        amount = body * (
            (0.50 + 0.50 * dome) * np.maximum(clumps, 0.3)
            + (0.15 + 0.25 * n.clumping) * membrane
        )
        for nx, ny in n.nucleoli:
            spot = ((p - nx) * n.a) ** 2 + ((q - ny) * n.b) ** 2
            amount = amount + 0.75 * body * np.exp(-spot / self.soften(0.55) ** 2)
        self.e[(slice(None), *where)] *= 1 - np.float32(0.55) * body
        self.add(
            where,
            n.depth,
            h=np.float32(n.density) * amount,
            e=0.10 * body,
            opd=phase * amount * (0.7 + 0.3 * dome),
        )
