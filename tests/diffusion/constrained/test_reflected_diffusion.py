"""Oracles of reflected diffusion: two series of one density, draws against it, point masses and the uniform law."""

import math

import pytest
import torch
from scipy.stats import kstest

from _common import Example
from perturbkit.core.random import randn
from perturbkit.diffusion import ReflectedDiffusion, folded_normal_log_prob, folded_normal_score, reflect
from perturbkit.diffusion.constrained import _parts


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def call(generator, dtype):
    model = ReflectedDiffusion(2, 0.05)
    points = rand(3, 2, dtype=dtype)
    score = model.empirical_score(points)
    x, times = rand(4, 2, seed=1, dtype=dtype), model.schedule.times(5, t_end=0.0)
    drawn = model.sample(score, x, times, corrector_steps=1, generator=generator)
    return [drawn.x, model.flow(score, x, times).x, model.loss(score, points, generator=generator)]


MODEL = ReflectedDiffusion(2)
TIMES = MODEL.schedule.times(4, t_end=0.0)


def zero(x, t):
    return torch.zeros_like(x)


EXAMPLE = Example(
    call=call,
    stochastic=True,
    refusals=(
        (lambda: ReflectedDiffusion(0), "dim is 0"),
        (lambda: ReflectedDiffusion(2, 0.1, 0.05), "sigma_max is 0.05"),
        (lambda: MODEL.perturb(rand(3, 2) * 2 - 1, 0.5), "x0 has values from"),
        (lambda: MODEL.perturb(rand(3, 1), 0.5), "x0 has shape"),
        (lambda: MODEL.perturb(rand(3, 2), 1.5), "t is 1.5"),
        (lambda: MODEL.perturb(rand(3, 2), torch.zeros(2)), "t has shape"),
        (lambda: MODEL.loss(zero, rand(3, 2) + 1), "x0 has values"),
        (lambda: MODEL.loss(lambda x, t: x[:, :1], rand(3, 2)), "score answered shape"),
        (lambda: MODEL.sample(lambda x, t: x[:, 0], rand(3, 2), TIMES), "score answered shape"),
        (lambda: MODEL.flow(lambda x, t: x[:, 0], rand(3, 2), TIMES), "score answered shape"),
        (lambda: MODEL.empirical_score(rand(3, 2), [1.0, 1.0, 1.0]), "weights is"),
        (lambda: MODEL.sample(zero, rand(3, 2), TIMES.flip(0)), "strictly monotone"),
        (lambda: MODEL.sample(zero, rand(3, 2), TIMES, weight=-1.0), "weight is -1"),
        (lambda: MODEL.sample(zero, rand(3, 2), TIMES, boundary="clip"), "boundary is 'clip'"),
        (lambda: MODEL.sample(zero, rand(3, 2), TIMES, corrector_steps=-1), "corrector_steps is -1"),
        (lambda: MODEL.flow(zero, rand(3, 2) + 2, TIMES), "x has values"),
        (lambda: MODEL.empirical_score(rand(3, 2), torch.tensor([1.0, 0.0, 1.0])), "weights is 0"),
        (lambda: folded_normal_log_prob(rand(2), rand(2), 0.0), "sigma is 0"),
        (lambda: folded_normal_score(rand(2) + 1, rand(2), 1.0), "x has values"),
        (lambda: reflect(torch.tensor([math.nan])), "NaN"),
    ),
)


def test_reflect_folds():
    x = 20 * rand(500) - 10
    mirrored = x % 2
    expected = torch.where(mirrored > 1, 2 - mirrored, mirrored)
    torch.testing.assert_close(reflect(x), expected, rtol=0, atol=1e-12)
    assert torch.allclose(reflect(-x), reflect(x), atol=1e-12)
    assert torch.allclose(reflect(x + 2), reflect(x), atol=1e-12)


def test_the_two_series_agree():
    x, mean = rand(200), rand(200, seed=1)
    s = 0.3 + 0.7 * rand(200, seed=2)
    by_images = _parts.images(x, mean, s, reach=6).exp().sum(-1)
    by_modes, slope = _parts.modes(x, mean, s)
    torch.testing.assert_close(by_images, by_modes, rtol=0, atol=1e-10)
    weights = _parts.images(x, mean, s, reach=6).exp()
    by_weights = (weights * (_parts.centres(mean, 6) - x[:, None])).sum(-1) / s**2
    torch.testing.assert_close(by_weights, slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.49, 0.51, 1.5])
def test_density_integrates_to_one_and_score_is_its_derivative(sigma):
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for mean in (torch.tensor(0.0).double(), rand(1)[0], torch.tensor(1.0).double()):
        density = folded_normal_log_prob(grid, mean, sigma).exp()
        assert abs(float(torch.trapezoid(density, grid)) - 1) < 1e-6
        x = rand(50, seed=3).requires_grad_()
        (slope,) = torch.autograd.grad(folded_normal_log_prob(x, mean, sigma).sum(), x)
        found = folded_normal_score(x.detach(), mean, sigma)
        torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-8)
        ends = folded_normal_score(torch.tensor([0.0, 1.0]).double(), torch.tensor(0.37).double(), sigma)
        assert float(ends.abs().max()) < 1e-6


@pytest.mark.parametrize("t", [0.3, 0.6, 0.8])
def test_perturbed_points_have_the_folded_law(t):
    model = ReflectedDiffusion(1, 0.02, 5.0)
    mean = torch.full((5000, 1), 0.1, dtype=torch.float64)
    drawn = model.perturb(mean, t, 3)[:, 0].numpy()
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)
    density = folded_normal_log_prob(grid, mean[0], float(model.schedule.sigma(t))).exp()
    cumulative = torch.cat((torch.zeros(1), torch.cumulative_trapezoid(density, grid)))

    def cdf(x):
        import numpy as np

        return np.interp(x, grid.numpy(), cumulative.numpy())

    assert kstest(drawn, cdf).pvalue > 0.01
    # Clipping, which the fold is mistaken for, has another law.
    noise = torch.randn(5000, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    clipped = (mean + float(model.schedule.sigma(t)) * noise).clamp(0, 1)
    assert kstest(clipped[:, 0].numpy(), cdf).pvalue < 1e-6


@pytest.mark.parametrize("boundary", ["reflect", "project"])
@pytest.mark.parametrize("corrector_steps", [0, 1])
def test_a_point_mass_is_reached(boundary, corrector_steps):
    model = ReflectedDiffusion(3, 0.02)
    point = torch.tensor([[0.0, 0.4, 1.0]], dtype=torch.float64)
    score = model.empirical_score(point)
    x = model.sample(
        score,
        model.prior(50, generator=1, dtype=torch.float64),
        model.schedule.times(300, t_end=0.0),
        boundary=boundary,
        corrector_steps=corrector_steps,
        generator=2,
    )
    assert float((x.x - point).abs().max()) < 5 * 0.02
    assert float(x.x.min()) >= 0
    assert float(x.x.max()) <= 1
    assert x.cost.nfev == 300 * 50 * (1 + corrector_steps)


def test_samples_of_a_point_have_the_last_law():
    model = ReflectedDiffusion(1, 0.05)
    point = torch.tensor([[0.3]], dtype=torch.float64)
    start = model.prior(3000, generator=1, dtype=torch.float64)
    times = model.schedule.times(300, t_end=0.0)
    x = model.sample(model.empirical_score(point), start, times, generator=2).x
    assert abs(float(x.mean()) - 0.3) < 4 * 0.05 / math.sqrt(3000)
    assert abs(float(x.std()) / 0.05 - 1) < 0.05


def test_flow_is_the_quantile_map():
    # In one dimension the flow is monotone, so that uniform quantiles go to those of the last law.
    model = ReflectedDiffusion(1, 0.05)
    points, u = torch.tensor([[0.1], [0.8]]).double(), torch.linspace(0.02, 0.98, 25).double()[:, None]
    score = model.empirical_score(points, torch.tensor([1.0, 3.0]))
    x = model.flow(score, u, model.schedule.times(400, t_end=0.0)).x
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64)
    logs = folded_normal_log_prob(grid[:, None], points[:, 0], 0.05)
    density = (logs.exp() * torch.tensor([0.25, 0.75])).sum(1)
    cumulative = torch.cat((torch.zeros(1).double(), torch.cumulative_trapezoid(density, grid)))
    reached = torch.stack([cumulative[int((grid < v).sum())] for v in x[:, 0]])
    torch.testing.assert_close(reached, u[:, 0], rtol=0, atol=2e-3)
    back = model.flow(score, x, model.schedule.times(400, t_end=0.0).flip(0)).x
    torch.testing.assert_close(back, u, rtol=0, atol=2e-3)


def test_uniform_data_have_no_score():
    model = ReflectedDiffusion(1, 0.1)
    points = ((torch.arange(400).double() + 0.5) / 400)[:, None]
    x = rand(60, 1)
    for t in (0.1, 0.5, 0.9):
        score = model.empirical_score(points)(x, torch.full((60,), t).double())
        assert float(score.abs().max()) < 1e-6
    start = model.prior(3000, generator=0)
    x = model.sample(zero, start, model.schedule.times(20, t_end=0.0), generator=1).x
    assert kstest(x[:, 0].numpy(), "uniform").pvalue > 0.01


def test_the_loss_is_least_at_the_score():
    model = ReflectedDiffusion(2, 0.05)
    points = rand(4, 2)
    exact = model.empirical_score(points)
    batch = points.repeat(2000, 1)
    best = float(model.loss(exact, batch, generator=0))
    for change in (0.9, 1.1):
        worse = model.loss(lambda x, t, c=change: c * exact(x, t), batch, generator=0)
        assert float(worse) > best
    # At its optimum the loss is the variance of the target given the state: nothing of it is left for one point.
    alone = points[:1].repeat(50, 1)
    assert float(model.loss(model.empirical_score(points[:1]), alone, generator=0)) < 1e-20


def test_loss_by_hand():
    model = ReflectedDiffusion(2)
    x0, t = rand(6, 2), rand(6, seed=1)
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    sigma = model.schedule.sigma(t)[:, None]
    x = reflect(x0 + sigma * noise)
    expected = (sigma * (3.0 - folded_normal_score(x, x0, sigma))).square().mean()
    found = model.loss(lambda x, t: torch.full_like(x, 3.0), x0, t=t, generator=4)
    torch.testing.assert_close(found, expected)


def test_guidance_combines_two_scores():
    model = ReflectedDiffusion(1, 0.05)
    left, both = (model.empirical_score(torch.tensor(p).double()) for p in ([[0.2]], [[0.2], [0.8]]))
    start, times = model.prior(20, generator=0, dtype=torch.float64), model.schedule.times(30, t_end=0.0)
    plain = model.sample(left, start, times, generator=1)
    same = model.sample(left, start, times, unconditional=both, weight=1.0, generator=1)
    torch.testing.assert_close(plain.x, same.x)
    assert same.cost.nfev == 2 * plain.cost.nfev
    strong = model.sample(left, start, times, unconditional=both, weight=10.0, generator=1).x
    assert 0 <= float(strong.min()) <= float(strong.max()) <= 1
    by_hand = model.sample(lambda x, t: 10 * left(x, t) - 9 * both(x, t), start, times, generator=1).x
    torch.testing.assert_close(strong, by_hand)


def test_images_as_states():
    model = ReflectedDiffusion((1, 2, 2))
    x0 = rand(3, 1, 2, 2)
    t = rand(3, seed=1)
    x = model.perturb(x0, t, 0)
    score = model.empirical_score(x0[:1])
    torch.testing.assert_close(score(x, t), model.transition_score(x, x0[:1].expand(3, 1, 2, 2), t))


def test_a_step_and_its_corrector_by_hand():
    model, start = ReflectedDiffusion(2, 0.05), rand(7, 2)
    score, times, snr = model.empirical_score(rand(4, 2, seed=1)), torch.tensor([0.8, 0.5]).double(), 0.2
    found = model.sample(score, start, times, corrector_steps=1, snr=snr, generator=3).x
    g = torch.Generator().manual_seed(3)
    before, after = (model.schedule.sigma(t) for t in times)
    v = before**2 - after**2
    x = reflect(
        start + v * score(start, times[0].expand(7)) + v.sqrt() * randn(start.shape, generator=g, like=start)
    )
    eps = 2 * (snr * after) ** 2
    x = reflect(
        x + eps * score(x, times[1].expand(7)) + (2 * eps).sqrt() * randn(x.shape, generator=g, like=x)
    )
    torch.testing.assert_close(found, x)
