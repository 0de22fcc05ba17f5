"""`run` and `autofocus`: files, faults, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mm_autofocus
import numpy as np
import pytest
import tifffile
from mm_autofocus import FocusFailedError, HardwareError, InputError, autofocus, run
from mm_autofocus.ometiff import read_plane, read_record
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.mda import MDAEngine

AF = {"range_um": 20.0, "z_min_um": -60.0, "z_max_um": 60.0}


def plan(settings: dict[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "stage_positions": [
            {"x": 0, "y": 0, "z": 8.0, "name": "A1"},
            {"x": 500, "y": 0, "z": -6.0, "name": "A2"},
        ],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {"mm_autofocus": {**AF, **(settings or {})}},
        **kwargs,
    }


def test_a_run_saves_its_frames_with_their_record(core: CMMCorePlus, tmp_path: Path) -> None:
    before = core.mda.engine
    file = tmp_path / "run.ome.tiff"
    result = run(plan(channels=["FITC", "DAPI"]), core=core, output=file)
    assert core.mda.engine is before
    assert result.output == [file]
    assert (result.frames, result.positions, result.missing) == (4, 2, 0)
    assert result.exposures == 4 + sum(r["looks"] for r in result.records)
    assert result.exit_code == 0
    record = read_record(file)
    assert record.complete
    assert [f.position for f in record.focus] == ["A1", "A2"]
    for focus, told in zip(record.focus, result.records, strict=True):
        assert focus.status == "ok"
        assert focus.z_before_um == pytest.approx(told["z_before_um"])
        assert focus.z_after_um == pytest.approx(told["z_after_um"])
        assert focus.curve == tuple(tuple(point) for point in told["curve"])
        assert focus.thumbnail is not None
        assert len(focus.frames) == 2
    for image in record.images:
        assert all(abs(p.z_um) <= 1 for p in image.planes.values() if p.z_um is not None)
    assert record.settings is not None
    assert record.settings["strategy"] == "hill-climb"
    assert read_plane(file, 1, c=1).shape == (512, 512)


def test_rgb_is_saved_right_where_the_stock_output_breaks(
    core: CMMCorePlus, tmp_path: Path
) -> None:
    core.setConfig("Camera", "8-bit RGB")
    frames: list[np.ndarray] = []
    core.mda.events.frameReady.connect(lambda image, *_: frames.append(image.copy()))
    file = tmp_path / "rgb.ome.tiff"
    result = run(plan(), core=core, output=file)
    # the adapter's RGB pattern is the same at every z, and is not taken for a focus
    assert [r["status"] for r in result.records] == ["failed", "failed"]
    with tifffile.TiffFile(file) as tif:
        assert [s.shape for s in tif.series] == [(512, 512, 3)] * 2
        for series, frame in zip(tif.series, frames, strict=True):
            np.testing.assert_array_equal(series.asarray(), frame)
    stock = tmp_path / "stock.ome.tiff"
    core.mda.set_engine(MDAEngine(core))
    core.mda.run(mm_autofocus.load_plan({"channels": ["FITC", "DAPI"]}), output=stock)
    with tifffile.TiffFile(stock) as tif:
        assert tif.series[0].shape != (2, 512, 512, 3)  # the trap


def test_skipped_tiles_keep_the_shape_of_the_file(core: CMMCorePlus, tmp_path: Path) -> None:
    def blind_at_second(engine: Any) -> None:
        engine.signals.started.connect(
            lambda index, _: core.setProperty(
                "Camera", "Mode", "Noise" if index["p"] == 1 else "Fluorescent Beads"
            )
        )

    file = tmp_path / "skip.ome.tiff"
    result = run(
        plan({"on_failure": "skip", "prior": "none"}, z_plan={"relative": [0, 1]}),
        core=core,
        output=file,
        on_engine=blind_at_second,
    )
    assert (result.frames, len(result.failed), result.exit_code) == (2, 1, 1)
    record = read_record(file)
    assert [i.shape for i in record.images] == [(1, 1, 2, 512, 512)] * 2
    assert record.images[1].gaps == {"skipped": 2}
    assert [f.status for f in record.focus] == ["ok", "failed"]


def test_abort_leaves_a_readable_file_that_says_why(core: CMMCorePlus, tmp_path: Path) -> None:
    def blind_at_second(engine: Any) -> None:
        engine.signals.started.connect(
            lambda index, _: core.setProperty(
                "Camera", "Mode", "Noise" if index["p"] == 1 else "Fluorescent Beads"
            )
        )

    file = tmp_path / "abort.ome.tiff"
    with pytest.raises(FocusFailedError, match="A2: not focused") as e:
        run(plan({"on_failure": "abort"}), core=core, output=file, on_engine=blind_at_second)
    assert f"1 frames are saved in {file}" in str(e.value)
    record = read_record(file)
    assert (record.complete, record.frames) == (True, 1)
    assert [f.status for f in record.focus] == ["ok", "failed"]


def test_a_camera_fault_ends_the_run_with_what_was_saved(
    core: CMMCorePlus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snaps = 0
    snap = core.snapImage

    def broken() -> None:
        nonlocal snaps
        snaps += 1
        if engines and engines[0].records and engines[0].frames:
            raise RuntimeError("camera unplugged")
        snap()

    engines: list[Any] = []
    monkeypatch.setattr(core, "snapImage", broken)
    file = tmp_path / "fault.ome.tiff"
    with pytest.raises(HardwareError) as e:
        run(plan(), core=core, output=file, on_engine=engines.append)
    assert "camera unplugged" in str(e.value)
    assert [r["status"] for r in e.value.result.records] == ["ok", "failed"]  # type: ignore[attr-defined]
    assert f"1 frames are saved in {file}" in str(e.value)
    record = read_record(file)
    assert record.complete
    assert record.frames == 1
    assert [(f.position, f.status) for f in record.focus] == [("A1", "ok"), ("A2", "failed")]
    assert "camera unplugged" in record.focus[1].reason


def test_a_failed_exposure_of_data_is_counted_as_missing(
    core: CMMCorePlus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snap = core.snapImage
    shots = iter(range(100))

    def sometimes() -> None:
        if next(shots) == 1:
            raise RuntimeError("timeout")
        snap()

    monkeypatch.setattr(core, "snapImage", sometimes)
    file = tmp_path / "missing.ome.tiff"
    plain = {"stage_positions": [{"x": x, "y": 0, "z": 0} for x in (0, 10, 20)]}
    result = run(plain, core=core, output=file)
    assert (result.frames, result.missing, result.exit_code) == (2, 1, 3)
    record = read_record(file)
    assert [i.gaps for i in record.images] == [{}, {"missing": 1}, {}]


REFUSED = {
    "exists": ({}, "there.ome.tiff", "exists"),
    "no such folder": ({}, "nope/run.ome.tiff", "does not exist"),
    "no OME-TIFF": ({}, "run.png", "ome.tif"),
    "unknown compression": ({"compression": "lzma"}, "run.ome.tiff", "lzma"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_outputs_are_refused_before_anything(
    core: CMMCorePlus, tmp_path: Path, case: str
) -> None:
    kwargs, name, words = REFUSED[case]
    (tmp_path / "there.ome.tiff").write_bytes(b"precious")
    core.setZPosition(3.0)
    with pytest.raises(InputError) as e:
        run(plan(), core=core, output=tmp_path / name, **kwargs)  # type: ignore[arg-type]
    assert words in str(e.value)
    assert core.getZPosition() == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["there.ome.tiff"]
    assert (tmp_path / "there.ome.tiff").read_bytes() == b"precious"


def test_a_bad_plan_writes_nothing(core: CMMCorePlus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'FITC'"):
        run(plan(channels=["FITK"]), core=core, output=tmp_path / "run.ome.tiff")
    assert list(tmp_path.iterdir()) == []


def test_autofocus_once(core: CMMCorePlus) -> None:
    core.setZPosition(-11.0)
    result = autofocus(core, range_um=15.0)
    assert result.status == "ok"
    assert core.getZPosition() == pytest.approx(result.z_um)
    assert abs(core.getZPosition()) <= 1
    with pytest.raises(InputError, match=r"autofocus\.rnge_um: unknown key"):
        autofocus(core, rnge_um=15.0)
    with pytest.raises(InputError, match="z_min_um and z_max_um"):
        autofocus(core, z_min_um=50.0)


def test_autofocus_on_a_blank_field_comes_back(make_core: Callable[..., CMMCorePlus]) -> None:
    core = make_core("Noise", z_um=4.0)
    result = autofocus(core)
    assert (result.status, result.z_um) == ("failed", None)
    assert result.reason
    assert core.getZPosition() == 4.0


def test_two_cameras_are_two_channels(tmp_path: Path) -> None:
    """The real Multi Camera adapter, focused by the first of its cameras."""
    from mm_autofocus.config import close_core, open_core

    from conftest import ROOT

    text = (ROOT / "demo_config" / "demo_camera.cfg").read_text()
    text = text.replace(
        "Property,Core,Initialize,1",
        "Device,Camera2,DemoCamera,DCam\nParent,Camera2,DHub\n"
        "Device,Both,Utilities,Multi Camera\nProperty,Core,Initialize,1",
    ).replace(
        "Property,Core,Camera,Camera",
        "Property,Both,Physical Camera 1,Camera\nProperty,Both,Physical Camera 2,Camera2\n"
        "Property,Core,Camera,Both",
    )
    text += (
        "ConfigGroup,System,Startup,Camera2,PixelType,16bit\n"
        "ConfigGroup,System,Startup,Camera2,BitDepth,16\n"
    )
    cfg = tmp_path / "both.cfg"
    cfg.write_text(text)
    core = open_core(cfg)
    try:
        file = tmp_path / "both.ome.tiff"
        result = run(plan(channels=["FITC", "DAPI"]), core=core, output=file)
    finally:
        close_core(core)
    assert [r["status"] for r in result.records] == ["ok", "ok"]
    record = read_record(file)
    assert [i.shape for i in record.images] == [(1, 4, 1, 512, 512)] * 2
    assert record.images[0].gaps == {}
    assert len(set(record.images[0].channels)) == 4


def test_positions_are_counted_in_hardware_sequences_too(core: CMMCorePlus) -> None:
    core.setProperty("Z", "UseSequences", "Yes")
    result = run(plan(z_plan={"relative": [-1, 0, 1]}), core=core)
    assert (result.frames, result.positions) == (6, 2)
