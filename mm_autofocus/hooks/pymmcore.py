"""The acquisition engine of pymmcore-plus, with software autofocus in it.

`AutofocusEngine` is the stock engine for every plan without ``metadata.mm_autofocus``.
With it, the stock autofocus events are answered by a strategy, and the correction reaches
every later event of the position: stepped or hardware-sequenced z, all channels, all later
time points.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import useq
from pymmcore_plus.core._sequencing import SequencedEvent
from pymmcore_plus.mda import MDAEngine, SkipEvent

from mm_autofocus.drive import drive, way_to
from mm_autofocus.errors import CancelledError, FocusFailedError, HardwareError
from mm_autofocus.hooks.ledger import Place
from mm_autofocus.hooks.rig import faults_of
from mm_autofocus.hooks.running import (
    FrameSink,
    Run,
    complaints_of_host,
    is_image,
    parts_of,
)
from mm_autofocus.hooks.shot_plan import in_turn, with_planes
from mm_autofocus.hooks.signals import FocusSignals
from mm_autofocus.hooks.thumbnail import detail_at, thumbnail_png
from mm_autofocus.hooks.verifying import Verification
from mm_autofocus.plan import (
    fresh,
    settings_of,
)
from mm_autofocus.types import FocusRequest, FocusResult, Look

if TYPE_CHECKING:
    from pymmcore_plus import CMMCorePlus
    from pymmcore_plus.mda._protocol import PImagePayload
    from pymmcore_plus.metadata import SummaryMetaV1


__all__ = ["AutofocusEngine", "FrameSink"]

logger = logging.getLogger(__name__)

_POLL_S = 0.02
# A stage that is so far from where it was sent did not go there; encoders err by far less.
_XY_OFF_UM = 10.0


class AutofocusEngine(MDAEngine):
    """The stock engine with software autofocus.

    ``core.mda.set_engine(AutofocusEngine(core))`` is all that a script needs.

    Parameters
    ----------
    mmc : CMMCorePlus
        The core.
    sink : FrameSink, optional
        Is given each frame, with its autofocus record, from within the acquisition.
    **kwargs
        As for `pymmcore_plus.mda.MDAEngine`.

    Attributes
    ----------
    signals : FocusSignals
        started, look, finished: for a GUI.
    records : list of dict
        The searches of the present or the last run.
    frames, missing : int
        Frames taken, and frames that a camera fault cost, in that run.
    closing_error : Exception | None
        What the sink raised when it was closed at the end of that run.
    """

    def __init__(
        self, mmc: CMMCorePlus, *, sink: FrameSink | None = None, **kwargs: Any
    ) -> None:
        super().__init__(mmc, **kwargs)
        self.signals = FocusSignals()
        self.sink = sink
        self.frames = 0
        self.missing = 0
        self.closing_error: Exception | None = None
        self.records: list[dict[str, Any]] = []
        self._run: Run | None = None

    # ------------------------------------------------------ the host's protocol

    def setup_sequence(self, sequence: useq.MDASequence) -> SummaryMetaV1 | None:
        """Validate everything, then set up as the stock engine does.

        Raises
        ------
        InputError
            The plan, its settings or its devices cannot work; nothing has moved.
        """
        self._run = None
        self.closing_error = None
        self.frames = self.missing = 0
        self.records = []
        settings = settings_of(sequence)
        sequence = with_planes(sequence, self.mmcore)
        run = None if settings is None else Run.prepare(self.mmcore, sequence, settings)
        if run is not None:
            self.records = run.ledger.records
        # from here on the teardown has something to restore, whatever fails next
        self._run = run
        meta = super().setup_sequence(sequence)
        if self.sink is not None:
            self.sink.setup(
                sequence,
                meta,
                settings=None if settings is None else settings.model_dump(mode="json"),
                optics=None
                if settings is None
                else settings.optics(self.mmcore.getPixelSizeUm()),
            )
        return meta

    def event_iterator(self, events: Iterable[useq.MDAEvent]) -> Iterator[useq.MDAEvent]:
        """Merge events for hardware sequencing, but never across two corrections."""
        if self._run is None:
            yield from super().event_iterator(events)
            return
        run = self._run
        if isinstance(events, useq.MDASequence):
            events = fresh(run.sequence)  # which may have been given its planes
        if run.shots is not None:
            events = in_turn(events, run.settings.backlash_um)

        def corrected_alike(event: useq.MDAEvent) -> tuple[int | None, int | None]:
            return event.index.get("p"), event.index.get("g")

        for _, group in itertools.groupby(events, key=corrected_alike):
            yield from super().event_iterator(group)

    def setup_event(self, event: useq.MDAEvent) -> None:
        """Set the hardware for an event, shifted by the correction of its position."""
        run = self._run
        if run is None:
            super().setup_event(event)
            return
        place = run.place(event)
        if isinstance(event.action, useq.HardwareAutofocus):
            if run.due(place):
                request = run.ledger.request(place, self.mmcore.getPixelSizeUm())
                self._set_up(event.model_copy(update={"z_pos": request.z_start_um}))
            return
        if is_image(event) and run.ledger.skipped(place):
            parts = parts_of(event)
            if self.sink is not None:
                for part in parts:
                    self.sink.skip(part, record=run.ledger.frame_record(place, run.now_s()))
            raise SkipEvent(num_frames=len(parts), reason="not focused (on_failure: skip)")
        self._set_up(self._shifted(event, place))

    def _set_up(self, event: useq.MDAEvent) -> None:
        """Set up as the stock engine does, but do not go on where it could not.

        It logs that a stage, a channel or a property could not be set, and takes the
        frame all the same; a tile must not be focused and saved under another's name.
        """
        run = self._run
        assert run is not None
        way: list[float] = []
        limits, backlash_um = run.ledger.travel_um(), run.settings.backlash_um
        if isinstance(event, SequencedEvent) and event.z_sequence:
            # the first plane of a hardware sequence, too, is approached from that side
            if backlash_um:
                here = run.rig.position_um()
                for z_um in way_to(event.z_sequence[0], here, backlash_um, limits):
                    run.rig.move_to(z_um)
        elif event.z_pos is not None:
            # The frame is approached from the side that its looks were approached from.
            here = run.rig.position_um()
            way = way_to(event.z_pos, here, backlash_um, limits)
            event = event.model_copy(update={"z_pos": way[0] if way else None})
        with complaints_of_host() as complaints:
            super().setup_event(event)
        if complaints:
            raise HardwareError(complaints[0])
        for z_um in way[1:]:
            run.rig.move_to(z_um)
        if len(way) == 1 and run.settings.settle_ms:  # the host's move does not settle
            time.sleep(run.settings.settle_ms / 1000)
        if isinstance(event, SequencedEvent) and event.x_sequence:
            return
        for axis, planned, reached in (
            ("x", event.x_pos, self.mmcore.getXPosition),
            ("y", event.y_pos, self.mmcore.getYPosition),
        ):
            if planned is not None and abs(reached() - planned) > _XY_OFF_UM:
                raise HardwareError(
                    f"the XY stage was sent to {axis} {planned:g} µm and says that it stands "
                    f"at {reached():g} µm"
                )

    def exec_event(self, event: useq.MDAEvent) -> Iterable[PImagePayload | None]:
        """Focus, or take the event's frames."""
        run = self._run
        if run is not None and isinstance(event.action, useq.HardwareAutofocus):
            place = run.place(event)
            if run.due(place):
                self._focus(run, event, place)
            elif run.shots is not None and not run.ledger.visited(place):
                here_um = run.rig.position_um()
                self.signals.finished.emit(run.shots.stand(place, here_um, run.now_s()))
            return ()
        check = run.verification(event) if run is not None and is_image(event) else None
        if run is not None and check is not None:
            return self._recorded(event, self._verified(run, event, check))
        frames = super().exec_event(event)
        # a plan that is none of our business gets the stock engine's own generator
        return frames if run is None and self.sink is None else self._recorded(event, frames)

    def teardown_sequence(self, sequence: useq.MDASequence) -> None:
        """Close the file, then restore as the stock engine does."""
        run, self._run = self._run, None
        try:
            if self.sink is not None:
                self.sink.close()
        except Exception as e:
            # the runner only logs what a teardown raises; `run` looks here
            self.closing_error = e
            raise
        finally:
            super().teardown_sequence(sequence)
            if run is not None and run.continuous_focus_was_on:
                self.mmcore.enableContinuousFocus(True)

    # ------------------------------------------------------------------ frames

    def _recorded(
        self, event: useq.MDAEvent, stock: Iterable[PImagePayload | None]
    ) -> Iterator[PImagePayload | None]:
        """Pass the stock engine's frames on, each with its record, and to the sink."""
        # a generator in the stock engine; the runner steers it through this one
        frames = cast("Generator[Any, Any, None]", stock)
        parts = parts_of(event)
        seen = 0
        signal: Any = None
        try:
            while True:
                payload = frames.send(signal)
                seen += 1
                if payload is None:
                    self.missing += 1  # the sink finds the gap by the index of the others
                else:
                    self._keep(payload)
                signal = yield payload
        except StopIteration:
            pass
        if not seen and is_image(event):
            # the stock engine logs a failed exposure and goes on without a frame
            self.missing += len(parts)

    def _keep(self, payload: PImagePayload) -> None:
        image, event, meta = payload
        self.frames += 1
        run = self._run
        if run is not None:
            extended: dict[str, Any] = meta  # type: ignore[assignment]
            place = run.place(event)
            if run.shots is not None and (seen := run.shots.add(place, event, image)):
                self.signals.verified.emit(seen)
            record = run.ledger.frame_record(place, run.now_s())
            if record is not None:
                extended["mm_autofocus"] = record
            if "position" not in extended:
                # Hardware-sequenced frames come without; what was commanded is known.
                extended["position"] = {
                    "x": place.x_um,
                    "y": place.y_um,
                    "z": run.ledger.target_um(place, event.z_pos),
                }
        if self.sink is not None:
            self.sink.append(image, event, meta)

    def _verified(
        self, run: Run, event: useq.MDAEvent, check: Verification
    ) -> Iterator[PImagePayload | None]:
        """Take an event's frame, again if it is out of focus, and pass the better one on."""
        core, fault = self.mmcore, None
        lit = core.getShutterDevice() and not core.getAutoShutter() and core.getShutterOpen()
        frames = list(super().exec_event(event))
        try:
            if frames and check.add(frames, check.target_um):
                while (target := check.next_um()) is not None:
                    self._checkpoint()
                    limits, backlash_um = run.ledger.travel_um(), run.settings.backlash_um
                    here_um = run.rig.position_um()
                    for z_um in way_to(target, here_um, backlash_um, limits):
                        run.rig.move_to(z_um)
                    if lit:  # the first exposure has closed it
                        with faults_of("the shutter could not be opened again"):
                            core.setShutterOpen(True)
                    again = list(super().exec_event(event))
                    if not again or not check.add(again, target):
                        break
        except CancelledError:
            pass  # the frame that was taken is kept
        except HardwareError as e:
            fault = e
        if check.taken:
            frames = check.conclude()
            self.signals.verified.emit(check.pending.record)
        for payload in frames:  # noqa: UP028 - a list cannot be sent the runner's signals
            yield payload
        if fault is not None:
            raise fault

    # ------------------------------------------------------------------- focus

    def _shifted(self, event: useq.MDAEvent, place: Place) -> useq.MDAEvent:
        """The event with its z, or its sequence of z, moved by the correction."""
        assert self._run is not None
        ledger = self._run.ledger
        update: dict[str, Any] = {"z_pos": ledger.target_um(place, event.z_pos)}
        if isinstance(event, SequencedEvent) and event.z_sequence:
            update["z_sequence"] = tuple(ledger.target_um(place, z) for z in event.z_sequence)
        return event.model_copy(update=update)

    def _focus(self, run: Run, event: useq.MDAEvent, place: Place) -> None:
        """Focus one place, write it down, and follow the policy if it fails."""
        try:
            record = self._try(run, event, place)
            if record["status"] != "failed":
                return
            what = f"{place.name}: not focused: {record['reason']}"
            policy = run.settings.on_failure
            # who listens to the signals has been told already
            level = logging.INFO if len(self.signals.finished) else logging.WARNING
            logger.log(level, "%s (on_failure: %s)", what, policy)
            if policy == "skip":
                run.ledger.leave_out(place)
            elif policy == "abort":
                self._leave_record(run, event, place)
                raise FocusFailedError(what)
            elif policy == "pause":
                self.mmcore.mda.set_paused(True)
                self._checkpoint()  # waits for the operator
                self._try(run, event, place, from_here=True)
        except CancelledError:
            logger.info(
                "cancelled while focusing %s; the stage is back at its start", place.name
            )
        except HardwareError as e:
            z_um = run.ledger.request(place).z_start_um  # where the loop sent the stage back
            result = FocusResult(None, "failed", reason=str(e), strategy=run.settings.strategy)
            now_s = run.now_s()
            record = run.ledger.enter(
                place, result, z_before_um=z_um, z_after_um=z_um, now_s=now_s
            )
            self._leave_record(run, event, place)
            self.signals.finished.emit(record)
            raise

    def _leave_record(self, run: Run, event: useq.MDAEvent, place: Place) -> None:
        """Let the file say why a tile has no frame: the run ends before one is taken."""
        if self.sink is not None and self.frames:
            self.sink.skip(event, record=run.ledger.frame_record(place, run.now_s()))

    def _try(
        self, run: Run, event: useq.MDAEvent, place: Place, *, from_here: bool = False
    ) -> dict[str, Any]:
        core = self.mmcore
        z_before = run.rig.position_um()
        pixel_size_um = run.rig.pixel_size_um()
        # after a pause the operator may have moved the stage to where the tile is sharp
        request = (
            run.ledger.request_from(z_before, pixel_size_um)
            if from_here
            else run.ledger.request(place, pixel_size_um)
        )
        first: list[Look] = []

        def on_look(look: Look) -> None:
            first.append(look) if not first else None
            self.signals.look.emit(look)

        self.signals.started.emit(dict(place.index), request)
        try:
            result = self._search(run, event, request, on_look)
        finally:
            # Presets were set behind the back of the engine's cache of the last one.
            core._last_config = ("", "")
        enter = run.ledger.enter if run.shots is None else run.shots.enter
        record = enter(
            place,
            result,
            z_before_um=z_before,
            z_after_um=run.rig.position_um(),
            now_s=run.now_s(),
            thumbnail=_thumbnail(first[0]) if first else None,
        )
        run.await_frame(place, event, request, result, record)
        self.signals.finished.emit(record)
        return record

    def _search(
        self,
        run: Run,
        event: useq.MDAEvent,
        request: FocusRequest,
        on_look: Callable[[Look], None],
    ) -> FocusResult:
        spent: FocusResult | None = None
        if run.settings.search == "hardware":
            assert isinstance(event.action, useq.HardwareAutofocus)
            ask = functools.partial(self._execute_autofocus, event.action)
            spent = run.rig.ask_hardware(request, ask)
            self._af_succeeded = spent.found  # the stock engine re-engages by it
            if spent.found or run.strategy is None:
                return spent
            logger.warning("hardware autofocus failed (%s); escalating", spent.reason)
        assert run.strategy is not None
        result = drive(
            run.strategy,
            request,
            run.rig,
            backlash_um=run.settings.backlash_um,
            checkpoint=self._checkpoint,
            on_look=on_look,
        )
        if spent is not None:
            result.details["before"] = [{"strategy": "hardware", "reason": spent.reason}]
        return result

    def _checkpoint(self) -> None:
        """Between two looks: wait while paused, stop if cancelled."""
        runner = self.mmcore.mda
        while True:
            status = runner.status
            if status.cancel_requested:
                raise CancelledError("the run was cancelled")
            if not status.pause_requested:
                return
            time.sleep(_POLL_S)


def _thumbnail(look: Look) -> dict[str, Any]:
    at = detail_at(look.image)
    return {"thumbnail": thumbnail_png(look.image, at), "thumbnail_xy": list(at)}
