"""Training, validation and test: whole slides or whole fields, never planes or patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.spatial import cKDTree

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    from mm_autofocus.training.stack import Stack

__all__ = ["PARTS", "Split", "draw", "groups_of"]

PARTS: Mapping[str, float] = {"train": 0.7, "validation": 0.15, "test": 0.15}


@dataclass(frozen=True, slots=True)
class Split:
    """Which groups of a dataset serve for what.

    Attributes
    ----------
    seed : int
        Of the drawing.
    by : {"slide", "field"}
        What a group is.
    fractions : dict
        Part → fraction asked for.
    groups : dict
        Part → names of its groups, sorted; ``slide/field`` for fields.
    """

    seed: int
    by: Literal["slide", "field"]
    fractions: dict[str, float]
    groups: dict[str, tuple[str, ...]]

    def part_of(self, stack: Stack) -> str | None:
        """Part that a stack belongs to; None if it came after the split was drawn."""
        name = stack.slide if self.by == "slide" else stack.group
        return next((part for part, names in self.groups.items() if name in names), None)

    def to_json(self) -> dict[str, Any]:
        """As it is written down in the dataset."""
        groups = {part: list(names) for part, names in self.groups.items()}
        return {
            "seed": self.seed,
            "by": self.by,
            "fractions": self.fractions,
            "groups": groups,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Split:
        """Read what `to_json` wrote."""
        groups = {part: tuple(names) for part, names in data["groups"].items()}
        return cls(int(data["seed"]), data["by"], dict(data["fractions"]), groups)


def groups_of(stacks: Sequence[Stack], by: Literal["slide", "field"]) -> list[list[str]]:
    """Names that must stay together, as sorted lists.

    Fields whose centres are nearer than half a frame show the same specimen, under whatever
    names, and stay together.
    """
    if by == "slide":
        return [[name] for name in sorted({s.slide for s in stacks})]
    parent = {s.group: s.group for s in stacks}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for slide in {s.slide for s in stacks}:
        placed = [s for s in stacks if s.slide == slide and s.frame_um and s.xy_um]
        if len(placed) < 2:
            continue
        near = min(min(s.frame_um) for s in placed if s.frame_um) / 2
        tree = cKDTree(np.array([s.xy_um for s in placed]))
        for i, j in tree.query_pairs(near * (1 - 1e-9)):
            a, b = sorted((root(placed[i].group), root(placed[j].group)))
            parent[b] = a
    together: dict[str, list[str]] = {}
    for name in sorted(parent):
        together.setdefault(root(name), []).append(name)
    return list(together.values())


def draw(
    stacks: Sequence[Stack],
    seed: int,
    parts: Mapping[str, float] = PARTS,
    by: Literal["slide", "field"] = "field",
) -> Split:
    """Draw a split; the same stacks and seed give the same, in whatever order they come.

    Groups with and without a label are dealt out separately, so that each part has its
    share of either.

    Raises
    ------
    InputError
        The fractions make no whole, or there are fewer labelled groups than parts.
    """
    if by not in ("slide", "field"):
        raise InputError(f"by: {by!r} is not allowed; a split is by 'slide' or by 'field'")
    fractions = {name: float(value) for name, value in parts.items() if value != 0}
    if len(fractions) < 2 or any(not 0 < v < 1 for v in fractions.values()):
        raise InputError(
            f"parts: {dict(parts)} is not allowed: two fractions between 0 and 1 at least"
        )
    if not math.isclose(sum(fractions.values()), 1.0, abs_tol=1e-6):
        raise InputError(f"parts: the fractions {dict(parts)} do not add up to 1")
    groups = groups_of(stacks, by)
    names = {(s.slide if by == "slide" else s.group) for s in stacks if s.labelled}
    labelled = [g for g in groups if names.intersection(g)]
    rest = [g for g in groups if not names.intersection(g)]
    if len(labelled) < len(fractions):
        what = f"{len(labelled)} {by}{'s' if len(labelled) != 1 else ''} with a label"
        other = "; split by field" if by == "slide" else ""
        raise InputError(
            f"a dataset of {what} has no honest split into {len(fractions)} parts "
            f"({', '.join(fractions)}){other}"
        )
    rng = np.random.default_rng(seed)
    dealt: dict[str, list[str]] = {part: [] for part in fractions}
    for pile, least in ((labelled, 1), (rest, 0)):
        order = [pile[i] for i in rng.permutation(len(pile))]
        counts = _counts(len(pile), list(fractions.values()), least)
        for part, count in zip(fractions, counts, strict=True):
            for group in order[:count]:
                dealt[part].extend(group)
            order = order[count:]
    return Split(seed, by, fractions, {p: tuple(sorted(names)) for p, names in dealt.items()})


def _counts(n: int, fractions: Sequence[float], least: int) -> list[int]:
    """Deal `n` by the largest remainder, at least `least` to each."""
    spare = n - least * len(fractions)
    # what is given to all is taken off the share of each
    shares = np.maximum(np.array(fractions) * n - least, 0)
    shares = shares / max(shares.sum(), 1e-12) * spare
    counts = np.floor(shares + 1e-9).astype(int)
    for i in np.argsort(counts - shares, kind="stable")[: spare - int(counts.sum())]:
        counts[i] += 1
    return [int(c) + least for c in counts]
