"""One table of a model and its baselines: for the console, the report and the benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm_autofocus.training.evaluate import Evaluation

__all__ = ["CLASSES", "HEADS", "cells", "number", "sentences", "share", "table_of"]

HEADS = (
    "who",
    "fields",
    "frames",
    "not predicted",
    "MAE ± SD, µm",
    "median",
    "≤ DoF",
    "≤ DoF/2",
    "≤ DoF/3",
    "direction",
    "looks",
)
CLASSES = {
    "dense": "dense",
    "sparse": "sparse",
    "extremely_sparse": "extremely sparse",
    "blank": "blank",
}
"""Key in the JSON → name in a table."""


def number(value: float | None, digits: int = 2) -> str:
    """A number, ``–`` for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    """A part as percent; 100 only where it is all."""
    if value is None:
        return "–"
    text = f"{100 * value:.1f}"
    return f"{'99.9' if text == '100.0' and value < 1 else text} %"


def cells(figures: Mapping[str, Any], *, direction: bool = True) -> list[str]:
    """A row of the table, from "frames" on, of what `merit.merit` returned."""
    spread = f"{number(figures['mae_um'])} ± {number(figures['mae_std_um'])}"
    looks = figures["looks"]
    return [
        str(figures["n"]),
        str(figures["n"] - figures["n_predicted"]),
        "–" if figures["mae_um"] is None else spread,
        number(figures["median_um"]),
        *(share(v) for v in figures["dof_accuracy"].values()),
        share(figures["direction_success"]) if direction else "–",
        "–" if looks is None else f"{looks:.1f}".removesuffix(".0"),
    ]


def table_of(evaluation: Evaluation) -> list[list[str]]:
    """Rows for :data:`HEADS`: all fields, then each class; the model, then its baselines."""
    everyone = {
        str(evaluation.about.get("model", "model")): evaluation.model,
        **evaluation.baselines,
    }
    figures = {name: evaluation.figures(judged) for name, judged in everyone.items()}
    rows = [
        [name, "all", *cells(found, direction=name != "zero")]
        for name, found in figures.items()
    ]
    classes = [key for key, v in evaluation.figures()["by_sparsity"].items() if v]
    if len(classes) > 1:
        for key in classes:
            for name, found in figures.items():
                if part := found["by_sparsity"].get(key):
                    shown = cells(part, direction=name != "zero")
                    rows.append([name, CLASSES[key], *shown])
    return rows


def sentences(document: Mapping[str, Any]) -> list[str]:
    """What the table does not say, from the JSON document, one sentence each."""
    coverage = document["coverage"]
    out = []

    def because(reasons: Mapping[str, int]) -> str:
        return ", ".join(f"{n} × {why}" for why, n in reasons.items())

    if coverage["missing"]:
        out.append(
            f"No prediction for {coverage['missing']} of {coverage['asked']} frames "
            f"({because(coverage['missing_because'])}). They are not in the MAE; they count as "
            "wrong in the DoF-accuracy and the direction. With 0 for them, the MAE is "
            f"{number(document['mae_all_um'])} µm."
        )
    if coverage["flagged"]:
        trusted = document["trusted"]
        out.append(
            f"{coverage['flagged']} predictions say that they are not to be trusted "
            f"({because(coverage['flagged_because'])}); the other {trusted['n']} have an MAE "
            f"of {number(trusted['mae_um'])} µm."
        )
    if document["n_far"]:
        out.append(
            f"Beyond 2 µm of defocus, the direction is right in "
            f"{share(document['direction_success_far'])} of {document['n_far']} frames."
        )
    if coverage["looks_missing"]:
        out.append(
            f"{coverage['looks_missing']} planes at the ends of the stacks were left out: one "
            "of the model's looks would be beyond."
        )
    if coverage["look_error_um"] > 0.05:
        out.append(
            f"The planes shown lie up to {number(coverage['look_error_um'])} µm from where "
            "the looks should be."
        )
    if coverage["outside_range"]:
        out.append(
            f"{coverage['outside_range']} planes were left out: beyond the trained range."
        )
    if (found := document["calibration"]) is not None:
        within = ", ".join(f"{share(v)} within {k} ×" for k, v in found["within"].items())
        out.append(
            f"Of the expected errors: {within} (a normal distribution: 68, 95, 99.7 %); error "
            f"over expected error {number(found['ratio'])} (rms; 1 is right)."
        )
    if document["truth"] == "label" and document.get("label_error_um") is not None:
        out.append(
            f"The labels themselves are known to ± {number(document['label_error_um'])} µm "
            "(median); no error below that means anything."
        )
    return out
