"""The report of a training: how it went, and where the net is good or bad."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cv2
import numpy as np

from mm_autofocus.page import page, plot, png, section, table
from mm_autofocus.training.progress import read_log
from mm_autofocus.training.refocus_train_report import refocus_parts

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.figure import Figure

    from mm_autofocus.training.fields import Field
    from mm_autofocus.training.options import TrainOptions
    from mm_autofocus.training.validate import Validation

    Floats = npt.NDArray[np.float64]

__all__ = ["write_train_report"]

_EXAMPLES = 6
_EDGE_PX = 160


def write_train_report(run: Path, validation: Validation, options: TrainOptions) -> Path:
    """Write ``report.html`` and its plots as PNG into the folder of a run.

    Parameters
    ----------
    run : Path
        With ``log.jsonl`` and ``validation.npy``.
    validation : Validation
        What it was judged by.
    options : TrainOptions
        Of the training.

    Returns
    -------
    Path
        ``report.html``.
    """
    rows = read_log(run / "log.jsonl")
    frames = np.load(run / "validation.npy")
    best = min(rows, key=lambda r: validation.worth(r["validation"]))
    if "psnr_db" in best["validation"]:
        text, pictures = refocus_parts(
            run, rows, best, frames, cast("Any", validation), options
        )
        for name, data in pictures.items():
            (run / f"{name}.png").write_bytes(data)
        return _write(run, options, text)
    fields = validation.fields
    figures = {"curves": _curves(rows), "error": _errors(frames), "regression": _fit(frames)}
    pictures = {name: png(figure) for name, figure in figures.items()}
    for name, data in pictures.items():
        (run / f"{name}.png").write_bytes(data)
    titles = {
        "curves": "Losses and validation",
        "error": "Error against defocus",
        "regression": "Predicted against labelled defocus",
    }
    parts = [_head(run, options, rows, best)]
    parts += [section(title, plot(pictures[name])) for name, title in titles.items()]
    error = np.abs(frames[:, 3] - frames[:, 2])
    order = np.argsort(error, kind="stable")
    parts += [
        section("Worst frames", _examples(frames[order[::-1][:_EXAMPLES]], fields)),
        section("Best frames", _examples(frames[order[:_EXAMPLES]], fields)),
        section("Fields", _by_field(frames, fields)),
    ]
    return _write(run, options, parts)


def _write(run: Path, options: TrainOptions, parts: list[str]) -> Path:
    how = (
        f"<h2>Options</h2><details><summary>show</summary><pre>"
        f"{html.escape(options.to_yaml())}</pre></details>"
    )
    report = run / "report.html"
    text = page(f"Training of {options.model}", "".join((*parts, how)))
    report.write_text(text, encoding="utf-8")
    return report


def _head(
    run: Path, options: TrainOptions, rows: list[dict[str, Any]], best: dict[str, Any]
) -> str:
    v = best["validation"]
    looks = ", ".join(f"{z:+g}" for z in options.looks_um)
    facts = [
        f"looks at {looks} µm",
        f"{len(rows)} of {options.epochs} epochs",
        f"{sum(r['seconds'] for r in rows) / 60:.1f} min",
        f"best: epoch {best['epoch']}",
    ]
    return (
        f"<h1>Training of {html.escape(options.model)}</h1>"
        f'<div class="meta">{html.escape(str(run))} · {" · ".join(facts)}</div>'
        f"<p>Validation, on fields that were not trained on: mean absolute error "
        f"<b>{v['mae_um']:.3f} µm</b> (median {v['median_um']:.3f}), right direction "
        f"<b>{100 * v['dss']:.2f} %</b> of {v['frames']} frames; single patches "
        f"{v['patch_mae_um']:.3f} µm, {100 * v['patch_dss']:.2f} % of {v['patches']}.</p>"
        '<p class="meta">These frames chose the best epoch, and flatter it a little; '
        "mm-autofocus evaluate judges on the test part.</p>"
    )


def _curves(rows: list[dict[str, Any]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), layout="constrained")
    loss, mae, dss = figure.subplots(1, 3)
    epochs = [r["epoch"] for r in rows]
    known = {"epoch", "steps", "lr", "validation", "patches_per_s", "seconds", "best"}
    for name in [k for k in rows[0] if k not in known]:
        wide = 2.0 if name == "loss" else 1.0
        loss.plot(epochs, [r.get(name) for r in rows], label=name, lw=wide)
    loss.legend(fontsize=7)
    loss.set_title("training loss", fontsize=10)
    for key, label in (("mae_um", "frames"), ("patch_mae_um", "patches")):
        mae.plot(epochs, [r["validation"][key] for r in rows], label=label)
    mae.set_yscale("log")
    mae.legend(fontsize=7)
    mae.set_title("validation MAE (µm)", fontsize=10)
    for key, label in (("dss", "frames"), ("patch_dss", "patches")):
        dss.plot(epochs, [100 * r["validation"][key] for r in rows], label=label)
    dss.set_title("right direction (%)", fontsize=10)
    for ax in (loss, mae, dss):
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
    return figure


def _errors(frames: Floats) -> Figure:
    """Mean and spread of the error in bins of |defocus|."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    ax = figure.subplots()
    distance = np.abs(frames[:, 2])
    error = np.abs(frames[:, 3] - frames[:, 2])
    ax.plot(distance, error, ".", ms=3, alpha=0.35, color="#888888", label="frames")
    edges = np.linspace(0, max(distance.max(), 1e-6), 11)
    which = np.clip(np.digitize(distance, edges) - 1, 0, 9)
    full = [k for k in range(10) if (which == k).any()]
    middle = (edges[:-1] + edges[1:]) / 2
    means = [error[which == k].mean() for k in full]
    ax.plot(middle[full], means, "o-", color="#2a7f4f", label="mean")
    ax.plot(distance, frames[:, 4], ".", ms=2, alpha=0.25, color="#c98500", label="own sd")
    ax.set_yscale("symlog", linthresh=0.5)
    ax.set_ylim(0)
    ax.set_xlabel("|defocus| (µm)")
    ax.set_ylabel("|error| (µm)")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return figure


def _fit(frames: Floats) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    ax = figure.subplots()
    ends = [frames[:, 2:4].min(), frames[:, 2:4].max()]
    ax.plot(ends, ends, color="#888888", lw=1)
    ax.plot(frames[:, 2], frames[:, 3], ".", ms=4, alpha=0.5)
    ax.set_xlabel("label (µm)")
    ax.set_ylabel("prediction (µm)")
    ax.grid(alpha=0.3)
    return figure


def _examples(frames: Floats, fields: Sequence[Field]) -> str:
    """The first look of each frame, with what was said of it."""
    out = []
    for i, k, label, predicted, sd in frames:
        of = fields[int(i)]
        image = np.asarray(of.stack.plane(int(of.planes[int(k), 0])))
        small = _thumbnail(image)
        said = f"{predicted:+.2f} ± {sd:.2f} µm"
        text = f"{of.stack.group}: label {label:+.2f} µm, prediction {said}"
        out.append(
            f'<figure><img alt="frame" src="data:image/png;base64,{small}">'
            f"<figcaption>{html.escape(text)}</figcaption></figure>"
        )
    return f'<div class="tiles">{"".join(out)}</div>'


def _thumbnail(image: npt.NDArray[Any]) -> str:
    """The middle of an image, stretched to its own range, as PNG."""
    edge = min(image.shape[0], image.shape[1], 2 * _EDGE_PX)
    top, left = (image.shape[0] - edge) // 2, (image.shape[1] - edge) // 2
    part = image[top : top + edge, left : left + edge].astype(np.float32)
    low, high = np.percentile(part, (0.5, 99.5))
    part = np.clip((part - low) / max(high - low, 1e-6) * 255, 0, 255)
    small = cv2.resize(part, (_EDGE_PX, _EDGE_PX), interpolation=cv2.INTER_AREA)
    if small.ndim == 3:
        small = small[..., ::-1]
    _, data = cv2.imencode(".png", small.astype(np.uint8))
    return base64.b64encode(data.tobytes()).decode()


def _by_field(frames: Floats, fields: Sequence[Field]) -> str:
    rows = []
    for i in np.unique(frames[:, 0]).astype(int):
        mine = frames[frames[:, 0] == i]
        error = np.abs(mine[:, 3] - mine[:, 2])
        right = np.sign(mine[:, 3]) == np.sign(mine[:, 2])
        of = fields[i]
        rows.append(
            (
                of.stack.group,
                of.stack.sparsity,
                str(len(mine)),
                f"{error.mean():.3f}",
                f"{error.max():.3f}",
                f"{100 * np.mean(right | (mine[:, 2] == 0)):.1f}",
            )
        )
    rows.sort(key=lambda r: -float(r[3]))
    heads = ("field", "class", "frames", "MAE µm", "worst µm", "right direction %")
    return table(heads, rows[:100], text=2)
