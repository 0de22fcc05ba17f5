"""Find the lens of a microscope by a stack or two: what a net has to be told to be right.

A model that may be told of the lens (`mm_autofocus.models.lens`) knows by one look how far
focus is about as well as it knows the lens. Nobody measures the aperture of a condenser or
waves of spherical aberration at a microscope in use; but stacks with labels say of each lens
how well it explains them. The most likely one is kept, and a copy of the model is written that
holds it: everything else uses that as any other model.

What is stated of the copy is found on fields that the fit did not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from scipy.optimize import minimize
from scipy.stats import qmc

from mm_autofocus.errors import InputError
from mm_autofocus.models.card import KEY, UNSEALED, ErrorModel, ModelCard
from mm_autofocus.models.importing import load_model
from mm_autofocus.models.lens import code_of, values_of
from mm_autofocus.models.runtime import OnnxModel
from mm_autofocus.models.sealing import seal
from mm_autofocus.training.error_fit import Seen, fit_errors, seen_of
from mm_autofocus.training.fields import evenly
from mm_autofocus.training.judges import ModelJudge, check_stack, looks_at, top_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from mm_autofocus.training.judges import Planes

    Real: TypeAlias = npt.NDArray[np.float32]
    Floats: TypeAlias = npt.NDArray[np.float64]

__all__ = ["LensFit", "check_stacks", "fit_lens", "lens_model", "write_lens"]

_FRAMES, _EACH = 240, 8  # that are looked at, of all stacks; and patches of each, at most
_TRIES = 64  # lenses, evenly over all ranges, of which the best is refined
_BEYOND = 1.25  # a lens may lie beyond what the net was taught, by so much of half a range
_LEAST_SD_UM = 0.05  # no patch is believed to be surer: one that is wrong would outvote all
_SPREAD = 3**-0.5  # of lenses over the ranges; a number that hardly matters stays in the middle
_FOLDS = 2


@dataclass(frozen=True, slots=True)
class LensFit:
    """A lens, and what a model is worth that is told of it.

    Attributes
    ----------
    code : numpy.ndarray
        ``(numbers,)`` float32, as the net is shown it.
    values : dict
        The same by name.
    mae_before_um, mae_um : float
        Mean absolute error of frames of fields that the fit had not seen, without and with
        a lens.
    frames, fields : int
        On how many of them.
    error : ErrorModel
        What the model is to expect of itself.
    """

    code: Real
    values: dict[str, float]
    mae_before_um: float
    mae_um: float
    frames: int
    fields: int
    error: ErrorModel

    @property
    def helps(self) -> bool:
        """Whether it is better to be told."""
        return self.mae_um < self.mae_before_um

    def to_json(self) -> dict[str, Any]:
        """The part ``lens`` of what ``mm-autofocus calibrate --json`` prints."""
        return {
            "values": {k: round(v, 4) for k, v in self.values.items()},
            "mae_before_um": round(self.mae_before_um, 4),
            "mae_um": round(self.mae_um, 4),
            "frames": self.frames,
            "fields": self.fields,
        }


def lens_model(name_or_path: str | Path) -> OnnxModel:
    """Load a model that may be told of the lens, which is not known of this microscope.

    Raises
    ------
    InputError
        It is no such model, or onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise InputError(
            "--fit-lens: needs onnx, which is not installed: pip install mm-autofocus[train]"
        ) from None
    model = load_model(name_or_path)
    card = model.card
    if not isinstance(model, OnnxModel) or None in (card.lens, card.outputs.sd):
        raise InputError(
            f"--fit-lens: the model {str(name_or_path)!r} cannot be told of the lens; allowed: "
            "one whose card has lens, as that of sparsefocus-slide20x"
        )
    return model


def check_stacks(model: OnnxModel, stacks: Sequence[Planes]) -> None:
    """Check that a lens can be found by these stacks.

    Raises
    ------
    InputError
        Too few fields, or frames that the model cannot be shown.
    """
    fields = len({s.group for s in stacks})
    if fields < _FOLDS:
        raise InputError(
            f"--fit-lens: needs labelled stacks of at least {_FOLDS} fields, for what is found "
            f"by one is checked on another; there are {fields}"
        )
    for stack in stacks:
        check_stack(model, stack)


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
    check_stacks(model, stacks)
    groups = sorted({s.group for s in stacks})
    order = np.random.default_rng([seed, 7]).permutation(len(groups))
    fold = {groups[g]: k % _FOLDS for k, g in enumerate(order)}
    answer = _Answer(model)
    say("looking at patches of the stacks")
    evidence = _evidence(model, answer, stacks, [fold[s.group] for s in stacks])
    before = model.net.lens
    try:
        model.net.lens = code_of(_ranges(model), None)
        without = _judged(model, stacks)
        parts = []
        for k in range(_FOLDS):
            say(f"fitting the lens, check {k + 1} of {_FOLDS}")
            model.net.lens = likeliest(model, answer, evidence.less(k), seed)
            parts.append(_judged(model, [s for s in stacks if fold[s.group] == k]))
    finally:
        model.net.lens = before
    say("fitting the lens by all fields")
    code = likeliest(model, answer, evidence, seed)
    columns = {
        name: np.concatenate([getattr(p, name) for p in parts])
        for name in ("label_um", "predicted_um", "raw_um", "spread_um")
    }
    seen = replace(parts[0], **columns, frames=sum(p.frames for p in parts))
    return LensFit(
        code,
        values_of(_ranges(model), code),
        _mae(without),
        _mae(seen),
        seen.frames,
        len(groups),
        fit_errors(seen),
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

    Raises
    ------
    InputError
        The card of the model lies beside it.
    """
    import onnx
    from onnx import numpy_helper

    card = model.card
    assert card.lens is not None
    assert model.net.path is not None
    graph = onnx.load(model.net.path)
    for usual in graph.graph.initializer:
        if usual.name == card.lens.input:
            usual.CopyFrom(numpy_helper.from_array(fit.code[None], usual.name))
    for entry in graph.metadata_props:
        if entry.key == KEY:
            entry.value = _card_with(card, fit, output.stem, data).to_json()
    temporary = output.with_name(output.name + ".new")
    try:
        temporary.write_bytes(graph.SerializeToString())
        seal(temporary)
        OnnxModel(temporary)  # as it will be loaded, checksum and all
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _card_with(card: ModelCard, fit: LensFit, name: str, data: str) -> ModelCard:
    assert card.lens is not None
    facts = {k: v for k, v in fit.to_json().items() if k != "values"}
    told = {"values": fit.values, "fitted": {"model": card.name, "data": data, **facts}}
    lens = card.lens.model_copy(update=told)
    return card.model_copy(
        update={"name": name, "lens": lens, "error": fit.error, "sha256": UNSEALED}
    )


def _ranges(model: OnnxModel) -> dict[str, tuple[float, float]]:
    assert model.card.lens is not None
    return model.card.lens.ranges


def _chosen(
    model: OnnxModel, stacks: Sequence[Planes]
) -> Iterator[tuple[int, tuple[int, ...], float]]:
    """Frames ``(number of the stack, planes of its looks, defocus)``, evenly over defocus."""
    low, high = model.card.z_range_um
    per = max(1, _FRAMES // len(stacks))
    for i, stack in enumerate(stacks):
        sets = looks_at(stack.z_um, model.card.looks_um)
        true = {k: float(stack.defocus_um[k]) for k in sets}
        inside = sorted((d, k) for k, d in true.items() if low <= d <= high)
        for j in evenly(len(inside), per, i):
            yield i, sets[inside[j][1]], inside[j][0]


def _evidence(
    model: OnnxModel, answer: _Answer, stacks: Sequence[Planes], folds: Sequence[int]
) -> _Evidence:
    found, label, fold = [], [], []
    for i, planes, defocus in _chosen(model, stacks):
        looks = [stacks[i].plane(p) for p in planes]
        some = model.content_patches(looks, _EACH, max_value=top_of(stacks[i]))
        found.append(answer.see(some))
        label += [defocus] * len(some)
        fold += [folds[i]] * len(some)
    seen = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    return _Evidence(seen, np.array(label), np.array(fold, np.intp))


def _judged(model: OnnxModel, stacks: Sequence[Planes]) -> Seen:
    """What the model says of whole frames."""
    judge = ModelJudge(model)
    return seen_of(
        [
            (defocus, judge([stacks[i].plane(p) for p in planes], stacks[i]))
            for i, planes, defocus in _chosen(model, stacks)
        ]
    )


def _mae(seen: Seen) -> float:
    return float(np.abs(seen.predicted_um - seen.label_um).mean())
