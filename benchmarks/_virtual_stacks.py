"""Z-stacks of virtual slides that no training has seen, each under a lens of its own.

The draws are those of `mm_autofocus.sim.draws`, with the seeds kept for benchmarks. The focus
is the simulator's own: where Brenner's measure of the noiseless image is largest. What the
model is shown are frames of the camera, noise, dust, shading and rounding included.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from mm_autofocus.errors import InputError
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.sim.draws import BENCHMARK_SEEDS, Draw, draw
from mm_autofocus.sim.microscope import SENSORS, Microscope
from mm_autofocus.sim.render import View
from mm_autofocus.sim.slide import SlideSettings, Sparsity, load_picture
from mm_autofocus.sim.truth import measured_focus_um
from mm_autofocus.training.label import StackMeter
from mm_autofocus.types import Optics

CLASSES: tuple[Sparsity, ...] = ("dense", "sparse", "extremely-sparse")
PICTURES = ("tiatoolbox_target_image.png", "tcgafocus_32381_sharp.png")
# Neighbouring seeds share some of their noise.
SPACING = 20
QUALITY = "standard"
PIXEL_UM = 0.325
# every 0.5 µm about focus, for the label; every 1 µm further off, every 2 µm as far as the
# nets reach
CALIBRATION_UM = tuple(
    sorted({*map(float, range(-26, 27, 2)), *map(float, range(-6, 7)), -1.5, -0.5, 0.5, 1.5})
)
_STACKS = 2  # that one calibration takes
_CALIBRATED = 50_000  # from the seed of a place to that of the slide for its calibration
DOF_UM = 0.98

Made = TypeVar("Made")


@dataclass(frozen=True)
class Place:
    """One field: which slide, and what kind of field on it."""

    seed: int
    kind: str
    picture: str
    sparsity: Sparsity

    @property
    def name(self) -> str:
        """For the table: tissue, smear, or the name of the picture."""
        return Path(self.picture).stem.partition("_")[0] if self.picture else self.kind


def places(n: int, textures: Path) -> list[Place]:
    """`n` fields of each class, each on a slide of its own, kinds in turn."""
    pictures = [str(textures / p) for p in PICTURES if (textures / p).is_file()]
    kinds = [("tissue", ""), ("picture", pictures[0] if pictures else ""), ("smear", "")]
    kinds.append(("picture", pictures[-1] if pictures else ""))
    return [
        Place(BENCHMARK_SEEDS[SPACING * (len(CLASSES) * j + i)], *kinds[j % len(kinds)], c)
        for j in range(n)
        for i, c in enumerate(CLASSES)
    ]


@dataclass
class VirtualStack:
    """A stack that is rendered when it is first looked at (`training.judges.Planes`).

    Attributes
    ----------
    place : Place
        Where.
    z_um : sequence of float
        Of each plane, relative to the measured focus.
    side : int
        Edge of the frame in pixels.
    folder : Path | None
        Where rendered frames are kept.
    under : Place | None
        The place under whose lens, lamp and camera this one is brought; None: its own.
    which : int
        Of the fields of this kind on the slide.
    """

    place: Place
    z_um: Sequence[float]
    side: int
    folder: Path | None = None
    under: Place | None = None
    which: int = 0
    truth: Mapping[str, Any] | None = None
    bit_depth: int = 8
    dtype: str = "uint8"
    _frames: Any = field(default=None, repr=False)

    @property
    def group(self) -> str:
        return f"{self.place.name}/{self.place.seed}"

    @property
    def sparsity(self) -> str:
        return self.place.sparsity

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.z_um), self.side, self.side, 3)

    @property
    def defocus_um(self) -> np.ndarray:
        return np.asarray(self.z_um, float)

    def known_optics(self) -> Optics:
        return Optics(na=0.75, magnification=20.0, pixel_size_um=PIXEL_UM)

    def plane(self, k: int) -> np.ndarray:
        return np.asarray(self.load()[k])

    def planes(self) -> Iterator[tuple[float, np.ndarray]]:
        yield from zip(self.z_um, self.load(), strict=True)

    def load(self) -> np.ndarray:
        if self._frames is None:
            file = None if self.folder is None else self.folder / f"{self._key()}.npy"
            if file is not None and file.is_file():
                self._frames = np.load(file)
            else:
                self._frames = self._render()
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    temporary = file.with_suffix(".new.npy")
                    np.save(temporary, self._frames)
                    temporary.replace(file)
        return self._frames

    def _key(self) -> str:
        drawn = drawn_at(self.place, self.under).to_json()
        facts = [drawn, self.place.sparsity, list(self.z_um), self.side, QUALITY, 2]
        facts += [self.which] if self.which else []
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def _render(self) -> np.ndarray:
        found = open_place(self.place, self.side, under=self.under, which=self.which)
        out = np.empty(self.shape, np.uint8)
        for k, z in enumerate(self.z_um):
            out[k] = found.frame(z, k)
        return out


@dataclass(frozen=True)
class OpenPlace:
    """A field under its lens, in front of its camera, and where its focus is."""

    drawn: Draw
    scope: Microscope
    view: View
    focus_um: float

    def frame(self, defocus_um: float, number: int | None) -> np.ndarray:
        """What the camera gives; without noise where `number`, of the frame, is None."""
        scope = self.scope
        return scope.camera.expose(
            scope.renderer.image(self.view, self.focus_um + defocus_um),
            dose=self.drawn.dose,
            frame=number,
            bit_depth=8,
            sensor=SENSORS[scope.sensor],
            roi=scope.window,
        )


def drawn_at(place: Place, under: Place | None = None) -> Draw:
    """What is drawn for a place; the microscope that of another, if one is named."""
    drawn = draw(place.seed, place.kind, picture=place.picture)
    if under is None:
        return drawn
    scope = draw(under.seed, under.kind, picture=under.picture)
    return replace(drawn, optics=scope.optics, camera=scope.camera, dose=scope.dose)


def open_place(
    place: Place, side: int, *, under: Place | None = None, which: int = 0
) -> OpenPlace:
    """Find the field and its focus; InputError if the slide has no such field."""
    drawn = drawn_at(place, under)
    scope = Microscope()
    scope.sensor = f"{side}x{side}"
    scope.set_quality(QUALITY)
    drawn.apply(scope)
    field_um = (side * PIXEL_UM,) * 2
    # Pictures are repeated in mirrored tiles: begin in the middle of one.
    picture = place.kind == "picture"
    middle = _middle_um(scope.slide_settings) if picture else (0.0, 0.0)
    x, y = scope.slide.find_fields(place.sparsity, which + 1, field_um, start=middle)[which]
    view = scope.view(x, y)
    focus = measured_focus_um(scope, view=view)
    if focus is None:
        raise InputError(f"{place.name}/{place.seed}: the field is blank")
    return OpenPlace(drawn, scope, view, focus)


def tried(places: Iterable[Place]) -> Iterator[Iterator[Place]]:
    """Of each place, it and those with the next seeds: a slide may have no such field."""
    for place in places:
        yield (replace(place, seed=place.seed + other) for other in range(SPACING))


def _middle_um(settings: SlideSettings) -> tuple[float, float]:
    """Middle of the first tile of a picture, x and y."""
    _, height, width = load_picture(settings.picture).shape
    return tuple(settings.picture_um_per_px * (n - 1) / 2 for n in (width, height))


def stacks(
    n: int,
    *,
    planes: int,
    side: int,
    textures: Path,
    looks_um: Sequence[float] = (0.0,),
    half_um: float = 25.0,
    cache: Path | None = None,
) -> Iterator[VirtualStack]:
    """Stacks of `planes` over ± `half_um`, and beyond as far as further looks reach.

    A slide without a field of the class gives way to the one with the next seed.
    """
    step = 2 * half_um / (planes - 1)
    below = math.ceil(max(0.0, -min(looks_um)) / step - 1e-9)
    above = math.ceil(max(0.0, *looks_um) / step - 1e-9)
    z = [round((k - (planes - 1) / 2) * step, 6) for k in range(-below, planes + above)]
    for candidates in tried(places(n, textures)):
        yield first_of(candidates, lambda place: _loaded(place, z, side, cache))


def first_of(candidates: Iterable[Place], make: Callable[[Place], Made]) -> Made:
    """What can be made of the first of these places of which anything can."""
    why = InputError("no place")
    for place in candidates:
        try:
            return make(place)
        except InputError as e:
            why = e
    raise why


def calibration_stacks(
    place: Place, *, side: int, textures: Path, cache: Path | None = None
) -> list[VirtualStack]:
    """What a user would take to calibrate the microscope of a place.

    Stacks of two dense fields of a slide that no benchmark judges, under the lens and in front
    of the camera of that place; `defocus_um` is by the label that `collect` would give them.
    """
    kinds = [(p.kind, p.picture) for p in places(4, textures)[:: len(CLASSES)]]
    number = BENCHMARK_SEEDS.index(place.seed)
    kind, picture = kinds[number % len(kinds)]
    other = Place(BENCHMARK_SEEDS[number + _CALIBRATED], kind, picture, "dense")

    def both(candidate: Place) -> list[VirtualStack]:
        return _labelled(candidate, range(2), side, cache, under=place)

    return first_of(next(tried([other])), both)


def slide_stacks(place: Place, *, side: int, cache: Path | None = None) -> list[VirtualStack]:
    """What a user would take to calibrate on the slide of a place: two other dense fields."""
    # the first dense field is the one that is judged
    return _labelled(replace(place, sparsity="dense"), range(1, 9), side, cache)


def _labelled(
    place: Place,
    which: Iterable[int],
    side: int,
    cache: Path | None,
    under: Place | None = None,
) -> list[VirtualStack]:
    """The first two of these fields of a slide whose stack has a label."""
    found: list[VirtualStack] = []
    for k in which:
        stack = LabelledStack(place, CALIBRATION_UM, side, cache, under=under, which=k)
        stack.load()
        if stack.label is not None:
            found.append(stack)
        if len(found) == _STACKS:
            return found
    raise InputError(f"{place.name}/{place.seed}: fewer than {_STACKS} fields with a label")


@dataclass
class LabelledStack(VirtualStack):
    """A stack whose focus is known by its frames, as that of a recorded one."""

    @property
    def group(self) -> str:
        return f"{super().group}/{self.which}"

    @cached_property
    def label(self) -> float | None:
        meter = StackMeter(FocusMeasure())
        for z_um, frame in self.planes():
            meter.add(z_um, frame)
        return meter.label(self.known_optics().dof_um).focus_z_um

    @property
    def defocus_um(self) -> np.ndarray:
        return np.asarray(self.z_um, float) - (self.label or 0.0)


def _loaded(place: Place, z: list[float], side: int, cache: Path | None) -> VirtualStack:
    stack = VirtualStack(place, z, side, cache)
    stack.load()
    return stack
