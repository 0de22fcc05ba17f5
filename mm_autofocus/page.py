"""Pieces of an HTML report: one style, one file without scripts, plots inside."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.figure import Figure

__all__ = ["COLOURS", "page", "plot", "png", "section", "table"]

COLOURS = {
    "ok": "#2a7f4f",
    "low-confidence": "#c98500",
    "stale": "#c98500",
    "failed": "#b3261e",
}
"""Colour of a status."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 1360px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.meta, figcaption, .none { color: #6e6e73 } .warn { color: #b3261e; font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e5e5ea; text-align: right }
th:first-child, td:first-child, td.text, th.text { text-align: left }
td { white-space: nowrap } td:last-child { white-space: normal }
td.text:last-child { min-width: 19rem }
.tiles { display: grid; gap: 1rem;
         grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) }
figure { margin: 0 } img.plot { max-width: 100% }
figure img { image-rendering: pixelated; width: 140px; height: 140px; object-fit: cover;
             border-radius: 4px; margin-right: 6px }
figure.wide img { width: auto; height: auto; max-width: 100%; object-fit: contain }
pre { background: #f5f5f7; padding: .8rem; overflow-x: auto; border-radius: 6px;
      font-size: 12px }
.badge { border-radius: 9px; padding: 0 .55rem; color: white; font-size: .85em;
         white-space: nowrap }
"""


def page(title: str, body: str) -> str:
    """Return a whole document; `body` is HTML, `title` is text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    """Return a heading and the HTML below it."""
    return f"<h2>{title}</h2>{body}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """Return a table; cells are text, the first `text` columns stand on the left.

    Examples
    --------
    >>> table(["who", "n"], [["a<b", "3"]])[-55:]
    '<tr><td class="text">a&lt;b</td><td>3</td></tr></table>'
    """

    def row(cells: Sequence[str], tag: str) -> str:
        starts = [
            f'<{tag} class="text">' if i < text else f"<{tag}>" for i in range(len(cells))
        ]
        return "".join(
            f"{start}{html.escape(cell)}</{tag}>"
            for start, cell in zip(starts, cells, strict=True)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f"<table><tr>{row(heads, 'th')}</tr>{body}</table>"


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Draw a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plot(figure: Figure | bytes) -> str:
    """Return a figure, or its PNG, as HTML with the picture inside."""
    data = figure if isinstance(figure, bytes) else png(figure)
    return f'<img class="plot" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
