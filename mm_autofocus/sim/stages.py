"""The stages of the virtual microscope: focus, XY, and the hardware focus."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pymmcore_plus import FocusDirection
from pymmcore_plus.experimental.unicore import StageDevice, XYStageDevice

from mm_autofocus.errors import InputError
from mm_autofocus.sim.base import VirtualDevice

if TYPE_CHECKING:
    from mm_autofocus.sim.mechanics import Axis

__all__ = ["VirtualFocus", "VirtualFocusLock", "VirtualXYStage"]


def _axis_properties(device: VirtualDevice, axes: Callable[[], tuple[Axis, ...]]) -> None:
    """Properties of one or two axes that are alike."""

    def get(name: str) -> Any:
        return getattr(axes()[0], name)

    def put(name: str, value: float) -> None:
        for axis in axes():
            setattr(axis, name, value)

    for name, low, high in (
        ("speed_um_s", 1e-3, 1e9),
        ("settle_s", 0.0, 60.0),
        ("backlash_um", 0.0, 100.0),
        ("repeatability_um", 0.0, 100.0),
        ("drift_um_h", -1e4, 1e4),
        ("low_um", -1e6, 1e6),
        ("high_um", -1e6, 1e6),
    ):
        device.add(name, float, partial(get, name), partial(put, name), limits=(low, high))


class VirtualFocus(VirtualDevice, StageDevice):
    """Focus stage. Its reading knows nothing of backlash, repeatability and drift.

    A wrong value is ``fault_value`` µm added to where it goes (``move``) or to what it
    says (``read``). A hanging ``move`` stays busy.
    """

    OPERATIONS = ("move", "read")

    def __init__(self) -> None:
        super().__init__()
        _axis_properties(self, lambda: (self.scope.z,))
        self._sequence_length = 0
        self.add(
            "sequence_length",
            int,
            lambda: self._sequence_length,
            lambda v: setattr(self, "_sequence_length", v),
            limits=(0, 10000),
        )

    def home(self) -> None:
        """Go to 0."""
        self.set_position_um(0.0)

    def stop(self) -> None:
        """Stop."""
        self.scope.z.stop(self.scope.clock.now_s)

    def set_origin(self) -> None:
        """Read 0 here."""
        self.scope.z.zero(self.scope.clock.now_s)

    def set_adapter_origin_um(self, newZUm: float) -> None:
        """Read `newZUm` here."""
        self.scope.z.zero(self.scope.clock.now_s, newZUm)

    def set_position_um(self, val: float) -> None:
        """Start to move."""
        wrong = self.call("move", stay_busy=True)
        scope = self.scope
        with scope.lock:
            if scope.focus_lock:
                scope.release_focus()
            scope.z.move(float(val) + (self.wrong_by if wrong else 0.0), scope.clock.now_s)
        self.core.events.stagePositionChanged.emit(self.get_label(), float(val))

    def get_position_um(self) -> float:
        """Where the encoder says the stage is."""
        wrong = self.call("read")
        return self.scope.z_reading_um() + (self.wrong_by if wrong else 0.0)

    def busy(self) -> bool:
        """Whether the stage moves or settles."""
        return self.hung or not self.scope.clock.reached(self.scope.z.ready_s())

    def get_focus_direction(self) -> FocusDirection:
        """Say that a higher z takes the lens away from the slide (always so)."""
        return FocusDirection.AwayFromSample

    def set_focus_direction(self, sign: int) -> None:
        """Accept what a configuration says; it cannot be changed."""

    def get_sequence_max_length(self) -> int:
        """Length of a hardware sequence; 0 unless ``sequence_length`` is set."""
        return self._sequence_length

    def send_sequence(self, sequence: tuple[float, ...]) -> None:
        """Load heights; each frame of a camera sequence steps to the next."""
        self.scope.load_z_sequence([float(z) for z in sequence])

    def start_sequence(self) -> None:
        """Go to the first height."""
        self.scope.start_z_sequence()

    def stop_sequence(self) -> None:
        """Stop stepping."""
        self.scope.stop_z_sequence()


class VirtualXYStage(VirtualDevice, XYStageDevice):
    """XY stage. A wrong value is ``fault_value`` µm added to x, going or reading."""

    OPERATIONS = ("move", "read")

    def __init__(self) -> None:
        super().__init__()
        _axis_properties(self, lambda: (self.scope.x, self.scope.y))

    def home(self) -> None:
        """Go to 0, 0."""
        self.set_position_um(0.0, 0.0)

    def stop(self) -> None:
        """Stop."""
        for axis in (self.scope.x, self.scope.y):
            axis.stop(self.scope.clock.now_s)

    def set_origin_x(self) -> None:
        """Read x = 0 here."""
        self.scope.x.zero(self.scope.clock.now_s)

    def set_origin_y(self) -> None:
        """Read y = 0 here."""
        self.scope.y.zero(self.scope.clock.now_s)

    def set_adapter_origin_um(self, x: float, y: float) -> None:
        """Read `x`, `y` here."""
        self.scope.x.zero(self.scope.clock.now_s, x)
        self.scope.y.zero(self.scope.clock.now_s, y)

    def set_position_um(self, x: float, y: float) -> None:
        """Start to move."""
        wrong = self.call("move", stay_busy=True)
        scope = self.scope
        with scope.lock:
            t = scope.clock.now_s
            before = scope.x.motor_um(t) - scope.x.origin_um
            scope.x.move(float(x) + (self.wrong_by if wrong else 0.0), t)
            try:
                scope.y.move(float(y), t)
            except Exception:
                scope.x.move(before, t)
                raise
        self.core.events.XYStagePositionChanged.emit(self.get_label(), float(x), float(y))

    def get_position_um(self) -> tuple[float, float]:
        """Where the encoders say the stage is."""
        wrong = self.call("read")
        t = self.scope.clock.now_s
        x, y = self.scope.x.reading_um(t), self.scope.y.reading_um(t)
        return x + (self.wrong_by if wrong else 0.0), y

    def busy(self) -> bool:
        """Whether the stage moves or settles."""
        ready = max(self.scope.x.ready_s(), self.scope.y.ready_s())
        return self.hung or not self.scope.clock.reached(ready)


class VirtualFocusLock(VirtualDevice, StageDevice):
    """Hardware focus: its position is the offset from the glass at which it holds z.

    ``UniMMCore`` has no device type for autofocus (``setAutoFocusDevice`` refuses a Python
    device), so this is a stage, like the offset drives of commercial systems. It is
    worked by its properties: ``continuous`` (1: lock now and follow; it reads 0 again
    when the lock is lost) and ``lock`` (off, locked, lost). Moving the focus stage lets go.
    ``lose`` = 1 makes it lose the lock and refuse to lock until it is set to 0. A wrong
    value: it locks ``fault_value`` µm away from where it should.
    """

    OPERATIONS = ("lock", "move", "read")

    def __init__(self) -> None:
        super().__init__()
        self.add(
            "continuous",
            int,
            lambda: int(self.scope.focus_lock),
            lambda v: self._continuous(bool(v)),
            allowed=(0, 1),
        )
        self.add("lock", str, self._state)
        self.add("lose", int, lambda: int(self.scope.focus_lost), self._lose, allowed=(0, 1))
        self.add(
            "range_um",
            float,
            lambda: self.scope.focus_range_um,
            lambda v: setattr(self.scope, "focus_range_um", v),
            limits=(0, 1e4),
        )

    def _state(self) -> str:
        if self.scope.focus_lock:
            return "locked"
        return "lost" if self.scope.focus_lost else "off"

    def _continuous(self, on: bool) -> None:
        if not on:
            self.scope.release_focus()
            return
        wrong = self.call("lock")
        self.scope.focus_error_um = self.wrong_by if wrong else 0.0
        self.scope.engage_focus()

    def _lose(self, lost: int) -> None:
        if lost:
            self.scope.release_focus()
        self.scope.focus_lost = bool(lost)

    def home(self) -> None:
        """Set the offset to 0."""
        self.set_position_um(0.0)

    def stop(self) -> None:
        """Let go."""
        self.scope.release_focus()

    def set_origin(self) -> None:
        """Do nothing: the offset is absolute."""

    def set_position_um(self, val: float) -> None:
        """Set the offset."""
        self.call("move", stay_busy=True)
        if not -100 <= val <= 100:
            raise InputError(f"offset: {val:g} µm is not between -100 and 100")
        self.scope.focus_offset_um = float(val)

    def get_position_um(self) -> float:
        """Read the offset."""
        wrong = self.call("read")
        return self.scope.focus_offset_um + (self.wrong_by if wrong else 0.0)

    def is_continuous_focus_drive(self) -> bool:
        """Say that it can be moved while it holds focus."""
        return True

    def busy(self) -> bool:
        """Whether it hangs."""
        return self.hung
