"""Nuclei counted on recovered and on true images of unseen virtual slides of tissue.

The counter is the same for both: haematoxylin by colour deconvolution (Ruifrok and Johnston,
scikit-image), smoothed, Otsu's threshold of each image by itself, and a watershed of the
distance to the edge, one nucleus for each of its peaks. Where there is hardly a nucleus,
Otsu's threshold would part the bright middle of bare glass from its darker corners: it must
lie some way above the median of the frame.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mm_autofocus.sim.draws import BENCHMARK_SEEDS
from mm_autofocus.training.evaluation_table import number
from mm_autofocus.training.refocus_baselines import SHARPER, baselines_of
from mm_autofocus.training.refocus_cases import Case
from mm_autofocus.training.refocus_evaluate import PairRow, evaluate_refocus
from mm_autofocus.training.refocus_table import name_of
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import label
from skimage.morphology import remove_small_objects
from skimage.segmentation import find_boundaries, watershed

from _refocus_virtual import VirtualField, command_line, markdown, models_of, virtual_fields
from _virtual_stacks import CLASSES, PIXEL_UM, SPACING, Place

SMOOTH_PX = 2.0
# Of haematoxylin. On 25 true fields of training seeds Otsu lies 0.027 … 0.055 above the median,
# and 0.0002 in the one that has no nucleus, where it marks 39 % of the frame.
LEAST_STAIN = 0.01
LEAST_UM2 = 8.0  # a disc of 3.2 µm
APART_PX = 9  # 2.9 µm: nearer peaks are one nucleus
MARK = 0.01
FEWEST = 10  # nuclei in a field for a percentage of its own


def nuclei(rgb: np.ndarray) -> np.ndarray:
    """Label the nuclei of a frame ``(Y, X, 3)`` uint8: 0 outside, then 1, 2, ..."""
    stain = gaussian(rgb2hed(rgb)[..., 0], SMOOTH_PX)
    inside = stain > max(threshold_otsu(stain), np.median(stain) + LEAST_STAIN)
    inside = ndimage.binary_fill_holes(inside)
    inside = remove_small_objects(inside, max_size=round(LEAST_UM2 / PIXEL_UM**2))
    # the frame's edge is an edge of a nucleus, too: else its rim is a row of peaks
    depth = ndimage.distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    depth = gaussian(depth, 1.0)
    peaks = peak_local_max(depth, min_distance=APART_PX, labels=label(inside))
    seeds = np.zeros(depth.shape, int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    return np.asarray(watershed(-depth, seeds, mask=inside))


def count(rgb: np.ndarray) -> int:
    """Number of nuclei."""
    return int(nuclei(rgb).max())


@dataclass
class Counter:
    """Counts while the pairs are recovered (`watch`)."""

    picture: Path | None = None
    there: VirtualField | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    true: dict[str, int] = field(default_factory=dict)
    noisy: dict[str, int] = field(default_factory=dict)
    strips: list[np.ndarray] = field(default_factory=list)

    def __call__(self, case: Case, images: Mapping[str, Any], row: PairRow) -> None:
        assert self.there is not None
        if case.field not in self.true:
            self.true[case.field] = count(case.truth)
            self.noisy[case.field] = count(self.there.noisy)
            if self.picture is not None and len(self.strips) < 6:
                shown = (case.truth, images[next(iter(images))], images[SHARPER])
                self.strips.append(np.hstack([outlined(np.asarray(i)) for i in shown]))
        self.rows.append(
            {
                "field": case.field,
                "half_um": case.asked_um,
                "enclosed": row.enclosed,
                **{name: count(np.asarray(image)) for name, image in images.items()},
            }
        )


def outlined(rgb: np.ndarray) -> np.ndarray:
    """The frame with the edges of what is counted, for a look at it."""
    out = rgb.copy()
    out[find_boundaries(nuclei(rgb), mode="inner")] = (0, 255, 0)
    return out


def tissue(n: int) -> list[Place]:
    """`n` fields of each class of tissue drawn by the simulator, each on its own slide.

    Seeds as in `_virtual_stacks.places`. A smear has no such nuclei, and of the pictures of
    tissue the enlarged ones are cut into pieces that are none.
    """
    return [
        Place(BENCHMARK_SEEDS[SPACING * (len(CLASSES) * j + i)], "tissue", "", c)
        for j in range(n)
        for i, c in enumerate(CLASSES)
    ]


def run(args: argparse.Namespace) -> str:
    """Recover and count; return the text of the section."""
    model, others = models_of(args)
    counter = Counter(args.picture)
    start = time.perf_counter()

    def cases() -> Iterator[Case]:
        for found in virtual_fields(args, tissue(args.fields)):
            counter.there = found
            yield from found.cases()

    judged = evaluate_refocus(
        model, cases(), baselines_of([SHARPER]), others=others, watch=counter
    )
    if args.picture is not None:
        cv2.imwrite(str(args.picture), np.vstack(counter.strips)[..., ::-1])
    return _section(counter, judged.methods, args, time.perf_counter() - start)


def _section(
    counter: Counter, methods: list[str], args: argparse.Namespace, seconds: float
) -> str:
    rows, true = counter.rows, counter.true
    heads = ["nuclei in a field (mean)", *(f"± {h:g} µm" for h in _halves(rows)), "all"]
    heads += ["relative difference of the means", "of single frames (mean of abs)"]
    lines = [_true_line("true image", rows, true, true)]
    lines.append(_true_line("camera's frame at focus", rows, counter.noisy, true))
    shares = {}
    for method in methods:
        cells, shares[method] = _line(method, rows, true)
        lines.append(cells)
    own = methods[0]
    met = "met" if abs(shares[own]) <= MARK else "**missed**"
    text = [
        f"**Simulated.** {len(true)} fields of {args.frame}² pixels of unseen virtual slides "
        f"of tissue drawn by the simulator, {len(rows)} pairs of shots, drawn as for the PSNR. "
        "Counter: scikit-image, haematoxylin (`rgb2hed`), "
        f"Gaussian of {SMOOTH_PX:g} px, Otsu (at least {LEAST_STAIN:g} above the median: bare "
        f"glass is no nucleus), discs below {LEAST_UM2:g} µm² dropped, watershed "
        f"of the distance transform with peaks {APART_PX} px apart; the same for all images. "
        "The true image is without noise. Otsu's threshold is of each image by itself. In the "
        f"last column only fields with at least {FEWEST} nuclei.",
        "",
        f"{command_line('nuclei', args)} ({seconds / 60:.0f} minutes)",
        "",
        *markdown(heads, lines),
        "",
        f"Mark: {own} and true images agree within {100 * MARK:g} % on average: "
        f"{100 * shares[own]:+.2f} %, {met}.",
    ]
    return "\n".join(text)


def _halves(rows: list[dict[str, Any]]) -> list[float]:
    return sorted({r["half_um"] for r in rows})


def _true_line(
    title: str, rows: list[dict[str, Any]], counts: dict[str, int], true: dict[str, int]
) -> list[str]:
    """Counts that do not depend on the shots, weighted by them all the same."""
    found = [{**r, title: counts[r["field"]]} for r in rows]
    return _line(title, found, true)[0] if counts is not true else _plain(title, found)


def _plain(title: str, rows: list[dict[str, Any]]) -> list[str]:
    parts = [[r for r in rows if r["half_um"] == h] for h in _halves(rows)]
    means = [number(float(np.mean([r[title] for r in part]))) for part in (*parts, rows)]
    return [title, *means, "–", "–"]


def _line(
    method: str, rows: list[dict[str, Any]], true: dict[str, int]
) -> tuple[list[str], float]:
    """Cells, and the relative difference of the means over all pairs."""

    def relative(some: list[dict[str, Any]]) -> float:
        return sum(r[method] for r in some) / sum(true[r["field"]] for r in some) - 1

    cells = []
    for half in _halves(rows):
        some = [r for r in rows if r["half_um"] == half]
        mean = np.mean([r[method] for r in some])
        cells.append(f"{mean:.2f} ({100 * relative(some):+.1f} %)")
    single = [abs(r[method] / true[r["field"]] - 1) for r in rows if true[r["field"]] >= FEWEST]
    share = relative(rows)
    mean = float(np.mean([r[method] for r in rows]))
    last = f"{100 * float(np.mean(single)):.1f} %" if single else "–"
    return [name_of(method), *cells, number(mean), f"{100 * share:+.2f} %", last], share
