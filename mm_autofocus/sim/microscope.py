"""The state that the devices of one virtual microscope share.

A Python device of a core sees that core's events and no other device, so camera, stages
and lamp meet here: devices of one core that name the same microscope share one object,
devices of another core never do.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.optics import Aberrations, Lens
from mm_autofocus.sim.camera import EXPOSURE_MS, Camera
from mm_autofocus.sim.mechanics import Axis, Clock
from mm_autofocus.sim.render import CHANNELS, QUALITIES, Channel, Renderer, View
from mm_autofocus.sim.slide import Slide, SlideSettings, load_picture

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["OBJECTIVES", "PIXEL_FORMATS", "SENSORS", "Exposure", "Microscope", "Objective"]

logger = logging.getLogger(__name__)

CAMERA_PIXEL_UM = 6.5
FIELD_NUMBER_MM = 22.0

SENSORS = {
    "256x256": (256, 256),
    "512x512": (512, 512),
    "1024x1024": (1024, 1024),
    "2016x2016": (2016, 2016),
}
PIXEL_FORMATS = {"RGB8": (3, 8), "Mono8": (1, 8), "Mono12": (1, 12), "Mono16": (1, 16)}


@dataclass(frozen=True, slots=True)
class Objective:
    """An objective on the turret.

    Attributes
    ----------
    magnification : float
        From the specimen to the camera.
    lens : Lens
        Aperture and aberrations.
    parfocal_um : float
        How much higher than with the 20× the stage stands in focus.
    """

    magnification: float
    lens: Lens
    parfocal_um: float = 0.0

    @property
    def pixel_um(self) -> float:
        """Camera pixel in the specimen."""
        return CAMERA_PIXEL_UM / self.magnification


def _objective(
    magnification: float, na: float, parfocal_um: float, **aberrations: float
) -> Objective:
    return Objective(magnification, Lens(na, 1.0, Aberrations(**aberrations)), parfocal_um)


OBJECTIVES: dict[str, Objective] = {
    "10x/0.30": _objective(
        10, 0.30, -1.6, spherical_waves=0.02, axial_colour_um=1.2, lateral_colour_um=0.6,
        field_curvature_um=4.0,
    ),
    "20x/0.75": _objective(
        20, 0.75, 0.0, spherical_waves=0.045, axial_colour_um=0.5, lateral_colour_um=0.3,
        astigmatism_waves=0.015, field_curvature_um=0.8,
    ),
    "40x/0.95": _objective(
        40, 0.95, 1.1, spherical_waves=-0.035, axial_colour_um=0.3, lateral_colour_um=0.2,
        astigmatism_waves=0.02, coma_waves=0.01, field_curvature_um=0.4,
    ),
}  # fmt: skip
"""Objectives by the label on the turret."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """What was true when a frame was taken; only :mod:`mm_autofocus.sim.truth` reads it.

    Attributes
    ----------
    frame : int
        Number of the frame since the microscope was switched on.
    time_s : float
        On the clock of the microscope, in the middle of the exposure.
    z_um : float
        True height of the stage.
    view : View
        What was in view.
    parfocal_um : float
        Of the objective.
    light : bool
        Whether light fell on the specimen.
    camera : dict
        Keywords of `Camera.expose`: dose, bit depth, sensor, region, binning.
    """

    frame: int
    time_s: float
    z_um: float
    view: View
    parfocal_um: float
    light: bool
    camera: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Microscope:
    """A virtual microscope without its devices. Safe to use from several threads."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.clock = Clock()
        self.slide_settings = SlideSettings()
        self.camera = Camera()
        self.z = Axis(
            speed_um_s=1000.0,
            settle_s=0.03,
            backlash_um=0.25,
            repeatability_um=0.15,
            drift_um_h=1.0,
            low_um=-200.0,
            high_um=200.0,
            seed=(1, 81),
        )
        self.x, self.y = (
            Axis(
                speed_um_s=20000.0,
                settle_s=0.05,
                backlash_um=1.0,
                repeatability_um=0.3,
                drift_um_h=0.0,
                low_um=-60000.0,
                high_um=60000.0,
                seed=(1, seed),
            )
            for seed in (82, 83)
        )
        self.objectives = dict(OBJECTIVES)
        self.objective = "20x/0.75"
        self.channel: Channel = "Brightfield"
        self.sigma = 0.6
        self.quality = "standard"
        self.lamp_percent = 50.0
        self.shutter_open = False
        self.auto_shutter = True
        self.sequence_running = False
        self.sensor = "512x512"
        self.pixel_format = "RGB8"
        self.binning = 1
        self.roi: tuple[int, int, int, int] | None = None
        self.exposure_ms = EXPOSURE_MS
        self.frames = 0
        self.exposures: deque[Exposure] = deque(maxlen=20000)
        self._renderer: Renderer | None = None
        self._render_lock = threading.Lock()
        self._z_sequence: list[float] = []
        self._z_next: int | None = None
        # Hardware focus: holds z at the surface plus an offset while it is locked.
        self.focus_lock = False
        self.focus_lost = False
        self.focus_offset_um = 0.0
        self.focus_range_um = 60.0
        self.focus_error_um = 0.0

    # --- settings ------------------------------------------------------------------------

    @property
    def slide(self) -> Slide:
        """The slide on the stage."""
        return self.renderer.slide

    @property
    def renderer(self) -> Renderer:
        """What makes images of the slide."""
        with self.lock:
            if self._renderer is None or self._renderer.slide.settings != self.slide_settings:
                self._renderer = Renderer(Slide(self.slide_settings))
            return self._renderer

    def set_slide(self, **changes: Any) -> None:
        """Change settings of the slide.

        Raises
        ------
        InputError
            Names the key, the value and the allowed range; nothing has changed then.
        """
        with self.lock:
            settings = replace(self.slide_settings, **changes)
            if "picture" in changes or settings.kind == "picture":
                load_picture(settings.picture)
            self.slide_settings = settings

    def set_camera(self, **changes: Any) -> None:
        """Change settings of the camera; as :meth:`set_slide`."""
        with self.lock:
            self.camera = Camera(replace(self.camera.settings, **changes))

    def set_objective(self, label: str) -> None:
        """Turn the turret.

        Raises
        ------
        InputError
            If there is no such objective.
        """
        if label not in self.objectives:
            raise InputError(f"objective: {label!r} is not one of {', '.join(self.objectives)}")
        with self.lock:
            self.objective = label

    def set_lens(self, **changes: float) -> None:
        """Change aperture, index or aberrations of the objective in use."""
        with self.lock:
            current = self.objectives[self.objective]
            names = {f.name for f in fields(Aberrations)}
            aberrations = replace(
                current.lens.aberrations, **{k: v for k, v in changes.items() if k in names}
            )
            lens = replace(
                current.lens,
                aberrations=aberrations,
                **{k: v for k, v in changes.items() if k not in names},
            )
            self.objectives[self.objective] = replace(current, lens=lens)

    def set_quality(self, name: str) -> None:
        """Choose how finely images are computed."""
        if name not in QUALITIES:
            raise InputError(f"quality: {name!r} is not one of {', '.join(QUALITIES)}")
        self.quality = name

    def set_channel(self, name: str) -> None:
        """Choose brightfield or a fluorescence filter."""
        for channel in CHANNELS:
            if channel == name:
                self.channel = channel
                return
        raise InputError(f"channel: {name!r} is not one of {', '.join(CHANNELS)}")

    # --- geometry ------------------------------------------------------------------------

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Rows and columns of a frame, binned, without region of interest."""
        ny, nx = SENSORS[self.sensor]
        return ny // self.binning, nx // self.binning

    @property
    def window(self) -> tuple[int, int, int, int]:
        """Region of interest: x, y, width, height in binned pixels."""
        ny, nx = self.frame_shape
        return self.roi or (0, 0, nx, ny)

    def view(self, x_um: float, y_um: float) -> View:
        """What is in view with the optical axis at a point of the slide."""
        objective = self.objectives[self.objective]
        pitch = objective.pixel_um * self.binning
        ny, nx = self.frame_shape
        left, top, w, h = self.window
        off = ((left + w / 2 - nx / 2) * pitch, (top + h / 2 - ny / 2) * pitch)
        return View(
            round(x_um + off[0], 4),
            round(y_um + off[1], 4),
            (h, w),
            pitch,
            objective.lens,
            field_radius_um=0.5e3 * FIELD_NUMBER_MM / objective.magnification,
            sigma=self.sigma,
            channel=self.channel,
            colour=PIXEL_FORMATS[self.pixel_format][0] == 3,
            quality=self.quality,
            off_axis_um=off,
        )

    def true_xy_um(self) -> tuple[float, float]:
        """Point of the slide on the optical axis, now."""
        t = self.clock.now_s
        return self.x.true_um(t), self.y.true_um(t)

    def true_z_um(self) -> float:
        """Height of the focus stage, now, whatever it reads."""
        t = self.clock.now_s
        if self.focus_lock:
            return self.focus_target_um()
        return self.z.true_um(t)

    def z_reading_um(self) -> float:
        """What the focus stage says of its height."""
        t = self.clock.now_s
        if self.focus_lock:
            drift = self.z.drift_um_h * t / 3600
            return round(self.focus_target_um() - self.z.origin_um - drift, 3)
        return self.z.reading_um(t)

    # --- hardware focus ------------------------------------------------------------------

    def focus_target_um(self) -> float:
        """Where the hardware focus holds the stage: on the glass below the specimen.

        It sees the slide, not the specimen: it follows tilt and waves, knows nothing of
        folds or thickness, and keeps the distance it was set to.
        """
        x, y = self.true_xy_um()
        settings = replace(self.slide_settings, fold_um=0.0, kind="tissue")
        glass = Slide(settings).height_at(x, y)
        return (
            glass
            + self.objectives[self.objective].parfocal_um
            + self.focus_offset_um
            + self.focus_error_um
        )

    def engage_focus(self) -> bool:
        """Try to lock the hardware focus; it must be near enough to the glass."""
        with self.lock:
            distance = abs(self.z.true_um(self.clock.now_s) - self.focus_target_um())
            self.focus_lock = not self.focus_lost and distance <= self.focus_range_um
            self.clock.spend(0.4)
            return self.focus_lock

    def release_focus(self) -> None:
        """Let go: the motor takes over where the hardware focus left the stage."""
        with self.lock:
            if not self.focus_lock:
                return
            place = self.focus_target_um()
            self.focus_lock = False
            t = self.clock.now_s
            self.z.move(place - self.z.origin_um - self.z.drift_um_h * t / 3600, t)
            self.clock.reached(self.z.ready_s())

    # --- hardware sequences --------------------------------------------------------------

    def load_z_sequence(self, positions: list[float]) -> None:
        """Load heights that the camera will step through, one for each frame."""
        self._z_sequence = positions

    def start_z_sequence(self) -> None:
        """Go to the first height and wait for the camera."""
        with self.lock:
            self._z_next = 0
            self._step_z()

    def stop_z_sequence(self) -> None:
        """Stop stepping."""
        self._z_next = None

    def _step_z(self) -> None:
        if self._z_next is None or not self._z_sequence:
            return
        t = self.clock.now_s
        self.z.move(self._z_sequence[self._z_next % len(self._z_sequence)], t)
        self.clock.reached(self.z.ready_s())
        self._z_next += 1

    # --- light ---------------------------------------------------------------------------

    @property
    def lit(self) -> bool:
        """Whether the shutter lets light through."""
        return self.shutter_open or (self.sequence_running and self.auto_shutter)

    def _dose(self) -> float:
        """Exposure times lamp, relative to what fills the camera to its reference."""
        if not self.lit:
            return 0.0
        dose = self.exposure_ms / EXPOSURE_MS * self.lamp_percent / 50.0
        if self.channel != "Brightfield":
            lens = self.objectives[self.objective]
            # Light collected and spread: NA⁴/M² for epi-illumination, 1 at 20×/0.75.
            dose *= 0.12 * (lens.lens.na / 0.75) ** 4 * (20 / lens.magnification) ** 2
        return dose

    def expose(self) -> npt.NDArray[Any]:
        """Take a frame with the present state of everything.

        Returns
        -------
        numpy.ndarray
            ``(Y, X)`` or ``(Y, X, 3)``, uint8 or uint16.
        """
        with self.lock:
            self.clock.spend(0.5e-3 * self.exposure_ms)
            x, y = self.true_xy_um()
            z = self.true_z_um()
            view = self.view(x, y)
            dose = self._dose()
            objective = self.objectives[self.objective]
            frame = self.frames
            self.frames += 1
            colours, depth = PIXEL_FORMATS[self.pixel_format]
            args: dict[str, Any] = {
                "dose": dose,
                "bit_depth": depth,
                "sensor": SENSORS[self.sensor],
                "roi": self.window,
                "binning": self.binning,
            }
            now = self.clock.now_s
            self.exposures.append(
                Exposure(frame, now, z, view, objective.parfocal_um, dose > 0, args)
            )
            camera, renderer = self.camera, self.renderer
            self.clock.spend(0.5e-3 * self.exposure_ms)
        if dose > 0:
            with self._render_lock:
                light = renderer.image(view, z - objective.parfocal_um)
        else:
            light = np.zeros((*view.shape, 3)[: 3 if colours == 3 else 2], np.float32)
        out = camera.expose(light, frame=frame, **args)
        with self.lock:
            self._step_z()
        return out


_lock = threading.Lock()
_microscopes: dict[tuple[object, str], tuple[Microscope, set[int]]] = {}


def join(core_key: object, name: str, device: object) -> Microscope:
    """Give a device the microscope of its core and name, a new one for the first."""
    with _lock:
        microscope, members = _microscopes.setdefault((core_key, name), (Microscope(), set()))
        members.add(id(device))
        return microscope


def leave(core_key: object, name: str, device: object) -> None:
    """Forget a device; with the last one, the microscope goes."""
    with _lock:
        found = _microscopes.get((core_key, name))
        if found is None:
            return
        found[1].discard(id(device))
        if not found[1]:
            del _microscopes[core_key, name]
