"""One pair through a model: the same here, in the process beside a run, and on a cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.frames import saturation
from mm_autofocus.models.refocus import TILE_PX
from mm_autofocus.ometiff.following import PageAt, read_page

if TYPE_CHECKING:
    from mm_autofocus.models.refocus import Recovery, RefocusModel
    from mm_autofocus.refocusing.pairs import Pair
    from mm_autofocus.types import Image

__all__ = ["KEPT_RAW", "RECOVERED", "Done", "How", "derived_of", "recover_pair"]

RECOVERED, KEPT_RAW = "recovered", "sharper shot"
"""What may stand in the fused file."""

_STRIP_PX = 256
_LEAST_MSE = 1e-9  # of the range, squared; as in the training's figures


@dataclass(frozen=True, slots=True)
class How:
    """What holds for all pairs.

    Attributes
    ----------
    raw_if_unsure : bool
        Keep the sharper shot where there is a reason to distrust the recovered image.
    tile_px : int
        Edge of a tile of a frame.
    max_value : float | None
        Value at which the camera saturates; None: as the file says.
    """

    raw_if_unsure: bool = False
    tile_px: int = TILE_PX
    max_value: float | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a pair.

    Attributes
    ----------
    image : numpy.ndarray
        As it is saved.
    z_um : float | None
        Where it is in focus, as far as it is known.
    told : dict
        See `mm_autofocus.ometiff.record.RecoveryRecord`; with a truth also ``psnr_db`` and
        ``psnr_identity_db``.
    """

    image: Image
    z_um: float | None
    told: dict[str, Any]


def recover_pair(
    model: RefocusModel, pair: Pair, how: How, truth: PageAt | None = None
) -> Done:
    """Read two shots and recover their sharp image.

    Raises
    ------
    InputError
        They cannot be read, or are not what the model takes; names the tile.
    """
    lower, upper = read_page(pair.lower), read_page(pair.upper)
    max_value = pair.max_value if how.max_value is None else how.max_value
    try:
        found = model.recover(
            lower,
            upper,
            half_um=pair.half_um,
            max_value=max_value,
            pixel_size_um=pair.pixel_size_um,
            tile_px=how.tile_px,
        )
    except InputError as e:
        raise InputError(f"{Path(pair.lower.path)}: {pair.name}: {e}") from None
    sharper = (lower, upper)[found.sharper]
    kept_raw = how.raw_if_unsure and not found.trusted
    told = _told(pair, found, KEPT_RAW if kept_raw else RECOVERED)
    if truth is not None:
        real = read_page(truth)
        limit = saturation(lower, max_value)
        # of the recovered image, also where the shot is kept: it is the model that is judged
        told["psnr_db"] = _psnr_db(found.image, real, limit)
        told["psnr_identity_db"] = _psnr_db(sharper, real, limit)
    if kept_raw:
        z_um = None if pair.z_um is None else pair.z_um[found.sharper]
        return Done(sharper, z_um, told)
    middle = None if pair.z_um is None else sum(pair.z_um) / 2
    z_um = middle if middle is None or found.focus_um is None else middle + found.focus_um
    return Done(found.image, z_um, told)


def _told(pair: Pair, found: Recovery, kept: str) -> dict[str, Any]:
    middle = 0.0 if pair.z_um is None else sum(pair.z_um) / 2
    return {
        "status": "ok" if found.trusted else "low-confidence",
        "reasons": list(found.reasons),
        "kept": kept,
        "sharper": ("lower", "upper")[found.sharper],
        "z_shots_um": None if pair.z_um is None else list(pair.z_um),
        "delta_um": pair.half_um,
        "focus_um": None if found.focus_um is None else middle + found.focus_um,
        "focus_sd_um": found.focus_sd_um,
        "ood": found.ood,
    }


def _psnr_db(image: Image, truth: Image, limit: float) -> float:
    """Peak signal-to-noise ratio, strip by strip."""
    total = 0.0
    for y in range(0, len(image), _STRIP_PX):
        ours, real = (a[y : y + _STRIP_PX].astype(np.float64) for a in (image, truth))
        total += float(np.square((ours - real) / limit).sum())
    return -10 * math.log10(max(total / image.size, _LEAST_MSE))


def derived_of(model: RefocusModel, source: Path, version: str, how: How) -> dict[str, Any]:
    """What a fused file says of its origin, before the first pair."""
    return {
        "note": "Derived: computed from two shots of each tile; the raw planes are in source.",
        "source": source.name,
        "model": model.card.name,
        "model_sha256": model.card.sha256,
        "card": model.card.model_dump(mode="json"),
        "raw_if_unsure": how.raw_if_unsure,
        "version": version,
    }
