"""Datasets of labelled z-stacks: a folder of OME-TIFF files and one index.

::

    DATASET/
      dataset.json          what holds for all: format, focus measure, plan of each slide,
                            the split, once it is drawn
      stacks.jsonl          the index: one line, a JSON object, per stack
      stacks/*.ome.tiff     the planes

A stack is one z-series of one field in one channel at one time point. Its line in the index:

==================  =====================================================================
``file``            path in the dataset
``image``           number of the OME Image in the file
``time, channel``   indices in that image
``pages``           TIFF page of each plane
``slide, field``    names; a field is a position of the plan, or a tile of its grid
``x_um, y_um``      stage, null where unknown
``z_um``            of each plane, as the stage reported it
``scores``          focus measure of each plane
``label``           ``ok`` or ``refused``, with ``reason``
``focus_z_um``      the peak of the focus curve between the planes; null if refused
``quality``         expected error, contrast, significance, width, planes on each side: see
                    `mm_autofocus.training.label.Label`
``sparsity``        dense, sparse, extremely-sparse or blank, by ``content``, the part of
                    the sharpest plane whose local variance is above the camera's noise
``optics``          na, magnification, wavelength_um, refractive_index, pixel_size_um,
                    dof_um; null where unknown
``lens``            what is known of lens and condenser, by the names of
                    `mm_autofocus.models.lens.LENS_NAMES`; else null
``shape, dtype``    ``[Z, Y, X]`` or ``[Z, Y, X, 3]``; with ``bit_depth``, ``channel_name``
                    and ``exposure_ms`` as far as known
``truth``           what a simulator knows, never a part of the label: ``focus_z_um`` and
                    the ``defocus_um`` of each plane; else null
``origin``          the file that it was taken from; null if it was acquired
==================  =====================================================================

Lengths are µm. The defocus of a plane is ``z_um - focus_z_um``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.training.split import PARTS, Split, draw
from mm_autofocus.training.stack import Stack

__all__ = ["FORMAT", "INDEX", "META", "Dataset", "read_index", "read_meta", "write_whole"]

FORMAT = 1
META, INDEX = "dataset.json", "stacks.jsonl"


class Dataset:
    """A dataset, open to be read. Iterate over it for its stacks.

    Examples
    --------
    >>> dataset = Dataset.open("stacks_of_monday")                     # doctest: +SKIP
    >>> split = dataset.split(seed=0)                                  # doctest: +SKIP
    >>> for stack in dataset.part("train"):                            # doctest: +SKIP
    ...     for d_um, (_, image) in zip(stack.defocus_um, stack.planes()): ...

    Attributes
    ----------
    path : Path
        Its folder.
    meta : dict
        Content of ``dataset.json``.
    stacks : tuple of Stack
        All, in the order of the index; their planes are on the disk.
    """

    def __init__(self, path: Path, meta: dict[str, Any], stacks: Sequence[Stack]) -> None:
        self.path, self.meta, self.stacks = path, meta, tuple(stacks)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, labels: bool = True) -> Dataset:
        """Open a dataset.

        Parameters
        ----------
        path : path
            Its folder.
        labels : bool
            Whether to insist on stacks with a label.

        Raises
        ------
        InputError
            No dataset, damaged, of a newer format; or, with `labels`, empty or without
            any label.
        """
        path = Path(path)
        meta = read_meta(path)
        stacks, _ = read_index(path)
        dataset = cls(path, meta, stacks)
        if labels and not stacks:
            raise InputError(f"{path}: the dataset is empty")
        if labels and not dataset.labelled:
            raise InputError(
                f"{path}: the dataset has no labels: all {len(stacks)} stacks were refused, "
                f"the first because of this: {stacks[0].reason}"
            )
        return dataset

    def __iter__(self) -> Iterator[Stack]:
        return iter(self.stacks)

    def __len__(self) -> int:
        return len(self.stacks)

    @property
    def labelled(self) -> tuple[Stack, ...]:
        """Stacks with a label."""
        return tuple(s for s in self.stacks if s.labelled)

    def is_simulated(self, stack: Stack) -> bool:
        """Whether a simulator made a stack; figures that stand on it must say so."""
        facts = self.meta["slides"].get(stack.slide, {})
        return stack.truth is not None or bool(facts.get("simulated"))

    @property
    def written_split(self) -> Split | None:
        """The split that is written down in the dataset, if one is."""
        data = read_meta(self.path).get("split")
        return None if data is None else Split.from_json(data)

    def split(
        self,
        seed: int = 0,
        parts: Mapping[str, float] = PARTS,
        by: Literal["slide", "field"] = "field",
    ) -> Split:
        """Draw a split by slide or by field, and write it down in the dataset.

        Training and evaluation then share it by `part`. The same seed on the same stacks
        gives the same split.

        Raises
        ------
        InputError
            Too few labelled slides or fields for an honest split, or bad fractions.
        """
        split = draw(self.stacks, seed, parts, by)
        meta = {**read_meta(self.path), "split": split.to_json()}
        write_whole(self.path / META, json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
        self.meta = meta
        return split

    def part(self, name: str, *, labelled: bool = True) -> tuple[Stack, ...]:
        """Stacks of one part of the split that is written down.

        Parameters
        ----------
        name : str
            ``train``, ``validation`` or ``test``, or as the split names them.
        labelled : bool
            Only those with a label.

        Raises
        ------
        InputError
            No split has been drawn, or it has no such part.
        """
        split = self.written_split
        if split is None:
            raise InputError(f"{self.path}: no split has been drawn yet")
        if name not in split.groups:
            raise InputError(
                f"{self.path}: {name!r} is no part of its split; it has: "
                f"{', '.join(split.groups)}"
            )
        stacks = self.labelled if labelled else self.stacks
        return tuple(s for s in stacks if split.part_of(s) == name)

    def summary(self) -> dict[str, Any]:
        """Counts, as ``mm-autofocus collect --json`` prints them."""
        refused: dict[str, int] = {}
        sparsity: dict[str, int] = {}
        for s in self.stacks:
            sparsity[s.sparsity] = sparsity.get(s.sparsity, 0) + 1
            if not s.labelled:
                kind = s.reason.partition(":")[0]
                refused[kind] = refused.get(kind, 0) + 1
        errors = [e for s in self.labelled if (e := s.expected_error_um) is not None]
        return {
            "dataset": str(self.path),
            "stacks": len(self.stacks),
            "planes": sum(len(s.z_um) for s in self.stacks),
            "slides": len({s.slide for s in self.stacks}),
            "fields": len({s.group for s in self.stacks}),
            "labelled": len(self.labelled),
            "refused": refused,
            "by_sparsity": sparsity,
            "median_expected_error_um": float(np.median(errors)) if errors else None,
        }


def read_meta(path: Path) -> dict[str, Any]:
    """Read ``dataset.json``.

    Raises
    ------
    InputError
        The folder is no dataset, or one of a newer format.
    """
    if not path.is_dir():
        what = "is a file, not the folder of a dataset" if path.exists() else "no such folder"
        raise InputError(f"{path}: {what}")
    file = path / META
    if not file.is_file():
        raise InputError(f"{path}: is not a dataset; it has no {META}")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        version = int(meta["format"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{file}: does not read as the head of a dataset ({e})") from None
    if version > FORMAT:
        raise InputError(f"{file}: format {version} is newer than this program's {FORMAT}")
    return dict(meta)


def read_index(path: Path) -> tuple[list[Stack], int]:
    """Read the index, up to a line that a killed process left unfinished.

    Returns
    -------
    stacks : list of Stack
    end : int
        Where the last whole line ends, in bytes.
    """
    file = path / INDEX
    if not file.is_file():
        return [], 0
    data = file.read_bytes()
    end = data.rfind(b"\n") + 1
    stacks = []
    for number, line in enumerate(data[:end].splitlines(), start=1):
        try:
            stacks.append(Stack.from_json(path, json.loads(line)))
        except (ValueError, TypeError) as e:
            raise InputError(f"{file}:{number}: does not read as a stack ({e})") from None
    return stacks, end


def write_whole(path: Path, text: str) -> None:
    """Write a file so that at any moment either the old or the new one is there."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
