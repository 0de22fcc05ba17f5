"""Every plan that an operator can copy runs here: on the demo adapters, or on the virtual slide.

The shipped models are made for the virtual slide's colour camera; their plans run there alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tifffile
import yaml
from mm_autofocus import run
from mm_autofocus.config import close_core, open_core
from mm_autofocus.ometiff import read_record
from pymmcore_plus import CMMCorePlus

import learned_rig
from conftest import PLANS
from learned_rig import FakeModel

# plan: frames, searches, (T, C, Z) of each image
EXPECTED = {
    "hill_climb.yaml": (3, 3, (1, 1, 1)),
    "z_stack.yaml": (16, 2, (1, 2, 4)),
    "time_lapse.yaml": (12, 4, (6, 1, 1)),
    "slide_grid.yaml": (9, 9, (1, 1, 1)),
    "reference_channel.yaml": (4, 2, (1, 2, 1)),
    "collect_stacks.yaml": (63, 3, (1, 1, 21)),
    "two_shot.yaml": (18, 9, (1, 1, 2)),
}
# plan: the model it names, the model's looks, looks of each search
LEARNED = {
    "one_shot.yaml": ("sparsefocus-slide20x", (0.0,), 1),
    "two_look.yaml": ("sparsefocus-slide20x-two-look", (-8.0, 8.0), 2),
    "shadow.yaml": ("sparsefocus-slide20x", (0.0,), None),
}


# of colour images only, and run by the README
CALIBRATING = {"calibrate_lens.yaml"}


def test_no_plan_is_left_out() -> None:
    known = set(EXPECTED) | set(LEARNED) | CALIBRATING
    assert {p.name for p in PLANS.glob("*.yaml")} == known


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
        core.setProperty("Optics", "quality", "preview")
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


@pytest.fixture
def slide() -> Iterator[CMMCorePlus]:
    core = open_core("virtual_slide.cfg")
    core.setProperty("Optics", "quality", "preview")
    yield core
    close_core(core)


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_plan_does_what_it_says(
    name: str, slide: CMMCorePlus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, looks_um, looks = LEARNED[name]
    fields = {"channels": 3, "patch_px": 224, "looks_um": looks_um, "pixel_size_um": 0.325}
    # a model that takes the first look of a search for 1 µm above focus, and later ones for sharp
    at: list[float] = []

    def answer(_: object) -> float:
        at.append(slide.getZPosition())
        return 1.0 if len(at) % 2 else 0.0

    fake = FakeModel(answer, **fields)
    monkeypatch.setattr(learned_rig, "MODEL", fake)
    plan = yaml.safe_load((PLANS / name).read_text(encoding="utf-8"))
    settings = plan["metadata"]["mm_autofocus"]
    owner = settings if "model" in settings else settings["shadow"]
    assert owner["model"] == model
    owner["model"] = "learned_rig:MODEL"
    file = tmp_path / "run.ome.tiff"
    result = run(plan, core=slide, output=file)
    assert (result.frames, result.failed) == (3, [])
    for record in result.records:
        if looks is None:
            assert record["details"]["shadow"]["model"] == "fake"
            assert record["strategy"] == "hill-climb"
        else:
            assert (record["looks"], record["details"]["model"]) == (looks, "fake")
    if name == "one_shot.yaml":
        assert [r["verified"] for r in result.records] == [True] * 3
    assert len(read_record(file).focus) == 3


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_plan_runs_with_its_shipped_model(name: str, tmp_path: Path) -> None:
    core = open_core("virtual_slide.cfg")
    try:
        result = run(PLANS / name, core=core, output=tmp_path / "run.ome.tiff")
    finally:
        close_core(core)
    assert (result.frames, result.exit_code) == (3, 0)
    assert {r["status"] for r in result.records} <= {"ok", "low-confidence"}
