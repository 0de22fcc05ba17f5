"""Two shots in, one sharp image out: the file, the tiles, the mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import ome_types
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mm_autofocus import cli, refocus
from mm_autofocus.errors import InputError
from mm_autofocus.models.importing import load_model, load_refocus_model
from mm_autofocus.models.ood import OodStats, names
from mm_autofocus.ometiff import files, read_record
from mm_autofocus.refocusing import running
from mm_autofocus.refocusing.fused import part_of

from tiny_refocus import (
    DELTA_UM,
    make_refocus,
    plan,
    refocus_card,
    two_shots,
    write_raw,
)


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return int(e.value.code or 0), out, err


@pytest.fixture
def net(tmp_path: Path) -> Path:
    return make_refocus(tmp_path / "net.onnx")


def mean(p: int, shape: tuple[int, ...], dtype: str, top: float) -> np.ndarray:
    lower, upper = two_shots(p, shape, dtype, top)
    return np.rint((lower.astype(np.float64) + upper) / 2)


# ------------------------------------------------------------------------ the file

PIXELS = {
    "grey 8": ((72, 100), "uint8", None, 1),
    "grey 16": ((72, 100), "uint16", None, 1),
    "grey 12 in 16": ((72, 100), "uint16", 12, 1),
    "RGB 8": ((72, 100, 3), "uint8", None, 3),
    "RGB 16": ((72, 100, 3), "uint16", None, 3),
}


@pytest.mark.parametrize(("shape", "dtype", "bits", "channels"), PIXELS.values(), ids=PIXELS)
def test_the_fused_file(
    tmp_path: Path, shape: Any, dtype: str, bits: int | None, channels: int
) -> None:
    card = refocus_card(channels=channels)
    net = make_refocus(tmp_path / "net.onnx", card=card, bias=1.25)
    raw = write_raw(tmp_path / "raw.ome.tiff", shape=shape, dtype=dtype, bits=bits)
    before = raw.read_bytes()
    fused = tmp_path / "fused.ome.tiff"
    found = refocus(raw, fused, model=net, threads=1)
    assert raw.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "fused.ome.tiff",
        "net.onnx",
        "raw.ome.tiff",
    ]
    assert (len(found.tiles), found.flagged, found.alone) == (3, [], 0)
    top = float(2 ** (bits or 8 * np.dtype(dtype).itemsize) - 1)
    ome_types.validate_xml(tifffile.tiffcomment(fused))
    old, new = ome_types.from_tiff(raw), ome_types.from_tiff(fused)
    with tifffile.TiffFile(fused) as tif:
        assert not tif.is_bigtiff
        data = [s.asarray() for s in tif.series]
    for p, (image, a, b) in enumerate(zip(data, old.images, new.images, strict=True)):
        off = np.abs(image.astype(np.float64) - mean(p, shape, dtype, top)).max()
        assert image.dtype == dtype
        assert off <= 1
        assert (b.name, b.pixels.size_z) == (a.name, 1)
        assert b.acquisition_date == a.acquisition_date
        assert b.pixels.significant_bits == a.pixels.significant_bits == bits
        assert b.pixels.physical_size_x == a.pixels.physical_size_x == 0.5
        (plane,) = b.pixels.planes
        raw_plane = next(x for x in a.pixels.planes if x.the_z == 0)
        assert plane.position_x == raw_plane.position_x == 10.0 * p
        assert plane.exposure_time == raw_plane.exposure_time == 0.02
        assert plane.delta_t == raw_plane.delta_t
        # the sharper shot is the lower one of even tiles; focus lies 1.25 µm from it
        assert plane.position_z == pytest.approx(
            100 + (-0.25 if p % 2 == 0 else 0.25), abs=1e-4
        )
    assert new.instruments[0].objectives[0].lens_na == 0.75
    record = read_record(fused)
    assert record.complete
    assert record.derived is not None
    assert record.derived["source"] == "raw.ome.tiff"
    assert record.derived["source_uuid"] == old.uuid
    assert record.derived["model"] == "tiny-refocus"
    assert record.derived["model_sha256"] == load_refocus_model(net).card.sha256
    assert record.derived["card"]["shots"]["half_um"] == [1, 2]
    assert record.derived["delta_um"] == pytest.approx(DELTA_UM)
    assert [r.sharper for r in record.recoveries] == ["lower", "upper", "lower"]
    assert {(r.status, r.kept) for r in record.recoveries} == {("ok", "recovered")}
    assert record.recoveries[0].focus_sd_um == pytest.approx(0.1)
    assert record.recoveries[0].z_shots_um == (98.5, 101.5)
    # the focus record of the raw file is still there, whole
    assert [f.curve for f in record.focus] == [((99.0, 0.5),)] * 3
    assert record.plan is not None
    assert record.frames == record.frames_planned == 3
    assert record.frames_missing == 0


def test_time_channels_and_gaps(tmp_path: Path, net: Path) -> None:
    sequence = plan(channels=["DAPI", "FITC"], time_plan={"interval": 0, "loops": 2})
    raw = write_raw(
        tmp_path / "raw.ome.tiff",
        sequence,
        skip=lambda e: e.index["t"] == 0 and e.index["p"] == 1,
    )
    found = refocus(raw, tmp_path / "fused.ome.tiff", model=net, threads=1)
    assert len(found.tiles) == 10
    ome_types.validate_xml(tifffile.tiffcomment(tmp_path / "fused.ome.tiff"))
    record = read_record(tmp_path / "fused.ome.tiff")
    assert [i.shape for i in record.images] == [(2, 2, 1, 72, 100)] * 3
    assert record.images[0].channels == ("DAPI", "FITC")
    assert record.images[1].gaps == {"skipped": 2}
    assert next(f.status for f in record.focus if f.index == {}) == "failed"
    with tifffile.TiffFile(tmp_path / "fused.ome.tiff") as tif:
        image = tif.series[2].asarray()[1, 1]
    assert np.abs(image - mean(12, (72, 100), "uint8", 255)).max() <= 1


def test_a_run_that_was_cut_short(tmp_path: Path, net: Path) -> None:
    raw = write_raw(tmp_path / "raw.ome.tiff", stop=5)
    found = refocus(raw, tmp_path / "fused.ome.tiff", model=net, threads=1)
    assert (len(found.tiles), found.alone) == (2, 1)
    assert read_record(tmp_path / "fused.ome.tiff").frames == 2


def test_bigtiff_and_compression(
    tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, fused = write_raw(tmp_path / "raw.ome.tiff"), tmp_path / "fused.ome.tiff"
    refocus(raw, fused, model=net, threads=1, compression="zlib")
    plain = [tifffile.imread(fused, series=p) for p in range(3)]
    monkeypatch.setattr(files, "_CLASSIC_BYTES", 10_000)
    refocus(raw, fused, model=net, threads=1, overwrite=True)
    with tifffile.TiffFile(fused) as tif:
        assert tif.is_bigtiff
        for image, series in zip(plain, tif.series, strict=True):
            np.testing.assert_array_equal(image, series.asarray())


def foreign(path: Path, **changes: Any) -> Path:
    """A file of tifffile's: (T, C, Z, Y, X) of one position."""
    data = np.stack(two_shots(0, (64, 80), "uint16"))[None, None]
    metadata: dict[str, Any] = {
        "axes": "TCZYX",
        "Name": "other",
        "SignificantBits": 16,
        "PhysicalSizeX": 0.5,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": 0.5,
        "PhysicalSizeYUnit": "µm",
        "PhysicalSizeZ": 3000.0,
        "PhysicalSizeZUnit": "nm",
        "Channel": {"Name": ["BF"]},
        "Plane": {"ExposureTime": [5, 5], "ExposureTimeUnit": ["ms"] * 2},
    }
    metadata.update(changes)
    tifffile.imwrite(path, data, metadata={k: v for k, v in metadata.items() if v}, ome=True)
    return path


def test_a_file_of_another_program(tmp_path: Path, net: Path) -> None:
    raw = foreign(tmp_path / "raw.ome.tiff")
    found = refocus(raw, tmp_path / "fused.ome.tiff", model=net, threads=1)
    assert found.tiles[0]["delta_um"] == pytest.approx(1.5)
    assert found.tiles[0]["z_um"] is None
    ome = ome_types.from_tiff(tmp_path / "fused.ome.tiff")
    assert ome.images[0].name == "other"
    assert ome.images[0].pixels.channels[0].name == "BF"
    assert ome.images[0].pixels.planes[0].exposure_time == pytest.approx(0.005)
    image = tifffile.imread(tmp_path / "fused.ome.tiff")
    assert np.abs(image - mean(0, (64, 80), "uint16", 65535.0)).max() <= 1
    record = read_record(tmp_path / "fused.ome.tiff")
    assert record.derived is not None
    assert record.frames_planned == 1


def test_positions_of_another_program(tmp_path: Path) -> None:
    net = make_refocus(tmp_path / "net.onnx", card=refocus_card(channels=3))
    raw = tmp_path / "raw.ome.tif"
    shots = [two_shots(n, (40, 48, 3)) for n in range(2)]
    with tifffile.TiffWriter(raw, ome=True) as tif:
        for n, (lower, upper) in enumerate(shots):
            unit = ["µm"] * 2
            plane = {
                "PositionX": [7.0 * n] * 2,
                "PositionXUnit": unit,
                "PositionZ": [10.0, 12.5],
                "PositionZUnit": unit,
            }
            tif.write(
                np.stack([lower, upper]),
                photometric="rgb",
                metadata={"axes": "ZYXS", "Name": f"well {n}", "Plane": plane},
            )
    refocus(raw, tmp_path / "fused.ome.tif", model=net, threads=1)
    with tifffile.TiffFile(tmp_path / "fused.ome.tif") as tif:
        assert [s.name for s in tif.series] == ["well 0", "well 1"]
        for n, series in enumerate(tif.series):
            assert np.abs(series.asarray() - mean(n, (40, 48, 3), "uint8", 255)).max() <= 1
    record = read_record(tmp_path / "fused.ome.tif")
    plane = record.images[1].planes[0, 0, 0]
    assert (plane.x_um, plane.z_um) == (7.0, pytest.approx(11.0, abs=0.5))
    assert record.derived is not None
    assert record.derived["delta_um"] == pytest.approx(1.25)


def test_floats_need_the_saturation(tmp_path: Path, net: Path) -> None:
    raw = write_raw(tmp_path / "raw.ome.tiff", dtype="float32")
    with pytest.raises(InputError, match="max_value is missing"):
        refocus(raw, tmp_path / "fused.ome.tiff", model=net)
    refocus(raw, tmp_path / "fused.ome.tiff", model=net, max_value=1.0, threads=1)
    image = tifffile.imread(tmp_path / "fused.ome.tiff", series=1)
    lower, upper = two_shots(1, dtype="float32")
    np.testing.assert_allclose(image, (lower + upper) / 2, atol=1e-6)


# ----------------------------------------------------------------------- the tiles


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("deep")
    return load_refocus_model(make_refocus(folder / "deep.onnx", "deep", gain=1.0, side=True))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    height=st.integers(9, 150),
    width=st.integers(9, 150),
    tile=st.integers(8, 96),
    dtype=st.sampled_from(["uint8", "uint16"]),
    seed=st.integers(0, 1000),
)
def test_no_seam(deep: Any, height: int, width: int, tile: int, dtype: str, seed: int) -> None:
    lower, upper = two_shots(seed, (height, width), dtype)
    whole = deep.recover(lower, upper, half_um=1.5, tile_px=1000)
    parts = deep.recover(lower, upper, half_um=1.5, tile_px=tile)
    off = np.abs(whole.image.astype(np.int64) - parts.image.astype(np.int64)).max()
    assert off <= (1 if dtype == "uint8" else 2)
    assert whole.sharper == parts.sharper
    assert whole.focus_um == pytest.approx(parts.focus_um, abs=0.02)
    assert whole.image.std() > 0


def test_a_halo_that_is_too_small_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_refocus(tmp_path / "good.onnx", "deep")
    code, out, _ = call(capsys, "models", "check", good, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["seam"] < 0.005
    assert found["megapixels_per_s"] > 0
    bad = make_refocus(tmp_path / "bad.onnx", "deep", refocus_card(shots={"halo_px": 0}))
    code, out, _ = call(capsys, "models", "check", bad)
    assert code == 1
    assert "shots.halo_px 0 is too small" in out
    code, out, _ = call(capsys, "models", "show", good)
    assert code == 0
    assert "ΔD 1 … 2 µm" in out


def test_one_shot_alone(tmp_path: Path) -> None:
    card = refocus_card(shots={"count": 1})
    model = load_refocus_model(make_refocus(tmp_path / "net.onnx", "mean", card))
    lower, upper = two_shots(1)
    np.testing.assert_array_equal(model.recover(lower, upper).image, upper)


def test_memory_is_bounded(tmp_path: Path, net: Path) -> None:
    sequence = plan(
        stage_positions=[
            {"x": float(i), "y": 0.0, "z": 0.0, "name": f"t{i}"} for i in range(30)
        ]
    )
    raw = write_raw(tmp_path / "raw.ome.tiff", sequence, shape=(512, 768), dtype="uint16")
    frame = 512 * 768 * 2
    assert raw.stat().st_size > 60 * frame
    tracemalloc.start()
    try:
        refocus(raw, tmp_path / "fused.ome.tiff", model=net, threads=1, tile_px=128)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 14 * frame


# ----------------------------------------------------------------------- not sure


def test_a_tile_that_is_not_enclosed_is_flagged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = make_refocus(tmp_path / "net.onnx", bias=-0.8)
    raw = write_raw(tmp_path / "raw.ome.tiff")
    fused, page = tmp_path / "fused.ome.tiff", tmp_path / "report.html"
    code, out, _ = call(capsys, "refocus", raw, "-o", fused, "--model", net, "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["pairs"], told["flagged"], told["raw_kept"]) == (3, 3, 0)
    assert "do not enclose the focus" in told["tiles"][0]["reasons"][0]
    code, out, _ = call(
        capsys, "refocus", raw, "-o", fused, "--model", net, "--raw-if-unsure", "--overwrite"
    )
    assert code == 0
    assert "3 of 3 recovered tiles to distrust, 3 of them kept as the sharper shot" in out
    for p in range(3):
        image = tifffile.imread(fused, series=p)
        np.testing.assert_array_equal(image, two_shots(p)[p % 2])
    record = read_record(fused)
    assert [r.kept for r in record.recoveries] == ["sharper shot"] * 3
    assert [i.planes[0, 0, 0].z_um for i in record.images] == [98.5, 101.5, 98.5]
    code, out, _ = call(capsys, "inspect", fused)
    assert code == 0
    for part in ("derived from raw.ome.tiff by model tiny-refocus", "ΔD 1.50 µm", "3 of 3"):
        assert part in out
    code, out, _ = call(capsys, "inspect", fused, "--json")
    assert json.loads(out)["refocus"]["flagged"] == 3
    call(capsys, "report", fused, "-o", page)
    text = page.read_text()
    assert "Recovered from two shots" in text
    assert "do not enclose the focus" in text


def test_what_is_unlike_the_training_is_flagged(tmp_path: Path) -> None:
    count = len(names(1))
    stats = OodStats(
        names=names(1),
        mean=[0.0] * count,
        whitening=(100 * np.eye(count)).tolist(),
        threshold=1.0,
    )
    net = make_refocus(tmp_path / "net.onnx", card=refocus_card(ood=stats.model_dump()))
    raw = write_raw(tmp_path / "raw.ome.tiff")
    found = refocus(raw, tmp_path / "fused.ome.tiff", model=net, raw_if_unsure=True, threads=1)
    assert len(found.flagged) == 3
    assert found.tiles[0]["ood"] > 1
    assert "unlike the training data" in found.tiles[0]["reasons"][0]
    assert found.to_json()["raw_kept"] == 3


def test_a_tile_off_the_range_is_flagged_and_not_refused(tmp_path: Path, net: Path) -> None:
    raw = write_raw(
        tmp_path / "raw.ome.tiff",
        z_um=lambda e: e.z_pos * (1 if e.index["p"] != 1 else 1 + 2 * e.index["z"] / 100),
    )
    found = refocus(raw, tmp_path / "fused.ome.tiff", model=net, threads=1)
    assert [t["status"] for t in found.tiles] == ["ok", "low-confidence", "ok"]
    assert "it was trained on 1 … 2 µm" in found.flagged[0]["reasons"][0]


def test_a_net_without_an_answer_keeps_the_shot(tmp_path: Path) -> None:
    model = load_refocus_model(make_refocus(tmp_path / "net.onnx", "nan"))
    lower, upper = two_shots(0)
    found = model.recover(lower, upper, half_um=1.5)
    np.testing.assert_array_equal(found.image, lower)
    assert found.reasons == (
        "the net gave no number for the image; the sharper shot is kept there",
    )


def test_psnr_where_truth_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = make_refocus(tmp_path / "net.onnx")
    raw = write_raw(tmp_path / "raw.ome.tiff")
    truth = tmp_path / "truth.ome.tiff"
    with tifffile.TiffWriter(truth, ome=True) as tif:
        for p in range(3):
            image = mean(p, (72, 100), "uint8", 255).astype(np.uint8)
            tif.write(image, metadata={"axes": "YX"})
    fused = tmp_path / "fused.ome.tiff"
    args = ("refocus", raw, "-o", fused, "--model", net, "--truth", truth)
    code, out, _ = call(capsys, *args, "--json")
    assert code == 0
    told = json.loads(out)
    assert told["psnr_db"] > 45 > 20 > told["psnr_identity_db"]
    assert told["pairs"] == 3
    assert told["megapixels_per_s"] > 0
    code, out, _ = call(capsys, *args, "--overwrite")
    assert "PSNR" in out


# -------------------------------------------------------------------- bad input


def three_planes(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", plan(z_plan={"relative": [-1, 0, 1]}))


def one_plane(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", plan(z_plan=None))


def upside_down(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", z_um=lambda e: -e.z_pos)


def of_unknown_z(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", z_um=lambda e: None)


def foreign_of_unknown_z(folder: Path) -> Path:
    return foreign(folder / "raw.ome.tiff", PhysicalSizeZ=None, PhysicalSizeZUnit=None)


def foreign_upside_down(folder: Path) -> Path:
    unit = ["reference frame"] * 2
    planes = {"PositionZ": [5.0, 2.0], "PositionZUnit": unit}
    return foreign(folder / "raw.ome.tiff", Plane=planes)


def too_far_apart(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", plan(z_plan={"relative": [-3, 3]}))


def in_colour(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", shape=(72, 100, 3))


def coarse(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", pixel_size_um=2.0)


def of_32_bits(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", dtype="uint32")


def of_16_bits(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", dtype="uint16")


def no_tiff(folder: Path) -> Path:
    (folder / "raw.ome.tiff").write_text("hello")
    return folder / "raw.ome.tiff"


def no_ome(folder: Path) -> Path:
    tifffile.imwrite(folder / "raw.ome.tiff", np.zeros((2, 64, 64), np.uint8), ome=False)
    return folder / "raw.ome.tiff"


def good(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff")


def half(folder: Path) -> Path:
    return write_raw(folder / "raw.ome.tiff", skip=lambda e: e.index["z"] == 1)


BAD: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "three planes": (three_planes, (), "its Z axis has 3 planes"),
    "one plane": (one_plane, (), "its Z axis has 1 plane,"),
    "wrong order": (upside_down, (), "wrong order"),
    "wrong order, foreign": (foreign_upside_down, (), "wrong order"),
    "unknown z": (of_unknown_z, (), "z of its planes is not known"),
    "unknown z, foreign": (foreign_of_unknown_z, (), "z of its planes is not known"),
    "ΔD": (too_far_apart, (), "trained on 1 … 2 µm"),
    "channels": (in_colour, (), "the frame is RGB, the model takes grey"),
    "pixel size": (coarse, (), "pixel size 2 µm, the model takes 0.5 µm ± 10 %"),
    "pixel type": (of_32_bits, (), "frames of uint32 are not allowed"),
    "bits": (of_16_bits, (), "frames of 16 bits are not allowed"),
    "no TIFF": (no_tiff, (), "not a TIFF"),
    "no OME": (no_ome, (), "no OME-TIFF"),
    "no file": (lambda f: f / "nothing.ome.tiff", (), "there is no such file"),
    "only one shot": (half, (), "Z axis has 1 plane"),
    "model": (good, ("--model", "none-such"), "'none-such' is unknown"),
    "model of defocus": (good, ("--model", "sparsefocus-slide20x"), "tells the defocus"),
    "tile": (good, ("--tile-px", "3"), "tile_px: 3 is not allowed"),
    "threads": (good, ("--threads", "0"), "threads: 0 is not allowed"),
    "output": (good, ("-o", "OUT/x.tif"), "must end with"),
    "folder": (good, ("-o", "OUT/no/x.ome.tif"), "does not exist"),
    "itself": (good, ("-o", "OUT/raw.ome.tiff", "--overwrite"), "is the raw file itself"),
    "exists": (good, ("-o", "OUT/raw.ome.tiff"), "raw"),
    "truth": (good, ("--truth", "OUT/raw.ome.tiff"), "one plane along Z"),
}


@pytest.mark.parametrize(("make", "options", "says"), BAD.values(), ids=BAD)
def test_bad_input(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Any,
    options: tuple[str, ...],
    says: str,
) -> None:
    card = refocus_card(pixel_size_um=0.5, bit_depths=[8])
    net = make_refocus(tmp_path / "net.onnx", card=card)
    raw = make(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    options = tuple(o.replace("OUT", str(tmp_path)) for o in options)
    args = ["refocus", raw, "-o", tmp_path / "fused.ome.tiff", "--model", net, *options]
    code, out, err = call(capsys, *args)
    assert code == 2
    assert out == ""
    assert says in err
    assert err.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_output_that_exists(
    tmp_path: Path, net: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, fused = write_raw(tmp_path / "raw.ome.tiff"), tmp_path / "fused.ome.tiff"
    fused.write_text("mine")
    code, _, err = call(capsys, "refocus", raw, "-o", fused, "--model", net)
    assert code == 2
    assert "exists" in err
    assert fused.read_text() == "mine"
    code, _, _ = call(capsys, "refocus", raw, "-o", fused, "--model", net, "--overwrite")
    assert code == 0
    # a fused file is no raw one
    code, _, err = call(capsys, "refocus", fused, "-o", tmp_path / "b.ome.tiff", "--model", net)
    assert code == 2
    assert "result of a refocus already" in err


def test_without_the_default_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "shipped_models", list)
    raw = write_raw(tmp_path / "raw.ome.tiff")
    code, _, err = call(capsys, "refocus", raw, "-o", tmp_path / "fused.ome.tiff")
    assert code == 2
    assert "--model" in err
    assert not (tmp_path / "fused.ome.tiff").exists()


def test_a_refocus_model_does_not_focus(net: Path) -> None:
    with pytest.raises(InputError, match="recovers the sharp image; here one is needed"):
        load_model(net)


# ---------------------------------------------------------------------- killed


def test_a_fault_on_the_way_leaves_nothing(
    tmp_path: Path, net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_raw(tmp_path / "raw.ome.tiff")

    def fail(done: int, of: int) -> None:
        assert part_of(tmp_path / "fused.ome.tiff").exists()
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refocus(raw, tmp_path / "fused.ome.tiff", model=net, on_pair=fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "raw.ome.tiff"]


def test_killed_halfway_leaves_no_half_file(tmp_path: Path, net: Path) -> None:
    raw, fused = write_raw(tmp_path / "raw.ome.tiff"), tmp_path / "fused.ome.tiff"
    script = (
        "import sys, time, mm_autofocus\n"
        "mm_autofocus.refocus(sys.argv[1], sys.argv[2], model=sys.argv[3],\n"
        "    on_pair=lambda n, of: (print(n, flush=True), time.sleep(60)))\n"
    )
    args = [sys.executable, "-c", script, str(raw), str(fused), str(net)]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGKILL)
    assert not fused.exists()
    assert part_of(fused).exists()
    refocus(raw, fused, model=net, threads=1)  # what is left over is in no one's way
    assert read_record(fused).frames == 3
    assert not part_of(fused).exists()
