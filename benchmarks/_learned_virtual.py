"""The paper's protocol on virtual slides, with everybody on the same frames."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from mm_autofocus.models.importing import load_model
from mm_autofocus.models.runtime import OnnxModel, Prediction
from mm_autofocus.sim.draws import OPTICS
from mm_autofocus.training import merit
from mm_autofocus.training.baselines import HillClimb, grid_median
from mm_autofocus.training.curve_fit import CurveFit, fit_curve
from mm_autofocus.training.evaluate import Evaluation, evaluate
from mm_autofocus.training.evaluation_table import CLASSES as NAMES
from mm_autofocus.training.evaluation_table import number, share
from mm_autofocus.training.judges import Judge, ModelJudge, Planes
from mm_autofocus.training.lens_fit import LensFit, fit_lens, lens_model
from mm_autofocus.training.merit import Row

from _virtual_stacks import (
    CALIBRATION_UM,
    CLASSES,
    DOF_UM,
    Place,
    VirtualStack,
    calibration_stacks,
    drawn_at,
    slide_stacks,
    stacks,
)

HALF_UM = 25.0
ONE, TWO, FITTED = "one look", "two looks", "one look, lens fitted"
CURVED = "one look, lens and slide fitted"
_ONE_MARKS = [
    ("dense", "mae_um", 0.37),
    ("sparse", "mae_um", 0.51),
    ("extremely-sparse", "mae_um", 0.60),
    *((c, "direction_success", 0.999) for c in CLASSES),
    ("dense", "dof", 0.95),
    ("extremely-sparse", "dof", 0.85),
]
MARKS: dict[str, list[tuple[str, str, float]]] = {
    ONE: _ONE_MARKS,
    FITTED: _ONE_MARKS,
    CURVED: _ONE_MARKS,
    TWO: [
        ("dense", "mae_um", 0.25),
        ("sparse", "mae_um", 0.35),
        ("extremely-sparse", "mae_um", 0.45),
        *((c, "direction_success", 0.9995) for c in CLASSES),
    ],
}
EDGES = (0.0, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 25.01)


def run(args: argparse.Namespace) -> str:
    """Judge the models; return the text of the section."""
    model = load_model(args.model)
    judges: dict[str, Judge] = {}
    every: dict[str, int] = {}
    looks = set(model.card.looks_um)
    if args.two_look:
        judges[TWO] = ModelJudge(load_model(args.two_look))
        looks |= set(judges[TWO].looks_um)
    fitted = curved = None
    if model.card.lens is not None:
        fitted = judges[FITTED] = Fitted(args)
        curved = judges[CURVED] = Curved(fitted)
    judges["grid median"] = grid_median(model)
    every["grid median"] = args.every
    if args.resnet:
        judges["resnet, grid median"] = grid_median(load_model(args.resnet))
        every["resnet, grid median"] = args.every
    start = time.perf_counter()
    found = evaluate(
        model,
        _told(
            stacks(
                args.fields,
                planes=args.planes,
                side=args.frame,
                textures=args.data / "textures",
                looks_um=sorted(looks),
                half_um=HALF_UM,
                cache=args.cache,
            ),
            3 * args.fields,
            start,
        ),
        dof_um=DOF_UM,
        judges=judges,
        searches={"hill-climb": HillClimb(starts=args.starts)},
        every=every,
        range_um=(-HALF_UM, HALF_UM),
    )
    offsets = judges[TWO].looks_um if args.two_look else ()
    return _section(found, args, offsets, time.perf_counter() - start, fitted, curved)


class Fitted:
    """A model of which each field is shown to a copy fitted to its lens.

    By stacks of another slide under that lens: as ``calibrate --fit-lens`` does it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.model = args, lens_model(args.model)
        self.card, self.looks_um = self.model.card, tuple(self.model.card.looks_um)
        self.fits: dict[Place, LensFit] = {}

    def __call__(self, images: Sequence[np.ndarray], stack: Planes) -> Prediction:
        assert isinstance(stack, VirtualStack)
        return ModelJudge(self.told(stack.place))(images, stack)

    def told(self, place: Place) -> OnnxModel:
        """The copy for the lens of a place."""
        fit = self.fits.get(place)
        if fit is None:
            data, side = self.args.data / "textures", self.args.frame
            others = calibration_stacks(place, side=side, textures=data, cache=self.args.cache)
            self.model.card = self.card
            fit = self.fits[place] = fit_lens(self.model, others)
        self.model.net.lens = fit.code
        self.model.card = self.card.model_copy(update={"error": fit.error})
        return self.model

    def text(self) -> str:
        """How well the lenses were found."""
        found = np.array([f.values["sigma"] for f in self.fits.values()])
        true = np.array([drawn_at(p).optics.sigma for p in self.fits])
        low, high = OPTICS["sigma"]
        return (
            f"`{FITTED}`: told of the lens as `calibrate --fit-lens` finds it, by stacks of "
            "two dense fields of another slide under the same lens and camera, "
            f"{len(CALIBRATION_UM)} planes each, labelled by their own focus curves. The "
            f"aperture of the condenser comes out {np.sqrt(np.mean((found - true) ** 2)):.3f} "
            f"beside the true one (rms; it is drawn from {low:g} to {high:g})."
        )


class Curved:
    """The copies of `Fitted`, each calibrated on the slide of the field, too.

    By stacks of two other fields of it: as ``calibrate --fit-curve`` does it.
    """

    def __init__(self, fitted: Fitted) -> None:
        self.fitted = fitted
        self.card, self.looks_um = fitted.card, fitted.looks_um
        self.fits: dict[Place, CurveFit] = {}

    def __call__(self, images: Sequence[np.ndarray], stack: Planes) -> Prediction:
        assert isinstance(stack, VirtualStack)
        place, args = stack.place, self.fitted.args
        model = self.fitted.told(place)
        fit = self.fits.get(place)
        if fit is None:
            fields = slide_stacks(place, side=args.frame, cache=args.cache)
            fit = self.fits[place] = fit_curve(model, fields)
        if fit.helps:  # else no copy is written
            update = {"curve": fit.curve, "error": fit.error}
            model.card = model.card.model_copy(update=update)
        return ModelJudge(model)(images, stack)

    def text(self) -> str:
        """What was done, and by how much the slides shift what is said."""
        aside = [abs(fit.aside_um) for fit in self.fits.values()]
        helped = sum(fit.helps for fit in self.fits.values())
        return (
            f"`{CURVED}`: that copy with a calibration curve of the slide, as `calibrate "
            "--fit-curve` finds it by stacks of two other dense fields of the same slide, of "
            f"as many planes (a picture is repeated in mirror images, so these may show some "
            f"of the same); it helped, by its own check, on {helped} of {len(aside)} slides. "
            f"In focus, copies without it are off by {np.mean(aside):.2f} µm on average."
        )


def _told(some: Iterator[VirtualStack], total: int, start: float) -> Iterator[VirtualStack]:
    for k, stack in enumerate(some, 1):
        seconds = time.perf_counter() - start
        print(f"{k}/{total}  {stack.group}, {stack.sparsity}  {seconds:.0f} s", flush=True)
        yield stack


def _section(
    found: Evaluation,
    args: argparse.Namespace,
    offsets: Sequence[float],
    seconds: float,
    fitted: Fitted | None,
    curved: Curved | None,
) -> str:
    people = {ONE: found.model, **found.baselines}
    kinds = sorted({r.field.partition("/")[0] for r in found.model.rows})
    lines = [
        f"**Simulated.** {found.stacks} fields, each on a virtual slide, under a lens and in "
        "front of a camera of its own, drawn from the ranges in `mm_autofocus/sim/draws.py` "
        f"with seeds that training does not use ({', '.join(kinds)}; tiatoolbox and tcgafocus "
        "are pictures of real H&E sections, the others are drawn by the simulator). Frames of "
        f"{args.frame}² pixels, 20×/0.75, with the camera's noise; {args.planes} planes over ± "
        f"{HALF_UM:g} µm of the focus by Brenner's measure on noiseless images. Depth of field "
        f"{DOF_UM} µm. In brackets: 95 % of the MAE by drawing fields (bootstrap). A frame "
        "without a prediction is not in the MAE and counts as wrong in the rest."
        + (f" `{TWO}`: at {', '.join(f'{o:+g}' for o in offsets)} µm." if offsets else "")
        + ("" if fitted is None else f" {fitted.text()}")
        + ("" if curved is None else f" {curved.text()}"),
        "",
        f"`python benchmarks/learned.py --part virtual-slide --model {Path(args.model).name}"
        + (f" --two-look {Path(args.two_look).name}" if args.two_look else "")
        + (f" --resnet {Path(args.resnet).name}" if args.resnet else "")
        + f" --fields {args.fields} --write` ({seconds / 60:.0f} minutes)",
        "",
        "| who | fields | frames | MAE ± SD, µm | median | ≤ DoF | ≤ DoF/2 | ≤ DoF/3 "
        "| direction | not predicted | flagged | looks |",
        "|---" * 12 + "|",
    ]
    for c in CLASSES:
        for who, judged in people.items():
            rows = [r for r in judged.rows if r.sparsity == c]
            if rows:
                lines.append(_line(who, c, rows))
    lines += ["", *_marks(people), "", *_against_defocus(people), "", *_kinds(people)]
    lines += ["", *_factors(people)]
    for who in MARKS:
        known = merit.calibration(people[who].rows) if who in people else None
        if known is not None:
            within = ", ".join(f"{share(v)} within {k} ×" for k, v in known["within"].items())
            lines += ["", f"Expected errors of `{who}`: {within}."]
    return "\n".join(lines)


def _line(who: str, sparsity: str, rows: Sequence[Row]) -> str:
    m = merit.merit(rows, DOF_UM)
    cover = merit.coverage(rows)
    between = merit.interval(rows, _mae)
    extent = "" if between is None else f" ({between[0]:.2f} … {between[1]:.2f})"
    direction = "–" if who == "zero" else _fine(m["direction_success"])
    cells = [
        who,
        NAMES[sparsity.replace("-", "_")],
        str(m["n"]),
        f"{number(m['mae_um'])} ± {number(m['mae_std_um'])}{extent}",
        number(m["median_um"]),
        *(share(v) for v in m["dof_accuracy"].values()),
        direction,
        str(cover["missing"]),
        str(cover["flagged"]),
        f"{m['looks']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _mae(rows: Sequence[Row]) -> float | None:
    """Mean absolute error alone: the interval asks for it some hundred times."""
    errors = [abs(e) for r in rows if (e := r.error_um) is not None]
    return float(np.mean(errors)) if errors else None


def _fine(value: float | None) -> str:
    """Two digits: the marks for the direction need them."""
    return "–" if value is None else f"{np.floor(1e4 * value) / 100:.2f} %"


def _marks(people: dict[str, Any]) -> list[str]:
    lines = ["| mark | fields | asked for | found | reached |", "|---|---|---|---|---|"]
    texts = {"mae_um": "MAE", "direction_success": "direction", "dof": "≤ DoF"}
    for who, marks in MARKS.items():
        if who not in people:
            continue
        for c, what, limit in marks:
            rows = [r for r in people[who].rows if r.sparsity == c]
            if not rows:
                continue
            m = merit.merit(rows, DOF_UM)
            value = m["dof_accuracy"]["1"] if what == "dof" else m[what]
            if what == "mae_um":
                sign = "≤" if who == TWO else "<"
                good = value is not None and (value < limit or (sign == "≤" and value == limit))
                asked, shown = f"{sign} {limit:.2f} µm", f"{number(value, 3)} µm"
            else:
                good = value is not None and value >= limit
                asked, shown = f"≥ {100 * limit:g} %", _fine(value)
            name = NAMES[c.replace("-", "_")]
            verdict = "yes" if good else "**no**"
            lines.append(f"| {who}, {texts[what]} | {name} | {asked} | {shown} | {verdict} |")
    return lines


def _against_defocus(people: dict[str, Any]) -> list[str]:
    heads = [f"{a:g}–{round(b, 1):g}" for a, b in pairwise(EDGES)]
    lines = [
        "MAE (µm), and in brackets wrong directions of all frames, against |defocus| (µm):",
        "",
        f"| who | fields | {' | '.join(heads)} |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for who, judged in people.items():
        if who == "zero":
            continue
        for c in CLASSES:
            rows = [r for r in judged.rows if r.sparsity == c]
            cells = []
            for low, high in pairwise(EDGES):
                some = [r for r in rows if low <= abs(r.true_um) < high]
                m = merit.merit(some, DOF_UM)
                wrong = round((1 - (m["direction_success"] or 0)) * len(some))
                cells.append(f"{number(m['mae_um'])} ({wrong}/{len(some)})" if some else "–")
            if rows:
                name = NAMES[c.replace("-", "_")]
                lines.append(f"| {who} | {name} | {' | '.join(cells)} |")
    return lines


def _factors(people: dict[str, Any]) -> list[str]:
    """How much of the error is one factor per field: a lens that the model misjudges."""
    texts = []
    for who in MARKS:
        if who not in people:
            continue
        fields: dict[str, list[Row]] = {}
        for r in people[who].rows:
            if r.predicted_um is not None:
                fields.setdefault(f"{r.field}/{r.sparsity}", []).append(r)
        before, after, factors = [], [], []
        for rows in fields.values():
            said = np.array([r.predicted_um for r in rows])
            true = np.array([r.true_um for r in rows])
            # the factor that makes the sum of absolute errors least
            said, true = said[true != 0], true[true != 0]
            order = np.argsort(said / true)
            weights = np.abs(true)[order].cumsum()
            middle = order[np.searchsorted(weights, weights[-1] / 2)]
            factors.append(float(said[middle] / true[middle]))
            before.append(np.abs(said - true).mean())
            after.append(np.abs(said / factors[-1] - true).mean())
        texts.append(
            f"`{who}`: {np.mean(before):.2f} → {np.mean(after):.2f} µm, factors "
            f"{np.mean(factors):.3f} ± {np.std(factors):.3f}"
        )
    return [
        "MAE if the predictions of each field were multiplied by one factor, fitted to the "
        f"truth (not possible in use; what a misjudged lens costs): {'; '.join(texts)}."
    ]


def _kinds(people: dict[str, Any]) -> list[str]:
    """By what the slide shows."""
    lines = [
        "| who | specimen | frames | MAE ± SD, µm | ≤ DoF | direction |",
        "|---|---|---|---|---|---|",
    ]
    for who in MARKS:
        if who not in people:
            continue
        kinds: dict[str, list[Row]] = {}
        for r in people[who].rows:
            kinds.setdefault(r.field.partition("/")[0], []).append(r)
        for kind, rows in sorted(kinds.items()):
            m = merit.merit(rows, DOF_UM)
            lines.append(
                f"| {who} | {kind} | {m['n']} | {number(m['mae_um'])} ± "
                f"{number(m['mae_std_um'])} | {share(m['dof_accuracy']['1'])} | "
                f"{_fine(m['direction_success'])} |"
            )
    return lines
