"""A Micro-Manager core as a rig: moves the focus stage, takes looks, restores everything."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import HardwareError
from mm_autofocus.types import FocusResult, Look

if TYPE_CHECKING:
    from mm_autofocus.settings import AutofocusSettings
    from mm_autofocus.types import FocusRequest, Image

__all__ = ["CoreRig", "channel_group", "faults_of", "full_scale"]

logger = logging.getLogger(__name__)


class CoreRig:
    """The focus stage, the camera and the shutter of a core (see `drive.Rig`).

    Parameters
    ----------
    core : pymmcore_plus.CMMCorePlus
        Or any object with the same methods.
    settings : AutofocusSettings
        Channel, exposure, binning, ROI, shutter and settling of the looks.
    """

    def __init__(self, core: Any, settings: AutofocusSettings) -> None:
        self.core = core
        self.settings = settings
        self.stage: str = core.getFocusDevice()
        self.camera: str = core.getCameraDevice()
        self._open_for_each_look = False

    def position_um(self) -> float:
        """Where the focus stage stands, in µm."""
        with faults_of(f"focus stage {self.stage!r} gives no position"):
            return float(self.core.getPosition(self.stage))

    def at_rest_um(self) -> float:
        """Where the focus stage stands once a move that someone else began has ended, in µm."""
        with faults_of(f"focus stage {self.stage!r} does not come to rest"):
            self.core.waitForDevice(self.stage)
        return self.position_um()

    def move_to(self, z_um: float) -> None:
        """Send the focus stage to `z_um` (µm), wait for it, and let it settle."""
        with faults_of(f"focus stage {self.stage!r} could not be sent to {z_um:g} µm"):
            self.core.setPosition(self.stage, z_um)
            self.core.waitForDevice(self.stage)
        if self.settings.settle_ms:
            time.sleep(self.settings.settle_ms / 1000)

    def look(self) -> Look:
        """Take one exposure where the stage stands."""
        core, settings = self.core, self.settings
        z_um = self.position_um()
        with faults_of(f"camera {self.camera!r} could not take a look at z {z_um:g} µm"):
            if self._open_for_each_look:
                core.setShutterOpen(True)
            try:
                core.snapImage()
            finally:
                if self._open_for_each_look:
                    core.setShutterOpen(False)
            image: Image = np.asarray(core.getImage())
        return self._seen(image, z_um, cut=settings.crop)

    def as_look(self, image: Image, z_um: float) -> Look:
        """An image that was taken for another purpose, as if it had been a look.

        Of a whole frame, the part that the looks show.
        """
        x, y, width, height = self.settings.roi or (0, 0, 0, 0)
        cut = x + width <= image.shape[1] and y + height <= image.shape[0]
        return self._seen(image, z_um, cut=cut)

    def _seen(self, image: Image, z_um: float, *, cut: bool) -> Look:
        if cut and self.settings.roi is not None:
            x, y, width, height = self.settings.roi
            image = image[y : y + height, x : x + width]
        with faults_of(f"camera {self.camera!r} does not tell its bit depth"):
            bits = self.core.getImageBitDepth()
        return Look(z_um, image, max_value=full_scale(image.dtype, bits))

    def binning_ratio(self) -> float:
        """Binning of the looks over that of the camera as it is set now."""
        if self.settings.binning is None:
            return 1.0
        return self.settings.binning / float(self.core.getProperty(self.camera, "Binning"))

    def pixel_size_um(self) -> float:
        """Pixel size of the looks in the specimen, in µm; 0 where it is not known."""
        return float(self.core.getPixelSizeUm()) * self.binning_ratio()

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Set live mode, channel, exposure, binning, ROI and shutter for the looks.

        All of it is restored on exit, each step even if another one fails.

        Raises
        ------
        HardwareError
            A device refused what was asked for, or could not be restored.
        """
        with ExitStack() as undo:
            with faults_of("the looks could not be prepared"):
                self._prepare(undo)
            try:
                yield
            finally:
                with faults_of("camera or shutter could not be restored"):
                    undo.close()

    def ask_hardware(
        self, request: FocusRequest, focus: Callable[[], object] | None = None
    ) -> FocusResult:
        """Let the core's autofocus device focus, within the limits of `request`.

        Parameters
        ----------
        request : FocusRequest
            Where the search begins and what it may not leave.
        focus : callable, optional
            How to ask the device; default ``core.fullFocus()``.

        Returns
        -------
        FocusResult
            If it failed, the stage has been sent back to the start.
        """
        reason = ""
        try:
            (focus or self.core.fullFocus)()
            self.core.waitForDevice(self.stage)
        except Exception as e:  # noqa: BLE001 - see `faults_of`
            reason = f"the autofocus device failed: {e}"
        z_um = self.position_um()
        if not reason and not request.z_min_um <= z_um <= request.z_max_um:
            reason = (
                f"the autofocus device went to {z_um:g} µm, outside the limits "
                f"{request.z_min_um:g} … {request.z_max_um:g} µm"
            )
        if not reason:
            return FocusResult(z_um, "ok", strategy="hardware", z_start_um=request.z_start_um)
        self.move_to(request.z_start_um)
        return FocusResult(
            None,
            "failed",
            reason=reason,
            strategy="hardware",
            z_start_um=request.z_start_um,
            moves=1,
        )

    def _prepare(self, undo: ExitStack) -> None:
        core, settings = self.core, self.settings
        if core.isSequenceRunning():
            # Live frames are taken while the stage still moves and spoil the scores.
            core.stopSequenceAcquisition()
            undo.callback(core.startContinuousSequenceAcquisition, 0)
        if settings.channel is not None:
            self._set_channel(undo, settings.channel)
        if settings.exposure_ms is not None:
            undo.callback(core.setExposure, core.getExposure())
            core.setExposure(settings.exposure_ms)
        hardware_roi = settings.roi if not settings.crop else None
        if settings.binning is not None or hardware_roi is not None:
            # Binning resets the ROI on many cameras: binning first, and back in reverse.
            undo.callback(self._restore_roi, tuple(core.getROI()))
        if settings.binning is not None:
            binning = core.getProperty(self.camera, "Binning")
            undo.callback(core.setProperty, self.camera, "Binning", binning)
            core.setProperty(self.camera, "Binning", str(settings.binning))
        if hardware_roi is not None:
            undo.callback(core.clearROI)
            core.clearROI()
            core.setROI(*hardware_roi)
        self._prepare_shutter(undo)

    def _restore_roi(self, roi: tuple[int, int, int, int]) -> None:
        self.core.clearROI()
        full = tuple(self.core.getROI())
        if roi != full:
            self.core.setROI(*roi)

    def _set_channel(self, undo: ExitStack, preset: str) -> None:
        core = self.core
        group = channel_group(core, self.settings)
        # Property by property, because the operator's state may match no preset.
        data = core.getConfigData(group, preset)
        for device, prop in _pairs(data):
            undo.callback(core.setProperty, device, prop, core.getProperty(device, prop))
        core.setConfig(group, preset)
        core.waitForConfig(group, preset)

    def _prepare_shutter(self, undo: ExitStack) -> None:
        core = self.core
        self._open_for_each_look = False
        if not core.getShutterDevice():
            return
        auto, is_open = bool(core.getAutoShutter()), bool(core.getShutterOpen())
        if self.settings.shutter == "sweep":
            undo.callback(core.setAutoShutter, auto)
            undo.callback(core.setShutterOpen, is_open)
            core.setAutoShutter(False)
            core.setShutterOpen(True)
        elif not auto and not is_open:
            self._open_for_each_look = True


@contextmanager
def faults_of(what: str) -> Iterator[None]:
    """Turn whatever a device raises into a `HardwareError` that says `what` failed.

    Compiled adapters raise `RuntimeError`, time-outs are `OSError`, and a device written in
    Python raises what it likes.
    """
    try:
        yield
    except Exception as e:
        raise HardwareError(f"{what}: {e}") from e


def channel_group(core: Any, settings: AutofocusSettings) -> str:
    """Name of the group that the channel of the looks belongs to."""
    # useq calls it "Channel" where nothing is said, too
    return str(settings.channel_group or core.getChannelGroup() or "Channel")


def _pairs(data: Any) -> list[tuple[str, str]]:
    """``(device, property)`` of each setting of a preset, for either kind of core."""
    if hasattr(data, "getSetting"):
        settings = [data.getSetting(i) for i in range(data.size())]
        return [(s.getDeviceLabel(), s.getPropertyName()) for s in settings]
    return [(item[0], item[1]) for item in data]


def full_scale(dtype: np.dtype[Any], bits: int) -> float | None:
    """Grey value at which the camera saturates; None where it is not known."""
    if dtype.kind not in "ui":
        return None
    depth = 8 * dtype.itemsize
    return float(2 ** (bits if 0 < bits <= depth else depth) - 1)
