"""The devices of the virtual microscope, for ``UniMMCore``.

A configuration loads them by lines like
``#py pyDevice,Camera,mm_autofocus.sim.devices,VirtualCamera``; ``virtual_slide.cfg`` is one.
All settings are device properties and have the names of the settings they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pymmcore_plus.experimental.unicore import (
    CameraDevice,
    GenericDevice,
    ShutterDevice,
    StateDevice,
)

from mm_autofocus.errors import InputError
from mm_autofocus.sim.base import VirtualDevice
from mm_autofocus.sim.camera import CAMERA_RANGES
from mm_autofocus.sim.microscope import OBJECTIVES, PIXEL_FORMATS, SENSORS
from mm_autofocus.sim.render import CHANNELS, QUALITIES
from mm_autofocus.sim.slide import KINDS, SLIDE_RANGES, SlideSettings
from mm_autofocus.sim.stages import VirtualFocus, VirtualFocusLock, VirtualXYStage

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

__all__ = [
    "VirtualCamera",
    "VirtualFilter",
    "VirtualFocus",
    "VirtualFocusLock",
    "VirtualLamp",
    "VirtualObjective",
    "VirtualOptics",
    "VirtualShutter",
    "VirtualSlide",
    "VirtualXYStage",
]


class VirtualCamera(VirtualDevice, CameraDevice):
    """Camera: RGB or grey, several sizes, binning, region of interest.

    A wrong value is a frame of the grey value ``fault_value``.
    """

    OPERATIONS = ("snap",)

    def __init__(self) -> None:
        super().__init__()
        self.set_property_allowed_values("Binning", (1, 2, 4))
        self.set_property_limits("Exposure", (0.01, 60000.0))
        self.add(
            "sensor", str, lambda: self.scope.sensor, self._set_sensor, allowed=tuple(SENSORS)
        )
        self.add(
            "pixel_format",
            str,
            lambda: self.scope.pixel_format,
            lambda v: setattr(self.scope, "pixel_format", v),
            allowed=tuple(PIXEL_FORMATS),
        )
        for name, limits in CAMERA_RANGES.items():
            kind = int if name in ("dust", "camera_seed") else float
            self.add(
                name,
                kind,
                partial(self._setting, name),
                partial(self._set_setting, name),
                limits=limits,
            )

    def _setting(self, name: str) -> Any:
        return getattr(self.scope.camera.settings, name)

    def _set_setting(self, name: str, value: Any) -> None:
        self.scope.set_camera(**{name: value})

    def _set_sensor(self, name: str) -> None:
        self.scope.sensor = name
        self.scope.roi = None

    def get_exposure(self) -> float:
        """Exposure in ms."""
        return self.scope.exposure_ms

    def set_exposure(self, exposure: float) -> None:
        """Set the exposure in ms, 0.01 to 60000."""
        if not 0.01 <= exposure <= 60000:
            raise InputError(f"exposure: {exposure:g} ms is not between 0.01 and 60000")
        self.scope.exposure_ms = float(exposure)

    def get_binning(self) -> int:
        """Pixels along one axis that are averaged."""
        return self.scope.binning

    def set_binning(self, value: int) -> None:
        """Set the binning and reset the region of interest."""
        self.scope.binning = int(value)
        self.scope.roi = None

    def shape(self) -> tuple[int, int] | tuple[int, int, int]:
        """Shape of a frame."""
        _, _, w, h = self.scope.window
        colours = PIXEL_FORMATS[self.scope.pixel_format][0]
        return (h, w, 3) if colours == 3 else (h, w)

    def dtype(self) -> DTypeLike:
        """Type of the pixels."""
        return np.uint8 if PIXEL_FORMATS[self.scope.pixel_format][1] == 8 else np.uint16

    def get_roi(self) -> tuple[int, int, int, int]:
        """Region of interest: x, y, width, height in binned pixels."""
        return self.scope.window

    def set_roi(self, x: int, y: int, width: int, height: int) -> None:
        """Set the region of interest, at least 8 × 8 binned pixels."""
        ny, nx = self.scope.frame_shape
        if min(x, y) < 0 or min(width, height) < 8 or x + width > nx or y + height > ny:
            raise InputError(
                f"roi: {x}, {y}, {width}, {height} is not within {nx} × {ny} pixels, "
                "8 or more along each side"
            )
        self.scope.roi = (int(x), int(y), int(width), int(height))

    def clear_roi(self) -> None:
        """Use the whole sensor."""
        self.scope.roi = None

    def start_sequence(
        self, n: int | None, get_buffer: Callable[[Sequence[int], DTypeLike], Any]
    ) -> Iterator[Mapping[str, Any]]:
        """Take `n` frames, or frames without end."""
        # A single snap has its shutter opened by the core; sequences have to ask for it.
        count = 0
        single = n == 1
        try:
            while n is None or count < n:
                wrong = self.call("snap")
                if not single:
                    self.scope.sequence_running = True
                frame = self.scope.expose()
                if wrong:
                    frame = np.full_like(
                        frame, np.clip(self.wrong_by, 0, np.iinfo(frame.dtype).max)
                    )
                buffer = get_buffer(frame.shape, frame.dtype)
                buffer[:] = frame
                count += 1
                yield {}
        finally:
            if not single and self._scope is not None:
                self._scope.sequence_running = False


class VirtualShutter(VirtualDevice, ShutterDevice):
    """Shutter between lamp and specimen.

    The core's automatic shutter does not drive Python devices: it only announces that
    the shutter changes. This one listens, so it opens for a snap. For sequences nothing is
    announced; while one runs, it is open if the automatic shutter is on. A wrong value:
    the shutter does the opposite of what it is told and says.
    """

    OPERATIONS = ("open",)

    def __init__(self) -> None:
        super().__init__()
        self._says = False
        self.add(
            "State",
            int,
            lambda: int(self._says),
            lambda v: self.set_open(bool(v)),
            allowed=(0, 1),
        )

    def initialize(self) -> None:
        """Join the microscope and listen to the core."""
        super().initialize()
        signal: Any = self.core.events.propertyChanged
        signal.connect(self._heard)

    def shutdown(self) -> None:
        """Stop listening and leave."""
        if self._scope is not None:
            signal: Any = self.core.events.propertyChanged
            signal.disconnect(self._heard)
        super().shutdown()

    def _heard(self, device: str, name: str, value: object) -> None:
        if device == self.get_label() and name == "State" and self._scope is not None:
            self._turn(str(value) == "1", wrong=self.call("open"))
        elif device == "Core" and name == "AutoShutter" and self._scope is not None:
            self._scope.auto_shutter = str(value) == "1"

    def _turn(self, on: bool, *, wrong: bool = False) -> None:
        self._says = on
        self.scope.shutter_open = on != wrong

    def get_open(self) -> bool:
        """Whether it says that it is open."""
        return self._says

    def set_open(self, open: bool) -> None:
        """Open or close it."""
        wrong = self.call("open", stay_busy=True)
        self._turn(bool(open), wrong=wrong)

    def busy(self) -> bool:
        """Whether it hangs."""
        return self.hung


class VirtualLamp(VirtualDevice, GenericDevice):
    """Lamp: ``intensity`` in percent; a wrong value sets ``fault_value`` percent."""

    OPERATIONS = ("set",)

    def __init__(self) -> None:
        super().__init__()
        self.add(
            "intensity", float, lambda: self.scope.lamp_percent, self._set, limits=(0, 100)
        )

    def _set(self, percent: float) -> None:
        wrong = self.call("set")
        self.scope.lamp_percent = min(max(self.wrong_by, 0), 100) if wrong else percent


class _VirtualState(VirtualDevice, StateDevice):
    """A wheel or turret. A wrong value: it stays where it is and says it has turned."""

    OPERATIONS = ("turn",)
    TURN_S = 1.0

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__(dict(enumerate(labels)))
        self._labels = tuple(labels)
        self._says = 0
        self._ready = 0.0

    def _apply(self, label: str) -> None:
        raise NotImplementedError

    def get_state(self) -> int:
        """Which position it says it is in."""
        return self._says

    def set_state(self, position: int) -> None:
        """Turn to a position."""
        wrong = self.call("turn", stay_busy=True)
        if position != self._says:
            self._ready = self.scope.clock.now_s + self.TURN_S
        self._says = int(position)
        if not wrong:
            self._apply(self._labels[self._says])

    def busy(self) -> bool:
        """Whether it turns."""
        return self.hung or not self.scope.clock.reached(self._ready)


class VirtualObjective(_VirtualState):
    """Objective turret; starts with the 20×."""

    TURN_S = 1.5

    def __init__(self) -> None:
        super().__init__(tuple(OBJECTIVES))
        self._says = self._labels.index("20x/0.75")
        self.add("pixel_size_um", float, lambda: self._in_use().pixel_um)
        self.add("na", float, lambda: self._in_use().lens.na)
        self.add("magnification", float, lambda: self._in_use().magnification)

    def _in_use(self) -> Any:
        return self.scope.objectives[self.scope.objective]

    def _apply(self, label: str) -> None:
        self.scope.set_objective(label)


class VirtualFilter(_VirtualState):
    """Filter wheel: brightfield, or a fluorescence filter set."""

    TURN_S = 0.2

    def __init__(self) -> None:
        super().__init__(CHANNELS)

    def _apply(self, label: str) -> None:
        self.scope.set_channel(label)


class VirtualOptics(VirtualDevice, GenericDevice):
    """Condenser, quality of the images, and aberrations of the objective in use."""

    def __init__(self) -> None:
        super().__init__()
        self.add(
            "quality",
            str,
            lambda: self.scope.quality,
            partial(self._put, "quality"),
            allowed=tuple(QUALITIES),
        )
        self.add(
            "sigma",
            float,
            lambda: self.scope.sigma,
            lambda v: setattr(self.scope, "sigma", v),
            limits=(0.05, 0.95),
        )
        for name, low, high in (
            ("na", 0.01, 1.49),
            ("index", 1.0, 2.0),
        ):
            get, put = partial(self._get, name), partial(self._put, name)
            self.add(name, float, get, put, limits=(low, high))
        for name in (
            "spherical_waves",
            "astigmatism_waves",
            "coma_waves",
            "axial_colour_um",
            "lateral_colour_um",
            "field_curvature_um",
        ):
            high = 2.0 if name.endswith("waves") else 20.0
            get, put = partial(self._get, name), partial(self._put, name)
            self.add(name, float, get, put, limits=(-high, high))

    def _get(self, name: str) -> Any:
        lens = self.scope.objectives[self.scope.objective].lens
        return getattr(lens if hasattr(lens, name) else lens.aberrations, name)

    def _put(self, name: str, value: Any) -> None:
        if name == "quality":
            self.scope.set_quality(value)
        else:
            self.scope.set_lens(**{name: value})


class VirtualSlide(VirtualDevice, GenericDevice):
    """The slide on the stage, and the clock: ``time`` real or accelerated, ``clock_s``."""

    def __init__(self) -> None:
        super().__init__()
        for f in fields(SlideSettings):
            self.add(
                f.name,
                int if f.name == "seed" else float if f.name in SLIDE_RANGES else str,
                partial(self._setting, f.name),
                partial(self._set_setting, f.name),
                limits=SLIDE_RANGES.get(f.name),
                allowed=KINDS if f.name == "kind" else None,
            )
        self.add(
            "time",
            str,
            lambda: "real" if self.scope.clock.real_time else "accelerated",
            lambda v: setattr(self.scope.clock, "real_time", v == "real"),
            allowed=("accelerated", "real"),
        )
        self.add("clock_s", float, lambda: round(self.scope.clock.now_s, 4))
        self.add("frames", int, lambda: self.scope.frames)

    def _setting(self, name: str) -> Any:
        return getattr(self.scope.slide_settings, name)

    def _set_setting(self, name: str, value: Any) -> None:
        self.scope.set_slide(**{name: value})
