"""The demo: its marks, the same table each time, and the table in the README."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from mm_autofocus import cli
from mm_autofocus.demo import demo_plan
from mm_autofocus.ometiff import read_record

from conftest import ROOT

_DOF_UM = 0.978


def demo(*args: str) -> tuple[int, str]:
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as e:
        cli.main(["demo", *args])
    return int(e.value.code or 0), out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def told(folder: Path) -> str:
    code, text = demo("-o", str(folder))
    # by the command line's own rule: blank tiles are tiles that failed to focus
    assert code == 1
    return text


class Row(NamedTuple):
    """Of the table that is printed."""

    position: str
    kind: str
    z_before: str
    z_after: str
    moved: str
    looks: str
    moves: str
    status: str
    defocus: str


def test_the_marks(told: str) -> None:
    rows = _rows(told)
    assert len(rows) >= 25
    assert {r.kind for r in rows} == {"dense", "sparse", "extremely-sparse", "blank"}
    assert all((r.defocus == "–") == (r.kind == "blank") for r in rows)
    off = np.array([abs(float(r.defocus)) for r in rows if r.kind != "blank"])
    # The mark is 95 % (98 % over the fields of benchmarks/classic.py). Where a stage comes to
    # rest by chance, other digits of another processor make another demo: four of 22 tiles
    # are beyond once in 50 at 95 %, once in 1000 at 98 %.
    assert len(off) == 22
    marks = re.search(
        r"simulated: (\d+) of 22 tiles with specimen within half a depth of field of the "
        r"truth, (\d+) within one",
        told,
    )
    assert marks is not None
    within_half, within_one = map(int, marks.groups())
    assert 22 - within_half <= 3
    assert within_one == 22
    # and the table, to its two decimals, is what the sentence counts
    assert (off <= _DOF_UM / 2 - 0.005).sum() <= within_half
    assert (off <= _DOF_UM / 2 + 0.005).sum() >= within_half
    blank = [r.status for r in rows if r.kind == "blank"]
    assert blank == 8 * ["failed"]
    assert "simulated: 8 of 8 blank tiles reported as not focused, 0 false ok" in told


def test_what_it_leaves(told: str, folder: Path) -> None:
    record = read_record(folder / "demo.ome.tiff")
    assert record.complete
    assert record.frames == 30
    assert record.images[0].shape == (1, 1, 1, 512, 512, 3)
    assert record.images[0].pixel_size_um == pytest.approx(0.325)
    page = (folder / "report.html").read_text()
    assert page.count('alt="after"') == 30
    assert "true z" in page


def test_the_same_table_each_time_and_in_the_readme(
    told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(told)
    # the second time only its first row: all of it takes a minute
    plan = demo_plan()
    plan["stage_positions"] = plan["stage_positions"][:6]
    monkeypatch.setattr("mm_autofocus.demo.demo_plan", lambda _: plan)
    code, text = demo("-o", str(tmp_path / "again"), "--json")
    again = json.loads(text)
    assert code == (1 if again["blank_reported"] else 0)
    assert again["frames"] == len(again["autofocus"]) == 6
    for row, t in zip(rows[:6], again["autofocus"], strict=True):
        name, kind, status = row.position, row.kind, row.status
        assert (name, kind, status) == (t["position"], t["kind"], t["status"])
        assert (t["true_defocus_um"] is None) == (kind == "blank")
        assert t["dof_um"] == pytest.approx(_DOF_UM, abs=1e-3)
        if row.defocus != "–":
            assert float(row.defocus) == pytest.approx(t["true_defocus_um"], abs=0.006)
        assert (int(row.looks), int(row.moves)) == (t["looks"], t["moves"])
        assert float(row.z_before) == pytest.approx(t["z_before_um"], abs=0.006)
        assert float(row.z_after) == pytest.approx(t["z_after_um"], abs=0.006)
    # digits may differ between processors' Fourier transforms; what was found may not
    shown = _rows((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) >= 10
    outcome = {r.position: (r.kind, r.status) for r in rows}
    assert {r.position: (r.kind, r.status) for r in shown}.items() <= outcome.items()


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
    assert all(t["dof_um"] == pytest.approx(_DOF_UM, abs=1e-3) for t in told["autofocus"])
    for t in told["autofocus"]:
        assert (t["true_defocus_um"] is None) == (t["kind"] == "blank")
    tiles = [t for t in told["autofocus"] if t["kind"] != "blank"]
    assert all(t["verified"] is not None for t in tiles if t["status"] != "failed")
    exposures = sum(t["looks"] + 1 + t.get("corrections", 0) for t in told["autofocus"])
    assert told["exposures"] == exposures
    assert told["corrections"] == sum(t.get("corrections", 0) for t in tiles)


def _rows(text: str) -> list[Row]:
    found = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("│").split("│")]
        if len(cells) >= 9 and re.fullmatch(r"r\dc\d", cells[0]):
            found.append(Row(*cells[:9]))
    return found
