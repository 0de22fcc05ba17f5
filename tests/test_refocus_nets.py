"""Nets that recover the sharp image: what they see, what they add, and that tiles are seamless."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")

from mm_autofocus.cli import main  # noqa: E402
from mm_autofocus.errors import InputError  # noqa: E402
from mm_autofocus.models.card import parse_card  # noqa: E402
from mm_autofocus.models.nets import NETS, build_net  # noqa: E402
from mm_autofocus.models.nets.base import NetContext  # noqa: E402
from mm_autofocus.models.refocus import RefocusModel  # noqa: E402
from mm_autofocus.models.runtime import OnnxModel  # noqa: E402
from mm_autofocus.training import Dataset  # noqa: E402
from mm_autofocus.training.export import export  # noqa: E402
from mm_autofocus.training.pairs import Truths, read_pair  # noqa: E402
from mm_autofocus.training.refocus_export import write_refocus  # noqa: E402
from mm_autofocus.training.train import train  # noqa: E402

from blurred import make_dataset  # noqa: E402

torch.set_num_threads(1)

SMALL = {
    "tsva": {"width": 4},
    "tsva, told": {"width": 4, "told": True},
    "unet": {"width": 4},
    "nafnet": {"width": 4},
}
OPTIONS = {
    "model": "tsva",
    "net": {"width": 6},
    "patch_px": 64,
    "batch": 8,
    "epochs": 6,
    "patches_per_stack": 24,
    "validation_planes": 6,
    "lr": 4e-3,
    "ema": 0.9,
    "precision": "32-true",
    "accelerator": "cpu",
    "workers": 0,
    "augment": {"turns": False, "noise": 0.0},
    # the planes of this dataset are 1 µm apart and blur slowly
    "pairs": {"half_um": [2, 4]},
}


def kind(label: str) -> str:
    """Name in the registry of a net in `SMALL`."""
    return label.split(",", maxsplit=1)[0]


def small(name: str, channels: int = 3, **options):
    torch.manual_seed(0)
    context = NetContext(channels=channels, half_um=(0.5, 3.0), range_um=(-2.5, 2.5))
    net = build_net(kind(name), context, {**SMALL[name], **options})
    for parameter in net.parameters():
        if not parameter.abs().max():  # what begins with nothing would hide what it sees
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def test_all_of_them_are_tried_here() -> None:
    torch_tasks = {name: NETS.get(name).task for name in NETS.names()}
    there = {n for n, task in torch_tasks.items() if task == "refocus"}
    assert there == {kind(label) for label in SMALL}


@pytest.mark.parametrize("name", sorted(SMALL))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_net_answers_and_learns(name, channels) -> None:
    net = small(name, channels)
    shots = torch.rand(2, 2 * channels, 48, 64)
    batch = {
        "shots": shots,
        "truth": torch.rand(2, channels, 48, 64),
        "side": torch.tensor([1.0, -1.0]),
        "half_um": torch.tensor([1.0, 2.0]),
        "toward_um": torch.tensor([0.5, -1.0]),
    }
    out = net(shots[:, : net.shots * channels], batch["side"], batch["half_um"])
    assert out.image.shape == (2, channels, 48, 64)
    assert out.toward.shape == out.log_sd.shape == (2, 6, 8)
    for loss in ("mse", "psnr", "charbonnier"):
        losses = small(name, channels, loss=loss).losses_of(batch)
        assert all(math.isfinite(v.item()) for v in losses.values())
    losses = net.losses_of(batch)
    sum(losses.values()).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", sorted(SMALL))
def test_untrained_it_returns_the_sharper_shot(name) -> None:
    context = NetContext(channels=1, half_um=(0.5, 3.0))
    net = build_net(kind(name), context, SMALL[name])
    shots = torch.rand(1, 2, 32, 32)
    image = net(shots[:, : net.shots], torch.ones(1), torch.ones(1)).image
    assert torch.equal(image, shots[:, :1])


def test_the_published_net_has_27_convolutions() -> None:
    net = small("tsva")
    kinds = [(name, m) for name, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)]
    own = [name for name, _ in kinds if not name.startswith("toward.")]  # that one is ours
    assert sum(2 if name.startswith("down.") else 1 for name in own) == 27  # both are drawn


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_pixel_sees_no_farther_than_the_halo(name) -> None:
    net = small(name).eval()
    edge = 2 * net.halo_px + 48
    shots = torch.rand(1, 3 * net.shots, edge, edge, requires_grad=True)
    out = net(shots, torch.ones(1), torch.ones(1))
    middle = net.halo_px // 8 * 8
    seen = 0
    for y in range(middle + 16, middle + 24):
        (slope,) = torch.autograd.grad(out.image[0, 0, y, y], shots, retain_graph=True)
        at = torch.nonzero(slope.abs().sum((0, 1, 2))).flatten()
        seen = max(seen, y - int(at.min()), int(at.max()) - y)
    # some of it depends on the corner of the steps of 8 pixels that a pixel lies in
    assert net.halo_px - 16 <= seen <= net.halo_px
    (slope,) = torch.autograd.grad(out.toward[0, middle // 8 + 2, middle // 8 + 2], shots)
    at = torch.nonzero(slope.abs().sum((0, 1, 2))).flatten()
    assert middle + 16 - int(at.min()) <= net.halo_px
    assert int(at.max()) - (middle + 23) <= net.halo_px
    # no gradient tells what a net is told of the distance, which it estimates from pixels, too
    seen_alone = torch.rand_like(shots)
    near = slice(middle + 16 - net.halo_px, middle + 24 + net.halo_px)
    seen_alone[..., near, near] = shots.detach()[..., near, near]
    with torch.no_grad():
        alone = net(seen_alone, torch.ones(1), torch.ones(1)).image
    at_last = slice(middle + 16, middle + 24)
    difference = (alone - out.image)[..., at_last, at_last].abs().max()
    assert difference < 1e-5 < (alone - out.image).abs().max()


def test_which_nets_know_where_the_shots_lie() -> None:
    shots = torch.rand(1, 6, 32, 32)
    cases = (("tsva", False), ("tsva, told", True), ("unet", False), ("nafnet", True))
    for name, differs in cases:
        net = small(name).eval()
        given = shots[:, : 3 * net.shots]
        one, other = (net(given, torch.tensor([s]), torch.ones(1)).image for s in (1.0, -1.0))
        assert torch.equal(one, other) != differs


def test_a_net_that_is_told_begins_as_the_published_one() -> None:
    context = NetContext(channels=3, half_um=(0.5, 3.0), range_um=(-2.5, 2.5))
    told = build_net("tsva", context, {"width": 4, "told": True}).eval()
    published = build_net("tsva", context, {"width": 4}).eval()
    torch.nn.init.normal_(told.up.last.weight)
    weights = {k: v for k, v in told.state_dict().items() if not k.startswith("gates.")}
    published.load_state_dict(weights)
    shots, side, half = torch.rand(2, 6, 32, 32), torch.ones(2), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        assert torch.equal(told(shots, side, half).image, published(shots, side, half).image)
        torch.nn.init.normal_(told.gates.gates[0].weight)
        of_half = told(shots[:1].expand(2, -1, -1, -1), side, half).image
        assert not torch.equal(of_half[0], of_half[1])


def test_to_be_told_the_distance_does_not_change_how_it_is_estimated() -> None:
    net = small("tsva, told")
    out = net(torch.rand(1, 6, 32, 32), torch.ones(1), torch.ones(1))
    out.image.sum().backward()
    assert all(p.grad is None for p in net.toward.parameters())
    assert all(p.grad is not None for p in net.gates.parameters())


def test_a_net_of_one_shot_may_learn_from_either() -> None:
    """A single exposure does not know whether it is the sharper one of two."""
    net = small("unet", 1, shot="either")
    seen = []
    net.register_forward_hook(lambda _, given, out: seen.append(given))
    n = 64
    sharper, other = torch.full((n, 1, 16, 16), 0.75), torch.full((n, 1, 16, 16), 0.25)
    batch = {
        "shots": torch.cat((sharper, other), 1),
        "truth": sharper,
        "side": torch.ones(n),
        "half_um": torch.full((n,), 2.0),
        "toward_um": torch.full((n,), 0.5),
    }
    torch.manual_seed(3)
    told = [net.losses_of(batch)["toward"].item() for _ in range(2)]
    shots, side, _ = seen[0]
    first = shots[:, 0, 0, 0] == 0.75
    assert 16 < int(first.sum()) < 48
    assert torch.equal(side, torch.where(first, 1.0, -1.0))  # whose side it now is
    assert not torch.equal(shots, seen[1][0])
    # From the other shot focus lies 3.5 µm further: without that, all would be told alike.
    assert told[0] > small("unet", 1, shot="sharper").losses_of(batch)["toward"].item()
    shown = small("unet", 1)
    shown.register_forward_hook(lambda _, given, out: seen.append(given))
    shown.losses_of(batch)
    assert torch.equal(seen[-1][0], sharper)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_the_graph_takes_any_number_of_frames_of_any_size(name, tmp_path) -> None:
    net = small(name).eval()
    count = 2 if net.shots > 1 else 1
    shots = {"count": count, "half_um": [0.5, 3], "halo_px": net.halo_px}
    kind = {"name": name, "task": "refocus", "channels": 3, "patch_px": 64}
    card = parse_card({**kind, "z_range_um": [-2, 2], "shots": shots})
    path = tmp_path / "net.onnx"
    write_refocus(net, card, path)
    model = RefocusModel(path)
    for n, height, width in ((1, 64, 48), (3, 80, 120)):
        given = torch.rand(n, 3 * net.shots, height, width)
        side, half = torch.ones(n), torch.linspace(1, 2, n)
        with torch.inference_mode():
            expected = net(given, side, half)
        image, toward, _ = model.run(given.numpy(), side.numpy(), half.numpy())
        np.testing.assert_allclose(image, expected.image.numpy(), atol=1e-4)
        np.testing.assert_allclose(toward, expected.toward.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tsva", {"width": 2}, "net.width: 2 is not allowed"),
        ("tsva", {"looks": 2}, "net.looks: is unknown"),
        ("nafnet", {"up": [1, 1]}, "net.up: "),
        ("unet", {"loss": "ssim"}, "net.loss: 'ssim' is not allowed"),
    ],
)
def test_a_bad_option_is_named(name, options, message) -> None:
    with pytest.raises(InputError, match=message):
        build_net(name, NetContext(half_um=(0.5, 3)), options)


# ---------------------------------------------------- from stacks to a file that recovers


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("blurred"))


@pytest.fixture(scope="module")
def learned(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    run = tmp_path_factory.mktemp("runs") / "learned"
    return run, train(dataset.path, run, OPTIONS)


@pytest.fixture(scope="module")
def exported(learned) -> tuple[Path, dict]:
    path = learned[0].parent / "small.onnx"
    return path, export(learned[0], path, licence="CC0", frames=40)


def test_it_learns_to_sharpen(learned) -> None:
    run, result = learned
    v = result["validation"]
    assert v["gain_db"] > 1.0
    assert v["worse"] < 0.2
    assert "dB over the sharper shot" in result["figures"]
    text = (run / "report.html").read_text(encoding="utf-8")
    assert f"{v['psnr_db']:.2f} dB" in text
    for name in ("curves", "gain"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_resumed_is_the_same_run(dataset, tmp_path) -> None:
    options = {**OPTIONS, "patches_per_stack": 4, "epochs": 2}
    whole = train(dataset.path, tmp_path / "whole", options)["validation"]
    train(dataset.path, tmp_path / "half", {**options, "epochs": 1, "schedule": "constant"})
    constant = {**options, "schedule": "constant"}
    once = train(dataset.path, tmp_path / "once", constant)["validation"]
    again = train(dataset.path, tmp_path / "half", {"epochs": 2}, resume=True)["validation"]
    assert again == once != whole


def test_the_card_says_what_it_is(exported, learned, dataset) -> None:
    path, result = exported
    assert result["parity"] < 1e-5
    model = RefocusModel(path)
    card = model.card
    assert (card.task, card.architecture, card.channels) == ("refocus", "tsva", 1)
    assert model.shots.half_um == (2, 4)
    assert model.shots.halo_px == 72
    assert card.metrics["validation"]["psnr_db"] == result["validation"]["psnr_db"]
    assert card.training["licence"] == "CC0"
    assert card.ood is not None
    with pytest.raises(InputError, match="recovers the sharp image; here one is needed"):
        OnnxModel(path)


def test_the_file_recovers_what_torch_recovers_in_tiles_of_any_size(exported, learned) -> None:
    path, _ = exported
    model = RefocusModel(path)
    rng = np.random.default_rng(0)
    lower, upper = rng.integers(0, 255, (2, 203, 170), np.uint8)
    whole = model.recover(lower, upper, tile_px=1024).image
    assert whole.shape == lower.shape
    assert whole.dtype == np.uint8
    for tile_px in (64, 100, 8):
        part = model.recover(lower, upper, tile_px=tile_px).image
        # a value just between two grey levels may be rounded to either
        assert np.abs(part.astype(int) - whole).max() <= 1
        assert np.mean(part != whole) < 1e-3


def test_where_focus_lies_is_told_with_its_sign(exported, dataset) -> None:
    path, _ = exported
    model = RefocusModel(path)
    errors, guesses = [], []
    for stack in dataset.part("validation"):
        d = stack.defocus_um
        for middle in (-1.5, 1.5):
            lower, upper = (int(np.abs(d - middle - s).argmin()) for s in (-3, 3))
            half = (stack.z_um[upper] - stack.z_um[lower]) / 2
            found = model.recover(stack.plane(lower), stack.plane(upper), half_um=half)
            true = -(d[lower] + d[upper]) / 2  # focus less middle
            errors.append(abs(found.focus_um - true))
            guesses.append(abs(true))
            assert found.sharper == (0 if true < 0 else 1)
    assert np.mean(errors) < 0.7 * np.mean(guesses)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"looks_um": [0, 4]}, "looks_um: is not allowed with the model 'tsva'"),
        ({"range_um": [-5, 5]}, "range_um: is not allowed with the model 'tsva'"),
        ({"pairs": {"half_um": [20, 30]}}, "hardly any two of its planes"),
        ({"pairs": {"half_um": [3, 1]}}, "pairs.half_um"),
        ({"pairs": {"truth": "best"}}, "pairs.truth: 'best' is not allowed"),
    ],
)
def test_what_cannot_be_trained_is_said(dataset, tmp_path, options, message) -> None:
    with pytest.raises(InputError, match=message):
        train(dataset.path, tmp_path / "run", {**OPTIONS, **options})
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_it(dataset, tmp_path, capsys) -> None:
    words = ["train", str(dataset.path), "--model", "unet", "-o", str(tmp_path / "run")]
    sets = {
        "net.width": 4,
        "patch_px": 64,
        "epochs": 1,
        "batch": 4,
        "patches_per_stack": 2,
        "pairs.half_um": "[2, 4]",
        "pairs.truth": "fusion",
    }
    words += [f"--set={key}={value}" for key, value in sets.items()]
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 0
    assert "dB over the sharper shot" in capsys.readouterr().out
    assert list((tmp_path / "run" / "fusion").glob("*.npy"))


def test_the_truth_is_never_one_of_the_shots(dataset) -> None:
    from mm_autofocus.training.fields import Field
    from mm_autofocus.training.pairs import pair_near

    stack = dataset.part("train")[0]
    mask = np.zeros((16, 16), bool)
    fields = [Field(stack, np.zeros((1, 1), np.intp), np.zeros(1), mask, np.argwhere(mask))]
    truths = Truths(fields, "plane", Path("nowhere"))
    order = np.abs(stack.defocus_um).argsort()
    for half in (1.0, 2.0, 3.0):
        pair = pair_near(stack.defocus_um, half, half, 0.6)
        assert pair is not None
        assert pair.lower == order[0]
        found = truths.crop(pair, 0, 0, 64, 64)
        np.testing.assert_allclose(found[0] * 255, stack.plane(order[1])[:64, :64], atol=1e-3)
        shots, side = read_pair(truths.reader, fields[0], pair, 0, 0, 64, 64)
        assert side == 1  # the one in focus is the sharper one
        np.testing.assert_allclose(shots[0] * 255, stack.plane(order[0])[:64, :64], atol=1e-3)
