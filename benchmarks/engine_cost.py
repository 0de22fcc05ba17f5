"""What the engine costs a plan without autofocus, beside the stock engine.

Both run the same plan on the same core, in turn, in the same process; the ratio is taken
pair by pair, so that a machine whose speed drifts does not decide.

    python benchmarks/engine_cost.py [--write]
"""

from __future__ import annotations

import logging
import statistics
import time
import warnings

import useq
from mm_autofocus import AutofocusEngine
from mm_autofocus.config import close_core, open_core
from pymmcore_plus.mda import MDAEngine

from _results import pairs_parser, ratio_cells, write_section

PLANS = {
    "one position, 300 frames": useq.MDASequence(
        stage_positions=[(0, 0, 0)], time_plan={"interval": 0, "loops": 300}
    ),
    "60 positions": useq.MDASequence(stage_positions=[(i, 0, 0) for i in range(60)]),
    "10 positions, 3 channels, 5 planes": useq.MDASequence(
        stage_positions=[(i, 0, 0) for i in range(10)],
        channels=["DAPI", "FITC", "Rhodamine"],
        z_plan={"range": 4, "step": 1},
    ),
}


def main() -> None:
    """Run and print, or write, the table."""
    args = pairs_parser(__doc__, 15).parse_args()
    logging.getLogger("pymmcore-plus").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    core = open_core("demo_camera.cfg")
    core.setProperty("Camera", "FastImage", "1")
    core.setExposure(0)
    engines = {"stock": MDAEngine(core), "ours": AutofocusEngine(core)}
    rows = [
        "| plan | stock, ms an event | ratio ours / stock (median) | 5 … 95 % of the pairs |"
    ]
    rows.append("|---|---|---|---|")
    for name, plan in PLANS.items():
        events = sum(1 for _ in plan)
        times: dict[str, list[float]] = {"stock": [], "ours": []}
        for pair in range(args.pairs + 1):
            order = ["stock", "ours"] if pair % 2 else ["ours", "stock"]
            for which in order:
                core.mda.set_engine(engines[which])
                start = time.perf_counter()
                core.mda.run(plan)
                if pair:  # the first pair warms up
                    times[which].append(time.perf_counter() - start)
        stock_ms = 1e3 * statistics.median(times["stock"]) / events
        ratio = ratio_cells(times["ours"], times["stock"])
        rows.append(f"| {name} | {stock_ms:.2f} | {ratio} |")
    close_core(core)
    text = (
        "Plans without autofocus on the DemoCamera adapters "
        f"({args.pairs} pairs each, mark: ratio ≤ 1.03).\n\n" + "\n".join(rows)
    )
    print(text)
    if args.write:
        write_section("engine-cost", "Cost of the engine", text)


if __name__ == "__main__":
    main()
