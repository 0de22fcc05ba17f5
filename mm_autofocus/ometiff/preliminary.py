"""What the first page says while its file is being written, and for ever if it is killed.

A few elements, written directly: the first frame waits for them, and the pages themselves
carry all that a repair needs.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from mm_autofocus.ometiff.annotations import text
from mm_autofocus.ometiff.frames import NAMESPACE, FrameRecord, Header, image_key, to_json
from mm_autofocus.ometiff.layout import image_name
from mm_autofocus.ometiff.pages import DTYPES

__all__ = ["first_description"]

_SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_XSI = "http://www.w3.org/2001/XMLSchema-instance"
_NOTE = (
    "This file was not closed: only its first frame is described here. "
    "`mm-autofocus inspect --repair` completes it from its own pages."
)

_BYTES_PER_PLANE = 420
_BYTES_PER_FILE = 16 * 1024
_MOST_RESERVED = 32 * 2**20


def first_description(header: Header, first: FrameRecord, planes: int | None) -> bytes:
    """OME-XML while the file is being written: it describes the first frame only.

    It is as long as the final one will probably be, so that this fits in its place and
    a file can be closed even when the disk is full.

    Parameters
    ----------
    header : Header
        Of the file.
    first : FrameRecord
        The first frame; its page is 0.
    planes : int | None
        Planned in this file, if known.

    Returns
    -------
    bytes
        UTF-8, valid by the OME schema.
    """
    more = _BYTES_PER_PLANE * (planes or 100) + len(to_json(header.summary))
    more += len(to_json(header.plan)) + len(to_json(header.settings)) + _BYTES_PER_FILE
    xml: bytes = ET.tostring(_ome(header, first), encoding="utf-8", xml_declaration=True)
    end = b"</OME>"
    body = xml.removesuffix(end)
    return body + b" " * (min(more, _MOST_RESERVED) - len(xml)) + end


def _ome(header: Header, first: FrameRecord) -> ET.Element:
    root = ET.Element(
        "OME",
        {
            "xmlns": _SCHEMA,
            "xmlns:xsi": _XSI,
            "xsi:schemaLocation": f"{_SCHEMA} {_SCHEMA}/ome.xsd",
            "UUID": header.uuid,
            "Creator": text(header.creator),
        },
    )
    name = image_name(image_key(first.index), first.name)
    suffix = " (incomplete: see mm-autofocus inspect --repair)"
    image = ET.SubElement(root, "Image", {"ID": "Image:0", "Name": text(name) + suffix})
    ET.SubElement(image, "AcquisitionDate").text = header.created
    assert first.shape is not None
    samples = str(first.shape[2] if len(first.shape) == 3 else 1)
    pixels = {
        "ID": "Pixels:0",
        "DimensionOrder": "XYZCT",
        "Type": DTYPES[first.dtype],
        "Interleaved": "true" if len(first.shape) == 3 else "false",
        "BigEndian": "false",
        "SizeX": str(first.shape[1]),
        "SizeY": str(first.shape[0]),
        "SizeZ": "1",
        "SizeC": samples,
        "SizeT": "1",
    }
    if size := first.pixel_size_um or header.pixel_size_um:
        pixels |= {"PhysicalSizeX": str(size), "PhysicalSizeY": str(size)}
    element = ET.SubElement(image, "Pixels", pixels)
    ET.SubElement(element, "Channel", {"ID": "Channel:0:0", "SamplesPerPixel": samples})
    ET.SubElement(element, "TiffData", {"IFD": "0", "PlaneCount": "1"})
    notes = ET.SubElement(root, "StructuredAnnotations")
    note = {"ID": "Annotation:incomplete", "Namespace": f"{NAMESPACE}.incomplete"}
    value = ET.SubElement(ET.SubElement(notes, "MapAnnotation", note), "Value")
    ET.SubElement(value, "M", {"K": "note"}).text = _NOTE
    return root
