"""Rigs and models for learned strategies, of which every answer is known in advance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mm_autofocus.models.card import ModelCard
from mm_autofocus.models.runtime import CallableModel, FocusModel, Prediction
from mm_autofocus.types import FocusRequest, Look, Optics

P = 32
_TEXTURE = np.tile(np.random.default_rng(3).normal(0, 0.05, (P, P)), (3, 3))
_TEXTURE -= _TEXTURE[:P, :P].mean()
OPTICS = Optics(na=0.75, pixel_size_um=0.0)  # depth of field 0.98 µm, tolerance 0.33 µm


def card(**fields: Any) -> ModelCard:
    given = {"name": "coded", "channels": 1, "patch_px": P, "z_range_um": (-20, 20)}
    return ModelCard.model_validate(given | fields, strict=False)


def frame(defocus_um: float, texture: np.ndarray = _TEXTURE) -> np.ndarray:
    """A frame whose mean tells its defocus: ½ in focus, 0.01 of the range more per µm."""
    return np.rint(65535 * (0.5 + defocus_um / 100 + texture)).astype(np.uint16)


class CodedRig:
    """A stage that goes where it is sent, and a camera that sees `frame`."""

    def __init__(
        self,
        focus_um: float = 0.0,
        z_um: float = 0.0,
        texture: np.ndarray | None = None,
        grain_um: float = 0.0,
    ) -> None:
        self.focus_um, self.z_um = focus_um, z_um
        self.texture = _TEXTURE if texture is None else texture
        self.grain_um = grain_um
        self.moves: list[float] = []
        self.looks: list[float] = []

    def position_um(self) -> float:
        return self.z_um

    def move_to(self, z_um: float) -> None:
        self.z_um = np.rint(z_um / self.grain_um) * self.grain_um if self.grain_um else z_um
        self.moves.append(float(z_um))

    def look(self) -> Look:
        self.looks.append(self.z_um)
        return Look(self.z_um, frame(self.z_um - self.focus_um, self.texture), 65535.0)

    @contextmanager
    def looking(self) -> Iterator[None]:
        yield


def read(x: np.ndarray) -> np.ndarray:
    """Defocus of the first look of patches ``(N, looks, P, P)``."""
    return (x[:, 0].mean((1, 2)) - 0.5) * 100


def coded_model(
    sd: float | Callable[[np.ndarray], np.ndarray] = 0.1,
    change: Callable[[np.ndarray], np.ndarray] = lambda d: d,
    **fields: Any,
) -> CallableModel:
    """Reads the defocus from the mean of the patches; `change` makes it err."""

    def net(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = read(x)
        return change(d), sd(d) if callable(sd) else np.full(len(d), sd)

    return CallableModel(net, card(**fields))


def request(start_um: float = 0.0, **fields: Any) -> FocusRequest:
    given = {
        "z_min_um": start_um - 30,
        "z_max_um": start_um + 30,
        "max_looks": 20,
        "optics": OPTICS,
    }
    return FocusRequest(start_um, **(given | fields))


class FakeModel:
    """Says what `answer` says of the looks: a defocus, or a whole `Prediction`, or raises."""

    def __init__(
        self,
        answer: Callable[[Sequence[np.ndarray]], float | Prediction],
        error_um: float = 0.1,
        **fields: Any,
    ) -> None:
        self.card = card(**({"name": "fake"} | fields))
        self.answer, self.error_um = answer, error_um
        self.seen: list[Sequence[np.ndarray]] = []
        self.asked: list[dict[str, Any]] = []
        self.warmed: list[tuple[int, ...]] = []

    def predict(self, images: Sequence[np.ndarray], **how: Any) -> Prediction:
        self.seen.append(images)
        self.asked.append(how)
        said = self.answer(images)
        return said if isinstance(said, Prediction) else prediction(said, self.error_um)

    def warm(self, shape: tuple[int, ...]) -> None:
        self.warmed.append(shape)


def prediction(
    defocus_um: float | None,
    error_um: float | None = 0.1,
    *reasons: str,
    ood: float | None = None,
) -> Prediction:
    found = defocus_um is not None
    return Prediction(
        defocus_um,
        error_um,
        np.zeros((int(found), 2), np.intp),
        np.full(int(found), defocus_um or 0.0, np.float32),
        None,
        np.ones((1, 1), np.float32),
        int(found),
        None,
        "dense" if found else "blank",
        ood,
        reasons,
        np.zeros((int(found), 2), np.intp),
        P,
    )


MODEL: FocusModel = FakeModel(lambda _: 0.0)
"""What ``learned_rig:MODEL`` finds; tests put their own in its place."""
