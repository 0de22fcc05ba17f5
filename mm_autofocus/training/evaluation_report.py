"""The report of an evaluation: one HTML file, and its plots as PNG."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.hooks.thumbnail import detail_at, thumbnail_png
from mm_autofocus.page import page, plot, png, section, table
from mm_autofocus.training import merit
from mm_autofocus.training.evaluation_plots import (
    error_plot,
    regression_plot,
    reliability_plot,
)
from mm_autofocus.training.evaluation_table import HEADS, number, sentences, share, table_of

if TYPE_CHECKING:
    from mm_autofocus.training.evaluate import Evaluation
    from mm_autofocus.training.judges import Planes

__all__ = ["plots", "report_page"]

_DPI = 130


def plots(found: Evaluation) -> dict[str, bytes]:
    """Draw the plots: name → PNG."""
    drawn = {
        "regression": regression_plot(found),
        "error": error_plot(found),
        "reliability": reliability_plot(found),
    }
    return {name: png(figure, _DPI) for name, figure in drawn.items() if figure is not None}


def report_page(
    found: Evaluation, pictures: Mapping[str, bytes], stacks: Sequence[Planes] = ()
) -> str:
    """Return the report as HTML; self-contained, without scripts.

    Parameters
    ----------
    found : Evaluation
        What was found.
    pictures : mapping
        From `plots`.
    stacks : sequence of Planes
        In the order in which they were judged, for pictures of the worst frames.
    """
    document = found.to_json()
    sections = [_head(found)]
    for title, name, caption in (
        (
            "Predicted against true defocus",
            "regression",
            "Grey band: the depth of field. Frames in the tinted quadrants were sent the wrong "
            "way. Crosses: errors beyond the edge of the plot.",
        ),
        (
            "Error against defocus",
            "error",
            "Mean absolute error; the bands hold the middle 80 % of the frames.",
        ),
        (
            "Expected errors",
            "reliability",
            "Left: frames ordered by the error they expect, in bins of equal size.",
        ),
    ):
        if name in pictures:
            body = f'{plot(pictures[name])}<p class="meta">{html.escape(caption)}</p>'
            sections.append(section(title, body))
        elif name == "reliability":
            none = '<p class="none">The model does not say what error it expects.</p>'
            sections.append(section(title, none))
    sections += [
        section("Worst frames", _worst(found, stacks)),
        section("Fields", _fields(document["fields"])),
    ]
    text = html.escape(json.dumps(document, indent=1, ensure_ascii=False))
    sections.append(
        f"<h2>Figures</h2><details><summary>show as JSON</summary><pre>{text}</pre></details>"
    )
    return page(f"{found.about.get('model', 'model')}: evaluation", "".join(sections))


def _head(found: Evaluation) -> str:
    about = found.about
    dof = "not known" if found.dof_um is None else f"{found.dof_um:.2f} µm"
    facts = [
        f"{about.get('dataset', '')} ({about.get('part', 'all')})",
        f"{found.stacks} stacks, {len(found.model.rows)} frames",
        f"depth of field {dof}",
        f"compared with the {found.truth}'s focus",
    ]
    notes = "".join(f'<p class="warn">{html.escape(n)}</p>' for n in found.notes)
    rows = table_of(found)
    said = "".join(f"<p>{html.escape(s)}</p>" for s in sentences(found.to_json()))
    remarks = "".join(
        f'<p class="meta">{html.escape(name)}: {html.escape(judged.note)}.</p>'
        for name, judged in found.baselines.items()
        if judged.note
    )
    return (
        f"<h1>{html.escape(str(about.get('model', 'model')))}</h1>"
        f'<div class="meta">{html.escape(" · ".join(facts))}</div>{notes}'
        f"{section('Figures of merit', table(HEADS, rows, text=2) + said + remarks)}"
    )


def _worst(found: Evaluation, stacks: Sequence[Planes]) -> str:
    figures = []
    for row in merit.worst(found.model.rows):
        try:
            pictures = _pictures(stacks[row.stack], row) if row.stack < len(stacks) else ""
        except InputError:  # the file went away meanwhile: figures without pictures
            pictures = ""
        expected = row.expected_error_um
        words = [
            f"{row.field}, plane {row.plane}: {row.predicted_um:+.2f} µm instead of "
            f"{row.true_um:+.2f} µm",
            "" if expected is None else f"(expected ± {expected:.2f})",
            *(row.reasons or ("no reason to distrust it",)),
        ]
        caption = html.escape(" · ".join(w for w in words if w))
        figures.append(f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>")
    if not figures:
        return '<p class="none">No predictions.</p>'
    note = (
        '<p class="meta">The frame as the model saw it, and the same place in the sharpest '
        "plane. At most two frames of a field.</p>"
    )
    return f'{note}<div class="tiles">{"".join(figures)}</div>'


def _pictures(stack: Planes, row: merit.Row) -> str:
    """The frame, and the same place in focus, as HTML."""
    sharpest = int(np.abs(np.asarray(stack.defocus_um)).argmin())
    sharp, frame = stack.plane(sharpest), stack.plane(row.plane)
    at = detail_at(sharp)
    return "".join(
        f'<img alt="{name}" title="{name}" src="data:image/png;base64,'
        f'{thumbnail_png(image, at)}">'
        for name, image in (("as seen", frame), ("in focus", sharp))
    )


def _fields(fields: Sequence[Mapping[str, Any]]) -> str:
    heads = (
        "field",
        "class",
        "frames",
        "not predicted",
        "MAE, µm",
        "bias",
        "largest",
        "≤ DoF",
        "direction",
    )
    rows = [
        [
            str(f["field"]),
            str(f["sparsity"]),
            str(f["n"]),
            str(f["n"] - f["n_predicted"]),
            number(f["mae_um"]),
            "–" if f["bias_um"] is None else f"{f['bias_um']:+.2f}",
            number(f["largest_um"]),
            share(f["dof_accuracy"]["1"]),
            share(f["direction_success"]),
        ]
        for f in sorted(fields, key=lambda f: -(f["mae_um"] or 0.0))
    ]
    return '<p class="meta">The largest mean error first.</p>' + table(heads, rows, text=2)
