"""Datasets that are written: created, continued after an interruption, and appended to."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm_autofocus.errors import InputError
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.ometiff import read_info, repair
from mm_autofocus.ometiff.recovery import open_tiff
from mm_autofocus.training.dataset import (
    FORMAT,
    INDEX,
    META,
    Dataset,
    read_index,
    read_meta,
    write_whole,
)
from mm_autofocus.training.label import StackMeter
from mm_autofocus.training.stack import Stack
from mm_autofocus.types import Optics

__all__ = ["PLANES", "DatasetWriter", "labelled", "optics_json"]

logger = logging.getLogger(__name__)

PLANES = "stacks"
"""Folder of the files in a dataset."""


class DatasetWriter:
    """A dataset that grows. Nothing is written before `begin`.

    Parameters
    ----------
    path : path
        Its folder: not there yet, empty, or a dataset.
    measure : FocusMeasure
        That defines focus.

    Raises
    ------
    InputError
        The folder holds something else, or its labels were made by another measure.
    """

    def __init__(self, path: str | os.PathLike[str], measure: FocusMeasure) -> None:
        self.path = Path(path)
        self.measure = measure
        self.meta: dict[str, Any] = {
            "format": FORMAT,
            "what": "labelled z-stacks for autofocus; see mm_autofocus.training.dataset",
            "metric": measure.name,
            "metric_options": measure.options.model_dump(mode="json"),
            "slides": {},
            "split": None,
            "closed": False,
        }
        self.stacks: list[Stack] = []
        self._is_new = True
        self._mended = False
        if self.path.exists():
            self._look_at_what_is_there()
        elif not self.path.absolute().parent.is_dir():
            raise InputError(f"{self.path}: the folder {self.path.parent} does not exist")

    def _look_at_what_is_there(self) -> None:
        half = f"{META}.new"  # of a process killed at its very beginning
        if self.path.is_dir() and all(p.name == half for p in self.path.iterdir()):
            return
        meta = read_meta(self.path)
        mine = (self.meta["metric"], self.meta["metric_options"])
        theirs = (meta.get("metric"), meta.get("metric_options"))
        if mine != theirs:
            raise InputError(
                f"{self.path}: its labels were made by the metric {theirs[0]} with the options "
                f"{theirs[1]}, and cannot be mixed with those by {mine[0]} with {mine[1]}"
            )
        self.meta, self._is_new = meta, False
        self.stacks, _ = read_index(self.path)

    def check_slide(self, slide: str, plan: Mapping[str, Any] | None) -> None:
        """Refuse a slide that was collected by another plan.

        Raises
        ------
        InputError
            So it was.
        """
        known = self.meta["slides"].get(slide)
        if known is not None and known.get("plan") != plan:
            raise InputError(
                f"{self.path}: slide {slide!r} of this dataset was collected by another plan; "
                "give the same plan to continue it, another --slide name, or another folder"
            )

    def begin(self, slide: str, facts: Mapping[str, Any]) -> None:
        """Make the folder, mend what an interruption left, and note the slide."""
        self.begin_all({slide: facts})

    def begin_all(self, slides: Mapping[str, Mapping[str, Any]]) -> None:
        """As `begin`, of many slides at once: what is known of them is written once."""
        self.path.mkdir(exist_ok=True)
        # Looking into every file takes long where there are thousands of them: only where
        # something can be amiss, or where the user comes back to a slide.
        known = self.meta["slides"]
        doubtful = not self.meta.get("closed", False) or any(s in known for s in slides)
        doubtful, self._mended = doubtful and not self._mended, True
        for slide, facts in slides.items():
            known.setdefault(slide, dict(facts))
        self.meta["closed"] = False
        self._write_meta()
        (self.path / PLANES).mkdir(exist_ok=True)
        if doubtful:
            self._mend()

    def finish(self) -> None:
        """Note that nothing is under way any more: all that is indexed is whole."""
        self.meta["closed"] = True
        self._write_meta()

    def note(self, slide: str, key: str, facts: Mapping[str, Any]) -> None:
        """Add to what is known of a slide."""
        known = self.meta["slides"][slide]
        known[key] = {**known.get(key, {}), **facts}
        self._write_meta()

    def _write_meta(self) -> None:
        if not self._is_new and (self.path / META).is_file():
            self.meta["split"] = read_meta(self.path).get("split")  # drawn meanwhile
        text = json.dumps(self.meta, indent=1, ensure_ascii=False)
        write_whole(self.path / META, text + "\n")

    def abandon(self) -> None:
        """Remove a new dataset into which nothing came."""
        if self._is_new and not self.stacks:
            for name in (META, INDEX):
                (self.path / name).unlink(missing_ok=True)
            for folder in (self.path / PLANES, self.path):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    def append(self, stack: Stack) -> None:
        """Add a line to the index; it is with the operating system on return."""
        with (self.path / INDEX).open("a", encoding="utf-8") as f:
            f.write(json.dumps(stack.to_json(), ensure_ascii=False) + "\n")
        self.stacks.append(stack)

    def drop(self, files: Iterable[str]) -> None:
        """Remove files and their lines from the index: the lines first."""
        files = set(files)
        kept = [s for s in self.stacks if s.file not in files]
        if len(kept) < len(self.stacks):
            self.stacks = kept
            lines = (json.dumps(s.to_json(), ensure_ascii=False) + "\n" for s in kept)
            write_whole(self.path / INDEX, "".join(lines))
        for file in files:
            (self.path / file).unlink(missing_ok=True)

    def dataset(self) -> Dataset:
        """The dataset as it is now, to be read."""
        return Dataset(self.path, self.meta, self.stacks)

    def _mend(self) -> None:
        """Complete files that were not closed; forget what is not whole."""
        index = self.path / INDEX
        if index.is_file():
            self.stacks, end = read_index(self.path)
            if end < index.stat().st_size:
                with index.open("r+b") as f:
                    f.truncate(end)
        names: dict[str, list[Stack]] = {}
        for stack in self.stacks:
            names.setdefault(stack.file, []).append(stack)
        lost = []
        for name, stacks in names.items():
            if not _is_whole(self.path / name, stacks):
                logger.warning("%s: damaged; its stacks are taken anew", self.path / name)
                lost.append(name)
        for file in (self.path / PLANES).iterdir():
            name = f"{PLANES}/{file.name}"
            if name not in names:
                lost.append(name)  # it holds no whole stack
        self.drop(lost)


def _is_whole(path: Path, stacks: list[Stack]) -> bool:
    try:
        if stacks[0].origin is None and not read_info(path).complete:
            repair(path)
        with open_tiff(path) as tif:
            size = tif.filehandle.size
            pages: Any = tif.pages
            for stack in stacks:
                for k in stack.pages:
                    ends = zip(pages[k].dataoffsets, pages[k].databytecounts, strict=True)
                    if any(start + count > size for start, count in ends):
                        return False
    except (InputError, IndexError, OSError):
        return False
    return True


def optics_json(optics: Optics) -> dict[str, float | None]:
    """The optics as a row holds them, the depth of field included."""
    return {**asdict(optics), "dof_um": optics.dof_um}


def labelled(meter: StackMeter, dof_um: float | None, digits: int = 4) -> dict[str, Any]:
    """Columns of a row that come from its planes."""
    label = asdict(meter.label(dof_um))
    quality = {
        name: round(value, digits) if isinstance(value, float) else value
        for name, value in label.items()
        if name not in ("status", "reason", "focus_z_um")
    }
    focus = label["focus_z_um"]
    return {
        "label": label["status"],
        "reason": label["reason"],
        "focus_z_um": None if focus is None else round(focus, digits),
        "quality": quality,
        "sparsity": meter.sparsity,
        "content": round(meter.content, digits),
        "z_um": tuple(round(z, digits) for z in meter.z_um),
        "scores": tuple(float(f"{s:.6g}") for s in meter.scores),
    }
