"""The report of recovered images: the table, PSNR against the distance, examples."""

from __future__ import annotations

import html
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mm_autofocus.hooks.thumbnail import detail_at, thumbnail_png
from mm_autofocus.page import page, plot, png, section, table
from mm_autofocus.training.evaluation_plots import tidy
from mm_autofocus.training.refocus_baselines import SHARPER
from mm_autofocus.training.refocus_evaluate import figures
from mm_autofocus.training.refocus_table import (
    NAMES,
    name_of,
    refocus_heads,
    refocus_sentences,
    refocus_table,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mm_autofocus.training.refocus_cases import Case
    from mm_autofocus.training.refocus_evaluate import PairRow, RefocusEvaluation
    from mm_autofocus.types import Image

__all__ = ["Examples", "psnr_plot", "refocus_page", "refocus_plots"]

_DPI = 130
_WORST = 4
_COLOURS = ("#1b6ca8", "#b3261e", "#2a7f4f", "#7a4fa3")
_STYLES = {
    SHARPER: (0, ()),
    "mean": (0, (1, 1.5)),
    "wiener": (0, (4, 2)),
    "wavelet": (0, (8, 2)),
    "laplacian": (0, (4, 1, 1, 1)),
}


@dataclass
class Examples:
    """Keeps small pictures of some pairs while they are judged (`watch`).

    One pair of each half distance, drawn by lot, and those that gained least.

    Attributes
    ----------
    name : str
        Of the model.
    others : tuple of str
        Further models to show.
    """

    name: str
    others: tuple[str, ...] = ()
    _drawn: dict[float, tuple[int, str]] = field(default_factory=dict)
    _worst: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, case: Case, images: Mapping[str, Image], row: PairRow) -> None:
        """Look at a pair."""
        lot = zlib.crc32(f"{case.field} {case.asked_um:g} {case.middle_um:.3f}".encode())
        gained = row.psnr_db[self.name] - row.psnr_db[SHARPER]
        draws = case.asked_um not in self._drawn or lot < self._drawn[case.asked_um][0]
        bad = len(self._worst) < _WORST or gained < self._worst[-1][0]
        if not (draws or bad):
            return
        strip = self._strip(case, images, row)
        if draws:
            self._drawn[case.asked_um] = (lot, strip)
        if bad:
            self._worst = sorted([*self._worst, (gained, strip)])[:_WORST]

    def drawn(self) -> list[str]:
        """Strips by half distance, HTML."""
        return [self._drawn[half][1] for half in sorted(self._drawn)]

    def worst(self) -> list[str]:
        """Strips of those that gained least, HTML."""
        return [strip for _, strip in self._worst]

    def _strip(self, case: Case, images: Mapping[str, Image], row: PairRow) -> str:
        at = detail_at(case.truth)
        shown = [
            (f"sharper shot, {row.psnr_db[SHARPER]:.1f} dB", images[SHARPER]),
            (f"{self.name}, {row.psnr_db[self.name]:.1f} dB", images[self.name]),
            ("truth", case.truth),
            *((f"{o}, {row.psnr_db[o]:.1f} dB", images[o]) for o in self.others),
        ]
        pictures = "".join(
            f'<img alt="{html.escape(what)}" title="{html.escape(what)}" '
            f'src="data:image/png;base64,{thumbnail_png(image, at)}">'
            for what, image in shown
        )
        words = [
            f"{case.field}: shots at {case.lower_um:+.2f} and {case.upper_um:+.2f} µm",
            " | ".join(what for what, _ in shown),
            *row.reasons,
        ]
        caption = html.escape(" · ".join(words))
        return f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>"


def psnr_plot(found: RefocusEvaluation) -> Figure:
    """Draw the PSNR against the half distance, method by method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    ax = figure.subplots()
    halves = found.halves_um
    models = [m for m in found.methods if m not in NAMES]
    for method in found.methods:
        mean = [figures(found.at(h), method)["psnr_db"] for h in halves]
        if method in models:
            colour = _COLOURS[models.index(method) % len(_COLOURS)]
            ax.plot(halves, mean, "o-", color=colour, ms=4, lw=1.7, label=method)
        else:
            style = _STYLES[method]
            ax.plot(halves, mean, ".", color="#6e6e73", lw=1.1, ls=style, label=name_of(method))
    ax.set_xlabel("shots below and above their middle by, µm", fontsize=8.5)
    ax.set_ylabel("PSNR, dB (mean)", fontsize=8.5)
    ax.set_xticks(halves)
    tidy(ax)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def refocus_plots(found: RefocusEvaluation) -> dict[str, bytes]:
    """Draw the plots: name → PNG."""
    return {"psnr": png(psnr_plot(found), _DPI)}


def refocus_page(
    found: RefocusEvaluation, pictures: Mapping[str, bytes], examples: Examples
) -> str:
    """Return the report as HTML; self-contained, without scripts.

    Parameters
    ----------
    found : RefocusEvaluation
        What was found.
    pictures : mapping
        From `refocus_plots`.
    examples : Examples
        Which watched.
    """
    document = found.to_json()
    about = found.about
    facts = [
        f"{about.get('dataset', '')} ({about.get('part', 'all')})",
        f"{document['fields']} fields, {document['pairs']} pairs of shots",
    ]
    notes = "".join(f'<p class="warn">{html.escape(n)}</p>' for n in found.notes)
    said = "".join(f"<p>{html.escape(s)}</p>" for s in refocus_sentences(document, found.name))
    text = html.escape(json.dumps(document, indent=1, ensure_ascii=False))
    body = [
        f"<h1>{html.escape(found.name)}</h1>"
        f'<div class="meta">{html.escape(" · ".join(facts))}</div>{notes}',
        section("Recovered images", table(refocus_heads(found), refocus_table(found)) + said),
        section("Against the distance of the shots", plot(pictures["psnr"])),
        section("Examples, one of each distance, drawn by lot", _tiles(examples.drawn())),
        section("Pairs that gained least", _tiles(examples.worst())),
        f"<h2>Figures</h2><details><summary>show as JSON</summary><pre>{text}</pre></details>",
    ]
    return page(f"{found.name}: evaluation", "".join(body))


def _tiles(strips: list[str]) -> str:
    return "".join(f'<div style="margin-bottom: 1rem">{strip}</div>' for strip in strips)
