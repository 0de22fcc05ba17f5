"""The demo: its marks, the same table each time, and the table in the README."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from mm_autofocus import cli
from mm_autofocus.ometiff import read_record

from conftest import ROOT


def demo(*args: str) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as e:
        cli.main(["demo", *args])
    return int(e.value.code or 0), out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    code, text = demo("-o", str(folder), "--json")
    document = dict(json.loads(text))
    # by the command line's own rule: blank tiles are tiles that failed to focus
    assert code == (1 if document["blank_reported"] else 0)
    return document


def test_the_marks(told: dict[str, Any]) -> None:
    tiles = told["autofocus"]
    assert len(tiles) >= 25
    kinds = {t["kind"] for t in tiles}
    assert kinds == {"dense", "sparse", "extremely-sparse", "blank"}
    # The mark is 95 % (98 % over the fields of benchmarks/classic.py). Where a stage comes to
    # rest by chance, other digits of another processor make another demo: four of 22 tiles
    # are beyond once in 50 at 95 %, once in 1000 at 98 %.
    assert told["non_blank"] == 22
    assert told["non_blank"] - told["within_half_dof"] <= 3
    assert told["within_dof"] == told["non_blank"]
    assert told["blank_reported"] == told["blank"] > 0
    assert told["false_ok"] == 0
    for t in tiles:
        assert (t["true_defocus_um"] is None) == (t["kind"] == "blank")
        assert t["dof_um"] == pytest.approx(0.978, abs=1e-3)


def test_what_it_leaves(told: dict[str, Any], folder: Path) -> None:
    record = read_record(folder / "demo.ome.tiff")
    assert record.complete
    assert record.frames == told["frames"] == 30
    assert record.images[0].shape == (1, 1, 1, 512, 512, 3)
    assert record.images[0].pixel_size_um == pytest.approx(0.325)
    page = (folder / "report.html").read_text()
    assert page.count('alt="after"') == 30
    assert "true z" in page


def test_the_same_table_each_time_and_in_the_readme(told: dict[str, Any], folder: Path) -> None:
    _, text = demo("-o", str(folder))
    rows = _rows(text)
    assert [r[0] for r in rows] == [t["position"] for t in told["autofocus"]]
    for row, t in zip(rows, told["autofocus"], strict=True):
        name, kind, before, after, _, looks, moves, status, defocus = row
        assert (name, kind, status) == (t["position"], t["kind"], t["status"])
        assert (int(looks), int(moves)) == (t["looks"], t["moves"])
        assert float(before) == pytest.approx(t["z_before_um"], abs=0.006)
        assert float(after) == pytest.approx(t["z_after_um"], abs=0.006)
        if defocus != "–":
            assert float(defocus) == pytest.approx(t["true_defocus_um"], abs=0.006)
    # digits may differ between processors' Fourier transforms; what was found may not
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = _rows(readme)
    assert len(shown) >= 10
    outcome = {r[0]: (r[1], r[7]) for r in rows}
    assert {r[0]: (r[1], r[7]) for r in shown}.items() <= outcome.items()


@pytest.mark.parametrize("strategy", ["one-shot", "two-look"])
def test_a_model_that_is_not_there_is_named(
    strategy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mm_autofocus.models.importing.shipped_models", list)
    code, _ = demo("-o", str(tmp_path / "out"), "--strategy", strategy)
    assert code == 2
    error = capsys.readouterr().err
    assert f"--strategy {strategy}: the model 'sparsefocus-slide20x" in error
    assert not (tmp_path / "out").exists()


def test_the_marks_of_the_shipped_model(tmp_path: Path) -> None:
    _, text = demo("-o", str(tmp_path), "--strategy", "one-shot", "--json")
    told = json.loads(text)
    assert told["looks_per_tile"] <= 1.2
    assert told["within_dof"] >= 0.98 * told["non_blank"]
    assert told["within_half_dof"] >= 0.95 * told["non_blank"]
    assert told["blank_reported"] == told["blank"] > 0
    assert told["false_ok"] == 0
    tiles = [t for t in told["autofocus"] if t["kind"] != "blank"]
    assert all(t["verified"] is not None for t in tiles if t["status"] != "failed")
    exposures = sum(t["looks"] + 1 + t.get("corrections", 0) for t in told["autofocus"])
    assert told["exposures"] == exposures
    assert told["corrections"] == sum(t.get("corrections", 0) for t in tiles)


def _rows(text: str) -> list[tuple[str, ...]]:
    found = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("│").split("│")]
        if len(cells) >= 9 and re.fullmatch(r"r\dc\d", cells[0]):
            found.append(tuple(cells[:9]))
    return found
