"""How fast the virtual slide is on one core, and how far each quality is from a fine reference.

Speed: a 512² colour frame at 20×/0.75. *Field* is what a new place costs
(specimen, layers, source points), *look* each image of it at some z; the camera's noise
apart. Milliseconds of processor time of one thread: the machine may be shared.
Error: root mean square difference to the quality `reference`, in % of the contrast (standard
deviation) of the reference in focus, at several defoci; and the difference of the best focus by
Brenner's measure.

    python benchmarks/virtual_slide.py [--quick] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import cv2
import numpy as np
from mm_autofocus.sim import truth
from mm_autofocus.sim.microscope import Microscope
from mm_autofocus.sim.render import QUALITIES, Field
from mm_autofocus.sim.slide import Slide, SlideSettings

from _results import write_section

DEFOCI = (0.0, 1.0, 3.0, 10.0, 25.0)
BIG = """
import sys, time
from pathlib import Path
import cv2
cv2.setNumThreads(1)
from mm_autofocus.sim.microscope import Microscope
scope = Microscope()
scope.sensor = "2016x2016"
scope.shutter_open = True
scope.set_quality(sys.argv[1])
def memory_mb(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return float(line.split()[1]) / 1024
    return float("nan")
base = memory_mb("VmRSS")
t = time.perf_counter(); scope.expose(); first = time.perf_counter() - t
t = time.perf_counter(); scope.expose(); again = time.perf_counter() - t
print(first, again, memory_mb("VmHWM") - base)
"""


def speed(quality: str, repeats: int) -> tuple[float, float, float]:
    """Median milliseconds of a new field, of a further look, and of the camera."""
    scope = Microscope()
    scope.set_quality(quality)
    slide = Slide(SlideSettings())
    fields, looks = [], []
    places = slide.find_fields("dense", repeats + 1, (166.4, 166.4))
    for k, (x, y) in enumerate(places):
        view = scope.view(x, y)
        start = time.process_time()
        field = Field(slide, view)
        built = time.process_time()
        z = slide.height_at(x, y)
        field.image(z)
        if k:  # the first warms up
            fields.append(built - start)
        for d in (1.0, -2.0, 4.0):
            start = time.process_time()
            light = field.image(z + d)
            looks.append(time.process_time() - start)
    shots = []
    for frame in range(10):
        start = time.process_time()
        scope.camera.expose(
            light, dose=1.0, frame=frame, bit_depth=8, sensor=(512, 512), roi=(0, 0, 512, 512)
        )
        shots.append(time.process_time() - start)
    return tuple(1e3 * statistics.median(v) for v in (fields, looks, shots))


def errors(names: list[str], n_fields: int, size: int) -> tuple[dict, dict]:
    """Differences to the reference: rms in % of contrast per defocus, and of best focus."""
    rms: dict[str, dict[float, list[float]]] = {q: {d: [] for d in DEFOCI} for q in names}
    shift: dict[str, list[float]] = {q: [] for q in names}
    slide = Slide(SlideSettings())
    for sparsity in ("dense", "sparse"):
        for x, y in slide.find_fields(sparsity, n_fields, (166.4, 166.4)):
            scope = Microscope()
            scope.roi = ((512 - size) // 2, (512 - size) // 2, size, size)
            if scope.slide.sparsity(x, y, (size * 0.325, size * 0.325)) == "blank":
                continue
            images, best = {}, {}
            for quality in [*names, "reference"]:
                scope.set_quality(quality)
                view = scope.view(x, y)
                best[quality] = truth.measured_focus_um(scope, view=view)
                field = Field(slide, view)
                images[quality] = {
                    (s, d): field.image(slide.height_at(x, y) - 0.8 + s * d)  # near the best
                    for d in DEFOCI
                    for s in ((1,) if d == 0 else (1, -1))
                }
            contrast = images["reference"][1, 0.0].std()
            for quality in names:
                for (s, d), image in images[quality].items():
                    difference = image - images["reference"][s, d]
                    rms[quality][d].append(
                        100 * float(np.sqrt((difference**2).mean()) / contrast)
                    )
                shift[quality].append(best[quality] - best["reference"])
    return rms, shift


def main() -> None:
    """Run and print, or write, the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer fields, no 2016² frame")
    parser.add_argument(
        "--write", action="store_true", help="replace its section in RESULTS.md"
    )
    args = parser.parse_args()
    cv2.setNumThreads(1)
    names = [q for q in QUALITIES if q != "reference"]
    rows = [
        "512 × 512 RGB, 20×/0.75, tissue, one thread; median.",
        "",
        "| quality | source points | layers | samples a pixel "
        "| new field, ms | look, ms | camera, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        field, look, camera = speed(name, 3 if args.quick or name == "fine" else 8)
        q = QUALITIES[name]
        rows.append(
            f"| {name} | {q.n_points} | {q.n_layers} | {q.oversample}² "
            f"| {field:.0f} | {look:.1f} | {camera:.1f} |"
        )
        print(rows[-1], flush=True)
    rms, shift = errors(names, 1 if args.quick else 2, 256)
    rows += [
        "",
        "Difference to `reference` (60 source points, 4 layers, 2² samples a pixel): rms in % "
        "of its contrast in focus, at ± defocus; and of the best focus by Brenner's measure.",
        "",
        "| quality | " + " | ".join(f"{d:g} µm" for d in DEFOCI) + " | best focus, µm (rms) |",
        "|---" * (len(DEFOCI) + 2) + "|",
    ]
    for name in names:
        values = " | ".join(f"{statistics.mean(rms[name][d]):.1f}" for d in DEFOCI)
        rows.append(f"| {name} | {values} | {np.sqrt(np.mean(np.square(shift[name]))):.3f} |")
    if not args.quick:
        rows += [
            "",
            "| 2016² frame | first, s | again, s | memory (peak), MB |",
            "|---|---|---|---|",
        ]
        for name in names[:-1]:
            out = subprocess.run(
                [sys.executable, "-c", BIG, name], capture_output=True, text=True, check=True
            )
            first, again, memory = map(float, out.stdout.split())
            rows.append(f"| {name} | {first:.1f} | {again:.1f} | {memory:.0f} |")
    text = "\n".join(rows)
    print(text)
    if args.write:
        write_section("virtual_slide", "The virtual slide: speed and error", text)


if __name__ == "__main__":
    main()
