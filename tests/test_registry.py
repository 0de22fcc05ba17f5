"""The tables of names: ours, and third parties' by entry points."""

from __future__ import annotations

from pathlib import Path

import pytest
from mm_autofocus.errors import InputError
from mm_autofocus.registry import METRICS, STRATEGIES, Registry
from mm_autofocus.replay import replay
from mm_autofocus.settings import AutofocusSettings, parse_settings
from mm_autofocus.strategies.learned import Learned

PLUGIN = '''
"""A strategy of a lab's own: one file."""
from typing import Annotated

from pydantic import Field

from mm_autofocus.settings import AutofocusSettings
from mm_autofocus.types import FocusResult


class Settings(AutofocusSettings):
    shots: Annotated[int, Field(ge=1)] = 2


class Fixed:
    name = "fixed"
    Settings = Settings

    def __init__(self, settings=None):
        self.shots = settings.shots if settings is not None else 2

    def focus(self, request):
        for i in range(self.shots):
            look = yield request.z_start_um + i
            look.score = float(look.image.mean())
        return FocusResult(request.z_start_um + 1, "ok", expected_error_um=0.5)


def brightest(image):
    return float(image.max())
'''

ENTRY_POINTS = """
[mm_autofocus.strategies]
fixed = lab_focus:Fixed
hill-climb = lab_focus:Fixed

[mm_autofocus.metrics]
brightest = lab_focus:brightest
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed third-party package, as pip leaves one."""
    (tmp_path / "lab_focus.py").write_text(PLUGIN)
    info = tmp_path / "lab_focus-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-focus\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for registry in (STRATEGIES, METRICS):
        monkeypatch.setattr(registry, "_third_party", None)


@pytest.mark.usefixtures("plugin")
def test_a_third_partys_strategy_runs_by_its_name_and_settings() -> None:
    import numpy as np

    assert STRATEGIES.names()[-1] == "fixed"
    assert METRICS.get("brightest")(np.eye(3)) == 1.0
    settings = parse_settings({"strategy": "fixed", "shots": 3, "metric": "brightest"})
    stack = np.random.default_rng(0).normal(size=(9, 16, 16))
    result = replay(stack, step_um=1.0, start_um=2.0, settings=settings)
    assert (result.strategy, result.z_um, result.looks) == ("fixed", 3.0, 3)
    with pytest.raises(InputError, match=r"shotz: unknown key \(did you mean 'shots'\?\)"):
        parse_settings({"strategy": "fixed", "shotz": 3})
    with pytest.raises(InputError, match="shots: unknown key"):
        parse_settings({"strategy": "hill-climb", "shots": 3})


@pytest.mark.usefixtures("plugin")
def test_what_ships_is_not_replaced_by_a_plug_in() -> None:
    assert STRATEGIES.get("hill-climb").__module__.startswith("mm_autofocus.")


def test_everything_that_ships_can_be_built() -> None:
    for name in STRATEGIES.names():
        strategy = STRATEGIES.get(name)
        assert strategy.name == name
        if not issubclass(strategy, Learned):  # these need a model: test_learned.py
            assert strategy(AutofocusSettings()).name == name
    for name in METRICS.names():
        assert callable(METRICS.get(name))


def test_adding_a_name_twice_is_refused() -> None:
    registry = Registry("strategy", "mm_autofocus.nothing", {"a": "math:pi"})
    registry.add("b", "math:tau")
    assert registry.get("b") == pytest.approx(6.283, abs=1e-3)
    with pytest.raises(InputError, match="'a' is already registered"):
        registry.add("a", "math:tau")
