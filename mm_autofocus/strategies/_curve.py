"""What a few looks tell of the whole focus curve: a posterior over its possible courses.

Model
-----
The score at z is ``b + a · f(u) · (1 + δ(z))`` with ``u = (z - z0) / w``:

- ``f`` is a peak of height 1 and half-width w at half height. Its shapes reach from a cusp
  with long tails to a plateau with steep flanks: ``1 / (1 + |u|^p)`` and ``2^-|u|^q``;
  the two sides may differ in width by the factor ``(1 + k) / (1 - k)``.
- ``b`` is the baseline: camera noise and what does not depend on focus. Its share of the
  top is gridded from 0 to 97 %; the height of the whole is integrated out by least squares.
- The z of a look is known to `z_sd_um` only: its score is off by the slope of the curve
  times that, which on a steep flank is far more than the camera's noise.
- ``δ`` is what no formula knows: a smooth random deviation, a Gaussian process of standard
  deviation `DEVIATION` and correlation length `LENGTH · w`. Two near looks share it, so
  the curve may lean or bulge on its plateau without pushing the model about.

The posterior over (z0, w, k, shape, baseline) is computed on a grid that shrinks around
what the looks leave possible. From it an ensemble of whole curves is drawn, each of which
passes through the looks; every decision is an average over the ensemble:

- where focus is: the z with the highest expected sharpness relative to the peak;
- whether to stop: the sharpness one expects to lose there;
- where to look next: the z whose look is expected to reduce that loss most (knowledge
  gradient; P. Frazier et al., *SIAM J. Control Optim.* 47 (2008) 2410-2439).

All random numbers are fixed: the same looks give the same answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mm_autofocus.strategies._looks import parabola_top
from mm_autofocus.strategies._threads import one_thread

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Prior

    Floats = npt.NDArray[np.float64]
    Singles = npt.NDArray[np.float32]
    Weights = npt.NDArray[np.floating]
    Bools = npt.NDArray[np.bool_]

__all__ = ["CurvePosterior", "Estimate"]

DEVIATION = 0.08
"""Relative deviation of real focus curves from the shapes below (standard deviation)."""

LENGTH = 0.5
"""How far along z that deviation is correlated, in half-widths of the peak."""

_NUGGET = 0.05  # part of the deviation that even near looks do not share
_TAIL = 0.03  # deviation in the far tails, in parts of the peak's height

# Exponent, and whether the shape is a bell 1 / (1 + |u|^p) or else 2^-|u|^p.
_SHAPES = (
    (1.3, True),
    (2.0, True),
    (3.0, True),
    (5.0, True),
    (8.0, True),
    (2.0, False),
    (4.0, False),
)
_EXPONENT = np.array([p for p, _ in _SHAPES])
_IS_BELL = np.array([bell for _, bell in _SHAPES])
_SKEW = np.array([-0.4, -0.2, 0.0, 0.2, 0.4])
_SKEW_SD = 0.35
_BASE = np.array([0.0, 0.05, 0.15, 0.4, 0.8, 0.97])
_BASE_PRIOR = np.array([0.35, 0.30, 0.15, 0.10, 0.06, 0.04])

_CENTRES = 49
_WIDTHS = 11
_CURVES = 160
_WAVES = 16
_MARGIN = 0.15  # a peak may lie so far outside the limits, in parts of their span
_MOST_OFF = 0.7  # that a wrong z can change a score, in parts of the peak there
_FEW = 3  # looks, of which the highest says more of the peak than a model of fewer
_BLUR = 0.02  # scores nearer than this, in parts of the best, count as the same


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the posterior says.

    Attributes
    ----------
    z_um : float
        The z, within the limits, with the highest expected sharpness.
    loss : float
        Sharpness expected to be lost there, relative to the peak within the limits.
    sd_um : float
        Root mean square distance of the peak from `z_um`.
    width_um : float
        Half-width of the peak at half height.
    beyond : float
        Sharpness expected to be lost in addition because the peak may lie beyond the
        limits.
    outside : float
        Probability that the peak lies beyond the limits.
    score : float
        Expected score at `z_um`.
    """

    z_um: float
    loss: float
    sd_um: float
    width_um: float
    beyond: float
    outside: float
    score: float


def _relative_slope(u: Weights, f: Weights, exponent: Weights, is_bell: Bools) -> Weights:
    """``|f'(u)| / f(u)`` of the shapes, of which ``f`` is given; the arguments broadcast."""
    slope = np.where(is_bell, 1 - f, -np.log(np.maximum(f, f.dtype.type(1e-12))))
    relative: Weights = exponent * slope / np.maximum(u, u.dtype.type(1e-6))
    return relative


def _peak(u: Floats, exponent: Floats, is_bell: Bools) -> Floats:
    """The shapes at ``|u|``; the arguments broadcast."""
    v = np.exp(np.minimum(exponent * np.log(np.maximum(u, 1e-6)), 80.0))
    return np.where(is_bell, 1.0 / (1.0 + v), np.exp2(-np.minimum(v, 120.0)))


@dataclass(slots=True)
class CurvePosterior:
    """Posterior over focus curves, given looks.

    Parameters
    ----------
    low_um, high_um : float
        Limits of the search.
    width_um : float
        Half-width of the peak that is expected (median).
    width_spread : float
        Standard deviation of its natural logarithm.
    prior : Prior, optional
        Where the peak is expected; one time in ten it may be anywhere.
    z_sd_um : float
        Standard deviation of where a look was really taken about its z.
    """

    low_um: float
    high_um: float
    width_um: float
    width_spread: float = 1.0
    prior: Prior | None = None
    z_sd_um: float = 0.0
    _z: list[float] = field(default_factory=list)
    _y: list[float] = field(default_factory=list)
    _noise: float = 0.0
    _about: float = 0.0
    _centres: Floats = field(init=False)
    _log_widths: Floats = field(init=False)
    _posterior: Weights = field(init=False)
    _inverse_height: Weights = field(init=False)
    _grid: Floats = field(init=False)
    _contrast: Floats = field(init=False)
    _baseline: Floats = field(init=False)
    _sharpness: Floats = field(init=False)

    def __post_init__(self) -> None:
        margin = _MARGIN * (self.high_um - self.low_um)
        self._centres = np.linspace(self.low_um - margin, self.high_um + margin, _CENTRES)
        middle, reach = math.log(self.width_um), 2.2 * self.width_spread
        self._log_widths = np.linspace(middle - reach, middle + reach, _WIDTHS)

    # -- the posterior over parameters -------------------------------------------------

    def update(self, z_um: Floats, scores: Floats, noise: float) -> Estimate:
        """Take in all looks so far.

        Parameters
        ----------
        z_um, scores : numpy.ndarray
            ``(N,)``, N ≥ 1; scores ≥ 0.
        noise : float
            Standard deviation of the noise of a score.
        """
        self._z, self._y = list(map(float, z_um)), list(map(float, scores))
        self._noise = noise
        if len(self._z) <= _FEW:
            self._about = self._z[int(np.argmax(self._y))]
        with one_thread():
            self._weigh()
            # The grid shrinks onto what is left, until it resolves it.
            for _ in range(3):
                if not self._shrink():
                    break
                self._weigh()
            estimate = self._estimate()
        self._about = estimate.z_um
        return estimate

    def _weigh(self) -> None:
        """Posterior weight of every cell (centre, width, skew, shape, baseline)."""
        z = np.array(self._z)
        top = max(*self._y, 1e-300)
        y = (np.array(self._y) / top).astype(np.float32)
        n = len(z)
        noise = np.float32(self._noise / top)
        width = np.exp(self._log_widths)

        # |u| of every look in every (centre, width, skew); then all shapes of it
        d = z[:, None, None, None] - self._centres[:, None, None]
        side = np.where(d > 0, 1.0, -1.0)
        u = np.abs(d) / (width[:, None] * (1.0 + side * _SKEW))
        log_u = np.log(np.maximum(u, 1e-6)).astype(np.float32)[..., None]
        power = np.exp(np.minimum(log_u * _EXPONENT.astype(np.float32), np.float32(80)))
        f = np.where(_IS_BELL, 1 / (1 + power), np.exp2(-np.minimum(power, np.float32(120))))
        shape = f.shape[1:]  # (centre, width, skew, shape)
        f = f.astype(np.float32)[..., None]
        base = _BASE.astype(np.float32)
        g = base + (1 - base) * f  # (look, centre, width, skew, shape, baseline)

        k = int(y.argmax())
        # standard deviation of each look, in parts of the height; the height enters the
        # measured noise only, for which a guess from the best look is good enough
        variance = (np.float32(DEVIATION) * (1 - base)) ** 2 * (f * f + np.float32(_TAIL**2))
        variance += (noise * g[k]) ** 2 + np.float32(1e-9)
        if self.z_sd_um > 0:
            slope = _relative_slope(
                u.astype(np.float32)[..., None],
                f[..., 0],
                _EXPONENT.astype(np.float32),
                _IS_BELL,
            )
            off = np.float32(self.z_sd_um) * slope / width.astype(np.float32)[:, None, None]
            # further than down or up the whole flank it cannot be off
            off = f * np.minimum(off, np.float32(_MOST_OFF))[..., None]
            variance += ((1 - base) * off) ** 2
        inverse = 1 / np.sqrt(variance)

        # Whitening: the deviation is correlated between looks near in z. Where measured
        # noise, which is not, is large beside it, the correlation is reduced.
        contrast = max(float(y.max() - y.min()), 0.05)
        nugget = _NUGGET + (float(noise) / (DEVIATION * contrast)) ** 2 + self._loosened(width)
        apart = (z[:, None] - z[None, :]) / (LENGTH * width[:, None, None])
        corr = np.exp(-0.5 * apart**2) + nugget[:, :, None] * np.eye(n)
        corr /= np.sqrt((1 + nugget[:, :, None]) * (1 + nugget[:, None, :]))
        whiten = np.linalg.inv(np.linalg.cholesky(corr)).astype(np.float32)  # (width, n, n)

        def white(x: Singles) -> Singles:
            rows = np.moveaxis(x, 2, 0).reshape(len(width), n, -1)
            whitened: Singles = np.matmul(whiten, rows)
            return whitened

        gw = white(g * inverse)
        yw = white(y[:, None, None, None, None, None] * inverse)
        num, den = (gw * yw).sum(1), (yw * yw).sum(1)
        t = np.maximum(num / den, np.float32(1e-4))  # 1 / height, by least squares
        chi2 = (gw * gw).sum(1) - 2 * t * num + t * t * den
        log_like = -0.5 * chi2 + (n - 1) * np.log(t) - 0.5 * np.log(den)
        cells = (len(width), shape[0], *shape[2:], len(base))

        def unfold(x: Singles) -> Singles:
            return np.moveaxis(x.reshape(cells), 0, 1)

        log_p = unfold(log_like) - 0.5 * np.log(variance).sum(0)
        log_p += np.log(np.diagonal(whiten, axis1=1, axis2=2)).sum(1)[:, None, None, None]
        log_p = log_p + self._log_prior()
        p = np.exp(log_p - log_p.max())
        self._posterior = p / p.sum()
        self._inverse_height = unfold(t) / top

    def _loosened(self, width: Floats) -> Floats:
        """Variance of each look by its z alone, in parts of the deviation's: (width, look).

        Near looks share the deviation, but not this. A typical shape about the peak as it
        was found last is good enough for it.
        """
        u = np.abs(np.array(self._z) - self._about) / width[:, None]
        off = self.z_sd_um / width[:, None] * 2 * u / (1 + u * u)
        loosened: Floats = (np.minimum(off, _MOST_OFF) / DEVIATION) ** 2
        return loosened

    def _log_prior(self) -> Floats:
        spread = (self._log_widths - math.log(self.width_um)) / self.width_spread
        centre = np.zeros_like(self._centres)
        if self.prior is not None:
            mean, sd = self.prior.z_um, self.prior.sd_um
            anywhere = 0.1 / max(self.high_um - self.low_um, 1e-9)
            normal = np.exp(-0.5 * ((self._centres - mean) / sd) ** 2) / (sd * 2.5066)
            centre = np.log(0.9 * normal + anywhere)
        out = (
            centre[:, None, None]
            - 0.5 * spread[None, :, None] ** 2
            - 0.5 * (_SKEW / _SKEW_SD) ** 2
        )
        log_prior: Floats = out[..., None, None] + np.log(_BASE_PRIOR)
        return log_prior

    def _shrink(self) -> bool:
        """Refine the grid where the posterior fills less than half of it."""
        changed = False
        for name, axis, least in (("_centres", 0, 0.0), ("_log_widths", 1, 0.25)):
            x = getattr(self, name)
            others = tuple(i for i in range(5) if i != axis)
            cumulative = np.cumsum(self._posterior.sum(others))
            last = len(x) - 1
            i = max(int(np.searchsorted(cumulative, 1e-4)) - 1, 0)
            j = min(int(np.searchsorted(cumulative, 1 - 1e-4)) + 1, last)
            if j - i <= last / 2 and x[j] - x[i] > least:
                setattr(self, name, np.linspace(x[i], x[j], last + 1))
                changed = True
        return changed

    # -- the ensemble of curves --------------------------------------------------------

    def _estimate(self) -> Estimate:
        low, high = self.low_um, self.high_um
        margin = _MARGIN * (high - low)
        p = np.cumsum(self._posterior.sum((1, 2, 3, 4)))
        last = len(p) - 1
        i, j = (min(int(np.searchsorted(p, q)), last) for q in (0.005, 0.995))
        a, b = np.clip(
            [self._centres[max(i - 1, 0)], self._centres[min(j + 1, last)]], low, high
        )
        wide = np.linspace(low - margin, high + margin, 53)
        grid = np.unique(np.concatenate([wide, np.linspace(a, b, 53), [low, high]]))
        contrast, width = self._draw(grid)

        peaks = grid[contrast.argmax(0)]
        highest = np.maximum(contrast.max(0), 1e-300)
        inside = (grid >= low) & (grid <= high)
        self._grid, self._contrast = grid[inside], contrast[inside]
        self._sharpness = np.clip(
            self._contrast / np.maximum(self._contrast.max(0), 1e-300), 0.0, 1.0
        )
        expected = self._sharpness.mean(1)
        k = int(expected.argmax())
        z = float(self._grid[k])
        if 0 < k < len(expected) - 1:
            z = parabola_top(self._grid[k - 1 : k + 2], expected[k - 1 : k + 2])
        return Estimate(
            z_um=z,
            loss=float(1.0 - expected[k]),
            sd_um=float(np.sqrt(np.mean((peaks - z) ** 2))),
            width_um=float(np.exp(np.mean(np.log(width)))),
            beyond=float(expected[k] - np.mean(np.clip(self._contrast[k] / highest, 0.0, 1.0))),
            outside=float(np.mean((peaks < low - 1e-9) | (peaks > high + 1e-9))),
            score=float(np.mean(self._contrast[k] + self._baseline)),
        )

    def _draw(self, grid: Floats) -> tuple[Floats, Floats]:
        """Draw curves that pass through the looks: contrast ``(grid, curve)``, and widths.

        Cells are drawn by their weight. To each belongs a random deviation, drawn as a sum
        of waves and then bent to pass through the looks (Matheron's rule; J. Wilson et al.,
        *Proc. ICML* (2020) 10292-10302).
        """
        rng = np.random.default_rng(1)
        cumulative = np.cumsum(self._posterior.ravel())
        at = (np.arange(_CURVES) + 0.5) / _CURVES * cumulative[-1]
        cell = np.minimum(np.searchsorted(cumulative, at), cumulative.size - 1)
        ci, wi, ki, si, bi = np.unravel_index(cell, self._posterior.shape)
        step = self._centres[1] - self._centres[0]
        centre = self._centres[ci] + step * (rng.random(_CURVES) - 0.5)
        width, skew = np.exp(self._log_widths[wi]), _SKEW[ki]
        height = 1.0 / self._inverse_height.ravel()[cell]
        base = _BASE[bi] * height
        amplitude = height - base
        frequency = rng.normal(size=_WAVES)
        phase = rng.uniform(0, 2 * np.pi, _WAVES)
        waves = rng.normal(size=(_CURVES, _WAVES)) * math.sqrt(2.0 / _WAVES)
        shake = rng.normal(size=(len(self._z), _CURVES))

        def peak(z: Floats) -> Floats:
            d = z[:, None] - centre
            u = np.abs(d) / (width * np.where(d > 0, 1 + skew, 1 - skew))
            return _peak(u, _EXPONENT[si], _IS_BELL[si])

        def wander(z: Floats) -> Floats:
            # counted from the limit, so that the answer does not depend on the stage's zero
            u = (z[:, None] - self.low_um) / (LENGTH * width)
            out: Floats = np.einsum(
                "cw,zcw->zc", waves, np.cos(u[..., None] * frequency + phase)
            )
            return out

        z, y = np.array(self._z), np.array(self._y)
        f = peak(z)
        sd = DEVIATION * amplitude * np.sqrt(f**2 + _TAIL**2)  # (look, curve)
        # The looks are passed closely, not exactly: each has its own noise.
        own = (0.2 * _NUGGET) * sd**2 + self._noise**2 + (1e-6 * y.max()) ** 2
        if self.z_sd_um > 0:
            d = z[:, None] - centre
            u = np.abs(d) / (width * np.where(d > 0, 1 + skew, 1 - skew))
            off = self.z_sd_um / width * _relative_slope(u, f, _EXPONENT[si], _IS_BELL[si])
            own = own + (amplitude * f * np.minimum(off, _MOST_OFF)) ** 2
        rest = y[:, None] - (base + amplitude * f) - wander(z) * sd - shake * np.sqrt(own)

        def correlation(x: Floats) -> Floats:
            apart = (x[:, None, None] - z[None, :, None]) / (LENGTH * width)
            out: Floats = np.exp(-0.5 * apart**2)  # (x, look, curve)
            return out

        cov = correlation(z) * sd[:, None] * sd[None]
        cov += np.eye(len(z))[..., None] * own
        pull = np.linalg.solve(np.moveaxis(cov, 2, 0), rest.T[..., None])[..., 0]
        f = peak(grid)
        sd_grid = DEVIATION * amplitude * np.sqrt(f**2 + _TAIL**2)
        bend = np.einsum("zlc,lc,cl->zc", correlation(grid), sd, pull) * sd_grid
        self._baseline = base
        return amplitude * f + wander(grid) * sd_grid + bend, width

    def worth(self, candidates: Floats) -> Floats:
        """Sharpness to be expected after one more look, for each candidate z.

        Parameters
        ----------
        candidates : numpy.ndarray
            ``(C,)``, in µm, within the limits.

        Returns
        -------
        numpy.ndarray
            ``(C,)``, from 0 to 1, relative to the peak.
        """
        scale = _BLUR * max(self._y) + self._noise
        worth = np.empty(len(candidates))
        right = np.clip(np.searchsorted(self._grid, candidates), 1, len(self._grid) - 1)
        left = right - 1
        part = (candidates - self._grid[left]) / (self._grid[right] - self._grid[left])
        scores = (
            self._contrast[left] * (1 - part[:, None])
            + self._contrast[right] * part[:, None]
            + self._baseline
        ) / scale
        sharpness = self._sharpness.astype(np.float32).T  # (curve, grid)
        with one_thread():
            for i, y in enumerate(scores.astype(np.float32)):
                # If curve j were the truth, which curves would the look leave?
                weight = np.exp(-0.5 * (y[:, None] - y[None, :]) ** 2)
                weight /= weight.sum(1, keepdims=True)
                worth[i] = (weight @ sharpness).max(1).mean()
        return worth
