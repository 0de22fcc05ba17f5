"""The plan of a two-shot scan: its two planes, what it must be like, and in which order.

The plan stays an ordinary useq plan whose ``z_plan`` has two relative planes. Only the order
of the exposures is changed on the way to the microscope: a tile begins with the plane that
the tile before ended with, so that the stage makes one short move a tile and none between
tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import useq

from mm_autofocus.errors import InputError
from mm_autofocus.plan import autofocus_plans, fresh, settings_of
from mm_autofocus.strategies.two_shot import DELTA_UM, TwoShotSettings, default_delta_um

if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import Any

__all__ = ["check_shots", "delta_of", "in_turn", "with_planes"]

# Planes are meant to be symmetric; what a z plan computes in floating point is not quite.
_SAME_UM = 1e-3
# Events that are looked through before the run: enough for any mistake, not for a whole day.
_LOOKED_THROUGH = 100_000


def with_planes(sequence: useq.MDASequence, core: Any) -> useq.MDASequence:
    """Give a two-shot plan that has no z_plan its two planes; any other as it is.

    Parameters
    ----------
    sequence : useq.MDASequence
        The plan; it is not changed.
    core : pymmcore_plus.CMMCorePlus
        Tells the pixel size, of which the depth of field is part.

    Raises
    ------
    InputError
        A setting is wrong, or the default ΔD cannot be computed.
    """
    settings = settings_of(sequence)
    owners = [sequence, *_subs(sequence)]
    if not isinstance(settings, TwoShotSettings) or any(s.z_plan for s in owners):
        return sequence
    delta_um = settings.delta_um
    if delta_um is None:
        dof_um = settings.optics(core.getPixelSizeUm()).dof_um
        if dof_um is None:
            raise InputError(
                "metadata.mm_autofocus.delta_um: is not set, the plan has no z_plan with two "
                "planes, and without na there is no depth of field to choose it by; set "
                f"delta_um ({DELTA_UM[0]:g} … {DELTA_UM[1]:g} µm), or na"
            )
        delta_um = round(default_delta_um(dof_um, settings.flatness_um), 2)
    planes = useq.ZRelativePositions(relative=[-delta_um, delta_um])

    def given(owner: useq.MDASequence) -> useq.MDASequence:
        order = owner.axis_order
        order = order if "z" in order else (*order, "z")
        return owner.replace(z_plan=planes, axis_order=order)

    # in the sequence of a position the planes must stand beside its grid: those of the whole
    # plan would be taken one after the other around all of its tiles
    positions = [
        p if p.sequence is None else p.model_copy(update={"sequence": given(fresh(p.sequence))})
        for p in sequence.stage_positions
    ]
    planned = given(fresh(sequence))
    return planned.replace(stage_positions=positions) if positions else planned


def delta_of(sequence: useq.MDASequence, settings: TwoShotSettings) -> float:
    """ΔD of a plan with two planes, in µm.

    Raises
    ------
    InputError
        There are not two, they are not symmetric, the upper one comes first, they differ
        among positions, or they are not those of ``delta_um``.
    """
    found: set[float] = set()
    for owner in (sequence, *_subs(sequence)):
        if owner.z_plan is not None:
            found.add(round(_delta_of(owner.z_plan), 4))
    if not found:
        raise InputError("z_plan: strategy two-shot needs two planes, and there are none")
    if len(found) > 1:
        both = " and ".join(f"±{d:g}" for d in sorted(found)[:2])
        raise InputError(f"z_plan: the planes of all positions must be the same, not {both} µm")
    delta_um = found.pop()
    low, high = DELTA_UM
    if not low <= delta_um <= high:
        raise InputError(
            f"z_plan: two-shot planes at ±{delta_um:g} µm are not allowed: ±{low:g} … "
            f"±{high:g} µm are"
        )
    if settings.delta_um is not None and abs(settings.delta_um - delta_um) > _SAME_UM:
        raise InputError(
            f"metadata.mm_autofocus.delta_um: {settings.delta_um:g} is not what z_plan says, "
            f"±{delta_um:g} µm; leave one of them out"
        )
    return delta_um


def _delta_of(plan: Any) -> float:
    if not plan.is_relative:
        raise InputError(
            "z_plan: two-shot planes are relative to focus; use {relative: [-1, 1]}"
        )
    planes = [float(z) for z in plan]
    text = ", ".join(f"{z:g}" for z in planes[:5]) + (", …" if len(planes) > 5 else "")
    if len(planes) != 2:
        raise InputError(
            f"z_plan: strategy two-shot takes exactly two planes, for example "
            f"{{relative: [-1, 1]}}, not {len(planes)} ({text} µm)"
        )
    if abs(planes[0] + planes[1]) > _SAME_UM or planes[0] >= planes[1]:
        raise InputError(
            f"z_plan: two-shot planes must be symmetric about focus, the lower one first, for "
            f"example {{relative: [-1, 1]}}, not {text} µm"
        )
    return planes[1]


def check_shots(
    sequence: useq.MDASequence, settings: TwoShotSettings, fov_um: tuple[float, float]
) -> None:
    """Raise `InputError` unless each tile of the plan is two shots that can follow each other.

    Parameters
    ----------
    sequence : useq.MDASequence
        A plan with planes; it is not changed.
    settings : TwoShotSettings
        Its settings.
    fov_um : (float, float)
        Width and height of a frame, by which a grid knows its tiles.
    """
    delta_of(sequence, settings)
    for plan in autofocus_plans(sequence):
        if bad := [axis for axis in plan.axes if axis in ("c", "z")]:
            raise InputError(
                f"autofocus_plan.axes: {list(plan.axes)}: with two-shot F is asked for once a "
                f"tile, before its shots; leave out {', '.join(bad)}"
            )
    # useq caches axes by (uid, content): another content keeps the copy apart
    copy = sequence.model_copy(deep=True)
    copy = copy.model_copy(update={"metadata": {**copy.metadata, "_copy": True}})
    for owner in (copy, *_subs(copy)):
        if owner.grid_plan is not None:
            owner.grid_plan.fov_width, owner.grid_plan.fov_height = fov_um
    events = list(itertools.islice(fresh(copy), _LOOKED_THROUGH))
    tiles = [(visit, list(tile)) for visit, tile in itertools.groupby(events, key=_visit)]
    done: set[Hashable] = set()
    for visit, _ in tiles:
        if visit in done:
            raise InputError(
                f"axis_order: in {''.join(map(str, sequence.axis_order))!r} the two shots of a "
                "tile do not follow each other; put c and z last, for example tpgcz, and "
                "where a position has a grid of its own, put z_plan (and channels) into its "
                "sequence, too"
            )
        done.add(visit)
    for _, tile in tiles[:-1] if len(events) == _LOOKED_THROUGH else tiles:
        _check_tile(tile, sequence)


def _check_tile(tile: Sequence[useq.MDAEvent], sequence: useq.MDASequence) -> None:
    shots: dict[int, list[int]] = {}
    for event in tile:
        if not isinstance(event.action, useq.HardwareAutofocus):
            shots.setdefault(event.index.get("c", 0), []).append(event.index.get("z", 0))
    for c, planes in shots.items():
        if sorted(planes) != [0, 1]:
            channel = next(e.channel for e in tile if e.index.get("c", 0) == c)
            name = "a tile" if channel is None else f"channel {channel.config!r}"
            raise InputError(
                f"z_plan: strategy two-shot exposes each tile at both planes, and {name} has "
                f"{len(planes)} (do_stack: false, or a position without the planes?)"
            )
    if not isinstance(tile[0].action, useq.HardwareAutofocus):
        used = [str(a) for a in sequence.axis_order if a in tile[0].index and a in "tpg"]
        raise InputError(
            "autofocus_plan.axes: with two-shot it is asked at every tile whether F is to be "
            f"found (mostly nothing moves); use axes: [{', '.join(used) or 'p'}]"
        )


def _visit(event: useq.MDAEvent) -> Hashable:
    index = event.index
    return index.get("t"), index.get("p"), index.get("g")


def _subs(sequence: useq.MDASequence) -> list[useq.MDASequence]:
    return [p.sequence for p in sequence.stage_positions if p.sequence is not None]


def in_turn(
    events: Iterable[useq.MDAEvent], backlash_um: float = 0.0
) -> Iterator[useq.MDAEvent]:
    """The events of a two-shot plan, in the order in which the stage travels least.

    Each sweep through the two planes begins at the plane where the last one ended. With a
    backlash that is to be taken up, all sweeps go the same way: from below if it is positive.

    Parameters
    ----------
    events : iterable of MDAEvent
        In the order of the plan.
    backlash_um : float, optional
        As the setting.
    """
    begin = 1 if backlash_um < 0 else 0
    for _, tile in itertools.groupby(events, key=_visit):
        for sweep in _sweeps(tile):
            planes = sorted(sweep, key=_plane, reverse=begin == 1)  # stable
            for place, event in zip(sweep, planes, strict=True):
                # what belongs to the place in the order and not to the exposure
                stays = {
                    "keep_shutter_open": place.keep_shutter_open,
                    "reset_event_timer": place.reset_event_timer,
                    "min_start_time": place.min_start_time,
                }
                yield event if place is event else event.model_copy(update=stays)
            if not backlash_um and len({_plane(e) for e in sweep}) > 1:
                begin = _plane(planes[-1])


def _plane(event: useq.MDAEvent) -> int:
    return int(event.index.get("z", 0))


def _sweeps(tile: Iterable[useq.MDAEvent]) -> Iterator[list[useq.MDAEvent]]:
    """Runs of exposures from the lower to the upper plane; other events by themselves."""
    sweep: list[useq.MDAEvent] = []
    for event in tile:
        image = isinstance(event.action, useq.AcquireImage | None)
        if sweep and (not image or _plane(event) < _plane(sweep[-1])):
            yield sweep
            sweep = []
        if image:
            sweep.append(event)
        else:
            yield [event]
    if sweep:
        yield sweep
