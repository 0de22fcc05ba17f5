"""What is recovered from two shots, beside what needs no learning and a single-shot U-Net.

    python benchmarks/refocus_quality.py --part virtual-slide --model PATH --unet PATH
                                         [--other PATH] [--fields N] [--cache FOLDER] [--write]
    python benchmarks/refocus_quality.py --part nuclei --model PATH --unet PATH [--write]
    python benchmarks/refocus_quality.py --part information [--fields N] [--write]
    python benchmarks/refocus_quality.py --part brain [--net NAME] [--minutes N] [--write]

``virtual-slide`` judges models that are there on unseen virtual slides, PSNR and SSIM against
the true image; ``nuclei`` counts nuclei on the recovered and on the true images; ``brain``
trains models on recorded stacks by the shipped commands first; ``information`` asks what the
second shot adds, whatever looks at it. ``--cache FOLDER`` keeps the
rendered frames (30 MB a field of 512²).
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import cv2

from _results import write_section

DATA = Path(__file__).parents[2] / "shared" / "data"
TITLES = {
    "virtual-slide": "Two shots: recovered images on virtual slides never seen (simulated)",
    "nuclei": "Two shots: nuclei counted on recovered and on true images (simulated)",
    "information": "Two shots: what the second shot adds at the best (simulated)",
    "brain": "Two shots: recovered images on recorded stacks of a brain section",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=TITLES, required=True)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of recorded images")
    parser.add_argument("--write", action="store_true", help="replace its part of RESULTS.md")
    virtual = parser.add_argument_group("virtual-slide, nuclei")
    virtual.add_argument("--model", help="the model that is judged, by name or *.onnx")
    virtual.add_argument("--unet", help="the U-Net: of one shot, and of the sharper one")
    virtual.add_argument("--other", action="append", default=[], help="further models")
    virtual.add_argument("--threads", type=int, default=1, help="of one run of a net")
    virtual.add_argument("--fields", type=int, default=8, help="of each class")
    virtual.add_argument("--per-half", type=int, default=3, help="pairs of each, at each ΔD")
    virtual.add_argument("--frame", type=int, default=512, choices=(256, 512, 1024, 2016))
    virtual.add_argument("--cache", type=Path, help="folder that keeps the rendered frames")
    virtual.add_argument("--picture", type=Path, help="nuclei: PNG of what was counted")
    real = parser.add_argument_group("brain")
    real.add_argument("--net", default="tsva")
    real.add_argument("--unet-net", default="unet")
    real.add_argument("--minutes", type=float, help="of each training; default: its own")
    real.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser


def main() -> None:
    """Run a part, and print or write its section."""
    parser = _parser()
    args = parser.parse_args()
    cv2.setNumThreads(1)
    logging.disable(logging.WARNING)
    if args.part in ("virtual-slide", "nuclei") and not args.model:
        parser.error("--model: is missing")
    if args.part == "virtual-slide":
        from _refocus_virtual import run
    elif args.part == "nuclei":
        from _refocus_nuclei import run
    elif args.part == "information":
        from _refocus_information import run
    else:
        from _refocus_brain import run
    text = run(args)
    print(text)
    if args.write:
        write_section(f"refocus-{args.part}", TITLES[args.part], text)


if __name__ == "__main__":
    main()
