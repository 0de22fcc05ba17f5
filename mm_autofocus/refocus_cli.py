"""``mm-autofocus refocus``: carried out with an operator before it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_autofocus.console import make_console, progress_bar
from mm_autofocus.refocusing import refocus
from mm_autofocus.report import print_flagged

if TYPE_CHECKING:
    from pathlib import Path

    from mm_autofocus.refocusing import Refocused

__all__ = ["print_refocused", "refocus_shown"]


def refocus_shown(raw: Path, output: Path, *, quiet: bool = False, **options: Any) -> Refocused:
    """Recover with a progress bar.

    Parameters
    ----------
    raw, output, **options
        As for `mm_autofocus.refocus`.
    quiet : bool
        No progress bar.
    """
    with progress_bar("recovering", quiet=quiet) as on_pair:
        return refocus(raw, output, on_pair=on_pair, **options)


def print_refocused(found: Refocused) -> None:
    """Say what was done, and which tiles are not to be trusted."""
    console = make_console()
    told = found.to_json()

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    clauses = [f"{told['pairs']} tiles recovered by {found.model}"]
    clauses.append(f"ΔD {told['delta_um']:.2f} µm")
    clauses.append(f"{told['megapixels_per_s']:.2f} megapixels/s")
    line(", ".join(clauses))
    if told["psnr_db"] is not None:
        identity = told["psnr_identity_db"]
        line(f"PSNR {told['psnr_db']:.2f} dB, of the sharper shot {identity:.2f} dB")
    if found.alone:
        line(f"{found.alone} shots have no partner: their tiles are missing")
    print_flagged(found.tiles, console)
    line(f"data: {found.output}")
