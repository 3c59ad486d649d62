"""What samplers share: coefficients of a grid, exact transfer under a constant prediction, sums in one pass, and the door."""

import pytest
import torch

from perturbkit.core import Denoiser, EDMSchedule, FlowSchedule, VPSchedule
from perturbkit.core.checks import ArgumentError, ArgumentTypeError
from perturbkit.core.random import randn
from perturbkit.core.sampling import Path, check_noise_left, check_start, transfer, weighted


@pytest.mark.parametrize(
    "schedule", [VPSchedule(), EDMSchedule(), FlowSchedule()], ids=lambda s: type(s).__name__
)
def test_a_path_holds_the_coefficients_of_its_times(schedule):
    times = schedule.times(5, t_start=0.9 * schedule.t_max, t_end=0.01)
    path = Path(Denoiser(lambda x, t: x, schedule), times)
    assert path.n_steps == 5
    for point, t in zip(path.points, times.tolist(), strict=True):
        assert point.time == t
        assert (point.alpha, point.sigma, point.lam) == tuple(
            float(f(t)) for f in (schedule.alpha, schedule.sigma, schedule.lam)
        )
    middles = path.between(0.25)
    levels = schedule.lam(times).log()
    torch.testing.assert_close(
        torch.tensor([p.lam for p in middles]).double().log(), 0.75 * levels[:-1] + 0.25 * levels[1:]
    )


def test_transfer_is_exact_for_a_constant_noise_prediction():
    g = torch.Generator().manual_seed(1)
    x0, eps = (randn((3, 2), generator=g, dtype=torch.float64) for _ in range(2))
    schedule = VPSchedule()
    s, t = Path(Denoiser(lambda x, t: x, schedule), torch.tensor([0.8, 0.3], dtype=torch.float64)).points
    moved = transfer(s.alpha * x0 + s.sigma * eps, eps, s, t)
    torch.testing.assert_close(moved, t.alpha * x0 + t.sigma * eps)


def test_a_weighted_sum_leaves_its_terms_alone():
    g = torch.Generator().manual_seed(2)
    a, b, c = (randn((4,), generator=g) for _ in range(3))
    kept = [v.clone() for v in (a, b, c)]
    torch.testing.assert_close(weighted((2.0, a), (-1.0, b), (0.5, c)), 2 * a - b + 0.5 * c)
    assert all(torch.equal(v, k) for v, k in zip((a, b, c), kept, strict=True))
    assert weighted((1.0, a)) is not a


def test_the_door():
    denoiser, x = Denoiser(lambda x, t: x, VPSchedule()), torch.ones(2, 3)
    grid = VPSchedule().times(3)
    check_start(denoiser, x, grid)
    with pytest.raises(ArgumentTypeError, match=r"core\.Denoiser"):
        check_start(lambda x, t: x, x, grid)
    for times, match in (
        (grid.flip(0), "strictly decreasing"),
        (grid[:1], "at least two"),
        (torch.tensor([2.0, 0.5]), "starts at 2"),
    ):
        with pytest.raises(ArgumentError, match=match):
            check_start(denoiser, x, times)
    check_noise_left(VPSchedule(), grid, "")
    with pytest.raises(ArgumentError, match=r"where there is no noise.*Stop before"):
        check_noise_left(EDMSchedule(), torch.tensor([1.0, 0.0]), "Stop before.")
