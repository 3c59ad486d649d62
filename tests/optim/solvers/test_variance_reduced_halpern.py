"""Oracles of variance-reduced Halpern: the ordinary iteration, its rate, recorded queries, skew operators and SciPy."""

import math

import pytest
import torch

from _common import Example
from perturbkit.core.projection import project_simplex
from perturbkit.optim import solve_monotone_finite_sum


def rows(n=50, d=4, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=g, dtype=dtype)
    a = a / a.norm(dim=1, keepdim=True)
    b = a @ torch.randn(d, generator=g, dtype=dtype) + 0.1 * torch.randn(n, generator=g, dtype=dtype)
    return a, b


def least_squares(a, b):
    return lambda x, i: a[i].T @ (a[i] @ x - b[i]) / len(i)


def solve(n=50, x0=None, operator=None, **options):
    operator = least_squares(*rows(n)) if operator is None else operator
    x0 = torch.zeros(4, dtype=torch.float64) if x0 is None else x0
    return solve_monotone_finite_sum(operator, n, x0, **({"lipschitz": 1.0, "generator": 0} | options))


def small(generator, dtype):
    return solve(
        9,
        torch.zeros(4, dtype=dtype),
        least_squares(*rows(9, dtype=dtype)),
        max_calls=200,
        generator=generator,
    )


EXAMPLE = Example(
    call=small,
    stochastic=True,
    refusals=(
        (lambda: solve(0), "n is 0"),
        (lambda: solve(x0=torch.zeros(1, 4)), "x0"),
        (lambda: solve(lipschitz=0.0), "lipschitz is 0"),
        (lambda: solve(kind="strong"), "kind is 'strong'"),
        (lambda: solve(tol=-1.0), "tol is -1"),
        (lambda: solve(max_calls=99), "max_calls is 99"),
        (lambda: solve(step=0.0), "step is 0"),
        (lambda: solve(batch=0), "batch is 0"),
        (lambda: solve(operator=lambda x, i: x.sum()), r"operator answered shape \(\)"),
        (lambda: solve(operator=lambda x, i: 1.0), "operator answered a float"),
    ),
)


def test_with_all_components_it_is_the_ordinary_iteration():
    a, b = rows(seed=1)
    u0 = torch.ones(4, dtype=torch.float64)
    found = solve(50, u0, least_squares(a, b), batch=50, step=0.7, tol=0.0, max_calls=50 * 31,
                  resolvent=lambda v, s: v.clamp(-0.2, 0.3))  # fmt: skip
    u, want = u0, []
    for k in range(30):
        target = 2 / (k + 4) * u0 + (k + 2) / (k + 4) * u - 0.7 * a.T @ (a @ u - b) / 50
        u = target.clamp(-0.2, 0.3)
        want.append((a.T @ (a @ u - b) / 50 + (target - u) / 0.7).norm())
    torch.testing.assert_close(found.x, u)
    torch.testing.assert_close(found.history, torch.stack(want))
    assert found.history_calls.tolist() == [50 * (k + 2) for k in range(30)]
    assert (found.calls, found.steps, found.converged) == (1550, 30, False)


def test_the_estimate_follows_the_recursion_with_the_same_components_at_both_points():
    a, b = rows(49, seed=2)
    mean, asked = least_squares(a, b), []

    def operator(x, i):
        asked.append((x.clone(), i.clone()))
        return mean(x, i)

    u0 = torch.zeros(4, dtype=torch.float64)
    solve(49, u0, operator, tol=0.0, max_calls=900, generator=3, step=0.2)
    u, value, k, place, kinds = u0, mean(*asked[0]), 0, 1, set()
    while place < len(asked):
        new = 2 / (k + 4) * u0 + (k + 2) / (k + 4) * u - 0.2 * value
        x, i = asked[place]
        torch.testing.assert_close(x, new)
        if len(i) == 49:
            value, place = mean(new, i), place + 1
        else:
            assert len(i) == 7
            assert torch.equal(i, asked[place + 1][1])
            torch.testing.assert_close(asked[place + 1][0], u)
            value, place = value + mean(new, i) - mean(u, i), place + 2
        kinds.add(len(i))
        u, k = new, k + 1
    assert kinds == {7, 49}


@pytest.mark.parametrize("kind", ["cocoercive", "monotone"])
@pytest.mark.parametrize("bounded", [False, True], ids=["free", "box"])
def test_the_residual_is_exact_and_the_solution_that_of_scipy(kind, bounded):
    optimize = pytest.importorskip("scipy.optimize")
    a, b = rows(60, seed=5)
    limits = (-0.3, 0.2) if bounded else (-math.inf, math.inf)
    found = solve(60, operator=least_squares(a, b), kind=kind, tol=5e-3, max_calls=100_000, generator=1,
                  resolvent=(lambda v, s: v.clamp(*limits)) if bounded else None)  # fmt: skip
    assert found.converged
    assert found.residual <= 5e-3
    want = optimize.lsq_linear(a.numpy(), b.numpy(), bounds=limits, tol=1e-12).x
    # A residual bounds the distance of a strongly monotone operator's zero.
    distance = (found.x - torch.as_tensor(want)).norm()
    assert distance <= found.residual / torch.linalg.eigvalsh(a.T @ a / 60)[0] + 1e-9
    slope = a.T @ (a @ found.x - b) / 60
    # The nearest element of the normal cone, and not some element of it.
    at_low, at_high = found.x == limits[0], found.x == limits[1]
    nearest = torch.where(at_low, slope.clamp(max=0), torch.where(at_high, slope.clamp(min=0), slope)).norm()
    assert nearest <= found.residual + 1e-12
    if not bounded:
        torch.testing.assert_close(found.residual, slope.norm())


def skew(n=40, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=g, dtype=torch.float64) + torch.randn(
        n, d, d, generator=g, dtype=torch.float64
    )
    zero = torch.zeros_like(a)
    m = torch.cat([torch.cat([zero, a], 2), torch.cat([-a.mT, zero], 2)], 1)
    return m, float(torch.linalg.matrix_norm((m.mT @ m).mean(0), 2)) ** 0.5


@pytest.mark.parametrize("batch", [1, 6, 40])
def test_a_skew_operator_is_solved_at_the_rate_of_the_resolvent(batch):
    m, lipschitz = skew(seed=batch)
    u0 = torch.ones(6, dtype=torch.float64)
    found = solve(40, u0, lambda x, i: m[i].mean(0) @ x, kind="monotone", lipschitz=lipschitz, batch=batch, tol=0.0,
                  max_calls=12_000)  # fmt: skip
    eta = (1.0 if batch == 40 else math.sqrt(40)) / lipschitz
    # The zero is the origin; the exact resolvent would give |u0| / (eta k).
    assert found.residual <= 1.6 * u0.norm() / (eta * found.steps)
    assert found.steps > 5
    torch.testing.assert_close(found.residual, (m.mean(0) @ found.x).norm())
    # The plain forward method diverges from the same start with the same step.
    x = u0
    for _ in range(found.steps):
        x = x - m.mean(0) @ x / lipschitz
    assert (m.mean(0) @ x).norm() > 10 * (m.mean(0) @ u0).norm()


def test_a_first_resolvent_with_all_components_is_the_deterministic_inner_method():
    m, lipschitz = skew(seed=9)
    u0 = torch.ones(6, dtype=torch.float64)
    found = solve(40, u0, lambda x, i: m[i].mean(0) @ x, kind="monotone", lipschitz=lipschitz, batch=40,
                  max_calls=40 * 4, tol=0.0)  # fmt: skip
    mean, eta, tau = m.mean(0), 1 / lipschitz, 0.5
    z, previous = u0, mean @ u0
    for _ in range(3):
        value = mean @ z
        z, previous = (z - tau * eta * (2 * value - previous) + tau * u0) / (1 + tau), value
    torch.testing.assert_close(found.x, z)


def test_a_matrix_game_has_a_small_duality_gap():
    d = 5
    g = torch.Generator().manual_seed(4)
    a = torch.randn(d, d, generator=g, dtype=torch.float64) + 0.3 * torch.randn(
        30, d, d, generator=g, dtype=torch.float64
    )

    def operator(u, i):
        mean = a[i].mean(0)
        return torch.cat([mean @ u[d:], -(mean.T @ u[:d])])

    found = solve(30, torch.full((2 * d,), 0.2, dtype=torch.float64), operator, kind="monotone", lipschitz=6.0, tol=0.05,
                  max_calls=60_000, resolvent=lambda v, s: project_simplex(v.reshape(2, d)).reshape(-1))  # fmt: skip
    x, y = found.x[:d], found.x[d:]
    assert found.converged
    assert x.sum().item() == pytest.approx(1.0)
    gap = (a.mean(0).T @ x).max() - (a.mean(0) @ y).min()
    assert 0 <= gap <= 2 * math.sqrt(2) * found.residual  # the residual times the sets' diameter


@pytest.mark.parametrize("kind", ["cocoercive", "monotone"])
@pytest.mark.parametrize("limit", [20, 41, 399])
def test_the_evaluations_are_kept(kind, limit):
    seen = []
    mean = least_squares(*rows(10))

    def operator(x, i):
        seen.append(len(i))
        return mean(x, i)

    found = solve(10, operator=operator, kind=kind, max_calls=limit, tol=0.0)
    assert sum(seen) == found.calls <= limit
    assert found.calls > limit - 30
    assert found.history_calls[-1] == found.calls
    assert "399 component" in found.message or limit != 399


def test_one_component_and_a_start_at_the_zero():
    found = solve(1, operator=lambda x, i: x, lipschitz=1.0)
    assert found.converged
    assert found.calls == 2
    assert "at most" in found.message
