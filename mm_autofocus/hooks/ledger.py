"""The books of a run: which position was focused where and when, and what follows from it.

Pure bookkeeping, without a core: the pymmcore-plus engine and the pycro-manager hook
keep the same books.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm_autofocus.errors import InputError
from mm_autofocus.surface import FocusSurface
from mm_autofocus.types import FocusRequest, FocusResult, Prior

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mm_autofocus.settings import AutofocusSettings

__all__ = ["Ledger", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where and when in the plan: one position, one tile, one time point.

    Attributes
    ----------
    index : mapping of str to int
        The plan's index, of which t, p and g matter.
    home_um : float | None
        z that the plan gives the position, in µm; None if it gives none.
    x_um, y_um : float
        Stage position, in µm.
    name : str
        The position's name.
    """

    index: Mapping[str, int]
    home_um: float | None
    x_um: float = 0.0
    y_um: float = 0.0
    name: str = ""

    @property
    def key(self) -> tuple[int | None, int | None]:
        """What a correction belongs to: position and tile of its grid."""
        return self.index.get("p"), self.index.get("g")

    @property
    def visit(self) -> Hashable:
        """What is focused once: this key at this time point, whatever the channel or z."""
        return self.index.get("t"), *self.key


@dataclass(slots=True)
class _Focus:
    """The state of one key."""

    dz_um: float
    record: dict[str, Any]
    found_at_s: float | None  # None: the search failed and none succeeded before


@dataclass(slots=True)
class Ledger:
    """Corrections, priors and records of one run.

    Parameters
    ----------
    settings : AutofocusSettings
        What was asked for.
    z_run_start_um : float
        Where the focus stage stood when the run began, in µm: the home of positions to
        which the plan gives no z.
    offsets_um : (float, float)
        Lowest and highest z relative to home that the plan sends the stage to. The
        search is kept so far from the limits that a whole z-stack stays within them.
    stage_limits_um : (float | None, float | None)
        What the stage itself says of its travel.
    """

    settings: AutofocusSettings
    z_run_start_um: float
    offsets_um: tuple[float, float] = (0.0, 0.0)
    stage_limits_um: tuple[float | None, float | None] = (None, None)
    records: list[dict[str, Any]] = field(default_factory=list)
    surface: FocusSurface = field(init=False)
    _foci: dict[Hashable, _Focus] = field(default_factory=dict)
    _visited: set[Hashable] = field(default_factory=set)
    _skipped: set[Hashable] = field(default_factory=set)

    def __post_init__(self) -> None:
        s = self.settings
        self.surface = FocusSurface(s.prior, sd_um=s.range_um / 2)

    # ---------------------------------------------------------------- when

    def due(self, place: Place, *, again: bool = False) -> bool:
        """Whether this visit is to be focused: once, and at every n-th time point only.

        `again` allows a second focus in the same visit (``axes`` that contain c or z).
        """
        if place.visit in self._visited and not again:
            return False
        return place.index.get("t", 0) % self.settings.every == 0

    def visited(self, place: Place) -> bool:
        """Whether a focus, or what it stands on, was entered for this visit."""
        return place.visit in self._visited

    def skipped(self, place: Place) -> bool:
        """Whether frames of this visit are to be left out (``on_failure: skip``)."""
        return place.visit in self._skipped

    # --------------------------------------------------------------- where

    def home_um(self, place: Place) -> float:
        """Z of the plan, or where the run began if the plan gives none; in µm."""
        return self.z_run_start_um if place.home_um is None else place.home_um

    def dz_um(self, place: Place) -> float | None:
        """Correction of a position relative to its home, in µm; None if it has none."""
        p, _ = place.key
        focus = self._foci.get(place.key) or self._foci.get(("any", p))
        return None if focus is None else focus.dz_um

    def focus_um(self, place: Place) -> float:
        """Where focus is taken to be at a place, in µm; its home if it was never focused."""
        return self.home_um(place) + (self.dz_um(place) or 0.0)

    def target_um(self, place: Place, z_pos_um: float | None) -> float | None:
        """Where to send the stage for an event of this place, in µm.

        Parameters
        ----------
        place : Place
            Whose event it is.
        z_pos_um : float | None
            The event's own z (z plan and channel offset included), None if it has none.

        Returns
        -------
        float | None
            None: leave the stage where it is.

        Raises
        ------
        LimitError
            Never: the search was kept so far inside that no stack leaves the limits.
        """
        dz_um = self.dz_um(place)
        if z_pos_um is None:
            return None if dz_um is None else self.home_um(place) + dz_um
        # Where the plan gives no z, useq's relative stack stands around 0: the home that
        # it is relative to is then where the run began.
        base = self.home_um(place) if place.home_um is None else 0.0
        return z_pos_um + base + (dz_um or 0.0)

    def travel_um(self) -> tuple[float, float]:
        """Absolute limits of the stage, in µm: the user's and its own."""
        s, (low, high) = self.settings, self.stage_limits_um
        lows = [v for v in (s.z_min_um, low) if v is not None]
        highs = [v for v in (s.z_max_um, high) if v is not None]
        return max(lows, default=-1e9), min(highs, default=1e9)

    def limits_um(self) -> tuple[float, float]:
        """Absolute limits for a focus, in µm: the stage's, less the reach of the plan."""
        low, high = self.travel_um()
        return low - self.offsets_um[0], high - self.offsets_um[1]

    def check_home(self, home_um: float, what: str) -> None:
        """Raise `InputError` if a home is outside the limits."""
        low, high = self.limits_um()
        if not low <= home_um <= high:
            reach = (
                " (less what the z plan and the channel offsets reach)"
                if any(self.offsets_um)
                else ""
            )
            raise InputError(
                f"{what}: z {home_um:g} µm is outside the limits "
                f"{low:g} … {high:g} µm{reach}; see z_min_um and z_max_um"
            )

    def request(self, place: Place, pixel_size_um: float | None = None) -> FocusRequest:
        """The task of focusing a place: start, limits, prior."""
        home = self.home_um(place)
        prior = self.surface.predict(place.key, place.x_um, place.y_um)
        low, high = self.limits_um()
        start = min(max(home + (prior.z_um if prior else 0.0), low), high)
        if prior is None:
            return self._request(start, start, None, pixel_size_um)
        # A neighbour's correction is a guess; the z that the plan gives this place stays
        # within reach, in case the plan knew better.
        also = home if prior.source == "neighbour" and low <= home <= high else start
        prior = Prior(home + prior.z_um, prior.sd_um, prior.source)
        return self._request(start, also, prior, pixel_size_um)

    def request_from(self, z_um: float, pixel_size_um: float | None = None) -> FocusRequest:
        """The task of focusing from where the stage stands, whatever was known before."""
        low, high = self.limits_um()
        start = min(max(z_um, low), high)
        return self._request(start, start, None, pixel_size_um)

    def _request(
        self, start_um: float, also_um: float, prior: Prior | None, pixel_size_um: float | None
    ) -> FocusRequest:
        s = self.settings
        low, high = self.limits_um()
        return FocusRequest(
            z_start_um=start_um,
            z_min_um=max(low, min(start_um, also_um) - s.range_um),
            z_max_um=min(high, max(start_um, also_um) + s.range_um),
            max_looks=s.max_looks,
            tolerance_um=s.tolerance_um,
            step_um=s.step_um,
            optics=s.optics(pixel_size_um),
            prior=prior,
            z_sd_um=s.repeatability_um,
        )

    # ---------------------------------------------------------------- what

    def enter(
        self,
        place: Place,
        result: FocusResult,
        *,
        z_before_um: float,
        z_after_um: float,
        now_s: float,
        thumbnail: dict[str, Any] | None = None,
        stands_since_s: float | None = None,
    ) -> dict[str, Any]:
        """Write down one search, and what it means for later frames.

        Parameters
        ----------
        place : Place
            What was focused.
        result : FocusResult
            What came out.
        z_before_um, z_after_um : float
            Where the stage stood before the search, and where it was left.
        now_s : float
            Time since the run began, in s.
        thumbnail : dict, optional
            ``thumbnail`` (base64 PNG of a part of the first look) and ``thumbnail_xy``
            (where the part begins).
        stands_since_s : float, optional
            When the focus was found that this place stands on without one of its own; in s
            since the run began.

        Returns
        -------
        dict
            The record; JSON values only.
        """
        residual: float | None = None
        self._visited.add(place.visit)
        dz_um = z_after_um - self.home_um(place)
        own = result.found and stands_since_s is None
        if own:
            residual = self.surface.add(place.key, place.x_um, place.y_um, dz_um)
        record: dict[str, Any] = {
            "focus_id": len(self.records),
            "index": {k: v for k, v in place.index.items() if k in "tpg"},
            "position": place.name,
            "x_um": place.x_um,
            "y_um": place.y_um,
            "strategy": result.strategy,
            "status": result.status,
            "reason": result.reason,
            "z_before_um": z_before_um,
            "z_after_um": z_after_um,
            "z_um": result.z_um,
            "expected_error_um": result.expected_error_um,
            "score": result.score,
            "looks": result.looks,
            "moves": result.moves,
            "time_s": now_s,
            "surface_residual_um": residual,
            "curve": [list(point) for point in result.curve],
            "details": dict(result.details),
            **(thumbnail or {}),
        }
        self.records.append(record)
        before = self._foci.get(place.key)
        if own:
            focus = _Focus(dz_um, record, now_s)
        elif stands_since_s is not None:
            focus = _Focus(dz_um, record, stands_since_s)
        elif before is not None and before.found_at_s is not None:
            # go back to the best known z of this position
            focus = _Focus(before.dz_um, record, before.found_at_s)
        else:
            focus = _Focus(dz_um, record, None)
        self._foci[place.key] = self._foci["any", place.key[0]] = focus
        return record

    def record_of(self, place: Place) -> dict[str, Any]:
        """The record of the last focus of a place."""
        return self._foci[place.key].record

    def revise(self, place: Place, *, shift_um: float = 0.0, **changes: Any) -> None:
        """Correct the last focus of a place by what its frame has shown.

        Parameters
        ----------
        place : Place
            Which was focused.
        shift_um : float
            By how much its focus is higher than was written down, in µm.
        **changes
            Of its record.
        """
        focus = self._foci[place.key]
        # a frame that is saved already has it as it was: its file is told that it changed
        focus.record.update(changes, revised=focus.record.get("revised", 0) + 1)
        if not shift_um:
            return
        focus.dz_um += shift_um
        self.surface.move(place.key, focus.dz_um)
        for key in ("z_after_um", "z_um", "surface_residual_um"):
            if focus.record[key] is not None:
                focus.record[key] += shift_um

    def leave_out(self, place: Place) -> None:
        """Take no frames of this visit."""
        self._skipped.add(place.visit)

    def frame_record(self, place: Place, now_s: float) -> dict[str, Any] | None:
        """The record that a frame of this place carries; None if it was never focused."""
        focus = self._foci.get(place.key) or self._foci.get(("any", place.key[0]))
        if focus is None:
            return None
        status, reason = focus.record["status"], focus.record["reason"]
        age_s = None if focus.found_at_s is None else max(0.0, now_s - focus.found_at_s)
        max_age_s = self.settings.max_age_s
        if status == "failed" and age_s is not None:
            status = "stale"
            reason = f"refocusing failed ({reason}); the z is that of an earlier focus"
        elif status != "failed" and max_age_s and age_s is not None and age_s > max_age_s:
            status = "stale"
            reason = f"the focus is {age_s:.0f} s old (max_age_s: {max_age_s:g})"
        return {**focus.record, "status": status, "reason": reason, "age_s": age_s}
