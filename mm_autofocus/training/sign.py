"""Whether one image tells on which side of focus it was taken: a quick, held-out test.

A small net learns the sign of the defocus from labelled stacks and is asked about stacks of
fields that it has never seen. Each field is held out once. What could give the sign away
without being an image of it is taken out:

- the planes of a stack that count lie as far below focus as above it, so that far and below
  are not the same;
- each image is brought to mean 0 per colour and standard deviation 1, so that a specimen that
  bleaches, or a lamp that warms up, from plane to plane tells nothing;
- fields that overlap are held out together.

That nothing was found means little by itself. So the same net is given two looks at once,
the second a known way further up, where the sign is bound to be: if it succeeds there and
fails with one look, the sign is not in one image of these stacks, or is beyond a small net.

The confidence interval is Wilson's, for as many independent images as the images of a field
are worth: L. Kish, *Survey Sampling* (1965), § 8.2, with at least the correlation
`LEAST_CORRELATION` within a field; Student's quantile for few fields (E. Korn & B. Graubard,
*Surv. Methodol.* 24 (1998) 193–201).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from scipy.stats import t as student

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats: TypeAlias = npt.NDArray[np.float64]
    Ints: TypeAlias = npt.NDArray[np.intp]
    Bools: TypeAlias = npt.NDArray[np.bool_]

__all__ = ["LEAST_FIELDS", "Score", "Series", "SignTest", "interval", "sign_test"]

Verdict = Literal["yes", "no", "partly", "unsure"]

SUFFICES = 0.9
"""The sign is there if the lower end of the confidence interval is above this ..."""

CHANCE = 0.65
"""... and is not if the upper end is below this; or if the interval holds one half but not
`SUFFICES`."""

LEAST_FIELDS = 6
"""With fewer there is nothing to hold out."""

LEAST_CORRELATION = 0.1
"""Of right and wrong among the images of one field, where it cannot be seen from the data."""

_FOLDS = 3
_PATCH = 96
_BATCH = 32
_STEPS = {1: 280, 2: 160}  # by looks; two are learnt at once
_BANDS = ((1.0, 2.0), (2.0, 4.0), (4.0, math.inf))  # of |d|, in depths of field
_APART = 0.3  # of a plane's distance by which the second look may be off


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """A part of one labelled stack, followed through focus.

    Attributes
    ----------
    stack : int
        Number of the stack; several parts of one stack are judged together.
    group : str
        What is held out together: the field, or overlapping ones.
    defocus_um : numpy.ndarray
        ``(Z,)``, ascending, positive above focus.
    images : numpy.ndarray
        ``(Z, C, Y, X)``, any numbers.
    """

    stack: int
    group: str
    defocus_um: Floats
    images: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Score:
    """How often the sign was right on fields that were held out.

    Attributes
    ----------
    looks_um : tuple of float
        Offsets of the looks.
    accuracy : float
        Part of the images whose sign was right.
    low, high : float
        95 % confidence interval, by field.
    images, fields : int
        How many.
    near, middle, far : float | None
        Accuracy from 1 to 2, 2 to 4, and beyond 4 depths of field.
    """

    looks_um: tuple[float, ...]
    accuracy: float
    low: float
    high: float
    images: int
    fields: int
    near: float | None = None
    middle: float | None = None
    far: float | None = None

    @property
    def suffices(self) -> bool:
        """Whether the sign is surely there."""
        return self.low > SUFFICES

    @property
    def is_chance(self) -> bool:
        """Whether it was tossed for, or nearly."""
        return self.high < CHANCE or (self.low <= 0.5 and self.high < SUFFICES)


@dataclass(frozen=True, slots=True)
class SignTest:
    """The answer.

    Attributes
    ----------
    verdict : {"yes", "no", "partly", "unsure"}
        Whether the sign is in one image. ``partly``: better than chance, not enough to rely
        on. ``unsure``: two looks did not help either, or there was no test.
    reason : str
        One sentence for the operator.
    one : Score | None
        With one look.
    two : tuple of Score
        With two looks, by growing offset, up to the first that suffices.
    """

    verdict: Verdict
    reason: str
    one: Score | None = None
    two: tuple[Score, ...] = ()

    @property
    def looks_um(self) -> tuple[float, ...] | None:
        """The fewest and nearest looks that suffice; None if none of those tried do."""
        if self.verdict == "yes":
            return (0.0,)
        return next((s.looks_um for s in self.two if s.suffices), None)

    def to_json(self) -> dict[str, Any]:
        """Numbers and the verdict; ``looks_um`` is what is recommended."""
        document = asdict(self)
        looks = self.looks_um
        return document | {"looks_um": None if looks is None else list(looks)}


def sign_test(
    series: Sequence[Series],
    dof_um: float,
    offsets_um: Sequence[float] | None = None,
    *,
    seed: int = 0,
    steps: int | None = None,
    patch_px: int = _PATCH,
) -> SignTest:
    """Ask whether the sign of defocus is in one image.

    Parameters
    ----------
    series : sequence of Series
        Of at least `LEAST_FIELDS` fields.
    dof_um : float
        Depth of field: nearer to focus there is no sign to be asked for.
    offsets_um : sequence of float, optional
        Of the second look, to be tried one after the other; default 1, 2 and 4 depths
        of field, in whole plane distances.
    seed : int, optional
        The same seed and series give the same answer on one computer.
    steps : int, optional
        Training steps of each net.
    patch_px : int, optional
        Edge of what a net is shown.

    Returns
    -------
    SignTest
    """
    if find_spec("torch") is None:
        return SignTest("unsure", "the test needs torch: pip install mm-autofocus[train]")
    if not series or len({s.group for s in series}) < LEAST_FIELDS:
        fields = len({s.group for s in series})
        return SignTest(
            "unsure",
            f"{fields} labelled fields are too few to hold any out; {LEAST_FIELDS} at least",
        )
    test = _Test(series, dof_um, seed, steps, patch_px)
    one = test.score(0.0)
    if one is None:
        return SignTest(
            "unsure", "the stacks reach no further than a depth of field on both sides"
        )
    if one.suffices:
        return SignTest("yes", "one image tells the side of focus; one look suffices", one)
    two: list[Score] = []
    for offset in offsets_um if offsets_um is not None else _offsets(series, dof_um):
        score = test.score(float(offset))
        if score is not None:
            two.append(score)
            if score.suffices:
                break
    return SignTest(*_verdict(one, two), one, tuple(two))


def _verdict(one: Score, two: Sequence[Score]) -> tuple[Verdict, str]:
    best = next((s for s in two if s.suffices), None)
    if best is None:
        return "unsure", (
            "the side of focus was found neither from one look nor from two: "
            "the stacks may be too few, too noisy or wrongly labelled"
        )
    help_ = f"a second look at {best.looks_um[1]:+g} µm suffices"
    if one.is_chance:
        return "no", f"one image does not tell the side of focus; {help_}"
    if one.low <= 0.5:
        return "unsure", f"too few fields to tell what one image says; {help_}"
    return "partly", f"one image hints at the side of focus, not surely; {help_}"


def _offsets(series: Sequence[Series], dof_um: float) -> list[float]:
    """1, 2 and 4 depths of field in whole steps, at most a quarter of the range."""
    step = float(np.median([np.median(np.diff(s.defocus_um)) for s in series]))
    reach = float(np.median([s.defocus_um[-1] - s.defocus_um[0] for s in series]))
    most = max(int(reach / 4 / step), 1)
    counts = {min(max(round(m * dof_um / step), 1), most) for m in (1, 2, 4)}
    return [round(n * step, 3) for n in sorted(counts)]


def interval(right: Bools, groups: Sequence[str] | Ints) -> tuple[float, float, float]:
    """Part that is right and its 95 % confidence interval, by group; see the module.

    Returns
    -------
    part, low, high : float
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    n, k = len(right), int(index.max()) + 1
    sizes = np.bincount(index, minlength=k)
    p = float(right.mean())
    effect = 1 + (float((sizes**2).sum()) / n - 1) * LEAST_CORRELATION
    if 0 < p < 1 and k > 1:
        # variance of the ratio of totals over groups, against that of single images
        off = np.bincount(index, weights=right - p, minlength=k)
        effect = max(effect, float((off**2).sum()) * k / (k - 1) / (n * p * (1 - p)))
    worth = max(n / effect, 1.0)
    z = float(student.ppf(0.975, max(k - 1, 1)))
    middle = (p + z * z / (2 * worth)) / (1 + z * z / worth)
    half = z / (1 + z * z / worth) * math.sqrt(p * (1 - p) / worth + (z / (2 * worth)) ** 2)
    return p, max(0.0, middle - half), min(1.0, middle + half)


class _Test:
    """The series, and what is asked of them."""

    def __init__(
        self, series: Sequence[Series], dof_um: float, seed: int, steps: int | None, patch: int
    ) -> None:
        self.series, self.dof, self.seed, self.steps = series, dof_um, seed, steps
        self.patch = min(patch, *(n for s in series for n in s.images.shape[2:]))
        names = sorted({s.group for s in series})
        order = np.random.default_rng(seed).permutation(len(names))
        self.fold = {names[k]: i % _FOLDS for i, k in enumerate(order)}

    def score(self, offset_um: float) -> Score | None:
        """Held-out accuracy with one look (offset 0) or two; None without any image."""
        from mm_autofocus.training.sign_net import fit, predict, quiet_torch

        rows = self._rows(offset_um)
        if len({self.series[s].group for s, *_ in rows}) < LEAST_FIELDS:
            return None
        looks = 2 if offset_um else 1
        channels = self.series[0].images.shape[1] * looks
        steps = self.steps or _STEPS[looks]
        index = np.array([r[:3] for r in rows], np.intp)
        d = np.array([r[3] for r in rows])
        fold = np.array([self.fold[self.series[s].group] for s, *_ in rows])
        logit = np.zeros(len(rows))
        for k in range(_FOLDS):
            rng = np.random.default_rng([self.seed, k])
            learn = _balanced(np.flatnonzero(fold != k), d)
            asked = np.flatnonzero(fold == k)

            def draw(
                rng: np.random.Generator = rng, learn: tuple[Ints, Ints] = learn
            ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
                sides = rng.integers(0, 2, _BATCH)
                chosen = [int(rng.choice(learn[s])) for s in sides]
                x = np.stack([self._cut(index[i], rng) for i in chosen])
                return x, sides.astype(np.float32)

            with quiet_torch(self.seed + k):
                net = fit(draw, channels, steps)
                for part in np.array_split(asked, max(len(asked) // 256, 1)):
                    for corner in range(4):
                        x = np.stack([self._cut(index[i], corner) for i in part])
                        logit[part] += predict(net, x)
        return self._judge(rows, logit, (0.0, offset_um) if offset_um else (0.0,))

    def _rows(self, offset_um: float) -> list[tuple[int, int, int, float]]:
        """Series, plane, plane of the second look, and defocus of each question."""
        rows: list[tuple[int, int, int, float]] = []
        for s, one in enumerate(self.series):
            z = one.defocus_um
            apart = np.abs(z[None, :] - z[:, None] - offset_um)
            second = apart.argmin(1)
            there = apart.min(1) <= _APART * float(np.median(np.diff(z)))
            if not there.any():
                continue
            reach = min(-z[there].min(), z[there].max())
            for i in np.flatnonzero(there & (np.abs(z) >= self.dof) & (np.abs(z) <= reach)):
                rows.append((s, int(i), int(second[i]), float(z[i])))
        return rows

    def _cut(self, row: Ints, how: np.random.Generator | int) -> npt.NDArray[np.float32]:
        """A patch of all looks, ``(C, P, P)``; maybe upside down, or one of four corners."""
        s, i, j = row
        images = self.series[s].images
        free = [n - self.patch for n in images.shape[2:]]
        if isinstance(how, int):
            y, x = free[0] * (how % 2), free[1] * (how // 2)
        else:
            y, x = (int(how.integers(0, n + 1)) for n in free)
        window = np.s_[..., y : y + self.patch, x : x + self.patch]
        planes = [images[i][window]] if i == j else [images[i][window], images[j][window]]
        normal = []
        for plane in planes:
            a = plane.astype(np.float32)
            a = a - a.mean((1, 2), keepdims=True)
            normal.append(a / max(float(a.std()), 1e-6))
        a = np.concatenate(normal)
        if isinstance(how, int):
            return a
        # by half a turn only: any other one, and a flip, would undo what astigmatism tells
        return np.ascontiguousarray(a[:, ::-1, ::-1]) if how.random() < 0.5 else a

    def _judge(
        self,
        rows: Sequence[tuple[int, int, int, float]],
        logit: Floats,
        looks_um: tuple[float, ...],
    ) -> Score:
        """Parts of one frame decide together."""
        frames: dict[tuple[int, int], int] = {}
        for s, i, *_ in rows:
            frames.setdefault((self.series[s].stack, i), len(frames))
        which = np.array([frames[self.series[s].stack, i] for s, i, *_ in rows])
        total = np.bincount(which, weights=logit)
        d = np.zeros(len(frames))
        groups = np.empty(len(frames), object)
        for (s, _, _, d_um), w in zip(rows, which, strict=True):
            d[w], groups[w] = d_um, self.series[s].group
        right = (total > 0) == (d > 0)
        bands: list[float | None] = []
        for low, high in _BANDS:
            inside = (np.abs(d) >= low * self.dof) & (np.abs(d) < high * self.dof)
            bands.append(float(right[inside].mean()) if inside.any() else None)
        part, low, high = interval(right, [str(g) for g in groups])
        return Score(looks_um, part, low, high, len(right), len(set(groups)), *bands)


def _balanced(rows: Ints, d: Floats) -> tuple[Ints, Ints]:
    """Rows below and above focus."""
    return rows[d[rows] < 0], rows[d[rows] > 0]
