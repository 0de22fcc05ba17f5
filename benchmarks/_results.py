"""Sections of RESULTS.md, each replaced by the script that measured it."""

from __future__ import annotations

import argparse
import platform
import re
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
_HEAD = (
    "# Measured\n\nWritten by the scripts beside this file; each replaces its own section.\n"
)


def pairs_parser(summary: str | None, pairs: int) -> argparse.ArgumentParser:
    """Options of a script that times things in turn, so many `pairs` of runs."""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--pairs", type=int, default=pairs)
    parser.add_argument(
        "--write", action="store_true", help="replace the section in RESULTS.md"
    )
    return parser


def ratio_cells(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the ratios pair by pair, and 5 … 95 % of them, as cells of a table."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, high = ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20]
    return f"{statistics.median(ratios):.3f} | {low:.3f} … {high:.3f}"


def environment() -> str:
    """The versions and the machine, for the foot of a section."""
    packages = ("numpy", "opencv-python-headless", "scipy", "tifffile", "pymmcore-plus")
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    machine = f"{platform.machine()} {platform.system()}"
    return f"Python {platform.python_version()}, {versions}; {machine}"


def write_section(key: str, title: str, text: str) -> None:
    """Replace (or append) one section.

    Parameters
    ----------
    key : str
        Name in the HTML comments that enclose the section.
    title, text : str
        Heading and Markdown body.
    """
    begin, end = f"<!-- begin {key} -->", f"<!-- end {key} -->"
    section = f"{begin}\n## {title}\n\n{text.strip()}\n\n*{environment()}*\n{end}"
    document = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else _HEAD
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(document):
        document = pattern.sub(lambda _: section, document)
    else:
        document = f"{document.rstrip()}\n\n{section}\n"
    RESULTS.write_text(document, encoding="utf-8")
