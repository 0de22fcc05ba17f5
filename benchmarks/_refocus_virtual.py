"""Two shots on virtual slides that no training has seen, with the truth that a camera lacks.

The fields, lenses and cameras are those of `_virtual_stacks`. The shots are frames of the
camera, noise and all, exactly ΔD below and above a middle that is off focus by lot; the truth
is the same camera's frame at the simulator's focus without its noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mm_autofocus.models.importing import load_refocus_model
from mm_autofocus.models.refocus import Recovery, RefocusModel
from mm_autofocus.sim.draws import TRAINING_SEEDS, draw
from mm_autofocus.training.evaluation_table import CLASSES as CLASS_NAMES
from mm_autofocus.training.evaluation_table import number, share
from mm_autofocus.training.refocus_baselines import (
    REFOCUS_BASELINES,
    SHARPER,
    Wiener,
    baselines_of,
    planes_of,
    two_shots,
)
from mm_autofocus.training.refocus_cases import Case, middles_um
from mm_autofocus.training.refocus_evaluate import (
    PairRow,
    RefocusEvaluation,
    evaluate_refocus,
    figures,
    gain,
    psnr_db,
)
from mm_autofocus.training.refocus_table import (
    extent,
    name_of,
    refocus_heads,
    refocus_sentences,
    refocus_table,
)
from mm_autofocus.types import Optics

from _virtual_stacks import (
    CLASSES,
    PIXEL_UM,
    QUALITY,
    Place,
    first_of,
    open_place,
    places,
    tried,
)

HALVES_UM = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
FULL = 255.0
OPTICS = Optics(na=0.75, magnification=20.0, pixel_size_um=PIXEL_UM)
UNET_DB, SHARPER_DB, SHARPER_FROM_UM = 2.8, 3.0, 1.5
ONE_SHOT, OF_SHARPER = "single-shot U-Net", "U-Net, sharper of both shots"
TUNED_SEED, TUNED_FIELDS, TUNED_PX = TRAINING_SEEDS[90_000], 8, 256


@dataclass(frozen=True)
class VirtualField:
    """A field with all its shots; `frames[2 k]` and `[2 k + 1]` belong to `shots[k]`.

    `middles[k]` is one exposure in their middle, at F.
    """

    place: Place
    shots: Sequence[tuple[float, float]]
    frames: np.ndarray
    middles: np.ndarray
    truth: np.ndarray
    noisy: np.ndarray

    @property
    def group(self) -> str:
        return f"{self.place.name}/{self.place.seed}/{self.place.sparsity}"

    def cases(self) -> Iterator[Case]:
        """All pairs of shots."""
        for k, (half, middle) in enumerate(self.shots):
            yield Case(
                self.group,
                self.place.sparsity,
                half,
                middle - half,
                middle + half,
                self.frames[2 * k],
                self.frames[2 * k + 1],
                self.truth,
                0.0,
                FULL,
                OPTICS,
            )


def shots_of(seed: int, per_half: int) -> list[tuple[float, float]]:
    """ΔD and the defocus of the middle, drawn by lot as in the paper."""
    rng = np.random.default_rng([seed, 55])
    return [(h, round(float(m), 4)) for h in HALVES_UM for m in middles_um(rng, per_half)]


def virtual_field(place: Place, side: int, per_half: int, cache: Path | None) -> VirtualField:
    """Render a field, or take it from the cache."""
    shots = shots_of(place.seed, per_half)
    file = None
    if cache is not None:
        drawn = draw(place.seed, place.kind, picture=place.picture).to_json()
        facts = [drawn, place.sparsity, shots, side, QUALITY, "refocus 2"]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        file = cache / f"{digest}.npy"
    if file is not None and file.is_file():
        frames = np.load(file)
    else:
        there = open_place(place, side)
        wanted = [m + s * h for h, m in shots for s in (-1, 1)] + [0.0] + [m for _, m in shots]
        made = [there.frame(z, k) for k, z in enumerate(wanted)]
        frames = np.stack([*made, there.frame(0.0, None)])
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".new.npy")
            np.save(temporary, frames)
            temporary.replace(file)
    n = 2 * len(shots)
    return VirtualField(place, shots, frames[:n], frames[n + 1 : -1], frames[-1], frames[n])


def virtual_fields(args: argparse.Namespace, wanted: Sequence[Place]) -> Iterator[VirtualField]:
    """The fields at these places, or at the next ones that have such a field."""
    start = time.perf_counter()
    for k, candidates in enumerate(tried(wanted), 1):
        found = first_of(
            candidates,
            lambda place: virtual_field(place, args.frame, args.per_half, args.cache),
        )
        seconds = time.perf_counter() - start
        print(f"{k}/{len(wanted)}  {found.group}  {seconds:.0f} s", flush=True)
        yield found


def tuned_wiener(cache: Path | None) -> Wiener:
    """The Wiener filter, its setting chosen on slides of the seeds of the training."""
    kinds = ("tissue", "smear", "tissue", "picture")

    def pairs() -> Iterator[Any]:
        spots = [
            Place(TUNED_SEED + 20 * k, kinds[k % len(kinds)], "", CLASSES[k % len(CLASSES)])
            for k in range(TUNED_FIELDS)
        ]
        for candidates in tried(spots):
            found = first_of(candidates, lambda p: virtual_field(p, TUNED_PX, 1, cache))
            for case in found.cases():
                shots = two_shots(case.lower, case.upper, case.asked_um, OPTICS, FULL)
                yield shots, planes_of(case.truth, FULL)

    return Wiener.fit(pairs(), HALVES_UM)


class OneShot:
    """A net for one shot, where no other one was taken: it sees the lower one.

    At run time such a net is shown the sharper one of both, and that takes two exposures.
    """

    def __init__(self, model: RefocusModel) -> None:
        self.model, self.card = model, model.card

    def recover(self, lower: Any, upper: Any, **known: Any) -> Recovery:
        return self.model.recover(lower, lower, **known)


def models_of(args: argparse.Namespace) -> tuple[RefocusModel, dict[str, Any]]:
    """The model that is judged, and others by the names in the table."""

    def load(path: str) -> RefocusModel:
        return load_refocus_model(path, threads=args.threads)

    others: dict[str, Any] = {}
    if args.unet:
        unet = load(args.unet)
        others |= {ONE_SHOT: OneShot(unet), OF_SHARPER: unet}
    for path in args.other:
        other = load(path)
        others[other.card.name] = other
    return load(args.model), others


class Noisy:
    """Compares with the frame in focus that the camera would have given, too (`watch`).

    And asks what one exposure at F would have given, where no second one is needed.
    """

    def __init__(self, unet: OneShot | None) -> None:
        self.field: VirtualField | None = None
        self.rows: list[PairRow] = []
        self.own: dict[str, float] = {}
        self.unet = unet
        self.once: list[list[float]] = []

    def __call__(self, case: Case, images: Mapping[str, Any], row: PairRow) -> None:
        assert self.field is not None
        truth = self.field.noisy
        if self.unet is not None:
            off = np.abs(np.array(self.field.shots) - (case.asked_um, case.middle_um)).sum(1)
            once = self.field.middles[int(off.argmin())]
            seen = self.unet.recover(once, once).image
            self.once += [[psnr_db(i, case.truth, FULL) for i in (once, seen)]]
        self.own[row.field] = psnr_db(truth, case.truth, FULL)
        found = {k: psnr_db(i, truth, FULL) for k, i in images.items()}
        self.rows.append(replace(row, psnr_db=found))


def run(args: argparse.Namespace) -> str:
    """Judge the models; return the text of the section."""
    model, others = models_of(args)
    wiener = tuned_wiener(args.cache)
    noisy = Noisy(others.get(ONE_SHOT))
    start = time.perf_counter()

    def cases() -> Iterator[Case]:
        for found in virtual_fields(args, places(args.fields, args.data / "textures")):
            noisy.field = found
            yield from found.cases()

    judged = evaluate_refocus(
        model, cases(), baselines_of(REFOCUS_BASELINES, wiener), others=others, watch=noisy
    )
    return _section(judged, noisy, wiener, args, time.perf_counter() - start)


def _section(
    judged: RefocusEvaluation,
    noisy: Noisy,
    wiener: Wiener,
    args: argparse.Namespace,
    seconds: float,
) -> str:
    kinds = sorted({r.field.partition("/")[0] for r in judged.rows})
    fields = len({r.field for r in judged.rows})
    chosen = ", ".join(
        f"± {h:g} µm: {s.blur:g} µm and {s.balance:g}" for h, s in wiener.settings.items()
    )
    document = judged.to_json()
    again = replace(judged, rows=noisy.rows)
    lines = [
        f"**Simulated.** {fields} fields of {args.frame}² pixels, each on a virtual slide, "
        "under a lens and in front of a camera of its own, with seeds that training does not "
        f"use ({', '.join(kinds)}), 20×/0.75. Shots with the camera's noise, {args.per_half} "
        "pairs of each field at each distance; their middle is off focus by N(0, 1 µm), cut at "
        "± 2.5 µm. The truth is the frame at focus (Brenner's measure of the noiseless image) "
        "through the same camera without its noise. PSNR of whole RGB frames of 8 bits; in "
        "brackets 95 % by drawing fields (bootstrap). Wiener: defocus of its point spread "
        f"function and balance by the PSNR on {TUNED_FIELDS} fields of training seeds "
        f"({chosen}).",
        "",
        f"{command_line('virtual-slide', args)} ({seconds / 60:.0f} minutes)",
        "",
        *markdown(refocus_heads(judged), refocus_table(judged)),
        "",
        "SSIM:",
        "",
        *markdown(*ssim_table(judged)),
        "",
        *marks(judged, args.unet is not None),
        "",
        *_once(noisy),
        f"A frame that the camera takes at focus itself differs from the truth by its noise: "
        f"{np.mean(list(noisy.own.values())):.2f} dB on average over the fields. Against such "
        "frames as the truth, as in the paper, whose noise nothing can recover:",
        "",
        *markdown(*_psnr_alone(again)),
        "",
        *_by_class(judged),
        "",
        *_by_middle(judged),
        "",
        *(f"{s}  " for s in refocus_sentences(document, judged.name)),
    ]
    return "\n".join(lines)


def command_line(part: str, args: argparse.Namespace) -> str:
    """The command of this run, to be typed again."""
    words = [f"--part {part}", f"--model {Path(args.model).name}"]
    words += [f"--unet {Path(args.unet).name}"] if args.unet else []
    words += [f"--other {Path(o).name}" for o in args.other]
    words += [f"--fields {args.fields} --per-half {args.per_half} --frame {args.frame} --write"]
    return f"`python benchmarks/refocus_quality.py {' '.join(words)}`"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _once(noisy: Noisy) -> list[str]:
    """What the rows of the U-Net are, and what one exposure at F would have given."""
    if noisy.unet is None:
        return []
    raw, seen = np.mean(noisy.once, 0)
    return [
        f"{ONE_SHOT}: shown the lower shot and no other, as the paper's baseline is shown one "
        f"image at an offset. {OF_SHARPER}: the same net, shown the sharper one; that takes "
        "both exposures, and much of what the second one tells is told by this choice. (It "
        "learned from either shot.) A single exposure need not lie ΔD beside F: at F itself, "
        f"off by the same N(0, 1 µm), it has {raw:.2f} dB as it is and {seen:.2f} dB through "
        "the U-Net.",
        "",
    ]


def ssim_table(judged: RefocusEvaluation) -> tuple[list[str], list[list[str]]]:
    heads = ["SSIM", *(f"± {h:g} µm" for h in judged.halves_um), "all ± SD"]
    rows = []
    for method in judged.methods:
        every = figures(judged.rows, method)
        cells = [number(figures(judged.at(h), method)["ssim"], 4) for h in judged.halves_um]
        spread = f"{number(every['ssim'], 4)} ± {number(every['ssim_std'], 4)}"
        rows.append([name_of(method), *cells, spread])
    return heads, rows


def _psnr_alone(judged: RefocusEvaluation) -> tuple[list[str], list[list[str]]]:
    """Of the table, what comes before the SSIM."""
    heads = refocus_heads(judged)
    some = heads.index("SSIM")
    return heads[:some], [row[:some] for row in refocus_table(judged)]


def marks(judged: RefocusEvaluation, unet: bool) -> list[str]:
    """What was asked for, what was found, and whether that is it."""
    name = judged.name
    lines = []
    for other in judged.methods:
        if other == name:
            continue
        gains = {h: gain(judged.at(h), name, other)["gain_db"] for h in judged.halves_um}
        least = min(gains, key=lambda h: gains[h])
        found = f"{gains[least]:+.2f} dB at ± {least:g} µm is the least"
        lines.append(
            [f"above: {name_of(other)}", "> 0 dB at each ΔD", found, _yes(gains[least] > 0)]
        )
    if unet:
        over = gain(judged.rows, name, ONE_SHOT)
        lines.append(
            [
                f"over the {ONE_SHOT}, on average",
                f"≥ +{UNET_DB:g} dB",
                f"{extent(over)} dB",
                _yes(over["gain_db"] >= UNET_DB),
            ]
        )
    for h in judged.halves_um:
        if h >= SHARPER_FROM_UM:
            over = gain(judged.at(h), name, SHARPER)
            lines.append(
                [
                    f"over the sharper shot at ± {h:g} µm",
                    f"≥ +{SHARPER_DB:g} dB",
                    f"{extent(over)} dB",
                    _yes(over["gain_db"] >= SHARPER_DB),
                ]
            )
    return markdown(["mark", "asked for", "found", "met"], lines)


def _yes(good: bool) -> str:
    return "yes" if good else "**missed**"


def _by_class(judged: RefocusEvaluation) -> list[str]:
    heads = ["fields", "pairs", *(name_of(m) for m in judged.methods), "gain ± 95 %", "worse"]
    groups: dict[str, list[PairRow]] = {}
    for r in judged.rows:
        groups.setdefault(CLASS_NAMES[r.sparsity.replace("-", "_")], []).append(r)
    for r in judged.rows:
        groups.setdefault(r.field.partition("/")[0], []).append(r)
    return ["PSNR by class of the field, and by slide:", "", *_groups(judged, heads, groups)]


def _by_middle(judged: RefocusEvaluation) -> list[str]:
    heads = ["shots", "pairs", *(name_of(m) for m in judged.methods), "gain ± 95 %", "worse"]
    groups = {
        "enclose focus": [r for r in judged.rows if r.enclosed],
        "do not": [r for r in judged.rows if not r.enclosed],
    }
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.5, 2.51)):
        some = [r for r in judged.rows if low <= abs(r.middle_um) < high]
        groups[f"middle off by {low:g}–{high:.1f} µm"] = some
    return ["PSNR by where focus lies:", "", *_groups(judged, heads, groups)]


def _groups(
    judged: RefocusEvaluation, heads: list[str], groups: Mapping[str, Sequence[PairRow]]
) -> list[str]:
    rows = []
    for title, some in groups.items():
        if some:
            cells = [number(figures(some, m)["psnr_db"]) for m in judged.methods]
            worse = share(figures(some, judged.name)["worse"])
            over = extent(gain(some, judged.name, SHARPER))
            rows.append([title, str(len(some)), *cells, over, worse])
    return markdown(heads, rows)
