"""How good a net is on the validation part, during the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mm_autofocus.training.fields import Field, read_looks
from mm_autofocus.training.planes import PlaneReader

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.nets.base import DefocusNet

__all__ = ["predict_patches", "score"]

_BATCH = 64


def predict_patches(
    net: DefocusNet,
    fields: Sequence[Field],
    patches: Sequence[tuple[int, int, int, int]],
    patch_px: int,
    device: torch.device | str = "cpu",
) -> npt.NDArray[np.float32]:
    """Predict patches ``(field, set, y, x)``: ``(N, 2)`` of defocus and sd in µm."""
    reader = PlaneReader()
    out = np.empty((len(patches), 2), np.float32)
    with torch.inference_mode():
        for start in range(0, len(patches), _BATCH):
            part = patches[start : start + _BATCH]
            batch = np.stack(
                [
                    read_looks(reader, fields[i], k, y, x, patch_px, patch_px)
                    for i, k, y, x in part
                ]
            )
            tensor = torch.from_numpy(batch).to(device, memory_format=torch.channels_last)
            defocus, log_sd, _ = net(tensor)
            both = torch.stack((defocus, log_sd.exp()), 1).float().cpu().numpy()
            out[start : start + len(part)] = both
    return out


def score(
    fields: Sequence[Field],
    patches: Sequence[tuple[int, int, int, int]],
    predicted: npt.NDArray[np.float32],
) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """Figures of predicted patches, and of the frames that they make by their median.

    Returns
    -------
    figures : dict
        ``mae_um``, ``median_um``, ``dss`` (share of right signs; 0 is right) and
        ``frames`` of the frames, ``patch_mae_um``, ``patch_dss`` and ``patches`` of single
        patches.
    frames : numpy.ndarray
        ``(F, 5)``: field, set, label, prediction, median sd of the patches.
    """
    labels = np.array([fields[i].defocus_um[k] for i, k, _, _ in patches])
    at = np.array([(i, k) for i, k, _, _ in patches])
    _, frame = np.unique(at, axis=0, return_inverse=True)
    frame = frame.ravel()
    rows = []
    for f in range(frame.max() + 1):
        mine = frame == f
        i, k = at[mine][0]
        middle = np.median(predicted[mine], axis=0)
        rows.append((i, k, labels[mine][0], middle[0], middle[1]))
    frames = np.array(rows, float)
    error = np.abs(frames[:, 3] - frames[:, 2])
    patch_error = np.abs(predicted[:, 0] - labels)
    figures = {
        "mae_um": float(error.mean()),
        "median_um": float(np.median(error)),
        "dss": _dss(frames[:, 3], frames[:, 2]),
        "frames": len(frames),
        "patch_mae_um": float(patch_error.mean()),
        "patch_dss": _dss(predicted[:, 0], labels),
        "patches": len(patches),
    }
    return figures, frames


def _dss(predicted: npt.NDArray[Any], label: npt.NDArray[Any]) -> float:
    return float(np.mean((np.sign(predicted) == np.sign(label)) | (label == 0)))
