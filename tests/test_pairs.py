"""Pairs of shots: which planes they are, what is drawn, and what is fused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus.errors import InputError
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.models.fusion import fuse, sharper_of
from mm_autofocus.training import Dataset
from mm_autofocus.training.augment import AugmentOptions
from mm_autofocus.training.fields import Field
from mm_autofocus.training.importance import content_map
from mm_autofocus.training.options import PairOptions
from mm_autofocus.training.pairs import (
    PairSource,
    Truths,
    draw_pair,
    pair_near,
    validation_pairs,
)
from scipy.ndimage import gaussian_filter

from blurred import make_dataset

# The planes of the dataset are 1 µm apart.
PAIRS = PairOptions(half_um=(1, 3))
STILL = AugmentOptions(turns="none", brightness=(1, 1), contrast=(1, 1), offset=0, noise=0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("pairs"), fields=6)


@pytest.fixture(scope="module")
def fields(dataset: Dataset) -> list[Field]:
    made = []
    for stack in dataset.labelled:
        mask = content_map(stack)
        made.append(
            Field(stack, np.zeros((1, 1), np.intp), np.zeros(1), mask, np.argwhere(mask))
        )
    return made


def source(fields: list[Field], change: AugmentOptions = STILL, **kwargs) -> PairSource:
    truths = Truths(fields, kwargs.pop("truth", "plane"), kwargs.pop("folder", Path("none")))
    return PairSource(fields, truths, 64, 4, 0, change, PAIRS)


@given(
    middle=st.floats(-3, 3),
    half=st.floats(0.5, 3),
    step=st.floats(0.2, 1.0),
    tolerance=st.floats(0.05, 0.6),
)
@settings(max_examples=200, deadline=None)
def test_a_pair_is_where_it_was_asked_for_or_is_none(middle, half, step, tolerance) -> None:
    defocus = np.arange(-7, 7.001, step)
    pair = pair_near(defocus, middle, half, tolerance)
    reachable = tolerance >= step / 2 + 1e-9 and 2 * half > step
    if pair is None:
        assert not reachable
        return
    assert pair.lower < pair.upper
    assert abs(pair.lower_um - (middle - half)) <= tolerance + 1e-9
    assert abs(pair.upper_um - (middle + half)) <= tolerance + 1e-9
    assert pair.half_um == pytest.approx(half, abs=tolerance + 1e-9)
    # from either shot focus lies as far as that shot is off, towards the other one if enclosed
    assert pair.toward_um(1) + pair.toward_um(-1) == pytest.approx(2 * pair.half_um)
    assert (pair.toward_um(1) > 0) == (pair.lower_um < 0)


def test_drawn_pairs_lie_as_the_options_say(dataset) -> None:
    rng = np.random.default_rng(0)
    stack = dataset.labelled[0]
    pairs = [draw_pair(stack, PAIRS, rng) for _ in range(300)]
    halves = np.array([p.half_um for p in pairs])
    middles = np.array([p.middle_um for p in pairs])
    assert halves.min() >= 1 - 0.6
    assert halves.max() <= 3 + 0.6
    assert len(set(halves.round(3))) >= 4
    assert np.abs(middles).max() <= PAIRS.focus_most_um + 0.6
    assert 0.7 < middles.std() < 1.3  # 1 µm, and the planes


def test_a_stack_without_such_planes_is_named(dataset) -> None:
    stack = dataset.labelled[0]
    short = replace(stack, z_um=stack.z_um[:2], pages=stack.pages[:2])
    with pytest.raises(InputError, match="hardly any two of its planes, 1 µm apart"):
        draw_pair(short, PAIRS, np.random.default_rng(0))


def test_a_sample_is_a_function_of_its_number(fields) -> None:
    one, other = source(fields), source(fields)
    other[5]  # whatever was asked before
    for number in (0, 7, 31):
        a, b = one[number], other[number]
        assert {k: v.shape for k, v in a.items() if hasattr(v, "shape") and v.ndim} == {
            "shots": (2, 64, 64),
            "truth": (1, 64, 64),
        }
        for key, value in a.items():
            np.testing.assert_array_equal(value, b[key])


def test_the_sharper_shot_comes_first_and_side_says_which(fields) -> None:
    made = source(fields)
    energies = []
    for number in range(24):
        s = made[number]
        rough = [np.square(np.diff(shot)).mean() for shot in s["shots"]]
        energies.append(rough[0] > 0.97 * rough[1])
        # the nearer shot is the sharper one, but for those that are equally near
        if abs(s["toward_um"] - s["half_um"]) > 1:
            assert s["toward_um"] < s["half_um"]
    assert np.mean(energies) > 0.9


def test_shots_and_truth_are_changed_alike_but_for_noise(fields) -> None:
    change = AugmentOptions(noise=0.0, offset=0.02)
    plain, changed = source(fields)[3], source(fields, change)[3]
    assert not np.array_equal(plain["shots"], changed["shots"])
    # one gain and offset for all three, whatever the turn: order statistics agree
    old = np.sort(np.concatenate((plain["shots"], plain["truth"])), axis=None)
    new = np.sort(np.concatenate((changed["shots"], changed["truth"])), axis=None)
    inside = (new > 0) & (new < 1)
    slope, level = np.polyfit(old[inside], new[inside], 1)
    np.testing.assert_allclose(new[inside], slope * old[inside] + level, atol=1e-4)
    noisy = source(fields, AugmentOptions(noise=0.05, turns="none", offset=0.0))[3]
    quiet = source(fields, AugmentOptions(noise=0.0, turns="none", offset=0.0))[3]
    np.testing.assert_array_equal(noisy["truth"], quiet["truth"])
    assert np.std(noisy["shots"] - quiet["shots"]) > 1e-3


def test_validation_is_the_same_each_time_and_spread_over_the_fields(fields) -> None:
    once = validation_pairs(fields, PAIRS, 64, per_field=3, most=100)
    assert once == validation_pairs(fields, PAIRS, 64, per_field=3, most=100)
    assert len(once) == 3 * len(fields)
    few = validation_pairs(fields, PAIRS, 64, per_field=3, most=6)
    assert len(few) == 6
    assert len({pair.field for pair, _, _ in few}) > 3


def test_a_fusion_is_made_once_and_kept(fields, tmp_path) -> None:
    made = source(fields, truth="fusion", folder=tmp_path)
    first = made[0]["truth"]
    files = list(tmp_path.glob("*.npy"))
    assert len(files) == 1
    before = files[0].stat().st_mtime_ns
    np.testing.assert_array_equal(
        source(fields, truth="fusion", folder=tmp_path)[0]["truth"], first
    )
    assert files[0].stat().st_mtime_ns == before
    assert not list(tmp_path.glob("*.new"))


def test_what_is_sharp_on_either_side_is_sharp_in_the_fusion() -> None:
    rng = np.random.default_rng(1)
    truth = gaussian_filter(rng.random((3, 96, 128)), (0, 1, 1)).astype(np.float32)
    blurred = gaussian_filter(truth, (0, 3, 3))
    left, right = truth.copy(), truth.copy()
    left[..., 64:], right[..., :64] = blurred[..., 64:], blurred[..., :64]
    fused = fuse(np.stack((left, right)))
    away = np.r_[0:52, 76:128]  # but for the seam
    error = np.abs(fused - truth)[..., away].mean()
    assert error < 0.05 * np.abs(left - truth)[..., away].mean()
    assert fused.shape == truth.shape
    assert sharper_of(truth, blurred) == 1
    assert sharper_of(blurred, truth) == -1
    assert sharper_of(truth, truth) == 1


def test_planes_without_detail_are_averaged() -> None:
    rng = np.random.default_rng(2)
    planes = (0.5 + 0.003 * rng.standard_normal((5, 1, 64, 64))).astype(np.float32)
    assert fuse(planes).std() < 0.75 * planes[0].std()
    with pytest.raises(InputError, match="must be"):
        fuse(planes[0])


def test_the_run_and_the_model_call_the_same_shot_the_sharper() -> None:
    measure = FocusMeasure()
    rng = np.random.default_rng(3)
    for _ in range(40):
        lower, upper = rng.random((2, 3, 48, 64)).astype(np.float32)
        scores = [
            measure.score(measure.grey(s.transpose(1, 2, 0).copy())) for s in (lower, upper)
        ]
        assert sharper_of(lower, upper) == (1 if scores[0] >= scores[1] else -1)
