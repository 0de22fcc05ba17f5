"""Find a Micro-Manager configuration and load it into a core."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from mm_autofocus.errors import InputError
from mm_autofocus.registry import suggest

if TYPE_CHECKING:
    from pymmcore_plus import CMMCorePlus

__all__ = ["close_core", "open_core", "shipped"]

_PY_DEVICE = "#py "


def shipped(folder: str, name: str) -> Path:
    """Path of a file that comes with the package.

    Parameters
    ----------
    folder : {"demo_config", "acquisition_plans"}
        Where it is.
    name : str
        Its file name.

    Raises
    ------
    InputError
        There is no such file.
    """
    package = Path(__file__).parent
    # installed wheels carry the folders inside the package, a checkout beside it
    roots = (package / "_data" / folder, package.parent / folder)
    for root in roots:
        if (path := root / name).is_file():
            return path
    names = sorted({p.name for root in roots if root.is_dir() for p in root.iterdir()})
    raise InputError(f"{name}: no such file in {folder}{suggest(name, names)}")


def open_core(config: str | os.PathLike[str]) -> CMMCorePlus:
    """Load a configuration into a new core.

    Configurations with Python devices (lines that begin with ``#py``) get the core of
    pymmcore-plus that can run them beside compiled adapters. Compiled adapters are those
    of the installed Micro-Manager, or of ``mm-test-adapters`` if there is none.

    Parameters
    ----------
    config : path
        A Micro-Manager ``.cfg``, or the name of one that is shipped (``demo_camera.cfg``).

    Raises
    ------
    InputError
        No such file, no device adapters, or a device that does not load.
    """
    path = Path(config)
    if not path.is_file():
        if path.name != str(config) or path.suffix != ".cfg":
            raise InputError(f"{path}: no such file")
        path = shipped("demo_config", path.name)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    python_devices = any(line.startswith(_PY_DEVICE) for line in text.splitlines())
    from pymmcore_plus import CMMCorePlus

    if python_devices:
        from pymmcore_plus.experimental.unicore import UniMMCore

        core: CMMCorePlus = UniMMCore()
    else:
        core = CMMCorePlus()
    _ensure_adapters(core, needed=not python_devices)
    try:
        core.loadSystemConfiguration(str(path))
    except Exception as e:
        close_core(core)
        reason = " ".join(str(e).split())
        raise InputError(f"{path}: does not load: {reason}") from e
    return core


def _ensure_adapters(core: CMMCorePlus, *, needed: bool) -> None:
    if any(Path(p).is_dir() for p in core.getDeviceAdapterSearchPaths()):
        return
    if find_spec("mm_test_adapters") is not None:
        import mm_test_adapters

        core.setDeviceAdapterSearchPaths([mm_test_adapters.device_adapter_path()])
    elif needed:
        raise InputError(
            "no Micro-Manager device adapters were found; install Micro-Manager "
            "(mmcore install), or for the demo: pip install mm-test-adapters"
        )


def close_core(core: CMMCorePlus) -> None:
    """Unload the devices and stop the core's own thread.

    That thread calls into Python; still running when the interpreter ends, it can take the
    process down after all is done, and its exit code with it.
    """
    from pymmcore_plus import CMMCorePlus

    with suppress(RuntimeError):  # a configuration that never loaded
        core.unloadAllDevices()
    # pymmcore-plus keeps this method for itself, and calls it only when it is collected
    super(CMMCorePlus, core).registerCallback(None)
