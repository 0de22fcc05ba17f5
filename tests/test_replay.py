"""Recorded stacks: reading them, standing in for a microscope, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from mm_autofocus.drive import drive
from mm_autofocus.errors import InputError
from mm_autofocus.replay import RecordedStack, load_stack, replay, request_for
from mm_autofocus.settings import AutofocusSettings, parse_settings
from mm_autofocus.strategies.sweep import Sweep

calm = hypothesis_settings(deadline=None, derandomize=True)

RNG = np.random.default_rng(0)
TEXTURE = RNG.normal(size=(64, 64))


def recorded(planes=21, peak=12.0, width=4.0, dtype=np.uint16):
    """A stack whose contrast is a Gaussian about plane `peak`, with camera noise."""
    contrast = 60 * np.exp(-(((np.arange(planes) - peak) / width) ** 2))
    noise = RNG.normal(0, 2, (planes, 64, 64))
    return np.rint(120 + contrast[:, None, None] * TEXTURE + noise).clip(0).astype(dtype)


@calm
@given(z=st.floats(-5, 25), step=st.floats(0.05, 3))
def test_a_look_is_the_nearest_plane(z, step):
    stack = np.arange(11, dtype=np.uint8)[:, None, None] * np.ones((4, 4), np.uint8)
    rig = RecordedStack(stack, step)
    rig.move_to(z * step)
    look = rig.look()
    k = int(look.image[0, 0])
    assert look.z_um == k * step
    assert k == np.clip(np.rint(z * step / step), 0, 10)
    assert rig.position_um() == z * step
    assert look.max_value == 255


@pytest.mark.parametrize("name", ["hill-climb", "sweep", "brent"])
@pytest.mark.parametrize("step", [0.25, 1.0])
def test_replay_finds_the_plane(name, step):
    settings = AutofocusSettings(strategy=name, range_um=20 * step, tolerance_um=step)
    result = replay(recorded(), step_um=step, start_um=6 * step, settings=settings)
    assert result.status == "ok"
    assert result.z_um == pytest.approx(12 * step, abs=step)
    assert result.looks == len(result.curve) <= 20
    assert result.strategy == name
    assert all(z / step == pytest.approx(round(z / step)) for z, _ in result.curve)


def test_replay_takes_a_strategy_and_reports_looks():
    seen = []
    result = replay(recorded(), Sweep(), step_um=1.0, on_look=seen.append)
    assert result.z_start_um == 10.0  # the middle
    assert [look.z_um for look in seen] == [z for z, _ in result.curve]


def test_colour_stacks():
    rgb = np.repeat(recorded(dtype=np.uint8)[..., None], 3, axis=3)
    assert replay(rgb, step_um=1.0, start_um=5.0).z_um == pytest.approx(12, abs=1)


def test_request_is_clipped_to_the_stack_and_the_settings():
    rig = RecordedStack(recorded(), 0.5, start_um=2.0)
    settings = parse_settings({"range_um": 4.0, "z_min_um": 1.0, "max_looks": 7, "na": 0.5})
    request = request_for(rig, settings)
    assert (request.z_min_um, request.z_max_um) == (1.0, 6.0)
    assert (request.max_looks, request.optics.na) == (7, 0.5)
    assert request_for(rig).z_min_um == 0.0


def test_hardware_is_refused():
    settings = parse_settings({"strategy": "hardware"})
    with pytest.raises(InputError, match="needs a microscope"):
        replay(recorded(), step_um=1.0, settings=settings)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RecordedStack(recorded(), 0.0), "step_um"),
        (lambda: RecordedStack(recorded(), float("nan")), "step_um"),
        (lambda: replay(recorded(), step_um=1.0, start_um=40.0), "start_um: 40 is outside"),
        (lambda: RecordedStack(np.zeros((2, 4, 4)), 1.0), "2 planes are too few"),
        (lambda: RecordedStack(np.zeros((4, 4)), 1.0), "not the shape (4, 4)"),
        (lambda: RecordedStack(np.zeros((5, 4, 4, 4)), 1.0), "not the shape"),
        (lambda: RecordedStack(np.zeros((5, 0, 4)), 1.0), "empty"),
        (lambda: RecordedStack(np.full((5, 4, 4), np.nan), 1.0), "NaN"),
        (lambda: RecordedStack(np.zeros((5, 4, 4), bool), 1.0), "no grey values"),
    ],
)
def test_refused(call, says):
    with pytest.raises(InputError) as error:
        call()
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ((5, 32, 40), {}),
        ((5, 32, 40), {"metadata": {"axes": "ZYX"}, "ome": True}),
        ((5, 32, 40, 3), {"photometric": "rgb"}),
        ((5, 32, 40, 3), {"photometric": "rgb", "metadata": {"axes": "ZYXS"}, "ome": True}),
        ((5, 32, 40), {"imagej": True, "metadata": {"axes": "ZYX"}}),
        ((5, 32, 40), {"photometric": "minisblack", "metadata": None}),
    ],
    ids=["shaped", "ome", "rgb", "ome-rgb", "imagej", "plain pages"],
)
def test_written_stacks_are_read_back(tmp_path, shape, kwargs):
    dtype = np.uint16 if kwargs.get("imagej") else np.uint8
    stack = RNG.integers(0, 200, shape).astype(dtype)
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, stack, **kwargs)
    read = load_stack(path)
    assert read.dtype == stack.dtype
    np.testing.assert_array_equal(read, stack)


def _truncated(path):
    tifffile.imwrite(path, recorded())
    path.write_bytes(path.read_bytes()[:-20_000])


def _time_lapse(path):
    tifffile.imwrite(path, recorded(), metadata={"axes": "TYX"}, ome=True)


def _nan(path):
    stack = recorded().astype(np.float32)
    stack[3, 4, 5] = np.nan
    tifffile.imwrite(path, stack)


BROKEN = {
    "no such file": (lambda path: None, "there is no such file"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty file": (lambda path: path.write_bytes(b""), "not a readable TIFF"),
    "text": (lambda path: path.write_text("z,y,x\n1,2,3\n"), "not a readable TIFF"),
    "garbage": (lambda path: path.write_bytes(b"II*\0" + bytes(range(200))), "TIFF"),
    "cut off": (_truncated, "damaged"),
    "one plane": (lambda p: tifffile.imwrite(p, recorded()[0]), "axes ZYX"),
    "two planes": (lambda p: tifffile.imwrite(p, recorded()[:2]), "2 planes are too few"),
    "one RGB image": (
        lambda p: tifffile.imwrite(p, np.zeros((9, 9, 3), "u1"), photometric="rgb"),
        "axes ZYX",
    ),
    "4-D": (
        lambda p: tifffile.imwrite(
            p, np.zeros((2, 5, 9, 9), "u1"), metadata={"axes": "CZYX"}, ome=True
        ),
        "not CZYX (2 × 5 × 9 × 9)",
    ),
    "time lapse": (_time_lapse, "not TYX"),
    "NaN": (_nan, "NaN or infinite"),
    "complex": (lambda p: tifffile.imwrite(p, np.zeros((5, 9, 9), "c8")), "no grey values"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_sentence(case, tmp_path):
    make, says = BROKEN[case]
    path = tmp_path / "stack.tif"
    make(path)
    with pytest.raises(InputError) as error:
        load_stack(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert says in message


def test_real_stack(data_root):
    stack = load_stack(data_root / "zstack_brain" / "Btrain_00015.tif")
    assert stack.shape == (29, 128, 128)
    rig = RecordedStack(stack, 1.0, start_um=5.0)
    settings = AutofocusSettings(range_um=10.0)
    from mm_autofocus.strategies.hill_climb import HillClimb

    result = drive(HillClimb(settings), request_for(rig, settings), rig)
    assert 9 <= result.z_um <= 19
