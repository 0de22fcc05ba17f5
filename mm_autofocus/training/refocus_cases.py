"""Two shots with their truth, to judge by: from recorded stacks, by the protocol of the paper.

The focus was found at another tile: the middle of the shots is off the focus of the field by
a normal random number (Li et al., the two-shot paper, § V).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as column
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.training.fields import Field
from mm_autofocus.training.pairs import Pair, Truths
from mm_autofocus.training.planes import max_value_of
from mm_autofocus.training.refocus_baselines import as_frame
from mm_autofocus.types import Optics

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.training.stack import Stack
    from mm_autofocus.types import Image

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["FOCUS_MOST_UM", "FOCUS_SD_UM", "Case", "cases_of", "halves_within", "middles_um"]

FOCUS_SD_UM, FOCUS_MOST_UM = 1.0, 2.5
"""Standard deviation of the middle of the shots about focus, and where it is cut."""

PER_HALF = 3
"""Pairs of each field at each distance."""

_TOLERANCE_UM = 0.13
"""By how much half of the distance of recorded planes may differ from what is asked for."""


@dataclass(frozen=True, slots=True)
class Case:
    """Two shots and the truth.

    Attributes
    ----------
    field, sparsity : str
        Where: ``slide/field``, and its class.
    asked_um : float
        Half distance that was asked for (ΔD).
    lower_um, upper_um : float
        Defocus of the shots.
    lower, upper, truth : numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``, all alike.
    truth_um : float
        Defocus of the truth: recorded planes are not exactly at focus.
    max_value : float
        Where the camera saturates.
    optics : Optics
        As far as known.
    """

    field: str
    sparsity: str
    asked_um: float
    lower_um: float
    upper_um: float
    lower: Image = column(repr=False)
    upper: Image = column(repr=False)
    truth: Image = column(repr=False)
    truth_um: float = 0.0
    max_value: float = 255.0
    optics: Optics = column(default_factory=Optics)

    @property
    def half_um(self) -> float:
        """Half of the distance of the shots."""
        return (self.upper_um - self.lower_um) / 2

    @property
    def middle_um(self) -> float:
        """Defocus of their middle."""
        return (self.upper_um + self.lower_um) / 2


def halves_within(low: float, high: float) -> tuple[float, ...]:
    """Half distances to judge at: multiples of 0.5 µm; of 1, 2, … µm where these are many.

    Examples
    --------
    >>> halves_within(0.5, 3.0)
    (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    >>> halves_within(2, 6)
    (2.0, 3.0, 4.0, 5.0, 6.0)
    """
    step = 0.5
    while True:
        numbers = np.arange(np.ceil(low / step - 1e-6), np.floor(high / step + 1e-6) + 1)
        if len(numbers) <= 6:
            found = tuple(float(round(k * step, 6)) for k in numbers if k > 0)
            return found or (float(high),)
        step *= 2


def middles_um(rng: np.random.Generator, n: int) -> Floats:
    """Draw middles of shots: normal, cut at ± :data:`FOCUS_MOST_UM`."""
    return np.clip(rng.normal(0, FOCUS_SD_UM, n), -FOCUS_MOST_UM, FOCUS_MOST_UM)


def nearest_pair(
    defocus_um: Floats, middle_um: float, half_um: float, number: int = 0
) -> Pair | None:
    """The two recorded planes of a distance whose middle is nearest to where it should be.

    The distance must be right to some 0.1 µm; the middle, which is drawn by lot, may lie half
    a step of the planes beside, or 0.25 µm if that is more. None: there are no such planes.
    """
    order = np.argsort(defocus_um, kind="stable")
    d = defocus_um[order]
    if len(d) < 2:
        return None
    half = (d[None, :] - d[:, None]) / 2
    middle = (d[None, :] + d[:, None]) / 2
    off = np.abs(middle - middle_um)
    far = max(0.25, float(np.median(np.diff(d))) / 2) + 1e-6
    bad = (np.abs(half - half_um) > min(_TOLERANCE_UM, half_um / 2)) | (off > far)
    if bad.all():
        return None
    # the middle is drawn by lot and may give way, the distance is what was asked for
    cost = off + 4 * np.abs(half - half_um)
    i, j = np.unravel_index(int(np.where(bad, np.inf, cost).argmin()), off.shape)
    return Pair(number, int(order[i]), int(order[j]), float(d[i]), float(d[j]))


def cases_of(
    stacks: Sequence[Stack],
    halves_um: Sequence[float],
    *,
    per_half: int = PER_HALF,
    seed: int = 0,
    truth: str = "plane",
    folder: Path | None = None,
) -> Iterator[tuple[int, Case]]:
    """Draw the cases of recorded stacks: ``(number of the stack, case)``.

    Parameters
    ----------
    stacks : sequence of Stack
        Labelled.
    halves_um : sequence of float
        Half distances.
    per_half : int
        Of each stack and distance; fewer where recorded planes are few, for no pair of
        planes comes twice.
    seed : int
        Decides what is drawn, with the name of the stack: not with what else is judged.
    truth, folder
        As in `mm_autofocus.training.pairs.Truths`.
    """
    none = np.empty((0, 2), np.intp)
    fields = [Field(s, none, np.zeros(0), np.zeros((0, 0), bool), none) for s in stacks]
    if truth != "plane" and folder is None:
        raise InputError("truth: a fusion needs a folder to be kept in")
    truths = Truths(fields, truth, folder or Path())
    for number, (stack, of) in enumerate(zip(stacks, fields, strict=True)):
        name = zlib.crc32("/".join(map(str, stack.key)).encode())
        limit, optics, defocus = max_value_of(stack), stack.known_optics(), stack.defocus_um
        height, width = stack.shape[1:3]
        for half in halves_um:
            rng = np.random.default_rng([seed, name, round(1000 * half)])
            taken: set[tuple[int, int]] = set()
            for middle in middles_um(rng, per_half):
                pair = nearest_pair(defocus, float(middle), half, number)
                if pair is None or (pair.lower, pair.upper) in taken:
                    continue
                taken.add((pair.lower, pair.upper))
                best = truths.plane(pair) if truth == "plane" else None
                if truth == "plane" and best is None:
                    continue
                sharp = truths.crop(pair, 0, 0, height, width)
                lower, upper = (
                    np.array(truths.reader.crop(of.stack, k, 0, 0, height, width))
                    for k in (pair.lower, pair.upper)
                )
                yield (
                    number,
                    Case(
                        stack.group,
                        stack.sparsity,
                        half,
                        pair.lower_um,
                        pair.upper_um,
                        lower,
                        upper,
                        as_frame(sharp, limit, stack.dtype),
                        0.0 if best is None else float(defocus[best]),
                        limit,
                        optics,
                    ),
                )
