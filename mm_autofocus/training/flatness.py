"""How flat the slides are: by how much focus differs from field to field.

Two shots that are to enclose the focus of every tile must be as far apart as focus differs
(`mm_autofocus.strategies.two_shot`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mm_autofocus.training.stack import Stack

__all__ = ["Flatness", "flatness_of"]

_LEAST_FIELDS = 5  # of a slide: a plane takes three of them


@dataclass(frozen=True, slots=True)
class Flatness:
    """Focus from field to field; the median of the slides.

    Attributes
    ----------
    um : float
        Standard deviation of the focus of the fields of a slide, in µm.
    beside_plane_um : float
        What of it is left beside a tilted plane.
    slides, fields : int
        How many it stands on.
    """

    um: float
    beside_plane_um: float
    slides: int
    fields: int

    def to_json(self) -> dict[str, Any]:
        """For ``mm-autofocus calibrate --json``."""
        return {
            "um": self.um,
            "beside_plane_um": self.beside_plane_um,
            "slides": self.slides,
            "fields": self.fields,
        }


def flatness_of(stacks: Iterable[Stack]) -> Flatness | None:
    """Tell how flat the slides are.

    Parameters
    ----------
    stacks : iterable of Stack
        Labelled, of one channel; those that do not know where they were taken do not count.

    Returns
    -------
    Flatness | None
        None without a slide of at least five fields.
    """
    places: dict[str, dict[tuple[float, float], float]] = {}
    for s in stacks:
        if s.focus_z_um is not None and s.xy_um is not None:
            # of several times the first: focus drifts
            places.setdefault(s.slide, {}).setdefault(s.xy_um, s.focus_z_um)
    found, fields = [], 0
    for slide in places.values():
        if len(slide) < _LEAST_FIELDS:
            continue
        xy, z = np.array(list(slide)), np.array(list(slide.values()))
        fields += len(z)
        plane = np.column_stack((xy - xy.mean(0), np.ones(len(z))))
        weights, _, rank, _ = np.linalg.lstsq(plane, z, rcond=None)
        left = float(np.sqrt(np.square(z - plane @ weights).sum() / (len(z) - rank)))
        found.append((float(z.std(ddof=1)), left))
    if not found:
        return None
    whole, beside = np.median(np.array(found), axis=0)
    return Flatness(float(whole), float(beside), len(found), fields)
