"""The report's pictures show what there is, from files with skipped and failed tiles."""

from __future__ import annotations

import base64

import cv2
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from mm_autofocus.hooks.thumbnail import SIZE_PX, detail_at, thumbnail_png


def decode(text: str) -> np.ndarray:
    png = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.asarray(cv2.imdecode(png, cv2.IMREAD_UNCHANGED))


def test_the_part_with_the_specimen_is_shown() -> None:
    image = np.full((512, 600), 100, np.uint16)
    image[300:360, 420:500] = np.random.default_rng(0).integers(0, 4000, (60, 80))
    left, top = detail_at(image)
    assert left <= 420
    assert left + SIZE_PX >= 500
    assert top <= 300
    assert top + SIZE_PX >= 360


def test_the_middle_of_a_blank_field_is_shown() -> None:
    image = np.random.default_rng(0).poisson(100, (512, 512)).astype(np.uint16)
    assert detail_at(image) == (192, 192)


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from(["u1", "u2", "f4"]),
    st.booleans(),
)
def test_any_image_has_a_thumbnail(height: int, width: int, dtype: str, colour: bool) -> None:
    shape = (height, width, 3) if colour else (height, width)
    image = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    png = decode(thumbnail_png(image, detail_at(image)))
    assert png.shape[:2] == (min(height, SIZE_PX), min(width, SIZE_PX))
    assert png.dtype == np.uint8


def test_colours_keep_their_order() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 200  # red
    assert decode(thumbnail_png(image, (0, 0)))[0, 0].tolist() == [0, 0, 200]  # BGR
