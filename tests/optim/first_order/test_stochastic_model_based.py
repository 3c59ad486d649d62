"""Oracles of model-based steps: projected descent, models solved by convex programs, Huber's function, recovery."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from _common import Example
from perturbkit.optim import (
    CompositeProblem,
    make_blind_deconvolution,
    make_phase_retrieval,
    minimize_model_based,
    weakly_convex_envelope,
)

MODELS = ("subgradient", "prox_linear", "prox_point", "clipped")
PROBLEM, START = make_phase_retrieval(40, 6, generator=0)


def solve(x0=START, problem=PROBLEM, **options):
    return minimize_model_based(problem, x0, **({"max_iter": 20, "generator": 0} | options))


LINE = CompositeProblem(lambda x, rows: (x[:, 0], torch.ones_like(x)), 1, torch.zeros(1, 1))
EXAMPLE = Example(
    call=lambda generator, dtype: solve(START.to(dtype), generator=generator),
    stochastic=True,
    refusals=(
        (lambda: solve(problem=3), "problem is a int"),
        (lambda: solve(START[None, None]), "x0"),
        (lambda: solve(model="bundle"), "model is 'bundle'"),
        (lambda: solve(step=0.0), "step is 0"),
        (lambda: solve(step=torch.ones(3)), "step is tensor"),
        (lambda: solve(schedule="cosine"), "schedule is 'cosine'"),
        (lambda: solve(output="best"), "output is 'best'"),
        (lambda: solve(max_iter=0), "max_iter is 0"),
        (lambda: solve(prox=abs), "prox is given with the model 'prox_linear'"),
        (lambda: weakly_convex_envelope(LINE, torch.ones(1), 0.0), "lam is 0"),
        (lambda: weakly_convex_envelope(LINE, torch.ones(1, 1), 1.0), "x"),
        (lambda: weakly_convex_envelope(LINE, torch.ones(1), 1.0, steps=0), "steps is 0"),
        (lambda: make_phase_retrieval(0, 2), "m is 0"),
        (lambda: make_phase_retrieval(2, 2, corrupt=1.0), "corrupt is 1"),
        (lambda: make_blind_deconvolution(2, 0), "d is 0"),
        (lambda: make_blind_deconvolution(2, 2, distance=-1.0), "distance is -1"),
    ),
)


def drawn(model, seed, alpha, problem=PROBLEM, x0=START, **options):
    """Return the sample of the first step, and the step."""
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(0, problem.n, (1,), generator=g)
    found = solve(x0, problem, model=model, step=alpha, max_iter=1, generator=seed, **options)
    return row, found.x - x0


@pytest.mark.parametrize("alpha", [1e-3, 0.05, 10.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_prox_linear_steps_solve_their_model(alpha, seed):
    cp = pytest.importorskip("cvxpy")
    row, step = drawn("prox_linear", seed, alpha)
    c, slope = PROBLEM.inner(START[None], row)
    y = cp.Variable(6)
    model = cp.abs(float(c) + slope[0].numpy() @ y) + cp.sum_squares(y) / (2 * alpha)
    cp.Problem(cp.Minimize(model)).solve(
        solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    np.testing.assert_allclose(step, y.value, atol=1e-6)


@pytest.mark.parametrize("seed", [1, 2])
def test_prox_point_steps_minimise_the_sample_itself(seed):
    alpha = 0.02
    row, step = drawn("prox_point", seed, alpha)
    a = PROBLEM.inner(START[None], row)[1][0]
    unit = (a / a.norm()).numpy()
    # The minimiser moves along a only.
    line = step.numpy() @ unit
    np.testing.assert_allclose(step, line * unit, atol=1e-9)

    def whole(t):
        at = START + t * torch.as_tensor(unit)
        return float(PROBLEM.inner(at[None], row)[0].abs()) + t**2 / (2 * alpha)

    best = min(
        minimize_scalar(whole, bounds=(line - w, line + w), method="bounded", options={"xatol": 1e-10}).fun
        for w in (1e-2, 0.3)
    )
    assert whole(line) <= best + 1e-6


def test_clipped_models_are_prox_linear_ones_and_subgradients_are_projected_descent():
    for alpha in (0.01, 1.0):
        assert torch.equal(solve(model="clipped", step=alpha).x.isfinite(), torch.ones(6, dtype=torch.bool))
        torch.testing.assert_close(solve(model="clipped", step=alpha).x, solve(step=alpha).x)
    row, step = drawn("subgradient", 4, 0.1)
    c, slope = PROBLEM.inner(START[None], row)
    torch.testing.assert_close(step, -0.1 * c.sign() * slope[0])
    _, step = drawn("subgradient", 4, 0.1, prox=lambda x, alpha: x.clamp(-0.1, 0.1))
    torch.testing.assert_close(START + step, (START - 0.1 * c.sign() * slope[0]).clamp(-0.1, 0.1))


def test_schedules():
    flat = CompositeProblem(lambda x, rows: (x[:, 0] + 1e6, torch.ones_like(x)), 1, torch.zeros(1, 1))
    x0 = torch.zeros(1, dtype=torch.float64)
    falling = solve(x0, flat, model="subgradient", step=1.0, max_iter=9).x
    assert falling.item() == pytest.approx(-sum((t + 1) ** -0.5 for t in range(9)))
    constant = solve(x0, flat, model="subgradient", step=1.0, max_iter=9, schedule="constant").x
    assert constant.item() == pytest.approx(-9 / 10**0.5)


def test_the_iterate_that_is_returned_is_drawn_uniformly():
    flat = CompositeProblem(lambda x, rows: (x[:, 0] + 1e6, torch.ones_like(x)), 1, torch.zeros(1, 1))
    times = [
        round(
            -(6**0.5)
            * solve(
                torch.zeros(1),
                flat,
                model="subgradient",
                schedule="constant",
                max_iter=5,
                output="random",
                generator=s,
            ).x.item()
        )
        for s in range(400)
    ]
    counts = torch.bincount(torch.tensor(times), minlength=5)
    assert len(counts) == 5
    assert float(((counts - 80) ** 2 / 80).sum()) < 18.5  # the 0.999 quantile of chi-squared with 4


@pytest.mark.parametrize("place", [-3.0, -0.2, 0.0, 0.4, 2.0])
def test_the_envelope_of_the_absolute_value_is_hubers_function(place):
    lam = 0.5
    value, slope = weakly_convex_envelope(LINE, torch.tensor([place], dtype=torch.float64), lam)
    want = place**2 / (2 * lam) if abs(place) <= lam else abs(place) - lam / 2
    assert value.item() == pytest.approx(want, abs=1e-6)
    assert slope.item() == pytest.approx(min(abs(place) / lam, 1.0), abs=1e-5)


def test_the_envelope_of_a_weakly_convex_problem_is_below_it_and_stationary_at_solutions():
    value, slope = weakly_convex_envelope(PROBLEM, START, 0.05)
    assert value < PROBLEM(START)
    assert slope > 0.1
    _, rest = weakly_convex_envelope(PROBLEM, PROBLEM.solution[0], 0.05)
    assert rest < 1e-5


@pytest.mark.parametrize("make", [make_phase_retrieval, make_blind_deconvolution])
@pytest.mark.parametrize("model", ["prox_linear", "prox_point"])
def test_solutions_are_recovered_also_from_corrupted_measurements(make, model):
    problem, start = make(120, 8, corrupt=0.1, distance=0.3, generator=3)
    assert float(problem.distance(start)) == pytest.approx(0.3, abs=0.02)
    gradient = problem.inner(start[None], torch.tensor([50]))[1][0]
    leaf = start.clone().requires_grad_(True)
    (want,) = torch.autograd.grad(problem.inner(leaf[None], torch.tensor([50]))[0], leaf)
    torch.testing.assert_close(gradient, want)
    found = minimize_model_based(problem, start, model=model, step=0.05, max_iter=3000, generator=1)
    limit = 0.1 if make is make_phase_retrieval else 0.2
    assert float(problem.distance(found.x)) < limit


def test_runs_have_their_own_steps():
    found = solve(START.expand(3, -1), step=torch.tensor([1e-3, 1.0, 10.0]))
    assert found.x.shape == (3, 6)
    assert found.history.shape == (20, 3)
    assert (found.x[0] - START).norm() < (found.x[1] - START).norm()
    assert found.fun.shape == (3,)
