"""What the default focus measure costs, beside one copy of the frame.

Both are timed in turn in the same process; the ratio is taken pair by pair, so that a
machine whose speed drifts does not decide.

    python benchmarks/brenner_cost.py [--write]
"""

from __future__ import annotations

import time
from collections.abc import Callable

import cv2
import numpy as np
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.metrics import brenner

from _results import pairs_parser, write_section

SIZE = 2048


def seconds(call: Callable[[], object], repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def main() -> None:
    """Run and print, or write, the table."""
    args = pairs_parser(__doc__, 200).parse_args()

    rng = np.random.default_rng(0)
    frame = rng.integers(0, 2**16, (SIZE, SIZE), dtype=np.uint16)
    target = np.empty_like(frame)
    measure = FocusMeasure()
    calls: dict[str, Callable[[], object]] = {
        "copy of the frame (`numpy.copyto`)": lambda: np.copyto(target, frame),
        "`brenner`": lambda: brenner(frame),
        "`brenner` by 8 × 8 tiles (for the noise of a look)": lambda: measure.tile_scores(
            frame
        ),
    }
    times = {name: np.empty(args.pairs) for name in calls}
    for pair in range(-10, args.pairs):  # the first ten warm up
        for name, call in calls.items():
            took = seconds(call, 3)
            if pair >= 0:
                times[name][pair] = took
    reference = next(iter(times.values()))
    rows = [
        "| what | ms (median) | ratio to the copy (median) | 5 … 95 % of the pairs |",
        "|---|---|---|---|",
    ]
    for name, took in times.items():
        low, middle, high = np.percentile(took / reference, [5, 50, 95])
        rows.append(
            f"| {name} | {1e3 * np.median(took):.3f} | {middle:.2f} | {low:.2f} … {high:.2f} |"
        )
    text = (
        f"{SIZE}² pixels of 16 bits, {args.pairs} pairs of 3 runs each, OpenCV with "
        f"{cv2.getNumThreads()} threads.\n`python benchmarks/brenner_cost.py --write`\n\n"
        + "\n".join(rows)
    )
    print(text)
    if args.write:
        write_section("brenner-cost", "Cost of the focus measure", text)


if __name__ == "__main__":
    main()
