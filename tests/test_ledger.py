"""The books of a run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mm_autofocus.errors import InputError
from mm_autofocus.hooks.ledger import Ledger, Place
from mm_autofocus.settings import AutofocusSettings
from mm_autofocus.types import FocusResult


def place(home: float | None = 0.0, **index: int) -> Place:
    return Place(index, home, 0.0, 0.0, "tile")


def enter(
    ledger: Ledger, where: Place, z_um: float | None, now_s: float = 0.0, **kwargs: str
) -> None:
    status = "failed" if z_um is None else "ok"
    result = FocusResult(z_um, status, **kwargs)  # type: ignore[arg-type]
    after = ledger.request(where).z_start_um if z_um is None else z_um
    ledger.enter(where, result, z_before_um=0.0, z_after_um=after, now_s=now_s)


def test_a_visit_is_due_once_and_every_n() -> None:
    ledger = Ledger(AutofocusSettings(every=3), 0.0)
    due = [t for t in range(7) if ledger.due(place(t=t, p=0))]
    assert due == [0, 3, 6]
    enter(ledger, place(t=0, p=0), 1.0)
    assert not ledger.due(place(t=0, p=0))
    assert ledger.due(place(t=0, p=0), again=True)
    assert ledger.due(place(t=0, p=1))


def test_targets_follow_the_focus_of_their_own_position() -> None:
    ledger = Ledger(AutofocusSettings(), z_run_start_um=100.0)
    enter(ledger, place(10.0, p=0), 13.0)
    assert ledger.target_um(place(10.0, p=0), 11.0) == 14.0
    assert ledger.target_um(place(10.0, p=0, g=2), 10.0) == 13.0  # a tile of that position
    assert ledger.target_um(place(20.0, p=1), 20.0) == 20.0  # never focused
    assert ledger.target_um(place(None, p=1), None) is None
    assert ledger.target_um(place(None, p=1), -2.0) == 98.0  # around where the run began


def test_a_stack_fits_into_the_limits_wherever_focus_is_found() -> None:
    settings = AutofocusSettings(z_min_um=-10.0, z_max_um=10.0)
    ledger = Ledger(settings, 0.0, offsets_um=(-3.0, 4.0), stage_limits_um=(-8.0, 50.0))
    assert ledger.limits_um() == (-5.0, 6.0)
    request = ledger.request(place(2.0, p=0))
    assert (request.z_min_um, request.z_max_um) == (-5.0, 6.0)
    with pytest.raises(InputError, match=r"stage_positions\[1\]: z 7 µm is outside the limits"):
        ledger.check_home(7.0, "stage_positions[1]")


def test_a_neighbours_guess_does_not_put_the_plans_z_out_of_reach() -> None:
    ledger = Ledger(AutofocusSettings(range_um=20.0), 0.0)
    enter(ledger, place(12.0, p=0), 0.0)
    request = ledger.request(place(-9.0, p=1))
    assert request.z_start_um == -21.0
    assert (request.z_min_um, request.z_max_um) == (-41.0, 11.0)
    enter(ledger, place(-9.0, p=1), 0.0)
    request = ledger.request(place(-9.0, p=1))  # its own last focus is no guess
    assert (request.z_min_um, request.z_max_um) == (-20.0, 20.0)


@given(
    st.floats(-40, 40),
    st.lists(
        st.tuples(st.integers(0, 3), st.one_of(st.none(), st.floats(-40, 40))), max_size=8
    ),
)
def test_no_request_leaves_the_limits(
    home: float, history: list[tuple[int, float | None]]
) -> None:
    ledger = Ledger(AutofocusSettings(z_min_um=-45.0, z_max_um=45.0, range_um=30.0), 0.0)
    for p, z in history:
        enter(ledger, place(home, p=p), z)
        request = ledger.request(place(home, p=p + 1))
        assert -45 <= request.z_min_um <= request.z_start_um <= request.z_max_um <= 45


def test_a_frame_never_pretends() -> None:
    ledger = Ledger(AutofocusSettings(max_age_s=60.0), 0.0)
    assert ledger.frame_record(place(p=0), 0.0) is None
    enter(ledger, place(t=0, p=0), 5.0, now_s=10.0)
    young = ledger.frame_record(place(t=0, p=0), 30.0)
    old = ledger.frame_record(place(t=1, p=0), 100.0)
    assert young is not None
    assert old is not None
    assert (young["status"], young["age_s"]) == ("ok", 20.0)
    assert (old["status"], old["age_s"]) == ("stale", 90.0)
    enter(ledger, place(t=2, p=0), None, now_s=100.0, reason="flat curve")
    failed = ledger.frame_record(place(t=2, p=0), 110.0)
    assert failed is not None
    assert failed["status"] == "stale"
    assert "flat curve" in failed["reason"]
    assert ledger.target_um(place(t=2, p=0), 0.0) == 5.0  # back at the best known z


def test_a_failure_without_a_past_is_failed() -> None:
    ledger = Ledger(AutofocusSettings(), 0.0)
    enter(ledger, place(p=0), None)
    record = ledger.frame_record(place(p=0), 1.0)
    assert record is not None
    assert record["status"] == "failed"
    assert record["age_s"] is None
