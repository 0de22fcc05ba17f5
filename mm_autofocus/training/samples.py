"""What a net is trained on: patches at known defocus, and mosaics with known importance.

A sample is a pure function of the seed, the epoch and its number. Nothing depends on who
reads it, in which order or how often, so that a run that was killed goes on exactly where it
was, with any number of workers. No torch here; a loader of torch reads these as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import cv2
import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.lens import code_of
from mm_autofocus.models.patches import CELL_PX, grid
from mm_autofocus.training.augment import AugmentOptions, allowed_turn, augment, turn
from mm_autofocus.training.fields import (
    Field,
    evenly,
    fields_of,
    looks_of,
    range_of,
    read_looks,
)
from mm_autofocus.training.importance import WINDOW, importance_of, share
from mm_autofocus.training.planes import PlaneReader

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.lens import Ranges

    Real: TypeAlias = npt.NDArray[np.float32]
    Index: TypeAlias = npt.NDArray[np.intp]

__all__ = [
    "Field",
    "MosaicSource",
    "PatchSource",
    "Source",
    "corner_of",
    "fields_of",
    "looks_of",
    "range_of",
    "read_looks",
    "validation_patches",
]

_TRIES = 8
_MOSAIC_CELLS = 3


@lru_cache(maxsize=64)
def _order(seed: int, epoch: int, turn: int, n: int) -> Index:
    return np.random.default_rng([seed, epoch, turn, 1]).permutation(n)


class Source:
    """Numbers samples: ``epoch · len(self) + i``, each epoch all fields equally often."""

    kind = 0

    def __init__(self, fields: Sequence[Field], per_field: int, seed: int) -> None:
        self.fields, self.per_field, self.seed = list(fields), per_field, seed
        self.reader = PlaneReader()

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self.fields) * self.per_field

    def _draw(self, number: int) -> tuple[int, np.random.Generator]:
        epoch, i = divmod(number, len(self))
        turn, at = divmod(i, len(self.fields))
        which = int(_order(self.seed + self.kind, epoch, turn, len(self.fields))[at])
        return which, np.random.default_rng([self.seed, epoch, i, 2 + self.kind])


def corner_of(of: Field, patch_px: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draw y, x of a patch about a window with specimen, rather with more of it than less."""
    most = np.array(of.stack.shape[1:3]) - patch_px
    windows = of.windows[rng.integers(len(of.windows), size=_TRIES)]
    inside = rng.integers(0, max(1, patch_px - WINDOW), size=(_TRIES, 2))
    corners = np.clip(windows * WINDOW - inside, 0, most)
    weights = importance_of(share(of.content, corners, patch_px))
    good = np.flatnonzero(weights >= 0.8)
    y, x = corners[good[0] if len(good) else int(weights.argmax())]
    return int(y), int(x)


class PatchSource(Source):
    """Patches for the defocus, drawn where there is specimen, not only on the grid.

    Parameters
    ----------
    fields : sequence of Field
        All labelled.
    patch_px : int
        Edge of the patches.
    per_field : int
        Patches of each field in an epoch.
    seed : int
        Decides what is drawn.
    change : AugmentOptions
        How samples are changed.
    near : tuple of float
        ``(part, um)``: of `part` of the samples the defocus is drawn from within ± `um`.
    told : mapping
        What a net is told of the lens (`models.lens`); empty: nothing.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        patch_px: int,
        per_field: int,
        seed: int,
        change: AugmentOptions,
        near: tuple[float, float] = (0.0, 0.0),
        told: Ranges | None = None,
    ) -> None:
        super().__init__([f for f in fields if len(f.windows)], per_field, seed)
        self.told = dict(told or {})
        self.patch_px, self.change, self.near = patch_px, change, near
        if not self.fields:
            raise InputError("none of the stacks to train on shows specimen in focus")

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``patches (C, P, P)`` float32, ``defocus_um`` float32, ``field`` int.

        And ``lens``, float32, if the net is told of it: `models.lens.code_of`.
        """
        which, rng = self._draw(number)
        of = self.fields[which]
        k = self._set(of, rng)
        y, x = corner_of(of, self.patch_px, rng)
        sample = read_looks(self.reader, of, k, y, x, self.patch_px, self.patch_px)
        sample = augment(sample, self.change, rng, of.planes.shape[1])
        lens = {"lens": code_of(self.told, of.stack.lens)} if self.told else {}
        return {
            "patches": sample,
            "defocus_um": np.float32(of.defocus_um[k]),
            "field": which,
            **lens,
        }

    def _set(self, of: Field, rng: np.random.Generator) -> int:
        part, um = self.near
        u, v = rng.random(2)
        sets = np.arange(len(of.defocus_um))
        if u < part:
            close = sets[np.abs(of.defocus_um) <= um]
            sets = close if len(close) else sets
        return int(sets[int(v * len(sets))])


class MosaicSource(Source):
    """Mosaics for the importance: whole cells of a field, half of them about specimen.

    Parameters
    ----------
    fields : sequence of Field
        Labelled or blank.
    patch_px : int
        Edge of a patch at run time; each becomes a cell of 56 pixels.
    per_field : int
        Mosaics of each field in an epoch.
    seed : int
        Decides what is drawn.
    change : AugmentOptions
        How samples are changed.
    """

    kind = 1

    def __init__(
        self,
        fields: Sequence[Field],
        patch_px: int,
        per_field: int,
        seed: int,
        change: AugmentOptions,
    ) -> None:
        super().__init__(fields, per_field, seed)
        self.patch_px, self.change = patch_px, change
        least = min(min(f.stack.shape[1:3]) for f in fields)
        self.cells = max(1, min(_MOSAIC_CELLS, least // patch_px))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """``mosaic (C, n · 56, n · 56)`` and ``importance (n, n)``, float32."""
        which, rng = self._draw(number)
        of = self.fields[which]
        n, edge = self.cells, self.cells * self.patch_px
        k = int(rng.integers(len(of.planes)))
        most = np.array(of.stack.shape[1:3]) - edge
        corner = rng.integers(0, most + 1)
        about, u = rng.random(2)
        if about < 0.5 and len(of.windows):
            window = of.windows[int(u * len(of.windows))] * WINDOW
            corner = np.clip(window - rng.integers(0, edge, size=2), 0, most)
        y, x = int(corner[0]), int(corner[1])
        frame = read_looks(self.reader, of, k, y, x, edge, edge)
        size = (n * CELL_PX, n * CELL_PX)
        small = np.stack([cv2.resize(p, size, interpolation=cv2.INTER_AREA) for p in frame])
        cells = np.arange(n) * self.patch_px
        corners = np.stack(np.meshgrid(cells + y, cells + x, indexing="ij"), -1).reshape(-1, 2)
        weights = importance_of(share(of.content, corners, self.patch_px)).reshape(n, n)
        which_turn = allowed_turn(self.change, int(rng.integers(8)))
        small, weights = turn(small, which_turn), turn(weights, which_turn)
        still = self.change.model_copy(update={"turns": "none"})
        small = augment(np.ascontiguousarray(small), still, rng, of.planes.shape[1])
        return {"mosaic": small, "importance": np.ascontiguousarray(weights)}


def validation_patches(
    fields: Sequence[Field], patch_px: int, *, planes: int, patches: int, most: int
) -> list[tuple[int, int, int, int]]:
    """Which patches are looked at after each epoch; the same each time, as at run time.

    Parameters
    ----------
    fields : sequence of Field
        Of the validation part.
    patch_px : int
        At run time.
    planes, patches : int
        Sets of looks of each field, spread over the range; patches of each, the most
        important of the grid.
    most : int
        Patches altogether; above it, sets are left out evenly.

    Returns
    -------
    list
        ``(field, set, y, x)``; patches of one frame in a row.
    """
    frames = []
    for i, of in enumerate(fields):
        corners = grid(of.stack.shape[1:], patch_px).reshape(-1, 2)
        weights = importance_of(share(of.content, corners, patch_px))
        good = np.argsort(-weights, kind="stable")[:patches]
        good = good[weights[good] >= 0.8]
        if not len(good) or not of.stack.labelled:
            continue
        order = np.argsort(of.defocus_um, kind="stable")
        # not the same ones of each field: every defocus has its turn
        for k in order[evenly(len(order), planes, i)]:
            frames.append([(i, int(k), int(y), int(x)) for y, x in corners[good]])
    total = sum(len(f) for f in frames)
    if total > most:
        keep = np.linspace(0, len(frames) - 1, max(1, len(frames) * most // total))
        frames = [frames[k] for k in np.unique(keep.round().astype(int))]
    return [patch for frame in frames for patch in frame]
