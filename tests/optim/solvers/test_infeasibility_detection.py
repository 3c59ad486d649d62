"""Oracles of infeasibility detection: translations, discs, worst cases by semidefinite programming, linear programs."""

import math

import pytest
import torch

from _common import Example
from perturbkit.optim import (
    PDHGOperator,
    displacement_bound,
    douglas_rachford_operator,
    pdhg_operator,
    solve_fixed_point,
)


def isometry(d=6, seed=0, shift=True):
    """An average of the identity and a rigid motion; the motion's axis is the last coordinate."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    angles = 0.3 + 2 * torch.rand((d - 2) // 2, generator=g, dtype=torch.float64)
    blocks = [
        torch.stack([torch.stack([a.cos(), -a.sin()]), torch.stack([a.sin(), a.cos()])]) for a in angles
    ]
    rotation = torch.block_diag(*blocks, torch.eye(d - 2 * len(blocks), dtype=torch.float64))
    axis = torch.zeros(d, dtype=torch.float64)
    axis[-1] = 1.0 if shift else 0.0
    center = torch.randn(d, generator=g, dtype=torch.float64)
    r, v = q @ rotation @ q.T, q @ axis
    return lambda x: 0.5 * (x + center + (x - center) @ r.T) - v, v, center


def small(generator, dtype):
    operator = douglas_rachford_operator(lambda z: z.clamp(max=0.0), lambda z: z.clamp(min=1.0, max=3.0))
    start = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=dtype)
    return solve_fixed_point(operator, start, max_iter=200)


ONE = torch.ones(2)
EXAMPLE = Example(
    call=small,
    refusals=(
        (lambda: solve_fixed_point(torch.sin, torch.ones(1, 1, 1)), "x0"),
        (lambda: solve_fixed_point(torch.sin, torch.ones(0, 2)), "x0 is empty"),
        (lambda: solve_fixed_point(torch.sin, ONE, method="anchor"), "method is 'anchor'"),
        (lambda: solve_fixed_point(torch.sin, ONE, max_iter=0), "max_iter is 0"),
        (lambda: solve_fixed_point(torch.sin, ONE, tol=-1.0), "tol is -1"),
        (lambda: solve_fixed_point(torch.sin, ONE, certificate_tol=0.0), "certificate_tol is 0"),
        (lambda: solve_fixed_point(torch.sum, ONE), r"operator answered shape \(\)"),
        (lambda: solve_fixed_point(lambda x: 1.0, ONE), "operator answered a float"),
        (lambda: displacement_bound(0, 1.0), "k is 0"),
        (lambda: displacement_bound(1, -1.0), "distance is -1"),
        (lambda: displacement_bound(1, 1.0, "anchor"), "method is 'anchor'"),
        (lambda: displacement_bound(1, 1.0, "picard", "residual"), "estimate is 'residual'"),
        (lambda: douglas_rachford_operator(1.0, torch.sin), "prox_f is a float"),
        (lambda: douglas_rachford_operator(torch.sin, None), "prox_g is a NoneType"),
        (lambda: pdhg_operator(torch.eye(2), torch.sin, torch.sin, 1.0, 1.0), r"tau sigma \|A\|\^2 is 1"),
        (lambda: pdhg_operator(torch.eye(2), 3, torch.sin, 0.1, 0.1), "prox_f is a int"),
        (lambda: pdhg_operator(torch.eye(2), torch.sin, torch.sin, 0.0, 0.1), "tau is 0"),
        (lambda: pdhg_operator(torch.eye(2), torch.sin, torch.sin, 0.1, 0.0), "sigma is 0"),
        (lambda: pdhg_operator(torch.ones(2), torch.sin, torch.sin, 0.1, 0.1), "matrix"),
    ),
)


@pytest.mark.parametrize("method", ["picard", "halpern"])
def test_a_translation_is_found_exactly(method):
    v = torch.tensor([3.0, -4.0], dtype=torch.float64)
    for k in (1, 2, 17, 63):
        found = solve_fixed_point(
            lambda x: x - v, torch.ones(2, dtype=torch.float64), method=method, max_iter=k
        )
        torch.testing.assert_close(found.displacement, v)
        torch.testing.assert_close(found.normalized, v)
        torch.testing.assert_close(found.x, 1 - v * (k if method == "picard" else k / 2))
        assert found.status == ("undecided",)
        assert found.evaluations == k + 1
    found = solve_fixed_point(lambda x: x - v, torch.ones(2, dtype=torch.float64), method=method)
    assert (found.status, int(found.iterations)) == (("infeasible",), 64)
    # Nothing nearer than half the way gone, or than the residual allows.
    assert float(found.excluded) == pytest.approx(5 * 64 / 2 if method == "picard" else 5 * 65 / 2)


def test_three_anchored_steps_written_out():
    operator, _, _ = isometry(seed=3)
    x0 = torch.ones(6, dtype=torch.float64)
    x, norms = x0, [(x0 - operator(x0)).norm()]
    for k in range(3):
        x = x0 / (k + 2) + (k + 1) / (k + 2) * operator(x)
        norms.append((x - operator(x)).norm())
    found = solve_fixed_point(operator, x0, max_iter=3)
    torch.testing.assert_close(found.x, x)
    torch.testing.assert_close(found.residual_norms, torch.stack(norms))
    torch.testing.assert_close(found.normalized, 2 * (x0 - x) / 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_errors_keep_to_their_bounds_at_every_step(seed):
    operator, v, center = isometry(seed=seed)
    x0 = torch.randn(6, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    # The displacement is attained on the line through the centre along the axis: its nearest point.
    axis = v / v.norm()
    distance = float((x0 - center - axis * ((x0 - center) @ axis)).norm())
    for k in (1, 2, 3, 5, 8, 40):
        for method in ("picard", "halpern"):
            found = solve_fixed_point(operator, x0, method=method, max_iter=k, certificate_tol=1e9)
            assert (found.normalized - v).norm() <= displacement_bound(k, distance, method) + 1e-12
        bound = displacement_bound(k, distance, estimate="residual")
        assert (found.displacement - v).norm() <= bound + 1e-12


@pytest.mark.parametrize("method", ["picard", "halpern"])
def test_consistent_maps_keep_to_the_tight_bound_and_are_excluded_correctly(method):
    operator, *_ = isometry(seed=11, shift=False)
    starts = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = solve_fixed_point(operator, starts, method=method, max_iter=300, tol=0.0, certificate_tol=1.0)
    # Fixed points: the plane left by the rotation; the distance to it follows from the limit of Picard.
    limit = starts
    for _ in range(4000):
        limit = operator(limit)
    distance = (starts - limit).norm(dim=1)
    assert (found.excluded <= distance * (1 + 1e-9)).all()
    if method == "halpern":
        k = torch.arange(301, dtype=torch.float64)[:, None]
        assert (found.residual_norms <= 2 * distance / (k + 1) + 1e-9).all()


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("method", ["picard", "halpern"])
def test_no_map_at_all_exceeds_the_bounds(k, method):
    """The worst nonexpansive map by semidefinite programming over the Gram matrix of the points involved."""
    cp = pytest.importorskip("cvxpy")
    np = pytest.importorskip("numpy")
    # Basis: x0, v, T x_0 .. T x_k, with the attaining point at the origin.
    size = k + 3
    unit = np.eye(size)
    points, images = [np.zeros(size), unit[0]], [-unit[1], unit[2]]
    for j in range(k):
        new = unit[0] / (j + 2) + (j + 1) / (j + 2) * images[-1] if method == "halpern" else images[-1]
        points.append(new)
        images.append(unit[3 + j])
    gram = cp.Variable((size, size), PSD=True)

    def inner(a, b):
        return cp.trace(gram @ ((np.outer(a, b) + np.outer(b, a)) / 2))

    limits = [inner(unit[0], unit[0]) <= 1]
    for i in range(len(points)):
        limits.append(inner(points[i] - images[i] - unit[1], unit[1]) >= 0)
        for j in range(i):
            dx, dt = points[i] - points[j], images[i] - images[j]
            limits.append(inner(dt, dt) <= inner(dx, dx))
    factor = 2 / k if method == "halpern" else 1 / k
    error = factor * (points[1] - points[-1]) - unit[1]
    cases = [(error, "normalized")]
    if method == "halpern":
        cases.append((points[-1] - images[-1] - unit[1], "residual"))
    for vector, estimate in cases:
        program = cp.Problem(cp.Maximize(inner(vector, vector)), limits)
        program.solve(solver="CLARABEL")
        bound = displacement_bound(k, 1.0, method, estimate)
        assert math.sqrt(program.value) <= bound * (1 + 1e-5)
        assert math.sqrt(program.value) >= 0.3 * bound  # not loose beyond use


@pytest.mark.parametrize("method", ["picard", "halpern"])
def test_two_discs_apart_give_their_distance_and_direction(method):
    a, b = torch.tensor([0.0, 0.0], dtype=torch.float64), torch.tensor([3.0, 4.0], dtype=torch.float64)

    def disc(center, radius):
        return lambda z: (
            center + (z - center) / ((z - center).norm(dim=-1, keepdim=True) / radius).clamp(min=1)
        )

    operator = douglas_rachford_operator(disc(a, 1.0), disc(b, 1.5))
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = solve_fixed_point(operator, start, method=method, max_iter=3000)
    assert found.status == ("infeasible",) * 3
    want = -(5 - 2.5) * torch.tensor([0.6, 0.8], dtype=torch.float64)
    torch.testing.assert_close(found.displacement, want.expand(3, 2), atol=0.15, rtol=0)
    longer = solve_fixed_point(operator, start, method=method, max_iter=3000, certificate_tol=1e9)
    torch.testing.assert_close(longer.displacement, want.expand(3, 2), atol=5e-3, rtol=0)


def test_a_splitting_step_is_half_of_two_reflections():
    operator = douglas_rachford_operator(lambda z: z.clamp(max=0.5), lambda z: z / (1 + z.abs()))
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    mirrored = 2 * z.clamp(max=0.5) - z
    torch.testing.assert_close(operator(z), (z + 2 * (mirrored / (1 + mirrored.abs())) - mirrored) / 2)


def linear_program(feasible, seed, m=4, n=8):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=g, dtype=torch.float64)
    if feasible:
        return a, a @ torch.rand(n, generator=g, dtype=torch.float64)
    y = torch.randn(m, generator=g, dtype=torch.float64)
    a = a + torch.outer(y, (-(y @ a)).clamp(min=0) / y.square().sum())  # now y A >= 0
    b = torch.randn(m, generator=g, dtype=torch.float64)
    return a, b - y * ((y @ b) + 1) / y.square().sum()  # and y b = -1


@pytest.mark.parametrize("method", ["picard", "halpern"])
@pytest.mark.parametrize("splitting", ["douglas-rachford", "pdhg"])
def test_linear_programs_are_told_apart_with_a_certificate_as_scipy_does(method, splitting):
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(3):
        for feasible in (True, False):
            a, b = linear_program(feasible, seed)
            want = optimize.linprog(torch.zeros(8).numpy(), A_eq=a.numpy(), b_eq=b.numpy()).status
            assert want == (0 if feasible else 2)
            if splitting == "pdhg":
                step = 0.9 / float(torch.linalg.matrix_norm(a, 2))
                operator = pdhg_operator(
                    a, lambda x: x.clamp(min=0), lambda y, s=step, b=b: y - s * b, step, step
                )
                found = solve_fixed_point(operator, torch.zeros(12, dtype=torch.float64), method=method,
                                          norm=operator.norm, tol=2e-3, max_iter=4000)  # fmt: skip
                y = -found.displacement[8:]
            else:
                inverse = torch.linalg.pinv(a)
                operator = douglas_rachford_operator(
                    lambda z, a=a, b=b, i=inverse: z - (z @ a.T - b) @ i.T, lambda z: z.clamp(min=0)
                )
                found = solve_fixed_point(
                    operator, torch.zeros(8, dtype=torch.float64), method=method, tol=2e-3, max_iter=4000
                )
                y = -found.displacement @ inverse
            assert found.status == ("solved" if feasible else "infeasible",), seed
            if not feasible:
                y = y / y.norm()
                assert y @ b < 0
                assert (y @ a).min() > -0.02 * a.norm(dim=0).max()


def test_a_primal_dual_step_is_nonexpansive_in_its_norm_only():
    g = torch.Generator().manual_seed(3)
    a = torch.randn(3, 5, generator=g, dtype=torch.float64)
    step = 0.95 / float(torch.linalg.matrix_norm(a, 2))
    operator = PDHGOperator(a, lambda x: x.clamp(min=0), lambda y: y - 0.1, step, step)
    x, y = torch.randn(2, 500, 8, generator=g, dtype=torch.float64)
    assert (operator.norm(operator(x) - operator(y)) <= operator.norm(x - y) * (1 + 1e-12)).all()
    assert ((operator(x) - operator(y)).norm(dim=1) > (x - y).norm(dim=1)).any()


def test_a_verifier_has_the_last_word():
    asked = []

    def refuse(v):
        asked.append(v.shape)
        return torch.zeros(len(v), dtype=torch.bool)

    found = solve_fixed_point(lambda x: x - 1, torch.zeros(2, 3), verify=refuse, max_iter=200)
    assert found.status == ("undecided", "undecided")
    assert not found.converged
    assert asked == [(2, 3), (2, 3)]  # at 64 and 128 steps


def test_rows_are_decided_apart_and_kept_as_they_were():
    shift = torch.tensor([[0.0], [2.0]])
    found = solve_fixed_point(lambda x: x / 2 - shift * (1 - 0.5 * (x > 0)) + 0.5 * x * (shift > 0),
                              torch.tensor([[1.0], [0.0]]), method="picard", tol=1e-3)  # fmt: skip
    alone = solve_fixed_point(lambda x: x / 2, torch.tensor([1.0]), method="picard", tol=1e-3)
    assert found.status == ("solved", "infeasible")
    assert found.iterations.tolist() == [10, 64]
    torch.testing.assert_close(found.x[0], alone.x)
    torch.testing.assert_close(found.displacement[0], alone.displacement)


def test_a_start_at_the_fixed_point():
    found = solve_fixed_point(lambda x: x, ONE)
    assert (found.status, found.evaluations, float(found.excluded)) == (("solved",), 1, 0.0)
