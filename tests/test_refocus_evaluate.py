"""Recovered images judged: figures against numbers known by hand, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mm_autofocus import cli
from mm_autofocus.errors import InputError
from mm_autofocus.models.refocus import RefocusModel
from mm_autofocus.training import Dataset
from mm_autofocus.training.refocus_baselines import SHARPER, baselines_of
from mm_autofocus.training.refocus_cases import (
    Case,
    cases_of,
    halves_within,
    middles_um,
    nearest_pair,
)
from mm_autofocus.training.refocus_evaluate import (
    NOT_ENCLOSED,
    evaluate_refocus,
    psnr_db,
    ssim,
)
from mm_autofocus.training.refocus_table import (
    refocus_heads,
    refocus_sentences,
    refocus_table,
)

from blurred import make_dataset
from judged import plain
from tiny_refocus import make_refocus, refocus_card

SIDE = 64


def card(**changes):
    shots = {"half_um": [0.5, 3.0], **changes.pop("shots", {})}
    return refocus_card(**{"name": "tiny", "patch_px": 32, "shots": shots, **changes})


@pytest.fixture
def model(tmp_path: Path):
    """Makes a model that answers the mean of both shots, and where focus is."""

    def make(kind: str = "mean", *, toward: float = 1.0, **changes) -> RefocusModel:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.onnx"
        return RefocusModel(make_refocus(path, kind, card(**changes), bias=toward, sd=0.2))

    return make


def case(
    lower_um: float,
    upper_um: float,
    below: float,
    above: float,
    *,
    field: str = "slide/0",
    sparsity: str = "dense",
    asked: float | None = None,
) -> Case:
    """Shots that are off the truth by so many grey values in each pixel.

    In the truth stand stripes, which `below` and `above` raise or lower: Brenner's measure
    takes that shot for the sharper one in which they stand out more.
    """
    rng = np.random.default_rng(len(field))
    stripes = np.where(np.arange(SIDE) % 4 < 2, 1, -1)[None]
    truth = rng.integers(100, 140, (SIDE, 1)) + 20 * stripes
    lower, upper, truth = ((truth + v * stripes).astype(np.uint8) for v in (below, above, 0))
    half = (upper_um - lower_um) / 2 if asked is None else asked
    return Case(field, sparsity, half, lower_um, upper_um, lower, upper, truth, 0.0, 255.0)


def db(error: float) -> float:
    return 20 * np.log10(255 / error)


# ------------------------------------------------------------------------------- figures


def test_psnr_is_what_it_is_by_hand() -> None:
    truth = np.full((16, 16, 3), 100, np.uint8)
    image = truth.copy()
    image[..., 0] += 6  # one channel of three: a mean square of 12
    assert psnr_db(image, truth, 255.0) == pytest.approx(10 * np.log10(255**2 / 12))
    deep = truth.astype(np.uint16)
    assert psnr_db(deep + 8, deep, 4095.0) == pytest.approx(20 * np.log10(4095 / 8))
    assert psnr_db(truth, truth, 255.0) == 100.0
    noisy = np.random.default_rng(0).integers(0, 255, truth.shape).astype(np.uint8)
    assert ssim(truth, truth, 255.0) == pytest.approx(1.0)
    assert ssim(noisy, truth, 255.0) < 0.2
    assert ssim(noisy[..., 0], truth[..., 0], 255.0) < 0.2


def test_the_table_of_known_errors(model) -> None:
    """Errors of ± 4 and of 8 and -4: their mean is right, and wrong by 2."""
    cases = [
        case(-1, 1, 4, -4, field="a/1"),
        case(-2, 2, 8, -4, field="a/2", sparsity="sparse"),
    ]
    found = evaluate_refocus(
        model(), cases, baselines_of(["mean"]), others={"alone": model(shots={"count": 1})}
    )
    assert found.methods == ["tiny", "alone", SHARPER, "mean"]
    one, two = found.rows
    assert one.psnr_db == pytest.approx(
        {"tiny": 100.0, "alone": db(4), SHARPER: db(4), "mean": 100.0}
    )
    assert two.psnr_db == pytest.approx(
        {"tiny": db(2), "alone": db(8), SHARPER: db(8), "mean": db(2)}
    )
    document = plain(found.to_json())
    assert document["pairs"] == 2 and document["fields"] == 2
    assert document["half_um"] == [1.0, 2.0]
    assert document["psnr_db"] == pytest.approx((100 + db(2)) / 2)
    assert document["psnr_identity_db"] == pytest.approx((db(4) + db(8)) / 2)
    own = document["methods"]["tiny"]
    assert own["psnr_std_db"] == pytest.approx((100 - db(2)) / 2)
    assert own["by_half_um"]["2"]["psnr_db"] == pytest.approx(db(2))
    assert own["by_sparsity"]["sparse"]["n"] == 1 and own["worse"] == 0.0
    assert set(own["by_sparsity"]) == {"dense", "sparse"}
    assert own["gain_db"] == pytest.approx((100 - db(4) + db(2) - db(8)) / 2)
    over = document["gain_over"]["alone"]
    assert over["gain_db"] == pytest.approx(own["gain_db"])
    assert over["interval_db"] is None  # of two fields
    assert over["by_half_um"]["2"]["gain_db"] == pytest.approx(db(2) - db(8))
    assert document["megapixels_per_s"] > 0
    rows = refocus_table(found)
    assert [len(row) for row in rows] == [len(refocus_heads(found))] * 4
    assert rows[2][1:3] == [f"{db(4):.2f}", f"{db(8):.2f}"]
    assert "tiny over alone" in refocus_sentences(document, "tiny")[0]


def test_what_became_worse_is_counted(model) -> None:
    """The mean of a good shot and a bad one is worse than the good one."""
    cases = [case(-1, 1, 1, -9, field=f"a/{k}") for k in range(3)]
    cases += [case(-1, 1, 4, -4, field=f"b/{k}") for k in range(3)]
    found = evaluate_refocus(model(), cases, baselines_of([]))
    document = plain(found.to_json())
    assert document["methods"]["tiny"]["worse"] == 0.5
    assert document["methods"][SHARPER]["worse"] == 0.0
    low, high = document["gain_over"][SHARPER]["interval_db"]
    assert low < document["gain_over"][SHARPER]["gain_db"] < high
    assert document["worst"][0]["field"].startswith("a/")
    assert document["worst"][0]["psnr_db"] == pytest.approx(db(4))


def test_flags_are_counted_against_the_label(model) -> None:
    """The net says -1 ± 0.2 µm for all: focus is beyond the lower shot, by its own word."""
    cases = [
        case(-1, 1, 4, -4),  # enclosed: falsely flagged
        case(0.2, 2.2, 4, -4),  # not enclosed, by little
        case(1.0, 3.0, 4, -4),  # not enclosed, by 1 µm
        case(-3.5, -0.9, 4, -4),
    ]
    beyond = evaluate_refocus(model(toward=-1.0), cases, baselines_of([])).to_json()["flags"]
    assert (beyond["enclosed"], beyond["enclosed_flagged"]) == (1, 1)
    assert (beyond["not_enclosed"], beyond["not_enclosed_flagged"]) == (3, 3)
    assert (beyond["not_enclosed_far"], beyond["not_enclosed_far_flagged"]) == (2, 2)
    assert beyond["distrusted"] == 4
    assert list(beyond["distrusted_because"].values()) == [4]
    between = evaluate_refocus(model(toward=0.5), cases, baselines_of([])).to_json()["flags"]
    assert between["enclosed_flagged"] == between["not_enclosed_flagged"] == 0
    assert between["distrusted"] == 0
    said = model(toward=-1.0).recover(cases[0].lower, cases[0].upper, half_um=1.0)
    assert any(reason.startswith(NOT_ENCLOSED) for reason in said.reasons)


def test_where_focus_is_said_to_be(model) -> None:
    """Half way between the shots, ± 0.2 µm: wrong by how far the middle is from focus."""
    middles = (0.1, -0.3, 0.5, 1.2)
    cases = [case(m - 1, m + 1, 4, -4, field=f"s/{m}") for m in middles]
    focus = evaluate_refocus(model(toward=1.0), cases, baselines_of([])).to_json()["focus"]
    assert focus["n"] == 4
    assert focus["mae_um"] == pytest.approx(np.mean(np.abs(middles)), abs=1e-6)
    assert focus["mae_enclosed_um"] == pytest.approx(np.mean([0.1, 0.3, 0.5]), abs=1e-6)
    assert focus["bias_um"] == pytest.approx(np.mean(middles), abs=1e-6)
    assert focus["calibration"]["within"] == {"1": 0.25, "2": 0.5, "3": 0.75}
    silent = model(shots={"toward": None, "toward_sd": None})
    document = evaluate_refocus(silent, cases, baselines_of([])).to_json()
    assert document["focus"] is None
    assert plain(document)["flags"]["enclosed_flagged"] == 0


def test_a_watcher_sees_what_was_recovered(model) -> None:
    seen = []
    cases = [case(-1, 1, 4, -4)]
    evaluate_refocus(
        model(),
        cases,
        baselines_of([]),
        others={"alone": model("first")},
        watch=lambda *args: seen.append(args),
    )
    ((shown, images, row),) = seen
    assert shown is cases[0] and row.field == "slide/0"
    np.testing.assert_array_equal(images["tiny"], shown.truth)
    np.testing.assert_array_equal(images[SHARPER], shown.lower)
    np.testing.assert_array_equal(images["alone"], shown.lower)


def test_refusals(model) -> None:
    with pytest.raises(InputError, match=r"no two planes .* \(0.5 … 3 µm"):
        evaluate_refocus(model(), [], baselines_of([]))
    with pytest.raises(InputError, match="the same name"):
        evaluate_refocus(model(), [], baselines_of([]), others={SHARPER: model()})


# --------------------------------------------------------------------------------- cases


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("blurred"), fields=9)


def test_pairs_of_planes_have_the_distance_asked_for() -> None:
    z = np.arange(-6, 7) - 0.3
    pair = nearest_pair(z, 0.4, 2.0)
    assert pair is not None
    assert (pair.half_um, pair.middle_um) == (2.0, pytest.approx(0.7))
    pair = nearest_pair(z[::-1], 0.0, 0.5)
    assert pair is not None and pair.half_um == pytest.approx(0.5)
    assert (pair.lower, pair.upper) == (6, 5)  # 0.2 lies nearer than -0.8
    assert nearest_pair(z, 0.0, 0.3) is None  # no planes are 0.6 µm apart
    assert nearest_pair(z, 5.9, 2.0) is None  # beyond the stack
    assert nearest_pair(z[:1], 0.0, 1.0) is None
    # uneven planes: rather another middle than another distance
    pair = nearest_pair(np.array([-1.0, 0.0, 1.0, 1.8, 2.0]), 0.3, 1.5)
    assert pair is not None and (pair.lower_um, pair.upper_um) == (-1.0, 2.0)


def test_middles_are_drawn_as_in_the_paper() -> None:
    some = middles_um(np.random.default_rng(0), 4000)
    assert abs(some.mean()) < 0.05 and some.std() == pytest.approx(0.99, abs=0.03)
    assert np.abs(some).max() == 2.5
    assert halves_within(0.5, 3.0) == (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
    assert halves_within(1.9, 2.1) == (2.0,)
    assert halves_within(0.6, 0.9) == (0.9,)


def test_cases_of_stacks(dataset: Dataset) -> None:
    stacks = dataset.labelled[:3]
    found = list(cases_of(stacks, (0.5, 2.0), per_half=4))
    assert {n for n, _ in found} == {0, 1, 2}
    for number, one in found:
        stack, d = stacks[number], stacks[number].defocus_um
        lower, upper = (int(np.abs(d - v).argmin()) for v in (one.lower_um, one.upper_um))
        assert one.half_um == pytest.approx(one.asked_um)
        np.testing.assert_array_equal(one.lower, stack.plane(lower))
        np.testing.assert_array_equal(one.upper, stack.plane(upper))
        others = np.abs(np.delete(d, [lower, upper]))
        assert abs(one.truth_um) == pytest.approx(others.min())
        best = int(np.abs(d - one.truth_um).argmin())
        np.testing.assert_array_equal(one.truth, stack.plane(best))
    keys = [(n, c.lower_um, c.upper_um) for n, c in found]
    assert len(set(keys)) == len(keys)
    alone = [(c.lower_um, c.upper_um) for _, c in cases_of(stacks[1:2], (2.0,), per_half=4)]
    assert alone == [(a, b) for n, a, b in keys if n == 1 and b - a > 2]


def test_fused_truth(dataset: Dataset, tmp_path: Path) -> None:
    stacks = dataset.labelled[:1]
    ((_, one),) = cases_of(stacks, (1.0,), per_half=1, truth="fusion", folder=tmp_path)
    assert one.truth.dtype == one.lower.dtype and one.truth_um == 0.0
    assert psnr_db(one.truth, stacks[0].plane(8), 255.0) > 25
    with pytest.raises(InputError, match="needs a folder"):
        list(cases_of(stacks, (1.0,), truth="fusion"))


# ------------------------------------------------------------------------------- command


def run_cli(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["mm-autofocus"])
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", *map(str, args)])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_the_command(dataset: Dataset, tmp_path: Path, monkeypatch, capsys) -> None:
    two, one = tmp_path / "two.onnx", tmp_path / "one.onnx"
    make_refocus(two, card=card())
    make_refocus(one, card=card(name="alone", shots={"count": 1}))
    out = tmp_path / "out"
    words = ["--part", "test", "--baseline", "wiener", "--baseline", one, "-o", out]
    code, text, err = run_cli(monkeypatch, capsys, two, dataset.path, *words)
    assert code == 0, err
    for word in ("tiny on", "sharper shot as it is", "Wiener", "alone", "± 0.5 µm", "± 3 µm"):
        assert word in text
    assert "its setting was chosen by the PSNR" in text and "report:" in text
    assert sorted(p.name for p in out.iterdir()) == [
        "evaluation.json",
        "psnr.png",
        "report.html",
    ]
    written = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert {"psnr_db", "psnr_identity_db", "pairs", "megapixels_per_s"} <= set(written)
    assert list(written["methods"]) == ["tiny", "alone", SHARPER, "wiener"]
    assert written["task"] == "refocus" and written["part"] == "test"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == 6 + 4 and "<script" not in page
    assert page.count("data:image/png") == 1 + 10 * 4
    code, text, _ = run_cli(
        monkeypatch, capsys, two, dataset.path, "--json", "--limit", 1, "--baseline", "none"
    )
    document = json.loads(text)
    assert code == 0 and document["fields"] == 1
    assert document["methods"].keys() == {"tiny", SHARPER}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--truth"], "--truth: is not allowed with a model that recovers images"),
        (["--baseline", "hill-climb"], "--baseline: model: 'hill-climb' is unknown"),
        (["--baseline", "none", "--baseline", "mean"], "'none' and others"),
        (["--baseline", "narrow.onnx"], "shots ± 1 µm from their middle are not allowed"),
        (["--baseline", "rgb.onnx"], "the frame is grey, the model takes RGB"),
        (["--limit", "0"], "--limit: 0 is not allowed"),
    ],
)
def test_mistakes_are_one_sentence(
    dataset: Dataset, tmp_path: Path, monkeypatch, capsys, words, sentence
) -> None:
    monkeypatch.chdir(tmp_path)
    make_refocus(tmp_path / "two.onnx", card=card())
    narrow = card(name="narrow", shots={"half_um": [0.4, 0.6]})
    make_refocus(tmp_path / "narrow.onnx", card=narrow)
    make_refocus(tmp_path / "rgb.onnx", card=card(name="rgb", channels=3))
    code, out, err = run_cli(monkeypatch, capsys, "two.onnx", dataset.path, *words)
    assert code == 2 and not out
    assert sentence in err and len(err.strip().splitlines()) == 1
