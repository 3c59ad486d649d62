"""Oracles of utility-based perturbed descent: plain descent in its limits, utilities exact on quadratics, and one step by hand."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.core.random import seeded_init
from perturbkit.optim import UPGD, scaled_utility, true_utility, weight_utility


def problem(dtype=torch.float64, seed=0, act=nn.Tanh):
    """A small network and its loss on random rows."""
    with seeded_init(seed):
        net = nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, 3)).to(dtype)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 4, generator=g, dtype=dtype)
    y = torch.randint(0, 3, (9,), generator=g)
    return net, lambda: nn.functional.cross_entropy(net(x), y)


def closure_of(net, loss_fn):
    def closure():
        net.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss

    return closure


def flat(values):
    return torch.cat([v.detach().flatten() for v in values])


def trained(dtype, steps=4, **options):
    net, loss_fn = problem(dtype)
    optimizer = UPGD(net.parameters(), lr=0.1, sigma=0.1, **options)
    closure = loss_fn if options.get("second_order") else closure_of(net, loss_fn)
    for _ in range(steps):
        optimizer.step(closure)
    return flat(net.parameters())


def one():
    return [nn.Parameter(torch.ones(2))]


EXAMPLE = Example(
    call=lambda generator, dtype: [trained(dtype), trained(dtype, second_order=True, n_probes=2)],
    refusals=(
        (lambda: UPGD(one(), lr=-1.0), "lr is -1"),
        (lambda: UPGD(one(), sigma=-1.0), "sigma is -1"),
        (lambda: UPGD(one(), utility_decay=1.0), "utility_decay is 1"),
        (lambda: UPGD(one(), weight_decay=-1.0), "weight_decay is -1"),
        (lambda: UPGD(one(), gain=0.0), "gain is 0"),
        (lambda: UPGD(one(), scaling="row"), "scaling is 'row'"),
        (lambda: UPGD(one(), n_probes=0), "n_probes is 0"),
        (lambda: UPGD(one(), seed=-1), "seed is -1"),
        (lambda: UPGD([{"params": one(), "sigma": -2.0}]), "sigma is -2"),
        (lambda: UPGD(one(), second_order=True).step(), "closure is None"),
        (lambda: UPGD(one(), second_order=True).step(lambda: torch.ones(())), "no graph"),
        (lambda: scaled_utility([]), "utilities is empty"),
        (lambda: scaled_utility(one(), "row"), "scaling is 'row'"),
        (lambda: weight_utility(lambda: 0.0, []), "params has none"),
        (lambda: weight_utility(lambda: 0.0, one(), order=3), "order is 3"),
        (lambda: weight_utility(lambda: 0.0, one()), "no graph"),
        (lambda: true_utility(lambda: torch.ones(2), one()), "shape"),
    ),
)


def by_hand(net, loss_fn, steps, lr, decay, wd, gain, protect, scaling):
    """Return the weights after steps without noise, and what was spared at the last."""
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]
    traces = [torch.zeros_like(w) for w in weights]
    for t in range(1, steps + 1):
        named = dict(zip([n for n, _ in net.named_parameters()], weights, strict=True))
        grads = torch.autograd.grad(loss_fn(named), weights)
        with torch.no_grad():
            traces = [decay * a - (1 - decay) * g * w for a, g, w in zip(traces, grads, weights, strict=True)]
            hats = [a / (1 - decay**t) for a in traces]
            if scaling == "global":
                largest = max(float(a.max()) for a in hats)
                s = [torch.sigmoid(a / largest) for a in hats]
            else:
                s = [torch.sigmoid(a / a.square().sum(-1, keepdim=True).sqrt()) for a in hats]
            weights = [
                ((1 - lr * wd) * w - gain * lr * g * ((1 - k) if protect else 1)).requires_grad_()
                for w, g, k in zip(weights, grads, s, strict=True)
            ]
    return flat(weights)


@pytest.mark.parametrize("scaling", ["global", "local"])
@pytest.mark.parametrize("protect", [True, False])
def test_steps_without_noise_by_hand(scaling, protect):
    net, _ = problem(seed=1)
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(9, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (9,), generator=g)

    def loss_fn(weights=None):
        out = net(x) if weights is None else torch.func.functional_call(net, weights, (x,))
        return nn.functional.cross_entropy(out, y)

    options = {"lr": 0.3, "weight_decay": 0.05, "gain": 2.0, "protect": protect, "scaling": scaling}
    want = by_hand(net, loss_fn, 4, 0.3, 0.9, 0.05, 2.0, protect, scaling)
    optimizer = UPGD(net.parameters(), sigma=0.0, utility_decay=0.9, **options)
    for _ in range(4):
        optimizer.step(closure_of(net, loss_fn))
    torch.testing.assert_close(flat(net.parameters()), want)


def test_without_noise_or_utility_it_is_gradient_descent():
    (net, loss_fn), (other, other_loss) = problem(), problem()
    optimizer = UPGD(net.parameters(), lr=0.1, sigma=0.0)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer.step(closure_of(net, loss_fn))
    other.load_state_dict(net.state_dict())
    for p in net.parameters():
        optimizer.state[p]["utility"].fill_(-torch.inf)
    for _ in range(3):
        optimizer.step(closure_of(net, loss_fn))
        plain.step(closure_of(other, other_loss))
    torch.testing.assert_close(flat(net.parameters()), flat(other.parameters()), rtol=1e-13, atol=1e-15)


def test_the_most_useful_weight_moves_least():
    w = nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    w.grad = torch.tensor([-1.0, -0.5, 1.0], dtype=torch.float64)
    UPGD([w], lr=1.0, sigma=0.0).step()
    spared = 1 - torch.sigmoid(torch.tensor([1.0, 0.5, -1.0], dtype=torch.float64))
    torch.testing.assert_close(w.detach(), 1 - spared * w.grad)


@pytest.mark.parametrize("protect", [True, False])
def test_noise_has_the_deviation_that_the_utility_leaves(protect):
    w = nn.Parameter(torch.cat([torch.ones(20_000), torch.zeros(20_000)]).double())
    w.grad = -torch.ones_like(w)
    before = w.detach().clone()
    UPGD([w], lr=0.5, sigma=0.2, protect=protect, seed=3).step()
    moved = (w.detach() - before).reshape(2, -1)
    for row, s in zip(moved, torch.sigmoid(torch.tensor([1.0, 0.0])).tolist(), strict=True):
        assert float(row.std()) == pytest.approx(0.5 * 0.2 * (1 - s), rel=0.03)
        assert float(row.mean()) == pytest.approx(0.5 * ((1 - s) if protect else 1), abs=0.003)


def test_noise_differs_between_steps_seeds_and_tensors_and_is_the_same_again():
    w, v = (nn.Parameter(torch.zeros(50)) for _ in range(2))

    def noise(optimizer):
        before = flat([w, v])
        w.grad, v.grad = torch.zeros(50), torch.zeros(50)
        optimizer.step()
        return flat([w, v]) - before

    optimizer = UPGD([w, v], lr=1.0, sigma=1.0, seed=5)
    first, second = noise(optimizer), noise(optimizer)
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first[:50], first[50:], atol=1e-3)
    torch.testing.assert_close(noise(UPGD([w, v], lr=1.0, sigma=1.0, seed=5)), first, atol=1e-5, rtol=0)
    assert not torch.allclose(noise(UPGD([w, v], lr=1.0, sigma=1.0, seed=6)), first, atol=1e-3)


def test_on_a_quadratic_the_second_order_is_exact_and_the_first_is_not():
    g = torch.Generator().manual_seed(6)
    x, y = (torch.randn(30, n, generator=g, dtype=torch.float64) for n in (5, 2))
    w = nn.Parameter(torch.randn(5, 2, generator=g, dtype=torch.float64))
    b = nn.Parameter(torch.randn(2, generator=g, dtype=torch.float64))

    def loss_fn():
        return (x @ w + b - y).square().mean()

    truth = flat(true_utility(loss_fn, [w, b]))
    torch.testing.assert_close(flat(weight_utility(loss_fn, [w, b], 2)), truth)
    first = flat(weight_utility(loss_fn, [w, b], 1))
    assert (first - truth).abs().max() > 0.1
    # One probe's variance is twice the squares beside the diagonal: 4000 of them are right to a few percent.
    estimate = flat(weight_utility(loss_fn, [w, b], 2, n_probes=4000, generator=0))
    assert (estimate - truth).abs().max() < 0.1 * truth.abs().max()
    assert not torch.allclose(estimate, truth, rtol=1e-6)


def test_the_exact_diagonal_of_more_weights_than_are_probed_at_a_time():
    h = torch.arange(1.0, 151.0, dtype=torch.float64)
    w, v = (nn.Parameter(torch.ones(n, dtype=torch.float64)) for n in (140, 10))
    found = flat(weight_utility(lambda: (h * torch.cat([w, v]).square()).sum() / 2, [w, v], 2))
    torch.testing.assert_close(found, -h / 2)


def test_a_weight_whose_gradient_comes_late_is_compared_on_equal_terms():
    w, v = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    optimizer = UPGD([w, v], lr=1.0, sigma=0.0, utility_decay=0.9)
    for _ in range(5):
        w.grad, v.grad = -1 / w.detach(), None
        optimizer.step()
    before = v.detach().clone()
    w.grad, v.grad = -1 / w.detach(), -torch.ones(1, dtype=torch.float64)
    optimizer.step()
    # Both have a mean utility of 1, after six steps and after one.
    torch.testing.assert_close(v.detach() - before, 1 - torch.sigmoid(torch.ones(1, dtype=torch.float64)))


def test_on_a_trained_network_utilities_are_ordered_as_the_true_ones():
    net, loss_fn = problem(seed=7)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(150):
        optimizer.step(closure_of(net, loss_fn))
    truth = flat(true_utility(loss_fn, net.parameters()))
    first, second = (flat(weight_utility(loss_fn, net.parameters(), k)) for k in (1, 2))
    assert spearmanr(first, truth).statistic > 0.6
    assert spearmanr(second, truth).statistic > 0.9


def test_utilities_leave_weights_and_gradients_alone():
    net, loss_fn = problem(seed=8)
    closure_of(net, loss_fn)()
    before, grads = flat(net.parameters()), flat(p.grad for p in net.parameters())
    for values in (true_utility(loss_fn, net.parameters()), weight_utility(loss_fn, net.parameters(), 2)):
        assert [v.shape for v in values] == [p.shape for p in net.parameters()]
    assert torch.equal(flat(net.parameters()), before)
    assert torch.equal(flat(p.grad for p in net.parameters()), grads)


def test_the_second_order_step_uses_the_exact_diagonal_where_asked():
    net, loss_fn = problem(seed=9)
    utilities = weight_utility(loss_fn, net.parameters(), 2)
    grads = torch.autograd.grad(loss_fn(), list(net.parameters()))
    want = [
        p.detach() - 0.1 * g * (1 - s)
        for p, g, s in zip(net.parameters(), grads, scaled_utility(utilities), strict=True)
    ]
    loss = UPGD(net.parameters(), lr=0.1, sigma=0.0, second_order=True, n_probes=None).step(loss_fn)
    torch.testing.assert_close(flat(net.parameters()), flat(want))
    assert not loss.requires_grad


def test_a_loss_that_is_linear_has_no_curvature():
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = lambda: (w * torch.tensor([3.0, -1.0])).sum()
    assert torch.equal(weight_utility(loss, [w], 2)[0], torch.tensor([-3.0, 2.0]))


@pytest.mark.parametrize("scaling", ["global", "local"])
def test_scaled_utilities_can_be_mapped_over_networks(scaling):
    g = torch.Generator().manual_seed(10)
    u, v = torch.randn(3, 4, 2, generator=g), torch.randn(3, 5, generator=g)
    mapped = torch.func.vmap(lambda a, b: tuple(scaled_utility([a, b], scaling)))(u, v)
    for i in range(3):
        for a, b in zip(scaled_utility([u[i], v[i]], scaling), mapped, strict=True):
            torch.testing.assert_close(a, b[i])


def test_where_no_utility_is_positive_nothing_is_spared():
    assert all((s < 1e-6).all() for s in scaled_utility([torch.tensor([-1.0, -0.5]), torch.tensor(-2.0)]))
    assert [float(s) for s in scaled_utility([torch.tensor(0.0)], "local")] == [0.5]


def test_frozen_and_sparse_parameters_and_groups():
    with seeded_init(0):
        table = nn.Embedding(5, 3, sparse=True)
    frozen, other = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(3))
    groups = [{"params": [table.weight, frozen]}, {"params": [other], "lr": 0.0}]
    optimizer = UPGD(groups, lr=0.1, sigma=0.0)
    before = table.weight.detach().clone()
    (table(torch.tensor([1, 3])) * frozen * other).sum().backward()
    optimizer.step()
    assert (table.weight != before).any(1).tolist() == [False, True, False, True, False]
    assert (frozen == 1).all()
    assert (other == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("second_order", [False, True])
def test_training_goes_on_bit_for_bit_from_a_state_dict(second_order, dtype):
    (net, loss_fn), (other, other_loss) = problem(dtype), problem(dtype)
    start = flat(net.parameters())
    options = {"lr": 0.1, "sigma": 0.1, "utility_decay": 0.9, "second_order": second_order}
    first, second = (UPGD(n.parameters(), **options) for n in (net, other))
    wrap = (lambda n, f: f) if second_order else closure_of
    schedule = torch.optim.lr_scheduler.StepLR(first, 2, 0.5)
    for _ in range(4):
        first.step(wrap(net, loss_fn))
        schedule.step()
    assert first.param_groups[0]["lr"] == 0.025
    assert not torch.equal(flat(net.parameters()), start)
    other.load_state_dict(net.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        first.step(wrap(net, loss_fn))
        second.step(wrap(other, other_loss))
    assert torch.equal(flat(net.parameters()), flat(other.parameters()))


def test_weights_stay_and_come_back_when_the_loss_fails():
    net, loss_fn = problem()
    before = flat(net.parameters())
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise checks.ModelError("lost")
        return loss_fn()

    with pytest.raises(checks.ModelError):
        true_utility(failing, net.parameters())
    assert torch.equal(flat(net.parameters()), before)


def test_the_utility_of_a_unit_is_that_of_a_gate_on_its_output():
    g = torch.Generator().manual_seed(31)
    first, second = (
        torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (2, 5))
    )
    kernel = torch.randn(4, 5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, generator=g, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 3, generator=g, dtype=torch.float64)

    def loss(gate):
        h = gate * torch.tanh(x @ first.T)
        wide = torch.nn.functional.conv1d(h[:, :, None].expand(7, 5, 4), kernel)
        return (h @ second.T + bias).square().sum() + wide.square().sum()

    gate = torch.ones(5, dtype=torch.float64, requires_grad=True)
    # Each path's own gate: a gate on the units moves both at once, so they are told apart by zeroing the other.
    optimizer = UPGD([second, kernel, bias], lr=0.0, utility_decay=0.0, feature_wise=True, sigma=0.0)
    loss(gate).backward()
    total = -gate.grad
    optimizer.step()
    found = [optimizer.state[p]["utility"] for p in (second, kernel, bias)]
    assert [u.shape for u in found] == [(5,), (5,), (2,)]
    torch.testing.assert_close(found[0] + found[1], total)
    torch.testing.assert_close(found[2], -bias.grad * bias.detach())


@pytest.mark.parametrize("protect", [True, False])
@pytest.mark.parametrize("scaling", ["global", "local"])
def test_weights_that_leave_a_unit_are_spared_alike(protect, scaling):
    g = torch.Generator().manual_seed(32)
    w = torch.nn.Parameter(torch.randn(4, 3, generator=g, dtype=torch.float64))
    before = w.detach().clone()
    optimizer = UPGD(
        [w], lr=0.1, sigma=0.0, utility_decay=0.5, protect=protect, scaling=scaling, feature_wise=True
    )
    w.grad = torch.randn(4, 3, generator=g, dtype=torch.float64)
    optimizer.step()
    utility = -(w.grad * before).sum(0)
    spared = 1 - scaled_utility([utility], scaling)[0]
    expected = before - 0.1 * w.grad * (spared if protect else 1.0)
    torch.testing.assert_close(w.detach(), expected)
    with pytest.raises(checks.ArgumentError, match="feature_wise and second_order"):
        UPGD([w], second_order=True, feature_wise=True)
