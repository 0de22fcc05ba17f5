"""Megapixels per second of refocus on one core, beside deconvolution and sharpening.

A tile of 2048² pixels, RGB, is recovered in tiles of 512 by a model; in turn and in the same
process, the same number of pixels goes through scikit-image's Richardson-Lucy deconvolution
and through OpenCV's unsharp mask, neither of which knows how far the tile is out of focus.
Reading and writing are not counted. Prints a Markdown table; ``--json`` prints one JSON
document.

    python benchmarks/refocus_throughput.py --model NAME|PATH [--json] [--repeats 5] [--write]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from mm_autofocus.models.importing import load_refocus_model
from skimage.restoration import richardson_lucy
from threadpoolctl import threadpool_limits

from _results import write_section

ITERATIONS = 10
OURS, LUCY, UNSHARP = (
    "refocus",
    f"Richardson-Lucy, {ITERATIONS} iterations (scikit-image)",
    "unsharp mask (OpenCV)",
)


def shots(edge: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Texture, blurred as two shots would be."""
    coarse = np.random.default_rng(0).integers(20, 236, (edge // 4, edge // 4, channels))
    sharp = np.kron(coarse.astype(np.uint8), np.ones((4, 4, 1), np.uint8))
    sharp = sharp[..., 0] if channels == 1 else sharp
    lower, upper = (cv2.GaussianBlur(sharp, (0, 0), sigma) for sigma in (1.5, 2.5))
    return np.asarray(lower), np.asarray(upper)


def lucy(image: np.ndarray) -> np.ndarray:
    """Each channel by itself, with a Gaussian of the blur's width."""
    line = cv2.getGaussianKernel(11, 1.5)
    psf = line @ line.T
    planes = np.atleast_3d(image).astype(np.float32) / 255
    out = [richardson_lucy(p, psf, num_iter=ITERATIONS) for p in np.moveaxis(planes, -1, 0)]
    return np.rint(255 * np.clip(np.stack(out, -1), 0, 1)).astype(np.uint8)


def unsharp(image: np.ndarray) -> np.ndarray:
    return cv2.addWeighted(image, 2, cv2.GaussianBlur(image, (0, 0), 1.5), -1, 0)


def measure(model: Any, edge: int, repeats: int) -> dict[str, Any]:
    lower, upper = shots(edge, model.card.channels)
    half_um = sum(model.shots.half_um) / 2
    ways: dict[str, Callable[[], object]] = {
        OURS: lambda: model.recover(lower, upper, half_um=half_um),
        LUCY: lambda: lucy(lower),
        UNSHARP: lambda: unsharp(lower),
    }
    rates: dict[str, list[float]] = {who: [] for who in ways}
    for i in range(repeats + 1):  # the first round warms up
        for who in sorted(ways, reverse=bool(i % 2)):
            start = time.perf_counter()
            ways[who]()
            if i:
                rates[who].append(edge * edge / 1e6 / (time.perf_counter() - start))
    rows = []
    for who, values in rates.items():
        ratios = [a / b for a, b in zip(rates[OURS], values, strict=True)]
        rows.append(
            {
                "who": who,
                "megapixels_per_s": statistics.median(values),
                "spread": [min(values), max(values)],
                "ours_to_it": statistics.median(ratios),
                "ours_to_it_spread": [min(ratios), max(ratios)],
            }
        )
    return {"edge": edge, "channels": model.card.channels, "repeats": repeats, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--edge", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--write", action="store_true", help="replace the section in RESULTS.md"
    )
    options = parser.parse_args()
    cv2.setNumThreads(1)
    model = load_refocus_model(options.model, threads=1)
    with threadpool_limits(1):
        found = measure(model, options.edge, options.repeats)
    if options.json:
        print(json.dumps({"machine": platform.platform(), "model": model.card.name, **found}))
        return
    colour = "RGB" if found["channels"] == 3 else "grey"
    lines = [
        f"One tile of {found['edge']}² pixels, {colour}, uint8, on one core, by "
        f"`{model.card.name}` in tiles of 512; {found['repeats']} rounds in turn, the median, "
        "and in brackets least and most. Reading and writing are not counted.\n",
        "| | megapixels/s | refocus is faster by |",
        "|---|---|---|",
    ]
    for row in found["rows"]:
        low, high = row["spread"]
        a, b = row["ours_to_it_spread"]
        ratio = "–" if row["who"] == OURS else f"{row['ours_to_it']:.3g} × ({a:.3g} … {b:.3g})"
        rate = f"{row['megapixels_per_s']:.3g} ({low:.3g} … {high:.3g})"
        lines.append(f"| {row['who']} | {rate} | {ratio} |")
    lines.append(
        "\nThe peers are shown one shot and sharpen it by the same everywhere; they are the "
        "cost of classical methods, not their result on focus."
    )
    print("\n".join(lines))
    if options.write:
        write_section("refocus-throughput", "Refocus on one core", "\n".join(lines))


if __name__ == "__main__":
    main()
