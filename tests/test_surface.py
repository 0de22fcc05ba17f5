"""The focus surface: a law (it recovers a plane), and what it claims of itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus.surface import FocusSurface

slopes = st.floats(-0.02, 0.02)


@settings(max_examples=25, deadline=None)
@given(slopes, slopes, st.floats(-50, 50), st.randoms(use_true_random=False))
def test_a_plane_is_recovered(a: float, b: float, c: float, random: object) -> None:
    surface = FocusSurface("surface")
    rng = np.random.default_rng(random.randrange(2**32))  # type: ignore[attr-defined]
    tiles = rng.uniform(-2000, 2000, (8, 2))
    for i, (x, y) in enumerate(tiles):
        surface.add(i, x, y, a * x + b * y + c)
    x, y = tiles.mean(axis=0)
    prior = surface.predict("new", x, y)
    assert prior is not None
    assert prior.z_um == pytest.approx(a * x + b * y + c, abs=0.05)


def test_the_first_row_is_extrapolated_along_and_not_across() -> None:
    surface = FocusSurface("surface")
    for i in range(4):
        surface.add(i, 100.0 * i, 0.0, 0.5 * i)
    along = surface.predict("next", 400.0, 0.0)
    across = surface.predict("row 2", 300.0, 100.0)
    assert along is not None
    assert across is not None
    assert along.z_um == pytest.approx(2.0, abs=1e-6)
    assert across.z_um == pytest.approx(1.5, abs=1e-6)


def test_it_claims_what_its_predictions_have_shown() -> None:
    rng = np.random.default_rng(0)
    surface = FocusSurface("surface", sd_um=10.0, floor_um=0.01)
    errors: list[float] = []
    claims: list[float] = []
    for i in range(64):
        x, y = 300.0 * (i % 8), 300.0 * (i // 8)
        z = 0.01 * x - 0.004 * y + 1.5 * np.sin(x / 600) + rng.normal(0, 0.1)
        prior = surface.predict(i, x, y)
        if prior is not None and i >= 24:
            errors.append(z - prior.z_um)
            claims.append(prior.sd_um)
        surface.add(i, x, y, z)
    rms = float(np.sqrt(np.mean(np.square(errors))))
    assert rms < 0.3
    assert 0.4 < rms / float(np.mean(claims)) < 2.5


@pytest.mark.parametrize("mode", ["last", "surface", "none"])
def test_nothing_known_nothing_claimed(mode: str) -> None:
    surface = FocusSurface(mode)  # type: ignore[arg-type]
    assert surface.predict(0, 0.0, 0.0) is None
    assert surface.add(0, 0.0, 0.0, 1.0) is None
    prior = surface.predict(0, 0.0, 0.0)
    assert (prior is None) == (mode == "none")


def test_last_prefers_the_same_place_to_the_neighbour() -> None:
    surface = FocusSurface("last")
    surface.add("a", 0, 0, 1.0)
    surface.add("b", 100, 0, 5.0)
    assert surface.predict("a", 0, 0).z_um == 1.0  # type: ignore[union-attr]
    assert surface.predict("c", 200, 0).z_um == 5.0  # type: ignore[union-attr]


def test_an_outlier_is_told_from_noise() -> None:
    surface = FocusSurface("surface", floor_um=0.05)
    rng = np.random.default_rng(1)
    for i in range(30):
        surface.add(i, 100.0 * (i % 6), 100.0 * (i // 6), rng.normal(0, 0.1))
    assert not surface.is_outlier(0.2)
    assert surface.is_outlier(5.0)
