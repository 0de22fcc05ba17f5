"""The books of a two-shot scan: where F is, how old it is, and which shot is sharper.

Pure bookkeeping beside `ledger`, without a core. Whether F is to be found at a tile is asked
before the tile (`Shots.why_find`); what its two shots show is told as they come
(`Shots.add`), and may say that F is to be found again at the next tile.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.measure import FocusMeasure, noise_variance
from mm_autofocus.metrics import brenner
from mm_autofocus.types import FocusResult

if TYPE_CHECKING:
    from collections.abc import Hashable

    import useq

    from mm_autofocus.hooks.ledger import Ledger, Place
    from mm_autofocus.strategies.two_shot import TwoShotSettings
    from mm_autofocus.types import Image

__all__ = ["Shots", "shows_nothing"]

logger = logging.getLogger(__name__)

# Tiles that the median runs over, and how many it needs.
_HISTORY = 15
_ENOUGH = 3
# After searches that were of no use, the next waits for so many tiles at most.
_PATIENCE = 64
# White noise gives Brenner's measure twice its variance. On the virtual slide (512²) that is
# within 3 % of the estimate where there is nothing, and tissue 25 µm out of focus is 10 %
# above; the estimate of a smaller image errs by more.
_NOISE_ALONE = 2.0
_ESTIMATE, _ESTIMATE_PX = 0.03, 14.4
# Below this share of the median a tile is stale where F is never found again for it.
_FALLEN = 0.3


def shows_nothing(grey: Image) -> bool:
    """Whether neighbouring pixels of ``(Y, X)`` differ by no more than noise makes them."""
    slack = 1 + _ESTIMATE + _ESTIMATE_PX / math.sqrt(grey.size)
    return brenner(grey) <= slack * _NOISE_ALONE * noise_variance(grey)


@dataclass(slots=True)
class _Region:
    """What is known of the focus of one region."""

    dz_um: float
    focus_id: int
    by: str
    found_at_s: float
    error_um: float
    t: int
    tiles: int = 0
    """Tiles since F was found."""
    wait: int = 0
    """Tiles for which the next search is put off."""
    patience: int = 1
    suspect: str = ""
    """Why the frames of the last tiles make a search advisable."""
    unconfirmed: str = ""
    """Why F stands although it should have been found again."""
    doubt: str = ""
    """Why F was not sure when it was found."""
    scores: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))


@dataclass(slots=True)
class _Tile:
    """The tile whose shots are coming."""

    visit: Hashable
    place: Place
    region: _Region | None
    scores: dict[int, float] = field(default_factory=dict)
    sharper: Image | None = None
    """Grey values of the shot with the higher score."""


@dataclass(slots=True)
class Shots:
    """Decides where F is found, and keeps what follows from it.

    Parameters
    ----------
    settings : TwoShotSettings
        What was asked for.
    ledger : Ledger
        The books of the run, where the records are entered.
    delta_um : float
        ΔD of the plan.
    by_position : bool
        Each position is a region of its own.
    channel : int
        Index of the channel whose shots are measured.
    """

    settings: TwoShotSettings
    ledger: Ledger
    delta_um: float
    by_position: bool
    channel: int = 0
    measure: FocusMeasure = field(init=False)
    _regions: dict[Hashable, _Region] = field(default_factory=dict)
    _tile: _Tile | None = None

    def __post_init__(self) -> None:
        self.measure = FocusMeasure.from_settings(self.settings)

    # ---------------------------------------------------------------- before a tile

    def why_find(self, place: Place) -> str:
        """Why F is to be found at a place, as a clause; ``""`` if the tile stands on F."""
        region = self._region(place)
        if region is None:
            return "there is no F yet"
        if not self._within(place, region):
            return "F ± ΔD would leave the limits there"
        return "" if region.wait else self._why_again(place, region)

    def _why_again(self, place: Place, region: _Region) -> str:
        s, t = self.settings, place.index.get("t", 0)
        if t != region.t and t % s.every == 0:
            return f"time point {t}"
        if s.refind_every is not None and region.tiles + 1 >= s.refind_every:
            return f"F is {region.tiles + 1} tiles old"
        if s.prior == "surface" and not region.suspect:
            sd, most = self._surface_sd_um(place), s.refind_above_um or self.delta_um / 2
            if sd > most:
                return f"the surface is unsure by {sd:.2g} µm (at most {most:.2g})"
        return region.suspect

    def stand(self, place: Place, here_um: float, now_s: float) -> dict[str, Any]:
        """Enter a tile that stands on the F of its region; nothing moves.

        Parameters
        ----------
        place : Place
            Which `why_find` has nothing to say of.
        here_um : float
            Where the focus stage stands, in µm.
        now_s : float
            Time since the run began.
        """
        region = self._region(place)
        assert region is not None
        region.tiles += 1
        region.wait = max(0, region.wait - 1)
        return self._enter(place, region, _standing(region), here_um, now_s)

    def enter(
        self,
        place: Place,
        result: FocusResult,
        *,
        z_before_um: float,
        z_after_um: float,
        now_s: float,
        thumbnail: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Enter a search for F, as `Ledger.enter` does, and what it means for its region."""
        why, region = self.why_find(place), self._region(place)
        stands = region is not None and self._within(place, region)
        if result.found and not (stands and self._unsure(result)):
            region = self._found(place, result, z_after_um, now_s)
        elif region is not None:
            region.tiles += 1
            region.wait = region.patience - 1
            region.patience = min(2 * region.patience, _PATIENCE)
            if stands:
                region.unconfirmed = f"F could not be found again ({result.reason})"
                stale = replace(result, status="stale", reason=region.unconfirmed)
                return self._enter(place, region, stale, z_before_um, now_s, thumbnail, why=why)
        by = result.strategy
        record = self.ledger.enter(
            place,
            replace(result, strategy=self.settings.strategy),
            z_before_um=z_before_um,
            z_after_um=z_after_um,
            now_s=now_s,
            thumbnail=thumbnail,
        )
        if result.found:
            assert region is not None
            region.focus_id, region.by = record["focus_id"], by
        self._tell(record, place, region if result.found else None, why)
        return record

    def _unsure(self, result: FocusResult) -> bool:
        """Whether an F that stands is better than what was found."""
        if result.status == "ok":
            return False
        return result.expected_error_um is None or result.expected_error_um > self.delta_um

    def _found(
        self, place: Place, result: FocusResult, z_after_um: float, now_s: float
    ) -> _Region:
        dz_um = z_after_um - self.ledger.home_um(place)
        before = self._region(place)
        error = result.expected_error_um or 0.0
        t = place.index.get("t", 0)
        region = _Region(dz_um, -1, "", now_s, error, t, doubt=result.reason)
        if before is not None:
            region.scores = before.scores
            moved = abs(z_after_um - self._focus_um(place, before))
            if moved <= self.delta_um / 2:
                region.patience = before.patience
                if before.suspect:
                    # the frames had fallen for another reason, and may fall again
                    region.wait = before.patience
                    region.patience = min(2 * before.patience, _PATIENCE)
        self._regions[self._key(place)] = region
        return region

    def _enter(
        self,
        place: Place,
        region: _Region,
        result: FocusResult,
        here_um: float,
        now_s: float,
        thumbnail: dict[str, Any] | None = None,
        *,
        why: str = "",
    ) -> dict[str, Any]:
        """Enter a tile that stands on an F that was not found there."""
        focus_um = self._focus_um(place, region)
        spread = self.settings.flatness_um
        if self.settings.prior == "surface":
            spread = max(self._surface_sd_um(place), spread)
        record = self.ledger.enter(
            place,
            replace(
                result,
                z_um=focus_um,
                strategy=self.settings.strategy,
                expected_error_um=math.hypot(region.error_um, spread),
            ),
            z_before_um=here_um,
            z_after_um=focus_um,
            now_s=now_s,
            thumbnail=thumbnail,
            stands_since_s=region.found_at_s,
        )
        self._tell(record, place, region, why)
        return record

    def _tell(
        self,
        record: dict[str, Any],
        place: Place,
        region: _Region | None,
        why: str,
    ) -> None:
        """Write what is special of two shots into a record, and await them."""
        age_s = None if region is None else max(0.0, record["time_s"] - region.found_at_s)
        record["details"]["two_shot"] = {
            "f_um": record["z_after_um"],
            "delta_um": self.delta_um,
            "focus_id": None if region is None else region.focus_id,
            "found_by": None if region is None else region.by,
            "age_tiles": None if region is None else region.tiles,
            "age_s": age_s,
            "why_found": why,
            "metric": self.settings.metric,
            "channel": self.channel,
            "scores": [None, None],
            "sharper": None,
            "median": None,
        }
        self._tile = _Tile(place.visit, place, region)

    # ------------------------------------------------------------------ its frames

    def add(self, place: Place, event: useq.MDAEvent, image: Image) -> dict[str, Any] | None:
        """Look at a frame; once both shots are there, revise and return the tile's record."""
        tile, index = self._tile, event.index
        if tile is None or tile.visit != place.visit or index.get("cam", 0):
            return None
        if index.get("c", 0) != self.channel:
            return None
        try:
            grey = self.measure.grey(image)
            score = self.measure.score(grey)
        except Exception:  # it must not cost the frame
            logger.warning("%s: its shot could not be measured", place.name, exc_info=True)
            return None
        if score > max(tile.scores.values(), default=-math.inf):
            # some cameras lend out the memory that the next frame is written to
            tile.sharper = grey if tile.scores else np.array(grey)
        tile.scores[int(index.get("z", 0))] = score
        if len(tile.scores) < 2:
            return None
        self._tile = None
        return self._conclude(tile)

    def _conclude(self, tile: _Tile) -> dict[str, Any]:
        place, region = tile.place, tile.region
        record = self.ledger.record_of(place)
        scores = [tile.scores[0], tile.scores[1]]
        best, blank = max(scores), tile.sharper is None or shows_nothing(tile.sharper)
        told = {
            **record["details"]["two_shot"],
            "f_um": self.ledger.focus_um(place),  # its frame may have proved it wrong
            "scores": scores,
            "sharper": None if blank else scores.index(best),
        }
        changes: dict[str, Any] = {}
        if region is not None:
            known = statistics.median(region.scores) if len(region.scores) >= _ENOUGH else None
            told["median"] = known
            if told["focus_id"] == record["focus_id"]:
                # F was found here just now: a focus measure that fell says nothing of it, and
                # where a frame proved a learned search, F follows the proof
                region.dz_um = told["f_um"] - self.ledger.home_um(place)
            else:
                changes = self._judged(region, record, best, known, blank=blank)
            if not blank:
                region.scores.append(best)
        details = {**record["details"], "two_shot": told}
        self.ledger.revise(place, **changes, details=details)
        return record

    def _judged(
        self,
        region: _Region,
        record: dict[str, Any],
        best: float,
        median: float | None,
        *,
        blank: bool,
    ) -> dict[str, Any]:
        """Status of a tile that stands on F, by its shots; and what they say of F."""
        below = self.settings.refind_below
        if blank:
            status, reason = "low-confidence", "neither shot shows anything to judge focus by"
            if record["status"] != "ok":
                status, reason = record["status"], record["reason"]
        elif median is None:
            status, reason = record["status"], record["reason"]
        elif best >= (below or _FALLEN) * median:
            region.suspect = region.unconfirmed = ""
            sure = _standing(region)
            status, reason = sure.status, sure.reason
        else:
            reason = (
                f"the sharper shot's focus measure is {100 * best / median:.0f} % of the "
                f"median of the tiles before{'' if below else '; refind_below is off'}"
            )
            status = "stale" if record["status"] == "stale" or not below else "low-confidence"
            region.suspect = reason if below else ""
        return {"status": status, "reason": reason}

    # -------------------------------------------------------------------- inside

    def _key(self, place: Place) -> Hashable:
        return place.index.get("p") if self.by_position else None

    def _region(self, place: Place) -> _Region | None:
        return self._regions.get(self._key(place))

    def _focus_um(self, place: Place, region: _Region) -> float:
        """F of a place, in µm; its home is where the plan means it to be."""
        prior = None
        if self.settings.prior == "surface":
            prior = self.ledger.surface.predict(place.key, place.x_um, place.y_um)
        return self.ledger.home_um(place) + (region.dz_um if prior is None else prior.z_um)

    def _within(self, place: Place, region: _Region) -> bool:
        """Whether both shots are within the limits."""
        low, high = self.ledger.limits_um()
        return low <= self._focus_um(place, region) <= high

    def _surface_sd_um(self, place: Place) -> float:
        return self.ledger.surface.sd_at(place.x_um, place.y_um)


def _standing(region: _Region) -> FocusResult:
    """What is to be said of a tile that stands on the F of a region."""
    if region.unconfirmed:
        return FocusResult(None, "stale", reason=region.unconfirmed)
    if region.doubt:
        return FocusResult(None, "low-confidence", reason=f"F was not sure: {region.doubt}")
    return FocusResult(None, "ok")
