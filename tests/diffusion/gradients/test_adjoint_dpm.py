"""Oracles of the adjoint: Gaussian flow maps, autograd through the steps and its order, memory, and refusals."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Denoiser, DiscreteSchedule
from perturbkit.diffusion import adjoint_sample, sample_ddim

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VP, gaussian, gaussian_end, mixture, start

TIMES = VP.times(12, t_end=0.05)


class Net(nn.Module):
    def __init__(self, d=3, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        self.weight = nn.Parameter(0.4 * torch.randn(d, d, generator=g, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(d, generator=g, dtype=dtype))
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, x, t):
        return torch.tanh(x @ self.weight + t[:, None] * self.bias)


def _call(generator, dtype):
    net, x = Net(dtype=dtype), start(2, 3, VP, dtype=dtype).requires_grad_()
    out = adjoint_sample(Denoiser(net, VP), x, TIMES)
    out.square().sum().backward()
    return [out.detach(), x.grad, net.weight.grad]


def _refused(**options):
    return lambda: adjoint_sample(
        Denoiser(Net(), VP), start(2, 3, VP), options.pop("times", TIMES), **options
    )


EXAMPLE = Example(
    call=_call,
    read=lambda result: result,
    refusals=(
        (_refused(method="midpoint"), "method is 'midpoint'"),
        (_refused(backward_times=VP.times(5, t_end=0.1)), "backward_times go from"),
        (_refused(backward_times=VP.times(5, t_end=0.05), checkpoint=True), "one of them"),
        (_refused(times=torch.tensor([1.0, 0.5, 0.0])), "times ends at 0"),
        (_refused(times=TIMES.flip(0)), "strictly decreasing"),
        (_refused(params=[torch.ones(2)]), "does not require gradients"),
    ),
)


def _through_the_steps(denoiser, x, times, method):
    """Differentiate the same solver by autograd."""
    lam = VP.lam(times).tolist()
    z = x / float(VP.alpha(times[0]))

    def f(z, at):
        t = float(VP.time(at))
        return denoiser.eps(float(VP.alpha(t)) * z, t)

    for a, b in pairwise(lam):
        h = b - a
        k1 = f(z, a)
        if method == "euler":
            z = z + h * k1
        elif method == "heun":
            z = z + h / 2 * (k1 + f(z + h * k1, b))
        else:
            k2 = f(z + h / 2 * k1, a + h / 2)
            k3 = f(z + h / 2 * k2, a + h / 2)
            z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + f(z + h * k3, b))
    return float(VP.alpha(times[-1])) * z


def _gradients(sample, net, x):
    leaf = x.clone().requires_grad_()
    out = sample(leaf)
    weight = torch.arange(1.0, out.numel() + 1, dtype=out.dtype).reshape(out.shape)
    return out.detach(), torch.autograd.grad((weight * out.sin()).sum(), [leaf, net.weight, net.bias])


@pytest.mark.parametrize("method", ["euler", "heun", "rk4"])
def test_draw_is_that_of_the_plain_solver(method):
    x, d = start(3, 3, VP), Denoiser(Net(), VP)
    expected = _through_the_steps(d, x, TIMES, method)
    torch.testing.assert_close(adjoint_sample(d, x, TIMES, method=method), expected, rtol=1e-12, atol=1e-12)
    if method == "euler":
        torch.testing.assert_close(expected, sample_ddim(d, x, TIMES).x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradient_of_the_gaussian_flow(checkpoint):
    x = start(4, 2, VP).requires_grad_()
    times = VP.times(50, t_end=0.05)
    out = adjoint_sample(gaussian(VP, 0.5), x, times, checkpoint=checkpoint)
    upstream = torch.linspace(-1, 2, 8, dtype=torch.float64).reshape(4, 2)
    out.backward(upstream)
    factor = gaussian_end(1.0, VP, 1.0, 0.05, 0.5)
    torch.testing.assert_close(out.detach(), factor * x.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, factor * upstream, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_agreement_with_autograd_improves_at_the_order(method, order):
    net, x = Net(), start(3, 3, VP, seed=4)
    d = Denoiser(net, VP)

    def gap(n):
        times = VP.times(n, t_start=0.6, t_end=0.2)
        ours = _gradients(lambda v: adjoint_sample(d, v, times, method=method), net, x)[1]
        theirs = _gradients(lambda v: _through_the_steps(d, v, times, method), net, x)[1]
        return sum(float((a - b).norm()) for a, b in zip(ours, theirs, strict=True))

    assert math.log2(gap(8) / gap(16)) > order - 0.5  # reversing a step of even order gains one


def test_euler_with_kept_states_is_autograd_through_ddim():
    net, x = Net(), start(3, 3, VP)
    d = Denoiser(net, VP)
    for times in (VP.times(7, t_end=0.05), torch.tensor([1.0, 0.4, 0.0], dtype=torch.float64)):
        ours = _gradients(lambda v, t=times: adjoint_sample(d, v, t, method="euler", checkpoint=True), net, x)
        theirs = _gradients(lambda v, t=times: sample_ddim(d, v, t).x, net, x)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=1e-9)
        for a, b in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_more_backward_times_make_gradients_more_exact():
    net, x = Net(), start(3, 3, VP)
    d = Denoiser(net, VP)

    def gradient(n, back=None):
        times, finer = (None if k is None else VP.times(k, t_start=0.6, t_end=0.2) for k in (n, back))
        return _gradients(lambda v: adjoint_sample(d, v, times, backward_times=finer, method="heun"), net, x)[
            1
        ][0]

    exact = gradient(60, 240)
    assert float((gradient(60, 30) - exact).norm()) < 0.2 * float((gradient(60, 10) - exact).norm())


def test_a_condition_and_an_unused_parameter():
    condition = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    shifted = 2 * condition  # not a leaf
    net = Net()
    d = Denoiser(lambda x, t: net(x + shifted, t), VP)
    out = adjoint_sample(d, start(3, 3, VP), VP.times(50, t_end=0.05), params=[shifted, net.unused])
    out.sum().backward()
    plain = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    d = Denoiser(lambda x, t: net(x + 2 * plain, t), VP)
    _through_the_steps(d, start(3, 3, VP), VP.times(50, t_end=0.05), "rk4").sum().backward()
    torch.testing.assert_close(condition.grad, plain.grad, rtol=1e-4, atol=1e-6)
    assert bool((net.unused.grad == 0).all())


def test_gradients_on_a_mixture():
    d, _ = mixture(schedule=VP)
    x = start(5, 8, VP).requires_grad_()
    times = VP.times(40, t_end=0.2)
    ours = torch.autograd.grad(adjoint_sample(d, x, times).square().sum(), x)[0]
    theirs = torch.autograd.grad(_through_the_steps(d, x, times, "rk4").square().sum(), x)[0]
    assert float(torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0)) > 0.9999


@pytest.mark.parametrize("n", [5, 40])
def test_memory_does_not_grow_with_the_steps(n):
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    d = Denoiser(Net(), VP)
    x = start(2, 3, VP).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = adjoint_sample(d, x, VP.times(n, t_end=0.05))
    assert sum(saved) == x.numel() + sum(p.numel() for p in d.fun.parameters())
    out.sum().backward()


def test_calls_are_counted():
    d = Denoiser(Net(), VP)
    x = start(2, 3, VP).requires_grad_()
    out = adjoint_sample(d, x, TIMES, method="heun")
    assert d.nfev == 2 * 2 * 12
    out.sum().backward()
    assert d.nfev == 2 * 2 * 2 * 12


def test_a_parameter_changed_before_the_backward_pass_is_refused():
    net = Net()
    out = adjoint_sample(Denoiser(net, VP), start(2, 3, VP), TIMES)
    with torch.no_grad():
        net.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_no_gradient_is_asked_for():
    out = adjoint_sample(gaussian(), start(2, 3, VP), TIMES)
    assert not out.requires_grad


def test_time_zero_is_allowed_where_it_has_noise():
    schedule = DiscreteSchedule.from_betas(torch.linspace(0.01, 0.1, 100, dtype=torch.float64))
    d, x = gaussian(schedule, 0.7), start(2, 3, schedule).requires_grad_()
    times = schedule.times(60, t_end=0.0)
    found = adjoint_sample(d, x, times)
    found.sum().backward()
    factor = gaussian_end(torch.ones(1, 1, dtype=torch.float64), schedule, times[0], 0.0, 0.7)
    torch.testing.assert_close(x.grad, factor.expand_as(x), rtol=1e-5, atol=0)


def test_kept_states_are_those_of_the_draw():
    forward, backward = [], []

    def network(x, t):
        (backward if x.requires_grad else forward).append(x.detach().clone())
        return torch.tanh(x) * t[:, None]

    x = start(2, 3, VP).requires_grad_()
    adjoint_sample(
        Denoiser(network, VP), x, VP.times(4, t_end=0.05), method="heun", checkpoint=True
    ).sum().backward()
    for drawn, solved in zip(forward[2::2], reversed(backward[2::2]), strict=True):
        torch.testing.assert_close(solved, drawn, rtol=1e-14, atol=0)


def test_parameters_of_a_wrapped_network_are_found():
    net = Net(d=1)
    denoiser = Denoiser.from_edm(lambda x, t: net(x, t))
    assert not adjoint_sample(denoiser, start(2, 1, VP), TIMES).requires_grad  # a plain function has none
    wrapped = Denoiser.from_edm(net)
    adjoint_sample(wrapped, start(2, 1, VP), TIMES).sum().backward()
    assert float(net.weight.grad.abs().sum()) > 0
