"""Plans: an ordinary useq sequence, from YAML, JSON, a dict or Python, strictly read.

useq ignores keys that it does not know, so that a typing error in a plan is swallowed.
Here every key of the plan's top level is checked, and each error names the key, the
value, what is allowed, and the file and the line where there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import useq
import yaml
from pydantic import ValidationError

from mm_autofocus.errors import InputError
from mm_autofocus.registry import suggest
from mm_autofocus.settings import KEY, AutofocusSettings, parse_settings

__all__ = [
    "PlanLike",
    "autofocus_plans",
    "fresh",
    "load_plan",
    "planned_home_um",
    "position_of",
    "settings_of",
    "z_offsets_um",
]

PlanLike = useq.MDASequence | Mapping[str, Any] | str | os.PathLike[str]
"""A sequence, its dict, or the path of a YAML or JSON file."""

# `uid` is written by useq into its own files; it carries no instruction.
_TOP_LEVEL = frozenset({*useq.MDASequence.model_fields, "uid"})


def load_plan(
    plan: PlanLike,
    *,
    strategy: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> useq.MDASequence:
    """Read and check a plan; nothing moves.

    Parameters
    ----------
    plan : useq.MDASequence or mapping or path
        The plan. A sequence is not changed: a fresh copy is returned.
    strategy : str, optional
        Replaces ``metadata.mm_autofocus.strategy``.
    overrides : mapping, optional
        Replace single settings of ``metadata.mm_autofocus``; a dotted key
        (``metric_options.tiles``) reaches into a nested one.

    Returns
    -------
    useq.MDASequence
        With ``metadata["mm_autofocus"]`` validated (and still a plain dict, so that it
        travels with the sequence through any other tool).

    Raises
    ------
    InputError
        One sentence; see the module.
    """
    where = _Source(None, "plan")
    if isinstance(plan, useq.MDASequence):
        sequence = fresh(plan)
    else:
        if isinstance(plan, Mapping):
            data: Any = dict(plan)
        else:
            where = _Source.read(Path(plan))
            data = where.data
        sequence = _sequence(data, where)
    changes = {**({"strategy": strategy} if strategy else {}), **(overrides or {})}
    if KEY in sequence.metadata or changes:
        given = sequence.metadata.get(KEY)
        if given is None:
            given = {}
        if changes and isinstance(given, Mapping):
            given = _merged(given, changes)
        try:
            parse_settings(given)
        except InputError as e:
            path = ("metadata", KEY, *getattr(e, "path", ()))
            raise InputError(f"{where.at(path)}{e}") from None
        sequence = sequence.model_copy(update={"metadata": {**sequence.metadata, KEY: given}})
    return sequence


def settings_of(sequence: useq.MDASequence) -> AutofocusSettings | None:
    """The validated settings of a sequence, or None if it has no ``mm_autofocus``."""
    if KEY not in sequence.metadata:
        return None
    return parse_settings(sequence.metadata[KEY])


def fresh(sequence: useq.MDASequence) -> useq.MDASequence:
    """Return the sequence with autofocus plans that have not seen any event.

    useq's `AxesBasedAF` remembers the last index across iterations: a second run of the
    same sequence, or ``list(sequence)`` before the run, would lose autofocus events.
    """
    for each in autofocus_plans(sequence):
        # An event without an index makes a plan forget; useq caches the positions, so that
        # the plans of theirs cannot be replaced by copies.
        each.should_autofocus(useq.MDAEvent())
    plan = sequence.autofocus_plan
    if plan is None:
        return sequence
    # Its own memory, so that listing the plan elsewhere does not disturb a run.
    return sequence.model_copy(update={"autofocus_plan": type(plan)(**plan.model_dump())})


def autofocus_plans(sequence: useq.MDASequence) -> Iterator[useq.AxesBasedAF]:
    """All autofocus plans of a sequence: its own and those of its positions."""
    if sequence.autofocus_plan is not None:
        yield sequence.autofocus_plan
    for p in sequence.stage_positions:
        if p.sequence is not None and p.sequence.autofocus_plan is not None:
            yield p.sequence.autofocus_plan


def position_of(event: useq.MDAEvent, sequence: useq.MDASequence) -> useq.Position | None:
    """The stage position that an event belongs to, or None if the plan has none."""
    p = event.index.get("p")
    if p is None or p >= len(sequence.stage_positions):
        return None
    return sequence.stage_positions[p]


def _z_plan_of(event: useq.MDAEvent, sequence: useq.MDASequence) -> Any:
    position = position_of(event, sequence)
    sub = position.sequence if position is not None else None
    return (sub.z_plan if sub is not None else None) or sequence.z_plan


def planned_home_um(event: useq.MDAEvent, sequence: useq.MDASequence) -> float | None:
    """The z around which the plan means an event's position to be, in µm.

    It is the position's own z: without the z plan's offset and without the channel's
    ``z_offset``, which useq leaves in the start z of an autofocus event. None where the
    plan says nothing, be it that z is not planned at all or that a relative z plan has
    no z to be relative to (useq then silently takes 0).
    """
    position = position_of(event, sequence)
    if position is not None:
        return position.z
    return None if _z_plan_of(event, sequence) is not None else event.z_pos


def z_offsets_um(sequence: useq.MDASequence) -> tuple[float, float]:
    """Lowest and highest z, relative to home, that the plan will send the stage to, in µm.

    Both ends contain 0, z plans of single positions and channel offsets are included.
    """
    low = high = 0.0
    plans = [
        sequence.z_plan,
        *(p.sequence.z_plan for p in sequence.stage_positions if p.sequence is not None),
    ]
    for plan in plans:
        if plan is None or not plan.is_relative:
            continue
        steps = list(plan)
        channels = [c for c in sequence.channels if c.z_offset is not None]
        offsets = [0.0, *(float(c.z_offset) for c in channels)]
        low = min(low, min(steps) + min(offsets))
        high = max(high, max(steps) + max(offsets))
    return low, high


def _merged(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(given)
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            inner = merged.get(head)
            merged[head] = _merged(inner if isinstance(inner, Mapping) else {}, {rest: value})
        else:
            merged[head] = value
    return merged


def _sequence(data: Any, where: _Source) -> useq.MDASequence:
    if not isinstance(data, Mapping):
        raise InputError(f"{where.at(())}a plan is a mapping of keys, not {data!r}")
    for key in data:
        if key not in _TOP_LEVEL:
            allowed = sorted(_TOP_LEVEL - {"uid"})
            raise InputError(
                f"{where.at((key,))}{key}: unknown key of a plan"
                f"{suggest(str(key), allowed)}; allowed: {', '.join(allowed)}"
            )
    af = data.get("autofocus_plan")
    if isinstance(af, Mapping):
        allowed = list(useq.AxesBasedAF.model_fields)
        for key in af:
            if key not in allowed:
                raise InputError(
                    f"{where.at(('autofocus_plan', key))}autofocus_plan.{key}: unknown key"
                    f"{suggest(str(key), allowed)}; allowed: {', '.join(allowed)}"
                )
    try:
        return useq.MDASequence(**data)
    except ValidationError as e:
        first = e.errors()[0]
        path = tuple(p for p in first["loc"] if _is_key(p, data))
        name = ".".join(map(str, path))
        message = str(first["msg"]).removeprefix("Value error, ")
        value = "" if isinstance(first["input"], Mapping) else f"{first['input']!r}: "
        raise InputError(
            f"{where.at(path)}{name + ': ' if name else ''}{value}"
            f"{message[:1].lower()}{message[1:].rstrip('.')}"
        ) from None
    except (ValueError, TypeError) as e:
        raise InputError(f"{where.at(())}{e}") from None


def _is_key(part: str | int, data: Any) -> bool:
    # pydantic puts names of union members into the path; they are no keys of the user's
    return isinstance(part, int) or part in _TOP_LEVEL or part.islower()


class _Source:
    """Text of a plan, and where its keys stand."""

    def __init__(self, node: yaml.Node | None, name: str, data: Any = None) -> None:
        self.node, self.name, self.data = node, name, data

    @classmethod
    def read(cls, path: Path) -> _Source:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise InputError(f"{path}: is a folder, not a plan") from None
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path}: cannot be read ({e})") from None
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)  # JSON is YAML, too
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            mark = getattr(e, "problem_mark", None)
            line = f":{mark.line + 1}" if mark is not None else ""
            problem = getattr(e, "problem", None) or str(e).splitlines()[0]
            raise InputError(f"{path}{line}: does not parse as YAML: {problem}") from None
        if data is None:
            raise InputError(f"{path}: is empty")
        return cls(node, str(path), data)

    def at(self, path: Sequence[str | int]) -> str:
        """``"file:line: "`` of the deepest part of `path` that is in the text."""
        if self.node is None:
            return ""
        node, line = self.node, self.node.start_mark.line
        for part in path:
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if key.value == str(part):
                        node, line = value, key.start_mark.line
                        break
                else:
                    break
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                if part >= len(node.value):
                    break
                node = node.value[part]
                line = node.start_mark.line
            else:
                break
        return f"{self.name}:{line + 1}: "
