"""Plots of an evaluation: predicted against true, error against defocus, reliability."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.training import merit
from mm_autofocus.training.evaluation_table import CLASSES, number, share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mm_autofocus.training.evaluate import Evaluation
    from mm_autofocus.training.merit import Row

__all__ = ["error_plot", "regression_plot", "reliability_plot", "tidy"]

_CLASS_COLOURS = {
    "dense": "#1b6ca8",
    "sparse": "#2a7f4f",
    "extremely-sparse": "#b3261e",
    "blank": "#6e6e73",
}
_DARK, _GREY, _LIGHT = "#1d1d1f", "#6e6e73", "#d1d1d6"
_LINES = (("1", "-", "DoF"), ("1/2", "--", "DoF/2"), ("1/3", ":", "DoF/3"))
_BINS = 13


def tidy(ax: Axes) -> None:
    """Leave two of the four edges, in grey."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_GREY)
    ax.tick_params(colors=_GREY, labelcolor=_DARK, labelsize=8)


def _groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by class of the field; classes without rows are left out."""
    found = [(name, [r for r in rows if r.sparsity == name]) for name in _CLASS_COLOURS]
    return [(name, some) for name, some in found if some]


def regression_plot(found: Evaluation) -> Figure:
    """Draw predicted against true defocus for each class, and the error below it.

    The band is the depth of field; frames in the shaded quadrants have the wrong direction.
    """
    from matplotlib.figure import Figure

    groups = _groups(found.model.rows)
    figure = Figure(figsize=(max(3.3 * len(groups), 5.0), 5.4), layout="constrained")
    axes = figure.subplots(
        2, len(groups), squeeze=False, sharex=True, sharey="row", height_ratios=(2.1, 1)
    )
    true, said, _ = merit.columns(found.model.rows)
    reach = 1.04 * float(np.nanmax(np.abs(np.concatenate([true, said]))))
    error = np.abs(said - true)
    known = error[np.isfinite(error)]
    # a few strays do not squeeze all others into a line
    most = 1.3 * max(found.dof_um or 0.0, float(np.percentile(known, 99)) if len(known) else 1)
    for k, (name, rows) in enumerate(groups):
        top, below = axes[0, k], axes[1, k]
        d, p, _ = merit.columns(rows)
        figures = merit.merit(rows, found.dof_um)
        top.fill_between([0, reach], -reach, 0, color="#b3261e", alpha=0.05, lw=0)
        top.fill_between([-reach, 0], 0, reach, color="#b3261e", alpha=0.05, lw=0)
        top.plot([-reach, reach], [-reach, reach], color=_GREY, lw=0.8)
        if found.dof_um is not None:
            for ax, line in ((top, np.array([-reach, reach])), (below, np.zeros(2))):
                ax.fill_between(
                    [-reach, reach], line - found.dof_um, line + found.dof_um,
                    color=_LIGHT, alpha=0.6, lw=0, zorder=0,
                )  # fmt: skip
        style: dict[str, Any] = {
            "s": 9 if len(rows) < 1500 else 4,
            "color": _CLASS_COLOURS[name],
            "alpha": float(np.clip(260 / len(rows), 0.12, 0.7)),
            "lw": 0,
            "rasterized": True,
        }
        top.scatter(d, p, **style)
        below.scatter(d, p - d, **style)
        out = np.isfinite(p) & (np.abs(p - d) > most)
        below.scatter(
            d[out], np.sign((p - d)[out]) * most * 0.97, marker="x", s=18,
            color=_CLASS_COLOURS[name], lw=0.9,
        )  # fmt: skip
        below.axhline(0, color=_GREY, lw=0.8)
        label = CLASSES[name.replace("-", "_")]
        top.set_title(
            f"{label}, {len(rows)} frames\nMAE {number(figures['mae_um'])} µm, direction "
            f"{share(figures['direction_success'])}",
            fontsize=9,
            color=_DARK,
        )
        top.set(xlim=(-reach, reach), ylim=(-reach, reach))
        below.set_ylim(-most, most)
        below.set_xlabel("true defocus, µm", fontsize=8.5)
        for ax in (top, below):
            tidy(ax)
    axes[0, 0].set_ylabel("predicted defocus, µm", fontsize=8.5)
    axes[1, 0].set_ylabel("error, µm", fontsize=8.5)
    return figure


def error_plot(found: Evaluation) -> Figure:
    """Draw the mean absolute error against the defocus, by class, beside the baselines.

    The bands hold the middle 80 % of the frames.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    ax = figure.subplots()
    peak = found.dof_um or 0.0
    for name, rows in _groups(found.model.rows):
        centres, mean, low, high = _error_bins(rows)
        colour = _CLASS_COLOURS[name]
        ax.fill_between(centres, low, high, color=colour, alpha=0.09, lw=0)
        ax.plot(
            centres, mean, "o-", color=colour, ms=3.5, lw=1.6,
            label=CLASSES[name.replace("-", "_")],
        )  # fmt: skip
        peak = max([peak, *high.tolist()])
    styles = ((0, (4, 2)), (0, (1, 1.5)), (0, (4, 1, 1, 1)), (0, (8, 2)))
    others = [(n, j) for n, j in found.baselines.items() if n != "zero" and j.rows]
    for (name, judged), style in zip(others, styles, strict=False):
        centres, mean, _, _ = _error_bins(judged.rows)
        ax.plot(centres, mean, color=_GREY, lw=1.1, ls=style, label=f"{name} (all)")
    if found.dof_um is not None:
        _dof_lines(ax, found.dof_um)
    ax.set_ylim(0, 1.12 * (peak or 1.0))
    ax.set_xlabel("true defocus, µm", fontsize=8.5)
    ax.set_ylabel("absolute error, µm", fontsize=8.5)
    ax.margins(x=0.02)
    tidy(ax)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _dof_lines(ax: Axes, dof_um: float) -> None:
    for part, style, label in _LINES:
        y = dof_um * merit.PARTS_OF_DOF[part]
        ax.axhline(y, color=_DARK, lw=0.7, ls=style, zorder=0)
        ax.annotate(
            label, (1, y), xycoords=("axes fraction", "data"), xytext=(3, 0),
            textcoords="offset points", fontsize=7.5, va="center", color=_GREY,
        )  # fmt: skip


def _error_bins(rows: Sequence[Row]) -> tuple[Any, Any, Any, Any]:
    """Middle, mean error, 10th and 90th percentile of bins of equal width."""
    true, said, _ = merit.columns(rows)
    good = np.isfinite(said)
    if not good.any():
        return (np.zeros(0),) * 4
    d, error = true[good], np.abs(said - true)[good]
    edges = np.linspace(d.min() - 1e-6, d.max() + 1e-6, _BINS + 1)
    which = np.digitize(d, edges) - 1
    used = np.unique(which)
    parts = [error[which == k] for k in used]
    low, high = (np.array([np.percentile(p, q) for p in parts]) for q in (10, 90))
    centres = np.array([d[which == k].mean() for k in used])
    return centres, np.array([p.mean() for p in parts]), low, high


def reliability_plot(found: Evaluation) -> Figure | None:
    """Draw found against expected error, and how often the error was within 1, 2, 3 times.

    None if the model expects no errors.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    known = merit.calibration(found.model.rows)
    if known is None:
        return None
    figure = Figure(figsize=(7.6, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    expected = np.array([b["expected_um"] for b in known["bins"]])
    errors = np.array([b["found_um"] for b in known["bins"]])
    low = 0.7 * max(min(expected.min(), errors.min()), 1e-3)
    high = 1.4 * max(expected.max(), errors.max(), 1e-3)
    left.plot([low, high], [low, high], color=_GREY, lw=0.9)
    left.fill_between(
        [low, high], [low / 2, high / 2], [low * 2, high * 2], color=_LIGHT, alpha=0.45, lw=0
    )
    left.plot(expected, errors, "o-", color="#1b6ca8", ms=4.5, lw=1.4)
    left.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    left.set_xlabel("expected error, µm (rms of a bin)", fontsize=8.5)
    left.set_ylabel("error found, µm (rms)", fontsize=8.5)
    left.set_title("band: right to a factor of 2", fontsize=8.5, color=_GREY)
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low <= t <= high]
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
        axis.set_ticks(ticks)
    x = np.arange(3)
    within = [100 * v for v in known["within"].values()]
    normal = (68.3, 95.4, 99.7)
    right.bar(x - 0.19, within, 0.36, color="#1b6ca8", label="found")
    right.bar(x + 0.19, normal, 0.36, color=_LIGHT, label="normal distribution")
    for at, value in zip(x, within, strict=True):
        right.annotate(f"{value:.0f}", (at - 0.19, value), ha="center", va="bottom", fontsize=8)
    right.set_xticks(x, [f"within {k} ×" for k in (1, 2, 3)])
    right.set_ylim(0, 122)
    right.set_yticks([0, 25, 50, 75, 100])
    right.set_ylabel("frames, %", fontsize=8.5)
    right.legend(fontsize=7.5, frameon=False, loc="upper left", ncols=2)
    for ax in (left, right):
        tidy(ax)
    return figure
