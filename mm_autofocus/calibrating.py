"""``mm-autofocus calibrate``: the options checked, the microscope asked, the answer told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_autofocus.collecting import collect_with
from mm_autofocus.config import close_core, open_core
from mm_autofocus.drive import drive
from mm_autofocus.errors import InputError
from mm_autofocus.hooks.checks import check_looks, stage_limits_um
from mm_autofocus.hooks.ledger import Ledger, Place
from mm_autofocus.hooks.rig import CoreRig, faults_of
from mm_autofocus.measure import FocusMeasure
from mm_autofocus.plan import load_plan, settings_of
from mm_autofocus.settings import AutofocusSettings, parse_settings
from mm_autofocus.settings_file import check_new_file, write_text
from mm_autofocus.strategies.hill_climb import HillClimb
from mm_autofocus.training.calibrate import Images, calibrate
from mm_autofocus.training.calibration_page import calibration_page
from mm_autofocus.training.collect import Collection
from mm_autofocus.training.curve_fit import OPTION as CURVE
from mm_autofocus.training.curve_fit import CurveFit, fit_curve, write_curve
from mm_autofocus.training.dataset import Dataset
from mm_autofocus.training.fitted_copy import check_stacks, onnx_model
from mm_autofocus.training.focus_curves import SHARE
from mm_autofocus.training.lens_fit import OPTION as LENS
from mm_autofocus.training.lens_fit import LensFit, fit_lens, lens_model, write_lens
from mm_autofocus.training.recommend import Recommendation, recommend
from mm_autofocus.training.stage_play import StagePlay, StageSweeps, play_of

if TYPE_CHECKING:
    from mm_autofocus.models.runtime import OnnxModel
    from mm_autofocus.training.stack import Stack

__all__ = ["Calibration", "calibrate_microscope", "measure_stage"]

_APPROACH_UM = (3.0, 12.0)
"""From how far a sweep comes; the second where the backlash is not small beside the first."""

_NOT_RECORDED = "not in recorded stacks; name the microscope with --config"


@dataclass(frozen=True, slots=True)
class Calibration:
    """All that was measured, and what is recommended.

    Attributes
    ----------
    dataset : Path | None
        The stacks.
    images : Images | None
        What they say.
    stage : StagePlay | None
        What the microscope says.
    stage_reason : str
        Why it says nothing.
    recommended : Recommendation
        How to focus.
    settings_file : Path | None
        Where that was written to.
    fit : LensFit | CurveFit | None
        What a model was told of the lens, or its calibration curve.
    fitted_file : Path | None
        The copy of the model that holds it; None: it is no better by it.
    """

    dataset: Path | None
    images: Images | None
    stage: StagePlay | None
    stage_reason: str
    recommended: Recommendation
    settings_file: Path | None = None
    fit: LensFit | CurveFit | None = None
    fitted_file: Path | None = None

    @property
    def exit_code(self) -> int:
        """1 if the stage was to be measured and was not, else 0."""
        return int(self.stage is None and self.stage_reason != _NOT_RECORDED)

    def to_json(self) -> dict[str, Any]:
        """The document that ``mm-autofocus calibrate --json`` prints."""
        stage: dict[str, Any] = {"backlash_um": None, "repeatability_um": None}
        stage |= {} if self.stage is None else self.stage.to_json()
        return {
            "dataset": None if self.dataset is None else str(self.dataset),
            "images": None if self.images is None else self.images.to_json(),
            "stage": {**stage, "reason": self.stage_reason},
            "lens": self.fit.to_json() if isinstance(self.fit, LensFit) else None,
            "curve": self.fit.to_json() if isinstance(self.fit, CurveFit) else None,
            "model": None if self.fitted_file is None else str(self.fitted_file),
            "recommended": self.recommended.to_json(),
            "settings_file": None if self.settings_file is None else str(self.settings_file),
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        if self.images is not None:
            yield from _image_lines(self.images)
        if self.stage is None:
            yield f"stage         backlash and repeatability: {self.stage_reason}"
        else:
            b, r = self.stage.backlash, self.stage.repeatability
            yield f"backlash      {b.um:.2f} µm ({b.low_um:.2f} … {b.high_um:.2f})"
            yield f"repeatability {r.um:.2f} µm ({r.low_um:.2f} … {r.high_um:.2f})"
        if self.fit is not None:
            yield from _fit_lines(self.fit, self.fitted_file)
        best = self.recommended
        looks = best.looks_um
        at = "" if looks is None else f", looks at [{', '.join(f'{x:g}' for x in looks)}] µm"
        px = "" if not best.patch_px or looks is None else f", patches of {best.patch_px} px"
        yield f"recommended   {best.strategy}{at}{px}"
        if self.settings_file is not None:
            yield f"settings      {self.settings_file}"
        else:
            yield ""
            yield best.text().rstrip()


def calibrate_microscope(
    dataset: Path | None,
    config: str | None,
    *,
    plan: Path | None = None,
    slide: str = "slide",
    output: Path | None = None,
    report: Path | None = None,
    overwrite: bool = False,
    model: str | None = None,
    lens_output: Path | None = None,
    curve_output: Path | None = None,
    sets: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    as_json: bool = False,
    debug: bool = False,
) -> Calibration:
    """Calibrate from stacks, on a microscope, or both.

    Parameters
    ----------
    dataset : path, optional
        Recorded stacks; with `plan`, where they go.
    config : str, optional
        The microscope; its stage is measured where it stands, or at the surest field of the
        plan. It comes back to where it stood.
    plan : path, optional
        Takes stacks first; see `mm_autofocus.training.collect`.
    slide : str, optional
        Name of the slide of the plan.
    output : path, optional
        ``*.yaml`` for the settings.
    report : path, optional
        ``*.html`` with focus curves and the test of the sign; needs stacks.
    overwrite : bool, optional
        Whether these may be replaced.
    model : str, optional
        A trained model to be used in the settings.
    lens_output : path, optional
        ``*.onnx`` for a copy of that model that is told of the lens which the stacks show: see
        `mm_autofocus.training.lens_fit`. It takes the model's place in the settings.
    curve_output : path, optional
        The same with a calibration curve of the slide of the stacks: see
        `mm_autofocus.training.curve_fit`.
    sets : mapping, optional
        Settings: limits, channel, exposure, optics.
    seed : int, optional
        Of the sign test, and of the fit.
    progress : callable, optional
        Is told what comes next.
    as_json, debug : bool, optional
        How a plan is shown while it runs.

    Raises
    ------
    InputError
        Nothing was moved and nothing was written.
    HardwareError
        A device failed.
    """
    _check_asked(dataset, config, plan, output, report, overwrite=overwrite)
    fitting = _fitting(model, dataset, lens_output, curve_output, overwrite=overwrite)
    settings = parse_settings(sets, where="--set")
    say = progress or (lambda _: None)
    stage, reason, data = None, _NOT_RECORDED, None
    if plan is None and dataset is not None:
        data = Dataset.open(dataset)
        if fitting is not None:  # before anything moves
            check_stacks(fitting.model, data.labelled, fitting.option)
    if config is not None:
        collection = None
        if plan is not None and dataset is not None:
            collection = _collection(plan, dataset, slide, sets or {})
        core = open_core(config)
        try:
            check_looks(core, settings)
            best = None
            with _xy_restored(core):
                if collection is not None:
                    say("taking stacks")
                    collect_with(core, collection, as_json=as_json, debug=debug)
                    data = Dataset.open(collection.writer.path)
                    best = _surest(data, slide)
                say("sweeping through focus, up and down")
                stage, reason = measure_stage(core, settings, best)
        finally:
            close_core(core)
    images = None if data is None else calibrate(data, seed=seed, progress=progress)
    fit, fitted_file, tried = None, None, None
    if fitting is not None and data is not None:
        fit = fitting.fit(data, seed, say)
        worth = f"off by {fit.mae_before_um:.2f} µm on these stacks"
        if fit.helps:
            fitted_file, model = fitting.output, str(fitting.output)
            worth = f"off by {fit.mae_um:.2f} µm on fields that {fitting.its} was not found by"
        tried = (fitting.model.card, worth)
    recommended = recommend(images, stage, given=sets, model=model, tried=tried)
    if output is not None:
        write_text(output, recommended.text())
    path = None if data is None else data.path
    done = Calibration(path, images, stage, reason, recommended, output, fit, fitted_file)
    if report is not None and images is not None:
        write_text(report, calibration_page(images, list(done.lines()), recommended.text()))
    return done


def _check_asked(
    dataset: Path | None,
    config: str | None,
    plan: Path | None,
    output: Path | None,
    report: Path | None,
    *,
    overwrite: bool,
) -> None:
    """Refuse what cannot be done before anything is."""
    if plan is not None and (config is None or dataset is None):
        missing = "a microscope with --config" if config is None else "the dataset to write"
        raise InputError(f"--plan: {plan}: needs {missing}")
    if dataset is None and config is None:
        raise InputError("calibrate: name a dataset, or a microscope with --config, or both")
    if output is not None:
        check_new_file(output, overwrite=overwrite, kinds=(".yaml", ".yml"))
    if report is not None:
        check_new_file(report, overwrite=overwrite, kinds=(".html", ".htm"))
        if dataset is None:
            raise InputError(f"--report: {report}: a report needs the stacks of a dataset")


@dataclass(frozen=True, slots=True)
class _Fitting:
    """What is to be fitted to the stacks.

    Attributes
    ----------
    model : OnnxModel
    option : {"--fit-lens", "--fit-curve"}
    output : Path
        ``*.onnx`` for the copy.
    """

    model: OnnxModel
    option: str
    output: Path

    @property
    def its(self) -> str:
        """What the copy holds, in words."""
        return "its lens" if self.option == LENS else "its curve"

    def fit(self, data: Dataset, seed: int, say: Callable[[str], None]) -> LensFit | CurveFit:
        """Fit, and write the copy if it is better."""
        stacks, name = data.labelled, data.path.name
        if self.option == LENS:
            lens = fit_lens(self.model, stacks, seed=seed, progress=say)
            if lens.helps:
                write_lens(self.model, self.output, lens, data=name)
            return lens
        curve = fit_curve(self.model, stacks, seed=seed, progress=say)
        if curve.helps:
            write_curve(self.model, self.output, curve, data=name)
        return curve


def _fitting(
    model: str | None,
    dataset: Path | None,
    lens: Path | None,
    curve: Path | None,
    *,
    overwrite: bool,
) -> _Fitting | None:
    """What is to be fitted, if anything is."""
    if lens is not None and curve is not None:
        raise InputError(
            f"{LENS} and {CURVE}: only one at a time; the lens first, by stacks of any slide, "
            "then the curve of that copy on the slide"
        )
    output, option = (lens, LENS) if lens is not None else (curve, CURVE)
    if output is None:
        return None
    check_new_file(output, overwrite=overwrite, kinds=(".onnx",))
    if model is None or dataset is None:
        missing = "a model with --model" if model is None else "the stacks of a dataset"
        raise InputError(f"{option}: {output}: needs {missing}")
    found = lens_model(model) if option == LENS else onnx_model(model, option)
    return _Fitting(found, option, output)


def measure_stage(
    core: Any, settings: AutofocusSettings, field: Stack | None = None
) -> tuple[StagePlay | None, str]:
    """Measure backlash and repeatability of the focus stage, through the camera.

    Focus is found first; the stage then sweeps through it and goes back where it stood.
    Camera, channel and shutter are as before.

    Parameters
    ----------
    core : CMMCorePlus
        The core.
    settings : AutofocusSettings
        Limits and looks; its strategy and its own backlash do not matter.
    field : Stack, optional
        Where to measure: x, y and z are gone to.

    Returns
    -------
    play : StagePlay | None
    reason : str
        Why there is none; else empty.

    Raises
    ------
    InputError
        The stage stands outside its limits; nothing has moved.
    HardwareError
        A device failed; the stage has been sent back.
    """
    rig = CoreRig(core, settings)
    ledger = Ledger(settings, rig.position_um(), stage_limits_um=stage_limits_um(core))
    ledger.check_home(ledger.z_run_start_um, "the focus stage stands where it may not")
    start = None
    if field is not None and field.xy_um is not None and core.getXYStageDevice():
        with faults_of("the XY stage could not be sent to the field"):
            core.setXYPosition(*field.xy_um)
            core.waitForDevice(core.getXYStageDevice())
        start = field.focus_z_um
    finder: Any = HillClimb(settings)
    play = None
    for approach in _APPROACH_UM:
        request = ledger.request(Place({}, None), core.getPixelSizeUm())
        sweeps = StageSweeps(
            finder,
            FocusMeasure.from_settings(settings),
            None,
            approach,
            start,
            settings.range_um,
        )
        # the finder keeps its range; the sweeps may go as far as the stage may
        low, high = ledger.limits_um()
        here = request.z_start_um
        about = [here, here if start is None else start]
        reach = settings.range_um + approach + _FURTHEST_UM
        request = replace(
            request,
            z_min_um=max(low, min(about) - reach),
            z_max_um=min(high, max(about) + reach),
            max_looks=settings.max_looks + sweeps.looks,
        )
        result = drive(sweeps, request, rig)
        if not sweeps.complete:
            return play, "" if play is not None else f"no focus was found here: {result.reason}"
        play = play_of(sweeps.stops, approach)
        if max(abs(play.backlash.low_um), abs(play.backlash.high_um)) < approach / 2:
            break
    return play, ""


_FURTHEST_UM = 25.0  # that half a sweep can be


def _collection(plan: Path, dataset: Path, slide: str, sets: Mapping[str, Any]) -> Collection:
    """The plan's stacks; settings are the plan's as well where it focuses."""
    focuses = settings_of(load_plan(plan)) is not None
    names = ("na", "magnification", "wavelength_um", "refractive_index")
    optics = {k: float(sets[k]) for k in names if sets.get(k) is not None}
    return Collection(
        plan, dataset, slide=slide, optics=optics, settings=sets if focuses else None
    )


def _surest(dataset: Dataset, slide: str) -> Stack | None:
    """The labelled stack of a slide with the clearest peak, if it is known where it is."""
    ours = [s for s in dataset.labelled if s.slide == slide and s.xy_um is not None]
    return max(ours, key=lambda s: float(s.quality.get("significance") or 0), default=None)


@contextmanager
def _xy_restored(core: Any) -> Iterator[None]:
    """Send the XY stage back where it stood."""
    stage = core.getXYStageDevice()
    if not stage:
        yield
        return
    with faults_of(f"XY stage {stage!r} gives no position"):
        x, y = core.getXYPosition()
    try:
        yield
    finally:
        with faults_of(f"XY stage {stage!r} could not be sent back"):
            if tuple(core.getXYPosition()) != (x, y):
                core.setXYPosition(x, y)
                core.waitForDevice(stage)


def _fit_lines(fit: LensFit | CurveFit, file: Path | None) -> Iterator[str]:
    if isinstance(fit, LensFit):
        told = ", ".join(f"{name} {value:.2g}" for name, value in fit.values.items())
        yield f"lens          {told}"
        how, what = "where it is told of the lens", "a lens"
    else:
        yield f"curve         the model says {fit.aside_um:+.2f} µm where the slide is in focus"
        how, what = "with a calibration curve", "a curve"
    yield (
        f"model         off by {fit.mae_um:.2f} µm {how}, "
        f"{fit.mae_before_um:.2f} µm without ({fit.frames} frames of {fit.fields} fields, "
        f"each by {what} found on others)"
    )
    yield f"{'':14}{file or 'no better: not written'}"


def _image_lines(images: Images) -> Iterator[str]:
    depth, sign = images.depth, images.sign
    yield f"stacks        {images.stacks} labelled, of {images.fields} fields"
    if depth.um is not None:
        yield f"depth of field {depth.um:.2f} µm, by the {depth.source}"
    for name, known in (
        (f"at {100 * SHARE:.0f} % of its height", depth.curve_um),
        ("by its curvature", depth.curvature_um),
        ("at half height", depth.width_um),
    ):
        if known is not None:
            yield (
                f"focus curve   {known.median:.2f} ± {known.spread:.2f} µm wide {name} "
                f"({known.n} stacks)"
            )
    for kind, known in depth.by_sparsity.items():
        if len(depth.by_sparsity) > 1:
            yield f"  {kind}: {known.median:.2f} ± {known.spread:.2f} µm ({known.n})"
    for o in (*images.channels, *images.colours):
        yield (
            f"offset        {o.channel} from {o.reference}: {o.um.median:+.2f} ± "
            f"{o.error_um:.2f} µm (spread {o.um.spread:.2f}, {o.um.n} fields)"
        )
    if (flat := images.flatness) is not None:
        yield (
            f"flatness      focus differs by {flat.um:.2f} µm from field to field (standard "
            f"deviation; {flat.fields} fields of {flat.slides} slides), by "
            f"{flat.beside_plane_um:.2f} µm beside a tilted plane: flatness_um of two-shot"
        )
    yield f"sign in one image: {sign.verdict}; {sign.reason}"
    for score in (sign.one, *sign.two):
        if score is not None:
            at = ", ".join(f"{x:g}" for x in score.looks_um)
            yield (
                f"  looks [{at}] µm: right on {100 * score.accuracy:.1f} % of {score.images} "
                f"held-out frames ({100 * score.low:.1f} … {100 * score.high:.1f} %, "
                f"{score.fields} fields, |d| ≥ {images.sign_least_um:.2g} µm)"
            )
