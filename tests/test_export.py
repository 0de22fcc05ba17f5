"""From a run to one ONNX file: the same answers as torch, and a card that is true."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from mm_autofocus.cli import main  # noqa: E402
from mm_autofocus.errors import InputError  # noqa: E402
from mm_autofocus.models.card import Importance, ModelCard  # noqa: E402
from mm_autofocus.models.consensus import agreed  # noqa: E402
from mm_autofocus.models.nets import NETS, build_net  # noqa: E402
from mm_autofocus.models.nets.base import NetContext  # noqa: E402
from mm_autofocus.models.patches import cut, grid, mosaic, stack_looks  # noqa: E402
from mm_autofocus.models.runtime import OnnxModel  # noqa: E402
from mm_autofocus.training import Dataset, error_fit  # noqa: E402
from mm_autofocus.training.checkpoint import load_checkpoint, net_of  # noqa: E402
from mm_autofocus.training.error_fit import Seen, fit_errors  # noqa: E402
from mm_autofocus.training.export import export, write_onnx  # noqa: E402
from mm_autofocus.training.train import train  # noqa: E402

from blurred import OPTIONS, PATCH, make_dataset  # noqa: E402

torch.set_num_threads(1)

SMALL = {
    "sparsefocus": {"widths": (8, 16), "depths": (1, 1), "rin_widths": (4, 4, 8)},
    "pg-dcn": {"widths": (8, 16), "depths": (1, 1)},
    "resnet": {"width": 8},
    "convnext": {"widths": (8, 16), "depths": (1, 1)},
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("blurred"), rgb=True)


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    options = {**OPTIONS, "epochs": 3, "patches_per_stack": 24, "looks_um": (0.0, 2.0)}
    train(dataset.path, path, options)
    return path


@pytest.fixture(scope="module")
def exported(run: Path) -> tuple[Path, dict]:
    path = run.parent / "small.onnx"
    return path, export(run, path, licence="CC0", frames=60)


def test_the_graph_answers_as_torch_does_on_real_frames(exported, run, dataset) -> None:
    path, result = exported
    assert 0 <= result["parity_um"] < 1e-3
    net = net_of(load_checkpoint(run / "best.ckpt"))
    model = OnnxModel(path)
    stack = dataset.part("validation")[0]
    for k in (2, 8, 13):
        looks = [stack.plane(k), stack.plane(k + 2)]
        seen = model.predict(looks, every_patch=True)
        frame = stack_looks(looks, 255)
        corners = grid(frame.shape[1:], PATCH).reshape(-1, 2)
        patches = cut(frame, corners, PATCH)
        with torch.no_grad():
            cells = torch.from_numpy(mosaic(frame, PATCH))[None]
            importance = net.rin(cells).sigmoid()[0].numpy()
            output = net(torch.from_numpy(patches))
        np.testing.assert_allclose(seen.importance, importance, atol=1e-5)
        defocus, sd = model.net.patches(patches)
        np.testing.assert_allclose(defocus, output.defocus.numpy(), atol=1e-3)
        np.testing.assert_allclose(sd, output.log_sd.exp().numpy(), atol=1e-3)
        # and the frame is what those of its patches say together that matter
        matter = importance.ravel() >= 0.8
        chosen, sure = output.defocus.numpy()[matter], output.log_sd.exp().numpy()[matter]
        assert seen.content == len(chosen)
        if len(chosen):
            assert seen.defocus_um == pytest.approx(agreed(chosen, sure), abs=1e-3)


def test_half_the_size_answers_nearly_the_same(
    exported, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = exported
    monkeypatch.setattr("mm_autofocus.training.graph._LARGE", 256)
    path = run.parent / "half.onnx"
    result = export(run, path, licence="CC0", frames=60, half_weights=True)
    assert path.stat().st_size < 0.8 * whole.stat().st_size
    assert 0 < result["parity_um"] < 0.05
    x = np.random.default_rng(0).random((5, 6, PATCH, PATCH), np.float32)
    one, other = (OnnxModel(p).net.patches(x) for p in (whole, path))
    np.testing.assert_allclose(other[0], one[0], atol=0.05)
    np.testing.assert_allclose(other[1], one[1], rtol=0.05)


def test_any_number_of_patches_and_any_mosaic_fit(exported) -> None:
    path, _ = exported
    net = OnnxModel(path).net
    x = np.random.default_rng(0).random((5, 6, PATCH, PATCH), np.float32)
    together, sd = net.patches(x)
    single = np.concatenate([net.patches(x[k : k + 1])[0] for k in range(5)])
    np.testing.assert_allclose(together, single, atol=1e-4)
    assert (sd > 0).all()
    for rows, columns in ((1, 1), (2, 5), (9, 9)):
        cells = np.random.default_rng(1).random((1, 6, rows * 56, columns * 56), np.float32)
        answer = net.importance(cells)
        assert answer.shape == (rows, columns)
        assert ((answer >= 0) & (answer <= 1)).all()
    # the half that is not wanted costs nothing
    assert len(net._no_patches) == 0
    assert net._no_mosaic.size <= 6 * 56 * 56


def test_the_graph_is_clean(exported) -> None:
    path, result = exported
    graph = onnx.load(path)
    assert graph.opset_import[0].version == 17
    kinds = {node.op_type for node in graph.graph.node}
    assert "BatchNormalization" not in kinds  # folded into the convolutions
    assert "If" not in kinds
    assert result["size_mb"] == pytest.approx(path.stat().st_size / 1e6, abs=1e-3)


def test_the_card_says_what_it_was_trained_on(exported, dataset: Dataset) -> None:
    path, result = exported
    card = OnnxModel(path).card
    assert card.name == "small"
    assert card.architecture == "sparsefocus"
    assert (card.looks_um, card.channels, card.patch_px) == ((0.0, 2.0), 3, PATCH)
    assert (card.pixel_size_um, card.na, card.bit_depths) == (0.5, 0.3, (8,))
    low, high = card.z_range_um
    assert -9 < low < -6
    assert 4 < high < 7  # the second look takes 2 µm of it
    assert card.sha256 == result["sha256"] != "0" * 64
    assert card.training["stacks"] == len(dataset.part("train"))
    assert card.training["licence"] == "CC0"
    assert card.training["simulated"] is False
    assert card.training["options"]["seed"] == 0
    assert "recorded" in card.metrics["validation"]["data"]
    assert card.metrics["validation"]["frames"] > 20
    assert card.metrics["parity_um"] == result["parity_um"]
    assert card.ood is not None
    assert card.importance is not None


def test_frames_of_the_training_look_usual_and_others_do_not(exported, dataset) -> None:
    path, _ = exported
    model = OnnxModel(path)
    stack = dataset.part("test")[0]
    usual = model.predict([stack.plane(6), stack.plane(8)])
    assert usual.ood < 1
    foreign = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert model.predict([foreign, foreign]).ood > 1


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_net_exports(name: str, tmp_path: Path) -> None:
    other = {"tsva", "unet", "nafnet"}  # tests/test_refocus_nets.py
    assert set(SMALL) | other == set(NETS.names())
    torch.manual_seed(1)
    context = NetContext(looks_um=(0.0, 4.0), channels=1, range_um=(-9, 9), patch_px=128)
    net = build_net(name, context, SMALL[name]).train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(8, 2, 128, 128))  # statistics that are not 0 and 1
            if net.rin is not None:
                net.rin(torch.rand(2, 2, 112, 112))
    net.eval()
    card = ModelCard(
        name=name,
        looks_um=(0.0, 4.0),
        channels=1,
        patch_px=128,
        z_range_um=(-9.0, 9.0),
        importance=Importance() if net.rin is not None else None,
    )
    path = tmp_path / "m.onnx"
    write_onnx(net, card, path)
    x = np.random.default_rng(0).random((7, 2, 128, 128), np.float32)
    x *= np.linspace(0.2, 1, 7, dtype=np.float32)[:, None, None, None]
    with torch.no_grad():
        output = net(torch.from_numpy(x))
    defocus, sd = OnnxModel(path).net.patches(x)
    np.testing.assert_allclose(defocus, output.defocus, atol=2e-3)
    np.testing.assert_allclose(sd, output.log_sd.exp(), rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"run": "nowhere"}, "nowhere: no such run"),
        ({"output": "m.pt"}, "m.pt: a model is a .onnx file"),
        ({"output": "gone/m.onnx"}, "gone: no such folder"),
        ({"keep": "worst"}, "--keep: 'worst' is not allowed"),
        ({"dataset": "nodata"}, "nodata: no such folder"),
    ],
)
def test_what_cannot_be_exported_is_said(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        export(**{"run": run, "output": "m.onnx", **arguments})
    assert not list(tmp_path.glob("*.onnx*"))


def test_a_graph_that_answers_otherwise_is_refused(run, tmp_path, monkeypatch) -> None:
    from mm_autofocus.models.onnx_net import OnnxNet

    honest = OnnxNet.patches
    monkeypatch.setattr(OnnxNet, "patches", lambda s, x: (honest(s, x)[0] + 0.1, None))
    with pytest.raises(InputError, match=r"the graph differs from torch by 0\.1 µm"):
        export(run, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_exports(run: Path, tmp_path: Path, capsys) -> None:
    args = ["export", str(run), "-o", str(tmp_path / "m.onnx"), "--name", "mine"]
    with pytest.raises(SystemExit) as end:
        main([*args, "--json"])
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["name"] == "mine"
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2
    assert "exists already" in capsys.readouterr().err


# ------------------------------------------------------------------------------- errors


def seen(scale: float, floor: float, n: int = 4000) -> Seen:
    rng = np.random.default_rng(0)
    raw = rng.uniform(0.02, 3, n)
    label = rng.uniform(-9, 9, n)
    error = rng.normal(size=n) * np.hypot(scale * raw, floor)
    empty = np.zeros((2, 0), np.float32)
    return Seen(label, label + error, raw, 0.5 * raw, empty, n)


@pytest.mark.parametrize(("scale", "floor"), [(0.5, 0.0), (2.0, 0.0), (1.0, 1.0), (0.3, 0.4)])
def test_expected_errors_are_calibrated(scale: float, floor: float) -> None:
    frames = seen(scale, floor)
    fitted = fit_errors(frames)
    expected = np.hypot(fitted.sd_scale * frames.raw_um, fitted.floor_um)
    error = np.abs(frames.predicted_um - frames.label_um)
    assert np.mean(error <= expected) == pytest.approx(0.683, abs=0.02)
    surest = frames.raw_um < np.quantile(frames.raw_um, 0.25)
    assert np.mean(error[surest] <= expected[surest]) == pytest.approx(0.683, abs=0.12)
    assert fitted.disagreement_um is not None


def test_a_few_frames_are_not_calibrated_on() -> None:
    assert fit_errors(seen(3.0, 0.0, n=5)).sd_scale == 1.0


@pytest.mark.parametrize(("large", "edges"), [(20, {512}), (3, {256, 512})])
def test_a_model_is_calibrated_on_the_largest_frames(large, edges) -> None:
    def field(edge: int) -> SimpleNamespace:
        stack = SimpleNamespace(shape=(9, edge, edge + 40, 3))
        return SimpleNamespace(stack=stack, defocus_um=np.linspace(-4.0, 4.0, 9))

    fields = [field(256)] * 60 + [field(512)] * large
    chosen = error_fit._frames(fields, 80)
    assert {of.stack.shape[1] for of, _ in chosen} == edges
    assert len(chosen) <= 80
