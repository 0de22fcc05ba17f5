"""Time, stages and faults of the virtual microscope."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np

from mm_autofocus.errors import LimitError

__all__ = ["FAULTS", "Axis", "Clock", "FaultSwitch"]


class Clock:
    """Time as the microscope sees it.

    Accelerated (the default), nothing sleeps: what takes time adds it to the clock.
    In real time the clock is the computer's.
    """

    def __init__(self) -> None:
        self._t = 0.0
        self._started: float | None = None

    @property
    def real_time(self) -> bool:
        """Whether what takes time really takes it."""
        return self._started is not None

    @real_time.setter
    def real_time(self, on: bool) -> None:
        self._t = self.now_s
        self._started = time.perf_counter() if on else None

    @property
    def now_s(self) -> float:
        """Seconds since the microscope was switched on."""
        if self._started is None:
            return self._t
        return self._t + time.perf_counter() - self._started

    def spend(self, seconds: float) -> None:
        """Let time pass."""
        if self._started is None:
            self._t += seconds
        else:
            time.sleep(seconds)

    def reached(self, moment_s: float) -> bool:
        """Whether a moment has come; accelerated, waiting for it is what makes it come."""
        if self._started is None:
            self._t = max(self._t, moment_s)
        return self.now_s >= moment_s


@dataclass(slots=True)
class Axis:
    """One axis of a stage.

    The motor goes where it is told and reports it. The stage behind it lags by the
    backlash when the direction turns (upwards it rests on the motor), comes to rest with
    a random error, and drifts; none of this is in the reading.

    Attributes
    ----------
    speed_um_s : float
        Speed of the motor.
    settle_s : float
        Time to rest after a move.
    backlash_um : float
        Play between motor and stage.
    repeatability_um : float
        Standard deviation of where the stage comes to rest.
    drift_um_h : float
        Drift in µm per hour.
    low_um, high_um : float
        Limits of travel.
    """

    speed_um_s: float
    settle_s: float
    backlash_um: float
    repeatability_um: float
    drift_um_h: float
    low_um: float
    high_um: float
    seed: tuple[int, ...] = (0,)
    origin_um: float = 0.0
    _from: float = 0.0
    _to: float = 0.0
    _began: float = 0.0
    _play: float = 0.0
    _error: float = 0.0
    _moves: int = 0
    _last_error: float = 0.0

    def _fraction(self, t: float) -> float:
        distance = abs(self._to - self._from)
        if distance == 0:
            return 1.0
        return min(max((t - self._began) * self.speed_um_s / distance, 0.0), 1.0)

    def motor_um(self, t: float) -> float:
        """Where the motor is, in its own coordinates."""
        return self._from + (self._to - self._from) * self._fraction(t)

    def reading_um(self, t: float) -> float:
        """What the encoder says."""
        return round(self.motor_um(t) - self.origin_um, 3)

    def true_um(self, t: float) -> float:
        """Where the stage is."""
        motor = self.motor_um(t)
        place = min(max(self._play, motor), motor + self.backlash_um)
        f = self._fraction(t)
        error = self._last_error + (self._error - self._last_error) * f
        if f >= 1:  # ringing until it rests
            since = t - self._began - abs(self._to - self._from) / self.speed_um_s
            if self._to != self._from and 0 <= since < self.settle_s:
                swing = min(0.02 * abs(self._to - self._from), 0.5)
                error += swing * math.exp(-5 * since / self.settle_s) * math.cos(40 * since)
        return place + error + self.drift_um_h * t / 3600

    def ready_s(self) -> float:
        """When the last move is over."""
        distance = abs(self._to - self._from)
        return self._began + (distance / self.speed_um_s + self.settle_s if distance else 0.0)

    def move(self, reading_um: float, t: float) -> None:
        """Start to move to a reading.

        Raises
        ------
        LimitError
            If it is beyond the limits of travel.
        """
        target = reading_um + self.origin_um
        if not (math.isfinite(target) and self.low_um <= target <= self.high_um):
            raise LimitError(
                f"position: {reading_um:g} µm is beyond the limits of travel, "
                f"{self.low_um - self.origin_um:g} … {self.high_um - self.origin_um:g} µm"
            )
        motor = self.motor_um(t)
        self._play = min(max(self._play, motor), motor + self.backlash_um)
        if target == motor:
            return
        self._from, self._to, self._began = motor, target, t
        self._moves += 1
        rng = np.random.default_rng([*self.seed, self._moves])
        self._last_error = self._error
        self._error = (
            float(rng.normal(0, self.repeatability_um)) if self.repeatability_um else 0.0
        )

    def stop(self, t: float) -> None:
        """Stop where the motor is."""
        motor = self.motor_um(t)
        self._from = self._to = motor

    def zero(self, t: float, reading_um: float = 0.0) -> None:
        """Let the place where the motor is have a reading."""
        self.origin_um = self.motor_um(t) - reading_um


FAULTS = ("none", "raise", "hang", "wrong-value")


@dataclass(slots=True)
class FaultSwitch:
    """Makes a device fail on command.

    Attributes
    ----------
    kind : {"none", "raise", "hang", "wrong-value"}
        What happens.
    operation : str
        Which calls are counted: ``"any"`` or one that the device names.
    at_call : int
        The how-manieth of these calls from now is the first to fail, 1 or more.
    calls : int
        How many fail; 0: all that follow.
    value : float
        The wrong value: what it means is told by each device.
    seconds : float
        How long a hanging call (or a device that stays busy) hangs, in real seconds.
    """

    kind: str = "none"
    operation: str = "any"
    at_call: int = 1
    calls: int = 1
    value: float = 0.0
    seconds: float = 10.0
    seen: int = field(default=0)

    def strikes(self, operation: str) -> bool:
        """Count a call; whether it has to fail."""
        if self.kind == "none" or self.operation not in ("any", operation):
            return False
        self.seen += 1
        after = self.seen - self.at_call
        return after >= 0 and (self.calls == 0 or after < self.calls)
