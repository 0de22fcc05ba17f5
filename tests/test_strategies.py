"""The searches: what they find, what they refuse to find, and in how many looks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from mm_autofocus.drive import drive
from mm_autofocus.errors import InputError
from mm_autofocus.registry import STRATEGIES
from mm_autofocus.replay import RecordedStack, request_for
from mm_autofocus.settings import AutofocusSettings, EscalationStep, parse_settings
from mm_autofocus.strategies._curve import Estimate
from mm_autofocus.strategies.brent import Brent, bounded_brent
from mm_autofocus.strategies.escalate import Escalate, build_strategy
from mm_autofocus.strategies.hill_climb import HillClimb, _Climb
from mm_autofocus.strategies.sweep import Sweep
from mm_autofocus.types import FocusRequest, FocusResult, Look, Optics, Prior
from scipy.optimize import minimize_scalar

from focus_rig import FocusRig

calm = hypothesis_settings(deadline=None, derandomize=True, max_examples=40)

ALL = ["hill-climb", "sweep", "brent"]


def search(rig, name="hill-climb", span=20.0, start=None, **request):
    strategy = STRATEGIES.get(name)() if isinstance(name, str) else name
    start = rig.z_um if start is None else start
    return drive(strategy, FocusRequest(start, start - span, start + span, **request), rig)


# -- what is found -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", ["gauss", "lorentz", "plateau"])
@pytest.mark.parametrize("focus", [-13.0, -4.0, 0.0, 9.0])
def test_finds_a_peak(name, shape, focus):
    rig = FocusRig(shape, focus_um=focus, width_um=4.0)
    result = search(rig, name)
    assert result.status == "ok"
    assert rig.curve(result.z_um) > (0.97 if name == "hill-climb" else 0.9)
    assert rig.position_um() == result.z_um
    assert result.looks <= {"hill-climb": 8, "sweep": 20, "brent": 12}[name]


@pytest.mark.parametrize("width", [1.0, 3.0, 10.0])
def test_the_width_need_not_be_known(width):
    for seed, focus in enumerate((-11.3, -2.2, 6.1)):
        rig = FocusRig("lorentz", focus_um=focus, width_um=width, seed=seed)
        result = search(rig)
        assert result.status == "ok"
        assert rig.curve(result.z_um) > 0.97
        assert result.looks <= 10


def test_a_few_looks_are_enough():
    looks = []
    for seed, focus in enumerate(np.linspace(-12, 12, 13)):
        rig = FocusRig("lorentz", focus_um=float(focus), width_um=5.0, seed=seed)
        looks.append(search(rig).looks)
    assert np.mean(looks) <= 6


@pytest.mark.parametrize("tolerance", [0.3, 1.0])
def test_the_tolerance_is_kept(tolerance):
    error, expected = [], []
    for seed, focus in enumerate((-9.0, -2.7, 4.4, 12.2)):
        rig = FocusRig("gauss", focus_um=focus, width_um=4.0, seed=seed)
        result = search(rig, tolerance_um=tolerance)
        assert result.status == "ok"
        error.append(result.z_um - focus)
        expected.append(result.expected_error_um)
    assert max(expected) <= max(tolerance, 0.5)
    assert np.sqrt(np.mean(np.square(error))) <= tolerance


@pytest.mark.parametrize(("shape", "width"), [("lorentz", 1.7), ("gauss", 2.5)])
def test_the_expected_error_knows_that_z_is_uncertain(shape, width):
    optics = Optics(na=0.75, pixel_size_um=0.325)
    error, expected = [], []
    for seed in range(24):
        focus = (seed * 7.3) % 22 - 11
        rig = FocusRig(shape, focus, width, seed=seed, z_sd_um=0.15)
        result = search(rig, span=15.0, optics=optics, z_sd_um=0.15)
        assert result.status == "ok"
        error.append(rig.true_um - focus)
        expected.append(result.expected_error_um)
    ratio = np.abs(error) / np.array(expected)
    assert min(expected) >= 0.15  # the frame itself is off by so much
    assert max(expected) <= optics.dof_um / 3
    assert np.max(np.abs(error)) < optics.dof_um / 2
    assert np.mean(ratio <= 1) >= 0.6
    assert np.mean(ratio <= 2) >= 0.9


@pytest.mark.parametrize(("given", "z_sd_um"), [({}, 0.0), ({"repeatability_um": 0.2}, 0.2)])
def test_recorded_planes_are_where_they_are(given, z_sd_um):
    rig = RecordedStack(np.arange(3 * 8 * 8, dtype=np.uint16).reshape(3, 8, 8), 1.0)
    assert request_for(rig, AutofocusSettings(**given)).z_sd_um == z_sd_um


def test_a_stage_that_is_coarser_than_the_tolerance_is_not_sure():
    rig = FocusRig("lorentz", 3.0, 3.0, z_sd_um=0.3)
    result = search(rig, tolerance_um=0.2, z_sd_um=0.3)
    assert result.status == "low-confidence"
    assert "repeatability" in result.reason
    assert result.looks < 15  # it does not try until the budget is spent
    assert abs(rig.true_um - 3.0) < 1.2


@pytest.mark.parametrize(("width_um", "coarse"), [(3.0, True), (30.0, False)])
def test_beside_a_narrow_peak_a_coarse_stage_loses_what_no_look_saves(width_um, coarse):
    request = FocusRequest(0.0, -20.0, 20.0, tolerance_um=0.2, z_sd_um=0.3)
    known = Estimate(
        z_um=0.0, loss=0.001, sd_um=0.1, width_um=width_um, beyond=0.0, outside=0.0, score=1.0
    )
    assert _Climb(HillClimb(), request)._too_coarse(known) is coarse


def test_the_same_looks_give_the_same_answer():
    assert search(FocusRig(focus_um=3.3)) == search(FocusRig(focus_um=3.3))


@calm
@given(shift=st.sampled_from([-1e4, -37.0, 512.0, 8000.0]))
def test_the_zero_of_the_stage_does_not_matter(shift):
    here = search(FocusRig(focus_um=3.5))
    there = search(FocusRig(focus_um=3.5 + shift, z_um=shift))
    assert there.looks == here.looks
    assert there.z_um - shift == pytest.approx(here.z_um, abs=1e-3)


def test_the_prior_is_looked_at_first():
    rig = FocusRig(focus_um=8.0)
    result = search(rig, prior=Prior(8.2, 1.0))
    assert result.curve[0][0] == 8.2
    assert result.z_um == pytest.approx(8.0, abs=0.7)
    # a wrong prior costs looks, but not the focus
    rig = FocusRig(focus_um=-9.0)
    assert search(rig, prior=Prior(12.0, 1.0)).z_um == pytest.approx(-9.0, abs=0.7)


def test_the_first_step_is_kept():
    assert search(FocusRig(focus_um=5.0), step_um=3.0).curve[1][0] == 3.0


def test_the_width_is_remembered():
    strategy = HillClimb()
    first = search(FocusRig(focus_um=6.0, width_um=2.0), strategy)
    again = [search(FocusRig(focus_um=f, width_um=2.0), strategy).looks for f in (1.0, -2.0)]
    assert strategy.known_width_um == pytest.approx(2.0, rel=0.3)
    assert np.mean(again) <= first.looks


def test_depth_of_field_sets_tolerance_and_width():
    optics = Optics(na=0.5, pixel_size_um=0.3)  # 2.8 µm
    result = search(FocusRig("lorentz", focus_um=-7.0, width_um=2.5), optics=optics)
    assert result.status == "ok"
    assert result.z_um == pytest.approx(-7.0, abs=optics.dof_um / 3)


# -- what must not be found --------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_pure_camera_noise_is_never_focus(name):
    runs = 40 if name == "hill-climb" else 20
    for seed in range(runs):
        result = search(FocusRig("none", seed=seed), name)
        assert (result.status, result.z_um) == ("failed", None)
        assert "no contrast" in result.reason
        assert result.looks <= 12  # a blank field must not cost the whole budget


def test_a_blank_field_is_given_up_after_an_even_lattice():
    rig = FocusRig("none")
    result = search(rig, span=15.0, optics=Optics(na=0.75, pixel_size_um=0.325), z_sd_um=0.1)
    assert (result.status, result.looks) == ("failed", 7)
    z = sorted(z for z, _ in result.curve)
    assert np.ptp(np.diff(z)) < 0.1 and z[0] == pytest.approx(-12.86, abs=0.1)


def test_where_tiles_show_no_lamp_nothing_is_repeated():
    rig = FocusRig("lorentz", 4.0, 2.0)
    uniform = rig.look

    def sparse():  # an object in one corner, noise elsewhere
        look, blank = uniform(), FocusRig("none", seed=rig.looks).look()
        blank.image[:40, :40] = look.image[:40, :40]
        return Look(look.z_um, blank.image, look.max_value)

    rig.look = sparse
    rig.amplitude = 20.0
    result = search(rig, span=15.0)
    assert result.status == "ok"
    assert result.z_um == pytest.approx(4.0, abs=1.0)
    scores = [score for _, score in result.curve]
    assert min(scores) > 0.4 * max(scores)  # as a lamp could do
    assert len({z for z, _ in result.curve}) == result.looks


@pytest.mark.parametrize("level", [3.0, 20.0])
def test_quiet_camera_in_the_dark(level):
    for seed in range(10):
        result = search(FocusRig("none", noise=0.25, level=level, seed=seed))
        assert result.status == "failed"
        assert result.reason.startswith("dark image")


def test_weak_peak_above_the_noise_is_found():
    for seed, focus in enumerate((-8.0, 1.0, 10.0)):
        rig = FocusRig("lorentz", focus, 5.0, amplitude=5, noise=5, seed=seed)
        result = search(rig)
        assert result.status == "ok"
        assert result.z_um == pytest.approx(focus, abs=1.5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "lamp",
    [
        lambda k: 1 + 0.03 * k,
        lambda k: 0.96**k,
        lambda k: 1 + 0.02 * np.sin(17.3 * k),
    ],
    ids=["drifts up", "bleaches", "flickers"],
)
def test_a_lamp_is_no_focus(name, lamp):
    result = search(FocusRig("even", lamp=lamp, z_um=2.0), name)
    assert result.status != "ok"
    if name == "hill-climb":
        assert result.status == "failed"
        assert "changes by itself" in result.reason


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("focus", [-26.0, 26.0])
def test_a_peak_beyond_the_limits_is_not_sure(name, focus):
    result = search(FocusRig("gauss", focus_um=focus, width_um=6.0), name)
    assert result.status == "low-confidence"
    assert "beyond the limit" in result.reason
    assert abs(result.z_um - np.sign(focus) * 20) < 1.5


def test_a_rise_through_the_whole_range_is_no_peak():
    result = search(FocusRig("slope", width_um=20.0))
    assert result.status == "low-confidence"
    assert "beyond the limit" in result.reason


@pytest.mark.parametrize("width", [3.0, 6.0])
def test_never_in_the_dip_between_two_peaks(width):
    for seed, focus in enumerate(np.linspace(-6, 6, 7)):
        rig = FocusRig("two peaks", float(focus), width, seed=seed)
        result = search(rig)
        best = max(rig.curve(z) for z, _ in result.curve)
        assert rig.curve(result.z_um) > 0.95 * best  # not blurrier than what was seen
        assert rig.curve(result.z_um) > 0.8  # the dip is below 0.2


@calm
@given(
    shape=st.sampled_from(["gauss", "lorentz", "plateau", "two peaks"]),
    focus=st.floats(-15, 15),
    width=st.floats(1.5, 10),
    seed=st.integers(0, 1000),
)
def test_never_blurrier_than_the_best_look(shape, focus, width, seed):
    rig = FocusRig(shape, focus, width, seed=seed)
    result = search(rig)
    if result.found:
        best = max(rig.curve(z) for z, _ in result.curve)
        assert rig.curve(result.z_um) > 0.93 * best


class FixedRig(FocusRig):
    """A camera that shows the same frame, whatever the stage does."""

    def __init__(self, image, max_value=None):
        super().__init__()
        self.image, self.max_value = image, max_value

    def look(self):
        return Look(self.z_um, self.image, self.max_value)


NOISE = np.random.default_rng(0).integers(90, 110, (64, 64)).astype(np.uint16)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("image", "max_value", "says"),
    [
        (NOISE, None, "identical frames at different z"),
        (np.full((64, 64), 255, np.uint8), None, "saturated image"),
        (np.full((64, 64), 4095, np.uint16), 4095.0, "saturated image"),
        (NOISE // 10, 4095.0, "dark image"),
        (np.full((64, 64), 700, np.uint16), 4095.0, "empty image"),
    ],
)
def test_why_a_curve_is_flat(name, image, max_value, says):
    rig = FixedRig(image, max_value)
    result = search(rig, name)
    assert (result.status, result.z_um) == ("failed", None)
    assert result.reason.startswith(says)
    assert rig.position_um() == 0.0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5])
def test_a_spent_budget_is_not_sure(name, budget):
    rig = FocusRig(focus_um=7.0, width_um=2.0)
    result = search(rig, name, max_looks=budget)
    assert result.looks <= budget
    assert result.status in ("low-confidence", "failed")
    assert result.reason


@pytest.mark.parametrize("name", ALL)
def test_no_room_to_search(name):
    request = FocusRequest(3.0, 3.0, 3.0)
    result = drive(STRATEGIES.get(name)(), request, FocusRig(z_um=3.0))
    assert result.status == "failed"


@pytest.mark.parametrize("name", ALL)
def test_metric_and_its_options_are_used(name):
    settings = parse_settings(
        {"strategy": name, "metric": "tenengrad", "metric_options": {"tiles": 3}}
    )
    rig = FocusRig(focus_um=5.0)
    result = search(rig, STRATEGIES.get(name)(settings))
    assert result.status == "ok"
    assert result.z_um == pytest.approx(5.0, abs=1.0)


# -- brent and sweep ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "low", "high", "tolerance"),
    [
        (lambda x: (x - 3) ** 2 + 0.01 * x**3, -10, 10, 1e-2),
        (lambda x: -1 / (1 + abs(x - 2.2)), -7, 20, 0.1),
        (lambda x: np.sin(x) + 0.1 * x, -8, 9, 0.5),
        (lambda x: 0.0, 0, 1, 0.1),
        (lambda x: -x, 0, 5, 0.2),
        (lambda x: x, 100, 120, 1.0),
        (lambda x: -np.exp(-(((x - 7) / 3) ** 2)), -20, 20, 1.0),
    ],
)
def test_brent_goes_where_scipy_goes(function, low, high, tolerance):
    theirs = []

    def noted(x):
        theirs.append(float(x))
        return function(x)

    best = minimize_scalar(
        noted, bounds=(low, high), method="bounded", options={"xatol": tolerance}
    )
    walk = bounded_brent(low, high, tolerance)
    mine = [next(walk)]
    with pytest.raises(StopIteration) as stop:
        while True:
            mine.append(walk.send(function(mine[-1])))
    assert mine == pytest.approx(theirs, rel=1e-9)
    assert stop.value.value == pytest.approx(best.x, rel=1e-9)


def test_brent_stops_at_one_micrometre_by_default():
    coarse = search(FocusRig(focus_um=3.0), Brent())
    fine = search(FocusRig(focus_um=3.0), Brent(), tolerance_um=0.05)
    assert coarse.looks < fine.looks
    assert fine.z_um == pytest.approx(3.0, abs=0.15)


def test_sweep_travels_upwards_in_its_steps():
    result = search(FocusRig(focus_um=3.0), Sweep(), span=10, step_um=5.0)
    coarse, fine = result.curve[:5], result.curve[5:]
    assert [z for z, _ in coarse] == [-10, -5, 0, 5, 10]
    assert [z for z, _ in fine] == sorted(z for z, _ in fine)
    assert all(0 <= z <= 10 for z, _ in fine)


# -- escalation --------------------------------------------------------------------------


class Says:
    """A strategy that looks once where it is and says what it was told."""

    name = "says"

    def __init__(self, name, result, looks=1):
        self.name, self.result, self.looks = name, result, looks
        self.request = None

    def focus(self, request):
        self.request = request
        for _ in range(min(self.looks, request.max_looks)):
            look = yield request.z_start_um
            look.score = 1.0
        return self.result


OK = FocusResult(1.0, "ok", score=5.0)
WEAK = FocusResult(4.0, "low-confidence", score=2.0, reason="unsure")
BETTER = FocusResult(-3.0, "low-confidence", score=3.0, reason="still unsure")
FAILED = FocusResult(None, "failed", reason="flat")


@pytest.mark.parametrize(
    ("said", "status", "by", "tried"),
    [
        ([OK, WEAK], "ok", "a", 1),
        ([WEAK, OK], "ok", "b", 2),
        ([FAILED, WEAK, BETTER], "low-confidence", "c", 3),
        ([BETTER, WEAK, FAILED], "low-confidence", "a", 3),
        ([FAILED, FAILED], "failed", "b", 2),
    ],
)
def test_the_first_sure_one_answers(said, status, by, tried):
    chain = Escalate([(Says(n, r), None) for n, r in zip("abc", said, strict=False)])
    result = drive(chain, FocusRequest(0.0, -10, 10), FocusRig())
    assert (result.status, result.strategy, result.looks) == (status, by, tried)
    assert [t["strategy"] for t in result.details["tried"]] == list("abc"[:tried])
    if status == "failed":
        assert result.reason == "flat"


def test_a_step_has_its_own_range_and_budget():
    first = Says("a", WEAK, looks=3)
    local = Says("b", FAILED, looks=2)
    wide = Says("c", FAILED)
    chain = Escalate(
        [
            (first, None),
            (local, EscalationStep(strategy="sweep", range_um=7, step_um=0.5, max_looks=2)),
            (wide, EscalationStep(strategy="sweep")),
        ]
    )
    result = drive(
        chain, FocusRequest(0.0, -10, 10, max_looks=9, prior=Prior(-9, 1)), FocusRig()
    )
    assert first.request.max_looks == 9
    # around the best so far, never beyond the limits of the whole
    asked = local.request
    assert (asked.z_start_um, asked.z_min_um, asked.z_max_um) == (4.0, -3.0, 10.0)
    assert (asked.max_looks, asked.step_um, asked.prior) == (2, 0.5, None)
    assert (wide.request.z_min_um, wide.request.z_max_um) == (-10, 10)
    assert wide.request.max_looks == 4
    assert result.z_um == 4.0


def test_nothing_is_asked_without_a_budget():
    last = Says("b", OK)
    chain = Escalate([(Says("a", WEAK, looks=5), None), (last, None)])
    result = drive(chain, FocusRequest(0.0, -10, 10, max_looks=5), FocusRig())
    assert last.request is None
    assert result.z_um == 4.0


def test_build_strategy():
    assert isinstance(build_strategy(AutofocusSettings()), HillClimb)
    chain = build_strategy(
        parse_settings({"strategy": "brent", "escalate": ["sweep", {"strategy": "hill-climb"}]})
    )
    assert isinstance(chain, Escalate)
    assert [s.name for s, _ in chain.steps] == ["brent", "sweep", "hill-climb"]
    assert build_strategy(parse_settings({"strategy": "hardware"})) is None
    after = build_strategy(parse_settings({"strategy": "hardware", "escalate": ["sweep"]}))
    assert [s.name for s, _ in after.steps] == ["sweep"]
    with pytest.raises(InputError):
        Escalate([])


class Choosy:
    """A strategy with a key of its own."""

    name = "choosy"

    class Settings(AutofocusSettings):
        """One key more."""

        depth: int = 3

    def __init__(self, settings=None):
        self.settings = settings or self.Settings(strategy="sweep")

    def focus(self, request):
        look = yield request.z_start_um
        look.score = 0.0
        return FAILED


def test_each_strategy_gets_the_settings_it_knows():
    STRATEGIES.add("choosy", f"{__name__}:Choosy")
    try:
        chain = build_strategy(
            parse_settings({"strategy": "sweep", "metric": "tenengrad", "escalate": ["choosy"]})
        )
        settings = chain.steps[1][0].settings
        assert (settings.depth, settings.metric) == (3, "tenengrad")
        chain = build_strategy(
            parse_settings({"strategy": "choosy", "depth": 9, "escalate": ["hill-climb"]})
        )
        assert chain.steps[0][0].settings.depth == 9
        result = drive(chain, FocusRequest(0.0, -20, 20), FocusRig(focus_um=4.0))
        assert (result.status, result.strategy) == ("ok", "hill-climb")
    finally:
        del STRATEGIES._targets["choosy"]


# -- on real stacks ----------------------------------------------------------------------


def test_brain_stacks(data_root):
    import csv

    from mm_autofocus.replay import load_stack, replay

    folder = data_root / "zstack_brain"
    with (folder / "index.csv").open() as file:
        rows = list(csv.DictReader(file))[5::10]
    settings = AutofocusSettings(range_um=10.0)
    looks, quality = [], []
    for row in rows:
        stack = load_stack(folder / row["file"]).astype(float)
        curve = ((stack[:, :, 2:] - stack[:, :, :-2]) ** 2).mean((1, 2))
        for offset in (-9, -5, 5, 9):
            start = float(row["centroid_above_half_max"]) + offset
            result = replay(stack, step_um=1.0, start_um=start, settings=settings)
            low, high = float(row["first_plane_half_max"]), float(row["last_plane_half_max"])
            assert low <= result.z_um <= high
            looks.append(result.looks)
            quality.append(np.interp(result.z_um, np.arange(29), curve) / curve.max())
    assert np.mean(looks) <= 4.5
    assert np.median(quality) >= 0.99
    assert np.percentile(quality, 5) >= 0.95
