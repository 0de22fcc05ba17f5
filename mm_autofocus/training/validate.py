"""How good a net is on the validation part, during the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch

from mm_autofocus.models.consensus import agreed
from mm_autofocus.training.fields import Field, read_looks
from mm_autofocus.training.pairs import Pair, Truths, decibels, read_pair
from mm_autofocus.training.planes import PlaneReader

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.nets.base import DefocusNet, Net
    from mm_autofocus.models.nets.refocus import RefocusNet

__all__ = ["DefocusValidation", "RefocusValidation", "Validation", "predict_patches", "score"]

_BATCH = 64
_PAIRS = 4  # their images are large, and few numbers are kept of them


class Validation(Protocol):
    """What a training is judged by after each epoch.

    Attributes
    ----------
    fields : sequence of Field
        Of the validation part.
    items : sequence
        What is looked at.
    """

    fields: Sequence[Field]

    @property
    def items(self) -> Sequence[Any]:
        """What is looked at."""
        ...

    def predict(
        self, net: Net, numbers: Sequence[int], device: torch.device
    ) -> npt.NDArray[np.float32]:
        """What the net makes of these items, ``(n, columns)``."""
        ...

    def score(
        self, predicted: npt.NDArray[np.float32]
    ) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
        """Figures of all items, and the rows that the report is made of."""
        ...

    def worth(self, figures: dict[str, Any]) -> float:
        """The number by which epochs are compared; smaller is better."""
        ...

    def line(self, figures: dict[str, Any]) -> str:
        """The figures in a few words."""
        ...


class DefocusValidation:
    """Patches at known defocus; by the mean absolute error of frames.

    Parameters
    ----------
    fields : sequence of Field
    patches : sequence of tuple
        ``(field, set, y, x)``.
    patch_px : int
    """

    def __init__(
        self,
        fields: Sequence[Field],
        patches: Sequence[tuple[int, int, int, int]],
        patch_px: int,
    ) -> None:
        self.fields, self.items, self.patch_px = fields, patches, patch_px

    def predict(
        self, net: Net, numbers: Sequence[int], device: torch.device
    ) -> npt.NDArray[np.float32]:
        """``(n, 2)`` of defocus and sd."""
        own = [self.items[i] for i in numbers]
        return predict_patches(cast("DefocusNet", net), self.fields, own, self.patch_px, device)

    def score(
        self, predicted: npt.NDArray[np.float32]
    ) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
        """See the function `score`."""
        return score(self.fields, self.items, predicted)

    def worth(self, figures: dict[str, Any]) -> float:
        """Mean absolute error of frames."""
        return float(figures["mae_um"])

    def line(self, figures: dict[str, Any]) -> str:
        """The figures in a few words."""
        v = figures
        return (
            f"MAE {v['mae_um']:.3f} µm  DSS {100 * v['dss']:.2f} %  (patches "
            f"{v['patch_mae_um']:.3f} µm)"
        )


class RefocusValidation:
    """Pairs of shots with their truth; by the mean PSNR of what is recovered.

    Parameters
    ----------
    fields : sequence of Field
    truths : Truths
        Of these fields.
    pairs : sequence of tuple
        ``(pair, y, x)``.
    patch_px : int
    """

    def __init__(
        self,
        fields: Sequence[Field],
        truths: Truths,
        pairs: Sequence[tuple[Pair, int, int]],
        patch_px: int,
    ) -> None:
        self.fields, self.truths, self.items = fields, truths, pairs
        self.patch_px = patch_px

    def predict(
        self, net: Net, numbers: Sequence[int], device: torch.device
    ) -> npt.NDArray[np.float32]:
        """``(n, 5)``: mean square of the sharper shot and of the recovered image.

        After these two: the distance to focus by the net, its sd, and the true one.
        """
        net = cast("RefocusNet", net)
        p, c = self.patch_px, net.context.channels
        out = np.empty((len(numbers), 5), np.float32)
        with torch.inference_mode():
            for start in range(0, len(numbers), _PAIRS):
                some = [self.items[i] for i in numbers[start : start + _PAIRS]]
                reader = self.truths.reader
                read = [
                    read_pair(reader, self.fields[q.field], q, y, x, p, p) for q, y, x in some
                ]
                shots = np.stack([s for s, _ in read])
                sides = np.array([side for _, side in read], np.float32)
                truth = np.stack([self.truths.crop(q, y, x, p, p) for q, y, x in some])
                tensor = torch.from_numpy(shots[:, : net.shots * c]).to(
                    device, memory_format=torch.channels_last
                )
                halves = np.array([q.half_um for q, _, _ in some], np.float32)
                known = (torch.from_numpy(v).to(device) for v in (sides, halves))
                found = net(tensor, *known)
                image = found.image.float().cpu().numpy().clip(0, 1)
                rows = out[start : start + len(some)]
                rows[:, 0] = np.square(shots[:, :c] - truth).mean((1, 2, 3))
                rows[:, 1] = np.square(image - truth).mean((1, 2, 3))
                toward = found.toward.float().flatten(1)
                rows[:, 2] = toward.median(1).values.cpu().numpy()
                rows[:, 3] = (
                    found.log_sd.float().flatten(1).median(1).values.exp().cpu().numpy()
                )
                rows[:, 4] = [
                    q.toward_um(int(s)) for (q, _, _), s in zip(some, sides, strict=True)
                ]
        return out

    def score(
        self, predicted: npt.NDArray[np.float32]
    ) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
        """Figures, and rows ``(n, 8)``: field, half distance, middle, and what `predict` says.

        ``psnr_db`` and ``identity_db`` are means over the pairs, of the recovered image and
        of the sharper shot as it is; ``toward_mae_um`` of the distance to focus.
        """
        rows = np.array(
            [(q.field, q.half_um, q.middle_um) for q, _, _ in self.items], np.float64
        )
        rows = np.concatenate((rows, predicted), 1)
        before, after = decibels(rows[:, 3]), decibels(rows[:, 4])
        figures = {
            "psnr_db": float(after.mean()),
            "identity_db": float(before.mean()),
            "gain_db": float((after - before).mean()),
            "worse": float(np.mean(after < before)),
            "toward_mae_um": float(np.abs(rows[:, 5] - rows[:, 7]).mean()),
            "pairs": len(rows),
        }
        return figures, rows

    def worth(self, figures: dict[str, Any]) -> float:
        """The mean PSNR, reversed."""
        return -float(figures["psnr_db"])

    def line(self, figures: dict[str, Any]) -> str:
        """The figures in a few words."""
        v = figures
        return (
            f"PSNR {v['psnr_db']:.2f} dB, {v['gain_db']:+.2f} dB over the sharper shot  "
            f"(focus {v['toward_mae_um']:.2f} µm)"
        )


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
    """Figures of predicted patches, and of the frames that they make together.

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
        defocus, sd = predicted[mine].T
        rows.append((i, k, labels[mine][0], agreed(defocus, sd), float(np.median(sd))))
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
