"""A model that recovers the sharp image, judged by shots whose truth is known.

PSNR and SSIM of whole frames against the truth (scikit-image), of the model, of other models
and of what needs no learning, all on the same pairs; and whether the model knows where focus
is, and when the shots do not enclose it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from mm_autofocus.errors import InputError
from mm_autofocus.training import merit
from mm_autofocus.training.label import SPARSITIES
from mm_autofocus.training.refocus_baselines import SHARPER, as_frame, need_images, two_shots

if TYPE_CHECKING:
    from mm_autofocus.models.refocus import Recovery, RefocusModel
    from mm_autofocus.training.refocus_baselines import Baseline
    from mm_autofocus.training.refocus_cases import Case
    from mm_autofocus.types import Image

__all__ = [
    "MIDDLE_EDGES_UM",
    "NOT_ENCLOSED",
    "PairRow",
    "RefocusEvaluation",
    "evaluate_refocus",
    "psnr_db",
    "ssim",
]

MIDDLE_EDGES_UM = (0.0, 0.5, 1.0, 1.5, 2.51)
"""Of the bins of how far the middle of the shots is from focus."""

NOT_ENCLOSED = "the shots do not enclose the focus"
"""How the reason of a model begins that says so."""

_MOST_DB = 100.0  # two images that are the same
_FAR_UM = 0.5  # so far beyond a shot, focus should be noticed to be
_WORSE_DB = 0.01  # what two ways of rounding may differ by


def psnr_db(image: Image, truth: Image, max_value: float) -> float:
    """Peak signal-to-noise ratio of a whole frame, all channels together; 100 at most."""
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        found: Any = peak_signal_noise_ratio
        return min(float(found(truth, image, data_range=max_value)), _MOST_DB)


def ssim(image: Image, truth: Image, max_value: float) -> float:
    """Structural similarity (windows of 7²), the mean of the channels."""
    from skimage.metrics import structural_similarity

    found: Any = structural_similarity
    axis = -1 if image.ndim == 3 else None
    return float(found(truth, image, data_range=max_value, channel_axis=axis))


@dataclass(frozen=True, slots=True)
class PairRow:
    """What came of one pair of shots.

    Attributes
    ----------
    field, sparsity : str
        Where.
    asked_um : float
        Half distance (ΔD) that was asked for.
    lower_um, upper_um, truth_um : float
        Defocus of the shots and of the truth.
    psnr_db, ssim : dict
        Of each method.
    focus_um, focus_sd_um : float | None
        Where the model says that focus is, relative to the middle of the shots.
    reasons : tuple of str
        Why the model says that it is not to be trusted.
    """

    field: str
    sparsity: str
    asked_um: float
    lower_um: float
    upper_um: float
    truth_um: float
    psnr_db: Mapping[str, float]
    ssim: Mapping[str, float]
    focus_um: float | None = None
    focus_sd_um: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def middle_um(self) -> float:
        """Defocus of the middle of the shots."""
        return (self.upper_um + self.lower_um) / 2

    @property
    def enclosed(self) -> bool:
        """Whether focus lies between the shots, by the label."""
        return self.lower_um <= 0 <= self.upper_um

    @property
    def beyond_um(self) -> float:
        """How far focus lies beyond the nearer shot; 0 if they enclose it."""
        return max(self.lower_um, -self.upper_um, 0.0)

    @property
    def flagged(self) -> bool:
        """Whether the model says that the shots do not enclose focus."""
        return any(r.startswith(NOT_ENCLOSED) for r in self.reasons)


@dataclass
class RefocusEvaluation:
    """A model and what it has to beat, on the same pairs.

    Attributes
    ----------
    name : str
        Of the model, as it stands among the methods.
    methods : list of str
        The model, other models, baselines; ``sharper`` among them.
    rows : list of PairRow
        One per pair.
    megapixels_per_s : float | None
        What the model recovered in a second.
    about : dict
        Where all this comes from.
    notes : list of str
        What a reader must know before believing the figures, one sentence each.
    """

    name: str
    methods: list[str]
    rows: list[PairRow] = field(default_factory=list)
    megapixels_per_s: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def halves_um(self) -> list[float]:
        """Half distances, the smallest first."""
        return sorted({r.asked_um for r in self.rows})

    def at(self, half_um: float) -> list[PairRow]:
        """Rows of one half distance."""
        return [r for r in self.rows if r.asked_um == half_um]

    def to_json(self) -> dict[str, Any]:
        """The document that ``mm-autofocus evaluate --json`` prints."""
        own = figures(self.rows, self.name)
        off = [abs(r.truth_um) for r in self.rows]
        return {
            **self.about,
            "psnr_db": own["psnr_db"],
            "psnr_identity_db": figures(self.rows, SHARPER)["psnr_db"],
            "ssim": own["ssim"],
            "ssim_identity": figures(self.rows, SHARPER)["ssim"],
            "pairs": len(self.rows),
            "fields": len({r.field for r in self.rows}),
            "megapixels_per_s": self.megapixels_per_s,
            "half_um": self.halves_um,
            "methods": {name: self._method(name) for name in self.methods},
            "gain_over": {
                name: {
                    **gain(self.rows, self.name, name),
                    "by_half_um": {
                        f"{h:g}": gain(self.at(h), self.name, name) for h in self.halves_um
                    },
                }
                for name in self.methods
                if name != self.name
            },
            "focus": focus_figures(self.rows),
            "flags": flags(self.rows),
            "truth_off_um": {"mean": float(np.mean(off)), "most": float(max(off))},
            "worst": [_worst(r, self.name) for r in worst(self.rows, self.name)],
            "notes": self.notes,
        }

    def _method(self, name: str) -> dict[str, Any]:
        rows = self.rows
        enclosed = [r for r in rows if r.enclosed]
        out = [r for r in rows if not r.enclosed]
        return {
            **figures(rows, name),
            "by_half_um": {f"{h:g}": figures(self.at(h), name) for h in self.halves_um},
            "by_sparsity": {
                c.replace("-", "_"): figures(some, name)
                for c in SPARSITIES
                if (some := [r for r in rows if r.sparsity == c])
            },
            "enclosed": figures(enclosed, name),
            "not_enclosed": figures(out, name),
            "by_middle_um": [
                {"from_um": a, "to_um": round(b, 1), **figures(some, name)}
                for a, b in pairwise(MIDDLE_EDGES_UM)
                if (some := [r for r in rows if a <= abs(r.middle_um) < b])
            ],
        }


# ------------------------------------------------------------------------------ figures


def figures(rows: Sequence[PairRow], name: str) -> dict[str, Any]:
    """Mean and spread of a method over pairs; None where there are none."""
    if not rows:
        return {
            "n": 0,
            **dict.fromkeys(("psnr_db", "psnr_std_db", "ssim", "ssim_std", "gain_db", "worse")),
        }
    psnr = np.array([r.psnr_db[name] for r in rows])
    alike = np.array([r.ssim[name] for r in rows])
    before = np.array([r.psnr_db[SHARPER] for r in rows])
    return {
        "n": len(rows),
        "psnr_db": float(psnr.mean()),
        "psnr_std_db": float(psnr.std()),
        "ssim": float(alike.mean()),
        "ssim_std": float(alike.std()),
        "gain_db": float((psnr - before).mean()),
        "worse": float(np.mean(psnr < before - _WORSE_DB)),
    }


def gain(rows: Sequence[PairRow], name: str, over: str) -> dict[str, Any]:
    """Mean gain in dB of one method over another, pair by pair, and its 95 % interval.

    The interval by drawing fields (bootstrap); None with fewer than three.
    """

    def mean(some: Sequence[PairRow]) -> float | None:
        if not some:
            return None
        return float(np.mean([r.psnr_db[name] - r.psnr_db[over] for r in some]))

    between = merit.interval(rows, mean)
    return {"gain_db": mean(rows), "interval_db": None if between is None else list(between)}


def focus_figures(rows: Sequence[PairRow]) -> dict[str, Any] | None:
    """How well the model knows where focus is; None if it does not tell."""
    told = [
        merit.Row(k, r.field, r.sparsity, 0, -r.middle_um, r.focus_um, r.focus_sd_um, r.reasons)
        for k, r in enumerate(rows)
        if r.focus_um is not None
    ]
    if not told:
        return None
    found = merit.merit(told, None)
    keys = ("n", "mae_um", "mae_std_um", "median_um", "bias_um", "direction_success")
    inside = [t for t in told if rows[t.stack].enclosed]
    return {
        **{key: found[key] for key in keys},
        "mae_enclosed_um": merit.merit(inside, None)["mae_um"],
        "calibration": merit.calibration(told),
    }


def flags(rows: Sequence[PairRow]) -> dict[str, Any]:
    """How many pairs that do not enclose focus were flagged, and how many others."""
    out = [r for r in rows if not r.enclosed]
    far = [r for r in out if r.beyond_um > _FAR_UM]
    inside = [r for r in rows if r.enclosed]
    seen = [merit.Row(0, r.field, r.sparsity, 0, 0.0, 0.0, None, r.reasons) for r in rows]
    return {
        "enclosed": len(inside),
        "enclosed_flagged": sum(r.flagged for r in inside),
        "not_enclosed": len(out),
        "not_enclosed_flagged": sum(r.flagged for r in out),
        "far_um": _FAR_UM,
        "not_enclosed_far": len(far),
        "not_enclosed_far_flagged": sum(r.flagged for r in far),
        "distrusted": sum(bool(r.reasons) for r in rows),
        "distrusted_because": merit.coverage(seen)["flagged_because"],
    }


def worst(rows: Sequence[PairRow], name: str, n: int = 8) -> list[PairRow]:
    """Pairs in which the method gained least over the sharper shot, the worst first."""
    return sorted(rows, key=lambda r: r.psnr_db[name] - r.psnr_db[SHARPER])[:n]


def _worst(r: PairRow, name: str) -> dict[str, Any]:
    return {
        "field": r.field,
        "half_um": r.asked_um,
        "lower_um": r.lower_um,
        "upper_um": r.upper_um,
        "psnr_db": r.psnr_db[name],
        "psnr_identity_db": r.psnr_db[SHARPER],
        "reasons": list(r.reasons),
    }


# ------------------------------------------------------------------------------ judging


def evaluate_refocus(
    model: RefocusModel,
    cases: Iterable[Case],
    baselines: Mapping[str, Baseline],
    *,
    others: Mapping[str, RefocusModel] | None = None,
    name: str = "",
    watch: Callable[[Case, Mapping[str, Image], PairRow], None] | None = None,
) -> RefocusEvaluation:
    """Judge a model, other models and baselines on the same shots.

    Parameters
    ----------
    model : RefocusModel
        The model.
    cases : iterable of Case
        Shots with their truth; they may be made as they are asked for.
    baselines : mapping
        Name → baseline; ``sharper`` must be among them.
    others : mapping, optional
        Name → another model.
    name : str, optional
        Of the model in the table; default: that of its card.
    watch : callable, optional
        Called with each case, the image of each method as the camera would have given it
        (``sharper`` is the shot itself), and the row.

    Raises
    ------
    InputError
        No case; shots that a model cannot be shown; scikit-image is missing.
    """
    need_images()
    name = name or model.card.name
    models = {name: model, **(others or {})}
    found = RefocusEvaluation(name, [*models, *baselines])
    if len(set(found.methods)) < len(models) + len(baselines):
        raise InputError(
            f"evaluate: two methods have the same name: {', '.join(found.methods)}"
        )
    seconds, pixels = 0.0, 0
    for case in cases:
        images: dict[str, Any] = {}
        told: dict[str, Recovery] = {}
        for who, other in models.items():
            start = time.perf_counter()
            told[who] = other.recover(
                case.lower,
                case.upper,
                half_um=case.half_um,
                max_value=case.max_value,
                pixel_size_um=case.optics.pixel_size_um,
            )
            if who == name:
                seconds += time.perf_counter() - start
                pixels += math.prod(case.lower.shape[:2])
            images[who] = told[who].image
        shots = two_shots(case.lower, case.upper, case.half_um, case.optics, case.max_value)
        dtype = case.lower.dtype.name
        for who, baseline in baselines.items():
            images[who] = as_frame(baseline(shots), case.max_value, dtype)
        own = told[name]
        row = PairRow(
            case.field,
            case.sparsity,
            case.asked_um,
            case.lower_um,
            case.upper_um,
            case.truth_um,
            {k: psnr_db(i, case.truth, case.max_value) for k, i in images.items()},
            {k: ssim(i, case.truth, case.max_value) for k, i in images.items()},
            own.focus_um,
            own.focus_sd_um,
            own.reasons,
        )
        found.rows.append(row)
        if watch is not None:
            watch(case, images, row)
    if not found.rows:
        raise InputError(
            f"model {model.card.name!r}: no two planes of the stacks lie as its shots do "
            f"({model.shots.half_um[0]:g} … {model.shots.half_um[1]:g} µm from their middle)"
        )
    found.megapixels_per_s = pixels / 1e6 / seconds if seconds else None
    return found
