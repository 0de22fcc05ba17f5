"""One labelled z-stack of a dataset: its line of the index, its planes on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as column
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.ometiff.recovery import open_tiff
from mm_autofocus.types import Optics

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

__all__ = ["Stack"]

_KNOWN = (
    "file",
    "image",
    "time",
    "channel",
    "pages",
    "slide",
    "field",
    "x_um",
    "y_um",
    "z_um",
    "scores",
    "label",
    "reason",
    "focus_z_um",
    "quality",
    "sparsity",
    "content",
    "optics",
    "lens",
    "shape",
    "dtype",
    "bit_depth",
    "channel_name",
    "exposure_ms",
    "truth",
    "origin",
)


@dataclass(frozen=True, slots=True)
class Stack:
    """One line of the index; the planes stay on the disk until they are asked for.

    Attributes are those of the index: see `mm_autofocus.training.dataset`.
    """

    folder: Path = column(repr=False)
    file: str
    slide: str
    field: str
    z_um: tuple[float, ...] = column(repr=False)
    pages: tuple[int, ...] = column(repr=False)
    shape: tuple[int, ...]
    dtype: str
    label: Literal["ok", "refused"]
    sparsity: str
    scores: tuple[float, ...] = column(default=(), repr=False)
    content: float = 0.0
    reason: str = ""
    focus_z_um: float | None = None
    quality: Mapping[str, Any] = column(default_factory=dict, repr=False)
    optics: Mapping[str, Any] = column(default_factory=dict, repr=False)
    lens: Mapping[str, float] | None = column(default=None, repr=False)
    truth: Mapping[str, Any] | None = column(default=None, repr=False)
    x_um: float | None = None
    y_um: float | None = None
    image: int = 0
    time: int = 0
    channel: int = 0
    channel_name: str = ""
    bit_depth: int | None = None
    exposure_ms: float | None = None
    origin: str | None = None

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Slide, field, time and channel: no two stacks of a dataset share it."""
        return self.slide, self.field, self.time, self.channel

    @property
    def group(self) -> str:
        """``slide/field``: what a split by field keeps together."""
        return f"{self.slide}/{self.field}"

    @property
    def labelled(self) -> bool:
        """Whether it has a label."""
        return self.label == "ok" and self.focus_z_um is not None

    @property
    def defocus_um(self) -> npt.NDArray[np.float64]:
        """Defocus of each plane by the label, ``(Z,)``, positive above focus.

        Raises
        ------
        InputError
            The stack has no label.
        """
        if self.focus_z_um is None:
            raise InputError(f"{self.file}: this stack has no label ({self.reason})")
        return np.asarray(self.z_um) - self.focus_z_um

    @property
    def expected_error_um(self) -> float | None:
        """Standard deviation expected of the label."""
        error = self.quality.get("expected_error_um")
        return None if error is None else float(error)

    @property
    def is_rgb(self) -> bool:
        """Whether its planes are ``(Y, X, 3)``."""
        return len(self.shape) == 4

    @property
    def xy_um(self) -> tuple[float, float] | None:
        """Where the stage stood, if that is known."""
        return None if self.x_um is None or self.y_um is None else (self.x_um, self.y_um)

    @property
    def frame_um(self) -> tuple[float, float] | None:
        """Width and height of the field in µm, if the pixel size is known."""
        pixel = self.optics.get("pixel_size_um")
        return None if not pixel else (self.shape[2] * pixel, self.shape[1] * pixel)

    def known_optics(self) -> Optics:
        """The optics as the strategies know them."""
        names = ("na", "magnification", "wavelength_um", "refractive_index", "pixel_size_um")
        given = {k: self.optics[k] for k in names if self.optics.get(k) is not None}
        return Optics(**given)

    def plane(self, k: int) -> Image:
        """Read plane `k`, ``(Y, X)`` or ``(Y, X, 3)``.

        Raises
        ------
        InputError
            The file is missing or damaged, or there is no such plane.
        """
        if not 0 <= k < len(self.pages):
            raise InputError(f"{self.file}: plane {k} is not one of 0 … {len(self.pages) - 1}")
        return next(image for _, image in self._read([k]))

    def planes(self) -> Iterator[tuple[float, Image]]:
        """Read plane by plane: ``(z_um, image)``; one image is held at a time."""
        return self._read(range(len(self.pages)))

    def load(self) -> Image:
        """Read the whole stack, ``(Z, Y, X)`` or ``(Z, Y, X, 3)``."""
        stack = np.empty(self.shape, self.dtype)
        for k, (_, image) in enumerate(self.planes()):
            stack[k] = image
        return stack

    def _read(self, planes: Sequence[int]) -> Iterator[tuple[float, Image]]:
        path = self.folder / self.file
        with open_tiff(path) as tif:
            for k in planes:
                try:
                    page: Any = tif.pages[self.pages[k]]
                    image: Image = page.asarray()
                except Exception as e:  # noqa: BLE001  (a damaged file can raise anything)
                    raise InputError(f"{path}: plane {k} cannot be read ({e})") from None
                if image.shape != self.shape[1:] or image.dtype != self.dtype:
                    raise InputError(f"{path}: plane {k} is not what the index says of it")
                yield self.z_um[k], image

    def to_json(self) -> dict[str, Any]:
        """Its line of the index."""
        return {name: getattr(self, name) for name in _KNOWN}

    @classmethod
    def from_json(cls, folder: Path, data: Mapping[str, Any]) -> Stack:
        """Read a line of the index; columns that are not known are left alone."""
        known = {name: data[name] for name in _KNOWN if name in data}
        for name in ("z_um", "pages", "shape", "scores"):
            known[name] = tuple(known.get(name) or ())
        return cls(folder=folder, **known)
