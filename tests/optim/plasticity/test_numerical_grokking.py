"""Oracles of StableMax and orthogonal gradients: geometry, the softmax's rounding, and a loss that is scaled only."""

import copy
import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.core.random import seeded_init
from perturbkit.optim import (
    ModularAddition,
    OrthogonalGradient,
    StableMaxCrossEntropy,
    log_stablemax,
    naive_loss_alignment,
    softmax_collapse_fraction,
    stablemax,
)


def problem(dtype=torch.float64, seed=0):
    """A small network without biases, and a closure of its loss on random rows."""
    with seeded_init(seed):
        net = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False)).to(dtype)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(11, 5, generator=g, dtype=dtype)
    y = torch.randint(0, 3, (11,), generator=g)

    def closure():
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return net, closure


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def trained(dtype):
    net, closure = problem(dtype)
    optimizer = OrthogonalGradient(net.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.step(closure)
    return flat(net)


EXAMPLE = Example(
    call=lambda generator, dtype: [trained(dtype), stablemax(torch.tensor([1.0, -2.0], dtype=dtype))],
    refusals=(
        (lambda: OrthogonalGradient([nn.Parameter(torch.ones(1))], rescale="yes"), "rescale is 'yes'"),
        (lambda: OrthogonalGradient([{"params": [torch.ones(1)], "project": 2}]), "project is 2"),
        (lambda: OrthogonalGradient([nn.Parameter(torch.ones(1))], "SGD"), "base_optimizer is a str"),
        (lambda: stablemax(torch.tensor([1, 2])), "dtype"),
        (lambda: stablemax(torch.tensor([math.inf, 2.0])), "infinite"),
        (lambda: log_stablemax(torch.ones(2, 2), 2), "dim is 2"),
        (lambda: StableMaxCrossEntropy("max"), "reduction is 'max'"),
        (lambda: softmax_collapse_fraction(torch.ones(2, 3), torch.tensor([0, 3])), "labels"),
        (lambda: softmax_collapse_fraction(torch.ones(3), torch.tensor([0])), "dimensions"),
        (lambda: naive_loss_alignment([nn.Parameter(torch.ones(1))]), "none with a gradient"),
        (lambda: ModularAddition(1), "p is 1"),
        (lambda: ModularAddition(5, 1.0), "train_fraction is 1"),
    ),
)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_given_is_orthogonal_to_each_tensor(rescale, dtype):
    net, closure = problem(dtype, seed=1)
    closure()
    before = [p.grad.clone() for p in net.parameters()]
    weights = [p.detach().clone() for p in net.parameters()]
    OrthogonalGradient(net.parameters(), torch.optim.SGD, rescale, lr=0.0).step(closure)
    eps = torch.finfo(dtype).eps
    for p, g, w in zip(net.parameters(), before, weights, strict=True):
        assert float((p.grad * w).sum().abs() / (g.norm() * w.norm())) < 4 * eps
        part = g - (g * w).sum() / w.square().sum() * w
        want = part * (g.norm() / part.norm()) if rescale else part
        torch.testing.assert_close(p.grad, want)


def test_rescaling_a_nearly_parallel_gradient_keeps_it_orthogonal():
    g = torch.Generator().manual_seed(2)
    w = nn.Parameter(torch.randn(1000, generator=g))
    w.grad = w.detach() + 1e-4 * torch.randn(1000, generator=g)
    length = float(w.grad.norm())
    OrthogonalGradient([w], torch.optim.SGD, lr=0.0).step()
    assert float((w.grad.double() @ w.detach().double()).abs() / (length * w.detach().norm())) < 1e-6
    assert float(w.grad.norm()) == pytest.approx(length, rel=1e-5)


def test_a_gradient_along_the_weights_is_not_followed():
    g = torch.Generator().manual_seed(3)
    w, v = (nn.Parameter(torch.randn(n, generator=g)) for n in (50, 1))
    before = w.detach().clone(), v.detach().clone()
    w.grad, v.grad = 3 * before[0], torch.ones(1)
    OrthogonalGradient([w, v], torch.optim.SGD, lr=1.0).step()
    assert torch.equal(w.detach(), before[0])
    assert torch.equal(v.detach(), before[1])


def test_zero_weights_and_groups_that_are_not_projected_follow_the_gradient():
    zero, gain = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    zero.grad, gain.grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    groups = [{"params": [zero]}, {"params": [gain], "project": False}]
    OrthogonalGradient(groups, torch.optim.SGD, lr=1.0).step()
    assert zero.tolist() == [-1.0, -2.0, -3.0]
    assert gain.tolist() == [0.0, -1.0, -2.0]


def test_on_homogeneous_networks_small_steps_leave_norms_as_they_are():
    net, closure = problem(seed=4)
    norms = [p.norm().item() for p in net.parameters()]
    drift = {}
    for lr, steps in ((1e-2, 100), (1e-3, 1000)):
        net, closure = problem(seed=4)
        optimizer = OrthogonalGradient(net.parameters(), torch.optim.SGD, rescale=False, lr=lr)
        for _ in range(steps):
            optimizer.step(closure)
        drift[lr] = sum(p.norm().item() for p in net.parameters()) - sum(norms)
    # Norms grow by lr^2 |g|^2 / 2 a step: by lr over the same time.
    assert 0 < drift[1e-3] < 0.02
    assert drift[1e-2] / drift[1e-3] == pytest.approx(10, rel=0.1)


def test_stablemax_is_a_distribution_in_the_order_of_the_logits():
    x = 5 * torch.randn(40, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    p = stablemax(x)
    s = torch.where(x >= 0, x + 1, 1 / (1 - x))
    torch.testing.assert_close(p, s / s.sum(1, keepdim=True))
    assert (p > 0).all()
    assert torch.equal(p.argsort(1), x.argsort(1))
    torch.testing.assert_close(stablemax(x.T, dim=0), p.T)
    torch.testing.assert_close(log_stablemax(x).exp(), p)


@pytest.mark.parametrize("side", [1e-7, 0.0, -1e-7])
def test_the_slope_at_zero_is_one_from_both_sides(side):
    # d log p_0 / d x_0 = (1 - p_0) s'(0) / s(0) = 1/2 for two logits at zero.
    x = torch.tensor([side, 0.0], dtype=torch.float64, requires_grad=True)
    log_stablemax(x)[0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.5, -0.5], dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_loss_is_the_mean_of_minus_log_probabilities():
    g = torch.Generator().manual_seed(6)
    x = torch.randn(8, 4, 3, generator=g, dtype=torch.float64)
    y = torch.randint(0, 4, (8, 3), generator=g)
    want = -stablemax(x, 1).gather(1, y[:, None]).log()[:, 0]
    torch.testing.assert_close(StableMaxCrossEntropy("none")(x, y), want)
    torch.testing.assert_close(StableMaxCrossEntropy()(x, y), want.mean())
    torch.testing.assert_close(StableMaxCrossEntropy("sum")(x, y), want.sum())


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)], ids=["single", "double"]
)
def test_the_gradient_vanishes_at_the_margin_where_the_sum_rounds(dtype, bits):
    def collapsed(margin):
        z = torch.tensor([[margin, 0.0]], dtype=dtype, requires_grad=True)
        nn.functional.cross_entropy(z, torch.tensor([0])).backward()
        found = softmax_collapse_fraction(z, torch.tensor([0]))
        assert (z.grad[0, 0] == 0) == (found == 1)
        return found == 1

    low, high = 1.0, 80.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if collapsed(middle) else (middle, high)
    # Ties round to even: 1 + exp(-margin) is 1 where exp(-margin) is at most half of the last place.
    assert high == pytest.approx(bits * math.log(2), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collapsed_rows_are_those_whose_correct_logit_has_no_gradient(dtype):
    g = torch.Generator().manual_seed(7)
    scale = 20 if dtype == torch.float32 else 45
    z = (scale * torch.randn(300, 5, generator=g, dtype=dtype)).requires_grad_()
    y = torch.randint(0, 5, (300,), generator=g)
    nn.functional.cross_entropy(z, y, reduction="sum").backward()
    want = float((z.grad[torch.arange(300), y] == 0).double().mean())
    assert 0.02 < want < 0.5
    assert softmax_collapse_fraction(z, y) == want


def test_stablemax_still_learns_where_the_softmax_has_collapsed():
    z = torch.tensor([[40.0, 0.0]], requires_grad=True)
    StableMaxCrossEntropy()(z, torch.tensor([0])).backward()
    assert softmax_collapse_fraction(z, torch.tensor([0])) == 1
    torch.testing.assert_close(z.grad, torch.tensor([[-1 / 41 / 42, 1 / 42]]))


def test_alignment_is_the_cosine_and_zero_without_a_direction():
    net, closure = problem(seed=8)
    closure()
    w = flat(net)
    g = torch.cat([p.grad.flatten() for p in net.parameters()])
    want = -float(nn.functional.cosine_similarity(g, w, dim=0))
    assert naive_loss_alignment(net.parameters()) == pytest.approx(want, rel=1e-9)
    assert 0.01 < abs(want) < 1
    for p in net.parameters():
        p.grad.zero_()
    assert naive_loss_alignment(net.parameters()) == 0


def test_the_pairs_are_split_without_overlap_and_summed_right():
    task = ModularAddition(7, 0.3, generator=9)
    x, y = torch.cat([task.x, task.test_x]), torch.cat([task.y, task.test_y])
    pairs = torch.stack([x[:, :7].argmax(1), x[:, 7:].argmax(1)], 1)
    assert len(task.x) == 15
    assert len(pairs.unique(dim=0)) == 49
    assert torch.equal(x.sum(1), torch.full((49,), 2.0))
    assert torch.equal(pairs.sum(1) % 7, y)
    assert not torch.equal(ModularAddition(7, 0.3, generator=10).x, task.x)


def test_frozen_and_sparse_parameters():
    with seeded_init(0):
        table = nn.Embedding(5, 3, sparse=True)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = OrthogonalGradient([table.weight, frozen], torch.optim.SGD, rescale=False, lr=0.1)
    before = table.weight.detach().clone()
    (table(torch.tensor([1, 3])) * frozen).sum().backward()
    g = torch.zeros(5, 3)
    g[[1, 3]] = 1.0
    optimizer.step()
    part = g - (g * before).sum() / before.square().sum() * before
    torch.testing.assert_close(table.weight.detach(), before - 0.1 * part)
    assert (frozen == 1).all()


def test_an_optimizer_that_evaluates_the_closure_often_is_given_orthogonal_gradients_each_time():
    net, closure = problem(seed=11)
    seen = []

    class Twice(torch.optim.SGD):
        def step(self, closure):
            for _ in range(2):
                with torch.enable_grad():
                    closure()
                seen.extend(
                    float((p.grad * p.detach()).sum()) for g in self.param_groups for p in g["params"]
                )
                super().step()

    OrthogonalGradient(net.parameters(), Twice, lr=0.1).step(closure)
    assert len(seen) == 4
    assert max(map(abs, seen)) < 1e-14


@pytest.mark.parametrize("scheduler", ["step", "cosine", "plateau"])
def test_training_goes_on_bit_for_bit_from_a_state_dict(scheduler):
    (net, closure), (other, other_closure) = problem(), problem()
    one, two = (OrthogonalGradient(n.parameters(), lr=0.05) for n in (net, other))
    make = {
        "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=1.0),
    }[scheduler]
    schedule = make(one)
    for _ in range(4):
        loss = one.step(closure)
        schedule.step(*([loss.item()] if scheduler == "plateau" else []))
    assert one.param_groups[0]["lr"] < 0.05
    assert one.base_optimizer.param_groups[0]["lr"] == one.param_groups[0]["lr"]
    other.load_state_dict(net.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        one.step(closure)
        two.step(other_closure)
    assert torch.equal(flat(net), flat(other))


def test_a_failing_closure_leaves_the_weights():
    net, _ = problem()
    before = flat(net)

    def failing():
        raise checks.ModelError("lost")

    with pytest.raises(checks.ModelError):
        OrthogonalGradient(net.parameters(), lr=0.1).step(failing)
    assert torch.equal(flat(net), before)
