"""The package as such: light to import, public names, import contracts."""

from __future__ import annotations

import json
import subprocess
import sys

import mm_autofocus
import pytest

PUBLIC = {
    "AutofocusEngine",
    "AutofocusError",
    "AutofocusSettings",
    "FocusFailedError",
    "FocusRequest",
    "FocusResult",
    "HardwareError",
    "InputError",
    "Look",
    "OmeTiffSink",
    "Optics",
    "Prior",
    "RunResult",
    "Strategy",
    "autofocus",
    "load_plan",
    "run",
}

HEAVY = ("torch", "onnxruntime", "matplotlib", "qtpy", "PyQt6", "PySide6", "mm_autofocus.sim")


def _modules_after(code: str) -> dict[str, object]:
    script = (
        f"import json, logging, sys\n{code}\n"
        "print(json.dumps([sorted(sys.modules), len(logging.getLogger().handlers), "
        "len(logging.getLogger('mm_autofocus').handlers)]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    modules, root, ours = json.loads(out.splitlines()[-1])
    return {"modules": set(modules), "handlers": root + ours}


def test_public_names_stay() -> None:
    assert set(mm_autofocus.__all__) >= PUBLIC
    for name in PUBLIC:
        assert getattr(mm_autofocus, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        mm_autofocus.nope  # noqa: B018


def test_import_is_light_and_configures_no_logger() -> None:
    after = _modules_after("import mm_autofocus")
    heavy = {*HEAVY, "numpy", "scipy", "cv2", "pymmcore_plus", "tifffile", "ome_types"}
    assert not after["modules"] & heavy  # type: ignore[operator]
    assert after["handlers"] == 0


def test_collecting_on_a_microscope_does_not_load_the_simulator() -> None:
    after = _modules_after(
        "from mm_autofocus.config import close_core, open_core\n"
        "from mm_autofocus.collecting import _truth\n"
        "core = open_core('demo_camera.cfg')\n"
        "assert _truth(core) is None\n"
        "close_core(core)"
    )
    assert "mm_autofocus.sim" not in after["modules"]  # type: ignore[operator]


def test_an_acquisition_loads_no_torch_no_plots_and_no_simulator() -> None:
    after = _modules_after("from mm_autofocus import AutofocusEngine, run, OmeTiffSink")
    assert not after["modules"] & set(HEAVY)  # type: ignore[operator]
