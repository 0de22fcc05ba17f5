"""The loop: limits, budget, backlash, the way back, cancel, and what it counts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus.drive import LookBudgetError, drive
from mm_autofocus.errors import CancelledError, HardwareError, LimitError
from mm_autofocus.registry import STRATEGIES
from mm_autofocus.types import FocusRequest, FocusResult

from focus_rig import FocusRig

REQUEST = FocusRequest(0.0, -10.0, 10.0, max_looks=6)


class Asks:
    """A strategy that asks for the z it is told, whatever it sees."""

    name = "asks"

    def __init__(self, *z_um, result=None):
        self.z_um = z_um
        self.result = result or FocusResult(None, "failed", reason="told so")
        self.seen = []

    def focus(self, request):
        for z in self.z_um:
            look = yield z
            look.score = float(len(self.seen))
            self.seen.append(look.z_um)
        return self.result


def found(z):
    return FocusResult(z, "ok")


def test_counts_and_curve():
    rig = FocusRig()
    seen = []
    result = drive(Asks(-5, 3, result=found(1.5)), REQUEST, rig, on_look=seen.append)
    assert (result.looks, result.moves, result.z_um, result.strategy) == (2, 3, 1.5, "asks")
    assert result.curve == ((-5, 0.0), (3, 1.0))
    assert result.z_start_um == 0.0
    assert [look.score for look in seen] == [0.0, 1.0]
    assert rig.position_um() == 1.5
    assert (rig.prepared, rig.restored) == (1, 1)


def test_failed_goes_back_to_the_start():
    rig = FocusRig()
    result = drive(Asks(-5, 3), REQUEST, rig)
    assert result.status == "failed"
    assert rig.position_um() == 0.0
    assert result.moves == 3


def test_the_way_back_to_the_start_is_exact_however_short():
    # a few nanometres are no move on the way to a look, but the start is promised
    rig = FocusRig(noise=0)
    result = FocusResult(None, "failed")
    drive(Asks(1.0, 0.004, 0.0, result=result), REQUEST, rig)
    assert rig.position_um() == 0.0


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    z=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=8),
    final=st.one_of(st.none(), st.floats(allow_nan=True)),
    backlash=st.floats(-15, 15),
)
def test_the_limits_are_never_left(z, final, backlash):
    rig = FocusRig(noise=0)
    result = FocusResult(final, "ok" if final is not None else "failed")
    try:
        drive(Asks(*z, result=result), REQUEST, rig, backlash_um=backlash)
    except LimitError:
        assert rig.position_um() == 0.0
    assert all(-10 <= v <= 10 for v in rig.visited)
    assert rig.looks <= REQUEST.max_looks
    assert rig.prepared == rig.restored


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    name=st.sampled_from(["hill-climb", "sweep", "brent"]),
    shape=st.sampled_from(["gauss", "plateau", "two peaks", "slope", "none"]),
    low=st.floats(-8, 0),
    high=st.floats(0, 8),
    focus=st.floats(-12, 12),
    budget=st.integers(1, 9),
)
def test_our_searches_stay_within_limits_and_budget(name, shape, low, high, focus, budget):
    rig = FocusRig(shape, focus, 2.0)
    request = FocusRequest(0.0, low, high, max_looks=budget)
    result = drive(STRATEGIES.get(name)(), request, rig)  # LimitError would be the failure
    assert all(low - 1e-6 <= v <= high + 1e-6 for v in rig.visited)
    assert result.looks <= budget
    if result.z_um is None:
        assert result.status == "failed" and result.reason
    else:
        assert low <= result.z_um <= high
        assert (result.reason == "") == (result.status == "ok")


def test_just_beyond_a_limit_is_on_it():
    rig = FocusRig()
    drive(Asks(10 + 5e-7, result=found(10 + 5e-7)), REQUEST, rig)
    assert max(rig.visited) == 10.0


@pytest.mark.parametrize("z", [10.01, -11, math.nan, math.inf])
def test_outside_is_refused_and_the_stage_goes_back(z):
    rig = FocusRig()
    with pytest.raises(LimitError, match="outside the limits -10 … 10"):
        drive(Asks(4, z), REQUEST, rig)
    assert rig.visited == [0.0, 4.0, 0.0]
    assert rig.restored == 1


def test_a_result_outside_is_refused():
    rig = FocusRig()
    with pytest.raises(LimitError):
        drive(Asks(4, result=found(12)), REQUEST, rig)
    assert rig.position_um() == 0.0


def test_the_budget_is_the_end():
    rig = FocusRig()
    with pytest.raises(LookBudgetError, match="look 7 of at most 6"):
        drive(Asks(*range(-5, 5)), REQUEST, rig)
    assert rig.looks == 6
    assert rig.position_um() == 0.0


@pytest.mark.parametrize(
    ("backlash", "path"),
    [
        (0.0, [4, -3, 1]),
        (2.0, [4, -5, -3, 1]),  # downwards goes past and comes back up
        (-2.0, [6, 4, -3, 3, 1]),
        (20.0, [4, -10, -3, 1]),  # never past a limit
    ],
)
def test_every_z_is_approached_from_the_side_of_the_backlash(backlash, path):
    rig = FocusRig()
    result = drive(Asks(4, -3, result=found(1)), REQUEST, rig, backlash_um=backlash)
    assert rig.visited[1:] == path
    assert result.moves == len(path)


def test_a_fault_sends_the_stage_back_and_restores_the_camera():
    rig = FocusRig(breaks_at_look=2)
    strategy = Asks(4, 5, 6)
    with pytest.raises(HardwareError, match="the camera has gone"):
        drive(strategy, REQUEST, rig)
    assert rig.position_um() == 0.0
    assert (rig.prepared, rig.restored) == (1, 1)


def test_the_first_fault_is_the_one_seen():
    class Stuck(FocusRig):
        def move_to(self, z_um):
            if self.looks:
                raise HardwareError("the stage is stuck")
            super().move_to(z_um)

    with pytest.raises(HardwareError, match="the stage is stuck"):
        drive(Asks(4, 5), REQUEST, Stuck())


def test_a_strategy_that_throws():
    class Throws(Asks):
        def focus(self, request):
            yield 4.0
            raise RuntimeError("a bug of the plug-in")

    rig = FocusRig()
    with pytest.raises(RuntimeError, match="a bug of the plug-in"):
        drive(Throws(), REQUEST, rig)
    assert rig.position_um() == 0.0
    assert rig.restored == 1


def test_cancel_between_two_looks():
    rig = FocusRig()
    calls = []

    def checkpoint():
        calls.append(rig.looks)
        if rig.looks == 2:
            raise CancelledError("cancelled")

    strategy = Asks(1, 2, 3)
    with pytest.raises(CancelledError):
        drive(strategy, REQUEST, rig, checkpoint=checkpoint)
    assert calls == [0, 1, 2]
    assert rig.looks == 2
    assert rig.position_um() == 0.0
    assert rig.restored == 1
