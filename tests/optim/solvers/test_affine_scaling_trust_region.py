"""Oracles of affine scaling: formulas by hand, the unscaled dogleg, quadratic convergence, SciPy's roots, interior points."""

import math

import pytest
import torch

from _common import Example
from perturbkit.optim import scaling_vector, solve_bounded_system

KINDS = ("combined", "coleman_li", "heinkenschloss", "kanzow_klug", "hager")
INF = math.inf


def rosenbrock(x):
    return torch.stack([10 * (x[:, 1] - x[:, 0] ** 2), 1 - x[:, 0]], 1)


def himmelblau(x):
    a, b = x.T
    return torch.stack([a * a + b - 11, a + b * b - 7], 1)


def point(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def solve(fun=rosenbrock, x0=None, bounds=(-2.0, 2.0), **options):
    return solve_bounded_system(fun, point(-1.2, 1.0) if x0 is None else x0, bounds, **options)


def vector(kind="combined", x=None, **options):
    x = point(0.5) if x is None else x
    return scaling_vector(x, torch.ones_like(x), 0.0, 1.0, kind, **options)


EXAMPLE = Example(
    call=lambda generator, dtype: solve(x0=point(-1.2, 1.0, dtype=dtype), tol=1e-3),
    refusals=(
        (lambda: solve(x0=torch.zeros(1, 2)), "x0"),
        (lambda: solve(bounds=(0.0, 1.0)), "x0 touches"),
        (lambda: solve(bounds=(-1.2, 3.0)), "x0 touches"),
        (lambda: solve(bounds=(1.0, -1.0)), "a lower bound"),
        (lambda: solve(bounds=1.0), "bounds is float"),
        (lambda: solve(scaling="none"), "scaling is 'none'"),
        (lambda: solve(weights=(1.0, 1.0)), r"weights is \[1.0, 1.0\]"),
        (lambda: solve(weights=(0.0, 0.0, 0.0)), "not all zero"),
        (lambda: solve(weights=(1.0, -1.0, 0.0)), "weights is -1"),
        (lambda: solve(tol=-1.0), "tol is -1"),
        (lambda: solve(max_iter=0), "max_iter is 0"),
        (lambda: solve(radius=0.0), "radius is 0"),
        (lambda: solve(lambda x: x[:, :1]), r"fun answered shape \(1, 1\)"),
        (lambda: solve(jac=lambda x: x), r"jac answered shape \(2,\)"),
        (lambda: solve(jac=lambda x: 1.0), "jac answered a float"),
        (lambda: vector("none"), "kind is 'none'"),
        (lambda: vector(x=point(1.0)), "x touches"),
        (lambda: vector(power=1.0), "power is 1"),
        (lambda: vector(slope=0.0), "slope is 0"),
        (lambda: vector(curvature=0.0), "curvature is 0"),
        (lambda: scaling_vector(point(0.5), point(1.0, 2.0), 0.0, 1.0), "g has shape"),
    ),
)


def test_the_scalings_are_those_of_their_formulas():
    x = point(0.2, 0.2, 0.2, 0.2, 0.7, 0.2, 0.2)
    g = point(2.0, -2.0, 0.0, 0.5, 0.0, 0.01, -3.0)
    low, high = point(0, 0, 0, -INF, 0, 0, 0), point(1, 1, 1, 1, 1, 1, INF)
    want = {
        "coleman_li": point(0.2, 0.8, 0.2, 1.0, 0.3, 0.2, 1.0),
        # |g| < m^1.5 or m < |g|^1.5, with m the smaller distance.
        "heinkenschloss": point(0.2, 0.8, 0.2, 1.0, 0.3, 0.2, 1.0),
        "kanzow_klug": point(0.2, 0.8, 0.2, 1.0, 0.3, 0.2, 1.0),
        "hager": point(0.4 / 2.4, 1.6 / 3.6, 1.0, 1.0, 1.0, 0.4 / 0.41, 1.0),
    }
    want["kanzow_klug"] = torch.where(torch.isinf(torch.minimum(x - low, high - x)), 1.0,
        torch.minimum(x - low + 1.0 * (-g).clamp(min=0), high - x + 1.0 * g.clamp(min=0)))  # fmt: skip
    for kind, values in want.items():
        torch.testing.assert_close(
            scaling_vector(x, g, low, high, kind, curvature=2.0), values, rtol=1e-12, atol=1e-12
        )
    between = point(0.15)  # neither small nor large: 0.2^1.5 < 0.15 and 0.15^1.5 < 0.2
    assert scaling_vector(point(0.2), between, 0.0, 1.0, "heinkenschloss").item() == 1.0
    assert scaling_vector(point(0.2), between, 0.0, 1.0, "heinkenschloss", power=1.01).item() == 0.2
    members = [want["coleman_li"], want["kanzow_klug"], want["hager"]]
    mixed = scaling_vector(x, g, low, high, weights=(1.0, 2.0, 5.0), curvature=2.0)
    torch.testing.assert_close(mixed, (members[0] + 2 * members[1] + 5 * members[2]) / 8)


def test_kanzow_klug_by_hand():
    x, g = point(0.1, 0.9, 0.1, 0.9), point(0.3, -0.3, -0.3, 0.3)
    torch.testing.assert_close(
        scaling_vector(x, g, 0.0, 1.0, "kanzow_klug", slope=2.0), point(0.1, 0.1, 0.7, 0.7)
    )
    half = scaling_vector(point(3.0), point(1.0), 0.0, INF, "kanzow_klug")
    assert half.item() == 3.0  # the lower bound alone


@pytest.mark.parametrize("kind", KINDS)
def test_scalings_are_positive_and_vanish_before_a_bound_that_the_gradient_points_out_of(kind):
    g = torch.Generator().manual_seed(3)
    x = torch.rand(500, 4, generator=g, dtype=torch.float64) * 0.98 + 0.01
    slope = torch.randn(500, 4, generator=g, dtype=torch.float64)
    d = scaling_vector(x, slope, 0.0, 1.0, kind)
    assert (d > 0).all()
    assert (d < 2).all()
    near = torch.logspace(-2, -10, 5, dtype=torch.float64)
    down = scaling_vector(near, torch.ones(5, dtype=torch.float64), 0.0, 1.0, kind)
    up = scaling_vector(1 - near, -torch.ones(5, dtype=torch.float64), 0.0, 1.0, kind)
    torch.testing.assert_close(down, up, rtol=1e-5, atol=0)
    assert (down <= 1.01 * near).all()
    # Pushed away from the bound it stays.
    assert (scaling_vector(near, -torch.ones(5, dtype=torch.float64), 0.0, 1.0, kind) > 0.3).all()
    assert (scaling_vector(x, slope, -INF, INF, kind) == 1).all()


def test_without_bounds_it_is_the_unscaled_dogleg():
    x, delta = point(-1.2, 1.0), 1.0
    found = {kind: solve(bounds=(-INF, INF), scaling=kind, tol=1e-12) for kind in KINDS}
    norms = [rosenbrock(x[None])[0].norm()]
    while norms[-1] > 1e-12:
        value = rosenbrock(x[None])[0]
        jacobian = torch.tensor([[-20 * x[0], 10.0], [-1.0, 0.0]], dtype=torch.float64)
        g = jacobian.T @ value
        newton = -torch.linalg.solve(jacobian, value)
        cauchy = -g * g.square().sum() / (jacobian @ g).square().sum()
        if newton.norm() <= delta:
            step = newton
        elif cauchy.norm() >= delta:
            step = cauchy * delta / cauchy.norm()
        else:
            t = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
            path = cauchy + t * (newton - cauchy)
            step = path[int((path.norm(dim=1) <= delta).sum()) - 1]
        new = rosenbrock((x + step)[None])[0]
        predicted = value.square().sum() - (value + jacobian @ step).square().sum()
        actual = value.square().sum() - new.square().sum()
        if actual < 0.1 * predicted:
            delta = min(delta / 4, float(step.norm()) / 2)
            continue
        if actual >= 0.75 * predicted:
            delta = max(delta, 2 * float(step.norm()))
        x = x + step
        norms.append(new.norm())
    for result in found.values():
        assert result.status == "solved"
        torch.testing.assert_close(result.history, torch.stack(norms), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_step_is_along_the_scaled_gradient(kind):
    x0 = point(-1.2, 1.0)
    found = solve(x0=x0, scaling=kind, radius=1e-4, max_iter=1)
    jacobian = torch.tensor([[24.0, 10.0], [-1.0, 0.0]], dtype=torch.float64)
    g = jacobian.T @ rosenbrock(x0[None])[0]
    d = scaling_vector(x0, g, -2.0, 2.0, kind)
    torch.testing.assert_close(found.x, x0 - d * g * (1e-4 / (d.sqrt() * g).norm()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((found.x - x0).div(d.sqrt()).norm().item(), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_convergence_is_quadratic_at_a_root_inside(kind):
    found = solve(himmelblau, point(2.0, 1.0), (-5.0, 5.0), scaling=kind, tol=1e-13)
    torch.testing.assert_close(found.x, point(3.0, 2.0))
    errors = found.history[-4:-1]
    assert (errors[1:] <= 2 * errors[:-1] ** 2 + 1e-13).all()
    assert found.iterations < 15
    assert found.optimality < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_roots_agree_with_scipy_and_every_question_is_strictly_inside(kind, seed):
    optimize = pytest.importorskip("scipy.optimize")
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(4, 4, generator=g, dtype=torch.float64) + 4 * torch.eye(4, dtype=torch.float64)
    root = 0.1 + 0.8 * torch.rand(4, generator=g, dtype=torch.float64)
    target = root @ a.T + 0.5 * root**3
    asked = []

    def fun(x):
        asked.append(x.detach())
        return x @ a.T + 0.5 * x**3 - target

    found = solve(fun, torch.full((4,), 0.95, dtype=torch.float64), (0.0, 1.0), scaling=kind, tol=1e-10)
    assert found.status == "solved"
    torch.testing.assert_close(found.x, root, atol=1e-8, rtol=0)
    rows = torch.cat(asked)
    assert ((rows > 0) & (rows < 1)).all()

    def system(x):
        return (torch.as_tensor(x) @ a.T + 0.5 * torch.as_tensor(x) ** 3 - target).numpy()

    want = optimize.least_squares(
        system, [0.95] * 4, bounds=(0, 1), method="trf", xtol=1e-12, ftol=1e-12, gtol=1e-12
    )
    torch.testing.assert_close(found.x, torch.as_tensor(want.x), atol=1e-7, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_root_on_the_bound_is_approached_from_inside(kind):
    def fun(x):
        return torch.stack([x[:, 0] * x[:, 1], x[:, 0] ** 2 + x[:, 1] - 1], 1)

    found = solve(fun, point(1.5, 0.4), (0.0, 2.0), scaling=kind)
    assert found.status == "solved"
    assert (found.x > 0).all()
    torch.testing.assert_close(found.x.sort().values, point(0.0, 1.0), atol=1e-7, rtol=0)


def test_a_system_without_a_root_ends_where_the_scaled_gradient_vanishes():
    found = solve(lambda x: x + 1.0, point(0.5, 0.8), (0.0, 1.0))
    assert found.status == "stationary"
    assert not found.converged
    assert found.optimality <= 1e-8 * found.residual
    torch.testing.assert_close(found.x, point(0.0, 0.0), atol=1e-7, rtol=0)
    torch.testing.assert_close(found.residual, point(2.0)[0].sqrt())
    free = solve(lambda x: 1 + x**2, point(0.5, -0.8), (-INF, INF), tol=1e-6)
    assert free.status == "stationary"


def test_limits_singular_and_undefined_systems():
    short = solve(max_iter=3)
    assert (short.status, short.iterations) == ("limit", 3)
    assert "3 trial" in short.message
    twins = solve(lambda x: x.sum(1, keepdim=True).expand(-1, 2) - 1, point(0.0, 0.0))  # singular everywhere
    assert twins.status == "solved"
    roots = solve(lambda x: x.sqrt() - 0.5, point(3.0, 0.9), (0.0, INF))  # not a number outside
    torch.testing.assert_close(roots.x, point(0.25, 0.25))
    at_once = solve(rosenbrock, point(1.0, 1.0))
    assert (at_once.status, at_once.iterations, at_once.njev) == ("solved", 0, 1)


def test_a_given_jacobian_gives_the_same_and_its_cost():
    def jac(x):
        return torch.stack([torch.stack([-20 * x[0], x.new_tensor(10.0)]), point(-1.0, 0.0)])

    given, derived = solve(jac=jac), solve()
    torch.testing.assert_close(given.x, derived.x)
    assert (given.cost.nfev, given.cost.ngrad) == (given.iterations + 1, 0)
    assert derived.cost.ngrad == 2 * derived.njev
    assert given.njev == len(given.history) == derived.njev
