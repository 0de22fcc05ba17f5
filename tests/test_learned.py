"""Learned strategies by the loop that moves Z, with models of which every answer is known."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from mm_autofocus import cli
from mm_autofocus.drive import drive
from mm_autofocus.errors import InputError
from mm_autofocus.replay import replay
from mm_autofocus.settings import AutofocusSettings, parse_settings
from mm_autofocus.strategies.escalate import Escalate, build_strategy
from mm_autofocus.strategies.hill_climb import HillClimb
from mm_autofocus.strategies.learned import Learned, error_of_frame
from mm_autofocus.strategies.one_shot import OneShot
from mm_autofocus.strategies.two_look import TwoLook
from mm_autofocus.types import FocusResult, FrameFormat, Look, Optics

import learned_rig
from learned_rig import CodedRig, FakeModel, coded_model, frame, prediction, request

TWO = {"looks_um": (0.0, 4.0)}


def two(backlash_um: float = 0.0, **kwargs: Any) -> TwoLook:
    settings = AutofocusSettings(backlash_um=backlash_um)
    return TwoLook(settings, model=coded_model(**({"looks_um": (0.0, 4.0)} | kwargs)))


def one(**kwargs: Any) -> OneShot:
    return OneShot(model=coded_model(**kwargs))


def run(strategy: Learned, rig: CodedRig, **fields: Any) -> FocusResult:
    backlash_um = fields.pop("backlash_um", 0.0)
    return drive(strategy, request(rig.z_um, **fields), rig, backlash_um=backlash_um)


# ------------------------------------------------------------------ one look, one move


@pytest.mark.parametrize("start_um", [-15.0, -0.4, 3.0, 12.0])
def test_one_look_and_one_move(start_um: float) -> None:
    rig = CodedRig(focus_um=0.0, z_um=start_um)
    result = run(one(), rig)
    assert (result.status, result.reason, result.strategy) == ("ok", "", "one-shot")
    assert (result.looks, result.moves) == (1, 1)
    assert rig.looks == [start_um]
    assert rig.z_um == pytest.approx(0.0, abs=0.01)
    assert result.expected_error_um == pytest.approx(0.1, abs=0.01)
    assert result.details["model"] == "coded"
    (told,) = result.details["predictions"]
    assert told["defocus_um"] == pytest.approx(start_um, abs=0.01)
    assert (told["content"], told["patches"], told["reasons"]) == (9, 9, [])


def test_the_stage_is_part_of_the_expected_error() -> None:
    result = run(one(sd=0.12), CodedRig(z_um=5.0), z_sd_um=0.16)
    assert result.expected_error_um == pytest.approx(0.2, abs=0.01)
    assert result.status == "ok"


def test_an_offset_of_the_only_look_counts() -> None:
    rig = CodedRig(focus_um=2.0, z_um=5.0)
    # the net tells the defocus of the present z, three below the look
    result = run(one(change=lambda d: d - 3, looks_um=(3.0,)), rig)
    assert rig.looks == [8.0]
    assert result.z_um == pytest.approx(2.0, abs=0.01)


# ------------------------------------------------------ several looks, one approach

APPROACHES = {
    # backlash, offsets, looks, moves
    "upwards": (0.0, (0.0, 4.0), [6, 10], [10, 0]),
    "from below": (1.0, (0.0, 4.0), [6, 10], [10, -1, 0]),
    "from above": (-1.0, (0.0, 4.0), [10, 6], [11, 10, 6, 0]),
    "card in falling order": (0.0, (4.0, 0.0), [6, 10], [10, 0]),
    "around the present z": (1.0, (-3.0, 0.0, 3.0), [3, 6, 9], [2, 3, 6, 9, -1, 0]),
}


@pytest.mark.parametrize("case", APPROACHES)
def test_looks_are_taken_without_reversing(case: str) -> None:
    backlash_um, offsets, looks, moves = APPROACHES[case]
    # the answer is that of the present z, whatever the first look of the card is
    rig = CodedRig(focus_um=0.0, z_um=6.0)
    strategy = two(backlash_um, change=lambda d: d - offsets[0], looks_um=offsets)
    result = run(strategy, rig, backlash_um=backlash_um)
    assert result.status == "ok"
    assert rig.looks == looks
    assert rig.moves == pytest.approx(moves, abs=0.01)
    assert (result.looks, result.moves) == (len(looks), len(moves))
    assert result.z_um == pytest.approx(0.0, abs=0.01)


LIMITS = {
    # z_min, z_max, looks
    "room above": (-30, 10, [6, 10]),
    "no room above: both further down": (-30, 9, [5, 9]),
    "just room": (5, 9, [5, 9]),
}


@pytest.mark.parametrize("case", LIMITS)
def test_looks_stay_within_the_limits(case: str) -> None:
    low, high, looks = LIMITS[case]
    rig = CodedRig(focus_um=6.5, z_um=6.0)
    result = run(two(), rig, z_min_um=low, z_max_um=high)
    assert rig.looks == looks
    assert (result.status, result.z_um) == ("ok", pytest.approx(6.5, abs=0.01))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        pytest.param(
            {"z_min_um": 5, "z_max_um": 8}, "no room for looks at +0, +4", id="limits"
        ),
        pytest.param({"max_looks": 1}, "max_looks: 1 are fewer than", id="budget"),
    ],
)
def test_no_room_is_a_failure_before_anything_moves(fields: dict[str, Any], why: str) -> None:
    rig = CodedRig(z_um=6.0)
    result = run(two(), rig, **fields)
    assert (result.status, result.z_um, result.looks) == ("failed", None, 0)
    assert why in result.reason
    assert rig.moves == rig.looks == []


def test_a_stage_that_cannot_keep_the_distance_is_doubted() -> None:
    rig = CodedRig(focus_um=0.0, z_um=6.0, grain_um=3.0)
    result = run(two(), rig)
    assert rig.looks == [6, 9]
    assert result.status == "low-confidence"
    assert "the looks are 3 µm apart, the model is used to 4 µm" in result.reason


# ------------------------------------------------------------- when it is not sure

BLANK = np.zeros((96, 96))


def test_a_blank_field_fails_and_the_stage_goes_back() -> None:
    rig = CodedRig(z_um=6.0, texture=BLANK)
    result = run(two(), rig)
    assert (result.status, result.z_um) == ("failed", None)
    assert result.reason == "blank: none of 9 patches carries content"
    assert (rig.z_um, result.looks) == (6.0, 2)
    assert result.details["predictions"][0]["sparsity"] == "blank"


def test_beyond_the_trained_range_it_goes_there_and_looks_again() -> None:
    rig = CodedRig(focus_um=0.0, z_um=28.0)
    result = run(one(), rig)
    assert rig.looks == pytest.approx([28, 8], abs=0.01)
    assert (result.status, result.looks, result.moves) == ("ok", 2, 2)
    assert rig.z_um == pytest.approx(0.0, abs=0.01)
    first, second = result.details["predictions"]
    assert "beyond the trained range" in first["reasons"][0]
    assert second["reasons"] == []


def test_it_does_not_follow_for_ever() -> None:
    # always 25 µm above focus, wherever it stands
    rig = CodedRig(z_um=0.0)
    result = run(one(change=lambda d: 0 * d + 25), rig, z_min_um=-200)
    assert rig.looks == pytest.approx([0, -20, -40])
    assert result.status == "low-confidence"
    assert "beyond the trained range" in result.reason


def test_a_budget_of_one_look_is_kept() -> None:
    rig = CodedRig(focus_um=0.0, z_um=28.0)
    result = run(one(), rig, max_looks=1)
    assert (result.looks, result.status) == (1, "low-confidence")
    assert rig.z_um == pytest.approx(8.0, abs=0.01)


def test_far_away_and_unsure_it_looks_again_nearer() -> None:
    # errs by a tenth of the way, and knows it
    strategy = one(sd=lambda d: 0.05 + np.abs(d) / 10, change=lambda d: 0.9 * d)
    rig = CodedRig(focus_um=0.0, z_um=10.0)
    result = run(strategy, rig)
    assert rig.looks == pytest.approx([10, 1], abs=0.01)
    assert (result.status, result.looks) == ("ok", 2)
    assert rig.z_um == pytest.approx(0.1, abs=0.01)


def test_near_focus_and_unsure_another_look_is_of_no_use() -> None:
    rig = CodedRig(focus_um=0.0, z_um=0.5)
    result = run(one(sd=0.4), rig)
    assert (result.looks, result.status) == (1, "low-confidence")
    assert result.reason == (
        "the expected error of 0.400 µm is larger than the tolerance of 0.326 µm"
    )
    assert rig.z_um == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        pytest.param({"tolerance_um": 0.5}, "ok", id="of the request"),
        pytest.param({"optics": Optics()}, "low-confidence", id="of the card"),
    ],
)
def test_whose_tolerance(fields: dict[str, Any], status: str) -> None:
    result = run(one(sd=0.4, dof_um=0.9), CodedRig(z_um=0.5), **fields)
    assert result.status == status


def test_patches_that_disagree_are_doubted() -> None:
    strategy = one(change=lambda d: np.where(np.arange(len(d)) % 2, 3.0, -3.0))
    result = run(strategy, CodedRig(z_um=0.0))
    assert result.status == "low-confidence"
    assert "patches disagree" in result.reason


OUTSIDE = {
    # focus, where it goes, status
    "within": (-8.0, -8.0, "ok"),
    "beyond the limit": (-12.0, -10.0, "low-confidence"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_focus_beyond_the_limits_is_not_followed(case: str) -> None:
    focus_um, z_um, status = OUTSIDE[case]
    rig = CodedRig(focus_um=focus_um, z_um=0.0)
    result = run(one(), rig, z_min_um=-10)
    assert (rig.z_um, result.status) == (pytest.approx(z_um, abs=0.01), status)
    if status != "ok":
        assert "focus is expected at -12 µm, beyond the limit of the search" in result.reason
        assert result.expected_error_um == pytest.approx(2.0, abs=0.02)


def boom(_: Any) -> float:
    raise RuntimeError("cuda fell over\nand more")


ANSWERS = {
    # what the model says, status, reason, looks
    "foreign frame": (
        lambda _: prediction(12.0, 0.1, "frame unlike the training data: x", ood=1.7),
        "low-confidence",
        "frame unlike the training data: x",
        1,
    ),
    "no number": (lambda _: float("nan"), "failed", "the model's prediction is no number", 1),
    "raises": (boom, "failed", "the model failed: cuda fell over", 1),
    "no error": (
        lambda _: prediction(3.0, None),
        "low-confidence",
        "the model does not tell its error",
        1,
    ),
    "error is no number": (
        lambda _: prediction(3.0, float("inf")),
        "low-confidence",
        "the model does not tell its error",
        1,
    ),
    "nothing, and no reason": (lambda _: prediction(None), "failed", "blank", 1),
    "beyond, and no reason": (
        lambda _: prediction(50.0),
        "low-confidence",
        "prediction beyond the trained range of -20 … 20 µm",
        2,  # then the limit is reached
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_a_model_may_say(case: str) -> None:
    answer, status, reason, looks = ANSWERS[case]
    rig = CodedRig(z_um=0.0)
    result = run(OneShot(model=FakeModel(answer)), rig, z_min_um=-20)
    assert (result.status, result.looks) == (status, looks)
    assert reason in result.reason
    assert result.found == (status != "failed")
    if status == "failed":
        assert rig.z_um == 0.0


def test_nothing_where_focus_was_expected_is_a_failure() -> None:
    said = iter([prediction(9.0, 2.0), prediction(None, None, "blank")])
    rig = CodedRig(z_um=0.0)
    result = run(OneShot(model=FakeModel(lambda _: next(said))), rig)
    assert (result.status, result.reason) == ("failed", "at -9 µm: blank")
    assert rig.z_um == 0.0


def test_the_model_is_told_what_the_camera_and_the_optics_are() -> None:
    model = FakeModel(lambda _: 1.0)
    run(OneShot(model=model), CodedRig(), optics=Optics(pixel_size_um=0.3))
    assert model.asked == [{"max_value": 65535.0, "pixel_size_um": 0.3}]
    assert model.seen[0][0].shape == (96, 96)


# -------------------------------------------------------------- with other strategies


@pytest.mark.parametrize(
    ("sd", "status", "tried"),
    [(0.1, "ok", ["one-shot"]), (0.6, "low-confidence", ["one-shot", "hill-climb"])],
)
def test_it_escalates_when_it_is_not_sure(sd: float, status: str, tried: list[str]) -> None:
    strategy = Escalate([(one(sd=sd), None), (HillClimb(), None)])
    stack = np.stack([frame(z - 12.0) for z in range(25)])
    settings = AutofocusSettings(na=0.75)
    result = replay(stack, strategy, settings=settings, step_um=1.0, start_um=12.0)
    # frames that differ by their level alone have no focus curve: the first answer stands
    assert (result.strategy, result.status) == ("one-shot", status)
    assert (result.looks > 1) == (len(tried) > 1)
    assert [t["strategy"] for t in result.details["tried"]] == tried
    # and whoever answered judges the frame
    verdict = strategy.verify(Look(0.0, frame(0.0), 65535.0), request(), 0.0)
    assert verdict is not None and verdict.defocus_um == pytest.approx(0.0, abs=0.01)


def test_a_recorded_stack_is_replayed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_rig, "MODEL", coded_model(), raising=True)
    settings = parse_settings(
        {"strategy": "one-shot", "model": "learned_rig:MODEL", "na": 0.75}
    )
    stack = np.stack([frame(z - 9.3) for z in range(25)])
    result = replay(stack, settings=settings, step_um=1.0, start_um=15.0)
    assert (result.status, result.looks) == ("ok", 1)
    assert result.z_um == pytest.approx(9.3, abs=0.01)
    settings = parse_settings({"escalate": ["one-shot"], "model": "learned_rig:MODEL"})
    built = build_strategy(settings)
    assert isinstance(built, Escalate)
    assert [s.name for s, _ in built.steps] == ["hill-climb", "one-shot"]


def test_the_command_replays_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def replayed(planes: np.ndarray) -> int:
        tifffile.imwrite(tmp_path / "a.tif", planes, photometric="minisblack")
        command = ["replay", str(tmp_path / "a.tif"), "--strategy", "one-shot", "--json"]
        options = ["--step-um", "1", "--start-um", "3", "--set", "model=learned_rig:MODEL"]
        with pytest.raises(SystemExit) as e:
            cli.main([*command, *options])
        return int(e.value.code or 0)

    monkeypatch.setattr(learned_rig, "MODEL", coded_model())
    assert replayed(np.stack([frame(z - 9.3) for z in range(25)])) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["looks"], row["moves"], row["status"]) == (1, 1, "ok")
    assert row["z_um"] == pytest.approx(9.3, abs=0.01)
    assert row["details"]["predictions"][0]["defocus_um"] == pytest.approx(-6.3, abs=0.01)
    # frames that the model cannot be shown are the user's mistake, not a failed search
    assert replayed(np.zeros((5, 20, 20), np.uint16)) == 2
    assert "less than one patch" in capsys.readouterr().err


# ---------------------------------------------------- what is refused before the run

REFUSED = {
    "unknown model": ({"strategy": "one-shot", "model": "sparsefocuss"}, "'sparsefocuss' is"),
    "one look for two-look": (
        {"strategy": "two-look", "model": "learned_rig:MODEL"},
        "'fake' takes 1 look; strategy 'two-look' needs a model of two or more, strategy "
        "'one-shot' takes this one",
    ),
    "in a step": (
        {"escalate": [{"strategy": "two-look", "model": "learned_rig:MODEL"}]},
        "'fake' takes 1 look;",
    ),
    "in the shadow": (
        {"shadow": {"strategy": "two-look", "model": "learned_rig:MODEL"}},
        "'fake' takes 1 look;",
    ),
    "a classic shadow": (
        {"shadow": {"strategy": "sweep"}},
        "shadow.strategy: 'sweep' is not a learned strategy",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_when_it_is_built(case: str) -> None:
    data, sentence = REFUSED[case]
    with pytest.raises(InputError) as e:
        build_strategy(parse_settings(data))
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)


FORMATS = {
    "fits": ((64, 64), 65535.0, 0.325, ""),
    "RGB": ((64, 64, 3), 255.0, 0.325, "the frame is RGB, the model takes grey frames"),
    "bits": ((64, 64), 4095.0, 0.325, "frames of 12 bits are not allowed"),
    "pixel size": (
        (64, 64),
        65535.0,
        0.65,
        "pixel size 0.65 µm, the model takes 0.325 µm ± 10",
    ),
    "too small": ((16, 64), 65535.0, 0.325, "is less than one patch of 32"),
}


@pytest.mark.parametrize("case", FORMATS)
def test_a_camera_that_does_not_fit_is_refused(case: str) -> None:
    shape, max_value, pixel_size_um, sentence = FORMATS[case]
    model = FakeModel(lambda _: 0.0, pixel_size_um=0.325, bit_depths=(8, 16))
    frames = FrameFormat(shape, "uint16", max_value, Optics(pixel_size_um=pixel_size_um))
    strategy = Escalate([(HillClimb(), None), (OneShot(model=model), None)])
    if not sentence:
        strategy.prepare(frames)
        assert model.warmed == [(64, 64)]
        return
    with pytest.raises(InputError, match=sentence):
        strategy.prepare(frames)
    assert model.warmed == []


def test_another_objective_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    strategy = OneShot(model=FakeModel(lambda _: 0.0, na=0.75))
    with caplog.at_level(logging.WARNING):
        strategy.prepare(FrameFormat((64, 64), "uint8", 255.0, Optics(na=0.4)))
    assert "model 'fake': NA 0.4, trained at 0.75" in caplog.text


# ------------------------------------------------------------------ judging a frame

JUDGED = {
    # z of the frame, planned offset, defocus beyond it, good, off
    "in focus": (0.0, 0.0, 0.0, True, False),
    "within the tolerance": (0.3, 0.0, 0.3, True, False),
    "off": (-0.8, 0.0, -0.8, False, True),
    "where the plan wants it": (3.0, 3.0, 0.0, True, False),
    "off within a stack": (3.0, 2.0, 1.0, False, True),
}


@pytest.mark.parametrize("case", JUDGED)
def test_a_frame_is_judged(case: str) -> None:
    z_um, offset_um, defocus_um, good, off = JUDGED[case]
    verdict = one().verify(Look(z_um, frame(z_um), 65535.0), request(), offset_um)
    assert verdict is not None
    assert verdict.defocus_um == pytest.approx(defocus_um, abs=0.01)
    assert (verdict.good, verdict.off) == (good, off)


def test_a_frame_that_cannot_be_judged() -> None:
    blank = one().verify(Look(0.0, frame(0.0, BLANK), 65535.0), request(), 0.0)
    assert blank is not None
    assert (blank.good, blank.off, blank.defocus_um) == (False, False, None)
    assert "blank" in blank.reason
    # an error as large as the defocus is no reason to move
    unsure = one(sd=1.0).verify(Look(0.8, frame(0.8), 65535.0), request(), 0.0)
    assert unsure is not None
    assert (unsure.good, unsure.off) == (False, False)
    assert two().verify(Look(0.0, frame(0.0), 65535.0), request(), 0.0) is None


@pytest.mark.parametrize(
    ("before", "defocus", "error", "expected"),
    [
        (0.3, 0.0, 0.3, 0.3),
        (0.3, 0.4, 0.3, np.hypot(0.2, 0.3)),
        (0.6, 0.3, 0.2, np.hypot(0.27, 0.2)),
        (None, 0.3, 0.4, 0.5),
        (0.3, 0.2, None, 0.3),
        (0.0, 0.2, 0.0, 0.2),
    ],
)
def test_expected_error_of_a_frame(
    before: float | None, defocus: float, error: float | None, expected: float
) -> None:
    assert error_of_frame(before, defocus, error) == pytest.approx(expected)
