"""Oracles of median gradients: each proximal step by its definition, clipping as a special case, geometric medians."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import MedianSGD, SampleMedianSGD, geometric_median

P = nn.Parameter
NORMS = ("l2", "l1", "huber", "squared")


def trained(dtype):
    w = P(torch.linspace(-1, 1, 5, dtype=dtype))
    optimizer = MedianSGD([w], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (w**4).sum().backward()
        optimizer.step()
    return w.detach()


EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype),
    refusals=(
        (lambda: MedianSGD([P(torch.ones(1))], lr=-1.0), "lr is -1"),
        (lambda: MedianSGD([P(torch.ones(1))], lr=1.0, norm="l3"), "norm is 'l3'"),
        (lambda: MedianSGD([P(torch.ones(1))], lr=1.0, tau=0.0), "tau is 0"),
        (lambda: MedianSGD([P(torch.ones(1))], lr=1.0, huber=-1.0), "huber is -1"),
        (lambda: SampleMedianSGD([P(torch.ones(1))], lr=-1.0), "lr is -1"),
        (lambda: SampleMedianSGD([P(torch.ones(1))], lr=1.0, chunks=0), "chunks is 0"),
        (lambda: SampleMedianSGD([P(torch.ones(1))], lr=1.0).step([]), "closures is 0"),
        (lambda: geometric_median(torch.ones(0, 2)), "points is empty"),
        (lambda: geometric_median(torch.ones(2, 2), max_iter=0), "max_iter is 0"),
        (lambda: geometric_median(torch.ones(2, 2), tol=-1.0), "tol is -1"),
    ),
)


def distance(norm, r, mu):
    if norm == "l1":
        return np.abs(r).sum()
    size = np.linalg.norm(r)
    if norm == "l2":
        return size
    if norm == "squared":
        return size**2 / 2
    return size**2 / (2 * mu) if size <= mu else size - mu / 2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [0.05, 3.0])
def test_each_step_is_the_proximal_point_of_its_definition(norm, scale):
    rng = np.random.default_rng(1)
    tau, mu = 0.3, 0.5
    w = P(torch.zeros(3, dtype=torch.float64))
    optimizer = MedianSGD([w], lr=1.0, norm=norm, tau=tau, huber=mu)
    median = np.zeros(3)
    for _ in range(3):
        g = scale * rng.normal(size=3)
        before = w.detach().clone()
        w.grad = torch.tensor(g)
        optimizer.step()
        got = (before - w.detach()).numpy()

        def whole(z, g=g, median=median):
            return distance(norm, z - g, mu) + ((z - median) ** 2).sum() / (2 * tau)

        found = min((minimize(whole, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000})
                     for start in (got + 0.01, g, median)), key=lambda r: r.fun)  # fmt: skip
        assert whole(got) <= found.fun + 1e-9
        np.testing.assert_allclose(got, found.x, atol=1e-4)
        median = got


def test_forgetting_is_clipping():
    g = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for norm, clip in (("l2", nn.utils.clip_grad_norm_), ("l1", nn.utils.clip_grad_value_)):
        w, v = P(torch.zeros(6, dtype=torch.float64)), P(torch.zeros(6, dtype=torch.float64))
        ours, plain = MedianSGD([w], lr=0.5, norm=norm, tau=0.7, reset=True), torch.optim.SGD([v], lr=0.5)
        for factor in (0.1, 1.0, 30.0):
            w.grad, v.grad = factor * g, factor * g
            clip([v], 0.7)
            ours.step()
            plain.step()
        torch.testing.assert_close(w, v, rtol=1e-5, atol=1e-9)
    w, v = P(torch.zeros(6, dtype=torch.float64)), P(torch.zeros(6, dtype=torch.float64))
    w.grad, v.grad = g.clone(), g.clone()
    MedianSGD([w], lr=0.5, tau=1e9).step()
    torch.optim.SGD([v], lr=0.5).step()
    torch.testing.assert_close(w, v)


def test_tensors_share_a_distance_unless_told_otherwise():
    for per_tensor, reach in ((False, (0.3, 0.4)), (True, (0.5, 0.5))):
        w, v = P(torch.zeros(1)), P(torch.zeros(1))
        w.grad, v.grad = torch.tensor([30.0]), torch.tensor([40.0])
        MedianSGD([w, v], lr=1.0, tau=0.5, per_tensor=per_tensor).step()
        assert [-w.item(), -v.item()] == pytest.approx(reach)


def test_a_relative_step_follows_the_size_of_the_residuals():
    w = P(torch.zeros(2, dtype=torch.float64))
    optimizer = MedianSGD([w], lr=0.0, tau=0.5, relative=True)
    g = torch.Generator().manual_seed(1)
    for scale in (1e-6, 1e3):
        for _ in range(600):
            noise = torch.randn(2, generator=g, dtype=torch.float64)
            w.grad = scale * (torch.tensor([3.0, 4.0], dtype=torch.float64) + 0.1 * noise)
            optimizer.step()
        want = scale * torch.tensor([3.0, 4.0], dtype=torch.float64)
        torch.testing.assert_close(optimizer.state[w]["median"], want, rtol=0.1, atol=0)


def test_geometric_medians():
    g = torch.Generator().manual_seed(2)
    line = torch.randn(7, generator=g, dtype=torch.float64)[:, None] * torch.tensor(
        [0.6, 0.8], dtype=torch.float64
    )
    torch.testing.assert_close(geometric_median(line), line[line[:, 0].argsort()[3]], rtol=1e-6, atol=1e-8)
    points = torch.randn(9, 4, generator=g, dtype=torch.float64)
    m = geometric_median(points, max_iter=1000)
    unit = (points - m) / (points - m).norm(dim=1, keepdim=True)
    assert unit.sum(0).norm() < 1e-5
    turn = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64)).Q
    torch.testing.assert_close(geometric_median(points @ turn, max_iter=1000), m @ turn, rtol=1e-5, atol=1e-6)
    # A point that most of the weight lies on is the median itself, also from a start on it.
    heavy = torch.cat([torch.zeros(5, 2), torch.randn(4, 2, generator=g)])
    assert geometric_median(heavy).abs().max() < 1e-6
    assert torch.equal(geometric_median(torch.ones(3, 2)), torch.ones(2))


def test_corrupted_chunks_do_not_move_the_step():
    g = torch.Generator().manual_seed(5)
    w = P(torch.tensor([1.0, -2.0], dtype=torch.float64))
    frozen = P(torch.ones(1), requires_grad=False)
    chunks = [torch.randn(2, generator=g, dtype=torch.float64) * 0.1 for _ in range(8)]
    chunks[1], chunks[6] = torch.tensor([1e4, 1e4]).double(), torch.tensor([-1e5, 3.0]).double()
    before = w.detach().clone()
    optimizer = SampleMedianSGD([{"params": [w]}, {"params": [frozen]}], lr=1.0)
    losses = optimizer.step([lambda c=c: (w @ w) / 2 + c @ w for c in chunks])
    assert len(losses) == 8
    assert (before - w.detach() - before).norm() < 0.3
    want = geometric_median(torch.stack([before + c for c in chunks]))
    torch.testing.assert_close(before - w.detach(), want)


def test_frozen_and_sparse_parameters_states_and_schedulers():
    (w, v), optimizers = (P(torch.ones(3)), P(torch.ones(3))), []
    tables = [nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True) for _ in range(2)]
    frozen = P(torch.ones(2), requires_grad=False)
    for p, table in zip((w, v), tables, strict=True):
        optimizers.append(MedianSGD([p, frozen, *table.parameters()], lr=0.1, relative=True))
    schedule = torch.optim.lr_scheduler.StepLR(optimizers[0], 2, 0.5)

    def gradients(p, table):
        p.grad = table.weight.grad = None
        ((p**4).sum() + table(torch.tensor([1])).sum() + frozen.sum()).backward()

    for _ in range(3):
        gradients(w, tables[0])
        optimizers[0].step()
        schedule.step()
    with torch.no_grad():
        v.copy_(w)
        tables[1].weight.copy_(tables[0].weight)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for _ in range(3):
        for p, table, optimizer in zip((w, v), tables, optimizers, strict=True):
            gradients(p, table)
            optimizer.step()
    assert torch.equal(w, v)
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert (tables[0].weight[[0, 2, 3]] == 1).all()


def test_a_relative_distance_begins_at_the_first_gradient_that_is_not_zero():
    w = nn.Parameter(torch.ones(2))
    optimizer = MedianSGD([w], lr=0.1, relative=True)
    for size in (0.0, 0.0, 1.0, 1.0):
        w.grad = torch.full((2,), size)
        optimizer.step()
    # Tenths of the residual of 1, then of the first size over 1.1.
    first, second = 0.1, 0.1 + 0.1 / 1.1
    torch.testing.assert_close(w.detach(), torch.full((2,), 1 - 0.1 * (first + second)))


def test_the_relative_distance_goes_on_where_the_first_parameter_had_no_gradient_before():
    w, v = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = MedianSGD([w, v], lr=0.1, tau=0.5, relative=True)
    v.grad = torch.tensor([8.0])
    optimizer.step()
    before = optimizer.state[w]["middle"].item()
    w.grad = torch.tensor([1e-3])
    optimizer.step()
    assert optimizer.state[w]["middle"].item() == pytest.approx(before / 1.1)


def test_medians_of_half_precision_weights_move_by_small_steps():
    w = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = MedianSGD([w], lr=1e-3, tau=1e-3)
    for _ in range(1500):
        w.grad = torch.tensor([2.0], dtype=torch.bfloat16)
        optimizer.step()
    assert optimizer.state[w]["median"].item() == pytest.approx(1.5, rel=1e-3)


@pytest.mark.parametrize("far", [1e9, 1e20, 1e35], ids=str)
def test_how_far_an_outlier_is_does_not_matter(far):
    near = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    with_one = torch.cat([near, torch.tensor([[far, 0.0, 0.0]])])
    want = geometric_median(torch.cat([near, torch.tensor([[1e5, 0.0, 0.0]])]).double())
    torch.testing.assert_close(geometric_median(with_one).double(), want, rtol=1e-3, atol=1e-3)


def test_points_that_are_not_finite_are_left_out():
    near = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    bad = torch.tensor([[torch.inf, 0.0], [torch.nan, 1.0]])
    torch.testing.assert_close(geometric_median(torch.cat([bad, near])), geometric_median(near))
    with pytest.raises(checks.ArgumentError, match="no finite row"):
        geometric_median(bad)


@pytest.mark.parametrize(
    ("closure", "match"),
    [(lambda: 1.0, "without a graph"), (3, "closure is 3"), (lambda: torch.ones(2), r"shape \(2,\)")],
    ids=["number", "uncallable", "vector"],
)
def test_chunks_that_are_no_losses_are_told(closure, match):
    w = nn.Parameter(torch.ones(2))
    with pytest.raises(checks.PerturbkitError, match=match):
        SampleMedianSGD([w], 0.1, chunks=1).step([closure])
    assert (w == 1).all()
