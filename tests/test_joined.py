"""Datasets put together."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from mm_autofocus import cli
from mm_autofocus.errors import InputError
from mm_autofocus.settings import parse_settings
from mm_autofocus.training import Dataset, store
from mm_autofocus.training.collect import measure_of
from mm_autofocus.training.joined import add_datasets
from mm_autofocus.training.recorded import add_recorded
from mm_autofocus.training.store import DatasetWriter


def a_dataset(folder: Path, slide: str, n: int = 2, *, seed: int = 0, metric: str = "brenner"):
    """A small dataset of blurred noise, focus at plane 5."""
    rng = np.random.default_rng(seed)
    files = []
    for i in range(n):
        sharp = rng.uniform(40, 200, (48, 48)).astype(np.float32)
        planes = [cv2.GaussianBlur(sharp, (0, 0), 0.3 + 0.6 * abs(k - 5)) for k in range(11)]
        file = folder.parent / f"{slide}_{seed}_{i}.tif"
        tifffile.imwrite(file, np.stack(planes).astype(np.uint8))
        files.append(file)
    measure = measure_of(parse_settings({"metric": metric}))
    return add_recorded(files, folder, step_um=1.0, slide=slide, measure=measure)[0]


def test_two_datasets_become_one_with_the_same_pixels_and_labels(tmp_path):
    a, b = a_dataset(tmp_path / "a", "s1"), a_dataset(tmp_path / "b", "s2", 3)
    joined, new = add_datasets([a.path, b.path], tmp_path / "all")
    assert new == len(joined) == 5
    old = {s.key: s for d in (a, b) for s in d}
    for s in Dataset.open(joined.path):
        assert s.focus_z_um == old[s.key].focus_z_um
        np.testing.assert_array_equal(s.load(), old[s.key].load())
    assert set(joined.meta["slides"]) == {"s1", "s2"}


def test_what_is_known_of_slides_is_written_once_however_many_they_are(tmp_path, monkeypatch):
    a = a_dataset(tmp_path / "a", "s0", 1)
    slides = {f"s{k}": {"plan": None} for k in range(50)}
    writer = DatasetWriter(a.path, measure_of(parse_settings({"metric": "brenner"})))
    writer.begin_all(slides)
    writer.finish()
    written = []
    monkeypatch.setattr(store, "write_whole", lambda path, text: written.append(path))
    monkeypatch.setattr(DatasetWriter, "dataset", lambda self: self.meta)
    meta, _ = add_datasets([a.path], tmp_path / "all")
    assert set(slides) <= set(meta["slides"])
    assert len(written) == 2  # before and after the stacks


def test_a_source_may_be_deleted_and_joining_again_adds_only_what_is_new(tmp_path):
    a = a_dataset(tmp_path / "a", "s1")
    add_datasets([a.path], tmp_path / "all")
    b = a_dataset(tmp_path / "b", "s2")
    _, new = add_datasets([a.path, b.path], tmp_path / "all")
    assert new == 2
    before = [s.load() for s in a]
    for file in (tmp_path / "a" / "stacks").iterdir():
        file.unlink()
    after = {s.field: s.load() for s in Dataset.open(tmp_path / "all") if s.slide == "s1"}
    for s, image in zip(a, before, strict=True):
        np.testing.assert_array_equal(after[s.field], image)


def test_a_joined_dataset_can_be_collected_into_again(tmp_path):
    a = a_dataset(tmp_path / "a", "s1")
    add_datasets([a.path], tmp_path / "all")
    more = a_dataset(tmp_path / "all", "s3", seed=5)
    assert {s.slide for s in more} == {"s1", "s3"}
    assert all(s.load().shape == (11, 48, 48) for s in more)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("metric", "labels were made by another metric"),
        ("clash", "another --slide"),
        ("plan", "was collected by another plan"),
        ("itself", "is the dataset that is written to"),
        ("nothing", "no datasets were named"),
        ("missing", "no such folder"),
    ],
)
def test_what_cannot_be_joined_is_refused_and_nothing_is_written(tmp_path, case, words):
    a = a_dataset(tmp_path / "a", "s1")
    sources = [a.path]
    output = tmp_path / "all"
    if case == "metric":
        sources.append(a_dataset(tmp_path / "b", "s2", metric="tenengrad").path)
    elif case == "clash":
        (tmp_path / "x").mkdir()
        other = a_dataset(tmp_path / "x" / "b", "s1", n=2)
        sources.append(other.path)
    elif case == "plan":
        other = a_dataset(tmp_path / "b", "s1", seed=3)
        meta = other.path / "dataset.json"
        text = meta.read_text(encoding="utf-8")
        assert '"plan": null' in text
        meta.write_text(
            text.replace('"plan": null', '"plan": {"z_plan": {}}'), encoding="utf-8"
        )
        sources.append(other.path)
    elif case == "itself":
        output = a.path
    elif case == "nothing":
        sources = []
    else:
        sources.append(tmp_path / "nowhere")
    with pytest.raises(InputError, match=words):
        add_datasets(sources, output)
    assert case == "itself" or not output.exists()


def test_the_command_joins(tmp_path, capsys):
    a, b = a_dataset(tmp_path / "a", "s1"), a_dataset(tmp_path / "b", "s2")
    args = ["collect", "--from", str(a.path), "--from", str(b.path), "--json"]
    with pytest.raises(SystemExit) as e:
        cli.main([*args, "-o", str(tmp_path / "all")])
    assert e.value.code == 0
    assert json.loads(capsys.readouterr().out)["new_stacks"] == 4
    file = tmp_path / "s1_0_0.tif"
    with pytest.raises(SystemExit) as e:
        cli.main(
            ["collect", "--from", str(a.path), "--from", str(file), "-o", str(tmp_path / "c")]
        )
    assert e.value.code == 2


def test_the_files_of_a_closed_dataset_are_not_looked_through_again(tmp_path, monkeypatch):
    looked_at = []

    def is_whole(path, stacks):
        looked_at.append(path.name)
        return True

    monkeypatch.setattr("mm_autofocus.training.store._is_whole", is_whole)
    folder = tmp_path / "d"
    a_dataset(folder, "s1")
    a_dataset(folder, "s2", seed=1)
    assert not looked_at
    meta = folder / "dataset.json"
    text = meta.read_text(encoding="utf-8")
    assert '"closed": true' in text  # as a run that was killed would have left it:
    meta.write_text(text.replace('"closed": true', '"closed": false'), encoding="utf-8")
    a_dataset(folder, "s3", seed=2)
    assert len(looked_at) == 4
