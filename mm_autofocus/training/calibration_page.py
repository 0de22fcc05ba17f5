"""The report of a calibration: focus curves with the depth of field, and the sign test."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mm_autofocus.page import page, plot, section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mm_autofocus.training.calibrate import Images
    from mm_autofocus.training.sign import SignTest

__all__ = ["calibration_page"]


def calibration_page(images: Images, lines: Sequence[str], settings: str) -> str:
    """One self-contained HTML page.

    Parameters
    ----------
    images : Images
        What the stacks said.
    lines : sequence of str
        As told on the console.
    settings : str
        Recommended, as YAML.
    """
    said = f"<pre>{html.escape(chr(10).join(lines))}</pre>"
    parts = [
        "<h1>Calibration</h1>",
        section("What was measured", said),
        section("Focus curves", plot(_curves(images))),
    ]
    if images.sign.one is not None:
        parts.append(section("Side of focus, on held-out fields", plot(_sign(images.sign))))
    parts.append(section("Settings", f"<pre>{html.escape(settings)}</pre>"))
    return page("Calibration", "".join(parts))


def _curves(images: Images) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for d, score in images.curves:
        axes.plot(d, score, "-", color="#5b7aa5", lw=0.7, alpha=0.5)
    if images.depth.um is not None:
        half = images.depth.um / 2
        axes.axvspan(-half, half, color="#2a7f4f", alpha=0.2, label="depth of field")
        axes.legend(fontsize=8)
    axes.set_xlabel("defocus (µm)")
    axes.set_ylabel("focus measure / peak")
    return figure


def _sign(test: SignTest) -> Figure:
    from matplotlib.figure import Figure

    scores = [s for s in (test.one, *test.two) if s is not None]
    figure = Figure(figsize=(7, 3.0), layout="constrained")
    axes = figure.subplots()
    for k, s in enumerate(scores):
        parts = (s.near, s.middle, s.far)
        error = [[s.accuracy - s.low], [s.high - s.accuracy]]
        axes.errorbar(k, s.accuracy, yerr=error, fmt="o", color="#1d1d1f", capsize=5)
        for i, part in enumerate(parts):
            if part is not None:
                axes.plot(k + 0.12 * (i + 1), part, "s", color=_COLOURS[i], ms=5)
    for i, name in enumerate(("1 to 2", "2 to 4", "beyond 4")):
        axes.plot([], [], "s", color=_COLOURS[i], ms=5, label=f"{name} DoF from focus")
    axes.axhline(0.5, color="#b3261e", lw=0.8, ls="--", label="tossed")
    axes.set_xticks(range(len(scores)))
    axes.set_xticklabels(
        [f"looks at {', '.join(f'{x:g}' for x in s.looks_um)} µm" for s in scores]
    )
    axes.set_ylabel("sign right")
    axes.set_ylim(0.3, 1.03)
    axes.legend(fontsize=7, loc="lower right")
    return figure


_COLOURS = ("#c98500", "#5b7aa5", "#7a5ba5")
