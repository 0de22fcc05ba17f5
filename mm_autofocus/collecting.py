"""``mm-autofocus collect``: what the options ask for, checked and carried out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mm_autofocus.config import close_core, open_core
from mm_autofocus.errors import InputError
from mm_autofocus.settings import parse_settings
from mm_autofocus.shown import run_shown
from mm_autofocus.training.collect import Collected, Collection, StackTruth, measure_of
from mm_autofocus.training.joined import add_datasets, is_dataset
from mm_autofocus.training.recorded import add_recorded

__all__ = ["collect_plan", "collect_recorded", "collect_with"]


def collect_plan(
    plan: Path | None,
    config: str | None,
    output: Path,
    *,
    extra: Sequence[Path] | None = None,
    step_um: float | None = None,
    slide: str,
    optics: Mapping[str, float],
    sets: Mapping[str, Any],
    as_json: bool,
    debug: bool = False,
) -> Collected:
    """Run a plan on a microscope; on the virtual one, its truth is stored beside the labels.

    Raises
    ------
    InputError
        Nothing was moved and nothing was written.
    """
    if plan is None:
        raise InputError("collect: name a plan, or recorded stacks with --from")
    if extra:
        raise InputError(f"collect: {extra[0]}: one plan at a time; --from takes many files")
    if config is None:
        raise InputError("--config: a plan needs a microscope; name its .cfg")
    if step_um is not None:
        raise InputError("--step-um is for recorded stacks; that of a plan is its z_plan's")
    collection = Collection(plan, output, slide=slide, optics=optics, settings=sets)
    core = open_core(config)
    try:
        return collect_with(core, collection, as_json=as_json, debug=debug)
    finally:
        close_core(core)


def collect_with(
    core: Any, collection: Collection, *, as_json: bool = False, debug: bool = False
) -> Collected:
    """Run a collection on an open core, and show it; with the truth of a virtual one."""
    return collection.run(
        core,
        truth=_truth(core),
        run=partial(_shown, as_json=as_json, debug=debug),
    )


def collect_recorded(
    files: Sequence[Path],
    output: Path,
    *,
    config: str | None = None,
    step_um: float | None,
    slide: str,
    optics: Mapping[str, float],
    sets: Mapping[str, Any],
) -> Collected:
    """Copy recorded stacks, or whole datasets, into a dataset.

    Raises
    ------
    InputError
        Of the files, the options or the folder.
    """
    if config is not None:
        raise InputError("--config: recorded stacks need no microscope; leave it out")
    if datasets := [file for file in files if is_dataset(file)]:
        if len(datasets) < len(files):
            raise InputError("--from: name either datasets or recorded stacks, not both")
        return Collected(*add_datasets(datasets, output))
    settings = parse_settings(sets, where="--set")
    known = settings.optics()
    named = {k: getattr(known, k) for k in ("na", "magnification", "wavelength_um")}
    named["refractive_index"] = known.refractive_index
    dataset, new = add_recorded(
        files,
        output,
        step_um=step_um,
        slide=slide,
        optics={**named, **optics},
        measure=measure_of(settings),
    )
    return Collected(dataset, new)


def _truth(core: Any) -> StackTruth | None:
    """What the simulator knows, if the configuration has just loaded it; else nothing."""
    if "mm_autofocus.sim.devices" not in sys.modules:
        return None  # a real microscope: the simulator is not even imported
    from mm_autofocus.sim.stack_truth import truth_of

    return truth_of(core)


def _shown(sequence: Any, *, core: Any, output: Path, **options: Any) -> Any:
    return run_shown(sequence, core, output, **options)
