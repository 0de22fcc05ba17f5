"""Closing a file, by its writer or by a repair: blank planes and the final OME-XML."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from mm_autofocus.ometiff.annotations import FileFacts
from mm_autofocus.ometiff.frames import FORMAT, FrameRecord, Header, ImageKey, to_json
from mm_autofocus.ometiff.layout import ImageLayout, Plan, lay_out
from mm_autofocus.ometiff.model import ome_xml
from mm_autofocus.ometiff.pages import PageWriter, overwrite_description

__all__ = ["finish", "page_tag"]

logger = logging.getLogger(__name__)


def page_tag(
    frame: FrameRecord | None = None,
    *,
    blank_of: ImageKey | None = None,
    header: Header | None = None,
    skipped: Sequence[FrameRecord] = (),
) -> str:
    """Value of the private tag: what the page is, and what goes with it.

    Parameters
    ----------
    frame : FrameRecord | None
    blank_of : tuple | None
        The image that uses this page of zeros.
    header : Header | None
        On the first page.
    skipped : sequence of FrameRecord
        The frames left out since the page before.
    """
    content: dict[str, object] = {"mm_autofocus": FORMAT}
    if frame is not None:
        content["frame"] = frame.to_dict()
    if blank_of is not None:
        content["blank_of"] = dict(blank_of)
    if header is not None:
        content["header"] = header.to_dict()
    if skipped:
        content["skipped"] = [s.to_dict() for s in skipped]
    return to_json(content)


def finish(
    writer: PageWriter,
    header: Header,
    frames: Sequence[FrameRecord],
    *,
    skipped: Sequence[FrameRecord],
    plan: Plan | None,
    facts: FileFacts,
    unsaid: Sequence[FrameRecord] = (),
    blanks: Mapping[ImageKey, int] | None = None,
) -> list[ImageLayout]:
    """Fill the holes, close the file and write its OME-XML.

    All planes of an image that hold no data point at one page of zeros, so that a plan
    with many holes costs no disk. (One page for several images would do in Bio-Formats,
    but tifffile cannot read that.)

    Parameters
    ----------
    writer : PageWriter
        Open; closed on return.
    header : Header
        Of this file.
    frames, skipped : sequence of FrameRecord
        What is in the file, and what was left out on purpose.
    plan : Plan | None
        Of this file.
    facts : FileFacts
        What to say of the file; `error` means that there may be no room for more pages.
    unsaid : sequence of FrameRecord
        Those of `skipped` that no page has recorded yet.
    blanks : mapping | None
        Pages of zeros that are there already.

    Returns
    -------
    list of ImageLayout
        As written.

    Raises
    ------
    OSError
        The OME-XML could not be written. All frames are in the file; `repair` may
        complete it later.
    """
    images = lay_out(frames, skipped, plan)
    blanks = dict(blanks or {})
    try:
        try:
            rest = list(unsaid)
            for image in images:
                if not image.gaps or image.key in blanks:
                    continue
                tag = page_tag(blank_of=image.key, skipped=rest)
                page = writer.add_blank(image.shape, image.dtype, tag)
                blanks[image.key] = page
                for record in rest:
                    record.tag_page = page
                rest = []
        except OSError as e:
            logger.warning("%s: no room for a page of zeros (%s)", writer.path, e)
            facts.error = facts.error or str(e)
    finally:
        writer.close()
    write_description(writer.path, header, images, blanks, facts)
    return images


def write_description(
    path: Path,
    header: Header,
    images: Sequence[ImageLayout],
    blanks: Mapping[ImageKey, int],
    facts: FileFacts,
) -> None:
    """Write the final OME-XML, without the bulky parts if there is no room for them."""
    try:
        overwrite_description(path, ome_xml(header, images, blanks, facts))
    except OSError as e:
        logger.warning("%s: no room for the whole OME-XML (%s)", path, e)
        facts.brief, facts.error = True, facts.error or str(e)
        overwrite_description(path, ome_xml(header, images, blanks, facts))
