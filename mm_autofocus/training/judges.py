"""Frames of a labelled stack, and who is asked what their defocus is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.runtime import FocusModel, Prediction
    from mm_autofocus.training.merit import Row
    from mm_autofocus.types import Image, Optics

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = [
    "Judge",
    "ModelJudge",
    "Planes",
    "Search",
    "check_stack",
    "look_error",
    "looks_at",
    "show",
    "top_of",
]


NEAR_UM = 0.25
"""A plane so near to where a look would be is as good as it: a stage repeats no better."""


class Planes(Protocol):
    """A labelled stack: `mm_autofocus.training.stack.Stack`, or one that is still in memory."""

    @property
    def group(self) -> str:
        """Slide and field."""

    @property
    def sparsity(self) -> str:
        """Class of the field."""

    @property
    def z_um(self) -> Sequence[float]:
        """Of each plane."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(Z, Y, X)`` or ``(Z, Y, X, 3)``."""

    @property
    def dtype(self) -> str:
        """Of the pixels."""

    @property
    def bit_depth(self) -> int | None:
        """Of the camera."""

    @property
    def truth(self) -> Mapping[str, Any] | None:
        """What a simulator knows."""

    @property
    def defocus_um(self) -> Floats:
        """Defocus of each plane by the label."""

    def known_optics(self) -> Optics:
        """The optics, as far as known."""

    def plane(self, k: int) -> Image:
        """One plane."""

    def planes(self) -> Iterator[tuple[float, Image]]:
        """Plane by plane."""

    def load(self) -> Image:
        """All planes at once."""


class Judge(Protocol):
    """What is shown frames: the model, or what it has to beat."""

    @property
    def looks_um(self) -> tuple[float, ...]:
        """Offsets of the looks from the present z."""

    def __call__(self, images: Sequence[Image], stack: Planes) -> Prediction:
        """Tell the defocus of the present z."""


class Search(Protocol):
    """What searches whole stacks: a start, then looks of its own choice."""

    def __call__(
        self, number: int, stack: Planes, true_um: Floats, use: Sequence[int]
    ) -> list[Row]:
        """Rows of the searches from some of the planes `use`."""


@dataclass(frozen=True)
class ModelJudge:
    """A model that is shown frames.

    Attributes
    ----------
    model : FocusModel
        The model.
    every_patch : bool
        Look at all patches with content.
    """

    model: FocusModel
    every_patch: bool = False

    @property
    def looks_um(self) -> tuple[float, ...]:
        """Of its card."""
        return tuple(self.model.card.looks_um)

    def __call__(self, images: Sequence[Image], stack: Planes) -> Prediction:
        """Predict."""
        return self.model.predict(
            images,
            max_value=top_of(stack),
            every_patch=self.every_patch,
            pixel_size_um=stack.known_optics().pixel_size_um,
        )


def top_of(stack: Planes) -> float | None:
    """Value at which the camera of a stack saturates; None: its bits are not known."""
    return None if stack.bit_depth is None else float(2**stack.bit_depth - 1)


def looks_at(z_um: Sequence[float], offsets: Sequence[float]) -> dict[int, tuple[int, ...]]:
    """Which planes show what a model wants to see from each plane.

    The nearest plane to each look, if it is within 0.25 µm, and another one for another
    look. In a stack that has no such planes at all, within half the distance of its planes.

    Parameters
    ----------
    z_um : sequence of float
        Of each plane, in any order.
    offsets : sequence of float
        Of the looks from the present z.

    Returns
    -------
    dict
        Plane → planes to show, in the order of `offsets`; planes without all looks are
        left out.

    Examples
    --------
    >>> looks_at([0.0, 2.0, 4.0, 6.0], [0, 4])
    {0: (0, 2), 1: (1, 3)}
    """
    z = np.asarray(z_um, np.float64)
    steps = np.diff(np.sort(z))
    half = float(np.median(steps)) / 2 if len(steps) else 0.0
    return _within(z, offsets, min(half, NEAR_UM)) or _within(z, offsets, half)


def _within(z: Floats, offsets: Sequence[float], far_um: float) -> dict[int, tuple[int, ...]]:
    found = {}
    for k in range(len(z)):
        shown = tuple(int(np.abs(z - (z[k] + o)).argmin()) for o in offsets)
        off = [abs(z[j] - z[k] - o) for j, o in zip(shown, offsets, strict=True)]
        if max(off) <= far_um + 1e-6 and len(set(shown)) == len(shown):
            found[k] = shown
    return found


def check_stack(model: FocusModel, stack: Planes) -> None:
    """Refuse a stack whose frames the model cannot be shown.

    Raises
    ------
    InputError
        Other channels, less than one patch, another bit depth or pixel size.
    """
    pixel, top = stack.known_optics().pixel_size_um, top_of(stack)
    try:
        model.card.check_frame(tuple(stack.shape[1:]), max_value=top, pixel_size_um=pixel)
    except InputError as e:
        raise InputError(f"{stack.group}: {e}") from None


def show(
    stack: Planes,
    asked: Mapping[str, Judge],
    wanted: Mapping[str, Mapping[int, tuple[int, ...]]],
) -> Iterator[tuple[str, int, Prediction]]:
    """Show each judge its frames; a plane is forgotten once nobody needs it any more."""
    waiting = [(name, k, shown) for name, use in wanted.items() for k, shown in use.items()]
    users: dict[int, int] = {}
    for _, _, shown in waiting:
        for j in shown:
            users[j] = users.get(j, 0) + 1
    images: dict[int, Image] = {}
    for j, (_, image) in enumerate(stack.planes()):
        if not users.get(j):
            continue
        images[j] = image
        rest = []
        for name, k, shown in waiting:
            if j not in shown or any(i not in images for i in shown):
                rest.append((name, k, shown))
                continue
            yield name, k, asked[name]([images[i] for i in shown], stack)
            for i in shown:
                users[i] -= 1
        waiting = rest
        images = {i: image for i, image in images.items() if users[i]}


def look_error(
    z_um: Sequence[float], offsets: Sequence[float], wanted: Mapping[int, tuple[int, ...]]
) -> float:
    """Largest distance between where a look should be and the plane that is shown, µm."""
    return max(
        (
            abs(z_um[j] - z_um[k] - o)
            for k, shown in wanted.items()
            for j, o in zip(shown, offsets, strict=True)
        ),
        default=0.0,
    )
