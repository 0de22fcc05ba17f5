"""Datasets put together: of several days, microscopes or processes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_autofocus.errors import InputError
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.settings import MetricOptions
from mm_autofocus.training.dataset import META, Dataset
from mm_autofocus.training.store import PLANES, DatasetWriter

__all__ = ["add_datasets", "is_dataset"]


def is_dataset(path: str | os.PathLike[str]) -> bool:
    """Whether a path is the folder of a dataset."""
    return (Path(path) / META).is_file()


def add_datasets(
    sources: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> tuple[Dataset, int]:
    """Add the stacks of datasets, with their labels and truth, to another one.

    On one file system the files are linked, not copied: they take no further room, and either
    dataset may be deleted.

    Parameters
    ----------
    sources : sequence of path
        Folders of datasets, labelled by the same focus measure.
    output : path
        Folder of the dataset: not there yet, empty, or a dataset. Stacks that it has from
        these sources already are left out.

    Returns
    -------
    dataset : Dataset
    new : int
        Stacks added.

    Raises
    ------
    InputError
        A source is no dataset, was labelled by another measure, or has a slide of the same
        name as another one, but by another plan, or a stack of the same slide, field, time
        and channel; nothing was written then.
    """
    if not sources:
        raise InputError("--from: no datasets were named")
    given = [Dataset.open(path, labels=False) for path in sources]
    first = given[0].meta
    options = MetricOptions.model_validate(first["metric_options"])
    writer = DatasetWriter(output, FocusMeasure(first["metric"], options))
    slides = _checked(given, writer)
    have = {s.key for s in writer.stacks}
    files: dict[Path, str] = {}
    number = 1 + max((_number(s.file) for s in writer.stacks), default=-1)
    new = 0
    writer.begin_all(slides)
    for stack in (stack for dataset in given for stack in dataset.stacks):
        if stack.key in have:
            continue
        source = (stack.folder / stack.file).resolve()
        if source not in files:
            files[source] = f"{PLANES}/d{number:06d}.ome.tiff"
            number += 1
            _link(source, writer.path / files[source])
        file = files[source]
        writer.append(replace(stack, folder=writer.path, file=file, origin=str(source)))
        new += 1
    writer.finish()
    return writer.dataset(), new


def _checked(given: Sequence[Dataset], writer: DatasetWriter) -> dict[str, Any]:
    """Slides of all datasets with what is known of them, if they go together."""
    origins = {s.key: s.origin for s in writer.stacks}
    slides: dict[str, Any] = dict(writer.meta["slides"])
    first = given[0].meta
    for dataset in given:
        if dataset.path.resolve() == writer.path.resolve():
            raise InputError(f"--from: {dataset.path} is the dataset that is written to")
        for key in ("metric", "metric_options"):
            if dataset.meta[key] != first[key]:
                raise InputError(
                    f"{dataset.path}: its labels were made by another {key} "
                    f"({dataset.meta[key]}) than those of {given[0].path} ({first[key]})"
                )
        for slide, facts in dataset.meta["slides"].items():
            if slides.setdefault(slide, facts).get("plan") != facts.get("plan"):
                raise InputError(
                    f"{dataset.path}: its slide {slide!r} was collected by another plan than "
                    "the slide of that name in another dataset; collect it under another "
                    "--slide"
                )
        for stack in dataset.stacks:
            origin = str((stack.folder / stack.file).resolve())
            if origins.setdefault(stack.key, origin) != origin:
                raise InputError(
                    f"{dataset.path}: slide {stack.slide!r} has a field {stack.field!r}, as "
                    f"has another dataset ({origins[stack.key]}); collect it under another "
                    "--slide"
                )
    return slides


def _number(file: str) -> int:
    name = Path(file).name
    digits = name[1:].partition(".")[0]
    return int(digits) if name.startswith("d") and digits.isdigit() else -1


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        # left by an interruption before its line was written
        target.unlink()
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
