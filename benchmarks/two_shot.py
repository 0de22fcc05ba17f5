"""Two-shot scanning on the virtual slide (SIMULATED).

Part ``tiles``: how many tiles a minute, in real time. Stages travel, settle and camera exposes
for as long as real ones would; what the program computes and writes counts, only the rendering
of the virtual frames by this computer is taken out. The same tiles are scanned in turn by

- a z-stack of 21 planes at each tile, the sharpest plane to be chosen afterwards,
- a hill-climb at each tile,
- one look and the shipped model at each tile,
- two shots at each tile, F found once by hill-climb.

    python benchmarks/two_shot.py --part tiles [--rounds N] [--side N] [--quick] [--write]
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_autofocus import run
from mm_autofocus.config import close_core, open_core
from mm_autofocus.sim.truth import microscope_of

from _results import write_section

RANGE_UM, PLANES = 20.0, 21
START_OFF_UM = 3.0
COMMON = {"z_min_um": -60.0, "z_max_um": 60.0, "range_um": 15.0, "na": 0.75}
WAYS: dict[str, dict[str, Any]] = {
    f"z-stack of {PLANES} planes": {},
    "`hill-climb` at each tile": COMMON | {"strategy": "hill-climb", "prior": "surface"},
    "`one-shot`, `sparsefocus-slide20x`": COMMON
    | {
        "strategy": "one-shot",
        "model": "sparsefocus-slide20x",
        "prior": "surface",
        "magnification": 20.0,
    },
    "`two-shot`": COMMON | {"strategy": "two-shot", "delta_um": 1.5},
}


@dataclass(slots=True)
class Way:
    """What was measured of one way of scanning, a value per round."""

    tiles_a_minute: list[float] = field(default_factory=list)
    exposures: list[float] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)


def plan_of(settings: dict[str, Any], corner: tuple[float, float], z: float, side: int) -> Any:
    """A snake of ``side × side`` neighbouring tiles."""
    plan: dict[str, Any] = {
        "stage_positions": [{"x": corner[0], "y": corner[1], "z": z, "name": "slide"}],
        "grid_plan": {"rows": side, "columns": side, "mode": "row_wise_snake"},
        "channels": [{"config": "Brightfield", "exposure": 5.0}],
    }
    if not settings:
        return plan | {"z_plan": {"range": RANGE_UM, "step": RANGE_UM / (PLANES - 1)}}
    return plan | {
        "autofocus_plan": {"axes": ["p", "g"]},
        "metadata": {"mm_autofocus": settings},
    }


def without_rendering(scope: Any) -> list[float]:
    """Let the microscope tell how long each exposure took beyond its exposure time, in s."""
    spent: list[float] = []
    expose = scope.expose

    def timed() -> Any:
        start = time.perf_counter()
        image = expose()
        spent.append(time.perf_counter() - start - scope.exposure_ms / 1000)
        return image

    scope.expose = timed
    return spent


def scan(way: Way, settings: dict[str, Any], corner: tuple[float, float], side: int) -> None:
    """Scan the tiles at a corner once, and keep what it took."""
    core = open_core("virtual_slide.cfg")
    try:
        core.setProperty("Optics", "quality", "preview")
        scope = microscope_of(core)
        z = scope.slide.height_at(*corner) + START_OFF_UM
        core.setXYPosition(*corner)
        core.setZPosition(z)
        core.waitForSystem()
        core.setProperty("Slide", "time", "real")
        plan = plan_of(settings, corner, z, side)
        began: list[float] = []
        core.mda.events.sequenceStarted.connect(lambda *_: began.append(time.perf_counter()))
        ended: list[float] = []
        core.mda.events.frameReady.connect(lambda *_: ended.append(time.perf_counter()))
        spent, moves = without_rendering(scope), scope.z._moves
        with tempfile.TemporaryDirectory() as folder:
            run(plan, core=core, output=Path(folder) / "tiles.ome.tiff")
        moves = scope.z._moves - moves - 1  # the engine puts the stage back at the end
        tiles = side * side
        way.tiles_a_minute.append(60 * tiles / (ended[-1] - began[0] - sum(spent)))
        way.exposures.append(len(spent) / tiles)
        way.moves.append(moves / tiles)
    finally:
        close_core(core)


def tiles(args: argparse.Namespace) -> None:
    """Measure the tiles a minute."""
    core = open_core("virtual_slide.cfg")
    scope = microscope_of(core)
    span = args.side * 166.4
    corners = list(scope.slide.find_fields("dense", args.rounds, (span, span)))
    stage, xy = scope.z, scope.x
    close_core(core)
    ways = {name: Way() for name in WAYS}
    for k, corner in enumerate(corners):
        names = list(WAYS)
        for name in [*names[k % len(names) :], *names[: k % len(names)]]:
            scan(ways[name], WAYS[name], corner, args.side)
            print(f"round {k + 1}: {name}: {ways[name].tiles_a_minute[-1]:.0f}", flush=True)
    two = ways["`two-shot`"].tiles_a_minute
    rows = [
        "| way | tiles a minute, median | least … most | exposures a tile | z moves a tile "
        "| `two-shot` is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for name, way in ways.items():
        n = way.tiles_a_minute
        ratio = statistics.median(b / a for a, b in zip(n, two, strict=True))
        rows.append(
            f"| {name} | {statistics.median(n):.0f} | {min(n):.0f} … {max(n):.0f} "
            f"| {statistics.mean(way.exposures):.2f} | {statistics.mean(way.moves):.2f} "
            f"| {ratio:.1f} × |"
        )
    text = (
        f"SIMULATED: the virtual slide in real time, {len(corners)} places of {args.side} × "
        f"{args.side} neighbouring tiles in a snake, 512² RGB at 20×/0.75, 5 ms exposure, "
        f"saved as OME-TIFF. Focus stage {stage.speed_um_s:g} µm/s and "
        f"{stage.settle_s * 1e3:g} ms to settle, XY stage {xy.speed_um_s:g} µm/s and "
        f"{xy.settle_s * 1e3:g} ms. The stage begins {START_OFF_UM:g} µm above focus. All ways "
        "take turns at each place; what the program computes and writes counts, the rendering "
        "of the virtual frames is taken out.\n"
        "`python benchmarks/two_shot.py --part tiles --write`\n\n" + "\n".join(rows)
    )
    print(text)
    if args.write:
        write_section("two-shot-tiles", "Two shots: tiles a minute (SIMULATED)", text)


def main() -> None:
    """Run one part and print, or write, its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["tiles"], default="tiles")
    parser.add_argument("--rounds", type=int, default=7, help="places")
    parser.add_argument("--side", type=int, default=5, help="tiles in a row")
    parser.add_argument("--quick", action="store_true", help="2 places of 3 × 3 tiles")
    parser.add_argument("--write", action="store_true", help="replace the section")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.side = 2, 3
    logging.getLogger("pymmcore-plus").setLevel(logging.ERROR)
    logging.getLogger("mm_autofocus").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    tiles(args)


if __name__ == "__main__":
    main()
