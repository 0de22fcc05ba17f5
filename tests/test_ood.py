"""Frames unlike those of the training: blank, saturated, foreign; and those that are not."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from mm_autofocus.errors import InputError
from mm_autofocus.models.ood import LEAST_FRAMES, OodStats, describe, judge, names
from mm_autofocus.models.patches import mosaic, stack_looks
from mm_autofocus.optics import Lens
from mm_autofocus.sim.camera import Camera
from mm_autofocus.sim.render import Field, View
from mm_autofocus.sim.slide import Slide, SlideSettings
from skimage import data

PITCH, SIDE = 0.325, 224
DEFOCI = (-22.0, -6.0, 0.5, 14.0)
KINDS = ("dense", "sparse", "extremely-sparse")


def slide_frames(seeds, kinds, fields, defoci):
    """Frames of the virtual slide, 8 bits RGB, ordered by field."""
    frames = []
    for seed in seeds:
        slide, rng = Slide(SlideSettings(seed=seed)), np.random.default_rng(seed)
        for kind in kinds:
            for x, y in slide.find_fields(kind, fields, (SIDE * PITCH, SIDE * PITCH)):
                view = View(
                    x,
                    y,
                    (SIDE, SIDE),
                    PITCH,
                    Lens(0.75),
                    sigma=rng.uniform(0.5, 0.7),
                    quality="preview",
                )
                field = Field(slide, view)
                for defocus in defoci:
                    light = field.image(slide.height_at(x, y) + defocus)
                    frames.append(
                        Camera().expose(
                            light,
                            dose=1.0,
                            frame=len(frames),
                            bit_depth=8,
                            sensor=(SIDE, SIDE),
                            roi=(0, 0, SIDE, SIDE),
                        )
                    )
    return frames


def described(frame, patch=SIDE):
    small = mosaic(stack_looks([frame], 255.0), patch)
    return describe(small, 1 if frame.ndim == 2 else 3)


def fit(frames):
    stacks = [k // len(DEFOCI) for k in range(len(frames))]
    return OodStats.fit(np.concatenate([described(f) for f in frames]), stacks)


@pytest.fixture(scope="module")
def known():
    return slide_frames((1, 2), KINDS, 3, DEFOCI)


@pytest.fixture(scope="module")
def stats(known):
    return fit(known)


@pytest.fixture(scope="module")
def unseen():
    return slide_frames((11, 12), KINDS, 1, (-25.0, -11.0, -3.0, 0.0, 2.0, 8.0, 25.0))


def score(stats, frame):
    return judge(stats, described(frame))[0]


def test_unseen_fields_of_unseen_slides_are_accepted_at_any_defocus(stats, unseen):
    scores = np.array([score(stats, f) for f in unseen])
    assert scores.max() < 1
    assert np.median(scores) < 0.75
    for frame in unseen:
        assert judge(stats, described(frame))[1] == []


def test_another_size_of_the_frame_and_flips_do_not_matter(stats, unseen):
    for frame in unseen[::9]:
        whole = score(stats, frame)
        above = np.hstack([frame, frame[:, ::-1]])
        wide = np.vstack([above, above[::-1]])
        assert score(stats, wide) == pytest.approx(whole, rel=0.1)
        assert score(stats, frame[::-1]) == pytest.approx(whole, rel=0.1)
        assert score(stats, wide[:300, :380]) < 1


def _picture(name):
    image = np.asarray(getattr(data, name)())[..., :3]
    image = cv2.resize(image, (448, 448), interpolation=cv2.INTER_AREA)
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)


def _like(value, noise=0.0):
    rng = np.random.default_rng(0)
    frame = (
        rng.normal(value, noise, (SIDE, SIDE, 3)) if noise else np.full((SIDE, SIDE, 3), value)
    )
    return np.clip(frame, 0, 255).astype(np.uint8)


MADE = {
    "dark": lambda f: _like(0),
    "dark, with noise": lambda f: _like(2, 2.0),
    "white": lambda f: _like(255),
    "even grey": lambda f: _like(128),
    "even, as bright as a blank field": lambda f: _like(216),
    "noise": lambda f: _like(128, 60.0),
    "noise, as bright as a blank field": lambda f: _like(216, 3.0),
    "shading only": lambda f: _like(0) + np.linspace(140, 230, SIDE).astype(np.uint8)[:, None],
    "overexposed": lambda f: np.clip(f * 1.5, 0, 255).astype(np.uint8),
    "saturated": lambda f: np.clip(f * 4.0, 0, 255).astype(np.uint8),
    "underexposed": lambda f: (f * 0.2).astype(np.uint8),
    "inverted": lambda f: 255 - f,
}
PICTURES = ("astronaut", "camera", "coins", "coffee", "chelsea", "brick", "grass", "gravel")
PICTURES += ("moon", "rocket", "page", "text", "hubble_deep_field", "retina", "cell")


@pytest.mark.parametrize("case", MADE)
def test_frames_that_no_slide_gives_are_flagged(stats, unseen, case):
    for frame in unseen[2::7]:
        value, why = judge(stats, described(MADE[case](frame.astype(np.float64))))
        assert value > 1
        assert why


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_other_things_are_flagged(stats, name):
    value, why = judge(stats, described(_picture(name)))
    assert value > 1
    assert f"its score is {value:.1f} where 1 is the limit" in why[-1]


def test_blank_fields_of_the_same_slide_are_less_like_it_than_any_other(stats, unseen):
    blank = slide_frames((2, 11), ("blank",), 1, (0.0, 9.0))
    assert min(score(stats, f) for f in blank) > 1.5 * max(score(stats, f) for f in unseen)


def test_frames_of_a_grey_camera_are_told_from_blank_and_saturated_ones(known, unseen):
    def grey(frame):
        return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)

    stats = fit([grey(f) for f in known])
    assert stats.names == names(1)
    assert max(score(stats, grey(f)) for f in unseen) < 1
    for case in ("dark", "white", "even grey", "noise", "saturated", "underexposed"):
        frame = MADE[case](unseen[0].astype(np.float64))
        assert score(stats, np.ascontiguousarray(frame[..., 0])) > 1, case


def test_of_several_looks_the_most_unlike_decides(stats, unseen):
    white = _like(255)
    small = mosaic(stack_looks([unseen[0], white], 255.0), SIDE)
    both = describe(small, 3)
    assert both.shape == (2, len(names(3)))
    assert judge(stats, both)[0] == pytest.approx(score(stats, white))


def test_an_exposure_outside_that_of_the_training_is_named(stats, unseen):
    _, why = judge(stats, described((unseen[0] * 0.5).astype(np.uint8)))
    assert "% of the camera's range, trained on" in why[0]


def test_a_number_that_never_varied_does_not_make_everything_unlike(known):
    x = np.concatenate([described(f) for f in known])
    assert np.ptp(x[:, names(3).index("saturated share")]) == 0
    stats = OodStats.fit(x)
    nudged = x[0].copy()
    nudged[names(3).index("saturated share")] += 0.002
    assert judge(stats, nudged[None])[0] == pytest.approx(judge(stats, x[:1])[0], rel=0.05)


def test_few_frames_teach_nothing():
    with pytest.raises(InputError, match=f"must be at least {LEAST_FRAMES}"):
        OodStats.fit(np.zeros((LEAST_FRAMES - 1, len(names(1)))))


def test_frames_all_alike_give_finite_numbers():
    stats = OodStats.fit(np.ones((30, len(names(3)))))
    assert stats.threshold > 0
    assert judge(stats, np.ones((1, len(names(3)))))[0] == 0
    assert judge(stats, np.zeros((1, len(names(3)))))[0] > 1
