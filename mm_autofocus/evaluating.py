"""``mm-autofocus evaluate``: what the options ask for, checked, carried out and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.console import progress_bar
from mm_autofocus.errors import HardwareError, InputError
from mm_autofocus.models.importing import load_any, load_model, load_refocus_model
from mm_autofocus.models.refocus import RefocusModel
from mm_autofocus.training.baselines import HillClimb, grid_median
from mm_autofocus.training.dataset import Dataset
from mm_autofocus.training.evaluate import Evaluation, evaluate
from mm_autofocus.training.evaluation_table import HEADS, sentences, table_of
from mm_autofocus.training.judges import check_stack
from mm_autofocus.training.planes import max_value_of
from mm_autofocus.training.refocus_baselines import (
    REFOCUS_BASELINES,
    Wiener,
    baselines_of,
    need_images,
    planes_of,
    two_shots,
)
from mm_autofocus.training.refocus_cases import cases_of, halves_within
from mm_autofocus.training.refocus_evaluate import RefocusEvaluation, evaluate_refocus
from mm_autofocus.training.refocus_table import (
    refocus_heads,
    refocus_sentences,
    refocus_table,
)

if TYPE_CHECKING:
    from rich.console import Console

    from mm_autofocus.models.card import ModelCard
    from mm_autofocus.training.judges import Judge, Search
    from mm_autofocus.training.refocus_report import Examples
    from mm_autofocus.training.stack import Stack

__all__ = ["BASELINES", "evaluate_model", "print_evaluation"]

BASELINES = ("zero", "hill-climb", "grid-median")
"""Baselines by name; any other name is that of a model."""

ALL = "all"

_WIENER_STACKS = 8  # of the validation part, to choose the setting of the Wiener filter by
_WIENER_PX = 256


def evaluate_model(
    model: str,
    dataset: Path,
    *,
    part: str | None = None,
    baselines: Sequence[str] | None = None,
    limit: int | None = None,
    truth: bool = False,
    card: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Evaluation | RefocusEvaluation:
    """Judge a model by a dataset, and write the report.

    A model that tells the defocus is shown planes; one that recovers the sharp image, pairs
    of planes, as shots below and above a middle that is drawn by lot.

    Parameters
    ----------
    model : str
        A name or a path, as for `load_model`.
    dataset : path
        Its folder.
    part : str, optional
        ``train``, ``validation`` or ``test`` of the split that is written down, or
        ``all``; default: ``test`` if there is a split, else all.
    baselines : sequence of str, optional
        Of :data:`BASELINES`, or models, which are asked for the plain median over the
        grid; ``none`` for none. Default: :data:`BASELINES`. For a model that recovers
        images: of `mm_autofocus.training.refocus_baselines.REFOCUS_BASELINES`, or models.
    limit : int, optional
        At most so many stacks, spread evenly over the part.
    truth : bool
        Compare with what the simulator knows, not with the labels.
    card : path, optional
        Card of the model, where it has none.
    output : path, optional
        Folder for ``evaluation.json``, ``report.html`` and the plots.
    overwrite : bool
        Whether these may be replaced.
    quiet : bool
        No progress bar.

    Raises
    ------
    InputError
        Of the options, the model or the dataset; nothing was written.
    """
    if output is not None:
        _check_output(output, overwrite)
    if limit is not None and limit < 1:
        raise InputError(f"--limit: {limit} is not allowed: must be 1 or more")
    judged = load_any(model, card=card)
    if isinstance(judged, RefocusModel):
        if truth:
            raise InputError(
                "--truth: is not allowed with a model that recovers images: they are compared "
                "with recorded ones"
            )
        return _evaluate_refocus(judged, dataset, part, baselines, limit, output, quiet=quiet)
    judges, searches, zero = _baselines(baselines, judged)
    data = Dataset.open(dataset)
    stacks, name, notes = _stacks(data, part, judged.card, limit)
    for stack in stacks:  # before the first of them takes its time
        check_stack(judged, stack)
    with progress_bar("stacks", len(stacks), quiet=quiet) as on_stack:
        found = evaluate(
            judged,
            stacks,
            truth="simulator" if truth else "label",
            judges=judges,
            searches=searches,
            zero=zero,
            on_stack=on_stack,
        )
    skipped = sum(s.skipped for s in searches.values() if isinstance(s, HillClimb))
    if skipped:
        notes.append(f"hill-climb: not replayed on {skipped} stacks of uneven planes.")
    simulated = sum(map(data.is_simulated, stacks))
    if simulated:
        notes.append(f"{simulated} of {len(stacks)} stacks are simulated.")
    found.notes = notes
    found.about = {
        "model": judged.card.name,
        "architecture": judged.card.architecture,
        "sha256": judged.card.sha256,
        "looks_um": list(judged.card.looks_um),
        "z_range_um": list(judged.card.z_range_um),
        "dataset": str(dataset),
        "part": name,
        "simulated": bool(simulated),
        "label_error_um": _label_error(stacks),
    }
    if output is not None:
        _write(found, output, stacks)
    return found


def print_evaluation(found: Evaluation | RefocusEvaluation, console: Console) -> None:
    """Print the figures as an operator reads them."""
    from rich.table import Table

    if isinstance(found, RefocusEvaluation):
        _print_refocus(found, console)
        return
    about = found.about
    dof = "not known" if found.dof_um is None else f"{found.dof_um:.2f} µm"

    def line(text: str, style: str = "") -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False, style=style)

    line(
        f"{about['model']} on {about['dataset']} ({about['part']}): {found.stacks} stacks; "
        f"depth of field {dof}; compared with the {found.truth}'s focus"
    )
    for note in found.notes:
        line(f"! {note}", "yellow")
    table = Table()
    for k, head in enumerate(HEADS):
        table.add_column(head, justify="left" if k < 2 else "right", no_wrap=True)
    previous = None
    for row in table_of(found):
        if previous not in (None, row[1]):
            table.add_section()
        previous = row[1]
        table.add_row(*row)
    console.print(table)
    for sentence in sentences(found.to_json()):
        line(sentence)


# ----------------------------------------------------------------------------- refocus


def _evaluate_refocus(
    judged: RefocusModel,
    dataset: Path,
    part: str | None,
    names: Sequence[str] | None,
    limit: int | None,
    output: Path | None,
    *,
    quiet: bool,
) -> RefocusEvaluation:
    """`evaluate_model`, for a model that recovers the sharp image."""
    from mm_autofocus.training.refocus_report import Examples

    need_images()
    data = Dataset.open(dataset)
    stacks, name, notes = _stacks(data, part, judged.card, limit)
    halves = halves_within(*judged.shots.half_um)
    known, others = _refocus_baselines(names)
    for one in (judged, *others.values()):  # before the first of them takes its time
        for stack, half in ((s, h) for s in stacks for h in halves):
            _check_shots(one, stack, half)
    wiener = Wiener()
    if "wiener" in known:
        wiener, note = _wiener(data, name, halves)
        notes.append(note)
    examples = Examples(judged.card.name, tuple(others))
    kind = _truth_of(judged.card)
    if kind != "plane":
        notes.append("The truth is a fusion of all planes, as in the training of the model.")
    with (
        TemporaryDirectory() as folder,
        progress_bar("stacks", len(stacks), quiet=quiet) as on_stack,
    ):

        def counted() -> Iterator[Any]:
            for number, case in cases_of(stacks, halves, truth=kind, folder=Path(folder)):
                on_stack(number)
                yield case
            on_stack(len(stacks))

        found = evaluate_refocus(
            judged, counted(), baselines_of(known, wiener), others=others, watch=examples
        )
    simulated = sum(map(data.is_simulated, stacks))
    if simulated:
        notes.append(f"{simulated} of {len(stacks)} stacks are simulated.")
    found.notes = notes
    found.about = {
        "model": judged.card.name,
        "architecture": judged.card.architecture,
        "sha256": judged.card.sha256,
        "task": judged.card.task,
        "dataset": str(dataset),
        "part": name,
        "stacks": len(stacks),
        "simulated": bool(simulated),
        "label_error_um": _label_error(stacks),
    }
    if output is not None:
        _write_refocus(found, output, examples)
    return found


def _truth_of(card: ModelCard) -> str:
    """What the model was trained towards: ``plane`` or ``fusion``."""
    options = card.training.get("options")
    pairs = options.get("pairs") if isinstance(options, dict) else None
    return "fusion" if isinstance(pairs, dict) and pairs.get("truth") == "fusion" else "plane"


def _refocus_baselines(
    names: Sequence[str] | None,
) -> tuple[list[str], dict[str, RefocusModel]]:
    names = names or REFOCUS_BASELINES
    if "none" in names:
        if len(names) > 1:
            raise InputError("--baseline: 'none' and others are not allowed together")
        return [], {}
    known = [name for name in names if name in REFOCUS_BASELINES]
    others = {}
    for name in names:
        if name not in known:
            try:
                other = load_refocus_model(name)
            except InputError as e:
                allowed = ", ".join((*REFOCUS_BASELINES, "none"))
                raise InputError(f"--baseline: {e} (or one of {allowed})") from None
            others[other.card.name] = other
    return known, others


def _check_shots(model: RefocusModel, stack: Stack, half_um: float) -> None:
    try:
        model.check(
            tuple(stack.shape[1:]),
            half_um=half_um,
            max_value=max_value_of(stack),
            pixel_size_um=stack.known_optics().pixel_size_um,
        )
    except InputError as e:
        raise InputError(f"{stack.group}: {e}") from None


def _wiener(data: Dataset, part: str, halves: Sequence[float]) -> tuple[Wiener, str]:
    """The Wiener filter, its setting chosen on the validation part if there is one."""
    split = data.written_split
    if part in (ALL, "validation") or split is None or not split.groups.get("validation"):
        return Wiener(), "wiener: no validation part is left to choose its setting by."
    stacks = data.part("validation")
    some = np.linspace(0, len(stacks) - 1, min(len(stacks), _WIENER_STACKS)).round().astype(int)

    def pairs() -> Iterator[Any]:
        for _, case in cases_of([stacks[i] for i in some], halves, per_half=1):
            size = case.truth.shape[:2]
            y, x = (max(n - _WIENER_PX, 0) // 2 for n in size)
            lower, upper, truth = (
                image[y : y + _WIENER_PX, x : x + _WIENER_PX]
                for image in (case.lower, case.upper, case.truth)
            )
            shots = two_shots(lower, upper, case.asked_um, case.optics, case.max_value)
            yield shots, planes_of(truth, case.max_value)

    note = (
        "wiener: its setting was chosen by the PSNR, for each distance, on "
        f"{len(some)} stacks of the part 'validation'."
    )
    return Wiener.fit(pairs(), halves), note


def _print_refocus(found: RefocusEvaluation, console: Console) -> None:
    from rich.table import Table

    about = found.about
    fields = len({r.field for r in found.rows})

    def line(text: str, style: str = "") -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False, style=style)

    line(
        f"{found.name} on {about['dataset']} ({about['part']}): {fields} fields, "
        f"{len(found.rows)} pairs of shots"
    )
    for note in found.notes:
        line(f"! {note}", "yellow")
    table = Table()
    for k, head in enumerate(refocus_heads(found)):
        table.add_column(head, justify="right" if k else "left", no_wrap=True)
    for row in refocus_table(found):
        table.add_row(*row)
    console.print(table)
    for sentence in refocus_sentences(found.to_json(), found.name):
        line(sentence)


def _stacks(
    data: Dataset, part: str | None, card: ModelCard, limit: int | None
) -> tuple[list[Stack], str, list[str]]:
    """The stacks to judge by, the name of their part, and what a reader must know of it."""
    notes = []
    split = data.written_split
    if part is None:
        part = "test" if split is not None and "test" in split.groups else ALL
        if part == ALL:
            notes.append(
                "The dataset has no split with a part 'test': all its labelled stacks are used."
            )
    stacks = data.labelled if part == ALL else data.part(part)
    if not stacks:
        raise InputError(f"{data.path}: the part {part!r} has no labelled stack")
    if _learned_from(card, data) and part in (ALL, "train"):
        notes.append(
            "By its card, the model was trained on this dataset: these stacks are among those "
            "it learned from, and the errors on others will be larger."
        )
    elif part == "train":
        notes.append("The part 'train': if the model learned from it, this is no test.")
    refused = len(data) - len(data.labelled)
    if refused and part == ALL:
        notes.append(f"{refused} stacks have no label and cannot be used.")
    if limit is not None and limit < len(stacks):
        notes.append(f"{limit} of {len(stacks)} stacks, spread evenly (--limit).")
        chosen = np.linspace(0, len(stacks) - 1, limit).round().astype(int)
        stacks = tuple(stacks[i] for i in chosen)
    return list(stacks), part, notes


def _label_error(stacks: Sequence[Stack]) -> float | None:
    """What the labels say of their own error, in the median."""
    errors = [e for s in stacks if (e := s.expected_error_um) is not None]
    return float(np.median(errors)) if errors else None


def _learned_from(card: ModelCard, data: Dataset) -> bool:
    """Whether the card names this dataset as its training's."""
    here = {str(data.path), str(data.path.resolve()), data.path.resolve().name}
    named = {str(card.training.get(key, "")) for key in ("dataset", "data", "path")}
    return bool(here & named) or str(data.path.resolve()) in json.dumps(card.training)


def _baselines(
    names: Sequence[str] | None, model: Any
) -> tuple[dict[str, Judge], dict[str, Search], bool]:
    names = names or BASELINES
    if "none" in names:
        if len(names) > 1:
            raise InputError("--baseline: 'none' and others are not allowed together")
        return {}, {}, False
    judges: dict[str, Judge] = {}
    searches: dict[str, Search] = {}
    for name in names:
        if name == "grid-median":
            judges["grid-median"] = grid_median(model)
        elif name == "hill-climb":
            searches[name] = HillClimb()
        elif name != "zero":
            try:
                other = load_model(name)
            except InputError as e:
                known = ", ".join((*BASELINES, "none"))
                raise InputError(f"--baseline: {e} (or one of {known})") from None
            judges[f"{other.card.name}, grid median"] = grid_median(other)
    return judges, searches, "zero" in names


# ------------------------------------------------------------------------------ output

FILES = ("evaluation.json", "report.html")


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, not a folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"{folder.absolute().parent}: no such folder")
    taken = next((folder / name for name in FILES if (folder / name).exists()), None)
    if taken is not None and not overwrite:
        raise InputError(f"{taken}: exists already; use --overwrite or another name")


def _write(found: Evaluation, folder: Path, stacks: Sequence[Stack]) -> None:
    from mm_autofocus.training.evaluation_report import plots, report_page

    pictures = plots(found)
    _write_files(folder, found.to_json(), pictures, report_page(found, pictures, stacks))


def _write_refocus(found: RefocusEvaluation, folder: Path, examples: Examples) -> None:
    from mm_autofocus.training.refocus_report import refocus_page, refocus_plots

    pictures = refocus_plots(found)
    _write_files(folder, found.to_json(), pictures, refocus_page(found, pictures, examples))


def _write_files(
    folder: Path, document: dict[str, Any], pictures: dict[str, bytes], page: str
) -> None:
    try:
        folder.mkdir(exist_ok=True)
        text = json.dumps(document, indent=1, ensure_ascii=False)
        (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        for name, data in pictures.items():
            (folder / f"{name}.png").write_bytes(data)
        (folder / "report.html").write_text(page, encoding="utf-8")
    except OSError as e:
        raise HardwareError(f"{folder}: cannot be written ({e.strerror})") from e
