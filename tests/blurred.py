"""A small dataset whose defocus a small net can learn in seconds, sign included.

Above focus it is blurred along x, below focus along y: the sign is the direction.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from mm_autofocus.training import Dataset
from mm_autofocus.training.recorded import add_recorded
from scipy.ndimage import gaussian_filter

PATCH = 64
NET = {"widths": [12, 24, 32], "depths": [0, 1, 1], "rin_widths": [4, 8, 8]}
OPTIONS = {
    "net": NET,
    "patch_px": PATCH,
    "batch": 32,
    "accelerator": "cpu",
    "precision": "32-true",
    "lr": 5e-3,
    "workers": 0,
    "validation_planes": 6,
    "validation_patches": 2,
    "augment": {"turns": False},  # a turn would exchange the sides of this make-believe
}


def stack(seed: int, *, size: int = 128, rgb: bool = False, focus_um: float = 0.0):
    rng = np.random.default_rng(seed)
    shape = (size, size, 3) if rgb else (size, size)
    field = gaussian_filter(rng.normal(size=shape), (1.0, 1.0, 0) if rgb else 1.0)
    field *= 35 / field.std()
    planes = []
    for z in np.arange(-8.0, 9.0):
        d = z - focus_um
        along, across = 0.15 * abs(d) + 0.35 * max(-d, 0), 0.15 * abs(d) + 0.35 * max(d, 0)
        blurred = gaussian_filter(field, (along, across, 0) if rgb else (along, across))
        planes.append(130 + blurred + rng.normal(scale=1.0, size=shape))
    return np.clip(np.rint(planes), 0, 255).astype(np.uint8)


def make_dataset(folder: Path, fields: int = 9, **kwargs) -> Dataset:
    files = []
    for k in range(fields):
        files.append(folder / f"field{k}.tif")
        focus = 0.7 * ((k % 5) - 2) / 2
        tifffile.imwrite(
            files[-1],
            stack(k, focus_um=focus, **kwargs),
            photometric="rgb" if kwargs.get("rgb") else "minisblack",
        )
    dataset, _ = add_recorded(
        files, folder / "dataset", step_um=1.0, optics={"na": 0.3, "pixel_size_um": 0.5}
    )
    dataset.split(seed=1)
    return dataset
