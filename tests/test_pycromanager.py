"""The pycro-manager hook, on pycro-manager's own Python backend and the demo adapters.

One core per process is all that pycro-manager has, and its engine is a singleton, so that
one process runs all cases and the tests look at what it wrote down.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from mm_autofocus.errors import InputError
from mm_autofocus.hooks.pycromanager import autofocus_hook
from pymmcore_plus import CMMCorePlus

pytest.importorskip("pycromanager")

SCRIPT = r"""
import json, os, sys, threading, time, traceback, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import mm_test_adapters
from pycromanager import Acquisition, Core, start_headless, stop_headless
from mm_autofocus.config import shipped
from mm_autofocus.hooks.pycromanager import autofocus_hook, record_of

out = Path(sys.argv[1])


def die(kind, error, trace):  # other threads would keep the process alive
    traceback.print_exception(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


sys.excepthook = die
start_headless(
    mm_test_adapters.device_adapter_path(), str(shipped("demo_config", "demo_camera.cfg")),
    python_backend=True,
)
core = Core()
core.set_exposure(1)


def hook_rig(hook):
    return hook._open()[0]


def events(positions, relative=(0.0,), times=1, z_axis=False):
    for t in range(times):
        for p, z in enumerate(positions):
            for i, dz in enumerate(relative):
                axes = {"time": t, "position": p}
                if z_axis:
                    axes["z"] = i
                yield {"axes": axes, "x": 500.0 * p, "y": 0.0, "z": z + dz}


def run(name, hook, evs, mode="Fluorescent Beads", during=None):
    core.set_property("Camera", "Mode", mode)
    exposed = []

    def watched(event):
        result = hook(event)
        if result is not None:
            exposed.append(core.get_position())
        return result

    if during is not None:
        threading.Thread(target=during, daemon=True).start()
    acq = Acquisition(str(out), name, show_display=False, post_hardware_hook_fn=watched)
    acq.acquire(list(evs))
    acq.mark_finished()
    acq.await_completion()
    data = acq.get_dataset()
    keys = sorted(map(str, data.get_image_coordinates_list())) if exposed else []
    records = []
    for axes in (data.get_image_coordinates_list() if exposed else []):
        records.append(record_of(data.read_metadata(**axes)))
    data.close()
    return {"z": exposed, "images": len(keys), "records": records,
            "searches": [r["status"] for r in hook.records]}


AF = {"range_um": 20.0, "z_min_um": -60.0, "z_max_um": 60.0}
done = {}
done["positions"] = run("a", autofocus_hook(AF), events([8.0, -6.0]))
done["stack"] = run(
    "b", autofocus_hook(AF, z_offsets_um=[-2, 0, 2]),
    events([8.0, -6.0], relative=(-2, 0, 2), times=2, z_axis=True),
)
done["keep"] = run("c", autofocus_hook(AF), events([8.0]), mode="Noise")
done["skip"] = run("d", autofocus_hook({**AF, "on_failure": "skip"}), events([8.0]), mode="Noise")
pausing = autofocus_hook({**AF, "on_failure": "pause"})


def operator():
    while not pausing.records:
        time.sleep(0.01)
    core.set_property("Camera", "Mode", "Fluorescent Beads")
    core.set_position(4.0)
    time.sleep(0.1)
    pausing.resume()


done["pause"] = run("e", pausing, events([8.0]), mode="Noise", during=operator)
aborting = autofocus_hook({**AF, "on_failure": "abort"})
done["abort"] = run("f", aborting, events([8.0, -6.0]), mode="Noise")
cancelled = autofocus_hook(AF)
cancelled.cancel()
done["cancel"] = run("g", cancelled, events([8.0]))
# pycro-manager 1.0 cannot acquire from RGB cameras on this backend; looks can be taken
core.set_property("Camera", "PixelType", "32bitRGB")
core.set_property("Camera", "Mode", "Color Test Pattern")
look = hook_rig(pausing).look()
done["rgb"] = {"shape": look.image.shape, "corner": look.image[-1, 0].tolist(),
               "full_scale": look.max_value}
(out / "done.json").write_text(json.dumps(done))
stop_headless()
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("ndtiff")
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (out / "done.json").exists(), process.stderr[-3000:]
    return dict(json.loads((out / "done.json").read_text()))


def test_each_position_is_focused_and_the_record_is_in_the_image(done: dict[str, Any]) -> None:
    case = done["positions"]
    assert case["searches"] == ["ok", "ok"]
    assert all(abs(z) <= 1 for z in case["z"])
    assert [r["focus_id"] for r in case["records"]] == [0, 1]
    assert [r["status"] for r in case["records"]] == ["ok", "ok"]


def test_a_stack_stands_around_focus_at_all_time_points(done: dict[str, Any]) -> None:
    case = done["stack"]
    assert len(case["searches"]) == 4  # the position changes again at the second time point
    assert case["z"] == pytest.approx([-2, 0, 2] * 4, abs=1)


def test_policies(done: dict[str, Any]) -> None:
    assert done["keep"]["z"] == [8.0]
    assert done["keep"]["records"][0]["status"] == "failed"
    assert (done["skip"]["z"], done["skip"]["images"]) == ([], 0)
    assert done["pause"]["searches"] == ["failed", "ok"]
    assert done["pause"]["z"] == pytest.approx([0.0], abs=1)
    # an exception in a hook aborts the acquisition: the second position is never visited
    assert (done["abort"]["searches"], done["abort"]["images"]) == (["failed"], 0)
    assert (done["cancel"]["searches"], done["cancel"]["images"]) == ([], 0)


def test_a_look_of_an_rgb_camera_has_its_shape(core: CMMCorePlus, done: dict[str, Any]) -> None:
    core.setProperty("Camera", "Mode", "Color Test Pattern")
    core.setProperty("Camera", "PixelType", "32bitRGB")
    expected = core.snap()  # pymmcore-plus knows the order of the colours
    assert done["rgb"]["shape"] == list(expected.shape)
    assert done["rgb"]["corner"] == expected[-1, 0].tolist()
    assert done["rgb"]["full_scale"] == 255


def test_settings_are_checked_when_the_hook_is_made() -> None:
    with pytest.raises(InputError, match=r"autofocus_hook\.range: unknown key"):
        autofocus_hook({"range": 3})
