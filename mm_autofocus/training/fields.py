"""What can be drawn from stacks: sets of planes that lie as the looks of a model do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.training.planes import PlaneReader, max_value_of
from mm_autofocus.training.stack import Stack

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.training.importance import Mask

    Real: TypeAlias = npt.NDArray[np.float32]
    Index: TypeAlias = npt.NDArray[np.intp]

__all__ = ["Field", "evenly", "fields_of", "looks_of", "range_of", "read_looks"]


@dataclass(frozen=True, slots=True)
class Field:
    """A stack with what can be drawn from it.

    Attributes
    ----------
    stack : Stack
        Its planes are on the disk.
    planes : numpy.ndarray
        ``(K, L)`` numbers of the planes of each set of looks.
    defocus_um : numpy.ndarray
        ``(K,)`` of the present z of each set, by the label.
    content : numpy.ndarray
        Which windows carry specimen: `importance.content_map`.
    windows : numpy.ndarray
        ``(W, 2)`` row, column of those that do.
    """

    stack: Stack
    planes: Index
    defocus_um: npt.NDArray[np.float64]
    content: Mask
    windows: Index = field(repr=False)


def looks_of(
    stack: Stack, looks_um: Sequence[float], tolerance_um: float
) -> tuple[Index, npt.NDArray[np.float64]]:
    """Sets of planes that lie as the looks of a model do.

    Parameters
    ----------
    stack : Stack
        Labelled, or blank: then the defocus is NaN.
    looks_um : sequence of float
        Offsets from the present z.
    tolerance_um : float
        How far a plane may lie beside where a look would have been taken.

    Returns
    -------
    planes : numpy.ndarray
        ``(K, L)``.
    defocus_um : numpy.ndarray
        ``(K,)``, of the present z, offset 0.
    """
    z = np.asarray(stack.z_um)
    focus = stack.focus_z_um if stack.focus_z_um is not None else np.nan
    sets, defocus = [], []
    for k in range(len(z)):
        present = z[k] - looks_um[0]
        far = np.abs(z[None, :] - (present + np.asarray(looks_um))[:, None])
        nearest = far.argmin(1)
        if far[np.arange(len(looks_um)), nearest].max() <= tolerance_um:
            sets.append(nearest)
            defocus.append(present - focus)
    return np.array(sets, np.intp).reshape(-1, len(looks_um)), np.array(defocus)


def range_of(
    stacks: Sequence[Stack], looks_um: Sequence[float], tolerance_um: float
) -> tuple[float, float]:
    """Range of defocus that half of the stacks cover, in µm.

    Raises
    ------
    InputError
        No stack has planes that lie as the looks do.
    """
    ends = []
    for stack in stacks:
        _, defocus = looks_of(stack, looks_um, tolerance_um)
        if len(defocus):
            ends.append((defocus.min(), defocus.max()))
    if not ends:
        _no_looks(stacks, looks_um, tolerance_um)
    low, high = np.median(np.array(ends), axis=0)
    return float(round(low, 2)), float(round(high, 2))


def fields_of(
    stacks: Sequence[Stack],
    maps: dict[tuple[Any, ...], Mask],
    looks_um: Sequence[float],
    range_um: tuple[float, float],
    *,
    tolerance_um: float,
    least_px: int,
) -> list[Field]:
    """What can be drawn from stacks; those from which nothing can are left out.

    Raises
    ------
    InputError
        Frames smaller than a patch, stacks of grey and of colour, or nothing to draw.
    """
    found = []
    for stack in stacks:
        if min(stack.shape[1:3]) < least_px:
            raise InputError(
                f"patch_px: {least_px} does not fit into the frames of {stack.file}, "
                f"{stack.shape[2]} × {stack.shape[1]} pixels"
            )
        if stack.is_rgb != stacks[0].is_rgb:
            raise InputError(
                f"{stack.file}: is {'RGB' if stack.is_rgb else 'grey'} and {stacks[0].file} "
                "is not; a model takes one kind"
            )
        planes, defocus = looks_of(stack, looks_um, tolerance_um)
        if stack.labelled:
            inside = (defocus >= range_um[0] - 1e-6) & (defocus <= range_um[1] + 1e-6)
            planes, defocus = planes[inside], defocus[inside]
        if len(planes):
            content = maps[stack.key]
            found.append(Field(stack, planes, defocus, content, np.argwhere(content)))
    if stacks and not found:
        _no_looks(stacks, looks_um, tolerance_um)
    return found


def _no_looks(stacks: Sequence[Stack], looks_um: Sequence[float], tolerance: float) -> None:
    steps = sorted({round(float(np.median(np.diff(np.sort(s.z_um)))), 3) for s in stacks})
    raise InputError(
        f"looks: {', '.join(f'{v:g}' for v in looks_um)} µm: no planes of the dataset lie so "
        f"to each other within {tolerance:g} µm (look_tolerance_um) and in the range; the "
        f"planes are {' or '.join(f'{s:g}' for s in steps[:3])} µm apart"
    )


def evenly(count: int, most: int, turn: int) -> Index:
    """At most `most` of `count` things in a row, evenly; other ones at each turn."""
    n = min(most, count)
    if not n:
        return np.empty(0, np.intp)
    return ((np.arange(n) + (turn * 0.618) % 1) / n * count).astype(np.intp)


def read_looks(
    reader: PlaneReader, of: Field, k: int, y: int, x: int, height: int, width: int
) -> Real:
    """Read the looks of set `k` of a field, ``(L · C, height, width)`` float32 in 0 … 1."""
    scale = np.float32(1 / max_value_of(of.stack))
    channels = 3 if of.stack.is_rgb else 1
    out = np.empty((len(of.planes[k]) * channels, height, width), np.float32)
    for i, plane in enumerate(of.planes[k]):
        crop = reader.crop(of.stack, int(plane), y, x, height, width)
        if crop.ndim == 2:
            np.multiply(crop, scale, out=out[i], casting="unsafe")
        else:
            np.multiply(
                crop.transpose(2, 0, 1),
                scale,
                out=out[i * 3 : i * 3 + 3],
                casting="unsafe",
            )
    return out
