"""Projections and proximal maps against the optimality conditions that define them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.projection import (
    moreau_envelope,
    project_box,
    project_halfspace,
    project_l1,
    project_simplex,
    prox_l1,
    prox_l2,
)

few = settings(max_examples=40, deadline=None)
seeds, dims = st.integers(0, 2**31), st.integers(1, 12)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@few
@given(seed=seeds, d=dims, total=st.sampled_from([0.01, 1.0, 30.0]))
def test_simplex(seed: int, d: int, total: float) -> None:
    v = 3 * draw(seed, 2, 3, d)
    p = project_simplex(v, total)
    assert p.shape == v.shape
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.full((2, 3), total, dtype=torch.float64))
    torch.testing.assert_close(project_simplex(p, total), p, atol=1e-12, rtol=0)
    # The linear form v - p is largest over the simplex at a vertex, and no vertex beats p.
    best = total * (v - p).amax(-1)
    assert (best - ((v - p) * p).sum(-1) <= 1e-9 * max(1, total)).all()


@few
@given(seed=seeds, d=dims, radius=st.sampled_from([0.0, 0.3, 2.0, 100.0]))
def test_l1(seed: int, d: int, radius: float) -> None:
    v = 3 * draw(seed, 4, d)
    p = project_l1(v, radius)
    assert (p.abs().sum(-1) <= radius + 1e-10).all()
    assert (radius * (v - p).abs().amax(-1) - ((v - p) * p).sum(-1) <= 1e-9 * max(1, radius)).all()
    torch.testing.assert_close(project_l1(v[0], radius), p[0])


@few
@given(seed=seeds, d=dims)
def test_halfspace(seed: int, d: int) -> None:
    v, a, b = draw(seed, 5, d), draw(seed + 1, 5, d), draw(seed + 2, 5)
    p = project_halfspace(v, a, b)
    inside = (v * a).sum(-1) <= b
    assert torch.equal(p[inside], v[inside])
    torch.testing.assert_close((p * a).sum(-1)[~inside], b[~inside], atol=1e-9, rtol=1e-9)
    # The step is along the normal.
    along = ((v - p) * a).sum(-1) / a.square().sum(-1)
    torch.testing.assert_close(v - p, along[:, None] * a, atol=1e-9, rtol=0)
    assert (along >= 0).all()


def test_box() -> None:
    v = 2 * draw(0, 3, 4)
    low, high = (
        torch.full((4,), -0.5, dtype=torch.float64),
        torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64),
    )
    assert torch.equal(project_box(v, low, high), torch.minimum(torch.maximum(v, low), high))
    assert torch.equal(project_box(v[0], -1.0, 1.0), v[0].clamp(-1, 1))


PAIRS = {
    "l1": (prox_l1, lambda p: p.abs().sum(-1)),
    "l2": (prox_l2, lambda p: p.norm(dim=-1)),
}


@pytest.mark.parametrize("name", list(PAIRS))
@few
@given(seed=seeds, d=dims, step=st.sampled_from([1e-3, 0.5, 4.0]))
def test_proximal_maps_minimise_and_obey_moreau(name: str, seed: int, d: int, step: float) -> None:
    prox, f = PAIRS[name]
    v = 2 * draw(seed, 6, d)
    p = prox(v, step)
    value, gradient = moreau_envelope(prox, f, v, step)
    goal = lambda q: f(q) + (q - v).square().sum(-1) / (2 * step)
    torch.testing.assert_close(goal(p), value)
    for k in range(8):
        assert (goal(p + 10.0 ** (-k) * draw(seed + k, 6, d)) >= value - 1e-12).all()
    # Moreau: v = prox_{t f}(v) + t P(v / t), with P the projection on the dual norm's unit ball.
    scaled = v / step
    unit = scaled.clamp(-1, 1) if name == "l1" else scaled / scaled.norm(dim=-1, keepdim=True).clamp_min(1)
    torch.testing.assert_close(p + step * unit, v)
    torch.testing.assert_close(gradient, unit)
    # The envelope's gradient, by automatic differentiation of its value.
    leaf = v.clone().requires_grad_(True)
    (auto,) = torch.autograd.grad(moreau_envelope(prox, f, leaf, step)[0].sum(), leaf)
    torch.testing.assert_close(auto, gradient)


def test_moreau_envelope_of_the_absolute_value_is_huber() -> None:
    v = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None]
    value, _ = moreau_envelope(prox_l1, lambda p: p.abs().sum(-1), v, 0.7)
    huber = torch.nn.functional.huber_loss(v, torch.zeros_like(v), delta=0.7, reduction="none") / 0.7
    torch.testing.assert_close(value, huber[:, 0])


def test_edges_and_dtype() -> None:
    zero = torch.zeros(2, 3)
    assert torch.equal(prox_l2(zero, 1.0), zero)
    assert torch.equal(prox_l2(zero, 0.0), zero)
    v = draw(0, 2, 3)
    torch.testing.assert_close(prox_l2(v, 0.0), v)
    steps = torch.tensor([[0.0], [100.0]], dtype=torch.float64)
    assert torch.equal(prox_l2(v, steps)[0], v[0])
    assert (prox_l1(v, steps)[1] == 0).all()
    for call in (project_simplex, project_l1, lambda u: prox_l1(u, 0.1), lambda u: prox_l2(u, 0.1)):
        assert call(v.float()).dtype == torch.float32
        assert call(v).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: project_simplex(torch.ones(3), 0.0), "total"),
        (lambda: project_simplex(torch.tensor(1.0)), "single number"),
        (lambda: project_simplex(torch.tensor([float("nan")])), "NaN"),
        (lambda: project_l1(torch.ones(3), -1.0), "radius"),
        (lambda: project_l1([1.0]), "torch.Tensor"),
        (lambda: project_box(torch.ones(3), 1.0, 0.0), "box is empty"),
        (lambda: project_halfspace(torch.ones(2), torch.zeros(2), 0.0), "normal is zero"),
        (lambda: prox_l1(torch.ones(2), -1.0), "step"),
        (lambda: prox_l2(torch.ones(2), torch.tensor([-1.0])), "zero or above"),
        (lambda: moreau_envelope(prox_l1, torch.sum, torch.ones(2), 0.0), "step"),
    ],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()
