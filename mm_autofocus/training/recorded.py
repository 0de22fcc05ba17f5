"""Recorded stacks become a dataset: TIFF with a known step, OME-TIFF with its own z."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import numpy as np
import tifffile

from mm_autofocus.errors import InputError
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.ometiff.recovery import open_tiff
from mm_autofocus.replay import load_stack
from mm_autofocus.training.dataset import Dataset
from mm_autofocus.training.label import LEAST_PLANES, StackMeter
from mm_autofocus.training.stack import Stack
from mm_autofocus.training.store import PLANES, DatasetWriter, labelled, optics_json
from mm_autofocus.types import Optics

if TYPE_CHECKING:
    from mm_autofocus.types import Image

__all__ = ["Recorded", "add_recorded", "find_stacks"]

_IN_UM = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}


@dataclass(frozen=True, slots=True)
class Recorded:
    """A z-stack in a file that somebody recorded.

    Attributes
    ----------
    path : Path
        The file.
    field : str
        Name of the field: of the file, and of the image in it where it has several.
    z_um : tuple of float
        Of each plane.
    pages : tuple of int | None
        TIFF pages; None: the whole file is the stack, as `load_stack` reads it.
    time, channel : int
        In its image.
    channel_name : str
        "" where there is none.
    x_um, y_um, pixel_size_um : float | None
        As far as the file knows them.
    """

    path: Path
    field: str
    z_um: tuple[float, ...]
    pages: tuple[int, ...] | None = None
    time: int = 0
    channel: int = 0
    channel_name: str = ""
    x_um: float | None = None
    y_um: float | None = None
    pixel_size_um: float | None = None

    def load(self) -> Image:
        """Read it, ``(Z, Y, X)`` or ``(Z, Y, X, 3)``.

        Raises
        ------
        InputError
            The file is damaged, or its planes are not of one shape.
        """
        if self.pages is None:
            return load_stack(self.path)
        with open_tiff(self.path) as tif:
            size = tif.filehandle.size
            planes = []
            for k in self.pages:
                page: Any = tif.pages[k]
                ends = zip(page.dataoffsets, page.databytecounts, strict=True)
                # tifffile reads what lies beyond the end of a torn file as zeros
                if any(start + count > size for start, count in ends):
                    raise InputError(f"{self.path}: the file is cut off; pixels are missing")
                planes.append(page.asarray())
        if len({(p.shape, p.dtype) for p in planes}) > 1:
            raise InputError(f"{self.path}: the planes of the stack are unequal in shape")
        stack: Image = np.stack(planes)
        if stack.ndim not in (3, 4) or (stack.ndim == 4 and stack.shape[3] != 3):
            raise InputError(f"{self.path}: planes of shape {stack.shape[1:]} are no images")
        return stack


def add_recorded(
    files: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    step_um: float | None = None,
    slide: str = "slide",
    optics: Mapping[str, float] | None = None,
    measure: FocusMeasure | None = None,
) -> tuple[Dataset, int]:
    """Copy recorded stacks into a dataset, and label them.

    Parameters
    ----------
    files : sequence of path
        TIFF or OME-TIFF. Stacks that the dataset has already are left out.
    output : path
        Folder of the dataset.
    step_um : float, optional
        Distance of the planes; needed where the files do not say their z.
    slide : str, optional
        Name of the slide they are from.
    optics : mapping, optional
        na, magnification, wavelength_um, refractive_index, pixel_size_um.
    measure : FocusMeasure, optional
        That defines focus.

    Returns
    -------
    dataset : Dataset
    new : int
        Stacks added.

    Raises
    ------
    InputError
        Of a file, the step or the folder; all files are looked at before anything is
        written.
    """
    if not files:
        raise InputError("--from: no files were named")
    if step_um is not None and not (np.isfinite(step_um) and step_um > 0):
        raise InputError(f"--step-um: {step_um:g} is not allowed: must be greater than 0 (µm)")
    known = Optics(**dict(optics or {}))
    writer = DatasetWriter(output, measure or FocusMeasure())
    writer.check_slide(slide, None)
    stacks = [s for file in files for s in find_stacks(file, step_um)]
    twice: dict[tuple[Any, ...], Path] = {}
    for s in stacks:
        key = (s.field, s.time, s.channel)
        if twice.setdefault(key, s.path) is not s.path:
            raise InputError(
                f"{s.path}: {twice[key]} has a field named {s.field!r}, too; give the files "
                "names of their own, or another --slide"
            )
    there = {s.key: s.origin for s in writer.stacks}
    for s in stacks:
        origin = there.get((slide, s.field, s.time, s.channel), str(s.path.resolve()))
        if origin != str(s.path.resolve()):
            raise InputError(
                f"{s.path}: the dataset has field {s.field!r} of slide {slide!r} from "
                f"{origin}; give another --slide"
            )
    writer.begin(slide, {"plan": None})
    new = 0
    for s in stacks:
        if (slide, s.field, s.time, s.channel) not in {t.key for t in writer.stacks}:
            writer.append(_copied(s, writer, slide, known))
            new += 1
    writer.finish()
    return writer.dataset(), new


def find_stacks(path: str | os.PathLike[str], step_um: float | None) -> list[Recorded]:
    """The z-stacks in a file, with the z of each plane.

    An OME-TIFF has one for each of its images, channels and time points; any other file is
    one stack.

    Raises
    ------
    InputError
        It is no file to read, it holds no stack, or nothing says where its planes are.
    """
    path = Path(path)
    name = path.name
    for suffix in (".tiff", ".tif", ".ome"):
        name = name.removesuffix(suffix)
    with open_tiff(path) as tif:
        ome = tif.ome_metadata
        series = len(tif.series) if ome is None else 1
    if ome is not None:
        return _ome_stacks(path, name, ome, step_um)
    if series > 1:
        raise InputError(f"{path}: the planes of the stack are unequal in shape")
    planes = len(load_stack(path))
    if step_um is None:
        raise InputError(f"{path}: does not say the z of its planes; give --step-um")
    _enough(path, planes)
    return [Recorded(path, name, tuple(k * step_um for k in range(planes)))]


def _ome_stacks(path: Path, name: str, ome: str, step_um: float | None) -> list[Recorded]:
    try:
        root = ET.fromstring(ome)
    except ET.ParseError as e:
        raise InputError(f"{path}: its OME-XML does not parse ({e})") from None
    pixels = root.findall("{*}Image/{*}Pixels")
    found = []
    for i, (image, px) in enumerate(zip(root.findall("{*}Image"), pixels, strict=True)):
        field = name if len(pixels) == 1 else f"{name} {image.get('Name') or i}"
        found += list(_of_image(path, field, px, step_um))
    names = [(s.field, s.time, s.channel) for s in found]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two of its images have the same name")
    if not found:
        raise InputError(f"{path}: holds no z-stack")
    return found


def _of_image(path: Path, field: str, px: ET.Element, step: float | None) -> Iterator[Recorded]:
    """The stacks of one OME Image."""
    channels = px.findall("{*}Channel")
    pages = _pages(path, px)
    planes = {_index(p, "The"): p for p in px.iterfind("{*}Plane")}
    size_z = int(px.get("SizeZ", 1))
    _enough(path, size_z)
    spacing = _um(px, "PhysicalSizeZ")
    for t, c in sorted({(t, c) for t, c, _ in pages}):
        at = [(t, c, z) for z in range(size_z)]
        if any(a not in pages for a in at):
            raise InputError(f"{path}: planes of {field!r} are missing; a stack has all")
        own = [planes.get(a) for a in at]
        z_um: list[float | None] = [None if p is None else _um(p, "PositionZ") for p in own]
        apart = step or (spacing if any(z is None for z in z_um) else None)
        if apart:
            z_um = [k * apart for k in range(size_z)]
        known = [z for z in z_um if z is not None]
        if len(known) < size_z:
            raise InputError(f"{path}: does not say the z of its planes; give --step-um")
        if len(set(known)) < size_z:
            raise InputError(f"{path}: says the same z of several planes; give --step-um")
        first = own[0]
        yield Recorded(
            path,
            field,
            tuple(known),
            tuple(pages[a] for a in at),
            t,
            c,
            channels[c].get("Name", "") if c < len(channels) else "",
            None if first is None else _um(first, "PositionX"),
            None if first is None else _um(first, "PositionY"),
            _um(px, "PhysicalSizeX"),
        )


def _pages(path: Path, px: ET.Element) -> dict[tuple[int, int, int], int]:
    """TIFF page of each ``(t, c, z)``, by the TiffData elements."""
    order = px.get("DimensionOrder", "XYZCT")[2:]
    channels = px.findall("{*}Channel")
    samples = int(channels[0].get("SamplesPerPixel", 1)) if channels else 1
    size = {a: int(px.get(f"Size{a}", 1)) for a in "TCZ"}
    size["C"] //= samples
    total = size["T"] * size["C"] * size["Z"]
    found: dict[tuple[int, int, int], int] = {}
    for block in px.iterfind("{*}TiffData"):
        uuid = block.find("{*}UUID")
        if uuid is not None and uuid.get("FileName", path.name) != path.name:
            raise InputError(f"{path}: its planes lie in several files; give a file with all")
        t, c, z = _index(block, "First")
        start = {"T": t, "C": c, "Z": z}
        ifd = int(block.get("IFD", 0))
        count = int(block.get("PlaneCount", 1 if block.get("IFD") else total))
        offset, scale = 0, 1
        for a in order:
            offset, scale = offset + start[a] * scale, scale * size[a]
        for k in range(count):
            rest, at = offset + k, {}
            for a in order:
                rest, at[a] = divmod(rest, size[a])
            found[at["T"], at["C"], at["Z"]] = ifd + k
    return found


def _index(element: ET.Element, prefix: str) -> tuple[int, int, int]:
    t, c, z = (int(element.get(f"{prefix}{a}", 0)) for a in "TCZ")
    return t, c, z


def _um(element: ET.Element, name: str) -> float | None:
    """A length in µm; None where it is not said, or in no unit of length."""
    value = element.get(name)
    if value is None:
        return None
    # OME: sizes are in µm if nothing is said, positions in a frame of reference; programs
    # that leave the unit of a position out mean µm
    unit = element.get(f"{name}Unit", "µm")
    return float(value) * _IN_UM[unit] if unit in _IN_UM else None


def _enough(path: Path, planes: int) -> None:
    if planes < LEAST_PLANES:
        raise InputError(
            f"{path}: {planes} planes are too few to find a focus in; at least "
            f"{LEAST_PLANES} are needed"
        )


def _copied(s: Recorded, writer: DatasetWriter, slide: str, known: Optics) -> Stack:
    images = s.load()
    if len(images) != len(s.z_um):
        raise InputError(f"{s.path}: has {len(images)} planes, not {len(s.z_um)}")
    meter = StackMeter(writer.measure)
    for z, image in zip(s.z_um, images, strict=True):
        meter.add(z, image)
    optics = replace(known, pixel_size_um=known.pixel_size_um or s.pixel_size_um)
    number = 1 + max(
        (int(t.file.rpartition("/")[2][1:6]) for t in writer.stacks if t.origin), default=0
    )
    file = f"{PLANES}/s{number:05d}.ome.tiff"
    metadata: dict[str, Any] = {
        "axes": "ZYXS" if images.ndim == 4 else "ZYX",
        "Name": s.field,
        "Plane": {
            "PositionZ": list(s.z_um),
            "PositionZUnit": ["µm"] * len(images),
        },
    }
    if optics.pixel_size_um:
        for axis in "XY":
            metadata[f"PhysicalSize{axis}"] = optics.pixel_size_um
            metadata[f"PhysicalSize{axis}Unit"] = "µm"
    # whole or not at all: a torn copy is never in the index
    tifffile.imwrite(
        writer.path / file,
        images,
        ome=True,
        photometric="rgb" if images.ndim == 4 else "minisblack",
        metadata=metadata,
    )
    return Stack(
        folder=writer.path,
        file=file,
        slide=slide,
        field=s.field,
        time=s.time,
        channel=s.channel,
        channel_name=s.channel_name,
        pages=tuple(range(len(images))),
        x_um=s.x_um,
        y_um=s.y_um,
        shape=images.shape,
        dtype=str(images.dtype),
        bit_depth=images.dtype.itemsize * 8 if images.dtype.kind in "ui" else None,
        optics=optics_json(optics),
        origin=str(s.path.resolve()),
        **labelled(meter, optics.dof_um),
    )
