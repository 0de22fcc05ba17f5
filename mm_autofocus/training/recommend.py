"""From what was measured to how to focus: strategy, looks, patches and settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm_autofocus.settings_file import settings_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm_autofocus.models.card import ModelCard
    from mm_autofocus.training.calibrate import Images
    from mm_autofocus.training.stage_play import StagePlay

__all__ = ["Recommendation", "recommend"]

_SURE = 2.0  # times its upper limit is the backlash travelled back and up again
_LEAST_PLAY_UM = 0.05  # backlash that no frame shows


@dataclass(frozen=True, slots=True)
class Recommendation:
    """How to focus on this microscope.

    Attributes
    ----------
    strategy : {"one-shot", "two-look", "hill-climb"}
        Best of what the images allow; the first two need a trained model.
    looks_um : tuple of float | None
        Offsets of the looks of that model; None for a search.
    patch_px : int | None
        Its patches.
    settings : dict
        What can be used now: without a model, a search.
    why : dict
        Setting → where it comes from.
    next_step : str
        What to do to get the model; empty if there is one or none is recommended.
    """

    strategy: str
    looks_um: tuple[float, ...] | None
    patch_px: int | None
    settings: dict[str, Any]
    why: dict[str, str] = field(default_factory=dict)
    next_step: str = ""

    def to_json(self) -> dict[str, Any]:
        """The part ``recommended`` of the document."""
        return {
            "strategy": self.strategy,
            "looks_um": None if self.looks_um is None else list(self.looks_um),
            "patch_px": self.patch_px,
            "settings": self.settings,
            "next_step": self.next_step,
        }

    def text(self) -> str:
        """The settings as a file."""
        notes = "Measured by mm-autofocus calibrate; for run --settings, or to paste in a plan."
        return settings_text(
            self.settings, self.why, "\n".join(n for n in (notes, self.next_step) if n)
        )


def recommend(
    images: Images | None,
    stage: StagePlay | None,
    *,
    given: Mapping[str, Any] | None = None,
    model: str | None = None,
    tried: tuple[ModelCard, str] | None = None,
) -> Recommendation:
    """Recommend settings.

    Parameters
    ----------
    images : Images | None
        From recorded stacks.
    stage : StagePlay | None
        From the microscope.
    given : mapping, optional
        Settings of the user's, which are kept.
    model : str, optional
        A trained model that is to be used.
    tried : tuple, optional
        Card of that model and what it is worth on the stacks, if it was tried on them: no
        test of the images says more.

    Raises
    ------
    InputError
        The user's settings do not fit in.
    """
    strategy, looks, patch, step = "hill-climb", None, None, ""
    settings: dict[str, Any] = {}
    why: dict[str, str] = {}

    def put(key: str, value: Any, reason: str) -> None:
        settings[key], why[key] = value, reason

    if images is not None:
        looks, patch = images.sign.looks_um, images.patch_px
    if tried is not None:
        looks, patch = tried[0].looks_um, tried[0].patch_px
    if looks is not None:
        strategy = "one-shot" if len(looks) == 1 else "two-look"
    learned = strategy != "hill-climb"
    settings["strategy"] = strategy if model and learned else "hill-climb"
    if learned:
        assert looks is not None
        at = ", ".join(f"{x:g}" for x in looks)
        why["strategy"] = f"looks at [{at}] µm"
        if model:
            put("model", model, "as asked for" if tried is None else tried[1])
        else:
            why["strategy"] = "until a model is trained"
            step = (
                f"With a model trained for looks at [{at}] µm"
                + (f" and patches of {patch} pixels" if patch else "")
                + f", set strategy: {strategy} and model: MODEL.onnx."
            )
    if images is not None:
        _from_images(images, put)
    if stage is not None:
        _from_stage(stage, put)
    for key, value in (given or {}).items():
        put(key, value, "as given")
    return Recommendation(strategy, looks, patch, settings, why, step)


def _from_images(images: Images, put: Any) -> None:
    for key, value in {**images.metric, **images.optics}.items():
        put(key, value, "as in the dataset")
    dof, width = images.depth.optics_um, images.depth.width_um
    reach = math.ceil(2 * images.range_um) / 2
    if dof is not None:
        put("tolerance_um", round(dof / 3, 3), f"a third of the depth of field, {dof:.2f} µm")
    elif width is not None:  # no tolerance: a thick specimen's curve is wider than the field
        step = round(min(width.median, reach), 2)
        put("step_um", step, "width of the focus curve at half height")
    put("range_um", reach, "as far as the stacks reach about focus")
    if images.channel is not None:
        put("channel", images.channel, "the channel that focuses most surely")


def _from_stage(stage: StagePlay, put: Any) -> None:
    b = stage.backlash
    said = f"measured {b.um:.2f} ({b.low_um:.2f} … {b.high_um:.2f}) µm"
    most = max(abs(b.low_um), abs(b.high_um))
    if stage.has_backlash and most > _LEAST_PLAY_UM:
        put("backlash_um", math.ceil(10 * _SURE * most) / 10, f"{said}; upwards, from below")
    else:
        put("backlash_um", 0.0, said)
    r = stage.repeatability
    put(
        "repeatability_um",
        round(r.um, 3),
        f"measured, {r.low_um:.2f} … {r.high_um:.2f} µm with 95 % confidence",
    )
