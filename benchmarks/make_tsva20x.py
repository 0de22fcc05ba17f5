"""Make the models of the virtual slide that recover the sharp image: collect, train, export.

    python benchmarks/make_tsva20x.py -o FOLDER [--stacks 1600] [--minutes 180]

Beside the two-shot net (``tsva``, told how far its shots lie from focus) the gated one
(``nafnet``) and the single-shot U-Net, the baseline, are trained on the same stacks, with the
same options and for as long.
The U-Net learns from either shot: a scanner that exposes once has no sharper one to choose.
On two cores the stacks take twenty minutes; each step goes on where it was interrupted. The
data stay in FOLDER (some 7 MB a stack).
"""

from __future__ import annotations

from _training_stacks import (
    Recipe,
    arguments,
    collect_all,
    collect_share,
    command,
    train_stages,
    with_photographs,
)

RECIPE = Recipe(
    # Half a µm apart as far as a shot may lie from focus; a quarter near it, where the truth
    # is to be found that is none of the shots. Of each slide fields of one sparsity: as many
    # stacks stand under three times as many lenses.
    planes_um=tuple(sorted({*(k / 2 for k in range(-14, 15)), *(k / 4 for k in range(-5, 6))})),
    first_seed=2000,
    fields={256: (2, 0)},
    large=0.0,
    offset_um=(-1.4, -0.4),
    one_sparsity=True,
)

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "tsva-slide20x": ("tsva", {"net.told": True}),
    "nafnet-slide20x": ("nafnet", {}),
    "unet-slide20x": ("unet", {"net.shot": "either"}),
}
"""Name, net and options of its own of each."""

TRAIN = {
    "split_by": "slide",
    "train_px": 128,
    "batch": 20,
    "lr": 0.001,
    "warmup": 0.1,
    "weight_decay": 0.0001,
    "ema": 0.998,
    "patches_per_stack": 3,
    "validation_planes": 3,
    "validation_most": 240,
    "augment.brightness": [0.9, 1.15],
    "augment.contrast": [0.85, 1.15],
    "augment.saturation": [0.85, 1.2],
    "augment.noise": 0.005,
    "workers": 0,
    "epochs": 1000,  # the minutes end it
}
# With the published loss first, the mean square, to which difficult fields give nearly all.
# Then with its logarithm, so that easy ones count, too. (net, part of the minutes)
STAGES: tuple[tuple[dict[str, object], float], ...] = (
    ({}, 0.4),
    ({"net.loss": "psnr", "lr": 0.0008, "warmup": 0.02}, 0.6),
)


def main() -> None:
    args = arguments(
        __doc__.splitlines()[0], stacks=1600, minutes=180, size="some 7 MB a stack"
    )
    # by the first process before the others: a mistake is said once
    recipe = with_photographs(RECIPE, args)
    if args.job is not None:
        folder = args.output / f"share{args.job}"
        collect_share(recipe, folder, args.stacks, args.job, args.jobs)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    dataset = collect_all(args.output, args.jobs)
    for name, (net, own) in MODELS.items():
        stages = [
            {**TRAIN, **more, **own, "max_minutes": part * args.minutes}
            for more, part in STAGES
        ]
        run = train_stages(args.output, dataset, name, ("--model", net), stages)
        model = args.output / f"{name}.onnx"
        licence = ("--licence", "BSD-3-Clause")
        command("export", run, "-o", model, "--name", name, *licence, "--overwrite")


if __name__ == "__main__":
    main()
