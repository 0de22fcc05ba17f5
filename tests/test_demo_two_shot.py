"""The demo of two shots: captured, recovered by the shipped model, and compared with the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tifffile
from mm_autofocus import cli
from mm_autofocus.ometiff import read_record

from test_demo import demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    code, text = demo("-o", str(folder), "--strategy", "two-shot", "--json")
    assert code == 0
    return dict(json.loads(text))


def test_two_exposures_a_tile_and_few_searches(told: dict[str, Any]) -> None:
    tiles = told["autofocus"]
    assert len(tiles) == 30
    assert told["frames"] == 60
    assert {t["kind"] for t in tiles} == {"dense", "sparse", "extremely-sparse", "blank"}
    searched = [t for t in tiles if t["looks"]]
    assert tiles[0] in searched
    assert len(searched) <= 6
    assert told["exposures"] == 60 + sum(t["looks"] for t in tiles)


def test_what_is_recovered_is_nearer_to_the_truth(told: dict[str, Any]) -> None:
    found = told["refocus"]
    assert found["pairs"] == 30
    assert found["non_blank"] >= 20
    assert found["enclosed"] >= 0.8 * found["non_blank"]
    assert found["psnr_enclosed_db"] > found["psnr_identity_enclosed_db"] + 2
    assert found["psnr_db"] > found["psnr_identity_db"] + 2
    assert found["worse"] <= 1
    assert found["enclosed_flagged"] <= 0.1 * found["enclosed"]
    for tile in told["autofocus"]:
        assert (tile["psnr_db"] is None) == (tile["kind"] == "blank")


def test_what_it_leaves(told: dict[str, Any], folder: Path) -> None:
    raw, fused = (read_record(folder / f"{n}.ome.tiff") for n in ("demo", "recovered"))
    assert raw.images[0].shape == (1, 1, 2, 512, 512, 3)
    assert fused.images[0].shape == (1, 1, 1, 512, 512, 3)
    assert fused.derived is not None
    assert fused.derived["model"] == "tsva-slide20x"
    assert [i.name for i in fused.images] == [i.name for i in raw.images]
    with tifffile.TiffFile(folder / "recovered.ome.tiff") as tif:
        assert len(tif.series) == 30
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Raw, recovered, true" in page
    shown = told["refocus"]["non_blank"]
    for what in ("sharper shot, ", "recovered, ", "in focus, without noise"):
        assert page.count(f'alt="{what}') == shown


def test_a_model_that_cannot_recover_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["demo", "-o", str(output), "--strategy", "two-shot"]
    for model in ("sparsefocus-slide20x", str(tmp_path / "none.onnx")):
        with pytest.raises(SystemExit) as e:
            cli.main([*words, "--refocus-model", model])
        assert e.value.code == 2
        assert model in capsys.readouterr().err
        assert not output.exists()


def test_a_model_that_nothing_would_use_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as e:
        cli.main(["demo", "-o", str(output), "--refocus-model", "tsva-slide20x"])
    assert e.value.code == 2
    assert "--refocus-model: needs --strategy two-shot" in capsys.readouterr().err
    assert not output.exists()
