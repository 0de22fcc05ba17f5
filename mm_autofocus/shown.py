"""A run with an operator before it: live table, progress, and a summary."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm_autofocus.api import RunResult
from mm_autofocus.api import run as run_plan
from mm_autofocus.console import COLUMNS, RunDisplay, make_console, print_tiles
from mm_autofocus.hooks.shot_plan import with_planes
from mm_autofocus.plan import fresh
from mm_autofocus.predictions import cells, columns, facts, summary

__all__ = ["quiet_host", "run_shown"]


def run_shown(
    sequence: Any,
    core: Any,
    output: Path | None,
    *,
    as_json: bool,
    debug: bool = False,
    **options: Any,
) -> RunResult:
    """Run with a display on the console.

    Parameters
    ----------
    sequence, core, output, **options
        As for `mm_autofocus.run`.
    as_json : bool
        Keep stdout free for a JSON document.
    debug : bool, optional
        Let the host's log messages through.
    """
    console = make_console(stderr=as_json)
    sequence = with_planes(sequence, core)
    total = sum(1 for e in fresh(sequence) if e.action.type == "acquire_image")
    with quiet_host(debug), RunDisplay(console, total, quiet=as_json) as display:

        def on_frame(*_: Any) -> None:
            display.frame()

        core.mda.events.frameReady.connect(on_frame)
        try:
            result = run_plan(
                sequence,
                core=core,
                output=output,
                on_engine=display.connect,
                on_refocus=display.recovered,
                **options,
            )
        finally:
            core.mda.events.frameReady.disconnect(on_frame)
    if not as_json:
        if console.is_terminal and result.records:
            rows = [{**r, **cells(r)} for r in result.records]
            print_tiles(rows, console, [*COLUMNS, *columns(rows)])
        console.print(_summary(result), highlight=False, soft_wrap=True)
    return result


def _summary(result: RunResult) -> str:
    lines = [
        f"{result.frames} frames at {result.positions} positions, "
        f"{result.exposures} exposures in all"
    ]
    if result.records:
        ok = sum(r["status"] == "ok" for r in result.records)
        lines.append(f"{ok} of {len(result.records)} searches ok, {len(result.failed)} failed")
        lines += facts(result.records)
        if (shadow := summary(result.records)) is not None:
            lines.append(shadow.sentence())
    if result.missing:
        lines.append(f"{result.missing} frames are missing: the camera gave none")
    if result.cancelled:
        lines.append("cancelled; what was taken before is in the file")
    lines += [f"data: {path}" for path in result.output]
    if result.refocus is not None and result.refocus["output"]:
        told = result.refocus
        lines.append(
            f"{told['pairs']} tiles recovered, {told['flagged']} of them to distrust: "
            f"{told['output']}"
        )
    return "\n".join(lines)


@contextmanager
def quiet_host(debug: bool = False) -> Iterator[None]:
    """Keep the host's log messages off the console; its log file has them."""
    host = logging.getLogger("pymmcore-plus")
    consoles = [h for h in host.handlers if type(h) is not logging.FileHandler]
    before = [(h, h.level) for h in consoles if not hasattr(h, "baseFilename")]
    try:
        if not debug:
            for handler, _ in before:
                handler.setLevel(logging.CRITICAL)
        yield
    finally:
        for handler, level in before:
            handler.setLevel(level)
