"""One strategy after another, until one is sure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm_autofocus.errors import InputError
from mm_autofocus.registry import STRATEGIES
from mm_autofocus.settings import AutofocusSettings, EscalationStep, settings_for
from mm_autofocus.strategies.learned import Learned
from mm_autofocus.strategies.shadow import Shadow
from mm_autofocus.types import (
    FocusRequest,
    FocusResult,
    FrameFormat,
    Look,
    Looking,
    Prepares,
    Strategy,
    Verdict,
    Verifies,
)

__all__ = ["Escalate", "build_strategy", "build_watcher"]


class Escalate:
    """Run strategies in turn; the first that is ``ok`` answers.

    Parameters
    ----------
    steps : sequence of (Strategy, EscalationStep or None)
        Who searches, and how far, in which steps and with how many looks; None: as the
        request says. A step with a range of its own searches around the best z found so
        far (the start, if there is none), within the limits of the request.

    Raises
    ------
    InputError
        There are no steps.

    Notes
    -----
    All share one look budget. If none is ``ok``, the ``low-confidence`` result with the
    highest score answers (where all have one; else that with the smallest expected
    error); if there is none either, the search has failed. ``details["tried"]`` lists
    what each said.
    """

    def __init__(self, steps: Sequence[tuple[Strategy, EscalationStep | None]]) -> None:
        if not steps:
            raise InputError("escalate: there is no strategy")
        self.steps = tuple(steps)
        self.name = self.steps[0][0].name
        self._answered: Strategy | None = None

    def prepare(self, frames: FrameFormat) -> None:
        """Prepare all of them."""
        for strategy, _ in self.steps:
            if isinstance(strategy, Prepares):
                strategy.prepare(frames)

    def verify(self, frame: Look, request: FocusRequest, offset_um: float) -> Verdict | None:
        """Let the strategy that answered last judge a frame."""
        who = self._answered
        return who.verify(frame, request, offset_um) if isinstance(who, Verifies) else None

    def focus(self, request: FocusRequest) -> Looking:
        """Begin the search that `request` describes."""
        self._answered = None
        results: list[FocusResult] = []
        left = request.max_looks
        for strategy, step in self.steps:
            if left < 1:
                break
            best = _best(results)
            mine = _request_for(request, step, left, best)
            result, used = yield from _counted(strategy.focus(mine))
            left -= used
            results.append(replace(result, strategy=result.strategy or strategy.name))
            if result.status == "ok":
                break
        answer, k = _answer(results)
        self._answered = self.steps[k][0]
        return answer


def _request_for(
    request: FocusRequest, step: EscalationStep | None, left: int, best: FocusResult | None
) -> FocusRequest:
    """The part of `request` that `step` is given."""
    if step is None:
        return replace(request, max_looks=left)
    low, high, start = request.z_min_um, request.z_max_um, request.z_start_um
    prior = request.prior
    if step.range_um is not None:
        if best is not None and best.z_um is not None:
            start = best.z_um
        low, high = max(low, start - step.range_um), min(high, start + step.range_um)
    if prior is not None and not low <= prior.z_um <= high:
        prior = None
    return replace(
        request,
        z_start_um=start,
        z_min_um=low,
        z_max_um=high,
        max_looks=min(left, step.max_looks or left),
        step_um=step.step_um or request.step_um,
        prior=prior,
    )


def _counted(search: Looking) -> Any:  # Generator[float, Look, tuple[FocusResult, int]]
    """As ``yield from search``, but return the number of looks beside the result."""
    looks = 0
    try:
        z_um = next(search)
        while True:
            look = yield z_um
            looks += 1
            z_um = search.send(look)
    except StopIteration as stop:
        return stop.value, looks
    finally:
        search.close()


def _best(results: Sequence[FocusResult]) -> FocusResult | None:
    found = [r for r in results if r.found]
    if not found:
        return None
    if all(r.score is not None for r in found):
        return max(found, key=lambda r: r.score if r.score is not None else -math.inf)
    unknown = math.inf
    return min(
        found,
        key=lambda r: unknown if r.expected_error_um is None else r.expected_error_um,
    )


def _answer(results: Sequence[FocusResult]) -> tuple[FocusResult, int]:
    """The result of all, and which of them it is."""
    tried = [
        {
            "strategy": r.strategy,
            "status": r.status,
            "z_um": r.z_um,
            "expected_error_um": r.expected_error_um,
            "reason": r.reason,
        }
        for r in results
    ]
    last = results[-1]
    chosen = last if last.status == "ok" else _best(results)
    k = next((i for i, r in enumerate(results) if r is chosen), len(results) - 1)
    if chosen is None:
        # the same clause need not be said twice
        reasons = dict.fromkeys(r.reason for r in results if r.reason)
        chosen = replace(last, reason="; ".join(reasons))
    return replace(chosen, details={**chosen.details, "tried": tried}), k


def build_strategy(settings: AutofocusSettings) -> Strategy | None:
    """The strategy that `settings` name, with what it escalates to and what watches it.

    Parameters
    ----------
    settings : AutofocusSettings
        ``strategy``, ``escalate`` and ``shadow``.

    Returns
    -------
    Strategy or None
        ``hardware`` is not built: it needs the microscope, and the engine runs it first.
        None if nothing follows it.

    Raises
    ------
    InputError
        A name is not registered, a strategy refuses its settings, or a model cannot be
        loaded.
    """
    steps: list[tuple[Strategy, EscalationStep | None]] = []
    if settings.search != "hardware":
        steps.append((_build(settings.search, settings), None))
    for step in settings.escalate:
        own = settings_for(step.strategy, settings, model=step.model)
        steps.append((_build(step.strategy, own), step))
    if not steps:
        return None
    strategy = steps[0][0]
    if len(steps) > 1 or steps[0][1] is not None:
        strategy = Escalate(steps)
    if settings.search == "hardware":
        return strategy  # its shadow watches the hardware
    watcher = build_watcher(settings)
    return strategy if watcher is None else Shadow(strategy, watcher)


def build_watcher(settings: AutofocusSettings) -> Learned | None:
    """The learned strategy of ``shadow``; None if there is none.

    Raises
    ------
    InputError
        It is no learned strategy, its model cannot be loaded, or it needs more than the one
        frame that there is beside the hardware's autofocus.
    """
    shadow = settings.shadow
    if shadow is None:
        return None
    own = settings_for(shadow.strategy, settings, model=shadow.model)
    watcher = _build(shadow.strategy, own)
    if not isinstance(watcher, Learned):
        raise InputError(
            f"shadow.strategy: {shadow.strategy!r} is not a learned strategy; use one-shot or "
            "two-look"
        )
    if settings.search == "hardware" and watcher.several:
        raise InputError(
            "shadow: beside 'hardware' a model sees the saved frame alone, and "
            f"{watcher.card.name!r} takes {watcher.card.n_looks} looks"
        )
    return watcher


def _build(name: str, settings: AutofocusSettings) -> Strategy:
    strategy = STRATEGIES.get(name)
    if not isinstance(settings, getattr(strategy, "Settings", AutofocusSettings)):
        # The keys of one strategy are unknown to the next; it gets those that all share.
        settings = settings_for(name, settings)
    built: Strategy = strategy(settings)
    return built
