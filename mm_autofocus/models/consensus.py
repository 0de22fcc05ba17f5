"""Which patches are looked at, and what they say together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypeAlias

import cv2
import numpy as np

from mm_autofocus.models.card import TopK
from mm_autofocus.models.patches import CELL_PX

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.card import ModelCard

    Real: TypeAlias = npt.NDArray[np.float32]
    Cells: TypeAlias = npt.NDArray[np.intp]

__all__ = [
    "Sparsity",
    "agreed",
    "choose",
    "class_of",
    "content_of",
    "doubts",
    "expected_error",
    "raw_error",
    "spread",
    "weighted_median",
]

Sparsity: TypeAlias = Literal["dense", "sparse", "extremely-sparse", "blank"]

_PAPER_GRID = 81  # the numbers of patches per class were chosen for 9 × 9
_MEDIAN = 1.2533  # standard error of a median over that of a mean
_ALIKE = 0.5  # standard deviations within which patches are averaged
_LEAST_SD, _TINY = 1e-3, 1e-12  # of the largest; no patch outweighs all others for ever
_SLACK = 1e-9
_SHORE = 0.2  # share of patches on the other side of focus that makes the direction doubtful

_CONTENT = 4.0  # variance of a cell over that of the noise
_CONTENT_SD = 2e-3  # of the range; below it a camera without noise shows its rounding


def class_of(content: int, total: int, k: TopK) -> Sparsity:
    """Class of a field by the share of its patches that carry content.

    Dense: at least as large a share as `k.dense` is of a grid of 9 × 9; sparse likewise.
    """
    if not content:
        return "blank"
    if content * _PAPER_GRID >= k.dense * total:
        return "dense"
    return "sparse" if content * _PAPER_GRID >= k.sparse * total else "extremely-sparse"


def choose(importance: Real, threshold: float, k: TopK | None) -> tuple[Cells, int, Sparsity]:
    """Choose the patches to look at.

    Parameters
    ----------
    importance : numpy.ndarray
        ``(rows, columns)``.
    threshold : float
        A patch with at least so much carries content.
    k : TopK | None
        How many of them at most, by class; None: all of them.

    Returns
    -------
    cells : numpy.ndarray
        ``(N, 2)`` of row, column, the most important first.
    content : int
        How many carry content.
    sparsity : {"dense", "sparse", "extremely-sparse", "blank"}
        Class of the field.
    """
    flat = importance.ravel()
    content = int(np.count_nonzero(flat >= threshold))
    sparsity = class_of(content, flat.size, k or TopK())
    most = content
    if k is not None:
        most = {
            "dense": k.dense,
            "sparse": k.sparse,
            "extremely-sparse": k.extremely_sparse,
            "blank": 0,
        }[sparsity]
    order = np.argsort(-flat, kind="stable")[: min(most, content)]
    return np.stack(np.unravel_index(order, importance.shape), axis=-1), content, sparsity


def content_of(mosaic: Real) -> Real:
    """Content of each patch by measure, for nets that do not judge it themselves.

    The variance of a cell about its plane (shading is no content), over that of the noise
    of the quietest tenth of the cells: ``v / (v + least)``, so that ½ is the threshold.

    Parameters
    ----------
    mosaic : numpy.ndarray
        ``(C, rows · 56, columns · 56)`` float32, 0 … 1.

    Returns
    -------
    numpy.ndarray
        ``(rows, columns)`` float32, 0 … 1.
    """
    grey = mosaic.mean(axis=0)
    rows, columns = grey.shape[0] // CELL_PX, grey.shape[1] // CELL_PX
    # one light blur: single hot pixels are no content
    kernel = np.array([0.25, 0.5, 0.25], np.float32)
    cells = _cells(_filtered(grey, kernel), rows, columns)
    edge = np.linspace(-1, 1, CELL_PX, dtype=np.float32)
    y, x = (a.ravel() for a in np.meshgrid(edge, edge, indexing="ij"))
    basis = np.stack([np.ones_like(x), x, y])
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    cells -= (cells @ basis.T) @ basis
    variance = (cells**2).mean(axis=1)
    fine = np.array([1.0, -2.0, 1.0], np.float32)
    rough = _cells(_filtered(grey, fine), rows, columns)
    # (1, -2, 1)² has gain 36, the blur leaves (3/8)² of white noise
    noise = (3 / 8) ** 2 * np.percentile((rough**2).mean(axis=1), 10) / 36
    least = max(_CONTENT * float(noise), _CONTENT_SD**2)
    return np.asarray(variance / (variance + least), np.float32).reshape(rows, columns)


def _filtered(plane: Real, kernel: Real) -> Real:
    return np.asarray(cv2.sepFilter2D(plane, cv2.CV_32F, kernel, kernel), np.float32)


def _cells(plane: Real, rows: int, columns: int) -> Real:
    n = CELL_PX
    return plane.reshape(rows, n, columns, n).swapaxes(1, 2).reshape(rows * columns, n * n)


def agreed(values: Real, sd: Real | None) -> float:
    """What patches say together, by how sure the net is of each.

    Huber's estimate of location (Ann. Math. Stat. 35, 73, 1964): the answer with the least sum
    of losses that grow as squares within half of a patch's standard deviation, and in
    proportion beyond it. Patches that agree are averaged, as is best for errors of theirs;
    whatever less than half of them say, counted by how sure they are, cannot draw it away, as
    it cannot a median.

    Parameters
    ----------
    values : numpy.ndarray
        ``(n,)``, at least one.
    sd : numpy.ndarray | None
        ``(n,)``, the net's own, 0 or more; None: not known, and the answer is the median.

    Returns
    -------
    float
        Midway where several answers are equally good; NaN where one of `values` or `sd` is no
        number.
    """
    if sd is None:
        return float(np.median(values))
    v, sure = np.asarray(values, np.float64), np.asarray(sd, np.float64)
    sure = np.maximum(sure, max(_LEAST_SD * sure.max(), _TINY))
    if not (np.isfinite(v).all() and np.isfinite(sure).all()):
        return math.nan
    # what pulls at the answer falls in straight pieces, from end to end of these
    ends = np.sort(np.concatenate([v - _ALIKE * sure, v + _ALIKE * sure]))
    pull = (((v - ends[:, None]) / sure).clip(-_ALIKE, _ALIKE) / sure).sum(axis=1)
    slack = _SLACK * pull[0]  # sums differ by their last bits
    above, below = np.flatnonzero(pull > slack)[-1], np.flatnonzero(pull < -slack)[0]
    first = np.interp(0, pull[[above + 1, above]], ends[[above + 1, above]])
    last = np.interp(0, pull[[below, below - 1]], ends[[below, below - 1]])
    return float((first + last) / 2)


def weighted_median(values: Real, weights: npt.NDArray[np.float64]) -> float:
    """Value with half of the weight on either side; midway between two where both are it.

    Parameters
    ----------
    values : numpy.ndarray
        ``(n,)``, at least one.
    weights : numpy.ndarray
        ``(n,)`` float64, above 0.

    Returns
    -------
    float
        NaN where a weight is no number.
    """
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    half = below[-1] / 2
    if not math.isfinite(half):
        return math.nan
    slack = _SLACK * half  # sums of equal weights differ by their last bits
    first, last = np.searchsorted(below, (half - slack, half + slack))
    return float((values[order[first]] + values[order[last]]) / 2)


def spread(values: Real) -> float | None:
    """Robust standard deviation, 1.4826 · MAD; None of fewer than two values."""
    if len(values) < 2:
        return None
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def raw_error(patch_sd_um: Real | None, spread_um: float | None, n: int) -> float | None:
    """Standard deviation of what patches agree on, before it is calibrated.

    What the net itself is unsure of is shared by all patches of a field (they lie behind the
    same optics), the rest is averaged away, at least as by a median: ``hypot(median sd,
    1.25 · spread / √n)``.

    Parameters
    ----------
    patch_sd_um : numpy.ndarray | None
        ``(n,)``, the net's own.
    spread_um : float | None
        Of the patches.
    n : int
        Number of patches.

    Returns
    -------
    float | None
        In µm; None where neither is known.
    """
    if patch_sd_um is None and spread_um is None:
        return None
    own = 0.0 if patch_sd_um is None else float(np.median(patch_sd_um))
    return math.hypot(own, _MEDIAN * (spread_um or 0.0) / math.sqrt(n))


def expected_error(card: ModelCard, raw_um: float | None) -> float | None:
    """Calibrated standard deviation of the frame's defocus, in µm; None: not known."""
    if raw_um is None:
        return card.error.floor_um or None
    return math.hypot(card.error.sd_scale * raw_um, card.error.floor_um) or None


def doubts(
    card: ModelCard,
    defocus_um: float,
    patches_um: Real,
    patch_sd_um: Real | None,
    *,
    content: int,
    total: int,
) -> list[str]:
    """Why the answer of these patches should not be trusted, clause by clause."""
    reasons = []
    few = 3 if card.importance is None else card.importance.k.extremely_sparse
    least = min(few, -(-total // 9))
    if content < least:
        reasons.append(f"too few patches carry content: {content} of {total}")
    sd = None if patch_sd_um is None else card.error.sd_scale * float(np.median(patch_sd_um))
    limit = card.error.disagreement_um or (4 * sd if sd else card.dof_um)
    apart = spread(patches_um)
    if limit is not None and apart is not None and apart > limit:
        reasons.append(f"patches disagree: they spread by {apart:.2f} µm")
    elif limit is not None and len(patches_um) > 2 and abs(defocus_um) > limit:
        # a robust spread does not see a third of the patches on the other side of focus
        across = int(np.count_nonzero(patches_um * np.sign(defocus_um) < -limit))
        if across > _SHORE * len(patches_um):
            reasons.append(
                f"patches disagree: {across} of {len(patches_um)} see the other direction"
            )
    low, high = card.z_range_um
    if not low <= defocus_um <= high:
        reasons.append(
            f"prediction beyond the trained range: {defocus_um:+.1f} µm of {low:+g} … "
            f"{high:+g} µm"
        )
    return reasons
