"""``mm-autofocus demo``: the whole way, without hardware."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["demo_plan", "run_demo"]

# Tiles of the demo begin so far out of focus, in µm: both sides, near and far.
_STARTS_UM = (-18.0, 12.0, -5.0, 7.5, -11.0, 16.0, -2.5, 9.0, -14.0)


def demo_plan() -> dict[str, Any]:
    """Return the plan of the demo: nine tiles, each begun out of focus, two channels."""
    return {
        "axis_order": "tpcz",
        "stage_positions": [
            {"x": 300.0 * (i % 3), "y": 300.0 * (i // 3), "z": z, "name": f"tile {i + 1}"}
            for i, z in enumerate(_STARTS_UM)
        ],
        "channels": [
            {"config": "FITC", "exposure": 20},
            {"config": "Rhodamine", "exposure": 20},
        ],
        "autofocus_plan": {"axes": ("p",)},
        "metadata": {
            "mm_autofocus": {
                "strategy": "hill-climb",
                "range_um": 20.0,
                "z_min_um": -50.0,
                "z_max_um": 50.0,
                # each tile is begun from its own wrong z, not from its neighbour's focus
                "prior": "none",
            }
        },
    }


def run_demo(
    output: Path, strategy: str | None, overrides: Mapping[str, Any], *, as_json: bool
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
    """
    from mm_autofocus.cli import run_shown
    from mm_autofocus.config import close_core, open_core
    from mm_autofocus.plan import load_plan
    from mm_autofocus.report import write_report

    sequence = load_plan(demo_plan(), strategy=strategy, overrides=overrides)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{output}: cannot be made ({e.strerror})") from None
    file, report = output / "demo.ome.tiff", output / "report.html"
    core = open_core("demo_camera.cfg")
    try:
        result = run_shown(sequence, core, file, as_json=as_json, overwrite=True)
    finally:
        close_core(core)
    write_report(file, report, overwrite=True)
    if as_json:
        document = {**result.to_json(), "report": str(report)}
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write(f"report: {report}\n")
    return result.exit_code
