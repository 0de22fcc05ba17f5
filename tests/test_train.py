"""The training loop: it learns what is there, resumes exactly, and says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mm_autofocus.cli import main  # noqa: E402
from mm_autofocus.errors import InputError  # noqa: E402
from mm_autofocus.training import Dataset, loop  # noqa: E402
from mm_autofocus.training import train as training  # noqa: E402
from mm_autofocus.training.batches import batches_of, learning_rate  # noqa: E402
from mm_autofocus.training.checkpoint import load_checkpoint, net_of  # noqa: E402
from mm_autofocus.training.options import TrainOptions, read_options  # noqa: E402
from mm_autofocus.training.progress import read_log  # noqa: E402
from mm_autofocus.training.train import prepare, train  # noqa: E402
from mm_autofocus.training.validate import score  # noqa: E402

from blurred import NET, OPTIONS, make_dataset  # noqa: E402

torch.set_num_threads(1)

QUICK = {**OPTIONS, "patches_per_stack": 12, "epochs": 2, "mosaics": 0.0625}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("blurred"))


@pytest.fixture(scope="module")
def learned(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    run = tmp_path_factory.mktemp("runs") / "learned"
    options = {**OPTIONS, "epochs": 8, "patches_per_stack": 64, "mosaics": 0.0625}
    return run, train(dataset.path, run, options)


def rows(run: Path) -> list[dict]:
    timing = ("seconds", "patches_per_s")
    return [
        {k: v for k, v in r.items() if k not in timing} for r in read_log(run / "log.jsonl")
    ]


# ---------------------------------------------------------------------------- it learns


def test_it_learns_the_defocus_and_its_sign(learned: tuple[Path, dict]) -> None:
    run, result = learned
    found = result["validation"]
    assert found["mae_um"] < 1.5  # of ±8 µm; who says 0 is off by 4
    assert found["dss"] > 0.85
    for name in ("options.yaml", "log.jsonl", "last.ckpt", "best.ckpt", "run.json"):
        assert (run / name).is_file()
    log = rows(run)
    assert [r["epoch"] for r in log] == list(range(1, 9))
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert log[-1]["importance"] < log[0]["importance"]


def test_the_report_shows_it(learned: tuple[Path, dict]) -> None:
    run, result = learned
    text = Path(result["report"]).read_text(encoding="utf-8")
    assert f"{result['validation']['mae_um']:.3f} µm" in text
    for heading in ("Losses and validation", "Error against defocus", "Worst frames"):
        assert heading in text
    assert text.count("data:image/png;base64,") > 3
    assert "<script" not in text
    for name in ("curves", "error", "regression"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_labels_that_mean_nothing_are_not_learned(dataset: Dataset, tmp_path: Path) -> None:
    options = read_options({**OPTIONS, "epochs": 4, "patches_per_stack": 40, "mosaics": 0})
    job = prepare(dataset, tmp_path / "run", options)
    rng = np.random.default_rng(0)
    job.patches.fields = [
        replace(f, defocus_um=rng.permutation(f.defocus_um)) for f in job.patches.fields
    ]
    found = training._launch(job)["validation"]
    assert found["mae_um"] > 2.5


def test_the_best_weights_are_those_that_were_validated(learned, dataset: Dataset) -> None:
    run, result = learned
    state = load_checkpoint(run / "best.ckpt")
    assert state["figures"] == result["validation"]
    frames = np.load(run / "validation.npy")
    assert np.abs(frames[:, 3] - frames[:, 2]).mean() == pytest.approx(
        result["validation"]["mae_um"], abs=1e-6
    )
    net = net_of(state)
    assert not net.training
    assert state["context"]["range_um"] == [pytest.approx(-8, abs=1), pytest.approx(8, abs=1)]


# --------------------------------------------------------------------------- it resumes


@pytest.mark.parametrize("after", [2, 3])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    options = {**QUICK, "checkpoint_minutes": 1e-9, "batch": 24}
    train(dataset.path, tmp_path / "whole", options)
    steps = [r["steps"] for r in rows(tmp_path / "whole")]
    assert steps == [3, 3]

    average, seen = loop._Loop._average, []

    def killed(self) -> None:
        seen.append(1)
        if len(seen) > after:
            raise KeyboardInterrupt
        average(self)

    monkeypatch.setattr(loop._Loop, "_average", killed)
    with pytest.raises(KeyboardInterrupt):
        train(dataset.path, tmp_path / "killed", options)
    monkeypatch.undo()
    torch.manual_seed(99)
    train(dataset.path, tmp_path / "killed", {}, resume=True)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    whole = load_checkpoint(tmp_path / "whole" / "last.ckpt")
    again = load_checkpoint(tmp_path / "killed" / "last.ckpt")
    for name, value in whole["training"].items():
        assert torch.equal(value, again["training"][name]), name


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there is one core
def test_readers_beside_it_change_nothing(dataset: Dataset, tmp_path: Path) -> None:
    train(dataset.path, tmp_path / "a", {**QUICK, "epochs": 1})
    train(dataset.path, tmp_path / "b", {**QUICK, "epochs": 1, "workers": 2})
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_more_epochs_may_be_asked_for_and_nothing_else(dataset: Dataset, tmp_path) -> None:
    run = tmp_path / "run"
    begun = {**QUICK, "schedule": "constant", "augment": {"noise": 0.01}}
    train(dataset.path, run, {**begun, "epochs": 1})
    with pytest.raises(InputError, match="lr: cannot change when a run is resumed"):
        train(dataset.path, run, {"lr": 1.0}, resume=True)
    with pytest.raises(InputError, match="augment: cannot change when a run is resumed"):
        train(dataset.path, run, {"augment": {"noise": 0.5}}, resume=True)
    # the words that began it, part of a mapping among them, and one that may change
    again = {**begun, "epochs": 2}
    assert train(dataset.path, run, again, resume=True)["epochs"] == 2
    assert len(rows(run)) == 2
    with pytest.raises(InputError, match="holds a run already; --resume continues it"):
        train(dataset.path, run, QUICK)
    with pytest.raises(InputError, match="nothing to resume"):
        train(dataset.path, tmp_path / "none", resume=True)


def test_other_weights_can_be_the_beginning(learned, dataset: Dataset, tmp_path: Path) -> None:
    run, result = learned
    options = {**QUICK, "epochs": 1, "lr": 1e-5, "init": str(run), "ema": 0}
    tuned = train(dataset.path, tmp_path / "tuned", options)
    assert tuned["validation"]["mae_um"] < result["validation"]["mae_um"] + 0.3
    with pytest.raises(InputError, match="init: a net 'sparsefocus' for 1 looks does not fit"):
        wrong = {**options, "model": "resnet", "net": {"width": 8}}
        train(dataset.path, tmp_path / "wrong", wrong)


# ----------------------------------------------------------------------------- it stops


def test_it_stops_where_nothing_gets_better(dataset: Dataset, tmp_path: Path) -> None:
    options = {**QUICK, "epochs": 9, "patience": 1, "lr": 1e-9, "ema": 0}
    options["augment"] = {"turns": False}
    result = train(dataset.path, tmp_path / "run", options)
    assert "patience" in result["stopped"]
    assert result["epochs"] < 9


def test_it_stops_in_time_with_the_schedule_at_its_end(dataset: Dataset, tmp_path) -> None:
    options = {**QUICK, "epochs": 500, "max_minutes": 0.01}
    result = train(dataset.path, tmp_path / "run", options)
    assert "max_minutes" in result["stopped"]
    assert result["epochs"] < 500
    assert rows(tmp_path / "run")[-1]["lr"] < 0.5 * OPTIONS["lr"]


def test_a_loss_that_is_no_number_names_the_batch(dataset: Dataset, tmp_path: Path) -> None:
    job = prepare(dataset, tmp_path / "run", read_options(QUICK))
    bad = job.patches.fields[2]
    defocus = np.full_like(bad.defocus_um, np.nan)
    job.patches.fields[2] = replace(bad, defocus_um=defocus)
    with pytest.raises(InputError) as error:
        training._launch(job)
    text = str(error.value)
    assert "not a number at epoch 1, batch 1" in text
    assert bad.stack.file in text


def test_the_learning_rate_rises_and_falls() -> None:
    options = TrainOptions(lr=1.0, warmup=0.25)
    rates = [learning_rate(options, p) for p in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert int(np.argmax(rates)) == 25
    assert rates[-1] == pytest.approx(1e-3)
    constant = TrainOptions(lr=0.3, schedule="constant")
    assert {learning_rate(constant, p) for p in (0.0, 0.5, 1.0)} == {0.3}


def test_figures_are_of_the_medians_of_frames(dataset: Dataset, tmp_path: Path) -> None:
    job = prepare(dataset, tmp_path / "run", read_options(QUICK))
    label = job.validation.fields[0].defocus_um
    k = int(np.abs(label - 4).argmin())
    patches = [(0, k, 0, 0), (0, k, 0, 64), (0, k, 64, 0), (0, 0, 0, 0)]
    said = np.array([[4, 1], [5, 1], [-90, 1], [-7, 1]], np.float32)
    figures, frames = score(job.validation.fields, patches, said)
    assert figures["frames"] == 2
    expected = (abs(4 - label[k]) + abs(-7 - label[0])) / 2
    assert figures["mae_um"] == pytest.approx(expected)
    assert figures["dss"] == 1
    assert figures["patch_dss"] == 0.75
    assert frames[1, 3] == 4


# ------------------------------------------------------------------------- what is wrong


def one_field(path: Path) -> Dataset:
    whole = make_dataset(path, fields=3)
    index = whole.path / "stacks.jsonl"
    index.write_text(index.read_text().splitlines()[0] + "\n")
    meta = json.loads((whole.path / "dataset.json").read_text())
    meta["split"] = None
    (whole.path / "dataset.json").write_text(json.dumps(meta))
    return whole


def test_one_field_has_no_honest_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 field with a label has no honest split"):
        train(one_field(tmp_path).path, tmp_path / "run", QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnt"}, r"model: 'resnt' is unknown \(did you mean 'resnet'\?\)"),
        ({"net": {"widht": 3}}, "net.widht: is unknown"),
        ({"looks_um": [0, 4.4]}, "looks: 0, 4.4 µm: no planes"),
        ({"patch_px": 224}, "patch_px: 224 does not fit into the frames"),
        ({"accelerator": "abacus"}, "accelerator"),
        ({"precision": "3-bit"}, "precision"),
        ({"init": "nowhere"}, "nowhere: no such run"),
    ],
)
def test_what_cannot_be_done_is_said(dataset: Dataset, tmp_path, change, message) -> None:
    with pytest.raises(InputError, match=message):
        train(dataset.path, tmp_path / "run", {**QUICK, **change})


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    for content in (b"", b"nonsense", b"PK\x03\x04 half a zip"):
        (tmp_path / "last.ckpt").write_bytes(content)
        with pytest.raises(InputError, match="does not read as a checkpoint"):
            load_checkpoint(tmp_path / "last.ckpt")


# ---------------------------------------------------------------------- the command line


def test_the_command_trains(dataset: Dataset, tmp_path: Path, capsys) -> None:
    config = tmp_path / "options.yaml"
    config.write_text(TrainOptions(**{**QUICK, "epochs": 5}).to_yaml())
    args = ["train", str(dataset.path), "-o", str(tmp_path / "run"), "--config", str(config)]
    with pytest.raises(SystemExit) as end:
        main([*args, "--looks", "0,4", "--set", "epochs=1", "--set", "net.expand=1", "--json"])
    assert end.value.code == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["epochs"] == 1
    assert "epoch 1/1" in err
    state = load_checkpoint(tmp_path / "run" / "best.ckpt")
    assert state["context"]["looks_um"] == [0.0, 4.0]
    assert state["net"]["expand"] == 1
    with pytest.raises(SystemExit) as end:
        main([*args, "--looks", "near"])
    assert end.value.code == 2
    assert "--looks: 'near' is not allowed" in capsys.readouterr().err


def test_two_processes_train_one_net(dataset: Dataset, tmp_path: Path) -> None:
    options = {**QUICK, "epochs": 2, "devices": 2, "net": NET}
    config = tmp_path / "options.yaml"
    config.write_text(TrainOptions(**options).to_yaml())
    code = "from mm_autofocus.cli import main; main()"
    args = ["train", str(dataset.path), "-o", str(tmp_path / "two"), "--config", str(config)]
    done = subprocess.run(
        [sys.executable, "-c", code, *args, "--json"],
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    first, second = result["best_of_each_process"]
    assert first == second
    assert len(rows(tmp_path / "two")) == 2
    # and the steps are those of one process with the same batch
    train(dataset.path, tmp_path / "one", {**options, "devices": 1})
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a["steps"] == b["steps"]
        assert b["validation"]["frames"] == a["validation"]["frames"]


def test_processes_together_take_what_one_would_take() -> None:
    taken = [
        list(batches_of(None, 4, range(3, 6), share=(r, 2), workers=0).batch_sampler)
        for r in range(2)
    ]
    alone = list(batches_of(None, 8, range(3, 6), workers=0).batch_sampler)
    for a, b, whole in zip(*taken, alone, strict=True):
        assert sorted(a + b) == whole
