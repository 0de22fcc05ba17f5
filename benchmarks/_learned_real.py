"""Learned focus on recorded images, by the commands that a lab would type."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.models.importing import load_model
from mm_autofocus.training import Dataset, Split, Stack
from mm_autofocus.training.dataset import META
from mm_autofocus.training.evaluate import evaluate
from mm_autofocus.training.evaluation_table import number, share
from mm_autofocus.training.store import DatasetWriter, optics_json
from mm_autofocus.types import Optics
from scipy.stats import spearmanr

LOOKS = [0.0, 4.0]
BRAIN_PX = 96  # edge of a patch; the frames have 128 pixels
BRAIN_UM = [-14, 12]  # what the stacks have, the second look included
METAL_PX, TILES = 224, 4
METAL_UM = 0.286


def command(*args: object) -> tuple[str, float]:
    """Run ``mm-autofocus``; stdout and seconds. Ends with its sentence if it fails."""
    words = [str(a) for a in args]
    print("  mm-autofocus " + " ".join(w for w in words if not w.endswith(".tif")), flush=True)
    start = time.perf_counter()
    program = [sys.executable, "-c", "from mm_autofocus.cli import main; main()"]
    done = subprocess.run([*program, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"mm-autofocus {words[0]} ended with {done.returncode}")
    return done.stdout, time.perf_counter() - start


def _sets(pairs: Sequence[str]) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def _flags(args: argparse.Namespace) -> str:
    """The options of this run, to be typed again."""
    words = ["--net", args.net]
    words += ["--minutes", f"{args.minutes:g}"] if args.minutes else []
    words += ["--folds", str(args.folds)] if args.folds else []
    words += ["--init", Path(args.init).name] if args.init else []
    words += [word for pair in args.set for word in ("--set", pair)]
    return " " + shlex.join(words)


# ---------------------------------------------------------------------------- brain


def brain(args: argparse.Namespace) -> str:
    """Collect, train, export, evaluate; return the text of the section."""
    files = sorted((args.data / "zstack_brain").glob("*.tif"))
    if not files:
        raise SystemExit(f"{args.data / 'zstack_brain'}: no stacks")
    lines = [
        f"{len(files)} stacks of one stained human brain section (grey, 128², 29 planes at "
        "1 µm; one scanner), split by stack; all figures are of stacks that the training did "
        "not see (part `test`). The focus is the label: the peak of the run-time measure. A "
        "thick section: the focus curve is a plateau of some µm.",
        "",
        "| looks | training | minutes | stacks | frames | not predicted | from … to, µm "
        "| MAE ± SD, µm | median | direction | direction beyond 2 µm |",
        "|---" * 11 + "|",
    ]
    texts = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "brain"
        _, seconds = command(
            "collect", "--from", files[0], *files[1:], "-o", data, "--step-um", 1,
            "--slide", "section", "--json",
        )  # fmt: skip
        texts.append(f"collect {seconds / 60:.1f} minutes")
        found, took = _trained(args, Path(folder), data)
        lines.append(_brain_line(args, found, took))
        print(lines[-1], flush=True)
        for other, figures in found["baselines"].items():
            if figures["mae_um"] is not None:
                looks = f", {figures['looks']:.1f} looks"
                texts.append(f"{other}: MAE {figures['mae_um']:.2f} µm{looks}")
        every = _folds(args, Path(folder), data) if args.folds else ""
        out, seconds = command("calibrate", data, "--json")
        sign = json.loads(out)["images"]["sign"]
    biases = [f["bias_um"] for f in found["fields"] if f["bias_um"] is not None]
    label = found["label_error_um"]
    lines += [
        "",
        f"Of the error, {np.mean(np.abs(biases)):.2f} µm on average is shared by all planes of "
        f"a stack, where the label itself is expected to be off by {label:.2f} µm (median): "
        "on a plateau there is no one true plane.",
        "",
        f"`calibrate` on the same stacks ({seconds / 60:.1f} minutes), held-out fields: "
        f"is the sign of defocus in one image? **{sign['verdict']}**: {sign['reason']}",
    ]
    lines += ["", "; ".join(texts) + ".", ""]
    lines += [every, ""] if every else []
    lines.append(f"`python benchmarks/learned.py --part brain{_flags(args)} --write`")
    lines.append("Marks: two looks, MAE ≤ 0.45 µm, direction ≥ 99.5 % beyond 2 µm, ± 12 µm.")
    return "\n".join(lines)


def _folds(args: argparse.Namespace, folder: Path, data: Path) -> str:
    """Train as often, so that each stack is held out once; say how all of them fare."""
    fields: list[dict[str, Any]] = []
    minutes = []
    names = np.array(sorted(s.group for s in Dataset.open(data).labelled))
    shuffled = names[np.random.default_rng(0).permutation(len(names))]
    parts = np.array_split(shuffled, args.folds)
    for k, held in enumerate(parts):
        check, rest = np.split(np.concatenate(parts[k + 1 :] + parts[:k]), [len(held) // 2])
        groups = {"train": rest, "validation": check, "test": held}
        shares = {part: len(some) / len(names) for part, some in groups.items()}
        _write_split(data, Split(0, "field", shares, {p: tuple(g) for p, g in groups.items()}))
        found, took = _trained(args, folder, data, str(k))
        fields += found["fields"]
        minutes.append(took)
    seen = [f for f in fields if f["n_predicted"]]
    if not seen:
        return f"**Each stack held out once**, by {args.folds} trainings: nothing predicted."
    errors = np.array([f["mae_um"] for f in seen])
    counts = np.array([f["n_predicted"] for f in seen])
    drawn = np.random.default_rng(0).integers(0, len(seen), (2000, len(seen)))
    spread = (errors * counts)[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(spread, [2.5, 97.5])
    far = np.array([f["n_far"] for f in fields])
    right = sum(f["n_far"] * (f["direction_success_far"] or 0) for f in fields)
    return (
        f"**Each stack held out once**, by {args.folds} trainings of {np.mean(minutes):.1f} "
        f"minutes: {len(seen)} stacks, {counts.sum()} frames, "
        f"{sum(f['n'] - f['n_predicted'] for f in fields)} not predicted, MAE "
        f"**{np.average(errors, weights=counts):.2f} µm** ({low:.2f} … {high:.2f}, 95 % by "
        f"drawing stacks), direction beyond 2 µm {share(right / far.sum())} of {far.sum()}."
    )


def _brain_line(args: argparse.Namespace, found: dict[str, Any], minutes: float) -> str:
    low, high = found["defocus_range_um"]
    cells = [
        "0 and +4 µm",
        args.net + (f", {args.minutes:g} minutes asked for" if args.minutes else ""),
        f"{minutes:.1f}",
        str(found["stacks"]),
        str(found["n"]),
        str(found["n"] - found["n_predicted"]),
        f"{low:+.1f} … {high:+.1f}",
        f"{number(found['mae_um'])} ± {number(found['mae_std_um'])}",
        number(found["median_um"]),
        share(found["direction_success"]),
        f"{share(found['direction_success_far'])} of {found['n_far']}",
    ]
    return f"| {' | '.join(cells)} |"


def _trained(
    args: argparse.Namespace, folder: Path, data: Path, name: str = ""
) -> tuple[dict[str, Any], float]:
    run = folder / f"run{name}"
    options = [f"looks_um={json.dumps(LOOKS)}", f"patch_px={BRAIN_PX}", "patches_per_stack=40"]
    options.append(f"range_um={json.dumps(BRAIN_UM)}")
    options += [f"max_minutes={args.minutes}"] if args.minutes else []
    _, training = command(
        "train", data, "--model", args.net, "-o", run, *_sets([*options, *args.set])
    )
    model = folder / f"brain{name}.onnx"
    _, export = command("export", run, "-o", model)
    out, _ = command("evaluate", model, data, "--json", "--part", "test")
    return json.loads(out), (training + export) / 60


# ---------------------------------------------------------------------------- metal


def metal_dataset(source: Path, folder: Path) -> Dataset:
    """Both fields, each cut into tiles, as a dataset; z = 0 of the files is the label."""
    writer = DatasetWriter(folder, FocusMeasure())
    writer.begin("metal", {"plan": None})
    with (source / "index.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for name in sorted({r["field"] for r in rows}):
        of_field = sorted(
            (r for r in rows if r["field"] == name), key=lambda r: float(r["z_um"])
        )
        z = tuple(round(float(r["z_um"]), 4) for r in of_field)
        images = [_read(source / r["file"]) for r in of_field]
        side = min(min(i.shape[:2]) for i in images) // TILES
        for k in range(TILES * TILES):
            y, x = side * (k // TILES), side * (k % TILES)
            stack = np.stack([i[y : y + side, x : x + side] for i in images])
            file_name = f"stacks/{name}-{k:02d}.ome.tiff"
            tifffile.imwrite(
                folder / file_name,
                stack,
                ome=True,
                photometric="rgb",
                metadata={"axes": "ZYXS"},
            )
            writer.append(
                Stack(
                    folder=folder,
                    file=file_name,
                    slide=name,
                    field=f"{k:02d}",
                    z_um=z,
                    pages=tuple(range(len(z))),
                    shape=stack.shape,
                    dtype="uint8",
                    label="ok",
                    focus_z_um=0.0,
                    quality={"expected_error_um": 1.0},
                    sparsity="dense",
                    bit_depth=8,
                    optics=optics_json(Optics(pixel_size_um=METAL_UM)),
                )
            )
    return writer.dataset()


def _read(path: Path) -> np.ndarray:
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise SystemExit(f"{path}: cannot be read")
    return np.ascontiguousarray(bgr[..., ::-1])


def _split_for(data: Dataset, learn: str) -> None:
    """Train on one field, a quarter of its tiles for validation; test on the other."""
    names = sorted(s.group for s in data.stacks if s.slide == learn)
    groups = {
        "train": tuple(n for k, n in enumerate(names) if k % 4),
        "validation": tuple(names[::4]),
        "test": tuple(sorted(s.group for s in data.stacks if s.slide != learn)),
    }
    shares = {"train": 0.375, "validation": 0.125, "test": 0.5}
    _write_split(data.path, Split(0, "field", shares, groups))


def _write_split(data: Path, split: Split) -> None:
    meta = {**Dataset.open(data, labels=False).meta, "split": split.to_json()}
    (data / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def metal(args: argparse.Namespace) -> str:
    """Train on one field and test on the other, both ways; return the text of the section."""
    source = args.data / "zseries_metal"
    if not (source / "index.csv").is_file():
        raise SystemExit(f"{source}: no index.csv")
    start = "from scratch" if args.init is None else f"fine-tuned from `{Path(args.init).name}`"
    lines = [
        "Two fields of metal pads in reflected light (RGB, 1024², 11 planes each at random "
        f"signed z within ± 50 µm), one look, `{args.net}` {start}, trained on the {TILES}² "
        "tiles of one field and tested on the other. One plane is one prediction: the median "
        f"of its {TILES}² tiles. 11 planes are few, and tiles of one plane are not "
        "independent: reported as it is.",
        "",
        "| trained on → tested on | minutes | planes | right sign "
        "| rank correlation (Spearman) | MAE, µm | predict 0 | right sign, single tiles |",
        "|---" * 8 + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = metal_dataset(source, Path(folder) / "metal")
        slides = sorted({s.slide for s in data.stacks})
        for learn in slides:
            _split_for(data, learn)
            lines.append(_metal_line(args, Path(folder), data, learn))
            print(lines[-1], flush=True)
    lines += ["", f"`python benchmarks/learned.py --part metal{_flags(args)} --write`"]
    return "\n".join(lines)


def _metal_line(args: argparse.Namespace, folder: Path, data: Dataset, learn: str) -> str:
    run, model = folder / f"run-{learn}", folder / f"metal-{learn}.onnx"
    options = [f"patch_px={METAL_PX}", "range_um=[-50, 50]"]
    options += [f"max_minutes={args.minutes}"] if args.minutes else []
    options += [f"init={args.init}"] if args.init else []
    _, seconds = command(
        "train", data.path, "--model", args.net, "-o", run, *_sets([*options, *args.set])
    )
    command("export", run, "-o", model)
    test = Dataset.open(data.path).part("test")
    found = evaluate(load_model(model), test, zero=False, range_um=(-51.0, 51.0))
    planes: dict[int, list[Any]] = {}
    for row in found.model.rows:
        planes.setdefault(row.plane, []).append(row)
    true = np.array([rows[0].true_um for rows in planes.values()])
    said = np.array(
        [
            np.median([0.0 if r.predicted_um is None else r.predicted_um for r in rows])
            for rows in planes.values()
        ]
    )
    right = int((np.sign(said) == np.sign(true)).sum())
    rho, p = spearmanr(said, true)
    single = replace(found).to_json()["direction_success"]
    other = test[0].slide
    return (
        f"| {learn} → {other} | {seconds / 60:.1f} | {len(true)} | {right} of {len(true)} | "
        f"{rho:.2f} (p = {p:.2g}) | {np.abs(said - true).mean():.1f} | "
        f"{np.abs(true).mean():.1f} | {100 * single:.0f} % |"
    )
