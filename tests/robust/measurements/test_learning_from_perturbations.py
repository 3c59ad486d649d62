"""Oracles of learning from perturbations: the margin problem, linearity, trained networks, and gradients."""

import pytest
import torch
from sklearn.svm import SVC

from _common import Example
from perturbkit.core.random import rademacher, randn
from perturbkit.robust import (
    LeakyTwoLayer,
    agreement_condition,
    boundary_perturbation,
    perturbation_boundary,
    standard_boundary,
)


def _world(n=40, d=800, seed=0, dtype=torch.float64):
    """Classes that differ in their mean along one direction, in many dimensions."""
    g = torch.Generator().manual_seed(seed)
    y = torch.where(torch.arange(n) % 2 == 0, 1, -1)
    mean = randn((d,), generator=g, dtype=dtype) / d**0.5 * 3
    return randn((n, d), generator=g, dtype=dtype) + y[:, None] * mean, y, g


def _run(generator, dtype):
    x, y, g = _world(10, 30, dtype=dtype)
    noise = randn((8, 30), generator=g, dtype=dtype)
    labels = rademacher((8,), generator=g)
    found = perturbation_boundary(x, y, noise, labels, 0.5)
    return [found.noise, found.feature, found.noise_term(x)]


X = torch.eye(3)
EXAMPLE = Example(
    call=_run,
    read=lambda result: result,
    refusals=(
        (lambda: standard_boundary(X, torch.tensor([0, 1, 1])), "y has values"),
        (lambda: standard_boundary(X, torch.tensor([1, -1])), "y has shape"),
        (lambda: standard_boundary(X, torch.tensor([1, -1, 1]), weights=torch.zeros(3)), "weights go down to 0"),
        (lambda: boundary_perturbation(X[0], -1.0), "epsilon is -1"),
        (lambda: boundary_perturbation(X[0], 1.0, norm="l1"), "norm is 'l1'"),
        (lambda: boundary_perturbation(X[0], 1.0, norm="l0", share=0.0), "share"),
        (
            lambda: perturbation_boundary(X, torch.tensor([1, -1, 1]), torch.ones(2, 5), torch.tensor([1, 1]), 0.1),
            "x_new has shape",
        ),
        (lambda: LeakyTwoLayer(3, 5), "width is 5"),
        (lambda: LeakyTwoLayer(3, 4, slope=1.0), "slope"),
    ),
)  # fmt: skip


def test_boundary_is_that_of_the_margin_problem_for_orthogonal_rows():
    q, _ = torch.linalg.qr(randn((60, 40), generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    x = 3 * q.T
    y = torch.where(torch.arange(40) % 2 == 0, 1, -1)
    svm = SVC(kernel="linear", C=1e6).fit(x.numpy(), y.numpy())
    found = standard_boundary(x, y)
    cosine = torch.cosine_similarity(found, torch.from_numpy(svm.coef_[0]), dim=0)
    assert float(cosine) > 0.999
    torch.testing.assert_close(x @ found, y.double())  # every row is at the same margin


def test_rows_of_unequal_norm_are_at_the_same_margin():
    x = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    y = torch.tensor([1, -1, 1])
    torch.testing.assert_close(x @ standard_boundary(x, y), y.double())
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(
        standard_boundary(x, y, weights=weights), torch.tensor([1.0, -4.0, 15.0], dtype=torch.float64)
    )


def test_perturbations_have_their_size_and_point_up():
    q = randn((4, 25), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for norm in ("l2", "linf", "l0"):
        r = boundary_perturbation(q, 0.3, norm=norm, share=0.1)
        assert float((r * q).sum()) > 0
        if norm == "l2":
            assert float(r.norm()) == pytest.approx(0.3)
        else:
            assert float(r.abs().max()) == pytest.approx(0.3)
            assert int((r != 0).sum()) == (10 if norm == "l0" else 100)
    sparse = boundary_perturbation(q, 0.3, norm="l0", share=0.1) != 0
    assert float(q.abs()[sparse].min()) >= float(q.abs()[~sparse].max())


@pytest.mark.parametrize("norm", ["l2", "linf", "l0"])
def test_terms_of_the_boundary(norm):
    x, y, g = _world()
    noise, labels = randn((30, 800), generator=g, dtype=torch.float64), rademacher((30,), generator=g)
    equal = torch.ones(30, dtype=torch.float64)
    one, two = (perturbation_boundary(x, y, noise, labels, e, norm=norm, weights=equal) for e in (0.1, 0.2))
    torch.testing.assert_close(two.feature, 2 * one.feature)
    torch.testing.assert_close(two.noise, one.noise)
    unit = boundary_perturbation(standard_boundary(x, y), 1.0, norm=norm)
    perturbed = noise + 0.1 * labels[:, None] * unit
    total = (labels.double()[:, None] * perturbed).sum(0)
    torch.testing.assert_close(one.noise + one.feature, total)
    assert float(perturbation_boundary(x, y, noise, labels, 0.0, norm=norm).feature.abs().max()) == 0
    many = perturbation_boundary(
        x, y, torch.cat([noise] * 3), torch.cat([labels] * 3), 0.1, norm=norm, weights=torch.cat([equal] * 3)
    )
    torch.testing.assert_close(many.feature, 3 * one.feature)


def test_condition_and_prediction():
    x, y, g = _world(200, 800)
    noise, labels = randn((200, 800), generator=g, dtype=torch.float64), rademacher((200,), generator=g)
    found = perturbation_boundary(x, y, noise, labels, 2.0)
    holds = agreement_condition(found, x)
    assert 0.3 < float(holds.double().mean()) < 1
    standard = torch.where(x @ standard_boundary(x, y) >= 0, 1, -1)
    assert bool((found.predict(x)[holds] == standard[holds]).all())


def test_gradient_of_a_trained_network_is_the_direction():
    """A network trained on the data has the closed form's boundary, and input gradients along it."""
    x, y, _ = _world(40, 800, dtype=torch.float32)
    net = LeakyTwoLayer(800, 20, slope=0.3, generator=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        torch.nn.functional.softplus(-y * net(x)).mean().backward()
        optimizer.step()
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(net(leaf).sum(), leaf)
    q = standard_boundary(x, y)
    assert float(torch.cosine_similarity(slope, q[None], dim=1).min()) > 0.9
    z = randn((500, 800), generator=torch.Generator().manual_seed(9))
    assert float(((net(z) >= 0) == (z @ q >= 0)).double().mean()) > 0.9


def test_network_by_hand():
    net = LeakyTwoLayer(2, 2, slope=0.5, scale=1.0, generator=1)
    z = torch.tensor([[1.0, -2.0]])
    inner = (z @ net.weight.detach().T)[0]
    expected = sum((1, -1)[j] / 2**0.5 * (v if v > 0 else 0.5 * v) for j, v in enumerate(inner.tolist()))
    assert net(z).item() == pytest.approx(expected, rel=1e-5)
    assert [n for n, _ in net.named_parameters()] == ["weight"]
