"""What a net that recovers the sharp image is trained on: two shots, and the plane in focus.

As in the two-shot paper: the shots lie half a distance below and above a middle that is off
the focus of the field by a normal random number, for the focus was found at another tile.
The truth is the plane in focus; of thick tissue, which has none, it may be a fusion of the
planes about it (`mm_autofocus.models.fusion`). Like all samples they are a pure function of
the seed, the epoch and their number. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.fusion import fuse, sharper_of
from mm_autofocus.training.augment import AugmentOptions, augment
from mm_autofocus.training.fields import Field, read_looks
from mm_autofocus.training.planes import PlaneReader
from mm_autofocus.training.samples import Source, corner_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.training.options import PairOptions
    from mm_autofocus.training.stack import Stack

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = [
    "Pair",
    "PairSource",
    "Truths",
    "decibels",
    "draw_pair",
    "pair_near",
    "read_pair",
    "validation_pairs",
]

_TRIES = 50
_LEAST_SQUARE = 1e-9
_TRUTH_STEPS = 0.75  # of the planes' distance: how far off focus a truth may be


@dataclass(frozen=True, slots=True)
class Pair:
    """Two shots of a field.

    Attributes
    ----------
    field : int
        Its number among the fields.
    lower, upper : int
        Numbers of the planes.
    lower_um, upper_um : float
        Their defocus, by the label.
    """

    field: int
    lower: int
    upper: int
    lower_um: float
    upper_um: float

    @property
    def half_um(self) -> float:
        """Half of their distance."""
        return (self.upper_um - self.lower_um) / 2

    @property
    def middle_um(self) -> float:
        """Defocus of their middle."""
        return (self.upper_um + self.lower_um) / 2

    def toward_um(self, side: int) -> float:
        """How far focus lies from one shot towards the other.

        Parameters
        ----------
        side : {1, -1}
            1: from the lower one; -1: from the upper one.
        """
        return -self.lower_um if side > 0 else self.upper_um


def decibels(square: npt.NDArray[np.float64] | float) -> npt.NDArray[np.float64]:
    """PSNR of mean square errors in parts of the range; 90 dB at most."""
    return -10 * np.log10(np.maximum(square, _LEAST_SQUARE))


def pair_near(
    defocus_um: npt.NDArray[np.float64],
    middle_um: float,
    half_um: float,
    tolerance_um: float,
    field: int = 0,
) -> Pair | None:
    """Two planes nearest to where shots would have been taken; None if there are none.

    Parameters
    ----------
    defocus_um : numpy.ndarray
        ``(Z,)`` of all planes.
    middle_um, half_um : float
        Of the shots.
    tolerance_um : float
        How far a plane may lie beside.
    field : int
        As it is noted.
    """
    wanted = (middle_um - half_um, middle_um + half_um)
    lower, upper = (int(np.abs(defocus_um - w).argmin()) for w in wanted)
    off = max(abs(defocus_um[k] - w) for k, w in zip((lower, upper), wanted, strict=True))
    if lower == upper or off > tolerance_um or defocus_um[lower] >= defocus_um[upper]:
        return None
    return Pair(field, lower, upper, float(defocus_um[lower]), float(defocus_um[upper]))


class Truths:
    """The sharp image of each field: its plane in focus, or a fusion that is kept on disk.

    The plane in focus is never one of the shots themselves: to find the same noise again is
    no recovery, and a net would learn to keep it. Then it is the next plane to focus.

    Parameters
    ----------
    fields : sequence of Field
    kind : {"plane", "fusion"}
    folder : Path
        Where fusions are kept.
    """

    def __init__(self, fields: Sequence[Field], kind: str, folder: Path) -> None:
        self.fields, self.kind, self.folder = fields, kind, folder
        self.reader = PlaneReader()
        # three suffice: at most two of them are the shots
        self.best = [np.abs(f.stack.defocus_um).argsort(kind="stable")[:3] for f in fields]

    def plane(self, pair: Pair) -> int | None:
        """Number of the plane that is the truth of a pair; None if there are but the shots."""
        shots = (pair.lower, pair.upper)
        return next((int(k) for k in self.best[pair.field] if k not in shots), None)

    def crop(self, pair: Pair, y: int, x: int, height: int, width: int) -> Real:
        """Read ``(C, height, width)`` float32 in 0 … 1 of the truth of a pair."""
        of = self.fields[pair.field]
        if self.kind == "plane":
            best = self.plane(pair)
            if best is None:
                raise InputError(f"{of.stack.file}: has no plane beside the two shots")
            return read_planes(self.reader, of, [best], y, x, height, width)
        file = self.folder / f"{'-'.join(map(str, of.stack.key)).replace('/', '_')}.npy"
        if not file.is_file():
            rows, columns = of.stack.shape[1:3]
            planes = list(range(len(of.stack.z_um)))
            looks = read_planes(self.reader, of, planes, 0, 0, rows, columns)
            fused = fuse(looks.reshape(len(planes), -1, rows, columns))
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.new")
            with temporary.open("wb") as f:
                np.save(f, fused)
            temporary.replace(file)  # whichever process comes last: they are the same
        part = np.load(file, mmap_mode="r")[:, y : y + height, x : x + width]
        return np.array(part, np.float32)


def read_planes(
    reader: PlaneReader, of: Field, planes: Sequence[int], y: int, x: int, h: int, w: int
) -> Real:
    """Read planes by number, ``(planes · C, h, w)`` float32 in 0 … 1."""
    one = Field(of.stack, np.array([planes], np.intp), np.zeros(1), of.content, of.windows)
    return read_looks(reader, one, 0, y, x, h, w)


def read_pair(
    reader: PlaneReader, of: Field, pair: Pair, y: int, x: int, height: int, width: int
) -> tuple[Real, int]:
    """Read two shots, the sharper one first.

    Returns
    -------
    shots : numpy.ndarray
        ``(2 C, height, width)`` float32 in 0 … 1.
    side : {1, -1}
        1: the lower one is the sharper one.
    """
    shots = read_planes(reader, of, [pair.lower, pair.upper], y, x, height, width)
    c = len(shots) // 2
    side = sharper_of(shots[:c], shots[c:])
    return (shots if side > 0 else np.concatenate((shots[c:], shots[:c]))), side


class PairSource(Source):
    """Pairs of shots with the truth, drawn where there is specimen, and a few elsewhere.

    Parameters
    ----------
    fields : sequence of Field
        All labelled.
    truths : Truths
        Of these fields.
    patch_px : int
        Edge of the patches.
    per_field : int
        Patches of each field in an epoch.
    seed : int
        Decides what is drawn.
    change : AugmentOptions
        How samples are changed; noise is added to the shots only.
    options : PairOptions
        How the shots lie.
    """

    kind = 2

    def __init__(
        self,
        fields: Sequence[Field],
        truths: Truths,
        patch_px: int,
        per_field: int,
        seed: int,
        change: AugmentOptions,
        options: PairOptions,
    ) -> None:
        super().__init__(fields, per_field, seed)
        self.patch_px, self.options, self.truths = patch_px, options, truths
        self.change = change
        if not self.fields:
            raise InputError("none of the stacks to train on has a label")

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One sample: images, how the shots lie, and where the focus is.

        ``shots (2 C, P, P)`` and ``truth (C, P, P)`` float32, ``side`` ±1, ``half_um`` and
        ``toward_um`` float32, ``field`` int.
        """
        which, rng = self._draw(number)
        of = self.fields[which]
        pair = draw_pair(of.stack, self.options, rng, which)
        p = self.patch_px
        if len(of.windows) and rng.random() < 0.9:
            y, x = corner_of(of, p, rng)
        else:
            y, x = (int(v) for v in rng.integers(0, np.array(of.stack.shape[1:3]) - p + 1))
        shots, side = read_pair(self.truths.reader, of, pair, y, x, p, p)
        truth = self.truths.crop(pair, y, x, p, p)
        still = self.change.model_copy(update={"noise": 0.0})
        sample = augment(np.concatenate((shots, truth)), still, rng, looks=3)
        sample = np.ascontiguousarray(sample)
        shots, truth = sample[: len(shots)], sample[len(shots) :]
        if self.change.noise:
            grain = np.float32(rng.random() * self.change.noise)
            shots = shots + grain * rng.standard_normal(shots.shape, np.float32)
        return {
            "shots": shots,
            "truth": truth,
            "side": np.float32(side),
            "half_um": np.float32(pair.half_um),
            "toward_um": np.float32(pair.toward_um(side)),
            "field": which,
        }


def draw_pair(
    stack: Stack, options: PairOptions, rng: np.random.Generator, field: int = 0
) -> Pair:
    """Draw two shots of a stack.

    Raises
    ------
    InputError
        No two of its planes lie as shots would.
    """
    low, high = options.half_um
    most = options.focus_most_um
    defocus = stack.defocus_um
    step = float(np.median(np.diff(np.sort(defocus)))) if len(defocus) > 1 else 0.0
    tolerance = options.tolerance_um or step / 2 + 1e-6
    for _ in range(_TRIES):
        half = float(rng.uniform(low, high))
        off = float(np.clip(rng.normal(0, options.focus_sd_um), -most, most))
        pair = pair_near(defocus, off, half, tolerance, field)
        if pair is None:
            continue
        # where a shot is the plane in focus, the next one must do for the truth
        others = np.delete(np.abs(defocus), [pair.lower, pair.upper])
        if options.truth == "plane" and others.min(initial=np.inf) > _TRUTH_STEPS * step:
            continue
        return pair
    raise InputError(
        f"{stack.file}: hardly any two of its planes, {step:g} µm apart over "
        f"{defocus.min():+.1f} … {defocus.max():+.1f} µm, lie {low:g} … {high:g} µm "
        "(pairs.half_um) below and above a middle near focus"
    )


def validation_pairs(
    fields: Sequence[Field], options: PairOptions, patch_px: int, *, per_field: int, most: int
) -> list[tuple[Pair, int, int]]:
    """Which pairs are looked at after each epoch: ``(pair, y, x)``, the same each time."""
    found = []
    for i, of in enumerate(fields):
        rng = np.random.default_rng([i, 7])
        for _ in range(per_field):
            pair = draw_pair(of.stack, options, rng, i)
            if len(of.windows):
                y, x = corner_of(of, patch_px, rng)
            else:
                y, x = ((np.array(of.stack.shape[1:3]) - patch_px) // 2).tolist()
            found.append((pair, int(y), int(x)))
    if len(found) > most:
        keep = np.linspace(0, len(found) - 1, most).round().astype(int)
        found = [found[k] for k in keep]
    return found
