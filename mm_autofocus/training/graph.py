"""A net of torch becomes the graph of an ONNX file, with its card inside."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.models.card import KEY

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.card import ModelCard

__all__ = ["OPSET", "write_graph"]

OPSET = 17
_LARGE = 2**16  # numbers: what is smaller saves nothing


def write_graph(
    graph: Any,
    inputs: tuple[Any, ...],
    names: Sequence[str],
    outputs: Sequence[str],
    axes: dict[str, dict[int, str]],
    card: ModelCard,
    path: Path,
    *,
    half: bool = False,
    usual: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> None:
    """Write a module of torch with its card, not sealed.

    Parameters
    ----------
    graph : torch.nn.Module
        Ready to predict.
    inputs : tuple of Tensor
        What it is traced with.
    names, outputs : sequence of str
        Of its inputs and outputs.
    axes : dict
        Input or output to axis to name: axes of any length.
    card : ModelCard
        Put into the metadata.
    path : Path
        File to write.
    half : bool
        Store large weights in 16 bits, to be read as 32.
    usual : mapping
        Input to what it is where nothing is given.
    """
    import onnx
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode():
        # the tracer says that it traces; parity is checked behind it
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            inputs,
            buffer,  # type: ignore[arg-type]
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    if half:
        _halve(model.graph)
    for name, value in (usual or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    model.producer_name = "mm_autofocus"
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, card.to_json()
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def _halve(graph: Any) -> None:
    """Round large weights to 16 bits; a Cast, which the run time folds, makes them 32 again."""
    from onnx import TensorProto, helper, numpy_helper

    wide: dict[str, str] = {}
    for weights in graph.initializer:
        large = len(weights.dims) > 1 and math.prod(weights.dims) >= _LARGE
        if large and weights.data_type == TensorProto.FLOAT:
            rounded = numpy_helper.to_array(weights).astype(np.float16)
            weights.CopyFrom(numpy_helper.from_array(rounded, weights.name))
            wide[weights.name] = f"{weights.name}:32"
    for node in graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = wide.get(name, name)
    for name, as_float in reversed(wide.items()):
        graph.node.insert(0, helper.make_node("Cast", [name], [as_float], to=TensorProto.FLOAT))
