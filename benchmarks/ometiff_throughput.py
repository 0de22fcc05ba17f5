"""Frames per second to OME-TIFF: this package's sink beside that of pymmcore-plus.

Both get the same frames, events and metadata in the same process, in turn, and the time
is from `setup` to the end of `close`: what an acquisition waits for. Prints a
Markdown table; ``--json`` prints one JSON document.

    python benchmarks/ometiff_throughput.py [--json] [--folder DIR] [--repeats 7] [--quick]

On a disk that others write to, the spread is larger than the difference; a folder in memory
(/dev/shm) shows what the programs themselves cost.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import useq
from mm_autofocus.ometiff import OmeTiffSink
from mm_autofocus.ometiff.annotations import FileFacts
from mm_autofocus.ometiff.frames import FrameRecord, Header
from mm_autofocus.ometiff.layout import lay_out
from mm_autofocus.ometiff.model import ome_xml
from pymmcore_plus.mda._sink import OmeWritersSink

from _results import write_section

CASES = {
    "2048² uint16": ((2048, 2048), "uint16", 400),
    "2048² uint16, a short run": ((2048, 2048), "uint16", 120),
    "2048² RGB uint8": ((2048, 2048, 3), "uint8", 80),
    "512² uint16": ((512, 512), "uint16", 1000),
}


def summary(shape: tuple[int, ...], dtype: str) -> Any:
    info = {
        "camera_label": "Camera",
        "plane_shape": shape,
        "height": shape[0],
        "width": shape[1],
        "dtype": dtype,
        "pixel_size_um": 0.5,
    }
    return {"image_infos": (info,)}


def events(n: int) -> tuple[useq.MDASequence, list[useq.MDAEvent]]:
    sequence = useq.MDASequence(
        axis_order="tz",
        time_plan={"interval": 0, "loops": n // 10},
        z_plan={"range": 9, "step": 1},
    )
    return sequence, list(sequence)


def write(sink: Any, shape: tuple[int, ...], dtype: str, n: int, *, focus: bool) -> float:
    sequence, plan = events(n)
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 255, shape).astype(dtype) for _ in range(4)]
    record = {
        "focus_id": 0,
        "strategy": "hill-climb",
        "status": "ok",
        "z_um": 1.5,
        "looks": 5,
        "curve": [[z, 100.0 - z] for z in range(10)],
    }
    start = time.perf_counter()
    sink.setup(sequence, summary(shape, dtype))
    for i, event in enumerate(plan):
        meta: dict[str, Any] = {
            "runner_time_ms": 10.0 * i,
            "exposure_ms": 10.0,
            "pixel_size_um": 0.5,
            "camera_device": "Camera",
            "position": {"x": 1.0, "y": 2.0, "z": 3.0},
        }
        if focus:
            meta["mm_autofocus"] = {**record, "focus_id": i // 50, "age_s": 0.1 * (i % 50)}
        sink.append(frames[i % 4], event, meta)
    sink.close()
    return time.perf_counter() - start


def measure(folder: Path, repeats: int, quick: bool) -> list[dict[str, Any]]:
    rows = []
    for name, (shape, dtype, count) in CASES.items():
        n = count // 4 // 10 * 10 if quick else count
        makers: dict[str, Callable[[], Any]] = {
            "ours": lambda: OmeTiffSink(folder / "ours.ome.tiff", overwrite=True),
            "stock": lambda: OmeWritersSink.from_output(
                str(folder / "stock.ome.tiff"), overwrite=True
            ),
        }
        times: dict[str, list[float]] = {who: [] for who in makers}
        for i in range(repeats + 1):  # the first round warms up
            for who in sorted(makers, reverse=bool(i % 2)):
                seconds = write(makers[who](), shape, dtype, n, focus=who == "ours")
                (folder / f"{who}.ome.tiff").unlink()
                if i:
                    times[who].append(seconds)
        rate = {who: [n / t for t in ts] for who, ts in times.items()}
        ratios = [a / b for a, b in zip(rate["ours"], rate["stock"], strict=True)]
        row: dict[str, Any] = {"case": name, "frames": n, "repeats": repeats}
        for who, values in rate.items():
            row[f"{who}_frames_per_s"] = statistics.median(values)
            row[f"{who}_spread"] = [min(values), max(values)]
        row["ratio"] = statistics.median(ratios)
        row["ratio_spread"] = [min(ratios), max(ratios)]
        rows.append(row)
    return rows


def xml_time(n: int) -> dict[str, float]:
    """Seconds to build the OME-XML of `n` planes."""
    frames = [
        FrameRecord(
            index={"p": i // 200, "t": i % 200},
            name=f"tile {i // 200}",
            time_s=0.1 * i,
            exposure_ms=10.0,
            x_um=1.0,
            y_um=2.0,
            z_um=3.0,
            focus={"focus_id": i // 200, "status": "ok", "age_s": 0.1},
            shape=(2048, 2048),
            dtype="uint16",
            page=i,
            tag_page=i,
        )
        for i in range(n)
    ]
    header = Header(
        created="2026-01-01T00:00:00+00:00",
        uuid="urn:uuid:00000000-0000-4000-8000-000000000000",
    )
    start = time.perf_counter()
    xml = ome_xml(header, lay_out(frames), {}, FileFacts())
    return {"planes": n, "seconds": time.perf_counter() - start, "mb": len(xml) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a quarter of the frames")
    parser.add_argument(
        "--write", action="store_true", help="replace the section in RESULTS.md"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the stock sink warns about RGB
    logging.disable(logging.WARNING)  # ours, that the disk is slow
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(Path(folder), options.repeats, options.quick)
    xml = xml_time(2_000 if options.quick else 20_000)
    if options.json:
        print(json.dumps({"machine": platform.platform(), "throughput": rows, "xml": xml}))
        return
    lines = [
        f"From `setup` to the end of `close`, {options.repeats} pairs, files in memory, so "
        "that the disk does not decide; the median, and in brackets least and most.\n",
        "| frames | ours, frames/s | pymmcore-plus, frames/s | ratio (min … max) |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row['frames']} × {row['case']}"]
        for who in ("ours", "stock"):
            low, high = row[f"{who}_spread"]
            cells.append(f"{row[f'{who}_frames_per_s']:.0f} ({low:.0f} … {high:.0f})")
        low, high = row["ratio_spread"]
        cells.append(f"{row['ratio']:.2f} ({low:.2f} … {high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(
        "\nThe stock output hands each frame to a queue without a bound; ours waits when "
        "256 MiB are queued. "
        f"OME-XML of {xml['planes']} planes: {xml['seconds']:.1f} s, {xml['mb']:.1f} MB."
    )
    print("\n".join(lines))
    if options.write:
        write_section("ometiff", "Writing OME-TIFF", "\n".join(lines))


if __name__ == "__main__":
    main()
