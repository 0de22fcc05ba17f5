"""The tables of strategies, focus measures and models, ours and third parties'.

An entry is a string ``"module:object"`` and is imported when it is first asked for, so
that listing names costs nothing and an acquisition loads only what it uses. A third
party adds to a table by an entry point of the group ``mm_autofocus.<table>``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

from mm_autofocus.errors import InputError

__all__ = ["METRICS", "MODELS", "STRATEGIES", "Registry", "suggest"]


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` if a near word is allowed, else ``""``."""
    near = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class Registry:
    """A table of names, each imported when it is asked for.

    Parameters
    ----------
    what : str
        The word used in error messages, and the key in the settings: ``"strategy"``.
    group : str
        Entry-point group that third parties use.
    builtin : dict of str to str
        Name to ``"module:object"``.
    """

    def __init__(self, what: str, group: str, builtin: dict[str, str]) -> None:
        self.what = what
        self.group = group
        self._targets = dict(builtin)
        self._third_party: dict[str, Any] | None = None

    def _entry_points(self) -> dict[str, Any]:
        if self._third_party is None:
            found = entry_points(group=self.group)
            # What the package ships cannot be replaced unnoticed by an installed plug-in.
            self._third_party = {e.name: e for e in found if e.name not in self._targets}
        return self._third_party

    def names(self) -> list[str]:
        """All names: ours in their order, then third parties' by alphabet."""
        return [*self._targets, *sorted(self._entry_points())]

    def add(self, name: str, target: str) -> None:
        """Add ``"module:object"`` under `name` for this process.

        Raises
        ------
        InputError
            The name is taken.
        """
        if name in self.names():
            raise InputError(f"{self.what}: {name!r} is already registered")
        self._targets[name] = target

    def check(self, name: str) -> str:
        """Return `name` if it is in the table, else raise `InputError` with the choices."""
        if name not in self._targets and name not in self._entry_points():
            names = self.names()
            raise InputError(
                f"{self.what}: {name!r} is unknown{suggest(name, names)}; "
                f"allowed: {', '.join(names)}"
            )
        return name

    def get(self, name: str) -> Any:
        """Import and return what stands behind `name`.

        Raises
        ------
        InputError
            No such name.
        """
        self.check(name)
        if (target := self._targets.get(name)) is None:
            return self._entry_points()[name].load()
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)


_S = "mm_autofocus.strategies"
STRATEGIES = Registry(
    "strategy",
    "mm_autofocus.strategies",
    {
        "hill-climb": f"{_S}.hill_climb:HillClimb",
        "sweep": f"{_S}.sweep:Sweep",
        "brent": f"{_S}.brent:Brent",
        "one-shot": f"{_S}.one_shot:OneShot",
        "two-look": f"{_S}.two_look:TwoLook",
        "two-shot": f"{_S}.two_shot:TwoShot",
        "hardware": f"{_S}.hardware:Hardware",
    },
)
"""Classes with a constructor that takes the settings (see `settings.AutofocusSettings`)."""

_M = "mm_autofocus.metrics"
METRICS = Registry(
    "metric",
    "mm_autofocus.metrics",
    {
        "brenner": f"{_M}:brenner",
        "tenengrad": f"{_M}:tenengrad",
        "variance-of-laplacian": f"{_M}:variance_of_laplacian",
        "normalized-variance": f"{_M}:normalized_variance",
        "vollath-f4": f"{_M}:vollath_f4",
        "vollath-f5": f"{_M}:vollath_f5",
        "standard-deviation": f"{_M}:standard_deviation",
        "mid-frequency": f"{_M}:mid_frequency",
    },
)
"""Functions ``(image (Y, X)) -> float``, larger where sharper."""

MODELS = Registry("model", "mm_autofocus.models", {})
"""Models of learned focus; filled by third parties."""
