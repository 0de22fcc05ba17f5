"""What an exported model says of itself: how far off it is, and what it is used to seeing.

Both are learned from whole frames by the model as it will run, not from patches in torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.models import ood
from mm_autofocus.models.card import ErrorModel
from mm_autofocus.models.consensus import raw_error
from mm_autofocus.models.patches import grid, mosaic
from mm_autofocus.training.fields import Field, evenly, read_looks
from mm_autofocus.training.importance import importance_of, share
from mm_autofocus.training.planes import PlaneReader, max_value_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.runtime import FocusModel, Prediction

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["Seen", "fit_errors", "fit_ood", "look_at", "seen_of", "together"]

_WITHIN = 0.6827  # of errors lie within one standard deviation
_LEAST = 12  # frames, to say anything of their errors


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model said of frames with labels; arrays of one length, one per frame.

    Attributes
    ----------
    label_um, predicted_um, raw_um, spread_um : numpy.ndarray
        Label; prediction; error expected before calibration; spread of the patches; the
        latter two NaN where unknown.
    importance : numpy.ndarray
        ``(2, patches)``: by content in focus, and by the net.
    frames : int
        How many were looked at, those without an answer among them.
    """

    label_um: Floats
    predicted_um: Floats
    raw_um: Floats
    spread_um: Floats
    importance: npt.NDArray[np.float32]
    frames: int

    @property
    def mae_um(self) -> float:
        """Mean absolute error."""
        return float(np.abs(self.predicted_um - self.label_um).mean())

    def figures(self, threshold: float = 0.8) -> dict[str, Any]:
        """Figures for the card."""
        error = np.abs(self.predicted_um - self.label_um)
        right = np.sign(self.predicted_um) == np.sign(self.label_um)
        found: dict[str, Any] = {"frames": self.frames, "answered": len(error)}
        if len(error):
            found |= {
                "mae_um": round(float(error.mean()), 4),
                "median_um": round(float(np.median(error)), 4),
                "dss": round(float(np.mean(right | (self.label_um == 0))), 5),
            }
        if self.importance.size:
            by_content, by_net = self.importance >= threshold
            found["importance_agreement"] = round(float(np.mean(by_content == by_net)), 4)
        return found


def _frames(fields: Sequence[Field], most: int) -> list[tuple[Field, int]]:
    """Sets of looks spread evenly over fields and defocus, at most so many.

    Of frames of several sizes the largest, if they are of enough fields: those of a run hold
    many patches, too, and what many say together errs otherwise than what one says.
    """
    edge = max((min(of.stack.shape[1:3]) for of in fields), default=0)
    large = [of for of in fields if min(of.stack.shape[1:3]) == edge]
    fields = large if len(large) >= _LEAST else fields
    per = max(1, most // max(len(fields), 1))
    chosen = []
    for i, of in enumerate(fields):
        order = np.argsort(of.defocus_um, kind="stable")
        chosen += [(of, int(k)) for k in order[evenly(len(order), per, i)]]
    if len(chosen) > most:
        keep = np.linspace(0, len(chosen) - 1, most).round().astype(int)
        chosen = [chosen[k] for k in keep]
    return chosen


def look_at(model: FocusModel, fields: Sequence[Field], most: int) -> Seen:
    """Show whole frames to a model, the way it is shown them in a run."""
    rows, weights = [], []
    threshold = 0.0
    for of, k in _frames(fields, most):
        looks = [of.stack.plane(int(p)) for p in of.planes[k]]
        seen = model.predict(looks, max_value=max_value_of(of.stack))
        if model.card.importance is not None:
            threshold = model.card.importance.threshold
            px = model.card.patch_px
            corners = grid(of.stack.shape[1:], px).reshape(-1, 2)
            content = importance_of(share(of.content, corners, px))
            weights.append(np.stack([content, seen.importance.ravel()]))
        rows.append((float(of.defocus_um[k]), seen))
    both = np.concatenate(weights, 1) if threshold else np.zeros((2, 0), np.float32)
    return seen_of(rows, both.astype(np.float32))


def seen_of(
    said: Sequence[tuple[float, Prediction]],
    importance: npt.NDArray[np.float32] | None = None,
) -> Seen:
    """From labels and what a model said of their frames."""
    rows = []
    for label, p in said:
        if p.defocus_um is not None:
            raw = raw_error(p.patch_sd_um, p.spread_um, len(p.patch_defocus_um))
            known = (np.nan if v is None else v for v in (raw, p.spread_um))
            rows.append((label, p.defocus_um, *known))
    if importance is None:
        importance = np.zeros((2, 0), np.float32)
    columns = np.array(rows, float).reshape(-1, 4).T
    return Seen(columns[0], columns[1], columns[2], columns[3], importance, len(said))


def together(parts: Sequence[Seen]) -> Seen:
    """All that was said, one after the other, without the importance."""
    names = ("label_um", "predicted_um", "raw_um", "spread_um")
    columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
    importance = np.zeros((2, 0), np.float32)
    return Seen(**columns, importance=importance, frames=sum(p.frames for p in parts))


def fit_errors(seen: Seen) -> ErrorModel:
    """From raw to calibrated errors: 68 % of frames then lie within what is expected.

    Of quantiles, so that a few wrong signs do not spoil what is said of all others. The
    floor is what the surest third is off by beyond what it says.
    """
    known = np.isfinite(seen.raw_um) & (seen.raw_um > 0)
    if known.sum() < _LEAST:
        return ErrorModel()
    error = np.abs(seen.predicted_um - seen.label_um)[known]
    raw = seen.raw_um[known]
    surest = raw <= np.quantile(raw, 1 / 3)
    floor = 0.0
    scale = _scale(error, raw, floor)
    for _ in range(20):
        off = float(np.quantile(error[surest], _WITHIN))
        said = scale * float(np.median(raw[surest]))
        floor = float(np.sqrt(max(off**2 - said**2, 0.0)))
        scale = 0.5 * scale + 0.5 * _scale(error, raw, floor)
    return ErrorModel(
        sd_scale=float(f"{scale:.4g}"),
        floor_um=float(f"{floor:.4g}"),
        disagreement_um=_disagreement(seen),
    )


def _scale(error: Floats, raw: Floats, floor: float) -> float:
    """The scale with which 68 % of the errors lie within ``hypot(scale · raw, floor)``."""
    beyond = np.sqrt(np.maximum(error**2 - floor**2, 0.0)) / raw
    return max(float(np.quantile(beyond, _WITHIN)), 1e-3)


def _disagreement(seen: Seen) -> float | None:
    """Spread of patches that hardly any frame with a good answer has."""
    error = np.abs(seen.predicted_um - seen.label_um)
    good = np.isfinite(seen.spread_um) & (error <= max(3 * float(np.median(error)), 1e-6))
    if good.sum() < _LEAST:
        return None
    limit = 1.25 * float(np.quantile(seen.spread_um[good], 0.98))
    return float(f"{limit:.4g}") if limit > 0 else None


def fit_ood(fields: Sequence[Field], patch_px: int, most: int) -> ood.OodStats | None:
    """What frames of the training look like; None of too few."""
    rows, groups = [], []
    for group, descriptors in _descriptors(fields, patch_px, most):
        rows += list(descriptors)
        groups += [group] * len(descriptors)
    if len(rows) < ood.LEAST_FRAMES:
        return None
    return ood.OodStats.fit(np.array(rows), groups)


def _descriptors(
    fields: Sequence[Field], patch_px: int, most: int
) -> Iterator[tuple[tuple[Any, ...], Floats]]:
    reader = PlaneReader()
    for of, k in _frames(fields, most):
        rows, columns = of.stack.shape[1:3]
        frame = read_looks(reader, of, k, 0, 0, rows, columns)
        channels = 3 if of.stack.is_rgb else 1
        yield of.stack.key, ood.describe(mosaic(frame, patch_px), channels)
