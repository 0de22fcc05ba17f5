"""What a dataset says of its microscope, and how to focus on it.

Depth of field, offsets between channels or colours, size of a patch that has enough to focus
on, and whether the sign of defocus is in one image. What only the stage itself can tell
(backlash and repeatability: recorded stacks do not hold them) is measured on the microscope,
see `mm_autofocus.training.stage_play`; here both become settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.settings import AutofocusSettings, MetricOptions
from mm_autofocus.training.flatness import Flatness, flatness_of
from mm_autofocus.training.focus_curves import (
    Depth,
    Offset,
    channel_offsets,
    depth_of,
    offset_of,
    patch_errors,
)
from mm_autofocus.training.label import StackMeter
from mm_autofocus.training.sign import Series, SignTest, sign_test
from mm_autofocus.training.split import groups_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.training.dataset import Dataset
    from mm_autofocus.training.stack import Stack
    from mm_autofocus.types import Image

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["Images", "calibrate"]

_MOST_STACKS = 120  # more of them say nothing new, and take their time
_TILE = 128  # what is kept of a stack for the sign test, in pixels
_TILES = 160  # of all stacks together
_MOST_TILES = 4  # of one stack
_BANDS = ("green", "red", "blue")  # the first is what the others are compared with
_BAND_OF = {"red": 0, "green": 1, "blue": 2}
_PATCHES = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448)
_WIDTHS = 1 / 3  # of the focus curve's width: where no optics are known, the scale of sign


@dataclass(frozen=True, slots=True)
class Images:
    """What the stacks say.

    Attributes
    ----------
    stacks, fields : int
        Labelled ones.
    used : int
        Stacks whose planes were read.
    depth : Depth
        Depth of field.
    channels, colours : list of Offset
        Offsets between channels, and between the colours of RGB images, from green.
    sign : SignTest
        Whether the sign of defocus is in one image.
    sign_least_um : float
        Least |defocus| that the sign test asked about.
    range_um : float
        How far the stacks reach on both sides of focus, in the median.
    patch_px : int | None
        Edge of a patch that has enough in it to focus on.
    patch_errors_um : dict
        Edge of patches in pixels → how far their focus lies from the frame's, median.
    channel : str | None
        With several channels, the one that focuses most surely.
    optics : dict
        na, magnification, wavelength_um, refractive_index as the stacks say.
    flatness : Flatness | None
        By how much focus differs from field to field of a slide.
    metric : dict
        ``metric`` and ``metric_options`` of the labels, where they are not the defaults.
    curves : list
        ``(z - focus, score / peak)`` of some stacks, for a picture.
    """

    stacks: int
    fields: int
    used: int
    depth: Depth
    channels: list[Offset]
    colours: list[Offset]
    sign: SignTest
    sign_least_um: float
    range_um: float
    patch_px: int | None
    patch_errors_um: dict[int, float]
    channel: str | None = None
    optics: dict[str, float] = field(default_factory=dict)
    flatness: Flatness | None = None
    metric: dict[str, Any] = field(default_factory=dict)
    curves: list[tuple[list[float], list[float]]] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """The part ``images`` of what ``mm-autofocus calibrate --json`` prints."""
        return {
            "stacks": self.stacks,
            "fields": self.fields,
            "used": self.used,
            "dof": self.depth.to_json(),
            "channel_offsets": [o.to_json() for o in self.channels],
            "colour_offsets": [o.to_json() for o in self.colours],
            "sign": {**self.sign.to_json(), "least_um": self.sign_least_um},
            "range_um": self.range_um,
            "patch_px": self.patch_px,
            "patch_errors_um": {str(k): v for k, v in self.patch_errors_um.items()},
            "channel": self.channel,
            "optics": self.optics,
            "flatness": None if self.flatness is None else self.flatness.to_json(),
        }


def calibrate(
    dataset: Dataset,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Images:
    """Calibrate from the labelled stacks of a dataset.

    Parameters
    ----------
    dataset : Dataset
        Its labels are believed.
    seed, steps : int, optional
        Of the sign test; see `mm_autofocus.training.sign.sign_test`.
    progress : callable, optional
        Is told what comes next.

    Raises
    ------
    InputError
        No label, or a file that cannot be read.
    """
    say = progress or (lambda _: None)
    labelled = dataset.labelled
    if not labelled:
        raise InputError(f"{dataset.path}: the dataset has no labels to calibrate from")
    depth = depth_of(labelled)
    scale = _scale_um(depth)
    channel = _surest_channel(labelled)
    chosen = _evenly(labelled, channel)
    say(f"reading {len(chosen)} stacks")
    measure = _measure(dataset)
    each = min(max(_TILES // len(chosen), 1), _MOST_TILES)
    group = _groups(chosen)
    series: list[Series] = []
    colours: dict[str, list[float]] = {band: [] for band in _BANDS[1:]}
    off: dict[int, list[float]] = {}
    for k, stack in enumerate(chosen):
        seen = _read(stack, measure, each)
        for window in seen.windows:
            series.append(Series(k, group[stack.group], seen.defocus_um, window))
        for band, apart in seen.colours.items():
            colours[band].append(apart)
        for n, error in seen.patches.items():
            off.setdefault(min(stack.shape[1:3]) // n, []).append(error)
    same = {s.images.shape[1] for s in series}
    if len(same) > 1:
        raise InputError(
            f"{dataset.path}: grey and RGB stacks are in one dataset; one kind at a time"
        )
    say("asking whether one image tells the side of focus")
    sign = sign_test(series, scale, seed=seed, steps=steps)
    errors = {px: float(np.median(e)) for px, e in sorted(off.items())}
    reach = [min(-d.min(), d.max()) for d in (s.defocus_um for s in labelled)]
    return Images(
        stacks=len(labelled),
        fields=len({s.group for s in labelled}),
        used=len(chosen),
        depth=depth,
        channels=channel_offsets(labelled),
        colours=[o for b, v in colours.items() if (o := offset_of(b, _BANDS[0], v))],
        sign=sign,
        sign_least_um=scale,
        range_um=float(np.median(reach)),
        patch_px=_patch(errors, depth.um or scale, min(min(s.shape[1:3]) for s in chosen)),
        patch_errors_um=errors,
        channel=None if channel is None else chosen[0].channel_name or None,
        optics=_optics(labelled),
        flatness=flatness_of(
            s for s in labelled if s.channel in (channel, labelled[0].channel)
        ),
        metric=_metric(measure),
        curves=[_curve(s) for s in chosen[:60]],
    )


def _scale_um(depth: Depth) -> float:
    """Depth of field that the sign test counts in: from optics, else from the curves."""
    if depth.optics_um is not None:
        return depth.optics_um
    if depth.width_um is not None:
        return _WIDTHS * depth.width_um.median
    raise InputError("the stacks show neither optics nor a focus curve of any width")


def _surest_channel(stacks: Sequence[Stack]) -> int | None:
    """Number of the channel whose labels are expected to err least; None with one only."""
    errors: dict[int, list[float]] = {}
    for s in stacks:
        errors.setdefault(s.channel, []).append(s.expected_error_um or math.inf)
    if len(errors) < 2:
        return None
    most = max(len(v) for v in errors.values())
    often = {c: v for c, v in errors.items() if len(v) >= 0.8 * most}
    return min(often, key=lambda c: (float(np.median(often[c])), c))


def _evenly(stacks: Sequence[Stack], channel: int | None) -> list[Stack]:
    """At most so many stacks of one channel, from all over the dataset."""
    ours = [s for s in stacks if channel is None or s.channel == channel]
    index = np.linspace(0, len(ours) - 1, min(len(ours), _MOST_STACKS)).round().astype(int)
    return [ours[i] for i in index]


def _groups(stacks: Sequence[Stack]) -> dict[str, str]:
    """Field → the first name of the fields it is held out with."""
    return {name: names[0] for names in groups_of(stacks, "field") for name in names}


def _measure(dataset: Dataset) -> FocusMeasure:
    options = MetricOptions.model_validate(dataset.meta.get("metric_options") or {})
    return FocusMeasure(dataset.meta.get("metric") or "brenner", options)


def _metric(measure: FocusMeasure) -> dict[str, Any]:
    """Settings of a focus measure, where they are not the defaults."""
    options = measure.options.model_dump(exclude_defaults=True)
    plain = AutofocusSettings.model_fields["metric"].default
    return ({"metric": measure.name} if measure.name != plain else {}) | (
        {"metric_options": options} if options else {}
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one reading of a stack leaves."""

    defocus_um: Floats
    windows: list[npt.NDArray[Any]]
    colours: dict[str, float]
    patches: dict[int, float]


def _read(stack: Stack, measure: FocusMeasure, each: int) -> _Seen:
    """Read a stack once, plane by plane, and keep its most interesting windows."""
    order = np.argsort(stack.z_um)
    sharpest = int(np.argmax(stack.scores)) if stack.scores else len(stack.z_um) // 2
    corners = _corners(measure.grey(stack.plane(sharpest)), each)
    size = min(_TILE, *stack.shape[1:3])
    kept: list[list[npt.NDArray[Any]]] = [[] for _ in corners]
    tiles: list[Floats] = []
    bands = {b: StackMeter(measure) for b in _BANDS} if stack.is_rgb else {}
    for z_um, image in stack.planes():
        planes: Image = image if image.ndim == 3 else image[..., None]
        for (y, x), part in zip(corners, kept, strict=True):
            window = planes[y : y + size, x : x + size]
            part.append(np.ascontiguousarray(np.moveaxis(window, -1, 0)))
        tiles.append(measure.tile_scores(measure.grey(image)))
        for band, meter in bands.items():
            meter.add(z_um, np.ascontiguousarray(image[..., _BAND_OF[band]]))
    foci = {b: label.focus_z_um for b, m in bands.items() if (label := m.label())}
    green = foci.get(_BANDS[0])
    apart = {b: f - green for b, f in foci.items() if f is not None and green is not None}
    apart.pop(_BANDS[0], None)
    z = np.asarray(stack.z_um)[order]
    scores = np.stack(tiles)[order]
    patches = patch_errors(z, scores) if scores.shape[1] == 64 else {}
    windows = [np.stack([part[k] for k in order]) for part in kept]
    return _Seen(stack.defocus_um[order], windows, apart, patches)


def _corners(grey: Image, count: int) -> list[tuple[int, int]]:
    """Corners of the windows with most detail, without overlap."""
    size = [min(_TILE, n) for n in grey.shape]
    rows, columns = (max(n // s, 1) for n, s in zip(grey.shape, size, strict=True))
    a = np.asarray(grey, np.float32)
    detail = []
    for i in range(rows):
        for j in range(columns):
            y, x = i * size[0], j * size[1]
            part = a[y : y + size[0], x : x + size[1]]
            detail.append((float(np.square(part[:, 2:] - part[:, :-2]).mean()), (y, x)))
    detail.sort(reverse=True)
    return [corner for _, corner in detail[:count]]


def _patch(errors: dict[int, float], dof_um: float, frame_px: int) -> int | None:
    """The smallest usual patch whose focus is the frame's within half a depth of field."""
    allowed = [p for p in _PATCHES if p <= frame_px]
    if not errors or not allowed:
        return None
    # not much worse than the largest parts are: a tilted field has no single focus
    limit = max(dof_um / 2, 1.2 * errors[max(errors)])
    good = [px for px, error in errors.items() if error <= limit]
    least = min(good, default=frame_px)
    return next((p for p in allowed if p >= least), allowed[-1])


def _optics(stacks: Sequence[Stack]) -> dict[str, float]:
    """What the stacks agree on."""
    found = {}
    for name in ("na", "magnification", "wavelength_um", "refractive_index"):
        values = {s.optics.get(name) for s in stacks}
        if len(values) == 1 and (value := values.pop()) is not None:
            found[name] = float(value)
    return found


def _curve(stack: Stack) -> tuple[list[float], list[float]]:
    order = np.argsort(stack.z_um)
    d, s = stack.defocus_um[order], np.asarray(stack.scores)[order]
    return d.tolist(), (s / max(float(s.max()), 1e-300)).tolist()
