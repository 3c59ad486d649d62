"""Oracles of fixed point diffusion: linear contractions, exact budgets, reuse that continues the iteration."""

import itertools
from functools import partial

import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule, VPSchedule
from perturbkit.core.random import randn, seeded_init
from perturbkit.diffusion import FixedPointDenoiser, sample_ddim, sample_fixed_point, stochastic_jfb_loss
from perturbkit.diffusion.training.fixed_point_diffusion import _iterated, _shared

F64 = torch.float64
EDM = EDMSchedule(sigma_max=10.0)


def made(dtype=F64, seed=0, schedule=EDM, **options):
    with seeded_init(seed):
        return FixedPointDenoiser(3, schedule, 0.5, **{"hidden": 12, **options}).to(dtype)


def state(n=5, dtype=F64, seed=1):
    return randn((n, 3), generator=torch.Generator().manual_seed(seed), dtype=dtype)


EXAMPLE = Example(
    model=made,
    with_model=lambda model, generator, dtype: sample_fixed_point(
        model.to(dtype), state(dtype=dtype), EDM.times(4), total_iterations=7
    ),
    read=lambda result: [result.x],
    refusals=(
        (lambda: sample_fixed_point(made(), state(), EDM.times(4), total_iterations=3), "total_iterations is 3"),
        (lambda: made()(state()[:, :1], 1.0), "x has shape"),
        (lambda: made()(state(), 1.0, 2, state()[:1]), "initial is of shape"),
        (lambda: made()(state(), 1.0, -1), "n_iterations is -1"),
        (lambda: stochastic_jfb_loss(made(), state(), torch.zeros(len(state()))), "least noise at t is 0"),
        (
            lambda: sample_fixed_point(made(), state(), EDM.times(2), total_iterations=5, allocation=lambda n, k: [1, 2]),
            r"allocation gives \[1, 2\]",
        ),
        (lambda: sample_fixed_point(made(), state(), EDM.times(2), total_iterations=5, allocation="any"), "allocation is 'any'"),
        (lambda: sample_fixed_point(lambda x, t: x, state(), EDM.times(2), total_iterations=5), "model is a function"),
        (lambda: stochastic_jfb_loss(made(), state(), torch.ones(4).double()), "t has shape"),
        (lambda: stochastic_jfb_loss(made(), state(), torch.ones(5).double(), max_with_grad=0), "max_with_grad is 0"),
        (lambda: FixedPointDenoiser(3, None, 0.5), "schedule is a NoneType"),
        (lambda: FixedPointDenoiser(3, EDM, -0.5), "data_std is -0.5"),
    ),
)  # fmt: skip


def test_a_linear_contraction_reaches_its_solution_and_its_implicit_gradient():
    g = torch.Generator().manual_seed(5)
    w = randn((6, 6), generator=g, dtype=F64)
    w = (0.6 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()
    b = randn((6,), generator=g, dtype=F64).requires_grad_()
    c = randn((6,), generator=g, dtype=F64)
    exact = torch.linalg.solve(torch.eye(6, dtype=F64) - w, b)
    start = torch.zeros(6, dtype=F64)
    expected = torch.autograd.grad(exact @ c, [w, b])

    def once(u):
        return w @ u + b

    found = _iterated(once, start, 40, 40)
    torch.testing.assert_close(found, exact)
    for a, e in zip(torch.autograd.grad(found @ c, [w, b]), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)
    # One step with gradient is the Jacobian-free direction: the plain derivative at the solution.
    short = torch.autograd.grad(_iterated(once, start, 60, 1) @ c, [w, b])
    torch.testing.assert_close(short[1], c)
    torch.testing.assert_close(short[0], torch.outer(c, exact.detach()), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("allocation", ["constant", "increasing", "decreasing"])
def test_every_budget_is_used_and_follows_its_line(allocation):
    for steps in (1, 2, 7, 13):
        for total in (steps, steps + 1, 3 * steps + 2, 91):
            counts = _shared(allocation, steps, total)
            assert sum(counts) == total
            assert min(counts) >= 1
            differences = [b - a for a, b in itertools.pairwise(counts)]
            if allocation == "constant":
                assert max(counts) - min(counts) <= 1
            else:
                sign = 1 if allocation == "increasing" else -1
                assert all(sign * d >= -1 for d in differences)
    assert _shared("increasing", 4, 24) == [3, 5, 7, 9]


def test_result_states_its_budget():
    model = made(pre_blocks=2, post_blocks=3)
    found = sample_fixed_point(model, state(), EDM.times(6), total_iterations=15, allocation="increasing")
    assert sum(found.extras["iterations"]) == 15
    assert found.extras["block_evaluations"] == 6 * 5 + 15
    assert found.cost.nfev == 6 * 5
    assert found.extras["residual"].shape == (6,)


def test_starting_at_a_solution_continues_the_iteration():
    model, x, t = made(), state(), torch.full((5,), 2.0, dtype=F64)
    with torch.no_grad():
        half = model(x, t, 5)[1]
        x0, solution = model(x, t, 3, half)
        torch.testing.assert_close(solution, model(x, t, 8)[1])
        torch.testing.assert_close(x0, model(x, t, 8)[0])
        torch.testing.assert_close(x0, model(x, t, 2, n_without_gradient=6)[0])


def test_identical_consecutive_problems_go_on_where_they_were():
    # A grid so fine that every step is the same problem: with reuse the residuals are those of one long iteration.
    model, x = made(), state()
    times = 2.0 - 1e-9 * torch.arange(5, dtype=F64)
    found = sample_fixed_point(model, x, times, total_iterations=8).extras["residual"]
    t = torch.full((5,), 2.0, dtype=F64)
    with torch.no_grad():
        path = [model(x, t, k)[1] for k in range(9)]
    expected = [((path[k] - path[k - 1]).norm(dim=1) / path[k].norm(dim=1)).mean() for k in (2, 4, 6, 8)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-9)
    scratch = sample_fixed_point(model, x, times, total_iterations=8, reuse=False).extras["residual"]
    torch.testing.assert_close(scratch, torch.full((4,), float(expected[0]), dtype=F64), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("schedule", [EDM, VPSchedule()], ids=["edm", "vp"])
def test_from_scratch_it_is_ddim(schedule):
    model = made(schedule=schedule).requires_grad_(False)
    times = schedule.times(5, t_end=0.05)
    found = sample_fixed_point(model, state(), times, total_iterations=15, reuse=False)
    torch.testing.assert_close(found.x, sample_ddim(model.denoiser(3), state(), times).x)


def test_loss_is_the_weighted_error_and_backpropagates_through_the_last_iterations():
    model, x0 = made(), state()
    t = torch.tensor([0.1, 0.5, 1.0, 3.0, 9.0], dtype=F64)
    found = stochastic_jfb_loss(model, x0, t, max_no_grad=0, max_with_grad=1, generator=3)
    g = torch.Generator().manual_seed(3)
    torch.randint(0, 1, (), generator=g), torch.randint(1, 2, (), generator=g)
    noisy = x0 + t[:, None] * randn(x0.shape, generator=g, like=x0)
    expected = ((1 / t**2 + 4)[:, None] * (model(noisy, t, 1)[0] - x0).square()).mean()
    torch.testing.assert_close(found, expected)
    seen = set()

    def note(iterations, *_):
        iterations.append(torch.is_grad_enabled())

    for seed in range(60):
        iterations = []
        handle = model.block.register_forward_hook(partial(note, iterations))
        stochastic_jfb_loss(model, x0, t, max_no_grad=2, max_with_grad=3, generator=seed)
        handle.remove()
        seen.add((iterations.count(False), iterations.count(True)))
    assert seen == {(n, m) for n in range(3) for m in range(1, 4)}


def test_gradients_reach_every_parameter():
    model = made(pre_blocks=2)
    stochastic_jfb_loss(model, state(), torch.ones(5).double(), generator=1).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_iteration_leaves_an_explicit_network():
    model = made()
    before = model(state(), 1.0, 0)[0]
    for p in [*model.mix.parameters(), *model.block.parameters(), *model.injection.parameters()]:
        p.data.zero_()
    torch.testing.assert_close(model(state(), 1.0, 0)[0], before)
    assert isinstance(model.denoiser(0), Denoiser)
