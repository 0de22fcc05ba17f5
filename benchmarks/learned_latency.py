"""What one learned prediction costs, beside a ResNet-18 on the same patches.

A frame of 2016 × 2016 pixels, RGB, one thread, ONNX Runtime. The prediction is all of it:
shrink the frame, ask for the importance of its patches, describe it for the
out-of-distribution score, cut the patches out, run the net on them, take the median. The
ResNet-18 is given the patches as they are to be shown to it, and only runs. Both are timed in
turn, in the same process, and the ratio is taken pair by pair.

    python benchmarks/learned_latency.py [--model MODEL.onnx] [--write]

Without --model an untrained sparsefocus of the default size is timed, which costs the same.
Needs torch, to write the untrained nets.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import torch
from mm_autofocus.models import ood
from mm_autofocus.models.card import UNSEALED, ModelCard, parse_card
from mm_autofocus.models.frames import normalise, prepare
from mm_autofocus.models.importing import load_model
from mm_autofocus.models.nets import build_net
from mm_autofocus.models.nets.base import NetContext
from mm_autofocus.models.onnx_net import OnnxNet
from mm_autofocus.models.runtime import OnnxModel
from mm_autofocus.training.export import write_onnx

from _results import write_section

SIDE, PATCH = 2016, 224
MARKS = {9: 0.45, 31: 0.40}


def write_untrained(name: str, path: Path, card: ModelCard) -> None:
    """Write a net with random weights, its BatchNorm filled."""
    torch.manual_seed(0)
    context = NetContext(channels=card.channels, looks_um=card.looks_um, patch_px=PATCH)
    net = build_net(name, context)
    with torch.no_grad():
        net.train()(torch.rand(2, card.planes, PATCH, PATCH))
        if net.rin is not None:
            net.rin(torch.rand(2, card.planes, 112, 112))
    write_onnx(net.eval(), card, path)


def plain_card(channels: int, looks: tuple[float, ...], *, importance: bool) -> ModelCard:
    numbers = ood.names(channels)
    rng = np.random.default_rng(0)
    return parse_card(
        {
            "name": "untrained",
            "channels": channels,
            "looks_um": list(looks),
            "patch_px": PATCH,
            "z_range_um": [-25, 25],
            "outputs": {"sd": "sd"},
            "importance": {} if importance else None,
            "ood": ood.OodStats.fit(rng.random((50, len(numbers)))).model_dump(),
        }
    )


def looking_at(card: ModelCard, k: int) -> ModelCard:
    """The same card, with which exactly `k` patches of any frame are looked at."""
    data = card.model_dump()
    data["importance"] |= {"threshold": 0.0, "k": {"dense": k}}
    return parse_card(data | {"sha256": UNSEALED})


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best_batch(net: OnnxNet, x: np.ndarray) -> int:
    """Give the peer the batch that suits it."""
    took = {}
    for batch in (1, 2, 8, len(x)):
        net.batch = batch
        net.patches(x[:batch])
        took[batch] = min(seconds(lambda: net.patches(x)) for _ in range(2)) / len(x)
    return min(took, key=took.__getitem__)


def main() -> None:
    """Run and print, or write, the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="an ONNX file or a shipped name with an importance net")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="replace the section")
    args = parser.parse_args()
    cv2.setNumThreads(1)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        if args.model is None:
            card, what = plain_card(3, (0.0,), importance=True), "an untrained `sparsefocus`"
            write_untrained("sparsefocus", path, card)
        else:
            loaded = load_model(args.model)
            if not (
                isinstance(loaded, OnnxModel) and loaded.card.importance and loaded.net.path
            ):
                parser.error(f"--model {args.model}: has no importance net")
            card, what = loaded.card, f"`{loaded.card.name}`"
            shutil.copy(loaded.net.path, path)
        models = {k: OnnxModel(path, looking_at(card, k)) for k in MARKS}
        size = path.stat().st_size / 1e6
        peer_path = Path(folder) / "resnet.onnx"
        peer_card = plain_card(card.channels, card.looks_um, importance=False)
        write_untrained("resnet", peer_path, peer_card)
        peer = OnnxNet(peer_path, peer_card)

    rng = np.random.default_rng(0)
    shape = (SIDE, SIDE) if card.channels == 1 else (SIDE, SIDE, 3)
    looks = [rng.integers(0, 256, shape, dtype=np.uint8) for _ in card.looks_um]
    frames = prepare(card, looks)
    shown = {}
    for k, model in models.items():
        model.warm(shape)
        seen = model.predict(looks)
        assert len(seen.cells) == k, (k, len(seen.cells))
        shown[k] = normalise(peer_card, frames.cut(seen.cells), 255.0)
    peer.batch = best_batch(peer, shown[9])

    calls: dict[str, Callable[[], object]] = {}
    for k, model in models.items():
        calls[f"prediction, {k} patches"] = lambda model=model: model.predict(looks)
        calls[f"ResNet-18, {k} patches"] = lambda k=k: peer.patches(shown[k])
    first = models[9]
    mosaic = normalise(card, frames.mosaic()[None], 255.0, per_patch=False)
    calls["of it: mosaic"] = frames.mosaic
    calls["of it: importance"] = lambda: first.net.importance(mosaic)
    calls["of it: description of the frame"] = lambda: ood.describe(mosaic[0], card.channels)
    calls["of it: net, 9 patches"] = lambda: first.net.patches(shown[9])
    took = {name: np.empty(args.pairs) for name in calls}
    for pair in range(-1, args.pairs):  # the first one warms up
        for name, call in calls.items():
            one = seconds(call)
            if pair >= 0:
                took[name][pair] = one

    rows = [
        "| what | ms, median | quartiles |",
        "|---|---|---|",
    ]
    for name, t in took.items():
        low, middle, high = 1e3 * np.percentile(t, [25, 50, 75])
        rows.append(f"| {name} | {middle:.1f} | {low:.1f} … {high:.1f} |")
    rows += ["", "| ratio | median | quartiles | mark | |", "|---|---|---|---|---|"]
    ratios = {
        f"prediction ÷ ResNet-18, {k} patches": (
            took[f"prediction, {k} patches"] / took[f"ResNet-18, {k} patches"],
            mark,
        )
        for k, mark in MARKS.items()
    }
    ratios["prediction, 9 patches ÷ 31 patches"] = (
        took["prediction, 9 patches"] / took["prediction, 31 patches"],
        1.0,
    )
    for name, (ratio, mark) in ratios.items():
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        verdict = "held" if middle <= mark else "**missed**"
        rows.append(
            f"| {name} | {middle:.3f} | {low:.3f} … {high:.3f} | ≤ {mark:.2f} | {verdict} |"
        )
    colour = "grey" if card.channels == 1 else "RGB"
    option = "" if args.model is None else f"--model {Path(args.model).name} "
    text = (
        f"One frame of {SIDE} × {SIDE} pixels, {colour}, {card.n_looks} "
        f"look{'s' if card.n_looks > 1 else ''}, one thread, ONNX Runtime "
        f"{onnxruntime.__version__}, {what} ({size:.1f} MB); {args.pairs} rounds in which all "
        f"take turns. ResNet-18 in batches of {peer.batch}, which suit it best here; it is "
        "given the patches as it is to see them, the prediction begins with the frame.\n"
        f"`python benchmarks/learned_latency.py {option}--write`\n\n" + "\n".join(rows)
    )
    print(text)
    if args.write:
        write_section("learned-latency", "Cost of a learned prediction", text)


if __name__ == "__main__":
    main()
