"""What a file says of its run before the first frame."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticSerializationError

from mm_autofocus.ometiff.frames import Header, finite

if TYPE_CHECKING:
    import useq

    from mm_autofocus.ometiff.layout import Plan
    from mm_autofocus.types import Optics

__all__ = ["installed", "make_header", "significant_bits"]

logger = logging.getLogger(__name__)

_PACKAGES = ("mm-autofocus", "pymmcore-plus", "useq-schema", "tifffile", "ome-types")


def make_header(
    sequence: useq.MDASequence,
    plan: Plan | None,
    meta: Mapping[str, Any],
    *,
    settings: Mapping[str, Any] | None = None,
    optics: Optics | None = None,
    creator: str = "mm_autofocus",
) -> Header:
    """Gather the header of a run.

    Parameters
    ----------
    sequence : useq.MDASequence
        The plan as the user gave it.
    plan : Plan | None
        The same, expanded; None if it does not know its length.
    meta : mapping
        Summary metadata of pymmcore-plus; may be empty.
    settings : mapping | None
        Of the autofocus.
    optics : Optics | None
        What is known of the microscope.
    creator : str
        Program named in the file.
    """
    summary = {k: v for k, v in meta.items() if k != "mda_sequence"}  # it is the plan
    info: Any = (summary.get("image_infos") or ({},))[0]
    pixel_size = finite(info.get("pixel_size_um"))
    if not pixel_size and optics is not None:
        pixel_size = optics.pixel_size_um
    return Header(
        created=_iso(summary.get("datetime")),
        uuid="",
        creator=creator,
        n_cameras=int(info.get("num_camera_adapter_channels", 1)),
        frames_planned=None if plan is None else len(plan),
        plan=None if plan is None else _plan_json(sequence),
        settings=None if settings is None else dict(settings),
        optics={} if optics is None else asdict(optics),
        versions=_versions(summary),
        pixel_size_um=pixel_size or None,
        summary=summary or None,
        significant_bits=significant_bits(summary),
    )


def significant_bits(summary: Mapping[str, Any]) -> int | None:
    """Bits of the camera, from ``Mono12`` and the like; None where it has all of its type."""
    info: Any = (summary.get("image_infos") or ({},))[0]
    digits = "".join(filter(str.isdigit, str(info.get("pixel_format") or "")))
    bits, kind = int(digits or 0), str(info.get("dtype") or "")
    full = {"uint8": 8, "uint16": 16}.get(kind, 0)
    return bits if 0 < bits < full else None


def _plan_json(sequence: useq.MDASequence) -> dict[str, Any]:
    """`sequence` as JSON values; metadata that JSON cannot hold are left out."""
    try:
        return sequence.model_dump(mode="json", exclude_unset=True)
    except PydanticSerializationError as e:
        logger.warning("the metadata of the plan are not saved: %s", e)
        return sequence.model_dump(mode="json", exclude_unset=True, exclude={"metadata"})


def _iso(text: Any) -> str:
    """`text` as ISO 8601 with an offset; now, if it is no date."""
    now = datetime.now(UTC).astimezone()
    with contextlib.suppress(TypeError, ValueError):
        when = datetime.fromisoformat(str(text))
        now = when if when.tzinfo else when.astimezone()
    return now.isoformat(timespec="milliseconds")


@functools.cache  # they do not change, and looking them up costs milliseconds
def installed() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("mm-autofocus", "pymmcore-plus", "useq-schema", "tifffile", "ome-types"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _versions(summary: Mapping[str, Any]) -> dict[str, str]:
    found = dict(installed())
    system = summary.get("system_info") or {}
    for name, key in (("MMCore", "mmcore_version"), ("MMDevice", "device_api_version")):
        if system.get(key):
            found[name] = str(system[key])
    return found
