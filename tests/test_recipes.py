"""What the recipes of the shipped models make of photographs."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import tifffile
from mm_autofocus.sim.slide import read_picture

from conftest import ROOT


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "_training_stacks", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import _training_stacks

    return _training_stacks


def specimen(shape: tuple[int, int] = (500, 620)) -> np.ndarray:
    """Discs in two colours on white, of all sizes, ``(Y, X, RGB)``."""
    rng = np.random.default_rng(4)
    picture = np.full((*shape, 3), 240, np.uint8)
    for _ in range(400):
        at = tuple(int(rng.integers(0, n)) for n in shape[::-1])
        colour = [(150, 60, 140), (220, 120, 160)][int(rng.integers(2))]
        cv2.circle(picture, at, int(rng.integers(2, 14)), colour, -1, cv2.LINE_AA)
    return picture


def recipe_of(recipes: ModuleType, **changes: object) -> object:
    whole = {"planes_um": (0.0,), "first_seed": 10_000, "fields": {256: (1, 0)}, "large": 0.0}
    return recipes.Recipe(**{**whole, "offset_um": (0.0, 0.1), **changes})


def asked(folder: Path | None) -> argparse.Namespace:
    return argparse.Namespace(photographs=folder)


def test_the_pictures_of_a_folder_are_added(recipes: ModuleType, tmp_path: Path) -> None:
    own = recipe_of(recipes)
    assert recipes.with_photographs(own, asked(None)) is own
    cv2.imwrite(str(tmp_path / "b.jpg"), specimen())
    tifffile.imwrite(tmp_path / "a.svs", specimen((1024, 1024)), photometric="rgb")
    (tmp_path / "notes.txt").write_text("of the pictures")
    found = recipes.with_photographs(own, asked(tmp_path)).pictures
    # what is four times as large is drawn four times as often
    assert found == (*own.pictures, *4 * [str(tmp_path / "a.svs")], str(tmp_path / "b.jpg"))


REFUSED = {
    "empty": ({}, "no picture in it"),
    "damaged": ({"a.jpg": b"\xff\xd8\xff no"}, "is no picture"),
    "damaged slide": ({"a.svs": b"II*\0 no"}, "a.svs"),
    "12 bits": ({"a.tif": np.zeros((64, 64, 3), np.uint16)}, "allowed: 8 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_told_before_anything_is_collected(
    recipes: ModuleType, case: str, tmp_path: Path
) -> None:
    files, sentence = REFUSED[case]
    for name, content in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            tifffile.imwrite(tmp_path / name, content)
    with pytest.raises(SystemExit, match=sentence) as e:
        recipes.with_photographs(recipe_of(recipes), asked(tmp_path))
    assert "--photographs" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_photograph_is_the_same_each_time_and_another_with_another_seed(
    recipes: ModuleType, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), specimen())
    recipe = recipe_of(recipes, blur_px=0.6, aside_px=1.0, raised=0.7, quality=(30, 95))

    def made(seed: int) -> bytes:
        rng = np.random.default_rng(seed)
        out = tmp_path / "out" / f"{seed}.png"
        assert recipes.photographed(str(tmp_path / "a.png"), recipe, rng, out) == str(out)
        return out.read_bytes()

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_colours_are_moved_aside_and_a_large_picture_is_cut(
    recipes: ModuleType, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), specimen((1500, 1900)))
    moves, sizes = [], []
    for seed in range(8):
        out = tmp_path / f"out{seed}.png"
        recipe = recipe_of(recipes, blur_px=0.6, aside_px=2.0)
        recipes.photographed(str(tmp_path / "a.png"), recipe, np.random.default_rng(seed), out)
        seen = cv2.imread(str(out)).astype(np.float32)
        sizes.append(seen.shape[:2])
        blue, green, _ = (np.ascontiguousarray(seen[..., c]) for c in range(3))
        (x, y), _ = cv2.phaseCorrelate(blue - blue.mean(), green - green.mean())
        moves.append(np.hypot(x, y))
    assert max(max(s) for s in sizes) <= 1200
    assert min(min(s) for s in sizes) >= 600  # half of it
    assert len(set(sizes)) > 4
    assert min(moves) < 1 < max(moves) < 8


def test_without_blur_a_given_picture_is_still_read_and_cut(
    recipes: ModuleType, tmp_path: Path
) -> None:
    tifffile.imwrite(tmp_path / "a.svs", specimen(), photometric="rgb")
    out = tmp_path / "out.png"
    rng = np.random.default_rng(1)
    recipes.photographed(str(tmp_path / "a.svs"), recipe_of(recipes), rng, out)
    seen = cv2.imread(str(out))
    assert 0.5 * 500 <= seen.shape[0] <= 500
    assert abs(float(seen.mean()) - float(specimen().mean())) < 2


def test_where_the_seeds_of_training_end_it_says_so(
    recipes: ModuleType, tmp_path: Path
) -> None:
    recipe = recipe_of(recipes, first_seed=10**6)
    with pytest.raises(SystemExit, match=r"first_seed 1000000: .* after 0 of 20 stacks"):
        recipes.collect_share(recipe, tmp_path / "share0", 40, 0, 2)
    assert not (tmp_path / "share0").exists()


def test_how_much_of_a_colour_is_left_beside_green_is_that_of_its_blur(
    recipes: ModuleType,
) -> None:
    import _learned_photographs as photographs

    rng = np.random.default_rng(0)
    fine = cv2.GaussianBlur(rng.normal(0, 1, (400, 400)), (0, 0), 0.8)
    green = 0.9 + 0.15 * fine / fine.std()
    blue, red = cv2.GaussianBlur(green, (0, 0), 0.7), 0.5 * green
    light = 255 * np.exp(-np.stack([blue, green, red], 2))
    of_red, of_blue = photographs.shared_with_green(light.round().astype(np.uint8))
    f = np.array(photographs.PER_PX)
    left = np.exp(-2 * np.pi**2 * 0.7**2 * (f**2 - f[0] ** 2))
    np.testing.assert_allclose(of_red, 1, atol=0.03)
    np.testing.assert_allclose(of_blue, [np.ones(len(f)), left], atol=0.03)

    noise = rng.normal(0, green.std(), green.shape)  # as strong as what is shared, or more
    light[..., 0] *= np.exp(-noise)
    coherence, _ = photographs.shared_with_green(light.clip(0, 255).round().astype(np.uint8))[1]
    assert (np.diff(coherence) < 0).all()
    assert coherence[-1] < 0.6


@pytest.mark.parametrize("script", ["make_slide20x", "make_tsva20x"])
def test_every_picture_that_a_recipe_names_is_there_and_can_be_read(
    recipes: ModuleType, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    """Two of them are grey."""
    monkeypatch.delitem(sys.modules, script, raising=False)
    named = importlib.import_module(script).RECIPE.pictures
    assert len(named) >= 4
    for name in named:
        assert read_picture(str(recipes.PICTURES / name)).shape[2] == 3
