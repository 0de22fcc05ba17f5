"""What records say beside their focus: models, their proof, the shadow, and two shots.

Works on the records of a run as well as on those read from a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mm_autofocus.errors import InputError
from mm_autofocus.ometiff import FileRecord, FocusRecord
from mm_autofocus.types import Optics

__all__ = ["ShadowSummary", "cells", "columns", "facts", "shadow_of", "summary"]

Record = Mapping[str, Any]

_WORST = 5


def cells(record: Record) -> dict[str, Any]:
    """What a table shows of one record's details, by the keys that `columns` names."""
    details = record.get("details") or {}
    told: dict[str, Any] = next(iter(details.get("predictions") or ()), {})
    shadow = details.get("shadow") or {}
    shots = details.get("two_shot") or {}
    sharper = shots.get("sharper")
    found = {
        "predicted_um": told.get("defocus_um"),
        "patches": told.get("content"),
        "ood": told.get("ood"),
        "proof": None,
        "shadow_um": shadow.get("disagreement_um"),
        "shadow_status": shadow.get("status"),
        "age_tiles": shots.get("age_tiles"),
        "sharper": None if sharper is None else ("lower", "upper")[sharper],
    }
    if (verified := record.get("verified")) is not None:
        again = record.get("corrections") or 0
        found["proof"] = ("yes" if verified else "no") + (f", {again} again" if again else "")
    return found


def columns(records: Iterable[Record]) -> list[tuple[str, str]]:
    """Heading and key of the columns that these records have something for."""
    rows = [cells(record) for record in records]
    named = (
        ("d", "predicted_um"),
        ("patches", "patches"),
        ("ood", "ood"),
        ("verified", "proof"),
        ("shadow Δ", "shadow_um"),
        ("shadow", "shadow_status"),
        ("F, tiles ago", "age_tiles"),
        ("sharper", "sharper"),
    )
    return [(head, key) for head, key in named if any(row[key] is not None for row in rows)]


def facts(records: Sequence[Record]) -> list[str]:
    """One sentence per model, and one on two shots: how often asked, what the frames said."""
    by_model: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        details = record.get("details") or {}
        if "model" in details:
            key = (str(details["model"]), str(details.get("model_sha256", "")))
            by_model.setdefault(key, []).append(record)
    lines = []
    for (model, sha256), its in by_model.items():
        clauses = [
            f"{len(its)} searches",
            f"{sum(r['looks'] for r in its) / len(its):.2f} looks each",
        ]
        judged = [r for r in its if r.get("verified") is not None]
        if judged:
            good = sum(r["verified"] for r in judged)
            again = sum(r.get("corrections") or 0 for r in judged)
            clauses.append(f"{good} of {len(judged)} verified by their frame")
            clauses.append(f"{again} frames taken again")
        lines.append(f"model {model} ({sha256}): {', '.join(clauses)}")
    return [*lines, *_two_shot_facts(records)]


def _two_shot_facts(records: Sequence[Record]) -> list[str]:
    told = [t for r in records if (t := (r.get("details") or {}).get("two_shot"))]
    if not told:
        return []
    found = sum(t["age_tiles"] == 0 for t in told)
    sharper = [t["sharper"] for t in told]
    return [
        f"two shots at F ± {told[0]['delta_um']:g} µm: {len(told)} tiles, F found at {found} "
        f"of them; the lower shot is the sharper one at {sharper.count(0)}, the upper one at "
        f"{sharper.count(1)}"
    ]


@dataclass(frozen=True, slots=True)
class ShadowSummary:
    """How a model agrees with the strategy that it watched.

    Attributes
    ----------
    strategy, model, model_sha256 : str
        Who watched.
    n : int
        Searches that it watched.
    predicted : int
        Of these it told a z.
    compared : int
        Of these the strategy in charge found one, too.
    sure : int
        Of these it would have been ``ok``.
    mean_um : float | None
        Mean absolute disagreement.
    dof_um : float | None
        Depth of field, if it is known.
    within_dof : int | None
        How many agree within it.
    same_way : (int, int)
        How many would have gone the same way, and of how many that can be told.
    missed, found : int
        How many it could not tell where the strategy in charge found focus; and the other
        way round.
    worst : tuple of (str, float)
        Position and disagreement in µm of the tiles that it disagrees most on.
    """

    strategy: str
    model: str
    model_sha256: str
    n: int
    predicted: int
    compared: int
    sure: int
    mean_um: float | None
    dof_um: float | None
    within_dof: int | None
    same_way: tuple[int, int]
    missed: int
    found: int
    worst: tuple[tuple[str, float], ...]

    def sentence(self) -> str:
        """As a lab reads it that is to decide whether to switch."""
        clauses = [f"{self.predicted} of {self.n} predicted"]
        if self.compared:
            assert self.mean_um is not None
            clauses.append(f"mean disagreement {self.mean_um:.2f} µm")
            if self.within_dof is not None:
                clauses.append(
                    f"{self.within_dof} of {self.compared} within {self.dof_um:.3g} µm"
                )
            clauses.append(f"{self.sure} of {self.compared} would have been ok")
            agree, of = self.same_way
            if of:
                clauses.append(f"{agree} of {of} the same way")
        if self.missed:
            clauses.append(f"{self.missed} where it alone could not tell")
        if self.found:
            clauses.append(f"{self.found} where it alone could")
        if self.worst:
            worst = ", ".join(f"{name} {value:+.2f}" for name, value in self.worst)
            clauses.append(f"worst: {worst} µm")
        return f"shadow: {self.strategy} with {self.model}: {'; '.join(clauses)}"

    def to_json(self) -> dict[str, Any]:
        """As ``mm-autofocus inspect --json`` prints it."""
        return asdict(self)


def summary(
    focuses: Sequence[Record | FocusRecord], *, dof_um: float | None = None
) -> ShadowSummary | None:
    """Sum up what a shadow saw; None if there was none.

    Parameters
    ----------
    focuses : sequence
        The searches.
    dof_um : float, optional
        Depth of field, in µm.
    """
    records = [f if isinstance(f, Mapping) else _as_record(f) for f in focuses]
    pairs = [(r, shadow) for r in records if (shadow := r["details"].get("shadow"))]
    if not pairs:
        return None
    who = pairs[0][1]
    both = [(r, s) for r, s in pairs if s.get("disagreement_um") is not None]
    apart = [abs(s["disagreement_um"]) for _, s in both]
    ways = [s["same_way"] for _, s in both if s.get("same_way") is not None]
    worst = sorted(both, key=lambda pair: -abs(pair[1]["disagreement_um"]))[:_WORST]
    found = [r["status"] != "failed" for r, _ in pairs]
    told = [s.get("z_um") is not None for _, s in pairs]
    return ShadowSummary(
        strategy=who["strategy"],
        model=who["model"],
        model_sha256=who["model_sha256"],
        n=len(pairs),
        predicted=sum(told),
        compared=len(both),
        sure=sum(s["status"] == "ok" for _, s in both),
        mean_um=sum(apart) / len(apart) if apart else None,
        dof_um=dof_um,
        within_dof=None if dof_um is None else sum(a <= dof_um for a in apart),
        same_way=(sum(ways), len(ways)),
        missed=sum(f and not t for f, t in zip(found, told, strict=True)),
        found=sum(t and not f for f, t in zip(found, told, strict=True)),
        worst=tuple((r["position"], s["disagreement_um"]) for r, s in worst),
    )


def shadow_of(record: FileRecord) -> ShadowSummary | None:
    """Sum up the shadow of a file, with the depth of field that its settings give."""
    s = record.settings or {}
    pixels = [image.pixel_size_um for image in record.images if image.pixel_size_um]
    known = {k: s[k] for k in ("na", "wavelength_um", "refractive_index") if s.get(k)}
    try:
        optics = Optics(**known, pixel_size_um=pixels[0] if pixels else None)
    except (InputError, TypeError):  # settings of another program
        optics = Optics()
    return summary(record.focus, dof_um=optics.dof_um)


def _as_record(focus: FocusRecord) -> Record:
    return {"position": focus.position, "status": focus.status, "details": focus.details}
