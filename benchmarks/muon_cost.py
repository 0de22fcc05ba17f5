"""What a step of Muon costs a core in blocks of rows, beside torch's; and which learns better.

Both take turns on the matrices of the shipped readers of spectra; the ratio is taken pair by
pair. Then both teach one reader the same spectra by theory, from the same weights, and are
judged on other lenses.

    python benchmarks/muon_cost.py [--write]
"""

from __future__ import annotations

import os
import statistics
import time
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from mm_autofocus.models.nets import build_net
from mm_autofocus.models.nets.base import NetContext
from mm_autofocus.training import spectra_first
from mm_autofocus.training.muon import BlockMuon
from mm_autofocus.training.options import TheoryOptions
from mm_autofocus.training.spectra_theory import SpectraByTheory
from torch.optim import Muon

from _results import pairs_parser, ratio_cells, write_section
from _training_stacks import THEORY

READERS = {"one look, width 512": ((0.0,), 512), "two looks, width 384": ((-8.0, 8.0), 384)}
PASSES, SEEDS, DRAWS = 4, 2, (60, 12)  # of 1024 patches: to learn from, to be judged by


def reader(looks_um: tuple[float, ...], width: int, seed: int = 0):
    """A net as it ships, with weights of its own."""
    torch.manual_seed(seed)
    context = NetContext(
        looks_um=looks_um,
        channels=3,
        range_um=(-26, 26),
        na=0.75,
        wavelength_um=0.55,
        pixel_size_um=0.325,
    )
    options = {"spectra": width, "widths": [16, 32], "depths": [1, 1]}
    return build_net("sparsefocus", context, options)


def cost(looks_um: tuple[float, ...], width: int, pairs: int) -> str:
    """Cells of a row: ms of a step of either, and their ratio."""
    matrices = reader(looks_um, width).reading_matrices()
    for p in matrices:
        p.grad = torch.randn_like(p)
    steps = {"ours": BlockMuon(matrices, 1e-9), "torch": Muon(matrices, 1e-9)}
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for pair in range(pairs + 1):
        for which in ("ours", "torch") if pair % 2 else ("torch", "ours"):
            start = time.perf_counter()
            steps[which].step()
            if pair:  # the first pair warms up
                times[which].append(1e3 * (time.perf_counter() - start))
    return (
        f"{statistics.median(times['ours']):.0f} | {statistics.median(times['torch']):.0f} | "
        + ratio_cells(times["ours"], times["torch"])
    )


def lesson(optimiser: type, seed: int, taught, judged) -> tuple[float, float, float]:
    """Loss and median error (µm) on other lenses, and seconds of the lesson."""
    net = reader((0.0,), 256, seed)
    net.learn_usual(taught[0])
    start = time.perf_counter()
    with patch.object(spectra_first, "BlockMuon", optimiser):
        spectra_first.learn(
            net, taught, passes=PASSES, seed=seed, say=lambda _: None, muon=True
        )
    took = time.perf_counter() - start
    net.eval()
    with torch.inference_mode():
        found = net.by_seen(judged[0])
        loss = float(sum(net.losses(found, judged[1]).values()))
        off = float((found.defocus - judged[1]).abs().median())
    return loss, off, took


def main() -> None:
    """Run and print, or write, the tables."""
    args = pairs_parser(__doc__, 15).parse_args()
    torch.set_num_threads(1)
    lines = [
        f"Blocks of 128 rows in single precision, beside `torch.optim.Muon`, on one core; "
        f"{args.pairs} pairs.",
        "",
        "| matrices of | ours, ms a step | torch, ms | ratio (median) | 5 … 95 % of pairs |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {name} | {cost(*what, args.pairs)} |" for name, what in READERS.items()]
    options = TheoryOptions(patches=1024 * sum(DRAWS), **THEORY)
    theory = SpectraByTheory(reader((0.0,), 256).context, options, 0, (0.12, 4.0))
    drawn = [theory[k] for k in range(sum(DRAWS))]
    taught, judged = (
        tuple(torch.cat(column) for column in zip(*part, strict=True))
        for part in (drawn[: DRAWS[0]], drawn[DRAWS[0] :])
    )
    lines += [
        "",
        f"**Simulated**, a lesson by theory: one look, width 256, {len(taught[0])} patches "
        f"{PASSES} times; judged on {len(judged[0])} under other lenses.",
        "",
        "| seed | loss, ours | torch | median error, ours, µm | torch | time, ours ÷ torch |",
        "|---|---|---|---|---|---|",
    ]
    for seed in range(SEEDS):
        ours, theirs = (lesson(o, seed, taught, judged) for o in (BlockMuon, Muon))
        lines.append(
            f"| {seed} | {ours[0]:.3f} | {theirs[0]:.3f} | {ours[1]:.2f} | {theirs[1]:.2f} "
            f"| {ours[2] / theirs[2]:.2f} |"
        )
    text = "\n".join([*lines, "", "`python benchmarks/muon_cost.py --write`"])
    print(text)
    if args.write:
        write_section("muon-cost", "Cost of Muon, in blocks and whole", text)


if __name__ == "__main__":
    main()
