"""Refocus by the workers of a Dask cluster: the same pixels."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from mm_autofocus import cli, refocus
from mm_autofocus.errors import InputError
from mm_autofocus.refocusing import cluster as ours

from tiny_refocus import make_refocus, write_raw

distributed = pytest.importorskip("distributed")

# of distributed itself, when its processes come and go
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as found:
        yield found


def test_the_same_pixels(
    tmp_path: Path,
    cluster: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = make_refocus(tmp_path / "net.onnx", "deep")
    raw = write_raw(tmp_path / "raw.ome.tiff", shape=(200, 170), dtype="uint16")
    here, there = tmp_path / "here.ome.tiff", tmp_path / "there.ome.tiff"
    alone = refocus(raw, here, model=net, threads=1, tile_px=64)
    monkeypatch.chdir(tmp_path)  # a relative name is meant here, not where the workers are
    args = ["refocus", "raw.ome.tiff", "-o", str(there), "--model", str(net)]
    args += ["--tile-px", "64", "--scheduler", cluster.scheduler_address, "--json"]
    with pytest.raises(SystemExit) as e:
        cli.main(args)
    told = json.loads(capsys.readouterr().out)
    assert not e.value.code
    assert told["pairs"] == 3
    assert told["tiles"] == json.loads(json.dumps(alone.tiles))
    for p in range(3):
        np.testing.assert_array_equal(
            tifffile.imread(there, series=p), tifffile.imread(here, series=p)
        )


def test_workers_that_do_not_see_the_file(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_refocus(tmp_path / "net.onnx")
    raw = write_raw(tmp_path / "raw.ome.tiff")
    # a file of that name, and another one: what a worker on another machine may see
    monkeypatch.setattr(ours, "_sizes", lambda paths: {str(raw): 1})
    with pytest.raises(InputError, match="must share a file system with this machine"):
        refocus(raw, tmp_path / "a.ome.tiff", model=net, scheduler=cluster.scheduler_address)
    assert not (tmp_path / "a.ome.tiff").exists()


def test_a_tile_that_cannot_be_read_ends_it(tmp_path: Path, cluster: Any) -> None:
    net = make_refocus(tmp_path / "net.onnx")
    raw = write_raw(tmp_path / "raw.ome.tiff", compression="zlib")
    with tifffile.TiffFile(raw) as tif:
        at, count = tif.pages[3].dataoffsets[0], tif.pages[3].databytecounts[0]
    with raw.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * count)
    with pytest.raises(InputError, match="cannot be read"):
        refocus(raw, tmp_path / "a.ome.tiff", model=net, scheduler=cluster.scheduler_address)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "raw.ome.tiff"]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x", "127.0.0.1:port"])
def test_no_scheduler(tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str) -> None:
    net = make_refocus(tmp_path / "net.onnx")
    raw = write_raw(tmp_path / "raw.ome.tiff")
    start = time.perf_counter()
    args = ["refocus", str(raw), "-o", str(tmp_path / "a.ome.tiff"), "--model", str(net)]
    with pytest.raises(SystemExit) as e:
        cli.main([*args, "--scheduler", address])
    assert e.value.code == 2
    assert time.perf_counter() - start < 30
    err = capsys.readouterr().err
    assert "no Dask scheduler answers there" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "a.ome.tiff").exists()
