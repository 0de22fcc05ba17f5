"""Stacks on virtual slides under lenses drawn by lot, by the `collect` that a lab uses.

What the scripts share that make the shipped models. Only seeds of training are used.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core while collecting

import cv2
import numpy as np
import skimage
import useq
from mm_autofocus.config import close_core, open_core
from mm_autofocus.errors import InputError
from mm_autofocus.models.lens import LENS_NAMES
from mm_autofocus.sim import draws
from mm_autofocus.sim.draws import TRAINING_SEEDS, draw
from mm_autofocus.sim.microscope import Microscope
from mm_autofocus.sim.slide import read_picture
from mm_autofocus.sim.truth import microscope_of
from mm_autofocus.training.collect import collect
from mm_autofocus.training.dataset import read_meta

PIXEL_UM = 0.325
OPTICS = {"na": 0.75, "magnification": 20}
# what a net may be told of, and what theory draws from (`training.options.TheoryOptions`):
# that of which stacks are drawn
LENS = {key: draws.OPTICS[key] for key in LENS_NAMES}
THEORY = {**LENS, "thickness_um": draws.SLIDE["thickness_um"]}

# Real pictures that come with scikit-image: one of tissue, and some that are none, as
# textures that the generators of the slide do not make.
PICTURES = Path(skimage.__file__).parent / "data"
TISSUE_PICTURE = ""
OTHER_PICTURES = ("coffee.png", "retina.jpg", "grass.png", "gravel.png")
SPARSITIES = ("dense", "sparse", "extremely-sparse")
_LEAST_PICTURE_PX = 400  # that pictures are made smaller to
_MOST_PICTURE_PX = 1200  # that are cut out of larger ones
_PIECE_PX = 512  # edge of what counts as one picture
_NO_BLUR_PX = 0.05
_SAMPLING = (
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
)
KINDS = (("tissue", 0.55), ("smear", 0.17), ("tissue picture", 0.16), ("other picture", 0.12))


@dataclass(frozen=True)
class Recipe:
    """What is collected.

    Attributes
    ----------
    planes_um : sequence of float
        Relative to about the middle of the specimen.
    first_seed : int
        Of the slides; each slide has the next one.
    fields : dict
        Edge of the frames to how many fields of each sparsity, and how many blank ones.
    one_sparsity : bool
        Of each slide with the smaller frames, fields of one sparsity by lot, not of each: as
        many stacks then stand under three times as many lenses.
    large : float
        Share of the slides whose frames have the larger edge.
    offset_um : (float, float)
        The stacks begin at a random z in this range about the middle.
    pictures : tuple of str
        Those of `PICTURES` that are no tissue, and others by their whole path.
    blur_px, aside_px : float
        Each colour of a picture is blurred by up to so much (standard deviation), and moved
        aside by chance (standard deviation along each axis up to so much): lenses that
        photographs were taken by favour one colour or another, and few pictures all the same.
    raised : float
        Of half of the pictures what is fine is raised, by up to so much of it.
    quality : (int, int) or None
        Half of the pictures are compressed (JPEG), with a quality in this range.
    """

    planes_um: tuple[float, ...]
    first_seed: int
    fields: dict[int, tuple[int, int]]
    large: float
    offset_um: tuple[float, float]
    one_sparsity: bool = False
    pictures: tuple[str, ...] = OTHER_PICTURES
    blur_px: float = 0.0
    aside_px: float = 0.0
    raised: float = 0.0
    quality: tuple[int, int] | None = None


def with_photographs(recipe: Recipe, args: argparse.Namespace) -> Recipe:
    """Add the pictures of a folder, a large one as often as it has pieces.

    Raises
    ------
    SystemExit
        There is none, or one cannot be read: before anything is collected.
    """
    if args.photographs is None:
        return recipe
    kinds = (".jpg", ".jpeg", ".png", ".svs", ".tif", ".tiff")
    files = sorted(p for p in args.photographs.glob("*") if p.suffix.lower() in kinds)
    if not files:
        allowed = ", ".join(kinds)
        raise SystemExit(f"--photographs {args.photographs}: no picture in it ({allowed})")
    pictures = list(recipe.pictures)
    for file in files:
        try:
            height, width, _ = read_picture(str(file)).shape
        except InputError as error:
            raise SystemExit(f"--photographs: {error}") from None
        pictures += max(1, round(height * width / _PIECE_PX**2)) * [str(file.resolve())]
    return replace(recipe, pictures=tuple(pictures))


def photographed(picture: str, recipe: Recipe, rng: np.random.Generator, path: Path) -> str:
    """Write a picture as another lens and another scanner would have shown it; return where.

    A piece of it, if it is large. It is made smaller (cameras interpolate colours, and
    compression leaves blocks of 8 pixels: little of either is left at half the size); its
    colours are blurred and moved aside, what is fine is raised, as scanners do, and it is
    compressed, its colours coarser than its light.
    """
    read = read_picture(picture)
    y, x = (int(rng.integers(0, max(0, n - _MOST_PICTURE_PX) + 1)) for n in read.shape[:2])
    read = read[y : y + _MOST_PICTURE_PX, x : x + _MOST_PICTURE_PX]
    # the smaller a picture, the sooner its mirror images follow
    least = min(1.0, max(0.5, _LEAST_PICTURE_PX / min(read.shape[:2])))
    scale = rng.uniform(least, 1)
    if scale < 1:
        soft = cv2.GaussianBlur(read, (0, 0), 0.3 + 0.9 * (1 / scale - 1))
        read = cv2.resize(soft, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    blurs = rng.uniform(_NO_BLUR_PX, max(_NO_BLUR_PX, recipe.blur_px), 3)
    moves = rng.normal(0, 1, (3, 2)) * rng.uniform(0, recipe.aside_px)
    shown = []
    for colour, blur, (x, y) in zip(cv2.split(read), blurs, moves, strict=True):
        size, move = colour.shape[::-1], np.array([[1, 0, x], [0, 1, y]])
        moved = cv2.warpAffine(
            colour, move, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
        )
        shown.append(cv2.GaussianBlur(moved, (0, 0), blur))
    seen = cv2.merge(shown)
    raised = max(0.0, rng.uniform(-1, 1)) * recipe.raised
    soft = cv2.GaussianBlur(seen, (0, 0), rng.uniform(0.7, 1.5))
    seen = cv2.addWeighted(seen, 1 + raised, soft, -raised, 0)
    if recipe.quality is not None and rng.uniform() < 0.5:
        how = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(*recipe.quality))]
        how += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, int(rng.choice(_SAMPLING))]
        seen = cv2.imdecode(cv2.imencode(".jpg", seen[..., ::-1], how)[1], cv2.IMREAD_COLOR)
        seen = seen[..., ::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), seen[..., ::-1])
    return str(path)


def kind_of(rng: np.random.Generator, pictures: Sequence[str]) -> tuple[str, str]:
    """Draw a kind of slide and its picture, of these where it is none of tissue."""
    name = str(rng.choice([k for k, _ in KINDS], p=[p for _, p in KINDS]))
    if name == "tissue picture":
        return "picture", TISSUE_PICTURE
    if name == "other picture":
        return "picture", str(PICTURES / str(rng.choice(pictures)))
    return name, ""


def places(
    scope: Microscope, rng: np.random.Generator, px: int, recipe: Recipe
) -> list[dict[str, object]]:
    """Fields of all sparsities, somewhere on the slide, near their focus."""
    edge = px * PIXEL_UM
    many, blank = recipe.fields[px]
    wanted = dict.fromkeys(SPARSITIES, many)
    if recipe.one_sparsity and px == min(recipe.fields):
        wanted = {str(rng.choice(SPARSITIES)): many}
    wanted["blank"] = blank
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
            z = scope.slide.height_at(x, y) + float(rng.uniform(*recipe.offset_um))
            found.append({"x": x, "y": y, "z": z, "name": f"{kind}{len(found):02d}"})
    return found


def collect_share(recipe: Recipe, folder: Path, stacks: int, job: int, jobs: int) -> None:
    """Collect one process's share of the stacks into a dataset of its own."""
    cv2.setNumThreads(1)
    known = set()
    if (folder / "dataset.json").is_file():
        # the last one may not be whole
        known = set(list(read_meta(folder)["slides"])[:-1])
    core = open_core("virtual_slide.cfg")
    # Two looks 4 µm apart tell the defocus by how much more one is blurred than the other: a
    # stage that comes to rest 0.15 µm beside would teach 5 % of the defocus as noise.
    for play in ("backlash_um", "repeatability_um", "drift_um_h"):
        core.setProperty("Z", play, 0)
    small, large = min(recipe.fields), max(recipe.fields)
    done = 0
    try:
        scope = microscope_of(core)
        for seed in range(recipe.first_seed + job, TRAINING_SEEDS[-1], jobs):
            if done >= stacks / jobs:
                return
            rng = np.random.default_rng([seed, 5])
            kind, picture = kind_of(rng, recipe.pictures)
            given = bool(picture) and not Path(picture).is_relative_to(PICTURES)
            if kind == "picture" and (recipe.blur_px or given):
                file = folder.with_name("pictures") / f"{seed}.png"
                picture = photographed(picture, recipe, rng, file)
            drawn = draw(seed, kind, picture=picture)
            drawn.apply(scope)
            px = large if rng.uniform() < recipe.large else small
            core.setProperty("Camera", "sensor", f"{px}x{px}")
            slide = f"{kind}-{seed}"
            fields = places(scope, rng, px, recipe)
            if slide not in known:
                plan = useq.MDASequence(
                    stage_positions=fields,
                    z_plan=useq.ZRelativePositions(relative=list(recipe.planes_um)),
                )
                lens = {name: drawn.optics.lens[name] for name in LENS_NAMES}
                collect(
                    plan, core, folder, slide=slide, optics=OPTICS, lens=lens, simulated=True
                )
            done += len(fields)
            print(f"job {job}: slide {slide}, {done} stacks", flush=True)
        raise SystemExit(
            f"first_seed {recipe.first_seed}: the seeds of training end at "
            f"{TRAINING_SEEDS[-1]}, after {done} of {stacks // jobs} stacks"
        )
    finally:
        close_core(core)


def command(*args: object) -> None:
    """Run a shipped command, and stop if it fails."""
    words = [*map(str, args)]
    print("$ mm-autofocus", *words, flush=True)
    own = Path(sys.executable).with_name("mm-autofocus")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    subprocess.run([own, *words], check=True, env=environment)


def collect_all(output: Path, jobs: int) -> Path:
    """Collect in several processes of the script, each into its own dataset; join these."""
    dataset = output / "dataset"
    shares = [output / f"share{k}" for k in range(jobs)]
    own = [sys.executable, *sys.argv, "--jobs", str(jobs), "--job"]
    workers = [subprocess.Popen([*own, str(k)]) for k in range(jobs)]
    codes = [worker.wait() for worker in workers]  # all of them, whichever fails first
    if any(codes):
        raise SystemExit("collecting failed")
    sources = [word for share in shares for word in ("--from", share)]
    command("collect", *sources, "-o", dataset)
    return dataset


def train_stages(
    output: Path,
    dataset: Path,
    name: str,
    net: Sequence[str],
    stages: Sequence[dict[str, object]],
) -> Path:
    """Train in stages, each from the weights of the one before; return the last run.

    Parameters
    ----------
    output, dataset : Path
        Folder of the runs; what they learn from.
    name : str
        Of the model.
    net : sequence of str
        Words of the command that say what is trained.
    stages : sequence of dict
        Options of each.
    """
    before = run = None
    for number, stage in enumerate(stages, 1):
        run = output / f"{name}-{number}"
        sets = stage if before is None else {**stage, "init": before}
        words = [f"--set={key}={value}" for key, value in sets.items()]
        begun = (run / "last.ckpt").is_file()
        command("train", dataset, "-o", run, *(["--resume"] if begun else [*net, *words]))
        before = run
    assert run is not None
    return run


def arguments(summary: str, *, stacks: int, minutes: float, size: str) -> argparse.Namespace:
    """Read the command line that the scripts share."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("-o", "--output", type=Path, required=True, help=f"folder, {size}")
    parser.add_argument("--stacks", type=int, default=stacks)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--photographs", type=Path, help="folder of further pictures to make specimens of"
    )
    parser.add_argument("--minutes", type=float, default=minutes, help="of training, each")
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()
