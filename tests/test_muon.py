"""Steps of Muon: every direction of a matrix as long as any other, and they lead down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from mm_autofocus.training.muon import Muon, orthogonal  # noqa: E402


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 99),
    scale=st.floats(1e-6, 1e6),
)  # fmt: skip
def test_directions_stay_and_become_alike(rows, columns, seed, scale) -> None:
    rng = np.random.default_rng(seed)
    n = min(rows, columns)
    u, v = (np.linalg.qr(rng.normal(size=(k, n)))[0] for k in (rows, columns))
    length = rng.uniform(0.05, 1, n)
    matrix = torch.tensor(scale * (u * length) @ v.T, dtype=torch.float32)
    found = orthogonal(matrix).numpy()
    assert found.shape == (rows, columns)
    within = u.T @ found @ v
    np.testing.assert_allclose(within, np.diag(np.diag(within)), atol=2e-3)
    assert (np.diag(within) > 0.5).all()
    assert (np.diag(within) < 1.3).all()


def test_it_learns_what_plain_steps_learn_last() -> None:
    torch.manual_seed(0)
    # inputs that are nearly alike; what they differ by is asked for
    x = torch.randn(512, 1) + 0.05 * torch.randn(512, 20)
    y = 20 * (x[:, :10].mean(1) - x[:, 10:].mean(1))
    errors = {}
    for name in ("muon", "sgd"):
        torch.manual_seed(1)
        net = torch.nn.Linear(20, 1, bias=False)
        make = {"muon": Muon, "sgd": torch.optim.SGD}[name]
        optimiser = make(net.parameters(), lr=0.05)
        for _ in range(60):
            optimiser.zero_grad()
            loss = (net(x)[:, 0] - y).square().mean()
            loss.backward()
            optimiser.step()
        errors[name] = float(loss.detach())
    assert errors["muon"] < 0.5 * errors["sgd"]
    assert float(y.square().mean()) > errors["muon"]


def test_what_has_no_gradient_stays() -> None:
    still = torch.nn.Parameter(torch.ones(3, 3))
    Muon([still]).step()
    assert torch.equal(still, torch.ones(3, 3))
