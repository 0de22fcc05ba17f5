"""The focus surface: where focus will be, from where it was.

It learns while it scans. Each focused tile adds a point ``(x, y) -> dz``; the next tile is
predicted before it is measured, and the error of those predictions, not an assumption, is
the standard deviation that the prior of the next search is given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.interpolate import RBFInterpolator

from mm_autofocus.types import Prior

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["FocusSurface"]

# 1.4826 · median |x| is the standard deviation of a normal distribution.
_MAD_TO_SD = 1.4826
# Predictions looked back at: enough for a median, few enough to follow a new region.
_HISTORY = 15
# Neighbours of the local fit; more than this only costs time.
_NEIGHBOURS = 24


class FocusSurface:
    """Focus over x and y, one point per key, fitted by a smoothed thin-plate spline.

    Parameters
    ----------
    mode : {"last", "surface", "none"}
        ``last``: the last focus of the same key, else of the tile focused last.
        ``surface``: the spline through all tiles (a plane where they are few).
        ``none``: no prediction.
    sd_um : float
        Standard deviation claimed before any prediction could be checked, in µm.
    floor_um : float
        Never claim to be better than this, in µm (repeatability of stage and focus).

    Notes
    -----
    Thin-plate spline with a linear trend: J. Duchon, *Splines minimizing
    rotation-invariant semi-norms in Sobolev spaces* (1977), by SciPy's `RBFInterpolator`.
    """

    def __init__(
        self,
        mode: Literal["last", "surface", "none"] = "last",
        *,
        sd_um: float = 10.0,
        floor_um: float = 0.2,
    ) -> None:
        self.mode = mode
        self.sd_um = sd_um
        self.floor_um = floor_um
        self._points: dict[Hashable, tuple[float, float, float]] = {}
        # one history per way of predicting: staying at a place errs less than moving on
        self._residuals: dict[str, deque[float]] = {}
        # how far the nearest tile was from those that were predicted
        self._reached: deque[float] = deque(maxlen=_HISTORY)

    def __len__(self) -> int:
        return len(self._points)

    def predict(self, key: Hashable, x_um: float, y_um: float) -> Prior | None:
        """Where focus is expected at ``(x_um, y_um)``; None if nothing is known.

        Returns
        -------
        Prior | None
            z in the coordinate that was given to `add`, in µm, and its standard deviation.
        """
        if self.mode == "none" or not self._points:
            return None
        source, z_um = self._estimate(key, x_um, y_um)
        return Prior(z_um, self._sd(source), source)

    def add(self, key: Hashable, x_um: float, y_um: float, z_um: float) -> float | None:
        """Learn one focused tile.

        Returns
        -------
        float | None
            How far the surface was off there (measured minus predicted), in µm; None for
            the first tile.
        """
        residual: float | None = None
        if self._points and self.mode != "none":
            source, predicted = self._estimate(key, x_um, y_um)
            residual = z_um - predicted
            self._residuals.setdefault(source, deque(maxlen=_HISTORY)).append(residual)
            if key not in self._points:
                self._reached.append(self._nearest_um(x_um, y_um))
        # The tile focused last stands last, which is what `last` goes by.
        self._points.pop(key, None)
        self._points[key] = (x_um, y_um, z_um)
        return residual

    def sd_at(self, x_um: float, y_um: float) -> float:
        """How sure a prediction at a place is: a standard deviation in µm.

        That of the predictions that could be checked; larger in proportion where the nearest
        tile is farther away than it was from those.
        """
        sd = self._sd("surface")
        if not self._points or not self._reached:
            return self.sd_um
        checked = float(np.median(self._reached))
        far = self._nearest_um(x_um, y_um)
        return sd if far <= checked else sd * far / max(checked, 1e-9)

    def move(self, key: Hashable, z_um: float) -> None:
        """Replace the z (µm) of a tile that was found again, nearer to the truth."""
        if key in self._points:
            x_um, y_um, _ = self._points[key]
            self._points[key] = (x_um, y_um, z_um)

    def is_outlier(
        self, residual_um: float, source: str = "surface", sigmas: float = 6.0
    ) -> bool:
        """Whether a residual is far beyond what predictions of this kind erred so far."""
        history = self._residuals.get(source, ())
        return len(history) >= 5 and abs(residual_um) > sigmas * self._sd(source)

    def _sd(self, source: str) -> float:
        history = self._residuals.get(source, ())
        if len(history) < 3:
            return self.sd_um
        return max(self.floor_um, _MAD_TO_SD * float(np.median(np.abs(history))))

    def _nearest_um(self, x_um: float, y_um: float) -> float:
        points = np.array(list(self._points.values()))
        return float(np.hypot(points[:, 0] - x_um, points[:, 1] - y_um).min())

    def _estimate(self, key: Hashable, x_um: float, y_um: float) -> tuple[str, float]:
        if key in self._points and (self.mode == "last" or len(self._points) < 4):
            return "last", self._points[key][2]
        if self.mode == "last":
            return "neighbour", next(reversed(self._points.values()))[2]
        points = np.array(list(self._points.values()))
        return "surface", _spline(points, x_um, y_um)


def _spline(points: npt.NDArray[np.float64], x_um: float, y_um: float) -> float:
    """Thin-plate spline with a linear trend at one point.

    Where it is not determined: the nearest tile (fewer than three points), or a line along
    the tiles (all on one).
    """
    xy, z = points[:, :2], points[:, 2]
    here = np.array([[x_um, y_um]])
    order = np.argsort(np.hypot(*(xy - here).T))[:_NEIGHBOURS]
    xy, z = xy[order], z[order]
    centre = xy.mean(axis=0)
    scale = float(np.abs(xy - centre).max()) or 1.0
    spread = np.linalg.svd((xy - centre) / scale, compute_uv=False)
    if len(xy) < 3 or spread[0] == 0:
        return float(z[0])
    if spread[1] < 1e-3 * spread[0]:
        # A first row of tiles: extrapolate along it, change nothing across it.
        direction = np.linalg.svd((xy - centre) / scale)[2][0]
        along = (xy - centre) @ direction / scale
        slope, intercept = np.polyfit(along, z, 1)
        return float(intercept + slope * ((here[0] - centre) @ direction / scale))
    spline = RBFInterpolator(
        (xy - centre) / scale, z, kernel="thin_plate_spline", degree=1, smoothing=1e-2
    )
    return float(spline((here - centre) / scale)[0])
