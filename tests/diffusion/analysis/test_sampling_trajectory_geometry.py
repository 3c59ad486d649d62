"""Oracles of the geometry of sampling: mean shift by hand, straight lines, limits, and the exact flow."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.core import EDMSchedule, VPSchedule
from perturbkit.data import EmpiricalMeasure
from perturbkit.diffusion import (
    EmpiricalDenoiser,
    annealed_mean_shift,
    sample_ddim,
    sample_ode_jump,
    score_deviation,
    trajectory_geometry,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import gaussian

EDM = EDMSchedule(20.0)


def _points(n=30, d=4, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _run(generator, dtype):
    points = _points(dtype=dtype)
    denoiser = EmpiricalDenoiser(points, EDM)
    path = annealed_mean_shift(points, 20 * points[:3], EDM.times(5, t_end=0.1))
    shape = trajectory_geometry(path, path)
    return [
        path,
        shape.deviation,
        score_deviation(denoiser, points, EDM.times(2, t_end=0.1), generator=generator),
    ]


EXAMPLE = Example(
    call=_run,
    read=lambda result: result,
    refusals=(
        (lambda: EmpiricalDenoiser(_points(), weights=-torch.ones(30)), "weights go from -1"),
        (lambda: EmpiricalDenoiser(_points()).x0(torch.ones(2, 5), 1.0), "x has shape"),
        (lambda: annealed_mean_shift(_points(), _points(3, 2), torch.tensor([2.0, 1.0])), "points has shape"),
        (lambda: annealed_mean_shift(_points(), _points(3), torch.tensor([1.0, 2.0])), "bandwidths has 2"),
        (lambda: trajectory_geometry(_points(3)[:, None], _points(2, 3)[:, None]), "denoised has shape"),
        (lambda: trajectory_geometry(_points(3), _points(3)), "trajectory has shape"),
        (lambda: sample_ode_jump(EmpiricalDenoiser(_points(), EDM), _points(2), EDM.times(4), jump_at=30.0), "jump_at"),
        (
            lambda: sample_ode_jump(
                EmpiricalDenoiser(_points(), EDM), _points(2), torch.tensor([2.0, 1.0, 0.0]), jump_at=0.0
            ),
            "no noise is left",
        ),
        (lambda: score_deviation(gaussian(), _points(), torch.tensor([0.0])), "there is no noise"),
    ),
)  # fmt: skip


@pytest.mark.parametrize("schedule", [EDM, VPSchedule()], ids=["edm", "vp"])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_denoiser_is_the_posterior_mean_of_the_data(schedule, chunk):
    points, x = _points(), 2 * _points(5, seed=3)
    weights = torch.rand(30, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights[:3] = 0
    t = torch.tensor([0.05, 0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    a, s = schedule.alpha(t), schedule.sigma(t)
    expected = torch.empty_like(x)
    for i in range(5):
        mass = weights.numpy() * np.exp(
            -((x[i].numpy() - float(a[i]) * points.numpy()) ** 2).sum(1) / (2 * float(s[i]) ** 2)
        )
        expected[i] = torch.from_numpy((mass[:, None] * points.numpy()).sum(0) / mass.sum())
    found = EmpiricalDenoiser(points, schedule, weights, chunk_size=chunk)
    torch.testing.assert_close(found.x0(x, t), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.score(x, t), (a[:, None] * expected - x) / s[:, None] ** 2)


def test_denoiser_agrees_with_the_world_at_every_level():
    points, x = _points(40, 6), 3 * _points(9, 6, seed=8)
    world, denoiser = EmpiricalMeasure(points), EmpiricalDenoiser(points, EDM)
    for level in (1e-3, 0.2, 1.0, 20.0):
        torch.testing.assert_close(denoiser.x0(x, level), world.posterior_mean(x, 1.0, level))


def test_denoiser_without_noise_is_the_nearest_point():
    points, x = _points(), _points(6, seed=2)
    nearest = points[torch.cdist(x, points).argmin(1)]
    assert torch.equal(EmpiricalDenoiser(points, chunk_size=4).x0(x, 0.0), nearest)


def test_denoiser_tends_to_the_mean_with_the_inverse_variance():
    points, x = _points(), _points(3, seed=1)

    def error(level):
        return float((EmpiricalDenoiser(points).x0(x, level) - points.mean(0)).norm())

    assert error(40.0) < 2e-2
    assert error(40.0) / error(80.0) == pytest.approx(4, rel=0.05)


def test_denoiser_has_derivatives():
    points = _points(8, 3)
    x = _points(2, 3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: EmpiricalDenoiser(points, chunk_size=3).x0(v, 0.7), (x,))


def test_last_step_is_a_plain_mean_shift():
    points, x = _points(), _points(4, seed=6)
    path = annealed_mean_shift(points, x, torch.tensor([0.8, 0.0], dtype=torch.float64))
    kernel = np.exp(-((x.numpy()[:, None] - points.numpy()[None]) ** 2).sum(2) / (2 * 0.8**2))
    expected = kernel @ points.numpy() / kernel.sum(1, keepdims=True)
    np.testing.assert_allclose(path[1].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_annealed_mean_shift_is_ddim_with_the_optimal_denoiser():
    points, times = _points(), EDM.times(12, t_end=0.05, spacing="karras")
    x = 20 * _points(5, seed=7)
    seen = [x]
    sample_ddim(EmpiricalDenoiser(points, EDM), x, times, callback=lambda i, state: seen.append(state))
    torch.testing.assert_close(annealed_mean_shift(points, x, times), torch.stack(seen), rtol=1e-9, atol=1e-9)


def test_one_point_gives_a_straight_line_to_it():
    point, x = _points(1, 3), 20 * _points(6, 3, seed=2)
    path = annealed_mean_shift(point, x, torch.cat([EDM.times(9), torch.zeros(1)]))
    found = trajectory_geometry(path, point.expand_as(path))
    assert float(found.deviation.max()) < 1e-12
    torch.testing.assert_close(found.straightness, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(path[-1], point.expand(6, 3))
    assert bool((found.monotone == 1).all())


def test_geometry_of_a_known_curve():
    angle = torch.linspace(0, torch.pi, 2001, dtype=torch.float64)
    half_circle = torch.stack([angle.cos(), angle.sin()], 1)[:, None]
    still = torch.ones(2001, 1, 2, dtype=torch.float64)
    found = trajectory_geometry(torch.cat([half_circle, still], 1), torch.cat([still, still], 1)[1:])
    assert found.deviation.tolist() == pytest.approx([0.5, 0])
    assert found.straightness.tolist() == pytest.approx([2 / np.pi, 1], rel=1e-6)
    torch.testing.assert_close(found.norms[:, 0], torch.ones(2001, dtype=torch.float64))
    assert float(found.distances[0, 0]) == pytest.approx(2)
    assert found.denoised_distances.shape == (2000, 2)


def test_monotone_counts_steps_towards_the_end():
    path = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])[:, None, None]
    denoised = torch.tensor([3.0, 1.0, 2.0, 0.5, 0.5])[:, None, None]
    assert float(trajectory_geometry(path, denoised).monotone) == pytest.approx(3 / 4)


def test_jump_counts_calls_and_returns_the_denoised_point():
    points, x, times = _points(), 20 * _points(5, seed=7), EDM.times(10, t_end=0.05)
    denoiser, seen = EmpiricalDenoiser(points, EDM), []
    found = sample_ode_jump(
        denoiser, x, times, jump_at=float(times[4]), callback=lambda i, s: seen.append((i, s))
    )
    assert found.cost.nfev == 5 * 5
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    before = sample_ddim(denoiser, x, times[:5]).x
    torch.testing.assert_close(found.x, denoiser.x0(before, times[4]))
    torch.testing.assert_close(found.times, times[:5])


def test_jump_at_once_is_the_denoiser():
    denoiser, x = EmpiricalDenoiser(_points(), EDM), 20 * _points(5, seed=7)
    times = EDM.times(4)
    torch.testing.assert_close(sample_ode_jump(denoiser, x, times, jump_at=20.0).x, denoiser.x0(x, times[0]))


def test_deviation_of_a_shrunken_denoiser():
    points, times = _points(), EDM.times(3, t_end=0.3)
    optimal = EmpiricalDenoiser(points, EDM)
    off = torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    shifted = EmpiricalDenoiser(points, EDM)
    shifted.fun = lambda x, t: optimal.fun(x, t) + off
    torch.testing.assert_close(
        score_deviation(shifted, points, times, generator=1), torch.full((4,), 5.0, dtype=torch.float64)
    )
