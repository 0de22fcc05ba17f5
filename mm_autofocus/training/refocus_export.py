"""What the export of a net that recovers the sharp image does differently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models import ood
from mm_autofocus.models.card import ModelCard, Shots
from mm_autofocus.models.patches import mosaic
from mm_autofocus.models.refocus import RefocusModel, summary
from mm_autofocus.training.graph import write_graph
from mm_autofocus.training.pairs import Truths, decibels, draw_pair, read_pair, validation_pairs

if TYPE_CHECKING:
    from mm_autofocus.models.nets.base import NetContext
    from mm_autofocus.models.nets.refocus import RefocusNet
    from mm_autofocus.training.dataset import Dataset
    from mm_autofocus.training.fields import Field
    from mm_autofocus.training.options import PairOptions, TrainOptions

__all__ = ["finish_refocus", "write_refocus"]

_PARITY = 2e-4  # largest difference from torch: a twentieth of a grey level of 8 bits
_PARITY_PAIRS = 8
_WITHIN = 0.6827  # of errors lie within one standard deviation
_LEAST = 12  # pairs, to say anything of their errors


def finish_refocus(
    net: RefocusNet,
    card: ModelCard,
    path: Path,
    learned: list[Field],
    checked: list[Field],
    context: NetContext,
    options: TrainOptions,
    run: Path,
    data: Dataset,
    frames: int,
    half: bool,
) -> tuple[ModelCard, Callable[[ModelCard], None], dict[str, float]]:
    """Card with its calibration, how to write the file, and what parity was found.

    Raises
    ------
    InputError
        The graph does not answer as torch does.
    """
    assert context.half_um is not None
    shots = Shots(
        count=2 if net.shots > 1 else 1,
        half_um=context.half_um,
        halo_px=net.halo_px,
        multiple=net.multiple,
    )
    card = card.model_copy(update={"shots": shots})
    write_refocus(net, card, path, half=half)
    model = RefocusModel(path)
    truths = Truths(checked, options.pairs.truth, run / "fusion")
    looked_at = validation_pairs(
        checked,
        options.pairs,
        context.patch_px,
        per_field=max(1, frames // max(len(checked), 1)),
        most=frames,
    )
    parity = _parity(net, model, checked, looked_at, context)
    figures, scale = _judge(model, checked, truths, looked_at, context)
    simulated = any(map(data.is_simulated, data.part("validation")))
    kind = "simulated" if simulated else "recorded"
    metrics = {
        "validation": {
            "data": f"validation part of {data.path.name}, {kind}, patches of "
            f"{context.patch_px} px, truth: {options.pairs.truth}, a recorded frame",
            "simulated": simulated,
            **figures,
        },
        "parity": parity,
        "size_mb": round(path.stat().st_size / 1e6, 3),
    }
    card = card.model_copy(
        update={
            "shots": shots.model_copy(update={"sd_scale": scale}),
            "ood": _fit_ood(learned, options.pairs, context.patch_px, frames),
            "metrics": metrics,
        }
    )
    return card, lambda final: write_refocus(net, final, path, half=half), {"parity": parity}


def write_refocus(net: RefocusNet, card: ModelCard, path: Path, *, half: bool = False) -> None:
    """Write a net with its card, not sealed; see `mm_autofocus.models.card_parts.Shots`."""
    import torch
    from torch import Tensor, nn

    class Graph(nn.Module):
        """The net as the run time sees it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, shots: Tensor, side: Tensor, half_um: Tensor) -> Any:
            image, toward, log_sd = self.net(shots, side, half_um)
            return image, toward, log_sd.exp()

    edge = 8 * net.multiple
    # not square, and more than one: nothing of it must be taken for fixed
    inputs = (torch.rand(2, card.planes, edge, 2 * edge), torch.ones(2), torch.ones(2))
    outputs = ["image", "toward", "toward_sd"]
    axes = {n: {0: "frames", 2: "height", 3: "width"} for n in ("shots", "image")}
    axes |= {n: {0: "frames", 1: "rows", 2: "columns"} for n in outputs[1:]}
    axes |= {"side": {0: "frames"}, "half_um": {0: "frames"}}
    names = ["shots", "side", "half_um"]
    write_graph(
        Graph().eval().float().cpu(), inputs, names, outputs, axes, card, path, half=half
    )


def _parity(
    net: RefocusNet,
    model: RefocusModel,
    fields: Sequence[Field],
    pairs: Sequence[Any],
    context: NetContext,
) -> float:
    """Largest difference between the graph and torch on real shots, in parts of the range.

    Raises
    ------
    InputError
        It is too large.
    """
    import torch

    from mm_autofocus.training.planes import PlaneReader

    reader, p, worst = PlaneReader(), context.patch_px, 0.0
    for pair, y, x in pairs[:_PARITY_PAIRS]:
        shots, side = read_pair(reader, fields[pair.field], pair, y, x, p, p)
        given = np.ascontiguousarray(shots[None, : model.card.planes])
        sides, half = np.array([side], np.float32), np.array([pair.half_um], np.float32)
        with torch.inference_mode():
            known = (torch.from_numpy(v) for v in (given, sides, half))
            by_torch = net.float().eval()(*known)
        image, toward, _ = model.run(given, sides, half)
        worst = max(worst, float(np.abs(image - by_torch.image.numpy()).max()))
        if toward is not None:
            far = float(np.abs(toward - by_torch.toward.numpy()).max())
            worst = max(worst, 0.01 * far)  # a hundredth of a µm weighs as a tenth of a grey
    if not worst <= _PARITY:
        raise InputError(
            f"export: the graph differs from torch by {worst:.3g} of the range on real shots; "
            f"at most {_PARITY:g} is allowed"
        )
    return float(f"{worst:.3g}")


def _judge(
    model: RefocusModel,
    fields: Sequence[Field],
    truths: Truths,
    pairs: Sequence[Any],
    context: NetContext,
) -> tuple[dict[str, Any], float]:
    """Figures for the card, and by what the standard deviation of the focus is off."""
    p, c = context.patch_px, context.channels
    before: list[float] = []
    after: list[float] = []
    error: list[float] = []
    said: list[float] = []
    for pair, y, x in pairs:
        shots, side = read_pair(truths.reader, fields[pair.field], pair, y, x, p, p)
        truth = truths.crop(pair, y, x, p, p)
        given = np.ascontiguousarray(shots[None, : model.card.planes])
        known = (np.array([v], np.float32) for v in (side, pair.half_um))
        image, toward, sd = model.run(given, *known)
        for found, of in ((before, shots[:c]), (after, image[0].clip(0, 1))):
            found.append(float(decibels(float(np.square(of - truth).mean()))))
        if toward is not None and sd is not None:
            middle, typical = summary(toward.ravel(), sd.ravel())
            error.append(abs(middle - pair.toward_um(side)))
            said.append(typical)
    figures: dict[str, Any] = {
        "pairs": len(pairs),
        "psnr_db": round(float(np.mean(after)), 3),
        "psnr_identity_db": round(float(np.mean(before)), 3),
    }
    if len(error) < _LEAST:
        return figures, 1.0
    figures["toward_mae_um"] = round(float(np.mean(error)), 4)
    scale = float(np.quantile(np.array(error) / np.maximum(said, 1e-6), _WITHIN))
    return figures, float(f"{max(scale, 1e-3):.4g}")


def _fit_ood(
    fields: Sequence[Field], options: PairOptions, patch_px: int, frames: int
) -> ood.OodStats | None:
    """What shots of the training look like; None of too few."""
    from mm_autofocus.training.planes import PlaneReader

    reader = PlaneReader()
    rows, groups = [], []
    per = max(1, frames // max(len(fields), 1))
    step = max(1, len(fields) // frames)
    for i, of in list(enumerate(fields))[::step]:
        rng = np.random.default_rng([i, 11])
        for _ in range(per):
            pair = draw_pair(of.stack, options, rng, i)
            shots, _ = read_pair(reader, of, pair, 0, 0, *of.stack.shape[1:3])
            found = ood.describe(mosaic(shots, patch_px), 3 if of.stack.is_rgb else 1)
            rows += list(found)
            groups += [of.stack.key] * len(found)
    if len(rows) < ood.LEAST_FRAMES:
        return None
    return ood.OodStats.fit(np.array(rows), groups)
