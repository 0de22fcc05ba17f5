"""Recovered while the run goes on: the same pixels, and never in its way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ome_types
import pytest
import tifffile
import yaml
from mm_autofocus import api, cli, refocus, run
from mm_autofocus.config import close_core, open_core
from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.ometiff import read_record
from mm_autofocus.ometiff.following import Follower, read_page
from mm_autofocus.refocusing.live import Live, fused_name

from conftest import PLANS
from tiny_refocus import make_refocus, plan, refocus_card, write_raw

PLAN: dict[str, Any] = yaml.safe_load((PLANS / "two_shot.yaml").read_text())
SMALL = {**PLAN, "grid_plan": {"rows": 2, "columns": 2, "overlap": [5, 5]}}


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return make_refocus(tmp_path / "net.onnx", "deep", refocus_card(channels=3))


@pytest.fixture
def slide() -> Iterator[Any]:
    core = open_core("virtual_slide.cfg")
    core.setProperty("Optics", "quality", "preview")
    yield core
    close_core(core)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".part")]


def test_live_is_the_same_as_afterwards(tmp_path: Path, slide: Any, net: Path) -> None:
    raw, seen = tmp_path / "raw.ome.tiff", []
    result = run(
        SMALL,
        core=slide,
        output=raw,
        refocus="live",
        refocus_model=net,
        on_refocus=seen.append,
    )
    live = tmp_path / "raw_fused.ome.tiff"
    assert result.refocus is not None
    assert result.refocus["output"] == str(live)
    assert (result.refocus["pairs"], result.refocus["shots_alone"]) == (4, 0)
    assert result.to_json()["refocus"]["pairs"] == 4
    assert not leftovers(tmp_path)
    later = tmp_path / "later.ome.tiff"
    refocus(raw, later, model=net, threads=1)
    ome_types.validate_xml(tifffile.tiffcomment(live))
    a, b = read_record(live), read_record(later)
    assert a.complete
    assert a.frames == a.frames_planned == 4
    assert [i.name for i in a.images] == [i.name for i in b.images]
    assert [(f.status, f.curve) for f in a.focus] == [(f.status, f.curve) for f in b.focus]
    assert a.derived is not None
    assert b.derived is not None
    changes = {"raw_if_unsure"}
    assert {k: v for k, v in a.derived.items() if k not in changes} == {
        k: v for k, v in b.derived.items() if k not in changes
    }
    assert a.recoveries == b.recoveries
    for n in range(4):
        np.testing.assert_array_equal(
            tifffile.imread(live, series=n), tifffile.imread(later, series=n)
        )


def test_when_the_process_dies_the_run_goes_on(
    tmp_path: Path, slide: Any, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw.ome.tiff"
    written = Live.written

    def kill(self: Live, frames: int) -> None:
        written(self, frames)
        if frames == 2 and self._process is not None:
            os.kill(self._process.pid, signal.SIGKILL)

    monkeypatch.setattr(Live, "written", kill)
    with pytest.raises(HardwareError, match=r"its process died.*8 frames are saved in") as e:
        run(SMALL, core=slide, output=raw, refocus="live", refocus_model=net)
    assert e.value.exit_code == 3
    assert read_record(raw).frames == 8
    assert read_record(raw).complete
    assert not fused_name(raw).exists()
    assert not leftovers(tmp_path)


def test_a_run_that_is_cut_short(tmp_path: Path, slide: Any, net: Path) -> None:
    raw = tmp_path / "raw.ome.tiff"
    frames = []

    def stop(*_: Any) -> None:
        frames.append(1)
        if len(frames) == 5:
            slide.mda.cancel()

    slide.mda.events.frameReady.connect(stop)
    result = run(SMALL, core=slide, output=raw, refocus="live", refocus_model=net)
    assert result.cancelled
    assert result.refocus is not None
    assert result.refocus["pairs"] == len(frames) // 2
    assert read_record(fused_name(raw)).frames == len(frames) // 2


def test_on_the_command_line(
    tmp_path: Path, net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, raw = tmp_path / "plan.yaml", tmp_path / "raw.ome.tiff"
    small = {**PLAN, "grid_plan": {"rows": 1, "columns": 2, "overlap": [5, 5]}}
    file.write_text(yaml.safe_dump(small))
    args = ["run", str(file), "--config", "virtual_slide.cfg", "-o", str(raw)]
    args += ["--refocus", "live", "--refocus-model", str(net), "--json"]
    with pytest.raises(SystemExit) as e:
        cli.main([*args, "--refocus-output", str(tmp_path / "sharp.ome.tiff")])
    told = json.loads(capsys.readouterr().out)
    assert not e.value.code
    assert told["refocus"]["pairs"] == 2
    assert read_record(tmp_path / "sharp.ome.tiff").frames == 2


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "grey model": ({"refocus_model": "GREY"}, "the frame is RGB, the model takes grey"),
    "no model": ({"refocus_model": "none-such"}, "'none-such' is unknown"),
    "word": ({"refocus": "later"}, "must be 'live'"),
    "not asked for": ({"refocus": None}, "need refocus: live"),
    "split": ({"split_positions": True}, "one output file"),
    "same file": ({"refocus_output": "RAW"}, "is the raw file itself"),
    "strategy": ({"plan": "hill-climb"}, "needs the strategy two-shot"),
    "far": ({"plan": "far"}, "trained on 1 … 2 µm"),
}


@pytest.mark.parametrize(("changes", "says"), BAD.values(), ids=BAD)
def test_bad_input(
    tmp_path: Path, slide: Any, net: Path, changes: dict[str, Any], says: str
) -> None:
    raw = tmp_path / "raw.ome.tiff"
    grey = make_refocus(tmp_path / "grey.onnx")
    changes = {**changes}
    plans: dict[Any, Any] = {
        "far": {**SMALL, "z_plan": {"relative": [-3, 3]}},
        "hill-climb": PLANS / "hill_climb.yaml",
    }
    wanted = plans.get(changes.pop("plan", None), SMALL)
    names = {"GREY": grey, "RAW": raw}
    given = {"refocus": "live", "refocus_model": net, **changes}
    given = {k: names.get(v, v) if isinstance(v, str) else v for k, v in given.items()}
    z_um = slide.getZPosition()
    with pytest.raises(InputError, match=says):
        run(wanted, core=slide, output=raw, **given)
    assert slide.getZPosition() == z_um
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx", "grey.onnx"}


def test_a_file_of_before_is_not_taken_for_the_new_one(tmp_path: Path, net: Path) -> None:
    """The process is told when the new file has been begun."""
    grey = make_refocus(tmp_path / "grey.onnx")
    raw = write_raw(tmp_path / "raw.ome.tiff")
    live = Live(raw, model=grey)
    live.start()
    time.sleep(1.5)
    assert not leftovers(tmp_path)
    raw.unlink()
    write_raw(raw, plan(stage_positions=[{"x": 0, "y": 0, "z": 100.0, "name": "only"}]))
    live.written(1)
    found = live.finish()
    assert found["pairs"] == 1


def test_pages_are_whole_when_they_are_found(tmp_path: Path) -> None:
    """Followed as fast as it is written, no page is read before it is there."""
    path, count = tmp_path / "raw.ome.tiff", 400
    places = [{"x": float(i), "y": 0.0, "z": 0.0} for i in range(count // 2)]
    done = threading.Thread(
        target=write_raw, args=(path, plan(stage_positions=places)), kwargs={"shape": (8, 16)}
    )
    done.start()
    # The size of the file says nothing: its first page may be written and not yet linked,
    # and until then the file has none. A live run is told of the first page instead.
    follower, found, until = None, [], time.monotonic() + 60
    while follower is None:
        assert time.monotonic() < until
        with contextlib.suppress(InputError):
            follower = Follower(path)
    while done.is_alive():
        found += list(follower.new())
    done.join()
    found += list(follower.new())
    assert len(found) == count
    assert [f.index["z"] for f, _ in found] == [0, 1] * (count // 2)
    assert all(read_page(at).shape == (8, 16) for _, at in found[::50])


def test_no_frame_at_all(tmp_path: Path) -> None:
    grey = make_refocus(tmp_path / "grey.onnx")
    live = Live(tmp_path / "raw.ome.tiff", model=grey)
    live.start()
    assert live.finish() == {"output": None, "pairs": 0}
    assert not leftovers(tmp_path)
    assert api.RunResult().to_json().get("refocus") is None
