"""Calibrate a model on a slide: by stacks of it, what the model says becomes what it is.

A model that was taught on other slides errs on this one by what is peculiar to it: how its
stain shows in each colour, how thick it is, where in it the focus measure finds the peak. That
shifts focus by some tenths of a µm, near it most, and hardly differs from field to field. Every
instrument has a calibration curve for that. This one is a Gaussian process (Rasmussen &
Williams, *Gaussian Processes for Machine Learning*, 2006, ch. 2) that all fields have in
common, and beside it one of each field. Its noise is what the model expects to be off by, with
Student's heavy tails: a frame that went wrong does not bend it.

What is stated of it is found on fields that the fit did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models import consensus
from mm_autofocus.models.card import Curve, ModelCard
from mm_autofocus.training.error_fit import Seen, fit_errors, together
from mm_autofocus.training.fitted_copy import (
    FOLDS,
    Worth,
    check_stacks,
    folds_of,
    judged,
    write_copy,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.runtime import OnnxModel
    from mm_autofocus.training.judges import Planes

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["OPTION", "CurveFit", "curve_through", "fit_curve", "write_curve"]

OPTION = "--fit-curve"
"""What it is asked for by."""

_NEAR_UM = 1.0  # within, the curve bends over so much; further off, over as much of the way
# how far aside it is expected to lie, in µm at 0 and in parts of the way; and from field to
# field, which counts most far off, where one specimen tells less than another
_SLIDE, _FIELD = (0.5, 0.01), (0.15, 0.03)
_LEAST_SD_UM = 0.1  # labels are no better, and no frame outvotes all others
_TAIL, _ROUNDS = 3.0, 10  # degrees of freedom; until the weights stand still
_KNOTS = 61
_LEAST = 12  # frames


@dataclass(frozen=True, slots=True)
class CurveFit(Worth):
    """A calibration curve, and what a model is worth with it.

    Attributes
    ----------
    curve : Curve
    """

    curve: Curve

    def to_json(self) -> dict[str, Any]:
        """The part ``curve`` of what ``mm-autofocus calibrate --json`` prints."""
        return {"at_focus_um": round(self.aside_um, 4), **super(CurveFit, self).to_json()}

    @property
    def aside_um(self) -> float:
        """What the model says of a frame in focus, in µm."""
        return float(np.interp(0.0, self.curve.defocus_um, self.curve.said_um))


def fit_curve(
    model: OnnxModel,
    stacks: Sequence[Planes],
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> CurveFit:
    """Find the calibration curve of a model by labelled stacks of a slide.

    Parameters
    ----------
    model : OnnxModel
        From `fitted_copy.onnx_model`: without a curve.
    stacks : sequence of Planes
        Labelled, of at least two fields of the slide.
    seed : int, optional
        Of the order of the fields.
    progress : callable, optional
        Is told what comes next.

    Raises
    ------
    InputError
        Too few fields, frames that the model cannot be shown, or too few that it answers.
    """
    say = progress or (lambda _: None)
    check_stacks(model, stacks, OPTION)
    fold = folds_of(stacks, seed)
    say("looking at the stacks")
    fields: dict[str, list[Planes]] = {}
    for stack in stacks:
        fields.setdefault(stack.group, []).append(stack)
    seen = {group: judged(model, some, len(stacks)) for group, some in fields.items()}
    say("fitting the calibration curve")
    checked = []
    for k in range(FOLDS):
        by = _curve(model.card, [seen[g] for g in seen if fold[g] != k])
        held_out = [seen[g] for g in seen if fold[g] == k]
        checked += [replace(s, predicted_um=by.of(s.predicted_um)) for s in held_out]
    every, found = together([*seen.values()]), together(checked)
    return CurveFit(
        mae_before_um=every.mae_um,
        mae_um=found.mae_um,
        frames=found.frames,
        fields=len(seen),
        error=fit_errors(found),
        curve=_curve(model.card, [*seen.values()]),
    )


def _curve(card: ModelCard, fields: Sequence[Seen]) -> Curve:
    """Through what was seen, field by field."""
    seen = together(fields)
    if len(seen.label_um) < _LEAST:
        raise InputError(
            f"{OPTION}: the model answers {len(seen.label_um)} of {seen.frames} frames of the "
            f"stacks of one half; at least {_LEAST} are needed"
        )
    expected = [consensus.expected_error(card, float(r)) for r in seen.raw_um]
    aside = np.abs(seen.label_um - seen.predicted_um)
    typical = 1.4826 * float(np.median(aside))  # where the model does not know
    sd = np.array([typical if e is None or not np.isfinite(e) else e for e in expected])
    field = np.repeat(np.arange(len(fields)), [len(s.label_um) for s in fields])
    return curve_through(seen.predicted_um, seen.label_um, sd, field)


def curve_through(
    said_um: Floats, defocus_um: Floats, sd_um: Floats, field: npt.NDArray[np.intp]
) -> Curve:
    """Calibration curve through frames of known defocus.

    Parameters
    ----------
    said_um, defocus_um, sd_um : numpy.ndarray
        ``(N,)``: what the model said, what it was, and by how much the model expected to err.
    field : numpy.ndarray
        ``(N,)``, of which field each is.

    Raises
    ------
    InputError
        The model says the same of all.
    """
    at, aside = np.arcsinh(said_um / _NEAR_UM), defocus_um - said_um
    noise = np.square(np.maximum(sd_um, _LEAST_SD_UM))
    one = field[:, None] == field[None]
    within = _alike(at, at, _SLIDE) + one * _alike(at, at, _FIELD)
    weight = np.ones_like(at)
    lever = np.zeros_like(at)
    for _ in range(_ROUNDS):
        lever = np.linalg.solve(within + np.diag(noise / weight), aside)
        weight = (_TAIL + 1) / (_TAIL + np.square(aside - within @ lever) / noise)
    ends = np.sinh([at.min(), at.max()]) * _NEAR_UM
    # the same knots on both sides, and one at 0
    knots = np.sinh(np.linspace(-1, 1, _KNOTS) * np.abs(at).max()) * _NEAR_UM
    knots = np.unique(np.clip(knots, *ends))
    if len(knots) < 2:
        raise InputError(f"{OPTION}: the model says {knots[0]:.3g} µm of every frame")
    is_um = knots + _alike(np.arcsinh(knots / _NEAR_UM), at, _SLIDE) @ lever
    # of two frames, the one said to be higher is not the lower one
    rising = np.maximum.accumulate(is_um)
    return Curve(said_um=tuple(knots.tolist()), defocus_um=tuple(rising.tolist()))


def _alike(one: Floats, other: Floats, high: tuple[float, float]) -> Floats:
    """Covariance ``(N, M)`` of how far aside a curve lies at two places, in µm²."""
    a, b = (high[0] + high[1] * _NEAR_UM * np.abs(np.sinh(x)) for x in (one, other))
    bell: Floats = np.exp(-0.5 * np.square(one[:, None] - other[None]))
    return a[:, None] * b[None] * bell


def write_curve(model: OnnxModel, output: Path, fit: CurveFit, *, data: str) -> None:
    """Write a copy of a model that has a calibration curve; whatever is there is replaced.

    Parameters
    ----------
    model : OnnxModel
        From `fitted_copy.onnx_model`.
    output : Path
        ``*.onnx`` to write.
    fit : CurveFit
    data : str
        Name of the stacks, for the card.
    """
    card = model.card
    facts = {"model": card.name, "data": data, **fit.to_json()}
    curve = fit.curve.model_copy(update={"fitted": facts})
    write_copy(model, output, card.model_copy(update={"curve": curve, "error": fit.error}))
