"""``mm-autofocus train``: a dataset and options become a run."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.models.lens import knows
from mm_autofocus.models.nets import NETS, build_net, need_torch
from mm_autofocus.training.dataset import Dataset
from mm_autofocus.training.importance import content_maps
from mm_autofocus.training.options import TrainOptions, read_options, read_options_file
from mm_autofocus.training.pairs import PairSource, Truths, draw_pair, validation_pairs
from mm_autofocus.training.samples import (
    MosaicSource,
    PatchSource,
    fields_of,
    range_of,
    validation_patches,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from mm_autofocus.models.lens import Ranges
    from mm_autofocus.models.nets.base import Net, NetContext
    from mm_autofocus.models.nets.sparsefocus import SparseFocus
    from mm_autofocus.training.fields import Field
    from mm_autofocus.training.loop import Job
    from mm_autofocus.training.samples import Source
    from mm_autofocus.training.stack import Stack
    from mm_autofocus.training.validate import Validation

__all__ = ["prepare", "train"]

logger = logging.getLogger(__name__)

_SETTLE_STEPS, _SETTLE_BATCH = 8, 32
_MAY_CHANGE = (
    "epochs",
    "patience",
    "max_minutes",
    "checkpoint_minutes",
    "workers",
    "devices",
    "accelerator",
    "strategy",
    "precision",
)


def train(
    dataset: str | os.PathLike[str],
    run: str | os.PathLike[str],
    options: TrainOptions | Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Train a net on a dataset.

    Parameters
    ----------
    dataset : path
        Folder that ``mm-autofocus collect`` wrote.
    run : path
        Folder to write: ``options.yaml``, ``log.jsonl``, ``last.ckpt``, ``best.ckpt``,
        ``report.html``.
    options : TrainOptions or mapping, optional
        How. With `resume`: only what may change, such as ``epochs``.
    resume : bool, optional
        Go on where `run` stopped, as if it had not.

    Returns
    -------
    dict
        ``run``, ``model``, ``epochs``, ``best_epoch``, ``validation``, ``elapsed_s``,
        ``stopped``, ``figures`` (of the validation, in words), ``report``.

    Raises
    ------
    InputError
        Of the dataset, the options or the run; torch is missing; the loss is no number.
    """
    need_torch()
    from mm_autofocus.training.checkpoint import LAST, load_checkpoint

    run = Path(run)
    state = None
    if resume:
        if not (run / LAST).is_file():
            raise InputError(f"{run}: there is nothing to resume; it has no {LAST}")
        options = _resumed(run, options)
        state = load_checkpoint(run / LAST)
    else:
        options = _checked(options)
        if (run / LAST).exists() or (run / "log.jsonl").exists():
            raise InputError(f"{run}: holds a run already; --resume continues it")
    job = prepare(Dataset.open(dataset), run, options, state)
    result = _launch(job)
    from mm_autofocus.training.train_report import write_train_report

    report = write_train_report(job.run, job.validation, job.options)
    return {
        "run": str(run),
        "model": options.model,
        **result,
        "figures": job.validation.line(result["validation"]),
        "report": str(report),
    }


def _checked(options: TrainOptions | Mapping[str, Any] | None) -> TrainOptions:
    return options if isinstance(options, TrainOptions) else read_options(options or {})


def _resumed(run: Path, given: TrainOptions | Mapping[str, Any] | None) -> TrainOptions:
    before = read_options_file(run / "options.yaml")
    changes = dict(given or {}) if not isinstance(given, TrainOptions) else {}
    for key, value in changes.items():
        if key not in _MAY_CHANGE and not _says(before.get(key), value):
            raise InputError(
                f"{key}: cannot change when a run is resumed; it may: {', '.join(_MAY_CHANGE)}"
            )
    free = {k: v for k, v in changes.items() if k in _MAY_CHANGE}
    return read_options({**before, **free}, where=str(run / "options.yaml"))


def _says(before: Any, value: Any) -> bool:
    """Whether options say this already; of a mapping, so far as it goes."""
    if isinstance(value, Mapping) and isinstance(before, Mapping):
        return all(k in before and _says(before[k], v) for k, v in value.items())
    if isinstance(value, tuple | list) and isinstance(before, tuple | list):
        return list(before) == list(value)
    return bool(before == value)


def prepare(
    dataset: Dataset, run: Path, options: TrainOptions, state: dict[str, Any] | None = None
) -> Job:
    """Make everything ready that a training needs, and write the folder of the run.

    Raises
    ------
    InputError
        Nothing was written then.
    """
    from mm_autofocus.training.loop import Job

    NETS.check(options.model)
    need_torch()
    if dataset.written_split is None:
        dataset.split(seed=options.seed, by=options.split_by)
    learn, check = dataset.part("train"), dataset.part("validation")
    for part, stacks in (("train", learn), ("validation", check)):
        if not stacks:
            raise InputError(f"{dataset.path}: no labelled stack in its {part} part")
    refocus = NETS.get(options.model).task == "refocus"
    context = _pair_context(learn, options) if refocus else _look_context(learn, options)
    if refocus:  # before anything is written: every stack must have two planes for shots
        for stack in (*learn, *check):
            draw_pair(stack, options.pairs, np.random.default_rng(0))
    if options.init is not None and state is None:
        options = options.model_copy(update={"net": _begun_net(options.init, options, learn)})
    net = build_net(options.model, context, options.net)  # its options are checked here
    _check_spectra(net, context, options)
    told = getattr(net, "lens", {})
    if told and not options.theory.patches and not any(knows(told, s.lens) for s in learn):
        raise InputError(
            f"net.lens: of no stack of {dataset.path} {' and '.join(told)} are known, and "
            "without theory.patches there is nothing to learn it from; allowed: {}"
        )
    identity = {
        "model": options.model,
        "net": net.options.model_dump(mode="json"),
        "context": context.model_dump(mode="json"),
    }
    blank: tuple[Stack, ...] = ()
    if getattr(net, "rin", None) is not None and options.mosaics:
        everything = dataset.part("train", labelled=False)
        blank = tuple(s for s in everything if s.sparsity == "blank")
    run.parent.mkdir(parents=True, exist_ok=True)
    run.mkdir(exist_ok=True)
    (run / "options.yaml").write_text(options.to_yaml(), encoding="utf-8")
    if state is None:
        _note(run, dataset)
    maps = content_maps((*learn, *check, *blank), run / "content.npz", os.cpu_count() or 1)

    def ready(stacks: tuple[Stack, ...]) -> list[Field]:
        return fields_of(
            stacks,
            maps,
            context.looks_um,
            # of two shots every plane of a stack may be one
            (-math.inf, math.inf) if refocus else context.range_um,
            tolerance_um=options.look_tolerance_um,
            least_px=max(options.patch_px, options.crop_px),
        )

    fields, validation = ready(learn), ready(check)
    job = Job(
        run,
        options,
        _source(fields, options, run, refocus, told),
        None,
        _judge(validation, options, run, refocus),
        identity,
        state,
    )
    if not job.validation.items:
        raise InputError(f"{dataset.path}: no patch of its validation part shows specimen")
    if getattr(net, "rin", None) is not None and options.mosaics:
        job.mosaics = MosaicSource(
            [*fields, *(ready(blank) if blank else [])],
            options.patch_px,
            options.patches_per_stack,
            options.seed,
            options.augment,
        )
    return job


def _begun_net(init: str, options: TrainOptions, learn: tuple[Stack, ...]) -> dict[str, Any]:
    """Options of a net that begins with other weights: as of that one, where none is given.

    What it is told of the lens is left out, unless asked for, where neither stacks nor theory
    know of one.
    """
    from mm_autofocus.training.begin import weights_to_begin_with

    begun = weights_to_begin_with(init)
    if begun["model"] != options.model:
        return options.net
    own = dict(begun["net"])
    told = own.get("lens")
    if told and not options.theory.patches and not any(knows(told, s.lens) for s in learn):
        del own["lens"]
    return {**own, **options.net}


def _check_spectra(net: Net, context: NetContext, options: TrainOptions) -> None:
    """Check that a net can learn from spectra as it is asked to.

    Raises
    ------
    InputError
        It reads none, patches are too small for them, or theory lacks the optics.
    """
    from mm_autofocus.models.nets.physics import CrossSpectra
    from mm_autofocus.training.spectra_theory import check_optics

    lessons = {
        "spectra_patches": options.spectra_patches,
        "theory.patches": options.theory.patches,
    }
    for key, value in lessons.items():
        if value and not getattr(net, "has_spectra", False):
            raise InputError(
                f"{key}: {value} is not allowed with the model {options.model!r} as it is, "
                "which reads no spectra; allowed: 0"
            )
    for module in net.modules():
        if isinstance(module, CrossSpectra):
            module.check(options.crop_px)
    if options.theory.patches:
        check_optics(context)


def _look_context(learn: tuple[Stack, ...], options: TrainOptions) -> NetContext:
    """What a net for the defocus is shown."""
    from mm_autofocus.models.nets.base import NetContext

    looks, tolerance = options.looks_um, options.look_tolerance_um
    return NetContext(
        looks_um=looks,
        channels=3 if learn[0].is_rgb else 1,
        range_um=options.range_um or range_of(learn, looks, tolerance),
        patch_px=options.patch_px,
        **_optics_of(learn),
    )


def _pair_context(learn: tuple[Stack, ...], options: TrainOptions) -> NetContext:
    """What a net that recovers the sharp image is shown.

    Raises
    ------
    InputError
        Looks or a range are given, which are those of other nets.
    """
    from mm_autofocus.models.nets.base import NetContext

    for key in ("looks_um", "range_um"):
        if key in options.model_fields_set and getattr(options, key) not in (None, (0.0,)):
            raise InputError(
                f"{key}: is not allowed with the model {options.model!r}, which takes two "
                "shots; pairs.half_um and pairs.focus_most_um say how they lie"
            )
    most = options.pairs.focus_most_um
    return NetContext(
        channels=3 if learn[0].is_rgb else 1,
        range_um=(-most, most),
        half_um=options.pairs.half_um,
        patch_px=options.patch_px,
        **_optics_of(learn),
    )


def _source(
    fields: list[Field],
    options: TrainOptions,
    run: Path,
    refocus: bool,
    told: Ranges,
) -> Source:
    """What is trained on."""
    if refocus:
        return PairSource(
            fields,
            Truths(fields, options.pairs.truth, run / "fusion"),
            options.crop_px,
            options.patches_per_stack,
            options.seed,
            options.augment,
            options.pairs,
        )
    return PatchSource(
        fields,
        options.crop_px,
        options.patches_per_stack,
        options.seed,
        options.augment,
        (options.near_share, options.near_um),
        told,
    )


def _judge(fields: list[Field], options: TrainOptions, run: Path, refocus: bool) -> Validation:
    """What it is judged by."""
    from mm_autofocus.training.validate import DefocusValidation, RefocusValidation

    px = options.patch_px
    if refocus:
        pairs = validation_pairs(
            fields,
            options.pairs,
            px,
            per_field=options.validation_planes,
            most=options.validation_most,
        )
        truths = Truths(fields, options.pairs.truth, run / "fusion")
        return RefocusValidation(fields, truths, pairs, px)
    looked_at = validation_patches(
        fields,
        px,
        planes=options.validation_planes,
        patches=options.validation_patches,
        most=options.validation_most,
    )
    return DefocusValidation(fields, looked_at, px)


def _note(run: Path, dataset: Dataset) -> None:
    """Note where the data are and what was typed; `export` puts it into the card."""
    known = dataset.meta.get("slides", {})
    notes = {
        "dataset": str(dataset.path.resolve()),
        "data": f"{dataset.path.name}: {len(dataset.labelled)} labelled stacks of "
        f"{len(known) or 1} slides",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    (run / "run.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")


def _optics_of(stacks: tuple[Stack, ...]) -> dict[str, Any]:
    """What all stacks agree on."""
    known: dict[str, Any] = {}
    for key in ("na", "wavelength_um", "pixel_size_um"):
        values = {s.optics.get(key) for s in stacks}
        value = values.pop() if len(values) == 1 else None
        known[key] = float(value) if value else None
    return known


def _launch(job: Job) -> dict[str, Any]:
    """Run the loop in as many processes as there are devices."""
    import torch
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from torch.multiprocessing.spawn import ProcessRaisedException

    options = job.options
    strategy = options.strategy
    if strategy == "auto" and options.devices > 1:
        # needs no second start of whatever program called us
        strategy = "ddp_spawn"
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    torch.set_float32_matmul_precision("high")
    try:
        fabric = Fabric(
            accelerator=options.accelerator,
            devices=options.devices,
            strategy=strategy,
            precision=_precision(options),  # type: ignore[arg-type]
        )
    except (MisconfigurationException, ValueError, RuntimeError) as e:
        raise InputError(f"accelerator, devices, strategy, precision: {e}") from None
    try:
        result: dict[str, Any] = fabric.launch(
            _work,  # type: ignore[arg-type]
            pickle.dumps(job),  # Lightning looks into what it passes on, and at no bytes
        )
    except ProcessRaisedException as e:
        # an error of the user's stays one when it happens in another process
        marker = f"{InputError.__module__}.{InputError.__name__}: "
        _, found, sentence = str(e).rpartition(marker)
        if not found:
            raise
        raise InputError(sentence.strip().splitlines()[0]) from None
    return result


def _work(fabric: Fabric, pickled: bytes) -> dict[str, Any]:
    """One process."""
    job: Job = pickle.loads(pickled)
    import torch

    from mm_autofocus.models.nets.base import NetContext
    from mm_autofocus.training.begin import begin_with, settle, weights_to_begin_with
    from mm_autofocus.training.loop import fit
    from mm_autofocus.training.progress import TrainingDisplay
    from mm_autofocus.training.spectra_first import spectra_first

    torch.manual_seed(job.options.seed)
    identity = job.identity
    net = build_net(identity["model"], NetContext(**identity["context"]), identity["net"])
    if job.options.init is not None and job.state is None:
        begun = weights_to_begin_with(job.options.init)
        begin_with(net, begun)
        if begun["folded"]:
            settle(net, _samples(job), fabric.device)
    with warnings.catch_warnings():
        # Lightning advises more workers and its own seeding; both are decided here
        warnings.filterwarnings("ignore", module="lightning_fabric")
        first = job.options.spectra_patches or job.options.theory.patches
        if first and job.state is None:
            reader = cast("SparseFocus", net)  # `prepare` refuses all others
            log = job.run / "log.jsonl" if fabric.is_global_zero else None
            say = TrainingDisplay(log, 1, 1).say  # where the epochs tell of themselves, too
            spectra_first(reader, job.patches, job.options, fabric.device, say)
        return fit(fabric, job, net)


def _samples(job: Job) -> Iterator[dict[str, Any]]:
    """Samples of the first steps, as the loop shows them."""
    from mm_autofocus.training.batches import batches_of

    patches = batches_of(job.patches, _SETTLE_BATCH, range(_SETTLE_STEPS), workers=0)
    if job.mosaics is None:
        yield from patches
        return
    mosaics = batches_of(job.mosaics, _SETTLE_BATCH, range(_SETTLE_STEPS), workers=0)
    for batch, beside in zip(patches, mosaics, strict=True):
        yield {**batch, **beside}


def _precision(options: TrainOptions) -> str:
    if options.precision != "auto":
        return options.precision
    import torch

    if options.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    if options.accelerator in ("auto", "cpu"):
        fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return "bf16-mixed" if fast is not None and fast() else "32-true"
    return "32-true"
