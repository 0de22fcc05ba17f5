"""Autofocus on a recorded z-stack: any strategy, no microscope.

`RecordedStack` stands where the microscope would: a look is the nearest recorded plane.
`replay` runs a strategy on it by the same loop as the engine does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from mm_autofocus.drive import drive
from mm_autofocus.errors import InputError
from mm_autofocus.settings import AutofocusSettings
from mm_autofocus.types import (
    FocusRequest,
    FocusResult,
    FrameFormat,
    Look,
    Prepares,
    Prior,
    Strategy,
)

if TYPE_CHECKING:
    import os

    import numpy.typing as npt

    from mm_autofocus.types import Image

__all__ = ["RecordedStack", "load_stack", "replay", "request_for"]

_MIN_PLANES = 3


class RecordedStack:
    """A recorded z-stack in the place of a microscope (a `drive.Rig`).

    The position is that of a stage that goes where it is sent; what is seen there is the
    nearest plane, and the look says the z of that plane.

    Parameters
    ----------
    stack : numpy.ndarray
        ``(Z, Y, X)`` or ``(Z, Y, X, 3)``; plane *k* was taken at ``k × step_um``.
    step_um : float
        Distance of the planes in µm, greater than 0.
    start_um : float, optional
        Where the stage stands at first; by default in the middle of the stack.
    max_value : float, optional
        Value at which the camera saturates; by default 255 for 8-bit stacks, else unknown.

    Attributes
    ----------
    z_max_um : float
        z of the last plane; that of the first is 0.

    Raises
    ------
    InputError
        The stack is not one, has fewer than three planes, or the step is not positive.
    """

    def __init__(
        self,
        stack: Image,
        step_um: float,
        start_um: float | None = None,
        max_value: float | None = None,
    ) -> None:
        self.stack = _checked(np.asarray(stack), "stack")
        if not (np.isfinite(step_um) and step_um > 0):
            raise InputError(f"step_um: {step_um} is not a distance greater than 0 µm")
        self.step_um = float(step_um)
        self.z_max_um = (len(self.stack) - 1) * self.step_um
        self.max_value = max_value
        if max_value is None and self.stack.dtype == np.uint8:
            self.max_value = 255.0
        self._z_um = self.z_max_um / 2 if start_um is None else float(start_um)

    def position_um(self) -> float:
        """Where the stage stands, in µm."""
        return self._z_um

    def move_to(self, z_um: float) -> None:
        """Send the stage to `z_um`."""
        self._z_um = float(z_um)

    def plane(self, z_um: float) -> int:
        """Index of the recorded plane nearest to `z_um`."""
        return int(np.clip(np.rint(z_um / self.step_um), 0, len(self.stack) - 1))

    def look(self) -> Look:
        """Show the nearest recorded plane."""
        k = self.plane(self._z_um)
        return Look(z_um=k * self.step_um, image=self.stack[k], max_value=self.max_value)

    def looking(self) -> AbstractContextManager[None]:
        """Nothing needs preparing."""
        return nullcontext()


def request_for(
    rig: RecordedStack,
    settings: AutofocusSettings | None = None,
    *,
    start_um: float | None = None,
    prior: Prior | None = None,
) -> FocusRequest:
    """The request that `settings` make of a recorded stack.

    Parameters
    ----------
    rig : RecordedStack
        The limits are its first and last plane, the range of the settings around the
        start, and ``z_min_um``/``z_max_um``, whichever is narrowest.
    settings : AutofocusSettings, optional
        Defaults if left out.
    start_um : float, optional
        Where the search begins; by default where `rig` stands.
    prior : Prior, optional
        Where focus is expected.

    Raises
    ------
    InputError
        The start is not in the stack, or not within the limits.
    """
    settings = settings or AutofocusSettings()
    # recorded planes are where they are, unless someone knows better
    given = "repeatability_um" in settings.model_fields_set
    start = rig.position_um() if start_um is None else float(start_um)
    if not 0 <= start <= rig.z_max_um:
        raise InputError(
            f"start_um: {start:g} is outside the recorded stack, 0 … {rig.z_max_um:g} µm"
        )
    lows = [0.0, start - settings.range_um]
    highs = [rig.z_max_um, start + settings.range_um]
    if settings.z_min_um is not None:
        lows.append(settings.z_min_um)
    if settings.z_max_um is not None:
        highs.append(settings.z_max_um)
    return FocusRequest(
        z_start_um=start,
        z_min_um=max(lows),
        z_max_um=min(highs),
        max_looks=settings.max_looks,
        tolerance_um=settings.tolerance_um,
        step_um=settings.step_um,
        optics=settings.optics(),
        prior=prior,
        z_sd_um=settings.repeatability_um if given else 0.0,
    )


def replay(
    stack: Image,
    strategy: Strategy | None = None,
    *,
    step_um: float,
    start_um: float | None = None,
    settings: AutofocusSettings | None = None,
    prior: Prior | None = None,
    on_look: Callable[[Look], None] | None = None,
) -> FocusResult:
    """Focus on a recorded stack.

    Parameters
    ----------
    stack : numpy.ndarray
        ``(Z, Y, X)`` or ``(Z, Y, X, 3)``, at least three planes.
    strategy : Strategy, optional
        Who searches; by default what `settings` ask for, escalation included.
    step_um : float
        Distance of the planes in µm; the first plane is z = 0.
    start_um : float, optional
        Where the search begins; by default in the middle of the stack.
    settings : AutofocusSettings, optional
        Range, limits, budget, tolerance, optics and backlash; defaults if left out.
    prior : Prior, optional
        Where focus is expected.
    on_look : callable, optional
        Called with each scored look.

    Returns
    -------
    FocusResult
        As from `drive`; z in µm above the first plane.

    Raises
    ------
    InputError
        Of the stack, the start or the settings.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.arange(21.0)
    >>> contrast = 100 * np.exp(-(((z - 12) / 4) ** 2))
    >>> texture = np.random.default_rng(0).normal(size=(64, 64))
    >>> result = replay(200 + contrast[:, None, None] * texture, step_um=1.0, start_um=5.0)
    >>> result.status, abs(result.z_um - 12) < 0.5
    ('ok', True)
    """
    settings = settings or AutofocusSettings()
    rig = RecordedStack(stack, step_um, start_um)
    if strategy is None:
        from mm_autofocus.strategies.escalate import build_strategy

        strategy = build_strategy(settings)
        if strategy is None:
            raise InputError(
                "strategy: 'hardware' needs a microscope; a recorded stack has none"
            )
        if isinstance(strategy, Prepares):
            shape, dtype = rig.stack.shape[1:], rig.stack.dtype.name
            strategy.prepare(FrameFormat(shape, dtype, rig.max_value, settings.optics()))
    request = request_for(rig, settings, prior=prior)
    return drive(strategy, request, rig, backlash_um=settings.backlash_um, on_look=on_look)


def load_stack(path: str | os.PathLike[str]) -> npt.NDArray[Any]:
    """Read a z-stack from a TIFF or OME-TIFF file.

    Parameters
    ----------
    path : path-like
        A file with one series of axes ZYX, or ZYX and three colours.

    Returns
    -------
    numpy.ndarray
        ``(Z, Y, X)`` or ``(Z, Y, X, 3)``, in the type of the file.

    Raises
    ------
    InputError
        One sentence: there is no such file, it is not a readable TIFF, it has other axes
        or fewer than three planes, or its pixels are no finite numbers.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "there is no such file"
        raise InputError(f"{path}: {what}")
    try:
        with _silent(tifffile.logger()), tifffile.TiffFile(path) as tif:
            if not tif.series:
                raise InputError(f"{path}: the TIFF file holds no image")
            series = tif.series[0]
            axes, stack = series.axes, series.asarray()
            # A file cut off in the middle can still have its directory; tifffile reads
            # planes that lie beyond the end as zeros, and so would hide the damage.
            _complete(tif, path)
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path}: the stack does not fit into memory") from None
    except Exception as e:  # noqa: BLE001  (a damaged file can raise anything)
        detail = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(
            f"{path}: not a readable TIFF file, or a damaged one ({detail})"
        ) from None
    return _checked(_zyx(stack, axes, path), str(path))


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """What tifffile says of a damaged file is in our own sentence."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def _complete(tif: tifffile.TiffFile, path: Path) -> None:
    size = tif.filehandle.size
    for page in tif.pages:
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            if offset + count > size:
                raise InputError(f"{path}: the file is cut off; pixels are missing at its end")


def _zyx(stack: npt.NDArray[Any], axes: str, path: Path) -> npt.NDArray[Any]:
    """Bring to ``(Z, Y, X[, 3])``, or say what the axes are instead."""
    # Axes of length 1 say nothing, unless the stack would lose its Y or X.
    keep = [
        i for i, (a, n) in enumerate(zip(axes, stack.shape, strict=True)) if n > 1 or a in "YX"
    ]
    stack = stack.reshape([stack.shape[i] for i in keep])
    axes = "".join(axes[i] for i in keep)
    # I and Q are tifffile's names for an axis that the file does not name; a time lapse
    # or a set of channels says T or C, and is not taken for a z-stack.
    if len(axes) in (3, 4) and axes[0] in "ZIQ" and axes[1:] in ("YX", "YXS"):
        return stack
    shape = " × ".join(map(str, stack.shape))
    raise InputError(
        f"{path}: a z-stack with the axes ZYX (or ZYX and RGB) is needed, not {axes} ({shape})"
    )


def _checked(stack: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    if stack.dtype.kind not in "uif":
        raise InputError(f"{where}: pixels of type {stack.dtype} are no grey values")
    if stack.ndim not in (3, 4) or (stack.ndim == 4 and stack.shape[3] != 3):
        raise InputError(
            f"{where}: a z-stack (Z, Y, X) or (Z, Y, X, 3) is needed, not the shape "
            f"{stack.shape}"
        )
    if len(stack) < _MIN_PLANES:
        raise InputError(
            f"{where}: {len(stack)} planes are too few for a z-stack; at least "
            f"{_MIN_PLANES} are needed"
        )
    if stack.size == 0:
        raise InputError(f"{where}: the stack is empty, of shape {stack.shape}")
    if stack.dtype.kind == "f" and not np.isfinite(stack).all():
        raise InputError(f"{where}: the stack holds NaN or infinite values")
    return stack
