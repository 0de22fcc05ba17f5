"""Saving: a streaming OME-TIFF sink, its reader, and the repair of files not closed.

The TIFF bytes are tifffile's, the OME model is that of ome-types. Frames go one way::

    OmeTiffSink → Conveyor (a queue of bounded size) → FileSet → PageWriter → the file
                                                                                │
    FileRecord ← read_record ← OME-XML ← finish ← lay_out ← the tags of the pages
"""

from __future__ import annotations

from mm_autofocus.ometiff.reader import read_plane, read_record
from mm_autofocus.ometiff.record import (
    FileRecord,
    FocusRecord,
    FrameUse,
    ImageRecord,
    PlaneRecord,
)
from mm_autofocus.ometiff.recovery import FileInfo, read_info, repair
from mm_autofocus.ometiff.sink import OmeTiffSink

__all__ = [
    "FileInfo",
    "FileRecord",
    "FocusRecord",
    "FrameUse",
    "ImageRecord",
    "OmeTiffSink",
    "PlaneRecord",
    "read_info",
    "read_plane",
    "read_record",
    "repair",
]
