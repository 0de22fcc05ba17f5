"""What reads spectra is taught first: it learns from them alone, the same each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mm_autofocus.errors import InputError  # noqa: E402
from mm_autofocus.models.nets import build_net  # noqa: E402
from mm_autofocus.models.nets.base import NetContext  # noqa: E402
from mm_autofocus.training import Dataset  # noqa: E402
from mm_autofocus.training.fields import read_looks  # noqa: E402
from mm_autofocus.training.loop import Job  # noqa: E402
from mm_autofocus.training.options import TheoryOptions, read_options  # noqa: E402
from mm_autofocus.training.spectra_first import learn, spectra_first  # noqa: E402
from mm_autofocus.training.spectra_theory import SpectraByTheory  # noqa: E402
from mm_autofocus.training.train import prepare, train  # noqa: E402
from mm_autofocus.training.validate import predict_patches  # noqa: E402

from blurred import NET, OPTIONS, PATCH, make_dataset  # noqa: E402

torch.set_num_threads(1)

FIRST = {**OPTIONS, "net": {**NET, "spectra": 48}, "spectra_patches": 640, "mosaics": 0}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("blurred"))


def taught(dataset: Dataset, run: Path) -> tuple[Job, object, list[str]]:
    job = prepare(dataset, run, read_options(FIRST))
    torch.manual_seed(0)
    net = build_net("sparsefocus", NetContext(**job.identity["context"]), job.identity["net"])
    said: list[str] = []
    spectra_first(net, job.patches, job.options, torch.device("cpu"), said.append)
    return job, net.eval(), said


def test_spectra_alone_teach_how_far_focus_is(dataset: Dataset, tmp_path: Path) -> None:
    job, net, said = taught(dataset, tmp_path / "run")
    assert said[-1].startswith("spectra, pass 24/24  loss ")
    judged = job.validation
    label = np.array([judged.fields[i].defocus_um[k] for i, k, _, _ in judged.items])
    reader, found = job.patches.reader, []
    with torch.inference_mode():
        for i, k, y, x in judged.items:
            patch = read_looks(reader, judged.fields[i], k, y, x, PATCH, PATCH)
            seen = net.seen(torch.from_numpy(patch)[None])
            found.append(float(net.by_seen(seen).defocus))
            assert found[-1] == pytest.approx(
                float(net(torch.from_numpy(patch)[None]).defocus), abs=1e-3
            )
    # which way the blur runs is not in rings: how far is
    error = np.abs(np.abs(found) - np.abs(label)).mean()
    assert error < 0.8 < np.abs(np.abs(label) - np.abs(label).mean()).mean() / 2


def test_it_is_the_same_each_time(dataset: Dataset, tmp_path: Path) -> None:
    (job, one, _), (_, two, _) = (taught(dataset, tmp_path / name) for name in "ab")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, rtol=0, atol=0)
    items = list(job.validation.items)
    both = [predict_patches(n, job.validation.fields, items, PATCH) for n in (one, two)]
    np.testing.assert_array_equal(*both)


def test_the_training_goes_on_from_there(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**FIRST, "epochs": 1, "patches_per_stack": 8, "spectra_passes": 2}
    train(dataset.path, tmp_path / "run", options)
    told = capsys.readouterr()
    assert "spectra, pass 2/2" in told.err
    assert not told.out
    # a run that goes on has it behind itself
    train(dataset.path, tmp_path / "run", {"epochs": 2}, resume=True)
    assert "spectra" not in capsys.readouterr().err


def test_what_was_taught_first_is_then_only_adapted(dataset: Dataset, tmp_path: Path) -> None:
    options = {**FIRST, "epochs": 1, "patches_per_stack": 4}
    net = build_net("sparsefocus", NetContext(channels=1, range_um=(-6, 6)), FIRST["net"])
    read, every = len(net.reading_parameters()), len(list(net.parameters()))
    for patches, expected in ((640, [every - read, read]), (0, [every])):
        run = tmp_path / str(patches)
        train(dataset.path, run, {**options, "spectra_patches": patches})
        groups = torch.load(run / "last.ckpt", weights_only=False)["optimiser"]["param_groups"]
        rates = sorted({g["lr"] for g in groups}, reverse=True)
        counts = [sum(len(g["params"]) for g in groups if g["lr"] == rate) for rate in rates]
        assert counts == expected
        assert rates[-1] == pytest.approx(rates[0] * (0.1 if patches else 1))


def test_a_run_of_other_rates_cannot_go_on(dataset: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(dataset.path, run, {**FIRST, "epochs": 1, "patches_per_stack": 4})
    state = torch.load(run / "last.ckpt", weights_only=False)
    first, *others = state["optimiser"]["param_groups"]
    first["params"] += [p for g in others for p in g["params"]]
    state["optimiser"]["param_groups"] = [first]
    torch.save(state, run / "last.ckpt")
    with pytest.raises(InputError, match="begun by another version"):
        train(dataset.path, run, {"epochs": 2}, resume=True)


def test_patches_too_small_for_spectra_are_refused_before_anything_is_written(
    dataset: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="train_px: 48 is less than patch_px, 64"):
        prepare(dataset, tmp_path / "run", read_options({**FIRST, "train_px": 48}))
    assert not (tmp_path / "run").exists()


def test_any_seed_will_do(dataset: Dataset, tmp_path: Path) -> None:
    quick = {**OPTIONS, "epochs": 1, "patches_per_stack": 4, "mosaics": 0}
    train(dataset.path, tmp_path / "run", {**quick, "seed": 2**40})


@pytest.mark.parametrize(
    "options", [{"model": "resnet", "net": {"width": 8}}, {"net": {**NET, "spectra": 0}}]
)
def test_nets_that_read_none_refuse(dataset: Dataset, tmp_path: Path, options) -> None:
    for key, lesson in {
        "spectra_patches": {"spectra_patches": 640},
        "theory.patches": {"spectra_patches": 0, "theory": {"patches": 640}},
    }.items():
        with pytest.raises(InputError, match=f"{key}: 640 is not allowed with the model"):
            prepare(dataset, tmp_path / "run", read_options({**FIRST, **lesson, **options}))
        assert not (tmp_path / "run").exists()


def test_theory_comes_before_patches(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lessons = {"theory": {"patches": 512, "passes": 2}, "spectra_passes": 3}
    quick = {"epochs": 1, "patches_per_stack": 8}
    train(dataset.path, tmp_path / "run", {**FIRST, **lessons, **quick})
    told = [line for line in capsys.readouterr().err.splitlines() if "spectra" in line]
    passes = [line.split("  ")[0] for line in told if "pass " in line]
    assert passes == [f"spectra, pass {k}/{n}" for n in (2, 3) for k in range(1, n + 1)]
    assert any("spectra by theory, 0 of 1024" in line for line in told)


def test_theory_wants_to_know_the_optics(tmp_path: Path) -> None:
    data = make_dataset(tmp_path)
    index = data.path / "stacks.jsonl"
    index.write_text(index.read_text("utf-8").replace('"na": 0.3, ', ""), "utf-8")
    theory = read_options({**FIRST, "theory": {"patches": 640}})
    with pytest.raises(InputError, match=r"theory.patches: needs na, which the stacks"):
        prepare(Dataset.open(data.path), tmp_path / "run", theory)
    assert not (tmp_path / "run").exists()


def test_beside_images_theory_is_not_forgotten() -> None:
    context = NetContext(
        looks_um=(0, 4), range_um=(-8, 8), patch_px=64, na=0.5, pixel_size_um=0.5
    )
    ranges = TheoryOptions(patches=6000, heights=4, each=2)
    draws = SpectraByTheory(context, ranges, 0)
    taught = tuple(torch.cat(parts) for parts in zip(*draws, strict=True))
    apart = SpectraByTheory(context, ranges.model_copy(update={"patches": 600}), 1)
    seen, label = (torch.cat(parts) for parts in zip(*apart, strict=True))
    errors = {}
    for beside in (None, taught):
        torch.manual_seed(0)
        net = build_net("sparsefocus", context, {**NET, "spectra": 32})
        net.learn_usual(taught[0])
        learn(net, taught, passes=6, seed=0, say=lambda _: None)
        near = taught[1].abs() < 1  # as if no stack went any farther
        few = (taught[0][near][:512], taught[1][near][:512])
        learn(net, few, passes=20, seed=0, say=lambda _: None, beside=beside)
        with torch.inference_mode():
            found = net.eval().by_seen(seen).defocus
        errors[beside is None] = float((found - label).abs()[label.abs() > 4].median())
    assert errors[False] < errors[True] / 2
