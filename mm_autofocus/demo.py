"""``mm-autofocus demo``: the whole way on the virtual slide, without hardware.

Beside `collecting`, the only module outside of `sim` that imports it. The truth is asked
for after the run is over, to judge it.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_autofocus.console import COLUMNS, make_console, print_tiles, progress_bar
from mm_autofocus.demo_two_shot import COLUMNS as TWO_SHOT_COLUMNS
from mm_autofocus.demo_two_shot import need_model, recover
from mm_autofocus.errors import InputError
from mm_autofocus.predictions import cells, columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm_autofocus.api import RunResult
    from mm_autofocus.demo_two_shot import Recovered
    from mm_autofocus.sim.microscope import Exposure, Microscope

__all__ = ["Tile", "demo_plan", "run_demo"]

# Six by five fields, 500 µm apart, where the tissue of slide 1 ends: dense, sparse and
# extremely sparse fields, and blank glass, over 1.5 … 3 µm of tilt and waves.
_COLUMNS_UM = (-1500.0, -1000.0, -500.0, 0.0, 500.0, 1000.0)
_ROWS_UM = (-1000.0, -1500.0, -2000.0, -2500.0, -3000.0)
# For two shots neighbouring fields at the same edge of the tissue, as one scans: focus changes
# by 1 µm over them.
_SCAN_COLUMNS_UM = (-394.0, -236.0, -78.0, 80.0, 238.0, 396.0)
_SCAN_ROWS_UM = (-1906.0, -2064.0, -2222.0, -2380.0, -2538.0)
_START_UM = 9.0
"""Where the operator left the focus stage: well out of focus."""

# What a slide is taken to be when its duration is told.
_SLIDE_MM = 15.0

_DEMO_COLUMNS = (
    COLUMNS[0],
    ("kind", "kind"),
    *COLUMNS[1:],
    ("true d", "true_defocus_um"),
)


@dataclass(frozen=True, slots=True)
class Tile:
    """What the simulator knows of one saved tile.

    Attributes
    ----------
    kind : str
        ``dense``, ``sparse``, ``extremely-sparse`` or ``blank``.
    true_defocus_um : float | None
        Defocus of the saved frame by the focus measure on noiseless images, in µm,
        positive above focus; None on a blank field.
    focus_um : float | None
        What the stage would have had to read to be in focus, in µm.
    dof_um : float
        Depth of field.
    """

    kind: str
    true_defocus_um: float | None
    focus_um: float | None
    dof_um: float


_MODELS = {"one-shot": "sparsefocus-slide20x", "two-look": "sparsefocus-slide20x-two-look"}
"""Models that ship for the virtual slide, by the strategy that they are for."""


def demo_plan(strategy: str | None = None) -> dict[str, Any]:
    """Return the plan of the demo: thirty tiles in a snake, each focused, one frame each.

    Of the strategy ``two-shot``: thirty neighbouring tiles, the first one focused, two frames
    each.
    """
    scan = strategy == "two-shot"
    xs, ys = (_SCAN_COLUMNS_UM, _SCAN_ROWS_UM) if scan else (_COLUMNS_UM, _ROWS_UM)
    tiles = []
    for row, y in enumerate(ys):
        columns = list(enumerate(xs))
        for column, x in columns if row % 2 == 0 else reversed(columns):
            tiles.append({"x": x, "y": y, "name": f"r{row + 1}c{column + 1}"})
    settings = {
        "strategy": "hill-climb",
        "range_um": 15.0,
        "z_min_um": -40.0,
        "z_max_um": 40.0,
        # each tile begins where the surface through the tiles before expects it
        "prior": "surface",
        "backlash_um": 1.0,
        "repeatability_um": 0.15,
        "na": 0.75,
        "magnification": 20.0,
    }
    if scan:
        del settings["prior"]  # one F for all of them
    return {
        "stage_positions": tiles,
        "channels": [{"config": "Brightfield", "exposure": 5.0}],
        "autofocus_plan": {"axes": ("p",)},
        "metadata": {"mm_autofocus": settings},
    }


def run_demo(
    output: Path,
    strategy: str | None,
    overrides: Mapping[str, Any],
    *,
    as_json: bool,
    real_time: bool = False,
    refocus_model: str | None = None,
) -> int:
    """Run the demo; return the exit code.

    Parameters
    ----------
    output : path
        Folder for ``demo.ome.tiff`` and ``report.html``; made if it is not there. Files
        of an earlier demo are replaced.
    strategy : str | None
        Replaces the hill-climb.
    overrides : mapping
        Replace single settings.
    as_json : bool
        Print one JSON document on stdout and nothing else there.
    real_time : bool
        Let stage and camera take the time that real ones would.
    refocus_model : str, optional
        With two shots: the model that recovers, instead of the one that ships.
    """
    from mm_autofocus.config import close_core, open_core
    from mm_autofocus.plan import load_plan, settings_of
    from mm_autofocus.report import write_report
    from mm_autofocus.shown import run_shown
    from mm_autofocus.sim.truth import microscope_of

    own = {} if "model" in overrides else _own_model(strategy)
    plan = demo_plan(strategy)
    sequence = load_plan(plan, strategy=strategy, overrides={**own, **overrides})
    asked = settings_of(sequence)
    two_shot = asked is not None and asked.strategy == "two-shot"
    if refocus_model is not None and not two_shot:
        raise InputError("--refocus-model: needs --strategy two-shot")
    recovers = need_model(refocus_model) if two_shot else None
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{output}: cannot be made ({e.strerror})") from None
    file, report = output / "demo.ome.tiff", output / "report.html"
    core = open_core("virtual_slide.cfg")
    try:
        if real_time:
            core.setProperty("Slide", "time", "real")
        core.setZPosition(_START_UM)
        scope = microscope_of(core)
        saved: dict[int, tuple[Exposure, float]] = {}

        def keep(_: Any, event: Any, meta: Any) -> None:
            # of several exposures of one frame, the one that was kept
            proof = meta["mm_autofocus"]["details"].get("verification", {})
            dropped = len(proof.get("frames", [0])) - 1 - proof.get("kept", 0)
            saved[event.index["p"]] = scope.exposures[-1 - dropped], meta["position"]["z"]

        core.mda.events.frameReady.connect(keep)
        began_s = scope.clock.now_s
        result = run_shown(sequence, core, file, as_json=as_json, overwrite=True)
        took_s = scope.clock.now_s - began_s
        tiles = _judge(scope, saved, quiet=as_json)
        rows = [_row(r, tiles.get(r["index"]["p"])) for r in result.records]
        recovered = None
        if recovers is not None:
            taken = {p: exposure for p, (exposure, _) in saved.items()}
            fused = output / "recovered.ome.tiff"
            recovered = recover(scope, file, fused, recovers, taken, rows, quiet=as_json)
    finally:
        close_core(core)
    write_report(
        file,
        report,
        overwrite=True,
        truth={r["position"]: r for r in rows if r["focus_um"] is not None},
        more=[] if recovered is None else [("Raw, recovered, true", recovered.strips)],
    )
    if recovered is not None:
        _tell_recovered(result, recovered, took_s, report, as_json=as_json, real_time=real_time)
    else:
        _tell_focused(result, rows, took_s, report, as_json=as_json, real_time=real_time)
    return result.exit_code


def _tell_focused(
    result: RunResult,
    rows: list[dict[str, Any]],
    took_s: float,
    report: Path,
    *,
    as_json: bool,
    real_time: bool,
) -> None:
    """Say what came of a focus for each tile."""
    verdict = _verdict(rows)
    if not as_json:
        _tell(rows, verdict, took_s, report, real_time=real_time)
        return
    document = result.to_json()
    for entry, row in zip(document["autofocus"], rows, strict=True):
        entry |= {k: row[k] for k in ("kind", "true_defocus_um", "dof_um")}
    document |= {"report": str(report), "stage_time_s": took_s, **verdict}
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _tell_recovered(
    result: RunResult,
    recovered: Recovered,
    took_s: float,
    report: Path,
    *,
    as_json: bool,
    real_time: bool,
) -> None:
    """Say what came of two shots."""
    if as_json:
        document = result.to_json()
        keys = ("kind", "true_offset_um", "told_offset_um", "psnr_db", "psnr_identity_db")
        by_place = {r["index"]["p"]: r for r in recovered.rows}
        for entry in document["autofocus"]:
            row = by_place[entry["index"]["p"]]
            entry |= {k: row.get(k) for k in (*keys, "ssim", "dof_um")}
        document |= {
            "report": str(report),
            "stage_time_s": took_s,
            "refocus": {**recovered.refocused.to_json(), **recovered.verdict()},
        }
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return
    console = make_console()
    print_tiles(recovered.rows, console, TWO_SHOT_COLUMNS)
    for line in (*recovered.sentences(), _pace(took_s, len(recovered.rows), real_time)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _own_model(strategy: str | None) -> dict[str, Any]:
    """The setting that gives a learned strategy the model that ships for this slide."""
    if strategy not in _MODELS:
        return {}
    from mm_autofocus.models.importing import shipped_models

    name = _MODELS[strategy]
    if name not in shipped_models():
        raise InputError(
            f"--strategy {strategy}: the model {name!r} of the virtual slide is not installed; "
            "name another with --set model=FILE.onnx"
        )
    return {"model": name}


def _judge(
    scope: Microscope, saved: Mapping[int, tuple[Exposure, float]], *, quiet: bool
) -> dict[int, Tile]:
    """Ask the simulator for the truth about each saved frame; in two threads."""
    from mm_autofocus.sim.truth import defocus_um

    def judge(item: tuple[int, tuple[Exposure, float]]) -> tuple[int, Tile]:
        p, (exposure, reading_um) = item
        view = exposure.view
        size = (view.shape[1] * view.pitch_um, view.shape[0] * view.pitch_um)
        kind = scope.slide.sparsity(view.x_um, view.y_um, size)
        defocus = defocus_um(scope, exposure)
        focus = None if defocus is None else reading_um - defocus
        return p, Tile(kind, defocus, focus, view.dof_um)

    tiles: dict[int, Tile] = {}
    with (
        ThreadPoolExecutor(2) as pool,
        progress_bar("asking the simulator", len(saved), quiet=quiet) as done,
    ):
        for p, tile in pool.map(judge, saved.items()):
            tiles[p] = tile
            done(len(tiles))
    return tiles


def _row(record: dict[str, Any], tile: Tile | None) -> dict[str, Any]:
    return {
        **record,
        **cells(record),
        "kind": tile.kind if tile else None,
        "true_defocus_um": tile.true_defocus_um if tile else None,
        "focus_um": tile.focus_um if tile else None,
        "dof_um": tile.dof_um if tile else None,
    }


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Count what the marks of the demo count."""
    tissue = [r for r in rows if r["true_defocus_um"] is not None]
    blank = [r for r in rows if r["kind"] == "blank"]

    def within(part: float) -> int:
        return sum(abs(r["true_defocus_um"]) <= part * r["dof_um"] for r in tissue)

    return {
        "non_blank": len(tissue),
        "within_dof": within(1.0),
        "within_half_dof": within(0.5),
        "blank": len(blank),
        "blank_reported": sum(r["status"] == "failed" for r in blank),
        "false_ok": sum(r["status"] == "ok" for r in blank)
        + sum(r["status"] == "ok" and abs(r["true_defocus_um"]) > r["dof_um"] for r in tissue),
        "looks_per_tile": sum(r["looks"] for r in rows) / max(len(rows), 1),
        "corrections": sum(r.get("corrections", 0) for r in rows),
    }


def _tell(
    rows: list[dict[str, Any]],
    verdict: dict[str, Any],
    took_s: float,
    report: Path,
    *,
    real_time: bool,
) -> None:
    console = make_console()
    print_tiles(rows, console, [*_DEMO_COLUMNS, *columns(rows)])
    for line in (
        f"simulated: {verdict['within_half_dof']} of {verdict['non_blank']} tiles with "
        f"specimen within half a depth of field of the truth, {verdict['within_dof']} within "
        "one",
        f"simulated: {verdict['blank_reported']} of {verdict['blank']} blank tiles reported as "
        f"not focused, {verdict['false_ok']} false ok",
        _pace(took_s, len(rows), real_time),
        f"report: {report}",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _pace(took_s: float, tiles: int, real_time: bool) -> str:
    """How long a whole slide would take at this pace."""
    tiles_per_slide = (_SLIDE_MM * 1000 / (512 * 0.325)) ** 2
    each_s = took_s / max(tiles, 1)
    minutes = tiles_per_slide * each_s / 60
    what = (
        "in real time, the rendering by this computer included,"
        if real_time
        else "stage and camera would take"
    )
    return (
        f"{what} {each_s:.2f} s a tile: {minutes:.0f} minutes for "
        f"{_SLIDE_MM:g} × {_SLIDE_MM:g} mm at 20×"
    )
