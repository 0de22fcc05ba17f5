"""The core's own hardware autofocus, by the name ``hardware``.

There is nothing to search here: the device focuses, and whoever holds the core asks it
to (see `hooks`). The class only carries the name and says so where no device can help.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mm_autofocus.errors import InputError

if TYPE_CHECKING:
    from mm_autofocus.settings import AutofocusSettings
    from mm_autofocus.types import FocusRequest, Looking

__all__ = ["Hardware"]


class Hardware:
    """Marks the core's autofocus device as the one to be asked."""

    name = "hardware"

    def __init__(self, settings: AutofocusSettings | None = None) -> None:
        del settings

    def focus(self, request: FocusRequest) -> Looking:
        """Refuse: a recorded stack or a virtual rig has no autofocus device."""
        raise InputError(
            "strategy: 'hardware' needs a microscope with an autofocus device; it cannot "
            "search in recorded images"
        )
