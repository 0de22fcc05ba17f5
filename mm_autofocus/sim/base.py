"""What all devices of the virtual microscope have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from pymmcore_plus.experimental.unicore import Device

from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.sim import microscope as shared
from mm_autofocus.sim.mechanics import FAULTS, FaultSwitch

if TYPE_CHECKING:
    from mm_autofocus.sim.microscope import Microscope

__all__ = ["VirtualDevice"]


def _core_key(device: Device) -> object:
    """Something that two devices have in common if, and only if, their core is the same.

    A device gets a proxy of its core with a few signals of it. Psygnal's signals know
    the object they belong to; of others the signal itself has to do (PySide makes one per
    core and keeps it; PyQt names the owner's address in its representation).
    """
    signal: Any = device.core.events.propertyChanged
    owner = getattr(signal, "instance", None)
    if owner is not None:
        return id(owner)
    text = repr(signal)
    return text if "object at 0x" in text else id(signal)


class VirtualDevice(Device):
    """A device that shares a microscope and can be told to fail.

    Properties of every device
    --------------------------
    microscope : str
        Devices of one core with the same name here share a microscope. To be set before
        the device is initialised, if at all.
    fault : none | raise | hang | wrong-value
        What happens from the `fault_at_call`-th call from now on.
    fault_on : str
        Which calls count: ``any`` or one of the device's operations.
    fault_at_call, fault_calls : int
        The first call to fail, and how many do (0: all that follow).
    fault_value : float
        What is wrong about a wrong value; each device says what it means.
    fault_s : float
        How long a call hangs, in seconds of the computer's clock.
    """

    OPERATIONS: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._name = ""
        self._scope: Microscope | None = None
        self._key: object = None
        self._switch = FaultSwitch()
        self._hung_until = 0.0
        self.add("microscope", str, lambda: self._name, self._set_name)
        sw = self._switch
        self.add("fault", str, lambda: sw.kind, self._arm, allowed=FAULTS)
        self.add(
            "fault_on",
            str,
            partial(getattr, sw, "operation"),
            partial(setattr, sw, "operation"),
            allowed=("any", *self.OPERATIONS),
        )
        for name, attribute, kind, low, high in (
            ("fault_at_call", "at_call", int, 1.0, 1e9),
            ("fault_calls", "calls", int, 0.0, 1e9),
            ("fault_value", "value", float, -1e9, 1e9),
            ("fault_s", "seconds", float, 0.0, 3600.0),
        ):
            get, put = partial(getattr, sw, attribute), partial(setattr, sw, attribute)
            self.add(name, kind, get, put, limits=(low, high))

    # --- properties ------------------------------------------------------------------------

    def add(
        self,
        name: str,
        kind: type,
        get: Callable[[], Any],
        put: Callable[[Any], None] | None = None,
        *,
        limits: tuple[float, float] | None = None,
        allowed: tuple[Any, ...] | None = None,
    ) -> None:
        """Register a property; values are converted to `kind` before they are set."""

        def setter(_: Any, value: Any) -> None:
            if put is not None:
                put(kind(value))

        self.register_property(
            name,
            property_type=kind,
            getter=lambda _: get(),
            setter=setter if put is not None else None,
            limits=limits,
            allowed_values=allowed,
        )

    def set_property_value(self, prop_name: str, value: Any) -> None:
        """Set a property; what a configuration file or a form says as text is converted."""
        allowed = self._get_prop_or_raise(prop_name).property.allowed_values
        if allowed and value not in allowed:
            kind = type(allowed[0])
            with suppress(TypeError, ValueError):  # the host names it and what is allowed
                value = kind(float(value)) if kind in (int, float) else kind(value)
        super().set_property_value(prop_name, value)

    # --- the microscope ----------------------------------------------------------------------

    @property
    def scope(self) -> Microscope:
        """The microscope this device is part of."""
        if self._scope is None:
            self._key = _core_key(self)
            self._scope = shared.join(self._key, self._name, self)
        return self._scope

    def _set_name(self, name: str) -> None:
        if self._scope is not None and name != self._name:
            raise InputError(
                f"microscope: {name!r}; it is set before the device is initialised"
            )
        self._name = name

    def initialize(self) -> None:
        """Join the microscope."""
        _ = self.scope

    def shutdown(self) -> None:
        """Leave the microscope."""
        if self._scope is not None:
            shared.leave(self._key, self._name, self)
            self._scope = None

    # --- faults ------------------------------------------------------------------------------

    def _arm(self, kind: str) -> None:
        self._switch.kind = kind
        self._switch.seen = 0
        self._hung_until = 0.0

    def call(self, operation: str, *, stay_busy: bool = False) -> bool:
        """Pass the fault switch at the beginning of an operation.

        Parameters
        ----------
        operation : str
            One of :attr:`OPERATIONS`.
        stay_busy : bool
            Hang by staying busy, where the operation itself returns at once.

        Returns
        -------
        bool
            Whether the operation has to give a wrong value.

        Raises
        ------
        HardwareError
            If the fault is ``raise``.
        """
        if not self._switch.strikes(operation):
            return False
        if self._switch.kind == "raise":
            raise HardwareError(f"{self.get_label()}: {operation} failed (a fault on command)")
        if self._switch.kind == "hang":
            if stay_busy:
                self._hung_until = time.monotonic() + self._switch.seconds
            else:
                time.sleep(self._switch.seconds)
            return False
        return True

    @property
    def hung(self) -> bool:
        """Whether the device hangs by staying busy."""
        return time.monotonic() < self._hung_until

    @property
    def wrong_by(self) -> float:
        """The `fault_value`."""
        return self._switch.value
