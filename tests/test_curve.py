"""Calibration curves: from what a model says of a slide to what it is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus.errors import InputError
from mm_autofocus.models.card import Curve, ModelCard, parse_card
from mm_autofocus.models.runtime import CallableModel

pytest.importorskip("torch")

from mm_autofocus.training.curve_fit import curve_through

FIELDS = np.arange(51) % 3  # of the frames of `said_of`
CARD = {
    "name": "shifted",
    "channels": 1,
    "patch_px": 32,
    "z_range_um": [-25, 25],
    "inputs": {"name": "patches"},
}


def said_of(
    shift: float, wide: float, noise: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A model that errs by a bump about focus, and by some noise that it knows of."""
    rng = np.random.default_rng(seed)
    true = np.concatenate([np.arange(-25, 26, 2.0), np.arange(-6, 6.5, 0.5)])
    sd = noise * (1 + 0.1 * np.abs(true))
    said = true + shift * np.exp(-((true / wide) ** 2)) + rng.normal(0, sd)
    return said, true, sd


@given(
    shift=st.floats(-0.7, 0.7),
    wide=st.floats(3, 30),
    noise=st.floats(0.01, 0.2),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_shift_about_focus_is_taken_away(shift, wide, noise, seed) -> None:
    curve = curve_through(*said_of(shift, wide, noise, seed), FIELDS)
    near = np.linspace(-2, 2, 9)
    said = near + shift * np.exp(-((near / wide) ** 2))
    assert np.abs(curve.of(said) - near).max() < 0.1 + 1.5 * noise
    # what is said to be higher is never made the lower one
    everywhere = np.linspace(-30, 30, 601)
    assert (np.diff(curve.of(everywhere)) >= -1e-9).all()


def test_a_model_that_is_right_stays_right_and_a_wrong_side_does_not_bend_it() -> None:
    said, true, sd = said_of(0.0, 5.0, 0.05, 0)
    off = curve_through(said, true, sd, FIELDS).of(true) - true
    assert np.abs(off[np.abs(true) < 6]).max() < 0.1
    said[5] = -said[5]  # 15 µm below, said to be above
    said[-3] = 5.0 - 4.0
    off = curve_through(said, true, sd, FIELDS).of(true) - true
    assert np.abs(off[np.abs(true) < 6]).max() < 0.15
    assert np.abs(off).max() < 1.5


def test_a_model_that_always_says_the_same_has_no_curve() -> None:
    with pytest.raises(InputError, match=r"--fit-curve: the model says 0.3 µm of every frame"):
        curve_through(np.full(51, 0.3), np.linspace(-20, 20, 51), np.ones(51), FIELDS)


def test_between_knots_is_a_line_and_beyond_them_the_last_shift() -> None:
    curve = Curve(said_um=(-1.0, 1.0), defocus_um=(-1.5, 0.5))
    np.testing.assert_allclose(curve.of([-3, -1, 0, 1, 9]), [-3.5, -1.5, -0.5, 0.5, 8.5])
    bent = Curve(said_um=(0.0, 1.0, 2.0), defocus_um=(0.0, 0.0, 2.0))
    np.testing.assert_allclose(bent.of([0.5, 1.5]), [0.0, 1.0])


@pytest.mark.parametrize(
    ("said", "defocus", "words"),
    [
        ([0, 1], [0, 1, 2], "3 numbers are not allowed: must be as many as of said_um, 2"),
        ([1, 0], [0, 1], "said_um: must rise strictly"),
        ([0, 1], [1, 0], "defocus_um: must not fall"),
        ([0], [0], "curve.said_um"),
    ],
)
def test_what_is_no_curve_is_one_sentence(said: list, defocus: list, words: str) -> None:
    with pytest.raises(InputError) as e:
        parse_card({**CARD, "curve": {"said_um": said, "defocus_um": defocus}})
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_a_curve_is_part_of_what_the_model_answers() -> None:
    curve = {"said_um": [-1.0, 1.0], "defocus_um": [-1.4, 0.6]}
    frame = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)

    def answer(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(x), 0.3, np.float32), np.full(len(x), 0.1, np.float32)

    plain = CallableModel(answer, parse_card(CARD)).predict([frame])
    card = parse_card({**CARD, "curve": curve})
    assert ModelCard.from_json(card.to_json()) == card
    curved = CallableModel(answer, card).predict([frame])
    assert plain.defocus_um == pytest.approx(0.3)
    assert curved.defocus_um == pytest.approx(-0.1)
    np.testing.assert_allclose(curved.patch_defocus_um, -0.1, atol=1e-6)
    assert np.nanmax(curved.focus_map()) == pytest.approx(-0.1)
