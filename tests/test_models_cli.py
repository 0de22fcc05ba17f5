"""``mm-autofocus models``: list, show, check."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
import tifffile
import yaml
from mm_autofocus import cli
from mm_autofocus.models import importing
from mm_autofocus.models.sealing import seal
from mm_autofocus.registry import MODELS

from tiny_nets import checkered, make_card, make_net
from tiny_refocus import make_refocus, refocus_card, two_shots

CARD = {
    "channels": 3,
    "looks_um": [0, 4],
    "pixel_size_um": 0.325,
    "na": 0.75,
    "bit_depths": [8],
    "importance": {"threshold": 0.5},
    "training": {"data": "made for the test", "seed": 3},
    "metrics": {"simulated": {"mae_um": 0.25}},
}


@pytest.fixture
def weights(monkeypatch, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    make_net(folder / "slide20x.onnx", make_card(name="slide20x", **CARD))
    seal(folder / "slide20x.onnx")
    monkeypatch.setattr(importing, "WEIGHTS", folder)
    monkeypatch.setattr(MODELS, "_targets", {})
    return folder


@pytest.fixture
def call(capsys):
    def run(*args):
        with pytest.raises(SystemExit) as e:
            cli.main(["models", *map(str, args)])
        out, err = capsys.readouterr()
        return int(e.value.code or 0), out, err

    return run


@pytest.mark.parametrize("args", [[], ["list"]])
def test_list(call, weights, args):
    code, out, err = call(*args)
    assert (code, err) == (0, "")
    assert all(word in out for word in ("slide20x", "shipped", "0, +4", "RGB", "0.325"))
    code, out, _ = call(*args, "--json")
    (row,) = json.loads(out)["models"]
    assert code == 0
    assert row["name"] == "slide20x"
    assert row["looks_um"] == [0, 4]
    assert row["size_bytes"] == (weights / "slide20x.onnx").stat().st_size


def test_list_tells_the_task(call, weights):
    make_refocus(weights / "sharp20x.onnx", card=refocus_card(name="sharp20x"))
    code, out, _ = call("list", "--json")
    rows = {row["name"]: row for row in json.loads(out)["models"]}
    assert code == 0
    assert (rows["sharp20x"]["task"], rows["sharp20x"]["delta_um"]) == ("refocus", [1, 2])
    assert (rows["slide20x"]["task"], rows["slide20x"]["delta_um"]) == ("defocus", None)
    out = call("list")[1]
    assert "refocus" in out
    assert "ΔD 1 … 2" in out


def test_check_two_shots(call, tmp_path):
    net = make_refocus(tmp_path / "net.onnx")
    lower, upper = two_shots(0)
    tifffile.imwrite(tmp_path / "lower.tif", lower)
    tifffile.imwrite(tmp_path / "upper.tif", upper)
    images = ["--image", tmp_path / "lower.tif", "--image", tmp_path / "upper.tif"]
    code, out, _ = call("check", net, *images, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["frame"] == [72, 100]
    assert found["sharper"] == "lower"
    code, _, err = call("check", net, *images[:2])
    assert code == 2
    assert "takes two shots" in err


def test_list_names_what_cannot_be_loaded_and_goes_on(call, weights, monkeypatch):
    module = types.ModuleType("broken_nets")
    module.net = lambda x: x
    monkeypatch.setitem(sys.modules, "broken_nets", module)
    MODELS.add("broken", "broken_nets:net")
    code, out, _ = call("list", "--json")
    rows = {row["name"]: row for row in json.loads(out)["models"]}
    assert code == 0
    assert "error" not in rows["slide20x"]
    assert rows["broken"]["source"] == "plug-in"
    assert "has no card" in rows["broken"]["error"]
    assert "has no card" in call("list")[1]


def test_list_of_nothing(call, weights):
    (weights / "slide20x.onnx").unlink()
    assert json.loads(call("--json")[1]) == {"models": []}
    assert "no models are installed" in call("list")[1]


def test_show(call, weights):
    code, out, _ = call("show", "slide20x")
    assert code == 0
    for word in ("0, +4 µm", "RGB, 8 bits", "chosen by an importance net", "0.325 µm ± 10 %"):
        assert word in out
    assert "made for the test" in out
    assert '{"mae_um": 0.25}' in out
    code, out, _ = call("show", weights / "slide20x.onnx", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["training"] == CARD["training"]
    assert data["sha256"] != "0" * 64


def test_show_with_a_card_by_hand(call, weights, tmp_path):
    path, card = tmp_path / "lab.onnx", tmp_path / "hand.yaml"
    make_net(path, inside=False)
    card.write_text(
        yaml.safe_dump(
            {"name": "by hand", "channels": 1, "patch_px": 56, "z_range_um": [-9, 9]}
        )
    )
    code, out, _ = call("show", path, "--card", card)
    assert code == 0
    assert "by hand" in out
    assert "not sealed" in out


def test_check_of_a_sound_model_and_of_one_that_answers_a_blank_frame(call, tmp_path):
    sound, rash = tmp_path / "sound.onnx", tmp_path / "rash.onnx"
    make_net(sound)
    make_net(rash, make_card(importance={"threshold": 0.5}))
    code, out, _ = call("check", sound, "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["problems"]) == (0, True, [])
    assert found["frame"] == [504, 504]
    assert found["milliseconds"] > 0
    assert any("no checksum" in note for note in found["notes"])
    code, out, _ = call("check", rash)
    assert code == 1
    assert "tiny: not ok" in out
    assert "a blank frame is given the defocus +7.84 µm" in out


def test_check_of_a_net_that_gives_no_numbers(call, tmp_path):
    make_net(tmp_path / "m.onnx", gain=-1.0, log=True)
    code, out, _ = call("check", tmp_path / "m.onnx")
    assert code == 1
    assert "texture: the net gave no number for" in out


def test_check_with_a_frame(call, tmp_path):
    make_net(tmp_path / "m.onnx", make_card(pixel_size_um=0.5))
    frame = checkered([[51, 102, 153]])
    tifffile.imwrite(tmp_path / "f.tif", frame)
    code, out, _ = call("check", tmp_path / "m.onnx", "--image", tmp_path / "f.tif", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["defocus_um"] == pytest.approx(4, rel=1e-3)
    assert found["patches"] == 3
    assert (
        "defocus +4.00 µm"
        in call("check", tmp_path / "m.onnx", "--image", tmp_path / "f.tif")[1]
    )


BAD = {
    "unknown": (["show", "slide20"], "model: 'slide20' is unknown (did you mean 'slide20x'?)"),
    "missing": (["check", "nothing.onnx"], "nothing.onnx does not exist"),
    "damaged": (["check", "{d}/junk.onnx"], "junk.onnx: is damaged or no ONNX file"),
    "sha256": (["show", "{d}/changed.onnx"], "the file was damaged or changed"),
    "no card": (["show", "{d}/bare.onnx"], "has no card"),
    "card": (["show", "{d}/bare.onnx", "--card", "{d}/x.yaml"], "x.yaml does not exist"),
    "looks": (
        ["check", "slide20x", "--image", "{d}/rgb.tif"],
        "1 looks were given, it takes 2",
    ),
    "channels": (["check", "slide20x", "--image", "{d}/grey.tif"], "the frame is grey"),
    "pixel": (
        ["check", "slide20x", "--image", "{d}/rgb.tif", "--pixel-size-um", "0.65"],
        "pixel size 0.65 µm, the model takes 0.325 µm ± 10 %",
    ),
    "no image": (["check", "slide20x", "--image", "{d}/x.tif"], "there is no such file"),
    "no TIFF": (["check", "slide20x", "--image", "{d}/junk.onnx"], "not a readable TIFF file"),
    "stack": (["check", "slide20x", "--image", "{d}/stack.tif"], "must be one frame"),
    "provider": (["check", "slide20x", "--provider", "cud"], "'cud' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_2(call, weights, tmp_path, case):
    (tmp_path / "junk.onnx").write_bytes(b"junk" * 99)
    make_net(tmp_path / "bare.onnx", inside=False)
    changed = (weights / "slide20x.onnx").read_bytes().replace(b"made for", b"bade for")
    (tmp_path / "changed.onnx").write_bytes(changed)
    tifffile.imwrite(tmp_path / "rgb.tif", np.zeros((60, 60, 3), np.uint8), photometric="rgb")
    tifffile.imwrite(tmp_path / "grey.tif", np.zeros((60, 60), np.uint8))
    stack = np.zeros((5, 60, 60), np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    args, sentence = BAD[case]
    code, out, err = call(*(a.format(d=tmp_path) for a in args))
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.startswith("mm-autofocus: ")
    assert err.count("\n") == 1
