"""Labels, the format on the disk, and honest splits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus.errors import InputError
from mm_autofocus.training import Dataset, Split, Stack
from mm_autofocus.training.label import StackMeter, middle_of, peak_of, sparsity_of
from mm_autofocus.training.recorded import add_recorded, find_stacks
from mm_autofocus.training.split import PARTS, draw, groups_of
from scipy.ndimage import gaussian_filter

TEXTURE = gaussian_filter(np.random.default_rng(5).normal(size=(96, 96)), 1)
TEXTURE /= TEXTURE.std()


def recorded(
    focus_um: float = 0.3,
    *,
    planes: int = 21,
    step_um: float = 1.0,
    half_um: float = 3.0,
    second_um: float | None = None,
    contrast: float = 30.0,
    noise: float = 1.0,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """z and planes of a field whose contrast is a bell about `focus_um`; z = 0 in the middle."""
    rng = np.random.default_rng(seed)
    z = (np.arange(planes) - planes // 2) * step_um
    bell = np.exp(-(((z - focus_um) / half_um) ** 2))
    if second_um is not None:
        bell = np.maximum(bell, 0.95 * np.exp(-(((z - second_um) / half_um) ** 2)))
    stack = 120 + contrast * bell[:, None, None] * TEXTURE
    stack = stack + rng.normal(scale=noise, size=stack.shape)
    return z, np.clip(np.rint(stack), 0, 255).astype(np.uint8)


def labelled(**kwargs):
    meter = StackMeter()
    for z, image in zip(*recorded(**kwargs), strict=True):
        meter.add(z, image)
    return meter


# ------------------------------------------------------------------------------ labels


@given(
    focus=st.floats(-4, 4),
    step=st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0]),
    noise=st.floats(0, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_the_peak_is_found_between_the_planes(focus, step, noise, seed) -> None:
    planes = int(24 / step) | 1
    label = labelled(
        focus_um=focus, step_um=step, planes=planes, noise=noise, seed=seed
    ).label()
    assert label.status == "ok"
    assert abs(label.focus_z_um - focus) < 0.25
    assert label.planes_below + label.planes_above in (planes, planes - 1)


@pytest.mark.parametrize("half_um", [3.0, 6.0])
@pytest.mark.parametrize("focus_um", [-8.7, -7.0, 0.2, 7.0, 8.4, 8.7])
def test_a_flank_that_the_stack_cuts_off_does_not_move_the_peak(half_um, focus_um) -> None:
    z = np.arange(-10, 11.0)
    scores = 0.02 + np.exp(-2 * ((z - focus_um) / half_um) ** 2)
    found, width = middle_of(z, scores)
    assert abs(found - focus_um) < 0.02
    assert width > 0
    assert abs(peak_of(z, scores) - focus_um) < 0.05


@pytest.mark.parametrize("scores", [np.arange(9.0), np.arange(9.0)[::-1], np.ones(9)])
def test_a_curve_without_a_flank_has_its_sharpest_plane(scores) -> None:
    """As those of patches, or of what is left of a frame without one, may be."""
    found, width = middle_of(np.arange(9.0), scores)
    assert found == scores.argmax() == peak_of(np.arange(9.0), scores)
    assert np.isfinite(width)


def steep_above(z: np.ndarray) -> np.ndarray:
    """Contrast of a thin specimen, in focus at 0, under a lens with spherical aberration."""
    return np.where(z > 0, np.exp(-((z / 1.4) ** 2)), 1 / (1 + (z / 2.2) ** 2))


@pytest.mark.parametrize("off_um", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("step_um", [0.5, 1.0])
def test_the_label_of_a_thin_specimen_is_the_peak_also_where_flanks_differ(
    off_um: float, step_um: float
) -> None:
    """The middle of such a curve lies 0.3 µm below its peak."""
    z = np.arange(-10, 11, step_um) + off_um
    rng = np.random.default_rng(1)
    meter = StackMeter()
    for at, contrast in zip(z, steep_above(z), strict=True):
        image = 120 + 30 * contrast * TEXTURE + rng.normal(scale=0.5, size=TEXTURE.shape)
        meter.add(at, np.clip(np.rint(image), 0, 255).astype(np.uint8))
    label = meter.label(1.0)
    middle, width = middle_of(z, np.array(meter.scores))
    assert middle < -0.2
    assert abs(label.focus_z_um) < 0.15 * step_um + 0.02
    assert abs(label.focus_z_um) < 3 * label.expected_error_um
    # of what is not known to be thin, the middle
    assert meter.label().focus_z_um == pytest.approx(middle)
    assert meter.label(width / 5).focus_z_um == pytest.approx(middle)


def test_scores_that_are_nothing_on_the_flanks_have_a_peak() -> None:
    scores = np.array([0.0, 0, 0, 2, 4, 2, 0, 0, 0])
    assert abs(peak_of(np.arange(9.0), scores) - 4) < 1e-9


@pytest.mark.parametrize(
    ("why", "kwargs"),
    [
        ("flat", {"contrast": 0.0}),
        ("flat", {"contrast": 0.0, "planes": 5}),
        ("flat", {"contrast": 0.0, "planes": 101}),
        ("edge", {"focus_um": 10.0}),
        ("edge", {"focus_um": -14.0}),
        ("edge", {"focus_um": 9.2}),
        ("two peaks", {"focus_um": -5.0, "second_um": 6.0, "half_um": 2.0}),
    ],
)
def test_a_curve_without_a_clear_peak_is_refused(why: str, kwargs: dict) -> None:
    for seed in range(5):
        label = labelled(**kwargs, seed=seed).label()
        assert (label.status, label.focus_z_um) == ("refused", None)
        # a curve of noise is refused for one reason or the other
        assert why == "flat" or label.reason.startswith(why)


def test_the_order_of_the_planes_does_not_matter() -> None:
    z, stack = recorded()
    labels = []
    for order in (slice(None), slice(None, None, -1)):
        meter = StackMeter()
        for at, image in zip(z[order], stack[order], strict=True):
            meter.add(at, image)
        labels.append(meter.label())
    assert labels[0] == labels[1]


def test_parts_at_two_depths_make_a_label_that_says_how_unsure_it_is() -> None:
    """A thick section: its top is a plateau, and its middle is the label."""
    z, lower = recorded(focus_um=-1.5, noise=0.5)
    _, upper = recorded(focus_um=1.5, noise=0.5)
    checkers = np.indices((96, 96)).sum(0) // 24 % 2 > 0
    stack = np.where(checkers, lower, upper)
    thick, thin = StackMeter(), labelled(focus_um=0.0, noise=0.5).label()
    for at, image in zip(z, stack, strict=True):
        thick.add(at, image)
    label = thick.label()
    assert abs(label.focus_z_um) < 0.5
    assert label.width_um > 1.2 * thin.width_um
    assert label.expected_error_um > 1.5 * thin.expected_error_um


def test_one_object_has_a_label_though_no_part_of_the_frame_can_be_left_out() -> None:
    z, stack = recorded(focus_um=0.4, noise=0.5)
    alone = stack.copy()
    rest = np.ones((96, 96), bool)
    rest[30:44, 30:44] = False
    alone[:, rest] = recorded(contrast=0.0, noise=0.5)[1][:, rest]
    meter = StackMeter()
    for at, image in zip(z, alone, strict=True):
        meter.add(at, image)
    label = meter.label()
    assert label.status == "ok"
    assert abs(label.focus_z_um - 0.4) < 0.25
    assert label.expected_error_um < 0.5


def test_planes_that_are_nowhere_are_an_error() -> None:
    meter = StackMeter()
    with pytest.raises(InputError, match="no z"):
        meter.add(float("nan"), TEXTURE)
    for _ in range(6):
        meter.add(1.0, TEXTURE + 50)
    with pytest.raises(InputError, match="two planes of the stack lie at 1 µm"):
        meter.label()


def test_content_tells_the_sparsity() -> None:
    rng = np.random.default_rng(0)
    texture = gaussian_filter(rng.normal(size=(256, 256)), 1) * 60
    for side, kind in ((256, "dense"), (100, "sparse"), (32, "extremely-sparse")):
        meter = StackMeter()
        for z in np.arange(-5.0, 6.0):
            image = rng.normal(scale=2, size=(256, 256)) + 200
            image[:side, :side] += np.exp(-((z / 2) ** 2)) * texture[:side, :side]
            meter.add(z, image.astype(np.uint16))
        assert meter.sparsity == kind
    assert [sparsity_of(c) for c in (0.45, 0.06, 0.002, 0.0)] == [
        "dense",
        "sparse",
        "extremely-sparse",
        "blank",
    ]


# -------------------------------------------------------------------------- from files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("recorded")
    paths = []
    for i in range(6):
        _, stack = recorded(focus_um=0.4 * i - 1, seed=i, contrast=0.0 if i == 5 else 30.0)
        paths.append(folder / f"field{i}.tif")
        tifffile.imwrite(paths[-1], stack, photometric="minisblack")
    return paths


@pytest.fixture
def dataset(files: list[Path], tmp_path: Path) -> Dataset:
    return add_recorded(files, tmp_path / "d", step_um=1.0, optics={"pixel_size_um": 0.5})[0]


def test_recorded_stacks_become_a_dataset(files: list[Path], dataset: Dataset) -> None:
    again = Dataset.open(dataset.path)
    assert [s.field for s in again] == [p.stem for p in files]
    assert [s.label for s in again] == ["ok"] * 5 + ["refused"]
    assert [s.sparsity for s in again][4:] == ["dense", "blank"]
    for i, stack in enumerate(again.labelled):
        assert stack.focus_z_um == pytest.approx(10 + 0.4 * i - 1, abs=0.15)
        assert abs(stack.defocus_um[9]) < 2.2
        assert np.array_equal(stack.load(), tifffile.imread(files[i]))
        assert np.array_equal(stack.plane(3), tifffile.imread(files[i])[3])
        assert [z for z, _ in stack.planes()] == list(map(float, range(21)))
        assert stack.known_optics().pixel_size_um == 0.5
        assert (stack.shape, stack.dtype, stack.bit_depth) == ((21, 96, 96), "uint8", 8)
        assert stack.truth is None
    assert again.summary()["refused"] == {"flat": 1}
    with tifffile.TiffFile(dataset.path / again.stacks[0].file) as tif:
        assert tif.is_ome
    with pytest.raises(InputError, match="has no label"):
        _ = again.stacks[5].defocus_um
    with pytest.raises(InputError, match="plane 21 is not one of"):
        again.stacks[0].plane(21)


def test_adding_the_same_files_again_adds_nothing(files: list[Path], dataset: Dataset) -> None:
    again, new = add_recorded(files, dataset.path, step_um=1.0)
    assert (new, len(again)) == (0, 6)
    more, new = add_recorded(files[:2], dataset.path, step_um=1.0, slide="other")
    assert (new, len(more), more.summary()["slides"]) == (2, 8, 2)


def test_an_interrupted_copy_is_mended(files: list[Path], dataset: Dataset) -> None:
    index = dataset.path / "stacks.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed while it wrote the line
    torn = dataset.path / dataset.stacks[1].file
    torn.write_bytes(torn.read_bytes()[:20000])
    assert len(Dataset.open(dataset.path)) == 3
    with pytest.raises(InputError, match=r"cannot be read|is not what|cut off"):
        list(Dataset.open(dataset.path).stacks[1].planes())
    again, new = add_recorded(files, dataset.path, step_um=1.0)
    assert new == 4
    assert sorted(s.key for s in again) == sorted(s.key for s in dataset)
    assert {p.name for p in (dataset.path / "stacks").iterdir()} == {
        Path(s.file).name for s in again
    }
    assert all(s.load().std() > 0 for s in again)


@pytest.mark.parametrize("rgb", [False, True])
def test_ome_tiff_brings_its_own_z(rgb: bool, tmp_path: Path) -> None:
    file = tmp_path / "run.ome.tif"
    z, stack = recorded(focus_um=1.2, step_um=0.8)
    if rgb:
        stack = np.repeat(stack[..., None], 3, axis=-1)
    with tifffile.TiffWriter(file, ome=True) as tif:
        for i in range(2):  # two positions
            metadata = {
                "axes": "ZYXS" if rgb else "ZYX",
                "Name": f"P{i}",
                "PhysicalSizeX": 0.65,
                "Plane": {
                    "PositionZ": list(z * 1000),
                    "PositionZUnit": ["nm"] * len(z),
                    "PositionX": [500.0 * i] * len(z),
                    "PositionY": [0.0] * len(z),
                },
            }
            photometric = "rgb" if rgb else "minisblack"
            tif.write(stack, metadata=metadata, photometric=photometric)
    dataset, new = add_recorded([file], tmp_path / "d")
    assert new == 2
    assert [s.field for s in dataset] == ["run P0", "run P1"]
    for s in dataset:
        assert s.z_um == pytest.approx(z)
        assert s.focus_z_um == pytest.approx(1.2, abs=0.15)
        assert s.known_optics().pixel_size_um == pytest.approx(0.65)
        assert np.array_equal(s.load(), stack)
    assert dataset.stacks[1].xy_um == (500.0, 0.0)


def test_channels_of_an_ome_tiff_are_stacks_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "two.ome.tif"
    both = np.stack([recorded(focus_um=f)[1] for f in (0.0, 2.0)])  # (C, Z, Y, X)
    metadata = {"axes": "CZYX", "PhysicalSizeZ": 0.5, "Channel": {"Name": ["DAPI", "FITC"]}}
    tifffile.imwrite(file, both, ome=True, photometric="minisblack", metadata=metadata)
    dataset, _ = add_recorded([file], tmp_path / "d")
    assert [(s.channel, s.channel_name) for s in dataset] == [(0, "DAPI"), (1, "FITC")]
    focus = [s.focus_z_um for s in dataset]
    assert focus == pytest.approx([5.0, 6.0], abs=0.15)
    assert len({s.group for s in dataset}) == 1  # one field: a split keeps them together


def bad_files(folder: Path) -> dict[str, tuple[list[Path], float | None, str]]:
    _, stack = recorded()
    tifffile.imwrite(folder / "a.tif", stack)
    tifffile.imwrite(folder / "short.tif", stack[:4], photometric="minisblack")
    (folder / "sub").mkdir()
    tifffile.imwrite(folder / "sub" / "a.tif", stack)
    (folder / "text.tif").write_text("no image")
    data = (folder / "a.tif").read_bytes()
    (folder / "torn.tif").write_bytes(data[: len(data) // 2])
    with tifffile.TiffWriter(folder / "unequal.tif") as tif:
        for k in range(8):
            tif.write(stack[k, : 90 + k], contiguous=False)
    a = folder / "a.tif"
    return {
        "no step": ([a], None, "give --step-um"),
        "step": ([a], -1.0, "must be greater than 0"),
        "short": ([folder / "short.tif"], 1.0, "4 planes are too few"),
        "missing": ([folder / "none.tif"], 1.0, "no such file"),
        "text": ([folder / "text.tif"], 1.0, "this is not a TIFF file"),
        "torn": ([folder / "torn.tif"], 1.0, "cut off|readable|damaged"),
        "unequal": ([folder / "unequal.tif"], 1.0, "unequal in shape"),
        "twice": ([a, folder / "sub" / "a.tif"], 1.0, "has a field named 'a', too"),
        "none": ([], 1.0, "no files"),
    }


@pytest.mark.parametrize(
    "case",
    ["no step", "step", "short", "missing", "text", "torn", "unequal", "twice", "none"],
)
def test_bad_files_are_one_sentence_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    paths, step, sentence = bad_files(tmp_path)[case]
    with pytest.raises(InputError, match=sentence) as e:
        add_recorded(paths, tmp_path / "d", step_um=step)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "d").exists()


def test_brain_stacks(data_root: Path, tmp_path: Path) -> None:
    paths = sorted((data_root / "zstack_brain").glob("*.tif"))[:12]
    if not paths:
        pytest.skip("no brain stacks")
    dataset, new = add_recorded(paths, tmp_path / "d", step_um=1.0, slide="brain")
    assert new == 12
    assert len(dataset.labelled) >= 11
    for s in dataset.labelled:  # a plateau: its middle is nearly as sharp as its sharpest plane
        assert np.interp(s.focus_z_um, s.z_um, s.scores) > 0.85 * max(s.scores)
        assert 0 < s.expected_error_um < 2


def test_two_halves_of_a_thick_section_have_nearly_the_same_focus(data_root: Path) -> None:
    """The peak of a plateau jumps about: a fit to its top differed by 1.9 µm (sd)."""
    paths = sorted((data_root / "zstack_brain").glob("*.tif"))[:40]
    if not paths:
        pytest.skip("no brain stacks")
    off, expected = [], []
    for path in paths:
        stack, labels = tifffile.imread(path), []
        for part in (stack[:, :, :64], stack[:, :, 64:]):
            meter = StackMeter()
            for at, image in enumerate(part):
                meter.add(float(at), image)
            labels.append(meter.label())
        if all(label.status == "ok" for label in labels):
            off.append(labels[0].focus_z_um - labels[1].focus_z_um)
            expected.append(np.hypot(*(label.expected_error_um for label in labels)))
    assert len(off) > 30
    assert np.std(off) < 1.3
    # and it says how unsure it is
    assert 0.5 < np.std(off) / np.median(expected) < 1.5


def test_find_stacks_says_what_is_in_a_file(files: list[Path]) -> None:
    (stack,) = find_stacks(files[0], 0.5)
    assert (stack.field, len(stack.z_um), stack.z_um[-1]) == ("field0", 21, 10.0)


# -------------------------------------------------------------------- opening, refusing


def test_what_is_no_dataset_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Dataset.open(tmp_path / "none")
    with pytest.raises(InputError, match="is a file"):
        Dataset.open(files[0])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a dataset"):
        Dataset.open(tmp_path / "other")
    with pytest.raises(InputError, match="is not a dataset"):
        add_recorded(files, tmp_path / "other", step_um=1.0)
    (tmp_path / "other" / "dataset.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match="newer"):
        Dataset.open(tmp_path / "other")
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        add_recorded(files, tmp_path / "a" / "b", step_um=1.0)


def test_without_labels_there_is_nothing_to_learn(files: list[Path], tmp_path: Path) -> None:
    add_recorded(files[5:], tmp_path / "d", step_um=1.0)
    with pytest.raises(InputError, match=r"no labels: all 1 stacks were refused.*flat"):
        Dataset.open(tmp_path / "d")
    assert len(Dataset.open(tmp_path / "d", labels=False)) == 1
    (tmp_path / "d" / "stacks.jsonl").write_text("")
    with pytest.raises(InputError, match="is empty"):
        Dataset.open(tmp_path / "d")
    (tmp_path / "d" / "stacks.jsonl").write_text('{"file": 1}\n')
    with pytest.raises(InputError, match=r"stacks.jsonl:1: does not read as a stack"):
        Dataset.open(tmp_path / "d")


# ------------------------------------------------------------------------------- split


def row(slide: str, name: str, ok: bool = True, xy: tuple | None = None, **more) -> Stack:
    return Stack(
        folder=Path(),
        file=f"stacks/{slide}{name}.ome.tiff",
        slide=slide,
        field=name,
        z_um=(0.0,) * 7,
        pages=tuple(range(7)),
        shape=(7, 100, 100),
        dtype="uint8",
        label="ok" if ok else "refused",
        focus_z_um=0.0 if ok else None,
        sparsity="dense",
        x_um=xy[0] if xy else None,
        y_um=xy[1] if xy else None,
        optics={"pixel_size_um": 1.0},
        **more,
    )


many = st.lists(
    st.tuples(
        st.sampled_from("AB"), st.integers(0, 30).map(str), st.booleans(), st.integers(0, 2)
    ),
    min_size=12,
    max_size=60,
    unique_by=lambda s: (s[0], s[1], s[3]),
)


@given(rows=many, seed=st.integers(0, 2**31), order=st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_a_split_is_a_partition_that_keeps_fields_together(rows, seed, order) -> None:
    stacks = [row(s, n, ok, channel=c) for s, n, ok, c in rows]
    stacks += [row("A", f"sure{i}") for i in range(3)]
    split = draw(stacks, seed)
    names = [name for part in split.groups.values() for name in part]
    assert len(set(names)) == len(names)
    assert set(names) == {s.group for s in stacks}
    assert set(split.groups) == set(PARTS)
    for part in PARTS:  # each has something to learn from or to judge by
        assert any(s.labelled for s in stacks if split.part_of(s) == part)
    order.shuffle(stacks)
    assert draw(stacks, seed) == split
    assert Split.from_json(json.loads(json.dumps(split.to_json()))) == split


def test_the_fractions_are_kept_and_the_seed_matters() -> None:
    stacks = [row("A", str(i)) for i in range(100)]
    split = draw(stacks, 1)
    assert [len(g) for g in split.groups.values()] == [70, 15, 15]
    assert draw(stacks, 2) != split
    two = draw(stacks, 1, {"train": 0.8, "test": 0.2})
    assert [len(g) for g in two.groups.values()] == [80, 20]


def test_the_same_spot_under_two_names_stays_together() -> None:
    stacks = [row("A", str(i), xy=(400.0 * i, 0.0)) for i in range(8)]
    stacks += [row("A", "again", xy=(430.0, 0.0)), row("B", "other slide", xy=(400.0, 0.0))]
    groups = groups_of(stacks, "field")
    assert ["A/1", "A/again"] in groups
    assert len(groups) == 9
    for seed in range(8):
        split = draw(stacks, seed)
        assert split.part_of(stacks[1]) == split.part_of(stacks[8])


@pytest.mark.parametrize(
    ("by", "rows", "parts", "sentence"),
    [
        ("field", [row("A", "1"), row("A", "1", channel=1)], PARTS, "no honest split"),
        ("slide", [row("A", str(i)) for i in range(9)], PARTS, "1 slide .* split by field"),
        ("field", [row("A", str(i), ok=i < 2) for i in range(9)], PARTS, "2 fields with"),
        ("field", [row("A", str(i)) for i in range(9)], {"a": 0.5, "b": 0.2}, "add up to 1"),
        ("field", [row("A", str(i)) for i in range(9)], {"a": 1.0}, "two fractions"),
        ("plane", [row("A", str(i)) for i in range(9)], PARTS, "by 'slide' or by 'field'"),
    ],
)
def test_dishonest_splits_are_refused(by, rows, parts, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        draw(rows, 0, parts, by)


def test_the_split_is_written_down(dataset: Dataset, files: list[Path]) -> None:
    assert dataset.written_split is None
    with pytest.raises(InputError, match="no split has been drawn"):
        dataset.part("train")
    split = dataset.split(seed=3)
    again = Dataset.open(dataset.path)
    assert again.written_split == split
    parts = {name: {s.key for s in again.part(name)} for name in split.groups}
    assert sum(map(len, parts.values())) == 5
    everything = [s for name in split.groups for s in again.part(name, labelled=False)]
    assert len(everything) == 6
    with pytest.raises(InputError, match="'trian' is no part of its split"):
        again.part("trian")
    # what comes later belongs to no part, until a split is drawn again
    more, _ = add_recorded(files[:1], dataset.path, step_um=1.0, slide="later")
    assert more.written_split == split
    assert split.part_of(more.stacks[-1]) is None
