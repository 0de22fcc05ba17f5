"""The command line: ``mm-autofocus``.

Exit codes: 0 done; 1 ran, but some tiles failed to focus; 2 bad input, nothing was moved
or written; 3 hardware or I/O fault, with what was saved named.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import mm_autofocus
from mm_autofocus import models_cli
from mm_autofocus.errors import AutofocusError, InputError

app = typer.Typer(
    name="mm-autofocus",
    help="Software autofocus for Micro-Manager.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.add_typer(models_cli.app, name="models")

_state = {"debug": False}

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one setting (repeatable)."),
]
StrategyName = Annotated[str | None, typer.Option(help="Replace the plan's strategy.")]
RawIfUnsure = Annotated[
    bool,
    typer.Option("--raw-if-unsure", help="Keep the sharper shot where the result is doubtful."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"mm-autofocus {mm_autofocus.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and log messages.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    del version
    _state["debug"] = debug
    # a full disk also stops the host's log file, and is no reason for a traceback
    logging.raiseExceptions = debug
    if debug:
        logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the file and the report.")
    ] = Path("demo_output"),
    strategy: StrategyName = None,
    set_: Sets = None,
    json_: Json = False,
    real_time: Annotated[
        bool, typer.Option("--real-time", help="Let the stage take its time.")
    ] = False,
    refocus_model: Annotated[
        str | None, typer.Option(help="Of two-shot: the model that recovers.")
    ] = None,
) -> None:
    """Focus the virtual slide, end to end, without hardware."""
    from mm_autofocus.demo import run_demo

    code = run_demo(
        output,
        strategy,
        parse_sets(set_),
        as_json=json_,
        real_time=real_time,
        refocus_model=refocus_model,
    )
    raise typer.Exit(code)


@app.command()
def run(
    plan: Annotated[Path, typer.Argument(help="A useq plan, YAML or JSON.")],
    config: Annotated[str, typer.Option(help="Micro-Manager .cfg, or a shipped one by name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="*.ome.tiff to write.")],
    strategy: StrategyName = None,
    settings: Annotated[
        Path | None, typer.Option(help="Settings that calibrate wrote; replace the plan's.")
    ] = None,
    set_: Sets = None,
    overwrite: Overwrite = False,
    split_positions: Annotated[
        bool, typer.Option("--split-positions", help="One file per position.")
    ] = False,
    compression: Annotated[str | None, typer.Option(help="zlib, lzw or zstd.")] = None,
    refocus: Annotated[
        str | None,
        typer.Option(help="live: recover the sharp image of each two-shot tile meanwhile."),
    ] = None,
    refocus_model: Annotated[str | None, typer.Option(help="Model that recovers.")] = None,
    refocus_output: Annotated[
        Path | None, typer.Option(help="*.ome.tiff; default: OUT_fused.ome.tiff.")
    ] = None,
    raw_if_unsure: RawIfUnsure = False,
    json_: Json = False,
) -> None:
    """Run a plan with autofocus and save it as OME-TIFF."""
    from mm_autofocus.config import close_core, open_core
    from mm_autofocus.ometiff import OmeTiffSink
    from mm_autofocus.plan import load_plan
    from mm_autofocus.settings_file import read_settings
    from mm_autofocus.shown import run_shown

    given = {} if settings is None else read_settings(settings)
    sequence = load_plan(plan, strategy=strategy, overrides={**given, **parse_sets(set_)})
    options: dict[str, Any] = {
        "overwrite": overwrite,
        "split_positions": split_positions,
        "compression": compression,
    }
    OmeTiffSink(output, **options).check()  # before a configuration wakes the devices
    if refocus == "live":
        from mm_autofocus.refocusing.live import Live

        Live(output, refocus_output, model=refocus_model, overwrite=overwrite)
    core = open_core(config)
    try:
        result = run_shown(
            sequence,
            core,
            output,
            as_json=json_,
            debug=_state["debug"],
            refocus=refocus,
            refocus_model=refocus_model,
            refocus_output=refocus_output,
            raw_if_unsure=raw_if_unsure,
            **options,
        )
    finally:
        close_core(core)
    if json_:
        _print_json(result.to_json())
    raise typer.Exit(result.exit_code)


@app.command()
def refocus(
    raw: Annotated[Path, typer.Argument(help="An OME-TIFF with two shots of each tile.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="*.ome.tiff to write.")],
    model: Annotated[
        str | None, typer.Option(help="A model by name, or *.onnx; default: tsva-slide20x.")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="Card of a model that has none.")] = None,
    raw_if_unsure: RawIfUnsure = False,
    scheduler: Annotated[
        str | None, typer.Option(help="A running Dask scheduler, tcp://host:8786.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of one run of the net; default: all cores.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda, directml or coreml (repeatable).")
    ] = None,
    tile_px: Annotated[int, typer.Option(help="Edge of what is recovered at once.")] = 512,
    max_value: Annotated[
        float | None, typer.Option(help="Where the camera saturates, if pixels are floats.")
    ] = None,
    truth: Annotated[
        Path | None, typer.Option(help="The same tiles in focus, to tell the PSNR.")
    ] = None,
    compression: Annotated[str | None, typer.Option(help="zlib, lzw or zstd.")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Recover the sharp image of each tile from its two shots."""
    from mm_autofocus.refocus_cli import print_refocused, refocus_shown

    found = refocus_shown(
        raw,
        output,
        quiet=json_,
        model=model,
        card=card,
        raw_if_unsure=raw_if_unsure,
        scheduler=scheduler,
        threads=threads,
        providers=provider,
        tile_px=tile_px,
        max_value=max_value,
        truth=truth,
        compression=compression,
        overwrite=overwrite,
    )
    if json_:
        _print_json(found.to_json())
    else:
        print_refocused(found)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An OME-TIFF written by mm-autofocus.")],
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend the file of a run that was killed, in place.")
    ] = False,
    json_: Json = False,
) -> None:
    """Show the autofocus record, from the file alone."""
    from mm_autofocus.console import make_console
    from mm_autofocus.ometiff import read_record
    from mm_autofocus.ometiff import repair as mend
    from mm_autofocus.report import inspect_json, print_record

    if repair:
        mend(file)
    record = read_record(file)
    if json_:
        _print_json(inspect_json(record))
    else:
        print_record(record, make_console())


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="An OME-TIFF written by mm-autofocus.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="*.html to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write an HTML report: focus curves, focus map, tiles to distrust."""
    from mm_autofocus.report import write_report

    write_report(file, output, overwrite=overwrite)
    typer.echo(f"report: {output}")


@app.command()
def replay(
    stacks: Annotated[list[Path], typer.Argument(help="TIFF stacks, (Z, Y, X[, 3]).")],
    strategy: Annotated[str, typer.Option(help="Who searches.")],
    step_um: Annotated[float, typer.Option(help="Distance of the planes in µm.")],
    start_um: Annotated[
        float | None, typer.Option(help="Where the search begins; default: the middle plane.")
    ] = None,
    set_: Sets = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON line per file.")
    ] = False,
) -> None:
    """Try a strategy offline, on recorded stacks."""
    from mm_autofocus.replay import load_stack
    from mm_autofocus.replay import replay as replay_stack
    from mm_autofocus.settings import parse_settings

    given = {**parse_sets(set_), "strategy": strategy}
    settings = parse_settings(given, where="--set")
    failed = False
    if not step_um > 0:
        raise InputError(f"--step-um: {step_um:g} is not allowed: must be greater than 0 (µm)")
    for path in stacks:
        result = replay_stack(
            load_stack(path), step_um=step_um, start_um=start_um, settings=settings
        )
        failed |= not result.found
        row = {
            "file": str(path),
            "start_um": result.z_start_um,
            "z_um": result.z_um,
            "looks": result.looks,
            "moves": result.moves,
            "status": result.status,
            "expected_error_um": result.expected_error_um,
            "score": result.score,
            "reason": result.reason,
            "strategy": result.strategy,
            "curve": [list(p) for p in result.curve],
            "details": result.details,
        }
        if json_:
            _print_json(row, indent=None)
        else:
            z = "no focus" if result.z_um is None else f"z {result.z_um:.2f} µm"
            error = result.expected_error_um
            plus = "" if error is None else f" ± {error:.2f}"
            why = f"  ({result.reason})" if result.reason else ""
            typer.echo(f"{path}: {z}{plus}, {result.looks} looks, {result.status}{why}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def collect(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the dataset; is continued.")
    ],
    plan: Annotated[
        Path | None, typer.Argument(help="A useq plan with z-stacks, YAML or JSON.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Micro-Manager .cfg, or a shipped one by name.")
    ] = None,
    from_: Annotated[
        list[Path] | None,
        typer.Option("--from", help="A recorded stack or a dataset (repeatable), not a plan."),
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Argument(help="Further recorded stacks.", hidden=True)
    ] = None,
    step_um: Annotated[
        float | None, typer.Option(help="Distance of the planes of recorded stacks in µm.")
    ] = None,
    slide: Annotated[str, typer.Option(help="Name of the slide.")] = "slide",
    na: Annotated[float | None, typer.Option(help="Numerical aperture.")] = None,
    magnification: Annotated[float | None, typer.Option(help="To the camera.")] = None,
    wavelength_um: Annotated[float | None, typer.Option(help="In vacuum, in µm.")] = None,
    pixel_size_um: Annotated[float | None, typer.Option(help="In the specimen, in µm.")] = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Collect labelled z-stacks: PLAN on a microscope, or --from recorded files."""
    from mm_autofocus.collecting import collect_plan, collect_recorded

    optics = {
        "na": na,
        "magnification": magnification,
        "wavelength_um": wavelength_um,
        "pixel_size_um": pixel_size_um,
    }
    given = {key: value for key, value in optics.items() if value is not None}
    sets = parse_sets(set_)
    if from_:
        files = [*from_, *([plan] if plan else []), *(more or [])]
        collected = collect_recorded(
            files, output, config=config, step_um=step_um, slide=slide, optics=given, sets=sets
        )
    else:
        collected = collect_plan(
            plan,
            config,
            output,
            extra=more,
            step_um=step_um,
            slide=slide,
            optics=given,
            sets=sets,
            as_json=json_,
            debug=_state["debug"],
        )
    if json_:
        _print_json(collected.to_json())
    else:
        typer.echo(collected.sentence())
    raise typer.Exit(0 if collected.run is None else collected.run.exit_code)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model by name, *.onnx, or module:object.")],
    dataset: Annotated[Path, typer.Argument(help="Folder of a dataset.")],
    part: Annotated[
        str | None,
        typer.Option(help="test, validation, train or all; default: test, if it is split."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="zero, hill-climb, grid-median, none, or another model (repeatable); "
            "default: the first three. For a model that recovers images: sharper, mean, "
            "wiener, wavelet, laplacian (all by default), none, or another model."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for report, plots and JSON.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many stacks.")] = None,
    truth: Annotated[
        bool, typer.Option("--truth", help="Compare with the simulator's truth, not labels.")
    ] = False,
    card: Annotated[Path | None, typer.Option(help="Card of a model that has none.")] = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Judge a model by a dataset, beside its baselines."""
    from mm_autofocus.console import make_console
    from mm_autofocus.evaluating import evaluate_model, print_evaluation

    found = evaluate_model(
        model,
        dataset,
        part=part,
        baselines=baseline,
        limit=limit,
        truth=truth,
        card=card,
        output=output,
        overwrite=overwrite,
        quiet=json_,
    )
    if json_:
        _print_json(found.to_json())
    else:
        print_evaluation(found, make_console())
        if output is not None:
            typer.echo(f"report: {output / 'report.html'}")


@app.command()
def train(
    dataset: Annotated[Path, typer.Argument(help="Folder of a dataset.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run.")],
    model: Annotated[
        str | None, typer.Option(help="sparsefocus, pg-dcn, resnet or convnext.")
    ] = None,
    looks: Annotated[
        str | None, typer.Option(help="Offsets of the looks in µm, for example 0,4.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of options.")] = None,
    set_: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    json_: Json = False,
) -> None:
    """Train a net on a dataset."""
    from mm_autofocus.training_cli import train_shown

    result = train_shown(
        dataset,
        output,
        model=model,
        looks=looks,
        config=config,
        sets=parse_sets(set_),
        resume=resume,
    )
    if json_:
        _print_json(result)
    else:
        typer.echo(
            f"{result['run']}: validation {result['figures']}; report: {result['report']}"
        )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or one of its checkpoints.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="*.onnx to write.")],
    name: Annotated[str | None, typer.Option(help="Name of the model.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Where the dataset is; default: where it was.")
    ] = None,
    keep: Annotated[str, typer.Option(help="best or last.")] = "best",
    licence: Annotated[str, typer.Option(help="Of the data, for the card.")] = "not stated",
    pixel_tolerance: Annotated[
        float, typer.Option(help="Relative difference in pixel size to allow.")
    ] = 0.1,
    half_weights: Annotated[
        bool, typer.Option("--half-weights", help="Store large weights in 16 bits.")
    ] = False,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Export a trained net as ONNX, with its card inside."""
    from mm_autofocus.training.export import export as export_run

    result = export_run(
        run,
        output,
        dataset=dataset,
        name=name,
        keep=keep,
        licence=licence,
        pixel_tolerance=pixel_tolerance,
        overwrite=overwrite,
        half_weights=half_weights,
    )
    if json_:
        _print_json(result)
    else:
        parity = (
            f"{result['parity_um']:.2g} µm"
            if "parity_um" in result
            else f"{result['parity']:.2g} of the range of the camera"
        )
        typer.echo(
            f"{result['model']}: {result['size_mb']:.1f} MB, differs from torch by at most "
            f"{parity}"
        )


@app.command()
def calibrate(
    dataset: Annotated[
        Path | None, typer.Argument(help="Folder of a dataset; with --plan, is written.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Micro-Manager .cfg: measure its stage, too.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A useq plan with z-stacks, to take them first.")
    ] = None,
    slide: Annotated[str, typer.Option(help="Name of the slide of the plan.")] = "slide",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="*.yaml to write the settings to.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="*.html to write a report to.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A trained model, to be named in the settings.")
    ] = None,
    fit_lens: Annotated[
        Path | None,
        typer.Option(help="*.onnx: a copy of --model, told of the lens that the stacks show."),
    ] = None,
    fit_curve: Annotated[
        Path | None,
        typer.Option(help="*.onnx: a copy of --model, calibrated on the slide of the stacks."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the test of the sign, and of the fit.")] = 0,
    set_: Sets = None,
    overwrite: Overwrite = False,
    json_: Json = False,
) -> None:
    """Measure depth of field, stage and channels, and recommend how to focus."""
    from mm_autofocus.calibrating import calibrate_microscope

    found = calibrate_microscope(
        dataset,
        config,
        plan=plan,
        slide=slide,
        output=output,
        report=report,
        overwrite=overwrite,
        model=model,
        lens_output=fit_lens,
        curve_output=fit_curve,
        sets=parse_sets(set_),
        seed=seed,
        progress=lambda what: None if json_ else typer.echo(f"{what} …", err=True),
        as_json=json_,
        debug=_state["debug"],
    )
    if json_:
        _print_json(found.to_json())
    else:
        for line in found.lines():
            typer.echo(line)
    raise typer.Exit(found.exit_code)


def parse_sets(pairs: list[str] | None) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; values are YAML, so that ``[0, 0, 64, 64]`` is a list."""
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair}: must be KEY=VALUE, for example --set range_um=10")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {pair}: the value does not parse as YAML") from None
    return values


def _print_json(document: Any, indent: int | None = 2) -> None:
    # plain print: rich would wrap and colour it
    sys.stdout.write(json.dumps(document, indent=indent, ensure_ascii=False) + "\n")


def main(args: list[str] | None = None) -> None:
    """Entry point of the console script; never returns."""
    args = list(sys.argv[1:] if args is None else args)
    if "--debug" in args:  # wherever it was put
        args.remove("--debug")
        args.insert(0, "--debug")
    try:
        app(args=args, prog_name="mm-autofocus")
    except AutofocusError as e:
        if _state["debug"]:
            raise
        _complain(str(e))
        sys.exit(e.exit_code)
    except Exception as e:  # the last line of defence of a night's run
        if _state["debug"]:
            raise
        _complain(f"{type(e).__name__}: {e} (mm-autofocus --debug … shows where)")
        sys.exit(3)


def _complain(sentence: str) -> None:
    sys.stderr.write(f"mm-autofocus: {sentence}\n")
