"""The plots of the report on a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_autofocus.page import COLOURS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from mm_autofocus.ometiff import FocusRecord

__all__ = ["colour", "curves", "focus_map", "title_of", "ways"]


def colour(status: str) -> str:
    """Colour of a status."""
    return COLOURS.get(status, "#6e6e73")


def title_of(focus: FocusRecord) -> str:
    """Name of the position, and the time point where there are several."""
    if "t" in focus.index:
        return f"{focus.position} t{focus.index['t']}"
    return focus.position


def focus_map(focuses: Sequence[FocusRecord], truth: dict[str, dict[str, Any]]) -> Figure:
    """Draw z of each focused tile over the stage, tiles without focus crossed."""
    from matplotlib.figure import Figure

    known = [
        f
        for f in focuses
        if f.position in truth and truth[f.position].get("focus_um") is not None
    ]
    panels = 2 if known else 1
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    found = [f for f in focuses if f.status != "failed" and f.z_after_um is not None]
    lost = [f for f in focuses if f.status == "failed"]
    z = [f.z_after_um for f in found if f.z_after_um is not None]
    true_z = [float(truth[f.position]["focus_um"]) for f in known]
    low, high = min([*z, *true_z], default=0.0), max([*z, *true_z], default=1.0)
    shared = {"vmin": low, "vmax": high, "cmap": "viridis", "s": 140, "marker": "s"}
    dots = axes[0].scatter([f.x_um for f in found], [f.y_um for f in found], c=z, **shared)
    if lost:
        axes[0].scatter(
            [f.x_um for f in lost],
            [f.y_um for f in lost],
            marker="x",
            c=colour("failed"),
            s=70,
            label="not focused",
        )
        axes[0].legend(loc="upper right", fontsize=8)
    axes[0].set_title("z of focus", fontsize=10)
    if known:
        axes[1].scatter([f.x_um for f in known], [f.y_um for f in known], c=true_z, **shared)
        axes[1].set_title("true z of focus", fontsize=10)
    for ax in axes:
        ax.set_xlabel("x (µm)")
        ax.set_ylabel("y (µm)")
        ax.set_aspect("equal", adjustable="datalim")
        ax.margins(0.12)
    figure.colorbar(dots, ax=list(axes), label="z (µm)")
    return figure


def ways(focuses: Sequence[FocusRecord], dof_um: float | None) -> Figure:
    """Draw how far a shadow would have gone against how far the strategy in charge went."""
    from matplotlib.figure import Figure

    shadows = [f.details["shadow"] for f in focuses if "shadow" in f.details]
    both = [s for s in shadows if s.get("disagreement_um") is not None]
    ours = [s["z_um"] - s["z_look_um"] for s in both]
    theirs = [way - s["disagreement_um"] for way, s in zip(ours, both, strict=True)]
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    ax = figure.subplots()
    ends = [min([*ours, *theirs], default=0.0) - 0.5, max([*ours, *theirs], default=0.0) + 0.5]
    ax.plot(ends, ends, color="#6e6e73", lw=0.8)
    if dof_um is not None:
        ax.fill_between(
            ends, [e - dof_um for e in ends], [e + dof_um for e in ends], color="#e5e5ea"
        )
    for status in dict.fromkeys(s["status"] for s in both):
        chosen = [k for k, s in enumerate(both) if s["status"] == status]
        ax.scatter(
            [theirs[k] for k in chosen],
            [ours[k] for k in chosen],
            s=16,
            color=colour(status),
            label=status,
            zorder=3,
        )
    if both:
        ax.legend(fontsize=8, loc="upper left")
    ax.set_xlabel("the strategy in charge went (µm)")
    ax.set_ylabel("the shadow would have gone (µm)")
    return figure


def curves(focuses: Sequence[FocusRecord]) -> Figure:
    """Small multiples: the score of each look against z, and where the tile was left."""
    from matplotlib.figure import Figure

    columns = min(5, len(focuses)) or 1
    rows = -(-len(focuses) // columns) or 1
    figure = Figure(figsize=(2.1 * columns, 1.75 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, focus in zip(axes, focuses, strict=False):
        points = [(z, s) for z, s in focus.curve if s is not None]
        if points:
            zs, scores = zip(*points, strict=True)
            ax.plot(zs, scores, "o", ms=3.5, color=colour(focus.status))
            for i, (z, s) in enumerate(points, 1):
                ax.annotate(
                    str(i), (z, s), fontsize=5.5, xytext=(3, 2), textcoords="offset points"
                )
        if focus.z_after_um is not None:
            ax.axvline(
                focus.z_after_um,
                color="#1d1d1f",
                lw=0.8,
                ls="--" if focus.status != "failed" else ":",
            )
        ax.set_title(title_of(focus), fontsize=8)
        ax.tick_params(labelsize=6)
        ax.set_yticks([])
    for ax in axes[len(focuses) :]:
        ax.set_axis_off()
    figure.supxlabel(
        "z (µm); numbers: order of the looks; dashed: where the tile was left", fontsize=8
    )
    return figure
