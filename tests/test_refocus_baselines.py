"""What a model that recovers images has to beat must itself be worth beating."""

from __future__ import annotations

import builtins

import cv2
import numpy as np
import pytest
from mm_autofocus.errors import InputError
from mm_autofocus.optics import FluorescenceImager, Lens
from mm_autofocus.training import refocus_baselines
from mm_autofocus.training.refocus_baselines import (
    REFOCUS_BASELINES,
    SHARPER,
    TwoShots,
    Wiener,
    WienerSetting,
    as_frame,
    baselines_of,
    need_images,
    planes_of,
    two_shots,
)
from mm_autofocus.types import Optics
from scipy.ndimage import gaussian_filter
from skimage import data

OPTICS = Optics(na=0.75, magnification=20.0, pixel_size_um=0.325)


def db(image: np.ndarray, truth: np.ndarray) -> float:
    return -10 * float(np.log10(np.square(image - truth).mean()))


def tissue(y: int = 0, x: int = 0, side: int = 192) -> np.ndarray:
    """A real picture, ``(3, Y, X)``, smoothed a little so that it has no noise of its own."""
    rgb = data.immunohistochemistry()[y : y + side, x : x + side]
    return gaussian_filter(planes_of(rgb, 255.0), (0, 0.6, 0.6)).astype(np.float32)


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.stack([cv2.GaussianBlur(plane, (0, 0), sigma) for plane in image])


@pytest.mark.parametrize("odd", [0, 5])
def test_fusions_put_two_halves_together(odd: int) -> None:
    """Each shot is sharp on one side: both fusions find it nearly everywhere."""
    truth = tissue(side=192 + odd)
    soft = blurred(truth, 2.5)
    left = np.arange(truth.shape[2]) < truth.shape[2] // 2
    shots = TwoShots(
        np.stack([np.where(left, truth, soft), np.where(left, soft, truth)]), 1, 1.0, OPTICS
    )
    found = {
        name: db(baseline(shots), truth)
        for name, baseline in baselines_of(REFOCUS_BASELINES).items()
    }
    assert list(found) == list(REFOCUS_BASELINES)
    assert found["mean"] > found[SHARPER]  # half of an error, twice the area
    assert found["wavelet"] > found[SHARPER] + 12
    assert found["laplacian"] > found[SHARPER] + 12


def test_wavelets_take_all_of_the_sharp_shot() -> None:
    """Where one shot is sharper everywhere, it is what comes out, but for the coarsest scale."""
    truth = tissue()
    shots = TwoShots(np.stack([truth, blurred(truth, 3.0)]), 1, 1.0, OPTICS)
    found = baselines_of(["wavelet"])["wavelet"](shots)
    assert found.shape == truth.shape and found.dtype == np.float32
    assert db(found, truth) > db(shots.planes.mean(0), truth) + 10
    same = TwoShots(np.stack([truth, truth]), 1, 1.0, OPTICS)
    np.testing.assert_allclose(baselines_of(["wavelet"])["wavelet"](same), truth, atol=1e-4)


def pairs_of_a_known_blur(defocus_um: float, noise: float) -> list[tuple[TwoShots, np.ndarray]]:
    rng = np.random.default_rng(1)
    found = []
    for y in (0, 250):
        truth = tissue(y=y, side=192)
        colours = (0.61, 0.55, 0.46)
        soft = np.stack(
            [
                FluorescenceImager(
                    [p], [0.0], pitch_um=0.325, wavelength_um=w, lens=Lens(0.75)
                ).image(defocus_um)
                for p, w in zip(truth, colours, strict=True)
            ]
        )
        soft = (soft + noise * rng.standard_normal(soft.shape)).astype(np.float32)
        found.append((TwoShots(np.stack([soft, soft]), 1, 1.0, OPTICS), truth))
    return found


def test_wiener_undoes_the_blur_it_is_fitted_to() -> None:
    pairs = pairs_of_a_known_blur(1.5, 0.002)
    fitted = Wiener.fit(pairs[:1], [0.5, 1.0])
    assert list(fitted.settings) == [1.0]  # no pair is nearer to 0.5
    assert fitted.settings[1.0].blur == 1.5
    shots, truth = pairs[1]  # not what it was fitted to
    inside = (slice(None), slice(16, -16), slice(16, -16))  # the simulated blur wraps around
    sharper = shots.planes[0][inside]
    assert db(fitted(shots)[inside], truth[inside]) > db(sharper, truth[inside]) + 2
    assert fitted.setting(3.0) is fitted.settings[1.0]


def test_wiener_without_a_choice_or_optics() -> None:
    assert Wiener().setting(2.0) == WienerSetting(1.0, 0.1)
    truth = tissue(side=128)
    soft = blurred(truth, 1.5)
    for channels in (slice(0, 1), slice(0, 3)):
        shots = TwoShots(np.stack([soft, soft])[:, channels], 1, 1.0, Optics())
        found = Wiener({1.0: WienerSetting(1.5, 0.003)})(shots)
        assert found.shape == truth[channels].shape
        assert db(found, truth[channels]) > db(soft[channels], truth[channels]) + 2


@pytest.mark.parametrize("rgb", [False, True])
def test_frames_come_back_as_they_were(rgb: bool) -> None:
    rng = np.random.default_rng(0)
    shape = (40, 48, 3) if rgb else (40, 48)
    lower = rng.integers(0, 4096, shape).astype(np.uint16)
    upper = np.full(shape, 7, np.uint16)
    shots = two_shots(upper, lower, 1.0, OPTICS, 4095.0)
    assert shots.side == -1  # the upper one is sharper here
    assert shots.planes.shape == (2, 3 if rgb else 1, 40, 48)
    back = as_frame(baselines_of([])[SHARPER](shots), 4095.0, "uint16")
    np.testing.assert_array_equal(back, lower)
    assert back.dtype == np.uint16


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == "pywt":
            raise ImportError("no", name="pywt")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"needs pywt, .*pip install mm-autofocus\[evaluate\]"):
        need_images()
    assert "pywt" not in vars(refocus_baselines)
