"""One table of recovered images, for the console, the report and the benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_autofocus.training.evaluation_table import number, share
from mm_autofocus.training.refocus_baselines import SHARPER
from mm_autofocus.training.refocus_evaluate import figures, gain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm_autofocus.training.refocus_evaluate import RefocusEvaluation

__all__ = ["NAMES", "extent", "name_of", "refocus_heads", "refocus_sentences", "refocus_table"]

NAMES = {
    SHARPER: "sharper shot as it is",
    "mean": "mean of both",
    "wiener": "Wiener",
    "wavelet": "wavelet fusion",
    "laplacian": "Laplacian fusion",
}
"""Baseline → name in a table."""


def name_of(method: str) -> str:
    """Name of a method in a table."""
    return NAMES.get(method, method)


def extent(found: Mapping[str, Any]) -> str:
    """A gain with its 95 % interval."""
    value, between = found["gain_db"], found["interval_db"]
    if value is None:
        return "–"
    text = f"{value:+.2f}"
    return text if between is None else f"{text} ({between[0]:+.2f} … {between[1]:+.2f})"


def refocus_heads(found: RefocusEvaluation) -> list[str]:
    """Heads of the columns of `refocus_table`."""
    return [
        "PSNR, dB",
        *(f"± {h:g} µm" for h in found.halves_um),
        "all ± SD",
        "SSIM",
        "over the sharper shot",
        "made worse",
    ]


def refocus_table(found: RefocusEvaluation) -> list[list[str]]:
    """Rows for `refocus_heads`: the mean PSNR of each method at each half distance."""
    rows = []
    for method in found.methods:
        every = figures(found.rows, method)
        own = method == SHARPER
        rows.append(
            [
                name_of(method),
                *(number(figures(found.at(h), method)["psnr_db"]) for h in found.halves_um),
                f"{number(every['psnr_db'])} ± {number(every['psnr_std_db'])}",
                number(every["ssim"], 4),
                "–" if own else extent(gain(found.rows, method, SHARPER)),
                "–" if own else share(every["worse"]),
            ]
        )
    return rows


def refocus_sentences(document: Mapping[str, Any], name: str) -> list[str]:
    """What the table does not say, from the JSON document, one sentence each."""
    out = []
    for other, found in document["gain_over"].items():
        if other not in NAMES:
            out.append(f"{name} over {other}: {extent(found)} dB, pair by pair.")
    own = document["methods"][name]
    inside, outside = own["enclosed"], own["not_enclosed"]
    if inside["n"] and outside["n"]:
        out.append(
            f"Where the shots enclose focus ({inside['n']} pairs), "
            f"{number(inside['psnr_db'])} dB, {inside['gain_db']:+.2f} over the sharper shot; "
            f"where they do not ({outside['n']}), {number(outside['psnr_db'])} dB, "
            f"{outside['gain_db']:+.2f}."
        )
    if (focus := document["focus"]) is not None:
        text = (
            f"Where focus is between the shots, it tells to {number(focus['mae_um'])} µm (mean "
            "absolute error)"
        )
        if (known := focus["calibration"]) is not None:
            within = ", ".join(f"{share(v)} within {k} ×" for k, v in known["within"].items())
            text += f"; of the errors that it expects: {within} (normal: 68, 95, 99.7 %)"
        out.append(f"{text}.")
        flags = document["flags"]
        out.append(
            f"It says of {flags['not_enclosed_flagged']} of {flags['not_enclosed']} pairs that "
            "do not enclose focus that they do not "
            f"({flags['not_enclosed_far_flagged']} of {flags['not_enclosed_far']} where focus "
            f"is more than {flags['far_um']:g} µm beyond), and, wrongly, of "
            f"{flags['enclosed_flagged']} of {flags['enclosed']} others."
        )
    if (speed := document["megapixels_per_s"]) is not None:
        out.append(f"{number(speed)} megapixels recovered in a second.")
    if document["truth_off_um"]["most"] > 0.05:
        off = document["truth_off_um"]
        out.append(
            f"The truth is a recorded plane, {number(off['mean'])} µm from focus on average "
            f"({number(off['most'])} at most), with the noise of the camera."
        )
    return out
