"""What a file says of its autofocus: on the console, as JSON, and as an HTML report.

Everything is read from the file; no core, no plan and no log is needed.
"""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_autofocus.console import number, tile_table
from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.hooks.thumbnail import detail_at, thumbnail_png
from mm_autofocus.ometiff import FileRecord, FocusRecord, read_plane, read_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["inspect_json", "print_record", "to_distrust", "write_report"]

_COLOURS = {
    "ok": "#2a7f4f",
    "low-confidence": "#c98500",
    "stale": "#c98500",
    "failed": "#b3261e",
}
# Pictures and curves of more tiles than this make a page that no browser likes.
_MOST_PICTURES = 30


def to_distrust(record: FileRecord) -> list[FocusRecord]:
    """Return the searches that were not ``ok``, the worst first."""
    order = {"failed": 0, "stale": 1, "low-confidence": 2}
    doubtful = [f for f in record.focus if f.status != "ok"]
    return sorted(doubtful, key=lambda f: order.get(f.status, 0))


def inspect_json(record: FileRecord) -> dict[str, Any]:
    """Return the document that ``mm-autofocus inspect --json`` prints."""
    return {
        "file": str(record.path),
        "complete": record.complete,
        "repaired": record.repaired,
        "error": record.error,
        "created": record.created,
        "frames": record.frames,
        "frames_planned": record.frames_planned,
        "frames_missing": record.frames_missing,
        "positions": [
            {
                "name": image.name,
                "index": image.index,
                "shape": list(image.shape),
                "dtype": image.dtype,
                "channels": list(image.channels),
                "pixel_size_um": image.pixel_size_um,
                "frames": image.frames,
                "gaps": image.gaps,
            }
            for image in record.images
        ],
        "autofocus": [
            {**{k: v for k, v in asdict(focus).items() if k not in {"thumbnail", "record"}}}
            for focus in record.focus
        ],
        "settings": record.settings,
        "plan": record.plan,
        "versions": record.versions,
    }


def print_record(record: FileRecord, console: Console) -> None:
    """Print the record of a file as an operator reads it."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(f"{record.path}  ({record.created})")
    planned = record.frames_planned
    of_planned = f" of {planned} planned" if planned is not None else ""
    line(f"{record.frames} frames{of_planned}, {len(record.images)} positions or tiles")
    if not record.complete:
        line("INCOMPLETE: the run was killed or still goes on; mend it with inspect --repair")
    elif record.repaired:
        line("repaired after its run was killed")
    if record.error:
        line(f"ended by a fault: {record.error}")
    gaps: dict[str, int] = {}
    for image in record.images:
        for reason, count in image.gaps.items():
            gaps[reason] = gaps.get(reason, 0) + count
    if gaps:
        line("no data in " + ", ".join(f"{n} planes ({why})" for why, n in gaps.items()))
    if not record.focus:
        line("no autofocus was done in this run")
        return
    doubtful = len(to_distrust(record))
    line(f"{len(record.focus)} searches, {doubtful} to distrust")
    console.print(tile_table(_row(focus) for focus in record.focus))


def write_report(
    file: Path,
    output: Path,
    *,
    overwrite: bool = False,
    truth: dict[str, dict[str, Any]] | None = None,
) -> None:
    """Write an HTML report on one file; self-contained, without scripts.

    Parameters
    ----------
    file : path
        An OME-TIFF with an autofocus record.
    output : path
        ``*.html``.
    overwrite : bool, optional
        Whether an existing report may be replaced.
    truth : dict, optional
        Name of the position → what is known of it beside the record (demo only): keys
        ``focus_um`` and anything printable.

    Raises
    ------
    InputError
        No such file, no record in it, or the output cannot be written.
    """
    if output.suffix.lower() not in {".html", ".htm"}:
        raise InputError(f"{output}: a report is a .html file")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; use --overwrite or another name")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    record = read_record(file)
    page = _page(record, truth or {})
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as e:
        raise HardwareError(f"{output}: cannot be written ({e.strerror})") from e


# -------------------------------------------------------------------------- page

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 1080px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.meta, figcaption, .none { color: #6e6e73 } .warn { color: #b3261e; font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e5e5ea; text-align: right }
th:first-child, td:first-child, td.text, th.text { text-align: left }
td { white-space: nowrap } td:last-child { white-space: normal }
.tiles { display: grid; gap: 1rem;
         grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)) }
figure { margin: 0 } img.plot { max-width: 100% }
figure img { image-rendering: pixelated; width: 140px; height: 140px; object-fit: cover;
             border-radius: 4px; margin-right: 6px }
pre { background: #f5f5f7; padding: .8rem; overflow-x: auto; border-radius: 6px;
      font-size: 12px }
.badge { border-radius: 9px; padding: 0 .55rem; color: white; font-size: .85em;
         white-space: nowrap }
"""


def _page(record: FileRecord, truth: dict[str, dict[str, Any]]) -> str:
    doubtful = to_distrust(record)
    sections = [
        _head(record),
        _section(
            "Tiles to distrust",
            _table(doubtful, truth) if doubtful else '<p class="none">None.</p>',
        ),
    ]
    if record.focus:
        sections += [
            _section("Focus map", _plot(_focus_map(record.focus, truth))),
            _section("Before and after", _pictures(record, doubtful)),
            _section("Focus curves", _plot(_curves(_chosen(record, doubtful)))),
            _section("All searches", _table(record.focus, truth)),
        ]
    for title, content in (
        ("Settings", record.settings),
        ("Plan", record.plan),
        ("Versions", record.versions),
    ):
        text = html.escape(json.dumps(content, indent=1, ensure_ascii=False, default=str))
        sections.append(
            f"<h2>{title}</h2><details><summary>show</summary><pre>{text}</pre></details>"
        )
    title = html.escape(record.path.name)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _head(record: FileRecord) -> str:
    ok = sum(f.status == "ok" for f in record.focus)
    looks = [f.looks for f in record.focus]
    facts = [f"{record.frames} frames", f"{len(record.images)} positions or tiles"]
    if looks:
        facts += [
            f"{ok} of {len(looks)} searches ok",
            f"{sum(looks) / len(looks):.1f} looks each",
        ]
    warnings = []
    if not record.complete:
        warnings.append("The file is incomplete: its run was killed or still goes on.")
    if record.error:
        warnings.append(f"The run was ended by a fault: {record.error}")
    if record.frames_missing:
        warnings.append(f"{record.frames_missing} planned frames are not there.")
    return (
        f"<h1>{html.escape(record.path.name)}</h1>"
        f'<div class="meta">{html.escape(record.created)} · {" · ".join(facts)}</div>'
        + "".join(f'<p class="warn">{html.escape(w)}</p>' for w in warnings)
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>{body}"


def _row(focus: FocusRecord) -> dict[str, Any]:
    row = {k: v for k, v in asdict(focus).items() if k not in {"thumbnail", "record", "frames"}}
    if "t" in focus.index:
        row["position"] = f"{focus.position} t{focus.index['t']}"
    return row


def _table(focuses: Sequence[FocusRecord], truth: dict[str, dict[str, Any]]) -> str:
    heads = ["tile", "x µm", "y µm", "z before", "z after", "± µm", "looks", "moves"]
    heads += ["true z"] if truth else []
    rows = []
    for f in focuses:
        row = _row(f)
        cells = [
            f.x_um,
            f.y_um,
            f.z_before_um,
            f.z_after_um,
            f.expected_error_um,
            f.looks,
            f.moves,
        ]
        if truth:
            cells.append(truth.get(f.position, {}).get("focus_um"))
        numbers = "".join(f"<td>{number(c)}</td>" for c in cells)
        badge = f'<span class="badge" style="background:{_colour(f.status)}">{f.status}</span>'
        rows.append(
            f"<tr><td>{html.escape(row['position'])}</td>{numbers}"
            f'<td class="text">{badge}</td><td class="text">{html.escape(f.strategy)}</td>'
            f'<td class="text">{html.escape(f.reason)}</td></tr>'
        )
    header = "".join(f"<th>{h}</th>" for h in heads)
    header += '<th class="text">status</th><th class="text">by</th><th class="text">why</th>'
    return f"<table><tr>{header}</tr>{''.join(rows)}</table>"


def _colour(status: str) -> str:
    return _COLOURS.get(status, "#6e6e73")


def _chosen(record: FileRecord, doubtful: list[FocusRecord]) -> list[FocusRecord]:
    """The tiles that are shown in full: those to distrust first."""
    rest = [f for f in record.focus if f.status == "ok"]
    return [*doubtful, *rest][:_MOST_PICTURES]


def _pictures(record: FileRecord, doubtful: list[FocusRecord]) -> str:
    figures = []
    for focus in _chosen(record, doubtful):
        images = []
        if focus.thumbnail:
            images.append(("before", base64.b64encode(focus.thumbnail).decode()))
        frame = next((f for f in focus.frames if _is_data(record, f)), None)
        if frame is not None:
            plane = read_plane(
                record.path, frame.image, frame.t, frame.c, frame.z, record=record
            )
            at = focus.record.get("thumbnail_xy") or detail_at(plane)
            images.append(("after", thumbnail_png(plane, (at[0], at[1]))))
        if not images:
            continue
        pictures = "".join(
            f'<img alt="{kind}" title="{kind}" src="data:image/png;base64,{png}">'
            for kind, png in images
        )
        name = html.escape(_row(focus)["position"])
        figures.append(
            f"<figure>{pictures}<figcaption>{name}: {' | '.join(k for k, _ in images)}"
            f" · {focus.status}</figcaption></figure>"
        )
    note = (
        f'<p class="meta">The first {_MOST_PICTURES} of {len(record.focus)} searches, those to '
        "distrust first.</p>"
        if len(record.focus) > _MOST_PICTURES
        else ""
    )
    body = f'<div class="tiles">{"".join(figures)}</div>' if figures else ""
    return (note + body) or '<p class="none">No pictures in the file.</p>'


def _is_data(record: FileRecord, frame: Any) -> bool:
    plane = record.images[frame.image].planes.get((frame.t, frame.c, frame.z))
    return plane is not None and plane.page is not None and not plane.gap


# ------------------------------------------------------------------------- plots


def _plot(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    png = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="plot" src="data:image/png;base64,{png}">'


def _focus_map(focuses: Sequence[FocusRecord], truth: dict[str, dict[str, Any]]) -> Figure:
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
            c=_colour("failed"),
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


def _curves(focuses: Sequence[FocusRecord]) -> Figure:
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
            ax.plot(zs, scores, "o", ms=3.5, color=_colour(focus.status))
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
        ax.set_title(_row(focus)["position"], fontsize=8)
        ax.tick_params(labelsize=6)
        ax.set_yticks([])
    for ax in axes[len(focuses) :]:
        ax.set_axis_off()
    figure.supxlabel(
        "z (µm); numbers: order of the looks; dashed: where the tile was left", fontsize=8
    )
    return figure
