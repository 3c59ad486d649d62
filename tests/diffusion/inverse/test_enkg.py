"""Oracles of EnKG: the update by matrices, the plain sampler, the span of the ensemble, equivariance, a known posterior."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.diffusion import BlackBox, sample_ddim, sample_enkg

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VP, gaussian

EDM = EDMSchedule(10.0)
TIMES = EDM.times(12, t_end=0.02, spacing="karras")


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nonlinear(x):
    flat = x.flatten(1)
    return torch.stack([flat[:, 0].sin() + flat[:, 1] ** 2, flat[:, 2]], 1)


def example(dtype):
    return sample_enkg(
        gaussian(EDM), 10 * draw(9, 3, dtype=dtype), TIMES, nonlinear, torch.tensor([0.3, 0.1], dtype=dtype)
    )


PRIOR, START, Y = gaussian(EDM), 10 * draw(9, 3), torch.tensor([0.3, 0.1], dtype=torch.float64)
EXAMPLE = Example(
    call=lambda generator, dtype: example(dtype),
    read=lambda result: [result.x, result.extras["misfit"]],
    chunked=lambda size: sample_enkg(PRIOR, START, TIMES, BlackBox(nonlinear, chunk_size=size), Y),
    refusals=(
        (lambda: sample_enkg(PRIOR, START[:1], TIMES, nonlinear, Y), "x has 1 particle"),
        (lambda: sample_enkg(PRIOR, START, TIMES, nonlinear, Y[:1]), "one row of the answer"),
        (lambda: sample_enkg(PRIOR, START, TIMES, nonlinear, Y, guidance=-1.0), "guidance is -1"),
        (lambda: sample_enkg(PRIOR, START, TIMES, nonlinear, Y, n_updates=0), "n_updates is 0"),
        (lambda: sample_enkg(PRIOR, START, TIMES, nonlinear, Y, window=(0.5, 0.2)), r"window\[1\] is 0.2"),
        (lambda: sample_enkg(PRIOR, START, TIMES, nonlinear, Y, window=0.5), "window is 0.5"),
        (
            lambda: sample_enkg(PRIOR, START, TIMES, lambda x: nonlinear(x) / 0, Y),
            "NaN or infinity to 9 of 9",
        ),
        (lambda: sample_enkg(PRIOR, START, TIMES, nonlinear, Y, ode_steps=0), "ode_steps is 0"),
        (
            lambda: sample_enkg(PRIOR, START, TIMES, nonlinear, Y, noise_precision=torch.ones(3)),
            "noise_precision has shape",
        ),
        (lambda: sample_enkg(PRIOR, START, torch.tensor([5.0, 0.0]), nonlinear, Y), "there is no noise"),
        (lambda: sample_enkg(PRIOR, START, TIMES.flip(0), nonlinear, Y), "strictly decreasing"),
    ),
)


def test_a_measurement_may_be_one_number():
    column = sample_enkg(PRIOR, START, TIMES, lambda x: x[:, :1] ** 3, Y[:1])
    number = sample_enkg(PRIOR, START, TIMES, lambda x: x[:, 0] ** 3, Y[0])
    torch.testing.assert_close(number.x, column.x)
    torch.testing.assert_close(number.extras["misfit"], column.extras["misfit"])


def one_step(denoiser, x, forward, y, times, **options):
    """The ensemble after one guided update, with the Euler step that follows undone by the caller."""
    seen = []
    sample_enkg(
        denoiser, x, times, forward, y, window=(0, 1), callback=lambda i, s: seen.append(s), **options
    )
    return seen[0]


@pytest.mark.parametrize("ode_steps", [1, 4])
def test_update_is_the_covariance_preconditioned_gradient(ode_steps):
    # x0 = g x along the Gaussian's flow, whatever the Euler steps are, so the measurement is a linear function of x.
    variance, d, m, j = 0.5, 5, 3, 20
    prior, x, a = gaussian(EDM, variance), 3 * draw(j, d, seed=1), draw(m, d, seed=2)
    y, precision = draw(m, seed=3), torch.diag(torch.tensor([1.0, 2.0, 0.5]).double()) + 0.1
    times = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    unguided = one_step(
        prior, torch.eye(d).double(), lambda z: z, torch.zeros(d).double(), times, guidance=0.0
    )
    scale = float(unguided[0, 0])  # of the Euler step
    grid = (
        [3.0] if ode_steps == 1 else EDM.times(3, t_start=3.0, t_end=0.5, spacing="karras").tolist()
    )  # Euler steps of x0 = gain(t) x

    def gain(t):
        return variance / (variance + t**2)

    to_clean = math.prod(1 + (t - s) / s * (1 - gain(s)) for s, t in itertools.pairwise(grid)) * gain(
        grid[-1]
    )
    found = one_step(
        prior, x, lambda z: z @ a.T, y, times, guidance=0.7, ode_steps=ode_steps, noise_precision=precision
    )
    covariance = torch.cov(x.T, correction=0) * to_clean  # of x and the clean state
    errors = to_clean * x @ a.T - y
    direction = errors @ precision @ a @ covariance  # rows: Cov(x, y) P (y_j - y)
    dy = (x - x.mean(0)) @ a.T * to_clean
    norm = torch.linalg.matrix_norm(errors @ precision @ dy.T / j)
    torch.testing.assert_close(found / scale, x - 0.7 / norm * direction, rtol=1e-10, atol=1e-10)


def test_without_guidance_it_is_the_plain_sampler():
    found = sample_enkg(PRIOR, START, TIMES, nonlinear, Y, guidance=0.0)
    torch.testing.assert_close(found.x, sample_ddim(PRIOR, START, TIMES).x, rtol=1e-12, atol=1e-12)
    assert found.cost.nfev == 12 * 9
    assert found.extras["nfev_forward"] == 9  # for the misfit
    torch.testing.assert_close(found.extras["misfit"], (nonlinear(found.x) - Y).norm(dim=1))


@pytest.mark.parametrize("schedule", [EDM, VP], ids=["edm", "vp"])
def test_ensemble_stays_in_its_affine_span(schedule):
    # A denoiser that scales keeps the span too: what is left is the update's doing.
    prior, x = gaussian(schedule), draw(4, 7, seed=4)
    times = schedule.times(8, t_end=0.05)
    end = sample_enkg(
        prior, x, times, lambda z: z[:, :3].sin(), torch.ones(3).double(), window=(0, 1), n_updates=2
    ).x
    start = torch.cat([x, torch.zeros(1, 7).double()])  # the span with the origin, to which the flow scales
    assert torch.linalg.matrix_rank(torch.cat([start, end])) == torch.linalg.matrix_rank(start) == 4
    assert float((end - sample_ddim(prior, x, times).x).norm()) > 0.1


def test_equivariance_under_linear_maps():
    # The ensemble, the prior and the forward model in other coordinates: the same particles in these coordinates.
    m = draw(3, 3, seed=5) + 2 * torch.eye(3).double()
    back = torch.linalg.inv(m)
    prior = Denoiser(lambda x, t: x.sin(), EDM, predicts="x0")
    moved = Denoiser(lambda x, t: (x @ back.T).sin() @ m.T, EDM, predicts="x0")
    one = sample_enkg(prior, START, TIMES, nonlinear, Y).x
    other = sample_enkg(moved, START @ m.T, TIMES, lambda x: nonlinear(x @ back.T), Y).x
    torch.testing.assert_close(other, one @ m.T, rtol=1e-8, atol=1e-8)


def test_scale_of_the_precision_does_not_matter_but_its_shape_does():
    def run(p):
        return sample_enkg(PRIOR, START, TIMES, nonlinear, Y, noise_precision=p).x

    p = torch.tensor([4.0, 0.25]).double()
    torch.testing.assert_close(run(p), run(9 * p), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(p), run(torch.diag(p)), rtol=1e-9, atol=1e-9)
    assert float((run(p) - run(None)).norm()) > 1e-2


def test_costs_and_window():
    forward = BlackBox(nonlinear)
    found = sample_enkg(PRIOR, START, TIMES, forward, Y, window=(0.25, 0.5), ode_steps=3, n_updates=2)
    guided = 3  # steps 3, 4, 5 of 12
    assert forward.nfev == found.extras["nfev_forward"] == 9 * (2 * guided + 1)
    assert found.cost.nfev == 9 * (12 + 3 * 2 * guided)
    auto = sample_enkg(PRIOR, START, TIMES, forward, Y, window=(0.25, 0.5))
    assert auto.cost.nfev == 9 * (12 + (1 + 9 // 4) + (1 + 8 // 4) + (1 + 7 // 4))


def test_agreeing_particles_are_left_alone():
    found = sample_enkg(PRIOR, START, TIMES, lambda x: torch.zeros(len(x), 2).double(), Y)
    torch.testing.assert_close(found.x, sample_ddim(PRIOR, START, TIMES).x)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_a_measured_direction_and_leaves_the_others(seed):
    # Prior N(0, 0.5 I); the sum of two coordinates is measured as 1: its mean there is 1/2 each, and the rest is free.
    x = 10 * draw(300, 4, seed=seed)

    def run(k):
        times = EDM.times(40, t_end=0.01, spacing="karras")
        return sample_enkg(
            PRIOR, x, times, lambda z: z[:, :1] + z[:, 1:2], torch.ones(1).double(), ode_steps=k
        ).x

    # Few Euler steps misjudge where the flow ends, and the ensemble obeys them.
    errors = [abs(float(run(k)[:, :2].sum(1).mean()) - 1) for k in (2, 8, 32)]
    assert errors[0] > errors[1] > errors[2], errors
    assert errors[2] < 0.05
    found = run(32)
    assert float((found[:, 0] - found[:, 1]).std()) == pytest.approx(1.0, abs=0.25)
    assert float(found[:, 2:].std()) == pytest.approx(math.sqrt(0.5), abs=0.15)
