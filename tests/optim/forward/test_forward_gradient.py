"""Oracles of the forward gradient: autograd, the closed-form variance, the coordinate basis."""

import importlib

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.optim import ForwardSGD, forward_gradient, forward_gradient_variance

module = importlib.import_module("perturbkit.optim.forward.forward_gradient")


def problem(seed=0, dtype=torch.float64, d=6):
    """A small network's loss as a function of its parameters, and the parameters."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"0.weight": (4, d), "0.bias": (4,), "2.weight": (3, 4), "2.bias": (3,)}
    params = {k: torch.randn(s, generator=g, dtype=dtype) for k, s in shapes.items()}
    x = torch.randn(9, d, generator=g, dtype=dtype)
    y = torch.randint(0, 3, (9,), generator=g)

    def loss(values):
        hidden = torch.tanh(x @ values["0.weight"].T + values["0.bias"])
        return nn.functional.cross_entropy(hidden @ values["2.weight"].T + values["2.bias"], y)

    return loss, params


def exact(loss, params):
    leaves = {k: p.clone().requires_grad_(True) for k, p in params.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


EXAMPLE = Example(
    call=lambda generator, dtype: list(
        forward_gradient(*problem(dtype=dtype), generator=generator)[1].values()
    ),
    stochastic=True,
    refusals=(
        (lambda: forward_gradient(lambda p: p, {}), "params is a dict"),
        (lambda: forward_gradient(*problem(), directions=0), "directions is 0"),
        (lambda: forward_gradient(*problem(), distribution="uniform"), "distribution is 'uniform'"),
        (lambda: forward_gradient(lambda p: p["w"], {"w": torch.ones(3)}), "the loss has shape"),
        (
            lambda: forward_gradient(lambda p: p["w"].sum(), {"w": torch.ones(3, dtype=torch.int64)}),
            "floating-point",
        ),
        (lambda: ForwardSGD(nn.Linear(2, 1), lr=0.0), "lr is 0"),
        (lambda: ForwardSGD([torch.ones(2)], lr=0.1), "module is a list"),
    ),
)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_mean_and_variance(distribution):
    loss, params = problem(3)
    truth = flat(exact(loss, params))
    n = 40_000
    _, each = forward_gradient(
        loss, params, directions=n, distribution=distribution, average=False, generator=1
    )
    draws = torch.cat([g.reshape(n, -1) for g in each.values()], 1)
    error = draws.mean(0) - truth
    assert bool((error.abs() <= 4.5 * draws.std(0) / n**0.5 + 1e-12).all())
    squared = (draws - truth).square().sum(1)
    expected = float(forward_gradient_variance(truth, 1, distribution))
    spread = float(squared.std()) / n**0.5
    assert abs(float(squared.mean()) - expected) < 4.5 * spread + 1e-9
    assert spread < 0.03 * expected


@pytest.mark.parametrize(("distribution", "extra"), [("normal", 1), ("rademacher", -1)])
def test_variance_in_closed_form(distribution, extra):
    g = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert float(forward_gradient_variance(g, 2, distribution)) == pytest.approx((2 + extra) * 25 / 2)
    assert float(forward_gradient_variance([g[:1], g[1:]], 2, distribution)) == pytest.approx(
        (2 + extra) * 25 / 2
    )


def test_several_directions_average_their_estimates():
    loss, params = problem(4)
    _, each = forward_gradient(loss, params, directions=7, average=False, generator=5)
    value, mean = forward_gradient(loss, params, directions=7, generator=5)
    for k in params:
        torch.testing.assert_close(mean[k], each[k].mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(value, loss(params), rtol=1e-12, atol=0)


def test_one_direction_is_the_directional_derivative():
    loss, params = problem(5)
    _, got = forward_gradient(loss, params, generator=6)
    v = {k: g.sign() for k, g in got.items()}  # signs of the direction, up to the sign of the slope
    slope = sum(float((exact(loss, params)[k] * v[k]).sum()) for k in params)
    for k in params:
        torch.testing.assert_close(got[k], slope * v[k], rtol=1e-6, atol=1e-9)


def test_all_coordinates_give_the_gradient(monkeypatch):
    loss, params = problem(7)
    d = sum(p.numel() for p in params.values())
    basis = torch.eye(d, dtype=torch.float64) * d**0.5  # E v v^T = I over the d directions
    place = {"at": 0}

    def coordinates(shape, **_):
        size = int(torch.tensor(shape[1:]).prod())
        part = basis[:, place["at"] : place["at"] + size].reshape(shape)
        place["at"] += size
        return part

    monkeypatch.setitem(module._DRAW, "normal", coordinates)
    _, got = forward_gradient(loss, params, directions=d, distribution="normal")
    torch.testing.assert_close(flat(got), flat(exact(loss, params)), rtol=1e-10, atol=1e-12)


def test_nothing_is_saved_for_a_backward_pass():
    loss, params = problem(8)
    saved = []
    leaves = {k: p.requires_grad_(True) for k, p in params.items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        forward_gradient(loss, leaves, directions=3, generator=0)
    assert saved == []
    assert all(p.grad is None for p in leaves.values())


def test_sgd_follows_the_formula_and_learns():
    net = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=g, dtype=torch.float64)
    truth = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    y = x @ truth.T
    optimizer = ForwardSGD(net, lr=0.05, decay=0.1, generator=3)

    def closure(model):
        return ((model(x) - y) ** 2).mean()

    _, first = forward_gradient(
        lambda p: ((x @ p["weight"].T - y) ** 2).mean(), {"weight": net.weight}, generator=3
    )
    start = net.weight.detach().clone()
    optimizer.step(closure)
    torch.testing.assert_close(net.weight.detach(), start - 0.05 * first["weight"], rtol=1e-10, atol=1e-12)
    again = net.weight.detach().clone()
    source = torch.Generator().manual_seed(3)
    for weight in (start, again):
        _, second = forward_gradient(
            lambda p: ((x @ p["weight"].T - y) ** 2).mean(), {"weight": weight}, generator=source
        )
    optimizer.step(closure)
    rate = 0.05 * torch.exp(torch.tensor(-0.1, dtype=torch.float64))
    torch.testing.assert_close(net.weight.detach(), again - rate * second["weight"], rtol=1e-10, atol=1e-12)
    assert optimizer.param_groups[0]["t"] == 2
    slow = ForwardSGD(net, lr=0.05, decay=0.0, generator=4)
    losses = [float(slow.step(closure)) for _ in range(400)]
    assert losses[-1] < 1e-3 * losses[0]
