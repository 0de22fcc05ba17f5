"""Software autofocus for Micro-Manager in Python, on pymmcore-plus.

Importing the package is cheap: what needs the microscope, a file format or a plot is
imported when it is first used, and no logger is configured.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("mm-autofocus")
except PackageNotFoundError:  # pragma: no cover - run from an unpacked tree
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from mm_autofocus.api import RunResult, autofocus, run
    from mm_autofocus.errors import (
        AutofocusError,
        FocusFailedError,
        HardwareError,
        InputError,
    )
    from mm_autofocus.hooks.pymmcore import AutofocusEngine
    from mm_autofocus.ometiff import OmeTiffSink
    from mm_autofocus.plan import load_plan
    from mm_autofocus.settings import AutofocusSettings
    from mm_autofocus.types import FocusRequest, FocusResult, Look, Optics, Prior, Strategy

__all__ = [
    "AutofocusEngine",
    "AutofocusError",
    "AutofocusSettings",
    "FocusFailedError",
    "FocusRequest",
    "FocusResult",
    "HardwareError",
    "InputError",
    "Look",
    "OmeTiffSink",
    "Optics",
    "Prior",
    "Refocused",
    "RunResult",
    "Strategy",
    "autofocus",
    "load_plan",
    "refocus",
    "run",
]

_WHERE = {
    "AutofocusEngine": "hooks.pymmcore",
    "AutofocusError": "errors",
    "AutofocusSettings": "settings",
    "FocusFailedError": "errors",
    "FocusRequest": "types",
    "FocusResult": "types",
    "HardwareError": "errors",
    "InputError": "errors",
    "Look": "types",
    "OmeTiffSink": "ometiff",
    "Optics": "types",
    "Prior": "types",
    "Refocused": "refocusing",
    "RunResult": "api",
    "Strategy": "types",
    "autofocus": "api",
    "load_plan": "plan",
    "refocus": "refocusing",
    "run": "api",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
