"""The report of an evaluation shows what there is, also of a model that says little."""

from __future__ import annotations

import re
from functools import cache

import cv2
import numpy as np
import pytest
from mm_autofocus.errors import InputError
from mm_autofocus.training.evaluate import Evaluation, Judged
from mm_autofocus.training.evaluation_report import plots, report_page
from mm_autofocus.training.evaluation_table import HEADS, cells, share, table_of
from mm_autofocus.training.merit import Row, merit

from judged import Memory

CLASSES = ("dense", "sparse", "extremely-sparse")


def found(
    *, sd: bool = True, predicted: bool = True, classes: int = 3, dof_um: float | None = 1.0
) -> Evaluation:
    """Errors of ±0.1, ±0.3 and ±0.9 µm over ±10 µm, one wild one."""
    rows = []
    for i in range(classes):
        for k, d in enumerate(np.linspace(-10, 10, 21)):
            error = 0.1 * 3**i * (-1) ** k
            p = float(d + error) if predicted else None
            rows.append(Row(i, f"slide/<{i}>", CLASSES[i], k, float(d), p, 0.5 if sd else None))
    if predicted:
        rows.append(Row(0, "slide/<0>", "dense", 3, -7.0, 9.0, 0.5 if sd else None))
    zero = Judged([Row(r.stack, r.field, r.sparsity, r.plane, r.true_um, 0.0) for r in rows])
    about = {"model": "a<b", "dataset": "d", "part": "test"}
    return Evaluation(
        Judged(rows), {"zero": zero}, dof_um, stacks=classes, about=about, notes=["look <out>"]
    )


STACKS = [
    Memory(f"slide/<{i}>", c, z_um=np.linspace(-10, 10, 21)) for i, c in enumerate(CLASSES)
]


def decode(data: bytes) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))


def colour_share(picture: np.ndarray, rgb: tuple[int, int, int]) -> float:
    near = np.abs(picture[..., ::-1].astype(int) - rgb).max(axis=-1) < 12
    return float(near.mean())


@cache
def drawn() -> dict[str, bytes]:
    return plots(found())


def test_every_class_has_its_colour_in_the_plots() -> None:
    assert set(drawn()) == {"regression", "error", "reliability"}
    colours = {"dense": (27, 108, 168), "sparse": (42, 127, 79), "few": (179, 38, 30)}
    picture = decode(drawn()["error"])
    for rgb in colours.values():
        assert colour_share(picture, rgb) > 1e-4
    one = plots(found(classes=1))
    assert colour_share(decode(one["error"]), colours["dense"]) > 1e-4
    assert colour_share(decode(one["error"]), colours["few"]) < 1e-4
    # a panel for each class
    widths = [decode(p["regression"]).shape[1] for p in (one, drawn())]
    assert widths[0] < 0.6 * widths[1]


@pytest.mark.parametrize(
    ("why", "kwargs", "names"),
    [
        ("no expected errors", {"sd": False}, {"regression", "error"}),
        ("one class", {"classes": 1}, {"regression", "error", "reliability"}),
        ("no depth of field", {"dof_um": None}, {"regression", "error", "reliability"}),
        ("no prediction at all", {"predicted": False}, {"regression", "error"}),
    ],
)
def test_what_is_not_known_is_left_out(why, kwargs, names) -> None:
    evaluation = found(**kwargs)
    pictures = plots(evaluation)
    assert set(pictures) == names, why
    text = report_page(evaluation, pictures, STACKS)
    assert text.count('class="plot"') == len(names)
    words = re.sub(r"<[^>]*>", " ", text.partition("<h1")[2]).partition("Figures  ")[0]
    assert "MAE ± SD" in words
    assert not re.search(r"\b(nan|None|inf)\b", words)


def test_the_page_stands_alone_and_escapes() -> None:
    evaluation = found()
    text = report_page(evaluation, drawn(), STACKS)
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "a&lt;b" in text
    assert "look &lt;out&gt;" in text
    assert "slide/&lt;2&gt;" in text
    for head in HEADS:
        assert head in text
    assert "+9.00 µm instead of -7.00 µm" in text  # the worst, first
    assert text.index("+9.00 µm instead") < text.index("instead of", text.index("+9.00") + 30)


def test_the_worst_frames_are_shown_beside_the_sharp_ones() -> None:
    evaluation = found()
    text = report_page(evaluation, drawn(), STACKS)
    shown = len(re.findall(r'title="as seen"', text))
    assert shown == len(re.findall(r'title="in focus"', text)) == 6  # two of each field

    class Gone(Memory):
        def plane(self, k):
            raise InputError("the file is gone")

    gone = report_page(evaluation, drawn(), [Gone(z_um=np.linspace(-10, 10, 21))] * 3)
    assert "as seen" not in gone
    assert "+9.00 µm instead of -7.00 µm" in gone


def test_the_table_has_all_fields_then_each_class() -> None:
    rows = table_of(found())
    assert {len(r) for r in rows} == {len(HEADS)}
    assert [(r[0], r[1]) for r in rows[:4]] == [
        ("a<b", "all"),
        ("zero", "all"),
        ("a<b", "dense"),
        ("zero", "dense"),
    ]
    assert rows[1][HEADS.index("direction")] == "–"  # predicting 0 is no direction
    sparse = next(r for r in rows if r[:2] == ["a<b", "sparse"])
    assert sparse[HEADS.index("MAE ± SD, µm")] == "0.30 ± 0.00"
    assert len(table_of(found(classes=1))) == 2


def test_a_percent_is_100_only_if_all_are_right() -> None:
    assert share(1.0) == "100.0 %"
    assert share(0.99999) == "99.9 %"
    assert share(None) == "–"


def test_a_row_of_nothing_has_dashes() -> None:
    assert cells(merit([Row(0, "f", "dense", 0, 1.0, None)], None))[2:7] == ["–"] * 5
