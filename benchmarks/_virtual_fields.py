"""Hill-climb on the virtual slide, judged by the focus that the simulator knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mm_autofocus.api import autofocus
from mm_autofocus.config import close_core, open_core
from mm_autofocus.sim.truth import geometric_focus_um, measured_focus_um, microscope_of

STARTS_UM = (-10.0, -4.0, 5.0, 12.0)
KINDS = ("dense", "sparse", "extremely-sparse")
SETTINGS: dict[str, Any] = {
    "na": 0.75,
    "magnification": 20.0,
    "range_um": 15.0,
    "backlash_um": 1.0,
    "repeatability_um": 0.15,
}


@dataclass(frozen=True)
class Run:
    """One search: what it said, and the true defocus (µm) of the frame taken after it."""

    seed: int
    kind: str
    field: int
    start_um: float
    status: str
    reason: str
    looks: int
    expected_um: float | None
    defocus_um: float | None
    dof_um: float
    curve: tuple[tuple[float, float], ...]
    truth_um: float | None

    @property
    def error_um(self) -> float:
        """Absolute defocus of the frame."""
        return abs(self.defocus_um) if self.defocus_um is not None else float("nan")

    @property
    def false_ok(self) -> bool:
        """Called ``ok``, and out of focus by more than the depth of field, or blank."""
        return self.status == "ok" and not self.error_um <= self.dof_um


def runs(
    seed: int,
    fields: int,
    blank: int = 20,
    starts: Sequence[float] = STARTS_UM,
    **settings: Any,
) -> list[Run]:
    """Search from each start in `fields` fields of each kind, and in `blank` blank ones."""
    core = open_core("virtual_slide.cfg")
    try:
        core.setProperty("Slide", "seed", seed)
        scope = microscope_of(core)
        stage, done = core.getFocusDevice(), []
        for kind in (*KINDS, "blank"):
            count = blank if kind == "blank" else fields
            if not count:
                continue
            side = 512 * core.getPixelSizeUm()
            for n, (x, y) in enumerate(scope.slide.find_fields(kind, count, (side, side))):
                core.setXYPosition(x, y)
                core.waitForDevice(core.getXYStageDevice())
                view = scope.view(*scope.true_xy_um())
                truth = measured_focus_um(scope, view=view)
                middle = geometric_focus_um(scope, view=view)
                for start in starts:
                    core.setZPosition(middle + start)
                    core.waitForDevice(stage)
                    result = autofocus(core, **{**SETTINGS, **settings})
                    core.snapImage()
                    z = scope.exposures[-1].z_um
                    done.append(
                        Run(
                            seed,
                            kind,
                            n,
                            start,
                            result.status,
                            result.reason,
                            result.looks,
                            result.expected_error_um,
                            None if truth is None else z - truth,
                            view.dof_um,
                            result.curve,
                            truth,
                        )
                    )
        return done
    finally:
        close_core(core)


HEAD = (
    "| fields | runs | looks (mean) | most | off focus, median µm | 95 % | worst "
    "| within DoF/2 | within DoF | status | false ok |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(name: str, found: Iterable[Run]) -> str:
    """One line of the table."""
    found = list(found)
    looks = [r.looks for r in found]
    said = ", ".join(f"{n} {s}" for s, n in Counter(r.status for r in found).most_common())
    cells = ["–"] * 5
    if any(r.defocus_um is not None for r in found):
        # a search that failed left the stage at its start: that frame counts, too
        error = np.array([r.error_um for r in found])
        dof = np.array([r.dof_um for r in found])
        cells = [f"{v:.2f}" for v in (np.median(error), np.percentile(error, 95), error.max())]
        cells += [f"{100 * np.mean(error <= part * dof):.1f} %" for part in (0.5, 1.0)]
    return (
        f"| {name} | {len(found)} | {np.mean(looks):.2f} | {max(looks)} | {' | '.join(cells)} "
        f"| {said} | {sum(r.false_ok for r in found)} |"
    )


def table(found: Sequence[Run]) -> str:
    """Errors by kind of field, and whether the expected errors were right."""
    tissue = [r for r in found if r.kind != "blank"]
    lines = [HEAD, row("all but blank", tissue)]
    for kind in (*KINDS, "blank"):
        if of_kind := [r for r in found if r.kind == kind]:
            lines.append(row(kind, of_kind))
    lines += [
        "",
        "| expected error, of | runs | median of it, µm | error ÷ expected, median | 68 % "
        "| 95 % | within 1 × | within 2 × | within 3 × |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    sure = [r for r in tissue if r.expected_um]
    for name, some in (
        ("all found", sure),
        ("`ok`", [r for r in sure if r.status == "ok"]),
        ("`low-confidence`", [r for r in sure if r.status != "ok"]),
    ):
        if not some:
            continue
        expected = np.array([r.expected_um for r in some], float)
        ratio = np.array([r.error_um for r in some]) / expected
        quantiles = " | ".join(f"{np.percentile(ratio, q):.2f}" for q in (50, 68, 95))
        within = " | ".join(f"{100 * np.mean(ratio <= k):.0f} %" for k in (1, 2, 3))
        lines.append(
            f"| {name} | {len(some)} | {np.median(expected):.2f} | {quantiles} | {within} |"
        )
    return "\n".join(lines)
