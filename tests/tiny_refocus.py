"""ONNX nets that make one image of two shots, with answers known by hand; and raw files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import useq
from mm_autofocus.models.card import KEY, ModelCard, parse_card
from mm_autofocus.models.sealing import seal
from mm_autofocus.ometiff import OmeTiffSink
from mm_autofocus.types import Optics
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
DELTA_UM = 1.5


def refocus_card(**changes: Any) -> ModelCard:
    """A card for `make_refocus`, grey; changed as asked."""
    shots = {"half_um": [1, 2], "halo_px": 8, "multiple": 8, **changes.pop("shots", {})}
    keys: dict[str, Any] = {
        "name": "tiny-refocus",
        "task": "refocus",
        "channels": 1,
        "patch_px": 64,
        "z_range_um": [-2, 2],
        "shots": shots,
    }
    return parse_card(keys | changes)


def make_refocus(
    path: Path,
    kind: str = "mean",
    card: ModelCard | None = None,
    *,
    gain: float = 0.0,
    bias: float = 1.0,
    sd: float = 0.1,
    seed: int = 0,
    side: bool = False,
) -> Path:
    """Make a net: ``mean`` of both shots, the ``first`` (sharper) one, ``nan``, or ``deep``.

    ``deep`` has three convolutions of 3 × 3, one of them between a 2 × max-pool and an
    enlargement. ``toward`` is ``gain · mean + bias`` of each cell of 8 × 8 of the sharper shot.
    """
    card = card or refocus_card()
    c, n = card.channels, card.planes
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {}

    def conv(name: str, inputs: int, outputs: int, edge: int = 3) -> dict[str, Any]:
        weights = rng.normal(0, 1 / (edge * np.sqrt(inputs)), (outputs, inputs, edge, edge))
        tensors[name] = weights.astype(np.float32)
        return {"pads": [edge // 2] * 4}

    nodes: list[Any] = []

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    if kind == "deep":
        x = node("Conv", ["shots", "w1"], "c1", **conv("w1", n, 4))
        x = node("Relu", [x], "r1")
        x = node("MaxPool", [x], "p", kernel_shape=[2, 2], strides=[2, 2])
        x = node("Conv", [x, "w2"], "c2", **conv("w2", 4, 4))
        tensors["scales"] = np.float32([1, 1, 2, 2])
        x = node(
            "Resize",
            [x, "", "scales"],
            "up",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        x = node("Conv", [x, "w3"], "c3", **conv("w3", 4, c))
        tensors["half"] = np.float32(0.5)
        x = node("Add", [x, "half"], "image")
    else:
        weights = np.zeros((c, n, 1, 1), np.float32)
        for k in range(c):
            weights[k, k] = 1.0 if kind == "first" or n == c else 0.5
            if kind != "first" and n > c:
                weights[k, c + k] = 0.5
        tensors["mix"] = weights
        x = node("Conv", ["shots", "mix"], "image" if kind != "nan" else "mixed")
        if kind == "nan":
            tensors["minus"] = np.float32(-1)
            node("Mul", [x, "minus"], "negative")
            node("Log", ["negative"], "image")
    tensors |= {"gain": np.float32(gain), "bias": np.float32(bias), "nil": np.float32(0)}
    tensors |= {"sd": np.float32(sd), "axis": np.int64([1])}
    tensors["sharper"] = np.float32([1 / c] * c + [0] * (n - c)).reshape(1, n, 1, 1)
    x = node("Conv", ["shots", "sharper"], "grey")
    x = node("AveragePool", [x], "cells", kernel_shape=[8, 8], strides=[8, 8])
    x = node("Squeeze", [x, "axis"], "flat")
    x = node("Mul", [x, "gain"], "scaled")
    if side:  # reads it, and adds nothing
        tensors["ends"] = np.int64([1, 2])
        node("Unsqueeze", ["side", "ends"], "wide")
        node("Mul", ["wide", "nil"], "none")
        x = node("Add", [x, "none"], "sided")
    node("Add", [x, "bias"], "toward")
    node("Mul", [x, "nil"], "zeros")
    node("Add", ["zeros", "sd"], "toward_sd")
    info = helper.make_tensor_value_info
    inputs = [info("shots", FLOAT, ["n", n, "h", "w"])]
    inputs += [info("side", FLOAT, ["n"])] if side else []
    outputs = [info("image", FLOAT, ["n", c, "h", "w"])]
    outputs += [info(name, FLOAT, ["n", "y", "x"]) for name in ("toward", "toward_sd")]
    used = {name for made in nodes for name in made.input}
    constants = [
        numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items() if k in used
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {KEY: card.to_json()})
    path.write_bytes(model.SerializeToString())
    seal(path)
    return path


def two_shots(
    n: int, shape: tuple[int, ...] = (72, 100), dtype: str = "uint8", top: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Two shots of tile `n`; the lower one is the sharper where n is even."""
    rng = np.random.default_rng(n)
    limit = top or (1.0 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max)
    noise = rng.random((*shape[:2], *shape[2:]))
    soft = (noise + np.roll(noise, 1, 1) + np.roll(noise, 2, 1) + np.roll(noise, 3, 1)) / 4
    shots = [(limit * x).astype(dtype) for x in (noise, soft)]
    return (shots[0], shots[1]) if n % 2 == 0 else (shots[1], shots[0])


def plan(**changes: Any) -> useq.MDASequence:
    """Three positions, two shots each."""
    parts: dict[str, Any] = {
        "axis_order": "tpcz",
        "stage_positions": [
            {"x": 10.0 * i, "y": -5.0 * i, "z": 100.0, "name": f"tile {i}"} for i in range(3)
        ],
        "z_plan": {"relative": [-DELTA_UM, DELTA_UM]},
    }
    return useq.MDASequence(**{k: v for k, v in {**parts, **changes}.items() if v is not None})


def write_raw(
    path: Path,
    sequence: useq.MDASequence | None = None,
    *,
    shape: tuple[int, ...] = (72, 100),
    dtype: str = "uint8",
    bits: int | None = None,
    z_um: Any = lambda event: event.z_pos,
    pixel_size_um: float | None = 0.5,
    skip: Any = lambda event: False,
    stop: int | None = None,
    **options: Any,
) -> Path:
    """Run a plan through the sink; the frames are those of `two_shots`, by position."""
    sequence = sequence or plan()
    sink = OmeTiffSink(path, **options)
    kind = "RGB" if len(shape) == 3 else "Mono"
    info = {"plane_shape": shape, "dtype": dtype, "pixel_size_um": pixel_size_um}
    info["pixel_format"] = f"{kind}{bits or 8 * np.dtype(dtype).itemsize}"
    sink.setup(
        sequence,
        {"datetime": "2026-03-04 05:06:07.890000+01:00", "image_infos": (info,)},
        settings={"strategy": "two-shot"},
        optics=Optics(na=0.75, magnification=20, pixel_size_um=pixel_size_um),
    )
    top = None if bits is None else float(2**bits - 1)
    for n, event in enumerate(sequence.model_copy(deep=True)):
        if n == stop:
            break
        p, z, c = (event.index.get(a, 0) for a in "pzc")
        if skip(event):
            sink.skip(event, record={"focus_id": p, "status": "failed", "strategy": "two-shot"})
            continue
        meta = {
            "runner_time_ms": 12.5 * n,
            "exposure_ms": 20.0,
            "pixel_size_um": pixel_size_um,
            "camera_device": "Camera",
            "position": {"x": event.x_pos, "y": event.y_pos, "z": z_um(event)},
            "mm_autofocus": {
                "focus_id": p,
                "strategy": "two-shot",
                "status": "ok",
                "z_after_um": 100.0,
                "looks": 0,
                "curve": [[99.0, 0.5]],
                "age_s": 0.1 * z,
                "index": {"p": p},
            },
        }
        sink.append(two_shots(10 * c + p, shape, dtype, top)[z % 2], event, meta)
    sink.close()
    return path
