"""Oracles of low-rank recommendation: differences, enumerated samples, optimal measurements, and an attack on the profile."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from _common import Example
from perturbkit.core import checks
from perturbkit.privacy import (
    LowRankRecommender,
    epsilon_lower_bound,
    hockey_stick,
    length_squared_svd,
    privacy_profile,
    pure_state_delta,
    truncated_svd_derivative,
)
from perturbkit.privacy._noise import Noise
from perturbkit.privacy.mechanisms import _lowrank
from perturbkit.privacy.mechanisms.quantum_recommendation_privacy import _inspired

F64 = torch.float64
GRID = torch.tensor([0.0, 0.1, 1.0], dtype=F64)


def ratings(m=12, n=10, k=2, seed=0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.rand(s, k, generator=g, dtype=F64) for s in (m, n))
    return (left @ right.T / k).to(dtype)


def truncated(A, k):
    u, s, vh = torch.linalg.svd(A, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


A = ratings()


def call(generator, dtype):
    given = A.to(dtype)
    made = LowRankRecommender(rank=2, mode="quantum-inspired", n_rows=4, n_cols=4, generator=generator).fit(
        given
    )
    profile = privacy_profile(
        given, 1, GRID.to(dtype), rank=2, mode="quantum-inspired", n_rows=4, n_cols=4, n_neighbours=2, n_draws=2,
        generator=generator,
    )  # fmt: skip
    return [
        made.distribution(0),
        made.sample(0, 3),
        profile.delta,
        truncated_svd_derivative(given, given.flip(0), 2),
        length_squared_svd(given, 3, 3, 2, generator=generator).right,
    ]


def profile(**options):
    return privacy_profile(**{"A": A, "user": 0, "epsilons": GRID, "rank": 2} | options)


EXAMPLE = Example(
    call=call,
    stochastic=True,
    refusals=(
        (lambda: LowRankRecommender(), "rank is None and threshold is None"),
        (lambda: LowRankRecommender(rank=1, threshold=1.0), "rank is 1 and threshold is 1"),
        (lambda: LowRankRecommender(threshold=1.0, mode="quantum-inspired"), "rank for 'quantum-inspired'"),
        (lambda: LowRankRecommender(rank=0), "rank is 0"),
        (lambda: LowRankRecommender(threshold=0.0), "threshold is 0"),
        (lambda: LowRankRecommender(rank=1, mode="classical"), "mode is 'classical'"),
        (lambda: LowRankRecommender(rank=11).fit(A), "rank is 11"),
        (lambda: LowRankRecommender(rank=1).fit(A[0]), "A has shape"),
        (lambda: LowRankRecommender(rank=1).fit(0 * A), "A is zero"),
        (lambda: LowRankRecommender(rank=2).distribution(0), "nothing is fitted"),
        (lambda: LowRankRecommender(rank=2).fit(A).distribution(12), "user is 12"),
        (lambda: LowRankRecommender(rank=2).fit(A).sample(0, 0), "n is 0"),
        (lambda: LowRankRecommender(rank=1).fit(torch.eye(3) * torch.tensor([3.0, 2, 1])).distribution(2), "user is 2, whose row"),
        (lambda: length_squared_svd(A, 1, 3, 2), "n_rows is 1"),
        (lambda: length_squared_svd(A, 3, 1, 2), "n_cols is 1"),
        (lambda: truncated_svd_derivative(A, A.T, 2), "E has shape"),
        (lambda: truncated_svd_derivative(torch.eye(3), torch.ones(3, 3), 2), "meet; allowed: a rank with a gap"),
        (lambda: profile(A=2 * A), "A ranges from"),
        (lambda: profile(user=-1), "user is -1"),
        (lambda: profile(mode="x"), "mode is 'x'"),
        (lambda: profile(n_neighbours=1), "n_neighbours is 1"),
        (lambda: profile(n_draws=1), "n_draws is 1"),
        (lambda: profile(n_rows=1), "n_rows is 1"),
        (lambda: profile(n_cols=1), "n_cols is 1"),
        (lambda: profile(epsilons=-GRID), "epsilons has a smallest value of -1"),
        (lambda: profile(entries=torch.tensor([[0, 10]])), "entries range from"),
        (lambda: profile(entries=torch.tensor([0, 1])), "entries has shape"),
        (lambda: profile(entries=torch.zeros(1, 2)), "entries has dtype"),
    ),
)  # fmt: skip


@pytest.mark.parametrize(("m", "n", "k"), [(5, 5, 2), (7, 4, 3), (4, 9, 1), (6, 6, 6), (3, 8, 3)])
def test_derivative_against_differences(m, n, k):
    a, e = normal(m, n, seed=m), normal(m, n, seed=n + 50)
    found = truncated_svd_derivative(a, e, k)
    h = 1e-5
    torch.testing.assert_close(
        found, (truncated(a + h * e, k) - truncated(a - h * e, k)) / (2 * h), atol=1e-5, rtol=1e-5
    )
    if k == min(m, n):
        torch.testing.assert_close(found, e)


def test_derivative_of_a_matrix_of_that_rank_is_the_tangent_projection():
    a, e = ratings(9, 7, 3), normal(9, 7, seed=2)
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    left, right = u[:, :3] @ u[:, :3].T, vh[:3].T @ vh[:3]
    torch.testing.assert_close(truncated_svd_derivative(a, e, 3), left @ e + e @ right - left @ e @ right)


def test_hockey_stick_properties():
    rng = np.random.default_rng(0)
    p, q = (torch.as_tensor(rng.dirichlet(np.ones(9), 4)) for _ in range(2))
    grid = torch.linspace(0, 3, 61, dtype=F64)
    found = hockey_stick(p, q, grid)
    torch.testing.assert_close(found[:, 0], (p - q).abs().sum(1) / 2)
    assert (found.diff() <= 1e-15).all()
    assert (hockey_stick(p, p, grid) == 0).all()
    even = hockey_stick(p, q, torch.linspace(1, 4, 61, dtype=F64).log())
    assert (even.diff().diff() >= -1e-12).all()
    # By definition: the best of all sets.
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=9)), dtype=F64)
    best = (sets @ (p[0] - grid[20].exp() * q[0])).max()
    assert float(found[0, 20]) == pytest.approx(float(best))


def test_no_measurement_shows_more_than_the_pure_state_bound_and_one_shows_as_much():
    grid = torch.tensor([0.0, 0.05, 0.5, 2.0], dtype=F64)
    u, w = normal(6, 3, seed=3), normal(6, 3, seed=4)
    u, w = u / u.norm(dim=1, keepdim=True), w / w.norm(dim=1, keepdim=True)
    bound = pure_state_delta(u, 7 * w, grid)
    for seed in range(40):
        basis = torch.linalg.qr(normal(3, 3, seed=seed))[0]
        assert (hockey_stick((u @ basis) ** 2, (w @ basis) ** 2, grid) <= bound + 1e-12).all()
    for i in range(6):
        for e, value in zip(grid, bound[i], strict=True):
            operator = torch.outer(u[i], u[i]) - e.exp() * torch.outer(w[i], w[i])
            values, vectors = torch.linalg.eigh(operator)
            assert float(value) == pytest.approx(float(values[-1]), abs=1e-12)
            attained = hockey_stick((u[i] @ vectors) ** 2, (w[i] @ vectors) ** 2, e[None])
            assert float(attained) == pytest.approx(float(value), abs=1e-12)
    sine = 1 - (u * w).sum(1, keepdim=True) ** 2
    assert (bound[:, 1:] <= sine / (1 - (-grid[1:]).exp()) + 1e-12).all()
    torch.testing.assert_close(bound[:, :1], sine.sqrt())
    assert (pure_state_delta(u, -u, grid) < 1e-15).all()
    # Close states, without cancellation.
    near = pure_state_delta(torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([1.0, 1e-9], dtype=F64), grid)
    assert float(near[0]) == pytest.approx(1e-9, rel=1e-6)


def test_recommendations_have_the_squares_of_the_row():
    made = LowRankRecommender(rank=2, generator=5).fit(A)
    row = truncated(A, 2)[3]
    torch.testing.assert_close(made.distribution(3), row**2 / (row**2).sum())
    counts = torch.bincount(made.sample(3, 40_000), minlength=10).numpy()
    assert scipy.stats.chisquare(counts, made.distribution(3).numpy() * 40_000).pvalue > 1e-3
    all_of_it = LowRankRecommender(threshold=1e-6).fit(A)
    torch.testing.assert_close(all_of_it.distribution(0), A[0] ** 2 / (A[0] ** 2).sum())
    s = torch.linalg.svdvals(A)
    assert LowRankRecommender(threshold=float(s[1]) * 0.99).fit(A).right_.shape == (10, 2)


def test_a_seed_is_never_used_twice():
    made = LowRankRecommender(rank=2, mode="quantum-inspired", n_rows=9, n_cols=9, generator=3).fit(A)
    first, second = made.sample(0, 30), made.sample(0, 30)
    assert not torch.equal(first, second)
    # Nor do the numbers that drew the rows draw the products.
    rows = Noise(3).uniform((30,))
    assert not torch.equal(first, _lowrank.drawn(made.distribution(0), rows))


def test_products_without_chance_are_never_drawn():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=F64)
    drawn = _lowrank.drawn(p, np.array([0.0, 1e-300, 0.4999, 0.5, 0.75, np.nextafter(1, 0), 1.0]))
    assert set(drawn.tolist()) == {1, 3}


def test_sampled_rows_and_columns():
    a = torch.tensor([[3.0, 4.0], [0.0, 5.0], [0.0, 0.0]], dtype=F64)
    rows, cols = _lowrank.sampled(a, 20_000, 20_000, Noise(0))
    share = torch.bincount(rows, minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.5, 0.0]), atol=0.015, rtol=0)
    # Column 0 has 9/25 of row 0 and nothing of row 1.
    assert float((cols == 0).double().mean()) == pytest.approx(float(share[0]) * 9 / 25, abs=0.015)


def test_sampled_svd_recovers_an_exact_space_and_approaches_others():
    low = ratings(30, 20, 3, seed=6)
    found = length_squared_svd(low, 8, 8, 3, generator=1)
    exact = torch.linalg.svd(low, full_matrices=False)[2][:3].T
    torch.testing.assert_close(found.right @ found.right.T, exact @ exact.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.right.T @ found.right, torch.eye(3, dtype=F64))
    noisy = low + 0.03 * normal(30, 20, seed=7)
    best = float((noisy - truncated(noisy, 3)).norm())
    errors = []
    for r in (6, 40, 240):
        many = [length_squared_svd(noisy, r, r, 3, generator=s).right for s in range(10)]
        errors.append(np.mean([float((noisy - noisy @ v @ v.T).norm()) for v in many]) / best)
    assert errors[0] > errors[1] > errors[2] >= 1 - 1e-12
    assert errors[2] < 1.1
    # Singular values as well, for as many samples.
    s = length_squared_svd(noisy, 300, 300, 1, generator=0).singular_values
    assert float(s) == pytest.approx(float(torch.linalg.svdvals(noisy)[0]), rel=0.1)


def test_profile_of_the_exact_projection_by_brute_force():
    entries = torch.tensor([[0, 4], [0, 0], [7, 2]])
    found = profile(entries=entries)
    for row, (i, j) in enumerate(entries.tolist()):
        other = A.clone()
        other[i, j] = 1.0 if A[i, j] < 0.5 else 0.0
        a, b = truncated(A, 2)[0], truncated(other, 2)[0]
        p, q = a**2 / (a**2).sum(), b**2 / (b**2).sum()
        wanted = torch.maximum(hockey_stick(p, q, GRID), hockey_stick(q, p, GRID))
        torch.testing.assert_close(found.delta[row], wanted, atol=1e-10, rtol=0)
        torch.testing.assert_close(found.bound[row], pure_state_delta(a, b, GRID), atol=1e-10, rtol=0)
    assert (found.delta <= found.bound + 1e-12).all()
    torch.testing.assert_close(found.worst, found.delta.max(0).values)
    assert (found.standard_error == 0).all()
    assert (profile(n_neighbours=4, generator=0).entries[:2, 0] == 0).all()


def test_neighbouring_space_without_a_gap_falls_back_to_the_decomposition():
    flat = torch.eye(6, dtype=F64) + 1e-3 * normal(6, 6, seed=8)
    start = torch.linalg.svd(flat, full_matrices=False)[2][:2].T
    other = flat.clone()
    other[0, 0] = 0.2
    found, exact = _lowrank.subspace(other, start), torch.linalg.svd(other)[2][:2].T
    torch.testing.assert_close(found @ found.T, exact @ exact.T, atol=1e-9, rtol=0)


def test_a_change_elsewhere_that_takes_over_a_leading_direction_is_seen():
    # The iteration would stay in the old space, which the change leaves invariant but no longer leading.
    a = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 0.4]], dtype=F64)
    found = privacy_profile(a, 0, GRID[:1] * 0, rank=2, entries=torch.tensor([[2, 2]]))
    assert float(found.delta) == pytest.approx(0.3)  # (0.8, 0.2) against (0.5, 0.5)


def test_large_epsilons_do_not_overflow():
    u, w = torch.tensor([0.8, 0.6]), torch.tensor([1.0, 0.0])
    far = torch.tensor([50.0, 90.0, 1000.0])
    torch.testing.assert_close(pure_state_delta(u, w, far), torch.full((3,), 0.36))
    torch.testing.assert_close(hockey_stick(u**2, w**2, far), torch.full((3,), 0.36))


def test_sampled_profile_bounds_the_exact_one_of_a_tiny_matrix():
    """All draws of one row and one column enumerated: chances, their ratio, and the recommendation's own profile."""
    first = torch.tensor([[0.9, 0.3, 0.2], [0.1, 0.6, 0.8]], dtype=F64)
    second = first.clone()
    second[0, 1] = 1.0

    def law(a):
        chance, out = a.square().sum(1) / a.square().sum(), {}
        for i in range(2):
            for j in range(3):
                rows, cols = torch.tensor([i]), torch.tensor([j])
                v = _lowrank.fkv(a, rows, cols, 1)[1]
                row = v @ (v.T @ a[0])
                out[i, j] = chance[i] * a[i, j] ** 2 / a[i].square().sum(), row**2 / (row**2).sum()
        return out

    p, q = law(first), law(second)
    assert sum(float(c) for c, _ in p.values()) == pytest.approx(1)
    joint = [torch.cat([c * d for c, d in side.values()]) for side in (p, q)]
    mixed = [sum(c * d for c, d in side.values()) for side in (p, q)]
    found, error = _inspired(first, second, 0, GRID, (1, 1, 1), 4000, Noise(3))
    wanted = hockey_stick(*joint, GRID)
    assert ((found - wanted).abs() <= 4 * error + 1e-3).all()
    assert (hockey_stick(*mixed, GRID) <= wanted + 1e-12).all()
    assert wanted[0] > 0.02


def test_draws_that_a_neighbour_never_makes_count_in_full():
    first = torch.tensor([[0.5, 0.5], [0.0, 0.4]], dtype=F64)
    second = torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=F64)
    found, _ = _inspired(first, second, 0, GRID, (20, 20, 1), 40, Noise(0))
    assert (found > 0.9).all()


def test_attack_does_not_exceed_the_profile():
    """Runs of the sampler on both sides, at the epsilon where the exact profile meets delta."""
    grid = torch.linspace(0, 9, 9001, dtype=F64)
    other = A.clone()
    other[0, 4] = 1.0 if A[0, 4] < 0.5 else 0.0
    sides = [LowRankRecommender(rank=2, generator=s).fit(x) for s, x in enumerate((A, other))]
    p, q = (made.distribution(0) for made in sides)
    curve = torch.maximum(hockey_stick(p, q, grid), hockey_stick(q, p, grid))
    log_ratio = (p / q).log().numpy()
    scores = [log_ratio[made.sample(0, 30_000).numpy()] for made in sides]
    for delta in (0.02, 0.06):
        stated = float(grid[int((curve <= delta + 1e-12).nonzero()[0, 0])])
        found = epsilon_lower_bound(*scores, delta=delta).epsilon
        assert 0.2 * stated < found <= stated


def test_a_user_with_a_single_rating_has_no_privacy():
    n = 200
    a = ratings(n, n, 3, seed=9)
    for user, row in ((0, a[0].clone()), (1, torch.eye(n, dtype=F64)[7])):
        a[user] = row
    entries = torch.tensor([[0, 90], [1, 90]])
    typical, lone = (
        privacy_profile(a, user, GRID, rank=3, entries=entries[user : user + 1]).delta[0, 0]
        for user in (0, 1)
    )
    assert typical < 0.05
    assert lone > 0.2


def test_delta_falls_with_the_size_as_stated():
    """Total variation as 1/n, and the bound at a fixed epsilon as 1/n^2."""
    sizes, grid, values = (40, 160, 640), torch.tensor([0.0, 1.0], dtype=F64), []
    for n in sizes:
        a = ratings(n, n, 3, seed=n)
        found = [privacy_profile(a, u, grid, rank=3, n_neighbours=4, generator=u) for u in range(7)]
        values.append(
            [
                np.median([float(f.worst[0]) for f in found]),
                np.median([float(f.bound.max(0).values[1]) for f in found]),
            ]
        )
        assert all((f.delta <= f.bound + 1e-12).all() for f in found)
    slopes = np.polyfit(np.log(sizes), np.log(values), 1)[0]
    assert slopes[0] == pytest.approx(-1, abs=0.3)
    assert slopes[1] == pytest.approx(-2, abs=0.5)


def test_a_user_without_part_in_the_space_is_refused():
    a = torch.zeros(3, 4, dtype=F64)
    a[0], a[1, 0] = 0.9, 0.9
    with pytest.raises(checks.ArgumentError, match="user is 2, whose row"):
        privacy_profile(a, 2, GRID, rank=1)
    assert math.isfinite(float(privacy_profile(a, 0, GRID, rank=1).worst[0]))
