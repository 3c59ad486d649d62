"""Oracles of the SAM equations: Ornstein-Uhlenbeck processes, quadratics by hand, autograd, and where saddles attract."""

import copy
import math

import pytest
import torch
from scipy.linalg import expm, solve_continuous_lyapunov
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import (
    SAM,
    implicit_loss,
    saddle_attraction_radius,
    sam_sde,
    simulate_sde,
    weak_error,
)

P = nn.Parameter
VARIANTS = ("sam", "usam", "dnsam")


def problem(dtype=torch.float64, d=4, batches=6, seed=0):
    """A loss with a varying Hessian, its batches, and points."""
    g = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(batches, 5, d, generator=g, dtype=dtype),
        torch.randn(batches, 5, generator=g, dtype=dtype),
    )

    def loss(w, inputs, targets):
        return (torch.tanh(inputs @ w) - targets).square().mean()

    return loss, (x, y), torch.randn(3, d, generator=g, dtype=dtype)


def bowl(seed=0, d=4):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=g, dtype=torch.float64)
    return a @ a.T / d + torch.eye(d) / 4, P(torch.randn(d, generator=g, dtype=torch.float64))


def closure_of(w, hessian):
    def closure():
        w.grad = None
        loss = w @ hessian @ w / 2
        loss.backward()
        return loss

    return closure


def example(generator, dtype):
    loss, batches, x = problem(dtype)
    drift, diffusion = sam_sde(loss, batches, variant="sam", lr=0.1, radius=0.1)
    return simulate_sde(drift, diffusion, x, 0.1, 3, generator=generator)


LOSS, BATCHES, POINTS = problem()
EXAMPLE = Example(
    call=example,
    stochastic=True,
    refusals=(
        (lambda: SAM([P(torch.ones(1))], radius=-1.0), "radius is -1"),
        (lambda: SAM([P(torch.ones(1))], variant="asam"), "variant is 'asam'"),
        (lambda: SAM([P(torch.ones(1))], lr=0.1).step(None), "closure is None"),
        (
            lambda: SAM([P(torch.ones(1))], lr=0.1, variant="dnsam").step(lambda: 1.0),
            "full_batch is not given",
        ),
        (lambda: SAM([P(torch.ones(1))], lr=0.1).step(lambda: 1.0, lambda: 1.0), "full_batch is given"),
        (lambda: sam_sde(LOSS, BATCHES, variant="asam", lr=0.1, radius=0.1), "variant is 'asam'"),
        (lambda: sam_sde(LOSS, BATCHES, lr=0.0, radius=0.1), "lr is 0"),
        (lambda: sam_sde(LOSS, BATCHES, lr=0.1, radius=-0.1), "radius is -0.1"),
        (lambda: sam_sde(LOSS, (), lr=0.1, radius=0.1), "batches has"),
        (lambda: sam_sde(LOSS, (BATCHES[0], BATCHES[1][:2]), lr=0.1, radius=0.1), "lengths"),
        (lambda: implicit_loss(LOSS, BATCHES, variant="sgd", radius=0.1), "variant is 'sgd'"),
        (lambda: simulate_sde(abs, abs, torch.ones(1, 1), 0.0, 1), "dt is 0"),
        (lambda: simulate_sde(abs, abs, torch.ones(1, 1), 0.1, -1), "steps is -1"),
        (lambda: saddle_attraction_radius(torch.eye(2), 0.1), "hessian has the least eigenvalue 1"),
        (lambda: weak_error(torch.ones(1, 1), torch.ones(2, 1), torch.sum), "discrete has 1 paths"),
    ),
)


def test_without_a_radius_it_is_the_base_optimizer():
    for variant in ("sam", "usam"):
        (hessian, w), (_, v) = bowl(), bowl()
        ours = SAM([w], radius=0.0, lr=0.1, momentum=0.9, variant=variant)
        plain = torch.optim.SGD([v], lr=0.1, momentum=0.9)
        for _ in range(4):
            ours.step(closure_of(w, hessian))
            closure_of(v, hessian)()
            plain.step()
        assert torch.equal(w, v)


def test_unnormalised_steps_on_a_quadratic_are_powers_of_a_matrix():
    hessian, w = bowl(1)
    start = w.detach().clone()
    optimizer = SAM([w], lr=0.1, radius=0.3, variant="usam")
    for _ in range(5):
        optimizer.step(closure_of(w, hessian))
    once = torch.eye(4) - 0.1 * hessian @ (torch.eye(4) + 0.3 * hessian)
    torch.testing.assert_close(w.detach(), torch.linalg.matrix_power(once, 5) @ start)


def test_normalised_steps_use_the_norm_over_all_groups():
    hessian, w = bowl(2, d=6)
    a, b = (P(part.clone()) for part in w.detach().split([2, 4]))
    optimizer = SAM([{"params": [a]}, {"params": [b], "radius": 0.4}], lr=1.0, radius=0.2)

    def closure():
        optimizer.zero_grad()
        both = torch.cat([a, b])
        loss = both @ hessian @ both / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    start = w.detach()
    g = hessian @ start
    shift = g / g.norm() * torch.tensor([0.2] * 2 + [0.4] * 4)
    torch.testing.assert_close(torch.cat([a, b]).detach(), start - hessian @ (start + shift))


def test_the_full_gradients_norm_divides_the_batchs_gradient():
    hessian, w = bowl(3)
    start = w.detach().clone()
    full = torch.eye(4, dtype=torch.float64) * 3
    SAM([w], lr=1.0, radius=0.2, variant="dnsam").step(closure_of(w, hessian), closure_of(w, full))
    shift = 0.2 * hessian @ start / (3 * start).norm()
    torch.testing.assert_close(w.detach(), start - hessian @ (start + shift))


def test_a_zero_gradient_moves_nothing_and_frozen_parameters_stay():
    w, frozen = P(torch.zeros(2)), P(torch.ones(2), requires_grad=False)
    optimizer = SAM([w, frozen], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (w**2 * frozen).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (w == 0).all()
    assert (frozen == 1).all()


def test_training_goes_on_bit_for_bit_from_a_state_dict():
    (hessian, w), (_, v) = bowl(), bowl()
    one, two = (SAM([p], torch.optim.Adam, lr=0.05) for p in (w, v))
    schedule = torch.optim.lr_scheduler.StepLR(one, 2, 0.5)
    for _ in range(3):
        one.step(closure_of(w, hessian))
        schedule.step()
    with torch.no_grad():
        v.copy_(w)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        one.step(closure_of(w, hessian))
        two.step(closure_of(v, hessian))
    assert torch.equal(w, v)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_drift_is_minus_the_gradient_of_the_implicit_loss(variant):
    drift, _ = sam_sde(LOSS, BATCHES, variant=variant, lr=0.1, radius=0.3)
    whole = implicit_loss(LOSS, BATCHES, variant=variant, radius=0.3)
    x = POINTS.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(whole(x).sum(), x)
    torch.testing.assert_close(drift(POINTS), -gradient)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_diffusion_matches_the_optimizers_noise_to_first_order(variant):
    rho = 1e-4
    x, lr = POINTS[:1], 0.1
    _, diffusion = sam_sde(LOSS, BATCHES, variant=variant, lr=lr, radius=rho)
    _, plain = sam_sde(LOSS, BATCHES, variant="sgd", lr=lr, radius=rho)
    g = torch.stack([_gradient(x[0], b) for b in range(6)])
    mean = g.mean(0)
    steps = []
    for b in range(6):
        shift = {"sam": g[b] / g[b].norm(), "usam": g[b], "dnsam": g[b] / mean.norm()}[variant]
        steps.append(_gradient(x[0] + rho * shift, b))
    got = (diffusion(x) @ diffusion(x).mT - plain(x) @ plain(x).mT)[0] / (lr * rho)
    if variant == "dnsam":
        # The equation takes every batch's Hessian for the mean one; so here: the mean Hessian times each gradient.
        hessian = torch.autograd.functional.hessian(
            lambda w: torch.stack([LOSS(w, BATCHES[0][b], BATCHES[1][b]) for b in range(6)]).mean(), x[0]
        )
        covariance = torch.cov(g.T, correction=0)
        want = (hessian @ covariance + covariance @ hessian) / mean.norm()
    else:
        want = (torch.cov(torch.stack(steps).T, correction=0) - torch.cov(g.T, correction=0)) / rho
    torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3 * float(want.abs().max()))


def _gradient(w, b):
    leaf = w.clone().requires_grad_(True)
    return torch.autograd.grad(LOSS(leaf, BATCHES[0][b], BATCHES[1][b]), leaf)[0]


def test_one_batch_has_no_noise():
    drift, diffusion = sam_sde(LOSS, tuple(b[:1] for b in BATCHES), variant="usam", lr=0.1, radius=0.3)
    assert diffusion(POINTS).abs().max() < 1e-12
    moved = simulate_sde(drift, diffusion, POINTS, 0.1, 1, generator=0)
    torch.testing.assert_close(moved, POINTS + 0.1 * drift(POINTS))


def test_without_a_radius_a_quadratic_gives_the_ornstein_uhlenbeck_process():
    hessian, _ = bowl(5, d=2)
    noise = torch.tensor([[1.0, 0.3], [-1.0, -0.3], [0.2, -0.8], [-0.2, 0.8]], dtype=torch.float64)
    lr, time, paths = 0.2, 1.5, 40_000
    drift, diffusion = sam_sde(
        lambda x, e: x @ hessian @ x / 2 + e @ x, noise, variant="sgd", lr=lr, radius=9.0
    )
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    ends = simulate_sde(drift, diffusion, start.expand(paths, 2), time / 150, 150, generator=1)
    h, sigma = hessian.numpy(), (noise.T @ noise / 4).numpy()
    decay = expm(-h * time)
    stationary = solve_continuous_lyapunov(h, lr * sigma)
    covariance = torch.as_tensor(stationary - decay @ stationary @ decay.T)
    mean = torch.as_tensor(decay) @ start
    assert (ends.mean(0) - mean).norm() < 4 * (covariance.trace() / paths).sqrt() + 0.01
    torch.testing.assert_close(torch.cov(ends.T), covariance, rtol=0.05, atol=2e-3)


def test_saddles_attract_inside_the_radius_and_not_outside():
    hessian = torch.diag(torch.tensor([1.0, -0.5, -2.0], dtype=torch.float64))
    assert saddle_attraction_radius(hessian, 0.3) == pytest.approx(0.15)
    for size, leaves in ((0.14, False), (0.16, True)):
        w = P(torch.tensor([0.0, size / 0.5, 0.0], dtype=torch.float64))  # |H w| = size
        optimizer = SAM([w], lr=0.01, radius=0.3)
        for _ in range(600):
            optimizer.step(closure_of(w, hessian))
        assert (w.detach().norm() > size / 0.5) == leaves


def test_weak_errors_are_differences_of_means_with_their_standard_error():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(4000, 2, generator=g), 0.3 + torch.randn(1000, 2, generator=g)
    found = weak_error(a, b, lambda x: x[:, 0])
    assert found.value == pytest.approx(abs(float(a[:, 0].double().mean() - b[:, 0].double().mean())))
    assert found.standard_error == pytest.approx(math.sqrt(1 / 4000 + 1 / 1000), rel=0.05)


@pytest.mark.parametrize("size", [1e4, 5e-7], ids=["large", "small"])
def test_half_precision_gradients_of_any_size_ascend_by_the_radius(size):
    w = nn.Parameter(torch.full((100,), 1.0, dtype=torch.float16))
    optimizer = SAM([w], lr=0.0, radius=0.5)
    seen = []

    def closure():
        seen.append(w.detach().double().clone())
        w.grad = torch.full((100,), size, dtype=torch.float16)
        return 1.0

    optimizer.step(closure)
    assert float((seen[1] - seen[0]).norm()) == pytest.approx(0.5, rel=2e-2)


def test_what_is_no_saddle_is_refused():
    flat = torch.ones(3, 3, dtype=torch.float64)  # rounding makes -1e-16 of its zero eigenvalues
    with pytest.raises(checks.ArgumentError, match="no saddle"):
        saddle_attraction_radius(flat, 0.1)
    for wrong in (torch.ones(2, 3), torch.tensor([[1.0, 2.0], [0.0, -1.0]])):
        with pytest.raises(checks.ArgumentError, match="not symmetric"):
            saddle_attraction_radius(wrong, 0.1)
    with pytest.raises(checks.ArgumentError, match="diffusion answered shape"):
        simulate_sde(lambda x: x, lambda x: x, torch.ones(2, 2), 0.1, 1)
