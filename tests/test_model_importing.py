"""Models by name, by path and as Python objects."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import yaml
from mm_autofocus.errors import InputError
from mm_autofocus.models import importing
from mm_autofocus.models.importing import (
    check_against,
    load_any,
    load_model,
    model_names,
    shipped_models,
)
from mm_autofocus.models.runtime import CallableModel, OnnxModel
from mm_autofocus.registry import MODELS
from mm_autofocus.types import Optics

from tiny_nets import checkered, make_card, make_net

FRAME = checkered([[51, 102, 153]])


@pytest.fixture
def lab(monkeypatch, tmp_path):
    """A module of a lab's own, and names registered by third parties."""
    module = types.ModuleType("lab_nets")
    module.bare = lambda x: x.mean(axis=(1, 2, 3))
    module.carded = lambda x: x.mean(axis=(1, 2, 3))
    module.carded.card = make_card(name="carded")
    module.model = CallableModel(module.bare, make_card(name="whole"))
    module.number = 3
    module.file = str(tmp_path / "plugin.onnx")
    make_net(tmp_path / "plugin.onnx", make_card(name="plugin"))

    class Made:
        card = make_card(name="made")

        def predict(self, images, **kwargs):
            return None

    module.Made = Made
    monkeypatch.setitem(sys.modules, "lab_nets", module)
    monkeypatch.setattr(MODELS, "_targets", {})
    for name in ("carded", "model", "file", "Made"):
        MODELS.add(f"lab-{name.lower()}", f"lab_nets:{name}")
    return module


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    make_net(weights / "slide20x.onnx", make_card(name="slide20x"))
    monkeypatch.setattr(importing, "WEIGHTS", weights)
    return weights


def test_all_that_is_shipped_loads_and_is_sealed():
    tasks = set()
    for name in shipped_models():
        card = load_any(name).card
        assert card.sealed
        assert card.name == name
        tasks.add(card.task)
    assert tasks == {"defocus", "refocus"}


def test_a_shipped_model_by_name(shipped):
    assert shipped_models() == ["slide20x"]
    model = load_model("slide20x")
    assert isinstance(model, OnnxModel)
    assert model.card.name == "slide20x"


def test_one_table_of_names_in_which_ours_come_first(shipped, lab):
    MODELS.add("slide20x", "lab_nets:carded")
    names = ["slide20x", "lab-carded", "lab-model", "lab-file", "lab-made"]
    assert model_names() == names
    assert load_model("slide20x").card.name == "slide20x"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("lab-carded", "carded"),
        ("lab-model", "whole"),
        ("lab-file", "plugin"),
        ("lab-made", "made"),
        ("lab_nets:carded", "carded"),
    ],
)
def test_third_parties_models(lab, name, found):
    assert load_model(name).card.name == found


def test_a_function_with_a_card_by_hand(lab, tmp_path):
    with pytest.raises(InputError, match="'lab_nets:bare' has no card; name the file of one"):
        load_model("lab_nets:bare")
    path = tmp_path / "bare.yaml"
    path.write_text(
        yaml.safe_dump({"name": "bare", "channels": 1, "patch_px": 56, "z_range_um": [-9, 9]})
    )
    for card in (path, str(path), make_card(name="bare")):
        model = load_model("lab_nets:bare", card=card)
        assert model.card.name == "bare"
        assert model.predict([FRAME]).defocus_um == pytest.approx(0.4, rel=1e-3)


def test_a_path_with_or_without_the_suffix_and_a_card_that_replaces_its_own(tmp_path):
    path = tmp_path / "net"
    make_net(path)
    for name in (path, str(path)):
        assert load_model(name).card.name == "tiny"
    assert load_model(path, card=make_card(name="other")).card.name == "other"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "slide20",
            "model: 'slide20' is unknown .did you mean 'slide20x'.*; allowed: slide20x",
        ),
        ("nothing.onnx", "model: nothing.onnx does not exist"),
        ("no_such_module:net", "there is no module 'no_such_module'"),
        ("lab_nets:nothing", "the module has no 'nothing'"),
        (
            "lab_nets:number",
            "'lab_nets:number' is an object of type int; it must be a function",
        ),
        ("", "model: '' is unknown"),
        (".", "model: '.' is unknown"),
    ],
)
def test_what_is_no_model_is_one_sentence(shipped, lab, name, sentence):
    with pytest.raises(InputError, match=sentence) as e:
        load_model(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"junk" * 100, make_net()[:200]])
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx: is damaged or no ONNX file") as e:
        load_model(path)
    assert "\n" not in str(e.value)


def test_a_folder_is_no_model(tmp_path):
    (tmp_path / "x.onnx").mkdir()
    with pytest.raises(InputError, match=r"x\.onnx cannot be read"):
        load_model(tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"optics": Optics(pixel_size_um=0.325), "looks": 1}, ""),
        ({"optics": Optics(pixel_size_um=0.65)}, "pixel size 0.65 µm"),
        ({"image": np.zeros((60, 60, 3), np.uint8)}, "the frame is RGB"),
        ({"image": np.zeros((40, 60), np.uint8)}, "less than one patch"),
        ({"image": np.zeros((60, 60), np.uint16), "max_value": 4095.0}, "12 bits"),
        ({"looks": 2}, r"takes 1 looks \(at \+0 µm\), not 2"),
    ],
)
def test_a_microscope_is_checked_against_the_card(kwargs, sentence):
    card = make_card(pixel_size_um=0.325, bit_depths=[8])
    if not sentence:
        check_against(card, **kwargs)
        return
    with pytest.raises(InputError, match=sentence):
        check_against(card, **kwargs)
