"""The virtual slide: the same at each visit, and honest about what it is."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from mm_autofocus.errors import InputError, LimitError
from mm_autofocus.optics import Aberrations, Lens
from mm_autofocus.sim import render, spectra
from mm_autofocus.sim.camera import Camera, CameraSettings
from mm_autofocus.sim.mechanics import Axis, Clock, FaultSwitch
from mm_autofocus.sim.noise import noise, noise_at
from mm_autofocus.sim.render import Field, Renderer, View
from mm_autofocus.sim.slide import (
    KINDS,
    SPARSITIES,
    Slide,
    SlideSettings,
    load_picture,
    read_picture,
)

LENS = Lens(0.75)
PITCH = 0.325
FIELD = (512 * PITCH, 512 * PITCH)


def axis(start, n, pitch=PITCH):
    return start + np.arange(n, dtype=np.float64) * pitch


def small(x, y, *, n=160, lens=LENS, **kwargs):
    return View(x, y, (n, n), PITCH, lens, **kwargs)


def dense_spot(slide):
    return slide.find_fields("dense", 1, FIELD)[0]


# --- noise ---


def test_noise_has_unit_size_and_is_the_same_in_any_tile():
    x, y = axis(-300.3, 400, 1.3), axis(1e5, 300, 1.3)
    whole = noise(7, 9.0, x, y)
    assert abs(whole.mean()) < 0.1
    assert whole.std() == pytest.approx(1, abs=0.1)
    assert np.array_equal(noise(7, 9.0, x[100:180], y[50:90]), whole[50:90, 100:180])
    assert noise_at(7, 9.0, x[3], y[5]) == pytest.approx(whole[5, 3], abs=1e-4)
    assert not np.allclose(noise(8, 9.0, x, y), whole)


# --- the specimen ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_of_the_specimen_is_the_same_wherever_the_stage_stands(kind):
    slide = Slide(SlideSettings(kind=kind, seed=3))
    x0, y0 = dense_spot(slide)
    n, shift = 260, 70
    a = slide.layers(axis(x0, n), axis(y0, n), 2)
    b = slide.layers(axis(x0 + shift * PITCH, n), axis(y0 + shift * PITCH, n), 2)
    edge = 40  # objects that straddle the border of what is painted
    for one, two in zip(a, b, strict=True):
        left = one.stains[:, shift + edge : -edge, shift + edge : -edge]
        right = two.stains[:, edge : -shift - edge, edge : -shift - edge]
        assert np.ptp(left) > 0.02
        assert np.abs(left - right).max() < 2e-3
        assert (
            np.abs(one.opd_um[shift:, shift:] - two.opd_um[:-shift, :-shift])[
                edge:-edge, edge:-edge
            ].max()
            < 1e-3
        )


def test_images_of_overlapping_fields_agree_where_they_overlap():
    renderer = Renderer(Slide(SlideSettings(seed=1, wave_um=0, tilt_x_um_per_mm=0)))
    shift = 64
    view = small(0.0, 0.0, n=256)
    z = renderer.slide.height_at(0, 0) + 0.5
    a = renderer.image(view, z)
    b = renderer.image(replace(view, x_um=shift * PITCH), z)
    difference = np.abs(a[:, shift:] - b[:, :-shift])[:, 8:-8]
    assert difference.mean() < 0.002
    assert np.quantile(difference, 0.999) < 0.03


def test_another_seed_is_another_slide_and_the_same_seed_the_same():
    x, y = axis(0, 200), axis(0, 200)
    one = Slide(SlideSettings(seed=1)).layers(x, y, 1)[0].stains
    assert np.array_equal(one, Slide(SlideSettings(seed=1)).layers(x, y, 1)[0].stains)
    assert not np.allclose(one, Slide(SlideSettings(seed=2)).layers(x, y, 1)[0].stains)


def test_the_slide_has_no_end():
    slide = Slide()
    x, y = slide.find_fields("dense", 1, FIELD, start=(-48000.0, 37000.0))[0]
    assert slide.layers(axis(x, 64), axis(y, 64), 1)[0].stains.max() > 0.1


@pytest.mark.parametrize("kind", ["tissue", "smear", "cells"])
def test_one_slide_has_dense_sparse_extremely_sparse_and_blank_fields(kind):
    slide = Slide(SlideSettings(kind=kind, seed=1))
    seen = {s: slide.find_fields(s, 1, FIELD)[0] for s in SPARSITIES}
    covered = [slide.covered(*seen[s], FIELD) for s in SPARSITIES]
    assert covered == sorted(covered, reverse=True)
    assert covered[-1] == 0
    with pytest.raises(InputError, match="sparsity"):
        slide.find_fields("empty", 1, FIELD)


def test_layers_of_any_number_hold_the_same_stain():
    slide = Slide(SlideSettings(seed=1))
    x, y = (v - 50 for v in dense_spot(slide))
    amounts = []
    for n in (1, 2, 4):
        layers = slide.layers(axis(x, 150), axis(y, 150), n)
        assert [layer.z_um for layer in layers] == sorted(layer.z_um for layer in layers)
        assert abs(sum(layer.z_um for layer in layers)) < 1e-9
        amounts.append(sum(layer.stains.sum() for layer in layers))
    assert amounts == pytest.approx([amounts[0]] * 3, rel=0.03)


def test_tissue_looks_like_haematoxylin_and_eosin():
    slide = Slide(SlideSettings(seed=1))
    image = Renderer(slide).image(small(0, 0, n=320), slide.height_at(0, 0) - 0.9)
    r, g, b = image.mean(axis=(0, 1))
    assert r > b > g  # pink overall
    grey = image.mean(axis=-1)
    dark = image[grey < np.quantile(grey, 0.02)].mean(axis=0)
    assert dark[2] > dark[0]  # nuclei are blue
    assert dark.mean() < 0.45
    assert image.max() < 1.35


def test_the_stains_absorb_like_the_published_vectors():
    # Ruifrok & Johnston 2001, normalised optical densities for red, green, blue.
    for stain, expected in (
        (spectra.haematoxylin, (0.65, 0.70, 0.29)),
        (spectra.eosin, (0.07, 0.99, 0.11)),
    ):
        v = np.array([stain(w) for w in spectra.RGB_UM])
        assert float(v @ expected / np.linalg.norm(v) / np.linalg.norm(expected)) > 0.93


def test_topography_is_what_was_set():
    flat = {"wave_um": 0.0, "tilt_x_um_per_mm": 0.0, "tilt_y_um_per_mm": 0.0}
    x = axis(0, 4000, 5.0)
    assert np.ptp(Slide(SlideSettings(**flat)).height_um(x, x[:2])) == 0
    tilt = Slide(SlideSettings(**{**flat, "tilt_x_um_per_mm": 2.0, "z0_um": 5.0}))
    assert tilt.height_at(1000, 77) == pytest.approx(7)
    waves = Slide(SlideSettings(**{**flat, "wave_um": 10.0})).height_um(x, x[::20])
    assert 10 < np.ptp(waves) <= 20
    assert np.abs(waves).max() <= 10
    folds = Slide(SlideSettings(**{**flat, "fold_um": 6.0})).height_um(x, x[::20])
    assert folds.min() >= 0
    assert 5 < folds.max() <= 6
    assert np.median(folds) < 0.1


# --- pictures ---


def test_any_picture_serves_as_texture_and_in_focus_looks_like_itself(tmp_path):
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.uniform(0, 255, (120, 150, 3)), (0, 0), 4)
    picture = np.clip((picture - 128) * 4 + 150, 20, 240).astype(np.uint8)
    path = tmp_path / "texture.png"
    cv2.imwrite(str(path), picture[..., ::-1])
    settings = SlideSettings(
        kind="picture", picture=str(path), picture_um_per_px=PITCH, phase=0.0, thickness_um=0.1
    )
    slide = Slide(settings)
    x0, y0 = slide.find_fields("dense", 1, FIELD)[0]
    # to the corner of a tile of the mirrored picture, in closed tissue
    period = 2 * 149 * PITCH, 2 * 119 * PITCH
    x = round(x0 / period[0]) * period[0] + 74.5 * PITCH
    y = round(y0 / period[1]) * period[1] + 59.5 * PITCH
    image = Renderer(slide).image(View(x, y, (80, 80), PITCH, LENS), slide.height_at(x, y))
    expected = np.exp(-load_picture(str(path)))[:, 20:100, 35:115]
    for k in range(3):
        r = np.corrcoef(image[..., k].ravel(), expected[k].ravel())[0, 1]
        assert r > 0.97


def test_the_picture_of_scikit_image_works_out_of_the_box():
    absorbance = load_picture("")
    assert absorbance.shape == (3, 512, 512)
    assert absorbance.min() >= 0


# --- images ---


def test_preview_and_grey_and_fluorescence_have_their_shapes():
    slide = Slide(SlideSettings(kind="cells"))
    x, y = dense_spot(slide)
    z = slide.height_at(x, y)
    renderer = Renderer(slide)
    assert renderer.image(small(x, y, quality="preview"), z).shape == (160, 160, 3)
    assert renderer.image(small(x, y, colour=False), z).shape == (160, 160)
    dapi = renderer.image(small(x, y, channel="DAPI"), z)
    assert dapi[..., 2].max() > 0.1
    assert dapi[..., :2].max() == 0
    fitc = renderer.image(small(x, y, channel="FITC", colour=False), z)
    far = renderer.image(small(x, y, channel="FITC", colour=False), z + 8)
    assert far.std() < 0.75 * fitc.std()
    assert far.mean() == pytest.approx(fitc.mean(), rel=0.1)


def test_the_sign_of_defocus_is_in_the_picture_only_if_the_optics_put_it_there():
    flat = SlideSettings(phase=0.0, wave_um=0, tilt_x_um_per_mm=0, tilt_y_um_per_mm=0)
    slide = Slide(replace(flat, thickness_um=0.1))
    # One layer: one of several is nearer to the lamp, which is no symmetry either.
    pure = Field(slide, small(0, 0, quality="preview"))
    assert np.abs(pure.image(3) - pure.image(-3)).max() < 1e-4
    coloured = Lens(0.75, aberrations=Aberrations(axial_colour_um=0.8))
    colour = Field(slide, small(0, 0, quality="preview", lens=coloured))
    assert np.abs(colour.image(2) - colour.image(-2)).mean() > 0.002
    thick = Field(Slide(replace(flat, phase=1.0)), small(0, 0))
    assert np.abs(thick.image(3) - thick.image(-3)).mean() > 0.01


def test_a_large_frame_is_made_of_parts_without_seams(monkeypatch):
    slide = Slide()
    view = View(30.0, -20.0, (400, 360), PITCH, replace(LENS, aberrations=Aberrations(
        field_curvature_um=2, lateral_colour_um=0.5)), quality="preview")  # fmt: skip
    z = slide.height_at(30, -20) + 2
    whole = Field(slide, view, margin_um=30).image(z)
    monkeypatch.setattr(render, "TILED_ABOVE", 200)
    monkeypatch.setattr(render, "PART_SAMPLES", 150)
    renderer = Renderer(slide)
    parts = renderer.image(view, z)
    # The preview has one plane for each part, so they differ by the slope of the slide.
    assert np.abs(parts - whole).mean() < 0.01
    assert np.array_equal(parts, renderer.image(view, z))
    assert len(renderer._fields) == 9


def test_a_tilted_field_is_sharp_along_a_line():
    slide = Slide(SlideSettings(tilt_x_um_per_mm=50, tilt_y_um_per_mm=0, wave_um=0, phase=0))
    field = Field(slide, View(0, 0, (160, 480), PITCH, LENS, quality="fine", colour=False))
    assert np.ptp(field.height_um) == pytest.approx(50e-3 * 479 * PITCH, rel=1e-3)
    low, high = field.image(-3.0), field.image(3.0)
    detail = [
        np.abs(np.diff(im, axis=1)).reshape(-1, 479)[:, a:b].mean()
        for im in (low, high)
        for a, b in ((20, 120), (360, 460))
    ]
    # z = 50 µm/mm · x: the left part lies low, the right part high.
    assert detail[0] > detail[2]
    assert detail[3] > detail[1]


def test_field_curvature_bends_the_best_plane():
    lens = Lens(0.75, aberrations=Aberrations(field_curvature_um=4))
    flat = Slide(SlideSettings(wave_um=0, tilt_x_um_per_mm=0, tilt_y_um_per_mm=0))
    field = Field(flat, small(0, 0, lens=lens, field_radius_um=100.0))
    height = field.height_um
    assert height[80, 80] == pytest.approx(0, abs=0.01)
    assert height[80, 0] == pytest.approx(4 * (80 * PITCH / 100) ** 2, rel=0.03)


# --- camera ---

CLEAN = CameraSettings(vignetting=0, dust=0)


def expose(settings, light, **kwargs):
    args = {
        "dose": 1.0,
        "frame": 0,
        "bit_depth": 16,
        "sensor": light.shape[:2],
        "roi": (0, 0, light.shape[1], light.shape[0]),
    }
    return Camera(settings).expose(light.astype(np.float32), **{**args, **kwargs})


def test_the_camera_has_shot_and_read_noise_of_the_size_set():
    grey = expose(CLEAN, np.ones((200, 200))).astype(float)
    unit = 65535 / CLEAN.full_well_e
    electrons = (grey - CLEAN.offset * 65535) / unit
    assert electrons.mean() == pytest.approx(0.85 * CLEAN.full_well_e, rel=0.01)
    assert electrons.std() == pytest.approx((0.85 * CLEAN.full_well_e + 16) ** 0.5, rel=0.03)
    dark = expose(CLEAN, np.ones((200, 200)), dose=0.0).astype(float)
    assert dark.std() / unit == pytest.approx(4, rel=0.03)


def test_the_same_frame_has_the_same_noise_and_the_next_frame_another():
    light = np.full((64, 64, 3), 0.7)
    one = expose(CLEAN, light, bit_depth=8)
    assert one.dtype == np.uint8
    assert np.array_equal(one, expose(CLEAN, light, bit_depth=8))
    assert not np.array_equal(one, expose(CLEAN, light, bit_depth=8, frame=1))


def test_without_noise_a_frame_is_the_mean_of_many():
    light = np.linspace(0.2, 1.0, 64 * 64).reshape(64, 64)
    clean = expose(CameraSettings(), light, frame=None).astype(float)
    noisy = [expose(CameraSettings(), light, frame=k) for k in range(100)]
    assert np.abs(np.mean(noisy, 0) - clean).mean() < 0.1 * np.std(noisy, 0).mean()
    assert np.array_equal(clean, expose(CameraSettings(camera_seed=1), light, frame=None))


def test_dust_and_shading_stay_on_the_sensor_and_bits_clip():
    settings = CameraSettings(dust=30, vignetting=0.2, full_well_e=1e6)
    light = np.ones((128, 128))
    whole = expose(settings, light).astype(float)
    part = expose(settings, light[:40, :50], sensor=(128, 128), roi=(60, 20, 50, 40))
    assert np.abs(whole[20:60, 60:110] - part).max() < 0.01 * whole.max()
    assert whole[:8, :8].mean() < 0.95 * whole.max()
    assert expose(CLEAN, 9 * light, bit_depth=12).max() == 4095
    binned = expose(CLEAN, light, sensor=(256, 256), binning=2)
    assert binned.std() < 0.6 * expose(CLEAN, light).std()


def test_crosstalk_mixes_colours_and_keeps_white():
    light = np.zeros((50, 50, 3))
    light[..., 0] = 0.9
    mixed = expose(CameraSettings(crosstalk=0.1, vignetting=0, dust=0), light).mean(axis=(0, 1))
    assert mixed[1] == pytest.approx(mixed[2], rel=0.05)
    assert 0.1 < mixed[1] / mixed[0] < 0.2


# --- stage and time ---


def stage(**changes):
    args = {
        "speed_um_s": 100.0,
        "settle_s": 0.1,
        "backlash_um": 0.0,
        "repeatability_um": 0.0,
        "drift_um_h": 0.0,
        "low_um": -50.0,
        "high_um": 50.0,
    }
    return Axis(**{**args, **changes})


def test_a_stage_takes_its_time():
    clock, z = Clock(), stage()
    z.move(10, clock.now_s)
    assert z.ready_s() == pytest.approx(0.2)
    assert z.true_um(0.05) == pytest.approx(5)
    assert z.true_um(0.11) != pytest.approx(10, abs=0.02)  # it rings
    assert clock.reached(z.ready_s())
    assert clock.now_s == pytest.approx(0.2)
    assert z.true_um(clock.now_s) == pytest.approx(10)
    with pytest.raises(LimitError, match="-50"):
        z.move(51, clock.now_s)


def test_backlash_shows_when_the_direction_turns():
    z = stage(backlash_um=0.5)
    where = []
    for t, target in enumerate([10, 5, 0, 5]):
        z.move(target, 10.0 * t)
        where.append(z.true_um(10.0 * t + 9))
        assert z.reading_um(10.0 * t + 9) == target
    assert where == pytest.approx([10, 5.5, 0.5, 5])


def test_repeatability_and_drift_have_the_size_set():
    z = stage(repeatability_um=0.15)
    errors = []
    for k in range(400):
        z.move(float(k % 2), k)
        errors.append(z.true_um(k + 0.9) - k % 2)
    assert np.std(errors) == pytest.approx(0.15, rel=0.12)
    assert stage(drift_um_h=2.0).true_um(1800) == pytest.approx(1)


def test_a_real_clock_takes_real_time():
    clock = Clock()
    clock.spend(100)
    assert clock.now_s == 100
    clock.real_time = True
    before = clock.now_s
    clock.spend(0.02)
    assert 0.02 <= clock.now_s - before < 2
    assert not clock.reached(clock.now_s + 10)


def test_the_fault_switch_counts_the_calls_it_is_asked_to():
    switch = FaultSwitch(kind="raise", operation="move", at_call=2, calls=2)
    assert [switch.strikes("move") for _ in range(5)] == [False, True, True, False, False]
    assert not switch.strikes("read")
    forever = FaultSwitch(kind="raise", at_call=3, calls=0)
    assert [forever.strikes("x") for _ in range(5)] == [False, False, True, True, True]


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "wood"}, ["kind", "wood", "tissue"]),
        ({"wave_um": 11}, ["wave_um", "11", "10"]),
        ({"thickness_um": -1}, ["thickness_um", "-1", "0.1"]),
        ({"seed": "a"}, ["seed", "a"]),
        ({"tilt_x_um_per_mm": float("nan")}, ["tilt_x_um_per_mm", "50"]),
    ],
)
def test_settings_outside_of_what_is_allowed_are_named(settings, words):
    with pytest.raises(InputError) as error:
        SlideSettings(**settings)
    assert all(word in str(error.value) for word in words)


def test_a_texture_that_is_no_picture_is_named(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    tiny = tmp_path / "tiny.png"
    cv2.imwrite(str(tiny), np.zeros((4, 4, 3), np.uint8))
    deep = tmp_path / "deep.png"
    cv2.imwrite(str(deep), np.zeros((64, 64, 3), np.uint16))
    cut = tmp_path / "cut.tif"
    cv2.imwrite(str(cut), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    cut.write_bytes(cut.read_bytes()[:300])
    for path, words in (
        (text, "no picture"),
        (cut, "no picture"),
        (tiny, "16"),
        (tmp_path / "none.png", "no file"),
        (deep, "64 × 64 × 3, uint16; allowed: 8 bits"),
    ):
        with pytest.raises(InputError, match=words):
            Slide(SlideSettings(kind="picture", picture=str(path)))


def test_a_grey_picture_is_alike_in_all_colours(tmp_path):
    grey = np.random.default_rng(0).integers(20, 255, (64, 64), np.uint8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    assert (read_picture(str(tmp_path / "grey.png")) == grey[..., None]).all()


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: small(0, 0, quality="best"), "preview"),
        (lambda: small(0, 0, channel="Cy5"), "DAPI"),
        (lambda: small(0, 0, n=2), "8192"),
        (lambda: CameraSettings(full_well_e=-1), "100"),
    ],
)
def test_other_settings_are_named_too(make, word):
    with pytest.raises(InputError, match=word):
        make()


# --- who may know ---


def test_nothing_that_focuses_knows_the_simulator():
    package = Path(__file__).parent.parent / "mm_autofocus"
    # the demo, and the truth beside the labels that are collected on the simulator itself
    allowed = {"demo.py", "demo_two_shot.py", "collecting.py"}
    for path in package.rglob("*.py"):
        if "sim" in path.relative_to(package).parts or path.name in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""] + [f"{node.module}.{a.name}" for a in node.names]
            assert not [n for n in names if n.startswith("mm_autofocus.sim")], path
