"""``mm-autofocus export``: a run becomes one ONNX file with its card inside."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.card import (
    ErrorModel,
    Importance,
    LensInput,
    ModelCard,
    Outputs,
    Shots,
)
from mm_autofocus.models.nets import need_torch
from mm_autofocus.models.refocus import RefocusModel
from mm_autofocus.models.runtime import OnnxModel
from mm_autofocus.models.sealing import seal
from mm_autofocus.training.dataset import Dataset
from mm_autofocus.training.error_fit import Seen, fit_errors, fit_ood, look_at
from mm_autofocus.training.graph import write_graph
from mm_autofocus.training.importance import content_maps
from mm_autofocus.training.options import TrainOptions, read_options, read_options_file
from mm_autofocus.training.planes import PlaneReader
from mm_autofocus.training.refocus_export import finish_refocus
from mm_autofocus.training.samples import Field, fields_of, read_looks, validation_patches

if TYPE_CHECKING:
    from collections.abc import Callable

    from mm_autofocus.models.nets.base import DefocusNet, NetContext

__all__ = ["export", "write_onnx"]

_PARITY = 1e-3  # largest difference from torch, in parts of the trained range
_PARITY_SD = 0.25  # or, of a patch that leaves the net unsure, in parts of its sd
_PARITY_PATCHES = 64
# of the validation part, shown whole: a focus net reads a few patches of each, one that
# recovers images all of it
_FRAMES = {"defocus": 960, "refocus": 240}


def export(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dataset: str | os.PathLike[str] | None = None,
    name: str | None = None,
    keep: str = "best",
    licence: str = "not stated",
    pixel_tolerance: float = 0.1,
    overwrite: bool = False,
    frames: int | None = None,
    half_weights: bool = False,
) -> dict[str, Any]:
    """Export a run.

    Parameters
    ----------
    run : path
        Folder that ``mm-autofocus train`` wrote.
    output : path
        ``*.onnx`` to write.
    dataset : path, optional
        Where the dataset is; default: where it was.
    name : str, optional
        Of the model; default: that of the file.
    keep : {"best", "last"}
        Which weights.
    licence : str
        Of the data, as the card states it.
    pixel_tolerance : float
        Relative difference in pixel size that the model is to bear.
    overwrite : bool
        Whether an existing file may be replaced.
    frames : int, optional
        Of the validation part, for the calibration; as many of the training for what is
        usual. Default: 960, or 240 pairs where images are recovered.
    half_weights : bool
        Store large weights in 16 bits: half the size. They are read as 32, so it is as fast,
        and what rounding changes is in ``parity_um``.

    Returns
    -------
    dict
        ``model``, ``size_mb``, ``sha256``, ``parity_um`` (of an image ``parity``, in parts of
        the range), ``validation``, ``error``.

    Raises
    ------
    InputError
        Of the run, the dataset or the output; the graph does not answer as torch does.
    """
    need_torch()
    from mm_autofocus.models.nets.base import NetContext
    from mm_autofocus.training.checkpoint import find_checkpoint, load_checkpoint, net_of

    run, output = Path(run), Path(output)
    if keep not in ("best", "last"):
        raise InputError(f"--keep: {keep!r} is not allowed; best or last")
    if output.suffix != ".onnx":
        raise InputError(f"{output}: a model is a .onnx file")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists already; use --overwrite or another name")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder")
    checkpoint = find_checkpoint(run, f"{keep}.ckpt")
    if not run.is_dir():
        run = checkpoint.parent
    state = load_checkpoint(checkpoint)
    net: Any = net_of(state)
    context = NetContext(**state["context"])
    options = read_options(read_options_file(run / "options.yaml"))
    notes = _notes(run)
    data = Dataset.open(dataset or notes.get("dataset") or _no_dataset(run))
    learned, checked = _fields(data, run, options, context)
    notes = {**notes, "licence": licence}
    card = _card(name or output.stem, state, context, options, notes, data, learned)
    card = card.model_copy(update={"pixel_tolerance": pixel_tolerance})
    temporary = output.with_name(output.name + ".new")
    finish = finish_refocus if net.task == "refocus" else _finish
    try:
        card, write, parity = finish(
            net,
            card,
            temporary,
            learned,
            checked,
            context,
            options,
            run,
            data,
            _FRAMES[net.task] if frames is None else frames,
            half_weights,
        )
        write(card)
        digest = seal(temporary)
        # as it will be loaded, checksum and all
        (RefocusModel if net.task == "refocus" else OnnxModel)(temporary)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "model": str(output),
        "name": card.name,
        "size_mb": round(output.stat().st_size / 1e6, 3),
        "sha256": digest,
        **parity,
        "validation": card.metrics["validation"],
        "error": card.error.model_dump(),
    }


def _finish(
    net: DefocusNet,
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
    write_onnx(net, card, path, half=half)
    parity = _parity(net, path, checked, context)
    seen = look_at(OnnxModel(path), checked, frames)
    card = card.model_copy(
        update={
            "error": fit_errors(seen),
            "ood": fit_ood(learned, context.patch_px, frames),
            "metrics": _metrics(data, seen, parity, path),
        }
    )
    return card, lambda final: write_onnx(net, final, path, half=half), {"parity_um": parity}


def write_onnx(net: DefocusNet, card: ModelCard, path: Path, *, half: bool = False) -> None:
    """Write a net with its card, not sealed.

    One graph: ``patches (N, C, P, P)`` to ``defocus (N,)`` and ``sd (N,)``, and beside it,
    where the card says so, ``mosaic (M, C, H, W)`` to ``importance (M, H / 56, W / 56)``. An
    input ``lens (1, numbers)`` need not be given: then it is what the card says of the lens.
    BatchNorm is folded into the convolutions. With `half`, large weights are stored in 16 bits.
    """
    import torch

    px = card.patch_px
    inputs: tuple[Any, ...] = (torch.rand(2, card.planes, px, px),)
    names, outputs = ["patches"], ["defocus", "sd"]
    axes: dict[str, dict[int, str]] = {n: {0: "patches"} for n in (*names, *outputs)}
    usual = {}
    if card.lens is not None:
        code = card.lens.code()[None]
        inputs += (torch.from_numpy(code),)
        names.append(card.lens.input)
        usual[card.lens.input] = code
    if card.importance is not None:
        inputs += (torch.rand(1, card.planes, 112, 168),)
        names.append("mosaic")
        outputs.append("importance")
        axes["mosaic"] = {0: "frames", 2: "height", 3: "width"}
        axes["importance"] = {0: "frames", 1: "rows", 2: "columns"}
    graph = _graph(net, card, names)
    write_graph(graph, inputs, names, outputs, axes, card, path, half=half, usual=usual)


def _graph(net: DefocusNet, card: ModelCard, names: list[str]) -> Any:
    from torch import Tensor, nn

    class Graph(nn.Module):
        """The net as the run time sees it."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, patches: Tensor, *others: Tensor) -> Any:
            given = dict(zip(names[1:], others, strict=True))
            told = [] if card.lens is None else [given[card.lens.input]]
            defocus, log_sd, _ = self.net(patches, *told)
            if "mosaic" not in given or self.net.rin is None:
                return defocus, log_sd.exp()
            return defocus, log_sd.exp(), self.net.rin(given["mosaic"]).sigmoid()

    return Graph().eval().float().cpu()


def _fields(
    data: Dataset, run: Path, options: TrainOptions, context: NetContext
) -> tuple[list[Field], list[Field]]:
    """Fields of the training and of the validation part."""
    learn, check = data.part("train"), data.part("validation")
    maps = content_maps((*learn, *check), run / "content.npz", os.cpu_count() or 1)
    made = []
    for stacks in (learn, check):
        made.append(
            fields_of(
                stacks,
                maps,
                context.looks_um,
                context.range_um if context.half_um is None else (-math.inf, math.inf),
                tolerance_um=options.look_tolerance_um,
                least_px=context.patch_px,
            )
        )
    return made[0], made[1]


def _card(
    name: str,
    state: dict[str, Any],
    context: NetContext,
    options: TrainOptions,
    notes: dict[str, Any],
    data: Dataset,
    learned: list[Field],
) -> ModelCard:
    stacks = [of.stack for of in learned]
    known = {k: _common([s.optics.get(k) for s in stacks]) for k in ("magnification", "dof_um")}
    has_rin = bool(options.mosaics) and any(k.startswith("rin.") for k in state["weights"])
    kinds: dict[str, int] = {}
    told = state["net"].get("lens")
    for s in stacks:
        kinds[s.sparsity] = kinds.get(s.sparsity, 0) + 1
    simulated = any(map(data.is_simulated, stacks))
    return ModelCard(
        name=name,
        architecture=state["model"],
        task="defocus" if context.half_um is None else "refocus",
        # the net itself says the rest of them: `refocus_export`
        shots=None if context.half_um is None else Shots(half_um=context.half_um, halo_px=0),
        looks_um=context.looks_um,
        channels=context.channels,
        patch_px=context.patch_px,
        outputs=Outputs(),
        importance=Importance() if has_rin else None,
        lens=LensInput(ranges=told) if told else None,
        pixel_size_um=context.pixel_size_um,
        na=context.na,
        magnification=known["magnification"],
        dof_um=known["dof_um"],
        z_range_um=context.range_um,
        bit_depths=tuple(sorted({s.bit_depth for s in stacks if s.bit_depth})),
        error=ErrorModel(),
        training={
            "data": notes.get("data") or data.path.name,
            "simulated": simulated,
            "licence": notes.get("licence", "not stated"),
            "command": notes.get("command", ""),
            "seed": options.seed,
            "stacks": len(stacks),
            "stacks_by_sparsity": kinds,
            "epochs": state["epoch"],
            "split": data.meta.get("split", {}).get("by") if data.meta.get("split") else None,
            "net": state["net"],
            "options": options.model_dump(mode="json", exclude={"net", "model"}),
        },
    )


def _metrics(data: Dataset, seen: Seen, parity: float, path: Path) -> dict[str, Any]:
    simulated = any(map(data.is_simulated, data.part("validation")))
    kind = "simulated" if simulated else "recorded"
    return {
        "validation": {
            "data": f"validation part of {data.path.name}, {kind}, whole frames",
            "simulated": simulated,
            **seen.figures(),
        },
        "parity_um": parity,
        "size_mb": round(path.stat().st_size / 1e6, 3),
    }


def _parity(net: DefocusNet, path: Path, fields: list[Field], context: NetContext) -> float:
    """Largest difference between the graph and torch on patches of real frames, in µm.

    A patch that fits two distances equally well may be read as one here and as the other
    there, by the last bits: such a jump is small beside what the net expects to be off by.

    Raises
    ------
    InputError
        It is too large.
    """
    import torch

    px = context.patch_px
    patches = validation_patches(fields, px, planes=8, patches=2, most=_PARITY_PATCHES)
    reader = PlaneReader()
    x = np.stack([read_looks(reader, fields[i], k, y, x, px, px) for i, k, y, x in patches])
    with torch.inference_mode():
        by_torch = net.float().eval()(torch.from_numpy(x)).defocus.numpy()
    by_onnx, sd = OnnxModel(path).net.patches(x)
    apart = np.abs(by_torch - by_onnx)
    worst = float(apart.max())
    span = context.range_um[1] - context.range_um[0]
    allowed = np.full_like(apart, _PARITY * span)
    if sd is not None:
        allowed = np.maximum(allowed, _PARITY_SD * sd)
    if not (apart <= allowed).all():
        raise InputError(
            f"export: the graph differs from torch by {worst:.3g} µm on real patches; at most "
            f"{_PARITY * span:.3g} µm is allowed"
        )
    return float(f"{worst:.3g}")


def _common(values: list[Any]) -> float | None:
    """The one value that all have; None if they differ."""
    found = set(values)
    value = found.pop() if len(found) == 1 else None
    return float(value) if value else None


def _notes(run: Path) -> dict[str, Any]:
    file = run / "run.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _no_dataset(run: Path) -> str:
    raise InputError(f"{run}: does not say where its dataset is; give --dataset")
