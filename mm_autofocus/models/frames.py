"""From the looks as the camera gave them to what a net is shown, and no more than that.

A frame of 2016² pixels is never converted as a whole: the mosaic is made row by row, and only
the patches that are asked for become floats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import cv2
import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.patches import CELL_PX, grid

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.card import ModelCard
    from mm_autofocus.types import Image

    Real: TypeAlias = npt.NDArray[np.float32]
    Cells: TypeAlias = npt.NDArray[np.intp]

__all__ = ["Frames", "integer_limit", "normalise", "prepare", "saturation"]

_DTYPES = ("uint8", "uint16", "float32")


def integer_limit(image: Image) -> float | None:
    """Largest value of an integer type; None for floats."""
    kind = image.dtype
    return float(np.iinfo(kind.name).max) if kind.kind in "iu" else None


def saturation(image: Image, max_value: float | None, *, needed: bool = True) -> float:
    """Value at which the camera saturates: as given, or the largest of an integer type.

    Raises
    ------
    InputError
        It is not positive, or the frame holds floats and it is not given.
    """
    if max_value is not None:
        if not max_value > 0:
            raise InputError(f"max_value: {max_value:g} is not allowed: must be greater than 0")
        return float(max_value)
    if (largest := integer_limit(image)) is not None:
        return largest
    if needed:
        raise InputError(
            "max_value: is missing: a frame of floats does not tell where the camera saturates"
        )
    return 1.0


@dataclass(frozen=True, slots=True)
class Frames:
    """The looks at one field, at the model's pixel size, and the grid of patches on them.

    Attributes
    ----------
    looks : tuple of numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``; the camera's values.
    max_value : float
        Where they saturate.
    corners : numpy.ndarray
        ``(rows, columns, 2)`` of y, x of the upper left corners of the patches.
    patch_px : int
        Edge of a patch.
    scale : float
        By what the looks were enlarged to the model's pixel size.
    """

    looks: tuple[Image, ...]
    max_value: float
    corners: Cells
    patch_px: int
    scale: float = 1.0

    def cut(self, cells: Cells) -> Real:
        """Patches ``(N, looks · channels, P, P)`` at cells ``(N, 2)`` of the grid, 0 … 1."""
        p = self.patch_px
        channels = self._channels
        out = np.empty((len(cells), channels * len(self.looks), p, p), np.float32)
        for k, (y, x) in enumerate(self.corners[cells[:, 0], cells[:, 1]]):
            for n, image in enumerate(self.looks):
                part = np.atleast_3d(image[y : y + p, x : x + p])
                out[k, n * channels : (n + 1) * channels] = np.moveaxis(part, -1, 0)
        out *= np.float32(1 / self.max_value)
        return out

    def mosaic(self) -> Real:
        """The shrunk patches side by side, ``(looks · channels, rows · 56, columns · 56)``.

        Bit for bit what `mm_autofocus.models.patches.mosaic` makes of all the frame.
        """
        rows, columns = self.corners.shape[:2]
        channels = self._channels
        shape = (channels * len(self.looks), rows * CELL_PX, columns * CELL_PX)
        out = np.empty(shape, np.float32)
        for n, image in enumerate(self.looks):
            self._shrink(image, out[n * channels : (n + 1) * channels])
        return out

    @property
    def whole(self) -> bool:
        """Whether the patches neither overlap nor leave anything out."""
        p = self.patch_px
        rows, columns = self.corners.shape[:2]
        return self.looks[0].shape[:2] == (rows * p, columns * p)

    @property
    def _channels(self) -> int:
        return 1 if self.looks[0].ndim == 2 else 3

    def _shrink(self, image: Image, out: Real) -> None:
        """Shrink a look into its planes of the mosaic, from parts that stay in the cache."""
        p, n = self.patch_px, CELL_PX
        rows, columns = self.corners.shape[:2]
        wide = columns if self.whole else 1
        part = np.empty((p, wide * p, *image.shape[2:]), np.float32)
        for i in range(rows):
            for j in range(0, columns, wide):
                y, x = self.corners[i, j]
                np.copyto(part, image[y : y + p, x : x + wide * p], casting="unsafe")
                part *= np.float32(1 / self.max_value)
                small = cv2.resize(part, (wide * n, n), interpolation=cv2.INTER_AREA)
                target = out[:, i * n : (i + 1) * n, j * n : (j + wide) * n]
                target[...] = np.moveaxis(np.atleast_3d(small), -1, 0)


def prepare(
    card: ModelCard,
    images: Sequence[Image],
    *,
    max_value: float | None = None,
    pixel_size_um: float | None = None,
) -> Frames:
    """Check the looks against the card and bring them to its pixel size.

    Parameters
    ----------
    card : ModelCard
        Of the model.
    images : sequence of numpy.ndarray
        ``(Y, X)`` or ``(Y, X, 3)``, uint8, uint16 or float32, one per look, in the order of
        ``card.looks_um``.
    max_value : float | None
        Value at which the camera saturates; None: the largest of the integer type.
    pixel_size_um : float | None
        In the specimen; None: as in the training.

    Raises
    ------
    InputError
        Wrong number of looks, channels, type or shape; pixels that are no numbers.
    """
    if len(images) != card.n_looks:
        offsets = ", ".join(f"{o:+g}" for o in card.looks_um)
        raise InputError(
            f"model {card.name!r}: {len(images)} looks were given, it takes {card.n_looks} "
            f"(at {offsets} µm)"
        )
    first = images[0]
    for image in images:
        card.check_shape(image.shape)
        if image.shape != first.shape or image.dtype != first.dtype:
            raise InputError(
                f"model {card.name!r}: the looks differ: {first.dtype} {first.shape} and "
                f"{image.dtype} {image.shape}"
            )
    if first.dtype.name not in _DTYPES:
        raise InputError(
            f"model {card.name!r}: frames of {first.dtype} are not allowed: must be "
            f"{', '.join(_DTYPES)}"
        )
    if first.dtype.kind == "f" and not all(np.isfinite(image).all() for image in images):
        raise InputError(f"model {card.name!r}: the frame holds pixels that are no numbers")
    needed = card.normalisation.scale == "max_value"
    limit = saturation(first, max_value, needed=needed)
    scale = card.scale_from(pixel_size_um)
    looks = tuple(_rescale(image, scale) for image in images)
    return Frames(looks, limit, grid(looks[0].shape, card.patch_px), card.patch_px, scale)


def normalise(card: ModelCard, x: Real, max_value: float, *, per_patch: bool = True) -> Real:
    """Bring values of 0 … 1 to what the net was trained on; `x` is written to.

    Parameters
    ----------
    card : ModelCard
        Of the model.
    x : numpy.ndarray
        ``(N, looks · channels, Y, X)`` float32.
    max_value : float
        Where the camera saturates.
    per_patch : bool
        False for the mosaic, which is not one patch.

    Returns
    -------
    numpy.ndarray
        `x`.
    """
    rule = card.normalisation
    if rule.scale == "none":
        x *= np.float32(max_value)
    mean, std = (_per_plane(v, card.planes) for v in (rule.mean, rule.std))
    if mean.any():
        x -= mean
    if (std != 1).any():
        x /= std
    if rule.per_patch and per_patch:
        x -= x.mean(axis=(1, 2, 3), keepdims=True)
        # an even patch stays even
        x /= np.maximum(x.std(axis=(1, 2, 3), keepdims=True), np.float32(1e-6))
    return x


def _per_plane(value: float | tuple[float, ...], planes: int) -> Real:
    values = np.atleast_1d(np.asarray(value, np.float32))
    return np.resize(values, planes)[:, None, None]  # repeats the channels, look by look


def _rescale(image: Image, scale: float) -> Image:
    if scale == 1:
        return image
    size = round(image.shape[1] * scale), round(image.shape[0] * scale)
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(cast("Any", image), size, interpolation=how))
