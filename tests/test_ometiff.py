"""The OME-TIFF sink and its reader: what goes in comes out, in every reader."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import ome_types
import pytest
import tifffile
import useq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.ometiff import OmeTiffSink, read_info, read_plane, read_record
from mm_autofocus.ometiff import files as files_module
from mm_autofocus.ometiff.frames import FrameRecord, Header, to_json
from mm_autofocus.ometiff.layout import Plan
from mm_autofocus.ometiff.pages import PageWriter
from mm_autofocus.types import Optics

OPTICS = Optics(na=0.75, magnification=20, pixel_size_um=0.5)
POSITIONS = [{"x": 10.0 * i, "y": -5.0 * i, "z": 100.0, "name": f"tile {i}"} for i in range(3)]


def plan(order: str = "tpcz", **changes: Any) -> useq.MDASequence:
    """Two time points, three positions, two channels, three z, but for what is changed."""
    parts: dict[str, Any] = {
        "axis_order": order,
        "time_plan": {"interval": 0, "loops": 2},
        "stage_positions": POSITIONS,
        "channels": ["DAPI", "FITC"],
        "z_plan": {"range": 2, "step": 1},
        "metadata": {"mm_autofocus": {"strategy": "hill-climb"}},
    }
    parts.update(changes)
    return useq.MDASequence(**{k: v for k, v in parts.items() if v is not None})


def images(sequence: Any, cameras: int = 1) -> Iterator[useq.MDAEvent]:
    """Yield the events of the frames, as the engine passes them on."""
    for event in sequence:
        if event.action.type != "acquire_image":
            continue
        for cam in range(cameras):
            index = {**event.index, "cam": cam} if cameras > 1 else dict(event.index)
            yield event.model_copy(update={"index": index})


def pixels(n: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The n-th frame; each is different in every pixel type."""
    rng = np.random.default_rng(n)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def focus(event: useq.MDAEvent, **changes: Any) -> dict[str, Any]:
    """An autofocus record, as the engine makes it."""
    p = event.index.get("p", 0)
    return {
        "focus_id": p,
        "strategy": "hill-climb",
        "status": "ok",
        "z_before_um": 100.0,
        "z_after_um": 101.25,
        "z_um": 101.25,
        "looks": 5,
        "moves": 7,
        "score": 0.5,
        "expected_error_um": 0.1,
        "reason": "",
        "age_s": 0.25,
        "curve": [[99.0, 0.1], [101.0, 0.5], [103.0, None]],
        "index": {"p": p},
        **changes,
    }


def frame_meta(event: useq.MDAEvent, n: int = 0, **changes: Any) -> dict[str, Any]:
    """Frame metadata, as pymmcore-plus makes it."""
    return {
        "format": "frame-dict",
        "version": "1.0",
        "runner_time_ms": 12.5 * n,
        "exposure_ms": 20.0,
        "pixel_size_um": 0.5,
        "camera_device": f"Camera-{event.index.get('cam', 0) + 1}",
        "property_values": (),
        "position": {"x": event.x_pos or 0.0, "y": event.y_pos or 0.0, "z": 101.25 + n},
        **changes,
    }


def summary(cameras: int = 1, **changes: Any) -> dict[str, Any]:
    """Summary metadata, as pymmcore-plus makes it."""
    info = {"plane_shape": (16, 24), "dtype": "uint16", "pixel_size_um": 0.5, **changes}
    if cameras > 1:
        info["num_camera_adapter_channels"] = cameras
    return {
        "format": "summary-dict",
        "version": "1.0",
        "datetime": "2026-03-04 05:06:07.890000+01:00",
        "devices": ({"label": "Camera", "properties": ({"name": "Gain", "value": "1"},)},),
        "system_info": {"mmcore_version": "MMCore version 12.5.1"},
        "image_infos": (info,),
    }


@dataclass
class Written:
    """What was put into a file, to compare."""

    sink: OmeTiffSink
    frames: list[tuple[dict[str, int], np.ndarray, dict[str, Any]]] = field(
        default_factory=list
    )

    @property
    def path(self) -> Path:
        return self.sink.paths[0]


def write(
    path: Path,
    sequence: useq.MDASequence,
    *,
    shape: tuple[int, ...] = (16, 24),
    dtype: str = "uint16",
    cameras: int = 1,
    skip: tuple[int, ...] = (),
    stop: int | None = None,
    **options: Any,
) -> Written:
    """Run a plan through the sink; `skip` and `stop` count frames."""
    out = Written(OmeTiffSink(path, **options))
    out.sink.setup(
        sequence, summary(cameras), settings={"strategy": "hill-climb"}, optics=OPTICS
    )
    for n, event in enumerate(images(sequence.model_copy(deep=True), cameras)):
        if n == stop:
            break
        if n in skip:
            nothing = {"status": "failed", "z_um": None, "z_after_um": 100.0}
            out.sink.skip(event, record=focus(event, focus_id="x", **nothing))
            continue
        meta = frame_meta(event, n, mm_autofocus=focus(event))
        out.frames.append((dict(event.index), pixels(n, shape, dtype), meta))
        out.sink.append(out.frames[-1][1], event, meta)
    out.sink.close()
    return out


def check_file(out: Written, cameras: int = 1) -> None:
    """Each frame is where it belongs, in tifffile, ome-types and our own reader."""
    for path in out.sink.paths:
        xml = tifffile.tiffcomment(path)
        ome_types.validate_xml(xml)
        ome = ome_types.from_tiff(path)
        record = read_record(path)
        assert record.complete
        assert not record.repaired
        with tifffile.TiffFile(path) as tif:
            assert [s.name for s in tif.series] == list(record.positions)
            data = [s.asarray(squeeze=False) for s in tif.series]
        for image, array, model in zip(record.images, data, ome.images, strict=True):
            rgb = array.shape[-1] == 3
            assert image.shape == (array.shape if rgb else array.shape[:-1])
            assert array.dtype.name == image.dtype
            assert model.pixels.size_c == image.shape[1] * (3 if rgb else 1)
            for at, plane in image.planes.items():
                if plane.gap:
                    assert not array[at].any()
    keys = {path: [i.index for i in read_record(path).images] for path in out.sink.paths}
    for index, image, meta in out.frames:
        key = {k: v for k, v in index.items() if k in "pg"}
        path = next(p for p, k in keys.items() if key in k)
        number = keys[path].index(key)
        c = index.get("c", 0) * cameras + index.get("cam", 0)
        at = (index.get("t", 0), c, index.get("z", 0))
        record = read_record(path)
        plane = record.images[number].planes[at]
        np.testing.assert_array_equal(read_plane(path, number, *at, record=record), image)
        with tifffile.TiffFile(path) as tif:
            series = tif.series[number].asarray(squeeze=False)[at]
        np.testing.assert_array_equal(series if image.ndim == 3 else series[..., 0], image)
        assert plane.time_s == pytest.approx(meta["runner_time_ms"] / 1000)
        assert plane.exposure_s == pytest.approx(meta["exposure_ms"] / 1000)
        assert plane.z_um == meta["position"]["z"]


GREY = (16, 24)
RGB = (16, 24, 3)
PIXELS = {
    "grey 8": (GREY, "uint8"),
    "grey 16": (GREY, "uint16"),
    "grey 32": (GREY, "uint32"),
    "float": (GREY, "float32"),
    "RGB 8": (RGB, "uint8"),
    "RGB 16": (RGB, "uint16"),
}


@pytest.mark.parametrize(("shape", "dtype"), PIXELS.values(), ids=PIXELS)
def test_pixels(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    out = write(tmp_path / "a.ome.tiff", plan(), shape=shape, dtype=dtype)
    assert out.sink.frames_written == 36
    check_file(out)


PLANS: dict[str, useq.MDASequence] = {
    "tpgcz": plan("tpgcz", grid_plan={"rows": 1, "columns": 2}),
    "tpcz": plan("tpcz"),
    "ptzc": plan("ptzc"),
    "ptcz": plan("ptcz"),
    "tpzc": plan("tpzc"),
    "no time": plan("pcz", time_plan=None),
    "one position": plan("tcz", stage_positions=None),
    "only positions": plan("p", time_plan=None, channels=None, z_plan=None),
    "one frame": plan("c", time_plan=None, stage_positions=None, channels=["BF"], z_plan=None),
    "no stack": plan(channels=["DAPI", {"config": "BF", "do_stack": False}]),
    "every second": plan(channels=["DAPI", {"config": "BF", "acquire_every": 2}]),
    "ragged": plan(
        stage_positions=[
            {"x": 0, "y": 0, "name": "flat", "sequence": {"channels": ["Cy5"]}},
            {"x": 1, "y": 0, "name": "deep", "sequence": {"z_plan": {"range": 4, "step": 1}}},
            {"x": 2, "y": 0, "sequence": {"grid_plan": {"rows": 2, "columns": 1}}},
        ]
    ),
    "plate": plan(
        stage_positions=useq.WellPlatePlan(
            plate=96, a1_center_xy=(0, 0), selected_wells=([0, 1], [0, 1])
        )
    ),
    "autofocus": plan(autofocus_plan={"autofocus_motor_offset": 1.0, "axes": ("p",)}),
}


@pytest.mark.parametrize("sequence", PLANS.values(), ids=PLANS)
def test_plans(tmp_path: Path, sequence: useq.MDASequence) -> None:
    out = write(tmp_path / "a.ome.tiff", sequence)
    check_file(out)
    record = read_record(out.path)
    assert record.frames == record.frames_planned == len(out.frames)
    assert record.plan is not None
    again = useq.MDASequence.model_validate(record.plan)
    expected = [dict(e.index) for e in images(sequence.model_copy(deep=True))]
    assert [dict(e.index) for e in images(again)] == expected


OPTIONS: dict[str, dict[str, Any]] = {
    "zlib": {"compression": "zlib"},
    "lzw": {"compression": "lzw"},
    "zstd": {"compression": "zstd"},
    "zlib RGB": {"compression": "zlib", "shape": RGB, "dtype": "uint8"},
    "zlib float": {"compression": "zlib", "dtype": "float32"},
    "zlib 32": {"compression": "zlib", "dtype": "uint32"},
    "bigtiff": {"bigtiff": True},
    "split": {"split_positions": True},
    "split RGB": {"split_positions": True, "shape": RGB, "dtype": "uint8"},
    "skipped": {"skip": (0, 4, 35)},
    "skipped tile": {"skip": tuple(range(6, 12))},
    "skipped RGB": {"skip": (0, 4, 35), "shape": RGB, "dtype": "uint8"},
    "cut in t 0": {"stop": 8},
    "cut in t 1": {"stop": 20},
    "cut, split": {"stop": 20, "split_positions": True},
    "small queue": {"queue_mib": 1e-3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(tmp_path: Path, options: dict[str, Any]) -> None:
    out = write(tmp_path / "a.ome.tiff", plan(), **options)
    check_file(out)
    with tifffile.TiffFile(out.path) as tif:
        assert tif.is_bigtiff is options.get("bigtiff", False)
        named = {"zlib": 8, "lzw": 5, "zstd": 50000}
        assert tif.pages[0].compression == named.get(options.get("compression", ""), 1)


def test_cameras_are_channels(tmp_path: Path) -> None:
    out = write(tmp_path / "a.ome.tiff", plan(), cameras=2)
    check_file(out, cameras=2)
    names = [c.name for c in ome_types.from_tiff(out.path).images[0].pixels.channels]
    assert names == ["DAPI [Camera-1]", "DAPI [Camera-2]", "FITC [Camera-1]", "FITC [Camera-2]"]
    assert [d.model for d in ome_types.from_tiff(out.path).instruments[0].detectors] == [
        "Camera-1",
        "Camera-2",
    ]
    alone = write(tmp_path / "b.ome.tiff", plan(channels=None), cameras=2)
    assert read_record(alone.path).images[0].channels == ("Camera-1", "Camera-2")


def test_a_skipped_event_leaves_out_all_its_cameras(tmp_path: Path) -> None:
    sequence = plan()
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence, summary(2))
    for n, event in enumerate(sequence):
        if n == 1:
            sink.skip(event)
            continue
        if n == 3:
            sink.skip(frames=2)  # as the stock runner: the next ones of the plan
            continue
        for cam in range(2):
            index = {**event.index, "cam": cam}
            event_of_cam = event.model_copy(update={"index": index})
            sink.append(pixels(n, GREY, "uint8"), event_of_cam, frame_meta(event_of_cam))
    sink.close()
    record = read_record(tmp_path / "a.ome.tiff")
    gaps = {at for at, p in record.images[0].planes.items() if p.gap == "skipped"}
    assert gaps == {(0, 0, 1), (0, 1, 1), (0, 2, 0), (0, 3, 0)}


def test_a_skipped_sequence_of_events(tmp_path: Path) -> None:
    class Sequenced(useq.MDAEvent):
        events: tuple[useq.MDAEvent, ...] = ()

    sequence = plan()
    events = list(sequence)
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence)
    sink.skip(Sequenced(index=events[0].index, events=tuple(events[:3])))
    for n, event in enumerate(events[3:]):
        sink.append(pixels(n, GREY, "uint8"), event, frame_meta(event))
    sink.close()
    record = read_record(tmp_path / "a.ome.tiff")
    assert record.images[0].gaps == {"skipped": 3}
    assert record.frames_missing == 3


def test_gaps_say_why(tmp_path: Path) -> None:
    channels = ["DAPI", {"config": "BF", "do_stack": False}]
    # per position 3 DAPI and 1 BF: of the second time point only two frames of tile 0
    out = write(tmp_path / "a.ome.tiff", plan(channels=channels), skip=(1,), stop=14)
    check_file(out)
    record = read_record(out.path)
    assert record.frames_planned == 24
    assert record.frames == 13
    assert [i.shape for i in record.images] == [(2, 2, 3, *GREY), *[(1, 2, 3, *GREY)] * 2]
    assert [i.gaps for i in record.images] == [
        {"skipped": 1, "not planned": 4, "missing": 2},
        {"not planned": 2},
        {"not planned": 2},
    ]
    with pytest.raises(InputError, match="this plane is skipped; it holds no data"):
        read_plane(out.path, 0, 0, 0, 1)
    ome = ome_types.from_tiff(out.path)
    refs = {(p.the_t, p.the_c, p.the_z): p.annotation_refs for p in ome.images[0].pixels.planes}
    assert any("gap-skipped" in ref.id for ref in refs[0, 0, 1])


def test_blank_planes_of_an_image_share_one_page_that_takes_no_room(tmp_path: Path) -> None:
    shape = (1024, 1024)
    out = write(
        tmp_path / "a.ome.tiff",
        plan(time_plan=None),
        shape=shape,
        skip=tuple(range(4, 18)),
        bigtiff=True,
    )
    with tifffile.TiffFile(out.path) as tif:
        assert len(tif.pages) == 4 + 3
    if sys.platform == "linux":
        assert out.path.stat().st_blocks * 512 < 5 * 2 * 1024**2
    check_file(out)


def test_positions_never_reached_have_no_image(tmp_path: Path) -> None:
    out = write(tmp_path / "a.ome.tiff", plan("ptcz"), stop=15)
    record = read_record(out.path)
    assert record.positions == ("tile 0", "tile 1")
    assert [i.shape for i in record.images] == [(2, 2, 3, *GREY), (1, 1, 3, *GREY)]
    assert record.frames_missing == 36 - 15
    assert read_info(out.path).frames_missing == 36 - 15


def test_frames_that_the_run_went_past_are_missing(tmp_path: Path) -> None:
    """A camera that fails now and then: the engine says nothing, and goes on."""
    sequence = plan("pcz", time_plan=None)
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence)
    out = Written(sink)
    lost = {5, *range(6, 12), 17}  # the end of tile 0, all of tile 1, the end of the run
    for n, event in enumerate(sequence):
        if n not in lost:
            out.frames.append((dict(event.index), pixels(n, GREY, "u1"), frame_meta(event)))
            sink.append(out.frames[-1][1], event, out.frames[-1][2])
    sink.close()
    check_file(out)
    record = read_record(out.path)
    assert record.positions == ("tile 0", "tile 1", "tile 2")
    assert [i.gaps for i in record.images] == [{"missing": n} for n in (1, 6, 1)]


def test_a_tile_that_was_skipped_keeps_its_image(tmp_path: Path) -> None:
    sequence = plan("pcz", time_plan=None)
    out = write(tmp_path / "a.ome.tiff", sequence, skip=tuple(range(6, 12)))
    check_file(out)
    image = read_record(out.path).images[1]
    assert image.name == "tile 1"
    assert image.gaps == {"skipped": 6}
    assert [f.focus_id for f in read_record(out.path).focus] == [0, "x", 2]
    failed = read_record(out.path).focus[1]
    assert (failed.focus_id, failed.status, failed.z_after_um) == ("x", "failed", 100.0)
    assert [(f.image, f.z) for f in failed.frames] == [(1, z) for z in (0, 1, 2)] * 2


def test_metadata_in_ome(tmp_path: Path) -> None:
    out = write(tmp_path / "a.ome.tiff", plan())
    ome = ome_types.from_tiff(out.path)
    assert [i.name for i in ome.images] == ["tile 0", "tile 1", "tile 2"]
    image = ome.images[1]
    start = datetime.fromisoformat("2026-03-04T05:06:07.890+01:00")
    assert image.acquisition_date == start
    assert image.pixels.physical_size_x == 0.5
    assert image.pixels.physical_size_z == 1.0
    assert [c.name for c in image.pixels.channels] == ["DAPI", "FITC"]
    assert (image.stage_label.x, image.stage_label.y) == (10.0, -5.0)
    objective = ome.instruments[0].objectives[0]
    assert (objective.lens_na, objective.nominal_magnification) == (0.75, 20)
    plane = image.pixels.planes[0]
    assert plane.position_z == 101.25 + 6
    assert plane.position_z_unit.value == "µm"
    assert plane.delta_t == pytest.approx(0.0125 * 6)
    maps = {m.namespace: dict(m.value) for m in ome.structured_annotations.map_annotations}
    assert json.loads(maps["mm_autofocus.settings"]["json"]) == {"strategy": "hill-climb"}
    assert maps["mm_autofocus.settings"]["strategy"] == "hill-climb"
    assert json.loads(maps["mm_autofocus.plan"]["useq"])["axis_order"] == list("tpcz")
    assert maps["mm_autofocus.file"]["version MMCore"] == "MMCore version 12.5.1"
    state = json.loads(maps["pymmcore_plus"]["summary_metadata_json"])
    assert state["devices"][0]["properties"][0]["name"] == "Gain"


def test_focus_record(tmp_path: Path) -> None:
    png = base64.b64encode(b"\x89PNG picture").decode()
    sequence = plan()
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence, summary())
    for n, event in enumerate(sequence):
        age = 0.5 * n
        status = "ok" if event.index["t"] == 0 else "stale"
        record = focus(event, age_s=age, status=status, thumbnail=png, reason="µm & <Δz>")
        sink.append(pixels(n, GREY, "uint8"), event, frame_meta(event, n, mm_autofocus=record))
    sink.close()
    path = sink.paths[0]
    ome = ome_types.from_tiff(path)
    maps = ome.structured_annotations.map_annotations
    assert sum(m.namespace == "mm_autofocus" for m in maps) == 3  # one per focus event
    assert png not in tifffile.tiffcomment(path)
    assert all(p.annotation_refs for i in ome.images for p in i.pixels.planes)
    assert all(i.annotation_refs for i in ome.images)
    values = dict(next(m for m in maps if m.namespace == "mm_autofocus").value)
    assert (values["status"], values["looks"], values["z_um"]) == ("ok", "5", "101.25")
    record = read_record(path)
    assert len(record.focus) == 3
    second = record.focus[1]
    assert (second.index, second.position, second.x_um, second.y_um) == (
        {"p": 1},
        "tile 1",
        10.0,
        -5.0,
    )
    assert (second.z_before_um, second.z_after_um, second.status) == (100.0, 101.25, "ok")
    assert (second.strategy, second.looks, second.moves) == ("hill-climb", 5, 7)
    assert (second.expected_error_um, second.score) == (0.1, 0.5)
    assert second.reason == "µm & <Δz>"
    assert second.curve == ((99.0, 0.1), (101.0, 0.5), (103.0, None))
    assert second.thumbnail == b"\x89PNG picture"
    assert [(f.image, f.t, f.c, f.z) for f in second.frames][:4] == [
        (1, 0, 0, 0),
        (1, 0, 0, 1),
        (1, 0, 0, 2),
        (1, 0, 1, 0),
    ]
    assert [f.status for f in second.frames] == ["ok"] * 6 + ["stale"] * 6
    assert second.frames[0].age_s == 3.0


def test_the_record_survives_another_program(tmp_path: Path) -> None:
    """A program that copies pixels and OME-XML but no private tags leaves the record."""
    out = write(tmp_path / "a.ome.tiff", plan())
    xml = tifffile.tiffcomment(out.path)
    copy = tmp_path / "copy.ome.tiff"
    with tifffile.TiffFile(out.path) as tif, tifffile.TiffWriter(copy, ome=False) as writer:
        for i, page in enumerate(tif.pages):
            description = xml.encode() if i == 0 else None
            writer.write(
                page.asarray(), description=description, metadata=None, contiguous=False
            )
    record = read_record(copy)
    assert len(record.focus) == 3
    assert record.focus[0].curve
    np.testing.assert_array_equal(read_plane(copy, 0, 0, 0, 0), out.frames[0][1])


def test_roi_may_change_between_positions_only(tmp_path: Path) -> None:
    sequence = plan("pcz", time_plan=None)
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence)
    shapes = {0: (16, 24), 1: (8, 12), 2: (20, 20)}
    out = Written(sink)
    for n, event in enumerate(sequence):
        image = pixels(n, shapes[event.index["p"]], "uint16")
        out.frames.append((dict(event.index), image, frame_meta(event, n)))
        sink.append(image, event, out.frames[-1][2])
        if n == 7:
            with pytest.raises(HardwareError, match=r"c=0, z=1 is \(5, 5\) uint16, but"):
                sink.append(pixels(0, (5, 5), "uint16"), event, frame_meta(event))
            with pytest.raises(HardwareError, match="uint8, but"):
                sink.append(pixels(0, (8, 12), "uint8"), event, frame_meta(event))
    sink.close()
    check_file(out)
    assert [i.shape[-2:] for i in read_record(out.path).images] == list(shapes.values())


BAD_FRAMES = {
    "four colours": np.zeros((4, 4, 4), "u1"),
    "a stack": np.zeros((2, 4, 4, 3), "u1"),
    "64 bit": np.zeros((4, 4), "u8"),
    "complex": np.zeros((4, 4), "c8"),
    "a row": np.zeros(4, "u1"),
}


@pytest.mark.parametrize("image", BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_frames_that_are_no_images(tmp_path: Path, image: np.ndarray) -> None:
    sequence = plan()
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence)
    event = next(iter(sequence))
    with pytest.raises(HardwareError, match="cannot save a frame of shape"):
        sink.append(image, event, frame_meta(event))
    sink.close()
    assert not sink.path.exists()


def test_views_and_byte_order(tmp_path: Path) -> None:
    sequence = plan("t", stage_positions=None, channels=None, z_plan=None)
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence)
    buffer = pixels(0, (32, 48), "uint16")
    expected = buffer[::2, ::-2].copy()
    first, second = sequence
    sink.append(buffer[::2, ::-2], first, frame_meta(first))
    buffer[:] = 0  # the owner uses its buffer again
    big_endian = expected.astype(">u2")
    sink.append(big_endian, second, frame_meta(second))
    sink.close()
    np.testing.assert_array_equal(tifffile.imread(sink.path), [expected, expected])


def test_events_from_a_generator(tmp_path: Path) -> None:
    from pymmcore_plus.mda._generator_sequence import GeneratorMDASequence

    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(GeneratorMDASequence())
    frames = [pixels(n, GREY, "uint8") for n in range(8)]
    for n in range(4):  # no index at all: a time series
        sink.append(frames[n], useq.MDAEvent(), frame_meta(useq.MDAEvent(), n))
    for n in range(4, 8):
        event = useq.MDAEvent(index={"p": 1 + n % 2, "z": n // 6}, pos_name="A1")
        sink.append(frames[n], event, frame_meta(event, n))
    sink.close()
    record = read_record(sink.path)
    assert record.frames_planned is None
    assert record.plan is None
    assert record.frames_missing == 0
    assert [i.shape[:3] for i in record.images] == [(4, 1, 1), (1, 1, 2), (1, 1, 2)]
    np.testing.assert_array_equal(tifffile.imread(sink.path, series=0), frames[:4])
    with tifffile.TiffFile(sink.path) as tif:
        assert tif.is_bigtiff  # no one knows how long it will be


def test_a_frame_taken_twice_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sequence = plan("t", stage_positions=None, channels=None, z_plan=None)
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence)
    first = next(iter(sequence))
    for n in range(3):
        sink.append(pixels(n, GREY, "uint8"), first, frame_meta(first))
    sink.close()
    assert caplog.text.count("a second frame at t=0") == 1
    assert tifffile.imread(sink.path).shape == (3, *GREY)


def test_the_plan_is_left_as_it_is(tmp_path: Path) -> None:
    """Looking at the events of an autofocus plan uses it up; the sink must not."""
    af = {"autofocus_motor_offset": 1.0, "axes": ("p",)}
    sequence = plan("pc", z_plan=None, time_plan=None, autofocus_plan=af)
    expected = [e.action.type for e in sequence.model_copy(deep=True)]
    assert "hardware_autofocus" in expected
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence)
    assert [e.action.type for e in sequence] == expected
    sink.close()


def test_metadata_that_json_cannot_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = write(tmp_path / "a.ome.tiff", plan(metadata={"camera": object()}))
    assert "the metadata of the plan are not saved" in caplog.text
    record = read_record(out.path)
    assert record.plan is not None
    assert "metadata" not in record.plan


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "ending": ("a.tif", {}, r"must end with \.ome\.tif or \.ome\.tiff"),
    "zarr": ("a.ome.zarr", {}, "must end with"),
    "folder missing": ("no/a.ome.tif", {}, "no does not exist"),
    "exists": ("old.ome.tiff", {}, "old.ome.tiff exists; choose another name"),
    "exists, split": ("old.ome.tiff", {"split_positions": True}, "old_p0001.ome.tiff exists"),
    "is a folder": ("folder.ome.tiff", {"overwrite": True}, "is a folder"),
    "compression": ("a.ome.tiff", {"compression": "jpeg"}, "'jpeg' is not one of none, zlib"),
}


@pytest.mark.parametrize(("name", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_anything_is_written(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "old.ome.tiff").write_bytes(b"precious")
    (tmp_path / "old_p0001.ome.tiff").write_bytes(b"precious")
    (tmp_path / "folder.ome.tiff").mkdir()
    before = sorted(tmp_path.iterdir())
    sink = OmeTiffSink(tmp_path / name, **options)
    with pytest.raises(InputError, match=message):
        sink.check()
    with pytest.raises(InputError, match=message):
        sink.setup(plan())
    assert sorted(tmp_path.iterdir()) == before


def test_compression_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="'zstd' needs the package imagecodecs"):
        OmeTiffSink(tmp_path / "a.ome.tiff", compression="zstd").check()


def test_overwriting_waits_for_the_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tiff"
    for p in (0, 7):
        (tmp_path / f"a_p{p:04d}.ome.tiff").write_bytes(b"old")
    path.write_bytes(b"old")
    sink = OmeTiffSink(path, overwrite=True)
    sink.setup(plan())
    sink.close()
    assert path.read_bytes() == b"old"
    check_file(write(path, plan(), overwrite=True))
    check_file(write(path, plan(), overwrite=True, split_positions=True))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["a.ome.tiff", *(f"a_p{p:04d}.ome.tiff" for p in range(3))]


def test_order_of_calls(tmp_path: Path) -> None:
    sequence = plan()
    event = next(iter(sequence))
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.close()
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    with pytest.raises(InputError, match="setup"):
        sink.append(pixels(0, GREY, "uint8"), event, frame_meta(event))
    sink.setup(sequence)
    assert not sink.path.exists()
    sink.append(pixels(0, GREY, "uint8"), event, frame_meta(event))
    sink.close()
    sink.close()
    with pytest.raises(InputError, match="closed"):
        sink.append(pixels(0, GREY, "uint8"), event, frame_meta(event))
    with pytest.raises(InputError, match="make a new one"):
        sink.setup(sequence)
    assert read_info(sink.path).frames == 1


def test_written_frames_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    told: list[tuple[int, int]] = []

    def look(n: int) -> None:
        with tifffile.TiffFile(sink.path) as tif:
            told.append((n, len(tif.pages)))

    sink.on_written = look
    sequence = plan()
    sink.setup(sequence)
    for n, event in enumerate(sequence):
        sink.append(pixels(n, GREY, "uint8"), event, frame_meta(event))
    sink.close()
    assert told == [(n, n) for n in range(1, 37)]

    def broken(n: int) -> None:
        raise ValueError("the window is gone")

    other = OmeTiffSink(tmp_path / "b.ome.tiff")
    other.on_written = broken
    other.setup(sequence)
    for n, event in enumerate(sequence):
        other.append(pixels(n, GREY, "uint8"), event, frame_meta(event))
    other.close()
    assert other.frames_written == 36
    assert caplog.text.count("the callback on_written failed") == 1


def test_a_slow_disk_slows_the_camera_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add = PageWriter.add

    def slow(*args: Any, **kwargs: Any) -> int:
        time.sleep(0.005)
        return add(*args, **kwargs)

    monkeypatch.setattr(PageWriter, "add", slow)
    sequence = plan(time_plan={"interval": 0, "loops": 3})
    sink = OmeTiffSink(tmp_path / "a.ome.tiff", queue_mib=0.1)
    sink.setup(sequence)
    waiting = []
    for n, event in enumerate(sequence):
        sink.append(pixels(n, (64, 128), "uint16"), event, frame_meta(event))
        waiting.append(n + 1 - sink.frames_written)
    sink.close()
    assert sink.frames_written == 54
    assert max(waiting) <= 0.1 * 2**20 // (64 * 128 * 2) + 1
    slow_warnings = [r for r in caplog.records if "slower than the camera" in r.getMessage()]
    assert [r.levelno for r in slow_warnings] == [logging.WARNING]


def test_a_plan_larger_than_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sequence = plan("t", time_plan={"interval": 0, "loops": 1000}, stage_positions=None)
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence, summary(plane_shape=(10**6, 10**6)))  # type: ignore[arg-type]
    sink.close()
    assert "GiB free" in caplog.text


def test_large_plans_are_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_CLASSIC_BYTES", 100_000)
    for name, sequence in {"large": plan(), "small": plan("c", stage_positions=None)}.items():
        out = write(tmp_path / f"{name}.ome.tiff", sequence)
        with tifffile.TiffFile(out.path) as tif:
            assert tif.is_bigtiff is (name == "large")


def test_classic_tiff_that_grows_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm_autofocus.ometiff.pages._CLASSIC_LIMIT", 40_000)
    sequence = plan()
    sink = OmeTiffSink(tmp_path / "a.ome.tiff", bigtiff=False)
    sink.setup(sequence)
    with pytest.raises(HardwareError, match=r"without bigtiff .* the first \d+ frames are"):
        for n, event in enumerate(sequence):
            sink.append(pixels(n, (32, 32), "uint16"), event, frame_meta(event))
            time.sleep(0.002)
    sink.close()
    record = read_record(sink.path)
    assert record.frames == sink.frames_written > 0
    assert "4 GiB" in record.error


def test_many_files_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_MOST_OPEN", 2)
    positions = [{"x": i, "y": 0} for i in range(6)]
    sequence = plan(stage_positions=positions)
    check_file(write(tmp_path / "a.ome.tiff", sequence, split_positions=True))


def test_split_files_stand_alone(tmp_path: Path) -> None:
    out = write(tmp_path / "a.ome.tif", plan(), split_positions=True, skip=(6, 7, 8))
    assert [p.name for p in out.sink.paths] == [f"a_p{p:04d}.ome.tif" for p in range(3)]
    records = [read_record(path) for path in out.sink.paths]
    assert [r.positions for r in records] == [("tile 0",), ("tile 1",), ("tile 2",)]
    assert [r.frames_planned for r in records] == [12, 12, 12]
    assert [r.frames for r in records] == [12, 9, 12]
    assert [len(r.focus) for r in records] == [1, 2, 1]


def test_strange_names(tmp_path: Path) -> None:
    name = "A&B <1> \x07 \ud800 µ"
    sequence = plan("p", stage_positions=[{"x": 0, "y": 0, "name": "x"}])
    sink = OmeTiffSink(tmp_path / "a.ome.tiff", creator='"Ä"')
    sink.setup(sequence, settings={"note": name})
    event = next(iter(sequence)).model_copy(update={"pos_name": name})
    record = focus(event, reason=name, score=float("nan"), extra=np.float32(0.5))
    sink.append(pixels(0, GREY, "uint8"), event, frame_meta(event, mm_autofocus=record))
    sink.close()
    ome_types.validate_xml(tifffile.tiffcomment(sink.path))
    again = read_record(sink.path)
    assert again.positions == ("A&B <1> \ufffd \ufffd µ",)
    assert again.focus[0].reason == name  # JSON escapes what XML cannot hold
    assert again.focus[0].score is None
    assert again.focus[0].record["extra"] == 0.5


def test_not_ours(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.ome.tiff"
    tifffile.imwrite(foreign, np.zeros((2, 8, 8), "u1"), metadata={"axes": "TYX"})
    text = tmp_path / "text.ome.tiff"
    text.write_text("not a TIFF")
    empty = tmp_path / "empty.ome.tiff"
    empty.touch()
    for read in (read_record, read_info):
        with pytest.raises(InputError, match="was not written by mm_autofocus"):
            read(foreign)
        for path in (text, empty):
            with pytest.raises(InputError, match="not a TIFF file"):
                read(path)
        with pytest.raises(InputError, match="no such file"):
            read(tmp_path / "none.ome.tiff")


def test_planes_that_are_not_there(tmp_path: Path) -> None:
    out = write(tmp_path / "a.ome.tiff", plan())
    with pytest.raises(InputError, match="image 3 is not one of 0 … 2"):
        read_plane(out.path, 3)
    with pytest.raises(InputError, match="outside the shape"):
        read_plane(out.path, 0, 2, 0, 0)


def test_the_sink_does_not_need_the_acquisition_engine() -> None:
    code = (
        "import sys, mm_autofocus.ometiff; "
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('pymmcore_plus', 'pymmcore', 'torch', 'matplotlib', 'ome_writers')])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_records_round_trip() -> None:
    frame = FrameRecord({"p": 1, "t": 2}, name="A", time_s=0.5, focus={"focus_id": 1})
    assert FrameRecord.from_dict(json.loads(to_json(frame.to_dict()))) == frame
    header = Header("2026-01-01T00:00:00+00:00", "urn:uuid:1", plan={"a": [1]}, only={"p": 1})
    later = {**header.to_dict(), "added_later": 1}
    assert Header.from_dict(json.loads(to_json(later))) == header


def test_a_large_plan_is_expanded_quickly() -> None:
    sequence = plan(time_plan={"interval": 0, "loops": 1000})
    start = time.perf_counter()
    assert len(Plan.from_sequence(sequence) or ()) == 18_000
    assert time.perf_counter() - start < 10


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_plan_comes_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """write → read gives back the same pixels and metadata."""
    order = "".join(data.draw(st.permutations("tpgcz"), label="order"))
    sequence = plan(
        order,
        time_plan={"interval": 0, "loops": data.draw(st.integers(1, 3), label="t")},
        stage_positions=POSITIONS[: data.draw(st.integers(1, 3), label="p")],
        channels=["DAPI", "FITC"][: data.draw(st.integers(1, 2), label="c")],
        z_plan={"range": data.draw(st.integers(0, 3), label="z"), "step": 1},
        grid_plan=data.draw(st.sampled_from([None, {"rows": 1, "columns": 2}]), label="grid"),
    )
    cameras = data.draw(st.integers(1, 2), label="cameras")
    colours = data.draw(st.sampled_from([(), (3,)]), label="colours")
    sides = st.integers(1, 40)
    shape = (data.draw(sides, label="y"), data.draw(sides, label="x"), *colours)
    dtype = data.draw(
        st.sampled_from(["uint8", "uint16"] if colours else [p[1] for p in PIXELS.values()])
    )
    total = sum(1 for _ in images(sequence.model_copy(deep=True), cameras))
    skip = data.draw(st.sets(st.integers(1, total), max_size=4), label="skip")
    out = write(
        tmp_path_factory.mktemp("any") / "a.ome.tiff",
        sequence,
        shape=shape,
        dtype=dtype,
        cameras=cameras,
        skip=tuple(skip) if cameras == 1 else (),
        stop=data.draw(st.none() | st.integers(1, total), label="stop"),
        compression=data.draw(st.sampled_from([None, "zlib"]), label="compression"),
        split_positions=data.draw(st.booleans(), label="split"),
    )
    check_file(out, cameras)


@pytest.mark.parametrize("pixel_type", ["32bitRGB", "64bitRGB", "8bit", "16bit"])
def test_demo_camera(tmp_path: Path, make_core: Any, pixel_type: str) -> None:
    """The real adapters, through a runner in miniature."""
    core = make_core()
    core.setProperty("Camera", "PixelType", pixel_type)
    core.setROI(0, 0, 64, 48)
    sequence = plan(z_plan={"range": 2, "step": 2}, time_plan=None, order="pcz")
    engine = core.mda.engine
    meta = engine.setup_sequence(sequence)
    sink = OmeTiffSink(tmp_path / "a.ome.tiff")
    sink.setup(sequence, meta)
    out = Written(sink)
    for event in sequence:
        engine.setup_event(event)
        for image, of_frame, frame in engine.exec_event(event):
            frame.setdefault("runner_time_ms", 1.0)
            frame.setdefault("position", {"x": 0.0, "y": 0.0, "z": core.getZPosition()})
            sink.append(image, of_frame, frame)
            out.frames.append((dict(of_frame.index), image, frame))
    sink.close()
    check_file(out)
    rgb = pixel_type.endswith("RGB")
    assert out.frames[0][1].shape == ((48, 64, 3) if rgb else (48, 64))
    with tifffile.TiffFile(out.path) as tif:
        assert tif.pages[0].photometric.name == ("RGB" if rgb else "MINISBLACK")
