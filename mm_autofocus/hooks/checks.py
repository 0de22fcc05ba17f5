"""What can be known to be wrong before anything moves: a plan against a core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.hooks.rig import CoreRig, channel_group, full_scale
from mm_autofocus.hooks.shot_plan import check_shots
from mm_autofocus.plan import autofocus_plans, z_offsets_um
from mm_autofocus.registry import suggest
from mm_autofocus.strategies.two_shot import TwoShotSettings
from mm_autofocus.types import FrameFormat, Prepares

if TYPE_CHECKING:
    import useq

    from mm_autofocus.settings import AutofocusSettings
    from mm_autofocus.types import Strategy

__all__ = [
    "check_devices",
    "check_looks",
    "check_plan",
    "frame_format",
    "prepare_strategy",
    "stage_limits_um",
]


def check_devices(core: Any) -> None:
    """Raise `InputError` unless the core has a camera and a focus stage."""
    if not core.getCameraDevice():
        raise InputError("the configuration has no camera (Core, Camera is not set)")
    if not core.getFocusDevice():
        raise InputError("the configuration has no focus stage (Core, Focus is not set)")


def stage_limits_um(core: Any) -> tuple[float | None, float | None]:
    """Travel that the focus stage itself declares, in µm; None where it declares none."""
    stage = core.getFocusDevice()
    try:
        if core.hasProperty(stage, "Position") and core.hasPropertyLimits(stage, "Position"):
            return (
                float(core.getPropertyLowerLimit(stage, "Position")),
                float(core.getPropertyUpperLimit(stage, "Position")),
            )
    except RuntimeError:
        pass  # a stage that cannot tell has no limits to tell
    return None, None


def check_looks(core: Any, settings: AutofocusSettings) -> None:
    """Check channel, binning and ROI of the looks, and the hardware autofocus device."""
    check_devices(core)
    camera = core.getCameraDevice()
    if settings.channel is not None:
        group = channel_group(core, settings)
        _check_channel(core, group, settings.channel, "metadata.mm_autofocus.channel")
    if settings.binning is not None:
        allowed = list(core.getAllowedPropertyValues(camera, "Binning"))
        if str(settings.binning) not in allowed:
            raise InputError(
                f"metadata.mm_autofocus.binning: {settings.binning} is not allowed by "
                f"camera {camera!r}; allowed: {', '.join(sorted(allowed, key=int))}"
            )
    if settings.roi is not None:
        x, y, width, height = settings.roi
        *_, full_width, full_height = _full_roi(core)
        if settings.binning is not None:
            scale = int(core.getProperty(camera, "Binning")) / settings.binning
            full_width, full_height = int(full_width * scale), int(full_height * scale)
        if x + width > full_width or y + height > full_height:
            raise InputError(
                f"metadata.mm_autofocus.roi: {list(settings.roi)} is outside the image of "
                f"{full_width} × {full_height} pixels"
            )
    if settings.search == "hardware" and not core.getAutoFocusDevice():
        key = "strategy" if settings.search == settings.strategy else "find"
        raise InputError(
            f"metadata.mm_autofocus.{key}: 'hardware' needs an autofocus device, and the "
            "configuration has none (Core, AutoFocus is not set)"
        )


def prepare_strategy(core: Any, settings: AutofocusSettings, strategy: Strategy | None) -> None:
    """Let a strategy check what its looks will be like, and warm up; nothing moves.

    Raises
    ------
    InputError
        It cannot work with this camera or these optics.
    """
    if strategy is not None and isinstance(strategy, Prepares):
        strategy.prepare(frame_format(core, settings))


def frame_format(core: Any, settings: AutofocusSettings) -> FrameFormat:
    """What the looks will be like, as far as it is known before the first."""
    rig = CoreRig(core, settings)
    width, height = core.getImageWidth(), core.getImageHeight()
    if settings.roi is not None:
        *_, width, height = settings.roi
    elif settings.binning is not None:  # which resets the ROI
        *_, width, height = _full_roi(core)
        width, height = (round(n / rig.binning_ratio()) for n in (width, height))
    components = core.getNumberOfComponents()
    itemsize = max(1, core.getBytesPerPixel() // components)
    # four bytes of one component are floats in every adapter
    dtype = np.dtype(np.float32 if itemsize == 4 else f"u{itemsize}")
    return FrameFormat(
        (height, width) if components == 1 else (height, width, 3),
        dtype.name,
        full_scale(dtype, core.getImageBitDepth()),
        settings.optics(rig.pixel_size_um()),
    )


def check_plan(
    core: Any, sequence: useq.MDASequence, settings: AutofocusSettings | None
) -> None:
    """Check a plan against the core: channels, devices, and where autofocus can happen.

    Raises
    ------
    InputError
        One sentence; nothing has moved.
    """
    if not core.getCameraDevice():
        raise InputError("the configuration has no camera (Core, Camera is not set)")
    subs = [p.sequence for p in sequence.stage_positions if p.sequence is not None]
    for owner in (sequence, *subs):
        for channel in owner.channels:
            _check_channel(core, channel.group, channel.config, "channels")
    for p in sequence.stage_positions:
        _check_properties(core, getattr(p, "properties", None))
    if sequence.setup is not None:
        _check_properties(core, sequence.setup.properties)
    if settings is not None:
        check_looks(core, settings)
        _check_autofocus(core, sequence, settings)
        if isinstance(settings, TwoShotSettings):
            *_, width, height = core.getROI()
            pixel_um = core.getPixelSizeUm() or 1.0
            check_shots(sequence, settings, (width * pixel_um, height * pixel_um))


def _check_autofocus(
    core: Any, sequence: useq.MDASequence, settings: AutofocusSettings
) -> None:
    """Check when a plan focuses, and whether its z fits with that."""
    subs = [p.sequence for p in sequence.stage_positions if p.sequence is not None]
    moves = any(p.x is not None or p.y is not None for p in sequence.stage_positions)
    if (moves or sequence.grid_plan is not None) and not core.getXYStageDevice():
        raise InputError(
            "the plan moves in x and y, and the configuration has no XY stage "
            "(Core, XYStage is not set)"
        )
    plans = list(autofocus_plans(sequence))
    if not plans:
        raise InputError(
            "metadata.mm_autofocus says how to focus, but the plan has no autofocus_plan "
            "that says when; add for example autofocus_plan: {axes: [p]}"
        )
    used = _used_axes(sequence)
    for plan in plans:
        if not used & set(plan.axes):
            missing = "stage positions" if "p" in plan.axes else "such axes"
            raise InputError(
                f"autofocus_plan.axes: {list(plan.axes)} would never focus, as the plan has "
                f"no {missing}; it runs over {sorted(used) or 'nothing'}"
            )
        _check_offset_device(core, plan, settings)
    for owner in (sequence, *subs):
        if owner.z_plan is not None and not owner.z_plan.is_relative:
            raise InputError(
                "z_plan: absolute z positions cannot be combined with autofocus; use a "
                "relative plan, for example {range: 4, step: 1}"
            )
    low, high = z_offsets_um(sequence)
    lows = [v for v in (settings.z_min_um, stage_limits_um(core)[0]) if v is not None]
    highs = [v for v in (settings.z_max_um, stage_limits_um(core)[1]) if v is not None]
    if lows and highs and max(lows) - low >= min(highs) - high:
        raise InputError(
            f"z_plan: it reaches from {low:g} to {high:g} µm around focus, which does not "
            f"fit into the limits {max(lows):g} … {min(highs):g} µm"
        )


def _check_offset_device(
    core: Any, plan: useq.AxesBasedAF, settings: AutofocusSettings
) -> None:
    name = plan.autofocus_device_name
    if settings.search != "hardware" or not name or plan.autofocus_motor_offset is None:
        return
    if name not in core.getLoadedDevices():
        raise InputError(
            f"autofocus_plan.autofocus_device_name: {name!r} is no device of the "
            f"configuration{suggest(name, core.getLoadedDevices())}"
        )
    if int(core.getDeviceType(name)) != _STAGE_DEVICE:
        raise InputError(
            f"autofocus_plan.autofocus_device_name: {name!r} is no stage, so that it cannot "
            "take autofocus_motor_offset; name the offset drive, or leave the name out"
        )


_STAGE_DEVICE = 5  # MM::StageDevice; the same number in every flavour of the core


def _check_channel(core: Any, group: str, preset: str, where: str) -> None:
    groups = list(core.getAvailableConfigGroups())
    if group not in groups:
        raise InputError(
            f"{where}: there is no group {group!r} for channel {preset!r}"
            f"{suggest(group, groups)}; it has: {', '.join(groups) or 'none'}"
        )
    presets = list(core.getAvailableConfigs(group))
    if preset not in presets:
        raise InputError(
            f"{where}: {preset!r} is not a channel of group {group!r}"
            f"{suggest(preset, presets)}; allowed: {', '.join(presets)}"
        )


def _check_properties(core: Any, properties: Any) -> None:
    devices = list(core.getLoadedDevices())
    for device, name, _ in properties or ():
        if device not in devices:
            raise InputError(
                f"properties: {device!r} is no device of the configuration"
                f"{suggest(device, devices)}"
            )
        if not core.hasProperty(device, name):
            names = list(core.getDevicePropertyNames(device))
            raise InputError(
                f"properties: device {device!r} has no property {name!r}{suggest(name, names)}"
            )


def _used_axes(sequence: useq.MDASequence) -> set[str]:
    used = set(sequence.used_axes)
    for p in sequence.stage_positions:
        if p.sequence is not None:
            used |= set(p.sequence.used_axes)
    return used


def _full_roi(core: Any) -> tuple[int, int, int, int]:
    x, y, width, height = core.getROI()
    if (x, y) == (0, 0):
        return x, y, width, height
    core.clearROI()
    try:
        full = core.getROI()
        return full[0], full[1], full[2], full[3]
    finally:
        core.setROI(x, y, width, height)
