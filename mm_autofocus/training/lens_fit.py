"""Find the lens of a microscope by a stack or two: what a net has to be told to be right.

A model that may be told of the lens (`mm_autofocus.models.lens`) knows by one look how far
focus is about as well as it knows the lens. Nobody measures the aperture of a condenser or
waves of spherical aberration at a microscope in use; but stacks with labels say of each lens
how well it explains them. The most likely one is kept, and a copy of the model is written that
holds it: everything else uses that as any other model.

What is stated of the copy is found on fields that the fit did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from scipy.optimize import minimize
from scipy.stats import qmc

from mm_autofocus.errors import InputError
from mm_autofocus.models.lens import code_of, values_of
from mm_autofocus.models.runtime import OnnxModel
from mm_autofocus.training.error_fit import fit_errors, together
from mm_autofocus.training.fitted_copy import (
    FOLDS,
    Worth,
    check_stacks,
    chosen,
    folds_of,
    judged,
    onnx_model,
    write_copy,
)
from mm_autofocus.training.judges import top_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.training.judges import Planes

    Real: TypeAlias = npt.NDArray[np.float32]
    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["OPTION", "LensFit", "fit_lens", "lens_model", "write_lens"]

_EACH = 8  # patches of each frame, at most
_TRIES = 64  # lenses, evenly over all ranges, of which the best is refined
_BEYOND = 1.25  # a lens may lie beyond what the net was taught, by so much of half a range
_LEAST_SD_UM = 0.05  # no patch is believed to be surer: one that is wrong would outvote all
_SPREAD = 3**-0.5  # of lenses over the ranges; a number that hardly matters stays in the middle

OPTION = "--fit-lens"
"""What it is asked for by."""


@dataclass(frozen=True, slots=True)
class LensFit(Worth):
    """A lens, and what a model is worth that is told of it.

    Attributes
    ----------
    code : numpy.ndarray
        ``(numbers,)`` float32, as the net is shown it.
    values : dict
        The same by name.
    """

    code: Real
    values: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The part ``lens`` of what ``mm-autofocus calibrate --json`` prints."""
        values = {k: round(v, 4) for k, v in self.values.items()}
        return {"values": values, **super(LensFit, self).to_json()}


def lens_model(name_or_path: str | Path) -> OnnxModel:
    """Load a model that may be told of the lens, which is not known of this microscope.

    Raises
    ------
    InputError
        It is no such model, or onnx is not installed.
    """
    model = onnx_model(name_or_path, OPTION)
    card = model.card
    if None in (card.lens, card.outputs.sd):
        raise InputError(
            f"--fit-lens: the model {str(name_or_path)!r} cannot be told of the lens; allowed: "
            "one whose card has lens, as that of sparsefocus-slide20x"
        )
    return model


def fit_lens(
    model: OnnxModel,
    stacks: Sequence[Planes],
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> LensFit:
    """Find the lens under which a model explains labelled stacks best.

    Parameters
    ----------
    model : OnnxModel
        From `lens_model`; what it is told is changed, and left as it was found.
    stacks : sequence of Planes
        Labelled, of at least two fields of one microscope: what is said of the lens is
        checked on those that it was not found by.
    seed : int, optional
        Of the lenses that are tried first, and of the order of the fields.
    progress : callable, optional
        Is told what comes next.

    Raises
    ------
    InputError
        As `check_stacks`, or there is too little in the fields.
    """
    say = progress or (lambda _: None)
    check_stacks(model, stacks, OPTION)
    fold = folds_of(stacks, seed)
    answer = _Answer(model)
    say("looking at patches of the stacks")
    evidence = _evidence(model, answer, stacks, [fold[s.group] for s in stacks])
    before = model.net.lens
    try:
        model.net.lens = code_of(_ranges(model), None)
        without = judged(model, stacks)
        parts = []
        for k in range(FOLDS):
            say(f"fitting the lens, check {k + 1} of {FOLDS}")
            model.net.lens = likeliest(model, answer, evidence.less(k), seed)
            parts.append(judged(model, [s for s in stacks if fold[s.group] == k]))
    finally:
        model.net.lens = before
    say("fitting the lens by all fields")
    code = likeliest(model, answer, evidence, seed)
    seen = together(parts)
    return LensFit(
        mae_before_um=without.mae_um,
        mae_um=seen.mae_um,
        frames=seen.frames,
        fields=len(fold),
        error=fit_errors(seen),
        code=code,
        values=values_of(_ranges(model), code),
    )


@dataclass(frozen=True, slots=True)
class _Evidence:
    """Patches of frames all over the range.

    Attributes
    ----------
    seen : list of numpy.ndarray
        What does not depend on the lens, ``(N, ...)`` each.
    label_um : numpy.ndarray
        ``(N,)``.
    fold : numpy.ndarray
        ``(N,)``, which fold the field is of.
    """

    seen: list[Real]
    label_um: Floats
    fold: npt.NDArray[np.intp]

    def less(self, fold: int) -> _Evidence:
        """Without one fold."""
        keep = self.fold != fold
        return _Evidence(
            [part[keep] for part in self.seen], self.label_um[keep], self.fold[keep]
        )


def likeliest(model: OnnxModel, answer: _Answer, evidence: _Evidence, seed: int) -> Real:
    """The code ``(numbers,)`` of the lens under which the labels are most likely."""
    label, out = evidence.label_um, model.card.outputs
    if not len(label):
        raise InputError("--fit-lens: no patch of the stacks of one half carries content")
    numbers, frames = len(_ranges(model)), len(np.unique(label))

    def unlikely(at: Floats) -> float:
        """Negative log-likelihood of the labels, by Laplace's distribution, and of the lens."""
        value, sd = answer(evidence.seen, np.append(at, 1).astype(np.float32))
        error = np.abs(value * out.um_per_unit * out.sign - label)
        sd = np.maximum(sd * out.um_per_unit, _LEAST_SD_UM)
        before = np.square(at).sum() / (2 * _SPREAD**2 * frames)
        return float((np.sqrt(2) * error / sd + np.log(sd)).mean() + before)

    tries = 2 * qmc.Sobol(numbers, seed=seed).random(_TRIES) - 1
    found = minimize(
        unlikely,
        min(tries, key=unlikely),
        method="Powell",
        bounds=[(-_BEYOND, _BEYOND)] * numbers,
        options={"xtol": 0.01, "ftol": 1e-5},
    )
    return np.append(found.x, 1).astype(np.float32)


class _Answer:
    """The graph of a model cut in two: what it sees in patches, and what follows from that.

    Only the second half depends on the lens, and takes a hundredth of the time.

    Attributes
    ----------
    names : list of str
        What goes from the one to the other.
    """

    def __init__(self, model: OnnxModel) -> None:
        import onnx
        import onnxruntime as ort

        assert model.net.path is not None
        assert model.card.lens is not None
        self.lens = model.card.lens.input
        outputs = [model.card.outputs.defocus, str(model.card.outputs.sd)]
        whole = onnx.load(model.net.path)
        graph = whole.graph
        constant = {t.name for t in graph.initializer}
        behind = {self.lens}
        for node in graph.node:  # they stand in the order of their work
            if behind & set(node.input):
                behind |= set(node.output)
            elif constant >= set(node.input):
                constant |= set(node.output)
        second = [n for n in graph.node if behind & set(n.output)]
        given = dict.fromkeys(name for node in second for name in node.input if name)
        self.names = [n for n in given if n not in behind | constant]
        needed = _before(graph.node, self.names)
        patches = [i for i in graph.input if i.name == model.card.inputs.name]
        first = [n for n in graph.node if needed & set(n.output)]
        second = [n for n in graph.node if n in second or constant & set(n.output)]

        def session(nodes: list[Any], inputs: list[Any], names: list[str]) -> Any:
            free = [_free(name) for name in names]
            weights = [t for t in graph.initializer if t.name != self.lens]
            part = onnx.helper.make_graph(nodes, "part", inputs, free, weights)
            made = onnx.helper.make_model(part, opset_imports=whole.opset_import)
            made.ir_version = whole.ir_version
            options = ort.SessionOptions()
            options.log_severity_level = 4
            return ort.InferenceSession(
                made.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )

        self.patches = model.card.inputs.name
        self.first = session(first, patches, self.names)
        self.second = session(second, [_free(n) for n in (*self.names, self.lens)], outputs)

    def see(self, patches: Real) -> list[Real]:
        """What does not depend on the lens, of patches."""
        return list(self.first.run(None, {self.patches: patches}))

    def __call__(self, seen: Sequence[Real], lens: Real) -> tuple[Real, Real]:
        """Answers ``(N,)`` under a lens ``(numbers,)``, in the net's own unit, and their sd."""
        feeds = dict(zip(self.names, seen, strict=True)) | {self.lens: lens[None]}
        value, sd = self.second.run(None, feeds)
        return value.ravel(), sd.ravel()


def _free(name: str) -> Any:
    """An input or output of any shape."""
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


def _before(nodes: Sequence[Any], names: Sequence[str]) -> set[str]:
    """All that these follow from, themselves among it."""
    needed = set(names)
    for node in reversed(nodes):
        if needed & set(node.output):
            needed |= set(node.input)
    return needed


def write_lens(model: OnnxModel, output: Path, fit: LensFit, *, data: str) -> None:
    """Write a copy of a model that holds a lens; whatever is there is replaced.

    Parameters
    ----------
    model : OnnxModel
        From `lens_model`.
    output : Path
        ``*.onnx`` to write.
    fit : LensFit
        What it is to hold.
    data : str
        Name of the stacks, for the card.
    """
    from onnx import numpy_helper

    card = model.card
    lens = card.lens
    assert lens is not None
    facts = {k: v for k, v in fit.to_json().items() if k != "values"}
    told = {"values": fit.values, "fitted": {"model": card.name, "data": data, **facts}}
    update = {"lens": lens.model_copy(update=told), "error": fit.error}

    def tell(graph: Any) -> None:
        for usual in graph.initializer:
            if usual.name == lens.input:
                usual.CopyFrom(numpy_helper.from_array(fit.code[None], usual.name))

    write_copy(model, output, card.model_copy(update=update), tell)


def _ranges(model: OnnxModel) -> dict[str, tuple[float, float]]:
    assert model.card.lens is not None
    return model.card.lens.ranges


def _evidence(
    model: OnnxModel, answer: _Answer, stacks: Sequence[Planes], folds: Sequence[int]
) -> _Evidence:
    found, label, fold = [], [], []
    for i, planes, defocus in chosen(model, stacks):
        looks = [stacks[i].plane(p) for p in planes]
        some = model.content_patches(looks, _EACH, max_value=top_of(stacks[i]))
        found.append(answer.see(some))
        label += [defocus] * len(some)
        fold += [folds[i]] * len(some)
    seen = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    return _Evidence(seen, np.array(label), np.array(fold, np.intp))
