"""Configurations: found, loaded, or refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from mm_autofocus.config import close_core, open_core, shipped
from mm_autofocus.errors import InputError


def test_the_shipped_demo_loads_by_name() -> None:
    core = open_core("demo_camera.cfg")
    try:
        assert core.getCameraDevice() == "Camera"
        assert core.getFocusDevice() == "Z"
        assert core.getPixelSizeUm() == 0.5
        assert core.getProperty("Camera", "Mode") == "Fluorescent Beads"
    finally:
        close_core(core)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did you mean 'demo_camera\.cfg'"):
        open_core("demo_cam.cfg")
    with pytest.raises(InputError, match="no such file"):
        open_core(tmp_path / "nope.cfg")
    bad = tmp_path / "bad.cfg"
    bad.write_text("Device,Camera,DemoCamera,NoSuchCamera\n")
    with pytest.raises(InputError, match=r"bad\.cfg: does not load: .*NoSuchCamera"):
        open_core(bad)
    with pytest.raises(InputError, match="no such file in acquisition_plans"):
        shipped("acquisition_plans", "nope.yaml")
