"""``mm-autofocus models``: which there are, what a model's card says, and whether it works."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mm_autofocus.models.card import ModelCard
    from mm_autofocus.models.refocus import RefocusModel
    from mm_autofocus.models.runtime import FocusModel, Prediction
    from mm_autofocus.types import Image

__all__ = ["app", "check_model", "check_refocus_model", "list_models"]

app = typer.Typer(help="Models of learned focus and of refocus: list, show, check.")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Name = Annotated[str, typer.Argument(help="A name, the path of an ONNX file, module:object.")]
CardFile = Annotated[
    Path | None, typer.Option("--card", help="A card (YAML) instead of the model's own.")
]

_ROUNDS = 5
_TILE_PX = 512
_MOST_SEAM = 1.5 / 255  # a grey value of 8 bits, by rounding


@app.callback(invoke_without_command=True)
def _models(context: typer.Context, json_: Json = False) -> None:
    if context.invoked_subcommand is None:
        _list(json_)


@app.command("list")
def _list(json_: Json = False) -> None:
    """List the models that are shipped or installed."""
    from rich.table import Table

    from mm_autofocus.console import make_console

    rows = list_models()
    if json_:
        _print_json({"models": rows})
        return
    console = make_console()
    if not rows:
        console.print("no models are installed; a path to an ONNX file works, too")
        return
    table = Table()
    heads = ("name", "from", "task", "looks at µm", "frames", "µm per pixel", "NA", "range µm")
    for heading in heads:
        table.add_column(heading, no_wrap=True)
    for row in rows:
        if "error" in row:
            table.add_row(row["name"], row["source"], "–", row["error"], style="red")
            continue
        low, high = row["z_range_um"]
        table.add_row(
            row["name"],
            row["source"],
            row["task"],
            _offsets(row["looks_um"])
            if row["delta_um"] is None
            else "ΔD {:g} … {:g}".format(*row["delta_um"]),
            _colour(row["channels"]),
            _known(row["pixel_size_um"]),
            _known(row["na"]),
            f"{low:+g} … {high:+g}",
        )
    console.print(table)


@app.command("show")
def _show(name: Name, card: CardFile = None, json_: Json = False) -> None:
    """Show the card of a model."""
    from mm_autofocus.console import make_console
    from mm_autofocus.models.importing import load_any

    model = load_any(name, card=card)
    data = json.loads(model.card.to_json())
    if json_:
        _print_json(data | {"size_bytes": _size(model)})
    else:
        make_console().print(_card_table(model.card, _size(model)), highlight=False)


@app.command("check")
def _check(
    name: Name,
    card: CardFile = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A frame, TIFF; one per look or shot, lower first (repeatable)."),
    ] = None,
    max_value: Annotated[
        float | None, typer.Option(help="Grey value at which the camera saturates.")
    ] = None,
    pixel_size_um: Annotated[float | None, typer.Option(help="Of the frame, in µm.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda, directml or coreml (repeatable).")
    ] = None,
    json_: Json = False,
) -> None:
    """Load a model, verify its file, let it look, and time it."""
    from mm_autofocus.console import make_console
    from mm_autofocus.models.importing import load_any
    from mm_autofocus.models.refocus import RefocusModel

    model = load_any(name, card=card, providers=provider)
    frames = [_read_frame(path) for path in image or ()]
    check: Any = check_refocus_model if isinstance(model, RefocusModel) else check_model
    found = check(model, frames or None, max_value=max_value, pixel_size_um=pixel_size_um)
    if json_:
        _print_json(found)
    else:
        console = make_console()
        y, x = found["frame"]
        what = f"{found['patches']} patches of " if "patches" in found else ""
        rate = found.get("megapixels_per_s")
        console.print(
            f"{found['name']}: {'ok' if found['ok'] else 'not ok'}, "
            f"{found['milliseconds']:.0f} ms for {what}a frame of {x} × {y} pixels"
            + ("" if rate is None else f", {rate:.2f} megapixels/s"),
            highlight=False,
        )
        if (defocus := found.get("defocus_um")) is not None:
            console.print(f"defocus {defocus:+.2f} µm", highlight=False)
        for clause in [*found["problems"], *found["notes"]]:
            console.print(f"- {clause}", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if found["ok"] else 1)


def list_models() -> list[dict[str, Any]]:
    """The shipped and installed models; with ``error`` where one cannot be loaded."""
    from mm_autofocus.models.importing import load_any, model_names, shipped_models

    shipped = shipped_models()
    rows = []
    for name in model_names():
        row: dict[str, Any] = {
            "name": name,
            "source": "shipped" if name in shipped else "plug-in",
        }
        try:
            model = load_any(name)
        except Exception as e:  # noqa: BLE001 -- a plug-in may raise anything; the others count
            rows.append(row | {"error": str(e).splitlines()[0] if str(e) else repr(e)})
            continue
        keys = ["architecture", "task", "looks_um", "channels", "patch_px", "pixel_size_um"]
        keys += ["na", "magnification", "z_range_um", "sha256"]
        card = json.loads(model.card.to_json())
        row["delta_um"] = None if card["shots"] is None else card["shots"]["half_um"]
        rows.append(row | {k: card[k] for k in keys} | {"size_bytes": _size(model)})
    return rows


def check_model(
    model: FocusModel,
    frames: Sequence[Image] | None = None,
    *,
    max_value: float | None = None,
    pixel_size_um: float | None = None,
) -> dict[str, Any]:
    """Let a model look at texture, at a blank frame and, if given, at a frame; and time it.

    Parameters
    ----------
    model : FocusModel
        Loaded; so its file is what its card says.
    frames : sequence of numpy.ndarray, optional
        One per look.
    max_value, pixel_size_um
        Of these frames.

    Returns
    -------
    dict
        ``name``, ``ok``, ``problems`` (what is wrong), ``notes`` (what is only to be known),
        ``frame`` (rows and columns), ``patches``, ``milliseconds``; with a frame also its
        ``defocus_um``, ``expected_error_um``, ``ood`` and ``reasons``.

    Raises
    ------
    InputError
        The frame is not what the model takes, or the model cannot be run.
    """
    import numpy as np

    card = model.card
    side = 9 * card.patch_px
    shape = (side, side) if card.channels == 1 else (side, side, 3)
    # coarse blocks: white noise would be taken for a blank frame, and rightly so
    coarse = np.random.default_rng(0).integers(20, 236, (side // 8 + 1,) * 2, dtype=np.uint8)
    texture = np.kron(coarse, np.ones((8, 8), np.uint8))[:side, :side]
    texture = texture if card.channels == 1 else np.stack([texture] * 3, axis=-1)
    blank = np.full(shape, 200, np.uint8)
    problems, notes = [], []
    if not card.sealed:
        notes.append("its card states no checksum: a damaged file would not be noticed")
    if card.ood is None:
        notes.append("its card does not say what the training's frames look like")
    if not frames:
        frames = [texture] * card.n_looks
    else:
        card.check_frame(frames[0].shape, max_value=max_value, pixel_size_um=pixel_size_um)
    model.warm(frames[0].shape)
    took = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        seen = model.predict(frames, max_value=max_value, pixel_size_um=pixel_size_um)
        took.append(1e3 * (time.perf_counter() - start))
    every = model.predict([texture] * card.n_looks, every_patch=True)
    problems += [
        f"texture: {r}" for r in every.reasons if r.startswith("the net gave no number")
    ]
    empty = model.predict([blank] * card.n_looks)
    if empty.trusted:
        problems.append(
            f"a blank frame is given the defocus {empty.defocus_um:+.2f} µm, and no reason to "
            "distrust it"
        )
    found: dict[str, Any] = {
        "name": card.name,
        "ok": not problems,
        "problems": problems,
        "notes": notes,
        "frame": list(frames[0].shape[:2]),
        "patches": len(seen.patch_defocus_um),
        "milliseconds": statistics.median(took),
    }
    if frames[0] is not texture:
        found |= _answer(seen)
        notes += seen.reasons
    return found


def check_refocus_model(
    model: RefocusModel,
    shots: Sequence[Image] | None = None,
    *,
    max_value: float | None = None,
    pixel_size_um: float | None = None,
) -> dict[str, Any]:
    """Let a model recover a tile of texture or, if given, two shots; and time it.

    Parameters
    ----------
    model : RefocusModel
        Loaded; so its file is what its card says.
    shots : sequence of numpy.ndarray, optional
        The lower and the upper one.
    max_value, pixel_size_um
        Of these shots.

    Returns
    -------
    dict
        As of `check_model`, with ``megapixels_per_s``, ``seam`` (by how much of the range
        what is recovered in tiles differs from what is at once), and with shots ``sharper``,
        ``focus_um``, ``ood`` and ``reasons``.

    Raises
    ------
    InputError
        The shots are not what the model takes, or it cannot be run.
    """
    import cv2
    import numpy as np

    card = model.card
    rng = np.random.default_rng(0)
    edge = _TILE_PX
    coarse = rng.integers(20, 236, (edge // 4, edge // 4, card.channels), dtype=np.uint8)
    sharp = np.kron(coarse.astype(np.uint8), np.ones((4, 4, 1), np.uint8))
    sharp = sharp[..., 0] if card.channels == 1 else sharp
    blur: Any = cv2.GaussianBlur
    given: Sequence[Image] = shots or [blur(sharp, (0, 0), sigma) for sigma in (1, 2)]
    if len(given) != 2:
        raise InputError(
            f"--image: model {card.name!r} takes two shots, the lower first, not {len(given)}"
        )
    problems, notes = [], []
    if not card.sealed:
        notes.append("its card states no checksum: a damaged file would not be noticed")
    if card.ood is None:
        notes.append("its card does not say what the training's frames look like")
    if model.shots.toward is None:
        notes.append("it does not tell whether the shots enclose the focus")
    options: dict[str, Any] = {"max_value": max_value, "pixel_size_um": pixel_size_um}
    model.warm(given[0].shape)
    took = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        seen = model.recover(given[0], given[1], **options)
        took.append(time.perf_counter() - start)
    if any("no number" in reason for reason in seen.reasons):
        problems.append("; ".join(seen.reasons))
    seam = _seam(model, given, options)
    if seam > _MOST_SEAM:
        problems.append(
            f"in tiles it recovers another image than at once, by {100 * seam:.1f} % of the "
            f"range: shots.halo_px {model.shots.halo_px} is too small for this net"
        )
    seconds = statistics.median(took)
    found: dict[str, Any] = {
        "name": card.name,
        "ok": not problems,
        "problems": problems,
        "notes": notes,
        "frame": list(given[0].shape[:2]),
        "milliseconds": 1e3 * seconds,
        "megapixels_per_s": given[0].shape[0] * given[0].shape[1] / 1e6 / seconds,
        "seam": seam,
    }
    if shots:
        found |= {
            "sharper": ("lower", "upper")[seen.sharper],
            "focus_um": seen.focus_um,
            "ood": seen.ood,
            "reasons": list(seen.reasons),
        }
        notes += seen.reasons
    return found


def _seam(model: RefocusModel, shots: Sequence[Image], options: dict[str, Any]) -> float:
    """Largest difference between a frame in tiles and at once, as a part of the range."""
    import numpy as np

    from mm_autofocus.models.frames import saturation

    edge = max(shots[0].shape[:2])
    whole, parts = (
        model.recover(shots[0], shots[1], tile_px=tile, **options).image.astype(np.float64)
        for tile in (edge, max(edge // 3, model.shots.multiple))
    )
    return float(np.abs(whole - parts).max()) / saturation(shots[0], options["max_value"])


def _answer(seen: Prediction) -> dict[str, Any]:
    return {
        "defocus_um": seen.defocus_um,
        "expected_error_um": seen.expected_error_um,
        "sparsity": seen.sparsity,
        "spread_um": seen.spread_um,
        "ood": seen.ood,
        "reasons": list(seen.reasons),
    }


def _read_frame(path: Path) -> Image:
    """Read one frame.

    Raises
    ------
    InputError
        The file is missing, is no TIFF, or holds something else than one frame.
    """
    import numpy as np
    import tifffile

    if not path.is_file():
        raise InputError(f"--image {path}: there is no such file")
    try:
        image = np.squeeze(np.asarray(tifffile.imread(path)))
    except Exception as e:  # noqa: BLE001 -- a damaged file can raise anything
        raise InputError(f"--image {path}: not a readable TIFF file ({e})") from None
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3):
        shape = " × ".join(map(str, image.shape))
        raise InputError(f"--image {path}: must be one frame, grey or RGB, not {shape}")
    return image


def _card_table(card: ModelCard, size: int | None) -> Any:
    from rich.table import Table

    table = Table(title=card.name, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    low, high = card.z_range_um
    looks = f"{card.n_looks}, at {_offsets(card.looks_um)} µm"
    if card.shots is not None:
        looks = "2 shots, ΔD {:g} … {:g} µm".format(*card.shots.half_um)
    scaled = ", others are scaled to it" if card.may_rescale else ""
    rows = {
        "architecture": card.architecture or "–",
        "task": card.task,
        "looks": looks,
        "frames": _colour(card.channels)
        + (f", {' or '.join(map(str, card.bit_depths))} bits" if card.bit_depths else ""),
        "patches": f"{card.patch_px} × {card.patch_px} pixels"
        + ("" if card.importance is None else ", chosen by an importance net"),
        "pixel size": f"{_known(card.pixel_size_um)} µm ± {100 * card.pixel_tolerance:g} %"
        f"{scaled}",
        "objective": f"{_known(card.magnification)} × / {_known(card.na)}",
        "lens": _lens(card),
        "calibration curve": _curve(card),
        "depth of field": f"{_known(card.dof_um)} µm",
        "trained range": f"{low:+g} … {high:+g} µm",
        "unlikeness score": "none" if card.ood is None else "of every frame",
        "file": "–" if size is None else f"{size / 1e6:.2f} MB",
        "sha256": card.sha256 if card.sealed else "not sealed",
    }
    for key, text in rows.items():
        table.add_row(key, text)
    for name, story in (("training", card.training), ("metrics", card.metrics)):
        for key, value in story.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            table.add_row(f"{name}: {key}", text)
    return table


def _lens(card: ModelCard) -> str:
    """What the model knows of the lens."""
    if card.lens is None:
        return "not asked for"
    if card.lens.values is None:
        return "not known; calibrate --fit-lens finds it"
    values = ", ".join(f"{name} {value:.3g}" for name, value in card.lens.values.items())
    facts = "".join(f"; {key} {value}" for key, value in card.lens.fitted.items())
    return f"{values}{facts}"


def _curve(card: ModelCard) -> str:
    """Of which slide the model has a calibration curve."""
    if card.curve is None:
        return "none; calibrate --fit-curve finds that of a slide"
    ends = card.curve.said_um
    facts = "".join(f"; {key} {value}" for key, value in card.curve.fitted.items())
    return f"from {ends[0]:+.3g} to {ends[-1]:+.3g} µm{facts}"


def _size(model: FocusModel | RefocusModel) -> int | None:
    from mm_autofocus.models.refocus import RefocusModel
    from mm_autofocus.models.runtime import OnnxModel

    if isinstance(model, RefocusModel):
        return model.size
    return model.net.size if isinstance(model, OnnxModel) else None


def _offsets(looks_um: Sequence[float]) -> str:
    return ", ".join(f"{o:+g}" if o else "0" for o in looks_um)


def _colour(channels: int) -> str:
    return "grey" if channels == 1 else "RGB"


def _known(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _print_json(document: Any) -> None:
    # plain print: rich would wrap and colour it
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
