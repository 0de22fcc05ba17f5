"""The second half of ``mm-autofocus demo --strategy two-shot``: recover, and tell the truth."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import InputError
from mm_autofocus.hooks.thumbnail import detail_at, thumbnail_png
from mm_autofocus.ometiff import read_plane, read_record

if TYPE_CHECKING:
    from mm_autofocus.refocusing import Refocused
    from mm_autofocus.sim.microscope import Exposure, Microscope
    from mm_autofocus.types import Image

__all__ = ["COLUMNS", "Recovered", "need_model", "recover"]

COLUMNS = (
    ("tile", "position"),
    ("kind", "kind"),
    ("F", "f_um"),
    ("F, tiles ago", "age_tiles"),
    ("sharper", "sharper"),
    ("focus - F", "true_offset_um"),
    ("by model", "told_offset_um"),
    ("raw dB", "psnr_identity_db"),
    ("recovered dB", "psnr_db"),
    ("status", "status"),
)
"""Heading and key of the table of tiles."""

_MOST_PICTURES = 30


@dataclass(frozen=True, slots=True)
class Recovered:
    """What came of the demo.

    Attributes
    ----------
    file : Path
        The fused file.
    refocused : Refocused
        What the refocusing says of itself.
    rows : list of dict
        One per tile: what the record, the model and the simulator say.
    strips : str
        HTML: sharper shot, recovered image and truth, tile by tile.
    """

    file: Path
    refocused: Refocused
    rows: list[dict[str, Any]]
    strips: str

    def verdict(self) -> dict[str, Any]:
        """Count and compare; all of it simulated."""
        seen = [r for r in self.rows if r["psnr_db"] is not None]
        enclosed = [r for r in seen if r["enclosed"]]
        outside = [r for r in seen if not r["enclosed"]]

        def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
            return fmean(r[key] for r in rows) if rows else None

        return {
            "tiles": len(self.rows),
            "non_blank": len(seen),
            "enclosed": len(enclosed),
            "flagged": sum(bool(r["reasons"]) for r in self.rows),
            "not_enclosed_flagged": sum(bool(r["reasons"]) for r in outside),
            "enclosed_flagged": sum(bool(r["reasons"]) for r in enclosed),
            "psnr_db": mean(seen, "psnr_db"),
            "psnr_identity_db": mean(seen, "psnr_identity_db"),
            "psnr_enclosed_db": mean(enclosed, "psnr_db"),
            "psnr_identity_enclosed_db": mean(enclosed, "psnr_identity_db"),
            "worse": sum(r["psnr_db"] < r["psnr_identity_db"] for r in seen),
        }

    def sentences(self) -> list[str]:
        """The verdict in words."""
        v = self.verdict()
        if not v["non_blank"]:
            return ["simulated: no tile shows specimen"]
        lines = [
            f"simulated: {v['psnr_db']:.1f} dB to the image in focus, of the sharper shot "
            f"as it is {v['psnr_identity_db']:.1f} dB; {v['non_blank']} tiles with specimen, "
            f"{v['worse']} became worse",
            f"simulated: {v['enclosed']} tiles have their focus between the two shots, "
            f"{v['enclosed_flagged']} of them flagged; of the others "
            f"{v['not_enclosed_flagged']} of {v['non_blank'] - v['enclosed']}",
        ]
        if v["enclosed"]:
            lines.insert(
                1,
                f"simulated: where focus lies between the shots {v['psnr_enclosed_db']:.1f} dB "
                f"against {v['psnr_identity_enclosed_db']:.1f} dB",
            )
        return [*lines, f"recovered images: {self.file}"]


def need_model(model: str | None) -> str:
    """The model to recover with: the one named, or the one that ships for this slide.

    Raises
    ------
    InputError
        It, or scikit-image, is not there. Nothing has been moved yet.
    """
    try:
        import skimage  # noqa: F401
    except ImportError:
        raise InputError(
            "--strategy two-shot compares with the truth by scikit-image, which is not "
            "installed: pip install mm-autofocus[demo]"
        ) from None
    from mm_autofocus.refocusing import DEFAULT_MODEL
    from mm_autofocus.refocusing.running import load_chosen

    load_chosen(model)
    return model or DEFAULT_MODEL


def recover(
    scope: Microscope,
    raw: Path,
    output: Path,
    model: str,
    exposures: Mapping[int, Exposure],
    rows: Sequence[Mapping[str, Any]],
    *,
    quiet: bool = False,
) -> Recovered:
    """Recover all tiles of the demo, and compare them with what the simulator knows.

    Parameters
    ----------
    scope : Microscope
        As it stood in the run.
    raw, output : path
        File of the run; file to write, replaced if it is there.
    model : str
        Name or path.
    exposures : mapping
        Number of the position to one of its exposures.
    rows : sequence of mapping
        Of the tiles, as the demo has them: ``true_defocus_um`` is of that exposure,
        ``focus_um`` what the stage would have had to read.
    quiet : bool
        No progress bar.

    Raises
    ------
    InputError
        The model does not fit.
    """
    from mm_autofocus.refocus_cli import refocus_shown
    from mm_autofocus.sim.truth import frame_in_focus
    from mm_autofocus.training.refocus_evaluate import psnr_db, ssim

    found = refocus_shown(raw, output, quiet=quiet, model=model, overwrite=True)
    told = {t["position"]: t for t in found.tiles}
    shots, fused = read_record(raw), read_record(output)
    at = {image.name: k for k, image in enumerate(fused.images)}
    out, strips = [], []
    for number, image in enumerate(shots.images):
        row = dict(next(r for r in rows if r["index"]["p"] == image.index["p"]))
        of_pair = told.get(image.name)
        details = row.get("details", {}).get("two_shot") or {}
        f, delta = details.get("f_um"), details.get("delta_um")
        focus = row.get("focus_um")
        row |= {
            "f_um": f,
            "age_tiles": details.get("age_tiles"),
            "sharper": None,
            "true_offset_um": None if focus is None or f is None else focus - f,
            "told_offset_um": None,
            "enclosed": False,
            "reasons": [],
            "psnr_db": None,
            "psnr_identity_db": None,
            "ssim": None,
        }
        if row["true_offset_um"] is not None and delta is not None:
            row["enclosed"] = abs(row["true_offset_um"]) <= delta
        out.append(row)
        if of_pair is None:  # a tile that was skipped
            continue
        row["sharper"] = of_pair["sharper"]
        row["reasons"] = list(of_pair["reasons"])
        if of_pair["focus_um"] is not None and f is not None:
            row["told_offset_um"] = of_pair["focus_um"] - f
        if row["true_defocus_um"] is None:  # a blank field
            continue
        exposure = exposures[image.index["p"]]
        truth = frame_in_focus(scope, exposure, row["true_defocus_um"])
        z = 0 if of_pair["sharper"] == "lower" else 1
        sharper = read_plane(raw, number, z=z, record=shots)
        recovered = read_plane(output, at[image.name], record=fused)
        limit = float(2 ** exposure.camera["bit_depth"] - 1)
        row["psnr_identity_db"] = psnr_db(sharper, truth, limit)
        row["psnr_db"] = psnr_db(recovered, truth, limit)
        row["ssim"] = ssim(recovered, truth, limit)
        strips.append(_strip(row, sharper, recovered, truth))
    if not out:
        raise InputError(f"{raw}: holds no tiles")
    return Recovered(output, found, out, _pictures(strips))


def _strip(row: Mapping[str, Any], sharper: Image, recovered: Image, truth: Image) -> str:
    """Three pictures of the same detail."""
    at = detail_at(truth)
    shown = (
        (f"sharper shot, {row['psnr_identity_db']:.1f} dB", sharper),
        (f"recovered, {row['psnr_db']:.1f} dB", recovered),
        ("in focus, without noise", truth),
    )
    pictures = "".join(
        f'<img alt="{what}" title="{what}" '
        f'src="data:image/png;base64,{thumbnail_png(image, at)}">'
        for what, image in shown
    )
    offset = row["true_offset_um"]
    where = "" if offset is None else f": focus {offset:+.1f} µm from F"
    words = [f"{row['position']}{where}", " | ".join(what for what, _ in shown)]
    caption = html.escape(" · ".join([*words, *row["reasons"]]))
    return f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>"


def _pictures(strips: Sequence[str]) -> str:
    if not strips:
        return '<p class="none">No tile shows specimen.</p>'
    rows = "".join(
        f'<div style="margin-bottom: 1rem">{s}</div>' for s in strips[:_MOST_PICTURES]
    )
    return (
        '<p class="meta">Simulated. The same detail of the sharper shot as it is, of what was '
        "recovered from both, and of what the camera would have seen in focus, without noise."
        f"</p>{rows}"
    )
