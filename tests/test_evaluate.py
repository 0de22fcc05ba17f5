"""Evaluation: figures of merit that are known exactly, and everything that can be missing."""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus import cli
from mm_autofocus.errors import InputError
from mm_autofocus.training import merit
from mm_autofocus.training.baselines import HillClimb, grid_median
from mm_autofocus.training.evaluate import evaluate
from mm_autofocus.training.judges import ModelJudge, looks_at, show
from mm_autofocus.training.merit import Row
from mm_autofocus.types import Optics

from judged import Memory, knowing, plain, write_dataset

CLASSES = ("dense", "sparse", "extremely-sparse")
ERRORS = {"dense": 0.25, "sparse": -0.5, "extremely-sparse": 1.5}
STACKS = [Memory(f"slide/{c}", c, focus_um=k * 0.5) for k, c in enumerate(CLASSES)]


def rows_of(true: list[float], said: list[float | None]) -> list[Row]:
    return [
        Row(i, f"s/{i % 4}", CLASSES[i % 3], 0, t, p)
        for i, (t, p) in enumerate(zip(true, said, strict=True))
    ]


# ---------------------------------------------------------------------- figures of merit


def test_known_errors_give_known_figures() -> None:
    """One error for each class: 11 planes each, DoF 1 µm."""
    found = {
        c: evaluate(knowing(lambda d, e=ERRORS[c]: d + e), [s], zero=False)
        for c, s in zip(CLASSES, STACKS, strict=True)
    }
    for c, e in ERRORS.items():
        document = plain(found[c].to_json())
        key = c.replace("-", "_")
        assert document["n"] == document["n_predicted"] == 11
        assert document["mae_um"] == pytest.approx(abs(e), abs=1e-6)
        assert document["mae_std_um"] == pytest.approx(0, abs=1e-6)
        assert document["bias_um"] == pytest.approx(e, abs=1e-6)
        assert document["by_sparsity"][key]["mae_um"] == document["mae_um"]
        assert [k for k, v in document["by_sparsity"].items() if v] == [key]
        accuracy = {"1": abs(e) <= 1, "1/2": abs(e) <= 0.5, "1/3": abs(e) <= 1 / 3}
        assert document["dof_accuracy"] == {k: float(v) for k, v in accuracy.items()}
    # dense, focus on a plane: d̂ = d + 0.25 has the sign of d at |d| ≥ 1, and d = 0 is right
    assert found["dense"].to_json()["direction_success"] == 1.0
    # focus 0.5 µm: d = ±0.5, ±1.5, …; d̂ = d - 0.5 is 0 at +0.5, which counts as right
    assert found["sparse"].to_json()["direction_success"] == 1.0
    # focus 1 µm: d = -6 … 4; d̂ = d + 1.5 is wrong at -1 alone
    assert found["extremely-sparse"].to_json()["direction_success"] == pytest.approx(10 / 11)


def test_all_classes_stand_in_one_document() -> None:
    found = plain(evaluate(knowing(lambda d: d * 1.1), STACKS).to_json())
    assert found["n"] == 33
    assert {k: v["n"] for k, v in found["by_sparsity"].items()} == {
        "dense": 11,
        "sparse": 11,
        "extremely_sparse": 11,
    }
    d = np.concatenate([s.defocus_um for s in STACKS])
    assert found["mae_um"] == pytest.approx(0.1 * np.abs(d).mean(), abs=1e-6)
    assert found["mae_std_um"] == pytest.approx(0.1 * np.abs(d).std(), abs=1e-6)
    assert found["median_um"] == pytest.approx(0.1 * np.median(np.abs(d)), abs=1e-6)
    assert found["direction_success"] == found["direction_success_far"] == 1.0
    assert found["n_far"] == int((np.abs(d) > 2).sum())
    assert sum(b["n"] for b in found["by_defocus"]) == 33
    assert found["defocus_range_um"] == [d.min(), d.max()]
    assert [f["n"] for f in found["fields"]] == [11, 11, 11]
    zero = found["baselines"]["zero"]
    assert zero["mae_um"] == pytest.approx(np.abs(d).mean())
    assert (zero["looks"], found["looks"]) == (0, 1)


def test_focus_itself_has_no_direction() -> None:
    """At d = 0 either sign is right; a wrong sign elsewhere is wrong."""
    found = merit.merit(rows_of([0.0, 0.0, 3.0, -3.0], [-4.0, 4.0, -0.1, -9.0]), 1.0)
    assert found["direction_success"] == 0.75
    assert (found["direction_success_far"], found["n_far"]) == (0.5, 2)


def test_what_is_not_predicted_counts() -> None:
    """Blank planes: not in the MAE, 0 in that of all, wrong in the parts."""
    stack = Memory(blank=(0, 1, 10))
    found = plain(evaluate(knowing(lambda d: d + 0.2), [stack]).to_json())
    assert (found["n"], found["n_predicted"]) == (11, 8)
    assert found["mae_um"] == pytest.approx(0.2, abs=1e-6)
    assert found["mae_all_um"] == pytest.approx((8 * 0.2 + 5 + 4 + 5) / 11, abs=1e-6)
    assert found["dof_accuracy"]["1"] == found["direction_success"] == pytest.approx(8 / 11)
    assert found["coverage"]["missing"] == 3
    assert found["coverage"]["missing_because"] == {"blank": 3}
    assert found["coverage"]["asked"] == 11


def test_no_number_is_no_prediction() -> None:
    def some_nan(d):
        return np.where(d > 3, np.nan, d)

    found = plain(evaluate(knowing(some_nan), [Memory()]).to_json())
    assert found["n_predicted"] == 9
    assert sum(found["coverage"]["missing_because"].values()) >= 2
    assert found["mae_um"] == pytest.approx(0, abs=1e-6)


def test_doubtful_predictions_are_counted() -> None:
    far = evaluate(knowing(lambda d: d * 1.5, z_range_um=(-5.0, 5.0)), [Memory()])
    found = plain(far.to_json())
    assert found["coverage"]["flagged"] == 4  # ±4, ±5 become ±6, ±7.5
    assert list(found["coverage"]["flagged_because"]) == ["prediction beyond the trained range"]
    assert found["trusted"]["n"] == 7


def test_only_planes_within_the_trained_range_are_asked() -> None:
    found = evaluate(knowing(z_range_um=(-2.0, 3.0)), [Memory()])
    assert sorted(r.true_um for r in found.model.rows) == [-2, -1, 0, 1, 2, 3]
    assert found.outside_range == 5
    wider = evaluate(knowing(z_range_um=(-2.0, 3.0)), [Memory()], range_um=(-4.0, 4.0))
    assert len(wider.model.rows) == 9
    with pytest.raises(InputError, match=r"no plane of the 1 stacks is within \+30 … \+40"):
        evaluate(knowing(z_range_um=(30.0, 40.0)), [Memory()])


def test_depth_of_field_is_the_card_s_or_the_optics() -> None:
    assert evaluate(knowing(), [Memory()]).dof_um == 1.0
    by_optics = evaluate(knowing(dof_um=None), [Memory()])
    assert by_optics.dof_um == pytest.approx(Optics(0.75, 20, pixel_size_um=0.325).dof_um)
    assert evaluate(knowing(), [Memory()], dof_um=0.5).dof_um == 0.5
    unknown = evaluate(knowing(dof_um=None), [Memory(optics=Optics())])
    assert plain(unknown.to_json())["dof_accuracy"] == {"1": None, "1/2": None, "1/3": None}


def test_expected_errors_are_judged() -> None:
    rng = np.random.default_rng(0)
    sd = np.repeat([0.1, 0.3, 1.0], 700)
    error = rng.normal(0, sd)
    rows = [
        Row(0, "s/0", "dense", k, 5.0, 5.0 + e, s)
        for k, (e, s) in enumerate(zip(error, sd, strict=True))
    ]
    right = merit.calibration(rows)
    assert right is not None
    assert [right["within"][k] for k in "123"] == pytest.approx([0.683, 0.954, 0.997], abs=0.03)
    assert right["ratio"] == pytest.approx(1, abs=0.05)
    assert right["bins"][0]["found_um"] == pytest.approx(0.1, rel=0.15)
    assert right["bins"][-1]["found_um"] == pytest.approx(1.0, rel=0.15)
    assert sum(b["n"] for b in right["bins"]) == 2100
    assert merit.calibration(rows_of([1.0], [2.0])) is None


def test_the_worst_come_first_two_of_a_field() -> None:
    rows = [Row(0, f"s/{k // 5}", "dense", k, 0.0, float(k)) for k in range(15)]
    assert [r.predicted_um for r in merit.worst(rows, 5)] == [14, 13, 9, 8, 4]


def test_fields_are_drawn_for_the_interval_not_frames() -> None:
    """All frames of a field alike: 1600 frames say no more than the 16 fields."""
    errors = np.linspace(0, 1.5, 16)
    rows = [
        Row(i, f"s/{i}", "dense", k, 0.0, float(e))
        for i, e in enumerate(errors)
        for k in range(100)
    ]
    low, high = merit.interval(rows, lambda r: merit.merit(r, 1.0)["mae_um"], draws=200)
    assert low < 0.75 < high
    assert 0.25 < high - low < 0.7  # of 1600 independent frames: 0.05
    assert merit.interval(rows[:200], lambda r: 0.0) is None


numbers = st.floats(-30, 30)
pairs = st.lists(st.tuples(numbers, st.one_of(st.none(), numbers)), min_size=1, max_size=40)


@given(pairs, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_order_does_not_matter(found, random) -> None:
    rows = rows_of(*map(list, zip(*found, strict=True)))
    mixed = rows.copy()
    random.shuffle(mixed)
    for key, value in merit.merit(rows, 0.98).items():
        assert merit.merit(mixed, 0.98)[key] == (
            value if isinstance(value, dict) else pytest.approx(value)
        )


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_above_and_below_focus_are_alike(found) -> None:
    rows = rows_of(*map(list, zip(*found, strict=True)))
    turned = rows_of([-t for t, _ in found], [None if p is None else -p for _, p in found])
    a, b = merit.merit(rows, 0.98), merit.merit(turned, 0.98)
    assert a.pop("bias_um") == pytest.approx(-b.pop("bias_um") if a["n_predicted"] else None)
    for key in ("direction_success", "direction_success_far", "mae_um", "dof_accuracy"):
        assert a[key] == pytest.approx(b[key])


# --------------------------------------------------------------------------------- looks


@pytest.mark.parametrize(
    ("why", "z", "offsets", "expected"),
    [
        ("one look", [0.0, 1.0], (0,), {0: (0,), 1: (1,)}),
        ("missing at the end", [0, 1, 2, 3, 4], (0, 2), {0: (0, 2), 1: (1, 3), 2: (2, 4)}),
        ("below", [0, 1, 2, 3], (0, -2), {2: (2, 0), 3: (3, 1)}),
        ("any order", [3, 1, 0, 2], (0, 2), {1: (1, 0), 2: (2, 3)}),
        ("nearest", [0, 1.5, 3.0, 4.5], (0, 2), {0: (0, 1), 1: (1, 2), 2: (2, 3)}),
        ("exact where there are", [0, 2, 3, 4, 6], (0, 3), {0: (0, 2), 2: (2, 4)}),
        ("not the same plane twice", [0, 10, 20], (0, 4), {}),
        ("none at the present z", [0, 1, 2, 3, 4], (-1, 1), {1: (0, 2), 2: (1, 3), 3: (2, 4)}),
    ],
)
def test_looks_are_the_nearest_planes(why, z, offsets, expected) -> None:
    assert looks_at([float(v) for v in z], offsets) == expected, why


def test_planes_without_all_looks_are_left_out_and_counted() -> None:
    found = evaluate(knowing(looks_um=(0.0, 4.0)), [Memory()])
    assert len(found.model.rows) == 7
    assert found.model.looks_missing == 4
    assert {r.looks for r in found.model.rows} == {2}
    assert plain(found.to_json())["mae_um"] == pytest.approx(0, abs=1e-6)


def test_the_looks_are_shown_in_the_order_of_the_card() -> None:
    """The model answers with the second look's own defocus, less its offset."""
    for offset in (3.0, -3.0):
        model = knowing(looks_um=(0.0, offset))
        first = model.function

        def second(x, first=first, offset=offset):
            return first(x[:, 1:]) - offset

        model.function = second
        found = evaluate(model, [Memory(z_um=[float(z) for z in range(5, -6, -1)])])
        assert len(found.model.rows) == 8
        assert found.to_json()["mae_um"] == pytest.approx(0, abs=1e-6)


def test_looks_that_no_stack_has_are_an_error() -> None:
    with pytest.raises(InputError, match=r"looks that it takes \(\+0, \+4 µm .* 10 µm apart"):
        evaluate(
            knowing(looks_um=(0.0, 4.0)), [Memory(z_um=[float(z) for z in range(-20, 21, 10)])]
        )


def test_no_more_planes_are_held_than_the_looks_span() -> None:
    alive: list[weakref.ref] = []
    most = 0

    class Counted(Memory):
        def planes(self):
            nonlocal most
            for z, image in super().planes():
                alive.append(weakref.ref(image))
                most = max(most, sum(r() is not None for r in alive))
                yield z, image
                del image

    stack = Counted(z_um=[float(z) for z in range(-20, 21)])
    judge = ModelJudge(knowing(looks_um=(0.0, 4.0)))
    wanted = {"": looks_at(stack.z_um, (0.0, 4.0))}
    assert len(list(show(stack, {"": judge}, wanted))) == 37
    assert 5 <= most <= 7


@pytest.mark.parametrize(
    ("changes", "stack", "sentence"),
    [
        ({"channels": 3}, {}, "the frame is grey, the model takes RGB"),
        ({"pixel_size_um": 0.65}, {}, "pixel size 0.325 µm"),
        ({"bit_depths": (8,)}, {}, "16 bits are not allowed"),
        ({"patch_px": 224}, {}, "less than one patch of 224"),
    ],
)
def test_frames_that_are_not_the_model_s_are_refused(changes, stack, sentence) -> None:
    with pytest.raises(InputError, match=sentence) as e:
        evaluate(knowing(**changes), [Memory(**stack)])
    assert str(e.value).startswith("slide/0: ")


def test_nothing_to_judge_is_an_error() -> None:
    with pytest.raises(InputError, match="no stack with a label"):
        evaluate(knowing(), [])


def test_the_simulator_s_truth_is_used_when_asked_for() -> None:
    """The label is off by 0.4 µm; the truth is not."""
    d = Memory().defocus_um
    stack = Memory(truth={"defocus_um": (d + 0.4).tolist(), "focus_z_um": -0.4})
    assert evaluate(knowing(), [stack]).to_json()["mae_um"] == pytest.approx(0, abs=1e-6)
    by_truth = evaluate(knowing(), [stack], truth="simulator")
    assert by_truth.to_json()["mae_um"] == pytest.approx(0.4, abs=1e-6)
    with pytest.raises(InputError, match="slide/0 has no truth"):
        evaluate(knowing(), [Memory()], truth="simulator")


# ----------------------------------------------------------------------------- baselines


def test_the_search_is_replayed_with_its_looks() -> None:
    stack = Memory(z_um=[float(z) for z in range(-14, 15)], focus_um=1.0)
    found = evaluate(knowing(), [stack], searches={"hill-climb": HillClimb(starts=5)})
    climbed = found.to_json()["baselines"]["hill-climb"]
    assert (climbed["n"], climbed["n_predicted"]) == (5, 5)
    assert climbed["mae_um"] < 0.5
    assert climbed["looks"] > 2
    assert climbed["direction_success"] == 1.0


def test_a_search_that_finds_nothing_is_counted() -> None:
    class Noise(Memory):
        def plane(self, k):
            return np.random.default_rng(k).normal(20000, 90, (64, 64)).astype(np.uint16)

    stack = Noise(z_um=[float(z) for z in range(-6, 7)])
    rows = HillClimb(starts=3)(0, stack, stack.defocus_um, range(13))
    assert len(rows) == 3
    assert all(r.predicted_um is None and r.reasons for r in rows)


def test_uneven_planes_are_not_replayed() -> None:
    search = HillClimb()
    stack = Memory(z_um=[-9.0, -4.0, 0.0, 1.0, 7.0])
    assert search(0, stack, stack.defocus_um, range(5)) == []
    assert search.skipped == 1


def test_the_grid_median_looks_at_blank_patches_too() -> None:
    """Three of four patches are blank, and a blank patch answers 9."""

    class Corner(Memory):
        def plane(self, k):
            image = np.full((128, 128), 20000, np.uint16)
            image[::64, ::64] = 30900
            image[:64, :64] = super().plane(k)[:64, :64]
            return image

    stack = Corner(side=128)
    model = knowing()
    found = evaluate(model, [stack], judges={"grid": grid_median(model)}, every={"grid": 2})
    assert found.to_json()["mae_um"] == pytest.approx(0, abs=1e-6)
    assert {r.predicted_um for r in found.baselines["grid"].rows} == {9.0}
    assert len(found.baselines["grid"].rows) == 6


# ------------------------------------------------------------------------------- command

MODEL = """
import numpy as np
from judged import card
def shifted(x):
    return np.rint(x[:, 0, 0, 0] * 65535 - 30000) / 100 + 0.2, np.full(len(x), 0.2)
shifted.card = card(training={"dataset": "learned"})
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    return "my_model:shifted"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        cli.main(["evaluate", *map(str, args)])
    out, err = capsys.readouterr()
    return int(e.value.code or 0), out, err


@pytest.fixture
def dataset(tmp_path: Path):
    stacks = [
        Memory(f"slide/{i}", CLASSES[i % 3], focus_um=0.1 * i, z_um=np.arange(-6.0, 7.0))
        for i in range(9)
    ]
    return write_dataset(tmp_path / "d", stacks)


def test_the_command_prints_one_document(model, dataset, capsys) -> None:
    code, out, err = run(capsys, model, dataset.path, "--json", "--limit", 3)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["n"], found["stacks"]) == (3 * 13, 3)
    assert found["mae_um"] == pytest.approx(0.2, abs=1e-6)
    assert set(found["dof_accuracy"]) == {"1", "1/2", "1/3"}
    assert set(found["by_sparsity"]) == {"dense", "sparse", "extremely_sparse"}
    assert set(found["baselines"]) == {"zero", "hill-climb", "grid-median"}
    assert found["part"] == "all"
    assert any("no split" in n for n in found["notes"])
    assert found["calibration"]["within"]["2"] == 1.0


def test_the_part_is_that_of_the_written_split(model, dataset, capsys) -> None:
    dataset.split(seed=1)
    found = json.loads(run(capsys, model, dataset.path, "--json", "--baseline", "none")[1])
    assert found["part"] == "test"
    names = {s.group for s in dataset.part("test")}
    assert {f["field"] for f in found["fields"]} == names
    assert found["baselines"] == {}
    every = json.loads(
        run(capsys, model, dataset.path, "--json", "--part", "all", "--baseline", "zero")[1]
    )
    assert every["stacks"] == 9
    code, _, err = run(capsys, model, dataset.path, "--part", "exam")
    assert code == 2
    assert "'exam' is no part" in err


def test_stacks_that_the_model_learned_from_are_flagged(model, tmp_path, capsys) -> None:
    learned = write_dataset(tmp_path / "learned", [Memory()])
    found = json.loads(run(capsys, model, learned.path, "--json", "--baseline", "none")[1])
    assert any("was trained on this dataset" in n for n in found["notes"])


def test_the_report_is_written_once(model, dataset, tmp_path, capsys) -> None:
    folder = tmp_path / "judged"
    args = (model, dataset.path, "-o", folder, "--limit", 3, "--baseline", "zero")
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert "0.20 ± 0.00" in out
    assert "3 of 9 stacks" in out
    assert {p.name for p in folder.iterdir()} == {
        "evaluation.json",
        "report.html",
        "regression.png",
        "error.png",
        "reliability.png",
    }
    document = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    assert (document["stacks"], document["n"]) == (3, 39)
    code, _, err = run(capsys, *args)
    assert code == 2
    assert "use --overwrite" in err
    assert run(capsys, *args, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("why", "args", "sentence"),
    [
        ("no such model", ("nothing.onnx", "{d}"), "nothing.onnx"),
        ("no such dataset", ("{m}", "nowhere"), "no such folder"),
        ("empty", ("{m}", "{empty}"), "the dataset is empty"),
        ("no labels", ("{m}", "{refused}"), "no labels"),
        ("bad limit", ("{m}", "{d}", "--limit", "0"), "--limit: 0 is not allowed"),
        ("no split", ("{m}", "{d}", "--part", "test"), "no split has been drawn"),
        ("bad baseline", ("{m}", "{d}", "--baseline", "guess"), "guess"),
        ("none of it", ("{m}", "{d}", "--baseline", "none", "--baseline", "zero"), "'none'"),
        ("no truth", ("{m}", "{d}", "--truth"), "has no truth"),
        ("no folder", ("{m}", "{d}", "-o", "a/b/c"), "no such folder"),
    ],
)
def test_bad_input_is_one_sentence(why, args, sentence, model, tmp_path, capsys) -> None:
    d = write_dataset(tmp_path / "d", [Memory()])
    empty = write_dataset(tmp_path / "empty", [])
    refused = write_dataset(tmp_path / "refused", [Memory()], label="refused")
    places = {"m": model, "d": d.path, "empty": empty.path, "refused": refused.path}
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *(str(a).format(**places) for a in args))
    assert (code, out) == (2, ""), why
    assert sentence in err
    assert err.count("\n") == 1
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == before
