"""Sets and distributions: projections, support functions and samples against closed forms and convex analysis."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbkit.core import checks, perturbation
from perturbkit.core.perturbation import (
    Ball,
    BallInBox,
    Box,
    Distribution,
    Gaussian,
    Masks,
    Perturbation,
    Rademacher,
    Sphere,
    Uniform,
    all_masks,
    around,
    row_norm,
)

NORMS = ("l1", "l2", "linf")
TOL = 1e-9


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sets(seed: int, n: int, d: int) -> dict[str, Perturbation]:
    """Sets of every kind for n rows of d elements, with radii of wide range and boxes with and without zero."""
    radius = 10 ** (2 * rand(seed, n) - 1)
    low, high = -rand(seed + 1, n, d) * 0.8, rand(seed + 2, n, d) * 0.8
    found: dict[str, Perturbation] = {"box": Box(low, high)}
    for norm in NORMS:
        found[norm] = Ball(norm, radius)
        found[f"{norm} in box"] = BallInBox(Ball(norm, radius), Box(low, high))
        # A box away from zero in some coordinates, with the radius reaching 5 % to 100 % beyond its nearest point.
        away = Box(low + 0.4, high + 0.4)
        reach = row_norm((low + 0.4).clamp_min(0), norm) * (1.05 + rand(seed + 3, n)) + 1e-3
        found[f"{norm} away"] = BallInBox(Ball(norm, reach), away)
        found[f"{norm} half open"] = BallInBox(Ball(norm, radius), Box(-math.inf, high))
        found[f"{norm} open"] = around(low, norm, radius, bounds=None)
    return found


KINDS = sorted(sets(0, 1, 2))
seeds, dims = st.integers(0, 2**31), st.integers(1, 9)
few = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=seeds, d=dims, scale=st.sampled_from([1e-3, 0.3, 1.0, 5.0, 1e4]))
def test_projection_is_the_nearest_point(kind: str, seed: int, d: int, scale: float) -> None:
    n = 6
    chosen = sets(seed, n, d)[kind]
    z, w = scale * draw(seed + 5, n, d), scale * draw(seed + 6, n, d)
    p, q = chosen.project(z), chosen.project(w)
    slack = TOL * max(1.0, scale)
    assert chosen.contains(p, slack).all()
    torch.testing.assert_close(chosen.project(p), p, atol=slack, rtol=0)
    assert (row_norm(p - q, "l2") <= row_norm(z - w, "l2") + slack).all()
    # The variational inequality <z - p, y - p> <= 0 for y in the set decides whether p is the projection. The
    # largest left-hand side is attained at the support point, which needs no sampling of y.
    gap = chosen.support(z - p) - ((z - p) * p).sum(1)
    assert (gap <= slack * max(1.0, scale) * 10).all()
    y = chosen.project(draw(seed + 7, n, d))
    assert (((z - p) * (y - p)).sum(1) <= slack * max(1.0, scale) * 10).all()


@pytest.mark.parametrize("kind", KINDS)
@few
@given(seed=seeds, d=dims, zeros=st.booleans())
def test_support_is_the_largest_value_of_the_form(kind: str, seed: int, d: int, zeros: bool) -> None:
    n = 5
    chosen = sets(seed, n, d)[kind]
    g = draw(seed + 5, n, d)
    if zeros:
        g[:, ::2] = 0
    best = chosen.maximiser(g)
    support = chosen.support(g)
    assert (chosen.contains(best, TOL) | (support == math.inf)).all()
    finite = support < math.inf
    torch.testing.assert_close((g * best).sum(1)[finite], support[finite], atol=TOL, rtol=TOL)
    for k in range(20):
        y = chosen.project(3 * draw(seed + 6 + k, n, d))
        assert ((g * y).sum(1) <= support + TOL).all()
    # sigma(t g) = t sigma(g), and sigma is subadditive.
    torch.testing.assert_close(chosen.support(2.5 * g), 2.5 * support)
    h = draw(seed + 4, n, d)
    assert (chosen.support(g + h) <= support + chosen.support(h) + TOL).all()


def dual_projection(z: np.ndarray, low: np.ndarray, high: np.ndarray, norm: str, radius: float) -> np.ndarray:
    """Project by root finding on the multiplier, an independent route to the same point."""

    def point(multiplier: float) -> np.ndarray:
        if norm == "l2":
            return np.clip(z / (1 + multiplier), low, high)
        return np.clip(np.sign(z) * np.maximum(np.abs(z) - multiplier, 0), low, high)

    order = 2 if norm == "l2" else 1
    excess = lambda m: np.linalg.norm(point(m), order) - radius
    if excess(0) <= 0:
        return point(0)
    return point(scipy.optimize.brentq(excess, 0, 1e9, xtol=1e-15, rtol=1e-15, maxiter=2000))


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_projection_agrees_with_a_scalar_root_finder(norm: str, shift: float) -> None:
    n, d = 40, 12
    low, high = -rand(0, n, d) + shift, rand(1, n, d) + shift
    radius = row_norm(low.clamp_min(0), norm) + 0.1 + rand(2, n)
    z = 2 * draw(3, n, d)
    got = BallInBox(Ball(norm, radius), Box(low, high)).project(z)
    want = [
        dual_projection(*(a[i].numpy() for a in (z, low, high)), norm, float(radius[i])) for i in range(n)
    ]
    torch.testing.assert_close(got, torch.tensor(np.array(want)), atol=1e-8, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_agrees_with_a_general_solver(norm: str) -> None:
    d = 4
    for seed in range(6):
        low, high, z = -rand(seed, 1, d), rand(seed + 50, 1, d), 2 * draw(seed + 100, 1, d)
        got = BallInBox(Ball(norm, 0.7), Box(low, high)).project(z)[0]
        # Split into positive and negative parts, so that all norms are smooth.
        limits = {
            "l1": [{"type": "ineq", "fun": lambda v: 0.7 - v.sum()}],
            "l2": [{"type": "ineq", "fun": lambda v: 0.49 - np.sum((v[:d] - v[d:]) ** 2)}],
            "linf": [],
        }[norm]
        cap = np.full(d, 0.7 if norm == "linf" else np.inf)
        bounds = [(0, min(float(h), c)) for h, c in zip(high[0], cap, strict=True)]
        bounds += [(0, min(-float(b), c)) for b, c in zip(low[0], cap, strict=True)]
        solved = scipy.optimize.minimize(
            lambda v, target: np.sum((v[:d] - v[d:] - target) ** 2),
            np.full(2 * d, 0.05),
            args=(z[0].numpy(),),
            method="SLSQP",
            bounds=bounds,
            constraints=limits,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        torch.testing.assert_close(got, torch.tensor(solved.x[:d] - solved.x[d:]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("norm", ["l1", "linf"])
def test_support_of_a_polytope_agrees_with_linear_programming(norm: str) -> None:
    d = 7
    for seed in range(10):
        low, high = -rand(seed, 1, d) + 0.3, rand(seed + 50, 1, d) + 0.3
        g = draw(seed + 100, 1, d)
        radius = float(row_norm(low.clamp_min(0), norm)) + 0.6
        got = BallInBox(Ball(norm, radius), Box(low, high)).support(g)
        if norm == "linf":
            bounds = [
                (max(b, -radius), min(h, radius))
                for b, h in zip(low[0].tolist(), high[0].tolist(), strict=True)
            ]
            solved = scipy.optimize.linprog(-g[0].numpy(), bounds=bounds)
        else:
            # Variables (delta, s) with |delta_i| <= s_i and sum s <= radius.
            eye = np.eye(d)
            a = np.block([[eye, -eye], [-eye, -eye], [np.zeros(d), np.ones(d)]])
            b = np.concatenate([np.zeros(2 * d), [radius]])
            bounds = list(zip(low[0].tolist(), high[0].tolist(), strict=True)) + [(0, None)] * d
            solved = scipy.optimize.linprog(np.concatenate([-g[0].numpy(), np.zeros(d)]), a, b, bounds=bounds)
        assert float(got) == pytest.approx(-solved.fun, abs=1e-8)


def test_l2_support_in_a_box_satisfies_the_optimality_conditions() -> None:
    n, d = 50, 9
    low, high, g = -rand(0, n, d), rand(1, n, d), draw(2, n, d)
    best = BallInBox(Ball("l2", 0.6), Box(low, high)).maximiser(g)
    torch.testing.assert_close(
        row_norm(best, "l2"), torch.full((n,), 0.6, dtype=torch.float64), atol=1e-12, rtol=0
    )
    free = (best > low + 1e-12) & (best < high - 1e-12)
    ratio = torch.where(free, best / g, torch.nan)
    # Where free, best = t g with one t a row; where clipped, t g lies beyond the bound.
    t = ratio.nanmedian(1, keepdim=True).values
    torch.testing.assert_close(torch.where(free, t * g, best), best, atol=1e-12, rtol=0)
    assert (free | ((t * g).abs() >= best.abs() - 1e-12)).all()


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_breakpoints_of_any_scale_are_handled(norm: str) -> None:
    # Geometric scales from 1e-30 to 1e3: iterations on the multiplier would pass one breakpoint at a time.
    z = (10.0 ** torch.linspace(-30, 3, 80, dtype=torch.float64))[None]
    chosen = BallInBox(Ball(norm, 0.7), Box(-0.3, 0.3))
    for point in (chosen.project(z), chosen.maximiser(z)):
        assert float(row_norm(point, norm)) == pytest.approx(0.7, rel=1e-12)
        assert chosen.contains(point, 1e-12).all()


@pytest.mark.parametrize("norm", NORMS)
def test_without_an_active_box_the_intersection_is_the_ball(norm: str) -> None:
    z = draw(0, 8, 3, 4)
    ball = Ball(norm, 0.7)
    wide = BallInBox(ball, Box(-100.0, 100.0))
    torch.testing.assert_close(wide.project(z), ball.project(z))
    torch.testing.assert_close(wide.support(z), ball.support(z))


def test_closed_forms() -> None:
    x = torch.tensor([[3.0, -4.0]])
    torch.testing.assert_close(Ball("l2", 1.0).project(x), torch.tensor([[0.6, -0.8]]))
    torch.testing.assert_close(Ball("linf", 1.0).project(x), torch.tensor([[1.0, -1.0]]))
    torch.testing.assert_close(Ball("l1", 2.0).project(x), torch.tensor([[0.5, -1.5]]))
    assert [float(Ball(p, 2.0).support(x)) for p in NORMS] == [8.0, 10.0, 14.0]
    torch.testing.assert_close(Sphere(10.0).maximiser(x), torch.tensor([[6.0, -8.0]]))
    assert float(Sphere(10.0).support(x)) == 50.0


def test_radius_zero_is_the_point_zero() -> None:
    z = draw(0, 4, 5)
    for norm in NORMS:
        for chosen in (Ball(norm, 0.0), BallInBox(Ball(norm, 0.0), Box(-1.0, 1.0))):
            assert (chosen.project(z) == 0).all()
            assert (chosen.support(z) == 0).all()
            assert (chosen.sample(z, generator=0) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("d", [1, 2, 5])
def test_ball_samples_are_uniform(norm: str, d: int) -> None:
    x = Ball(norm, 2.0).sample(torch.zeros(1, d, dtype=torch.float64), generator=3, n=4000)
    # The norm of a uniform point has the distribution function (r / R)^d, whatever the norm.
    assert scipy.stats.kstest(row_norm(x, norm).numpy(), lambda r: (r / 2.0) ** d).pvalue > 1e-3
    # For the direction: the share of the ball where coordinate 0 dominates, and the signs, are symmetric.
    assert scipy.stats.binomtest(int((x[:, 0] > 0).sum()), 4000).pvalue > 1e-3
    leader = x.abs().argmax(1).bincount(minlength=d)
    assert scipy.stats.chisquare(leader.numpy()).pvalue > 1e-3 or d == 1


def test_l1_ball_marginal_is_that_of_the_cross_polytope() -> None:
    # One coordinate of a uniform point in the l1 ball of dimension d has density d (1 - |x|)^(d-1) / 2.
    d = 4
    x = Ball("l1", 1.0).sample(torch.zeros(1, d, dtype=torch.float64), generator=9, n=4000)[:, 2]
    assert scipy.stats.kstest(x.abs().numpy(), lambda a: 1 - (1 - a) ** d).pvalue > 1e-3


def test_l2_ball_marginal_is_a_scaled_beta() -> None:
    d = 4
    x = Ball("l2", 1.0).sample(torch.zeros(1, d, dtype=torch.float64), generator=9, n=4000)[:, 1]
    beta = scipy.stats.beta((d + 1) / 2, (d + 1) / 2)
    assert scipy.stats.kstest(((x + 1) / 2).numpy(), beta.cdf).pvalue > 1e-3


def test_distributions_have_their_moments() -> None:
    like = torch.zeros(1, 50, dtype=torch.float64)
    gauss = Gaussian(0.5).sample(like, generator=0, n=200)
    assert scipy.stats.kstest(gauss.flatten().numpy(), scipy.stats.norm(0, 0.5).cdf).pvalue > 1e-3
    flat = Uniform(-1.0, 3.0).sample(like, generator=0, n=200)
    assert scipy.stats.kstest(flat.flatten().numpy(), scipy.stats.uniform(-1, 4).cdf).pvalue > 1e-3
    assert Uniform(-1.0, 3.0).contains(flat).all()
    assert not Uniform(-1.0, 2.0).contains(flat).all()
    signs = Rademacher(0.3).sample(like, generator=0, n=200)
    assert Rademacher(0.3).contains(signs).all()
    assert not Rademacher(0.2).contains(signs).any()
    assert abs(float(signs.mean())) < 0.01
    sphere = Sphere(2.0).sample(like, generator=0, n=200)
    assert Sphere(2.0).contains(sphere, 1e-12).all()
    assert not Sphere(1.9).contains(sphere, 1e-3).any()
    assert float(sphere.mean(0).norm()) < 0.35
    boxed = Box(-1.0, 3.0).sample(like, generator=0, n=200)
    assert scipy.stats.kstest(boxed.flatten().numpy(), scipy.stats.uniform(-1, 4).cdf).pvalue > 1e-3


def test_a_tensor_of_scales_gives_each_row_its_own() -> None:
    like = torch.zeros(3, 4000, dtype=torch.float64)
    scale = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(Gaussian(scale).sample(like, generator=1).std(1), scale, atol=0.1, rtol=0)
    assert torch.equal(Rademacher(scale).sample(like, generator=1).abs(), scale[:, None].expand(3, 4000))
    torch.testing.assert_close(row_norm(Sphere(scale).sample(like, generator=1), "l2"), scale)
    with pytest.raises(checks.ArgumentError, match="3 rows"):
        Gaussian(scale).sample(like, generator=1, n=2)


def test_linf_samples_in_a_box_are_uniform_on_the_interval() -> None:
    x = torch.full((1, 3), 0.1, dtype=torch.float64)
    delta = around(x, "linf", 0.3).sample(x, generator=0, n=3000)
    assert scipy.stats.kstest(delta[:, 1].numpy(), scipy.stats.uniform(-0.1, 0.4).cdf).pvalue > 1e-3


@pytest.mark.parametrize("kind", [k for k in KINDS if "open" not in k])
def test_samples_lie_in_the_set(kind: str) -> None:
    chosen = sets(7, 6, 5)[kind]
    x = chosen.sample(torch.zeros(6, 5, dtype=torch.float64), generator=1)
    assert chosen.contains(x, TOL).all()
    assert (x != 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "made",
    [
        Ball("l1", 1.0),
        Ball("l2", 1.0),
        Ball("linf", 1.0),
        Box(-0.5, 0.5),
        Sphere(1.0),
        Gaussian(1.0),
        Uniform(),
        Rademacher(),
        Masks(),
        BallInBox(Ball("l2", 1.0), Box(-0.5, 0.5)),
        BallInBox(Ball("l1", 1.0), Box(-0.5, 0.5)),
    ],
    ids=lambda m: type(m).__name__,
)
def test_dtype_shape_and_protocol(made: object, dtype: torch.dtype) -> None:
    like = torch.zeros(2, 3, 4, dtype=dtype)
    assert isinstance(made, Distribution)
    x = made.sample(like, generator=torch.Generator().manual_seed(1), n=5)
    assert (x.dtype, x.shape) == (dtype, (5, 3, 4))
    assert torch.equal(x, made.sample(like, generator=1, n=5))
    assert not torch.equal(x, made.sample(like, generator=2, n=5))
    assert made.sample(like).shape == like.shape
    if isinstance(made, Perturbation):
        assert made.project(3 * x).dtype == dtype
        assert made.maximiser(x).shape == x.shape
        assert made.support(x).shape == (5,)
        assert made.contains(made.project(3 * x), 0.02).all()


def test_membership_is_refused_outside() -> None:
    z = torch.tensor([[0.6, 0.6]])
    assert [bool(Ball(p, 1.0).contains(z)) for p in NORMS] == [False, True, True]
    assert not Box(0.0, 0.5).contains(z).any()
    assert not BallInBox(Ball("linf", 1.0), Box(0.0, 0.5)).contains(z).any()


def test_maximiser_of_the_zero_form_is_in_the_set() -> None:
    zero = torch.zeros(2, 3)
    for chosen in (
        *(Ball(p, 1.0) for p in NORMS),
        Box(0.5, 1.0),
        Sphere(1.0),
        BallInBox(Ball("l2", 1.0), Box(0.5, 1)),
    ):
        assert chosen.contains(chosen.maximiser(zero)).all()
        torch.testing.assert_close(chosen.support(zero), torch.zeros(2))


@pytest.mark.parametrize("norm", NORMS)
def test_around_keeps_inputs_within_bounds(norm: str) -> None:
    x = rand(0, 20, 3, 4).float()
    chosen = around(x, norm, 2.0)
    for delta in (chosen.project(10 * draw(1, 20, 3, 4).float()), chosen.sample(x, generator=0)):
        assert float((x + delta).min()) >= -1e-7
        assert float((x + delta).max()) <= 1
    attack = x + chosen.maximiser(draw(2, 20, 3, 4).float())
    assert float(attack.max()) <= 1


def test_touching_sets_have_one_point() -> None:
    # The box touches the l1 and l2 balls in one point, which is then every projection.
    point = torch.tensor([[0.3, 0.4]])
    for norm, radius in (("l1", 0.7), ("l2", 0.5), ("linf", 0.4)):
        chosen = BallInBox(Ball(norm, radius), Box(point, point + torch.tensor([[0.0, 1.0]])))
        torch.testing.assert_close(chosen.project(torch.tensor([[5.0, 5.0]])), point)
        torch.testing.assert_close(chosen.maximiser(torch.tensor([[1.0, 1.0]])), point)


def test_all_masks_are_the_binary_numbers() -> None:
    masks = all_masks(4)
    assert (masks @ torch.tensor([1.0, 2.0, 4.0, 8.0])).tolist() == list(range(16))
    assert all_masks(2, like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("shift", [False, True])
def test_grid_masks_have_their_mean_everywhere(mode: str, shift: bool) -> None:
    chosen = Masks(0.3, cells=(4, 3), mode=mode, shift=shift)
    masks = chosen.sample(torch.zeros(1, 3, 16, 15, dtype=torch.float64), generator=0, n=3000)
    assert masks.shape == (3000, 1, 16, 15)
    assert chosen.contains(masks).all()
    torch.testing.assert_close(
        masks.mean(0), torch.full((1, 16, 15), 0.3, dtype=torch.float64), atol=0.05, rtol=0
    )
    steps = (masks[:, :, 1:] != masks[:, :, :-1]).any(0)[0].any(1)
    if mode == "nearest" and not shift:
        assert steps.nonzero()[:, 0].tolist() == [3, 7, 11]
    else:
        assert steps.sum() > 10


def test_shifted_cells_keep_their_size() -> None:
    masks = Masks(0.5, cells=4, shift=True).sample(torch.zeros(1, 1, 16, 16), generator=0, n=50)
    phases = set()
    for mask in masks[:, 0]:
        borders = (mask[1:] != mask[:-1]).any(1).nonzero()[:, 0] % 4
        assert len(borders.unique()) <= 1
        phases |= set(borders.tolist())
    assert phases == {0, 1, 2, 3}


def test_masks_of_features_and_their_enumeration() -> None:
    like = torch.zeros(4, 2, 2)
    kept = Masks(0.8).sample(like, generator=0, n=2000)
    assert abs(float(kept.mean()) - 0.8) < 0.02
    assert Masks(0.8).contains(kept).all()
    assert not Masks(0.8).contains(0.5 * kept[:1]).any()
    assert Masks(0.8).enumerate(like).shape == (16, 2, 2)
    grid = Masks(0.5, cells=2).enumerate(torch.zeros(1, 3, 4, 4))
    assert grid.shape == (16, 1, 4, 4)
    assert len(grid.flatten(1).unique(dim=0)) == 16
    assert torch.equal(grid[1, 0, :2, :2], torch.ones(2, 2))
    assert float(grid[1].sum()) == 4
    assert Masks(1.0).sample(like).min() == 1
    assert Masks(0.0).sample(like).max() == 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Ball("l3", 1.0), "norm is 'l3'"),
        (lambda: Ball("l2", -1.0), "radius"),
        (lambda: Ball("l2", torch.tensor([1.0, -1.0])), "zero or above"),
        (lambda: Ball("l2", torch.ones(3)).project(torch.ones(2, 2)), "3 rows"),
        (lambda: Ball("l2", 1.0).project(torch.ones(2, 2, dtype=torch.long)), "floating-point"),
        (lambda: Ball("l2", 1.0).sample([1.0]), "a list"),
        (lambda: Ball("l2", 1.0).sample(torch.ones(1, 2), n=0), "n is 0"),
        (lambda: Box(1.0, 0.0), "box is empty"),
        (lambda: Box(math.nan, 0.0), "box is empty"),
        (lambda: Box(0.0, math.inf).sample(torch.ones(1, 2)), "infinite bounds"),
        (lambda: Box(torch.zeros(3, 2), 1.0).project(torch.ones(2, 2)), "broadcasts"),
        (lambda: BallInBox(Ball("l2", 1.0), Ball("l2", 1.0)), "a Box"),
        (lambda: BallInBox(Ball("l2", 1.0), Box(torch.full((1, 4), 0.9), 1.0)), "intersection is empty"),
        (
            lambda: BallInBox(Ball("l1", 1.0), Box(0.5, 1.0)).project(torch.zeros(1, 3)),
            "intersection is empty",
        ),
        (lambda: around(torch.tensor([[1.5]]), "linf", 0.1), "intersection is empty"),
        (lambda: Sphere(-1.0), "radius"),
        (lambda: Gaussian(-1.0), "sigma"),
        (lambda: Uniform(1.0, 0.0), "high"),
        (lambda: Rademacher(math.inf), "scale"),
        (lambda: Masks(1.5), "keep"),
        (lambda: Masks(0.5, mode="cubic"), "mode"),
        (lambda: Masks(0.5, cells=(1, 2, 3)), "rows and columns"),
        (lambda: Masks(0.5, cells=0), "cells is 0"),
        (lambda: Masks(0.5, cells=9).sample(torch.zeros(1, 1, 8, 8)), "no finer"),
        (lambda: Masks(0.5).enumerate(torch.zeros(1, 21)), "n_parts is 21"),
        (lambda: row_norm(torch.zeros(1, 1), "l0"), "norm"),
    ],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()


def test_no_global_state_is_touched() -> None:
    before = torch.random.get_rng_state()
    for made in (Ball("l1", 1.0), Gaussian(), Masks(0.5, cells=2, shift=True)):
        made.sample(torch.zeros(1, 1, 4, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(perturbation.__all__) <= set(dir(perturbation))
