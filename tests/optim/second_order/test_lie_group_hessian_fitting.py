"""Oracles of Hessian fitting on groups: stationarity, autograd on the group, fixed points, and the baselines."""

import copy

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.core.random import randn
from perturbkit.optim import (
    PSGD,
    HessianFitter,
    fit_bfgs,
    fit_closed_form,
    fit_euclidean_gd,
    fit_spd_gd,
    fitting_criterion,
)

P = nn.Parameter
GROUPS = ("dense", "triangular", "diagonal")


def hessian(d=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    return (turn @ torch.diag(torch.logspace(-1, 1, d, dtype=torch.float64)) @ turn.T).to(dtype)


def pairs(matrix, n, seed=1):
    v = torch.randn(n, len(matrix), generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype)
    return v, v @ matrix


def fitted(group, matrix, n=40, rate=0.5):
    fitter = HessianFitter(len(matrix), group, rate=rate, dtype=matrix.dtype)
    for v, h in zip(*pairs(matrix, n), strict=True):
        fitter.update(v, h)
    return fitter


ONE = torch.ones(2)
EXAMPLE = Example(
    call=lambda generator, dtype: fitted("dense", hessian(dtype=dtype)).preconditioner(),
    refusals=(
        (lambda: HessianFitter(2, "full"), "group is 'full'"),
        (lambda: HessianFitter(0), "shape is 0"),
        (lambda: HessianFitter((2, 2)), "shape has 2 sides"),
        (lambda: HessianFitter(2, rate=0.0), "rate is 0"),
        (lambda: HessianFitter(2, init_scale=0.0), "init_scale is 0"),
        (lambda: HessianFitter(2, "low_rank", rank=0), "rank is 0"),
        (lambda: HessianFitter(2).update(torch.ones(3), ONE), "v"),
        (lambda: HessianFitter(2).apply(torch.ones(3)), "g"),
        (lambda: fitting_criterion(torch.eye(2), torch.ones(1, 3), torch.ones(1, 3)), "v"),
        (lambda: fit_closed_form(torch.ones(1, 2)), "h has 1 rows"),
        (lambda: fit_bfgs(ONE[None], torch.ones(1, 3)), "h"),
        (lambda: fit_spd_gd(ONE[None], ONE[None], rate=2.0), "rate is 2"),
        (lambda: fit_euclidean_gd(ONE[None], ONE[None], init_scale=0.0), "init_scale is 0"),
        (lambda: PSGD([P(ONE)], lr=-1.0), "lr is -1"),
        (lambda: PSGD([P(ONE)], lr=1.0, rate=2.0), "rate is 2"),
        (lambda: PSGD([P(ONE)], lr=1.0, group="dense"), "group is 'dense'"),
        (lambda: PSGD([P(ONE)], lr=1.0, mode="adam"), "mode is 'adam'"),
        (lambda: PSGD([P(ONE)], lr=1.0, update_every=0), "update_every is 0"),
        (lambda: PSGD([P(ONE)], lr=1.0, max_norm=0.0), "max_norm is 0"),
        (lambda: PSGD([P(ONE)], lr=1.0, seed=-1), "seed is -1"),
        (lambda: PSGD([P(ONE)], lr=1.0).step(lambda: ONE), "loss"),
    ),
)


@pytest.mark.parametrize("group", GROUPS)
def test_one_update_is_the_relative_gradient_of_the_criterion_on_the_group(group):
    matrix = hessian(seed=2)
    v, h = (x[0] for x in pairs(matrix, 1, seed=3))
    fitter = fitted(group, matrix, n=5)
    q = torch.diag(fitter.factors[0]) if group == "diagonal" else fitter.factors[0].clone()
    e = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
    turned = torch.matrix_exp(e) @ q
    (slope,) = torch.autograd.grad(fitting_criterion(turned.T @ turned, v[None], h[None]), e)
    a, b = q @ h, torch.linalg.solve(q.T, v)
    bracket = torch.outer(a, a) - torch.outer(b, b)
    torch.testing.assert_close(slope, 2 * bracket, rtol=1e-8, atol=1e-8)
    fitter.update(v, h)
    after = torch.diag(fitter.factors[0]) if group == "diagonal" else fitter.factors[0]
    size = a @ a + b @ b
    kept = {"dense": bracket, "triangular": torch.triu(bracket), "diagonal": torch.diag(torch.diag(bracket))}[
        group
    ]
    if group == "diagonal":
        size = (a.square() + b.square()).max()
    torch.testing.assert_close(after, q - 0.5 * kept @ q / size)


@pytest.mark.parametrize("group", ["dense", "triangular"])
def test_the_fit_is_the_absolute_inverse_also_of_an_indefinite_hessian(group):
    values, vectors = torch.linalg.eigh(hessian(seed=4))
    signs = torch.tensor([1.0, -1, 1, -1, 1, 1], dtype=torch.float64)
    matrix = vectors @ torch.diag(signs * values) @ vectors.T
    fitter = HessianFitter(6, group, dtype=torch.float64)
    for t, (v, h) in enumerate(zip(*pairs(matrix, 12_000), strict=True)):
        # Pairs of an indefinite Hessian do not agree with one another: the rate has to fall.
        fitter.rate = min(1.0, 100 / (t + 1))
        fitter.update(v, h)
    want = vectors @ torch.diag(1 / values) @ vectors.T
    assert (fitter.preconditioner() - want).norm() < 0.12 * want.norm()


def test_a_diagonal_hessian_is_a_fixed_point_of_the_diagonal_group():
    scale = torch.tensor([0.5, 2.0, -8.0], dtype=torch.float64)
    fitter = HessianFitter(3, "diagonal", rate=1.0, dtype=torch.float64)
    for v, h in zip(*pairs(torch.diag(scale), 4000), strict=True):
        fitter.update(v, h)
    torch.testing.assert_close(fitter.factors[0].square(), 1 / scale.abs(), rtol=1e-6, atol=0)
    torch.testing.assert_close(fitter.apply(torch.ones(3)), 1 / scale.abs(), rtol=1e-6, atol=0)


def test_products_of_two_are_fitted_by_two_factors():
    left, right = hessian(3, seed=5), hessian(4, seed=6)
    fitter = HessianFitter((3, 4), "kronecker", rate=0.5, dtype=torch.float64)
    g = torch.Generator().manual_seed(7)
    for t in range(3000):
        fitter.rate = 0.5 if t < 1500 else 0.05
        v = torch.randn(3, 4, generator=g, dtype=torch.float64)
        fitter.update(v, left @ v @ right)
    want = torch.linalg.inv(torch.kron(left, right))
    assert (fitter.preconditioner() - want).norm() < 0.02 * want.norm()
    x = torch.randn(3, 4, generator=g, dtype=torch.float64)
    torch.testing.assert_close(fitter.apply(x).reshape(-1), fitter.preconditioner() @ x.reshape(-1))
    assert torch.equal(fitter.factors[0], torch.triu(fitter.factors[0]))


@pytest.mark.parametrize("turn", [0, 1], ids=["first", "second"])
def test_one_low_rank_update_is_the_relative_gradient_of_each_factor(turn):
    g = torch.Generator().manual_seed(21)
    n, r, rate = 6, 2, 1e-3
    fitter = HessianFitter(n, "low_rank", rank=r, rate=rate, generator=3, dtype=torch.float64)
    for q in fitter.factors:
        q.copy_(0.5 + randn(q.shape, generator=g, dtype=torch.float64).abs())
    fitter._n_updates = turn
    v, h = (randn((n,), generator=g, dtype=torch.float64) for _ in range(2))
    d, left, right = (q.clone() for q in fitter.factors)

    def criterion(outer, scale):
        """Of Q perturbed: from the left inside the group of the moving factor, from the right by the diagonal."""
        move = outer @ right.T if turn == 0 else left @ outer.T
        q = (
            (torch.eye(n, dtype=torch.float64) + move)
            @ (torch.eye(n, dtype=torch.float64) + left @ right.T)
            @ torch.diag(d * scale)
        )
        p = q.T @ q
        return h @ p @ h + v @ torch.linalg.solve(p, v)

    outer = torch.zeros(n, r, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(n, dtype=torch.float64, requires_grad=True)
    by_outer, by_scale = torch.autograd.grad(criterion(outer, scale), [outer, scale])
    before = torch.eye(n, dtype=torch.float64) + left @ right.T
    fitter.update(v, h)
    found_d, found_left, found_right = fitter.factors
    # The moved factor's group element is (I - c E) times the old one, E along the gradient.
    moved = torch.eye(n, dtype=torch.float64) + found_left @ found_right.T
    relative = (moved - before) @ torch.linalg.inv(before)
    expected = -(by_outer @ right.T if turn == 0 else left @ by_outer.T)
    assert float((relative * expected).sum() / relative.norm() / expected.norm()) > 1 - 1e-6
    assert float(torch.cosine_similarity(found_d / d - 1, -by_scale, dim=0)) > 1 - 1e-9
    assert float((found_d / d - 1).abs().max()) <= rate * (1 + 1e-9)
    torch.testing.assert_close(found_left.norm(), found_right.norm())


def test_a_low_rank_is_found_where_a_diagonal_is_not_enough():
    g = torch.Generator().manual_seed(5)
    n = 12
    scale = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    spike = randn((n, 1), generator=g, dtype=torch.float64)
    # P = Q^T Q with Q of the group, and the Hessian that it inverts.
    q = (torch.eye(n, dtype=torch.float64) + 0.5 * spike @ spike.T / spike.norm()) @ torch.diag(scale)
    hessian = torch.linalg.inv(q.T @ q)
    fitter = HessianFitter(n, "low_rank", rank=4, rate=0.5, generator=1, dtype=torch.float64)
    plain = HessianFitter(n, "diagonal", rate=0.2, dtype=torch.float64)
    for _ in range(4000):
        v = randn((n,), generator=g, dtype=torch.float64)
        fitter.update(v, hessian @ v)
        plain.update(v, hessian @ v)
    errors = [
        float((f.preconditioner() @ hessian - torch.eye(n, dtype=torch.float64)).norm())
        for f in (fitter, plain)
    ]
    assert errors[0] < 0.02 < 0.2 < errors[1], errors
    x = randn((n,), generator=g, dtype=torch.float64)
    torch.testing.assert_close(fitter.apply(x), fitter.preconditioner() @ x)
    same = [HessianFitter(n, "low_rank", generator=4).factors[1] for _ in range(2)]
    assert torch.equal(*same)
    assert HessianFitter(3, "low_rank").factors[1].shape == (3, 3)


def test_baselines():
    matrix = hessian(seed=8)
    v, h = pairs(matrix, 3000)
    want = torch.linalg.inv(matrix)
    closed = fit_closed_form(h)
    torch.testing.assert_close(
        closed @ (h.T @ h / 3000) @ closed, torch.eye(6, dtype=torch.float64), rtol=1e-8, atol=1e-8
    )
    assert (closed - want).norm() < 0.1 * want.norm()
    torch.testing.assert_close(fit_bfgs(v, h), want, rtol=1e-4, atol=1e-4)
    for fit in (fit_euclidean_gd, fit_spd_gd):
        start, end = (fitting_criterion(p, v, h) for p in (torch.eye(6, dtype=torch.float64), fit(v, h)))
        assert end < start
    # The criterion is least at the inverse.
    least = fitting_criterion(want, v, h)
    for k in range(5):
        other = want + 0.01 * (k + 1) * torch.eye(6)
        assert fitting_criterion(other, *pairs(matrix, 20_000)) > fitting_criterion(
            want, *pairs(matrix, 20_000)
        )
    assert least < fitting_criterion(torch.eye(6, dtype=torch.float64), v, h)


def test_single_and_half_precision_stay_finite():
    for dtype in (torch.float32, torch.float64):
        fitter = HessianFitter(6, "triangular", rate=1.0, dtype=dtype)
        for v, h in zip(*pairs(1e6 * hessian(dtype=dtype), 500), strict=True):
            fitter.update(v, h)
        assert fitter.preconditioner().isfinite().all()
    fitter = HessianFitter(6, dtype=torch.float32)
    fitter.update(torch.ones(6, dtype=torch.bfloat16), torch.zeros(6, dtype=torch.bfloat16))
    assert fitter.preconditioner().isfinite().all()


def bowl(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    w, b = P(torch.randn(3, 4, generator=g, dtype=dtype)), P(torch.randn(3, generator=g, dtype=dtype))
    frozen = P(torch.ones(1), requires_grad=False)
    left, right = hessian(3, dtype=dtype), hessian(4, dtype=dtype)
    return (w, b, frozen), lambda: ((left @ w @ right) * w).sum() / 2 + (b**4).sum() + b.square().sum()


@pytest.mark.parametrize("mode", ["newton", "whitening"])
@pytest.mark.parametrize("group", ["kronecker", "diagonal"])
def test_preconditioned_descent_descends(mode, group):
    weights, loss = bowl()
    start = loss().item()
    optimizer = PSGD(weights, lr=0.3 if mode == "newton" else 0.02, group=group, mode=mode)
    for _ in range(150):
        optimizer.step(loss)
    assert loss().item() < 0.02 * start
    assert (weights[2] == 1).all()


def test_steps_are_bounded_and_fits_can_be_rare():
    w = P(torch.ones(5))
    optimizer = PSGD([w], lr=0.1, max_norm=0.5, update_every=3)
    before = w.detach().clone()
    optimizer.step(lambda: 1e8 * w.square().sum())
    assert (w.detach() - before).square().mean().sqrt().item() == pytest.approx(0.05, rel=1e-4)
    factors = optimizer.state[w]["factor0"].clone()
    optimizer.step(lambda: w.square().sum())
    assert torch.equal(factors, optimizer.state[w]["factor0"])


def test_training_goes_on_bit_for_bit_and_schedulers_work():
    (weights, loss), (others, other) = bowl(), bowl()
    one, two = (PSGD(w, lr=0.1, mode="newton", seed=3) for w in (weights, others))
    schedule = torch.optim.lr_scheduler.StepLR(one, 1, 0.5)
    for _ in range(3):
        one.step(loss)
    schedule.step()
    with torch.no_grad():
        for a, b in zip(others, weights, strict=True):
            a.copy_(b)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        one.step(loss)
        two.step(other)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(checks.ModelError):
        PSGD([P(torch.ones(2))], lr=0.1).step(lambda: None)
