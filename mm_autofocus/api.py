"""Run a plan, or focus once: the two calls that a script needs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mm_autofocus.drive import drive
from mm_autofocus.errors import AutofocusError, HardwareError, InputError
from mm_autofocus.hooks.checks import (
    check_looks,
    check_plan,
    frame_format,
    prepare_strategy,
    stage_limits_um,
)
from mm_autofocus.hooks.ledger import Ledger, Place
from mm_autofocus.hooks.pymmcore import AutofocusEngine
from mm_autofocus.hooks.rig import CoreRig
from mm_autofocus.hooks.running import parts_of
from mm_autofocus.hooks.shot_plan import delta_of, with_planes
from mm_autofocus.ometiff import OmeTiffSink
from mm_autofocus.plan import PlanLike, load_plan, settings_of
from mm_autofocus.settings import AutofocusSettings, parse_settings
from mm_autofocus.strategies.escalate import build_strategy
from mm_autofocus.strategies.two_shot import TwoShotSettings
from mm_autofocus.types import FocusResult, Look

if TYPE_CHECKING:
    import os

    from pymmcore_plus import CMMCorePlus

    from mm_autofocus.refocusing.live import Live

__all__ = ["RunResult", "autofocus", "run"]


@dataclass(slots=True)
class RunResult:
    """What a run did.

    Attributes
    ----------
    output : list of pathlib.Path
        Files written.
    frames : int
        Frames taken and, with an output, written.
    missing : int
        Frames that a camera fault cost.
    positions : int
        Places visited, tiles of a grid counted one by one.
    exposures : int
        Frames, those taken again after a correction, and looks together: the light that
        the specimen saw.
    records : list of dict
        One per search (see `hooks.ledger.Ledger.enter`); with two-shot, one per tile.
    cancelled : bool
        The run was ended before its last event.
    refocus : dict | None
        What was recovered meanwhile (``refocus="live"``): ``output, model, pairs, flagged,
        shots_alone, megapixels_per_s, tiles``.
    """

    output: list[Path] = field(default_factory=list)
    frames: int = 0
    missing: int = 0
    positions: int = 0
    exposures: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    cancelled: bool = False
    refocus: dict[str, Any] | None = None

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Records of the searches that found no focus."""
        return [r for r in self.records if r["status"] == "failed"]

    @property
    def exit_code(self) -> int:
        """3 if frames are missing by a fault, 1 if tiles failed or it was cancelled, else 0."""
        if self.missing:
            return 3
        return 1 if self.failed or self.cancelled else 0

    def to_json(self) -> dict[str, Any]:
        """The document that ``mm-autofocus run --json`` prints."""
        return {
            "output": [str(p) for p in self.output],
            "frames": self.frames,
            "missing_frames": self.missing,
            "positions": self.positions,
            "exposures": self.exposures,
            "cancelled": self.cancelled,
            "autofocus": [
                {key: r.get(key) for key in _RECORD_KEYS if key in r} for r in self.records
            ],
            **({} if self.refocus is None else {"refocus": self.refocus}),
        }


_RECORD_KEYS = (
    "index",
    "position",
    "x_um",
    "y_um",
    "z_before_um",
    "z_after_um",
    "status",
    "reason",
    "strategy",
    "looks",
    "moves",
    "expected_error_um",
    "score",
    "time_s",
    "verified",
    "corrections",
)


def run(
    plan: PlanLike,
    *,
    core: CMMCorePlus | None = None,
    output: str | os.PathLike[str] | None = None,
    strategy: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    split_positions: bool = False,
    compression: Literal["zlib", "lzw", "zstd"] | None = None,
    engine: Callable[..., AutofocusEngine] = AutofocusEngine,
    on_engine: Callable[[AutofocusEngine], None] | None = None,
    refocus: Literal["live"] | None = None,
    refocus_model: str | Path | None = None,
    refocus_output: str | os.PathLike[str] | None = None,
    raw_if_unsure: bool = False,
    on_refocus: Callable[[int], object] | None = None,
) -> RunResult:
    """Run a useq plan with autofocus, and save it as OME-TIFF.

    Blocks until the run has ended; the engine that the core had before is put back.
    Ctrl-C cancels cleanly: the stage goes back, the file is finished and readable.

    Parameters
    ----------
    plan : useq.MDASequence or mapping or path
        When (``autofocus_plan``) and how (``metadata.mm_autofocus``) to focus.
    core : CMMCorePlus, optional
        Default: the global instance.
    output : path, optional
        ``*.ome.tif`` or ``*.ome.tiff``. None: nothing is saved.
    strategy, settings : optional
        Replace the plan's strategy or single settings of it.
    overwrite : bool, optional
        Whether an existing output may be replaced.
    split_positions : bool, optional
        One file per position instead of one for all.
    compression : {"zlib", "lzw", "zstd"}, optional
        Lossless compression of the planes.
    engine : callable, optional
        Makes the engine; for subclasses.
    on_engine : callable, optional
        Called with the engine before the run, to connect to its signals.
    refocus : {"live"}, optional
        Recover the sharp image of each tile of a two-shot scan as soon as both shots are on
        disk, in a process of its own of low priority; what is left is recovered after the
        run.
    refocus_model, refocus_output, raw_if_unsure : optional
        As for `mm_autofocus.refocus`; default output: ``OUT_fused.ome.tiff``.
    on_refocus : callable, optional
        Called after the run with the number of tiles that are recovered.

    Returns
    -------
    RunResult

    Raises
    ------
    InputError
        Nothing was moved and nothing was written.
    FocusFailedError
        A tile failed under ``on_failure: abort``.
    HardwareError
        A device or the disk failed, or the recovery did. Whatever was saved is readable; the
        message names it.
    """
    sequence = load_plan(plan, strategy=strategy, overrides=settings)
    if core is None:
        from pymmcore_plus import CMMCorePlus

        core = CMMCorePlus.instance()
    sequence = with_planes(sequence, core)
    check_plan(core, sequence, settings_of(sequence))
    sink: OmeTiffSink | None = None
    if output is not None:
        sink = OmeTiffSink(
            Path(output),
            overwrite=overwrite,
            split_positions=split_positions,
            compression=compression,
        )
        sink.check()
    live = _live(
        core,
        sequence,
        refocus,
        output=None if split_positions else output,
        model=refocus_model,
        fused=refocus_output,
        raw_if_unsure=raw_if_unsure,
        overwrite=overwrite,
        compression=compression,
    )
    ours = engine(core, sink=sink)
    if on_engine is not None:
        on_engine(ours)
    seen: set[tuple[int | None, int | None]] = set()

    def count(event: Any) -> None:
        # a hardware sequence itself has no index
        seen.update((e.index.get("p"), e.index.get("g")) for e in parts_of(event))

    if live is not None and sink is not None:
        sink.on_written = live.written
        live.start()
    before = core.mda.set_engine(ours)
    core.mda.events.eventStarted.connect(count)
    try:
        error = _run_until_done(core, sequence)
    except BaseException:
        if live is not None:
            live.stop()
        raise
    finally:
        core.mda.events.eventStarted.disconnect(count)
        if before is not None:
            core.mda.set_engine(before)
    result = RunResult(
        output=list(sink.paths) if sink is not None else [],
        frames=ours.frames if sink is None else sink.frames_written,
        missing=ours.missing,
        positions=len(seen),
        exposures=ours.frames + sum(r["looks"] + r.get("corrections", 0) for r in ours.records),
        records=list(ours.records),
        cancelled=str(core.mda.status.finish_reason) == "canceled",
    )
    error = error or ours.closing_error
    if live is not None:
        try:
            result.refocus = live.finish(on_refocus)
        except HardwareError as e:  # what befell the microscope is said first
            error = error or e
    if error is not None:
        raise _as_ours(error, result) from error
    return result


def _live(
    core: CMMCorePlus,
    sequence: Any,
    refocus: str | None,
    *,
    output: str | os.PathLike[str] | None,
    model: str | Path | None,
    fused: str | os.PathLike[str] | None,
    **options: Any,
) -> Live | None:
    """Prepare what recovers while the run goes on, and check that it can."""
    if refocus is None:
        if model is not None or fused is not None:
            raise InputError("refocus_model, refocus_output: need refocus: live")
        return None
    if refocus != "live":
        raise InputError(f"refocus: {refocus!r} is not allowed: must be 'live'")
    settings = settings_of(sequence)
    if not isinstance(settings, TwoShotSettings):
        raise InputError(
            "refocus: live needs the strategy two-shot, which takes two shots a tile"
        )
    if output is None:
        raise InputError("refocus: live needs one output file for all positions (-o)")
    # only here: an acquisition without it loads no model for it
    from mm_autofocus.refocusing.live import Live

    live = Live(Path(output), None if fused is None else Path(fused), model=model, **options)
    saved = settings.model_copy(update={"roi": None, "binning": None})
    live.check(frame_format(core, saved), delta_of(sequence, settings))
    return live


def _run_until_done(core: CMMCorePlus, sequence: Any) -> BaseException | None:
    """Run in a thread, so that Ctrl-C reaches us and not the middle of the runner.

    The runner does not finish a run that a `KeyboardInterrupt` has torn apart: no file
    would be closed and no shutter restored.
    """
    errors: list[BaseException] = []

    def target() -> None:
        try:
            core.mda.run(sequence)
        except BaseException as e:  # noqa: BLE001 - handed to the caller's thread
            errors.append(e)

    thread = threading.Thread(target=target, name="mm-autofocus run")
    with _interrupt_calls(core.mda.cancel):
        thread.start()
        while thread.is_alive():
            thread.join(0.1)  # in slices, so that the interrupt is handled meanwhile
    return errors[0] if errors else None


@contextmanager
def _interrupt_calls(cancel: Callable[[], object]) -> Iterator[None]:
    """Let Ctrl-C call `cancel` instead of raising wherever this thread happens to be."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted
        return

    def handler(*_: object) -> None:
        cancel()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _as_ours(error: BaseException, result: RunResult) -> BaseException:
    """Faults name what was saved; other errors keep their type."""
    saved = (
        f"; {result.frames} frames are saved in {', '.join(str(p) for p in result.output)}"
        if result.output
        else ""
    )
    if isinstance(error, InputError):
        return error
    if isinstance(error, AutofocusError):
        again = type(error)(f"{error}{saved}")
    elif isinstance(error, RuntimeError | OSError | MemoryError):
        again = HardwareError(f"{error}{saved}")
    else:
        return error
    again.result = result  # type: ignore[attr-defined]
    return again


def autofocus(
    core: CMMCorePlus,
    settings: Mapping[str, Any] | AutofocusSettings | None = None,
    *,
    strategy: str | None = None,
    on_look: Callable[[Look], None] | None = None,
    **overrides: Any,
) -> FocusResult:
    """Focus once, where the stages stand, outside of any sequence.

    Parameters
    ----------
    core : CMMCorePlus
        The core.
    settings : mapping or AutofocusSettings, optional
        As ``metadata.mm_autofocus`` of a plan.
    strategy : str, optional
        Replaces the settings' strategy.
    on_look : callable, optional
        Called with each look after it was scored.
    **overrides
        Single settings: ``range_um=10``.

    Returns
    -------
    FocusResult
        If found, the stage stands at its ``z_um``; if not, where it stood before. Live
        mode, camera, channel and shutter are as before.

    Raises
    ------
    InputError
        Settings or devices cannot work; nothing has moved.
    HardwareError
        A device failed; the stage has been sent back.

    Examples
    --------
    >>> from mm_autofocus import autofocus
    >>> result = autofocus(core, range_um=10)  # doctest: +SKIP
    """
    given = (
        settings.model_dump(exclude_unset=True)
        if isinstance(settings, AutofocusSettings)
        else dict(settings or {})
    )
    if strategy is not None:
        given["strategy"] = strategy
    parsed = parse_settings({**given, **overrides}, where="autofocus")
    check_looks(core, parsed)
    rig = CoreRig(core, parsed)
    ledger = Ledger(parsed, rig.at_rest_um(), stage_limits_um=stage_limits_um(core))
    ledger.check_home(ledger.z_run_start_um, "the focus stage stands where it may not")
    request = ledger.request(Place({}, None), rig.pixel_size_um())
    chosen = build_strategy(parsed)
    if chosen is None or parsed.search == "hardware":
        raise InputError(
            "strategy: 'hardware' is the core's own: call core.fullFocus(), or use it in a plan"
        )
    prepare_strategy(core, parsed, chosen)
    return drive(chosen, request, rig, backlash_um=parsed.backlash_um, on_look=on_look)
