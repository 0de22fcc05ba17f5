"""Killed writers, full disks, damaged files: no frame that was reported is lost."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ome_types
import pytest
import tifffile
import useq
from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.ometiff import OmeTiffSink, read_info, read_plane, read_record, repair
from mm_autofocus.ometiff import finish as finish_module

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, kill and rlimit")

# What the child processes share. A frame is known by its number alone.
COMMON = """
import json, os, random, resource, signal, struct, sys, time
import numpy as np, useq
from mm_autofocus.errors import HardwareError
from mm_autofocus.ometiff import OmeTiffSink

def image(n, shape, dtype):
    size = int(np.prod(shape))
    return ((np.arange(size) * 31 + n * 7919) % 251 + 1).astype(dtype).reshape(shape)

def plan(positions=4, loops=5):
    return useq.MDASequence(
        axis_order="tpcz",
        time_plan={"interval": 0, "loops": loops},
        stage_positions=[(float(i), 0.0, 0.0) for i in range(positions)],
        channels=["DAPI", "FITC"],
        z_plan={"range": 2, "step": 1},
    )

def meta(event, n):
    focus = {"focus_id": event.index["p"], "status": "ok", "strategy": "hill-climb",
             "z_um": 1.0, "looks": 3, "moves": 4, "curve": [[0.0, 1.0]] * 20, "age_s": 0.1}
    return {"runner_time_ms": 5.0 * n, "exposure_ms": 10.0, "pixel_size_um": 0.5,
            "camera_device": "Camera", "position": {"x": 1.0, "y": 2.0, "z": float(n)},
            "mm_autofocus": focus}
"""

KILLED = (
    COMMON
    + """
def child(path, pipe, case):
    sink = OmeTiffSink(path, **case["options"])
    sink.on_written = lambda n: os.write(pipe, struct.pack("<i", n))
    sink.setup(plan(), None, settings={"strategy": "hill-climb"})
    for n, event in enumerate(plan()):
        sink.append(image(n, case["shape"], case["dtype"]), event, meta(event, n))
    sink.close()
    time.sleep(1)  # killed here at the latest

folder, seed = sys.argv[1:]
cases = json.loads(sys.stdin.read())
rng = random.Random(int(seed))
for i, case in enumerate(cases):
    path = os.path.join(folder, f"{i}.ome.tiff")
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        child(path, write, case)
        os._exit(0)
    os.close(write)
    reported = 0
    until = rng.randrange(1, 120)
    while reported < until and (told := os.read(read, 4)):
        reported = struct.unpack("<i", told)[0]
    time.sleep(rng.random() * (0.03 if until > 100 else 0.002))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while told := os.read(read, 4):  # what it said before it died
        reported = struct.unpack("<i", told)[0]
    os.close(read)
    print(json.dumps({"path": path, "reported": reported}), flush=True)
"""
)

KINDS: list[dict[str, Any]] = [
    {"shape": [48, 64], "dtype": "uint16", "options": {}},
    {"shape": [48, 64, 3], "dtype": "uint8", "options": {}},
    {"shape": [200, 300], "dtype": "uint16", "options": {"compression": "zlib"}},
    {"shape": [512, 512], "dtype": "uint16", "options": {"bigtiff": True}},
]


def expected_image(n: int, shape: list[int], dtype: str) -> np.ndarray:
    size = int(np.prod(shape))
    return ((np.arange(size) * 31 + n * 7919) % 251 + 1).astype(dtype).reshape(shape)


def run(code: str, *args: object, stdin: str = "") -> list[dict[str, Any]]:
    command = [sys.executable, "-c", code, *map(str, args)]
    out = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    return [json.loads(line) for line in out.stdout.splitlines()]


@posix
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Every frame that was reported is in the file, before and after the repair."""
    cases = [KINDS[i % len(KINDS)] for i in range(28)]
    results = run(KILLED, tmp_path, 20260304, stdin=json.dumps(cases))
    assert len(results) == len(cases)
    incomplete = 0
    for case, result in zip(cases, results, strict=True):
        path, reported = Path(result["path"]), result["reported"]
        shape, dtype = case["shape"], case["dtype"]
        with tifffile.TiffFile(path) as tif:  # as it is: a whole TIFF of whole pages
            assert len(tif.pages) >= reported
            for n in range(len(tif.pages)):
                if "frame" in json.loads(tif.pages[n].tags[65126].value):
                    np.testing.assert_array_equal(
                        tif.pages[n].asarray(), expected_image(n, shape, dtype)
                    )
        info = read_info(path)
        assert info.frames >= reported
        assert info.frames_planned == 120
        before = read_record(path)
        assert before.complete is info.complete
        incomplete += not info.complete
        if not info.complete:
            with tifffile.TiffFile(path) as tif:
                assert tif.ome_metadata is None or "incomplete" in tif.ome_metadata
        mended = repair(path)
        assert mended.complete
        assert mended.frames == info.frames
        assert mended.repaired is (not info.complete)
        record = read_record(path)
        assert record.frames == info.frames
        assert {f.focus_id for f in record.focus} == set(range(min(4, -(-info.frames // 6))))
        assert [f.curve for f in before.focus] == [f.curve for f in record.focus]
        check_series(path, record.frames, shape, dtype)
    assert incomplete >= 20


def check_series(path: Path, frames: int, shape: list[int], dtype: str) -> None:
    """Read through the OME-XML, as other programs do."""
    ome_types.from_tiff(path)
    with tifffile.TiffFile(path) as tif:
        ome_types.validate_xml(tif.ome_metadata)
        data = [series.asarray(squeeze=False) for series in tif.series]
    for n in range(frames):
        t, p, c, z = n // 24, n // 6 % 4, n // 3 % 2, n % 3
        plane = data[p][t, c, z]
        image = expected_image(n, shape, dtype)
        np.testing.assert_array_equal(plane if image.ndim == 3 else plane[..., 0], image)


FULL = (
    COMMON
    + """
import logging
logging.disable()
path, limit, shape, options = sys.argv[1], int(sys.argv[2]), *map(json.loads, sys.argv[3:])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sink = OmeTiffSink(path, **options)
sink.setup(plan(), None)
said = []
try:
    for n, event in enumerate(plan()):
        sink.append(image(n, shape, "uint16"), event, meta(event, n))
        time.sleep(0.0005)
except HardwareError as e:
    said.append(str(e))
try:
    sink.close()
except HardwareError as e:
    said.append(str(e))
sink.close()
print(json.dumps({"said": said, "written": sink.frames_written,
                  "exists": os.path.exists(path)}))
"""
)

LIMITS = {
    "large frames": (3_000_000, [256, 256], {}),
    "small frames": (150_000, [16, 16], {}),
    "compressed": (110_000, [128, 128], {"compression": "zlib"}),
    "at the last frames": (118 * 132_000, [256, 256], {}),
    "big": (1_000_000, [128, 128], {"bigtiff": True}),
}


@posix
@pytest.mark.parametrize(("limit", "shape", "options"), LIMITS.values(), ids=LIMITS)
def test_disk_full(
    tmp_path: Path, limit: int, shape: list[int], options: dict[str, Any]
) -> None:
    path = tmp_path / "a.ome.tiff"
    (result,) = run(FULL, path, limit, json.dumps(shape), json.dumps(options))
    written = result["written"]
    assert 0 < written < 120
    (said,) = result["said"]  # once
    assert str(path) in said
    assert f"the first {written} frames are saved" in said
    info = read_info(path)
    assert info.complete
    assert not info.repaired
    assert info.error
    record = read_record(path)
    assert record.frames == info.frames == written
    assert record.frames_missing == 120 - written
    assert all(focus.strategy == "hill-climb" for focus in record.focus)
    check_series(path, written, shape, "uint16")


@posix
def test_disk_full_before_the_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tiff"
    (result,) = run(FULL, path, 50_000, "[512, 512]", "{}")
    assert result["written"] == 0
    assert "the first 0 frames are saved" in result["said"][0]
    assert not result["exists"]


def killed_file(path: Path, frames: int = 14, skip: tuple[int, ...] = ()) -> Path:
    """Make the file of a writer that was killed: all is done but the closing."""
    sequence = useq.MDASequence(
        axis_order="tpcz",
        time_plan={"interval": 0, "loops": 5},
        stage_positions=[(float(i), 0.0, 0.0) for i in range(4)],
        channels=["DAPI", "FITC"],
        z_plan={"range": 2, "step": 1},
    )
    sink = OmeTiffSink(path)
    sink.setup(sequence, settings={"strategy": "hill-climb"})
    for n, event in enumerate(sequence):
        if n == frames:
            break
        record = {"focus_id": event.index["p"], "status": "ok", "z_um": 1.0}
        if n in skip:
            sink.skip(event, record={"focus_id": "x", "status": "failed"})
            continue
        meta = {"runner_time_ms": 5.0 * n, "exposure_ms": 10.0, "mm_autofocus": record}
        sink.append(expected_image(n, [16, 24], "uint16"), event, meta)
    assert sink._conveyor is not None
    sink._conveyor.end()
    data = path.read_bytes()
    sink.close()
    path.write_bytes(data)
    return path


def test_before_the_repair_it_does_not_mislead(tmp_path: Path) -> None:
    path = killed_file(tmp_path / "a.ome.tiff")
    ome = ome_types.from_tiff(path)
    ome_types.validate_xml(tifffile.tiffcomment(path))
    assert [i.name for i in ome.images] == [
        "p0000 (incomplete: see mm-autofocus inspect --repair)"
    ]
    namespaces = [m.namespace for m in ome.structured_annotations.map_annotations]
    assert "mm_autofocus.incomplete" in namespaces
    image = tifffile.imread(path)  # one frame is promised, and that is there
    np.testing.assert_array_equal(image, expected_image(0, [16, 24], "uint16"))
    info = read_info(path)
    assert (info.complete, info.frames, info.frames_planned) == (False, 14, 120)
    record = read_record(path)
    assert not record.complete
    assert [i.shape for i in record.images] == [(1, 2, 3, 16, 24)] * 2 + [(1, 1, 2, 16, 24)]
    np.testing.assert_array_equal(
        read_plane(path, 1, 0, 1, 2), expected_image(11, [16, 24], "uint16")
    )


def test_repair_knows_what_was_skipped(tmp_path: Path) -> None:
    path = killed_file(tmp_path / "a.ome.tiff", skip=(3, 4, 5))
    info = repair(path)
    assert (info.complete, info.repaired, info.frames) == (True, True, 11)
    record = read_record(path)
    assert record.images[0].gaps == {"skipped": 3}
    assert record.focus[1].focus_id == "x"
    assert record.settings == {"strategy": "hill-climb"}
    assert record.plan is not None
    stamp = path.stat().st_mtime_ns, path.read_bytes()
    assert repair(path).repaired
    assert (path.stat().st_mtime_ns, path.read_bytes()) == stamp  # nothing left to do


def test_repair_of_a_file_that_was_closed_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tiff"
    sequence = useq.MDASequence(channels=["DAPI"])
    sink = OmeTiffSink(path)
    sink.setup(sequence)
    sink.append(expected_image(0, [16, 24], "uint16"), next(iter(sequence)), {})
    sink.close()
    before = path.read_bytes()
    assert not repair(path).repaired
    assert path.read_bytes() == before


@pytest.mark.parametrize("seed", range(12))
def test_torn_files(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """After a power failure anything may be missing at the end: cut at any byte."""
    caplog.set_level(logging.CRITICAL, logger="tifffile")
    path = killed_file(tmp_path / "a.ome.tiff")
    data = path.read_bytes()
    rng = np.random.default_rng(seed)
    with tifffile.TiffFile(path) as tif:
        ends = [page.dataoffsets[0] + page.databytecounts[0] for page in tif.pages]
    cut = int(rng.integers(ends[0], len(data)))
    tail = b"\0" * int(rng.integers(0, 300)) if seed % 2 else rng.bytes(seed)
    path.write_bytes(data[:cut] + tail)
    whole = sum(end <= cut for end in ends)
    found = read_info(path).frames
    # zeros after the cut may happen to complete a page that lacked only its end
    assert whole <= found <= whole + 1
    info = repair(path)
    assert info.complete
    assert info.frames == found
    record = read_record(path)
    for n in range(whole):
        plane = read_plane(path, n // 6 % 4, 0, n // 3 % 2, n % 3, record=record)
        np.testing.assert_array_equal(plane, expected_image(n, [16, 24], "uint16"))
    ome_types.validate_xml(tifffile.tiffcomment(path))


def test_nothing_to_repair(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tiff"
    with pytest.raises(InputError, match="no such file"):
        repair(path)
    tifffile.imwrite(path, np.zeros((4, 4), "u1"))
    with pytest.raises(InputError, match="not written by mm_autofocus"):
        repair(path)
    path.write_bytes(b"II*\0\0\0\0\0")
    with pytest.raises(InputError, match="not one complete frame"):
        repair(path)
    data = killed_file(tmp_path / "b.ome.tiff").read_bytes()
    path.write_bytes(data[:200])
    with pytest.raises(InputError):
        repair(path)


def test_a_file_that_cannot_be_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = killed_file(tmp_path / "a.ome.tiff")

    def read_only(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mm_autofocus.ometiff.recovery.PageWriter", read_only)
    with pytest.raises(HardwareError, match="cannot be repaired"):
        repair(path)


def test_no_room_for_the_ome_xml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short OME-XML goes where the preliminary one was; the pages keep the rest."""
    whole: list[int] = []
    overwrite = finish_module.overwrite_description

    def full(path: Path, xml: bytes) -> None:
        whole.append(len(xml))
        if len(whole) == 1:
            raise OSError(28, "No space left on device")
        overwrite(path, xml)

    monkeypatch.setattr(finish_module, "overwrite_description", full)
    path = tmp_path / "a.ome.tiff"
    sequence = useq.MDASequence(channels=["DAPI"])
    sink = OmeTiffSink(path)
    sink.setup(sequence, {"devices": ["x" * 1000]})  # type: ignore[arg-type,typeddict-item]
    record = {"focus_id": 0, "status": "ok", "curve": [[0.0, 1.0]] * 100}
    event = next(iter(sequence))
    sink.append(expected_image(0, [16, 24], "uint16"), event, {"mm_autofocus": record})
    sink.close()
    assert whole[1] < whole[0] - 1500
    again = read_record(path)
    assert "No space left" in again.error
    assert again.focus[0].curve == ()


def test_the_file_cannot_be_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, xml: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish_module, "overwrite_description", full)
    path = tmp_path / "a.ome.tiff"
    sequence = useq.MDASequence(channels=["DAPI", "FITC"])
    sink = OmeTiffSink(path)
    sink.setup(sequence)
    first, second = sequence
    sink.append(expected_image(0, [16, 24], "uint16"), first, {})
    sink.skip(second)
    with pytest.raises(HardwareError, match=r"all 1 frames are saved, but .* --repair`"):
        sink.close()
    sink.close()
    monkeypatch.undo()
    assert not read_info(path).complete
    assert repair(path).frames == 1
    assert read_record(path).images[0].gaps == {"skipped": 1}
    with tifffile.TiffFile(path) as tif:
        assert len(tif.pages) == 2  # the page of zeros was there already
        assert tif.series[0].shape == (2, 16, 24)


def test_killed_while_the_ome_xml_was_written(tmp_path: Path) -> None:
    path = killed_file(tmp_path / "a.ome.tiff")
    repair(path)
    with tifffile.TiffFile(path) as tif:
        tag = tif.pages[0].tags[270]
    data = bytearray(path.read_bytes())
    middle = tag.valueoffset + tag.count // 2
    data[middle : tag.valueoffset + tag.count] = b" " * (tag.count - tag.count // 2)
    path.write_bytes(data)
    assert not read_info(path).complete
    assert repair(path).frames == 14
    check_series(path, 14, [16, 24], "uint16")
