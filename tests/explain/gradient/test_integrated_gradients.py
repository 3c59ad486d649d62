"""Oracles of integrated gradients: closed forms, axioms and captum."""

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Oracle
from perturbkit.explain import adaptive_integrated_gradients, check_axioms, integrated_gradients


def network(seed=0, d=5, k=3, activation=nn.Tanh, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 8), activation(), nn.Linear(8, k)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def inputs(n=4, d=5, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: integrated_gradients(
        model.to(dtype), inputs(dtype=dtype), target=1, n_steps=8
    ),
    chunked=lambda size: integrated_gradients(
        Oracle(network(), chunk_size=size), inputs(), target=0, n_steps=8
    ),
    refusals=(
        (lambda: integrated_gradients(network(), inputs(), 0, n_steps=0), "n_steps is 0"),
        (lambda: integrated_gradients(network(), inputs(), 9), "target is 9"),
        (lambda: integrated_gradients(network(), inputs()), "target is None"),
        (lambda: integrated_gradients(network(), inputs(), 0, rule="simpson"), "rule is 'simpson'"),
        (lambda: integrated_gradients(network(), inputs(), 0, baseline=torch.ones(7)), "baseline has shape"),
        (lambda: integrated_gradients(network(), inputs() * torch.nan, 0), "NaN"),
        (lambda: integrated_gradients(network(), inputs().long(), 0), "floating-point"),
        (lambda: adaptive_integrated_gradients(network(), inputs(), 0, tol=0.0), "tol is 0"),
        (lambda: check_axioms(lambda f, x, b: x, []), "models is empty"),
    ),
)


@pytest.mark.parametrize("rule", ["gauss-legendre", "trapezoid", "midpoint"])
def test_linear_function_needs_one_node(rule):
    w, x, b = inputs(3, 5, 2)[0], inputs(4), inputs(4, 5, 3)
    found = integrated_gradients(lambda z: z @ w, x, baseline=b, n_steps=1, rule=rule)
    torch.testing.assert_close(found.values, w * (x - b), rtol=1e-12, atol=1e-12)
    assert float(found.extras["completeness_gap"].abs().max()) < 1e-12
    assert (found.cost.ngrad, found.cost.nfev) == (4, 4 + 2 * 4)


def test_product_is_shared_equally():
    x = inputs(6, 2, 4)
    found = integrated_gradients(lambda z: z[:, 0] * z[:, 1], x, n_steps=2)
    torch.testing.assert_close(found.values, (x[:, :1] * x[:, 1:] / 2).expand(-1, 2), rtol=1e-12, atol=1e-12)


def test_saturated_function_where_the_gradient_is_zero():
    def f(z):
        return 1 - torch.relu(1 - z[:, 0])

    x = torch.tensor([[2.0]], dtype=torch.float64)
    assert float(Oracle(f).gradient(x)) == 0.0
    found = integrated_gradients(f, x, n_steps=100, rule="midpoint")
    torch.testing.assert_close(found.values, torch.ones_like(x), rtol=1e-12, atol=1e-12)


def test_gauss_legendre_is_exact_on_polynomials():
    x = inputs(3, 4, 5)
    found = integrated_gradients(lambda z: (z**7).sum(1), x, n_steps=4)  # integrand of degree 6 <= 2 * 4 - 1
    torch.testing.assert_close(found.values, x**7, rtol=1e-12, atol=1e-12)


def test_trapezoid_weights_sum_to_one():
    # A rule whose weights sum to (n - 1) / n would be 10 % low here.
    x = inputs(2, 3, 6)
    found = integrated_gradients(lambda z: z.sum(1), x, n_steps=10, rule="trapezoid")
    torch.testing.assert_close(found.values, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 7, 6), (3, 4, 5)])
def test_against_a_loop(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    w = torch.randn(shape[1:], generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def f(z):
        return torch.tanh((z * w).flatten(1).sum(1))

    expected = torch.zeros_like(x)
    for i in range(20):
        point = (x * (i + 0.5) / 20).requires_grad_(True)
        expected += x * torch.autograd.grad(f(point).sum(), point)[0] / 20
    found = integrated_gradients(f, x, n_steps=20, rule="midpoint")
    torch.testing.assert_close(found.values, expected, rtol=1e-10, atol=1e-12)


def test_several_baselines_are_averaged():
    net, x = network(), inputs()
    several = torch.stack([inputs(4, 5, s) for s in (20, 21, 22)])
    together = integrated_gradients(net, x, 2, baseline=several, n_steps=16)
    apart = [integrated_gradients(net, x, 2, baseline=b, n_steps=16) for b in several]
    torch.testing.assert_close(together.values, sum(a.values for a in apart) / 3, rtol=1e-12, atol=1e-12)
    assert together.cost.ngrad == sum(a.cost.ngrad for a in apart)


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_captum(seed):
    captum = pytest.importorskip("captum.attr", reason="captum is an extra of the tests")
    net, x, b = network(seed), inputs(5, 5, seed + 30), inputs(5, 5, seed + 40)
    target = torch.tensor([0, 2, 1, 0, 2])
    expected = captum.IntegratedGradients(net).attribute(
        x, b, target=target, n_steps=24, method="gausslegendre"
    )
    found = integrated_gradients(net, x, target, baseline=b, n_steps=24)
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)


def test_adaptive_stops_where_the_gap_is_small_and_only_there():
    x = torch.tensor([[0.3, 0.4], [6.0, 9.0]], dtype=torch.float64)

    def f(z):
        return torch.sin(3 * z).sum(1) + z.sum(1)

    found = adaptive_integrated_gradients(f, x, tol=1e-8)
    steps = found.extras["n_steps"].tolist()
    assert steps[0] == 8 < steps[1]
    change = f(x) - f(torch.zeros_like(x))
    assert bool((found.extras["completeness_gap"].abs() <= 1e-8 * change.abs()).all())
    torch.testing.assert_close(found.values, torch.sin(3 * x) + x, rtol=1e-6, atol=1e-6)
    assert found.cost.ngrad == 8 + sum(2**k for k in range(3, 11) if 2**k <= steps[1])


def test_axioms_hold_for_integrated_gradients_and_fail_for_the_gradient():
    models = [network(s, d=6, k=1) for s in range(3)]
    ig = check_axioms(
        lambda f, x, b: integrated_gradients(f, x, baseline=b, n_steps=64).values, models, generator=0
    )
    assert ig.failed == ()
    gradient = check_axioms(lambda f, x, b: Oracle(f).gradient(x) * (x - b), models, generator=0)
    assert {"completeness", "sensitivity_a"} <= set(gradient.failed)


def test_target_one_a_row():
    net, x = network(), inputs()
    target = torch.tensor([0, 1, 2, 1])
    together = integrated_gradients(net, x, target, n_steps=8).values
    for i, t in enumerate(target.tolist()):
        alone = integrated_gradients(net, x[i : i + 1], t, n_steps=8).values
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)
