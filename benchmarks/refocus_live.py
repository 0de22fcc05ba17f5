"""Does recovering during a run slow the run? On the virtual slide, in turn with and without.

The time is from the start of the run to its end, as the engine reports them: what the
acquisition itself takes, without what is recovered after it. Prints a Markdown table;
``--json`` prints one JSON document.

    python benchmarks/refocus_live.py --model NAME|PATH [--json] [--repeats 5] [--write]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from mm_autofocus import run
from mm_autofocus.config import close_core, open_core, shipped

from _results import write_section


def acquire(core: Any, plan: Any, folder: Path, model: str | None) -> dict[str, float]:
    """Seconds of the run itself, and until all is recovered."""
    times: dict[str, float] = {}
    begun, ended = (
        lambda *_: times.__setitem__("begun", time.perf_counter()),
        lambda *_: times.__setitem__("ended", time.perf_counter()),
    )
    core.mda.events.sequenceStarted.connect(begun)
    core.mda.events.sequenceFinished.connect(ended)
    live = {} if model is None else {"refocus": "live", "refocus_model": model}
    try:
        run(plan, core=core, output=folder / "raw.ome.tiff", overwrite=True, **live)
    finally:
        core.mda.events.sequenceStarted.disconnect(begun)
        core.mda.events.sequenceFinished.disconnect(ended)
    return {
        "run": times["ended"] - times["begun"],
        "all": time.perf_counter() - times["begun"],
    }


def measure(model: str, rows: int, repeats: int) -> dict[str, Any]:
    plan = yaml.safe_load(shipped("acquisition_plans", "two_shot.yaml").read_text())
    plan["grid_plan"] = {"rows": rows, "columns": rows, "overlap": [5, 5]}
    seconds: dict[str, list[float]] = {"alone": [], "live": [], "recovered": []}
    core = open_core("virtual_slide.cfg")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for i in range(repeats + 1):  # the first round warms up: the slide is rendered once
                for who in sorted(("alone", "live"), reverse=bool(i % 2)):
                    took = acquire(core, plan, Path(folder), model if who == "live" else None)
                    if i:
                        seconds[who].append(took["run"])
                        if who == "live":
                            seconds["recovered"].append(took["all"])
    finally:
        close_core(core)
    ratios = [a / b for a, b in zip(seconds["live"], seconds["alone"], strict=True)]
    return {
        "tiles": rows * rows,
        "repeats": repeats,
        "cores": os.cpu_count(),
        "seconds": seconds,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--write", action="store_true", help="replace the section in RESULTS.md"
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    found = measure(options.model, options.rows, options.repeats)
    if options.json:
        print(json.dumps({"machine": platform.platform(), **found}))
        return

    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} … {max(values):.2f})"

    low, high = found["ratio_spread"]
    text = "\n".join(
        [
            f"{found['tiles']} tiles of two shots on the virtual slide, {found['cores']} "
            f"cores, {found['repeats']} pairs of runs in turn; the median, and in brackets "
            "least and most.\n",
            "| | seconds |",
            "|---|---|",
            f"| the run without refocus | {cell(found['seconds']['alone'])} |",
            f"| the run with `--refocus live` | {cell(found['seconds']['live'])} |",
            f"| until all tiles are recovered | {cell(found['seconds']['recovered'])} |",
            f"\nThe run takes {found['ratio']:.3f} × ({low:.3f} … {high:.3f}) as long.",
        ]
    )
    print(text)
    if options.write:
        write_section("refocus-live", "Refocus during a run", text)


if __name__ == "__main__":
    main()
