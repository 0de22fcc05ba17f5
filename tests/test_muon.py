"""Muon in blocks: what a step is, beside the Muon of torch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from mm_autofocus.training.muon import BlockMuon, orthogonal  # noqa: E402


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 80),
    columns=st.integers(1, 80),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_all_directions_become_of_one_length(
    rows: int, columns: int, scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    # singular values within a factor of 20: what is nearly zero, five steps do not raise to one
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    lengths = torch.linspace(1, 20, min(rows, columns))
    found = torch.linalg.svdvals(orthogonal(scale * (u * lengths) @ v))
    assert found.min() > 0.3
    assert found.max() < 1.3


@pytest.mark.parametrize(("rows", "columns"), [(48, 96), (128, 128), (96, 24)])
def test_one_block_steps_like_the_muon_of_torch(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    start = torch.randn(rows, columns)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    steps = (
        BlockMuon([ours], 0.02, weight_decay=0.01),
        torch.optim.Muon([theirs], 0.02, weight_decay=0.01),
    )
    for _ in range(5):
        gradient = torch.randn(rows, columns)
        for p, optimiser in zip((ours, theirs), steps, strict=True):
            p.grad = gradient.clone()
            optimiser.step()
    went = (ours - start).detach()
    # theirs is in bfloat16, of 8 bits
    assert (ours - theirs).norm() < 0.02 * went.norm()


def test_each_block_of_rows_has_steps_of_its_own() -> None:
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(300, 64))
    p.grad = torch.randn(300, 64)
    p.grad[:128] *= 1e-3  # the whole would hardly see it
    BlockMuon([p], 1.0).step()
    for block in p.detach().split(128):
        assert torch.linalg.svdvals(block).min() > 0.3


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"not a matrix: \(3,\)"):
        BlockMuon([torch.nn.Parameter(torch.zeros(3))])
