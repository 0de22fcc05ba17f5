"""Recover a whole file that has been recorded."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import InputError
from mm_autofocus.models.importing import load_refocus_model, shipped_models
from mm_autofocus.models.refocus import TILE_PX
from mm_autofocus.ometiff.following import PageAt, read_page
from mm_autofocus.ometiff.layout import coordinate
from mm_autofocus.refocusing.fused import Fused, check_output
from mm_autofocus.refocusing.recovering import KEPT_RAW, Done, How, derived_of, recover_pair
from mm_autofocus.refocusing.source import Source, read_planes, read_source

if TYPE_CHECKING:
    from mm_autofocus.models.card import ModelCard
    from mm_autofocus.models.refocus import RefocusModel
    from mm_autofocus.refocusing.pairs import Pair

__all__ = ["DEFAULT_MODEL", "Refocused", "check_source", "load_chosen", "refocus"]

DEFAULT_MODEL = "tsva-slide20x"
"""The shipped model that is taken where none is named."""

_LEAST_TILE_PX = 64


@dataclass(slots=True)
class Refocused:
    """What a refocus did.

    Attributes
    ----------
    source, output : Path
        The raw file and the fused one.
    model, model_sha256 : str
        Who recovered.
    tiles : list of dict
        One per pair: index, position, status, reasons, kept, sharper, focus_um, ...
    alone : int
        Shots without a partner; they are not in the fused file.
    pixels : int
        Recovered.
    seconds : float
        It took, reading and writing included.
    """

    source: Path
    output: Path
    model: str
    model_sha256: str
    tiles: list[dict[str, Any]] = field(default_factory=list)
    alone: int = 0
    pixels: int = 0
    seconds: float = 0.0

    @property
    def flagged(self) -> list[dict[str, Any]]:
        """The tiles that are not to be trusted."""
        return [t for t in self.tiles if t["status"] != "ok"]

    @property
    def megapixels_per_s(self) -> float:
        """Of recovered image."""
        return self.pixels / 1e6 / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """The document that ``mm-autofocus refocus --json`` prints."""
        return {
            "source": str(self.source),
            "output": str(self.output),
            "model": self.model,
            "model_sha256": self.model_sha256,
            "pairs": len(self.tiles),
            "flagged": len(self.flagged),
            "raw_kept": sum(t["kept"] == KEPT_RAW for t in self.tiles),
            "shots_alone": self.alone,
            "delta_um": statistics.median(t["delta_um"] for t in self.tiles),
            "psnr_db": _mean(self.tiles, "psnr_db"),
            "psnr_identity_db": _mean(self.tiles, "psnr_identity_db"),
            "megapixels_per_s": self.megapixels_per_s,
            "seconds": self.seconds,
            "tiles": self.tiles,
        }


def _mean(tiles: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [t[key] for t in tiles if key in t]
    return statistics.fmean(values) if values else None


def refocus(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    model: str | Path | None = None,
    card: ModelCard | str | Path | None = None,
    raw_if_unsure: bool = False,
    scheduler: str | None = None,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    tile_px: int = TILE_PX,
    max_value: float | None = None,
    truth: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    compression: str | None = None,
    on_pair: Callable[[int, int], object] | None = None,
) -> Refocused:
    """Recover the sharp image of each tile of a two-shot scan.

    A few frames are in memory at a time, whatever the length of the file.

    Parameters
    ----------
    source : path
        An OME-TIFF whose Z axis is the two shots, the lower one first. It is left untouched.
    output : path
        ``*.ome.tif`` or ``*.ome.tiff``. It appears when all is written.
    model : str or path, optional
        A name or an ONNX file; default: :data:`DEFAULT_MODEL`.
    card : ModelCard, str or path, optional
        Card of a model that has none.
    raw_if_unsure : bool
        Keep the sharper shot where there is a reason to distrust the recovered image.
    scheduler : str, optional
        Address of a running Dask scheduler, ``tcp://host:8786``; needs ``distributed``.
    threads : int, optional
        Of one run of the net; default: as many as there are cores, on a cluster 1.
    providers : sequence of str, optional
        As for `mm_autofocus.models.importing.load_model`.
    tile_px : int
        Edge of a tile of a frame.
    max_value : float, optional
        Value at which the camera saturates, where pixels are floats.
    truth : path, optional
        An OME-TIFF with the planes in focus of the same tiles, to tell the PSNR.
    overwrite : bool
        Replace what is there.
    compression : {"zlib", "lzw", "zstd"}, optional
        Lossless compression of the planes.
    on_pair : callable, optional
        Called with the number of pairs that are done, and of all.

    Returns
    -------
    Refocused

    Raises
    ------
    InputError
        Nothing was written.
    HardwareError
        The disk or the cluster failed; there is no output.
    """
    raw, fused_path = Path(source), Path(output)
    known = None if truth is None else Path(truth)
    inputs = [raw] if known is None else [raw, known]
    check_output(fused_path, inputs, overwrite=overwrite, compression=compression)
    if tile_px < _LEAST_TILE_PX:
        raise InputError(f"tile_px: {tile_px} is not allowed: must be {_LEAST_TILE_PX} or more")
    found = read_source(raw)
    if threads is None:
        threads = 1 if scheduler is not None else cores()
    chosen = load_chosen(model, card=card, providers=providers, threads=threads)
    how = How(raw_if_unsure, tile_px, max_value)
    check_source(chosen, found, how)
    truths = _truths(found, known)
    work = [(pair, truths.get(_key(pair))) for pair in found.pairs]
    result = Refocused(raw, fused_path, chosen.card.name, chosen.card.sha256, alone=found.alone)
    derived = derived_of(chosen, raw, version("mm-autofocus"), how)
    derived |= {"source_uuid": found.header.uuid, "source_sha256": found.sha256}
    fused = Fused(
        fused_path,
        found.header,
        derived,
        pairs=len(work),
        overwrite=overwrite,
        compression=compression,
    )
    start = time.perf_counter()
    done: Generator[tuple[Pair, Done]]
    if scheduler is None:
        done = ((pair, recover_pair(chosen, pair, how, real)) for pair, real in work)
    else:
        from mm_autofocus.refocusing.cluster import recover_on_cluster

        done = recover_on_cluster(scheduler, chosen, work, how, threads=threads)
    try:
        fused.skip(found.left)
        for n, (pair, one) in enumerate(done, 1):
            fused.write(pair, one)
            if on_pair is not None:
                on_pair(n, len(work))
        fused.complete()
    except BaseException:
        fused.abandon()
        raise
    finally:
        done.close()
    result.tiles, result.pixels = fused.told, fused.pixels
    result.seconds = time.perf_counter() - start
    return result


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_chosen(model: str | Path | None, **options: Any) -> RefocusModel:
    """Load the model that is named, or the default.

    Raises
    ------
    InputError
        There is no such model; or none is named, and the default is not shipped.
    """
    if model is None and DEFAULT_MODEL not in shipped_models():
        raise InputError(
            f"model: {DEFAULT_MODEL!r}, the default, does not come with this installation; "
            "name one (--model), the path of an ONNX file that recovers the sharp image"
        )
    return load_refocus_model(DEFAULT_MODEL if model is None else model, **options)


def check_source(model: RefocusModel, source: Source, how: How) -> None:
    """Refuse a file that a model cannot be shown, before anything is written.

    Raises
    ------
    InputError
        Channels, pixel type, bit depth, pixel size or ΔD are not the model's; or the first
        plane cannot be read.
    """
    formats = {
        (p.frame.shape, p.frame.dtype, p.max_value, p.pixel_size_um): p for p in source.pairs
    }
    # a single tile that the stage made a little wider is flagged and not refused
    half_um = statistics.median(pair.half_um for pair in source.pairs)
    for pair in formats.values():
        max_value = pair.max_value if how.max_value is None else how.max_value
        model.check_type(pair.frame.dtype)
        if pair.frame.dtype == "float32" and max_value is None:
            raise InputError(
                f"{source.path}: max_value is missing: pixels that are floats do not tell "
                "where the camera saturates (--max-value)"
            )
        model.check(
            pair.frame.shape,
            half_um=half_um,
            max_value=max_value,
            pixel_size_um=pair.pixel_size_um,
        )
    read_page(source.pairs[0].lower)


def _key(pair: Pair) -> tuple[Any, ...]:
    key, t, c, _, cam = coordinate(pair.frame.index)
    return key, t, c, cam


def _truths(source: Source, path: Path | None) -> dict[tuple[Any, ...], PageAt]:
    """The plane in focus of each pair, by its place."""
    if path is None:
        return {}
    planes = read_planes(path).frames
    if any(frame.at("z") for frame, _ in planes):
        raise InputError(f"{path}: a file of planes in focus has one plane along Z")
    images = {key: n for n, key in enumerate(sorted({frame.key for frame, _ in planes}))}
    ours = {key: n for n, key in enumerate(sorted({p.frame.key for p in source.pairs}))}
    if len(images) != len(ours):
        raise InputError(
            f"{path}: holds {len(images)} images, {source.path} {len(ours)}; they must be the "
            "same tiles in the same order"
        )
    there = {}
    for frame, at in planes:
        _, t, c, _, cam = coordinate(frame.index)
        there[images[frame.key], t, c, cam] = frame, at
    found = {}
    for pair in source.pairs:
        key, t, c, cam = _key(pair)
        real = there.get((ours[key], t, c, cam))
        if real is None or real[0].shape != pair.frame.shape:
            what = "has no plane" if real is None else "has another size"
            raise InputError(f"{path}: {what} for {pair.name} of {source.path}")
        found[key, t, c, cam] = real[1]
    return found
