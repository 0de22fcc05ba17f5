"""Two shots of recorded stacks of a brain section, by the commands that a lab would type."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from mm_autofocus.training.evaluation_table import number, share
from mm_autofocus.training.refocus_baselines import REFOCUS_BASELINES
from mm_autofocus.training.refocus_table import extent, name_of

from _learned_real import command
from _refocus_virtual import markdown

HALVES_UM = (2.0, 4.0, 6.0)
OPTIONS = ("patch_px=96", "pairs.half_um=[2, 6]")


def run(args: argparse.Namespace) -> str:
    """Collect, train, export, evaluate; return the text of the section."""
    files = sorted((args.data / "zstack_brain").glob("*.tif"))
    if not files:
        raise SystemExit(f"{args.data / 'zstack_brain'}: no stacks")
    nets = {"two shots": args.net, "single-shot U-Net": args.unet_net}
    minutes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "brain"
        command(
            "collect", "--from", files[0], *files[1:], "-o", data, "--step-um", 1,
            "--slide", "section", "--json",
        )  # fmt: skip
        for title, net in nets.items():
            options = [*OPTIONS, *([f"max_minutes={args.minutes}"] if args.minutes else [])]
            sets = [word for pair in (*options, *args.set) for word in ("--set", pair)]
            run_folder, model = folder / f"run-{net}", folder / f"{net}-brain.onnx"
            _, seconds = command("train", data, "--model", net, "-o", run_folder, *sets)
            _, more = command("export", run_folder, "-o", model)
            minutes[title] = (seconds + more) / 60
        unet = folder / f"{args.unet_net}-brain.onnx"
        known = [word for b in (*REFOCUS_BASELINES, unet) for word in ("--baseline", b)]
        model = folder / f"{args.net}-brain.onnx"
        out, _ = command("evaluate", model, data, "--json", "--part", "test", *known)
    return _section(json.loads(out), len(files), minutes, args)


def _section(
    found: dict[str, Any], files: int, minutes: dict[str, float], args: argparse.Namespace
) -> str:
    halves = [
        f"{h:g}"
        for h in HALVES_UM
        if f"{h:g}" in next(iter(found["methods"].values()))["by_half_um"]
    ]
    heads = [
        "PSNR, dB (SSIM)",
        *(f"± {h} µm" for h in halves),
        "over the sharper shot, all distances",
    ]
    heads += ["made worse"]
    rows = []
    for method, figures in found["methods"].items():
        cells = []
        for h in halves:
            part = figures["by_half_um"][h]
            cells.append(f"{number(part['psnr_db'])} ({number(part['ssim'], 3)})")
        own = method == "sharper"
        rows.append(
            [
                name_of(method),
                *cells,
                "–" if own else f"{figures['gain_db']:+.2f}",
                "–" if own else share(figures["worse"]),
            ]
        )
    over = found["gain_over"]
    gains = [
        [name_of(other), *(extent(over[other]["by_half_um"][h]) for h in halves)]
        for other in over
    ]
    order = sorted(found["methods"], key=lambda m: -found["methods"][m]["psnr_db"])
    focus = found["focus"]
    told = (
        ""
        if focus is None
        else f" Focus between the shots is told to {number(focus['mae_um'])} µm (mean absolute "
        "error), against a label on a plateau."
    )
    times = ", ".join(f"{who} {m:.1f} minutes" for who, m in minutes.items())
    flags = f"--net {args.net} --unet-net {args.unet_net}"
    flags += f" --minutes {args.minutes:g}" if args.minutes else ""
    flags += "".join(f" --set {pair}" for pair in args.set)
    return "\n".join(
        [
            f"{files} stacks of one stained human brain section (grey, 128², 29 planes at "
            f"1 µm; one scanner), split by stack; {found['stacks']} stacks that the training "
            f"did not see, {found['pairs']} pairs of planes over all distances "
            f"({', '.join(f'± {h:g}' for h in found['half_um'])} µm). The middle is off the "
            "label by N(0, 1 µm), cut at ± 2.5 µm. The truth is the plane in focus by the "
            "label: a recorded frame with its noise, "
            f"{number(found['truth_off_um']['mean'])} µm from focus on average; the section is "
            "thick, so no plane is sharp all over.",
            "",
            f"`python benchmarks/refocus_quality.py --part brain {flags} --write` (training: "
            f"{times})",
            "",
            *markdown(heads, rows),
            "",
            f"Order of merit, all distances: {' > '.join(map(name_of, order))}.{told}",
            "",
            f"Gain of `{found['model']}`, dB, pair by pair (95 % by drawing stacks):",
            "",
            *markdown(["over", *(f"± {h} µm" for h in halves)], gains),
            "",
            *(f"{note}  " for note in found["notes"]),
        ]
    )
