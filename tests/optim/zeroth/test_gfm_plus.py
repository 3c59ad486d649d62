"""Oracles of GFM+: kinks and planes in closed form, its reduction to GFM, exact costs, and shortest hull vectors."""

import pytest
import torch

from _common import Example
from perturbkit.optim import goldstein_gradient_norm, minimize_gradient_free_nonsmooth


def solve(fun, x0, sampler=None, **options):
    options = {"radius": 0.1, "step": 0.01, "max_evals": 400, "big_batch": 9, "generator": 0} | options
    return minimize_gradient_free_nonsmooth(fun, x0, sampler, **options)


def kink(x):
    return x.abs().sum(1)


def noisy(x, y):
    return (x - y).abs().sum(1)


def normal(n, generator):
    return torch.randn(n, 3, generator=generator, dtype=torch.float64)


ONE = torch.ones(2)
EXAMPLE = Example(
    call=lambda generator, dtype: solve(kink, torch.ones(3, dtype=dtype), generator=generator),
    stochastic=True,
    refusals=(
        (lambda: solve(kink, ONE, radius=0.0), "radius is 0"),
        (lambda: solve(kink, ONE, step=0.0), "step is 0"),
        (lambda: solve(kink, ONE, big_batch=0), "big_batch is 0"),
        (lambda: solve(kink, ONE, small_batch=0), "small_batch is 0"),
        (lambda: solve(kink, ONE, period=0), "period is 0"),
        (lambda: solve(kink, ONE, max_evals=17), "max_evals is 17"),
        (lambda: solve(kink, ONE, output="best"), "output is 'best'"),
        (lambda: solve(kink, torch.ones(1, 2)), "x0"),
        (lambda: goldstein_gradient_norm(torch.sign, ONE, 0.0), "radius is 0"),
        (lambda: goldstein_gradient_norm(torch.sign, ONE, 1.0, 0), "n is 0"),
        (lambda: goldstein_gradient_norm(torch.sum, ONE, 1.0), "grad_fun answered"),
    ),
)


def first_estimate(fun, x0, n, sampler=None, **options):
    """Return the mean of n estimates at a point, from the last iterate after one step of size 1."""
    found = solve(fun, x0, sampler, step=1.0, max_evals=2 * n, big_batch=n, output="last", **options)
    return x0 - found.x


@pytest.mark.parametrize("place", [-0.4, -0.03, 0.0, 0.06, 0.5])
def test_the_mean_estimate_at_a_kink_is_the_slope_of_the_smoothed_function(place):
    x0 = torch.tensor([place], dtype=torch.float64)
    # In one dimension both directions give the same estimate: no spread at all.
    want = max(-1.0, min(1.0, place / 0.1))
    assert first_estimate(kink, x0, 4).item() == pytest.approx(want, abs=1e-12)


def test_estimates_of_a_plane_have_the_mean_and_variance_of_the_theory():
    a, n = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64), 200
    x0 = torch.zeros(4, dtype=torch.float64)
    means = torch.stack([first_estimate(lambda x: x @ a, x0, n, generator=s) for s in range(300)])
    variance = 3 * a.square().sum() / n  # (d - 1) |a|^2 / n
    assert (means.mean(0) - a).norm() < 4 * (variance / 300).sqrt()
    assert (means - a).square().sum(1).mean().item() == pytest.approx(variance.item(), rel=0.15)


def test_the_mean_in_several_dimensions_is_the_gradient_of_the_ball_average():
    x0 = torch.tensor([0.02, -0.05, 0.3], dtype=torch.float64)
    got = first_estimate(kink, x0, 200_000)
    # The average of sign(x + r u) over the ball; in one coordinate u has density 3/4 (1 - u^2).
    s = (x0 / 0.1).clamp(-1, 1)
    torch.testing.assert_close(got, 1.5 * (s - s**3 / 3), atol=0.02, rtol=0)


def test_period_one_is_the_method_without_recursion():
    one = solve(kink, torch.ones(3), period=1)
    two = solve(kink, torch.ones(3), variance_reduced=False)
    assert torch.equal(one.x, two.x)
    assert not torch.equal(one.x, solve(kink, torch.ones(3)).x)


def test_two_steps_written_out_share_directions_and_samples():
    x0, r, eta, n = torch.tensor([0.5, -0.2, 0.05], dtype=torch.float64), 0.1, 0.03, 4
    found = solve(
        noisy,
        x0,
        normal,
        step=eta,
        big_batch=n,
        small_batch=2,
        period=2,
        max_evals=16,
        output="last",
        generator=3,
    )
    g = torch.Generator().manual_seed(3)

    def draw(k):
        w = torch.randn(k, 3, generator=g, dtype=torch.float64)
        w = w / w.norm(dim=1, keepdim=True)
        return w, normal(k, g)

    def mean(x, w, y):
        return 3 / (2 * r) * ((noisy(x + r * w, y) - noisy(x - r * w, y))[:, None] * w).mean(0)

    v = mean(x0, *draw(n))
    x1 = x0 - eta * v
    w, y = draw(2)
    v = v + mean(x1, w, y) - mean(x0, w, y)
    torch.testing.assert_close(found.x, x1 - eta * v)
    assert found.cost.nfev == 2 * n + 4 * 2


@pytest.mark.parametrize("variance_reduced", [True, False])
def test_the_evaluations_are_kept_and_the_minimum_is_found(variance_reduced):
    found = solve(kink, torch.tensor([1.0, -2.0, 0.3]), max_evals=30_001, variance_reduced=variance_reduced)
    assert found.cost.nfev <= 30_001
    assert found.cost.nfev > 30_001 - 36
    last = solve(kink, torch.tensor([1.0, -2.0, 0.3]), max_evals=30_000, output="last")
    assert last.x.abs().max() < 0.12
    assert last.history[-1] < 0.2


def test_the_iterate_that_is_returned_is_drawn_uniformly():
    # A plane of slope one in one dimension: iterate t is at -0.01 t.
    times = [
        round(
            -100 * solve(lambda x: x[:, 0], torch.zeros(1), max_evals=8 * 18, period=1, generator=s).x.item()
        )
        for s in range(400)
    ]
    counts = torch.bincount(torch.tensor(times), minlength=8)
    assert len(counts) == 8
    assert float(((counts - 50) ** 2 / 50).sum()) < 24.3  # the 0.999 quantile of chi-squared with 7


def test_shortest_hull_vectors():
    far, near = torch.tensor([0.3, 0.4]), torch.tensor([0.03, 0.04])

    def unit(x):
        return x / x.norm(dim=1, keepdim=True)

    assert goldstein_gradient_norm(unit, near, 0.2, generator=0) < 1e-7
    # Outside, the directions seen from the origin fill a cone: its shortest hull vector is a chord's middle.
    got = goldstein_gradient_norm(unit, far, 0.1, 4000, generator=0)
    assert got == pytest.approx((1 - (0.1 / 0.5) ** 2) ** 0.5, abs=2e-3)
    assert got >= (1 - (0.1 / 0.5) ** 2) ** 0.5
    a = torch.tensor([3.0, -4.0]).double()
    assert goldstein_gradient_norm(lambda x: 1e-6 * a.expand(len(x), 2), a, 1.0) == pytest.approx(5e-6)
