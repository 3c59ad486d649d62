"""Oracles of the single loops: closed-form gradients, the law of the Langevin steps, and autograd through DDIM."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.core.random import randn
from perturbkit.diffusion import ImplicitDenoising, ImplicitDiffusion, sample_ddim

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VP

EDM = EDMSchedule(10.0)
TIMES = EDM.times(6, t_end=0.1)


def _normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _quadratic(x, mean):
    return 0.5 * (x - mean).square().sum(1)


def _loop(objective=lambda x: x.sum(1), n=40, d=2, dtype=torch.float64, **options):
    options = {"generator": 1, "lr": 0.01, **options}
    return ImplicitDiffusion(
        _quadratic, torch.zeros(d, dtype=dtype), objective, _normal(n, d, dtype=dtype), **options
    )


class Record(torch.optim.Optimizer):
    """Keeps the gradients and changes nothing."""

    def __init__(self, params):
        super().__init__(params, {})
        self.seen = []

    def step(self):
        self.seen.append([p.grad.clone() for group in self.param_groups for p in group["params"]])


class Net(nn.Module):
    def __init__(self, d=2):
        super().__init__()
        self.weight = nn.Parameter(0.3 * _normal(d, d, seed=3))
        self.bias = nn.Parameter(_normal(d, seed=4))

    def forward(self, x, t):
        return torch.tanh(x @ self.weight / (1 + t[:, None]) + self.bias)


def _denoising(objective, net=None, times=TIMES, schedule=EDM, **options):
    net = Net() if net is None else net
    options = {"generator": 5, "lr": 0.01, **options}
    return ImplicitDenoising(
        Denoiser(net, schedule), list(net.parameters()), objective, times, (7, 2), **options
    )


EXAMPLE = Example(
    call=lambda generator, dtype: _loop(dtype=dtype, generator=generator).run(3).particles,
    stochastic=True,
    refusals=(
        (lambda: _loop(n=1), "particles has 1 rows"),
        (lambda: _loop(step=0.0), "step"),
        (lambda: _loop(lr=-1.0), "lr"),
        (lambda: _loop(objective=lambda x: x).run(1), "objective answers with shape"),
        (lambda: _loop(objective=torch.ones(3, 5)), "objective has shape"),
        (lambda: _loop().run(0), "n_iter is 0"),
        (lambda: ImplicitDiffusion(_quadratic, [], lambda x: x.sum(1), _normal(4, 2)), "params is empty"),
        (lambda: ImplicitDenoising(Denoiser(Net(), EDM), [], lambda x: x.sum(1), TIMES, (7, 2)), "params has 0"),
        (lambda: _denoising(lambda x: x.sum(1), times=TIMES.flip(0)), "strictly decreasing"),
    ),
)  # fmt: skip


def _gradient_seen(loop, n_iter):
    found = [g[0] for g in loop._optimizer.seen]
    return torch.stack(found[-n_iter:])


def test_gradient_of_a_linear_cost_is_exact_in_the_mean():
    a = torch.tensor([1.0, -2.0], dtype=torch.float64)
    loop = _loop(lambda x: x @ a, n=2000, step=0.5, optimizer=Record)
    loop.run(200)
    seen = _gradient_seen(loop, 150)
    error = seen.std(0) / 150**0.5 * 3  # neighbours are correlated: a factor for that
    # Unadjusted Langevin with this step has variance 1 / (1 - step / 2), and the covariance with it.
    assert bool(((seen.mean(0) - a / (1 - 0.25)).abs() < 3 * error).all())


def test_covariance_by_hand():
    loop = _loop(lambda x: x.square().sum(1), optimizer=Record)
    x = loop.particles.clone()
    loop.run(1)
    reward, slope = x.square().sum(1), -x  # dV/dmean = mean - x, at mean 0
    expected = -((reward - reward.mean())[:, None] * (slope - slope.mean(0))).sum(0) / (len(x) - 1)
    torch.testing.assert_close(loop._optimizer.seen[0][0], expected)


def test_precision_of_a_quadratic():
    theta = torch.tensor(2.0, dtype=torch.float64)
    loop = ImplicitDiffusion(
        lambda x, t: 0.5 * t * x.square().sum(1), theta, lambda x: x.square().sum(1), _normal(4000, 1),
        step=0.05, optimizer=Record, generator=3,
    )  # fmt: skip
    loop.run(300)
    mean = _gradient_seen(loop, 200).mean()
    assert float(mean) == pytest.approx(
        -1 / 4, rel=0.15
    )  # l = 1 / theta, with the step's own 1 / (1 - 0.05)^2


def test_without_a_rate_it_is_unadjusted_langevin():
    loop = _loop(n=20_000, d=1, step=0.4, lr=0.0)
    found = loop.run(60)
    assert float(found.particles.var()) == pytest.approx(1 / (1 - 0.2), rel=0.05)
    assert torch.equal(found.params[0], torch.zeros(1, dtype=torch.float64))
    assert found.cost.nfev == 60 * 20_000
    assert found.cost.ngrad == 2 * 60 * 20_000


def test_likelihood_finds_the_mean_of_the_data():
    data = _normal(300, 2, seed=8) + torch.tensor([1.5, -0.5], dtype=torch.float64)
    loop = _loop(data, n=1000, step=0.1, lr=0.05)
    found = loop.run(300)
    torch.testing.assert_close(found.params[0], data.mean(0), rtol=0, atol=0.15)
    assert bool(found.history.isnan().all())


def test_a_run_goes_on_where_the_last_ended():
    whole, parts = _loop(), _loop()
    expected = whole.run(7)
    parts.run(3)
    found = parts.run(4)
    assert torch.equal(found.particles, expected.particles)
    assert torch.equal(found.params[0], expected.params[0])
    assert torch.equal(found.history, expected.history[3:])


def test_the_callers_tensors_are_left_alone():
    params, particles = torch.zeros(2, dtype=torch.float64), _normal(10, 2)
    before = particles.clone()
    ImplicitDiffusion(_quadratic, params, lambda x: x.sum(1), particles, lr=0.1).run(2)
    assert torch.equal(particles, before)
    assert not particles.requires_grad
    assert torch.equal(params, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("schedule", [EDM, VP], ids=["edm", "vp"])
def test_queues_give_the_gradient_of_autograd(schedule):
    """Only the first batch has a cost, so that all gradients together are its own."""
    calls = []

    def objective(x):
        calls.append(len(x))
        return x.sin().sum(1) * (len(calls) == 1)

    net = Net()
    times = schedule.times(6, t_end=0.1)
    loop = _denoising(objective, net, times, schedule, optimizer=Record)
    found = loop.run(13)
    assert len(calls) == 13 - 5
    total = [sum(g) for g in zip(*loop._optimizer.seen, strict=True)]
    first = schedule.sigma(times[0]) * randn(
        (7, 2), generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    end = sample_ddim(Denoiser(net, schedule), first, times).x
    expected = torch.autograd.grad(end.sin().sum(1).mean(), list(net.parameters()))
    for a, b in zip(total, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert bool(found.history[:5].isnan().all())
    assert float(found.history[5]) == pytest.approx(float(end.detach().sin().sum(1).mean()))


def test_a_full_queue_gives_a_whole_gradient_each_iteration():
    shift = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    a = torch.tensor([1.0, -3.0], dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: shift.expand_as(x), EDM)
    loop = ImplicitDenoising(denoiser, [shift], lambda x: x @ a, TIMES, (7, 2), optimizer=Record)
    loop.run(20)
    expected = float(TIMES[-1] - TIMES[0]) * a
    torch.testing.assert_close(loop._optimizer.seen[-1][0], expected)
    assert len(loop._optimizer.seen) == 20 - 5


def test_samples_are_those_of_ddim_and_calls_are_counted():
    net = Net()
    loop = _denoising(lambda x: x.sum(1), net, lr=0.0)
    found = loop.run(6)
    first = 10.0 * randn((7, 2), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    torch.testing.assert_close(found.particles, sample_ddim(Denoiser(net, EDM), first, TIMES).x.detach())
    assert found.cost.nfev == 7 * (1 + 2 + 3 + 4 + 5 + 6) + 7
    assert found.cost.ngrad == 7
    assert loop.run(2).cost.nfev == 7 * (6 + 2) + 7 * (6 + 3)
