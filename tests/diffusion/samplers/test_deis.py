"""Oracles of the exponential Adams methods: constants, DDIM, polynomials, orders, weights by quadrature, and diffusers."""

import math
import sys
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import lagrange

from _common import Example
from perturbkit.core import Denoiser
from perturbkit.diffusion import sample_ddim, sample_deis
from perturbkit.diffusion.samplers.deis import _adams

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VE, VP, constant, gaussian, gaussian_end, mixture, slope, start

EXAMPLE = Example(
    call=lambda generator, dtype: sample_deis(gaussian(), start(3, 4, VP, dtype=dtype), VP.times(6)),
    read=lambda result: [result.x],
    refusals=(
        (lambda: sample_deis(gaussian(), start(3, 4, VP), VP.times(6), order=5), "order is 5"),
        (lambda: sample_deis(gaussian(), start(3, 4, VP), torch.tensor([0.5, 0.0])), "times ends at 0"),
        (lambda: sample_deis(gaussian(), start(3, 4, VP), torch.tensor([0.1, 0.5])), "strictly decreasing"),
    ),
)


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", [VE, VP], ids=["ve", "vp"])
def test_constant_noise_is_exact(order, corrector, schedule):
    d, eps = constant(schedule)
    x, times = start(schedule=schedule), schedule.times(6, t_end=0.01)
    a, b = (float(schedule.alpha(t)) for t in times[[0, -1]])
    la, lb = (float(schedule.lam(t)) for t in times[[0, -1]])
    found = sample_deis(d, x, times, order=order, corrector=corrector)
    torch.testing.assert_close(found.x, b * (x / a + (lb - la) * eps), rtol=1e-9, atol=1e-9)


def test_order_one_is_ddim():
    d, x, times = gaussian(), start(4, 3, VP), VP.times(7)
    torch.testing.assert_close(sample_deis(d, x, times, order=1).x, sample_ddim(d, x, times).x)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_polynomials_in_the_log_noise_level_are_exact_once_the_start_is_over(degree):
    """eps = u^degree, whatever the state, from a start where earlier values are of the same polynomial."""
    u = [2.0, 1.1, 0.7, -0.4, -1.0]
    nodes = u[3 - degree : 4]
    weights = _adams(nodes, u[3], u[4])
    exact = quad(lambda v: v**degree * math.exp(v), u[3], u[4])[0]
    assert sum(w * n**degree for w, n in zip(weights, nodes, strict=True)) == pytest.approx(exact, rel=1e-12)


def test_weights_are_integrals_of_the_lagrange_basis():
    nodes = [1.3, 0.4, -0.2]
    for i, weight in enumerate(_adams(nodes, -0.2, -1.5)):
        basis = lagrange(nodes, [float(i == j) for j in range(3)])
        assert weight == pytest.approx(quad(lambda v, b=basis: b(v) * math.exp(v), -0.2, -1.5)[0], rel=1e-10)


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_of_convergence(order, corrector):
    x = start(6, 3, VP)
    exact = gaussian_end(x, VP, 0.7, 0.2)
    first, last = VP.lam(torch.tensor([0.7, 0.2], dtype=torch.float64)).log()

    def error(n):
        u = torch.linspace(float(first), float(last), n + 1, dtype=torch.float64)
        h = float(u[0] - u[1])
        # The first steps have too few values for their order: they are short enough for that not to show.
        u = torch.cat([u[:1], u[:1] - h**2 * torch.arange(1, 4), u[1:]])
        times = VP.time(u.exp())
        return float((sample_deis(gaussian(), x, times, order=order, corrector=corrector).x - exact).norm())

    assert slope(error, 24) > order + corrector - 0.4


def test_steps_by_hand():
    d = Denoiser(lambda x, t: torch.sin(x) * t[:, None], VP)
    x, times = start(3, 2, VP), VP.times(3, t_end=0.2)
    u = VP.lam(times).log().tolist()
    alpha = VP.alpha(times).tolist()
    for corrector in (False, True):
        z, eps, seen = x / alpha[0], [d.eps(x, times[0])], []
        for i in range(3):
            w = _adams(u[: i + 1], u[i], u[i + 1])
            moved = z + sum(a * e for a, e in zip(w, eps, strict=True))
            seen.append(alpha[i + 1] * moved)
            if i < 2:
                eps = [*eps, d.eps(seen[-1], times[i + 1])]
                if corrector:
                    w = _adams(u[: i + 2], u[i], u[i + 1])
                    moved = z + sum(a * e for a, e in zip(w, eps, strict=True))
                z = moved
        found = []
        result = sample_deis(d, x, times, corrector=corrector, callback=lambda i, s, f=found: f.append(s))
        torch.testing.assert_close(torch.stack(found), torch.stack(seen))
        assert result.cost.nfev == 3 * 3


def test_far_better_than_ddim_on_a_mixture():
    d, world = mixture()
    x = start(60)
    exact = world.probability_flow(x, 20.0, 0.02)
    times = VE.times(10, t_end=0.0, spacing="karras")
    ddim = float((sample_ddim(d, x, times).x - exact).norm(dim=1).median())
    for order, factor in ((2, 0.3), (3, 0.2)):
        ours = float((sample_deis(d, x, times, order=order).x - exact).norm(dim=1).median())
        assert ours < factor * ddim


def test_agrees_with_diffusers_in_the_mean_of_steps():
    """Both are the same method with another approximation of the same integrals: equal for many steps."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra")
    peer = diffusers.DEISMultistepScheduler(solver_order=2, lower_order_final=False)
    peer.set_timesteps(200)
    d = Denoiser.from_diffusers(lambda x, t: 0.5 * torch.tanh(x) + 0.0005 * t[:, None], peer)
    x = start(3, 4, VP)
    theirs, states = x.clone(), [x]
    for t in peer.timesteps:
        theirs = peer.step(d.eps(theirs, float(t)), t, theirs).prev_sample
        states.append(theirs)
    ours = sample_deis(d, x, peer.timesteps.double(), order=2).x
    scale = float(states[-2].abs().max())
    assert float((ours - states[-2]).abs().max()) < 2e-3 * scale


def test_parameters_of_the_network_are_batched_by_vmap():
    x, times = start(3, 4, VP), VP.times(4, t_end=0.1)

    def draw(weight):
        return sample_deis(Denoiser(lambda y, t: torch.tanh(weight * y), VP), x, times).x

    weights = torch.tensor([0.3, 0.8], dtype=x.dtype)
    torch.testing.assert_close(torch.func.vmap(draw)(weights), torch.stack([draw(w) for w in weights]))
