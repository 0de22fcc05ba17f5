"""What nets are trained on: planes, content, looks, patches, mosaics, and their changes."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus.errors import InputError
from mm_autofocus.models.patches import CELL_PX
from mm_autofocus.training import Dataset
from mm_autofocus.training.augment import AugmentOptions, augment, change_intensity, turn
from mm_autofocus.training.importance import (
    content_map,
    content_maps,
    importance_of,
    share,
)
from mm_autofocus.training.options import TrainOptions, merge_sets, read_options
from mm_autofocus.training.planes import PlaneReader, max_value_of
from mm_autofocus.training.recorded import add_recorded
from mm_autofocus.training.samples import (
    MosaicSource,
    PatchSource,
    fields_of,
    looks_of,
    range_of,
    validation_patches,
)

from blurred import PATCH, make_dataset, stack

STILL = AugmentOptions(
    turns="none",
    brightness=(1, 1),
    contrast=(1, 1),
    saturation=(1, 1),
    offset=0,
    noise=0,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("blurred"), fields=5)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("coloured"), fields=4, rgb=True)


def fields(dataset: Dataset, looks=(0.0,), span=(-8.0, 8.0), **kwargs):
    stacks = dataset.labelled
    options = {"tolerance_um": 0.1, "least_px": PATCH, **kwargs}
    return fields_of(stacks, content_maps(stacks), looks, span, **options)


# ------------------------------------------------------------------------------ planes


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("rgb", [False, True])
def test_a_part_of_a_plane_is_that_part(tmp_path: Path, compression, rgb) -> None:
    dataset = make_dataset(tmp_path, fields=3, rgb=rgb)
    one = dataset.stacks[1]
    path = one.folder / one.file
    if compression:
        data = one.load()
        tifffile.imwrite(
            path,
            data,
            compression=compression,
            photometric="rgb" if rgb else "minisblack",
            ome=True,
        )
    reader = pickle.loads(pickle.dumps(PlaneReader()))
    for k in (0, 7, 16):
        part = reader.crop(one, k, 5, 9, 40, 50)
        np.testing.assert_array_equal(part, one.plane(k)[5:45, 9:59])


def test_a_file_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, fields=3)
    one = dataset.stacks[0]
    path = one.folder / one.file
    reader = PlaneReader()
    reader.crop(one, 0, 0, 0, 8, 8)  # it knows where the planes are ...
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    other = PlaneReader()
    other._offsets = reader._offsets
    with pytest.raises(InputError, match="plane 16 cannot be read"):
        other.crop(one, 16, 0, 0, 8, 8)


def test_the_camera_saturates_at_its_bit_depth(dataset: Dataset) -> None:
    one = dataset.stacks[0]
    assert max_value_of(one) == 255
    assert max_value_of(replace(one, dtype="uint16", bit_depth=12)) == 4095
    assert max_value_of(replace(one, dtype="uint16", bit_depth=None)) == 65535


# ----------------------------------------------------------------------------- content


def test_specimen_is_content_and_dust_and_noise_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planes = np.full((17, 128, 128), 130.0)
    planes[:, 16:56, 16:56] += stack(1)[:, 16:56, 16:56] - 130.0
    planes[:, 80:112, 80:112] += rng.normal(scale=20, size=(32, 32))  # sharp in every plane
    planes += rng.normal(scale=1.0, size=planes.shape)
    tifffile.imwrite(tmp_path / "a.tif", planes.astype(np.uint8), photometric="minisblack")
    dataset, _ = add_recorded([tmp_path / "a.tif"], tmp_path / "d", step_um=1.0)
    mask = content_map(dataset.stacks[0])
    assert mask[2:7, 2:7].mean() > 0.9
    assert mask[9:15, 9:15].mean() < 0.1
    mask[1:8, 1:8] = False
    assert mask.mean() < 0.05


def test_maps_are_kept(dataset: Dataset, tmp_path: Path, monkeypatch) -> None:
    first = content_maps(dataset.stacks, tmp_path / "c.npz")
    monkeypatch.setattr("mm_autofocus.training.importance.content_map", None)
    again = content_maps(dataset.stacks, tmp_path / "c.npz")
    assert first.keys() == again.keys()
    for key, mask in first.items():
        np.testing.assert_array_equal(mask, again[key])


@given(st.integers(0, 99), st.integers(0, 12), st.integers(0, 12), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_the_share_of_a_patch_is_counted(seed, row, column, cells) -> None:
    mask = np.random.default_rng(seed).random((20, 20)) < 0.3
    corner = np.array([[row * 8, column * 8]])
    expected = mask[row : row + cells, column : column + cells].mean()
    assert share(mask, corner, cells * 8)[0] == pytest.approx(expected)


def test_importance_reaches_the_threshold_at_one_cell_in_a_patch() -> None:
    values = importance_of(np.array([0.0, 0.0079, 0.0081, 0.1, 0.5, 1.0], np.float32))
    assert (values >= 0.8).tolist() == [False, False, True, True, True, True]
    assert (np.diff(values[:5]) > 0).all()


# ------------------------------------------------------------------------------- looks


@pytest.mark.parametrize(
    ("looks", "sets", "first"),
    [
        ((0.0,), 17, [0]),
        ((0.0, 4.0), 13, [0, 4]),
        ((4.0, 0.0), 13, [4, 0]),
        ((0.0, -2.0), 15, [2, 0]),
        ((-2.0, 2.0), 13, [0, 4]),
        ((0.0, 4.5), 0, None),
        ((0.0, 17.0), 0, None),
    ],
)
def test_looks_are_planes_as_far_apart(dataset: Dataset, looks, sets, first) -> None:
    one = dataset.stacks[0]
    planes, defocus = looks_of(one, looks, 0.1)
    assert planes.shape == (sets, len(looks))
    if first:
        assert planes[0].tolist() == first
        # the defocus is that of the present z, wherever the looks are taken
        np.testing.assert_allclose(
            defocus, one.defocus_um[planes[:, 0]] - looks[0], rtol=0, atol=1e-9
        )


def test_looks_that_no_stack_has_are_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match=r"looks: 0, 4.5 µm: no planes .* 1 µm apart"):
        range_of(dataset.stacks, (0.0, 4.5), 0.1)
    with pytest.raises(InputError, match="patch_px: 200 does not fit"):
        fields(dataset, least_px=200)


def test_the_range_is_what_half_of_the_stacks_cover(dataset: Dataset) -> None:
    low, high = range_of(dataset.labelled, (0.0, 4.0), 0.1)
    assert low == pytest.approx(-8, abs=1)
    assert high == pytest.approx(4, abs=1)


def test_grey_and_colour_do_not_mix(dataset: Dataset, coloured: Dataset) -> None:
    both = (*dataset.labelled, *coloured.labelled)
    with pytest.raises(InputError, match="takes one kind"):
        fields_of(both, content_maps(both), (0.0,), (-8, 8), tolerance_um=0.1, least_px=PATCH)


# ----------------------------------------------------------------------------- patches


@pytest.mark.parametrize("looks", [(0.0,), (0.0, 4.0)])
def test_a_patch_is_cut_out_of_the_planes_at_its_defocus(dataset: Dataset, looks) -> None:
    source = PatchSource(fields(dataset, looks), PATCH, 6, 0, STILL)
    assert len(source) == 6 * len(source.fields)
    for number in range(0, 3 * len(source), 7):
        sample = source[number]
        of = source.fields[sample["field"]]
        k = int(np.abs(of.defocus_um - sample["defocus_um"]).argmin())
        assert of.defocus_um[k] == pytest.approx(sample["defocus_um"], abs=1e-5)
        looks_there = [of.stack.plane(p) / np.float32(255) for p in of.planes[k]]
        here = sample["patches"]
        found = [
            (y, x)
            for y in range(65)
            for x in range(65)
            if np.allclose(looks_there[0][y, x : x + 64], here[0, 0], atol=1e-6)
        ]
        assert len(found) == 1
        y, x = found[0]
        for look, there in zip(here, looks_there, strict=True):
            np.testing.assert_allclose(look, there[y : y + 64, x : x + 64], atol=1e-6)


def test_a_sample_depends_on_nothing_but_its_number(coloured: Dataset) -> None:
    make = fields(coloured)
    a = PatchSource(make, PATCH, 4, 3, AugmentOptions())
    b = pickle.loads(pickle.dumps(a))
    numbers = [5, 0, 17, 5]
    one = [a[n] for n in numbers]
    other = [b[n] for n in reversed(numbers)][::-1]
    for x, y in zip(one, other, strict=True):
        np.testing.assert_array_equal(x["patches"], y["patches"])
        assert x["defocus_um"] == y["defocus_um"]
    assert not np.array_equal(one[0]["patches"], a[5 + len(a)]["patches"])  # another epoch
    other_seed = PatchSource(make, PATCH, 4, 4, AugmentOptions())
    assert not np.array_equal(one[0]["patches"], other_seed[5]["patches"])


def test_each_field_comes_equally_often_in_an_epoch(dataset: Dataset) -> None:
    source = PatchSource(fields(dataset), 32, 4, 0, STILL)
    for epoch in (0, 1):
        drawn = [source[epoch * len(source) + i]["field"] for i in range(len(source))]
        assert np.bincount(drawn).tolist() == [4] * len(source.fields)


def test_a_part_of_the_patches_is_drawn_near_focus(dataset: Dataset) -> None:
    far = PatchSource(fields(dataset), 32, 30, 0, STILL)
    near = PatchSource(fields(dataset), 32, 30, 0, STILL, near=(1.0, 2.0))
    assert max(abs(near[i]["defocus_um"]) for i in range(40)) <= 2
    assert max(abs(far[i]["defocus_um"]) for i in range(40)) > 5


def test_patches_are_drawn_where_there_is_specimen(tmp_path: Path) -> None:
    planes = np.full((17, 256, 256), 130, np.uint8)
    planes[:, 10:40, 200:230] = stack(1)[:, :30, :30]
    noise = np.random.default_rng(0).integers(-1, 2, planes.shape)
    tifffile.imwrite(
        tmp_path / "a.tif", (planes + noise).astype(np.uint8), photometric="minisblack"
    )
    dataset, _ = add_recorded([tmp_path / "a.tif"], tmp_path / "d", step_um=1.0)
    source = PatchSource(fields(dataset, least_px=64), 64, 20, 0, STILL)
    blank = 0
    for i in range(20):
        patch = source[i]["patches"]
        blank += patch.std() < 0.012  # noise of one grey level, and nothing else
    assert blank == 0


def test_a_mosaic_has_the_importance_of_its_cells(coloured: Dataset) -> None:
    source = MosaicSource(fields(coloured, least_px=32), 32, 4, 0, AugmentOptions())
    assert source.cells == 3
    for i in range(8):
        sample = source[i]
        assert sample["mosaic"].shape == (3, 3 * CELL_PX, 3 * CELL_PX)
        assert sample["mosaic"].dtype == np.float32
        assert sample["importance"].shape == (3, 3)
        assert (sample["importance"] > 0.8).all()  # it is dense


def test_validation_looks_at_the_same_patches_each_time(dataset: Dataset) -> None:
    made = fields(dataset)
    chosen = validation_patches(made, PATCH, planes=5, patches=3, most=1000)
    assert chosen == validation_patches(made, PATCH, planes=5, patches=3, most=1000)
    assert len(chosen) == len(made) * 5 * 3
    fewer = validation_patches(made, PATCH, planes=5, patches=3, most=30)
    assert set(fewer) < set(chosen)
    assert 25 <= len(fewer) <= 33
    frames = {(i, k) for i, k, _, _ in chosen}
    spread = [made[i].defocus_um[k] for i, k in frames]
    assert min(spread) < -5
    assert max(spread) > 5


# ----------------------------------------------------------------------------- changes


@given(st.integers(0, 7), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_turn_moves_pixels_and_changes_none(which, channels) -> None:
    sample = np.random.default_rng(which).random((channels, 6, 6)).astype(np.float32)
    turned = turn(sample, which)
    for before, after in zip(sample, turned, strict=True):
        np.testing.assert_array_equal(np.sort(before, axis=None), np.sort(after, axis=None))

    # neighbours stay neighbours: nothing is scaled, so no defocus is changed
    def steps(a):
        return np.sort(np.concatenate([np.abs(np.diff(a, axis=k)).ravel() for k in (-1, -2)]))

    np.testing.assert_array_equal(steps(sample), steps(turned))


def test_all_eight_turns_differ() -> None:
    sample = np.arange(9, dtype=np.float32).reshape(1, 3, 3)
    assert len({turn(sample, k).tobytes() for k in range(8)}) == 8


@given(
    gain=st.floats(0.9, 1.4),
    contrast=st.floats(0.8, 1.5),
    saturation=st.floats(0.8, 1.5),
    offset=st.floats(-0.05, 0.05),
    seed=st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_intensity_keeps_its_order(gain, contrast, saturation, offset, seed) -> None:
    rng = np.random.default_rng(seed)
    how = {"gain": gain, "contrast": contrast, "offset": offset}
    grey = rng.random((2, 5, 5)).astype(np.float32)
    after = change_intensity(grey.copy(), saturation=saturation, looks=2, **how)
    # monotone over all looks together: contrast between looks is not exchanged
    order = np.argsort(grey, axis=None)
    assert (np.diff(after.ravel()[order]) >= -1e-6).all()
    rgb = rng.random((6, 5, 5)).astype(np.float32)
    after = change_intensity(rgb.copy(), saturation=saturation, looks=2, **how)
    for k in (0, 3):
        order = np.argsort(rgb[k : k + 3], axis=0)
        sorted_ = np.take_along_axis(after[k : k + 3], order, axis=0)
        assert (np.diff(sorted_, axis=0) >= -1e-6).all()  # no colour becomes another


@pytest.mark.parametrize("channels", [1, 3])
def test_all_looks_of_a_sample_change_alike(channels) -> None:
    look = np.random.default_rng(0).random((channels, 8, 8)).astype(np.float32)
    twice = np.concatenate([look, look])
    options = AugmentOptions(noise=0)
    for seed in range(10):
        out = augment(twice.copy(), options, np.random.default_rng(seed), 2)
        np.testing.assert_allclose(out[:channels], out[channels:], atol=1e-6)
        assert out.flags.c_contiguous


def test_a_bright_specimen_is_not_driven_into_saturation() -> None:
    sample = np.full((1, 16, 16), 0.9, np.float32)
    sample[0, :8] = 0.5
    options = AugmentOptions(contrast=(1, 1), offset=0, noise=0)
    for seed in range(20):
        out = augment(sample.copy(), options, np.random.default_rng(seed), 1)
        assert out.max() <= 1 + 1e-6
        assert np.unique(out.round(5)).size == 2


# ----------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"epoch": 3}, r"'epoch' is unknown \(did you mean 'epochs'\?\)"),
        ({"epochs": 0}, "epochs: 0 is not allowed"),
        ({"batch": 1}, "batch: 1 is not allowed"),
        ({"looks_um": [0, 4, 2]}, "looks_um: .* rise or fall strictly"),
        ({"range_um": [5, -5]}, "range_um: .* smaller end comes first"),
        ({"schedule": "linear"}, "schedule: 'linear' is not allowed"),
        ({"augment": {"noise": -1}}, "augment.noise: -1 is not allowed"),
        ({"augment": {"hue": 0.1}}, "augment.hue: 0.1 is not allowed"),
        ({"augment": {"contrast": [2, 1]}}, "augment.contrast: .* smaller first"),
    ],
)
def test_a_bad_option_is_named(given_, message) -> None:
    with pytest.raises(InputError, match=message):
        read_options(given_)


def test_options_survive_their_file_and_sets_reach_inside() -> None:
    merged = merge_sets({"net": {"expand": 2}}, {"net.kernel": 5, "epochs": 3})
    assert merged == {"net": {"expand": 2, "kernel": 5}, "epochs": 3}
    import yaml

    options = read_options(merged)
    assert read_options(yaml.safe_load(options.to_yaml())) == options
    assert TrainOptions(train_px=96).crop_px == 96


@pytest.mark.parametrize("shape", [(3, 64, 64), (6, 700, 700)])
def test_noise_is_white_and_as_strong_as_drawn(shape) -> None:
    grey = np.full(shape, 0.5, np.float32)
    options = STILL.model_copy(update={"noise": 0.05})
    strengths = []
    for seed in range(8):
        out = augment(grey.copy(), options, np.random.default_rng(seed), 1) - 0.5
        strengths.append(out.std())
        assert abs(np.corrcoef(out[0, :-1].ravel(), out[0, 1:].ravel())[0, 1]) < 0.06
        assert abs(np.corrcoef(out[0].ravel(), out[-1].ravel())[0, 1]) < 0.06
        assert abs(out.mean()) < 0.004
    assert max(strengths) <= 0.051
    assert np.ptp(strengths) > 0.01


def test_a_blank_field_teaches_that_nothing_is_there(dataset: Dataset) -> None:
    one = replace(dataset.stacks[0], label="refused", focus_z_um=None, sparsity="blank")
    blank = fields_of(
        [one], content_maps([one]), (0.0, 4.0), (-3, 3), tolerance_um=0.1, least_px=PATCH
    )
    assert len(blank[0].planes) == 13  # all of them: nobody knows where focus is
    source = MosaicSource(blank, PATCH, 4, 0, AugmentOptions())
    assert not source[0]["importance"].any()
    assert source[0]["mosaic"].shape == (2, 112, 112)
    with pytest.raises(InputError, match="none of the stacks"):
        PatchSource(blank, PATCH, 4, 0, AugmentOptions())


@pytest.mark.parametrize(
    ("turns", "how_many"), [("all", 8), ("half", 2), ("none", 1), (True, 8), (False, 1)]
)
def test_as_many_turns_are_made_as_the_microscope_bears(turns, how_many) -> None:
    sample = np.arange(12 * 12, dtype=np.float32).reshape(1, 12, 12) / 144
    options = STILL.model_validate({**STILL.model_dump(), "turns": turns})
    seen = {
        augment(sample.copy(), options, np.random.default_rng(seed), 1).tobytes()
        for seed in range(60)
    }
    assert len(seen) == how_many
    if turns == "half":
        assert seen == {
            sample.tobytes(),
            np.ascontiguousarray(np.rot90(sample, 2, (1, 2))).tobytes(),
        }
