"""Which samples each step takes, and how fast it learns from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mm_autofocus.refocusing.running import cores

if TYPE_CHECKING:
    from mm_autofocus.training.options import TrainOptions

__all__ = ["batches_of", "learning_rate"]


def learning_rate(options: TrainOptions, part: float) -> float:
    """Learning rate when `part`, 0 … 1, of the training is done."""
    rise = options.warmup if options.schedule == "one-cycle" else min(options.warmup, 0.02)
    if options.schedule == "constant":
        return options.lr
    if part < rise:
        down = 0.5 * (1 + math.cos(math.pi * part / rise))
        return options.lr * (1 - 0.96 * down)
    fall = (part - rise) / max(1 - rise, 1e-9)
    return options.lr * (1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * min(fall, 1.0))))


def batches_of(
    source: Any,
    count: int,
    steps: Iterable[int],
    *,
    share: tuple[int, int] = (0, 1),
    workers: int | None = None,
    cuda: bool = False,
) -> DataLoader[Any]:
    """Batches of a source of samples, for these steps of the training.

    Parameters
    ----------
    source : PatchSource or MosaicSource
        Samples by number.
    count : int
        Of each process in a step.
    steps : iterable of int
        Counted from the beginning of the training.
    share : tuple of int
        ``(rank, world)``: together the processes take what one alone would take.
    workers : int | None
        Processes that read; None: by the number of cores.
    cuda : bool
        Whether they go to such a device.
    """
    rank, world = share
    numbers = [[(s * count + k) * world + rank for k in range(count)] for s in steps]
    return DataLoader(
        source,
        batch_sampler=numbers,
        num_workers=_default_workers(cuda, world) if workers is None else workers,
        pin_memory=cuda,
        collate_fn=_collate,
    )


def _default_workers(cuda: bool, world: int) -> int:
    # beside a CPU that computes, readers only get in each other's way
    return max(1, cores() // world - 1) if cuda else 0


def _collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = {key: torch.from_numpy(np.stack([s[key] for s in samples])) for key in samples[0]}
    for key in ("patches", "mosaic", "shots", "truth"):
        if key in batch:
            batch[key] = batch[key].contiguous(memory_format=torch.channels_last)
    return batch
