"""The sign test: it finds the sign where it is, not where it is not, and says how surely."""

from __future__ import annotations

import numpy as np
import pytest
from mm_autofocus.training import sign as module
from mm_autofocus.training.sign import Score, Series, SignTest, interval, sign_test
from scipy.ndimage import gaussian_filter

torch = pytest.importorskip("torch")

Z = np.arange(-8.0, 9.0, 1.0)


def stacks(kind: str, fields: int = 12, size: int = 40) -> list[Series]:
    """Textures blurred by |d|: to all sides alike, or along x below and along y above."""
    rng = np.random.default_rng(3)
    made = []
    for k in range(fields):
        field = gaussian_filter(rng.normal(size=(size, size)), 0.7)
        field *= 20 / field.std()
        d = Z - rng.uniform(-0.5, 0.5)
        planes = []
        for n, d_um in enumerate(d):
            wide = 0.3 + 0.35 * abs(d_um)
            sigma = {
                "even": (wide, wide),
                "astigmatic": (wide, 0.3) if d_um > 0 else (0.3, wide),
                "bleached": (wide, wide),
            }[kind]
            plane = 100 + gaussian_filter(field, sigma, mode="wrap")
            plane = plane + rng.normal(0, 0.5, plane.shape)
            planes.append(plane * (1 - 0.04 * n if kind == "bleached" else 1))
        images = np.stack(planes)[:, None].astype(np.float32)
        made.append(Series(k, f"f{k}", d, images))
    return made


def run(kind: str, **options: object) -> SignTest:
    return sign_test(stacks(kind), 1.0, [4.0], steps=60, patch_px=32, **options)  # type: ignore[arg-type]


def test_the_sign_is_found_where_it_is() -> None:
    answer = run("astigmatic")
    assert answer.verdict == "yes"
    assert answer.one is not None
    assert answer.one.low > 0.9
    assert answer.looks_um == (0.0,)
    assert answer.two == ()  # no need to ask


@pytest.mark.parametrize("kind", ["even", "bleached"])
def test_no_sign_where_the_blur_is_even(kind: str) -> None:
    answer = run(kind)
    assert answer.one is not None
    assert answer.one.low <= 0.5 <= answer.one.high
    # the same net with two looks does find it: the answer means something
    assert answer.two[0].suffices
    assert answer.verdict == "no"
    assert answer.looks_um == (0.0, 4.0)
    document = answer.to_json()
    assert document["looks_um"] == [0.0, 4.0]
    assert document["two"][0]["fields"] == 12


def test_the_same_seed_gives_the_same_answer_and_torch_is_left_alone() -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    options = {"steps": 3, "patch_px": 32, "offsets_um": []}
    first = sign_test(stacks("even", 6), 1.0, **options)  # type: ignore[arg-type]
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert sign_test(stacks("even", 6), 1.0, **options) == first  # type: ignore[arg-type]


def test_far_and_below_are_not_the_same() -> None:
    """The planes asked about reach as far below focus as above, also with two looks."""
    lopsided = [
        Series(k, f"f{k}", np.arange(-9.0, 4.0), np.ones((13, 1, 8, 8))) for k in range(6)
    ]
    test = module._Test(lopsided, 1.0, 0, None, 8)
    for offset, reach in ((0.0, 3.0), (2.0, 1.0)):
        rows = test._rows(offset)
        assert {abs(d) for *_, d in rows} == set(np.arange(1.0, reach + 1))
        assert sum(d > 0 for *_, d in rows) == sum(d < 0 for *_, d in rows) > 0
        assert all(abs((j - i) - offset) < 1e-9 for _, i, j, _ in rows)


def test_fields_are_held_out_whole() -> None:
    twins = [Series(k, f"f{k // 2}", Z, np.ones((17, 1, 8, 8))) for k in range(12)]
    test = module._Test(twins, 1.0, 0, None, 8)
    assert set(test.fold) == {f"f{k}" for k in range(6)}
    assert sorted(np.bincount(list(test.fold.values()))) == [2, 2, 2]


def score(low: float, high: float, *looks: float) -> Score:
    return Score(looks or (0.0,), (low + high) / 2, low, high, 100, 10)


CASES: dict[str, tuple[Score, list[Score], str]] = {
    "chance": (score(0.47, 0.55), [score(0.95, 1.0, 0, 4)], "no"),
    "barely": (score(0.55, 0.62), [score(0.95, 1.0, 0, 4)], "no"),
    "hints": (score(0.7, 0.85), [score(0.95, 1.0, 0, 4)], "partly"),
    "too few fields": (score(0.4, 0.97), [score(0.95, 1.0, 0, 4)], "unsure"),
    "control fails": (score(0.45, 0.55), [score(0.45, 0.6, 0, 4)], "unsure"),
    "no control": (score(0.45, 0.55), [], "unsure"),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case: str) -> None:
    one, two, verdict = CASES[case]
    said, reason = module._verdict(one, two)
    assert said == verdict
    assert reason
    answer = SignTest(said, reason, one, tuple(two))
    suffices = bool(two) and two[0].low > 0.9
    assert answer.looks_um == ((0.0, 4.0) if suffices else None)


def test_too_little_to_ask() -> None:
    assert "too few" in sign_test(stacks("even", 5), 1.0).reason
    near = sign_test(stacks("even", 6), 20.0)
    assert (near.verdict, near.one, near.looks_um) == ("unsure", None, None)
    assert "no further" in near.reason


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    answer = sign_test(stacks("even", 6), 1.0)
    assert answer.verdict == "unsure"
    assert "mm-autofocus[train]" in answer.reason


def test_the_interval_counts_fields() -> None:
    right = np.ones(200, bool)
    part, low, high = interval(right, [f"f{k // 20}" for k in range(200)])
    assert (part, high) == (1.0, 1.0)
    assert 0.9 < low < 0.97  # 200 independent ones would give 0.98
    # a field all wrong is one event, not 20
    right[:20] = False
    _, low, high = interval(right, [f"f{k // 20}" for k in range(200)])
    assert low < 0.7
    _, low_independent, _ = interval(right, np.arange(200))
    assert low < low_independent - 0.1


def test_the_interval_covers() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        p = rng.beta(12, 4, 20)  # fields differ
        right = np.concatenate([rng.random(15) < q for q in p])
        _, low, high = interval(right, np.repeat(np.arange(20), 15))
        hits += low <= 0.75 <= high
    assert hits >= 0.92 * 300
