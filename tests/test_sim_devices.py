"""The virtual microscope in a core: what its devices do, and how they fail."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import useq
from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.sim import keep_pixel_size, microscope, truth
from mm_autofocus.sim.microscope import OBJECTIVES
from pymmcore_plus import CMMCorePlus
from pymmcore_plus.experimental.unicore import UniMMCore

CFG = Path(__file__).parent.parent / "demo_config" / "virtual_slide.cfg"
Make = Callable[..., UniMMCore]


@pytest.fixture
def make_scope() -> Iterator[Make]:
    """Opens cores on the virtual microscope, small and fast, and closes them."""
    cores: list[UniMMCore] = []

    def make(**properties: object) -> UniMMCore:
        core = UniMMCore()
        cores.append(core)
        core.loadSystemConfiguration(CFG)
        core.setProperty("Camera", "sensor", "256x256")
        core.setProperty("Optics", "quality", "preview")
        for key, value in properties.items():
            device, name = key.split("__")
            core.setProperty(device, name, value)
        return core

    yield make
    for core in cores:
        core.mda.cancel()
        core.stopSequenceAcquisition()
        core.unloadAllDevices()
        # Its callback thread may else outlive the interpreter and abort the process.
        super(CMMCorePlus, core).registerCallback(None)


@pytest.fixture
def core(make_scope: Make) -> UniMMCore:
    return make_scope()


def look(core, z):
    core.setPosition(z)
    core.waitForDevice("Z")
    return core.snap()


# --- the camera ---


def test_the_configuration_gives_a_colour_frame_and_a_pixel_size(core):
    image = core.snap()
    assert image.shape == (256, 256, 3)
    assert image.dtype == np.uint8
    assert core.getNumberOfComponents() == 3
    assert core.getPixelSizeUm() == 0.325
    assert 60 < image.mean() < 240


@pytest.mark.parametrize("sensor", ["512x512", "1024x1024", "2016x2016"])
def test_sizes(core, sensor):
    core.setProperty("Camera", "sensor", sensor)
    n = int(sensor.split("x")[0])
    assert (core.getImageHeight(), core.getImageWidth()) == (n, n)
    if n == 512:
        assert core.snap().shape == (n, n, 3)


@pytest.mark.parametrize(
    ("pixels", "dtype", "top"),
    [("Mono8", "u1", 255), ("Mono12", "u2", 4095), ("Mono16", "u2", 65535)],
)
def test_grey_cameras(core, pixels, dtype, top):
    core.setProperty("Camera", "pixel_format", pixels)
    image = core.snap()
    assert image.shape == (256, 256)
    assert image.dtype == np.dtype(dtype)
    assert 0.3 * top < image.mean() < top


def test_binning_and_roi_show_the_same_specimen(make_scope):
    core = make_scope(Camera__dust=0, Z__repeatability_um=0, Camera__full_well_e=1e6)
    whole = core.snap().astype(float)
    core.setProperty("Camera", "Binning", "2")
    assert core.getPixelSizeUm() == 0.65
    binned = core.snap().astype(float)
    assert binned.shape == (128, 128, 3)
    mean = whole.reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
    assert np.abs(binned - mean).mean() < 4
    core.setProperty("Camera", "Binning", 1)
    core.setROI(100, 40, 96, 64)
    assert core.getROI() == [100, 40, 96, 64]
    part = core.snap().astype(float)
    assert part.shape == (64, 96, 3)
    assert np.abs(part - whole[40:104, 100:196]).mean() < 3
    core.clearROI()
    assert core.snap().shape == (256, 256, 3)
    with pytest.raises(InputError, match="roi"):
        core.setROI(200, 0, 100, 100)


def test_light_follows_exposure_lamp_and_shutter(core):
    def mean():
        return core.snap().astype(float).mean()

    full = mean()
    dark = 255 * 0.008
    core.setExposure(2.5)
    assert mean() - dark == pytest.approx(0.5 * (full - dark), rel=0.03)
    core.setProperty("Lamp", "intensity", 100)
    assert mean() == pytest.approx(full, rel=0.03)
    core.setAutoShutter(False)
    assert mean() < 5  # nobody opened the shutter
    core.setShutterOpen(True)
    assert core.getShutterOpen()
    assert mean() == pytest.approx(full, rel=0.03)
    core.setShutterOpen(False)
    assert mean() < 5
    core.setAutoShutter(True)
    assert mean() == pytest.approx(full, rel=0.03)
    assert not core.getShutterOpen()


def test_the_same_looks_give_the_same_frames(make_scope):
    def run():
        core = make_scope()
        frames = [look(core, z) for z in (0, 3, -2)]
        core.setXYPosition(400, 250)
        core.waitForSystem()
        return [*frames, look(core, 1)]

    for a, b in zip(run(), run(), strict=True):
        assert np.array_equal(a, b)


def test_fluorescence_is_seen_through_its_filter(make_scope):
    core = make_scope(
        Slide__kind="cells", Camera__pixel_format="Mono16", Optics__quality="standard"
    )
    core.setConfig("Channel", "DAPI")
    core.setExposure(60)
    core.waitForSystem()
    nuclei = look(core, -0.4).astype(float)
    assert core.getCurrentConfig("Channel") == "DAPI"
    assert nuclei.max() > 5 * np.median(nuclei)
    assert look(core, 9).astype(float).std() < 0.8 * nuclei.std()


# --- live, sequences, plans ---


def test_live_mode_runs_beside_the_stages_and_stops(core):
    core.startContinuousSequenceAcquisition()
    deadline = time.monotonic() + 20
    while core.getRemainingImageCount() < 3 and time.monotonic() < deadline:
        core.setPosition(1.0)
        core.getPosition()
        time.sleep(0.01)
    assert core.isSequenceRunning()
    assert core.getLastImage().mean() > 60  # the automatic shutter is open meanwhile
    core.stopSequenceAcquisition()
    assert not core.isSequenceRunning()
    assert core.snap().mean() > 60


def test_a_sequence_gives_its_frames(core):
    core.startSequenceAcquisition(4, 0, True)
    deadline = time.monotonic() + 20
    while core.isSequenceRunning() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert core.getRemainingImageCount() == 4
    assert core.popNextImage().shape == (256, 256, 3)


def test_a_hardware_sequence_steps_z_with_each_frame(make_scope):
    core = make_scope(Z__sequence_length=10, Z__repeatability_um=0, Z__backlash_um=0)
    assert core.isStageSequenceable("Z")
    core.loadStageSequence("Z", [-2.0, 0.0, 2.0])
    core.startStageSequence("Z")
    core.startSequenceAcquisition(3, 0, True)
    while core.isSequenceRunning():
        time.sleep(0.01)
    core.stopStageSequence("Z")
    z = [e.z_um for e in list(truth.microscope_of(core).exposures)[-3:]]
    assert z == pytest.approx([-2, 0, 2], abs=0.01)


def test_a_plan_with_a_hardware_sequenced_stack_has_its_heights(make_scope):
    core = make_scope(Z__sequence_length=64, Z__repeatability_um=0, Z__backlash_um=0)
    core.mda.engine.use_hardware_sequencing = True
    scope = truth.microscope_of(core)
    plan = useq.MDASequence(
        stage_positions=[(0, 0, 10)], channels=["Brightfield"], z_plan={"range": 4, "step": 1}
    )
    core.mda.run(plan)
    z = [e.z_um for e in scope.exposures]
    assert z == pytest.approx([8, 9, 10, 11, 12], abs=0.02)
    assert all(e.light for e in scope.exposures)


def test_a_plan_runs_on_the_stock_engine(core):
    seen = []
    core.mda.events.frameReady.connect(
        lambda image, event: seen.append((event.z_pos, image.mean()))
    )
    plan = useq.MDASequence(
        stage_positions=[(0, 0, 0), (300, 0, 0)],
        channels=["Brightfield"],
        z_plan={"range": 4, "step": 2},
    )
    core.mda.run(plan)
    assert [z for z, _ in seen] == [-2, 0, 2] * 2
    assert all(mean > 60 for _, mean in seen)


# --- stages ---


def test_z_says_where_the_motor_is_and_truth_where_the_stage_is(make_scope):
    core = make_scope(Z__repeatability_um=0.15, Z__backlash_um=0.5)
    scope = truth.microscope_of(core)
    errors = []
    for k in range(12):
        core.setPosition(float(k % 3))
        core.waitForDevice("Z")
        assert core.getPosition() == k % 3
        errors.append(scope.true_z_um() - k % 3)
    assert 0.05 < np.std(errors) < 0.6
    with pytest.raises(HardwareError, match="limits of travel"):
        core.setPosition(1000)
    assert core.getPosition() == 2


def test_a_look_that_does_not_wait_sees_the_stage_where_it_is(core):
    core.setPosition(100)
    assert core.deviceBusy("Z") in (False, True)
    core.setPosition(0)
    core.waitForDevice("Z")
    core.setPosition(100)
    core.snap()
    assert truth.microscope_of(core).exposures[-1].z_um < 50


def test_time_passes_without_waiting_and_real_time_takes_it(core):
    core.setProperty("Z", "speed_um_s", 1.0)
    start, before = time.monotonic(), core.getProperty("Slide", "clock_s")
    core.setPosition(60)
    core.waitForDevice("Z")
    assert core.getProperty("Slide", "clock_s") - before == pytest.approx(60, abs=0.1)
    assert time.monotonic() - start < 10
    core.setProperty("Z", "speed_um_s", 100.0)
    core.setProperty("Slide", "time", "real")
    start = time.monotonic()
    core.setPosition(50)
    assert core.deviceBusy("Z")
    core.waitForDevice("Z")
    assert time.monotonic() - start >= 0.1
    core.setProperty("Slide", "time", "accelerated")


def test_drift_moves_the_stage_and_not_its_reading(make_scope):
    core = make_scope(Z__drift_um_h=10, Z__repeatability_um=0)
    scope = truth.microscope_of(core)
    core.setPosition(1)
    core.waitForDevice("Z")
    before = scope.true_z_um()
    scope.clock.spend(1800)
    assert scope.true_z_um() - before == pytest.approx(5)
    assert core.getPosition() == 1


def test_the_xy_stage_moves_over_the_slide(core):
    here = core.snap()
    core.setXYPosition(500, -300)
    core.waitForDevice("XY")
    assert core.getXYPosition() == (500, -300)
    assert np.abs(core.snap().astype(int) - here).mean() > 5
    with pytest.raises(HardwareError, match="limits of travel"):
        core.setXYPosition(0, 1e6)


def test_objectives_change_pixel_aperture_and_focus(core):
    keep_pixel_size(core)
    scope = truth.microscope_of(core)
    for label, pixel in (("10x/0.30", 0.65), ("40x/0.95", 0.1625), ("20x/0.75", 0.325)):
        core.setStateLabel("Objective", label)
        core.waitForDevice("Objective")
        assert core.getPixelSizeUm() == pytest.approx(pixel)
        assert core.getPixelSizeAffine()[0] == pytest.approx(pixel)
        assert core.getProperty("Objective", "pixel_size_um") == pixel
        assert core.snap().shape == (256, 256, 3)
        assert truth.present_view(scope).pitch_um == pixel
        height = scope.slide.height_at(0, 0) + OBJECTIVES[label].parfocal_um
        assert truth.geometric_focus_um(scope, 0, 0) == pytest.approx(height)


def test_the_hardware_focus_holds_an_offset_follows_the_slide_and_can_lose_it(make_scope):
    core = make_scope(Slide__tilt_x_um_per_mm=20, Slide__wave_um=0, Z__drift_um_h=100)
    scope = truth.microscope_of(core)
    core.setPosition("FocusLock", 1.5)
    core.setProperty("FocusLock", "continuous", 1)
    assert core.getProperty("FocusLock", "lock") == "locked"
    for x in (0.0, 500.0):
        core.setXYPosition(x, 0)
        core.waitForSystem()
        scope.clock.spend(600)
        true_x = scope.true_xy_um()[0]
        assert scope.true_z_um() == pytest.approx(0.02 * true_x + 1.5, abs=0.01)
    core.setProperty("FocusLock", "lose", 1)
    assert core.getProperty("FocusLock", "lock") == "lost"
    core.setProperty("FocusLock", "continuous", 1)
    assert core.getProperty("FocusLock", "continuous") == 0
    core.setProperty("FocusLock", "lose", 0)
    core.setPosition("Z", 150)
    core.waitForDevice("Z")
    core.setProperty("FocusLock", "continuous", 1)
    assert core.getProperty("FocusLock", "lock") == "off"  # too far from the glass


# --- truth ---


def test_truth_has_the_sign_of_the_house(make_scope):
    core = make_scope(Z__repeatability_um=0, Z__backlash_um=0, Z__drift_um_h=0)
    scope = truth.microscope_of(core)
    best = truth.measured_focus_um(scope)
    assert best == pytest.approx(truth.geometric_focus_um(scope), abs=1.5)
    core.setPosition(best + 3)
    core.waitForDevice("Z")
    assert truth.defocus_um(scope) == pytest.approx(3, abs=0.01)
    core.snap()
    assert truth.defocus_um(scope, scope.exposures[-1]) == pytest.approx(3, abs=0.01)
    z = best + np.array([-1.0, 0.0, 1.0])
    low, middle, high = truth.focus_curve(scope, z)
    assert middle > max(low, high)


def test_the_measured_truth_is_where_looks_are_sharpest(make_scope):
    core = make_scope(Z__repeatability_um=0, Z__backlash_um=0, Camera__dust=0)
    best = truth.measured_focus_um(truth.microscope_of(core))
    z = best + np.arange(-3, 3.1, 0.5)
    sharp = [
        float(np.mean((g[:, 2:] - g[:, :-2]) ** 2))
        for g in (truth.luminance(look(core, v).astype(np.float32)) for v in z)
    ]
    assert abs(z[int(np.argmax(sharp))] - best) <= 0.5


def searched_everywhere(scope, view) -> float:
    """Focus by the measure at all 49 heights within ± 4 depths of field."""
    grid = view.dof_um / 6
    z = truth.geometric_focus_um(scope, view=view) + grid * np.arange(-24, 25)
    curve = truth.focus_curve(scope, z, view=view)
    k = int(np.clip(curve.argmax(), 1, 47))
    a, b, c = curve[k - 1 : k + 2]
    return z[k] + grid * 0.5 * (a - c) / (a - 2 * b + c)


@pytest.mark.parametrize("kind", ["tissue", "smear"])
@pytest.mark.parametrize("sparsity", ["dense", "sparse"])
def test_the_measured_truth_is_that_of_a_search_everywhere(make_scope, kind, sparsity):
    scope = truth.microscope_of(make_scope(Slide__kind=kind))
    side = 256 * 0.325
    ((x, y),) = scope.slide.find_fields(sparsity, 1, (side, side))
    view = scope.view(x, y)
    found = truth.measured_focus_um(scope, view=view)
    assert found == pytest.approx(searched_everywhere(scope, view), abs=1e-9)


@pytest.mark.parametrize("offset_dof", [-3.9, -2.5, -2.0, -0.7, 0.0, 0.4, 1.9, 2.1, 3.6])
def test_a_peak_far_from_the_geometric_focus_is_found_with_few_images(
    make_scope, monkeypatch, offset_dof
):
    scope = truth.microscope_of(make_scope())
    view = truth.present_view(scope)
    middle, looks = truth.geometric_focus_um(scope, view=view), []

    def curve(scope, z_um, *, view, measure):
        looks.extend(z_um)
        # as narrow as a focus curve is: half the height at one depth of field
        return 2.0 ** -(((z_um - middle) / view.dof_um - offset_dof) ** 2)

    monkeypatch.setattr(truth, "focus_curve", curve)
    monkeypatch.setattr(truth, "_found", {})
    found = truth.measured_focus_um(scope, view=view)
    assert truth.measured_focus_um(scope, view=view) == found  # without a further image
    assert found == pytest.approx(middle + offset_dof * view.dof_um, abs=0.01)
    # beyond 5/3 the end of the first range, at 2, is the best of it
    assert len(looks) == len(set(looks)) <= (11 if abs(offset_dof) < 5 / 3 else 17)


def test_a_blank_field_has_no_focus_by_measure(core):
    scope = truth.microscope_of(core)
    x, y = scope.slide.find_fields("blank", 1, (200.0, 200.0), start=(1500.0, 1300.0))[0]
    core.setXYPosition(x, y)
    core.waitForSystem()
    assert truth.measured_focus_um(scope) is None
    assert truth.defocus_um(scope) is None
    assert math.isfinite(truth.defocus_um(scope, by="geometry"))


def test_truth_needs_a_virtual_microscope():
    with pytest.raises(InputError, match="0 virtual microscopes"):
        truth.microscope_of(object())


# --- cores beside each other ---


def test_cores_do_not_interfere_and_leave_nothing_behind(make_scope):
    one, two = make_scope(), make_scope(Slide__seed=2)
    a, b = truth.microscope_of(one), truth.microscope_of(two)
    assert a is not b
    one.setPosition(5)
    one.waitForDevice("Z")
    assert two.getPosition() == 0
    assert one.getProperty("Slide", "seed") == 1
    frames = []
    threads = [
        threading.Thread(target=lambda c=c: frames.append([c.snap().mean() for _ in range(3)]))
        for c in (one, two)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(frames) == 2
    before = len(microscope._microscopes)
    one.unloadAllDevices()
    assert len(microscope._microscopes) == before - 1
    one.loadSystemConfiguration(CFG)
    assert truth.microscope_of(one) is not a
    assert one.getPosition() == 0


# --- faults ---


def arm(core, device, kind, **settings):
    for name, value in settings.items():
        core.setProperty(device, f"fault_{name}", value)
    core.setProperty(device, "fault", kind)


ACTIONS = {
    "Camera": lambda c: c.snapImage(),
    "Z": lambda c: c.setPosition(1.0),
    "XY": lambda c: c.setXYPosition(1.0, 1.0),
    "Shutter": lambda c: c.setShutterOpen(True),
    "Lamp": lambda c: c.setProperty("Lamp", "intensity", 20),
    "Objective": lambda c: c.setState("Objective", 0),
    "Filter": lambda c: c.setState("Filter", 1),
    "FocusLock": lambda c: c.setProperty("FocusLock", "continuous", 1),
}


@pytest.mark.parametrize("device", ACTIONS)
def test_any_device_can_be_told_to_raise_at_the_nth_call(core, device):
    arm(core, device, "raise", at_call=2)
    ACTIONS[device](core)
    with pytest.raises(HardwareError, match=f"{device}: .* on command"):
        ACTIONS[device](core)
    ACTIONS[device](core)  # once only


@pytest.mark.parametrize("device", ["Z", "XY", "Shutter", "Objective"])
def test_a_hanging_device_stays_busy_until_the_core_gives_up(core, device):
    core.setTimeoutMs(100)
    arm(core, device, "hang", s=30)
    ACTIONS[device](core)
    with pytest.raises(TimeoutError):
        core.waitForDevice(device)
    core.setProperty(device, "fault", "none")
    core.waitForDevice(device)
    core.setTimeoutMs(5000)


def test_a_hanging_camera_blocks_for_its_time(core):
    arm(core, "Camera", "hang", s=0.3)
    start = time.monotonic()
    core.snapImage()
    assert time.monotonic() - start >= 0.3


def test_wrong_values(core):
    arm(core, "Camera", "wrong-value", value=7)
    assert (core.snap() == 7).all()
    arm(core, "Z", "wrong-value", on="read", value=50)
    assert core.getPosition() == 50
    assert core.getPosition() == 0
    arm(core, "Z", "wrong-value", on="move", value=-9)
    core.setPosition(0)
    core.waitForDevice("Z")
    assert core.getPosition() == -9
    arm(core, "XY", "wrong-value", on="read", value=3, calls=0)
    assert core.getXYPosition()[0] == core.getXYPosition()[0] == 3
    core.setAutoShutter(False)
    arm(core, "Shutter", "wrong-value")
    core.setShutterOpen(True)
    assert core.getShutterOpen()
    assert core.snap().mean() < 5
    arm(core, "Lamp", "wrong-value", value=0)
    core.setProperty("Lamp", "intensity", 100)
    assert core.getProperty("Lamp", "intensity") == 0
    arm(core, "Objective", "wrong-value")
    core.setState("Objective", 2)
    assert core.getStateLabel("Objective") == "40x/0.95"
    assert truth.microscope_of(core).objective == "20x/0.75"


def test_a_fault_in_a_sequence_ends_it(core):
    arm(core, "Camera", "wrong-value", at_call=2, value=0)
    core.startSequenceAcquisition(3, 0, True)
    while core.isSequenceRunning():
        time.sleep(0.01)
    means = [core.popNextImage().mean() for _ in range(3)]
    assert means[1] == 0
    assert min(means[0], means[2]) > 60


# --- bad input ---


@pytest.mark.parametrize(
    ("device", "name", "value", "words"),
    [
        ("Optics", "na", -0.5, ["na", "-0.5", "0.01"]),
        ("Optics", "na", 1.3, ["na", "1.3", "index 1"]),
        ("Optics", "quality", "best", ["quality", "best", "preview"]),
        ("Slide", "kind", "wood", ["kind", "wood", "tissue"]),
        ("Slide", "wave_um", 99, ["wave_um", "99", "10"]),
        ("Slide", "picture", "/nowhere.png", ["picture", "/nowhere.png"]),
        ("Camera", "Exposure", -1, ["Exposure", "-1", "0.01"]),
        ("Camera", "Binning", 3, ["Binning", "3", "4"]),
        ("Z", "speed_um_s", "fast", ["speed_um_s", "fast"]),
        ("Z", "fault", "explode", ["fault", "explode", "raise"]),
        ("Z", "microscope", "other", ["microscope", "other"]),
    ],
)
def test_settings_that_cannot_be_are_named(core, device, name, value, words):
    with pytest.raises(ValueError) as error:
        core.setProperty(device, name, value)
    assert all(word in str(error.value) for word in words)


def test_an_unknown_objective_is_named(core):
    with pytest.raises(RuntimeError, match=r"63x.*20x/0.75"):
        core.setStateLabel("Objective", "63x")
    with pytest.raises(InputError, match=r"63x.*20x/0.75"):
        truth.microscope_of(core).set_objective("63x")
