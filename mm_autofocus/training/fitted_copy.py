"""What the copies of a model share that are fitted to one microscope, or to one slide on it.

A fit is by labelled stacks of at least two fields. What is stated of it is found on fields that
it did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.card import KEY, UNSEALED, ErrorModel, ModelCard
from mm_autofocus.models.importing import load_model
from mm_autofocus.models.runtime import OnnxModel
from mm_autofocus.models.sealing import seal
from mm_autofocus.training.error_fit import Seen, seen_of
from mm_autofocus.training.fields import evenly
from mm_autofocus.training.judges import ModelJudge, check_stack, looks_at

if TYPE_CHECKING:
    from mm_autofocus.training.judges import Planes

__all__ = [
    "FOLDS",
    "Worth",
    "check_stacks",
    "chosen",
    "folds_of",
    "judged",
    "onnx_model",
    "write_copy",
]

FOLDS = 2
"""Fields that a fit needs: what is found by one is checked on another."""

_FRAMES = 240  # of all stacks


@dataclass(frozen=True, slots=True)
class Worth:
    """What a fitted copy is worth.

    Attributes
    ----------
    mae_before_um, mae_um : float
        Mean absolute error of frames of fields that the fit had not seen, without and with it.
    frames, fields : int
        On how many of them.
    error : ErrorModel
        What the copy is to expect of itself.
    """

    mae_before_um: float
    mae_um: float
    frames: int
    fields: int
    error: ErrorModel

    @property
    def helps(self) -> bool:
        """Whether it is better with the fit."""
        return self.mae_um < self.mae_before_um

    def to_json(self) -> dict[str, Any]:
        """Figures, as ``mm-autofocus calibrate --json`` prints them."""
        return {
            "mae_before_um": round(self.mae_before_um, 4),
            "mae_um": round(self.mae_um, 4),
            "frames": self.frames,
            "fields": self.fields,
        }


def onnx_model(name_or_path: str | Path, option: str) -> OnnxModel:
    """Load a model of which a copy can be written; a calibration curve that it has is left out.

    Raises
    ------
    InputError
        It is no such model, or onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise InputError(
            f"{option}: needs onnx, which is not installed: pip install mm-autofocus[train]"
        ) from None
    model = load_model(name_or_path)
    if not isinstance(model, OnnxModel) or model.net.path is None:
        raise InputError(f"{option}: the model {str(name_or_path)!r} is no ONNX file")
    model.card = model.card.model_copy(update={"curve": None})
    return model


def check_stacks(model: OnnxModel, stacks: Sequence[Planes], option: str) -> None:
    """Check that a model can be fitted to these stacks.

    Raises
    ------
    InputError
        Too few fields, or frames that the model cannot be shown.
    """
    fields = len({s.group for s in stacks})
    if fields < FOLDS:
        raise InputError(
            f"{option}: needs labelled stacks of at least {FOLDS} fields, for what is found "
            f"by one is checked on another; there are {fields}"
        )
    for stack in stacks:
        check_stack(model, stack)


def folds_of(stacks: Sequence[Planes], seed: int) -> dict[str, int]:
    """Number of the fold of each field (`Planes.group`)."""
    groups = sorted({s.group for s in stacks})
    order = np.random.default_rng([seed, 7]).permutation(len(groups))
    return {groups[g]: k % FOLDS for k, g in enumerate(order)}


def chosen(
    model: OnnxModel, stacks: Sequence[Planes], of: int | None = None
) -> Iterator[tuple[int, tuple[int, ...], float]]:
    """Frames ``(number of the stack, planes of its looks, defocus)``, evenly over defocus.

    So many that of `of` stacks, or of these, there are some 240.
    """
    low, high = model.card.z_range_um
    per = max(1, _FRAMES // (of or len(stacks)))
    for i, stack in enumerate(stacks):
        sets = looks_at(stack.z_um, model.card.looks_um)
        true = {k: float(stack.defocus_um[k]) for k in sets}
        inside = sorted((d, k) for k, d in true.items() if low <= d <= high)
        for j in evenly(len(inside), per, i):
            yield i, sets[inside[j][1]], inside[j][0]


def judged(model: OnnxModel, stacks: Sequence[Planes], of: int | None = None) -> Seen:
    """What the model says of whole frames, those that are `chosen`."""
    judge = ModelJudge(model)
    return seen_of(
        [
            (defocus, judge([stacks[i].plane(p) for p in planes], stacks[i]))
            for i, planes, defocus in chosen(model, stacks, of)
        ]
    )


def write_copy(
    model: OnnxModel,
    output: Path,
    card: ModelCard,
    change: Callable[[Any], None] | None = None,
) -> None:
    """Write a copy of a model with another card; whatever is there is replaced.

    Parameters
    ----------
    model : OnnxModel
        From `onnx_model`.
    output : Path
        ``*.onnx`` to write; the copy is named by it.
    card : ModelCard
        Of the copy; its name and checksum are set.
    change : callable, optional
        Changes the graph, ``onnx.GraphProto``, in place.
    """
    import onnx

    assert model.net.path is not None
    card = card.model_copy(update={"name": output.stem, "sha256": UNSEALED})
    whole = onnx.load(model.net.path)
    if change is not None:
        change(whole.graph)
    kept = {entry.key: entry.value for entry in whole.metadata_props}
    # of a net whose card lies beside it, the copy holds it inside
    onnx.helper.set_model_props(whole, {**kept, KEY: card.to_json()})
    temporary = output.with_name(output.name + ".new")
    try:
        temporary.write_bytes(whole.SerializeToString())
        seal(temporary)
        OnnxModel(temporary)  # as it will be loaded, checksum and all
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
