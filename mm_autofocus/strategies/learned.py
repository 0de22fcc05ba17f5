"""What the learned strategies share: looks in one approach, a prediction, one move.

How the looks are taken, and when a model is asked again, is in `_asking`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import model_validator

from mm_autofocus.errors import InputError
from mm_autofocus.settings import AutofocusSettings
from mm_autofocus.strategies._asking import Answer, Asking
from mm_autofocus.types import FocusRequest, FrameFormat, Look, Looking, Verdict

if TYPE_CHECKING:
    from typing import Self

    from mm_autofocus.models.card import ModelCard
    from mm_autofocus.models.runtime import FocusModel, Prediction

__all__ = ["Learned", "LearnedSettings", "error_of_frame"]

logger = logging.getLogger(__name__)


class LearnedSettings(AutofocusSettings):
    """Settings of a learned strategy: those of all, of which `model` is needed."""

    @model_validator(mode="after")
    def _has_model(self) -> Self:
        if self.model is None:
            raise ValueError(
                f"model: strategy {self.strategy!r} needs a model: a shipped name, the path of "
                "an ONNX file, or module:object"
            )
        return self


class Learned:
    """A strategy that asks a model.

    Parameters
    ----------
    settings : AutofocusSettings, optional
        ``model``, ``card`` and ``providers`` say which; ``backlash_um`` in which direction
        several looks are taken.
    model : FocusModel, optional
        The model itself, instead.

    Raises
    ------
    InputError
        There is no such model, it is damaged, or takes another number of looks.

    Notes
    -----
    The prior of a request decides where the look is taken, by its start; it is not mixed
    into the prediction, which is better than any surface where it is worth anything.
    """

    name: str = "learned"
    several: ClassVar[bool] = False
    """Whether its models take more than one look."""

    Settings = LearnedSettings

    def __init__(
        self, settings: AutofocusSettings | None = None, *, model: FocusModel | None = None
    ) -> None:
        settings = settings or AutofocusSettings()
        if model is None:
            if settings.model is None:
                raise InputError(f"model: strategy {self.name!r} needs a model")
            # not at the top: an acquisition loads only what it uses
            from mm_autofocus.models.importing import load_model

            model = load_model(
                settings.model, card=settings.card, providers=settings.providers or None
            )
        self.model = model
        n = self.card.n_looks
        if (n > 1) != self.several:
            other = "one-shot" if self.several else "two-look"
            raise InputError(
                f"model: {self.card.name!r} takes {n} look{'s' if n > 1 else ''}; "
                f"strategy {self.name!r} needs a model of "
                f"{'two or more' if self.several else 'one'}, strategy {other!r} takes this one"
            )
        # with a stage that is approached from above, from the uppermost look downwards
        self._downwards = settings.backlash_um < 0

    @property
    def card(self) -> ModelCard:
        """The model's card."""
        return self.model.card

    @property
    def identity(self) -> dict[str, str]:
        """Name and short checksum of the model, for the record."""
        return {"model": self.card.name, "model_sha256": self.card.sha256[:12]}

    def prepare(self, frames: FrameFormat) -> None:
        """Refuse looks that the model cannot be shown, and compute once.

        Raises
        ------
        InputError
            Channels, bit depth, pixel size or shape do not fit the model's card.
        """
        self.card.check_frame(
            frames.shape,
            max_value=frames.max_value,
            pixel_size_um=frames.optics.pixel_size_um,
        )
        for clause in self.card.check_optics(frames.optics):
            logger.warning("model %r: %s", self.card.name, clause)
        self.model.warm(frames.shape)

    def focus(self, request: FocusRequest) -> Looking:
        """Begin the search that `request` describes."""
        return Asking(self, request, downwards=self._downwards).run()

    def tolerance_um(self, request: FocusRequest) -> float | None:
        """Up to which expected error a result is ``ok``: of the request, or of the card."""
        tolerance = request.effective_tolerance_um
        if tolerance is None and self.card.dof_um is not None:
            return self.card.dof_um / 3
        return tolerance

    def ask(self, looks: Sequence[Look], base_um: float, request: FocusRequest) -> Answer:
        """Show the model `looks`, in the order of its card; never raises for its sake.

        Parameters
        ----------
        looks : sequence of Look
            One per offset of the card.
        base_um : float
            z from which the offsets count, in µm.
        request : FocusRequest
            Of which the optics matter.
        """
        try:
            prediction = self.model.predict(
                [look.image for look in looks],
                max_value=looks[0].max_value,
                pixel_size_um=request.optics.pixel_size_um,
            )
        except Exception as e:  # a model may raise anything; the tile has failed, not the run
            logger.warning("model %r failed: %s", self.card.name, e, exc_info=True)
            why = str(e).splitlines()[0] if str(e) else type(e).__name__
            return self._nothing(base_um, f"the model failed: {why}", {})
        return self._answer(prediction, base_um)

    def _answer(self, prediction: Prediction, base_um: float) -> Answer:
        defocus, error = prediction.defocus_um, prediction.expected_error_um
        details = {
            "z_um": base_um,
            "defocus_um": defocus,
            "expected_error_um": error,
            "patches": len(prediction.patch_defocus_um),
            "content": prediction.content,
            "sparsity": prediction.sparsity,
            "spread_um": prediction.spread_um,
            "ood": prediction.ood,
            "reasons": list(prediction.reasons),
        }
        if defocus is None:
            return self._nothing(base_um, "; ".join(prediction.reasons) or "blank", details)
        if not math.isfinite(defocus):
            details["defocus_um"] = None
            return self._nothing(base_um, "the model's prediction is no number", details)
        if error is not None and not math.isfinite(error):
            details["expected_error_um"] = error = None
        low, high = self.card.z_range_um
        clipped = min(max(defocus, low), high)
        reasons = tuple(prediction.reasons)
        if clipped != defocus and not reasons:  # a model from elsewhere may not say so
            reasons = (f"prediction beyond the trained range of {low:g} … {high:g} µm",)
        return Answer(
            base_um,
            base_um - clipped,
            error,
            reasons,
            clipped != defocus,
            prediction.ood is not None and prediction.ood > 1,
            details,
        )

    def _nothing(self, base_um: float, reason: str, details: dict[str, Any]) -> Answer:
        details = {"z_um": base_um, **details}
        return Answer(base_um, None, None, (reason,), False, False, details)

    def verify(self, frame: Look, request: FocusRequest, offset_um: float) -> Verdict | None:
        """Judge a frame meant to be taken `offset_um` above focus.

        Parameters
        ----------
        frame : Look
            The frame that is going to be saved.
        request : FocusRequest
            Of the search that led there.
        offset_um : float
            Where the plan wants it, relative to focus, in µm.

        Returns
        -------
        Verdict | None
            None for a model of more than one look: a single frame tells it nothing.
        """
        if self.card.looks_um != (0.0,):
            return None
        answer = self.ask([frame], frame.z_um, request)
        tolerance = self.tolerance_um(request)
        if answer.z_um is None:
            return Verdict(None, None, tolerance, "; ".join(answer.reasons))
        defocus = answer.base_um - answer.z_um - offset_um
        return Verdict(defocus, answer.expected_error_um, tolerance, "; ".join(answer.reasons))


def error_of_frame(
    before_um: float | None, defocus_um: float, expected_error_um: float | None
) -> float | None:
    """Expected error of a frame that was judged, in µm.

    What the search expected (0 ± `before_um`) and what the frame shows (`defocus_um` ±
    `expected_error_um`) are weighed by their variances. Both come from one model and one
    specimen, so that two of them are not taken to know more than the better one.
    """
    if expected_error_um is None:
        return before_um
    if before_um is None:
        return math.hypot(defocus_um, expected_error_um)
    total = before_um**2 + expected_error_um**2
    mean = defocus_um * before_um**2 / total if total else defocus_um
    return math.hypot(mean, min(before_um, expected_error_um))
