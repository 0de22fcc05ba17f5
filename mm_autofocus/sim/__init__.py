"""The virtual microscope: an honest slide under honest optics.

``demo_config/virtual_slide.cfg`` loads it into a ``UniMMCore``. What it knows about the true
focus is in :mod:`mm_autofocus.sim.truth`, which nothing that focuses imports; the package as
a whole is imported by configurations, the demo and tests only.
"""

from __future__ import annotations

from typing import Any

from mm_autofocus.sim.microscope import OBJECTIVES

__all__ = ["keep_pixel_size"]


def keep_pixel_size(core: Any, turret: str = "Objective", preset: str = "in-use") -> None:
    """Let the core's pixel size follow the virtual turret, from now on.

    ``UniMMCore`` does not look at properties of Python devices to find the pixel size in
    use, and a device cannot reach its core; a program that has the core can do it.

    Parameters
    ----------
    core : UniMMCore
        A core that has loaded ``virtual_slide.cfg``.
    turret : str
        Label of the turret.
    preset : str
        The pixel size preset that is always in use.
    """

    def follow(device: str, name: str, value: object) -> None:
        if device == turret and name == "Label" and str(value) in OBJECTIVES:
            size = OBJECTIVES[str(value)].pixel_um
            core.setPixelSizeUm(preset, size)
            core.setPixelSizeAffine(preset, [size, 0, 0, 0, size, 0])

    core.events.propertyChanged.connect(follow)
    follow(turret, "Label", core.getProperty(turret, "Label"))
