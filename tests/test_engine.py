"""The engine on the real demo adapters: what the stock engine loses must arrive here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import useq
from mm_autofocus import AutofocusEngine, FocusFailedError, HardwareError, InputError
from mm_autofocus.plan import fresh
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.mda import MDAEngine

AF = {"range_um": 20.0, "z_min_um": -60.0, "z_max_um": 60.0}
# The demo beads are sharpest at z = 0 whatever the position.
NEAR_UM = 1.0


class StockWithSoftwareFocus(MDAEngine):
    """What one writes today: the stock engine with its autofocus call replaced."""

    def _execute_autofocus(self, action: useq.HardwareAutofocus) -> float:
        before = self.mmcore.getZPosition()
        self.mmcore.setZPosition(0.0)
        return -before


class Recorder:
    """Collects what a run does: frames, and every z sent to the stage or its sequence."""

    def __init__(self, core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.core = core
        self.frames: list[tuple[np.ndarray, useq.MDAEvent, dict[str, Any]]] = []
        self.sequences: list[tuple[float, ...]] = []
        load = core.loadStageSequence

        def spy(stage: str, zs: Any) -> None:
            self.sequences.append(tuple(zs))
            load(stage, zs)

        monkeypatch.setattr(core, "loadStageSequence", spy)
        core.mda.events.frameReady.connect(self._frame)

    def _frame(self, image: np.ndarray, event: useq.MDAEvent, meta: dict[str, Any]) -> None:
        self.frames.append((image, event, dict(meta)))

    def run(self, engine: MDAEngine, sequence: useq.MDASequence) -> list[float]:
        """Run, and return the z of each frame as the stage reported it."""
        self.frames.clear()
        self.core.mda.set_engine(engine)
        self.core.mda.run(sequence)
        return [meta["position"]["z"] for _, _, meta in self.frames if "position" in meta]


@pytest.fixture
def recorder(core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(core, monkeypatch)


def plan(
    *, settings: dict[str, Any] | None = AF, axes: str = "p", **kwargs: Any
) -> useq.MDASequence:
    kwargs.setdefault(
        "stage_positions", [{"x": 0, "y": 0, "z": 8.0}, {"x": 500, "y": 0, "z": -6.0}]
    )
    return useq.MDASequence(
        autofocus_plan={"axes": tuple(axes)} if axes else None,
        metadata={} if settings is None else {"mm_autofocus": settings},
        **kwargs,
    )


# ------------------------------------------------------------------ the main job


def test_each_position_is_focused(core: CMMCorePlus, recorder: Recorder) -> None:
    engine = AutofocusEngine(core, restore_initial_state=False)
    zs = recorder.run(engine, plan())
    assert len(zs) == 2
    assert np.abs(zs).max() <= NEAR_UM
    assert [r["status"] for r in engine.records] == ["ok", "ok"]
    assert all(r["looks"] <= 10 for r in engine.records)
    record = recorder.frames[1][2]["mm_autofocus"]
    assert record["focus_id"] == 1
    assert record["index"] == {"p": 1}
    # the second search begins at the plan's z, moved as the first tile was
    assert record["z_before_um"] == pytest.approx(-6 + (zs[0] - 8), abs=0.01)


@pytest.mark.parametrize(
    "kwargs, n_frames",
    [
        pytest.param({"z_plan": {"range": 4, "step": 2}}, 6, id="stepped z-stack"),
        pytest.param(
            {
                "channels": [{"config": "FITC"}, {"config": "DAPI", "z_offset": 1.5}],
                "z_plan": {"relative": [0]},
            },
            4,
            id="channels with z offset",
        ),
        pytest.param({"time_plan": {"interval": 0, "loops": 3}}, 6, id="time points"),
        pytest.param(
            {"time_plan": {"interval": 0, "loops": 2}, "axis_order": "ptcz"}, 4, id="p before t"
        ),
        pytest.param(
            {"grid_plan": {"rows": 1, "columns": 2}}, 4, id="one focus for the tiles of a grid"
        ),
    ],
)
def test_the_correction_reaches_every_later_event(
    core: CMMCorePlus, recorder: Recorder, kwargs: dict[str, Any], n_frames: int
) -> None:
    recorder.run(AutofocusEngine(core, restore_initial_state=False), plan(**kwargs))
    assert len(recorder.frames) == n_frames
    homes = {0: 8.0, 1: -6.0}
    for _, event, meta in recorder.frames:
        relative = event.z_pos - homes[event.index["p"]]
        assert meta["position"]["z"] == pytest.approx(relative, abs=NEAR_UM)


def test_hardware_sequenced_z_is_shifted_where_the_stock_engine_forgets(
    core: CMMCorePlus, recorder: Recorder
) -> None:
    core.setProperty("Z", "UseSequences", "Yes")
    sequence = plan(z_plan={"relative": [-2, 0, 2]})
    recorder.run(StockWithSoftwareFocus(core), sequence)
    assert recorder.sequences == [(6, 8, 10), (-8, -6, -4)]  # raw: focus is at 0
    recorder.sequences.clear()
    recorder.run(AutofocusEngine(core, restore_initial_state=False), sequence)
    assert len(recorder.sequences) == 2
    for zs in recorder.sequences:
        np.testing.assert_allclose(zs, (-2, 0, 2), atol=NEAR_UM)
    # and the record and the z travel with each frame
    _, _, meta = recorder.frames[2]
    assert meta["position"]["z"] == pytest.approx(2, abs=NEAR_UM)
    assert meta["mm_autofocus"]["status"] == "ok"


def test_hardware_sequences_never_span_two_corrections(
    core: CMMCorePlus, recorder: Recorder
) -> None:
    # z moves by position only; without autofocus at p the combiner would join all of them
    core.setProperty("Z", "UseSequences", "Yes")
    sequence = plan(
        axes="pt",
        stage_positions=[{"z": 8.0}, {"z": -6.0}],
        time_plan={"interval": 0, "loops": 4},
        settings={**AF, "every": 2},
    )
    zs = recorder.run(AutofocusEngine(core, restore_initial_state=False), sequence)
    assert not recorder.sequences
    assert np.abs(zs).max() <= NEAR_UM


# --------------------------------------------------------- the traps of the host


def test_the_same_plan_twice_focuses_twice(core: CMMCorePlus, recorder: Recorder) -> None:
    sequence = plan(stage_positions=[{"x": 0, "y": 0, "z": 8.0}])
    stock = StockWithSoftwareFocus(core)
    assert recorder.run(stock, sequence)[0] == pytest.approx(0)
    assert recorder.run(stock, sequence)[0] == pytest.approx(8)  # the trap: no second focus
    ours = AutofocusEngine(core, restore_initial_state=False)
    for _ in range(2):
        assert recorder.run(ours, sequence)[0] == pytest.approx(0, abs=NEAR_UM)


def test_listing_a_plan_before_the_run_costs_no_focus(
    core: CMMCorePlus, recorder: Recorder
) -> None:
    sequence = plan(stage_positions=[{"x": 0, "y": 0, "z": 8.0}])
    list(sequence)
    assert recorder.run(StockWithSoftwareFocus(core), sequence)[0] == pytest.approx(8)
    assert recorder.run(AutofocusEngine(core, restore_initial_state=False), sequence)[
        0
    ] == pytest.approx(0, abs=NEAR_UM)


def test_channels_outside_positions_do_not_multiply_the_focus(
    core: CMMCorePlus, recorder: Recorder
) -> None:
    sequence = plan(axis_order="tcpz", channels=["FITC", "DAPI"])
    stock_events = [e for e in fresh(sequence) if e.action.type == "hardware_autofocus"]
    assert len(stock_events) == 4  # the trap: once per channel
    engine = AutofocusEngine(core, restore_initial_state=False)
    zs = recorder.run(engine, sequence)
    assert len(engine.records) == 2
    assert len(zs) == 4
    assert np.abs(zs).max() <= NEAR_UM


def test_axes_with_c_focus_each_channel(core: CMMCorePlus, recorder: Recorder) -> None:
    engine = AutofocusEngine(core, restore_initial_state=False)
    recorder.run(engine, plan(axes="pc", channels=["FITC", "DAPI"]))
    assert len(engine.records) == 4


def test_the_channel_offset_does_not_leak_into_the_start(
    core: CMMCorePlus, recorder: Recorder
) -> None:
    sequence = plan(
        stage_positions=[{"x": 0, "y": 0, "z": 8.0}],
        channels=[{"config": "FITC", "z_offset": 5.0}],
        z_plan={"relative": [0]},
    )
    first = next(iter(fresh(sequence)))
    assert first.z_pos == 13.0  # the trap
    engine = AutofocusEngine(core, restore_initial_state=False)
    zs = recorder.run(engine, sequence)
    assert engine.records[0]["z_before_um"] == pytest.approx(8.0)
    assert zs[0] == pytest.approx(5.0, abs=NEAR_UM)


def test_a_relative_stack_without_a_position_z_stands_around_the_stage(
    core: CMMCorePlus, recorder: Recorder
) -> None:
    core.setZPosition(12.0)
    sequence = plan(stage_positions=[{"x": 0, "y": 0}], z_plan={"relative": [-1, 0, 1]})
    engine = AutofocusEngine(core, restore_initial_state=False)
    zs = recorder.run(engine, sequence)
    assert engine.records[0]["z_before_um"] == pytest.approx(12.0)  # useq would say 0
    np.testing.assert_allclose(zs, (-1, 0, 1), atol=NEAR_UM)


def test_positions_without_z_keep_their_own_focus(
    core: CMMCorePlus, recorder: Recorder
) -> None:
    core.setZPosition(7.0)
    sequence = plan(
        stage_positions=[{"x": 0, "y": 0}, {"x": 500, "y": 0}],
        time_plan={"interval": 0, "loops": 2},
        settings={**AF, "every": 2},
    )
    zs = recorder.run(AutofocusEngine(core, restore_initial_state=False), sequence)
    assert len(zs) == 4
    assert np.abs(zs).max() <= NEAR_UM


def test_focusing_only_the_first_position_is_warned_of(
    core: CMMCorePlus, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    engine = AutofocusEngine(core, restore_initial_state=False)
    recorder.run(engine, plan(axes="t", time_plan={"interval": 0, "loops": 2}))
    assert {r["index"]["p"] for r in engine.records} == {0}
    assert "use [t, p] to focus each" in caplog.text


REFUSED = {
    "axes p without positions": ({"stage_positions": []}, "no stage positions"),
    "no autofocus plan": ({"axes": ""}, "autofocus_plan: {axes: [p]}"),
    "unknown channel": ({"channels": ["FITK"]}, "did you mean 'FITC'?"),
    "unknown focus channel": ({"settings": {"channel": "GFP"}}, "'GFP' is not a channel"),
    "binning": ({"settings": {"binning": 3}}, "allowed: 1, 2, 4, 8"),
    "roi": ({"settings": {"roi": [0, 0, 600, 10]}}, "outside the image of 512 × 512"),
    "position outside": ({"settings": {"z_max_um": 5.0}}, "stage_positions[0]: z 8 µm"),
    "stack outside": (
        {"settings": {"z_min_um": -7.0}, "z_plan": {"range": 4, "step": 2}},
        "stage_positions[1]: z -6 µm is outside the limits -5",
    ),
    "stack larger than the limits": (
        {"settings": {"z_min_um": -1.0, "z_max_um": 1.0}, "z_plan": {"range": 4, "step": 2}},
        "does not fit",
    ),
    "offset on a device that is no stage": (
        {
            "settings": {"strategy": "hardware"},
            "axes": "",
            "autofocus_plan": {
                "axes": ("p",),
                "autofocus_device_name": "Autofocus",
                "autofocus_motor_offset": 10,
            },
        },
        "'Autofocus' is no stage",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_plans_are_refused_before_anything_moves(
    core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kwargs, sentence = REFUSED[case]
    kwargs = dict(kwargs)
    if "autofocus_plan" in kwargs:
        af = kwargs.pop("autofocus_plan")
        sequence = plan(**{**kwargs, "axes": "p"}).replace(autofocus_plan=af)
    else:
        sequence = plan(**kwargs)
    core.setZPosition(3.0)
    moves: list[str] = []
    for name in ("setPosition", "setZPosition", "setXYPosition", "snapImage", "setConfig"):
        monkeypatch.setattr(core, name, lambda *_, name=name: moves.append(name))
    core.mda.set_engine(AutofocusEngine(core, restore_initial_state=False))
    with pytest.raises(InputError) as e:
        core.mda.run(sequence)
    assert sentence in str(e.value)
    assert core.getZPosition() == 3.0
    assert not moves


def test_an_absolute_z_plan_at_one_position_is_refused(core: CMMCorePlus) -> None:
    # useq itself refuses only the plan's own z_plan
    sub = useq.MDASequence(z_plan={"absolute": [1, 2]})
    sequence = plan(stage_positions=[useq.Position(x=0, y=0, z=8, sequence=sub)])
    core.mda.set_engine(AutofocusEngine(core, restore_initial_state=False))
    with pytest.raises(InputError, match="absolute z"):
        core.mda.run(sequence)


# --------------------------------------------------------- without our metadata


def test_without_settings_it_is_the_stock_engine(make_core: Callable[..., CMMCorePlus]) -> None:
    sequence = plan(
        settings=None, channels=["FITC", "DAPI"], z_plan={"range": 2, "step": 1}, axes="p"
    )
    got = []
    for engine_class in (MDAEngine, AutofocusEngine):
        core = make_core("Color Test Pattern")
        core.setProperty("Camera", "PixelType", "32bitRGB")
        core.setProperty("Z", "UseSequences", "Yes")
        frames: list[Any] = []
        core.mda.events.frameReady.connect(lambda *a, frames=frames: frames.append(a))
        core.mda.set_engine(engine_class(core))
        core.mda.run(fresh(sequence))
        got.append(frames)
    assert len(got[0]) == len(got[1]) == 12
    for (image_a, event_a, meta_a), (image_b, event_b, meta_b) in zip(*got, strict=True):
        np.testing.assert_array_equal(image_a, image_b)
        assert event_a == event_b
        assert set(meta_a) == set(meta_b)
        timed = {"runner_time_ms", "camera_metadata", "images_remaining_in_buffer", "mda_event"}
        for key in set(meta_a) - timed:
            assert meta_a[key] == meta_b[key], key


# ------------------------------------------------------------- failure policies


def _blank(sequence_settings: dict[str, Any]) -> useq.MDASequence:
    return plan(
        settings={**AF, **sequence_settings},
        stage_positions=[{"x": 0, "y": 0, "z": 8.0}],
        z_plan={"relative": [0, 1]},
    )


def test_keep_saves_at_the_start_and_flags(
    make_core: Callable[..., CMMCorePlus], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core("Noise")
    recorder = Recorder(core, monkeypatch)
    zs = recorder.run(AutofocusEngine(core, restore_initial_state=False), _blank({}))
    assert zs == [8.0, 9.0]
    record = recorder.frames[0][2]["mm_autofocus"]
    assert record["status"] == "failed"
    assert record["z_um"] is None
    assert record["reason"]


def test_keep_goes_back_to_the_best_known_z(core: CMMCorePlus, recorder: Recorder) -> None:
    engine = AutofocusEngine(core, restore_initial_state=False)

    def blind_after_first(record: dict[str, Any]) -> None:
        core.setProperty("Camera", "Mode", "Noise")

    engine.signals.finished.connect(blind_after_first)
    zs = recorder.run(
        engine,
        plan(
            axes="pt",
            stage_positions=[{"x": 0, "y": 0, "z": 8.0}],
            time_plan={"interval": 0, "loops": 2},
        ),
    )
    assert [r["status"] for r in engine.records] == ["ok", "failed"]
    assert zs[1] == pytest.approx(zs[0], abs=1e-3)
    stale = recorder.frames[1][2]["mm_autofocus"]
    assert stale["status"] == "stale"
    assert stale["age_s"] > 0


def test_skip_takes_no_frames(
    make_core: Callable[..., CMMCorePlus], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core("Noise")
    recorder = Recorder(core, monkeypatch)
    recorder.run(
        AutofocusEngine(core, restore_initial_state=False), _blank({"on_failure": "skip"})
    )
    assert recorder.frames == []


def test_abort_ends_the_run(make_core: Callable[..., CMMCorePlus]) -> None:
    core = make_core("Noise")
    core.mda.set_engine(AutofocusEngine(core, restore_initial_state=False))
    with pytest.raises(FocusFailedError, match="p000: not focused"):
        core.mda.run(_blank({"on_failure": "abort"}))
    assert core.getZPosition() == 8.0


def test_pause_waits_for_the_operator_and_tries_again(
    make_core: Callable[..., CMMCorePlus], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core("Noise")
    recorder = Recorder(core, monkeypatch)
    engine = AutofocusEngine(core, restore_initial_state=False)
    paused: list[bool] = []
    core.mda.events.sequencePauseToggled.connect(paused.append)

    def operator() -> None:
        while not paused:
            time.sleep(0.01)
        core.setProperty("Camera", "Mode", "Fluorescent Beads")
        core.setZPosition(4.0)
        time.sleep(0.1)
        core.mda.set_paused(False)

    thread = threading.Thread(target=operator)
    thread.start()
    zs = recorder.run(engine, _blank({"on_failure": "pause"}))
    thread.join()
    assert paused == [True, False]
    assert [r["status"] for r in engine.records] == ["failed", "ok"]
    assert engine.records[1]["z_before_um"] == 4.0
    np.testing.assert_allclose(zs, (0, 1), atol=NEAR_UM)


# ----------------------------------------------------- between two looks, signals


def test_cancel_is_obeyed_between_two_looks(core: CMMCorePlus, recorder: Recorder) -> None:
    engine = AutofocusEngine(core, restore_initial_state=False)
    looks: list[float] = []

    def on_look(look: Any) -> None:
        looks.append(look.z_um)
        if len(looks) == 2:
            core.mda.cancel()

    engine.signals.look.connect(on_look)
    recorder.run(engine, plan())
    assert len(looks) == 2
    assert recorder.frames == []
    assert core.getZPosition() == pytest.approx(8.0)
    assert str(core.mda.status.finish_reason) == "canceled"


def test_pause_is_obeyed_between_two_looks(core: CMMCorePlus, recorder: Recorder) -> None:
    engine = AutofocusEngine(core, restore_initial_state=False)
    times: list[float] = []

    def on_look(_: Any) -> None:
        times.append(time.perf_counter())
        if len(times) == 1:
            core.mda.set_paused(True)
            threading.Timer(0.4, core.mda.set_paused, args=[False]).start()

    engine.signals.look.connect(on_look)
    zs = recorder.run(engine, plan())
    assert times[1] - times[0] >= 0.39
    assert len(zs) == 2


def test_signals_tell_the_search(core: CMMCorePlus, recorder: Recorder) -> None:
    engine = AutofocusEngine(core, restore_initial_state=False)
    told: list[str] = []
    engine.signals.started.connect(lambda index, request: told.append(f"start {index['p']}"))
    engine.signals.look.connect(lambda look: told.append("scored" if look.score else "?"))
    engine.signals.finished.connect(lambda record: told.append(record["status"]))
    recorder.run(engine, plan(stage_positions=[{"x": 0, "y": 0, "z": 8.0}]))
    looks = engine.records[0]["looks"]
    assert told == ["start 0", *["scored"] * looks, "ok"]


# ------------------------------------------------------------ camera and shutter


def _camera_state(core: CMMCorePlus) -> dict[str, Any]:
    return {
        "exposure": core.getExposure(),
        "binning": core.getProperty("Camera", "Binning"),
        "roi": list(core.getROI()),
        "channel": core.getCurrentConfig("Channel"),
        "shutter": core.getShutterOpen(),
        "auto": core.getAutoShutter(),
        "z": core.getZPosition(),
    }


OVERRIDES = {
    "channel and exposure": {"channel": "DAPI", "exposure_ms": 3.0},
    "binning": {"binning": 2},
    "roi": {"roi": [100, 100, 200, 128]},
    "binning and roi": {"binning": 2, "roi": [10, 10, 128, 128]},
    "crop": {"roi": [100, 100, 200, 128], "crop": True},
    "shutter for the sweep": {"shutter": "sweep"},
}


@pytest.mark.parametrize("case", OVERRIDES)
@pytest.mark.parametrize("fault", [False, True], ids=["", "camera fault"])
def test_the_camera_is_restored(
    core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch, case: str, fault: bool
) -> None:
    core.setConfig("Channel", "FITC")
    core.setExposure(2.0)
    core.setROI(32, 32, 400, 400)
    core.setZPosition(6.0)
    before = _camera_state(core)
    seen: list[tuple[Any, ...]] = []
    engine = AutofocusEngine(core, restore_initial_state=False)

    def on_look(look: Any) -> None:
        seen.append((look.image.shape, core.getExposure(), core.getCurrentConfig("Channel")))
        if fault and len(seen) == 2:

            def broken() -> None:
                raise RuntimeError("camera unplugged")

            monkeypatch.setattr(core, "snapImage", broken)

    engine.signals.look.connect(on_look)
    core.mda.set_engine(engine)
    sequence = plan(stage_positions=[{"x": 0, "y": 0}], settings={**AF, **OVERRIDES[case]})
    if fault:
        with pytest.raises(HardwareError, match="camera unplugged"):
            core.mda.run(sequence)
        assert _camera_state(core) == before
    else:
        core.mda.run(sequence)
        after = _camera_state(core)
        assert after.pop("z") == pytest.approx(0, abs=NEAR_UM)
        before.pop("z")
        assert after == before
    shape, exposure, channel = seen[0]
    expected = {
        "channel and exposure": ((400, 400), 3.0, "DAPI"),
        "binning": ((200, 200), 2.0, "FITC"),
        "roi": ((128, 200), 2.0, "FITC"),
        "binning and roi": ((128, 128), 2.0, "FITC"),
        "crop": ((128, 200), 2.0, "FITC"),
        "shutter for the sweep": ((400, 400), 2.0, "FITC"),
    }[case]
    assert (shape, exposure, channel) == expected


def test_the_next_frame_has_its_own_channel_after_looks_in_another(
    core: CMMCorePlus, recorder: Recorder
) -> None:
    # the core caches the last preset; looks in DAPI must not make it believe DAPI is set
    seen: list[str] = []
    core.mda.events.frameReady.connect(lambda *_: seen.append(core.getCurrentConfig("Channel")))
    recorder.run(
        AutofocusEngine(core, restore_initial_state=False),
        plan(channels=["DAPI", "FITC"], settings={**AF, "channel": "DAPI"}),
    )
    assert seen == ["DAPI", "FITC"] * 2


def test_live_mode_is_stopped_and_started_again(core: CMMCorePlus) -> None:
    from mm_autofocus import autofocus

    core.setZPosition(7.0)
    core.startContinuousSequenceAcquisition(0)
    result = autofocus(core, range_um=15.0)
    assert result.status == "ok"
    assert abs(core.getZPosition()) <= NEAR_UM
    assert core.isSequenceRunning()
    core.stopSequenceAcquisition()


# ------------------------------------------------------------- hardware autofocus


def test_the_hardware_autofocus_by_name(
    core: CMMCorePlus, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The demo's autofocus device moves nothing; a device that does is played here.
    monkeypatch.setattr(core, "fullFocus", lambda: core.setZPosition(core.getZPosition() - 3))
    engine = AutofocusEngine(core, restore_initial_state=False)
    zs = recorder.run(
        engine, plan(settings={"strategy": "hardware"}, z_plan={"relative": [0, 1]})
    )
    assert zs == [5.0, 6.0, -12.0, -11.0]
    assert {r["strategy"] for r in engine.records} == {"hardware"}


def test_a_failing_hardware_autofocus_escalates(
    core: CMMCorePlus, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no lock")

    monkeypatch.setattr(core, "fullFocus", broken)
    engine = AutofocusEngine(core, restore_initial_state=False)
    settings = {**AF, "strategy": "hardware", "escalate": ["hill-climb"]}
    zs = recorder.run(engine, plan(settings=settings))
    assert np.abs(zs).max() <= NEAR_UM
    assert {r["strategy"] for r in engine.records} == {"hill-climb"}


def test_a_hardware_autofocus_outside_the_limits_fails_and_comes_back(
    core: CMMCorePlus, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "fullFocus", lambda: core.setZPosition(500.0))
    engine = AutofocusEngine(core, restore_initial_state=False)
    zs = recorder.run(engine, plan(settings={"strategy": "hardware"}))
    assert zs == [8.0, -6.0]
    assert {r["status"] for r in engine.records} == {"failed"}


def test_continuous_focus_is_switched_on_again_though_the_setup_fails(
    core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the demo's autofocus device has no continuous focus; one that has is played here
    switched: list[bool] = []
    monkeypatch.setattr(core, "isContinuousFocusEnabled", lambda: True)
    monkeypatch.setattr(core, "enableContinuousFocus", switched.append)

    class Full:
        def setup(self, *_: Any, **__: Any) -> None:
            raise HardwareError("the disk is full")

        def close(self) -> None: ...

    core.mda.set_engine(AutofocusEngine(core, sink=Full()))  # type: ignore[arg-type]
    with pytest.raises(HardwareError, match="the disk is full"):
        core.mda.run(plan())
    assert switched == [False, True]
