"""The card of a model, and the checksum it states of its file."""

from __future__ import annotations

import json

import pytest
import yaml
from mm_autofocus.errors import InputError
from mm_autofocus.models.card import ModelCard, bits_of, parse_card, read_sidecar, sidecar_of
from mm_autofocus.models.ood import names
from mm_autofocus.models.runtime import OnnxModel
from mm_autofocus.models.sealing import seal
from mm_autofocus.types import Optics

from tiny_nets import make_card, make_net

LEAST = {"name": "x", "channels": 3, "patch_px": 224, "z_range_um": [-25, 25]}
N = len(names(1))
OOD = {
    "names": list(names(1)),
    "mean": [0.5] * N,
    "whitening": [[float(i == j) for j in range(N)] for i in range(N)],
    "threshold": 3,
}
FULL = LEAST | {
    "format": 1,
    "architecture": "sparsefocus",
    "task": "defocus",
    "looks_um": [0, 4],
    "inputs": {"name": "patches", "layout": "NCHW"},
    "normalisation": {"mean": [0.5, 0.4, 0.6], "std": 0.2, "per_patch": True},
    "outputs": {"defocus": "d", "sd": None, "um_per_unit": 2, "sign": -1},
    "importance": {"threshold": 0.7, "k": {"dense": 20}},
    "pixel_size_um": 0.325,
    "may_rescale": True,
    "na": 0.75,
    "magnification": 20,
    "dof_um": 0.98,
    "bit_depths": [8, 12],
    "error": {"sd_scale": 1.2, "floor_um": 0.1},
    "ood": OOD,
    "training": {"data": "the virtual slide", "seed": 1, "fields": 20000},
    "metrics": {"simulated": {"mae_um": 0.3}},
}


def test_a_card_survives_being_written_and_read():
    card = parse_card(FULL)
    assert ModelCard.from_json(card.to_json()) == card
    assert parse_card(json.loads(card.to_json())) == card
    assert (card.n_looks, card.planes) == (2, 6)
    assert card.importance.k.sparse == 9
    assert card.to_json().endswith('"sha256":"' + "0" * 64 + '"}')


def test_the_least_card_is_that_of_one_look_without_an_importance_net():
    card = parse_card(LEAST)
    assert card.looks_um == (0.0,)
    assert card.importance is None
    assert card.ood is None
    assert not card.sealed


BAD = {
    "missing": ({"name": None, "delete": "channels"}, "card.channels: is missing"),
    "unknown": ({"chanels": 3}, "card.chanels: unknown key (did you mean 'channels'?)"),
    "unknown, nested": (
        {"importance": {"k": {"dens": 31}}},
        "card.importance.k.dens: unknown key (did you mean 'dense'?); allowed: dense, sparse",
    ),
    "channels": ({"channels": 2}, "card.channels: 2 is not allowed: must be 1 or 3"),
    "task": ({"task": "defocuss"}, "card.task: 'defocuss' is not allowed: must be 'defocus'"),
    "refocus without shots": ({"task": "refocus"}, "card.shots: is missing with the task"),
    "shots without refocus": (
        {"shots": {"half_um": [1, 2], "halo_px": 8}},
        "card.shots: is not allowed with the task 'defocus'",
    ),
    "text": ({"patch_px": "224"}, "card.patch_px: '224' is not allowed: must be a number"),
    "patch": ({"patch_px": 4}, "card.patch_px: 4 is not allowed: must be greater than"),
    "range": ({"z_range_um": [25, -25]}, "card.z_range_um: 25 is not below -25"),
    "half a range": ({"z_range_um": [25]}, "card.z_range_um.1: is missing"),
    "no looks": ({"looks_um": []}, "card.looks_um: [] is not allowed"),
    "looks back and forth": (
        {"looks_um": [0, 4, -4]},
        "card.looks_um: [0.0, 4.0, -4.0] is not allowed: must rise or fall strictly",
    ),
    "layout": ({"inputs": {"layout": "CHWN"}}, "card.inputs.layout: 'CHWN' is not allowed"),
    "std": ({"normalisation": {"std": 0}}, "card.normalisation.std: 0.0 is not allowed"),
    "two means of three": (
        {"normalisation": {"mean": [0.1, 0.2]}},
        "card.normalisation.mean: 2 numbers are not allowed: must be 1 or 3",
    ),
    "mean": ({"normalisation": {"mean": "a"}}, "card.normalisation.mean: 'a' is not allowed"),
    "sign": ({"outputs": {"sign": 0}}, "card.outputs.sign: 0 is not allowed: must be 1 or -1"),
    "unit": ({"outputs": {"um_per_unit": -1}}, "card.outputs.um_per_unit: -1 is not allowed"),
    "threshold": ({"importance": {"threshold": 2}}, "card.importance.threshold: 2 is not"),
    "sha256": ({"sha256": "1234"}, "card.sha256: '1234' is not allowed: must be 64"),
    "ood": ({"ood": OOD | {"mean": [0.5]}}, f"card.ood: mean and whitening do not fit its {N}"),
    "format": ({"format": 2}, "card.format: 2 is not allowed: must be 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_card_is_one_sentence(case):
    changes, sentence = BAD[case]
    data = LEAST | changes
    if key := data.pop("delete", None):
        data = {k: v for k, v in data.items() if k not in {key, "name"}} | {"name": "x"}
    with pytest.raises(InputError) as e:
        parse_card(data)
    assert str(e.value).startswith(sentence)
    assert "\n" not in str(e.value)


def test_what_is_no_mapping_is_no_card():
    with pytest.raises(InputError, match="is not a mapping"):
        parse_card([1, 2])
    with pytest.raises(InputError, match="card: is no JSON"):
        ModelCard.from_json("{")


def test_looks_may_be_taken_downwards():
    assert parse_card(LEAST | {"looks_um": [4, 0]}).looks_um == (4.0, 0.0)


# --- fits the microscope? ---


@pytest.mark.parametrize(
    ("card", "kwargs", "sentence"),
    [
        ({}, {}, ""),
        ({}, {"shape": (300, 300)}, "the frame is grey, the model takes RGB"),
        ({"channels": 1}, {}, "the frame is RGB, the model takes grey"),
        ({}, {"shape": (300, 300, 4)}, r"of shape \(300, 300, 4\)"),
        ({}, {"shape": (200, 300, 3)}, "300 × 200 pixels is less than one patch of 224"),
        ({"pixel_size_um": 0.5}, {"pixel_size_um": 0.54}, ""),
        ({"pixel_size_um": 0.5}, {"pixel_size_um": None}, ""),
        (
            {"pixel_size_um": 0.5},
            {"pixel_size_um": 0.56},
            "pixel size 0.56 µm, .*0.5 µm ± 10 %",
        ),
        ({"pixel_size_um": 0.5, "pixel_tolerance": 0.2}, {"pixel_size_um": 0.59}, ""),
        ({"pixel_size_um": 0.5, "may_rescale": True}, {"pixel_size_um": 0.9}, ""),
        ({"pixel_size_um": 0.5, "may_rescale": True}, {"pixel_size_um": 1.1}, "0.1 … 1 µm"),
        ({"pixel_size_um": 0.5, "may_rescale": True}, {"pixel_size_um": 0.25}, "patch of 448"),
        ({"bit_depths": [8]}, {"max_value": 255.0}, ""),
        ({"bit_depths": [8, 12]}, {"max_value": 65535.0}, "16 bits .* trained on 8 or 12"),
        ({"bit_depths": [8]}, {"max_value": 1000.5}, ""),
    ],
)
def test_frames_that_do_not_fit_the_card_are_refused(card, kwargs, sentence):
    card = parse_card(LEAST | card)
    kwargs = {"shape": (300, 320, 3)} | kwargs
    if not sentence:
        card.check_frame(**kwargs)
        return
    with pytest.raises(InputError, match=sentence):
        card.check_frame(**kwargs)


def test_other_optics_are_told():
    card = parse_card(LEAST | {"na": 0.75, "magnification": 20})
    assert card.check_optics(Optics(na=0.75, magnification=20)) == []
    assert card.check_optics(Optics()) == []
    assert card.check_optics(Optics(na=0.5, magnification=10)) == [
        "NA 0.5, trained at 0.75",
        "magnification 10, trained at 20",
    ]


@pytest.mark.parametrize(
    ("limit", "bits"), [(255, 8), (4095, 12), (65535, 16), (1000, None), (1.0, 1), (None, None)]
)
def test_bits_of_a_camera(limit, bits):
    assert bits_of(limit) == bits


# --- beside the file ---


def test_a_card_written_by_hand_lies_beside_the_model(tmp_path):
    path = tmp_path / "lab.net.onnx"
    make_net(path, inside=False)
    assert sidecar_of(path) == tmp_path / "lab.net.card.yaml"
    with pytest.raises(InputError, match=r"has no card; write one .* lab\.net\.card\.yaml"):
        OnnxModel(path)
    keys = LEAST | {"channels": 1, "patch_px": 56, "name": "lab"}
    sidecar_of(path).write_text(yaml.safe_dump(keys))
    assert OnnxModel(path).card.name == "lab"
    sidecar_of(path).write_text(yaml.safe_dump(keys | {"sha256": "1" * 64}))
    with pytest.raises(InputError, match="its card says 111111111111…"):
        OnnxModel(path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist"),
        ("a: [", "does not parse as YAML"),
        ("- 1", "is not a mapping"),
        ("name: x", "channels: is missing"),
        ("name: 2026-01-01\nchannels: 1\npatch_px: 56\nz_range_um: [0, .inf]", "z_range_um.1"),
    ],
)
def test_a_bad_card_beside_the_model_is_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "x.card.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=sentence) as e:
        read_sidecar(path)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)


# --- the checksum ---


def test_a_sealed_file_states_its_own_checksum(tmp_path):
    path = tmp_path / "m.onnx"
    size = len(make_net(path))
    assert not OnnxModel(path).card.sealed
    digest = seal(path)
    assert path.stat().st_size == size
    assert OnnxModel(path).card.sha256 == digest
    with pytest.raises(InputError, match="is sealed already"):
        seal(path)


def test_a_checksum_within_the_story_of_the_training_is_not_taken_for_that_of_the_file(
    tmp_path,
):
    path = tmp_path / "m.onnx"
    inner = {"sha256": "0" * 64, "data": {"sha256": "a" * 64}, "more": [{"sha256": "0" * 64}]}
    make_net(path, make_card(training=inner))
    seal(path)
    assert OnnxModel(path).card.training == inner


def test_a_changed_or_cut_file_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    data = make_net(path, make_card(training={"note": "abc"}), gain=10.0)
    seal(path)
    sealed = path.read_bytes()
    assert len(sealed) == len(data)
    for old, new in (
        (b'"note":"abc"', b'"note":"abd"'),
        (b"\x00\x00\x20\x41", b"\x00\x00\x30\x41"),
    ):
        assert sealed.count(old) == 1
        path.write_bytes(sealed.replace(old, new))
        with pytest.raises(InputError, match="the file was damaged or changed"):
            OnnxModel(path)
    path.write_bytes(sealed[: len(sealed) // 2])
    with pytest.raises(InputError, match="damaged or no ONNX file"):
        OnnxModel(path)


def test_a_file_without_a_card_cannot_be_sealed(tmp_path):
    path = tmp_path / "m.onnx"
    make_net(path, inside=False)
    with pytest.raises(InputError, match="has no card"):
        seal(path)
