"""One run of a plan with autofocus, as the engine holds it, and what it is made of."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import useq
from pymmcore_plus.core._sequencing import SequencedEvent

from mm_autofocus.hooks.checks import check_plan, prepare_strategy, stage_limits_um
from mm_autofocus.hooks.ledger import Ledger, Place
from mm_autofocus.hooks.rig import CoreRig
from mm_autofocus.hooks.shot_plan import delta_of
from mm_autofocus.hooks.shots import Shots
from mm_autofocus.hooks.verifying import Pending, Verification, Watching, why_not
from mm_autofocus.plan import autofocus_plans, planned_home_um, position_of, z_offsets_um
from mm_autofocus.strategies.escalate import build_strategy, build_watcher
from mm_autofocus.strategies.two_shot import TwoShotSettings
from mm_autofocus.types import FocusRequest, FocusResult, Strategy, Verifies

if TYPE_CHECKING:
    from pymmcore_plus import CMMCorePlus

    from mm_autofocus.settings import AutofocusSettings
    from mm_autofocus.strategies.learned import Learned

__all__ = ["FrameSink", "Run", "complaints_of_host", "is_image", "parts_of"]

logger = logging.getLogger(__name__)


class FrameSink(Protocol):
    """Where the frames go; `ometiff.OmeTiffSink` is one."""

    def setup(self, sequence: useq.MDASequence, meta: Any, **context: Any) -> None:
        """Prepare for the frames of `sequence`."""
        ...

    def append(self, img: Any, event: useq.MDAEvent, meta: Any) -> None:
        """Take one frame; may block, so that a slow disk slows the acquisition."""
        ...

    def skip(
        self, event: useq.MDAEvent | None = None, *, frames: int = 1, record: Any = None
    ) -> None:
        """Note frames that will not come."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


@dataclass(slots=True)
class Run:
    """What the engine holds during one run of a plan with autofocus.

    Attributes
    ----------
    sequence, settings : useq.MDASequence, AutofocusSettings
        The plan, and how to focus.
    strategy : Strategy | None
        None: only the hardware's own.
    rig, ledger : CoreRig, Ledger
        What moves, and the books.
    refocus_within_visit : bool
        The plan asks for a focus per channel or plane.
    continuous_focus_was_on : bool
        To be switched on again at the end.
    started_s : float
        When the run began, on the clock of `time.perf_counter`.
    watcher : Learned | None
        The shadow of the hardware's autofocus; that of a strategy is part of `strategy`.
    pending : dict
        Place → the focus there that no frame has proved yet.
    shots : Shots | None
        The books of a two-shot scan.
    """

    sequence: useq.MDASequence
    settings: AutofocusSettings
    strategy: Strategy | None
    rig: CoreRig
    ledger: Ledger
    refocus_within_visit: bool
    continuous_focus_was_on: bool = False
    started_s: float = field(default_factory=time.perf_counter)
    watcher: Learned | None = None
    pending: dict[Hashable, Pending] = field(default_factory=dict)
    shots: Shots | None = None

    @classmethod
    def prepare(
        cls, core: CMMCorePlus, sequence: useq.MDASequence, settings: AutofocusSettings
    ) -> Run:
        """Check everything that can be checked, and build the strategy; move nothing."""
        check_plan(core, sequence, settings)
        rig = CoreRig(core, settings)
        ledger = Ledger(
            settings,
            z_run_start_um=rig.at_rest_um(),
            offsets_um=z_offsets_um(sequence),
            stage_limits_um=stage_limits_um(core),
        )
        for i, position in enumerate(sequence.stage_positions):
            if position.z is not None:
                ledger.check_home(position.z, f"stage_positions[{i}]")
        if not sequence.stage_positions or any(p.z is None for p in sequence.stage_positions):
            ledger.check_home(ledger.z_run_start_um, "the focus stage stands where it may not")
        if any(c.z_offset for c in sequence.channels) and sequence.z_plan is None:
            logger.warning(
                "channels have a z_offset, but the plan has no z_plan: useq ignores the "
                "offset; add z_plan: {relative: [0]}"
            )
        axes = {axis for plan in autofocus_plans(sequence) for axis in plan.axes}
        if len(sequence.stage_positions) > 1 and axes <= {"t"}:
            logger.warning(
                "autofocus_plan.axes: %s focuses only the first of %d positions at each time "
                "point; use [t, p] to focus each",
                sorted(axes),
                len(sequence.stage_positions),
            )
        strategy = build_strategy(settings)
        watcher = build_watcher(settings) if settings.search == "hardware" else None
        for each in (strategy, watcher):
            prepare_strategy(core, settings, each)
        run = cls(
            sequence,
            settings,
            strategy,
            rig,
            ledger,
            refocus_within_visit=bool(axes & {"c", "z"}),
            watcher=watcher,
            shots=_shots(sequence, settings, ledger),
        )
        if settings.search != "hardware" and core.isContinuousFocusEnabled():
            logger.warning(
                "continuous focus of %r is switched off during the run: it would fight the "
                "software autofocus",
                core.getAutoFocusDevice(),
            )
            core.enableContinuousFocus(False)
            run.continuous_focus_was_on = True
        return run

    def due(self, place: Place) -> bool:
        """Whether a place is to be focused at an autofocus event of the plan."""
        if self.shots is None:
            return self.ledger.due(place, again=self.refocus_within_visit)
        return not self.ledger.visited(place) and bool(self.shots.why_find(place))

    def now_s(self) -> float:
        """Time since the run began, in s."""
        return time.perf_counter() - self.started_s

    def await_frame(
        self,
        place: Place,
        event: useq.MDAEvent,
        request: FocusRequest,
        result: FocusResult,
        record: dict[str, Any],
    ) -> None:
        """Remember a focus that its first frame is to prove, if its strategy can judge one."""
        self.pending.pop(place.key, None)
        by_hardware = result.strategy == "hardware"
        judge = self.watcher if by_hardware else self._judge()
        if not result.found or judge is None or not (by_hardware or self.settings.verify):
            return
        channel = event.channel.config if event.channel else None
        if not by_hardware:
            channel = self.settings.channel or channel
        self.pending[place.key] = Pending(request, record, channel, judge)

    def verification(self, event: useq.MDAEvent) -> Verification | None:
        """How the frame of `event` is verified; None if it is not."""
        if not self.pending:  # most frames: where they belong need not be asked of the stage
            return None
        place = self.place(event)
        pending = self.pending.pop(place.key, None)
        if pending is None:
            return None
        sequenced = isinstance(event, SequencedEvent)
        if why := why_not(pending, self.rig, event, sequenced=sequenced):
            pending.leave(self.ledger, place, why)
            return None
        target = self.ledger.target_um(place, event.z_pos)
        if target is None:
            target = self.ledger.focus_um(place)
        how = Watching if pending.judge is self.watcher else Verification
        return how(pending, place, self.ledger, self.rig, target)

    def _judge(self) -> Verifies | None:
        strategy: object = self.strategy
        return strategy if isinstance(strategy, Verifies) else None

    def place(self, event: useq.MDAEvent) -> Place:
        """Where and when in the plan an event, or a hardware sequence, belongs."""
        sequence, core = self.sequence, self.rig.core
        event = parts_of(event)[0]  # a hardware sequence itself has no index
        index = {str(k): int(v) for k, v in event.index.items()}
        x_um, y_um = event.x_pos, event.y_pos
        if (x_um is None or y_um is None) and core.getXYStageDevice():
            here = core.getXYPosition()
            x_um = here[0] if x_um is None else x_um
            y_um = here[1] if y_um is None else y_um
        position = position_of(event, sequence)
        name = event.pos_name or (position.name if position is not None else None)
        if not name:
            name = f"p{index.get('p', 0):03d}"
        if "g" in index:
            name += f" g{index['g']:03d}"
        home = planned_home_um(event, sequence)
        return Place(index, home, x_um or 0.0, y_um or 0.0, name)


def _shots(
    sequence: useq.MDASequence, settings: AutofocusSettings, ledger: Ledger
) -> Shots | None:
    """The books of a two-shot scan; None for every other strategy."""
    if not isinstance(settings, TwoShotSettings):
        return None
    subs = [p.sequence for p in sequence.stage_positions if p.sequence is not None]
    grid = any(owner.grid_plan is not None for owner in (sequence, *subs))
    names = [channel.config for channel in sequence.channels]
    return Shots(
        settings,
        ledger,
        delta_of(sequence, settings),
        by_position=(settings.region or ("position" if grid else "run")) == "position",
        channel=names.index(settings.channel) if settings.channel in names else 0,
    )


@contextmanager
def complaints_of_host() -> Iterator[list[str]]:
    """Collect what the stock engine complains of in this thread."""
    complaints: list[str] = []
    thread = threading.get_ident()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == thread:
                complaints.append(record.getMessage())

    host = logging.getLogger("pymmcore-plus")
    listener = Listener(logging.WARNING)
    host.addHandler(listener)
    try:
        yield complaints
    finally:
        host.removeHandler(listener)


def is_image(event: useq.MDAEvent) -> bool:
    """Whether an event takes images."""
    return isinstance(event.action, useq.AcquireImage | None)


def parts_of(event: useq.MDAEvent) -> tuple[useq.MDAEvent, ...]:
    """The single events of an event that may be hardware-sequenced."""
    return event.events if isinstance(event, SequencedEvent) else (event,)
