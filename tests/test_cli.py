"""The command line: exit codes, JSON, and one clear sentence for each mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from mm_autofocus import cli

ROOT = Path(__file__).parent.parent
HILL_CLIMB = ROOT / "acquisition_plans" / "hill_climb.yaml"


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return int(e.value.code or 0), out, err


def stack(path: Path, peak_plane: float = 9.0, planes: int = 20) -> Path:
    """A recorded stack whose contrast peaks at `peak_plane`."""
    rng = np.random.default_rng(0)
    texture = rng.normal(0, 1, (64, 64))
    contrast = 40 / (1 + ((np.arange(planes) - peak_plane) / 3) ** 2)
    frames = 100 + contrast[:, None, None] * texture + rng.normal(0, 1, (planes, 64, 64))
    tifffile.imwrite(path, frames.clip(0, 255).astype(np.uint8), metadata={"axes": "ZYX"})
    return path


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def plan(**changes: Any) -> dict[str, Any]:
    data = yaml.safe_load(HILL_CLIMB.read_text())
    return {**data, **changes}


# ---------------------------------------------------------------------- the way


def test_run_inspect_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, page = tmp_path / "run.ome.tiff", tmp_path / "report.html"
    code, out, _ = call(
        capsys, "run", HILL_CLIMB, "--config", "demo_camera.cfg", "-o", file, "--json"
    )
    assert code == 0
    told = json.loads(out)
    assert told["output"] == [str(file)]
    assert (told["frames"], told["positions"]) == (3, 3)
    assert told["exposures"] == 3 + sum(r["looks"] for r in told["autofocus"])
    for row in told["autofocus"]:
        assert {
            "index",
            "position",
            "x_um",
            "y_um",
            "z_before_um",
            "z_after_um",
            "status",
            "strategy",
            "looks",
            "moves",
            "expected_error_um",
        } <= set(row)
        assert row["status"] == "ok"
        assert abs(row["z_after_um"]) <= 1
    code, out, _ = call(capsys, "inspect", file, "--json")
    assert code == 0
    seen = json.loads(out)
    assert seen["complete"]
    assert [r["position"] for r in seen["autofocus"]] == ["A1", "A2", "B2"]
    assert [r["z_after_um"] for r in seen["autofocus"]] == [
        r["z_after_um"] for r in told["autofocus"]
    ]
    code, out, _ = call(capsys, "inspect", file)
    assert code == 0
    assert "3 searches, 0 to distrust" in out
    code, out, _ = call(capsys, "report", file, "-o", page)
    assert (code, out) == (0, f"report: {page}\n")
    text = page.read_text()
    assert "Tiles to distrust" in text
    assert text.count("<img") == 2 + 2 * 3  # map and curves, before and after
    assert "<script" not in text


def test_a_blank_field_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = write(
        tmp_path / "blank.cfg",
        (ROOT / "demo_config" / "demo_camera.cfg")
        .read_text()
        .replace("Fluorescent Beads", "Noise"),
    )
    file = tmp_path / "run.ome.tiff"
    code, out, _ = call(capsys, "run", HILL_CLIMB, "--config", cfg, "-o", file)
    assert code == 1
    assert "0 of 3 searches ok, 3 failed" in out
    code, out, _ = call(capsys, "inspect", file, "--json")
    assert {r["status"] for r in json.loads(out)["autofocus"]} == {"failed"}


def test_set_and_strategy_replace_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(
        capsys, "run", HILL_CLIMB, "--config", "demo_camera.cfg", "-o", tmp_path / "a.ome.tiff",
        "--strategy", "sweep", "--set", "range_um=15", "--set", "roi=[0, 0, 256, 256]", "--json",
    )  # fmt: skip
    assert code == 0
    assert {r["strategy"] for r in json.loads(out)["autofocus"]} == {"sweep"}


def test_replay_prints_one_line_per_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stacks = [stack(tmp_path / f"{i}.tif", peak) for i, peak in enumerate((6.0, 12.0))]
    code, out, _ = call(
        capsys, "replay", *stacks, "--strategy", "hill-climb", "--step-um", 0.5,
        "--start-um", 2, "--set", "range_um=8", "--json",
    )  # fmt: skip
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["file"] for r in rows] == [str(s) for s in stacks]
    for row, peak_um in zip(rows, (3.0, 6.0), strict=True):
        assert set(row) >= {
            "file", "start_um", "z_um", "looks", "moves", "status", "expected_error_um",
        }  # fmt: skip
        assert row["start_um"] == 2.0
        assert row["status"] == "ok"
        assert row["z_um"] == pytest.approx(peak_um, abs=0.5)
    code, out, _ = call(capsys, "replay", stacks[0], "--strategy", "brent", "--step-um", "0.5")
    assert code == 0
    assert "looks, ok" in out


# ------------------------------------------------------------------- mistakes

RUN = ("run", "PLAN", "--config", "demo_camera.cfg", "-o", "OUT")

MISTAKES: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "no such plan": (None, RUN, "plan.yaml: no such file"),
    "YAML does not parse": ("a: [1\n", RUN, "plan.yaml:2: does not parse as YAML"),
    "unknown key of the plan": (plan(chanels=[]), RUN, "did you mean 'channels'?"),
    "unknown strategy": (plan(), (*RUN, "--strategy", "hillclimb"), "did you mean 'hill-climb'?"),
    "unknown setting": (plan(), (*RUN, "--set", "rnge_um=3"), "did you mean 'range_um'?"),
    "wrong type": (plan(), (*RUN, "--set", "range_um=3um"), "'3um' is not allowed"),
    "negative step": (plan(), (*RUN, "--set", "step_um=-1"), "must be greater than 0"),
    "not KEY=VALUE": (plan(), (*RUN, "--set", "range_um"), "must be KEY=VALUE"),
    "unknown channel": (plan(channels=["FITK"]), RUN, "did you mean 'FITC'?"),
    "position outside the limits": (plan(), (*RUN, "--set", "z_max_um=5"), "outside the limits"),
    "axes p without positions": (plan(stage_positions=[]), RUN, "no stage positions"),
    "absolute z": (plan(z_plan={"top": 2, "bottom": 0, "step": 1}), RUN, "absolute Z"),
    "unknown device": (
        plan(setup={"properties": [["Camra", "Binning", "2"]]}), RUN, "did you mean 'Camera'?"
    ),
    "no such configuration": (
        plan(), ("run", "PLAN", "--config", "nope.cfg", "-o", "OUT"), "nope.cfg: no such file"
    ),
    "no camera": (plan(), ("run", "PLAN", "--config", "NOCAM", "-o", "OUT"), "no camera"),
    "no focus device": (plan(), ("run", "PLAN", "--config", "NOZ", "-o", "OUT"), "no focus stage"),
    "no XY stage": (plan(), ("run", "PLAN", "--config", "NOXY", "-o", "OUT"), "no XY stage"),
    "output exists": (plan(), ("run", "PLAN", "--config", "demo_camera.cfg", "-o", "THERE"), "exists"),
    "output folder missing": (
        plan(), ("run", "PLAN", "--config", "demo_camera.cfg", "-o", "NOFOLDER"), "does not exist"
    ),
    "not an OME-TIFF name": (
        plan(), ("run", "PLAN", "--config", "demo_camera.cfg", "-o", "a.png"), ".ome.tif"
    ),
    "inspect nothing": (None, ("inspect", "OUT"), "no such file"),
    "inspect a foreign file": (None, ("inspect", "STACK"), "mm_autofocus"),
    "report on nothing": (None, ("report", "OUT", "-o", "r.html"), "no such file"),
    "replay nothing": (
        None, ("replay", "OUT", "--strategy", "brent", "--step-um", "1"), "no such file"
    ),
    "replay two planes": (
        None, ("replay", "TWO", "--strategy", "brent", "--step-um", "1"), "2 planes are too few"
    ),
    "replay one image": (
        None, ("replay", "FLAT", "--strategy", "brent", "--step-um", "1"), "ZYX"
    ),
    "replay NaN": (None, ("replay", "NAN", "--strategy", "brent", "--step-um", "1"), "NaN"),
    "replay text": (None, ("replay", "TEXT", "--strategy", "brent", "--step-um", "1"), "TIFF"),
    "replay a truncated file": (
        None, ("replay", "TORN", "--strategy", "brent", "--step-um", "1"), "TORN"
    ),
    "replay negative step": (
        None, ("replay", "STACK", "--strategy", "brent", "--step-um", "-1"), "step"
    ),
    "replay start outside": (
        None,
        ("replay", "STACK", "--strategy", "brent", "--step-um", "1", "--start-um", "99"),
        "99",
    ),
    "replay by hardware": (
        None, ("replay", "STACK", "--strategy", "hardware", "--step-um", "1"), "hardware"
    ),
    "unknown option": (None, ("demo", "--nope"), "--nope"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_exit_code_2_and_leaves_nothing(
    case: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, args, words = MISTAKES[case]
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    demo = (ROOT / "demo_config" / "demo_camera.cfg").read_text()
    paths = {
        "PLAN": inputs / "plan.yaml",
        "OUT": work / "run.ome.tiff",
        "THERE": inputs / "there.ome.tiff",
        "NOFOLDER": work / "nope" / "run.ome.tiff",
        "STACK": stack(inputs / "stack.tif"),
        "NOCAM": write(
            inputs / "nocam.cfg",
            "\n".join(line for line in demo.splitlines() if ",Camera" not in line),
        ),
        "NOZ": write(inputs / "noz.cfg", demo.replace("Property,Core,Focus,Z", "")),
        "NOXY": write(
            inputs / "noxy.cfg",
            "\n".join(line for line in demo.splitlines() if ",XY" not in line),
        ),
        "TEXT": write(inputs / "text.tif", "not a picture"),
        "TWO": inputs / "two.tif",
        "FLAT": inputs / "flat.tif",
        "NAN": inputs / "nan.tif",
        "TORN": inputs / "TORN.tif",
    }
    paths["THERE"].write_bytes(b"precious")
    tifffile.imwrite(paths["TWO"], np.zeros((2, 8, 8), np.uint8), metadata={"axes": "ZYX"})
    tifffile.imwrite(paths["FLAT"], np.zeros((8, 8), np.uint8))
    tifffile.imwrite(
        paths["NAN"], np.full((5, 8, 8), np.nan, np.float32), metadata={"axes": "ZYX"}
    )
    paths["TORN"].write_bytes(paths["STACK"].read_bytes()[:20000])
    if data is not None:
        write(paths["PLAN"], data)
    code, out, err = call(capsys, *(paths.get(a, a) for a in args))
    assert code == 2, err
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 or case == "unknown option"
    assert list(work.iterdir()) == []
    assert paths["THERE"].read_bytes() == b"precious"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no such file"):
        cli.main(["inspect", str(tmp_path / "nope.ome.tiff"), "--debug"])
    cli._state["debug"] = False


def test_a_read_only_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    code, _, err = call(
        capsys, "run", HILL_CLIMB, "--config", "demo_camera.cfg", "-o", folder / "a.ome.tiff"
    )
    assert code == 2
    assert "writ" in err


def test_ctrl_c_ends_cleanly_with_a_readable_file(tmp_path: Path) -> None:
    long = write(tmp_path / "long.yaml", plan(time_plan={"interval": 0.05, "loops": 400}))
    file = tmp_path / "run.ome.tiff"
    process = subprocess.Popen(
        [sys.executable, "-c", "from mm_autofocus.cli import main; main()", "run", str(long),
         "--config", "demo_camera.cfg", "-o", str(file)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while (
        not (file.exists() and file.stat().st_size > 3_000_000) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "cancelled" in out
    assert "Traceback" not in err
    from mm_autofocus.ometiff import read_record

    record = read_record(file)
    assert record.complete
    assert 3 <= record.frames < 1200


def test_a_full_disk_is_exit_code_3_with_a_readable_file(tmp_path: Path) -> None:
    file = tmp_path / "run.ome.tiff"
    long = write(tmp_path / "long.yaml", plan(time_plan={"interval": 0, "loops": 20}))
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000,) * 2)\n"
        "from mm_autofocus.cli import main; main()"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, "run", str(long), "--config", "demo_camera.cfg",
         "-o", str(file), "--set", "every=100"],
        capture_output=True, text=True, timeout=120, check=False,
        # the host's own log file may be larger than the limit already
        env={**os.environ, "PYMM_LOG_FILE": str(tmp_path / "host.log")},
    )  # fmt: skip
    assert process.returncode == 3, process.stderr
    assert str(file) in process.stderr
    assert "Traceback" not in process.stderr
    from mm_autofocus.ometiff import read_plane, read_record

    record = read_record(file)
    assert record.complete
    assert record.error
    assert 5 <= record.frames <= 9  # of half a megabyte each
    assert f"{record.frames} frames are saved" in process.stderr
    assert read_plane(file, 0).shape == (512, 512)


def test_a_killed_run_is_mended_by_inspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = write(tmp_path / "long.yaml", plan(time_plan={"interval": 0, "loops": 400}))
    file = tmp_path / "run.ome.tiff"
    process = subprocess.Popen(
        [sys.executable, "-c", "from mm_autofocus.cli import main; main()", "run", str(long),
         "--config", "demo_camera.cfg", "-o", str(file), "--set", "every=1000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while (
        not (file.exists() and file.stat().st_size > 6_000_000) and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)
    code, out, _ = call(capsys, "inspect", file)
    assert code == 0
    assert "INCOMPLETE" in out
    code, out, _ = call(capsys, "inspect", file, "--repair", "--json")
    assert code == 0
    record = json.loads(out)
    assert record["complete"]
    assert record["repaired"]
    assert record["frames"] >= 5
    assert [r["position"] for r in record["autofocus"]] == ["A1", "A2", "B2"]
    with tifffile.TiffFile(file) as tif:
        assert {s.shape[-2:] for s in tif.series} == {(512, 512)}
