"""What a specimen made of a photograph does to one look near focus.

The side of focus is in how differently the colours are blurred. A photograph brings blur of its
own: the lens that took it has blurred one colour more than another, and a net that looks at it
through a second lens takes the one for the other. A stained section has no such blur. Here the
same fields, under the same lenses, are shown as the picture is; at half its size, which halves
that blur; with the fine structure of its green in red and blue, too; and with its blue blurred
a little more. Beside them, how much of the fine structure of each colour is that of green.

Then sections of the virtual slide are photographed first, by another microscope, in focus and a
little out of it, and these photographs are looked at: whoever took a picture did not focus
better than within the depth of field, either.

Last, a calibration curve (``calibrate --fit-curve``) of the one half of a picture, used on the
other: nothing that it was found by is seen again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from mm_autofocus.errors import InputError
from mm_autofocus.models.lens import code_of
from mm_autofocus.training.curve_fit import fit_curve
from mm_autofocus.training.evaluation_table import number
from mm_autofocus.training.lens_fit import lens_model
from numpy.lib.stride_tricks import sliding_window_view

from _virtual_stacks import DOF_UM, Place, VirtualStack, drawn_at, places, slide_stacks

if TYPE_CHECKING:
    from mm_autofocus.models.runtime import OnnxModel

AT_UM = tuple(k / 2 for k in range(-10, 11))
FINE_PX = 2.0  # standard deviation of the blur that leaves what is not fine
COARSE_PX = 5.0
SIDES_UM = (-0.5, 0.0, 0.5)
BLUR_PX = 0.7  # standard deviation
TILE_PX = 64
PER_PX = (0.05, 0.1, 0.2, 0.3)  # frequencies, in periods a pixel
OUT_UM = (-0.75, -0.5, 0.0, 0.5, 0.75)  # z from focus, where sections are photographed
SECTION_PX = 1024


def _log_light(picture: np.ndarray) -> np.ndarray:
    """What absorbance is the fall of, float32; of black, that of the darkest that counts."""
    return np.asarray(np.log(np.maximum(picture.astype(np.float32), 4)))


def with_fine_green(picture: np.ndarray) -> np.ndarray:
    """``(Y, X, 3)`` uint8, of whichever order: fine structure of the second colour in all.

    In absorbance, as strong as what is a little coarser is in each colour.
    """
    absorbed = _log_light(picture)
    coarse = cv2.GaussianBlur(absorbed, (0, 0), FINE_PX)
    between = coarse - cv2.GaussianBlur(absorbed, (0, 0), COARSE_PX)
    fine = absorbed - coarse
    out = absorbed.copy()
    for colour in (0, 2):
        strength = (between[..., colour] * between[..., 1]).sum() / (between[..., 1] ** 2).sum()
        out[..., colour] = coarse[..., colour] + strength * fine[..., 1]
    return np.asarray(np.clip(np.exp(out), 0, 255).round(), np.uint8)


def with_soft_blue(picture: np.ndarray) -> np.ndarray:
    """``(Y, X, BGR)``: its blue blurred."""
    blue, green, red = cv2.split(picture)
    return cv2.merge([cv2.GaussianBlur(blue, (0, 0), BLUR_PX), green, red])


def at_half_its_size(picture: np.ndarray) -> np.ndarray:
    """``(Y, X, 3)``: means of 2 × 2 pixels, so that its own blur becomes half as wide."""
    return cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


SHOWN = {
    "as it is": None,
    "at half its size": at_half_its_size,
    "fine structure of its green in all colours": with_fine_green,
    f"its blue blurred by {BLUR_PX:g} pixels": with_soft_blue,
}


def shared_with_green(picture: np.ndarray) -> np.ndarray:
    """How red and blue go with green, ``(2, 2, len(PER_PX))``: red and blue.

    Of absorbance in windowed tiles, at each of `PER_PX`: coherence, and amplitude of what goes
    with green over that of green, relative to the first.

    Parameters
    ----------
    picture : numpy.ndarray
        ``(Y, X, BGR)`` uint8.
    """
    every = sliding_window_view(_log_light(picture), (TILE_PX, TILE_PX), (0, 1))
    tiles = every[:: TILE_PX // 2, :: TILE_PX // 2]
    tiles = tiles - tiles.mean((-2, -1), keepdims=True)
    waves = np.fft.fft2(tiles * np.outer(*[np.hanning(TILE_PX)] * 2))
    cross = np.einsum("rcpyx,rcqyx->yxpq", waves, waves.conj()).real
    frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(TILE_PX)] * 2))
    near = [cross[np.abs(frequency - f) < 0.025].mean(0) for f in PER_PX]
    found = []
    for colour in (2, 0):
        coherence = [c[colour, 1] / math.sqrt(c[colour, colour] * c[1, 1]) for c in near]
        amplitude = np.array([c[colour, 1] / c[1, 1] for c in near])
        found.append([coherence, amplitude / amplitude[0]])
    return np.array(found)


def run(args: argparse.Namespace) -> str:
    """Make the text of the section."""
    model = lens_model(args.model)
    rows: dict[tuple[str, str], list[list[float]]] = {}
    for place, what, stack in _stacks(args):
        rows.setdefault((place.name, what), []).append(_errors(model, stack))
        print(f"{place.name}/{place.seed}, {place.sparsity}, {what}", flush=True)
    if not rows:
        raise SystemExit(f"--data {args.data}: no pictures in its folder textures")
    lines = [
        "**Simulated.** Specimens made of photographs, as among the fields of learned "
        "focus on virtual slides (the same lenses and cameras), one look that is told of the "
        "lens as it is, within 5 µm of focus, planes of 0.5 µm: as the picture is, and changed "
        f"(what is fine: below some {FINE_PX:g} pixels). `n`: frames; without those in focus "
        "for the direction. The side of focus is in how differently colours are blurred, and "
        "what the picture's own lens has done to them is taken for that of the microscope. A "
        "stained section has no such lens.",
        "",
        "| picture | shown | n | MAE, µm | error at -0.5 | at 0 | at +0.5 | wrong direction |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += _rows(rows)
    every = [p for p in places(args.fields, args.data / "textures") if p.sparsity == "dense"]
    under = [p for p in every if p.picture]
    sections = [p for p in every if p.kind == "tissue"]
    shots = [VirtualStack(p, OUT_UM, SECTION_PX).load() for p in sections]
    pictures = {p.name: cv2.imread(p.picture) for p in under}
    in_focus = shots[0][OUT_UM.index(0.0)]
    pictures["a virtual section"] = cv2.cvtColor(in_focus, cv2.COLOR_RGB2BGR)
    lines += ["", *_of_colours(pictures), "", *_of_sections(args, model, shots, under)]
    lines += ["", *_of_halves(args, model)]
    return "\n".join(lines)


def _of_colours(pictures: dict[str, np.ndarray]) -> list[str]:
    """How alike the colours are of each of `pictures`, ``(Y, X, BGR)``."""
    at = " / ".join(f"{f:g}" for f in PER_PX)
    lines = [
        "How the colours of these pictures go with their green, and those of a virtual section "
        f"in focus: coherence, and amplitude over that of green, relative to {PER_PX[0]:g}, at "
        f"{at} periods a pixel.",
        "",
        "| picture | red, coherence | amplitude | blue, coherence | amplitude |",
        "|---|---|---|---|---|",
    ]
    for name, picture in pictures.items():
        cells = [
            " / ".join(f"{v:.2f}" for v in values)
            for colour in shared_with_green(picture)
            for values in colour
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def _of_sections(
    args: argparse.Namespace, model: OnnxModel, shots: list[np.ndarray], under: list[Place]
) -> list[str]:
    """What a photograph that is out of focus does, by `shots` of virtual sections.

    Each ``(len(OUT_UM), Y, X, RGB)``, brought under the lenses of the places `under`.
    """
    lines = [
        f"{len(shots)} virtual sections, photographed by a microscope such as this one, "
        "each under a lens of its own, in focus and out of it, and these photographs as "
        f"specimens under the lenses of {len(under)} of the fields above. That a photograph is "
        f"sharp says no more than that it was taken within the depth of field ({DOF_UM} µm).",
        "",
        "| photographed at | error at -0.5 | at 0 | at +0.5 | wrong direction |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for k, out in enumerate(OUT_UM):
            errors = []
            for j, shot in enumerate(shots):
                file = f"{folder}/{j}-{k}.png"
                cv2.imwrite(file, cv2.cvtColor(shot[k], cv2.COLOR_RGB2BGR))
                for place in under:
                    shown = replace(place, picture=file)
                    errors.append(_errors(model, VirtualStack(shown, SIDES_UM, args.frame)))
            cells = _near(np.array(errors), SIDES_UM)
            lines.append(f"| {out:+g} µm | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


def _of_halves(args: argparse.Namespace, model: OnnxModel) -> list[str]:
    """What a calibration curve mends, found on the one half of a picture for the other."""
    lines = [
        "The same pictures cut in halves, left and right. Each half as specimen without a "
        "calibration curve, and with that which `calibrate --fit-curve` finds by stacks of two "
        "fields of the other half under the same lens: nothing is shown twice.",
        "",
        "| picture | calibrated | n | MAE, µm | error at -0.5 | at 0 | at +0.5 "
        "| wrong direction |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = model.card
    found: dict[tuple[str, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for place in places(args.fields, args.data / "textures"):
            if not place.picture:
                continue
            picture = cv2.imread(place.picture)
            halves = []
            for k, half in enumerate(np.array_split(picture, 2, axis=1)):
                halves.append(f"{folder}/{k}-{Path(place.picture).name}")
                cv2.imwrite(halves[-1], half)
            for one, other in (halves, halves[::-1]):
                shown = VirtualStack(replace(place, picture=one), AT_UM, args.frame)
                # some halves leave no field with enough on it: then of no use here
                try:
                    shown.load()
                    fields = slide_stacks(replace(place, picture=other), side=args.frame)
                except InputError:
                    continue
                # it is told of the lens there, which is that of the other half, too
                found.setdefault((place.name, "no"), []).append(_errors(model, shown))
                fit = fit_curve(model, fields)
                if fit.helps:
                    model.card = plain.model_copy(update={"curve": fit.curve})
                found.setdefault((place.name, "yes"), []).append(_errors(model, shown))
                model.card = plain
            print(f"halves of {place.name}/{place.seed}, {place.sparsity}", flush=True)
    return [*lines, *_rows(dict(sorted(found.items())))]


def _rows(found: dict[tuple[str, str], list[list[float]]]) -> list[str]:
    """A line for each picture and what was done to it, of the errors at `AT_UM` of stacks."""
    lines = []
    for (name, what), each in found.items():
        errors = np.array(each)
        mean = number(float(np.nanmean(np.abs(errors))))
        cells = [name, what, str(errors.size), mean, *_near(errors, AT_UM)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _near(errors: np.ndarray, at_um: tuple[float, ...]) -> list[str]:
    """Of `errors` ``(stacks, planes)``: mean of each of `SIDES_UM`, and wrong directions."""
    z = np.array(at_um)
    means = [f"{np.nanmean(errors[:, z == at]):+.2f}" for at in SIDES_UM]
    right = np.sign(errors + z) == np.sign(z)
    wrong = ~right[:, z != 0]
    return [*means, f"{wrong.sum()} of {wrong.size}"]


def _errors(model: OnnxModel, stack: VirtualStack) -> list[float]:
    """Of each plane, in µm, told of the lens as it is; NaN: no answer."""
    assert model.card.lens is not None
    lens = drawn_at(stack.place).optics.lens
    model.net.lens = code_of(model.card.lens.ranges, lens)
    errors = []
    for z, plane in stack.planes():
        found = model.predict([plane], max_value=255).defocus_um
        errors.append(math.nan if found is None else found - z)
    return errors


def _stacks(args: argparse.Namespace) -> Iterator[tuple[Place, str, VirtualStack]]:
    """Each field as its picture is, and as it is changed."""
    with tempfile.TemporaryDirectory() as folder:
        for place in places(args.fields, args.data / "textures"):
            if not place.picture:
                continue
            for k, (what, change) in enumerate(SHOWN.items()):
                picture = place.picture
                if change is not None:
                    picture = f"{folder}/{k}-{Path(place.picture).name}"
                    if not Path(picture).is_file():
                        cv2.imwrite(picture, change(cv2.imread(place.picture)))
                yield (
                    place,
                    what,
                    VirtualStack(replace(place, picture=picture), AT_UM, args.frame),
                )
