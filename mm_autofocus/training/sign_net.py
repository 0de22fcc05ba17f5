"""A small convolutional net that says on which side of focus an image was taken.

It is trained within seconds on one thread, tells whether something is there to be learned,
and is thrown away. torch is imported here; import this module where it is needed only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    import numpy.typing as npt

    Real: TypeAlias = npt.NDArray[np.float32]
    Batch: TypeAlias = tuple[Real, Real]

__all__ = ["SignNet", "fit", "predict", "quiet_torch"]

_RATE = 4e-3
_LEARNT = 0.03  # loss, averaged over some twenty batches, at which nothing is left to learn
_LEAST_STEPS = 60


class SignNet(nn.Module):
    """Five convolutions, largest value and mean of each feature, one number.

    Parameters
    ----------
    channels : int
        Of all looks together.
    width : int
        Features of the first convolution.
    """

    def __init__(self, channels: int, width: int = 12) -> None:
        super().__init__()
        sizes = (
            (channels, width, 5, 2),
            (width, 2 * width, 3, 2),
            (2 * width, 2 * width, 3, 1),
            (2 * width, 3 * width, 3, 2),
            (3 * width, 3 * width, 3, 1),
        )
        layers: list[nn.Module] = []
        for before, after, kernel, stride in sizes:
            conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(6 * width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logit ``(N,)`` of "above focus" for images ``(N, C, Y, X)``."""
        f = self.features(x)
        both = torch.cat([f.amax((2, 3)), f.mean((2, 3))], dim=1)
        logit: torch.Tensor = self.head(both)[:, 0]
        return logit


@contextmanager
def quiet_torch(seed: int) -> Iterator[None]:
    """One thread and a seed of its own; both are given back.

    Two threads that wait for each other on a busy computer take many times as long as one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def fit(draw: Callable[[], Batch], channels: int, steps: int) -> SignNet:
    """Train a net.

    Parameters
    ----------
    draw : callable
        Gives the next batch: images ``(N, C, Y, X)`` and 1 (above focus) or 0, ``(N,)``.
    channels : int
        Of the images.
    steps : int
        Batches at most; ended earlier where the loss is as good as nothing.

    Returns
    -------
    SignNet
        Ready for `predict`.
    """
    net = SignNet(channels)
    optimiser = torch.optim.AdamW(net.parameters(), _RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps)
    loss_of = nn.BCEWithLogitsLoss()
    smooth = 0.7
    net.train()
    for step in range(steps):
        x, y = draw()
        loss = loss_of(net(torch.from_numpy(x)), torch.from_numpy(y))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        smooth += 0.05 * (float(loss.detach()) - smooth)
        if step >= _LEAST_STEPS and smooth < _LEARNT:
            break
    return net


def predict(net: SignNet, x: Real, batch: int = 64) -> npt.NDArray[np.float64]:
    """Logits ``(N,)`` of "above focus" for images ``(N, C, Y, X)``."""
    net.eval()
    with torch.inference_mode():
        parts = [
            net(torch.from_numpy(x[k : k + batch])).numpy() for k in range(0, len(x), batch)
        ]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)
