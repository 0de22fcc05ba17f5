"""Models that recover the sharp image from two shots, at work on frames of any size.

ONNX Runtime only; torch is never imported here. A frame goes through the net in tiles with a
margin (the halo of the card) that is thrown away: every part of these nets is local, so the
tiles meet without a seam, and the result is that of the whole frame at once within rounding.
Only one tile at a time is floats; the frames stay as the camera gave them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.metrics import brenner
from mm_autofocus.models import ood
from mm_autofocus.models.card import Shots
from mm_autofocus.models.consensus import weighted_median
from mm_autofocus.models.frames import Frames, saturation
from mm_autofocus.models.fusion import grey_of
from mm_autofocus.models.onnx_net import OnnxFile
from mm_autofocus.models.patches import grid

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.types import Image

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["TILE_PX", "Recovery", "RefocusModel", "Tile", "tiles"]

TILE_PX = 512
"""Edge of what is recovered in one run of the net; the halo comes on top."""

_INPUT, _SIDE, _HALF = "shots", "side", "half_um"
_DTYPES = ("uint8", "uint16", "float32")
_STRIP_PX = 256  # rows that are measured at once
# What a stage makes of ΔD: a few nanometres do not matter.
_HALF_OFF_UM = 0.05


@dataclass(frozen=True, slots=True)
class Tile:
    """A part of a frame: what is read, and what of it is kept.

    Attributes
    ----------
    y, x, height, width : int
        Of the part that is read.
    keep : tuple of slice
        Rows and columns that are kept, in the tile.
    at : tuple of slice
        Where these lie in the frame.
    """

    y: int
    x: int
    height: int
    width: int
    keep: tuple[slice, slice]
    at: tuple[slice, slice]


def tiles(shape: tuple[int, int], tile_px: int, halo_px: int, multiple: int) -> Iterator[Tile]:
    """Cut a frame ``(Y, X)`` into tiles with a halo.

    At the edge of the frame a tile ends where the frame ends: the net then sees there what
    it would see of the whole frame. All corners are multiples of `multiple`, so that the
    steps of the net fall on the same pixels.
    """
    step = max(multiple, tile_px // multiple * multiple)
    halo = -(-halo_px // multiple) * multiple
    height, width = shape
    for y in range(0, height, step):
        for x in range(0, width, step):
            low = (max(y - halo, 0), max(x - halo, 0))
            end = (min(y + step, height), min(x + step, width))
            high = (min(end[0] + halo, height), min(end[1] + halo, width))
            yield Tile(
                low[0],
                low[1],
                high[0] - low[0],
                high[1] - low[1],
                (slice(y - low[0], end[0] - low[0]), slice(x - low[1], end[1] - low[1])),
                (slice(y, end[0]), slice(x, end[1])),
            )


@dataclass(frozen=True, slots=True)
class Recovery:
    """What came of two shots.

    Attributes
    ----------
    image : numpy.ndarray
        The sharp image, of the shape and type of a shot.
    sharper : {0, 1}
        Which shot is the sharper one (Brenner): 0 the lower, 1 the upper.
    focus_um : float | None
        z of focus relative to the middle of the shots, positive above it; None: the model
        does not tell, or ΔD is not known.
    focus_sd_um : float | None
        Its standard deviation.
    ood : float | None
        How unlike the training's frames the shots look; 1 is the limit. None: not known.
    reasons : tuple of str
        Why not to trust it, one clause each; empty if there is no reason.
    """

    image: Image
    sharper: int
    focus_um: float | None
    focus_sd_um: float | None
    ood: float | None
    reasons: tuple[str, ...]

    @property
    def trusted(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


class RefocusModel(OnnxFile):
    """A net that recovers the sharp image, in an ONNX file.

    Parameters and errors are those of `mm_autofocus.models.onnx_net.OnnxFile`; a model for
    another task is refused, too.
    """

    def _bind(self) -> None:
        """Find what the card names."""
        self._check_task("refocus")
        inputs = [i.name for i in self._session.get_inputs()]
        outputs = [o.name for o in self._session.get_outputs()]
        shots = self.shots
        self._check_names({"shots": _INPUT}, inputs, "input")
        self._check_names(
            {
                "shots.image": shots.image,
                "shots.toward": shots.toward,
                "shots.toward_sd": shots.toward_sd,
            },
            outputs,
            "output",
        )
        self._told = [name for name in (_SIDE, _HALF) if name in inputs]
        if unknown := set(inputs) - {_INPUT, _SIDE, _HALF}:
            raise InputError(
                f"{self.what}: the net has an input {min(unknown)!r} of which its card says "
                "nothing"
            )

    @property
    def shots(self) -> Shots:
        """The part of the card that is about shots."""
        return cast("Shots", self.card.shots)

    def check(
        self,
        shape: tuple[int, ...],
        *,
        half_um: float | None,
        max_value: float | None = None,
        pixel_size_um: float | None = None,
    ) -> None:
        """Refuse shots that the model cannot be shown.

        Parameters
        ----------
        shape : tuple of int
            ``(Y, X)`` or ``(Y, X, 3)`` of a shot.
        half_um : float | None
            Half of their distance (ΔD); None: not known.
        max_value : float | None
            Value at which the camera saturates.
        pixel_size_um : float | None
            In the specimen.

        Raises
        ------
        InputError
            Wrong channels, another bit depth or pixel size, ΔD out of range.
        """
        self.card.check_camera(shape, max_value=max_value, pixel_size_um=pixel_size_um)
        if half_um is not None and (why := self.why_not_half(half_um)):
            raise InputError(f"model {self.card.name!r}: {why}")

    def check_type(self, dtype: str) -> None:
        """Raise `InputError` for pixels that no camera of ours gives."""
        if dtype not in _DTYPES:
            raise InputError(
                f"model {self.card.name!r}: frames of {dtype} are not allowed: must be "
                f"{', '.join(_DTYPES)}"
            )

    def why_not_half(self, half_um: float) -> str:
        """Return why shots this far from their middle do not fit; ``""`` if they do."""
        low, high = self.shots.half_um
        if low - _HALF_OFF_UM <= half_um <= high + _HALF_OFF_UM:
            return ""
        return (
            f"shots ± {half_um:g} µm from their middle are not allowed: it was trained on "
            f"{low:g} … {high:g} µm"
        )

    def recover(
        self,
        lower: Image,
        upper: Image,
        *,
        half_um: float | None = None,
        max_value: float | None = None,
        pixel_size_um: float | None = None,
        tile_px: int = TILE_PX,
    ) -> Recovery:
        """Recover the sharp image.

        Parameters
        ----------
        lower, upper : numpy.ndarray
            ``(Y, X)`` or ``(Y, X, 3)``, uint8, uint16 or float32, at F - ΔD and F + ΔD.
        half_um : float | None
            ΔD. Beyond the model's range it is a reason not to trust the image. None: not known;
            a net that asks for it is told the middle of that range, and where focus lies is
            not said.
        max_value : float | None
            Value at which the camera saturates; None: the largest of the integer type.
        pixel_size_um : float | None
            In the specimen; None: taken as the model's.
        tile_px : int
            Edge of a tile, without the halo.

        Returns
        -------
        Recovery

        Raises
        ------
        InputError
            As `check`; the shots differ in shape or type, or hold what are no numbers.
        """
        if lower.shape != upper.shape or lower.dtype != upper.dtype:
            raise InputError(
                f"shots of {lower.shape} {lower.dtype} and {upper.shape} {upper.dtype} are not "
                "allowed: both must be alike"
            )
        self.check_type(lower.dtype.name)
        limit = saturation(lower, max_value)
        self.check(lower.shape, half_um=None, max_value=max_value, pixel_size_um=pixel_size_um)
        side = 1 if _sharpness(lower, limit) >= _sharpness(upper, limit) else -1
        both = (lower, upper) if side > 0 else (upper, lower)
        score, reasons = self._unlike(both, limit)
        if half_um is not None and (why := self.why_not_half(half_um)):
            reasons.append(why)
        half = float(np.mean(self.shots.half_um)) if half_um is None else half_um
        known = [np.array([v], np.float32) for v in (side, half)]
        # a net that wants to know ΔD, and does not, has nothing to say of where focus is
        silenced = half_um is None and _HALF in self._told
        image = np.empty_like(lower)
        told: list[tuple[Real, Real]] = []
        silent = False
        halo, multiple = self.shots.halo_px, self.shots.multiple
        for tile in tiles(lower.shape[:2], tile_px, halo, multiple):
            window = (
                slice(tile.y, tile.y + tile.height),
                slice(tile.x, tile.x + tile.width),
            )
            part = np.concatenate(
                [_channels_first(s[window], limit) for s in both[: self.shots.count]]
            )
            found, toward, sd = self.run(part[None], *known)
            kept = found[0][(slice(None), *tile.keep)]
            if np.isfinite(kept).all():
                image[tile.at] = _as_frame(kept, limit, image.dtype)
            else:
                image[tile.at], silent = both[0][tile.at], True
            if toward is not None and sd is not None and not silenced:
                cells = _cells(tile, toward.shape[1:], multiple)
                told.append((toward[0][cells].ravel(), sd[0][cells].ravel()))
        if silent:
            reasons.append(
                "the net gave no number for the image; the sharper shot is kept there"
            )
        focus, sd_um = self._focus(told, side, half_um, reasons)
        return Recovery(image, 0 if side > 0 else 1, focus, sd_um, score, tuple(reasons))

    def run(
        self, shots: Real, side: Real, half_um: Real
    ) -> tuple[Real, Real | None, Real | None]:
        """Run the net once.

        Parameters
        ----------
        shots : numpy.ndarray
            ``(N, count · C, H, W)`` float32 in 0 … 1, the sharper one first; any size.
        side : numpy.ndarray
            ``(N,)`` float32: 1 where the sharper shot is the lower one, else -1.
        half_um : numpy.ndarray
            ``(N,)`` float32: half of their distance.

        Returns
        -------
        image : numpy.ndarray
            ``(N, C, H, W)`` float32.
        toward, sd : numpy.ndarray | None
            See `mm_autofocus.models.card_parts.Shots`, ``sd_scale`` applied.
        """
        n, _, height, width = shots.shape
        m = self.shots.multiple
        below, right = -height % m, -width % m
        if below or right:
            shots = np.pad(shots, ((0, 0), (0, 0), (0, below), (0, right)), mode="edge")
        feeds: dict[str, Real] = {_INPUT: np.ascontiguousarray(shots)}
        feeds |= {k: v for k, v in ((_SIDE, side), (_HALF, half_um)) if k in self._told}
        rule = self.shots
        names = [x for x in (rule.image, rule.toward, rule.toward_sd) if x is not None]
        out = dict(zip(names, self._run(names, feeds), strict=True))
        image = np.asarray(out[rule.image], np.float32)
        if image.shape != (n, self.card.channels, height + below, width + right):
            raise InputError(
                f"{self.what}: output {rule.image!r} has the shape {image.shape}, which is "
                "not allowed: must be that of a shot"
            )
        toward = None if rule.toward is None else np.asarray(out[rule.toward], np.float32)
        sd = None
        if rule.toward_sd is not None:
            sd = np.asarray(out[rule.toward_sd], np.float32) * np.float32(rule.sd_scale)
        return image[..., :height, :width], toward, sd

    def warm(self, shape: tuple[int, ...]) -> None:
        """Run once on a tile of an empty frame ``(Y, X[, 3])``."""
        size = [min(s, TILE_PX) for s in shape[:2]]
        one = np.ones(1, np.float32)
        self.run(np.zeros((1, self.card.planes, *size), np.float32), one, one)

    def _unlike(
        self, shots: tuple[Image, Image], limit: float
    ) -> tuple[float | None, list[str]]:
        """Score against the training's frames, and what is unlike them."""
        card, shape = self.card, shots[0].shape
        if card.ood is None or min(shape[:2]) < card.patch_px:
            return None, []
        frames = Frames(shots, limit, grid(shape, card.patch_px), card.patch_px)
        score, why = ood.judge(card.ood, ood.describe(frames.mosaic(), card.channels))
        return score, [f"shots unlike the training data: {w}" for w in why]

    def _focus(
        self,
        told: list[tuple[Real, Real]],
        side: int,
        half_um: float | None,
        reasons: list[str],
    ) -> tuple[float | None, float | None]:
        """Where focus lies relative to the middle; a reason where it is not enclosed.

        The median of all places, weighted by how sure the net is of each.
        """
        if not told:
            return None, None
        toward, sd = (np.concatenate(part) for part in zip(*told, strict=True))
        good = np.isfinite(toward) & np.isfinite(sd) & (sd > 0)
        if not good.any():
            reasons.append("the net gave no number for the distance to focus")
            return None, None
        middle, error = summary(toward[good], sd[good])
        if middle + error < 0:
            reasons.append(
                f"the shots do not enclose the focus: it lies {-middle:.1f} ± {error:.1f} µm "
                f"beyond the {'lower' if side > 0 else 'upper'} one"
            )
        if half_um is None:
            return None, None
        return side * (middle - half_um), error


def summary(toward: Real, sd: Real) -> tuple[float, float]:
    """Median of places, weighted by their variance's inverse, and its standard deviation.

    Neighbouring places see the same specimen and err together: to have many of them makes
    the error no smaller than that of a good one.
    """
    weights = 1 / np.square(sd.astype(np.float64))
    return weighted_median(toward, weights), weighted_median(sd, weights)


def _sharpness(shot: Image, limit: float) -> float:
    """Brenner's measure of the grey values, strip by strip."""
    total = 0.0
    for y in range(0, len(shot), _STRIP_PX):
        grey = grey_of(_channels_first(shot[y : y + _STRIP_PX], limit))
        total += len(grey) * brenner(grey)
    return total / len(shot)


def _cells(tile: Tile, told: tuple[int, ...], multiple: int) -> tuple[slice, slice]:
    """The part of a map of a tile, at whatever resolution, that belongs to what is kept."""
    rows, columns = (
        slice(keep.start * n // padded, -(-keep.stop * n // padded))
        for keep, n, padded in zip(
            tile.keep,
            told,
            (size + -size % multiple for size in (tile.height, tile.width)),
            strict=True,
        )
    )
    return rows, columns


def _channels_first(shot: Image, limit: float) -> Real:
    """``(C, Y, X)`` float32 in 0 … 1."""
    planes: Any = shot[None] if shot.ndim == 2 else shot.transpose(2, 0, 1)
    return np.asarray(np.multiply(planes, np.float32(1 / limit), dtype=np.float32))


def _as_frame(image: Real, limit: float, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Values as the camera would give them, ``(Y, X[, 3])``."""
    values = np.clip(image, 0, 1) * np.float32(limit)
    if dtype.kind in "iu":
        values = np.rint(values)
    frame = values[0] if len(values) == 1 else values.transpose(1, 2, 0)
    return frame.astype(dtype)
