"""ONNX nets of a few nodes whose answers are known by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mm_autofocus.models.card import KEY, ModelCard, parse_card
from mm_autofocus.models.patches import CELL_PX
from onnx import TensorProto, helper, numpy_helper

PATCH = 56
FLOAT = TensorProto.FLOAT


def make_card(**changes: Any) -> ModelCard:
    """A card for `make_net`, grey, one look; changed as asked."""
    keys: dict[str, Any] = {
        "name": "tiny",
        "channels": 1,
        "patch_px": PATCH,
        "z_range_um": [-100, 100],
        "outputs": {"sd": None},
    }
    return parse_card(keys | changes)


def make_net(
    path: Path | None = None,
    card: ModelCard | None = None,
    *,
    gain: float | Sequence[float] = 10.0,
    bias: float = 0.0,
    log: bool = False,
    column: bool = False,
    wide: bool = False,
    batch: int | str = "n",
    crowd: bool = False,
    inside: bool = True,
    planes: int | None = None,
) -> bytes:
    """Make a net that answers ``gain · mean + bias``, one gain per plane or one for all.

    Its sd, where the card has one, is ``|answer| / 10``; its importance is the mean of each cell
    of the mosaic. `log` takes the logarithm before the bias, so that black patches give -inf;
    `column` answers ``(N, 1)``, `wide` ``(N, 2)``; `crowd` fails for an empty batch.
    """
    card = card or make_card()
    n, p = card.planes if planes is None else planes, card.patch_px
    gains = np.resize(np.asarray(gain, np.float32), n)
    nhwc = card.inputs.layout == "NHWC"
    shape = [batch, p, p, n] if nhwc else [batch, n, p, p]
    weights = gains.reshape((1, 1, 1, n) if nhwc else (1, n, 1, 1))
    constants = {"gains": weights, "bias": np.float32(bias), "tenth": np.float32(0.1)}
    constants |= {"one": np.asarray([1], np.int64), "two": np.float32([[1, 1]])}
    constants |= {"zero": np.float32(0), "first": np.asarray([1], np.int64)}
    constants |= {"none": np.asarray(0, np.int64)}
    out = card.outputs.defocus
    chain = [
        ("Mul", ["gains"], {}),
        ("ReduceMean", [], {"axes": [1, 2, 3], "keepdims": 0}),
        *([("Log", [], {})] if log else []),
        ("Add", ["bias"], {}),
    ]
    if column:
        chain.append(("Unsqueeze", ["one"], {}))
    if wide:
        chain += [("Unsqueeze", ["one"], {}), ("Mul", ["two"], {})]
    nodes, before = [], card.inputs.name
    for k, (kind, more, attributes) in enumerate(chain):
        last = "answer" if crowd else out
        after = last if k == len(chain) - 1 else f"x{k}"
        nodes.append(helper.make_node(kind, [before, *more], [after], **attributes))
        before = after
    if crowd:  # no patches have no first one
        nodes += [
            helper.make_node("Gather", ["answer", "none"], ["leader"]),
            helper.make_node("Mul", ["leader", "zero"], ["nothing"]),
            helper.make_node("Add", ["answer", "nothing"], [out]),
        ]
    tail = [batch, 1] if column else [batch, 2] if wide else [batch]
    inputs = [helper.make_tensor_value_info(card.inputs.name, FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(out, FLOAT, tail)]
    if card.outputs.sd is not None and "sd" in card.outputs.model_fields_set:
        nodes += [
            helper.make_node("Abs", [out], ["absolute"]),
            helper.make_node("Mul", ["absolute", "tenth"], [card.outputs.sd]),
        ]
        outputs.append(helper.make_tensor_value_info(card.outputs.sd, FLOAT, tail))
    if card.importance is not None:
        rule = card.importance
        cell = [CELL_PX, CELL_PX]
        nodes += [
            helper.make_node("ReduceMean", [rule.input], ["grey"], axes=[1]),
            helper.make_node(
                "AveragePool", ["grey"], ["cells"], kernel_shape=cell, strides=cell
            ),
            helper.make_node("Squeeze", ["cells", "first"], [rule.output]),
        ]
        inputs.append(helper.make_tensor_value_info(rule.input, FLOAT, ["m", n, "h", "w"]))
        outputs.append(helper.make_tensor_value_info(rule.output, FLOAT, ["m", "r", "c"]))
    used = {name for node in nodes for name in node.input}
    tensors = [
        numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if inside:
        helper.set_model_props(model, {KEY: card.to_json()})
    data: bytes = model.SerializeToString()
    if path is not None:
        path.write_bytes(data)
    return data


def checkered(
    levels: Any, *, dtype: str = "uint8", channels: int = 1, patch: int = PATCH
) -> Any:
    """A frame whose patches have the given levels, with a little texture that is their own.

    The mean of each patch is exactly its level.
    """
    rows = np.asarray(levels, np.float64)
    frame = np.kron(rows, np.ones((patch, patch)))
    swing = 0.1 * np.kron(rows, np.ones((patch, patch)))
    y, x = np.indices(frame.shape)
    frame = frame + np.round(swing) * np.where((y // 7 + x // 7) % 2, 1, -1)
    frame = frame.astype(dtype)
    return frame if channels == 1 else np.repeat(frame[..., None], channels, axis=-1)
