"""Learned focus beside its baselines: on virtual slides, and on recorded images.

    python benchmarks/learned.py --part virtual-slide --model NAME_OR_PATH
                                 [--two-look MODEL] [--resnet MODEL] [--fields N] [--write]
    python benchmarks/learned.py --part brain [--net NAME] [--minutes N] [--folds N] [--write]
    python benchmarks/learned.py --part information [--write]
    python benchmarks/learned.py --part labels [--fields N] [--write]
    python benchmarks/learned.py --part metal [--net NAME] [--init RUN] [--write]
    python benchmarks/learned.py --part photographs [--model NAME_OR_PATH] [--write]

``virtual-slide`` judges models that are there, by the protocol of the SparseFocus paper;
``information`` computes what there is to know; ``labels`` asks how well the focus of a
recorded stack is known, from which all learn; ``brain`` and ``metal`` train them by the
shipped commands first; ``photographs`` asks what the blur of a picture's own lens does, where
pictures are the specimens. ``--cache FOLDER`` keeps the rendered frames (0.35 GB a field of
1024²), so that other models see the very same ones sooner.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import cv2
from mm_autofocus.models.importing import shipped_models

from _results import write_section

DATA = Path(__file__).parents[2] / "shared" / "data"
TITLES = {
    "virtual-slide": "Learned focus on virtual slides never seen in training (simulated)",
    "photographs": "Specimens made of photographs, near focus (simulated)",
    "information": "What spectra can tell of the defocus at the best (by theory)",
    "labels": "How well the label of a stack is known",
    "brain": "Learned focus on recorded stacks: a brain section, trained and judged by stack",
    "metal": "Learned focus on recorded images: metal pads, one field against the other",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=TITLES, required=True)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of recorded images")
    parser.add_argument("--write", action="store_true", help="replace its part of RESULTS.md")
    virtual = parser.add_argument_group("virtual-slide")
    shipped = next(iter(shipped_models()), None)
    virtual.add_argument("--model", default=shipped, help=f"default: {shipped}")
    virtual.add_argument("--two-look", help="a model of two looks, on the same frames")
    virtual.add_argument("--resnet", help="a model asked for its plain grid median")
    virtual.add_argument("--fields", type=int, default=8, help="of each class")
    virtual.add_argument("--planes", type=int, default=101)
    virtual.add_argument("--frame", type=int, default=512, choices=(256, 512, 1024, 2016))
    virtual.add_argument("--every", type=int, default=20, help="baselines: every n-th plane")
    virtual.add_argument("--starts", type=int, default=2, help="searches in each field")
    virtual.add_argument("--cache", type=Path, help="folder that keeps the rendered frames")
    real = parser.add_argument_group("brain, metal")
    real.add_argument("--net", default="sparsefocus")
    real.add_argument("--minutes", type=float, help="of each training; default: its own")
    real.add_argument(
        "--init", help="metal: a run or a model whose weights the training begins with"
    )
    real.add_argument(
        "--folds",
        type=int,
        default=0,
        choices=(0, *range(2, 21)),  # of one fold nothing would be left to learn from
        metavar="N",
        help="brain: hold each stack out once, by so many trainings, 2 … 20",
    )
    real.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser


def main() -> None:
    """Run a part, and print or write its section."""
    parser = _parser()
    args = parser.parse_args()
    cv2.setNumThreads(1)
    logging.disable(logging.WARNING)
    if args.part == "virtual-slide":
        if args.model is None:
            parser.error("--model: none is shipped; name one")
        from _learned_virtual import run
    elif args.part == "photographs":
        from _learned_photographs import run
    elif args.part == "information":
        from _learned_information import run
    elif args.part == "labels":
        from _learned_labels import run
    elif args.part == "brain":
        from _learned_real import brain as run
    else:
        from _learned_real import metal as run
    text = run(args)
    print(text)
    if args.write:
        write_section(f"learned-{args.part}", TITLES[args.part], text)


if __name__ == "__main__":
    main()
