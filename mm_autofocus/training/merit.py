"""Figures of merit of predictions of defocus: how large the errors are, and how honest.

The three of SparseFocus (§ 2.2 of the paper) and what an operator needs beside them.

=====================  ==================================================================
``mae_um``             mean of abs(d̂ - d), over the frames that got a prediction; its
                       standard deviation ``mae_std_um`` and its median ``median_um``
``mae_all_um``         the same over all frames; one without a prediction counts as if 0 had
                       been predicted: the stage stays where it is
``dof_accuracy``       part of all frames with abs(d̂ - d) ≤ DoF, DoF/2, DoF/3; a frame
                       without a prediction counts as wrong
``direction_success``  part of all frames with sgn(d̂)·sgn(d) ≥ 0: d = 0 counts as right; a
                       frame without a prediction counts as wrong
=====================  ==================================================================
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np

from mm_autofocus.training.label import SPARSITIES

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = [
    "FAR_UM",
    "PARTS_OF_DOF",
    "Row",
    "by_defocus",
    "by_field",
    "by_sparsity",
    "calibration",
    "columns",
    "coverage",
    "interval",
    "merit",
    "worst",
]

PARTS_OF_DOF = {"1": 1.0, "1/2": 0.5, "1/3": 1 / 3}
FAR_UM = 2.0
"""Beyond this defocus the direction is also judged by itself: nearer, it hardly matters."""

_BINS = 24


class _OfField(Protocol):
    """A row of any table that says of which field it is."""

    @property
    def field(self) -> str: ...


_R = TypeVar("_R", bound=_OfField)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Row:
    """One frame that was judged, or one search that started there.

    Attributes
    ----------
    stack : int
        Which one, in the order they came.
    field, sparsity : str
        Of the stack; ``slide/field``.
    plane : int
        Its number in the stack.
    true_um : float
        Defocus, positive above focus.
    predicted_um : float | None
        None: nothing was predicted.
    expected_error_um : float | None
        What the prediction says of its own standard deviation.
    reasons : tuple of str
        Why not to trust it.
    looks : int
        What it cost.
    """

    stack: int
    field: str
    sparsity: str
    plane: int
    true_um: float
    predicted_um: float | None
    expected_error_um: float | None = None
    reasons: tuple[str, ...] = ()
    looks: int = 1

    @property
    def error_um(self) -> float | None:
        """``d̂ - d``; None without a prediction."""
        return None if self.predicted_um is None else self.predicted_um - self.true_um


def columns(rows: Iterable[Row]) -> tuple[Floats, Floats, Floats]:
    """True, predicted and expected error, each ``(N,)``; NaN where there is none."""
    rows = list(rows)
    true = np.array([r.true_um for r in rows], np.float64)
    said = np.array([np.nan if r.predicted_um is None else r.predicted_um for r in rows])
    expected = np.array(
        [np.nan if r.expected_error_um is None else r.expected_error_um for r in rows]
    )
    return true, np.asarray(said, np.float64), np.asarray(expected, np.float64)


def _mean(values: Floats | npt.NDArray[np.bool_]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def merit(rows: Sequence[Row], dof_um: float | None) -> dict[str, Any]:
    """Figures of merit of these frames; None where there is nothing to take a mean of.

    Parameters
    ----------
    rows : sequence of Row
        Frames.
    dof_um : float | None
        Depth of field; None: no DoF-accuracy.

    Returns
    -------
    dict
        ``n, n_predicted, mae_um, mae_std_um, median_um, bias_um, mae_all_um,
        dof_accuracy: {"1", "1/2", "1/3"}, direction_success, direction_success_far,
        n_far, looks``.

    Examples
    --------
    >>> rows = [Row(0, "a/1", "dense", k, d, d + 0.5) for k, d in enumerate((-2.0, 0.0, 4.0))]
    >>> found = merit(rows, dof_um=1.0)
    >>> found["mae_um"], found["dof_accuracy"]["1/3"], found["direction_success"]
    (0.5, 0.0, 1.0)
    """
    true, said, _ = columns(rows)
    got = np.isfinite(said)
    error = np.abs(said - true)
    seen = error[got]
    right = got & (np.sign(np.where(got, said, 0.0)) * np.sign(true) >= 0)
    far = np.abs(true) > FAR_UM
    accuracy: dict[str, float | None] = dict.fromkeys(PARTS_OF_DOF)
    if dof_um is not None:
        # a hair of tolerance: 0.5 - 0.2 is not 0.3 to a computer
        accuracy = {
            name: _mean(got & (error <= part * dof_um + 1e-9))
            for name, part in PARTS_OF_DOF.items()
        }
    return {
        "n": len(rows),
        "n_predicted": int(got.sum()),
        "mae_um": _mean(seen),
        "mae_std_um": float(np.std(seen)) if len(seen) else None,
        "median_um": float(np.median(seen)) if len(seen) else None,
        "bias_um": _mean((said - true)[got]),
        "mae_all_um": _mean(np.where(got, error, np.abs(true))),
        "dof_accuracy": accuracy,
        "direction_success": _mean(right),
        "direction_success_far": _mean(right[far]),
        "n_far": int(far.sum()),
        "looks": _mean(np.array([r.looks for r in rows], np.float64)),
    }


def by_sparsity(rows: Sequence[Row], dof_um: float | None) -> dict[str, dict[str, Any] | None]:
    """`merit` of each class; None where there is no frame of it.

    The keys are ``dense``, ``sparse`` and ``extremely_sparse``, and ``blank`` if fields
    were called so and have a focus all the same.
    """
    out: dict[str, dict[str, Any] | None] = {}
    for name in SPARSITIES:
        some = [r for r in rows if r.sparsity == name]
        if some or name != "blank":
            out[name.replace("-", "_")] = merit(some, dof_um) if some else None
    return out


def by_defocus(
    rows: Sequence[Row], dof_um: float | None, bins: int = _BINS
) -> list[dict[str, Any]]:
    """`merit` against the defocus, in bins of equal width, symmetric about 0.

    Returns
    -------
    list of dict
        Non-empty bins from below focus to above: ``from_um``, ``to_um`` and the figures.
    """
    if not rows:
        return []
    true, _, _ = columns(rows)
    reach = max(float(np.abs(true).max()), 1e-6)
    width = 2 * reach / bins
    index = np.clip(np.floor((true + reach) / width), 0, bins - 1).astype(int)
    out = []
    for k in np.unique(index).tolist():
        some = [r for r, i in zip(rows, index, strict=True) if i == k]
        place = {"from_um": k * width - reach, "to_um": (k + 1) * width - reach}
        out.append({**place, **merit(some, dof_um)})
    return out


def by_field(rows: Sequence[Row], dof_um: float | None) -> list[dict[str, Any]]:
    """`merit` of each field, the largest error of one of its frames beside it."""
    fields: dict[str, list[Row]] = {}
    for r in rows:
        fields.setdefault(r.field, []).append(r)
    out = []
    for name, some in sorted(fields.items()):
        errors = [abs(e) for r in some if (e := r.error_um) is not None]
        figures = merit(some, dof_um)
        classes = sorted({r.sparsity for r in some})
        largest = max(errors, default=None)
        out.append(
            {"field": name, "sparsity": ", ".join(classes), **figures, "largest_um": largest}
        )
    return out


def coverage(rows: Sequence[Row]) -> dict[str, Any]:
    """How many frames got no prediction, or one that is not to be trusted, and why.

    Reasons are counted by what stands before their colon, whatever numbers they hold.
    """

    def reasons(some: Iterable[Row]) -> dict[str, int]:
        kinds = ({_NUMBER.sub("N", w.partition(":")[0]) for w in r.reasons} for r in some)
        return dict(Counter(kind for row in kinds for kind in sorted(row)).most_common())

    missing = [r for r in rows if r.predicted_um is None]
    flagged = [r for r in rows if r.predicted_um is not None and r.reasons]
    return {
        "asked": len(rows),
        "predicted": len(rows) - len(missing),
        "missing": len(missing),
        "missing_because": reasons(missing),
        "flagged": len(flagged),
        "flagged_because": reasons(flagged),
    }


def calibration(rows: Sequence[Row], bins: int = 8) -> dict[str, Any] | None:
    """Whether the expected errors are right; None if the model expects none.

    Returns
    -------
    dict
        ``n``; ``within``: part of the frames whose error is at most 1, 2, 3 times what was
        expected (of a normal distribution 0.68, 0.95, 0.997); ``ratio``: root mean square
        of error over expected, 1 at best; ``bins``: of equally many frames each, ordered
        by the expected error: ``n, expected_um`` and ``found_um`` (root mean squares).
    """
    true, said, expected = columns(rows)
    known = np.isfinite(said) & np.isfinite(expected) & (expected > 0)
    if not known.any():
        return None
    error, expected = np.abs(said - true)[known], expected[known]
    ratio = error / expected
    order = np.argsort(expected, kind="stable")
    parts = [p for p in np.array_split(order, min(bins, max(len(order) // 5, 1))) if len(p)]

    def rms(values: Floats) -> float:
        return float(np.sqrt(np.mean(values**2)))

    return {
        "n": len(error),
        "within": {str(k): float(np.mean(ratio <= k)) for k in (1, 2, 3)},
        "ratio": rms(ratio),
        "bins": [
            {"n": len(p), "expected_um": rms(expected[p]), "found_um": rms(error[p])}
            for p in parts
        ],
    }


def worst(rows: Iterable[Row], n: int = 12) -> list[Row]:
    """The frames with the largest errors, the largest first; at most two of a field."""
    out: list[Row] = []
    taken: Counter[str] = Counter()
    wrong = [r for r in rows if r.error_um is not None]
    for r in sorted(wrong, key=lambda r: -abs(r.error_um or 0.0)):
        if taken[r.field] < 2 and len(out) < n:
            taken[r.field] += 1
            out.append(r)
    return out


def interval(
    rows: Sequence[_R],
    figure: Callable[[Sequence[_R]], float | None],
    *,
    draws: int = 300,
    seed: int = 0,
) -> tuple[float, float] | None:
    """95 % interval of a figure by drawing fields with replacement (bootstrap).

    Frames of one field are not independent: whole fields are drawn. None with fewer than
    three fields, or without the figure.
    """
    fields: dict[str, list[_R]] = {}
    for r in rows:
        fields.setdefault(r.field, []).append(r)
    piles = list(fields.values())
    if len(piles) < 3 or figure(rows) is None:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        some = [r for i in rng.integers(len(piles), size=len(piles)) for r in piles[i]]
        if (value := figure(some)) is not None:
            found.append(value)
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)
