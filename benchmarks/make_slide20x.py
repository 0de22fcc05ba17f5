"""Make the models of the virtual slide that the package ships: collect, train, export.

    python benchmarks/make_slide20x.py -o FOLDER [--stacks 5000] [--jobs 2]

It takes stacks on virtual slides under lenses drawn by lot (`mm_autofocus.sim.draws`, seeds of
training only) by the same `collect` that a lab uses, and then runs the shipped commands
``train``, ``export`` and ``evaluate``. On two cores the stacks take less than an hour; each
step goes on where it was interrupted. The data stay in FOLDER (some 6 MB a stack).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core while collecting

import cv2
import numpy as np
import skimage
import useq
from mm_autofocus.config import close_core, open_core
from mm_autofocus.errors import InputError
from mm_autofocus.sim.draws import TRAINING_SEEDS, draw
from mm_autofocus.sim.microscope import Microscope
from mm_autofocus.sim.truth import microscope_of
from mm_autofocus.training.collect import collect
from mm_autofocus.training.dataset import read_meta

# Relative to the middle of the specimen. Every second one has a partner 4 µm above for two
# looks; near focus they are dense enough for the label.
PLANES_UM = sorted({*range(-26, 31, 2), -3, -1, 1, 3})
FIRST_SEED = 1000
PIXEL_UM = 0.325
OPTICS = {"na": 0.75, "magnification": 20}

# Real pictures that come with scikit-image: one of tissue, and some that are none, as
# textures that the generators of the slide do not make.
PICTURES = Path(skimage.__file__).parent / "data"
TISSUE_PICTURE = ""
OTHER_PICTURES = ("coffee.png", "retina.jpg", "grass.png", "gravel.png")
KINDS = (("tissue", 0.55), ("smear", 0.17), ("tissue picture", 0.16), ("other picture", 0.12))

MODELS = {"sparsefocus-slide20x": "0", "sparsefocus-slide20x-two-look": "0,4"}
"""Name and looks of each."""

TRAIN = {
    "split_by": "slide",
    "range_um": [-26, 26],
    "batch": 64,
    "ema": 0.998,
    "near_share": 0.12,
    "patches_per_stack": 4,
    "validation_patches": 1,
    "validation_planes": 6,
    "validation_most": 500,
    # a blank field is bright already: more would only saturate
    "augment.brightness": [0.9, 1.15],
    "augment.contrast": [0.8, 1.2],
    "augment.saturation": [0.8, 1.25],
    "epochs": 1000,  # the minutes end it
}
# Small patches first: twice as many fit into an hour. Then nearly as large as at run time.
STAGES = (
    {"train_px": 160, "lr": 0.002, "warmup": 0.1},
    {"train_px": 192, "lr": 0.001, "warmup": 0.03},
)


def kind_of(rng: np.random.Generator) -> tuple[str, str]:
    """Draw a kind of slide and its picture."""
    name = str(rng.choice([k for k, _ in KINDS], p=[p for _, p in KINDS]))
    if name == "tissue picture":
        return "picture", TISSUE_PICTURE
    if name == "other picture":
        return "picture", str(PICTURES / str(rng.choice(OTHER_PICTURES)))
    return name, ""


def places(scope: Microscope, rng: np.random.Generator, px: int) -> list[dict[str, object]]:
    """Fields of all sparsities, somewhere on the slide, near their focus."""
    edge = px * PIXEL_UM
    many, blank = (2, 1) if px > 256 else (5, 0)
    wanted = {"dense": many, "sparse": many, "extremely-sparse": many, "blank": blank}
    found: list[dict[str, object]] = []
    for kind, n in wanted.items():
        start = (float(rng.uniform(-3000, 3000)), float(rng.uniform(-3000, 3000)))
        try:
            fields = (
                scope.slide.find_fields(kind, n, (edge, edge), start=start, max_fields=4000)
                if n
                else []
            )
        except InputError:
            continue  # some pictures leave no such field
        for x, y in fields:
            # phase and spherical aberration move the sharpest plane below the middle
            z = scope.slide.height_at(x, y) + float(rng.uniform(-2.0, 0.2))
            found.append({"x": x, "y": y, "z": z, "name": f"{kind}{len(found):02d}"})
    return found


def collect_share(folder: Path, stacks: int, job: int, jobs: int) -> None:
    """Collect one process's share of the stacks into a dataset of its own."""
    cv2.setNumThreads(1)
    known = set()
    if (folder / "dataset.json").is_file():
        # the last one may not be whole
        known = set(list(read_meta(folder)["slides"])[:-1])
    core = open_core("virtual_slide.cfg")
    done = 0
    try:
        scope = microscope_of(core)
        for seed in range(FIRST_SEED + job, TRAINING_SEEDS[-1], jobs):
            if done >= stacks / jobs:
                return
            rng = np.random.default_rng([seed, 5])
            kind, picture = kind_of(rng)
            draw(seed, kind, picture=picture).apply(scope)
            px = 512 if rng.uniform() < 0.2 else 256
            core.setProperty("Camera", "sensor", f"{px}x{px}")
            slide = f"{kind}-{seed}"
            fields = places(scope, rng, px)
            if slide not in known:
                plan = useq.MDASequence(
                    stage_positions=fields,
                    z_plan=useq.ZRelativePositions(relative=PLANES_UM),
                )
                collect(plan, core, folder, slide=slide, optics=OPTICS, simulated=True)
            done += len(fields)
            print(f"job {job}: slide {slide}, {done} stacks", flush=True)
    finally:
        close_core(core)


def command(*args: object) -> None:
    """Run a shipped command, and stop if it fails."""
    words = [*map(str, args)]
    print("$ mm-autofocus", *words, flush=True)
    own = Path(sys.executable).with_name("mm-autofocus")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    subprocess.run([own, *words], check=True, env=environment)


def collect_all(output: Path, stacks: int, jobs: int) -> Path:
    """Collect in several processes, each into a dataset of its own, and join these."""
    dataset = output / "dataset"
    shares = [output / f"share{k}" for k in range(jobs)]
    own = [sys.executable, __file__, "-o", output, "--stacks", stacks, "--jobs", jobs, "--job"]
    workers = [subprocess.Popen([*map(str, own), str(k)]) for k in range(jobs)]
    codes = [worker.wait() for worker in workers]  # all of them, whichever fails first
    if any(codes):
        raise SystemExit("collecting failed")
    sources = [word for share in shares for word in ("--from", share)]
    command("collect", *sources, "-o", dataset)
    return dataset


def train_all(output: Path, dataset: Path, name: str, looks: str, minutes: float) -> Path:
    """Train in stages, each from the weights of the one before; return the last run."""
    before = run = None
    for number, stage in enumerate(STAGES, 1):
        run = output / f"{name}-{number}"
        sets = {**TRAIN, **stage, "max_minutes": minutes / len(STAGES)}
        if before is not None:
            sets["init"] = before
        words = [f"--set={key}={value}" for key, value in sets.items()]
        begun = (run / "last.ckpt").is_file()
        options = (
            ["--resume"] if begun else ["--model", "sparsefocus", "--looks", looks, *words]
        )
        command("train", dataset, "-o", run, *options)
        before = run
    assert run is not None
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder, ~6 MB a stack"
    )
    parser.add_argument("--stacks", type=int, default=5000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--minutes", type=float, default=240, help="of training, each model")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        collect_share(args.output / f"share{args.job}", args.stacks, args.job, args.jobs)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    dataset = collect_all(args.output, args.stacks, args.jobs)
    for name, looks in MODELS.items():
        run = train_all(args.output, dataset, name, looks, args.minutes)
        model = args.output / f"{name}.onnx"
        licence = ("--licence", "BSD-3-Clause")
        command("export", run, "-o", model, "--name", name, *licence, "--overwrite")
        report = args.output / f"{name}-evaluation"
        command("evaluate", model, dataset, "-o", report, "--overwrite")


if __name__ == "__main__":
    main()
