"""A shadow predicts on every focus of another strategy, and changes nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mm_autofocus import run
from mm_autofocus.drive import drive
from mm_autofocus.errors import InputError
from mm_autofocus.hooks.pycromanager import autofocus_hook
from mm_autofocus.models.runtime import Prediction
from mm_autofocus.ometiff import read_record
from mm_autofocus.predictions import shadow_of, summary
from mm_autofocus.report import inspect_json, print_record, write_report
from mm_autofocus.settings import AutofocusSettings, parse_settings
from mm_autofocus.strategies.escalate import Escalate, build_strategy
from mm_autofocus.strategies.hill_climb import HillClimb
from mm_autofocus.strategies.one_shot import OneShot
from mm_autofocus.strategies.shadow import Shadow
from mm_autofocus.strategies.two_look import TwoLook
from mm_autofocus.types import FocusResult, FrameFormat, Look, Looking
from pymmcore_plus import CMMCorePlus
from rich.console import Console

import learned_rig
from focus_rig import FocusRig
from learned_rig import CodedRig, FakeModel, prediction, request


class Fixed:
    """Looks where it is told, and answers what it is told."""

    name = "fixed"

    def __init__(self, looks: list[float], result: FocusResult) -> None:
        self.looks, self.result = looks, result

    def focus(self, request: Any) -> Looking:
        for z_um in self.looks:
            look = yield z_um
            look.score = 1.0
        return self.result


def shadowed(
    looks: list[float], z_um: float | None, said: float | Prediction = 5.0, **card: Any
) -> tuple[CodedRig, FocusResult, dict[str, Any]]:
    status = "failed" if z_um is None else "ok"
    model = FakeModel(lambda _: said, **card)
    watcher = TwoLook(model=model) if len(model.card.looks_um) > 1 else OneShot(model=model)
    rig = CodedRig(z_um=looks[0])
    shadow = Shadow(Fixed(looks, FocusResult(z_um, status, 0.2, strategy="fixed")), watcher)
    result = drive(shadow, request(looks[0]), rig)
    return rig, result, result.details["shadow"]


COMPARED = {
    # z of the strategy in charge, what the model says, what is recorded
    "agrees": (1.2, 5.0, {"z_um": 1.0, "disagreement_um": -0.2, "same_way": True}),
    "the other way": (1.0, -3.0, {"z_um": 9.0, "disagreement_um": 8.0, "same_way": False}),
    "no way to go": (6.1, 5.0, {"z_um": 1.0, "disagreement_um": -5.1, "same_way": None}),
    "unsure": (1.0, prediction(5.0, 0.9), {"status": "low-confidence", "z_um": 1.0}),
    "doubtful": (
        1.0,
        prediction(5.0, 0.1, "patches disagree"),
        {"status": "low-confidence", "reason": "patches disagree"},
    ),
    "blank": (1.0, prediction(None, None, "blank"), {"status": "failed", "reason": "blank"}),
    "fails": (1.0, float("nan"), {"status": "failed"}),
    "only the other failed": (None, 5.0, {"status": "ok", "z_um": 1.0}),
}


@pytest.mark.parametrize("case", COMPARED)
def test_what_it_would_have_done_is_recorded(case: str) -> None:
    z_um, said, expected = COMPARED[case]
    rig, result, told = shadowed([6.0, 2.0, -1.0], z_um, said)
    assert rig.looks == [6.0, 2.0, -1.0]
    assert (result.z_um, result.strategy, result.looks) == (z_um, "fixed", 3)
    assert rig.z_um == (6.0 if z_um is None else z_um)
    assert result.curve == ((6.0, 1.0), (2.0, 1.0), (-1.0, 1.0))
    assert (told["model"], told["strategy"], told["z_look_um"]) == ("fake", "one-shot", 6.0)
    for key, value in expected.items():
        assert told[key] == (pytest.approx(value) if isinstance(value, float) else value)
    if z_um is None or told["z_um"] is None:
        assert "disagreement_um" not in told
    json.dumps(result.details, allow_nan=False)


PAIRS = {
    "first and second": ([6, 10, 3], [6, 10]),
    "found among others": ([6, 3, 0, 7.2], [3, 7.2]),
    "in falling order": ([6, 2], [2, 6]),
    "none": ([6, 4, 1], None),
}


@pytest.mark.parametrize("case", PAIRS)
def test_a_model_of_two_looks_is_shown_a_pair(case: str) -> None:
    looks, pair = PAIRS[case]
    _, _, told = shadowed([float(z) for z in looks], 1.0, 2.0, looks_um=(0.0, 4.0))
    if pair is None:
        assert (told["status"], told["reason"]) == (
            "no looks",
            "none of the looks stand at +0, +4 µm",
        )
        return
    base = (pair[0] + pair[1] - 4) / 2
    assert told["z_look_um"] == pytest.approx(base)
    assert told["z_um"] == pytest.approx(base - 2.0)


def test_the_strategy_in_charge_does_as_without_it() -> None:
    def focus(*, watched: bool) -> tuple[FocusRig, FocusResult]:
        rig = FocusRig(focus_um=3.0, seed=2)
        strategy: Any = HillClimb()
        if watched:
            strategy = Shadow(strategy, OneShot(model=FakeModel(lambda _: -3.0)))
        return rig, drive(strategy, request(), rig)

    (rig, result), (rig_2, result_2) = focus(watched=False), focus(watched=True)
    assert rig.visited == rig_2.visited
    assert result_2.details.pop("shadow")["disagreement_um"] == pytest.approx(
        3.0 - (result.z_um or 0)
    )
    assert result == result_2


def test_it_is_built_around_everything_else() -> None:
    settings = parse_settings(
        {
            "strategy": "one-shot",
            "model": "learned_rig:MODEL",
            "escalate": ["hill-climb"],
            "shadow": {},
        }
    )
    built = build_strategy(settings)
    assert isinstance(built, Shadow)
    assert isinstance(built.inner, Escalate)
    assert built.name == "one-shot"
    # and passes on what its strategy can: here nothing was answered yet
    built.prepare(FrameFormat((96, 96), "uint16", 65535.0))
    assert built.verify(Look(0.0, np.zeros((96, 96)), 1.0), request(), 0.0) is None
    assert Shadow(HillClimb(), built.watcher).verify(None, request(), 0.0) is None  # type: ignore[arg-type]
    inner = OneShot(model=FakeModel(lambda _: 0.4))
    verdict = Shadow(inner, built.watcher).verify(
        Look(1.0, np.zeros((96, 96)), 1.0), request(), 0.0
    )
    assert verdict is not None
    assert verdict.defocus_um == pytest.approx(0.4)


# ------------------------------------------------------------- in a run, and reported


@pytest.fixture
def watched(core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run of hill-climb with a shadow that errs by 0.5, -4, and not at all."""
    # each search begins where the plan says, and that is what the shadow is shown
    starts, errors = (8.0, -7.0, 5.0, 6.0), (0.5, -4.0, 0.0)
    said = iter([z + e for z, e in zip(starts, errors, strict=False)])

    def answer(_: Any) -> float | Prediction:
        return next(said, prediction(None, None, "blank: none of 9 patches carries content"))

    monkeypatch.setattr(learned_rig, "MODEL", FakeModel(answer, dof_um=1.5))
    file = tmp_path / "shadow.ome.tiff"
    plan = {
        "stage_positions": [
            {"x": 100.0 * k, "z": z, "name": f"p{k}"} for k, z in enumerate(starts)
        ],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {
            "mm_autofocus": {
                "range_um": 20.0,
                "prior": "none",
                "na": 0.75,  # with pixels of 0.5 µm a depth of field of 1.64 µm
                "shadow": {"strategy": "one-shot", "model": "learned_rig:MODEL"},
            }
        },
    }
    run(plan, core=core, output=file)
    return file


def test_a_lab_reads_whether_to_switch(watched: Path, tmp_path: Path) -> None:
    record = read_record(watched)
    told = [f.details["shadow"] for f in record.focus]
    assert [t["status"] for t in told] == ["ok", "ok", "ok", "failed"]
    assert [round(t["disagreement_um"], 1) for t in told[:3]] == pytest.approx(
        [-0.5, 4.0, 0.0], abs=0.6
    )
    found = shadow_of(record)
    assert found is not None
    assert (found.n, found.predicted, found.model) == (4, 3, "fake")
    gaps = sorted(abs(t["disagreement_um"]) for t in told[:3])
    assert found.mean_um == pytest.approx(sum(gaps) / 3)
    assert (found.within_dof, found.same_way) == (2, (3, 3))
    assert found.worst[0][0] == "p1"
    text = found.sentence()
    assert text.startswith("shadow: one-shot with fake: 3 of 4 predicted; ")
    assert "2 of 3 within 1.64 µm" in text
    assert inspect_json(record)["shadow"]["predicted"] == 3
    page = tmp_path / "report.html"
    write_report(watched, page)
    html = page.read_text(encoding="utf-8")
    assert "<h2>Shadow</h2>" in html
    assert text.removeprefix("shadow: ") in html
    console = Console(file=io.StringIO(), width=150)
    print_record(record, console)
    shown = console.file.getvalue()
    assert text in shown
    assert "shadow Δ" in shown


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (0.6, {"disagreement_um": -0.6, "z_um": 2.4, "status": "ok", "same_way": None}),
        (prediction(0.6, 0.1, "patches disagree"), {"status": "low-confidence"}),
        (prediction(None, None, "blank"), {"status": "failed", "z_um": None}),
    ],
)
def test_beside_the_hardware_it_sees_the_saved_frame(
    said: float | Prediction,
    expected: dict[str, Any],
    core: CMMCorePlus,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    model = FakeModel(lambda _: said)
    monkeypatch.setattr(learned_rig, "MODEL", model)
    snapped: list[float] = []
    snap = core.snapImage
    monkeypatch.setattr(
        core, "snapImage", lambda: (snapped.append(core.getZPosition()), snap())
    )
    monkeypatch.setattr(core, "fullFocus", lambda: core.setZPosition(3.0))
    file = tmp_path / "a.ome.tiff"
    plan = {
        "stage_positions": [{"z": 8.0}],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {
            "mm_autofocus": {
                "strategy": "hardware",
                "shadow": {"model": "learned_rig:MODEL"},
                "tolerance_um": 0.3,
            }
        },
    }
    result = run(plan, core=core, output=file)
    assert snapped == pytest.approx([3.0])
    (record,) = result.records
    assert (record["strategy"], record["status"], record["z_after_um"]) == ("hardware", "ok", 3)
    assert "verified" not in record
    assert model.warmed == [(512, 512)]
    (focus,) = read_record(file).focus
    for key, value in expected.items():
        told = focus.details["shadow"][key]
        assert told == (pytest.approx(value) if isinstance(value, float) else value)


REFUSED = {
    "two looks beside the hardware": (
        {
            "strategy": "hardware",
            "shadow": {"strategy": "two-look", "model": "learned_rig:TWO"},
        },
        "beside 'hardware' a model sees the saved frame alone, and 'fake' takes 2 looks",
    ),
    "a classic strategy": (
        {"strategy": "hardware", "shadow": {"strategy": "sweep"}},
        "shadow.strategy: 'sweep' is not a learned strategy",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_watch_the_hardware(
    case: str, core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, sentence = REFUSED[case]
    two = FakeModel(lambda _: 0.0, looks_um=(0.0, 4.0))
    monkeypatch.setattr(learned_rig, "TWO", two, raising=False)
    plan = {
        "stage_positions": [{"z": 8.0}],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {"mm_autofocus": settings},
    }
    with pytest.raises(InputError, match=sentence):
        run(plan, core=core)
    assert core.getZPosition() == 0.0


def test_the_hook_has_no_frame_for_a_shadow_of_the_hardware() -> None:
    with pytest.raises(InputError, match="a hook comes before it"):
        autofocus_hook({"strategy": "hardware", "shadow": {"model": "learned_rig:MODEL"}})


def test_without_a_shadow_there_is_no_summary() -> None:
    assert summary([], dof_um=1.0) is None
    assert AutofocusSettings().shadow is None
