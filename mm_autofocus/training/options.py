"""How a net is trained: options from a YAML file and from ``--set KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_validator,
)

from mm_autofocus.errors import InputError
from mm_autofocus.registry import suggest
from mm_autofocus.training.augment import AugmentOptions

__all__ = [
    "PairOptions",
    "TheoryOptions",
    "TrainOptions",
    "merge_sets",
    "read_options",
    "read_options_file",
]


def _rises(value: tuple[float, float]) -> tuple[float, float]:
    if not value[0] <= value[1]:
        raise ValueError("the smaller end comes first")
    return value


_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Range = Annotated[tuple[FiniteFloat, FiniteFloat], AfterValidator(_rises)]


class PairOptions(BaseModel):
    """How two shots lie to focus, for the nets that recover the sharp image.

    Attributes
    ----------
    half_um : tuple of float
        Smallest and largest distance of a shot from the middle of both (ΔD of the paper).
    focus_sd_um, focus_most_um : float
        The middle is off the focus of a field by a normal random number of this standard
        deviation, cut at ± the second. The paper takes 1 µm.
    tolerance_um : float | None
        How far a plane may lie beside where a shot would have been taken; default: half the
        distance of the planes.
    truth : {"plane", "fusion"}
        The plane in focus; or, of specimens thicker than the depth of field, a fusion of all
        planes, sharp all over.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    half_um: tuple[float, float] = (0.5, 3.0)
    focus_sd_um: Annotated[float, Field(ge=0)] = 1.0
    focus_most_um: Annotated[float, Field(ge=0)] = 2.5
    tolerance_um: _Positive | None = None
    truth: Literal["plane", "fusion"] = "plane"

    @field_validator("half_um")
    @classmethod
    def _rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two distances above 0, the smaller first")
        return value


class TheoryOptions(BaseModel):
    """What is drawn to teach a net spectra of patches that nobody took, by theory.

    Attributes
    ----------
    patches, passes : int
        How many are drawn at least, and how often they are gone through; 0 patches: none.
    heights, each : int
        Of each lens and slide, and patches of the slide at each of these heights.
    sigma : tuple of float
        Condenser aperture over objective aperture.
    spherical_waves, astigmatism_waves : tuple of float
        Aberrations of the lens, in waves rms.
    axial_colour_um : tuple of float
        Focus of red minus focus of blue, as in `optics.Aberrations`.
    thickness_um : tuple of float
        Of the specimen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    patches: Annotated[int, Field(ge=0)] = 0
    passes: _Count = 4
    heights: _Count = 4
    each: _Count = 8
    sigma: _Range = (0.3, 0.9)
    spherical_waves: _Range = (-0.1, 0.1)
    astigmatism_waves: _Range = (-0.05, 0.05)
    axial_colour_um: _Range = (-1.0, 1.0)
    thickness_um: _Range = (1.0, 6.0)

    @field_validator("sigma")
    @classmethod
    def _apertures(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.01 <= value[0] <= value[1] <= 0.98:
            raise ValueError("two numbers from 0.01 to 0.98, the smaller first")
        return value


class TrainOptions(BaseModel):
    """Options of the training.

    Attributes
    ----------
    model : str
        Name of the net.
    net : dict
        Options of this net: ``net.widths``, ...
    looks_um : tuple of float
        Offsets of the looks from the present z.
    look_tolerance_um : float
        How far a plane may lie beside where a look would have been taken.
    range_um : tuple of float | None
        Defocus to train on; default: what half of the stacks cover.
    patch_px, train_px : int
        Edge of a patch at run time; in training, where smaller is faster (default: same).
    epochs, batch : int
        Passes; patches of one step, over all devices.
    patches_per_stack : int
        In one epoch.
    near_share, near_um : float
        Of this part of the patches the defocus lies within ± `near_um`.
    spectra_patches, spectra_passes : int
        Of nets that read spectra: of so many patches these are computed first, and so many
        passes over them teach the part that reads them, before the epochs (and their
        minutes) begin, in which it is then adapted at a tenth of `lr`; 0 patches: not.
    theory : TheoryOptions
        Spectra by theory, which teach that part before those of patches do.
    mosaics : float
        Mosaics for the importance per patch; 0 leaves it untrained.
    lr, schedule, warmup, weight_decay, clip : float, str
        Largest learning rate of AdamW; ``one-cycle``, ``cosine`` or ``constant``; part of
        the training in which it rises; decay; largest norm of the gradient.
    ema : float
        Weights are averaged with this decay; 0: not.
    patience : int | None
        Epochs without a better validation after which it ends.
    max_minutes : float | None
        Time after which it ends; the schedule is stretched to it.
    checkpoint_minutes : float
        At the latest after so long the state is saved.
    seed : int
        Of everything.
    precision : str
        ``auto``, or as Lightning Fabric names it: ``32-true``, ``bf16-mixed``, ...
    accelerator, devices, strategy : str, int, str
        As Lightning Fabric names them.
    workers : int | None
        Processes that read, per device; default: by the number of cores.
    init : str | None
        What it begins with the weights of (fine-tuning): a run, a checkpoint, the name of a
        shipped model, or an ONNX file of ``export``. Options of the net that are not given are
        those of that one.
    augment : AugmentOptions
        How samples are changed.
    pairs : PairOptions
        How two shots lie, for nets that recover the sharp image.
    validation_planes, validation_patches, validation_most : int
        Looks (or pairs of shots) of each validation stack, patches of each, patches in all.
    split_by : {"field", "slide"}
        If no split is written in the dataset, one is drawn by this.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "sparsefocus"
    net: dict[str, Any] = Field(default_factory=dict)
    looks_um: tuple[float, ...] = (0.0,)
    look_tolerance_um: _Positive = 0.25
    range_um: tuple[float, float] | None = None
    patch_px: Annotated[int, Field(ge=16)] = 224
    train_px: Annotated[int, Field(ge=16)] | None = None
    epochs: _Count = 20
    batch: Annotated[int, Field(ge=2)] = 64
    patches_per_stack: _Count = 32
    near_share: _Share = 0.0
    near_um: _Positive = 4.0
    spectra_patches: Annotated[int, Field(ge=0)] = 0
    spectra_passes: _Count = 24
    theory: TheoryOptions = Field(default_factory=TheoryOptions)
    mosaics: _Share = 0.125
    lr: _Positive = 2e-3
    schedule: Literal["one-cycle", "cosine", "constant"] = "one-cycle"
    warmup: _Share = 0.2
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: _Positive = 5.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    patience: _Count | None = None
    max_minutes: _Positive | None = None
    checkpoint_minutes: _Positive = 10.0
    seed: Annotated[int, Field(ge=0)] = 0
    precision: str = "auto"
    accelerator: str = "auto"
    devices: _Count = 1
    strategy: str = "auto"
    workers: Annotated[int, Field(ge=0)] | None = None
    init: str | None = None
    augment: AugmentOptions = Field(default_factory=AugmentOptions)
    pairs: PairOptions = Field(default_factory=PairOptions)
    validation_planes: _Count = 8
    validation_patches: _Count = 4
    validation_most: _Count = 2048
    split_by: Literal["field", "slide"] = "field"

    @field_validator("looks_um")
    @classmethod
    def _one_way(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        steps = [b - a for a, b in pairwise(value)]
        if not value or any(s * steps[0] <= 0 for s in steps):
            raise ValueError("must rise or fall strictly, as the stage approaches")
        return value

    @field_validator("range_um")
    @classmethod
    def _rises(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("the smaller end comes first")
        return value

    @property
    def crop_px(self) -> int:
        """Edge of a patch in training."""
        return self.train_px or self.patch_px

    def to_yaml(self) -> str:
        """As they are written into the folder of the run."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def merge_sets(base: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``KEY=VALUE`` pairs over options; ``net.widths`` reaches into ``net``."""
    merged: dict[str, Any] = {
        k: dict(v) if isinstance(v, Mapping) else v for k, v in base.items()
    }
    for key, value in sets.items():
        outer, dot, inner = key.partition(".")
        if not dot:
            merged[outer] = value
            continue
        there = merged.setdefault(outer, {})
        if not isinstance(there, dict):
            raise InputError(f"--set {key}: {outer} holds no keys")
        there[inner] = value
    return merged


def read_options(data: Mapping[str, Any], *, where: str = "options") -> TrainOptions:
    """Check options.

    Raises
    ------
    InputError
        With the key, the value and what is allowed.
    """
    allowed = list(TrainOptions.model_fields)
    for key in data:
        if key not in allowed:
            raise InputError(
                f"{where}: {key!r} is unknown{suggest(key, allowed)}; allowed: "
                f"{', '.join(allowed)}"
            )
    try:
        return TrainOptions.model_validate(dict(data))
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        why = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: {key}: {first['input']!r} is not allowed: {why}") from None


def read_options_file(path: Path) -> dict[str, Any]:
    """Read a YAML file of options, not yet checked.

    Raises
    ------
    InputError
        No such file, or no mapping in it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise InputError(f"{path}: does not parse as YAML") from None
    if not isinstance(data, Mapping):
        raise InputError(f"{path}: is no mapping of options")
    return dict(data)
