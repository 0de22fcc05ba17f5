"""The weights that a training begins with: those of a run, or of an exported model.

An exported graph holds no BatchNorm: each is folded into the convolution before it. Its
convolutions stand in the order in which the net calls them, so that each finds its own again;
the BatchNorm behind it begins as nothing. Then it learns from the data what is usual before
it (`settle`), so that the net answers in training, too, as the model does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.card import ModelCard
from mm_autofocus.models.importing import model_names, onnx_of
from mm_autofocus.models.nets import NETS, build_net
from mm_autofocus.models.patches import CELL_PX

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

    from mm_autofocus.models.nets.base import Net

__all__ = ["begin_with", "settle", "weights_to_begin_with"]

_LEAST_VARIANCE = 1e-8
_LEARNED = ("running_mean", "running_var", "num_batches_tracked")  # among the buffers


def weights_to_begin_with(init: str) -> dict[str, Any]:
    """Read weights to begin with.

    Parameters
    ----------
    init : str
        A run, a checkpoint, the name of a model, or an ONNX file that ``export`` wrote.

    Returns
    -------
    dict
        ``model``, ``context``, ``net``, ``weights`` as in a checkpoint; ``folded``: whether
        what was BatchNorm has to `settle`.

    Raises
    ------
    InputError
        There is no such thing, it is damaged, or a net from elsewhere.
    """
    from mm_autofocus.training.checkpoint import find_checkpoint, load_checkpoint

    path = Path(init)
    if path.suffix.lower() == ".onnx" or (init in model_names() and not path.exists()):
        file = onnx_of(init)
        if file is None:
            raise InputError(f"init: {init!r} is no ONNX file that export wrote")
        return {**_exported(file), "folded": True}
    return {**load_checkpoint(find_checkpoint(path)), "folded": False}


def begin_with(net: Net, state: dict[str, Any]) -> None:
    """Take over what fits of other weights; a head for another range begins anew.

    So does what reads spectra, where the looks lie elsewhere: what differs between them is
    another thing then.

    Raises
    ------
    InputError
        Less than half of them fits.
    """
    own = net.state_dict()
    fits = {k: v for k, v in state["weights"].items() if k in own and own[k].shape == v.shape}
    if len(fits) < len(own) / 2:
        raise InputError(
            f"init: a net {state['model']!r} for {len(state['context']['looks_um'])} looks "
            "does not fit; its kind, widths and looks must be the same"
        )
    # what follows from this net's own range and looks, and is not learned
    fixed = {k for k, _ in net.named_buffers() if k.rpartition(".")[2] not in _LEARNED}
    if tuple(state["context"]["looks_um"]) != net.context.looks_um:
        fixed |= {k for k in own if ".spectral." in k}
    net.load_state_dict({k: v for k, v in fits.items() if k not in fixed}, strict=False)


def settle(net: Net, batches: Iterable[dict[str, Tensor]], device: torch.device) -> None:
    """Give each BatchNorm the statistics of what comes before it; no answer changes by it.

    Parameters
    ----------
    net : Net
        Changed in place, and left at rest.
    batches : iterable of dict
        Samples, as in training.
    device : torch.device
    """
    import torch

    sums: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        axes = (0, 2, 3)
        count = torch.tensor(float(x.numel() / x.shape[1]), device=x.device)
        new = [count, x.sum(axes), x.square().sum(axes)]
        before = sums.get(module)
        sums[module] = (
            new if before is None else [a + b for a, b in zip(before, new, strict=True)]
        )

    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(note) for norm in norms]
    net.to(device).eval()
    with torch.no_grad():
        for batch in batches:
            net.losses_of({k: v.to(device) for k, v in batch.items() if k != "field"})
        for hook in hooks:
            hook.remove()
        for norm, (count, one, two) in sums.items():
            bn = cast("Any", norm)
            mean = one / count
            variance = (two / count - mean.square()).clamp(min=_LEAST_VARIANCE)
            scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
            shift = bn.bias.double() - bn.running_mean.double() * scale
            bn.weight.copy_(scale * (variance + bn.eps).sqrt())
            bn.bias.copy_(shift + scale * mean)
            bn.running_mean.copy_(mean)
            bn.running_var.copy_(variance)


def _exported(path: Path) -> dict[str, Any]:
    """The weights of an exported model, by the names that a checkpoint has for them."""
    import onnx
    import torch
    from onnx import numpy_helper

    from mm_autofocus.models.nets.base import NetContext
    from mm_autofocus.models.onnx_net import OnnxFile

    card = OnnxFile(path).card
    options = card.training.get("net")
    if card.architecture not in NETS.names() or not isinstance(options, dict):
        raise InputError(
            f"init: {path}: a net {card.architecture!r} from elsewhere; only what export wrote "
            "can be trained further"
        )
    context = NetContext(
        looks_um=card.looks_um,
        channels=card.channels,
        range_um=card.z_range_um,
        half_um=None if card.shots is None else card.shots.half_um,
        patch_px=card.patch_px,
        na=card.na,
        pixel_size_um=card.pixel_size_um,
    )
    net = build_net(card.architecture, context, options).eval()
    graph = onnx.load(path).graph
    known = {t.name: _as_read(numpy_helper.to_array(t)) for t in graph.initializer}
    for node in graph.node:
        # weights that two paths share stand there once, large ones perhaps in 16 bits
        if node.op_type in ("Identity", "Cast") and node.input[0] in known:
            known[node.output[0]] = known[node.input[0]]
    values = {k: known[f"net.{k}"] for k in net.state_dict() if f"net.{k}" in known}
    values |= _usual(net, graph, known)
    values |= _unfolded(net, card, graph, known)
    values |= _turned(net, card, graph, known)
    weights = net.state_dict()
    learned = {k for k, _ in net.named_parameters()}
    for key, value in weights.items():
        new = values.get(key)
        if new is not None and new.shape == tuple(value.shape):
            weights[key] = torch.tensor(new)
        elif key in learned:
            raise InputError(
                f"init: {path}: a graph of {card.architecture!r} does not hold {key}; name the "
                "run that it was exported from"
            )
    return {
        "model": card.architecture,
        "context": context.model_dump(mode="json"),
        "net": dict(options),
        "weights": weights,
    }


def _as_read(weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return weights.astype(np.float32) if weights.dtype == np.float16 else weights


def _unfolded(
    net: Net, card: ModelCard, graph: Any, known: dict[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Convolutions by the order in which they are called, and a BatchNorm that does nothing."""
    import torch

    called = _called(net, card, torch.nn.Conv2d)
    nodes = [n for n in graph.node if n.op_type == "Conv"]
    norms = dict(_norms(net))
    state = net.state_dict()
    found: dict[str, npt.NDArray[Any]] = {}
    if len(called) != len(nodes):
        return {}
    for name, node in zip(called, nodes, strict=True):
        bias = known.get(node.input[2]) if len(node.input) > 2 else None
        found[f"{name}.weight"] = known[node.input[1]]
        behind = norms.get(name)
        if behind is not None:
            one = np.ones_like(state[f"{behind}.weight"].numpy())
            eps = cast("Any", net.get_submodule(behind)).eps
            found[f"{behind}.weight"] = one * np.float32(np.sqrt(1 + eps))
            found[f"{behind}.running_var"] = one
            found[f"{behind}.running_mean"] = 0 * one
            found[f"{behind}.bias"] = 0 * one if bias is None else bias
            bias = 0 * one  # the convolution's own, where it has one
        if bias is not None:
            found[f"{name}.bias"] = bias
    return found


def _turned(
    net: Net, card: ModelCard, graph: Any, known: dict[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Matrices of layers that act on images: the graph holds them, in order, transposed."""
    import torch

    products = [n.input[1] for n in graph.node if n.op_type == "MatMul"]
    unnamed = [known[i] for i in products if i in known and not i.startswith("net.")]
    found = {}
    for name in _called(net, card, torch.nn.Linear):
        shape = tuple(net.state_dict()[f"{name}.weight"].shape)
        if f"net.{name}.weight" in known:
            continue
        at = next((k for k, m in enumerate(unnamed) if m.shape == shape[::-1]), None)
        if at is not None:
            found[f"{name}.weight"] = unnamed[at].T
            unnamed = unnamed[at + 1 :]
    return found


def _called(net: Net, card: ModelCard, kind: type[nn.Module]) -> list[str]:
    """Names of layers of a kind, in the order in which the exported graph calls them."""
    import torch

    names: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in net.named_modules()
        if isinstance(module, kind)
    ]
    px = card.patch_px
    with torch.no_grad():
        if card.task == "refocus":
            edge = 8 * cast("Any", net).multiple
            net(torch.rand(1, card.planes, edge, edge), torch.ones(1), torch.ones(1))
        else:
            net(torch.rand(1, card.planes, px, px))
            rin = getattr(net, "rin", None)
            if card.importance is not None and rin is not None:
                rin(torch.rand(1, card.planes, CELL_PX, CELL_PX))
    for hook in hooks:
        hook.remove()
    return names


def _norms(net: Net) -> Iterator[tuple[str, str]]:
    """Names of convolutions, each with that of the BatchNorm behind it."""
    import torch

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Sequential):
            for (a, one), (b, other) in pairwise(module.named_children()):
                if isinstance(one, torch.nn.Conv2d) and isinstance(other, torch.nn.BatchNorm2d):
                    yield f"{name}.{a}", f"{name}.{b}"


def _usual(
    net: Net, graph: Any, known: dict[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Variances of which the graph holds the root of the inverse, behind the usual mean."""
    found = {}
    for node in graph.node:
        if node.op_type != "Sub" or not node.input[1].endswith(".running_mean"):
            continue
        name = node.input[1].removeprefix("net.").removesuffix(".running_mean")
        eps = cast("Any", net.get_submodule(name)).eps
        for other in graph.node:
            if other.op_type == "Mul" and node.output[0] in other.input:
                root = next((known[i] for i in other.input if i in known), None)
                if root is not None:
                    found[f"{name}.running_var"] = 1 / np.square(root) - np.float32(eps)
    return found
