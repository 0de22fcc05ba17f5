"""Which of two shots is the sharper one, and an image sharp all over from many planes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.metrics import brenner

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]

__all__ = ["fuse", "grey_of", "sharper_of"]

# ITU-R BT.601, as the focus measure weights colours at run time: of two shots the record of
# the run and the model are to call the same one the sharper.
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)

_REACH_PX = 3.0  # standard deviation of the neighbourhood in which sharpness is judged
_POWER = 6  # how much the sharpest plane is preferred
_NOISE = 1e-6  # of the range, squared; where all planes are flat they are averaged


def grey_of(planes: Real) -> Real:
    """Grey values ``(Y, X)`` of ``(C, Y, X)``."""
    return planes[0] if len(planes) == 1 else np.tensordot(_LUMINANCE, planes, 1)


def sharper_of(lower: Real, upper: Real) -> int:
    """Tell the sharper one of two shots by Brenner's measure.

    Parameters
    ----------
    lower, upper : numpy.ndarray
        ``(C, Y, X)`` float32.

    Returns
    -------
    int
        1: the lower one, also of two that are alike; -1: the upper one.
    """
    return 1 if brenner(grey_of(lower)) >= brenner(grey_of(upper)) else -1


def fuse(planes: Real) -> Real:
    """Extended depth of field: of each place, the planes that are sharp there.

    The energy of the Laplacian in a Gaussian neighbourhood, to the sixth power, weights the
    planes (compare Nayar and Nakagawa, *IEEE TPAMI* 16 (1994) 824–831, who take the largest
    alone): neighbouring planes that are equally sharp share the noise.

    Parameters
    ----------
    planes : numpy.ndarray
        ``(Z, C, Y, X)`` float32 in 0 … 1.

    Returns
    -------
    numpy.ndarray
        ``(C, Y, X)`` float32.

    Raises
    ------
    InputError
        Another shape.
    """
    if planes.ndim != 4 or not len(planes):
        raise InputError(f"fuse: shape {planes.shape} is not allowed: must be (Z, C, Y, X)")
    weights = np.empty((len(planes), *planes.shape[2:]), np.float32)
    for k, plane in enumerate(planes):
        grey = np.ascontiguousarray(grey_of(plane))
        edges = cv2.Laplacian(cv2.GaussianBlur(grey, (0, 0), 0.8), cv2.CV_32F, ksize=3)
        weights[k] = cv2.GaussianBlur(edges * edges, (0, 0), _REACH_PX)
    weights += _NOISE
    weights /= weights.max(0)
    weights **= _POWER
    weights /= weights.sum(0)
    return np.asarray(np.einsum("zyx,zcyx->cyx", weights, planes), np.float32)
