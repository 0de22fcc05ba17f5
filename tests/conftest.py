"""Real parts for the tests: the DemoCamera adapters, with Waves or Beads that follow z."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import pytest
from mm_autofocus.config import close_core, open_core
from pymmcore_plus import CMMCorePlus

if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers share the cores: threads of each for all of them would only wait for another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cv2.setNumThreads(1)

ROOT = Path(__file__).parent.parent
PLANS = ROOT / "acquisition_plans"
# Files that take longest: first, so that no worker waits long for the last one of another.
LONG = (
    "test_readme.py",
    "test_demo.py",
    "test_refocus_live.py",
    "test_faults.py",
    "test_demo_two_shot.py",
    "test_plans.py",
    "test_train.py",
    "test_collect.py",
    "test_refocus_nets.py",
    "test_strategies.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda i: LONG.index(i.path.name) if i.path.name in LONG else len(LONG))


@pytest.fixture
def make_core() -> Iterator[Callable[..., CMMCorePlus]]:
    """Opens cores on the demo adapters and closes them explicitly."""
    cores: list[CMMCorePlus] = []

    def make(mode: str = "Fluorescent Beads", z_um: float = 0.0) -> CMMCorePlus:
        core = open_core("demo_camera.cfg")
        cores.append(core)
        core.setProperty("Camera", "Mode", mode)
        core.setExposure(1)
        core.setZPosition(z_um)
        return core

    yield make
    for core in cores:
        core.mda.cancel()
        close_core(core)


@pytest.fixture
def core(make_core: Callable[..., CMMCorePlus]) -> CMMCorePlus:
    return make_core()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of recorded stacks; tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("MM_AUTOFOCUS_DATA", ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no recorded stacks in {root} (set MM_AUTOFOCUS_DATA)")
    return root
