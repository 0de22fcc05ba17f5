"""Stacks that say their own defocus, and models that read it: errors are known exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.models.card import ModelCard
from mm_autofocus.models.runtime import CallableModel
from mm_autofocus.training import Dataset, Stack
from mm_autofocus.training.store import DatasetWriter, optics_json
from mm_autofocus.types import Optics

SIDE = 64
OPTICS = Optics(na=0.75, magnification=20.0, pixel_size_um=0.325)
_RNG = np.random.default_rng(3)
TEXTURE = np.kron(_RNG.normal(size=(16, 16)), np.ones((4, 4)))


def frame(d_um: float, *, blank: bool = False, side: int = SIDE) -> np.ndarray:
    """A textured frame whose first pixel says its defocus in hundredths of a µm."""
    texture = np.tile(TEXTURE, (side // SIDE, side // SIDE))
    sharp = 0.0 if blank else 3000 * np.exp(-((d_um / 6) ** 2)) + 800
    image = 20000 + sharp * texture
    image[::SIDE, ::SIDE] = 30000 + round(100 * d_um)
    return np.rint(image).astype(np.uint16)


def card(**changes: Any) -> ModelCard:
    """A card for one grey look, DoF 1 µm."""
    given = {
        "name": "knows",
        "channels": 1,
        "patch_px": SIDE,
        "z_range_um": (-25.0, 25.0),
        "dof_um": 1.0,
    }
    return ModelCard(**{**given, **changes})


def knowing(answer: Callable[[np.ndarray], Any] = lambda d: d, **changes: Any) -> CallableModel:
    """A model that reads the defocus from the first look and answers something made of it."""

    def net(x: np.ndarray) -> Any:
        return answer(np.rint(x[:, 0, 0, 0] * 65535 - 30000) / 100)

    return CallableModel(net, card(**changes))


@dataclass
class Memory:
    """A stack in memory (`Planes`)."""

    group: str = "slide/0"
    sparsity: str = "dense"
    z_um: Sequence[float] = field(default_factory=lambda: [float(z) for z in range(-5, 6)])
    focus_um: float = 0.0
    blank: Sequence[int] = ()
    truth: dict[str, Any] | None = None
    bit_depth: int | None = 16
    side: int = SIDE
    optics: Optics = OPTICS

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.z_um), self.side, self.side)

    @property
    def dtype(self) -> str:
        return "uint16"

    @property
    def defocus_um(self) -> np.ndarray:
        return np.asarray(self.z_um, float) - self.focus_um

    def known_optics(self) -> Optics:
        return self.optics

    def plane(self, k: int) -> np.ndarray:
        return frame(float(self.defocus_um[k]), blank=k in self.blank, side=self.side)

    def planes(self) -> Iterator[tuple[float, np.ndarray]]:
        for k, z in enumerate(self.z_um):
            yield z, self.plane(k)

    def load(self) -> np.ndarray:
        return np.stack([image for _, image in self.planes()])


def write_dataset(folder: Path, stacks: Sequence[Memory], *, label: str = "ok") -> Dataset:
    """Write stacks as a dataset, with the focus that they have as their label."""
    writer = DatasetWriter(folder, FocusMeasure())
    writer.begin("slide", {})
    for i, s in enumerate(stacks):
        file = f"stacks/s{i:05d}.ome.tiff"
        tifffile.imwrite(folder / file, s.load(), metadata={"axes": "ZYX"}, ome=True)
        slide, _, name = s.group.partition("/")
        writer.append(
            Stack(
                folder=folder,
                file=file,
                slide=slide,
                field=name,
                z_um=tuple(s.z_um),
                pages=tuple(range(len(s.z_um))),
                shape=s.shape,
                dtype=s.dtype,
                label=label,
                reason="" if label == "ok" else "flat: nothing there",
                focus_z_um=s.focus_um if label == "ok" else None,
                sparsity=s.sparsity,
                quality={"expected_error_um": 0.05},
                optics=optics_json(s.optics),
                truth=s.truth,
                bit_depth=s.bit_depth,
            )
        )
    return writer.dataset()


def plain(document: Any) -> Any:
    """As it comes out of JSON; fails on what JSON has no word for."""
    return json.loads(json.dumps(document, allow_nan=False))
