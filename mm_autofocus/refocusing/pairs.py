"""Which two planes belong together, and how far apart they were taken."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_autofocus.errors import InputError
from mm_autofocus.ometiff.following import PageAt
from mm_autofocus.ometiff.frames import REVISED, Focus, FrameRecord, Header, ImageKey
from mm_autofocus.ometiff.header import significant_bits
from mm_autofocus.ometiff.layout import describe_index

__all__ = ["Pair", "Pairing"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two shots of one tile, in one channel, at one time.

    Attributes
    ----------
    frame : FrameRecord
        What becomes of the record of the lower shot: that of the one image.
    lower, upper : PageAt
        Where their pixels are.
    z_um : (float, float) | None
        Where they were taken; None: only their distance is known.
    half_um : float
        Half of their distance, ΔD.
    max_value : float | None
        Value at which the camera saturates; None for floats.
    pixel_size_um : float | None
        In the specimen.
    """

    frame: FrameRecord
    lower: PageAt
    upper: PageAt
    z_um: tuple[float, float] | None
    half_um: float
    max_value: float | None
    pixel_size_um: float | None

    @property
    def name(self) -> str:
        """For messages: position and index."""
        index = {k: v for k, v in self.frame.index.items() if k != "z"}
        return " ".join(x for x in (self.frame.name, f"({describe_index(index)})") if x)


@dataclass(slots=True)
class Pairing:
    """Finds the pairs among frames that come in any order.

    Parameters
    ----------
    path : Path
        The file, for messages.
    header : Header
        Of the file.
    steps_um : mapping
        Image → distance of its planes, where planes do not say their z.
    """

    path: Path
    header: Header
    steps_um: Mapping[ImageKey, float] = field(default_factory=dict)
    _waiting: dict[Hashable, tuple[FrameRecord, PageAt]] = field(default_factory=dict)
    _focus: dict[Any, Focus] = field(default_factory=dict)
    _bits: int | None = None

    def __post_init__(self) -> None:
        # files of earlier versions say it in the state of the microscope only
        self._bits = self.header.significant_bits or significant_bits(self.header.summary or {})

    @property
    def alone(self) -> list[FrameRecord]:
        """Shots whose partner has not come."""
        return [frame for frame, _ in self._waiting.values()]

    def add(self, frame: FrameRecord, at: PageAt) -> Pair | None:
        """Take a frame; return the pair that it completes.

        Raises
        ------
        InputError
            It is of a third plane, its z is not known or the wrong way round, or both differ
            in shape or type.
        """
        if frame.at("z") > 1:
            raise InputError(
                f"{self.path}: its Z axis has more than two planes, which is not allowed: must "
                "be two, the shots at F - ΔD and F + ΔD"
            )
        self._learn(frame.focus)
        key = (frame.key, frame.at("t"), frame.at("c"), frame.at("cam"))
        partner = self._waiting.pop(key, None)
        if partner is None:
            self._waiting[key] = frame, at
            return None
        if partner[0].at("z") == frame.at("z"):
            raise InputError(
                f"{self.path}: there are two planes z={frame.at('z')} at "
                f"{describe_index(frame.index)}"
            )
        (lower, below), (upper, above) = sorted(
            (partner, (frame, at)), key=lambda shot: shot[0].at("z")
        )
        return self._pair(lower, below, upper, above)

    def _learn(self, focus: Focus | None) -> None:
        """Keep the autofocus record whole: only the frame that came first has all of it."""
        if focus is None:
            return
        focus_id = focus.get("focus_id")
        known = self._focus.get(focus_id, {})
        if focus.get(REVISED, 0) >= known.get(REVISED, 0):
            self._focus[focus_id] = {**known, **focus}
        else:
            self._focus[focus_id] = {**focus, **known}

    def _pair(
        self, lower: FrameRecord, below: PageAt, upper: FrameRecord, above: PageAt
    ) -> Pair:
        where = f"{self.path}: {describe_index(lower.index)}"
        if (lower.shape, lower.dtype) != (upper.shape, upper.dtype):
            raise InputError(f"{where}: the two planes differ in size or pixel type")
        z_um = None
        if lower.z_um is not None and upper.z_um is not None:
            z_um = lower.z_um, upper.z_um
            if not lower.z_um < upper.z_um:
                raise InputError(
                    f"{where}: the planes are in the wrong order: z={lower.z_um:g} and "
                    f"{upper.z_um:g} µm; the lower shot (F - ΔD) must come first"
                )
            half_um = (upper.z_um - lower.z_um) / 2
        elif step := self.steps_um.get(lower.key):
            half_um = step / 2
        else:
            raise InputError(
                f"{where}: the z of its planes is not known (neither PositionZ nor "
                "PhysicalSizeZ in µm); ΔD must be in the file"
            )
        focus = None if lower.focus is None else self._focus[lower.focus.get("focus_id")]
        times = [t for t in (lower.time_s, upper.time_s) if t is not None]
        frame = replace(
            lower,
            focus=None if focus is None else dict(focus),
            time_s=min(times, default=None),
            bits=lower.bits or self._bits,
        )
        return Pair(
            frame,
            below,
            above,
            z_um,
            half_um,
            _max_value(frame),
            lower.pixel_size_um or self.header.pixel_size_um,
        )


def _max_value(frame: FrameRecord) -> float | None:
    types = {"uint8": 8, "uint16": 16}
    bits = frame.bits or types.get(frame.dtype)
    return None if bits is None or frame.dtype not in types else float(2**bits - 1)
