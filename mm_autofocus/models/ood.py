"""Whether a frame looks like those of the training: twenty numbers and a distance.

A net answers anything with a number. Frames that resemble nothing it was trained on are told
by the Mahalanobis distance of a small descriptor of their mosaic, which costs next to nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, TypeAlias

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]
    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["LEAST_FRAMES", "OodStats", "describe", "judge", "names"]

LEAST_FRAMES = 20
"""Fewer do not tell what is usual."""

_Tuple = Annotated[tuple[float, ...], Field(strict=False)]
_Rows = Annotated[tuple[_Tuple, ...], Field(strict=False)]

_COLOURS = ("red", "green", "blue")
_LEVELS = (2, 50, 98)  # percentiles
_SCALES_PX = (2, 4, 8, 56)  # edges of blocks, in pixels of the mosaic
_SATURATED, _DARK = 0.98, 0.02  # of the range
_LEAST_CONTRAST = 1e-3  # of the range; below it there is nothing to describe

_QUANTILE = 0.99  # of the training's frames are to lie within the limit ...
_MARGIN = 1.2  # ... and a margin, for no two slides are alike
_FOLDS = 5
_EXPOSURE_MARGIN = 0.05  # of the range
_FLOOR = 0.02
"""No number is believed to vary by less: one that was the same in all frames of the training
would make the smallest change infinitely unlikely."""


class OodStats(BaseModel):
    """What the descriptors of the training's frames look like.

    Attributes
    ----------
    names : list of str
        Of the numbers of the descriptor, see `describe`.
    mean : list of float
        Their mean.
    whitening : list of lists of float
        ``W``; the distance of a descriptor x is ``|W (x - mean)|``.
    threshold : float
        Distance at which a frame counts as unlike; its score is 1.
    exposure_range : (float, float)
        Lowest and highest median level of the frames, relative to saturation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    names: Annotated[tuple[str, ...], Field(strict=False)]
    mean: _Tuple
    whitening: _Rows
    threshold: Annotated[float, Field(gt=0)]
    exposure_range: Annotated[tuple[float, float], Field(strict=False)] = (0.0, 1.0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        n = len(self.names)
        if len(self.mean) != n or {len(self.whitening), *map(len, self.whitening)} != {n}:
            raise ValueError(f"ood: mean and whitening do not fit its {n} names")
        return self

    @classmethod
    def fit(cls, descriptors: Floats, groups: Sequence[object] | None = None) -> OodStats:
        """Learn what is usual.

        The limit is a high quantile of distances of frames that the fit did not see (in five
        folds), and a margin.

        Parameters
        ----------
        descriptors : numpy.ndarray
            ``(n, numbers)``, from `describe`, of frames of all kinds, defoci and exposures
            that the model is to accept.
        groups : sequence, optional
            ``(n,)``: the stack that each frame is from. Frames of one stack are alike, and
            stay in one fold. None: each is from a stack of its own.

        Raises
        ------
        InputError
            Fewer than `LEAST_FRAMES` rows.
        """
        x = np.asarray(descriptors, np.float64)
        if len(x) < LEAST_FRAMES:
            raise InputError(
                f"ood: {len(x)} frames are too few to say what is usual: must be at least "
                f"{LEAST_FRAMES}"
            )
        mean, whitening = _whiten(x)
        unseen = []
        order = {group: k for k, group in enumerate(dict.fromkeys(groups or range(len(x))))}
        fold = np.array([order[g] % _FOLDS for g in groups or range(len(x))])
        for k in np.unique(fold):
            rest = x[fold != k] if len(order) > 1 else x
            unseen.append(_distance(x[fold == k], *_whiten(rest)))
        limit = _MARGIN * float(np.quantile(np.concatenate(unseen), _QUANTILE))
        own = names({len(names(c)): c for c in (1, 3)}[x.shape[1]])
        middle = x[:, [k for k, name in enumerate(own) if name.endswith("median")]].mean(axis=1)
        return cls(
            names=own,
            mean=tuple(mean.tolist()),
            whitening=tuple(tuple(row) for row in whitening.tolist()),
            threshold=max(limit, 1.0),
            exposure_range=(float(middle.min()), float(middle.max())),
        )


def names(channels: int) -> tuple[str, ...]:
    """Names of the numbers that `describe` gives for grey (1) or RGB (3) frames."""
    colours = _COLOURS if channels == 3 else ("grey",)
    out = [f"{c} {p}" for c in colours for p in ("shadows", "median", "highlights")]
    out += ["saturated share", "dark share", "contrast", "skewness"]
    out += [f"detail of {n} px" for n in _SCALES_PX[:-1]]
    if channels == 3:
        out += ["red–green likeness", "blue–green likeness"]
        out += ["red contrast", "blue contrast"]
    return tuple(out)


def describe(mosaic: Real, channels: int) -> Floats:
    """Descriptors of the looks in a mosaic.

    Levels are relative to saturation; the contrast, the detail at each scale relative to
    it, and the contrast of red and blue relative to green are decadic logarithms. Detail is
    measured within the cells, so that the seams between them, and their number, do not count.

    Parameters
    ----------
    mosaic : numpy.ndarray
        ``(looks · channels, rows · 56, columns · 56)`` float32, 0 … 1.
    channels : int
        1 or 3.

    Returns
    -------
    numpy.ndarray
        ``(looks, numbers)`` float64.
    """
    looks = mosaic.reshape(-1, channels, *mosaic.shape[1:])
    return np.stack([_describe(look) for look in looks])


def _describe(look: Real) -> Floats:
    """Descriptor of ``(channels, Y, X)``."""
    # Levels and colours at a quarter of the resolution: there, noise is no colour.
    coarse = np.stack([_halved(_halved(plane)) for plane in look])
    flat = coarse.reshape(len(coarse), -1)
    levels = np.percentile(flat, _LEVELS, axis=1).T
    out: list[float] = levels.ravel().tolist()
    grey = look[0] if len(look) == 1 else np.asarray(look.mean(axis=0), np.float32)
    out += [float((grey > _SATURATED).mean()), float((grey < _DARK).mean())]
    energies = _energies(grey)
    total = sum(energies)
    out.append(_log(total))
    rest = flat.mean(axis=0)
    rest = rest - rest.mean()
    out.append(float((rest**3).mean() / max(float(rest.std()), _LEAST_CONTRAST) ** 3))
    # relative to all of it, but for what a plane without contrast would make of its noise
    out += [_log(e) - _log(total) for e in energies[:-1]]
    if len(look) == 3:
        red, green, blue = flat - flat.mean(axis=1, keepdims=True)
        sd = [float(c.std()) for c in (red, green, blue)]
        out += [_likeness(c, green) for c in (red, blue)]
        out += [_log(sd[k] ** 2) - _log(sd[1] ** 2) for k in (0, 2)]
    return np.asarray(out, np.float64)


def _energies(grey: Real) -> list[float]:
    """Mean squares of what is lost by averaging over blocks of each size, from the finest."""
    squares, plane, before = [], grey - np.float32(grey.mean()), 1
    for size in _SCALES_PX:
        last = float(np.square(plane, dtype=np.float64).mean())
        factor = size // before
        small = (plane.shape[1] // factor, plane.shape[0] // factor)
        plane = np.asarray(cv2.resize(plane, small, interpolation=cv2.INTER_AREA), np.float32)
        # averaging is a projection: what it takes away is the difference of the squares
        squares.append(max(last - float(np.square(plane, dtype=np.float64).mean()), 0.0))
        before = size
    return squares


def _halved(plane: Real) -> Real:
    size = (plane.shape[1] // 2, plane.shape[0] // 2)
    return np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_AREA), np.float32)


def _log(energy: float) -> float:
    """Decadic logarithm of a contrast, from its square."""
    return 0.5 * math.log10(energy + _LEAST_CONTRAST**2)


def _likeness(a: Real, b: Real) -> float:
    """Correlation of two colours; 0 where there is nothing to correlate."""
    return float((a * b).mean()) / max(float(a.std() * b.std()), _LEAST_CONTRAST**2)


def _whiten(x: Floats) -> tuple[Floats, Floats]:
    """Mean and whitening matrix, from a covariance shrunk towards its diagonal."""
    mean = x.mean(axis=0)
    n, d = x.shape
    covariance = np.cov(x, rowvar=False)
    weight = min(0.5, d / n)
    diagonal = np.diag(np.diag(covariance))
    covariance = (1 - weight) * covariance + weight * diagonal + _FLOOR**2 * np.eye(d)
    values, vectors = np.linalg.eigh(covariance)
    return mean, np.asarray((vectors / np.sqrt(values)).T, np.float64)


def _distance(x: Floats, mean: Floats, whitening: Floats) -> Floats:
    return np.asarray(np.linalg.norm((x - mean) @ whitening.T, axis=-1), np.float64)


def judge(stats: OodStats, descriptors: Floats) -> tuple[float, list[str]]:
    """Score a frame's looks by the one that is most unlike the training.

    Parameters
    ----------
    stats : OodStats
        Of the training.
    descriptors : numpy.ndarray
        ``(looks, numbers)``, from `describe`.

    Returns
    -------
    score : float
        Distance over the limit: 1 is the limit.
    clauses : list of str
        What is unlike; empty if nothing is.
    """
    mean, whitening = np.asarray(stats.mean), np.asarray(stats.whitening)
    distances = _distance(descriptors, mean, whitening)
    worst = int(np.argmax(distances))
    score = float(distances[worst]) / stats.threshold
    x = descriptors[worst]
    clauses = []
    low, high = stats.exposure_range
    middle = float(
        np.mean([v for v, n in zip(x, stats.names, strict=True) if n.endswith("median")])
    )
    if not low - _EXPOSURE_MARGIN <= middle <= high + _EXPOSURE_MARGIN:
        clauses.append(
            f"median level {100 * middle:.0f} % of the camera's range, trained on "
            f"{100 * low:.0f} … {100 * high:.0f} %"
        )
    if not score <= 1:
        offset = x - mean
        share = offset * (whitening.T @ (whitening @ offset))
        most = stats.names[int(np.argmax(share))]
        clauses.append(f"its score is {score:.1f} where 1 is the limit, most by its {most}")
    return score, clauses
