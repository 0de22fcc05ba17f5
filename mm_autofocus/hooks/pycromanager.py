"""Software autofocus as a hook of pycro-manager.

``Acquisition(directory, name, post_hardware_hook_fn=autofocus_hook(settings))`` focuses by
the same strategies, loop, limits and policies as the pymmcore-plus engine. The record of
each image goes into its NDTiff metadata, as the tag ``mm_autofocus``.

Tested on pycro-manager's Python backend. On the Java backend events and core calls are the
same by its documentation, but it was never tried.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.drive import drive, way_to
from mm_autofocus.errors import CancelledError, FocusFailedError, InputError
from mm_autofocus.hooks.checks import check_looks, prepare_strategy, stage_limits_um
from mm_autofocus.hooks.ledger import Ledger, Place
from mm_autofocus.hooks.rig import CoreRig
from mm_autofocus.settings import KEY, AutofocusSettings, parse_settings
from mm_autofocus.strategies.escalate import build_strategy

if TYPE_CHECKING:
    from mm_autofocus.types import FocusRequest, FocusResult, Image

__all__ = ["TAGS_KEY", "AutofocusHook", "autofocus_hook", "record_of"]

logger = logging.getLogger(__name__)

TAGS_KEY = "AcqEngMetadata.TAGS"
"""Where pycro-manager's Python backend puts an event's tags in the image metadata."""

Event = dict[str, Any]


def autofocus_hook(
    settings: Mapping[str, Any] | AutofocusSettings | None = None,
    *,
    axes: Sequence[str] = ("position",),
    z_offsets_um: Sequence[float] | None = None,
    core: Any = None,
) -> AutofocusHook:
    """Make a hook for ``Acquisition(post_hardware_hook_fn=...)``.

    Parameters
    ----------
    settings : mapping or AutofocusSettings, optional
        How to focus, as ``metadata.mm_autofocus`` of a plan.
    axes : sequence of str, optional
        When to focus: at every change of one of these axes of the events.
    z_offsets_um : sequence of float, optional
        The z plan relative to focus, one value per index of the events' ``z`` axis, in
        µm. Needed where the events have that axis: an event tells only its absolute z.
    core : optional
        Default: pycro-manager's ``Core()``, when the first event comes.

    Returns
    -------
    AutofocusHook

    Raises
    ------
    InputError
        A setting is wrong.
    """
    return AutofocusHook(
        parse_settings(settings, where="autofocus_hook"),
        axes=axes,
        z_offsets_um=z_offsets_um,
        core=core,
    )


class AutofocusHook:
    """Focuses before the exposure; see `autofocus_hook`.

    Attributes
    ----------
    records : list of dict
        One per search.

    Notes
    -----
    An exception in a hook aborts the acquisition; pycro-manager prints it. Under
    ``on_failure: pause`` the hook waits until `resume` (or `cancel`) is called from
    another thread. pycro-manager does not tell a hook that the acquisition was aborted:
    call `cancel` beside ``abort``, and the search ends before its next look.

    Frames are not verified by the model that focused, whatever ``verify`` says: a hook comes
    before the exposure, and pycro-manager has no way to expose again.
    """

    def __init__(
        self,
        settings: AutofocusSettings,
        *,
        axes: Sequence[str] = ("position",),
        z_offsets_um: Sequence[float] | None = None,
        core: Any = None,
    ) -> None:
        if settings.strategy == "hardware" and settings.shadow is not None:
            raise InputError(
                "autofocus_hook: shadow: beside 'hardware' a model would see the saved frame, "
                "and a hook comes before it; use the engine of pymmcore-plus"
            )
        if settings.strategy == "two-shot":
            raise InputError(
                "autofocus_hook: strategy: 'two-shot' says in which order a tile is exposed, "
                "and a hook is shown one exposure at a time; use the engine of pymmcore-plus"
            )
        self.settings = settings
        self.axes = tuple(axes)
        self.z_offsets_um = None if z_offsets_um is None else tuple(z_offsets_um)
        self.strategy = build_strategy(settings)
        self._core = core
        self._rig: CoreRig | None = None
        self._ledger: Ledger | None = None
        self._previous: dict[str, Any] = {}
        self._started_s = time.perf_counter()
        self._resume = threading.Event()
        self._cancel = threading.Event()

    @property
    def records(self) -> list[dict[str, Any]]:
        """One record per search, in their order."""
        return [] if self._ledger is None else self._ledger.records

    def resume(self) -> None:
        """Go on after a pause; the stage may have been moved meanwhile."""
        self._resume.set()

    def cancel(self) -> None:
        """End the present search before its next look, and let no image be taken any more.

        The stage goes back to where the search began.
        """
        self._cancel.set()
        self._resume.set()

    def __call__(self, event: Event | list[Event]) -> Event | list[Event] | None:
        """Focus if it is time to, correct z, and tag the event with its record.

        Parameters
        ----------
        event : dict or list of dict
            As pycro-manager gives it; a list is a hardware sequence.

        Returns
        -------
        dict or list of dict or None
            None leaves the images out (``on_failure: skip``, or cancelled).
        """
        if self._cancel.is_set():
            return None  # pycro-manager still brings the event that it had ready
        parts = event if isinstance(event, list) else [event]
        rig, ledger = self._open()
        _check_sequence(parts)
        head = parts[0]
        place = self._place(head, rig.core)
        if self._changed(head) and ledger.due(
            place, again=bool({"channel", "z"} & {*self.axes})
        ):
            try:
                self._focus(rig, ledger, place)
            except CancelledError:
                return None
        if ledger.skipped(place):
            return None
        target = ledger.target_um(place, head.get("z"))
        if target is not None:
            backlash_um = self.settings.backlash_um
            for z_um in way_to(target, rig.position_um(), backlash_um, ledger.travel_um()):
                rig.move_to(z_um)
        record = ledger.frame_record(place, self._now_s())
        if record is not None:
            for part in parts:
                part["tags"] = {**part.get("tags", {}), KEY: json.dumps(record)}
        return event

    # ----------------------------------------------------------------- inside

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s

    def _open(self) -> tuple[CoreRig, Ledger]:
        """Check the devices and open the books, at the first event."""
        if self._rig is None or self._ledger is None:
            core = self._core
            if core is None:
                from pycromanager import Core

                core = Core()
            _make_tags_work()
            core = core if hasattr(core, "getFocusDevice") else _CamelCore(core)
            check_looks(core, self.settings)
            prepare_strategy(core, self.settings, self.strategy)
            self._rig = CoreRig(_ImageCore(core), self.settings)
            offsets = self.z_offsets_um or (0.0,)
            self._ledger = Ledger(
                self.settings,
                z_run_start_um=self._rig.position_um(),
                offsets_um=(min(0.0, *offsets), max(0.0, *offsets)),
                stage_limits_um=stage_limits_um(core),
            )
        return self._rig, self._ledger

    def _changed(self, event: Event) -> bool:
        axes, previous = dict(event.get("axes", {})), self._previous
        self._previous = axes
        return any(previous.get(a, _NOTHING) != axes.get(a, _NOTHING) for a in self.axes)

    def _place(self, event: Event, core: Any) -> Place:
        axes = dict(event.get("axes", {}))
        index: dict[str, Any] = {}
        if "time" in axes:
            index["t"] = axes["time"]
        index["p"] = axes.get("position", 0)
        if "row" in axes or "column" in axes:
            index["g"] = f"{axes.get('row', 0)},{axes.get('column', 0)}"
        home = event.get("z")
        if home is not None and "z" in axes:
            home -= self._z_offset_um(int(axes["z"]))
        x_um, y_um = event.get("x"), event.get("y")
        if (x_um is None or y_um is None) and core.getXYStageDevice():
            x_um, y_um = core.getXPosition(), core.getYPosition()
        name = str(axes.get("position", "p000"))
        return Place(index, home, x_um or 0.0, y_um or 0.0, name)

    def _z_offset_um(self, index: int) -> float:
        if self.z_offsets_um is None or not 0 <= index < len(self.z_offsets_um):
            raise InputError(
                f"autofocus_hook: the events have a z axis (index {index}); give z_offsets_um, "
                "the z of each index relative to focus, so that the stack is put around it"
            )
        return self.z_offsets_um[index]

    def _focus(self, rig: CoreRig, ledger: Ledger, place: Place) -> None:
        record = self._try(rig, ledger, place, ledger.request(place, rig.pixel_size_um()))
        if record["status"] != "failed":
            return
        what = f"{place.name}: not focused: {record['reason']}"
        policy = self.settings.on_failure
        logger.warning("%s (on_failure: %s)", what, policy)
        if policy == "skip":
            ledger.leave_out(place)
        elif policy == "abort":
            self.cancel()
            raise FocusFailedError(what)
        elif policy == "pause":
            self._resume.clear()
            self._resume.wait()
            self._checkpoint()
            request = ledger.request_from(rig.position_um(), rig.pixel_size_um())
            self._try(rig, ledger, place, request)

    def _try(
        self, rig: CoreRig, ledger: Ledger, place: Place, request: FocusRequest
    ) -> dict[str, Any]:
        before = rig.position_um()
        result = self._search(rig, request)
        return ledger.enter(
            place,
            result,
            z_before_um=before,
            z_after_um=rig.position_um(),
            now_s=self._now_s(),
        )

    def _search(self, rig: CoreRig, request: FocusRequest) -> FocusResult:
        if self.settings.strategy == "hardware":
            result = rig.ask_hardware(request)
            if result.found or self.strategy is None:
                return result
        assert self.strategy is not None
        return drive(
            self.strategy,
            request,
            rig,
            backlash_um=self.settings.backlash_um,
            checkpoint=self._checkpoint,
        )

    def _checkpoint(self) -> None:
        if self._cancel.is_set():
            raise CancelledError("the search was cancelled")


_NOTHING = object()


def record_of(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """The autofocus record in the metadata of one NDTiff image, or None."""
    tags = metadata.get(TAGS_KEY) or metadata.get("tags") or metadata
    text = tags.get(KEY)
    return None if text is None else dict(json.loads(text))


def _check_sequence(parts: list[Event]) -> None:
    if len({part.get("z") for part in parts}) > 1:
        raise InputError(
            "autofocus_hook: the z of these events is hardware-sequenced; pycro-manager has "
            "loaded it before the hook is called, so that no correction can reach it; switch "
            "off the sequencing of the focus stage"
        )


def _make_tags_work() -> None:
    """Give pycro-manager 1.0's events the method that they call.

    Its Python backend calls ``setTags`` and ``getTags``, which are named ``set_tags`` and
    ``get_tags``: an event with tags ends the acquisition with an `AttributeError`.
    """
    try:
        from pycromanager.acquisition.acq_eng_py.main.acquisition_event import AcquisitionEvent
    except ImportError:  # another version keeps it elsewhere
        return
    for wrong, right in (("setTags", "set_tags"), ("getTags", "get_tags")):
        if not hasattr(AcquisitionEvent, wrong) and hasattr(AcquisitionEvent, right):
            setattr(AcquisitionEvent, wrong, getattr(AcquisitionEvent, right))


class _CamelCore:
    """A core with snake_case names (Java backend), asked for by its usual names."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        snake = "".join(f"_{c.lower()}" if c.isupper() else c for c in name)
        return getattr(self._core, snake.replace("x_y", "xy").replace("r_o_i", "roi"))


class _ImageCore:
    """A bare core whose images get the shape that pymmcore-plus would give them."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def getImage(self) -> Image:
        image = np.asarray(self._core.getImage())
        height, width = self._core.getImageHeight(), self._core.getImageWidth()
        components = self._core.getNumberOfComponents()
        if components == 1:
            return image.reshape(height, width)
        # BGRA, packed into one integer per pixel
        itemsize = self._core.getBytesPerPixel() // components
        packed = np.ascontiguousarray(image).view(f"u{itemsize}")
        return packed.reshape(height, width, components)[..., 2::-1]
