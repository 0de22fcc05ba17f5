"""What a file says of its autofocus: on the console, as JSON, and as an HTML report.

Everything is read from the file; no core, no plan and no log is needed.
"""

from __future__ import annotations

import base64
import html
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_autofocus.console import COLUMNS, Column, number, print_tiles
from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.hooks.thumbnail import detail_at, thumbnail_png
from mm_autofocus.ometiff import FileRecord, FocusRecord, read_plane, read_record
from mm_autofocus.ometiff.frames import finite
from mm_autofocus.page import page, plot, section, table
from mm_autofocus.predictions import cells, columns, facts, shadow_of
from mm_autofocus.report_plots import colour, curves, focus_map, title_of, ways

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

__all__ = ["inspect_json", "print_flagged", "print_record", "to_distrust", "write_report"]

# Pictures and curves of more tiles than this make a page that no browser likes.
_MOST_PICTURES = 30


def to_distrust(record: FileRecord) -> list[FocusRecord]:
    """Return the searches that were not ``ok``, the worst first."""
    order = {"failed": 0, "stale": 1, "low-confidence": 2}
    doubtful = [f for f in record.focus if f.status != "ok"]
    return sorted(doubtful, key=lambda f: order.get(f.status, 0))


def inspect_json(record: FileRecord) -> dict[str, Any]:
    """Return the document that ``mm-autofocus inspect --json`` prints."""
    shadow = shadow_of(record)
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
        "shadow": None if shadow is None else shadow.to_json(),
        "refocus": None
        if record.derived is None
        else {**record.derived, "tiles": [asdict(r) for r in record.recoveries]},
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
    if record.derived is not None:
        line(_derivation(record))
        print_flagged(_recovered_rows(record), console)
    if not record.focus:
        line("no autofocus was done in this run")
        return
    doubtful = len(to_distrust(record))
    line(f"{len(record.focus)} searches, {doubtful} to distrust")
    rows = [_row(focus) for focus in record.focus]
    for sentence in _of_models(record):
        line(sentence)
    print_tiles(rows, console, [*COLUMNS, *columns(rows)])


_RECOVERED: tuple[Column, ...] = (
    ("tile", "position"),
    ("sharper", "sharper"),
    ("focus", "focus_um"),
    ("± µm", "focus_sd_um"),
    ("ood", "ood"),
    ("kept", "kept"),
    ("status", "status"),
)


def print_flagged(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print how many recovered tiles are not to be trusted, and a table of them."""
    flagged = [row for row in rows if row["status"] != "ok"]
    kept = sum(row["kept"] != "recovered" for row in flagged)
    raw = f", {kept} of them kept as the sharper shot" if kept else ""
    text = f"{len(flagged)} of {len(rows)} recovered tiles to distrust{raw}"
    console.print(text, highlight=False, soft_wrap=True)
    if flagged:
        named = [{**row, "reason": "; ".join(row["reasons"])} for row in flagged]
        print_tiles(named, console, _RECOVERED)


def _derivation(record: FileRecord) -> str:
    """From what a computed file comes, as a sentence."""
    told = record.derived or {}
    delta = finite(told.get("delta_um"))
    sha256 = str(told.get("model_sha256", ""))[:12]
    clauses = [f"derived from {told.get('source')} by model {told.get('model')} ({sha256})"]
    if delta is not None:
        clauses.append(f"ΔD {delta:.2f} µm")
    if told.get("raw_if_unsure"):
        clauses.append("the sharper shot is kept where the result is doubtful")
    return ", ".join(clauses)


def _recovered_rows(record: FileRecord) -> list[dict[str, Any]]:
    several = len({(r.t, r.c) for r in record.recoveries}) > 1
    return [
        asdict(r)
        | {"position": record.images[r.image].name + (f" t={r.t} c={r.c}" if several else "")}
        for r in record.recoveries
    ]


def _recovered_section(record: FileRecord) -> str:
    """The same on the page."""

    def shown(rows: Iterable[dict[str, Any]]) -> str:
        heads = [*(head for head, _ in _RECOVERED), "why"]
        return table(
            heads,
            [
                [*(number(row[key]) for _, key in _RECOVERED), "; ".join(row["reasons"])]
                for row in rows
            ],
            text=2,
        )

    rows = _recovered_rows(record)
    flagged = [row for row in rows if row["status"] != "ok"]
    said = [_derivation(record), f"{len(flagged)} of {len(rows)} recovered tiles to distrust."]
    body = _paragraphs(said)
    if flagged:
        body += shown(flagged)
    every = f"<details><summary>all tiles</summary>{shown(rows)}</details>"
    return section("Recovered from two shots", body + every)


def write_report(
    file: Path,
    output: Path,
    *,
    overwrite: bool = False,
    truth: dict[str, dict[str, Any]] | None = None,
    more: Sequence[tuple[str, str]] = (),
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
    more : sequence of (str, str), optional
        Further sections, title and HTML, before all searches.

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
    text = _page(record, truth or {}, more)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as e:
        raise HardwareError(f"{output}: cannot be written ({e.strerror})") from e


# -------------------------------------------------------------------------- page


def _page(
    record: FileRecord,
    truth: dict[str, dict[str, Any]],
    more: Sequence[tuple[str, str]] = (),
) -> str:
    doubtful = to_distrust(record)
    sections = [
        _head(record),
        section(
            "Tiles to distrust",
            _table(doubtful, truth) if doubtful else '<p class="none">None.</p>',
        ),
    ]
    if record.derived is not None:
        sections.append(_recovered_section(record))
    if told := facts([_row(focus) for focus in record.focus]):
        sections.append(section("Models", _paragraphs(told)))
    if (shadow := shadow_of(record)) is not None:
        said = _paragraphs([shadow.sentence().removeprefix("shadow: ")])
        sections.append(section("Shadow", said + plot(ways(record.focus, shadow.dof_um))))
    sections += [section(title, body) for title, body in more]
    if record.focus:
        sections += [
            section("Focus map", plot(focus_map(record.focus, truth))),
            section("Before and after", _pictures(record, doubtful)),
        ]
        chosen = [f for f in _chosen(record, doubtful) if any(s for _, s in f.curve)]
        if chosen:  # a model looks without a score
            sections.append(section("Focus curves", plot(curves(chosen))))
        sections.append(section("All searches", _table(record.focus, truth)))
    for title, content in (
        ("Settings", record.settings),
        ("Plan", record.plan),
        ("Versions", record.versions),
    ):
        text = html.escape(json.dumps(content, indent=1, ensure_ascii=False, default=str))
        sections.append(
            f"<h2>{title}</h2><details><summary>show</summary><pre>{text}</pre></details>"
        )
    return page(record.path.name, "".join(sections))


def _paragraphs(sentences: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)


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


def _row(focus: FocusRecord) -> dict[str, Any]:
    row = {k: v for k, v in asdict(focus).items() if k not in {"thumbnail", "record", "frames"}}
    return row | {"position": title_of(focus)} | cells(row)


def _of_models(record: FileRecord) -> list[str]:
    """What is to be said of models and of the shadow, a sentence each."""
    shadow = shadow_of(record)
    said = facts([_row(focus) for focus in record.focus])
    return said if shadow is None else [*said, shadow.sentence()]


def _table(focuses: Sequence[FocusRecord], truth: dict[str, dict[str, Any]]) -> str:
    heads = ["tile", "x µm", "y µm", "z before", "z after", "± µm", "looks", "moves"]
    heads += ["true z"] if truth else []
    more = columns(_row(f) for f in focuses)
    heads += [html.escape(head) for head, _ in more]
    rows = []
    for f in focuses:
        row = _row(f)
        values = [
            f.x_um,
            f.y_um,
            f.z_before_um,
            f.z_after_um,
            f.expected_error_um,
            f.looks,
            f.moves,
        ]
        if truth:
            values.append(truth.get(f.position, {}).get("focus_um"))
        values += [row[key] for _, key in more]
        numbers = "".join(f"<td>{html.escape(number(v))}</td>" for v in values)
        badge = f'<span class="badge" style="background:{colour(f.status)}">{f.status}</span>'
        rows.append(
            f"<tr><td>{html.escape(row['position'])}</td>{numbers}"
            f'<td class="text">{badge}</td><td class="text">{html.escape(f.strategy)}</td>'
            f'<td class="text">{html.escape(f.reason)}</td></tr>'
        )
    header = "".join(f"<th>{h}</th>" for h in heads)
    header += '<th class="text">status</th><th class="text">by</th><th class="text">why</th>'
    return f"<table><tr>{header}</tr>{''.join(rows)}</table>"


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
