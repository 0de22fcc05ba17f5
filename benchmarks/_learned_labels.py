"""How well the label of a stack is known: beside other ways to find the peak of its curve.

On recorded stacks of a thick section there is no truth, but two halves of a frame should say
the same; on virtual slides there is one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import tifffile
from mm_autofocus.training.evaluation_table import number
from mm_autofocus.training.label import StackMeter, middle_of, peak_of
from mm_autofocus.types import Optics

from _refocus_virtual import markdown
from _virtual_stacks import PIXEL_UM, first_of, open_place, places, tried

STEPS_UM = (0.5, 1.0, 2.0)
HALF_UM = 9.0
SIDE = 256
OPTICS = Optics(na=0.75, magnification=20.0, pixel_size_um=PIXEL_UM)  # of the virtual ones
MIDDLE, PEAK = "centroid above half the height", "spline through the logarithm"
OURS = "label: the peak of a thin specimen, else the centroid"


def _sharpest(z: np.ndarray, s: np.ndarray) -> float:
    return float(z[s.argmax()])


def _parabola(z: np.ndarray, s: np.ndarray) -> float:
    """Through the sharpest plane and its neighbours."""
    k = int(np.clip(s.argmax(), 1, len(z) - 2))
    a, b, _ = np.polyfit(z[k - 1 : k + 2] - z[k], s[k - 1 : k + 2], 2)
    return float(z[k] - b / (2 * a)) if a < 0 else float(z[k])


def _bell(z: np.ndarray, s: np.ndarray) -> float:
    """A Gaussian through what rises above 60 % of the height, or through five planes."""
    k = int(s.argmax())
    part = (s - 0.98 * s.min()) / (s[k] - 0.98 * s.min())
    low = np.flatnonzero(part < 0.6)
    i = max([*low[low < k] + 1, 0])
    j = min([*low[low > k] - 1, len(z) - 1])
    if j - i < 4:
        i, j = max(k - 2, 0), min(k + 2, len(z) - 1)
    some = np.maximum(part[i : j + 1], 1e-3)
    a, b, _ = np.polyfit(z[i : j + 1] - z[k], np.log(some), 2, w=some)
    return float(np.clip(z[k] - b / (2 * a), z[i], z[j])) if a < 0 else float(z[k])


OTHERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "sharpest plane": _sharpest,
    "parabola through three planes": _parabola,
    "Gaussian through the top": _bell,
    PEAK: peak_of,
    MIDDLE: lambda z, s: middle_of(z, s)[0],
}


def _found(
    z: np.ndarray, stack: Any, dof_um: float | None = None
) -> tuple[dict[str, float], float, np.ndarray]:
    """What each way says, by how much the label expects to be off, and the scores.

    NaN if the label is refused.
    """
    meter = StackMeter()
    for at, image in zip(z, stack, strict=True):
        meter.add(float(at), image)
    label = meter.label(dof_um)
    scores = np.array(meter.scores)
    says = {name: way(z, scores) for name, way in OTHERS.items()}
    ok = label.status == "ok"
    says[OURS] = label.focus_z_um if ok else np.nan
    return says, label.expected_error_um if ok else np.nan, scores


def _section_stacks(args: argparse.Namespace) -> list[str]:
    files = sorted((args.data / "zstack_brain").glob("*.tif"))
    if not files:
        return ["No recorded stacks."]
    off: dict[str, list[float]] = {}
    expected, sharp = [], []
    for path in files:
        stack = tifffile.imread(path)
        z, half = np.arange(len(stack), dtype=float), stack.shape[2] // 2
        one, other = (_found(z, part) for part in (stack[:, :, :half], stack[:, :, half:]))
        for name in one[0]:
            off.setdefault(name, []).append(one[0][name] - other[0][name])
        expected.append(np.hypot(one[1], other[1]))
        at, _, scores = _found(z, stack)
        sharp.append({n: np.interp(v, z, scores) / scores.max() for n, v in at.items()})
    rows = []
    for name, values in off.items():
        d = np.array(values)
        share = np.array([s[name] for s in sharp])
        mark = [f"{100 * v:.1f} %" for v in (np.nanmedian(share), np.nanmin(share))]
        rows.append([name, number(float(np.nanstd(d))), *mark])
    d, e = np.array(off[OURS]), np.array(expected)
    ok = np.isfinite(d)
    within = [f"{100 * np.mean(np.abs(d[ok]) < k * e[ok]):.0f} %" for k in (1, 2)]
    return [
        f"{len(files)} stacks of a thick stained brain section (planes at 1 µm), cut into a "
        "left and a right half of 64 × 128 pixels: by how much the focus of the halves "
        "differs. Beside it, how sharp a plane at that focus of the whole frame is, in parts "
        "of the sharpest one (Brenner).",
        "",
        *markdown(["focus", "halves differ by, µm (sd)", "sharpness, median", "worst"], rows),
        "",
        f"The labels expect the halves to differ by {number(float(np.nanmedian(e)))} µm "
        f"(median): {within[0]} are within 1 ×, {within[1]} within 2 × of it (normal: 68, 95 "
        f"%). Refused: {int((~ok).sum())}.",
    ]


def _virtual(args: argparse.Namespace) -> list[str]:
    off: dict[float, dict[str, list[float]]] = {s: {} for s in STEPS_UM}
    expected: dict[float, list[float]] = {s: [] for s in STEPS_UM}
    wanted = places(args.fields, args.data / "textures")
    for n, candidates in enumerate(tried(wanted)):
        there = first_of(candidates, lambda place: open_place(place, SIDE))
        rng = np.random.default_rng(n)
        fine = min(STEPS_UM)
        z = np.arange(-HALF_UM, HALF_UM + fine, fine) + rng.uniform(-0.5, 0.5)
        frames = [there.frame(float(v), k) for k, v in enumerate(z)]
        for step in STEPS_UM:
            every = round(step / fine)
            says, error, _ = _found(z[::every], frames[::every], OPTICS.dof_um)
            for name, value in says.items():
                off[step].setdefault(name, []).append(value)
            expected[step].append(error)
        print(f"{n + 1}/{len(wanted)}", flush=True)
    rows = []
    for name in off[STEPS_UM[0]]:
        cells = []
        for step in STEPS_UM:
            d = np.array(off[step][name])
            cells.append(f"{np.nanmean(np.abs(d)):.2f} ({np.nanmean(d):+.2f})")
        rows.append([name, *cells])
    texts = []
    for step in STEPS_UM:
        d, e = np.abs(off[step][OURS]), np.array(expected[step])
        ok = np.isfinite(d)
        within = "/".join(f"{100 * np.mean(d[ok] < k * e[ok]):.0f}" for k in (1, 2))
        texts.append(f"{step:g} µm: {within} % ({int((~ok).sum())} refused)")
    return [
        f"**Simulated.** {len(wanted)} fields of {SIDE}² pixels of unseen virtual slides, 20×/"
        "0.75, each under a lens of its own: mean absolute error of the focus of a stack, µm "
        "(in brackets the mean error), for planes so far apart. The truth is the peak of "
        "Brenner's measure of the noiseless images; the lens makes the flanks differ.",
        "",
        *markdown(["focus", *(f"{s:g} µm" for s in STEPS_UM)], rows),
        "",
        "Labels within 1 × and 2 × of the error that they expect: " + "; ".join(texts) + ".",
    ]


def run(args: argparse.Namespace) -> str:
    """Return the text of the section."""
    return "\n".join(
        [
            *_section_stacks(args),
            "",
            *_virtual(args),
            "",
            "`python benchmarks/learned.py --part labels --write`",
        ]
    )
