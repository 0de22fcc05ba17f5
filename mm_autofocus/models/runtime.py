"""Models at work: from frames to a defocus, its expected error, and why not to trust it.

ONNX Runtime only; torch is never imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models import consensus, ood
from mm_autofocus.models.card import ModelCard, bits_of
from mm_autofocus.models.frames import Frames, integer_limit, normalise, prepare
from mm_autofocus.models.onnx_net import OnnxNet

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

    Real: TypeAlias = npt.NDArray[np.float32]
    Index: TypeAlias = npt.NDArray[np.intp]

__all__ = ["CallableModel", "FocusModel", "OnnxModel", "Prediction"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says of one field.

    Attributes
    ----------
    defocus_um : float | None
        Of the present z: positive means that the stage stands above focus, and the
        correction is its negative. None: nothing to say.
    expected_error_um : float | None
        Calibrated standard deviation of it; None: not known.
    corners : numpy.ndarray
        ``(N, 2)`` of y, x in the frame's pixels of the patches looked at, the most
        important first.
    patch_defocus_um : numpy.ndarray
        ``(N,)`` float32.
    patch_sd_um : numpy.ndarray | None
        ``(N,)`` float32; None where the net gives none.
    importance : numpy.ndarray
        ``(rows, columns)`` float32, 0 … 1.
    content : int
        How many patches carry content.
    spread_um : float | None
        Robust standard deviation of the patches; None of fewer than two.
    sparsity : {"dense", "sparse", "extremely-sparse", "blank"}
        Class of the field by its content.
    ood : float | None
        How unlike the training's frames it looks; 1 is the limit. None: not known.
    reasons : tuple of str
        Why not to trust it, one clause each; empty if there is no reason.
    cells : numpy.ndarray
        ``(N, 2)`` of row, column of the patches in the grid.
    patch_px : int
        Edge of a patch in the frame's pixels.
    """

    defocus_um: float | None
    expected_error_um: float | None
    corners: Index
    patch_defocus_um: Real
    patch_sd_um: Real | None
    importance: Real
    content: int
    spread_um: float | None
    sparsity: consensus.Sparsity
    ood: float | None
    reasons: tuple[str, ...]
    cells: Index
    patch_px: int

    @property
    def trusted(self) -> bool:
        """Whether there is an answer and nothing speaks against it."""
        return self.defocus_um is not None and not self.reasons

    def focus_map(self) -> Real:
        """Defocus over the grid, ``(rows, columns)`` float32; NaN where no patch was seen."""
        out = np.full(self.importance.shape, np.nan, np.float32)
        out[self.cells[:, 0], self.cells[:, 1]] = self.patch_defocus_um
        return out


class FocusModel(Protocol):
    """Anything that tells the defocus from the looks that its card names."""

    card: ModelCard

    def predict(
        self,
        images: Sequence[Image],
        *,
        max_value: float | None = None,
        every_patch: bool = False,
        pixel_size_um: float | None = None,
    ) -> Prediction:
        """Tell the defocus of the present z.

        Parameters
        ----------
        images : sequence of numpy.ndarray
            ``(Y, X)`` or ``(Y, X, 3)``, uint8, uint16 or float32: one look per offset of
            ``card.looks_um``, in that order.
        max_value : float | None
            Value at which the camera saturates; None: the largest of the integer type.
        every_patch : bool
            Look at all patches with content, for a map of the focus.
        pixel_size_um : float | None
            Of the frames, in the specimen; None: taken as the model's.

        Raises
        ------
        InputError
            The looks are not what the card asks for.
        """
        ...

    def warm(self, shape: tuple[int, ...]) -> None:
        """Run once on an empty frame ``(Y, X[, 3])``, so that the first tile is no slower."""
        ...


class _PatchModel(ABC):
    """What all models share; a subclass only runs the net."""

    card: ModelCard

    @abstractmethod
    def _patches(self, x: Real) -> tuple[Real, Real | None]:
        """Answers ``(N,)`` of the net, in its own unit, and their standard deviations."""

    def _importance(self, mosaic: Real) -> Real:
        """Importance ``(rows, columns)`` by the net."""
        raise NotImplementedError

    def predict(
        self,
        images: Sequence[Image],
        *,
        max_value: float | None = None,
        every_patch: bool = False,
        pixel_size_um: float | None = None,
    ) -> Prediction:
        """Tell the defocus of the present z; see `FocusModel.predict`."""
        frames = prepare(self.card, images, max_value=max_value, pixel_size_um=pixel_size_um)
        mosaic = frames.mosaic()
        score, reasons = self._unlike(frames, mosaic, max_value, pixel_size_um)
        importance, (cells, content, sparsity) = self._choose(
            mosaic, frames.max_value, every_patch=every_patch
        )
        total = importance.size
        sd: Real | None = None
        values = np.empty(0, np.float32)
        if not content:
            reasons.append(f"blank: none of {total} patches carries content")
        else:
            x = frames.cut(cells)
            values, sd = self._patches(normalise(self.card, x, frames.max_value))
            values, sd, cells = self._finite(values, sd, cells, reasons)
        defocus = consensus.agreed(values, sd) if len(values) else None
        if self.card.curve is not None and defocus is not None:
            defocus = float(self.card.curve.of(defocus))
            values = self.card.curve.of(values).astype(np.float32)
        apart = consensus.spread(values)
        error = None
        if defocus is not None:
            raw = consensus.raw_error(sd, apart, len(values))
            error = consensus.expected_error(self.card, raw)
            reasons += consensus.doubts(
                self.card, defocus, values, sd, content=content, total=total
            )
        corners = frames.corners[cells[:, 0], cells[:, 1]]
        if frames.scale != 1:
            corners = (corners / frames.scale).round().astype(np.intp)
        return Prediction(
            defocus,
            error,
            corners,
            values,
            sd,
            importance,
            content,
            apart,
            sparsity,
            score,
            tuple(reasons),
            cells,
            round(frames.patch_px / frames.scale),
        )

    def warm(self, shape: tuple[int, ...]) -> None:
        """Run once on an empty frame, so that the first tile is no slower."""
        card = self.card
        blank = np.zeros(shape, np.uint8)
        frames = prepare(card, [blank] * card.n_looks)
        if card.importance is not None:
            self._importance(normalise(card, frames.mosaic()[None], 255.0, per_patch=False))
        cells = np.argwhere(np.ones(frames.corners.shape[:2], bool))
        k = len(cells) if card.importance is None else card.importance.k.dense
        self._patches(normalise(card, frames.cut(cells[:k]), 255.0))

    def _choose(
        self, mosaic: Real, max_value: float, *, every_patch: bool = False
    ) -> tuple[Real, tuple[Index, int, consensus.Sparsity]]:
        """Importance of the patches, and what `consensus.choose` makes of it."""
        importance, threshold = self._worth(mosaic, max_value)
        k = None
        if self.card.importance is not None and not every_patch:
            k = self.card.importance.k
        return importance, consensus.choose(importance, threshold, k)

    def _worth(self, mosaic: Real, max_value: float) -> tuple[Real, float]:
        """Importance of the patches, and from where on they carry content."""
        if self.card.importance is None:
            return consensus.content_of(mosaic), 0.5
        x = normalise(self.card, mosaic[None], max_value, per_patch=False)
        return self._importance(x), self.card.importance.threshold

    def _unlike(
        self,
        frames: Frames,
        mosaic: Real,
        max_value: float | None,
        pixel_size_um: float | None,
    ) -> tuple[float | None, list[str]]:
        """Score against the training's frames, and what is unlike them."""
        card = self.card
        reasons: list[str] = []
        unlike = "frame unlike the training data:"
        if size := card.check_pixel_size(pixel_size_um):
            reasons.append(f"{unlike} {size}")
        bits = bits_of(integer_limit(frames.looks[0]) if max_value is None else max_value)
        if card.bit_depths and bits is not None and bits not in card.bit_depths:
            trained = " or ".join(map(str, card.bit_depths))
            reasons.append(f"{unlike} {bits} bits, trained on {trained}")
        if card.ood is None:
            return None, reasons
        score, why = ood.judge(card.ood, ood.describe(mosaic, card.channels))
        return score, [*reasons, *(f"{unlike} {w}" for w in why)]

    def _finite(
        self, values: Real, sd: Real | None, cells: Index, reasons: list[str]
    ) -> tuple[Real, Real | None, Index]:
        """Bring the answers to µm and our sign, and drop what is no number."""
        out = self.card.outputs
        values = values * np.float32(out.um_per_unit * out.sign)
        good = np.isfinite(values)
        if sd is not None:
            sd = sd * np.float32(out.um_per_unit)
            good &= np.isfinite(sd) & (sd >= 0)
        if bad := len(values) - int(np.count_nonzero(good)):
            reasons.append(f"the net gave no number for {bad} of {len(values)} patches")
        return values[good], None if sd is None else sd[good], cells[good]


class OnnxModel(_PatchModel):
    """A net in an ONNX file, by ONNX Runtime.

    Parameters
    ----------
    source : Path | str | bytes
        The file, or what it holds.
    card : ModelCard | None
        None: the one beside the file, or inside it.
    providers : sequence of str | None
        ``cpu``, ``cuda``, ``directml``, ``coreml``, in the order in which they are to be
        used; None: ``cpu``.
    threads : int
        Threads of one prediction.

    Raises
    ------
    InputError
        The file is missing or damaged, has no card, is not what its checksum says, or does
        not fit its card; a provider is not there.
    """

    def __init__(
        self,
        source: Path | str | bytes,
        card: ModelCard | None = None,
        *,
        providers: Sequence[str] | None = None,
        threads: int = 1,
    ) -> None:
        self.net = OnnxNet(source, card, providers=providers, threads=threads)
        self.card = self.net.card

    def content_patches(
        self, images: Sequence[Image], most: int, *, max_value: float | None = None
    ) -> Real:
        """Patches that it would look at, ``(N, looks · channels, P, P)``, as the net sees them.

        Parameters
        ----------
        images : sequence of numpy.ndarray
            The looks, as for `predict`.
        most : int
            How many; the most important ones.
        max_value : float | None
            Value at which the camera saturates.
        """
        frames = prepare(self.card, images, max_value=max_value)
        _, (cells, _, _) = self._choose(frames.mosaic(), frames.max_value)
        return normalise(self.card, frames.cut(cells[:most]), frames.max_value)

    def _patches(self, x: Real) -> tuple[Real, Real | None]:
        return self.net.patches(x)

    def _importance(self, mosaic: Real) -> Real:
        return self.net.importance(mosaic)


class CallableModel(_PatchModel):
    """A Python function as a model.

    Parameters
    ----------
    function : callable
        ``(N, looks · channels, P, P)`` float32 (or as ``card.inputs.layout`` says) to the
        defocus ``(N,)``, or to a pair of it and its standard deviation.
    card : ModelCard | None
        None: the function's attribute ``card``.

    Raises
    ------
    InputError
        There is no card, or it names an importance net, which a function has not.
    """

    def __init__(self, function: Callable[[Real], Any], card: ModelCard | None = None) -> None:
        card = getattr(function, "card", None) if card is None else card
        if not isinstance(card, ModelCard):
            raise InputError(f"model {function!r}: has no card")
        if card.importance is not None:
            raise InputError(
                f"model {card.name!r}: importance is not allowed in the card of a function"
            )
        self.function = function
        self.card = card

    def _patches(self, x: Real) -> tuple[Real, Real | None]:
        if self.card.inputs.layout == "NHWC":
            x = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        answer = self.function(x)
        value, sd = answer if isinstance(answer, tuple) else (answer, None)
        name = self.card.name
        return (
            _flat(value, len(x), f"model {name!r}: defocus"),
            None if sd is None else _flat(sd, len(x), f"model {name!r}: sd"),
        )


def _flat(value: Any, n: int, what: str) -> Real:
    """An answer as ``(N,)`` float32."""
    array = np.asarray(value, np.float32)
    if array.shape not in {(n,), (n, 1)}:
        raise InputError(f"{what}: shape {array.shape} is not allowed: must be ({n},)")
    return array.reshape(n)
