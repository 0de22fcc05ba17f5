"""Saving: a streaming OME-TIFF sink, its reader, and the repair of files not closed.

The TIFF bytes are tifffile's, the OME model is that of ome-types.
"""

from __future__ import annotations

from mm_autofocus.ometiff.sink import OmeTiffSink

__all__ = ["OmeTiffSink"]
