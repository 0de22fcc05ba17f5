"""The card of a model: what it was trained on, what it is to be shown, what it answers.

An ONNX file of this package carries its card inside; a net from elsewhere has one beside it,
``MODEL.card.yaml``, written by hand. It is read as strictly as the settings: an unknown
key, a wrong type or a value out of range is one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mm_autofocus.errors import InputError
from mm_autofocus.models.card_parts import (
    Count,
    Curve,
    ErrorModel,
    Floats,
    Importance,
    LensInput,
    NonNegative,
    Normalisation,
    Outputs,
    PatchInput,
    Positive,
    Shots,
    Strict,
    TopK,
)
from mm_autofocus.models.ood import OodStats
from mm_autofocus.models.sentences import sentence_of

if TYPE_CHECKING:
    from typing import Self

    from mm_autofocus.types import Optics

__all__ = [
    "KEY",
    "UNSEALED",
    "Curve",
    "ErrorModel",
    "Importance",
    "LensInput",
    "ModelCard",
    "Normalisation",
    "Outputs",
    "PatchInput",
    "Shots",
    "TopK",
    "parse_card",
    "read_sidecar",
    "sidecar_of",
]

KEY = "mm_autofocus.card"
"""Key of the card in the metadata of an ONNX file."""

UNSEALED = "0" * 64
"""What stands in place of the checksum until the file is sealed."""

# Finer frames lose nothing by being shrunk; coarser ones do not hold what was trained on.
_LEAST_SCALE, _MOST_SCALE = 0.2, 2.0


class ModelCard(Strict):
    """What a model is. Lengths are µm; None where it is not known.

    Attributes
    ----------
    format : {1}
        Of the card.
    name, architecture : str
        Of the model, and of the net.
    task : {"defocus", "refocus"}
        What it answers: where focus is, or what the image there looks like.
    looks_um : list of float
        z of each look, relative to the present z, rising or falling strictly. The answer is
        the defocus of the present z, 0, whether or not a look is taken there.
    channels : {1, 3}
        Of one look: grey or RGB.
    patch_px : int
        Edge of a patch.
    inputs, normalisation, outputs, importance, error
        See the classes. No importance: every patch with content is looked at.
    lens : LensInput | None
        What the net may be told of the lens; None: nothing.
    curve : Curve | None
        From what the net says to the defocus, of the slide that it was calibrated on; None:
        as the net says it.
    pixel_size_um : float | None
        Of the frames it was trained on, in the specimen.
    pixel_tolerance : float
        Relative difference in pixel size that it bears.
    may_rescale : bool
        Frames with another pixel size are scaled to it, instead of being refused.
    na, magnification : float | None
        Of the objective.
    shots : Shots | None
        Of the task ``refocus``, and only of that: it takes two shots and no looks.
    z_range_um : (float, float)
        Lowest and highest defocus of the training; of two shots, of their middle.
    dof_um : float | None
        Depth of field.
    bit_depths : list of int
        Of the cameras it was trained on; empty: it does not matter.
    ood : OodStats | None
        What frames of the training look like.
    training : dict
        ``data``, ``licence``, ``command``, ``seed``, ``stacks`` and what else is known.
    metrics : dict
        Figures with the data they stand on; simulated ones say so.
    sha256 : str
        Of the file, taken with zeros in this place; all zeros: not sealed. In a card beside
        the model: of the file as it is.
    """

    format: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    architecture: str = ""
    task: Literal["defocus", "refocus"] = "defocus"
    looks_um: Annotated[Floats, Field(min_length=1)] = (0.0,)
    channels: Literal[1, 3]
    patch_px: Annotated[int, Field(ge=8)]
    inputs: PatchInput = Field(default_factory=PatchInput)
    normalisation: Normalisation = Field(default_factory=Normalisation)
    outputs: Outputs = Field(default_factory=Outputs)
    importance: Importance | None = None
    lens: LensInput | None = None
    curve: Curve | None = None
    pixel_size_um: Positive | None = None
    pixel_tolerance: NonNegative = 0.1
    may_rescale: bool = False
    na: Positive | None = None
    magnification: Positive | None = None
    z_range_um: Annotated[tuple[float, float], Field(strict=False)]
    dof_um: Positive | None = None
    bit_depths: Annotated[tuple[Count, ...], Field(strict=False)] = ()
    shots: Shots | None = None
    error: ErrorModel = Field(default_factory=ErrorModel)
    ood: OodStats | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    metrics: dict[str, Any] = Field(default_factory=dict)
    # last, so that its place in the file is the last one of that name in the card
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] = UNSEALED

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        looks = self.looks_um
        steps = [b - a for a, b in pairwise(looks)]
        if any(s * steps[0] <= 0 for s in steps):
            raise ValueError(
                f"looks_um: {list(looks)} is not allowed: must rise or fall strictly, for "
                "the looks are taken in one approach"
            )
        if (self.task == "refocus") != (self.shots is not None):
            raise ValueError(
                f"shots: {'is missing' if self.shots is None else 'is not allowed'} with the "
                f"task {self.task!r}"
            )
        low, high = self.z_range_um
        if not low < high:
            raise ValueError(f"z_range_um: {low:g} is not below {high:g}")
        allowed = {1, self.channels, self.channels * len(looks)}
        for key in ("mean", "std"):
            value = getattr(self.normalisation, key)
            if isinstance(value, tuple) and len(value) not in allowed:
                raise ValueError(
                    f"normalisation.{key}: {len(value)} numbers are not allowed: must be "
                    f"{' or '.join(map(str, sorted(allowed)))}"
                )
        return self

    @property
    def n_looks(self) -> int:
        """How many looks it is shown."""
        return len(self.looks_um)

    @property
    def planes(self) -> int:
        """Channels of the net's input: looks (or shots) × channels."""
        count = len(self.looks_um) if self.shots is None else self.shots.count
        return count * self.channels

    @property
    def sealed(self) -> bool:
        """Whether the card states a checksum."""
        return self.sha256 != UNSEALED

    def to_json(self) -> str:
        """The card as compact JSON, as it is stored in an ONNX file."""
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, *, where: str = "card") -> ModelCard:
        """Read a card from JSON.

        Raises
        ------
        InputError
            With the key, the value and what is allowed.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as e:
            raise InputError(sentence_of(e, cls, where)) from None

    def scale_from(self, pixel_size_um: float | None) -> float:
        """By what frames of this pixel size are to be enlarged; 1: not at all."""
        if not (self.may_rescale and pixel_size_um and self.pixel_size_um):
            return 1.0
        scale = pixel_size_um / self.pixel_size_um
        return 1.0 if abs(scale - 1) < 0.01 else scale

    def check_pixel_size(self, pixel_size_um: float | None) -> str:
        """Return why frames of this pixel size do not fit; ``""`` if they do, or unknown."""
        own = self.pixel_size_um
        if not pixel_size_um or own is None:
            return ""
        ratio = pixel_size_um / own
        if self.may_rescale:
            if _LEAST_SCALE <= ratio <= _MOST_SCALE:
                return ""
            bounds = f"{_LEAST_SCALE * own:g} … {_MOST_SCALE * own:g} µm, by rescaling"
        elif abs(ratio - 1) <= self.pixel_tolerance * (1 + 1e-9):
            return ""
        else:
            bounds = f"{own:g} µm ± {100 * self.pixel_tolerance:g} %"
        return f"pixel size {pixel_size_um:g} µm, the model takes {bounds}"

    def check_frame(
        self,
        shape: tuple[int, ...],
        *,
        max_value: float | None = None,
        pixel_size_um: float | None = None,
    ) -> None:
        """Refuse frames that the model cannot be shown.

        Parameters
        ----------
        shape : tuple of int
            ``(Y, X)`` or ``(Y, X, 3)`` of one look.
        max_value : float | None
            Value at which the camera saturates.
        pixel_size_um : float | None
            In the specimen.

        Raises
        ------
        InputError
            Wrong channels, less than one patch, another bit depth or pixel size.
        """
        self.check_camera(shape, max_value=max_value, pixel_size_um=pixel_size_um)
        least = round(self.patch_px / self.scale_from(pixel_size_um))
        if min(shape[:2]) < least:
            raise InputError(
                f"model {self.name!r}: a frame of {shape[1]} × {shape[0]} pixels is less than "
                f"one patch of {least}"
            )

    def check_camera(
        self,
        shape: tuple[int, ...],
        *,
        max_value: float | None = None,
        pixel_size_um: float | None = None,
    ) -> None:
        """Refuse frames of other channels, another bit depth or pixel size; of any extent.

        Parameters and errors are those of `check_frame`.
        """
        self.check_shape(shape)
        bits = bits_of(max_value)
        if self.bit_depths and bits is not None and bits not in self.bit_depths:
            allowed = " or ".join(map(str, self.bit_depths))
            raise InputError(
                f"model {self.name!r}: frames of {bits} bits are not allowed: it was trained "
                f"on {allowed}"
            )
        if why := self.check_pixel_size(pixel_size_um):
            raise InputError(f"model {self.name!r}: {why}")

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse an image whose axes or channels are not the model's."""
        channels = 1 if len(shape) == 2 else shape[-1] if len(shape) == 3 else 0
        if channels != self.channels:
            found = {1: "grey", 3: "RGB"}.get(channels, f"of shape {tuple(shape)}")
            wants = {1: "grey", 3: "RGB"}[self.channels]
            raise InputError(
                f"model {self.name!r}: the frame is {found}, the model takes {wants} frames"
            )

    def check_optics(self, optics: Optics) -> list[str]:
        """What differs between these optics and those of the training, clause by clause."""
        clauses = []
        for key, name in (("na", "NA"), ("magnification", "magnification")):
            own, other = getattr(self, key), getattr(optics, key)
            if own is not None and other is not None and abs(other / own - 1) > 0.05:
                clauses.append(f"{name} {other:g}, trained at {own:g}")
        return clauses


def bits_of(max_value: float | None) -> int | None:
    """Bits of a camera that saturates at ``2^bits - 1``; None for any other value."""
    if max_value is None or max_value < 1:
        return None
    bits = math.log2(max_value + 1)
    return round(bits) if abs(bits - round(bits)) < 1e-6 else None


def sidecar_of(model: Path) -> Path:
    """Where the hand-written card of ``MODEL.onnx`` lies: ``MODEL.card.yaml`` beside it."""
    return model.with_name(f"{model.stem}.card.yaml")


def read_sidecar(path: Path) -> ModelCard:
    """Read a hand-written card, YAML (or JSON).

    Raises
    ------
    InputError
        The file is missing, is no YAML, or a key is not as it must be.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"card: {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"card: {path} does not parse as YAML") from None
    except OSError as e:
        raise InputError(f"card: {path} cannot be read ({e.strerror})") from None
    return parse_card(data, where=str(path))


def parse_card(data: ModelCard | Mapping[str, Any], *, where: str = "card") -> ModelCard:
    """Read a card from a mapping.

    Raises
    ------
    InputError
        With the key, the value and what is allowed.
    """
    if isinstance(data, ModelCard):
        return data
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: {data!r} is not a mapping of keys of a card")
    # By way of JSON, for a list in YAML is a tuple of the card, and nothing else may change.
    return ModelCard.from_json(json.dumps(dict(data), default=str), where=where)
