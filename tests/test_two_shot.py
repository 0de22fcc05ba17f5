"""Two-shot scanning: the plan, the order, F and its age, and what the shots tell of it."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ome_types
import pytest
import tifffile
import useq
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus import AutofocusEngine, FocusFailedError, HardwareError, InputError, run
from mm_autofocus.config import close_core, open_core
from mm_autofocus.hooks.ledger import Ledger, Place
from mm_autofocus.hooks.pycromanager import autofocus_hook
from mm_autofocus.hooks.shot_plan import in_turn, with_planes
from mm_autofocus.hooks.shots import Shots, shows_nothing
from mm_autofocus.ometiff import OmeTiffSink, read_plane, read_record
from mm_autofocus.plan import fresh
from mm_autofocus.report import inspect_json, write_report
from mm_autofocus.settings import parse_settings
from mm_autofocus.strategies.two_shot import TwoShotSettings, default_delta_um
from mm_autofocus.surface import FocusSurface
from mm_autofocus.types import FocusResult
from pymmcore_plus import CMMCorePlus
from scipy.ndimage import gaussian_filter

import learned_rig
from learned_rig import FakeModel

AF = {
    "strategy": "two-shot",
    "range_um": 20.0,
    "z_min_um": -60.0,
    "z_max_um": 60.0,
    "refind_below": 0.0,
}
PLANES = {"relative": [-1.5, 1.5]}
NEAR_UM = 1.0


def make_plan(
    af: dict[str, Any] | None = None, *, axes: tuple[str, ...] = ("p", "g"), **kwargs: Any
) -> useq.MDASequence:
    kwargs.setdefault("stage_positions", [{"x": 0, "y": 0, "z": 6.0, "name": "A"}])
    kwargs.setdefault("grid_plan", {"rows": 1, "columns": 4})
    kwargs.setdefault("z_plan", PLANES)
    return useq.MDASequence(
        autofocus_plan={"axes": axes} if axes else None,
        metadata={"mm_autofocus": AF | (af or {})},
        **{k: v for k, v in kwargs.items() if v is not None},
    )


def row(*zs: float) -> list[dict[str, float]]:
    """Positions side by side, with these planned z."""
    return [{"x": 600.0 * i, "y": 0.0, "z": z} for i, z in enumerate(zs)]


class Scope:
    """The demo adapters: what they are told, what they give, and tiles that are blank."""

    def __init__(self, core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch) -> None:
        self.core = core
        self.sent: list[float] = []
        self.snapped: list[float] = []
        self.frames: list[tuple[useq.MDAEvent, dict[str, Any]]] = []
        self.blank_from_um: tuple[float, float] = (np.inf, np.inf)
        move, snap, go = core.setPosition, core.snapImage, core.setXYPosition

        def set_position(*args: Any) -> None:
            self.sent.append(round(args[-1], 3))
            move(*args)

        def set_xy(*args: Any) -> None:
            low, high = self.blank_from_um
            blank = low <= args[-2] <= high
            mode = "Noise" if blank else "Fluorescent Beads"
            if core.getProperty("Camera", "Mode") != mode:
                core.setProperty("Camera", "Mode", mode)
            go(*args)

        def snap_image() -> None:
            self.snapped.append(round(core.getZPosition(), 3))
            snap()

        # setZPosition of the plus core ends in setPosition
        monkeypatch.setattr(core, "setPosition", set_position)
        monkeypatch.setattr(core, "setXYPosition", set_xy)
        monkeypatch.setattr(core, "snapImage", snap_image)
        core.mda.events.frameReady.connect(
            lambda _, event, meta: self.frames.append((event, dict(meta)))
        )

    def run(self, sequence: useq.MDASequence, **kwargs: Any) -> AutofocusEngine:
        engine = AutofocusEngine(self.core, restore_initial_state=False, **kwargs)
        self.core.mda.set_engine(engine)
        self.core.mda.run(sequence)
        return engine

    @property
    def planes(self) -> list[int]:
        return [event.index["z"] for event, _ in self.frames]

    @property
    def z(self) -> list[float]:
        return [meta["position"]["z"] for _, meta in self.frames]


@pytest.fixture
def scope(core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch) -> Scope:
    return Scope(core, monkeypatch)


def shots(record: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = record["details"]["two_shot"]
    return told


# ------------------------------------------------------------------- bad input

BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "delta too small": ({"delta_um": 0.4}, "delta_um: 0.4 is not allowed: must be greater"),
    "delta too large": ({"delta_um": 3.5}, "delta_um: 3.5 is not allowed: must be less than"),
    "delta with a unit": ({"delta_um": "1 um"}, "delta_um: '1 um' is not allowed: must be a n"),
    "unknown finder": ({"find": "sweeep"}, "find: 'sweeep' is unknown (did you mean 'sweep'?)"),
    "finds by itself": ({"find": "two-shot"}, "find: 'two-shot' finds nothing itself"),
    "learned finder without a model": (
        {"find": "one-shot"},
        "model: strategy 'one-shot' needs a model",
    ),
    "every zero tiles": ({"refind_every": 0}, "refind_every: 0 is not allowed"),
    "share above one": ({"refind_below": 1.5}, "refind_below: 1.5 is not allowed"),
    "region": (
        {"region": "slide"},
        "region: 'slide' is not allowed: must be one of 'position'",
    ),
    "unsure of no surface": (
        {"refind_above_um": 1.0},
        "refind_above_um: 1 is how unsure the focus surface may be, and prior: last asks none",
    ),
    "unknown key": ({"delta": 1.0}, "delta: unknown key (did you mean 'delta_um'?)"),
    "escalate": ({"strategy": "hill-climb", "escalate": ["two-shot"]}, "can only come first"),
    "its keys are its own": (
        {"strategy": "hill-climb", "refind_every": 3},
        "refind_every: unknown key",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_wrong_setting_is_one_sentence(case: str) -> None:
    given_, sentence = BAD_SETTINGS[case]
    with pytest.raises(InputError) as e:
        parse_settings({"strategy": "two-shot", **given_})
    assert sentence in str(e.value)
    assert str(e.value).startswith("metadata.mm_autofocus.")


GRID = {"rows": 1, "columns": 2}
BAD_PLANS: dict[str, tuple[dict[str, Any], str]] = {
    # what differs from a good plan, what is said
    "three planes": ({"z_plan": {"range": 4, "step": 2}}, "exactly two planes, for example"),
    "one plane": ({"z_plan": {"relative": [0]}}, "not 1 (0 µm)"),
    "not symmetric": (
        {"z_plan": {"relative": [-1, 2]}},
        "symmetric about focus, the lower one",
    ),
    "upper plane first": ({"z_plan": {"relative": [1, -1]}}, "the lower one first"),
    "absolute planes": (
        {
            "z_plan": None,
            "stage_positions": [
                {"x": 0, "y": 0, "z": 0, "sequence": {"z_plan": {"absolute": [1, 3]}}}
            ],
        },
        "absolute z positions cannot be combined with autofocus",
    ),
    "too near": ({"z_plan": {"relative": [-0.2, 0.2]}}, "±0.2 µm are not allowed: ±0.5 … ±3"),
    "too far": ({"z_plan": {"relative": [-4, 4]}}, "two-shot planes at ±4 µm are not allowed"),
    "two deltas": ({"af": {"delta_um": 2.0}}, "delta_um: 2 is not what z_plan says, ±1.5 µm"),
    "no delta to be had": ({"z_plan": None}, "delta_um: is not set, the plan has no z_plan"),
    "no autofocus plan": ({"axes": ()}, "the plan has no autofocus_plan that says when"),
    "asked once a position": (
        {"axes": ("p",)},
        "is asked at every tile whether F is to be fou",
    ),
    "asked once a channel": (
        {"axes": ("p", "g", "c"), "channels": ["FITC", "DAPI"]},
        "with two-shot F is asked for once a tile, before its shots; leave out c",
    ),
    "tiles inside of planes": (
        {"axis_order": "tpczg"},
        "do not follow each other; put c and z",
    ),
    "a channel without planes": (
        {"channels": ["FITC", {"config": "DAPI", "do_stack": False}]},
        "channel 'DAPI' has 1 (do_stack: false",
    ),
    "grid of a position, planes of the plan": (
        {
            "grid_plan": None,
            "stage_positions": [{"x": 0, "y": 0, "z": 0, "sequence": {"grid_plan": GRID}}],
        },
        "put z_plan (and channels) into its sequence, too",
    ),
    "other planes at a position": (
        {
            "stage_positions": [
                {"x": 0, "y": 0, "z": 0, "sequence": {"z_plan": {"relative": [-1, 1]}}},
            ],
        },
        "the planes of all positions must be the same, not ±1 and ±1.5 µm",
    ),
    "limits too narrow": (
        {"af": {"z_min_um": 0.0, "z_max_um": 2.0}},
        "z_plan: it reaches from -1.5 to 1.5 µm around focus, which does not fit",
    ),
    "home outside the limits": (
        {"af": {"z_max_um": 7.0}},
        "stage_positions[0]: z 6 µm is outs",
    ),
    "no device": (
        {"af": {"find": "hardware"}},
        "mm_autofocus.find: 'hardware' needs an autofo",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_wrong_plan_moves_nothing(case: str, scope: Scope, tmp_path: Path) -> None:
    changes, sentence = BAD_PLANS[case]
    if case == "no device":
        scope.core.setAutoFocusDevice("")
    sequence = make_plan(**changes)
    file = tmp_path / "run.ome.tiff"
    with pytest.raises(InputError) as e:
        run(sequence, core=scope.core, output=file)
    assert sentence in str(e.value)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError):  # the engine alone says it, too
        scope.run(sequence)
    assert (scope.sent, scope.snapped, file.exists()) == ([], [], False)


def test_a_hook_of_pycromanager_refuses_it() -> None:
    with pytest.raises(InputError, match="a hook is shown one exposure at a time"):
        autofocus_hook({"strategy": "two-shot"})


# --------------------------------------------------------------- the planes, ΔD

DELTA = {
    # settings beside na 0.75, pixel size 0.5: ΔD
    "set": ({"delta_um": 2.0}, 2.0),
    "slide of 1 µm": ({"na": 0.75}, round(float(np.hypot(0.822, 1.0)), 2)),
    "flat slide": ({"na": 0.75, "flatness_um": 0.0}, 0.82),
    "flat slide, high aperture": ({"na": 0.95, "flatness_um": 0.0}, 0.57),
    "rough slide": ({"na": 0.75, "flatness_um": 9.0}, 3.0),
}


@pytest.mark.parametrize("case", DELTA)
def test_a_plan_without_planes_is_given_them(case: str, core: CMMCorePlus) -> None:
    af, delta_um = DELTA[case]
    planned = with_planes(make_plan(af, z_plan=None, axis_order="tpgc"), core)
    assert list(planned.z_plan) == pytest.approx([-delta_um, delta_um])
    assert len([e for e in planned if e.index.get("g") == 0]) == 3  # focus, and two shots
    assert with_planes(planned, core) is planned


def test_planes_stand_beside_the_grid_of_a_position(core: CMMCorePlus) -> None:
    positions = [
        {"x": 0, "y": 0, "z": 0, "sequence": {"grid_plan": GRID}},
        {"x": 9000, "y": 0, "z": 0},
    ]
    planned = with_planes(
        make_plan({"delta_um": 1.0}, z_plan=None, grid_plan=None, stage_positions=positions),
        core,
    )
    events = [e for e in fresh(planned) if e.action.type == "acquire_image"]
    at = [(e.index["p"], e.index.get("g"), e.index["z"], e.z_pos) for e in events]
    tiles = [(0, 0), (0, 1), (1, None)]
    assert at == [(*tile, z, d) for tile in tiles for z, d in ((0, -1.0), (1, 1.0))]


def test_other_strategies_keep_their_plan(core: CMMCorePlus) -> None:
    plan = make_plan({"strategy": "hill-climb"}, z_plan=None)
    plan.metadata["mm_autofocus"].pop("refind_below")
    assert with_planes(plan, core) is plan


@given(st.floats(0.1, 20), st.floats(0, 20), st.floats(0, 5))
def test_delta_grows_with_depth_and_roughness(dof: float, flatness: float, more: float) -> None:
    delta = default_delta_um(dof, flatness)
    assert 0.5 <= delta <= 3.0
    assert default_delta_um(dof + more, flatness) >= delta
    assert default_delta_um(dof, flatness + more) >= delta
    if 0.5 < delta < 3.0:  # nearer than half a depth of field both shots show the same
        assert delta >= dof / 2


# ------------------------------------------------------------------- the order


@settings(max_examples=60, deadline=None)
@given(
    columns=st.integers(1, 4),
    loops=st.integers(1, 3),
    channels=st.integers(0, 3),
    order=st.sampled_from(["tpgcz", "tpgzc", "ptgcz", "ptgzc"]),
    keep=st.sampled_from([(), ("z",), ("c", "z")]),
    backlash_um=st.sampled_from([-1.0, 0.0, 1.0]),
)
def test_the_stage_travels_least(
    columns: int, loops: int, channels: int, order: str, keep: Any, backlash_um: float
) -> None:
    plan = make_plan(
        grid_plan={"rows": 1, "columns": columns},
        time_plan={"interval": 0, "loops": loops},
        channels=["A", "B", "C"][:channels] or None,
        axis_order=order,
        keep_shutter_open_across=keep,
    )
    events = list(fresh(plan))
    turned = list(in_turn(fresh(plan), backlash_um))

    def key(e: useq.MDAEvent) -> tuple[Any, ...]:
        return type(e.action).__name__, *sorted(e.index.items())

    def tile(e: useq.MDAEvent) -> tuple[Any, ...]:
        return e.index["t"], e.index["g"]

    # the same events, tile after tile as before, and the search first
    assert sorted(map(key, turned)) == sorted(map(key, events))
    assert [tile(e) for e in turned] == [tile(e) for e in events]
    assert [e.action for e in turned] == [e.action for e in events]
    # whatever belongs to the place in the order stays there
    for name in ("keep_shutter_open", "reset_event_timer", "min_start_time"):
        assert [getattr(e, name) for e in turned] == [getattr(e, name) for e in events]
    planes = [e.index["z"] for e in turned if e.action.type == "acquire_image"]
    changes = sum(a != b for a, b in itertools.pairwise(planes))
    sweeps = columns * loops * (max(channels, 1) if order.endswith("cz") else 1)
    if backlash_um:
        first = 0 if backlash_um > 0 else 1
        assert (planes[0], planes[-1], changes) == (first, 1 - first, 2 * sweeps - 1)
    else:
        assert changes == sweeps  # one move each, and none in between


# -------------------------------------------------------------------- the scan


def test_two_exposures_and_one_move_a_tile(scope: Scope) -> None:
    engine = scope.run(make_plan())
    first, *rest = engine.records
    assert first["looks"] > 0
    assert [(r["looks"], r["moves"], r["status"]) for r in rest] == [(0, 0, "ok")] * 3
    assert len(scope.snapped) == first["looks"] + 8
    assert scope.planes == [0, 1, 1, 0, 0, 1, 1, 0]
    f = first["z_um"]
    assert abs(f) <= NEAR_UM
    # after the search: to its lower shot, and then one move a tile
    after = scope.sent[first["moves"] + 1 :]
    assert after == pytest.approx([f - 1.5, f + 1.5, f - 1.5, f + 1.5, f - 1.5], abs=1e-3)
    expected = [f - 1.5 if plane == 0 else f + 1.5 for plane in scope.planes]
    assert scope.z == pytest.approx(expected, abs=0.01)
    for n, record in enumerate(engine.records):
        told = shots(record)
        assert told["age_tiles"] == n
        assert (told["f_um"], told["delta_um"]) == (pytest.approx(f), 1.5)
        assert (told["focus_id"], told["found_by"]) == (0, "hill-climb")
        assert told["sharper"] == int(np.argmax(told["scores"]))
        assert record["strategy"] == "two-shot"
    assert [shots(r)["why_found"] for r in engine.records] == ["there is no F yet", "", "", ""]
    ages = [shots(r)["age_s"] for r in engine.records]
    assert ages == sorted(ages)


@pytest.mark.parametrize(("backlash_um", "first"), [(1.0, 0), (-1.0, 1)])
def test_with_backlash_every_shot_comes_from_that_side(
    backlash_um: float, first: int, scope: Scope
) -> None:
    engine = scope.run(make_plan({"backlash_um": backlash_um}))
    assert scope.planes == [first, 1 - first] * 4
    f, side = engine.records[0]["z_um"], np.sign(backlash_um)
    near, far = f - 1.5 * side, f + 1.5 * side
    assert scope.sent[-9:] == pytest.approx([near - side, near, far] * 3, abs=1e-3)


def test_f_is_found_by_what_is_named(scope: Scope) -> None:
    engine = scope.run(make_plan({"find": "sweep", "step_um": 2.0, "max_looks": 30}))
    first, *rest = engine.records
    assert first["looks"] >= 21
    assert shots(rest[-1])["found_by"] == "sweep"
    assert [r["looks"] for r in rest] == [0] * 3


def test_f_is_found_by_the_hardware(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scope.core, "fullFocus", lambda: scope.core.setZPosition(0.5))
    engine = scope.run(make_plan({"find": "hardware"}))
    assert [shots(r)["found_by"] for r in engine.records] == ["hardware"] * 4
    assert [shots(r)["f_um"] for r in engine.records] == pytest.approx([0.5] * 4)
    assert sorted(set(np.round(scope.z, 2))) == [-1.0, 2.0]


def test_f_of_an_escalation(scope: Scope) -> None:
    engine = scope.run(
        make_plan({"max_looks": 60, "escalate": ["brent"], "tolerance_um": 1e-3})
    )
    first, *rest = engine.records
    assert len(first["details"]["tried"]) == 2
    assert [r["looks"] for r in rest] == [0] * 3


REGIONS = {
    # plan, setting: tiles at which F is found
    "grids of positions": ({"stage_positions": row(6, 4)}, {}, [0, 4]),
    "grids, one F": ({"stage_positions": row(6, 4)}, {"region": "run"}, [0]),
    "positions": ({"stage_positions": row(6, 4, 2), "grid_plan": None}, {}, [0]),
    "positions, each its own": (
        {"stage_positions": row(6, 4, 2), "grid_plan": None},
        {"region": "position"},
        [0, 1, 2],
    ),
    "every second tile": ({}, {"refind_every": 2}, [0, 2]),
    "time points": ({"time_plan": {"interval": 0, "loops": 3}}, {}, [0, 4, 8]),
    "every second time point": (
        {"time_plan": {"interval": 0, "loops": 3}},
        {"every": 2},
        [0, 8],
    ),
}


@pytest.mark.parametrize("case", REGIONS)
def test_where_f_is_found(case: str, scope: Scope) -> None:
    plan, af, found = REGIONS[case]
    engine = scope.run(make_plan(af, **plan))
    assert [i for i, r in enumerate(engine.records) if r["looks"]] == found
    assert len(scope.frames) == 2 * len(engine.records)


def test_the_z_of_the_plan_carries_f(scope: Scope) -> None:
    """F is kept relative to the z that the plan gives each position."""
    positions = row(6.0, 7.0, 9.0)
    engine = scope.run(make_plan(stage_positions=positions, grid_plan=None))
    f = engine.records[0]["z_um"]
    assert [shots(r)["f_um"] for r in engine.records] == pytest.approx([f, f + 1, f + 3])


def test_a_plan_without_z_stands_where_the_run_began(scope: Scope) -> None:
    scope.core.setZPosition(5.0)
    engine = scope.run(make_plan(stage_positions=[{"x": 0, "y": 0}]))
    f = engine.records[0]["z_um"]
    assert abs(f) <= NEAR_UM
    expected = [f - 1.5 if plane == 0 else f + 1.5 for plane in scope.planes]
    assert scope.z == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("order", ["tpgcz", "tpgzc"])
def test_channels_stand_around_the_same_f(order: str, scope: Scope) -> None:
    engine = scope.run(
        make_plan({"channel": "DAPI"}, channels=["FITC", "DAPI"], axis_order=order)
    )
    assert len(scope.frames) == 16
    f = engine.records[0]["z_um"]
    expected = [f - 1.5 if plane == 0 else f + 1.5 for plane in scope.planes]
    assert scope.z == pytest.approx(expected, abs=0.01)
    # of the channel of the looks, once both of its shots are there
    assert all(shots(r)["channel"] == 1 and shots(r)["scores"][1] for r in engine.records)


# ------------------------------------------------------------------- the file


def test_the_file_is_an_ordinary_one(scope: Scope, tmp_path: Path) -> None:
    file = tmp_path / "two.ome.tiff"
    result = run(make_plan({"refind_below": 0.3}), core=scope.core, output=file)
    assert (result.frames, result.exit_code) == (8, 0)
    with tifffile.TiffFile(file) as tif:
        assert len(tif.series) == 4
        assert tif.series[0].axes == "ZYX"
        stacks = [series.asarray() for series in tif.series]
    ome = ome_types.from_tiff(file)
    f = result.records[0]["z_um"]
    for n, image in enumerate(ome.images):
        assert image.pixels.size_z == 2
        z = {p.the_z: p.position_z for p in image.pixels.planes}
        assert z == {0: pytest.approx(f - 1.5, abs=0.01), 1: pytest.approx(f + 1.5, abs=0.01)}
        for plane in range(2):
            np.testing.assert_array_equal(stacks[n][plane], read_plane(file, n, z=plane))
    record = read_record(file)
    assert record.complete
    for n, focus in enumerate(record.focus):
        told = focus.details["two_shot"]
        assert told == shots(result.records[n])
        assert (told["delta_um"], told["age_tiles"]) == (1.5, n)
        score = [float(np.mean((s[:, 2:] - s[:, :-2]) ** 2.0)) for s in stacks[n].astype(float)]
        assert told["scores"] == pytest.approx(score)
        assert told["sharper"] == int(np.argmax(score))
        assert {(u.image, u.z, u.status) for u in focus.frames} == {(n, 0, "ok"), (n, 1, "ok")}
    document = inspect_json(record)
    assert document["autofocus"][2]["details"]["two_shot"]["age_tiles"] == 2
    write_report(file, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "two shots at F ± 1.5 µm: 4 tiles, F found at 1 of them" in page
    assert "F, tiles ago" in page


def test_what_the_second_shot_shows_holds_for_the_first_too(tmp_path: Path) -> None:
    """Also in a file whose writer was killed, and for every other frame of the file."""
    file, copy = tmp_path / "a.ome.tiff", tmp_path / "b.ome.tiff"
    plan = make_plan(grid_plan={"rows": 1, "columns": 2})
    sink = OmeTiffSink(file)
    sink.setup(plan, None)
    image = np.zeros((16, 16), np.uint16)
    images = [e for e in fresh(plan) if e.action.type == "acquire_image"]
    for n, event in enumerate(images):
        tile = n // 2
        record = {"focus_id": tile, "status": "ok", "age_s": 1.0, "curve": [[0.0, 1.0]] * 3}
        if n % 2:
            record |= {"status": "stale", "revised": 1, "reason": "fell", "curve": []}
        sink.append(image, event, {"mm_autofocus": record})
    deadline = time.monotonic() + 10
    while sink.frames_written < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    shutil.copy(file, copy)
    sink.close()
    for path in (file, copy):
        found = read_record(path)
        assert found.complete == (path == file)
        for focus in found.focus:
            assert (focus.status, focus.reason, len(focus.curve)) == ("stale", "fell", 3)
            assert [use.status for use in focus.frames] == ["stale", "stale"]
    ome = ome_types.from_tiff(file)
    tags = {a.id: a.value for a in ome.structured_annotations.tag_annotations}
    for pixels in (i.pixels for i in ome.images):
        for plane in pixels.planes:
            assert [tags[r.id] for r in plane.annotation_refs if r.id in tags] == ["stale"]


def test_a_plan_without_planes_makes_the_same_file(core: CMMCorePlus, tmp_path: Path) -> None:
    file = tmp_path / "two.ome.tiff"
    result = run(make_plan({"delta_um": 1.0}, z_plan=None), core=core, output=file)
    record = read_record(file)
    assert (result.frames, record.frames_planned) == (8, 8)
    assert {image.shape[:3] for image in record.images} == {(1, 1, 2)}
    assert record.plan is not None
    assert record.plan["z_plan"]["relative"] == [-1.0, 1.0]


# --------------------------------------------------------------- finding F again


def test_f_is_found_again_where_the_shots_fall(scope: Scope) -> None:
    # the plan's z is 12 µm off from the fifth tile on, and F with it
    positions = row(6, 6, 6, 6, 18, 18, 18, 18)
    plan = make_plan({"refind_below": 0.5}, stage_positions=positions, grid_plan=None)
    engine = scope.run(plan)
    assert [i for i, r in enumerate(engine.records) if r["looks"]] == [0, 5]
    fallen = engine.records[4]
    assert fallen["status"] == "low-confidence"
    assert "% of the median of the tiles before" in fallen["reason"]
    assert shots(engine.records[5])["why_found"] == fallen["reason"]
    assert abs(engine.records[5]["z_um"]) <= NEAR_UM
    assert [r["status"] for r in engine.records[5:]] == ["ok"] * 3
    # both frames of the tile are what its record says, whatever was thought at the first
    assert scope.frames[9][1]["mm_autofocus"]["status"] == "low-confidence"


def test_where_f_is_not_found_again_fallen_tiles_are_stale(scope: Scope) -> None:
    positions = row(6, 6, 6, 6, 30, 30)
    engine = scope.run(make_plan(stage_positions=positions, grid_plan=None))
    assert [i for i, r in enumerate(engine.records) if r["looks"]] == [0]
    assert [r["status"] for r in engine.records] == ["ok"] * 4 + ["stale"] * 2
    assert "refind_below is off" in engine.records[4]["reason"]


def test_blank_tiles_start_no_search(scope: Scope) -> None:
    scope.blank_from_um = (2300.0, 5000.0)  # the fifth to the ninth
    plan = make_plan({"refind_below": 0.5}, stage_positions=row(*[6.0] * 12), grid_plan=None)
    engine = scope.run(plan)
    assert [i for i, r in enumerate(engine.records) if r["looks"]] == [0]
    statuses = [r["status"] for r in engine.records]
    assert statuses == ["ok"] * 4 + ["low-confidence"] * 5 + ["ok"] * 3
    blank = engine.records[5]
    assert blank["reason"] == "neither shot shows anything to judge focus by"
    assert shots(blank)["sharper"] is None


def test_a_search_that_fails_leaves_f_as_it_was(scope: Scope) -> None:
    scope.blank_from_um = (1700.0, 3700.0)  # the fourth to the seventh
    plan = make_plan(
        {"refind_every": 3, "on_failure": "skip"},
        stage_positions=row(*[6.0] * 12),
        grid_plan=None,
    )
    engine = scope.run(plan)
    searched = [i for i, r in enumerate(engine.records) if r["looks"]]
    assert searched == [0, 3, 4, 6, 10]  # ever later
    assert len(scope.frames) == 24  # no tile is left out that has an F
    statuses = [r["status"] for r in engine.records]
    # the first tile that shows something proves F
    assert statuses == ["ok"] * 3 + ["stale"] * 4 + ["ok"] * 5
    assert engine.records[3]["reason"].startswith("F could not be found again (")
    assert shots(engine.records[5])["age_tiles"] == 5
    f = engine.records[0]["z_um"]
    assert scope.z[6] == pytest.approx(f - 1.5 if scope.planes[6] == 0 else f + 1.5, abs=0.01)


POLICIES = {
    # frames, statuses of the tiles
    "keep": (8, ["failed", "failed", "ok", "ok"]),
    "skip": (4, ["failed", "failed", "ok", "ok"]),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_where_the_first_tile_is_blank_the_next_is_tried(
    policy: str, scope: Scope, tmp_path: Path
) -> None:
    scope.blank_from_um = (-100.0, 1000.0)
    frames, statuses = POLICIES[policy]
    file = tmp_path / "run.ome.tiff"
    plan = make_plan({"on_failure": policy}, stage_positions=row(*[6.0] * 4), grid_plan=None)
    result = run(plan, core=scope.core, output=file)
    assert (result.frames, result.exit_code) == (frames, 1)
    assert [r["status"] for r in result.records] == statuses
    assert [bool(r["looks"]) for r in result.records] == [True, True, True, False]
    assert shots(result.records[0])["age_tiles"] is None
    record = read_record(file)
    assert [f.status for f in record.focus] == statuses
    gaps = [image.gaps for image in record.images]
    assert gaps == ([{"skipped": 2}] * 2 + [{}] * 2 if policy == "skip" else [{}] * 4)
    if policy == "keep":  # around the plan's z
        assert sorted(scope.z[:2]) == pytest.approx([4.5, 7.5], abs=0.01)


def test_abort_ends_the_run_at_the_first_tile(scope: Scope) -> None:
    scope.blank_from_um = (-100.0, 1000.0)
    plan = make_plan({"on_failure": "abort"}, stage_positions=row(6, 6), grid_plan=None)
    with pytest.raises(FocusFailedError, match="p000: not focused"):
        run(plan, core=scope.core)
    assert scope.frames == []
    assert scope.core.getZPosition() == pytest.approx(0, abs=0.01)  # where it was before


def test_f_outside_of_the_limits_is_not_stood_on(scope: Scope) -> None:
    # F follows the plan's z, and would be at 56 + dz with dz about -6, +1.5: within; at 59 not
    af = {"z_max_um": 14.0}
    scope.core.setZPosition(0.0)
    positions = row(-6.0, 5.0, 10.0)  # dz is +6: F at 11 is within 12.5, F at 16 is not
    engine = scope.run(make_plan(af, stage_positions=positions, grid_plan=None))
    assert max(scope.sent) <= 14.0
    assert [bool(r["looks"]) for r in engine.records] == [True, False, True]
    assert shots(engine.records[2])["why_found"] == "F ± ΔD would leave the limits there"


def test_f_follows_the_surface(scope: Scope) -> None:
    # the plan's z climbs by 1.5 µm a tile, which the microscope does not
    positions = row(*[1.5 * i for i in range(16)])
    af = {"prior": "surface", "flatness_um": 0.2, "refind_above_um": 1.6}
    engine = scope.run(make_plan(af, stage_positions=positions, grid_plan=None))
    searched = [i for i, r in enumerate(engine.records) if r["looks"]]
    assert searched[:4] == [0, 1, 2, 3]  # what it predicts must be checked first
    assert len(searched) < 16
    stood = [r for r in engine.records if not r["looks"]]
    assert max(abs(shots(r)["f_um"]) for r in stood) <= 2.0
    whys = {shots(r)["why_found"] for r in engine.records[1:] if r["looks"]}
    assert all(why.startswith("the surface is unsure by") for why in whys)


def test_a_surface_is_less_sure_farther_away() -> None:
    surface = FocusSurface("surface", sd_um=10.0)
    assert surface.sd_at(0, 0) == 10.0
    for i in range(6):
        surface.add(("p", i), 100.0 * i, 0.0, 0.5 * (i % 2))
    near, far = surface.sd_at(600, 0), surface.sd_at(900, 0)
    assert near < 10.0
    assert far == pytest.approx(4 * near)
    assert surface.sd_at(250, 0) == near  # between its tiles


def test_an_aged_f_is_stale(scope: Scope) -> None:
    engine = scope.run(make_plan({"max_age_s": 1e-4}))
    assert engine.records[3]["status"] == "ok"
    last = scope.frames[-1][1]["mm_autofocus"]
    assert last["status"] == "stale"
    assert "max_age_s" in last["reason"]


# ---------------------------------------------------------------- the books alone

_TEXTURE = gaussian_filter(np.random.default_rng(5).normal(size=(160, 160)), 1.0)


class Books:
    """A two-shot scan without a microscope: tiles of a contrast, searches that are told."""

    def __init__(self, **af: Any) -> None:
        parsed = parse_settings({"strategy": "two-shot", **af})
        assert isinstance(parsed, TwoShotSettings)
        self.ledger = Ledger(parsed, 0.0)
        self.shots = Shots(parsed, self.ledger, 1.0, by_position=False)
        self.rng = np.random.default_rng(0)
        self.searches: list[int] = []
        self.n = 0

    def tile(
        self, contrast: float, found_um: float | None = 0.0, error_um: float | None = None
    ) -> dict[str, Any]:
        """One tile; 0 is a blank one, `found_um` ± `error_um` what a search would find."""
        place = Place({"p": self.n}, None, 100.0 * self.n)
        if self.shots.why_find(place):
            self.searches.append(self.n)
            result = FocusResult(None, "failed", strategy="hill-climb", reason="flat")
            if found_um is not None:
                result = FocusResult(found_um, "ok", strategy="hill-climb")
            if error_um is not None:
                result = replace(
                    result,
                    status="low-confidence",
                    reason="weak",
                    expected_error_um=error_um,
                )
            self.shots.enter(
                place,
                result,
                z_before_um=0.0,
                z_after_um=found_um or 0.0,
                now_s=float(self.n),
            )
        else:
            self.shots.stand(place, 0.0, float(self.n))
        record = None
        for z in range(2):
            noise = self.rng.normal(0, 2, (160, 160))
            image = np.rint(500 + contrast * 100 * _TEXTURE + noise).astype(np.uint16)
            event = useq.MDAEvent(index={"p": self.n, "z": z})
            record = self.shots.add(place, event, image)
        self.n += 1
        assert record is not None
        return record


def test_blank_is_told_from_out_of_focus() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 3, (256, 256))
    assert shows_nothing(np.rint(400 + noise).astype(np.uint16))
    texture = gaussian_filter(rng.normal(size=(256, 256)), 6.0)
    texture *= 40 / texture.std()
    assert not shows_nothing(np.rint(400 + texture + noise).astype(np.uint16))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0, 3.0]), min_size=20, max_size=150))
def test_the_shots_never_start_endless_searches(contrasts: list[float]) -> None:
    """F is always where it was, or nothing is found: the searches become ever rarer."""
    books = Books(refind_below=0.5)
    books.tile(1.0)
    for contrast in contrasts:
        books.tile(contrast, found_um=None if contrast == 0 else 0.0)
    assert len(books.searches) <= 1 + 2 + np.log2(len(contrasts)) + len(contrasts) / 64


def test_a_search_that_helps_makes_the_next_welcome() -> None:
    books = Books(refind_below=0.5)
    for _ in range(4):
        books.tile(1.0)
    for drift in (3.0, 6.0, 9.0):
        books.tile(0.3)  # falls
        books.tile(1.0, found_um=drift)  # and is found somewhere else
        books.tile(1.0)
    assert books.searches == [0, 5, 8, 11]


def test_tiles_that_stand_on_an_unsure_f_say_so() -> None:
    books = Books(refind_every=6)
    assert books.tile(1.0, error_um=0.4)["status"] == "low-confidence"
    for _ in range(5):
        record = books.tile(1.0)
        assert (record["status"], record["reason"]) == (
            "low-confidence",
            "F was not sure: weak",
        )
    assert books.tile(1.0)["status"] == "ok"  # found again
    assert books.tile(1.0)["status"] == "ok"
    assert books.searches == [0, 6]


def test_an_f_that_stands_is_better_than_a_guess() -> None:
    books = Books(refind_every=4)
    for _ in range(4):
        books.tile(1.0)
    record = books.tile(0.0, found_um=7.0, error_um=3.0)
    assert (record["status"], record["z_um"]) == ("stale", 0.0)
    assert record["reason"] == "F could not be found again (weak)"
    assert books.tile(1.0, found_um=0.5, error_um=0.5)["z_um"] == 0.5  # within ΔD of 1 µm
    assert books.searches == [0, 4, 5]


def test_blank_tiles_are_no_part_of_the_median() -> None:
    books = Books(refind_below=0.5)
    for _ in range(4):
        books.tile(1.0)
    before = shots(books.tile(1.0))["median"]
    for _ in range(20):
        assert books.tile(0.0)["status"] == "low-confidence"
    assert shots(books.tile(1.0))["median"] == pytest.approx(before, rel=0.05)
    assert books.searches == [0]


def test_a_frame_that_cannot_be_measured_costs_nothing(caplog: Any) -> None:
    books = Books()
    books.tile(1.0)
    place = Place({"p": 1}, None)
    books.shots.stand(place, 0.0, 1.0)
    for z in range(2):
        event = useq.MDAEvent(index={"p": 1, "z": z})
        assert books.shots.add(place, event, np.full((8, 8), np.nan, np.float32)) is None
    assert shots(books.ledger.record_of(place))["sharper"] is None
    assert "could not be measured" in caplog.text


# -------------------------------------------------- sequences, models, faults


def test_hardware_sequenced_shots(
    scope: Scope, core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.setProperty("Z", "UseSequences", "Yes")
    loaded: list[tuple[float, ...]] = []
    load = core.loadStageSequence
    monkeypatch.setattr(
        core, "loadStageSequence", lambda s, z: (loaded.append(tuple(z)), load(s, z))[1]
    )
    engine = scope.run(make_plan({"refind_below": 0.3}))
    f = engine.records[0]["z_um"]
    up, down = (f - 1.5, f + 1.5), (f + 1.5, f - 1.5)
    assert loaded == [pytest.approx(z, abs=1e-3) for z in (up, down, up, down)]
    assert scope.planes == [0, 1, 1, 0, 0, 1, 1, 0]
    expected = [f - 1.5 if plane == 0 else f + 1.5 for plane in scope.planes]
    assert scope.z == pytest.approx(expected, abs=1e-3)
    assert all(None not in shots(r)["scores"] for r in engine.records)


def test_a_model_finds_f_and_the_first_shot_proves_it(
    scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = [3.0]

    def answer(_: Any) -> float:
        said = errors.pop(0) if errors else 0.0
        return float(scope.core.getZPosition()) - 2.0 + said  # focus is at 2

    monkeypatch.setattr(learned_rig, "MODEL", FakeModel(answer))
    af = {"find": "one-shot", "model": "learned_rig:MODEL", "tolerance_um": 0.5}
    engine = scope.run(make_plan({**af, "refind_below": 0.3, "repeatability_um": 0.0}))
    first = engine.records[0]
    # one look, the lower shot 3 µm off and again where the frame shows it belongs
    assert scope.snapped[:3] == pytest.approx([6.0, -2.5, 0.5], abs=0.01)
    assert (first["verified"], first["corrections"]) == (True, 1)
    assert [shots(r)["f_um"] for r in engine.records] == pytest.approx([2.0] * 4, abs=0.01)
    assert sorted(set(np.round(scope.z, 2))) == [0.5, 3.5]
    assert len(scope.snapped) == 2 + 8


def test_a_cancel_during_the_search_takes_no_frame(scope: Scope, core: CMMCorePlus) -> None:
    engine = AutofocusEngine(core, restore_initial_state=False)
    engine.signals.look.connect(lambda _: core.mda.cancel())
    core.mda.set_engine(engine)
    core.mda.run(make_plan())
    assert (scope.frames, engine.records) == ([], [])
    assert core.getZPosition() == pytest.approx(6.0, abs=0.01)


def test_a_cancel_between_the_shots_keeps_the_first(
    scope: Scope, core: CMMCorePlus, tmp_path: Path
) -> None:
    def cancel(*_: Any) -> None:
        if len(scope.frames) == 3:
            core.mda.cancel()

    core.mda.events.frameReady.connect(cancel)
    file = tmp_path / "run.ome.tiff"
    result = run(make_plan(), core=core, output=file)
    assert result.cancelled
    record = read_record(file)
    assert (record.complete, record.frames) == (True, 3)
    told = record.focus[1].details["two_shot"]
    assert (told["sharper"], told["scores"]) == (None, [None, None])


@pytest.mark.parametrize("what", ["setPosition", "setXYPosition"])
def test_a_stage_that_breaks_leaves_a_readable_file(
    what: str, scope: Scope, core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    move = getattr(core, what)

    def broken(*args: Any) -> None:
        if len(scope.frames) >= 3:
            raise RuntimeError("the stage has gone")
        move(*args)

    monkeypatch.setattr(core, what, broken)
    file = tmp_path / "run.ome.tiff"
    with pytest.raises(HardwareError, match="the stage has gone"):
        run(make_plan(), core=core, output=file)
    assert 3 <= read_record(file).frames <= 4


def test_a_camera_that_misses_a_shot_says_so(
    scope: Scope, core: CMMCorePlus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snap = core.snapImage

    def once_broken() -> None:
        if len(scope.frames) == 3:
            scope.frames.append(scope.frames[-1])
            raise RuntimeError("no frame")
        snap()

    monkeypatch.setattr(core, "snapImage", once_broken)
    file = tmp_path / "run.ome.tiff"
    result = run(make_plan(), core=core, output=file)
    assert (result.missing, result.frames) == (1, 7)
    record = read_record(file)
    assert [f.details["two_shot"]["sharper"] is None for f in record.focus] == [
        False,
        True,
        False,
        False,
    ]


def test_stage_and_camera_are_as_before(core: CMMCorePlus) -> None:
    core.setZPosition(3.0)
    core.setXYPosition(10.0, 20.0)
    run(make_plan({"channel": "DAPI", "exposure_ms": 3.0, "binning": 2}), core=core)
    assert core.getZPosition() == pytest.approx(3.0, abs=0.01)
    assert core.getXPosition() == pytest.approx(10.0, abs=0.1)
    assert core.getProperty("Camera", "Binning") == "1"
    assert core.getExposure() == 1.0


def test_the_saved_frame_waits_until_the_stage_has_settled(
    scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("mm_autofocus.hooks.pymmcore.time.sleep", waited.append)
    engine = scope.run(make_plan({"settle_ms": 7.0}))
    moved = len(scope.sent) - 1 - engine.records[0]["moves"]
    assert moved == 5
    assert waited.count(0.007) >= moved


# --------------------------------------------------------------- the virtual slide


@pytest.fixture
def slide() -> Iterator[Callable[[], CMMCorePlus]]:
    cores: list[CMMCorePlus] = []

    def make() -> CMMCorePlus:
        cores.append(open_core("virtual_slide.cfg"))
        cores[-1].setProperty("Camera", "sensor", "256x256")
        cores[-1].setProperty("Optics", "quality", "preview")
        return cores[-1]

    yield make
    for core in cores:
        close_core(core)


@pytest.mark.parametrize("sequenced", [False, True])
def test_focus_lies_between_the_shots_on_the_virtual_slide(
    sequenced: bool, slide: Callable[[], CMMCorePlus], tmp_path: Path
) -> None:
    from mm_autofocus.sim.truth import defocus_um, microscope_of

    core = slide()
    if sequenced:
        core.setProperty("Z", "sequence_length", 10)
    scope = microscope_of(core)
    (corner,) = list(scope.slide.find_fields("dense", 1, (332.8, 166.4)))
    plan = make_plan(
        {"na": 0.75, "backlash_um": 1.0, "flatness_um": 0.5},
        stage_positions=[{"x": corner[0], "y": corner[1], "z": 3.0}],
        grid_plan={"rows": 2, "columns": 3, "mode": "row_wise_snake"},
        channels=[{"config": "Brightfield", "exposure": 5.0}],
        z_plan=None,
    )
    file = tmp_path / "run.ome.tiff"
    result = run(plan, core=core, output=file)
    assert (result.frames, result.failed) == (12, [])
    assert [bool(r["looks"]) for r in result.records] == [True] + [False] * 5
    shot = list(scope.exposures)[-12:]
    off = [defocus_um(scope, exposure) for exposure in shot]
    record = read_record(file)
    for n, focus in enumerate(record.focus):
        lower, upper = off[2 * n], off[2 * n + 1]
        assert lower is not None
        assert upper is not None
        assert lower < 0 < upper
        told = focus.details["two_shot"]
        if abs(abs(lower) - abs(upper)) > 0.5:
            assert told["sharper"] == (0 if abs(lower) < abs(upper) else 1)
