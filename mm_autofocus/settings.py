"""The settings of an autofocus: ``metadata["mm_autofocus"]`` of a plan, strictly read.

The same names are used in the YAML of a plan, in Python and with ``--set KEY=VALUE``.
An unknown key, a wrong type or a value out of range is one sentence that names the key,
the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mm_autofocus.errors import InputError
from mm_autofocus.registry import METRICS, STRATEGIES, suggest
from mm_autofocus.types import Optics

if TYPE_CHECKING:
    from typing import Self

    from pydantic_core import ErrorDetails

__all__ = [
    "AutofocusSettings",
    "EscalationStep",
    "MetricOptions",
    "ShadowSettings",
    "parse_settings",
    "settings_for",
]

KEY = "mm_autofocus"
"""The key in ``sequence.metadata`` and the namespace of the record in files."""

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Roi = tuple[
    Annotated[int, Field(ge=0)],
    Annotated[int, Field(ge=0)],
    Annotated[int, Field(ge=1)],
    Annotated[int, Field(ge=1)],
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class MetricOptions(_Strict):
    """Options of the focus measure.

    Attributes
    ----------
    colour : {"luminance", "green"}
        What of an RGB image is measured.
    normalize : bool
        Divide by the squared mean intensity, so that a flickering lamp does not move
        the peak. Off by default: fluorescence out of focus changes its mean, too.
    background : float
        Subtracted from the mean before normalising (camera offset, in grey values).
    noise : bool
        Subtract what the camera's noise alone would give, estimated from the image.
    tiles : int
        The image is measured in ``tiles × tiles`` parts and their median is taken, so
        that one bright piece of dirt does not decide. 1: the whole image.
    roi : [x, y, width, height] | None
        Only this part of the look is measured, in pixels. None: all of it.
    """

    colour: Literal["luminance", "green"] = "luminance"
    normalize: bool = False
    background: _NonNegative = 0.0
    noise: bool = False
    tiles: Annotated[int, Field(ge=1, le=32)] = 1
    roi: Annotated[_Roi | None, Field(strict=False)] = None


class EscalationStep(_Strict):
    """One further try when the strategy before it was not sure.

    Attributes
    ----------
    strategy : str
        Name of the strategy.
    range_um : float | None
        Its own search half-range around the start; None: that of the settings.
    step_um : float | None
        Its own first step.
    max_looks : int | None
        Its own look budget; None: what is left.
    model : str | None
        Its own model, where it is a learned strategy; None: that of the settings.
    """

    strategy: Annotated[str, AfterValidator(STRATEGIES.check)]
    range_um: _Positive | None = None
    step_um: _Positive | None = None
    max_looks: Annotated[int, Field(ge=1)] | None = None
    model: str | None = None


class ShadowSettings(_Strict):
    """A learned strategy that watches another one, and moves nothing.

    Attributes
    ----------
    strategy : str
        Name of the learned strategy.
    model : str | None
        Its model; None: that of the settings.
    """

    strategy: Annotated[str, AfterValidator(STRATEGIES.check)] = "one-shot"
    model: str | None = None


class AutofocusSettings(_Strict):
    """How to focus. *When* to focus is the plan's ``autofocus_plan``.

    A strategy with keys of its own declares a subclass of this as its ``Settings``.

    Attributes
    ----------
    strategy : str
        Name of the strategy.
    range_um : float
        Search half-range around the start of the search; also the maximum excursion. Where
        the start was guessed from a neighbour, the same around the plan's z is in reach.
    step_um : float | None
        First step; None: the strategy chooses it from optics and range.
    tolerance_um : float | None
        Expected error at which to stop. None: a third of the depth of field where `na`
        is known, else taken from the width of the focus curve.
    z_min_um, z_max_um : float | None
        Absolute limits of the stage, never left, neither by a look nor by a z-stack.
    max_looks : int
        Look budget of one search, escalation included.
    metric : str
        Focus measure.
    metric_options : MetricOptions
        See there.
    channel, channel_group : str | None
        Preset (and its group; None: the core's channel group) during the looks.
    exposure_ms, binning, roi
        Camera during the looks; None: as the plan or the operator has set it.
    crop : bool
        True: `roi` is cut from the full frame instead of being set on the camera.
    shutter : {"look", "sweep"}
        Open the shutter for each exposure only, or keep it open for the whole search.
    settle_ms : float
        Waited after each move of the focus stage.
    backlash_um : float
        Approach every z towards +z (positive) or -z (negative), from at least so far
        away. 0: no matter.
    repeatability_um : float
        Standard deviation of where the focus stage really stands when it reports a z: what
        looks tell of the focus curve is uncertain by so much, and so is the z of a frame.
        In replay 0 unless it is set: recorded planes are where they are.
    every : int
        Refocus a position only at every n-th time point.
    max_age_s : float | None
        Frames of a position whose focus is older are marked ``stale``.
    prior : {"last", "surface", "none"}
        Where a search begins: at the last focus of this position, or of its neighbour if
        it has none; at the surface fitted through all tiles focused so far; at the z of
        the plan.
    escalate : list
        What follows when the strategy is not sure: names, or mappings of `EscalationStep`.
    on_failure : {"keep", "skip", "pause", "abort"}
        keep: go back to the best known z, save, flag. skip: take no frames there (the
        file keeps its shape). pause: wait for the operator, then try again. abort: end
        the run.
    na, magnification, wavelength_um, refractive_index
        The optics, for the depth of field.
    model : str | None
        For learned strategies: a shipped name, the path of an ONNX file, or
        ``module:object`` of a model in Python.
    card : str | None
        Path of a model card in YAML, where the model has none inside and none beside it.
    providers : list of str
        What computes: cpu, cuda, ...; empty: the processor.
    verify : bool
        After a learned strategy of one look, the model looks at the first frame that is
        saved; if that is off by more than the tolerance, z is corrected and the frame
        is exposed again.
    max_corrections : int
        How often at most, for one focus.
    shadow : ShadowSettings | None
        A learned strategy that predicts from the looks of the strategy in charge; what it
        would have done is recorded, and nothing moves by it.
    """

    strategy: Annotated[str, AfterValidator(STRATEGIES.check)] = "hill-climb"
    range_um: _Positive = 20.0
    step_um: _Positive | None = None
    tolerance_um: _Positive | None = None
    z_min_um: _Finite | None = None
    z_max_um: _Finite | None = None
    max_looks: Annotated[int, Field(ge=3, le=1000)] = 20
    metric: Annotated[str, AfterValidator(METRICS.check)] = "brenner"
    metric_options: MetricOptions = Field(default_factory=MetricOptions)
    channel: str | None = None
    channel_group: str | None = None
    exposure_ms: _Positive | None = None
    binning: Annotated[int, Field(ge=1)] | None = None
    roi: Annotated[_Roi | None, Field(strict=False)] = None
    crop: bool = False
    shutter: Literal["look", "sweep"] = "look"
    settle_ms: _NonNegative = 0.0
    backlash_um: _Finite = 0.0
    repeatability_um: _NonNegative = 0.1
    every: Annotated[int, Field(ge=1)] = 1
    max_age_s: _Positive | None = None
    prior: Literal["last", "surface", "none"] = "last"
    escalate: tuple[EscalationStep, ...] = ()
    on_failure: Literal["keep", "skip", "pause", "abort"] = "keep"
    na: _Positive | None = None
    magnification: _Positive | None = None
    wavelength_um: _Positive = 0.55
    refractive_index: Annotated[float, Field(ge=1, le=2)] = 1.0
    model: str | None = None
    card: str | None = None
    providers: tuple[str, ...] = ()
    verify: bool = True
    max_corrections: Annotated[int, Field(ge=0, le=5)] = 1
    shadow: ShadowSettings | None = None

    @field_validator("providers", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("escalate", mode="before")
    @classmethod
    def _names_are_steps(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        return tuple({"strategy": v} if isinstance(v, str) else v for v in value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        low, high = self.z_min_um, self.z_max_um
        if low is not None and high is not None and not low < high:
            raise ValueError(f"z_min_um: {low:g} is not below z_max_um: {high:g}")
        if self.step_um is not None and self.step_um > self.range_um:
            raise ValueError(
                f"step_um: {self.step_um:g} is larger than range_um: {self.range_um:g}"
            )
        if self.crop and self.roi is None:
            raise ValueError("crop: true needs roi: [x, y, width, height]")
        for step in self.escalate:
            if step.strategy in ("hardware", "two-shot"):
                raise ValueError(
                    f"escalate: {step.strategy!r} can only come first; set it as the strategy "
                    "and let a software strategy follow"
                )
        self.optics()  # na against refractive_index
        return self

    @property
    def search(self) -> str:
        """Name of the strategy that searches: this one, unless it leaves that to another."""
        return self.strategy

    def optics(self, pixel_size_um: float | None = None) -> Optics:
        """The optics, with the pixel size (µm in the specimen) if the caller knows it."""
        return Optics(
            na=self.na,
            magnification=self.magnification,
            wavelength_um=self.wavelength_um,
            refractive_index=self.refractive_index,
            pixel_size_um=pixel_size_um or None,
        )


def parse_settings(
    data: Mapping[str, Any] | AutofocusSettings | None, *, where: str = f"metadata.{KEY}"
) -> AutofocusSettings:
    """Validate `data` by the schema of the strategy that it names.

    Parameters
    ----------
    data : mapping or AutofocusSettings or None
        Keys as in `AutofocusSettings`; None means all defaults.
    where : str
        Put before the key in messages.

    Raises
    ------
    InputError
        With the key, the value and what is allowed.
        Its attribute ``path`` is the tuple of keys that lead to the value.
    """
    if isinstance(data, AutofocusSettings):
        return data
    data = {} if data is None else data
    if not isinstance(data, Mapping):
        raise _error(f"{where}: {data!r} is not a mapping of settings", ())
    name = data.get("strategy", AutofocusSettings.model_fields["strategy"].default)
    model = AutofocusSettings
    if isinstance(name, str):
        try:
            model = getattr(STRATEGIES.get(name), "Settings", AutofocusSettings)
        except InputError as e:
            raise _error(f"{where}.{e}", ("strategy",)) from None
    try:
        settings = model.model_validate(dict(data))
    except ValidationError as e:
        first = e.errors()[0]
        raise _error(_sentence(model, first, where), _path(first)) from None
    # what a later step would refuse is refused now
    if settings.search != settings.strategy:
        settings_for(settings.search, settings, where=where)
    for step in settings.escalate:
        settings_for(step.strategy, settings, model=step.model, where=where)
    if (shadow := settings.shadow) is not None:
        settings_for(shadow.strategy, settings, model=shadow.model, where=where)
    return settings


def settings_for(
    strategy: str,
    settings: AutofocusSettings,
    *,
    model: str | None = None,
    where: str = f"metadata.{KEY}",
) -> AutofocusSettings:
    """The settings of a further strategy: those of the first that all strategies share.

    Parameters
    ----------
    strategy : str
        Whose.
    settings : AutofocusSettings
        Of the strategy that comes first.
    model : str, optional
        A model of its own.
    where : str
        Put before the key in messages.

    Raises
    ------
    InputError
        The strategy refuses them.
    """
    schema = getattr(STRATEGIES.get(strategy), "Settings", AutofocusSettings)
    shared = {
        key: getattr(settings, key)
        for key in AutofocusSettings.model_fields
        if key in settings.model_fields_set
    }
    shared |= {"strategy": strategy, "escalate": (), "shadow": None}
    if model is not None:
        shared |= {"model": model, "card": None}
    try:
        validated: AutofocusSettings = schema.model_validate(shared)
    except ValidationError as e:
        first = e.errors()[0]
        raise _error(_sentence(schema, first, where), _path(first)) from None
    return validated


def _error(sentence: str, path: tuple[str | int, ...]) -> InputError:
    error = InputError(sentence)
    error.path = path  # type: ignore[attr-defined]
    return error


def _path(error: ErrorDetails) -> tuple[str | int, ...]:
    return tuple(error["loc"])


def _sentence(model: type[BaseModel], error: ErrorDetails, where: str) -> str:
    """One sentence for one error of pydantic's, in the words of the settings."""
    path = _path(error)
    key = ".".join([where, *map(str, path)])
    kind, value, message = error["type"], error["input"], error["msg"]
    if kind == "extra_forbidden":
        owner: Any = model
        for part in path[:-1]:
            if part == "escalate":
                owner = EscalationStep
            elif part == "metric_options":
                owner = MetricOptions
            elif part == "shadow":
                owner = ShadowSettings
        allowed = list(owner.model_fields)
        return (
            f"{key}: unknown key{suggest(str(path[-1]), allowed)}; "
            f"allowed: {', '.join(allowed)}"
        )
    if kind == "value_error":
        message = str(error.get("ctx", {}).get("error", message))
        # registry and cross-field messages name their key themselves
        last = str(path[-1]) if path else ""
        if not path or message.startswith(f"{last}:"):
            prefix = ".".join([where, *map(str, path[:-1])])
            return f"{prefix}.{message}"
        return f"{key}: {message}"
    if kind in {"float_type", "int_type"} and isinstance(value, str):
        unit = _unit(str(path[-1])) if path else ""
        message = f"must be a number{f' in {unit}' if unit else ''}, without quotes or a unit"
    elif kind == "literal_error":
        message = f"must be one of {error['ctx']['expected']}"
    else:
        message = message[0].lower() + message[1:]
        message = message.replace("input should", "must")
        unit = _unit(str(path[-1])) if path else ""
        if unit and kind.startswith(("greater", "less")):
            message += f" ({unit})"
    return f"{key}: {value!r} is not allowed: {message}"


def _unit(key: str) -> str:
    for suffix, unit in (("_um", "µm"), ("_ms", "ms"), ("_s", "seconds")):
        if key.endswith(suffix):
            return unit
    return ""
