"""Oracles of perturbed two-point descent: linear and quadratic functions, finite differences, and a strict saddle."""

import copy
import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks, seeded_direction
from perturbkit.core.random import mixed_seed
from perturbkit.optim import ZeroOrderSGD, is_second_order, minimize_perturbed_two_point


def saddle(x):
    """A strict saddle at zero, with minima of -1/16 at plus and minus sqrt(1/2) of the last coordinate."""
    return (x[:, :-1].square().sum(1) - x[:, -1].square() / 2) / 2 + x[:, -1] ** 4 / 4


def bowl(dtype=torch.float64, seed=0, d=6):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=g, dtype=dtype)
    return a @ a.T / d, torch.randn(d, generator=g, dtype=dtype)


def solve(fun, x0, **options):
    options = {"step": 0.05, "noise": 0.0, "max_iter": 1, "generator": 0} | options
    return minimize_perturbed_two_point(fun, x0, **options)


def linear(x):
    return x.sum(1)


EXAMPLE = Example(
    call=lambda generator, dtype: solve(
        saddle, torch.ones(2, 3, dtype=dtype), noise=0.1, max_iter=4, generator=generator
    ),
    stochastic=True,
    refusals=(
        (lambda: solve(linear, torch.ones(2), step=0.0), "step is 0"),
        (lambda: solve(linear, torch.ones(2), smoothing=0.0), "smoothing is 0"),
        (lambda: solve(linear, torch.ones(2), pairs=0), "pairs is 0"),
        (lambda: solve(linear, torch.ones(2), noise=-1.0), "noise is -1"),
        (lambda: solve(linear, torch.ones(2), max_iter=0), "max_iter is 0"),
        (lambda: solve(linear, torch.ones(2), target=math.nan), "target is nan"),
        (lambda: solve(linear, torch.ones(2, 2, 2)), "x0"),
        (lambda: ZeroOrderSGD([nn.Parameter(torch.ones(1))], smoothing=0.0), "smoothing is 0"),
        (lambda: ZeroOrderSGD([nn.Parameter(torch.ones(1))], pairs=0), "pairs is 0"),
        (lambda: ZeroOrderSGD([nn.Parameter(torch.ones(1))], noise=-1.0), "noise is -1"),
        (lambda: ZeroOrderSGD([nn.Parameter(torch.ones(1))]).step(None), "closure is None"),
        (lambda: is_second_order(torch.sum, torch.ones(2), 0.0, 1.0), "epsilon is 0"),
        (lambda: is_second_order(torch.sum, torch.ones(2), 0.1, -1.0), "rho is -1"),
    ),
)


@pytest.mark.parametrize("pairs", [1, 3])
def test_estimates_of_a_linear_function_have_the_mean_and_the_variance_of_the_theory(pairs):
    g = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    runs = 40_000
    found = solve(lambda x: x @ g, torch.zeros(runs, 4, dtype=torch.float64), step=1.0, pairs=pairs)
    estimates = -found.x
    error = estimates - g
    want = (4 + 1) * g.square().sum() / pairs
    assert (estimates.mean(0) - g).norm() < 4 * (want / runs).sqrt()
    assert error.square().sum(1).mean().item() == pytest.approx(want.item(), rel=0.05)


@pytest.mark.parametrize("smoothing", [1e-3, 0.7])
def test_a_quadratic_is_differentiated_exactly_at_any_distance(smoothing):
    hessian, x0 = bowl()
    one = solve(lambda x: ((x @ hessian) * x).sum(1) / 2, x0, step=1.0, smoothing=smoothing, generator=5)
    linearised = hessian @ x0
    two = solve(lambda x: x @ linearised, x0, step=1.0, smoothing=1.0, generator=5)
    torch.testing.assert_close(one.x, two.x, rtol=1e-9, atol=1e-10)


def test_noise_has_its_length():
    x0 = torch.zeros(3000, 7, dtype=torch.float64)
    found = solve(lambda x: torch.zeros(len(x), dtype=x.dtype), x0, step=2.0, noise=0.3)
    assert found.x.square().sum(1).mean().sqrt().item() == pytest.approx(0.6, rel=0.03)


def test_at_a_saddle_only_noise_moves_on():
    x0 = torch.zeros(5, 20, dtype=torch.float64)
    still = solve(saddle, x0, max_iter=50, step=0.04)
    assert (still.x == 0).all()
    moved = solve(saddle, x0, max_iter=4000, step=0.04, noise=0.1, target=-0.05)
    assert moved.converged
    assert "target" in moved.message
    assert (moved.history[-1] <= -0.05).sum() >= 1
    assert (moved.fun < -0.045).all()
    assert moved.cost.nfev == 2 * 5 * len(moved.history) + 5


def test_runs_are_independent_and_one_start_gives_one_answer():
    found = solve(saddle, torch.ones(4, dtype=torch.float64), max_iter=30)
    assert (found.x.shape, found.fun.shape, found.history.shape) == ((4,), (), (30,))
    assert not found.converged
    assert found.fun == saddle(found.x[None])[0]
    many = solve(saddle, torch.ones(3, 4, dtype=torch.float64), max_iter=30)
    assert len({float(v) for v in many.fun}) == 3


def test_second_order_points_are_told_from_saddles_and_slopes():
    zero = torch.zeros(5, dtype=torch.float64)
    best = zero.clone()
    best[-1] = math.sqrt(0.5)

    def one(x):
        return saddle(x[None])[0]

    assert is_second_order(one, best, 1e-6, 1.0)
    assert not is_second_order(one, zero, 0.01, 1.0)
    assert is_second_order(one, zero, 0.01, 26.0)  # sqrt(0.26) is above the curvature 1/2
    assert not is_second_order(one, best + 0.1, 1e-3, 1.0)


def test_the_optimizer_is_the_same_step_on_a_models_weights():
    hessian, start = bowl(seed=2)
    w, frozen = nn.Parameter(start.clone()), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = ZeroOrderSGD([w, frozen], lr=0.1, smoothing=0.01, pairs=2, noise=0.2, seed=7)
    optimizer.step(lambda: w @ hessian @ w / 2)
    z = [seeded_direction([w], mixed_seed(7, 0, i)) for i in range(3)]
    g = hessian @ start
    want = start - 0.1 * ((g @ z[1]) * z[1] + (g @ z[2]) * z[2]) / 2 - 0.1 * 0.2 / math.sqrt(6) * z[0]
    torch.testing.assert_close(w.detach(), want, rtol=1e-9, atol=1e-10)
    assert (frozen == 1).all()


def test_training_goes_on_bit_for_bit_from_a_state_dict():
    hessian, start = bowl(seed=3)
    w, v = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    one, two = (ZeroOrderSGD([p], lr=0.05) for p in (w, v))
    schedule = torch.optim.lr_scheduler.StepLR(one, 2, 0.5)
    for _ in range(3):
        one.step(lambda: w @ hessian @ w)
        schedule.step()
    with torch.no_grad():
        v.copy_(w)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        one.step(lambda: w @ hessian @ w)
        two.step(lambda: v @ hessian @ v)
    assert torch.equal(w, v)


def test_a_loss_that_is_not_finite_is_told_before_the_weights_move():
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(checks.ModelError, match="the losses at the two points are nan"):
        ZeroOrderSGD([w]).step(lambda: w.sum() * math.nan)
    assert (w == 1).all()


def test_values_that_are_not_numbers_have_not_reached_the_target():
    found = minimize_perturbed_two_point(
        lambda x: x.sum(1) * math.nan, torch.ones(2), step=0.1, target=0.0, max_iter=4, generator=0
    )
    assert not found.converged
    assert len(found.history) == 4
    assert not is_second_order(lambda x: x.sum() * math.nan, torch.ones(2), 0.1, 1.0, generator=0)


def test_second_order_is_asked_also_where_gradients_are_off_and_of_one_value_only():
    with torch.no_grad():
        assert is_second_order(lambda x: x.square().sum(), torch.zeros(2), 0.1, 1.0, generator=0)
    with pytest.raises(checks.ArgumentError, match="fun answered shape"):
        is_second_order(lambda x: x, torch.zeros(2), 0.1, 1.0)
