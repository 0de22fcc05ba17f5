"""What is drawn is seeded, within the stated ranges, and what the microscope then has."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from mm_autofocus.errors import InputError
from mm_autofocus.sim.draws import (
    BENCHMARK_SEEDS,
    CAMERA,
    OPTICS,
    SLIDE,
    TRAINING_SEEDS,
    draw,
    draw_optics,
)
from mm_autofocus.sim.microscope import OBJECTIVES, Microscope


def test_training_and_benchmarks_share_no_seed() -> None:
    assert not set(TRAINING_SEEDS[:: len(TRAINING_SEEDS) - 1]) & set(BENCHMARK_SEEDS)
    assert TRAINING_SEEDS.stop <= BENCHMARK_SEEDS.start


def test_the_same_seed_draws_the_same_and_another_another() -> None:
    assert draw(5, "smear") == draw(5, "smear")
    a, b = draw(5), draw(6)
    assert a.slide != b.slide
    assert a.optics != b.optics
    assert a.camera != b.camera
    # what is under the lens does not change the lens
    assert draw(5, "tissue").optics == draw(5, "smear").optics


def test_all_is_within_its_range_and_fills_it() -> None:
    draws = [draw(s) for s in range(200)]
    drawn = [
        {
            **d.optics.aberrations,
            "sigma": d.optics.sigma,
            **asdict(d.slide),
            **asdict(d.camera),
            "dose": d.dose,
        }
        for d in draws
    ]
    for name, (low, high) in {**OPTICS, **SLIDE, **CAMERA}.items():
        values = np.array([d[name] for d in drawn])
        assert low <= values.min() <= values.max() <= high, name
        assert np.ptp(values) > 0.9 * (high - low), name
        assert abs(values.mean() - (low + high) / 2) < 0.1 * (high - low), name
    assert (
        len({d.slide.seed for d in draws}) == len({d.camera.camera_seed for d in draws}) == 200
    )


def test_the_shipped_lens_lies_within() -> None:
    nominal = OBJECTIVES["20x/0.75"].lens.aberrations
    for name in (
        "spherical_waves",
        "astigmatism_waves",
        "axial_colour_um",
        "lateral_colour_um",
    ):
        low, high = OPTICS[name]
        assert low <= getattr(nominal, name) <= high, name
    assert OPTICS["sigma"][0] <= Microscope().sigma <= OPTICS["sigma"][1]


def test_the_microscope_has_what_was_drawn() -> None:
    scope, d = Microscope(), draw(900_123, "smear")
    d.apply(scope)
    lens = scope.objectives[scope.objective].lens
    assert lens.na == 0.75
    for name, value in d.optics.aberrations.items():
        assert getattr(lens.aberrations, name) == value
    assert (scope.sigma, scope.slide_settings, scope.camera.settings) == (
        d.optics.sigma,
        d.slide,
        d.camera,
    )
    scope.shutter_open = True
    assert scope._dose() == pytest.approx(d.dose)


def test_a_blank_field_does_not_saturate_the_camera() -> None:
    """85 % × the largest dose, offset included, stays below full scale."""
    from mm_autofocus.sim.camera import FULL_SCALE

    assert FULL_SCALE * CAMERA["dose"][1] + CAMERA["offset"][1] < 0.97


@pytest.mark.parametrize("seed", [-1, TRAINING_SEEDS.stop, BENCHMARK_SEEDS.stop])
def test_seeds_of_neither_are_refused(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed: {seed} is not one of"):
        draw(seed)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="kind: 'stone' is not one of tissue"):
        draw(1, "stone")


def test_optics_alone_follow_their_generator() -> None:
    a, b = (draw_optics(np.random.default_rng(4)) for _ in range(2))
    assert a == b
    assert set(a.aberrations) | {"sigma"} == set(OPTICS)
