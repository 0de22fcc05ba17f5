"""Faults on command: each run ends as promised.

A user's plan runs on the virtual microscope while one of its devices fails. Promised: no
frame pretends, the stage is at a safe and known z, shutter and camera are as before, and
each frame that was reported is readable in the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mm_autofocus import HardwareError, run
from mm_autofocus.config import close_core, open_core
from mm_autofocus.ometiff import read_record
from mm_autofocus.sim.truth import defocus_um, microscope_of

TILES = ((0.0, 0.0), (400.0, 0.0), (800.0, 400.0))
START_UM = 5.0
DOF_UM = 0.98


@pytest.fixture
def core() -> Iterator[Any]:
    core = open_core("virtual_slide.cfg")
    core.setTimeoutMs(300)
    core.setProperty("Optics", "quality", "preview")  # it is not the optics that fail
    core.setZPosition(START_UM)
    core.waitForDevice("Z")
    yield core
    for device in core.getLoadedDevices():
        if device != "Core":
            core.setProperty(device, "fault", "none")
    close_core(core)


def plan(**changes: Any) -> dict[str, Any]:
    return {
        "stage_positions": [{"x": x, "y": y} for x, y in TILES],
        "channels": ["Brightfield"],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {
            "mm_autofocus": {
                "range_um": 12.0, "z_min_um": -40.0, "z_max_um": 40.0, "na": 0.75,
                "prior": "none", "backlash_um": 1.0, "magnification": 20.0,
            }
        },
        **changes,
    }  # fmt: skip


def arm(core: Any, device: str, kind: str, **settings: Any) -> None:
    for name, value in settings.items():
        core.setProperty(device, f"fault_{name}", value)
    core.setProperty(device, "fault", kind)


def state(core: Any) -> dict[str, Any]:
    return {
        "exposure": core.getExposure(),
        "roi": list(core.getROI()),
        "auto shutter": core.getAutoShutter(),
        "shutter": core.getShutterOpen(),
        "channel": core.getProperty("Filter", "Label"),
    }


def true_defoci(core: Any, frames: list[Any]) -> list[float | None]:
    return [defocus_um(microscope_of(core), exposure) for exposure in frames]


# name: device, kind, settings of the fault, words of the error
ENDS_THE_RUN: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "camera raises in a look": ("Camera", "raise", {"at_call": 3}, "could not take a look"),
    "focus stage raises": ("Z", "raise", {"on": "move", "at_call": 5}, "could not be sent to"),
    "focus stage gives no position": ("Z", "raise", {"on": "read", "at_call": 6}, "no position"),
    "focus stage hangs": ("Z", "hang", {"on": "move", "at_call": 5, "s": 2.0}, "Z"),
    "XY stage raises": ("XY", "raise", {"on": "move", "at_call": 1}, "XY"),
    "XY stage hangs": ("XY", "hang", {"on": "move", "at_call": 2, "s": 3.0}, "XY"),
    "XY stage goes elsewhere": (
        "XY", "wrong-value", {"on": "move", "at_call": 1, "value": 300.0}, "stands at 300 µm"
    ),
    "shutter raises": ("Shutter", "raise", {"at_call": 5}, "Shutter"),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS_THE_RUN)
def test_a_fault_that_ends_the_run(core: Any, case: str, tmp_path: Path) -> None:
    device, kind, settings, words = ENDS_THE_RUN[case]
    before = state(core)
    file = tmp_path / "run.ome.tiff"
    arm(core, device, kind, **settings)
    with pytest.raises(HardwareError) as e:
        run(plan(), core=core, output=file)
    assert words in str(e.value)
    core.setProperty(device, "fault", "none")
    core.waitForSystem()
    assert state(core) == before
    # either where the run began (restored at its end) or at the start of the search
    assert core.getZPosition() == pytest.approx(START_UM, abs=0.5)
    if file.exists():
        assert f"frames are saved in {file}" in str(e.value)
        assert read_record(file).complete


@pytest.mark.parametrize("device", ["Filter", "Objective", "Lamp"])
def test_a_state_that_cannot_be_set_ends_the_run(
    core: Any, device: str, tmp_path: Path
) -> None:
    change = {
        "Filter": {"channels": ["Brightfield", "FITC"]},
        "Objective": {"channels": [{"config": "40x", "group": "Objective"}]},
        "Lamp": {
            "stage_positions": [{"x": 0, "y": 0, "properties": [["Lamp", "intensity", 80]]}]
        },
    }[device]
    # for good: the host tries a preset twice
    arm(core, device, "raise", at_call=2 if device == "Filter" else 1, calls=0)
    with pytest.raises(HardwareError, match=f"{device}: .* on command"):
        run(plan(**change), core=core, output=tmp_path / "run.ome.tiff")
    assert core.getZPosition() == pytest.approx(START_UM, abs=0.5)


def test_a_camera_that_fails_while_data_are_taken_leaves_a_gap(
    core: Any, tmp_path: Path
) -> None:
    file = tmp_path / "run.ome.tiff"
    arm(core, "Camera", "raise", at_call=2)
    result = run(plan(metadata={}, autofocus_plan=None), core=core, output=file)
    assert (result.frames, result.missing, result.exit_code) == (2, 1, 3)
    record = read_record(file)
    assert [image.gaps for image in record.images] == [{}, {"missing": 1}, {}]


def test_a_camera_that_hangs_for_a_while_costs_time_only(core: Any) -> None:
    arm(core, "Camera", "hang", at_call=2, s=0.5)
    result = run(plan(), core=core)
    assert [r["status"] for r in result.records] == ["ok"] * 3


def test_a_shutter_that_stays_closed_is_no_focus(core: Any, tmp_path: Path) -> None:
    arm(core, "Shutter", "wrong-value", calls=0)
    result = run(plan(), core=core, output=tmp_path / "run.ome.tiff")
    assert [r["status"] for r in result.records] == ["failed"] * 3
    assert all("dark" in r["reason"] for r in result.records)
    assert result.exit_code == 1


def test_a_lamp_that_went_out_is_no_focus(core: Any) -> None:
    arm(core, "Lamp", "wrong-value", value=0.0)
    core.setProperty("Lamp", "intensity", 50)
    result = run(plan(), core=core)
    assert {r["status"] for r in result.records} == {"failed"}


NEVER_A_FALSE_OK: dict[str, tuple[str, dict[str, Any]]] = {
    "one grey frame among the looks": ("Camera", {"at_call": 2, "value": 120}),
    "one black frame among the looks": ("Camera", {"at_call": 3, "value": 0}),
    "the focus stage goes 7 µm too far once": ("Z", {"on": "move", "at_call": 4, "value": 7.0}),
    "the focus stage reads 6 µm too much once": (
        "Z",
        {"on": "read", "at_call": 8, "value": 6.0},
    ),
}


@pytest.mark.parametrize("case", NEVER_A_FALSE_OK)
def test_one_wrong_value_is_never_a_false_ok(core: Any, case: str) -> None:
    device, settings = NEVER_A_FALSE_OK[case]
    scope = microscope_of(core)
    frames: list[Any] = []
    core.mda.events.frameReady.connect(lambda *_: frames.append(scope.exposures[-1]))
    arm(core, device, "wrong-value", **settings)
    result = run(plan(), core=core)
    assert len(frames) == 3
    for record, defocus in zip(result.records, true_defoci(core, frames), strict=True):
        assert defocus is not None
        assert record["status"] != "ok" or abs(defocus) <= DOF_UM
    assert result.records[2]["status"] == "ok"  # and the next tiles are as ever


def test_a_lost_focus_lock_says_so(core: Any) -> None:
    core.setProperty("FocusLock", "continuous", 1)
    assert core.getProperty("FocusLock", "lock") not in ("", None)
    core.setProperty("FocusLock", "lose", 1)
    assert microscope_of(core).focus_lost


def test_a_stage_that_does_not_follow_is_named(
    core: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no device of the virtual microscope lies like this: it accepts each move and stays
    monkeypatch.setattr(core, "setPosition", lambda *_: None)
    result = run(plan(stage_positions=[{"x": 0, "y": 0}]), core=core)
    assert result.records[0]["status"] == "failed"
    assert "does not follow" in result.records[0]["reason"]
    assert result.records[0]["looks"] <= 3


@pytest.mark.parametrize("device", ["Shutter", "Filter", "Objective"])
def test_a_device_that_hangs_ends_the_run(core: Any, device: str, tmp_path: Path) -> None:
    change = {
        "Shutter": {},
        "Filter": {"channels": ["Brightfield", "FITC"]},
        "Objective": {"channels": [{"config": "40x", "group": "Objective"}]},
    }[device]
    arm(core, device, "hang", at_call=2 if device == "Filter" else 1, s=3.0)
    try:
        result = run(plan(**change), core=core, output=tmp_path / "run.ome.tiff")
    except HardwareError as e:
        assert device in str(e)  # the core waited for it in vain
    else:  # or nothing waited for it, and what it was asked to do was done
        assert device == "Shutter"
        assert [r["status"] for r in result.records] == ["ok"] * 3
    core.setProperty(device, "fault", "none")
    core.waitForSystem()
    assert core.getZPosition() == pytest.approx(START_UM, abs=0.5)


@pytest.mark.parametrize("device", ["Filter", "Objective"])
def test_a_wheel_that_stays_and_says_it_has_turned_is_no_false_ok(
    core: Any, device: str
) -> None:
    # nothing in the core shows it; what is promised is that no tile pretends to be in focus
    channel = {
        "Filter": {"config": "FITC"},
        "Objective": {"config": "40x", "group": "Objective"},
    }
    scope = microscope_of(core)
    frames: list[Any] = []
    core.mda.events.frameReady.connect(lambda *_: frames.append(scope.exposures[-1]))
    arm(core, device, "wrong-value", calls=0)
    result = run(plan(channels=[channel[device]]), core=core)
    for record, defocus in zip(result.records, true_defoci(core, frames), strict=True):
        assert defocus is not None
        assert record["status"] != "ok" or abs(defocus) <= DOF_UM


@pytest.mark.parametrize("lost", [False, True], ids=["locked", "lost"])
def test_a_focus_lock_that_was_left_on_is_no_false_ok(core: Any, lost: bool) -> None:
    core.setProperty("FocusLock", "continuous", 1)
    core.waitForSystem()
    if lost:
        core.setProperty("FocusLock", "lose", 1)
    scope = microscope_of(core)
    frames: list[Any] = []
    core.mda.events.frameReady.connect(lambda *_: frames.append(scope.exposures[-1]))
    result = run(plan(), core=core)
    assert len(frames) == 3
    for record, defocus in zip(result.records, true_defoci(core, frames), strict=True):
        assert defocus is not None
        assert record["status"] != "ok" or abs(defocus) <= DOF_UM
