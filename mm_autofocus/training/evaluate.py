"""A model judged by labelled stacks, plane by plane, beside what it has to beat.

Every plane within the trained range is a frame on which the stage might have stood: the
model is shown it, and the further looks that its card asks for, and its answer is compared
with the defocus of that plane. Stacks are read once, plane by plane; no more planes are held
than lie between the first look and the last (the searches hold one stack).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.training import merit
from mm_autofocus.training.judges import ModelJudge, check_stack, look_error, looks_at, show
from mm_autofocus.training.merit import Row

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.models.runtime import FocusModel, Prediction
    from mm_autofocus.training.judges import Judge, Planes, Search

    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["Evaluation", "Judged", "Truth", "evaluate"]

Truth = Literal["label", "simulator"]


@dataclass
class Judged:
    """What came of one model or baseline.

    Attributes
    ----------
    rows : list of Row
        One per frame.
    looks_missing : int
        Planes without a plane where one of the looks should be: at the stack's end.
    note : str
        What has to be known of it.
    """

    rows: list[Row] = field(default_factory=list)
    looks_missing: int = 0
    note: str = ""


@dataclass
class Evaluation:
    """A model and its baselines on the same stacks.

    Attributes
    ----------
    model : Judged
        Of the model.
    baselines : dict
        Name → what came of it.
    dof_um : float | None
        Depth of field that the figures use.
    truth : {"label", "simulator"}
        What the predictions were compared with.
    outside_range : int
        Planes beyond the model's trained range, which nobody was asked about.
    look_error_um : float
        Largest distance between a look that was asked for and the plane that was shown.
    stacks : int
        How many.
    about : dict
        Where all this comes from: model, dataset, part, ...
    notes : list of str
        What a reader must know before believing the figures, one sentence each.
    """

    model: Judged = field(default_factory=Judged)
    baselines: dict[str, Judged] = field(default_factory=dict)
    dof_um: float | None = None
    truth: Truth = "label"
    outside_range: int = 0
    look_error_um: float = 0.0
    stacks: int = 0
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figures(self, judged: Judged | None = None) -> dict[str, Any]:
        """Figures of merit of the model, or of a baseline, with those of each class."""
        rows = (judged or self.model).rows
        return {
            **merit.merit(rows, self.dof_um),
            "by_sparsity": merit.by_sparsity(rows, self.dof_um),
        }

    def to_json(self) -> dict[str, Any]:
        """The document that ``mm-autofocus evaluate --json`` prints."""
        rows = self.model.rows
        trusted = [r for r in rows if r.predicted_um is not None and not r.reasons]
        return {
            **self.about,
            "truth": self.truth,
            "dof_um": self.dof_um,
            "stacks": self.stacks,
            "defocus_range_um": [min(r.true_um for r in rows), max(r.true_um for r in rows)],
            **self.figures(),
            "trusted": merit.merit(trusted, self.dof_um),
            "coverage": {
                **merit.coverage(rows),
                "looks_missing": self.model.looks_missing,
                "outside_range": self.outside_range,
                "look_error_um": self.look_error_um,
            },
            "calibration": merit.calibration(rows),
            "by_defocus": merit.by_defocus(rows, self.dof_um),
            "baselines": {
                name: {
                    **self.figures(judged),
                    "missing_because": merit.coverage(judged.rows)["missing_because"],
                    "looks_missing": judged.looks_missing,
                    "note": judged.note,
                }
                for name, judged in self.baselines.items()
            },
            "fields": merit.by_field(rows, self.dof_um),
            "worst": [
                {
                    "field": r.field,
                    "plane": r.plane,
                    "true_um": r.true_um,
                    "predicted_um": r.predicted_um,
                    "expected_error_um": r.expected_error_um,
                    "reasons": list(r.reasons),
                }
                for r in merit.worst(rows)
            ],
            "notes": self.notes,
        }


def evaluate(
    model: FocusModel,
    stacks: Iterable[Planes],
    *,
    truth: Truth = "label",
    dof_um: float | None = None,
    judges: Mapping[str, Judge] | None = None,
    searches: Mapping[str, Search] | None = None,
    every: Mapping[str, int] | None = None,
    range_um: tuple[float, float] | None = None,
    zero: bool = True,
    on_stack: Callable[[int], None] | None = None,
) -> Evaluation:
    """Judge a model and its baselines.

    Parameters
    ----------
    model : FocusModel
        The model.
    stacks : iterable of Planes
        Labelled; they may be made as they are asked for.
    truth : {"label", "simulator"}
        Compare with the stack's label, or with what a simulator knows.
    dof_um : float, optional
        Depth of field; default: that of the card, else that of the stacks' optics (median).
    judges : mapping, optional
        Baselines that are shown frames.
    searches : mapping, optional
        Baselines that search.
    every : mapping, optional
        Name of one of the `judges` → it is asked on every so-manieth plane only.
    range_um : (float, float), optional
        Lowest and highest defocus that counts; default: what the model was trained on.
    zero : bool
        Whether "predict 0" is among the baselines.
    on_stack : callable, optional
        Called with the number of stacks done.

    Raises
    ------
    InputError
        No stack; frames that are not the model's; no truth; no plane with all looks or
        within the range of the model.
    """
    asked: dict[str, Judge] = {"": ModelJudge(model), **(judges or {})}
    found = Evaluation(truth=truth)
    found.baselines = {name: Judged() for name in (*(judges or {}), *(searches or {}))}
    dofs: list[float] = []
    low, high = model.card.z_range_um if range_um is None else range_um
    steps = every or {}
    for number, stack in enumerate(stacks):
        check_stack(model, stack)
        found.stacks += 1
        if (dof := stack.known_optics().dof_um) is not None:
            dofs.append(dof)
        true = _true_um(stack, truth)
        within = [k for k in range(len(true)) if low - 1e-6 <= true[k] <= high + 1e-6]
        found.outside_range += len(true) - len(within)
        wanted = {}
        for name, judge in asked.items():
            judged = found.baselines[name] if name else found.model
            shown = looks_at(stack.z_um, judge.looks_um)
            judged.looks_missing += sum(k not in shown for k in within)
            use = [k for k in within if k in shown and k % steps.get(name, 1) == 0]
            wanted[name] = {k: shown[k] for k in use}
            found.look_error_um = max(
                found.look_error_um, look_error(stack.z_um, judge.looks_um, wanted[name])
            )
        for name, k, prediction in show(stack, asked, wanted):
            judged = found.baselines[name] if name else found.model
            judged.rows.append(_row(number, stack, k, float(true[k]), prediction, asked[name]))
        for name, search in (searches or {}).items():
            found.baselines[name].rows += search(number, stack, true, within)
        if on_stack is not None:
            on_stack(number + 1)
    if not found.stacks:
        raise InputError("evaluate: there is no stack with a label")
    if not found.model.rows:
        raise InputError(_nothing(model, found, stack.z_um, (low, high)))
    found.dof_um = dof_um or model.card.dof_um or (float(np.median(dofs)) if dofs else None)
    if zero:
        found.baselines = {"zero": _zero(found.model), **found.baselines}
    return found


def _true_um(stack: Planes, truth: Truth) -> Floats:
    if truth == "label":
        return np.asarray(stack.defocus_um, np.float64)
    known = (stack.truth or {}).get("defocus_um")
    if known is None:
        raise InputError(
            f"--truth: {stack.group} has no truth; only stacks of the virtual slide have one"
        )
    return np.asarray(known, np.float64)


def _row(
    number: int, stack: Planes, k: int, true_um: float, said: Prediction, judge: Judge
) -> Row:
    value, reasons = said.defocus_um, tuple(said.reasons)
    if value is not None and not np.isfinite(value):
        value, reasons = None, (*reasons, "not a number")
    if value is None and not reasons:
        reasons = ("no prediction and no reason",)
    return Row(
        number,
        stack.group,
        stack.sparsity,
        k,
        true_um,
        None if value is None else float(value),
        None if said.expected_error_um is None else float(said.expected_error_um),
        reasons,
        len(judge.looks_um),
    )


def _zero(judged: Judged) -> Judged:
    """What it would mean to leave the stage alone, on the model's own frames."""
    rows = [
        replace(r, predicted_um=0.0, expected_error_um=None, reasons=(), looks=0)
        for r in judged.rows
    ]
    note = "predicts 0 everywhere: by the paper's formula its direction is never wrong"
    return Judged(rows, note=note)


def _nothing(
    model: FocusModel,
    found: Evaluation,
    z_um: Sequence[float],
    range_um: tuple[float, float],
) -> str:
    card = model.card
    if found.model.looks_missing:
        apart = float(np.median(np.diff(np.sort(np.asarray(z_um, float)))))
        offsets = ", ".join(f"{o:+g}" for o in card.looks_um)
        return (
            f"model {card.name!r}: no plane has the looks that it takes ({offsets} µm from the "
            f"present z) in stacks of {len(z_um)} planes {apart:g} µm apart"
        )
    low, high = range_um
    return (
        f"model {card.name!r}: no plane of the {found.stacks} stacks is within "
        f"{low:+g} … {high:+g} µm of focus"
    )
