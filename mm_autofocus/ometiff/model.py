"""The OME-XML of a file, from its header and its layout.

The model is built with ome-types, but for the two elements that each plane has
(`TiffData`, `Plane`): they hold numbers only, and 20 000 of them take ten times longer
as objects than as text.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import ome_types.model as ome

from mm_autofocus.ometiff.annotations import (
    FileFacts,
    Links,
    link,
    structured_annotations,
    text,
)
from mm_autofocus.ometiff.frames import FrameRecord, Header, ImageKey, finite
from mm_autofocus.ometiff.layout import ImageLayout, PlaneIndex
from mm_autofocus.ometiff.pages import DTYPES

__all__ = ["ome_xml"]

_DECLARATION = b'<?xml version="1.0" encoding="UTF-8"?>\n'
_PIXELS_END = "</Pixels>"

Blanks = Mapping[ImageKey, int]
"""Image → its page of zeros, which stands for all its planes without data."""


def ome_xml(
    header: Header,
    images: Sequence[ImageLayout],
    blanks: Blanks,
    facts: FileFacts,
) -> bytes:
    """Build the OME-XML.

    Parameters
    ----------
    header : Header
        Of the file.
    images : sequence of ImageLayout
        One per OME Image.
    blanks : mapping
        Pages of zeros. A plane without data and without a blank page gets no TiffData:
        readers fill it with zeros themselves.
    facts : FileFacts
        What to say of the file.

    Returns
    -------
    bytes
        UTF-8.
    """
    links = link(images, derived=header.derived is not None)
    shell = _model(header, images, links, facts).to_xml(indent=0).strip()
    before, *after = shell.split(_PIXELS_END)  # in text and attributes "<" is escaped
    parts = [before]
    for i, (image, rest) in enumerate(zip(images, after, strict=True)):
        parts += [*_planes(i, image, blanks, links), _PIXELS_END, rest]
    return _DECLARATION + "".join(parts).encode("utf-8")


def _model(
    header: Header, images: Sequence[ImageLayout], links: Links, facts: FileFacts
) -> ome.OME:
    """Build everything but the planes."""
    cameras = sorted({camera for image in images for camera in image.cameras if camera})
    detectors = {camera: f"Detector:{i}" for i, camera in enumerate(cameras)}
    objective = _objective(header)
    instruments = []
    if detectors or objective:
        instruments = [
            ome.Instrument(
                id="Instrument:0",
                detectors=[ome.Detector(id=d, model=text(c)) for c, d in detectors.items()],
                objectives=objective,
            )
        ]
    ome_images = []
    for i, image in enumerate(images):
        known: dict[str, Any] = _stage_label(image)
        if instruments:
            known["instrument_ref"] = ome.InstrumentRef(id="Instrument:0")
        if objective:
            known["objective_settings"] = _objective_settings(header)
        ome_images.append(
            ome.Image(
                id=f"Image:{i}",
                name=text(image.name),
                acquisition_date=datetime.fromisoformat(header.created),
                pixels=_pixels(i, image, header, detectors),
                annotation_refs=[ome.AnnotationRef(id=ref) for ref in links.of_image(i, image)],
                **known,
            )
        )
    return ome.OME(
        uuid=header.uuid,
        creator=text(header.creator),
        images=ome_images,
        instruments=instruments,
        structured_annotations=structured_annotations(header, images, links, facts),
    )


def _objective(header: Header) -> list[ome.Objective]:
    na = finite(header.optics.get("na"))
    magnification = finite(header.optics.get("magnification"))
    known: dict[str, Any] = {"lens_na": na, "nominal_magnification": magnification}
    known = {k: v for k, v in known.items() if v is not None}
    return [ome.Objective(id="Objective:0", **known)] if known else []


def _objective_settings(header: Header) -> ome.ObjectiveSettings:
    known: dict[str, Any] = {}
    if (index := finite(header.optics.get("refractive_index"))) is not None:
        known["refractive_index"] = index
    return ome.ObjectiveSettings(id="Objective:0", **known)


def _stage_label(image: ImageLayout) -> dict[str, Any]:
    """Where the first frame of the image was taken."""
    first = min(image.frames.values(), key=lambda f: f.page, default=None)
    if first is None:
        return {}
    stage = {"x": first.x_um, "y": first.y_um, "z": first.z_um}
    known: dict[str, Any] = {k: v for k, v in stage.items() if v is not None}
    known.update({f"{k}_unit": ome.UnitsLength.MICROMETER for k in list(known)})
    return {"stage_label": ome.StageLabel(name=text(image.name), **known)} if known else {}


def _pixels(
    i: int, image: ImageLayout, header: Header, detectors: Mapping[str, str]
) -> ome.Pixels:
    samples = image.shape[2] if len(image.shape) == 3 else 1
    channels = []
    for c in range(image.size_c):
        known: dict[str, Any] = {}
        if image.channels[c]:
            known["name"] = text(image.channels[c])
        if image.cameras[c]:
            known["detector_settings"] = ome.DetectorSettings(id=detectors[image.cameras[c]])
        channels.append(ome.Channel(id=f"Channel:{i}:{c}", samples_per_pixel=samples, **known))
    first = next(iter(image.frames.values()), None)
    bits = (first.bits if first else None) or header.significant_bits
    return ome.Pixels(
        id=f"Pixels:{i}",
        # T outermost: tifffile and napari then see (T, C, Z, Y, X)
        dimension_order=ome.Pixels_DimensionOrder.XYZCT,
        type=ome.PixelType(DTYPES[image.dtype]),
        big_endian=False,
        interleaved=samples > 1,
        size_x=image.shape[1],
        size_y=image.shape[0],
        size_z=image.size_z,
        size_c=image.size_c * samples,
        size_t=image.size_t,
        channels=channels,
        significant_bits=bits or None,
        **_physical_sizes(image, header),
    )


def _physical_sizes(image: ImageLayout, header: Header) -> dict[str, Any]:
    first = next(iter(image.frames.values()), None)
    size = (first.pixel_size_um if first else None) or header.pixel_size_um
    sizes = {"physical_size_x": size, "physical_size_y": size} if size else {}
    if step := _z_step(image):
        sizes["physical_size_z"] = step
    return sizes


def _planes(i: int, image: ImageLayout, blanks: Blanks, links: Links) -> list[str]:
    """Write TiffData and Plane of all planes of image number `i`; nothing needs escaping."""
    blocks, planes = [], []
    for at, frame in sorted(image.frames.items(), key=lambda item: item[1].page):
        blocks.append(_tiff_data(at, frame.page))
        planes.append(_plane(at, frame, links.of_plane(i, at)))
    blank = blanks.get(image.key)
    for at, (reason, _record) in image.gaps.items():
        if blank is not None:
            blocks.append(_tiff_data(at, blank))
        planes.append(_plane(at, None, links.of_plane(i, at, reason)))
    return blocks + planes


def _tiff_data(at: PlaneIndex, page: int) -> str:
    t, c, z = at
    return f'<TiffData IFD="{page}" FirstZ="{z}" FirstC="{c}" FirstT="{t}" PlaneCount="1"/>'


def _plane(at: PlaneIndex, frame: FrameRecord | None, refs: list[str]) -> str:
    t, c, z = at
    parts = [f'<Plane TheZ="{z}" TheC="{c}" TheT="{t}"']
    if frame is not None:
        if frame.time_s is not None:
            parts.append(f' DeltaT="{frame.time_s!r}"')
        if frame.exposure_ms is not None:
            parts.append(f' ExposureTime="{frame.exposure_ms / 1000!r}"')
        for axis, value in (("X", frame.x_um), ("Y", frame.y_um), ("Z", frame.z_um)):
            if value is not None:
                # the schema's default unit is "reference frame", which means nothing
                parts.append(f' Position{axis}="{value!r}" Position{axis}Unit="µm"')
    if not refs:
        return "".join([*parts, "/>"])
    links = [f'<AnnotationRef ID="{ref}"/>' for ref in refs]
    return "".join([*parts, ">", *links, "</Plane>"])


def _z_step(image: ImageLayout) -> float | None:
    """Median distance between the planes of the stacks, in µm, as really reached."""
    steps = [
        abs(upper.z_um - frame.z_um)
        for (t, c, z), frame in image.frames.items()
        if (upper := image.frames.get((t, c, z + 1))) is not None
        and upper.z_um is not None
        and frame.z_um is not None
    ]
    return statistics.median(steps) or None if steps else None
