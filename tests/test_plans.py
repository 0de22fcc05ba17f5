"""Every plan that an operator can copy runs here, on the demo adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import tifffile
from mm_autofocus import run
from mm_autofocus.config import close_core, open_core
from mm_autofocus.ometiff import read_record
from pymmcore_plus import CMMCorePlus

from conftest import PLANS

# plan: frames, searches, (T, C, Z) of each image
EXPECTED = {
    "hill_climb.yaml": (3, 3, (1, 1, 1)),
    "z_stack.yaml": (16, 2, (1, 2, 4)),
    "time_lapse.yaml": (12, 4, (6, 1, 1)),
    "slide_grid.yaml": (9, 9, (1, 1, 1)),
    "reference_channel.yaml": (4, 2, (1, 2, 1)),
    "collect_stacks.yaml": (63, 3, (1, 1, 21)),
}


def test_no_plan_is_left_out() -> None:
    assert {p.name for p in PLANS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_plan_does_what_it_says(name: str, core: CMMCorePlus, tmp_path: Path) -> None:
    frames, searches, shape = EXPECTED[name]
    file = tmp_path / "run.ome.tiff"
    overrides = {} if name != "time_lapse.yaml" else {"max_age_s": 1e-3}
    result = run(PLANS / name, core=core, output=file, settings=overrides)
    assert (result.frames, len(result.records)) == (frames, searches)
    assert result.exit_code == 0
    assert all(abs(r["z_after_um"]) <= 1.5 for r in result.records)
    record = read_record(file)
    assert {image.shape[:3] for image in record.images} == {shape}
    with tifffile.TiffFile(file) as tif:
        assert len(tif.pages) == frames
    if name == "time_lapse.yaml":  # aged frames say so
        statuses = {f.status for focus in record.focus for f in focus.frames}
        assert "stale" in statuses
    if name == "reference_channel.yaml":
        z = [record.images[0].planes[0, c, 0].z_um for c in range(2)]
        assert z[1] - z[0] == pytest.approx(0.5, abs=1e-3)  # type: ignore[operator]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_plan_runs_on_the_virtual_slide(name: str, tmp_path: Path) -> None:
    frames, searches, shape = EXPECTED[name]
    core = open_core("virtual_slide.cfg")
    try:
        core.setProperty("Slide", "kind", "cells")
        core.setProperty("Camera", "pixel_format", "Mono16")
        file = tmp_path / "run.ome.tiff"
        result = run(PLANS / name, core=core, output=file)
        assert (result.frames, result.failed) == (frames, [])
        assert len(result.records) == searches
        record = read_record(file)
        assert {image.shape[:3] for image in record.images} == {shape}
        assert record.images[0].shape[3:] == (512, 512)
    finally:
        close_core(core)
