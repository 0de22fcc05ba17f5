"""Models at work, on nets whose answers are known by hand."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_autofocus.errors import InputError
from mm_autofocus.models import consensus, ood, patches
from mm_autofocus.models.card import TopK
from mm_autofocus.models.frames import Frames, normalise
from mm_autofocus.models.onnx_net import PROVIDERS, available_providers
from mm_autofocus.models.runtime import CallableModel, OnnxModel

from tiny_nets import PATCH, checkered, make_card, make_net

IMPORTANCE = {"threshold": 0.5}


def model(card=None, **net):
    card = card or make_card()
    return OnnxModel(make_net(card=card, **net))


# --- the answer ---


@pytest.mark.parametrize(
    ("dtype", "top", "max_value"),
    [
        ("uint8", 255, None),
        ("uint16", 65535, None),
        ("uint16", 4095, 4095.0),
        ("float32", 1000, 1000.0),
    ],
    ids=["8 bits", "16 bits", "12 bits in 16", "floats"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_answer_is_the_median_of_what_the_net_says_of_the_patches(
    dtype, top, max_value, channels
):
    levels = (np.array([[0.2, 0.4, 0.6], [0.3, 0.8, 0.5]]) * top).round()
    frame = checkered(levels, dtype=dtype, channels=channels)
    p = model(make_card(channels=channels)).predict([frame], max_value=max_value)
    assert p.patch_defocus_um == pytest.approx(10 * levels.ravel()[_order(p)] / top, rel=1e-3)
    assert p.defocus_um == pytest.approx(10 * np.median(levels) / top, rel=1e-3)
    assert p.content == 6
    assert p.corners.tolist() == (p.cells * PATCH).tolist()
    assert np.allclose(p.focus_map(), 10 * levels / top, rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "sd", "expected"),
    [
        ([3.0], [0.0], 3.0),
        ([3.0, 1.0], None, 2.0),  # not known how sure: their median
        ([3.0, 1.0, 7.0, 2.5], None, 2.75),
        ([3.0, 1.0], [0.2, 0.2], 2.0),
        ([3.0, 3.1, 3.5], [1.0, 1.0, 1.0], 3.2),  # alike within half of their sd: their mean
        ([3.0, 3.2, 3.6], [1.0, 2.0, 1.0], 7.4 / 2.25),  # (3 + 3.2 / 4 + 3.6) / 2.25
        ([3.0, 1.0, 7.0], [0.2, 0.2, 0.2], 3.0),  # further apart: the one in the middle
        ([3.0, 1.0], [0.2, 0.1], 1.025),  # the surer one, drawn as far as the other can
        ([3.0, 1.0, 7.0, 8.0], [0.1, 5.0, 5.0, 5.0], 3.0 + 0.003 / 2.501),
        ([0.0, 7.0, 8.0, 7.5], [1.0, 2.0, 2.0, 2.0], 6.75),  # less sure, still a majority
        ([3.0, 1.0], [0.0, 0.0], 2.0),
        ([3.0, 1.0, 2.0], [0.0, 1.0, 1.0], 3.0 - 1e-6),  # none is sure beyond all measure
        ([3.0, 1.0], [0.2, np.nan], np.nan),
        ([3.0, np.nan], [0.2, 0.2], np.nan),
        ([3.0, np.inf], [0.2, 0.2], np.nan),
    ],
)
def test_patches_agree_and_the_surer_ones_count_more(values, sd, expected):
    sd = None if sd is None else np.array(sd, np.float32)
    found = consensus.agreed(np.array(values, np.float32), sd)
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)


PATCHES = st.lists(
    st.tuples(st.floats(-25, 25, width=32), st.floats(0.0625, 8, width=32)),
    min_size=1,
    max_size=31,
)


@settings(max_examples=200, deadline=None)
@given(PATCHES, st.randoms(use_true_random=False))
def test_no_answer_has_a_smaller_loss_than_what_patches_agree_on(patches, random):
    values, sd = np.array(patches, np.float32).T
    found = consensus.agreed(values, sd)
    assert values.min() - 1e-9 <= found <= values.max() + 1e-9

    def loss(answer):  # Huber's
        off = np.abs(values.astype(float) - answer) / sd
        return float(np.where(off < 0.5, off**2 / 2, off / 2 - 0.125).sum())

    others = [*values.tolist(), found - 1e-3, found + 1e-3, values.mean(dtype=float)]
    assert all(loss(found) <= loss(other) * (1 + 1e-6) + 1e-6 for other in others)
    shuffled = list(range(len(values)))
    random.shuffle(shuffled)
    assert consensus.agreed(values[shuffled], sd[shuffled]) == pytest.approx(found, abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(PATCHES, PATCHES)
def test_a_minority_of_patches_cannot_draw_the_answer_away(patches, others):
    values, sd = np.array(patches, np.float32).T
    wrong, sure = np.array(others, np.float32).T
    few = np.cumsum(1 / sure.astype(float)) < 0.99 * np.sum(1 / sd.astype(float))
    together = np.concatenate([values, wrong[few]]), np.concatenate([sd, sure[few]])
    found = consensus.agreed(*together)
    assert (values - 0.5 * sd).min() - 1e-5 <= found <= (values + 0.5 * sd).max() + 1e-5


def _order(prediction):
    return np.ravel_multi_index(prediction.cells.T, prediction.importance.shape)


def test_looks_are_laid_one_after_the_other_in_the_order_of_the_card():
    card = make_card(channels=3, looks_um=[0, 4])
    net = make_net(card=card, gain=[6, 0, 0, 0, 0, 60])
    first, second = (checkered([[100.0]], channels=3) for _ in range(2))
    first[..., 0] = checkered([[51.0]])
    second[..., 2] = checkered([[102.0]])
    p = OnnxModel(net).predict([first, second])
    assert p.defocus_um == pytest.approx((6 * 0.2 + 60 * 0.4) / 6, rel=1e-4)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, 0.4),
        ({"scale": "none"}, 102),
        ({"mean": 0.5, "std": 0.25}, -0.4),
        ({"mean": [0.4, 0.3, 0.2]}, 0.1),
        ({"mean": [0.4, 0.3, 0.2, 0.1, 0.0, 0.4], "std": 2.0}, (0.4 * 6 - 1.4) / 12),
        ({"per_patch": True}, 0.0),
    ],
)
def test_what_the_net_is_shown_is_normalised_as_the_card_says(rule, expected):
    card = make_card(channels=3, looks_um=[0, 4], normalisation=rule)
    frame = checkered([[102.0]], channels=3)
    p = model(card, gain=1.0).predict([frame, frame])
    assert p.defocus_um == pytest.approx(expected, abs=1e-4)


def test_a_patch_normalised_by_itself_has_unit_size():
    card = make_card(normalisation={"per_patch": True})
    x = np.random.default_rng(0).random((3, 1, PATCH, PATCH), dtype=np.float32)
    x = normalise(card, x, 255.0)
    assert np.allclose(x.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    assert np.allclose(x.std(axis=(1, 2, 3)), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("card", "net", "expected"),
    [
        ({}, {}, 4.0),
        ({"outputs": {"um_per_unit": 0.5}}, {}, 2.0),
        ({"outputs": {"sign": -1}}, {}, -4.0),
        ({"outputs": {"defocus": "dz"}, "inputs": {"name": "x"}}, {}, 4.0),
        ({"inputs": {"layout": "NHWC"}, "channels": 3}, {"gain": [0, 0, 30]}, 4.0),
        ({}, {"column": True}, 4.0),
        ({}, {"batch": 4}, 4.0),
        ({}, {"batch": 1}, 4.0),
    ],
    ids=["own", "unit", "sign", "names", "NHWC", "column", "batch of 4", "batch of 1"],
)
def test_a_net_from_elsewhere_runs_with_a_card_written_by_hand(card, net, expected):
    card = make_card(**card)
    net = OnnxModel(make_net(card=card, inside=False, **net), card)
    frame = checkered(np.full((2, 3), 102.0), channels=card.channels)
    p = net.predict([frame])
    assert len(p.patch_defocus_um) == 6
    assert p.defocus_um == pytest.approx(expected, rel=1e-4)


def test_the_nets_own_sd_is_in_um_and_calibrated():
    outputs = {"sd": "sd", "um_per_unit": 2.0}
    card = make_card(outputs=outputs, error={"sd_scale": 3.0, "floor_um": 0.4})
    p = model(card).predict([checkered([[51.0]])])
    assert p.patch_sd_um == pytest.approx([0.4], rel=1e-3)
    assert p.expected_error_um == pytest.approx(np.hypot(1.2, 0.4), rel=1e-3)


@pytest.mark.parametrize(
    ("sd", "spread", "n", "expected"),
    [
        (None, None, 1, None),
        ([0.3], None, 1, 0.3),
        (None, 1.0, 4, 1.2533 / 2),
        ([0.3, 0.5, 9.0, 0.1], 1.0, 4, np.hypot(0.4, 1.2533 / 2)),
    ],
)
def test_raw_error_of_a_median(sd, spread, n, expected):
    sd = None if sd is None else np.asarray(sd, np.float32)
    found = consensus.raw_error(sd, spread, n)
    assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))


def test_one_patch_of_a_net_without_sd_says_nothing_of_its_error():
    assert model().predict([checkered([[51.0]])]).expected_error_um is None
    card = make_card(error={"floor_um": 0.3})
    assert model(card).predict([checkered([[51.0]])]).expected_error_um == 0.3


# --- which patches ---


def test_without_an_importance_net_the_patches_with_content_are_looked_at():
    levels = np.full((3, 3), 200.0)
    frame = checkered(levels)
    frame[:, PATCH:] = 200  # two even columns
    rng = np.random.default_rng(1)
    frame = np.clip(frame + rng.normal(0, 2, frame.shape), 0, 255).astype(np.uint8)
    p = model().predict([frame])
    assert sorted(map(tuple, p.cells.tolist())) == [(0, 0), (1, 0), (2, 0)]
    assert np.isnan(p.focus_map()[:, 1:]).all()


@pytest.mark.parametrize(
    ("content", "looked_at", "sparsity"),
    [
        (81, 31, "dense"),
        (31, 31, "dense"),
        (30, 9, "sparse"),
        (9, 9, "sparse"),
        (8, 3, "extremely-sparse"),
        (2, 2, "extremely-sparse"),
        (0, 0, "blank"),
    ],
)
def test_how_many_patches_are_looked_at_follows_from_the_content(content, looked_at, sparsity):
    importance = np.zeros(81, np.float32)
    importance[:content] = np.linspace(1, 0.8, content) if content else 0
    importance = np.random.default_rng(0).permutation(importance).reshape(9, 9)
    cells, found, kind = consensus.choose(importance, 0.8, TopK())
    assert (len(cells), found, kind) == (looked_at, content, sparsity)
    weights = importance[cells[:, 0], cells[:, 1]]
    assert (np.diff(weights) <= 0).all()
    assert set(weights) == set(np.sort(importance.ravel())[::-1][:looked_at])


def test_the_importance_net_chooses_and_every_patch_can_be_asked_for():
    card = make_card(importance=IMPORTANCE | {"k": {"dense": 2, "sparse": 1}})
    frame = checkered([[220, 10, 140], [200, 30, 0]])
    net = model(card)
    p = net.predict([frame])
    assert p.cells.tolist() == [[0, 0], [1, 0]]
    assert p.content == 3
    assert p.importance == pytest.approx(
        np.array([[220, 10, 140], [200, 30, 0]]) / 255, abs=1e-3
    )
    assert net.predict([frame], every_patch=True).cells.tolist() == [[0, 0], [1, 0], [0, 2]]


def test_the_half_of_the_net_that_is_not_wanted_is_fed_nothing():
    net = model(make_card(importance=IMPORTANCE)).net
    assert len(net._no_patches) == len(net._no_mosaic) == 0


def test_a_net_that_does_not_bear_an_empty_batch_works_all_the_same():
    card = make_card(importance=IMPORTANCE)
    odd = model(card, crowd=True)
    assert len(odd.net._no_patches) == 1
    frame = checkered([[220, 10, 140], [200, 30, 0]])
    assert odd.predict([frame]).defocus_um == pytest.approx(
        model(card).predict([frame]).defocus_um, rel=1e-3
    )


@pytest.mark.parametrize("shape", [(56, 56), (57, 100), (168, 112), (200, 131, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_patches_and_mosaic_are_bit_for_bit_those_of_the_training(shape, dtype):
    rng = np.random.default_rng(0)
    looks = [rng.integers(0, 255, shape).astype(dtype) for _ in range(2)]
    frames = Frames(tuple(looks), 255.0, patches.grid(shape, PATCH), PATCH)
    frame = patches.stack_looks(looks, 255.0)
    cells = np.argwhere(np.ones(frames.corners.shape[:2], bool))
    whole = patches.cut(frame, frames.corners.reshape(-1, 2), PATCH)
    assert np.array_equal(frames.cut(cells), whole)
    assert np.array_equal(frames.mosaic(), patches.mosaic(frame, PATCH))


@pytest.mark.parametrize(("pixel", "size"), [(0.25, 224), (1.0, 56)])
def test_frames_of_another_pixel_size_are_scaled_where_the_card_says_so(pixel, size):
    card = make_card(pixel_size_um=0.5, may_rescale=True)
    frame = checkered([[51, 102], [153, 204]], patch=size // 2)
    p = model(card).predict([frame], pixel_size_um=pixel)
    assert p.importance.shape == (2, 2)
    assert p.patch_px == size // 2
    assert sorted(p.corners.ravel().tolist()) == [0] * 4 + [size // 2] * 4
    assert p.focus_map().ravel() == pytest.approx([2, 4, 6, 8], abs=0.05)
    assert p.reasons == ()


# --- why not to trust it ---


def reasons(card=None, frame=None, net=None, **kwargs):
    frame = checkered([[51, 102, 51]]) if frame is None else frame
    return model(card, **(net or {})).predict([frame], **kwargs)


def test_nothing_speaks_against_an_ordinary_answer():
    p = reasons()
    assert p.reasons == ()
    assert p.trusted


@pytest.mark.parametrize(
    "frame",
    [
        np.full((112, 168), 128, np.uint8),
        np.zeros((112, 168), np.uint8),
        np.full((112, 168), 255, np.uint8),
        np.random.default_rng(0).normal(128, 5, (112, 168)).astype(np.uint8),
        np.add.outer(np.zeros(112), np.linspace(50, 200, 168)).astype(np.uint8),
    ],
    ids=["even", "dark", "saturated", "noise", "shading"],
)
def test_a_blank_frame_has_no_answer(frame):
    p = reasons(frame=frame)
    assert p.defocus_um is None
    assert p.expected_error_um is None
    assert p.reasons == ("blank: none of 6 patches carries content",)
    assert p.sparsity == "blank"
    assert not p.trusted


DOUBTS = {
    "beyond the range": (
        {"card": make_card(z_range_um=[-1, 1])},
        "prediction beyond the trained range: +2.0 µm of -1 … +1 µm",
    ),
    "patches disagree": (
        {
            "card": make_card(error={"disagreement_um": 1.0}),
            "frame": checkered([[51, 102, 153, 204]]),
        },
        "patches disagree: they spread by 2.97 µm",
    ),
    "patches disagree by the depth of field": (
        {"card": make_card(dof_um=1.0), "frame": checkered([[51, 102, 153, 204]])},
        "patches disagree: they spread by 2.97 µm",
    ),
    "patches disagree by their own sd": (
        {
            "card": make_card(outputs={"sd": "sd"}),
            "frame": checkered([[25, 50, 150, 225]]),
        },
        "patches disagree: they spread by 3.63 µm",
    ),
    "direction": (
        {
            "card": make_card(error={"disagreement_um": 1.0}),
            "frame": checkered([[51, 204, 204, 204, 204]] * 2 + [[51] * 2 + [204] * 3]),
            "net": {"gain": 10.0, "bias": -5.0},
        },
        "patches disagree: 4 of 15 see the other direction",
    ),
    "pixel size": (
        {"card": make_card(pixel_size_um=0.5), "pixel_size_um": 0.6},
        "frame unlike the training data: pixel size 0.6 µm, the model takes 0.5 µm ± 10 %",
    ),
    "bit depth": (
        {
            "card": make_card(bit_depths=[8]),
            "frame": checkered([[51, 102, 51]], dtype="uint16"),
            "max_value": 4095.0,
        },
        "frame unlike the training data: 12 bits, trained on 8",
    ),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_why_not_to_trust_it(case):
    kwargs, clause = DOUBTS[case]
    p = reasons(**kwargs)
    assert p.reasons == (clause,)
    assert p.defocus_um is not None
    assert not p.trusted


@pytest.mark.parametrize(("content", "doubt"), [(2, True), (3, False)])
def test_too_few_patches_carry_content(content, doubt):
    levels = np.zeros((9, 9))
    levels.ravel()[:content] = 200
    p = reasons(make_card(importance=IMPORTANCE), checkered(levels))
    assert p.content == content
    assert p.reasons == ((f"too few patches carry content: {content} of 81",) if doubt else ())


def test_a_frame_unlike_those_of_the_training_says_so_and_has_a_score():
    rng = np.random.default_rng(0)
    usual = [
        checkered(rng.uniform(90, 160, (2, 2)).round()) + rng.integers(0, 9, (112, 112))
        for _ in range(40)
    ]
    usual = [u.astype(np.uint8) for u in usual]
    described = np.concatenate(
        [ood.describe(patches.mosaic(patches.stack_looks([u], 255.0), PATCH), 1) for u in usual]
    )
    card = make_card(ood=ood.OodStats.fit(described[:30]).model_dump())
    net = model(card)
    for frame in usual[30:]:
        p = net.predict([frame])
        assert p.ood < 1
        assert p.reasons == ()
    p = net.predict([255 - usual[0] // 2])
    assert p.ood > 1
    assert all(r.startswith("frame unlike the training data: ") for r in p.reasons)


@pytest.mark.parametrize(("black", "left"), [(2, 4), (6, 0)])
def test_patches_for_which_the_net_gives_no_number_are_left_out_and_told(black, left):
    levels = np.full(6, 200.0)
    levels[:black] = 0
    frame = checkered(levels.reshape(2, 3))
    p = reasons(make_card(importance={"threshold": 0.0}), frame, {"log": True})
    assert len(p.patch_defocus_um) == len(p.cells) == left
    assert np.isfinite(p.patch_defocus_um).all()
    assert f"the net gave no number for {black} of 6 patches" in p.reasons
    assert (p.defocus_um is None) == (not left)


# --- what cannot be shown to it ---

BAD_FRAMES = {
    "too many looks": (
        lambda: [checkered([[50]])] * 2,
        {},
        r"2 looks were given, it takes 1 \(at \+0 µm\)",
    ),
    "colour": (lambda: [checkered([[50]], channels=3)], {}, "is RGB, the model takes grey"),
    "too small": (lambda: [np.zeros((55, 80), np.uint8)], {}, "less than one patch of 56"),
    "type": (
        lambda: [np.zeros((56, 56))],
        {},
        "float64 are not allowed: must be uint8, uint16",
    ),
    "floats without a limit": (
        lambda: [np.zeros((56, 56), np.float32)],
        {},
        "max_value: is missing",
    ),
    "no numbers": (
        lambda: [np.full((56, 56), np.nan, np.float32)],
        {"max_value": 1.0},
        "holds pixels that are no numbers",
    ),
    "limit": (
        lambda: [np.zeros((56, 56), np.uint8)],
        {"max_value": 0.0},
        "max_value: 0 is not allowed",
    ),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_frames_that_do_not_fit_are_refused(case):
    frames, kwargs, sentence = BAD_FRAMES[case]
    with pytest.raises(InputError, match=sentence):
        model().predict(frames(), **kwargs)


def test_looks_of_unequal_shape_are_refused():
    net = model(make_card(looks_um=[0, 4]))
    with pytest.raises(InputError, match="the looks differ"):
        net.predict([checkered([[50]]), checkered([[50, 50]])])


BAD_NETS = {
    "looks": (make_card(looks_um=[0, 4]), {"planes": 1}, r"2 looks, 1 channels.*any × 2 × 56"),
    "channels": (make_card(channels=3), {"planes": 1}, "asks for float any × 3 × 56 × 56"),
    "output": (
        make_card(),
        {"card": make_card(outputs={"defocus": "y"})},
        "no output 'defocus'",
    ),
    "sd": (make_card(outputs={"sd": "sd"}), {"card": make_card()}, "no output 'sd'; it has"),
    "input": (make_card(), {"card": make_card(inputs={"name": "x"})}, "no input 'patches'"),
    "mosaic": (make_card(importance={}), {"card": make_card()}, "no input 'mosaic'"),
    "second input": (make_card(), {"card": make_card(importance={})}, "'mosaic' of which its"),
}


@pytest.mark.parametrize("case", BAD_NETS)
def test_a_net_that_does_not_fit_its_card_is_refused(case):
    card, net, sentence = BAD_NETS[case]
    with pytest.raises(InputError, match=sentence):
        OnnxModel(make_net(**({"card": card} | net)), card)


def test_an_answer_of_two_columns_is_refused():
    with pytest.raises(InputError, match=r"shape \(1, 2\), which is not allowed"):
        model(wide=True).predict([checkered([[50]])])


# --- how it runs ---


def test_a_provider_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    assert "cpu" in available_providers()
    net = OnnxModel(make_net(), providers=["cpu"], threads=2)
    assert net.net.providers == ["cpu"]
    with pytest.raises(InputError, match=r"'cud' is unknown .did you mean 'cuda'"):
        OnnxModel(make_net(), providers=["cud"])
    absent = next(p for p in ("directml", "coreml", "cuda") if p not in available_providers())
    with pytest.raises(InputError, match=f"{absent!r} is not there.* has: .*cpu"):
        OnnxModel(make_net(), providers=[absent, "cpu"])
    # what is there by its name but has no driver is not replaced unnoticed
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *a, providers: real(*a, providers=[PROVIDERS["cpu"]]),
    )
    everything = list(PROVIDERS.values())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: everything)
    with pytest.raises(InputError, match=r"'cuda' could not be started.*; cpu would be used"):
        OnnxModel(make_net(), providers=["cuda"])
    with pytest.raises(InputError, match="threads: 0"):
        OnnxModel(make_net(), threads=0)


@pytest.mark.parametrize("importance", [None, {}])
def test_it_can_be_warmed(importance):
    model(make_card(channels=3, looks_um=[0, 4], importance=importance)).warm((130, 150, 3))


def test_a_function_is_a_model_with_a_card():
    card = make_card(inputs={"layout": "NHWC"}, outputs={"sign": -1})
    seen = []

    def net(x):
        seen.append(x.shape)
        return 10 * x.mean(axis=(1, 2, 3)), np.full((len(x), 1), 0.25)

    p = CallableModel(net, card).predict([checkered([[51, 102, 153]])])
    assert seen == [(3, PATCH, PATCH, 1)]
    assert p.defocus_um == pytest.approx(-4, rel=1e-3)
    assert p.patch_sd_um.tolist() == [0.25] * 3
    net.card = make_card()
    assert CallableModel(net).card is net.card
    with pytest.raises(InputError, match="has no card"):
        CallableModel(lambda x: x)
    with pytest.raises(InputError, match="importance is not allowed"):
        CallableModel(net, make_card(importance={}))
    with pytest.raises(InputError, match=r"shape \(3, 1, 56, 56\) is not allowed"):
        CallableModel(lambda x: x, make_card()).predict([checkered([[51, 102, 153]])])


def test_torch_is_never_loaded(tmp_path):
    make_net(tmp_path / "m.onnx", make_card(importance={}))
    code = (
        "import sys, numpy as np\n"
        "from mm_autofocus.models.importing import load_model\n"
        "frame = np.random.default_rng(0).integers(0, 255, (112, 112), dtype=np.uint8)\n"
        "load_model(sys.argv[1]).predict([frame])\n"
        "print([m for m in ('torch', 'onnx', 'lightning_fabric', 'matplotlib') "
        "if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.onnx")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"
    assert out.stderr == ""
