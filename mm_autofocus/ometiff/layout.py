"""From frames to images: shapes, channels, and which planes hold no data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mm_autofocus.ometiff.frames import FrameRecord, ImageKey, image_key

if TYPE_CHECKING:
    import useq

__all__ = ["Gap", "ImageLayout", "Plan", "PlaneIndex", "lay_out"]

PlaneIndex: TypeAlias = tuple[int, int, int]
"""``(t, c, z)`` in the OME sense: c counts channels × cameras."""

Gap: TypeAlias = Literal["skipped", "missing", "not planned"]
"""Why a plane holds no data.

``skipped``: left out on purpose (``on_failure: skip``, a lost frame of the camera).
``missing``: planned, but the run ended before.
``not planned``: the plan has none there (``do_stack: false``, ``acquire_every: 2``).
"""

_Coord: TypeAlias = tuple[ImageKey, int, int, int, int]  # image, t, c, z, cam


def coordinate(index: dict[str, int]) -> _Coord:
    """Where a frame belongs."""
    get = index.get
    return image_key(index), get("t", 0), get("c", 0), get("z", 0), get("cam", 0)


class Plan:
    """The frames that a sequence asks for, in its order.

    It keeps little of each, because a plan may have hundreds of thousands.

    Parameters
    ----------
    frames : iterable of FrameRecord
        One per frame, with index, name and channel.
    """

    def __init__(self, frames: Iterable[FrameRecord] = ()) -> None:
        self._ranks: dict[_Coord, int] = {}
        self._order: list[_Coord] = []
        self._channels: dict[tuple[ImageKey, int], str] = {}
        self._images: dict[ImageKey, FrameRecord] = {}
        keys: dict[ImageKey, ImageKey] = {}
        for frame in frames:
            key, t, c, z, cam = coordinate(frame.index)
            key = keys.setdefault(key, key)
            self._images.setdefault(key, frame)
            self._channels.setdefault((key, c), frame.channel)
            self._ranks[key, t, c, z, cam] = len(self._order)
            self._order.append((key, t, c, z, cam))

    @classmethod
    def from_sequence(cls, sequence: useq.MDASequence, n_cameras: int = 1) -> Plan | None:
        """Expand `sequence`; None if it does not know its length.

        The sequence itself stays as it is: autofocus plans in it remember the last event
        that they saw, so that even looking at the events would change the run.
        """
        if not sequence.axis_order:
            return None  # events come from a generator; there is nothing to iterate
        # useq caches axes by (uid, content): another content keeps the copy apart
        copy = sequence.model_copy(deep=True)
        copy = copy.model_copy(update={"metadata": {**copy.metadata, "_copy": True}})
        return cls(_planned_frames(copy, n_cameras))

    def __len__(self) -> int:
        return len(self._order)

    def rank(self, index: dict[str, int]) -> int | None:
        """Place of the frame with this index in the order; None if it is not planned."""
        return self._ranks.get(coordinate(index))

    def frame(self, rank: int) -> FrameRecord:
        """What the plan says of the frame at this place."""
        key, t, c, z, cam = self._order[rank]
        like = self._images[key]
        places = {**dict(key), "t": t, "c": c, "z": z, "cam": cam}
        return FrameRecord(
            index={axis: places[axis] for axis in like.index},
            name=like.name,
            channel=self._channels[key, c],
            x_um=like.x_um,
            y_um=like.y_um,
        )

    def __iter__(self) -> Iterator[FrameRecord]:
        return (self.frame(rank) for rank in range(len(self._order)))

    def only(self, part: dict[str, int] | None) -> Plan:
        """Keep the frames whose index agrees with `part`."""
        if not part:
            return self
        return Plan(f for f in self if all(f.index.get(k, 0) == v for k, v in part.items()))


def _planned_frames(sequence: useq.MDASequence, n_cameras: int) -> Iterator[FrameRecord]:
    for event in sequence:
        if event.action.type != "acquire_image":
            continue
        for cam in range(n_cameras):
            index = dict(event.index)
            if n_cameras > 1:
                index["cam"] = cam
            yield FrameRecord(
                index=index,
                name=event.pos_name or "",
                channel=event.channel.config if event.channel else "",
                x_um=event.x_pos,
                y_um=event.y_pos,
            )


@dataclass(slots=True)
class ImageLayout:
    """One OME Image.

    Attributes
    ----------
    key : tuple
        ``(("p", 3), ("g", 0))``.
    name : str
        Of the position.
    shape : tuple of int
        Of a plane, ``(Y, X)`` or ``(Y, X, 3)``.
    dtype : str
        NumPy name.
    size_t, size_c, size_z : int
        c counts channels × cameras (an RGB plane is one channel).
    channels : list of str
        Names, "" where there is none.
    cameras : list of str
        Device of each channel.
    frames : dict of (t, c, z) → FrameRecord
        The real planes.
    gaps : dict of (t, c, z) → (reason, FrameRecord | None)
        All others within the shape.
    """

    key: ImageKey
    name: str
    shape: tuple[int, ...]
    dtype: str
    size_t: int = 1
    size_c: int = 1
    size_z: int = 1
    channels: list[str] = field(default_factory=list)
    cameras: list[str] = field(default_factory=list)
    frames: dict[PlaneIndex, FrameRecord] = field(default_factory=dict)
    gaps: dict[PlaneIndex, tuple[Gap, FrameRecord | None]] = field(default_factory=dict)


def image_name(key: ImageKey, position: str = "") -> str:
    """Position name, or its index; then the other axes, such as the tile of a grid."""
    axes = dict(key)
    p = axes.pop("p", 0)
    return "_".join([position or f"p{p:04d}", *(f"{a}{i:04d}" for a, i in axes.items())])


def lay_out(
    frames: Iterable[FrameRecord],
    skipped: Iterable[FrameRecord] = (),
    plan: Plan | None = None,
) -> list[ImageLayout]:
    """Arrange frames to images, ordered by position.

    An image is as large as what was taken or left out up to the last frame of the run.
    Where a run was cut short, what lay ahead is not there: no image for a position that
    was not reached, no time point that was not begun. What the run went past without a
    frame is a gap, as are holes in the plan.
    """
    real: dict[ImageKey, list[FrameRecord]] = defaultdict(list)
    passed: dict[ImageKey, list[FrameRecord]] = defaultdict(list)
    left: dict[ImageKey, list[FrameRecord]] = defaultdict(list)
    planned: dict[ImageKey, list[FrameRecord]] = defaultdict(list)
    last = -1
    for target, source in ((real, frames), (left, skipped)):
        for record in source:
            target[record.key].append(record)
            rank = None if plan is None else plan.rank(record.index)
            last = max(last, -1 if rank is None else rank)
    for rank, record in enumerate(plan or ()):
        planned[record.key].append(record)
        if rank <= last:
            passed[record.key].append(record)
    default = next((rs[0] for rs in real.values()), None)
    layouts = []
    for key in sorted({*real, *left, *passed}):
        like = real[key][0] if real.get(key) else default
        if like is None:
            continue  # not one frame in the whole file: there is no shape to give it
        reached = [*real[key], *left[key], *passed[key]]
        layouts.append(
            _one_image(key, like, reached, real=real[key], left=left[key], plan=planned[key])
        )
    return layouts


def _one_image(
    key: ImageKey,
    like: FrameRecord,
    reached: list[FrameRecord],
    *,
    real: list[FrameRecord],
    left: list[FrameRecord],
    plan: list[FrameRecord],
) -> ImageLayout:
    n_cam = max(r.at("cam") for r in reached) + 1
    n_c = max(r.at("c") for r in reached) + 1

    def place(record: FrameRecord) -> PlaneIndex:
        return record.at("t"), record.at("c") * n_cam + record.at("cam"), record.at("z")

    position = next((r.name for r in reached if r.name), "")
    image = ImageLayout(
        key=key,
        name=image_name(key, position),
        shape=like.shape,
        dtype=like.dtype,
        size_t=max(r.at("t") for r in reached) + 1,
        size_c=n_c * n_cam,
        size_z=max(r.at("z") for r in reached) + 1,
    )
    image.frames = {place(r): r for r in real}
    missing: dict[PlaneIndex, tuple[Gap, FrameRecord | None]] = {
        place(r): ("missing", None) for r in plan if r.at("cam") < n_cam
    }
    skips: dict[PlaneIndex, tuple[Gap, FrameRecord | None]] = {
        place(r): ("skipped", r) for r in left
    }
    reasons = {**missing, **skips}
    if len(image.frames) < image.size_t * image.size_c * image.size_z:
        nothing: tuple[Gap, None] = ("not planned" if plan else "missing", None)
        image.gaps = {
            at: reasons.get(at, nothing)
            for t in range(image.size_t)
            for c in range(image.size_c)
            for z in range(image.size_z)
            if (at := (t, c, z)) not in image.frames
        }
    image.channels, image.cameras = _channel_names(image.size_c, n_cam, [*reached, *plan])
    return image


def _channel_names(
    size_c: int, n_cam: int, records: list[FrameRecord]
) -> tuple[list[str], list[str]]:
    presets: dict[int, str] = {}
    cameras: dict[int, str] = {}
    for r in records:
        if r.channel:
            presets.setdefault(r.at("c"), r.channel)
        if r.camera:
            cameras.setdefault(r.at("cam"), r.camera)
    names = []
    for c in range(size_c):
        preset, camera = presets.get(c // n_cam, ""), cameras.get(c % n_cam, "")
        if n_cam == 1:
            names.append(preset)
        else:
            camera = camera or f"camera {c % n_cam}"
            names.append(f"{preset} [{camera}]" if preset else camera)
    return names, [cameras.get(c % n_cam, "") for c in range(size_c)]


def describe_index(index: dict[str, Any]) -> str:
    """``t=0, p=3`` for messages."""
    return ", ".join(f"{k}={v}" for k, v in index.items()) or "without an index"
