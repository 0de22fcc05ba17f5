"""Collect a dataset: an ordinary acquisition of z-stacks, labelled while it runs.

The plan is run by the engine as any other, so that stacks stand around the focus that was
found where the plan has an autofocus. Each position gets a file of its own; its line is added
to the index as soon as all its planes are with the operating system. A process that is killed
loses the position under way and no other: the next call with the same plan goes on there.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

import useq

import mm_autofocus
from mm_autofocus.api import RunResult
from mm_autofocus.api import run as run_plan
from mm_autofocus.errors import InputError
from mm_autofocus.hooks.checks import check_plan
from mm_autofocus.hooks.pymmcore import AutofocusEngine, FrameSink
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.models.lens import LENS_NAMES
from mm_autofocus.ometiff.files import Naming
from mm_autofocus.plan import PlanLike, load_plan, settings_of
from mm_autofocus.registry import suggest
from mm_autofocus.settings import AutofocusSettings
from mm_autofocus.training.dataset import Dataset
from mm_autofocus.training.label import StackMeter
from mm_autofocus.training.planned import one_position_per_tile, planned_stacks, stack_key
from mm_autofocus.training.stack import Stack
from mm_autofocus.training.store import PLANES, DatasetWriter, labelled, optics_json
from mm_autofocus.types import Optics

if TYPE_CHECKING:
    import os

    from pymmcore_plus import CMMCorePlus

__all__ = ["Collected", "Collection", "StackTruth", "collect", "measure_of"]

logger = logging.getLogger(__name__)


class StackTruth(Protocol):
    """What a simulator can tell of the stacks that are taken with it."""

    def frame(self) -> Any:
        """Note the frame that was taken last; in the thread that took it."""
        ...

    def defocus_um(self, frames: Sequence[Any]) -> list[float] | None:
        """True defocus of each frame of a stack; None if the field has no focus."""
        ...


@dataclass(frozen=True, slots=True)
class Collected:
    """What a call of `collect` did.

    Attributes
    ----------
    dataset : Dataset
        As it is now.
    new : int
        Stacks that this call added.
    run : RunResult | None
        Of the acquisition; None if nothing was left to do.
    """

    dataset: Dataset
    new: int
    run: RunResult | None = None

    def to_json(self) -> dict[str, Any]:
        """The document that ``mm-autofocus collect --json`` prints."""
        document = {**self.dataset.summary(), "new_stacks": self.new}
        return document | ({} if self.run is None else {"run": self.run.to_json()})

    def sentence(self) -> str:
        """What there is now, for the operator."""
        s = self.dataset.summary()
        kinds = ", ".join(f"{n} {kind}" for kind, n in s["by_sparsity"].items())
        refused = ", ".join(f"{n} {reason}" for reason, n in s["refused"].items())
        return (
            f"dataset: {s['dataset']}: {s['stacks']} stacks of {s['fields']} fields ({kinds}), "
            f"{self.new} of them new; {s['labelled']} with a label"
            + (f", refused: {refused}" if refused else "")
        )


def collect(
    plan: PlanLike,
    core: CMMCorePlus,
    output: str | os.PathLike[str],
    *,
    slide: str = "slide",
    optics: Mapping[str, float] | None = None,
    lens: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    truth: StackTruth | None = None,
    simulated: bool = False,
    run: Callable[..., RunResult] = run_plan,
) -> Collected:
    """Take the z-stacks of a plan and write them as a dataset.

    Positions that the dataset has already are left out. The tiles of a grid count as
    positions, so that each is focused where the plan focuses positions.

    Parameters
    ----------
    plan : useq.MDASequence or mapping or path
        With a z plan of at least five planes, and positions.
    core : CMMCorePlus
        The core.
    output : path
        Folder of the dataset: not there yet, empty, or begun by the same plan.
    slide : str, optional
        Name of the slide under the microscope.
    optics : mapping, optional
        na, magnification, wavelength_um, refractive_index, pixel_size_um, where the plan
        or the core do not say them or say them wrongly.
    lens : mapping, optional
        What is known of lens and condenser: some of `mm_autofocus.models.lens.LENS_NAMES`.
    settings : mapping, optional
        Replace single settings of the plan.
    truth : StackTruth, optional
        Of a simulator.
    simulated : bool, optional
        The microscope is a simulator, though its truth is not asked for (which takes as long
        as the stack).
    run : callable, optional
        Runs the plan, with the parameters of `mm_autofocus.run`.

    Raises
    ------
    InputError
        Nothing was moved and nothing was written.
    HardwareError
        A fault ended the run; the stacks before it are in the dataset.
    """
    collection = Collection(
        plan, output, slide=slide, optics=optics, lens=lens, settings=settings
    )
    return collection.run(core, truth=truth, simulated=simulated, run=run)


def measure_of(settings: AutofocusSettings | None) -> FocusMeasure:
    """The focus measure of the run-time search, over the whole frame."""
    settings = settings or AutofocusSettings()
    # a region in pixels of the looks may mean another part of the frames
    options = settings.metric_options.model_copy(update={"roi": None})
    return FocusMeasure(settings.metric, options)


class Collection:
    """A plan and the dataset it goes into, checked against each other.

    Parameters
    ----------
    plan, output, slide, optics, lens, settings
        As for `collect`.

    Raises
    ------
    InputError
        The plan takes no stacks, or does not belong to the dataset.
    """

    def __init__(
        self,
        plan: PlanLike,
        output: str | os.PathLike[str],
        *,
        slide: str = "slide",
        optics: Mapping[str, float] | None = None,
        lens: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        for name in lens or ():
            if name not in LENS_NAMES:
                raise InputError(
                    f"lens: {name!r} is unknown{suggest(name, LENS_NAMES)}; allowed: "
                    f"{', '.join(LENS_NAMES)}"
                )
        given = load_plan(plan, overrides=settings)
        self.slide = slide
        self.settings = settings_of(given)
        known = (self.settings or AutofocusSettings()).optics()
        self.optics = replace(known, **dict(optics or {}))
        self.lens = None if lens is None else dict(lens)
        # before the tiles are counted out: what is compared is what the user wrote
        dump = given.model_dump_json(exclude={"uid"}, exclude_unset=True)
        self.plan: dict[str, Any] = json.loads(dump)
        self.sequence = one_position_per_tile(given)
        self.stacks = planned_stacks(self.sequence)
        self.writer = DatasetWriter(output, measure_of(self.settings))
        self.writer.check_slide(slide, self.plan)

    def run(
        self,
        core: CMMCorePlus,
        *,
        truth: StackTruth | None = None,
        simulated: bool = False,
        run: Callable[..., RunResult] = run_plan,
    ) -> Collected:
        """Take what the dataset does not have yet; see `collect`."""
        check_plan(core, self.sequence, self.settings)
        if int(core.getNumberOfCameraChannels()) > 1:
            raise InputError("the camera has several channels; collect takes one camera")
        writer = self.writer
        facts = {
            "plan": self.plan,
            "without_stack": {},
            "simulated": simulated or truth is not None,
            "begun": datetime.now(UTC).isoformat(timespec="seconds"),
            "made_by": f"mm_autofocus {mm_autofocus.__version__}",
        }
        writer.begin(self.slide, facts)
        sequence = self._rest()
        before = len(writer.stacks)
        if sequence is None:
            writer.finish()
            return Collected(writer.dataset(), 0)
        sinks: list[_Labelling] = []

        def engine(core: CMMCorePlus, *, sink: FrameSink) -> AutofocusEngine:
            labelling = _Labelling(sink, core, self, naming, truth)
            sinks.append(labelling)
            return AutofocusEngine(core, sink=labelling)

        output = writer.path / PLANES / f"r{self._run_number():02d}.ome.tiff"
        naming = Naming(output, True)
        try:
            result = run(
                sequence, core=core, output=output, split_positions=True, engine=engine
            )
        except InputError:
            writer.abandon()  # found by the engine, before anything moved
            raise
        if sinks and sinks[0].skipped:
            writer.note(self.slide, "without_stack", sinks[0].skipped)
        if result.exit_code < 3:
            writer.finish()
        return Collected(writer.dataset(), len(writer.stacks) - before, result)

    def _rest(self) -> useq.MDASequence | None:
        """The plan with the positions that are not complete; their remains are removed."""
        have = {s.key for s in self.writer.stacks}
        without = self.writer.meta["slides"][self.slide].get("without_stack", {})
        rest = []
        for p, position in enumerate(self.sequence.stage_positions):
            wanted = {(self.slide, position.name, t, c) for i, t, c in self.stacks if i == p}
            if not wanted <= have and position.name not in without:
                rest.append(position)
        names = {position.name for position in rest}
        self.writer.drop(
            {s.file for s in self.writer.stacks if s.slide == self.slide and s.field in names}
        )
        return self.sequence.replace(stage_positions=rest) if rest else None

    def _run_number(self) -> int:
        files = (self.writer.path / PLANES).glob("r*_p*.ome.tiff")
        numbers = (p.name[1:].partition("_")[0] for p in files)
        return 1 + max((int(n) for n in numbers if n.isdigit()), default=0)


@dataclass(slots=True)
class _Open:
    """A stack of which planes are still to come."""

    meter: StackMeter
    pages: list[int] = field(default_factory=list)
    frames: list[Any] = field(default_factory=list)


class _Labelling:
    """A sink before the sink: measures each frame and adds whole stacks to the index."""

    def __init__(
        self,
        inner: FrameSink,
        core: CMMCorePlus,
        collection: Collection,
        naming: Naming,
        truth: StackTruth | None,
    ) -> None:
        self.skipped: dict[str, str] = {}
        self._inner, self._core, self._all = inner, core, collection
        self._naming, self._truth = naming, truth
        self._sequence: useq.MDASequence | None = None
        self._planned: Mapping[tuple[int, int, int], int] = {}
        self._open: dict[tuple[int, int, int], _Open] = {}
        self._pages: Counter[int] = Counter()  # of each position's file
        self._taken = 0
        self._ready: list[tuple[int, Stack]] = []

    def setup(self, sequence: useq.MDASequence, meta: Any, **context: Any) -> None:
        self._sequence = sequence
        self._planned = planned_stacks(sequence)
        self._inner.setup(sequence, meta, **context)

    def append(self, img: Any, event: useq.MDAEvent, meta: Any) -> None:
        # before the sink, which may wait: the truth is that of the last frame
        seen = None if self._truth is None else self._truth.frame()
        self._inner.append(img, event, meta)
        p, t, c = stack_key(event)
        page = self._pages[p]
        self._pages[p] += 1
        self._taken += 1
        planned = self._planned.get((p, t, c))
        if planned is not None:
            stack = self._open.setdefault(
                (p, t, c), _Open(StackMeter(self._all.writer.measure))
            )
            stack.meter.add(meta["position"]["z"], img)
            stack.pages.append(page)
            stack.frames.append(seen)
            if len(stack.pages) == planned:
                row = self._row(self._open.pop((p, t, c)), img, event, meta)
                self._ready.append((self._taken, row))
        self._write_down(getattr(self._inner, "frames_written", self._taken))

    def skip(
        self, event: useq.MDAEvent | None = None, *, frames: int = 1, record: Any = None
    ) -> None:
        if event is not None and self._sequence is not None:
            name = self._sequence.stage_positions[stack_key(event)[0]].name or ""
            self.skipped[name] = str((record or {}).get("reason") or "skipped")
        self._inner.skip(event, frames=frames, record=record)

    def close(self) -> None:
        try:
            self._inner.close()
        finally:
            self._write_down(getattr(self._inner, "frames_written", self._taken))
        for (p, _, _), stack in self._open.items():
            logger.warning(
                "position %d: only %d planes of a stack were taken; it is left out",
                p,
                len(stack.pages),
            )

    def _write_down(self, frames_written: int) -> None:
        """Index the stacks whose planes are in the files, not in a queue."""
        while self._ready and self._ready[0][0] <= frames_written:
            self._all.writer.append(self._ready.pop(0)[1])

    def _row(self, stack: _Open, img: Any, event: useq.MDAEvent, meta: Any) -> Stack:
        assert self._sequence is not None
        p, t, c = stack_key(event)
        pixel = self._all.optics.pixel_size_um or float(meta.get("pixel_size_um") or 0) or None
        optics: Optics = replace(self._all.optics, pixel_size_um=pixel)
        where = meta["position"]
        columns = labelled(stack.meter, optics.dof_um)
        return Stack(
            folder=self._all.writer.path,
            file=f"{PLANES}/{self._naming.file(p).name}",
            slide=self._all.slide,
            field=self._sequence.stage_positions[p].name or "",
            time=t,
            channel=c,
            pages=tuple(stack.pages),
            x_um=_rounded(where.get("x")),
            y_um=_rounded(where.get("y")),
            shape=(len(stack.pages), *img.shape),
            dtype=str(img.dtype),
            bit_depth=int(self._core.getImageBitDepth()) or None,
            channel_name=event.channel.config if event.channel is not None else "",
            exposure_ms=meta.get("exposure_ms"),
            optics=optics_json(optics),
            lens=self._all.lens,
            truth=self._true(stack, columns["z_um"]),
            **columns,
        )

    def _true(self, stack: _Open, z_um: Sequence[float]) -> dict[str, Any] | None:
        if self._truth is None:
            return None
        defocus = self._truth.defocus_um(stack.frames)
        if defocus is None:
            return {"focus_z_um": None, "defocus_um": None}
        focus = sum(z - d for z, d in zip(z_um, defocus, strict=True)) / len(defocus)
        return {
            "focus_z_um": round(focus, 4),
            "defocus_um": [round(d, 4) for d in defocus],
        }


def _rounded(value: Any) -> float | None:
    return None if value is None else round(float(value), 3)
