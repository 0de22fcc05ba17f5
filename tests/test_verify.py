"""The first frame of a tile proves its focus, on the real demo adapters: kept, or taken again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import useq
from mm_autofocus import AutofocusEngine, HardwareError, InputError, run
from mm_autofocus.config import close_core, open_core
from mm_autofocus.hooks.ledger import Ledger, Place
from mm_autofocus.models.runtime import Prediction
from mm_autofocus.ometiff import read_plane, read_record
from mm_autofocus.settings import AutofocusSettings
from pymmcore_plus import CMMCorePlus

import learned_rig
from learned_rig import FakeModel, prediction

FOCUS_UM = 2.0
SETTINGS = {
    "strategy": "one-shot",
    "model": "learned_rig:MODEL",
    "tolerance_um": 0.5,
    "repeatability_um": 0.0,
    "z_min_um": -60.0,
    "z_max_um": 60.0,
}


class Scope:
    """The demo adapters, and a model that knows where the stage stands.

    `errors` are added to its answers one after the other; afterwards it tells the truth.
    """

    def __init__(self, core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.core = core
        self.errors: list[float | Prediction | Exception] = []
        self.model = FakeModel(self.answer)
        self.frames: list[tuple[np.ndarray, useq.MDAEvent, dict[str, Any]]] = []
        self.snapped: list[float] = []
        self.lit: list[bool] = []
        monkeypatch.setattr(learned_rig, "MODEL", self.model)
        snap = core.snapImage

        def spy() -> None:
            self.snapped.append(round(core.getZPosition(), 3))
            self.lit.append(core.getAutoShutter() or core.getShutterOpen())
            snap()

        monkeypatch.setattr(core, "snapImage", spy)
        core.mda.events.frameReady.connect(self._frame)

    def _frame(self, image: np.ndarray, event: useq.MDAEvent, meta: dict[str, Any]) -> None:
        self.frames.append((image, event, dict(meta)))

    def answer(self, _: Any) -> float | Prediction:
        said = self.errors.pop(0) if self.errors else 0.0
        if isinstance(said, Exception):
            raise said
        if isinstance(said, Prediction):
            return said
        return float(self.core.getZPosition()) - FOCUS_UM + said

    def run(self, settings: dict[str, Any] | None = None, **plan: Any) -> AutofocusEngine:
        plan.setdefault("stage_positions", [{"x": 0, "y": 0, "z": 8.0}])
        plan.setdefault("autofocus_plan", {"axes": ("p",)})
        sequence = useq.MDASequence(
            metadata={"mm_autofocus": SETTINGS | (settings or {})}, **plan
        )
        engine = AutofocusEngine(self.core, restore_initial_state=False)
        self.core.mda.set_engine(engine)
        self.core.mda.run(sequence)
        return engine

    @property
    def z(self) -> list[float]:
        """Where the frames were taken that came out."""
        return [round(meta["position"]["z"], 3) for _, _, meta in self.frames]


@pytest.fixture
def make_slide() -> Iterator[Callable[[], CMMCorePlus]]:
    cores: list[CMMCorePlus] = []

    def make() -> CMMCorePlus:
        cores.append(open_core("virtual_slide.cfg"))
        cores[-1].setProperty("Camera", "sensor", "256x256")
        cores[-1].setProperty("Optics", "quality", "preview")
        return cores[-1]

    yield make
    for core in cores:
        close_core(core)


@pytest.fixture
def scope(core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scope]:
    yield Scope(core, monkeypatch)


def kept(scope: Scope, n: int = 0) -> int:
    """Which of the images that the model was shown came out as frame number `n`."""
    image = scope.frames[n][0]
    same = [k for k, looks in enumerate(scope.model.seen) if np.array_equal(looks[0], image)]
    assert len(same) == 1
    return same[0]


# ------------------------------------------------------------------ one frame

CASES: dict[str, tuple[dict[str, Any], list[Any], list[float], float, int, dict[str, Any]]] = {
    # settings, errors of the answers, z of the exposures, z kept, which was kept, the record
    "in focus at once": (
        {},
        [],
        [8, 2],
        2,
        1,
        {"verified": True, "corrections": 0, "status": "ok", "expected_error_um": 0.1},
    ),
    "off within the tolerance": (
        {},
        [0.4, 0.0],
        [8, 1.6],
        1.6,
        1,
        {"verified": True, "corrections": 0, "status": "ok"},
    ),
    "corrected": (
        {},
        [3.0, 0.0],
        [8, -1, 2],
        2,
        2,
        {"verified": True, "corrections": 1, "status": "ok", "z_after_um": 2, "z_um": 2},
    ),
    "the second frame is worse": (
        {},
        [1.0, 2.0, 0.0],
        [8, 1, 0],
        1,
        1,
        {"verified": False, "corrections": 1, "status": "low-confidence", "z_after_um": 1},
    ),
    "corrected twice": (
        {"max_corrections": 3},
        [5.0, -3.0, 0.2, 0.0],
        [8, -3, 5, 1.8],
        1.8,
        3,
        {"verified": True, "corrections": 2, "status": "ok", "z_after_um": 1.8},
    ),
    "as often as allowed": (
        {"max_corrections": 1},
        [5.0, -3.0, 0.0],
        [8, -3, 5],
        5,
        2,
        {"verified": False, "corrections": 1, "status": "low-confidence", "z_after_um": 5},
    ),
    "only looked at": (
        {"max_corrections": 0},
        [5.0, 0.0],
        [8, -3],
        -3,
        1,
        {"verified": False, "corrections": 0, "status": "low-confidence", "z_after_um": -3},
    ),
    "a doubtful answer moves nothing": (
        {},
        [3.0, prediction(9.0, 0.1, "patches disagree")],
        [8, -1],
        -1,
        1,
        {"verified": False, "corrections": 0, "status": "ok", "z_after_um": -1},
    ),
    "a model that fails costs no frame": (
        {},
        [0.0, RuntimeError("out of memory")],
        [8, 2],
        2,
        1,
        {"verified": False, "corrections": 0, "status": "ok"},
    ),
    "a worse answer about the second frame": (
        {},
        [3.0, 0.0, prediction(None, None, "blank")],
        [8, -1, 2],
        -1,
        1,
        {"verified": False, "corrections": 1, "z_after_um": -1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_better_frame_is_kept(case: str, scope: Scope) -> None:
    settings, errors, exposures, z_um, which, expected = CASES[case]
    scope.errors = list(errors)
    engine = scope.run(settings)
    assert scope.snapped == pytest.approx(exposures, abs=0.01)
    assert scope.z == pytest.approx([z_um], abs=0.01)
    assert kept(scope) == which
    (record,) = engine.records
    assert {k: record[k] for k in expected} == {
        k: pytest.approx(v, abs=0.01) if isinstance(v, float | int) else v
        for k, v in expected.items()
    }
    told = record["details"]["verification"]
    assert len(told["frames"]) == expected["corrections"] + 1
    assert told["kept"] == which - 1
    # what came out with the frame is the same record
    assert scope.frames[0][2]["mm_autofocus"]["verified"] == expected["verified"]


def test_a_doubt_of_the_search_is_lifted_by_the_frame(scope: Scope) -> None:
    scope.errors = [prediction(6.2, 0.6)]  # the other answers err by 0.1
    engine = scope.run({"max_looks": 3, "tolerance_um": 0.5})
    # the search itself looked again, nearer; without that the frame would have to tell
    assert scope.snapped == pytest.approx([8, 1.8, 2], abs=0.01)
    assert engine.records[0]["status"] == "ok"
    scope.snapped.clear()
    scope.errors = [prediction(0.7, 0.6), -0.1]
    engine = scope.run({"tolerance_um": 0.5}, stage_positions=[{"z": 2.8}])
    assert scope.snapped == pytest.approx([2.8, 2.1], abs=0.01)
    (record,) = engine.records
    assert (record["status"], record["reason"], record["verified"]) == ("ok", "", True)
    before = record["details"]["verification"]["before"]
    assert before["status"] == "low-confidence"
    assert "larger than the tolerance" in before["reason"]


def test_without_verify_no_frame_is_looked_at(scope: Scope) -> None:
    scope.errors = [3.0]
    engine = scope.run({"verify": False})
    assert scope.snapped == pytest.approx([8, -1], abs=0.01)
    assert "verified" not in engine.records[0]
    assert len(scope.model.seen) == 1


def test_a_classic_strategy_is_not_verified(scope: Scope) -> None:
    engine = scope.run({"strategy": "hill-climb", "range_um": 20})
    assert "verified" not in engine.records[0]
    assert scope.model.seen == []


def test_a_failed_focus_is_not_verified(scope: Scope) -> None:
    scope.errors = [prediction(None, None, "blank: none of 9 patches carries content")]
    engine = scope.run()
    assert scope.snapped == pytest.approx([8, 8], abs=0.01)
    assert engine.records[0]["status"] == "failed"
    assert len(scope.model.seen) == 1


def test_listeners_are_told(core: CMMCorePlus, scope: Scope) -> None:
    scope.errors = [3.0]
    told: list[tuple[str, Any]] = []

    def listen(engine: AutofocusEngine) -> None:
        engine.signals.finished.connect(
            lambda r: told.append(("finished", round(r["z_after_um"], 2)))
        )
        engine.signals.verified.connect(
            lambda r: told.append(("verified", round(r["z_after_um"], 2)))
        )

    result = run(
        {
            "stage_positions": [{"z": 8.0}],
            "autofocus_plan": {"axes": ["p"]},
            "metadata": {"mm_autofocus": SETTINGS},
        },
        core=core,
        on_engine=listen,
    )
    assert told == [("finished", -1.0), ("verified", 2.0)]
    # one look, the frame, and the frame again
    assert (result.frames, result.exposures) == (1, 3)
    entry = result.to_json()["autofocus"][0]
    assert (entry["verified"], entry["corrections"]) == (True, 1)


# --------------------------------------------------------- what follows the frame


def test_later_frames_and_later_tiles_follow(scope: Scope) -> None:
    scope.errors = [3.0]
    engine = scope.run(
        stage_positions=[{"z": 8.0}, {"z": 8.0}],
        channels=["FITC", "DAPI"],
        time_plan={"interval": 0, "loops": 2},
        settings={"every": 2},
    )
    assert scope.z == pytest.approx([2] * 8, abs=0.01)
    # the second tile begins where the first one was left, after its correction
    assert [r["z_before_um"] for r in engine.records] == pytest.approx([8, 2], abs=0.01)
    assert [r["corrections"] for r in engine.records] == [1, 0]


def test_a_z_stack_is_judged_by_its_first_plane(scope: Scope) -> None:
    scope.errors = [3.0]
    scope.run(z_plan={"relative": [-2, 0, 2]})
    # first at -3 instead of 0: corrected by 3, and the planes after it, too
    assert scope.snapped == pytest.approx([8, -3, 0, 2, 4], abs=0.01)
    assert scope.z == pytest.approx([0, 2, 4], abs=0.01)


def test_a_correction_stays_within_the_limits(scope: Scope) -> None:
    scope.errors = [-3.0]
    engine = scope.run({"z_min_um": 4.0, "range_um": 20})
    # focus is at 2, which may not be reached: the frame says so
    assert scope.snapped == pytest.approx([8, 5, 4], abs=0.01)
    (record,) = engine.records
    assert (record["verified"], record["status"]) == (False, "low-confidence")
    assert record["reason"] == "by its frame, the tile is +2 µm out of focus"
    assert record["z_after_um"] == pytest.approx(4)


def test_the_frame_is_approached_from_the_side_that_is_set(
    core: CMMCorePlus, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[float] = []
    move = core.setPosition
    monkeypatch.setattr(core, "setPosition", lambda *a: (sent.append(a[-1]), move(*a))[1])
    scope.errors = [-3.0]
    scope.run({"backlash_um": 1.0})
    # from 5 down to 2, coming from below
    assert sent[-2:] == pytest.approx([1, 2], abs=0.01)


def test_the_light_is_on_for_every_exposure(scope: Scope) -> None:
    scope.errors = [3.0]
    scope.run(keep_shutter_open_across=("z",), z_plan={"relative": [0, 1]})
    assert len(scope.lit) == 4
    assert all(scope.lit)
    # the second of two positions comes with the shutter open, and closes it itself
    scope.lit.clear()
    scope.errors = [0.0, 0.0, 3.0]
    scope.run(
        keep_shutter_open_across=("p",),
        stage_positions=[{"z": 8.0}, {"z": 8.0}],
    )
    assert len(scope.lit) == 5
    assert all(scope.lit)


# --------------------------------------------------------------- what is not judged


def test_hardware_sequences_are_left_alone(
    core: CMMCorePlus, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.setProperty("Z", "UseSequences", "Yes")
    loaded: list[tuple[float, ...]] = []
    load = core.loadStageSequence
    monkeypatch.setattr(
        core, "loadStageSequence", lambda s, z: (loaded.append(tuple(z)), load(s, z))[1]
    )
    scope.errors = [3.0]
    engine = scope.run(z_plan={"relative": [-2, 0, 2]})
    assert loaded == [pytest.approx((-3, -1, 1), abs=0.01)]
    assert len(scope.frames) == 3
    assert len(scope.model.seen) == 1
    (record,) = engine.records
    assert record["verified"] is None
    assert "hardware-sequenced" in record["details"]["verification"]["why_not"]


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        pytest.param({"channel": "DAPI"}, "the looks were in 'DAPI'", id="channel"),
        pytest.param({"binning": 2}, "binned otherwise", id="binning"),
    ],
)
def test_frames_unlike_the_looks_are_not_judged(
    settings: dict[str, Any], why: str, scope: Scope
) -> None:
    scope.errors = [3.0]
    engine = scope.run(settings, channels=["FITC"])
    assert scope.snapped == pytest.approx([8, -1], abs=0.01)
    (record,) = engine.records
    assert record["verified"] is None
    assert why in record["details"]["verification"]["why_not"]


@pytest.mark.parametrize("crop", [True, False])
def test_the_part_that_the_looks_show_is_judged(crop: bool, scope: Scope) -> None:
    scope.run({"roi": [64, 32, 128, 96], "crop": crop})
    look, judged = (seen[0] for seen in scope.model.seen)
    assert look.shape == judged.shape == (96, 128)
    image = scope.frames[0][0]
    assert image.shape == (512, 512)
    np.testing.assert_array_equal(judged, image[32:128, 64:192])


# --------------------------------------------------------------------------- faults


def test_a_cancel_between_two_exposures_keeps_the_first(
    core: CMMCorePlus, scope: Scope
) -> None:
    def cancel(_: Any) -> float:
        if len(scope.model.seen) == 2:
            core.mda.cancel()
            return 3.0
        return 6.0

    scope.model.answer = cancel
    scope.run(stage_positions=[{"z": 8.0}, {"z": 8.0}])
    assert scope.snapped == pytest.approx([8, 2], abs=0.01)
    assert scope.z == pytest.approx([2], abs=0.01)


@pytest.mark.parametrize("what", ["stage", "camera"])
def test_a_fault_at_the_second_exposure_does_not_cost_the_first(
    what: str,
    core: CMMCorePlus,
    scope: Scope,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    scope.errors = [3.0]
    broken = {"stage": "setPosition", "camera": "snapImage"}[what]
    works: Callable[..., Any] = getattr(core, broken)
    answer = scope.model.answer

    def breaks(*_: Any) -> None:
        raise RuntimeError("gone")

    def then_break(images: Any) -> Any:
        if len(scope.model.seen) == 2:
            monkeypatch.setattr(core, broken, breaks)
        return answer(images)

    scope.model.answer = then_break
    file = tmp_path / "a.ome.tiff"
    plan = {
        "stage_positions": [{"z": 8.0}],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {"mm_autofocus": SETTINGS},
    }
    if what == "stage":
        with pytest.raises(HardwareError, match=r"gone.*1 frames are saved"):
            run(plan, core=core, output=file)
    else:  # the stock engine goes on without a frame, and we with the first
        assert run(plan, core=core, output=file).missing == 0
    monkeypatch.setattr(core, broken, works)
    record = read_record(file)
    assert record.frames == 1
    np.testing.assert_array_equal(read_plane(file, 0, 0, 0, 0), scope.model.seen[1][0])
    assert record.focus[0].record["verified"] is False


def test_the_file_holds_the_frame_that_was_kept(
    core: CMMCorePlus, scope: Scope, tmp_path: Path
) -> None:
    scope.errors = [3.0]
    file = tmp_path / "a.ome.tiff"
    plan = {
        "stage_positions": [{"z": 8.0}, {"z": 7.0}],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {"mm_autofocus": SETTINGS},
    }
    run(plan, core=core, output=file)
    record = read_record(file)
    assert record.frames == 2
    # looks, first frame, and what was taken after the correction
    np.testing.assert_array_equal(read_plane(file, 0, 0, 0, 0), scope.model.seen[2][0])
    assert record.images[0].planes[0, 0, 0].z_um == pytest.approx(FOCUS_UM, abs=0.01)
    first, second = record.focus
    assert (first.record["verified"], first.record["corrections"]) == (True, 1)
    assert (second.record["verified"], second.record["corrections"]) == (True, 0)
    assert first.z_after_um == pytest.approx(FOCUS_UM, abs=0.01)
    assert first.record["details"]["model"] == "fake"


# ---------------------------------------------------------- before anything moves


def test_a_model_that_does_not_fit_is_refused_before_the_run(scope: Scope) -> None:
    learned_rig.MODEL = FakeModel(lambda _: 0.0, pixel_size_um=0.1)
    plan = {
        "stage_positions": [{"z": 8.0}],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {"mm_autofocus": SETTINGS},
    }
    with pytest.raises(InputError, match=r"pixel size 0\.5 µm, the model takes 0\.1 µm"):
        run(plan, core=scope.core)
    assert scope.snapped == []
    assert scope.core.getZPosition() == 0.0


def test_the_model_is_warmed_before_the_run(core: CMMCorePlus, scope: Scope) -> None:
    scope.run()
    assert scope.model.warmed == [(512, 512)]
    scope.run({"roi": [0, 0, 128, 96]})
    scope.run({"binning": 2})
    core.setProperty("Camera", "Binning", "2")
    scope.run({"binning": 1})
    assert scope.model.warmed[1:] == [(96, 128), (256, 256), (512, 512)]


def test_a_run_begins_where_the_stage_comes_to_rest(
    make_slide: Callable[[], CMMCorePlus], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_slide()
    at: list[float] = []
    model = FakeModel(lambda _: at.append(core.getZPosition()) or 0.0, channels=3, patch_px=128)
    monkeypatch.setattr(learned_rig, "MODEL", model)
    core.setZPosition(9.0)  # and does not wait: it is still on its way
    plan = {
        "stage_positions": [{"x": -1000.0, "y": -1000.0}],
        "autofocus_plan": {"axes": ["p"]},
        "metadata": {"mm_autofocus": SETTINGS},
    }
    (record,) = run(plan, core=core).records
    # the look, and the frame that proves it
    assert at == pytest.approx([9.0, 9.0], abs=0.02)
    assert (record["verified"], record["z_after_um"]) == (True, pytest.approx(9.0, abs=0.02))


def test_a_place_that_was_never_focused_is_taken_at_its_home() -> None:
    ledger = Ledger(AutofocusSettings(), 3.0)
    assert ledger.focus_um(Place({"p": 1}, None)) == 3.0
    assert ledger.focus_um(Place({"p": 1}, 5.0)) == 5.0
