"""What a training begins with: a run's weights, or those of an exported model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from mm_autofocus.errors import InputError  # noqa: E402
from mm_autofocus.models.card import Importance, LensInput, ModelCard, Shots  # noqa: E402
from mm_autofocus.models.importing import shipped_models  # noqa: E402
from mm_autofocus.models.nets import NETS, build_net  # noqa: E402
from mm_autofocus.models.nets.base import NetContext  # noqa: E402
from mm_autofocus.training import Dataset  # noqa: E402
from mm_autofocus.training.begin import begin_with, settle, weights_to_begin_with  # noqa: E402
from mm_autofocus.training.checkpoint import save_checkpoint  # noqa: E402
from mm_autofocus.training.export import export, write_onnx  # noqa: E402
from mm_autofocus.training.options import read_options, read_options_file  # noqa: E402
from mm_autofocus.training.refocus_export import write_refocus  # noqa: E402
from mm_autofocus.training.train import prepare, train  # noqa: E402

import blurred  # noqa: E402
from blurred import OPTIONS, make_dataset  # noqa: E402
from tiny_nets import make_net  # noqa: E402

torch.set_num_threads(1)

PX = 64
FOCUS = {
    "sparsefocus": {"widths": (8, 16), "depths": (1, 1), "rin_widths": (4, 4, 8)},
    "sparsefocus, spectra": {
        "widths": (8,), "depths": (1,), "rin_widths": (4, 4, 8), "spectra": 8,
    },
    "sparsefocus, lens": {
        "widths": (8,), "depths": (1,), "rin_widths": (4, 4, 8), "spectra": 8,
        "lens": {"sigma": (0.3, 0.9)},
    },
    "pg-dcn": {"widths": (8, 16), "depths": (1, 1)},
    "resnet": {"width": 8},
    "convnext": {"widths": (8, 16), "depths": (1, 1)},
}  # fmt: skip
IMAGES = {
    "tsva": {"width": 4},
    "tsva, told": {"width": 4, "told": True},
    "tsva, without norm": {"width": 4, "norm": "none"},
    "unet": {"width": 4},
    "nafnet": {"width": 4},
}


def made(label: str):
    """A net with a history of its own, its card, and how to write both."""
    name = label.split(",", maxsplit=1)[0]
    defocus = label in FOCUS
    options = {**FOCUS, **IMAGES}[label]
    context = NetContext(
        looks_um=(0.0, 4.0) if defocus else (0.0,),
        channels=3,
        range_um=(-5.0, 5.0) if defocus else (-2.5, 2.5),
        half_um=None if defocus else (0.5, 3.0),
        patch_px=128 if name == "pg-dcn" else PX,
        na=0.3,
        pixel_size_um=0.5,
    )
    torch.manual_seed(1)
    net = build_net(name, context, options)
    with torch.no_grad():
        for key, value in net.state_dict().items():
            if key.endswith(("running_mean", "running_var")) or not value.any():
                value.copy_(0.5 + torch.rand(value.shape))
    card = ModelCard(
        name="small",
        architecture=name,
        task=net.task,
        looks_um=context.looks_um,
        channels=3,
        patch_px=context.patch_px,
        z_range_um=context.range_um,
        na=context.na,
        pixel_size_um=context.pixel_size_um,
        lens=LensInput(ranges=options["lens"]) if "lens" in options else None,
        importance=Importance() if getattr(net, "rin", None) is not None else None,
        shots=None
        if defocus
        else Shots(
            count=2 if net.shots > 1 else 1,
            half_um=(0.5, 3.0),
            halo_px=net.halo_px,
            multiple=net.multiple,
        ),
        training={"net": net.options.model_dump(mode="json")},
    )
    return net.eval(), card, write_onnx if defocus else write_refocus


def asked(net, card: ModelCard):
    """Some inputs, and all that the net answers to them."""
    torch.manual_seed(2)
    px = card.patch_px
    with torch.no_grad():
        if card.task == "refocus":
            out = net(torch.rand(2, card.planes, px, px), torch.ones(2), torch.ones(2))
            return [out.image, out.toward, out.log_sd]
        told = [] if card.lens is None else [torch.tensor([[-0.5, 1.0]])]
        out = net(torch.rand(3, card.planes, px, px), *told)
        rin = [net.rin(torch.rand(1, card.planes, 112, 56))] if card.importance else []
        return [out.defocus, out.log_sd, *rin]


def test_all_nets_are_tried() -> None:
    assert {n.split(",", maxsplit=1)[0] for n in (*FOCUS, *IMAGES)} == set(NETS.names())


@pytest.mark.parametrize("label", sorted({**FOCUS, **IMAGES}.keys() - {"pg-dcn"}))
def test_an_exported_model_is_a_net_again(label: str, tmp_path: Path) -> None:
    net, card, write = made(label)
    before = asked(net, card)
    write(net, card, tmp_path / "small.onnx")
    state = weights_to_begin_with(str(tmp_path / "small.onnx"))
    again = build_net(state["model"], NetContext(**state["context"]), card.training["net"])
    torch.manual_seed(3)
    begin_with(again, state)
    for one, other in zip(before, asked(again.eval(), card), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("label", ["sparsefocus, spectra", "tsva"])
def test_weights_of_16_bits_are_read_as_32(
    label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm_autofocus.training.graph._LARGE", 256)
    net, card, write = made(label)
    for name, half in (("whole", False), ("half", True)):
        write(net, card, tmp_path / f"{name}.onnx", half=half)
    whole, half = (
        weights_to_begin_with(str(tmp_path / f"{n}.onnx"))["weights"] for n in ("whole", "half")
    )
    assert (tmp_path / "half.onnx").stat().st_size < (tmp_path / "whole.onnx").stat().st_size
    rounded = 0
    for key, value in whole.items():
        assert half[key].dtype == value.dtype
        rounded += not torch.equal(half[key], value)
        torch.testing.assert_close(half[key], value, rtol=1e-3, atol=1e-6)
    assert rounded


def test_what_reads_spectra_begins_anew_where_the_looks_lie_elsewhere() -> None:
    nets = []
    for looks in ((0.0, 4.0), (0.0, 4.0), (-8.0, 8.0)):
        context = NetContext(looks_um=looks, range_um=(-5, 5), patch_px=64)
        torch.manual_seed(len(nets))
        nets.append(build_net("sparsefocus", context, FOCUS["sparsefocus, spectra"]))
    before, alike, elsewhere = nets
    state = {
        "model": "sparsefocus",
        "context": before.context.model_dump(mode="json"),
        "weights": before.state_dict(),
    }
    own = elsewhere.state_dict()["dpn.spectral.first.weight"].clone()
    begin_with(alike, state)
    begin_with(elsewhere, state)
    for key in ("dpn.spectral.first.weight", "rin.layers.0.weight"):
        given = before.state_dict()[key]
        torch.testing.assert_close(alike.state_dict()[key], given, rtol=0, atol=0)
        same = torch.equal(elsewhere.state_dict()[key], given)
        assert same == (".spectral." not in key)
    torch.testing.assert_close(elsewhere.state_dict()["dpn.spectral.first.weight"], own)


def test_what_the_looks_alone_decide_stays_the_nets_own() -> None:
    nets = []
    for second in (4.0, 8.0):
        context = NetContext(looks_um=(0.0, second), range_um=(-5, 5), patch_px=128)
        nets.append(build_net("pg-dcn", context, FOCUS["pg-dcn"]))
    before, after = nets
    own = {k: v.clone() for k, v in after.named_buffers() if k.endswith(".table")}
    assert own
    assert not any(torch.equal(dict(before.named_buffers())[k], v) for k, v in own.items())
    context = before.context.model_dump(mode="json")
    begin_with(after, {"model": "pg-dcn", "context": context, "weights": before.state_dict()})
    for key, value in own.items():
        torch.testing.assert_close(dict(after.named_buffers())[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("label", ["sparsefocus", "tsva, told"])
def test_settled_it_answers_the_same_and_learns_from_there(label: str, tmp_path: Path) -> None:
    net, card, write = made(label)
    write(net, card, tmp_path / "small.onnx")
    state = weights_to_begin_with(str(tmp_path / "small.onnx"))
    again = build_net(state["model"], NetContext(**state["context"]), card.training["net"])
    begin_with(again, state)
    px = card.patch_px
    batch = {
        "patches": torch.rand(16, card.planes, px, px),
        "defocus_um": torch.linspace(-4, 4, 16),
        "mosaic": torch.rand(4, card.planes, 56, 56),
        "importance": torch.rand(4, 1, 1),
        "shots": torch.rand(16, card.planes, px, px),
        "truth": torch.rand(16, 3, px, px),
        "side": torch.ones(16),
        "half_um": torch.ones(16),
        "toward_um": torch.ones(16),
        "field": torch.zeros(16),
    }
    before = asked(again.eval(), card)
    settle(again, [batch, batch], torch.device("cpu"))
    for one, other in zip(before, asked(again, card), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-3, rtol=1e-3)
    norms = [m for m in again.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(m.running_var.std() > 0 for m in norms)  # none is as it began
    # statistics of this batch are now those that it has learned
    with torch.no_grad():
        at_rest = [v.item() for v in again.losses_of(batch).values()]
        in_training = [v.item() for v in again.train().losses_of(batch).values()]
    np.testing.assert_allclose(in_training, at_rest, rtol=0.02)


def test_a_model_is_trained_further_from_its_file(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    options = {**OPTIONS, "epochs": 2, "patches_per_stack": 24}
    first = train(dataset.path, tmp_path / "run", options)
    export(tmp_path / "run", tmp_path / "model.onnx", frames=20)
    kept = {**options, "epochs": 1, "lr": 1e-9, "ema": 0}
    more = train(
        dataset.path, tmp_path / "more", {**kept, "init": str(tmp_path / "model.onnx")}
    )
    before = first["validation"]["mae_um"]
    # a step so small teaches nothing: all that it knows, it began with
    assert more["validation"]["mae_um"] == pytest.approx(before, rel=0.1)
    assert train(dataset.path, tmp_path / "new", kept)["validation"]["mae_um"] > 1.5 * before


def test_a_net_that_begins_with_another_is_built_as_that_one(tmp_path: Path) -> None:
    """As the README says it: ``--set init=NAME`` is all."""
    dataset = make_dataset(tmp_path)
    options = {**OPTIONS, "epochs": 1, "patches_per_stack": 8}
    net = {**blurred.NET, "spectra": 8, "lens": {"sigma": (0.45, 0.75)}}
    known = [replace(s, lens={"sigma": 0.6}) for s in dataset.stacks]
    told = Dataset(dataset.path, dataset.meta, known)
    first = prepare(told, tmp_path / "run", read_options({**options, "net": net}))
    save_checkpoint(
        tmp_path / "run" / "best.ckpt",
        {
            **first.identity,
            "weights": build_net(
                first.identity["model"],
                NetContext(**first.identity["context"]),
                first.identity["net"],
            ).state_dict(),
        },
    )
    more = {k: v for k, v in options.items() if k != "net"} | {"init": str(tmp_path / "run")}
    again = prepare(told, tmp_path / "again", read_options(more))
    assert again.identity["net"] == first.identity["net"]
    assert read_options_file(tmp_path / "again" / "options.yaml")["net"]["spectra"] == 8
    # what is given counts; of a lens that nobody knows of it is not told
    wider = read_options({**more, "net": {"spectra": 16}})
    silent = prepare(dataset, tmp_path / "wider", wider).identity["net"]
    assert (silent["spectra"], silent["lens"]) == (16, {})
    assert silent["widths"] == first.identity["net"]["widths"]


def test_what_cannot_be_trained_further_is_one_sentence(tmp_path: Path) -> None:
    make_net(tmp_path / "foreign.onnx")
    cases = (
        (str(tmp_path / "foreign.onnx"), "a net '' from elsewhere; only what export wrote"),
        (str(tmp_path / "none.onnx"), "none.onnx"),
        (str(tmp_path / "none"), "no such run"),
    )
    for init, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            weights_to_begin_with(init)
    net, card, write = made("pg-dcn")  # what it learns of the specimen becomes constants
    write(net, card, tmp_path / "pg.onnx")
    with pytest.raises(InputError, match=r"does not hold match\.\w+; name the run"):
        weights_to_begin_with(str(tmp_path / "pg.onnx"))
    (tmp_path / "damaged.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match="is damaged"):
        weights_to_begin_with(str(tmp_path / "damaged.onnx"))


@pytest.mark.parametrize("name", shipped_models())
def test_the_shipped_models_can_be_trained_further(name: str) -> None:
    state = weights_to_begin_with(name)
    assert state["folded"]
    assert state["model"] in NETS.names()
