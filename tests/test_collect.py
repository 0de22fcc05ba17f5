"""Collecting on a microscope: labels against the truth, interruption, refusals, the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mm_autofocus import cli
from mm_autofocus.config import close_core, open_core
from mm_autofocus.errors import InputError
from mm_autofocus.ometiff import read_info, read_record
from mm_autofocus.sim.stack_truth import truth_of
from mm_autofocus.sim.truth import geometric_focus_um, microscope_of
from mm_autofocus.training import Dataset
from mm_autofocus.training.collect import Collection, collect
from pymmcore_plus import CMMCorePlus

from conftest import PLANS

OPTICS = {"na": 0.75, "magnification": 20.0}
FIELD_UM = 512 * 0.325


@pytest.fixture(scope="module")
def slide_plan() -> dict[str, Any]:
    """Two dense, two sparse fields and a blank one of the virtual slide, near their focus."""
    core = open_core("virtual_slide.cfg")
    try:
        scope = microscope_of(core)
        positions = []
        for kind, n in (("dense", 2), ("sparse", 2), ("blank", 1)):
            for i, (x, y) in enumerate(scope.slide.find_fields(kind, n, (FIELD_UM, FIELD_UM))):
                z = round(geometric_focus_um(scope, x, y) + 0.7, 2)
                positions.append({"x": float(x), "y": float(y), "z": z, "name": f"{kind} {i}"})
    finally:
        close_core(core)
    return {
        "stage_positions": positions,
        "channels": [{"config": "Brightfield", "exposure": 5.0}],
        "z_plan": {"range": 10, "step": 1},
    }


@pytest.fixture(scope="module")
def collected(
    slide_plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Dataset]:
    """The plan, collected without any interruption."""
    core = open_core("virtual_slide.cfg")
    try:
        folder = tmp_path_factory.mktemp("collected") / "d"
        yield collect(
            slide_plan, core, folder, slide="one", optics=OPTICS, truth=truth_of(core)
        ).dataset
    finally:
        close_core(core)


def test_labels_agree_with_the_truth(collected: Dataset) -> None:
    dataset = Dataset.open(collected.path)
    assert [s.field for s in dataset] == [
        "dense 0",
        "dense 1",
        "sparse 0",
        "sparse 1",
        "blank 0",
    ]
    for s in dataset.stacks[:4]:
        dof = s.optics["dof_um"]
        assert s.label == "ok"
        assert abs(s.focus_z_um - s.truth["focus_z_um"]) < dof / 3
        # the stage errs by 0.15 µm from plane to plane
        assert np.abs(s.defocus_um - s.truth["defocus_um"]).max() < dof
        assert s.sparsity == s.field.split()[0]
        assert s.known_optics().pixel_size_um == 0.325
        assert (s.shape, s.dtype, s.is_rgb) == ((11, 512, 512, 3), "uint8", True)
        assert (s.channel_name, s.exposure_ms) == ("Brightfield", 5.0)
        assert s.frame_um == pytest.approx((FIELD_UM, FIELD_UM))
        assert 0 < s.expected_error_um < dof / 3
    blank = dataset.stacks[4]
    assert (blank.label, blank.sparsity) == ("refused", "blank")
    assert blank.reason.startswith("flat")
    assert blank.truth == {"focus_z_um": None, "defocus_um": None}


def test_the_planes_are_those_of_the_files(collected: Dataset) -> None:
    for s in collected.stacks[:2]:
        file = collected.path / s.file
        assert read_info(file).complete
        record = read_record(file)
        (image,) = record.images
        assert image.name == s.field
        z = [image.planes[0, 0, k].z_um for k in range(11)]
        assert z == pytest.approx(s.z_um, abs=1e-3)
        assert [image.planes[0, 0, k].page for k in range(11)] == list(s.pages)
        best = int(np.argmax(s.scores))
        planes = {z: float(im.astype(float).std()) for z, im in s.planes()}
        assert len(planes) == 11
        assert s.plane(best).shape == (512, 512, 3)


def test_a_split_of_what_was_collected(collected: Dataset) -> None:
    split = collected.split(seed=0, parts={"train": 0.5, "test": 0.5})
    again = Dataset.open(collected.path)
    assert again.written_split == split
    assert len(again.part("train")) == len(again.part("test")) == 2


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come so far"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_killed_collection_goes_on(
    slide_plan: dict[str, Any], collected: Dataset, tmp_path: Path
) -> None:
    plan, output = tmp_path / "plan.yaml", tmp_path / "d"
    plan.write_text(yaml.safe_dump(slide_plan))
    command = ["collect", str(plan), "--config", "virtual_slide.cfg", "-o", str(output)]
    command += ["--slide", "one", "--na", "0.75", "--magnification", "20", "--json"]
    call = [sys.executable, "-c", "from mm_autofocus.cli import main; main()", *command]
    index = output / "stacks.jsonl"
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: index.is_file() and index.read_bytes().count(b"\n") >= 2)
    wait_for((output / "stacks" / "r01_p0002.ome.tiff").is_file)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = Dataset.open(output)
    assert 2 <= len(done) < 5
    for s in done:  # what the index promises is there, before anything is mended
        assert s.load().shape == s.shape
    with index.open("ab") as f:
        f.write(b'{"file": "sta')  # as if it had been killed while it wrote
    again = subprocess.run(call, capture_output=True, check=False)
    assert again.returncode == 0, again.stderr.decode()
    document = json.loads(again.stdout)
    assert document["new_stacks"] == 5 - len(done)
    dataset = Dataset.open(output)

    def known(d: Dataset) -> list[tuple[Any, ...]]:
        return [(s.key, s.shape, s.label, s.sparsity, s.x_um, s.y_um) for s in d]

    assert known(dataset) == known(collected)
    for s, other in zip(dataset, collected, strict=True):
        if s.labelled:
            assert s.focus_z_um == pytest.approx(other.focus_z_um, abs=0.33)
            assert s.truth is not None
    # no more files than the index needs, and all of them closed
    files = {p.name for p in (output / "stacks").iterdir()}
    assert files == {Path(s.file).name for s in dataset}
    assert all(read_info(output / "stacks" / name).complete for name in files)
    third = subprocess.run(call, capture_output=True, check=True)
    assert json.loads(third.stdout)["new_stacks"] == 0


# ------------------------------------------------------- on the demo adapters: it is quick

QUICK: dict[str, Any] = {
    "stage_positions": [{"x": 0, "y": 0, "z": 1, "name": "A"}, {"x": 600, "y": 0, "z": 1}],
    "channels": [{"config": "FITC", "exposure": 1}],
    "z_plan": {"range": 12, "step": 1.5},
}


def test_the_plan_for_collecting_focuses_first(core: CMMCorePlus, tmp_path: Path) -> None:
    did = collect(PLANS / "collect_stacks.yaml", core, tmp_path / "d")
    assert did.new == len(did.dataset) == 3
    assert did.run is not None
    assert len(did.run.records) == 3
    for s in did.dataset:
        assert s.label == "ok"
        assert abs(s.focus_z_um) < 0.5  # the beads are in focus at 0
        assert np.mean(s.z_um) == pytest.approx(0, abs=1.0)  # the stack stands around it
        assert s.truth is None
    assert "labelled" in did.to_json()
    assert "3 of them new" in did.sentence()


def test_grids_channels_and_times_are_stacks(core: CMMCorePlus, tmp_path: Path) -> None:
    plan = {
        **QUICK,
        "stage_positions": [{"x": 0, "y": 0, "z": 0, "name": "S"}],
        "grid_plan": {"rows": 1, "columns": 2},
        "channels": [
            {"config": "FITC", "exposure": 1},
            {"config": "DAPI", "exposure": 1},
            {"config": "Rhodamine", "exposure": 1, "do_stack": False},
        ],
        "time_plan": {"interval": 0, "loops": 2},
    }
    dataset = collect(plan, core, tmp_path / "d").dataset
    assert {s.key for s in dataset} == {
        ("slide", f"S g{g:03d}", t, c) for g in range(2) for t in range(2) for c in range(2)
    }
    assert {s.channel_name for s in dataset} == {"FITC", "DAPI"}
    assert len({s.xy_um for s in dataset}) == 2
    assert dataset.summary()["fields"] == 2
    first = dataset.stacks[0]
    assert [z for z, _ in first.planes()] == pytest.approx(list(first.z_um))
    assert len(first.z_um) == 9
    assert collect(plan, core, tmp_path / "d").new == 0


def test_another_plan_goes_elsewhere(core: CMMCorePlus, tmp_path: Path) -> None:
    collect(QUICK, core, tmp_path / "d")
    before = (tmp_path / "d" / "stacks.jsonl").read_bytes()
    other = {**QUICK, "z_plan": {"range": 12, "step": 1}}
    for change in ({"plan": other}, {"settings": {"metric": "tenengrad"}}):
        with pytest.raises(InputError, match=r"another plan|made by the metric"):
            Collection(**{"plan": QUICK, "output": tmp_path / "d", **change})
    assert (tmp_path / "d" / "stacks.jsonl").read_bytes() == before
    second = collect(other, core, tmp_path / "d", slide="second")
    assert (second.new, second.dataset.summary()["slides"]) == (2, 2)
    assert [s.field for s in second.dataset] == ["A", "p001"] * 2


def test_tiles_left_out_are_not_asked_for_again(core: CMMCorePlus, tmp_path: Path) -> None:
    plan = {
        **QUICK,
        "autofocus_plan": {"axes": ["p"]},
        # 3 µm about z = 200 there is no focus to be found
        "stage_positions": [QUICK["stage_positions"][0], {"x": 9, "y": 9, "z": 200}],
        "metadata": {"mm_autofocus": {"range_um": 3.0, "on_failure": "skip", "max_looks": 8}},
    }
    did = collect(plan, core, tmp_path / "d")
    assert [s.field for s in did.dataset] == ["A"]
    assert did.run is not None
    assert did.run.exit_code == 1
    assert list(did.dataset.meta["slides"]["slide"]["without_stack"]) == ["p001"]
    again = collect(plan, core, tmp_path / "d")
    assert (again.new, again.run) == (0, None)


def test_a_lost_file_is_taken_anew(core: CMMCorePlus, tmp_path: Path) -> None:
    first = collect(QUICK, core, tmp_path / "d").dataset
    (tmp_path / "d" / first.stacks[1].file).unlink()
    (tmp_path / "d" / "stacks" / "r07_p0000.ome.tiff").write_bytes(b"torn")
    again = collect(QUICK, core, tmp_path / "d")
    assert again.new == 1
    assert {s.key for s in again.dataset} == {s.key for s in first}
    assert all(s.load().shape == s.shape for s in again.dataset)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no z": ({"z_plan": None}, "z_plan: the plan has none"),
    "one plane": ({"z_plan": {"relative": [0]}}, "one plane is no stack"),
    "few planes": ({"z_plan": {"range": 3, "step": 1}}, "4 planes are too few"),
    "no positions": ({"stage_positions": []}, "stage_positions: the plan has none"),
    "channel": ({"channels": ["DAPPI"]}, "'DAPPI' is not a channel"),
    "limits": (  # only the engine sees it
        {
            "autofocus_plan": {"axes": ["p"]},
            "metadata": {"mm_autofocus": {"z_min_um": -30, "z_max_um": 6}},
        },
        "stage_positions[0]",
    ),
    "setting": ({"metadata": {"mm_autofocus": {"rang_um": 3}}}, "unknown key"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans_write_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = BAD[case]
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        yaml.safe_dump({k: v for k, v in {**QUICK, **change}.items() if v is not None})
    )
    code, out, err = call(
        capsys, str(plan), "--config", "demo_camera.cfg", "-o", str(tmp_path / "d")
    )
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "d").exists()


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        cli.main(["collect", *args])
    out, err = capsys.readouterr()
    return int(e.value.code or 0), out, err


def test_the_command_for_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, d = tmp_path / "plan.yaml", str(tmp_path / "d")
    plan.write_text(yaml.safe_dump(QUICK))
    args = [str(plan), "--config", "demo_camera.cfg", "-o", d, "--na", "0.75"]
    code, out, _ = call(capsys, *args, "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["stacks"], document["labelled"], document["new_stacks"]) == (2, 2, 2)
    assert document["run"]["frames"] == 18
    assert Dataset.open(d).stacks[0].known_optics().na == 0.75
    code, out, _ = call(capsys, *args)
    assert (code, "0 of them new" in out) == (0, True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    code, _, err = call(capsys, *args[:4], str(tmp_path / "mine"))
    assert (code, "is not a dataset" in err) == (2, True)


def test_the_command_for_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tifffile

    rng = np.random.default_rng(0)
    texture = rng.normal(size=(64, 64))
    bell = np.exp(-(((np.arange(15) - 7.3) / 2.5) ** 2))
    names = []
    for i in range(3):
        stack = 100 + 30 * bell[:, None, None] * texture + rng.normal(size=(15, 64, 64))
        names.append(str(tmp_path / f"f{i}.tif"))
        tifffile.imwrite(names[-1], stack.astype(np.uint8), photometric="minisblack")
    d = str(tmp_path / "d")
    args = ["--from", *names, "--step-um", "2", "-o", d, "--slide", "blood", "--json"]
    code, out, _ = call(capsys, *args, "--set", "metric=tenengrad", "--pixel-size-um", "0.5")
    document = json.loads(out)
    assert (code, document["labelled"], document["new_stacks"]) == (0, 3, 3)
    dataset = Dataset.open(d)
    assert dataset.meta["metric"] == "tenengrad"
    assert [s.slide for s in dataset] == ["blood"] * 3
    assert all(s.focus_z_um == pytest.approx(14.6, abs=0.2) for s in dataset)
    for wrong, sentence in (
        (["--from", names[0], "-o", d], "made by the metric tenengrad"),
        (["--from", names[0], "--config", "x.cfg", "-o", d], "need no microscope"),
        (["-o", d], "name a plan, or recorded stacks with --from"),
        ([names[0], names[1], "-o", d], "one plan at a time"),
        ([names[0], "-o", d], "a plan needs a microscope"),
        ([names[0], "--config", "x.cfg", "--step-um", "1", "-o", d], "is for recorded stacks"),
        (["--from", names[0], "--na", "7", "-o", d], "na: 7"),
    ):
        code, out, err = call(capsys, *wrong)
        assert (code, out) == (2, "")
        assert sentence in err
