"""The report of a training that recovers the sharp image: curves, gain, examples."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from mm_autofocus.page import plot, png, section
from mm_autofocus.training.pairs import decibels

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from mm_autofocus.training.options import TrainOptions
    from mm_autofocus.training.validate import RefocusValidation

    Floats = npt.NDArray[np.float64]

__all__ = ["refocus_parts"]

_EXAMPLES = 5
_EDGE_PX = 200


def refocus_parts(
    run: Path,
    rows: list[dict[str, Any]],
    best: dict[str, Any],
    pairs: Floats,
    validation: RefocusValidation,
    options: TrainOptions,
) -> tuple[list[str], dict[str, bytes]]:
    """Make the parts of the page.

    Parameters
    ----------
    run : Path
        Folder of the run; its ``best.ckpt`` recovers the examples.
    rows, best : list of dict, dict
        Log, and the row of the best epoch.
    pairs : numpy.ndarray
        ``(n, 8)``, as `RefocusValidation.score` returns them.
    validation : RefocusValidation
        What it was judged by.
    options : TrainOptions
        Of the training.

    Returns
    -------
    parts : list of str
        HTML.
    pictures : dict
        Name to PNG, of the plots among them.
    """
    pictures = {"curves": png(_curves(rows)), "gain": png(_gain(pairs))}
    v = best["validation"]
    head = (
        f"<h1>Training of {html.escape(options.model)}</h1>"
        f'<div class="meta">{html.escape(str(run))} · shots '
        f"{options.pairs.half_um[0]:g} … {options.pairs.half_um[1]:g} µm from their middle · "
        f"{len(rows)} of {options.epochs} epochs · "
        f"{sum(r['seconds'] for r in rows) / 60:.1f} min · best: epoch {best['epoch']}</div>"
        f"<p>Validation, on fields that were not trained on: PSNR "
        f"<b>{v['psnr_db']:.2f} dB</b>, {v['gain_db']:+.2f} dB over the sharper shot; "
        f"{100 * v['worse']:.1f} % of {v['pairs']} pairs became worse; the focus between the "
        f"shots is found to {v['toward_mae_um']:.2f} µm.</p>"
        '<p class="meta">The truth is a recorded plane with the noise of the camera, which '
        "limits the PSNR. These pairs chose the best epoch, and flatter it a little; "
        "mm-autofocus evaluate judges on the test part.</p>"
    )
    order = np.argsort(pairs[:, 4] / np.maximum(pairs[:, 3], 1e-9), kind="stable")
    parts = [
        head,
        section("Losses and validation", plot(pictures["curves"])),
        section("Gain over the sharper shot", plot(pictures["gain"])),
        section("Smallest gain", _examples(run, order[::-1][:_EXAMPLES], pairs, validation)),
        section("Largest gain", _examples(run, order[:_EXAMPLES], pairs, validation)),
    ]
    return parts, pictures


def _curves(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    loss, psnr, focus = figure.subplots(1, 3)
    epochs = [r["epoch"] for r in rows]
    for name in ("loss", "image", "toward"):
        loss.plot(epochs, [r.get(name) for r in rows], label=name)
    loss.set_yscale("symlog", linthresh=0.1)
    loss.legend(fontsize=7)
    loss.set_title("training loss", fontsize=10)
    for key, label in (("psnr_db", "recovered"), ("identity_db", "sharper shot")):
        psnr.plot(epochs, [r["validation"][key] for r in rows], label=label)
    psnr.legend(fontsize=7)
    psnr.set_title("validation PSNR (dB)", fontsize=10)
    focus.plot(epochs, [r["validation"]["toward_mae_um"] for r in rows])
    focus.set_title("error of the focus between the shots (µm)", fontsize=10)
    for ax in (loss, psnr, focus):
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
    return figure


def _gain(pairs: Floats) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    gain, toward = figure.subplots(1, 2)
    db = decibels(pairs[:, 4]) - decibels(pairs[:, 3])
    shown = gain.scatter(pairs[:, 1], db, c=np.abs(pairs[:, 2]), s=8, cmap="viridis")
    figure.colorbar(shown, ax=gain, label="middle off focus (µm)")
    gain.axhline(0, color="#888888", lw=1)
    gain.set_xlabel("half distance of the shots (µm)")
    gain.set_ylabel("gain (dB)")
    ends = [pairs[:, 7].min(), pairs[:, 7].max()]
    toward.plot(ends, ends, color="#888888", lw=1)
    toward.plot(pairs[:, 7], pairs[:, 5], ".", ms=4, alpha=0.5)
    toward.set_xlabel("focus from the sharper shot towards the other, label (µm)")
    toward.set_ylabel("by the net (µm)")
    for ax in (gain, toward):
        ax.grid(alpha=0.3)
    return figure


def _examples(
    run: Path, numbers: npt.NDArray[np.intp], pairs: Floats, validation: RefocusValidation
) -> str:
    """Sharper shot, recovered image and truth beside each other."""
    import torch

    from mm_autofocus.training.checkpoint import BEST, load_checkpoint, net_of
    from mm_autofocus.training.pairs import read_pair

    net: Any = net_of(load_checkpoint(run / BEST))
    p = min(validation.patch_px, _EDGE_PX) // net.multiple * net.multiple
    out = []
    for i in numbers:
        pair, y, x = validation.items[int(i)]
        of = validation.fields[pair.field]
        shots, side = read_pair(validation.truths.reader, of, pair, y, x, p, p)
        c = net.context.channels
        with torch.inference_mode():
            given = torch.from_numpy(shots[None, : net.shots * c])
            known = (torch.tensor([v]) for v in (float(side), pair.half_um))
            image = net(given, *known).image[0].numpy()
        truth = validation.truths.crop(pair, y, x, p, p)
        strip = np.concatenate((shots[:c], image, truth), 2)
        before, after = decibels(pairs[i, 3]), decibels(pairs[i, 4])
        text = (
            f"{of.stack.group}: shots at {pair.lower_um:+.1f} and {pair.upper_um:+.1f} µm; "
            f"sharper shot {before:.1f} dB, recovered {after:.1f} dB, and the plane in focus"
        )
        out.append(
            f'<figure class="wide"><img alt="sharper shot, recovered, in focus" '
            f'src="data:image/png;base64,{_picture(strip)}">'
            f"<figcaption>{html.escape(text)}</figcaption></figure>"
        )
    return f'<div class="tiles">{"".join(out)}</div>'


def _picture(image: npt.NDArray[Any]) -> str:
    """``(C, Y, X)`` in 0 … 1 as PNG, in base 64."""
    whole = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    shown = (
        whole[0]
        if len(whole) == 1
        else np.ascontiguousarray(whole.transpose(1, 2, 0)[..., ::-1])
    )
    _, data = cv2.imencode(".png", shown)
    return base64.b64encode(data.tobytes()).decode()
