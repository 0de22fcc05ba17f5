"""Calibration: curves, offsets and patches from stacks; backlash from a microscope; the command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mm_autofocus import cli
from mm_autofocus.calibrating import measure_stage
from mm_autofocus.config import close_core, open_core
from mm_autofocus.drive import drive
from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.plan import load_plan, settings_of
from mm_autofocus.settings import parse_settings
from mm_autofocus.settings_file import read_settings, settings_text
from mm_autofocus.sim.truth import geometric_focus_um, microscope_of
from mm_autofocus.strategies.hill_climb import HillClimb
from mm_autofocus.training import Dataset, Stack
from mm_autofocus.training.calibrate import calibrate
from mm_autofocus.training.flatness import flatness_of
from mm_autofocus.training.focus_curves import channel_offsets, depth_of, patch_errors
from mm_autofocus.training.recommend import recommend
from mm_autofocus.training.stage_play import Estimate, StagePlay, StageSweeps
from mm_autofocus.types import FocusRequest
from pymmcore_plus import CMMCorePlus
from scipy.ndimage import gaussian_filter

from conftest import ROOT
from focus_rig import FocusRig

Z = np.arange(-8.0, 9.0)


def stack(field: str, focus: float = 0.0, width: float = 6.0, **columns: Any) -> Stack:
    scores = 5 + 100 * np.exp2(-((2 * (Z - focus) / width) ** 2))
    known: dict[str, Any] = {
        "folder": Path(),
        "file": "x",
        "slide": "s",
        "field": field,
        "z_um": tuple(Z),
        "pages": tuple(range(len(Z))),
        "shape": (len(Z), 64, 64),
        "dtype": "uint8",
        "label": "ok",
        "sparsity": "dense",
        "scores": tuple(scores),
        "focus_z_um": focus,
        "quality": {"width_um": width, "expected_error_um": 0.1},
    }
    return Stack(**{**known, **columns})


def test_flatness_is_what_differs_from_field_to_field() -> None:
    rng = np.random.default_rng(0)
    xy = rng.uniform(-1000, 1000, (400, 2))
    wavy = 0.5 * rng.normal(size=400)
    z = wavy + 0.002 * xy[:, 0]
    made = [
        stack(f"f{k}", float(z[k]), x_um=float(x), y_um=float(y), slide=f"s{k % 2}")
        for k, (x, y) in enumerate(xy)
    ]
    found = flatness_of(made)
    assert found is not None
    assert (found.slides, found.fields) == (2, 400)
    assert found.um == pytest.approx(z.std(), rel=0.1)
    assert found.beside_plane_um == pytest.approx(0.5, rel=0.1)
    assert flatness_of(made[:8]) is None  # four of each slide
    assert flatness_of([stack(f"f{k}", 0.1 * k) for k in range(9)]) is None  # nowhere
    again = [replace(s, time=1, focus_z_um=s.focus_z_um + 50) for s in made]
    assert flatness_of([*made, *again]) == found


def test_depth_of_field_from_the_curves_and_from_the_optics() -> None:
    stacks = [
        stack(str(k), 0.3 * k - 1, sparsity="sparse" if k > 4 else "dense") for k in range(7)
    ]
    depth = depth_of(stacks)
    truth = 6 * np.sqrt(np.log2(1 / 0.8))  # of a bell of 6 µm, at 80 % of its height
    assert depth.curve_um is not None
    assert depth.curvature_um is not None
    assert depth.curve_um.median == pytest.approx(truth, abs=0.15)
    assert depth.curvature_um.median == pytest.approx(truth, rel=0.2)
    assert (depth.curve_um.n, depth.by_sparsity["sparse"].n) == (7, 2)
    assert (depth.source, depth.um) == ("focus curve", depth.curve_um.median)
    optics = {"na": 0.75, "wavelength_um": 0.55, "pixel_size_um": 0.0}
    known = depth_of([replace(s, optics=optics) for s in stacks])
    assert (known.source, round(known.um or 0, 2)) == ("optics", 0.98)


def test_offsets_between_channels_are_of_the_same_field_and_time() -> None:
    rng = np.random.default_rng(0)
    stacks = []
    for k in range(9):
        focus = rng.uniform(-2, 2)
        stacks += [
            stack(str(k), focus, channel=0, channel_name="DAPI"),
            stack(str(k), focus + 0.8 + rng.normal(0, 0.05), channel=1, channel_name="FITC"),
            stack(str(k), 9.0, channel=1, channel_name="FITC", time=1),  # without its DAPI
        ]
    (offset,) = channel_offsets(stacks)
    assert (offset.channel, offset.reference, offset.um.n) == ("FITC", "DAPI", 9)
    assert offset.um.median == pytest.approx(0.8, abs=0.05)
    assert offset.error_um < 0.05
    assert channel_offsets(stacks[::3]) == []


def test_small_patches_err_more_under_noise() -> None:
    rng = np.random.default_rng(2)
    curve = np.exp2(-((Z - 0.4) ** 2) / 4)[:, None]
    tiles = 100 * curve + rng.normal(0, 25, (len(Z), 64))
    errors = patch_errors(Z, tiles)
    assert errors[8] > errors[2] > 0
    assert errors[1] < 0.3


# ---------------------------------------------------------------------- the stage


@pytest.fixture
def slide() -> Iterator[CMMCorePlus]:
    """The virtual microscope on a dense field, two micrometres off."""
    core = open_core("virtual_slide.cfg")
    core.setProperty("Camera", "sensor", "256x256")
    core.setProperty("Optics", "quality", "preview")
    scope = microscope_of(core)
    ((x, y),) = scope.slide.find_fields("dense", 1, (83.0, 83.0))
    core.setXYPosition(float(x), float(y))
    core.waitForSystem()
    core.setZPosition(round(geometric_focus_um(scope, x, y) + 2, 1))
    yield core
    close_core(core)


@pytest.mark.parametrize("backlash", [0.25, 0.0])
def test_backlash_and_repeatability_of_the_virtual_stage(
    slide: CMMCorePlus, backlash: float
) -> None:
    slide.setProperty("Z", "backlash_um", backlash)
    z = slide.getZPosition()
    play, reason = measure_stage(slide, parse_settings({}))
    assert (reason, slide.getZPosition()) == ("", z)
    assert play is not None
    assert play.backlash.low_um <= backlash <= play.backlash.high_um
    assert play.backlash.high_um - play.backlash.low_um < 0.25
    assert play.repeatability.low_um <= 0.15 <= play.repeatability.high_um
    assert play.has_backlash == (backlash > 0)
    assert not slide.getShutterOpen()


def sweeps_on(rig: Any, **limits: float) -> tuple[StageSweeps, Any]:
    settings = parse_settings({})
    sweeps = StageSweeps(HillClimb(settings), FocusMeasure.from_settings(settings), 2.0, 3.0)
    known = {"z_start_um": 1.0, "z_min_um": -25.0, "z_max_um": 25.0, **limits}
    request = FocusRequest(**known, max_looks=20 + sweeps.looks)
    return sweeps, drive(sweeps, request, rig)


def test_sweeps_stay_within_the_limits() -> None:
    rig = FocusRig(z_um=1.0)
    sweeps, result = sweeps_on(rig, z_max_um=4.5)
    assert not sweeps.complete
    assert "not within the limits" in result.reason
    assert rig.position_um() == 1.0
    assert max(rig.visited) <= 4.5


def test_a_blank_field_and_a_broken_camera_leave_the_stage_where_it_was() -> None:
    rig = FocusRig("none", z_um=1.0)
    sweeps, result = sweeps_on(rig)
    assert not sweeps.stops
    assert not result.found
    assert rig.position_um() == 1.0
    rig = FocusRig(z_um=1.0, breaks_at_look=30)
    with pytest.raises(HardwareError):
        sweeps_on(rig)
    assert (rig.position_um(), rig.prepared, rig.restored) == (1.0, 1, 1)


def test_a_blank_field_is_no_measurement(slide: CMMCorePlus) -> None:
    slide.setProperty("Slide", "kind", "blank") if "blank" in slide.getAllowedPropertyValues(
        "Slide", "kind"
    ) else slide.setProperty("Lamp", "intensity", 0)
    z = slide.getZPosition()
    play, reason = measure_stage(slide, parse_settings({"range_um": 5.0}))
    assert play is None
    assert reason.startswith("no focus was found here")
    assert slide.getZPosition() == z


# --------------------------------------------------------------- what is recommended

PLAY = StagePlay(Estimate(0.3, 0.2, 0.4), Estimate(0.12, 0.1, 0.15), 0.01, 108, 12, 3.0)


def test_settings_can_be_read_again_and_pasted_into_a_plan(tmp_path: Path) -> None:
    best = recommend(None, PLAY, given={"z_max_um": 80.0, "roi": [0, 0, 64, 64], "crop": True})
    assert best.settings["backlash_um"] == 0.8
    file = tmp_path / "s.yaml"
    file.write_text(best.text())
    assert read_settings(file) == best.settings
    pasted = {"autofocus_plan": {"axes": ["p"]}, **yaml.safe_load(best.text())}
    settings = settings_of(load_plan(pasted))
    assert settings is not None
    assert (settings.repeatability_um, settings.roi) == (0.12, (0, 0, 64, 64))
    none = replace(PLAY, backlash=Estimate(0.02, -0.05, 0.09))
    assert recommend(None, none).settings["backlash_um"] == 0.0


BAD_FILES = {
    "missing": (None, "no such file"),
    "no yaml": ("{a: [", "does not parse as YAML"),
    "a plan without": ("channels: [DAPI]", "has no settings"),
    "a list": ("[1]", "has no settings"),
    "unknown key": ("metadata: {mm_autofocus: {rang_um: 3}}", "unknown key"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_settings_files(case: str, tmp_path: Path) -> None:
    text, sentence = BAD_FILES[case]
    file = tmp_path / "s.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=sentence) as e:
        read_settings(file)
    assert str(file) in str(e.value)


def test_settings_that_are_not_allowed_are_not_written() -> None:
    with pytest.raises(InputError, match="rang_um"):
        settings_text({"rang_um": 3})


# ---------------------------------------------------------------------- the command


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        cli.main(list(args))
    out, err = capsys.readouterr()
    return int(e.value.code or 0), out, err


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four RGB fields, red in focus half a micrometre higher; and a grey dataset's worth."""
    import tifffile
    from mm_autofocus.collecting import collect_recorded

    folder = tmp_path_factory.mktemp("recorded")
    rng = np.random.default_rng(0)
    files = []
    for k in range(4):
        texture = gaussian_filter(rng.normal(size=(64, 64)), 0.8)
        texture *= 30 / texture.std()
        focus = np.array([7.5, 7.0, 7.0]) + rng.uniform(-1, 1)
        contrast = np.exp2(-(((np.arange(15)[:, None] - focus) / 3) ** 2))
        planes = 110 + contrast[:, None, None, :] * texture[None, :, :, None]
        planes = (planes + rng.normal(0, 1, planes.shape)).clip(0, 255).astype(np.uint8)
        files.append(folder / f"f{k}.tif")
        tifffile.imwrite(files[-1], planes, photometric="rgb")
    collect_recorded(files, folder / "d", step_um=1.0, slide="s", optics={"na": 0.3}, sets={})
    return folder / "d"


def test_colours_of_rgb_stacks(recorded: Path) -> None:
    images = calibrate(Dataset.open(recorded))
    offsets = {o.channel: o.um.median for o in images.colours}
    assert offsets["red"] == pytest.approx(0.5, abs=0.1)
    assert offsets["blue"] == pytest.approx(0.0, abs=0.1)
    assert images.sign.verdict == "unsure"  # four fields hold nothing out
    assert images.optics["na"] == 0.3
    assert images.patch_px == 64


def test_the_command_on_recorded_stacks(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, report = tmp_path / "s.yaml", tmp_path / "r.html"
    args = ["calibrate", str(recorded), "-o", str(settings), "--report", str(report)]
    code, out, _ = call(capsys, *args, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["stage"]["backlash_um"] is None
    assert document["stage"]["repeatability_um"] is None
    assert "not in recorded stacks" in document["stage"]["reason"]
    assert document["images"]["dof"]["source"] == "optics"
    assert read_settings(settings) == document["recommended"]["settings"]
    assert report.read_text().startswith("<!doctype html>")
    code, out, err = call(capsys, *args)
    assert (code, out) == (2, "")
    assert "exists already" in err
    code, out, _ = call(capsys, *args, "--overwrite")
    assert code == 0
    assert "red from green" in out
    assert "not in recorded stacks" in out


def test_the_command_takes_stacks_and_measures_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "demo_config" / "virtual_slide.cfg").read_text()
    config, plan = tmp_path / "small.cfg", tmp_path / "plan.yaml"
    config.write_text(
        text.replace("512x512", "256x256").replace("quality,standard", "quality,preview")
    )
    fields = [{"x": 83.0 * k, "y": 0.0, "z": 0.0, "name": f"f{k}"} for k in range(2)]
    plan.write_text(
        yaml.safe_dump(
            {
                "stage_positions": fields,
                "channels": [{"config": "Brightfield", "exposure": 5.0}],
                "z_plan": {"range": 16, "step": 1},
            }
        )
    )
    settings = tmp_path / "s.yaml"
    code, out, err = call(
        capsys,
        "calibrate", str(tmp_path / "d"), "--config", str(config), "--plan", str(plan),
        "-o", str(settings), "--set", "na=0.75", "--set", "z_max_um=60", "--json",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(out)
    assert document["images"]["stacks"] == 2
    assert document["stage"]["sweeps"] == 12
    assert read_settings(settings)["z_max_um"] == 60
    assert read_settings(settings)["repeatability_um"] == pytest.approx(0.15, abs=0.06)


WRONG = {
    "nothing": ([], "name a dataset, or a microscope"),
    "plan alone": (["--plan", "p.yaml"], "needs a microscope"),
    "plan without dataset": (["--plan", "p.yaml", "--config", "x.cfg"], "needs the dataset"),
    "no dataset there": (["nowhere"], "no such folder"),
    "kind of output": (["nowhere", "-o", "s.json"], "must be a .yaml or .yml file"),
    "report of nothing": (["--config", "x.cfg", "--report", "r.html"], "needs the stacks"),
    "setting": (["--config", "x.cfg", "--set", "rang_um=3"], "unknown key"),
    "config": (["--config", "nowhere.cfg"], "nowhere.cfg: no such file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_calls(
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    args, sentence = WRONG[case]
    code, out, err = call(capsys, "calibrate", *args)
    assert (code, out) == (2, "")
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_run_takes_the_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, plan = tmp_path / "s.yaml", tmp_path / "plan.yaml"
    file.write_text("metadata: {mm_autofocus: {strategy: sweep, range_um: 7.0, max_looks: 30}}")
    plan.write_text(
        "stage_positions: [{x: 0, y: 0, z: 1}]\nchannels: [{config: FITC, exposure: 1}]\n"
        "autofocus_plan: {axes: [p]}\nmetadata: {mm_autofocus: {range_um: 3}}\n"
    )
    out_file = str(tmp_path / "o.ome.tiff")
    args = ["run", str(plan), "--config", "demo_camera.cfg", "-o", out_file, "--json"]
    code, out, err = call(capsys, *args, "--settings", str(file), "--set", "max_looks=15")
    assert code in (0, 1), err
    (record,) = json.loads(out)["autofocus"]
    assert record["strategy"] == "sweep"
    code, out, _ = call(capsys, "inspect", out_file, "--json")
    settings = json.loads(out)["settings"]
    assert (settings["range_um"], settings["max_looks"]) == (7.0, 15)


def test_real_curves(data_root: Path, tmp_path: Path) -> None:
    """Thick sections: the curve is far wider than any depth of field of optics."""
    from mm_autofocus.collecting import collect_recorded

    files = sorted((data_root / "zstack_brain").glob("*.tif"))[:4]
    if not files:
        pytest.skip("no brain stacks")
    collect_recorded(files, tmp_path / "d", step_um=1.0, slide="b", optics={}, sets={})
    images = calibrate(Dataset.open(tmp_path / "d"))
    assert images.depth.source == "focus curve"
    assert images.depth.curve_um is not None
    assert 4 < images.depth.curve_um.median < 10
    settings = recommend(images, None).settings
    assert settings["range_um"] >= 10
    parse_settings(settings)
