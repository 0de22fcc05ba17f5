"""Which z-stacks a plan takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import useq

from mm_autofocus.errors import InputError
from mm_autofocus.plan import fresh
from mm_autofocus.training.label import LEAST_PLANES

__all__ = ["one_position_per_tile", "planned_stacks", "stack_key"]


def stack_key(event: useq.MDAEvent) -> tuple[int, int, int]:
    """Position, time and channel of an event: the stack that it belongs to."""
    index = event.index
    return index.get("p", 0), index.get("t", 0), index.get("c", 0)


def _is_image(event: useq.MDAEvent) -> bool:
    return event.action.type == "acquire_image"


def planned_stacks(sequence: useq.MDASequence) -> dict[tuple[int, int, int], int]:
    """The stacks of a plan: position, time, channel → planes.

    Channels without a stack (``do_stack: false``) are no stacks, and no fault.
    """
    events = [e for e in fresh(sequence) if _is_image(e)]
    if not any("z" in e.index for e in events):
        raise InputError("z_plan: the plan has none; collect takes z-stacks")
    counts = Counter(stack_key(e) for e in events)
    for n in counts.values():
        if 1 < n < LEAST_PLANES:
            raise InputError(
                f"z_plan: {n} planes are too few to find a focus in; at least {LEAST_PLANES} "
                "are needed"
            )
    stacks = {key: n for key, n in counts.items() if n >= LEAST_PLANES}
    if not stacks:
        raise InputError(
            f"z_plan: one plane is no stack; at least {LEAST_PLANES} planes are needed"
        )
    return stacks


def one_position_per_tile(sequence: useq.MDASequence) -> useq.MDASequence:
    """Count the tiles of grids out as positions, and give every position a name of its own."""
    first: dict[tuple[int, int | None], useq.MDAEvent] = {}
    for event in fresh(sequence):
        if _is_image(event) and ("p" in event.index or "g" in event.index):
            first.setdefault((event.index.get("p", 0), event.index.get("g")), event)
    if not first:
        raise InputError("stage_positions: the plan has none; collect needs fields to visit")
    given = list(sequence.stage_positions)
    names: Counter[str] = Counter()
    positions = []
    for (p, g), event in sorted(first.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        old = given[p] if p < len(given) else useq.Position()
        name = old.name or f"p{p:03d}"
        name += "" if g is None else f" g{g:03d}"
        names[name] += 1
        name += f" ({names[name]})" if names[name] > 1 else ""
        update: dict[str, Any] = {"name": name}
        if g is not None:
            sub = old.sequence.replace(grid_plan=None) if old.sequence is not None else None
            update |= {
                "x": event.x_pos,
                "y": event.y_pos,
                "sequence": sub if sub is not None and sub.used_axes else None,
            }
        positions.append(old.model_copy(update=update))
    changes: dict[str, Any] = {"stage_positions": positions, "grid_plan": None}
    plan = sequence.autofocus_plan
    if plan is not None and "g" in plan.axes:
        axes = dict.fromkeys("p" if axis == "g" else axis for axis in plan.axes)
        changes["autofocus_plan"] = plan.model_copy(update={"axes": tuple(axes)})
    return sequence.replace(**changes)
