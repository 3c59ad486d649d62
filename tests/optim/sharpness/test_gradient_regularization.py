"""Oracles of gradient regularisation: exactness on quadratics, orders of the differences, SAM, flooding, closed forms."""

import copy
import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.core.random import seeded_init
from perturbkit.optim import DiagonalLinearNet, Flooding, GradientRegularizer, implicit_norm, richness

SCHEMES = ("forward", "backward", "central", "double_backprop")


def bowl(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(5, 5, generator=g, dtype=dtype)
    w = nn.Parameter(torch.randn(5, generator=g, dtype=dtype))
    hessian = a @ a.T / 5
    return w, (lambda: w @ hessian @ w / 2), hessian


def steep(seed=0):
    """A loss with a third derivative, and its gradient and Hessian-gradient product."""
    g = torch.Generator().manual_seed(seed)
    w = nn.Parameter(torch.rand(4, generator=g, dtype=torch.float64) + 0.5)
    return w, lambda: (w**4).sum() / 4 + w.prod()


def closure_of(w, loss, scheme="forward"):
    def closure():
        w.grad = None
        value = loss()
        if scheme != "double_backprop":
            value.backward()
        return value

    return closure


def moved(w, loss, scheme, **options):
    """Return minus the first step of rate 1: the gradient that the base optimizer was given."""
    before = w.detach().clone()
    GradientRegularizer([w], lr=1.0, scheme=scheme, **options).step(closure_of(w, loss, scheme))
    step = before - w.detach()
    with torch.no_grad():
        w.copy_(before)
    return step


def trained(dtype):
    w, loss, _ = bowl(dtype)
    optimizer = GradientRegularizer([w], lr=0.1)
    for _ in range(3):
        optimizer.step(closure_of(w, loss))
    return w.detach()


P = nn.Parameter
EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype),
    refusals=(
        (lambda: GradientRegularizer([P(torch.ones(1))], coefficient=-1.0), "coefficient is -1"),
        (lambda: GradientRegularizer([P(torch.ones(1))], radius=0.0), "radius is 0"),
        (lambda: GradientRegularizer([P(torch.ones(1))], scheme="upward"), "scheme is 'upward'"),
        (lambda: GradientRegularizer([P(torch.ones(1))], lr=1.0).step(None), "closure is None"),
        (
            lambda: GradientRegularizer([P(torch.ones(1))], lr=1.0, scheme="double_backprop").step(
                lambda: torch.tensor(1.0)
            ),
            "without a graph",
        ),
        (lambda: Flooding([P(torch.ones(1))], level=-1.0), "level is -1"),
        (lambda: DiagonalLinearNet(0, 1.0), "d is 0"),
        (lambda: DiagonalLinearNet(2, 0.0), "init_scale is 0"),
        (lambda: implicit_norm(torch.ones(2), 0.0), "alpha is 0"),
        (lambda: richness(torch.ones(2), torch.tensor([1.0, -1.0])), "alpha is"),
    ),
)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("radius", [1e-3, 0.5, 20.0])
def test_every_scheme_is_exact_on_a_quadratic(scheme, radius):
    w, loss, hessian = bowl(seed=1)
    g = hessian @ w.detach()
    got = moved(w, loss, scheme, coefficient=0.3, radius=radius)
    torch.testing.assert_close(got, g + 0.3 * hessian @ g)


def test_equal_weight_and_radius_is_an_unnormalised_ascent_step():
    w, loss = steep()
    before = w.detach().clone()
    (g,) = torch.autograd.grad(loss(), w)
    with torch.no_grad():
        w.add_(0.2 * g)
    (there,) = torch.autograd.grad(loss(), w)
    with torch.no_grad():
        w.copy_(before)
    torch.testing.assert_close(moved(w, loss, "forward", coefficient=0.2, radius=0.2), there)


@pytest.mark.parametrize(("scheme", "order"), [("forward", 1), ("backward", 1), ("central", 2)])
def test_the_differences_tend_to_the_exact_product_at_their_orders(scheme, order):
    w, loss = steep(2)
    exact = moved(w, loss, "double_backprop", coefficient=1.0)
    (g,) = torch.autograd.grad(loss(), w, create_graph=True)
    torch.testing.assert_close(exact, g + torch.autograd.grad(g.square().sum() / 2, w)[0])
    radii = (1e-2, 1e-3)
    errors = [(moved(w, loss, scheme, coefficient=1.0, radius=r) - exact).norm() for r in radii]
    assert math.log10(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_groups_frozen_parameters_and_zero_weight(scheme):
    (w, loss, _), frozen = bowl(), P(torch.ones(2, dtype=torch.float64), requires_grad=False)
    v = P(torch.ones(3, dtype=torch.float64))

    def whole():
        return loss() + (v**2).sum() + (frozen**2).sum()

    optimizer = GradientRegularizer(
        [{"params": [w, frozen], "coefficient": 0.0}, {"params": [v], "lr": 0.5}], lr=0.1, coefficient=0.25, scheme=scheme
    )  # fmt: skip
    g = torch.autograd.grad(loss(), w)[0]
    before = w.detach().clone()

    def closure():
        optimizer.zero_grad()
        value = whole()
        if scheme != "double_backprop":
            value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(w.detach(), before - 0.1 * g)
    torch.testing.assert_close(v.detach(), torch.full_like(v, 1 - 0.5 * (2 + 0.25 * 2 * 2)))
    assert (frozen == 1).all()


def test_flooding_goes_up_below_its_level_and_two_steps_are_a_forward_difference():
    w, loss = steep(3)
    before, rate = w.detach().clone(), 1e-3
    level = loss().item() + 1e-9
    optimizer = Flooding([w], lr=rate, level=level)
    (g,) = torch.autograd.grad(loss(), w)
    optimizer.step(closure_of(w, loss))
    torch.testing.assert_close(w.detach(), before + rate * g)
    (there,) = torch.autograd.grad(loss(), w)
    optimizer.step(closure_of(w, loss))
    torch.testing.assert_close(w.detach() - before, -rate * (there - g), atol=1e-15, rtol=1e-6)


def test_training_goes_on_bit_for_bit_from_a_state_dict():
    (w, loss, _), (v, other, _) = bowl(), bowl()
    one, two = (GradientRegularizer([p], torch.optim.Adam, lr=0.05) for p in (w, v))
    for _ in range(3):
        one.step(closure_of(w, loss))
    with torch.no_grad():
        v.copy_(w)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        one.step(closure_of(w, loss))
        two.step(closure_of(v, other))
    assert torch.equal(w, v)


def test_running_statistics_move_once():
    def train(wrap):
        with seeded_init(3):
            net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
        optimizer = wrap(net)

        def closure():
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        return net

    plain = train(lambda net: torch.optim.SGD(net.parameters(), lr=0.1))
    ours = train(lambda net: GradientRegularizer(net.parameters(), lr=0.1, scheme="central", model=net))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), ours.buffers(), strict=True))


def test_the_implicit_norm_is_between_l1_and_squared_l2():
    beta = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Large starts: alpha^2 q(z) ~ z^2 alpha^2 / 4; small ones: |beta| (log(|beta| / alpha^2) - 1).
    torch.testing.assert_close(implicit_norm(beta, 1e3), beta.square().sum(1) / (4 * 1e6), rtol=1e-6, atol=0)
    alpha = 1e-40
    want = (beta.abs() * ((beta.abs() / alpha**2).log() - 1)).sum(1)
    torch.testing.assert_close(implicit_norm(beta, alpha), want, rtol=1e-6, atol=0)
    assert (richness(beta, 1e3) < 1e-5).all()
    assert ((richness(beta, 1e-40) > 0.98) & (richness(beta, 1e-40) < 1)).all()
    scales = torch.logspace(-6, 2, 9, dtype=torch.float64)
    falling = torch.stack([richness(beta, float(s)) for s in scales])
    assert (falling.diff(dim=0) < 0).all()


def test_gradient_flow_of_the_network_finds_the_solution_of_least_implicit_norm():
    g = torch.Generator().manual_seed(4)
    x = torch.randn(3, 6, generator=g, dtype=torch.float64)
    y = x @ torch.tensor([1.0, 0, 0, -0.5, 0, 0], dtype=torch.float64)
    alpha = 0.4
    net = DiagonalLinearNet(6, alpha, torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=5e-3)
    for _ in range(8000):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    beta = net.beta.detach()
    assert (x @ beta - y).abs().max() < 1e-8
    # Stationarity: the norm's gradient lies in the row space of x.
    slope = torch.asinh(beta / (2 * alpha**2))
    left = slope - x.T @ torch.linalg.lstsq(x.T, slope[:, None]).solution[:, 0]
    assert left.norm() < 0.02 * slope.norm()


def test_a_graph_is_needed_to_differentiate_twice():
    w, loss, _ = bowl()
    with pytest.raises(checks.ModelError, match="Do not call backward"):
        GradientRegularizer([w], lr=1.0, scheme="double_backprop").step(lambda: loss().item())


def test_double_backprop_tells_of_backward_in_the_closure():
    w = nn.Parameter(torch.ones(2))
    optimizer = GradientRegularizer([w], lr=0.1, scheme="double_backprop")

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    with pytest.raises(checks.ModelError, match="called backward"):
        optimizer.step(closure)
    assert (w == 1).all()


def test_double_backprop_of_a_linear_loss_is_plain_descent():
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = GradientRegularizer([w, v], lr=0.1, scheme="double_backprop")
    optimizer.step(lambda: w.sum() + 3 * v.sum())
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.9))
    torch.testing.assert_close(v.detach(), torch.tensor([0.7]))


def test_no_coefficients_have_no_richness():
    with pytest.raises(checks.ArgumentError, match="beta is zero"):
        richness(torch.zeros(2, 3), 1.0)
