"""Oracles of Source: unrolling by autograd, the two limits in closed form, Gauss-Newton products, and one retraining."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from _common import Example
from perturbkit.core import Oracle, flatten, functional, gauss_newton_vp
from perturbkit.explain import (
    Source,
    influence_function,
    linear_datamodeling_score,
    unrolled_influence,
)
from perturbkit.explain.influence._curvature import fitted
from perturbkit.explain.influence._parts import Network


def cross_entropy(out, y):
    return nn.functional.cross_entropy(out, y, reduction="none")


def half_square(out, y):
    return (out[:, 0] - y).square() / 2


def first(out, y):
    return out[:, 0]


def seeded(net, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = net.to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype) / 2
    return net


def mlp(seed=0, dtype=torch.float64):
    return seeded(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)), seed, dtype)


def rows(n=12, d=4, k=3, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=dtype), torch.randint(0, k, (n,), generator=g)


def saved(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def moved(net, n, seed=7, scale=0.1):
    """Return checkpoints around a net's weights."""
    g = torch.Generator().manual_seed(seed)
    noise = lambda v: scale * torch.randn(v.shape, generator=g, dtype=v.dtype)
    return [{k: v + noise(v) for k, v in saved(net).items()} for _ in range(n)]


def descended(net, loss, data, rate, steps, decay=0.0, batches=None):
    """Return the weights before every step of gradient descent and after the last."""
    net, states = copy.deepcopy(net).eval().requires_grad_(), []
    for k in range(steps + 1):
        states.append(saved(net))
        part = data if batches is None or k == steps else (data[0][batches[k]], data[1][batches[k]])
        grads = torch.autograd.grad(loss(net(part[0]), part[1]).mean(), list(net.parameters()))
        for p, g in zip(net.parameters(), grads, strict=True):
            p.data -= rate * (g + decay * p.data)
    return states


def linear_world(n=10, d=4, seed=3, rank=None):
    """Return least squares with its optimum."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if rank is not None:
        x[:, rank:] = x[:, :1]
    y = torch.randn(n, generator=g, dtype=torch.float64)
    net = nn.Linear(d, 1, bias=False).double()
    net.weight.data = (torch.linalg.pinv(x) @ y)[None]
    return net, (x, y)


def small_source(model, dtype, **options):
    states = moved(model, 4)
    made = Source(model, cross_entropy, 2, **options)
    return made.fit(states, 0.1, 20, rows(dtype=dtype)).scores(rows(3, seed=2, dtype=dtype))


EXAMPLE = Example(
    model=lambda: mlp(dtype=torch.float32),
    with_model=lambda model, generator, dtype: small_source(
        model, dtype, curvature="kfac", n_samples=2, generator=generator
    ),
    chunked=lambda size: small_source(mlp(), torch.float64, curvature="kfac", chunk_size=size),
    refusals=(
        (lambda: Source(first, half_square), "model is a function"),
        (lambda: Source(mlp().requires_grad_(False), cross_entropy), "no trainable parameters"),
        (lambda: Source(mlp(), cross_entropy, 0), "segments is 0"),
        (lambda: Source(mlp(), cross_entropy, curvature="lbfgs"), "curvature is 'lbfgs'"),
        (lambda: Source(mlp(), cross_entropy, damping=-1.0), "damping is -1"),
        (lambda: Source(mlp(), cross_entropy, n_samples=0), "n_samples is 0"),
        (lambda: Source(mlp(), cross_entropy).scores(rows()), "nothing is fitted"),
        (lambda: Source(mlp(), cross_entropy).fit(moved(mlp(), 2), 0.1, 9, rows()), "checkpoints has 2"),
        (lambda: Source(mlp(), cross_entropy, 1).fit([3], 0.1, 9, rows()), "checkpoints is a list"),
        (lambda: Source(mlp(), cross_entropy, 1).fit([{}], 0.1, 9, rows()), "a checkpoint lacks 0.weight"),
        (lambda: Source(mlp(), cross_entropy).fit(moved(mlp(), 3), [0.1], 9, rows()), "learning_rates has 1"),
        (lambda: Source(mlp(), cross_entropy).fit(moved(mlp(), 3), 0.1, 0, rows()), "steps is 0"),
        (
            lambda: Source(mlp(), cross_entropy).fit(moved(mlp(), 3), 0.1, 9, rows(), momentum=1.0),
            "momentum is 1",
        ),
        (lambda: Source(mlp(), cross_entropy).fit(moved(mlp(), 3), 0.1, 9, rows()[0]), "train_data is a"),
        (
            lambda: Source(mlp(), cross_entropy).fit(
                moved(mlp(), 3), 0.1, 9, rows(), used=torch.zeros(3, 12, dtype=torch.bool)
            ),
            "used leaves a segment",
        ),
        (
            lambda: Source(mlp(), nn.functional.cross_entropy).fit(moved(mlp(), 3), 0.1, 9, rows()),
            "per_sample_loss returned shape",
        ),
        (
            lambda: Source(nn.Linear(100, 100), half_square, 1).fit(
                moved(nn.Linear(100, 100), 1), 0.1, 9, (torch.ones(2, 100), torch.ones(2))
            ),
            "curvature is 'exact' with 10100",
        ),
        (
            lambda: unrolled_influence(
                mlp(),
                cross_entropy,
                moved(mlp(), 3),
                rows(),
                rows(),
                learning_rates=0.1,
                batches=[torch.tensor([0])],
            ),
            "batches has 1",
        ),
        (
            lambda: influence_function(mlp(), cross_entropy, moved(mlp(), 1), rows(), rows(), damping=-1.0),
            "damping is -1",
        ),
        (lambda: linear_datamodeling_score(torch.ones(2, 3), torch.ones(4, 2), torch.ones(4, 2)), "subsets"),
    ),
    stochastic=True,
)


def matrix(kind, net, data, states=None, loss=cross_entropy, n_samples=None):
    network, g = Network(net, loss), torch.Generator().manual_seed(0)
    with network.frozen():
        found = fitted(kind, network, states or [saved(net)], data, n_samples, g)
    eye = torch.eye(network.size, dtype=torch.float64)
    return found, found.apply(lambda s: s, eye), found.apply(torch.ones_like, eye)


def gauss_newton(net, data):
    """Return the Gauss-Newton matrix of the mean cross-entropy from core's products, which know nothing of rows."""
    call, v = functional(net), flatten(net)
    return torch.stack(
        [
            gauss_newton_vp(
                lambda w: call(w, data[0]), lambda o: cross_entropy(o, data[1]).mean(), v, e
            )
            for e in torch.eye(len(v), dtype=torch.float64)
        ]
    )  # fmt: skip


def convolutional():
    return seeded(
        nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(2, 3, 3, padding="same", bias=False),
            nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(12, 3),
        )
    )  # fmt: skip


def test_exact_curvature_is_that_of_gauss_newton_products():
    net, data = mlp().eval(), rows()
    torch.testing.assert_close(matrix("exact", net, data)[1], gauss_newton(net, data), rtol=1e-9, atol=1e-12)


def test_curvature_is_averaged_over_checkpoints():
    net, data = mlp().eval(), rows()
    states = moved(net, 2)
    expected = 0
    for state in states:
        net.load_state_dict(state)
        expected = expected + gauss_newton(net, data) / 2
    torch.testing.assert_close(matrix("exact", net, data, states)[1], expected, rtol=1e-9, atol=1e-12)


def test_random_pseudo_gradients_are_unbiased():
    net, data = mlp().eval(), rows(4)
    found = matrix("exact", net, data, n_samples=40000)[1]
    expected = gauss_newton(net, data)
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("make", [mlp, convolutional])
def test_kronecker_factors_keep_the_diagonal_in_their_basis(make):
    net = make().eval()
    data = rows(8) if make is mlp else (rows(8, 16)[0].reshape(8, 1, 4, 4), rows(8)[1])
    exact = gauss_newton(net, data)
    found, whole, identity = matrix("kfac", net, data)
    torch.testing.assert_close(identity, torch.eye(len(exact)).double(), rtol=1e-9, atol=1e-9)
    # A matrix V diag(s) V^T with s = diag(V^T G V): its products with G and with itself have one trace.
    torch.testing.assert_close((whole @ exact).trace(), (whole @ whole).trace(), rtol=1e-9, atol=0)
    torch.testing.assert_close(whole.trace(), exact.trace(), rtol=1e-9, atol=0)
    diagonal = matrix("diag", net, data)[1]
    torch.testing.assert_close(diagonal.diagonal(), exact.diagonal(), rtol=1e-9, atol=1e-12)
    assert float((whole - exact).norm()) < float((diagonal - exact).norm())
    assert float(found.values().min()) >= 0


def test_kronecker_factors_are_exact_for_one_row():
    net, data = seeded(nn.Linear(4, 3)).eval(), rows(1)
    torch.testing.assert_close(matrix("kfac", net, data)[1], gauss_newton(net, data), rtol=1e-9, atol=1e-12)


def test_unrolled_is_the_derivative_through_every_step():
    net, data, queries = mlp().eval(), rows(), rows(3, seed=2)
    g = torch.Generator().manual_seed(4)
    batches, rate, decay = [torch.randperm(12, generator=g)[:5] for _ in range(6)], 0.3, 0.05
    states = descended(net, cross_entropy, data, rate, 6, decay, batches)
    found = unrolled_influence(
        net, cross_entropy, states, data, queries, learning_rates=rate, batches=batches, weight_decay=decay
    )
    call, start = functional(net), flatten(net)

    def trained(weight):
        v = start
        for b in batches:
            mean = lambda w, b=b: (cross_entropy(call(w, data[0][b]), data[1][b]) * weight[b]).mean()
            v = v - rate * (torch.func.grad(mean)(v) + decay * v)
        return cross_entropy(call(v, queries[0]), queries[1])

    expected = -torch.func.jacrev(trained)(torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-12)


def test_quadratic_loss_at_rest_differs_from_unrolling_by_the_step_size():
    net, data = linear_world()
    queries, errors = (data[0][:3] + 1, data[1][:3]), []
    for steps in (20, 40, 80):
        rate = 2.0 / steps
        states = [saved(net)] * (steps + 1)
        exact = unrolled_influence(
            net, half_square, states, data, queries, learning_rates=rate, measurement=first
        )
        found = Source(net, half_square, 1).fit(states[:1], rate, steps, data).scores(queries, first)
        errors.append(float((found.values - exact.values).abs().max() / exact.values.abs().max()))
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_a_segment_a_step_is_unrolling_up_to_the_step_size():
    net, (x, y) = linear_world()
    net.weight.data += 1  # far from the optimum, so that gradients change along the way
    errors = []
    for steps in (10, 20):
        rate = 1.0 / steps
        states = descended(net, half_square, (x, y), rate, steps)
        exact = unrolled_influence(
            net, half_square, states, (x, y), (x[:3], y[:3]), learning_rates=rate, measurement=first
        )
        made = Source(net, half_square, steps).fit(states[:-1], rate, steps, (x, y))
        errors.append(float((made.scores((x[:3], y[:3]), first).values - exact.values).abs().max()))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)


def test_many_steps_give_the_influence_function_without_damping():
    net, data = linear_world(rank=3)  # the Gauss-Newton matrix is singular
    queries = data[0][:4], data[1][:4]
    found = Source(net, half_square, 1).fit([saved(net)], 0.5, 10**7, data).scores(queries, first)
    limit = influence_function(net, half_square, [saved(net)], data, queries, measurement=first, damping=0.0)
    h = data[0].T @ data[0] / 10
    g = (data[0] @ net.weight.data[0] - data[1])[:, None] * data[0]
    expected = queries[0] @ torch.linalg.pinv(h, hermitian=True, rtol=1e-10) @ g.T / 10
    torch.testing.assert_close(limit.values, expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(found.values, expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("kind", ["exact", "kfac", "diag"])
def test_few_steps_give_products_of_gradients(kind):
    net, data, queries = mlp().eval(), rows(), rows(3, seed=2)
    states = moved(net, 1)
    found = Source(net, cross_entropy, 1, kind).fit(states, 1e-9, 10, data).scores(queries)
    net.load_state_dict(states[0])

    def gradient(x, y):
        grads = torch.autograd.grad(cross_entropy(net(x[None]), y[None]).sum(), list(net.parameters()))
        return torch.cat([g.reshape(-1) for g in grads])

    train = torch.stack([gradient(x, y) for x, y in zip(*data, strict=True)])
    asked = torch.stack([gradient(x, y) for x, y in zip(*queries, strict=True)])
    torch.testing.assert_close(found.values, 1e-8 * asked @ train.T / 12, rtol=1e-6, atol=0)


def test_segments_compose_with_their_own_curvature_rates_and_rows():
    net, data, queries = mlp().eval(), rows(), rows(3, seed=2)
    states, used = moved(net, 3, scale=0.5), torch.zeros(2, 12, dtype=torch.bool)
    used[0, :7], used[1, 4:] = True, True
    made = Source(net, cross_entropy, 2, damping=0.1).fit(
        [states[:1], states[1:]], [0.5, 0.2], [10, 30], data, momentum=0.5, used=used
    )
    found = made.scores(queries)

    def matrices(index, group, t):
        part = data[0][used[index]], data[1][used[index]]
        h = matrix("exact", net, part, group)[1] + 0.1 * torch.eye(43, dtype=torch.float64)
        s = torch.linalg.matrix_exp(-t * h)
        return s, torch.linalg.solve(h, torch.eye(43, dtype=torch.float64) - s)

    network = Network(net, cross_entropy)
    with network.frozen():
        grads = [network.gradients(s, data, cross_entropy) for s in states]
        q = sum(network.gradients(s, queries, cross_entropy) for s in states[1:]) / 2
    (_, early), (late_s, late) = matrices(0, states[:1], 10.0), matrices(1, states[1:], 12.0)
    expected = (
        q @ late @ ((grads[1] + grads[2]) / 2).T * used[1] / 8 + q @ late_s @ early @ grads[0].T * used[0] / 7
    )
    torch.testing.assert_close(found.values, expected, rtol=1e-8, atol=1e-12)


def test_the_sign_is_that_of_a_retraining():
    net, data, queries = mlp().eval(), rows(20), rows(5, seed=2)
    states = descended(net, cross_entropy, data, 0.2, 60)
    found = Source(net, cross_entropy, 3).fit(states[5::10], 0.2, 60, data).scores(queries).values
    changes = []
    for i in range(20):
        weight = torch.ones(20, dtype=torch.float64)
        weight[i] = 0
        without = lambda out, y, w=weight: cross_entropy(out, y) * w
        again = copy.deepcopy(net)
        again.load_state_dict(descended(net, without, data, 0.2, 60)[-1])
        net.load_state_dict(states[-1])
        with torch.no_grad():
            changes.append(
                cross_entropy(again(queries[0]), queries[1]) - cross_entropy(net(queries[0]), queries[1])
            )
        net = mlp().eval()
    changes = torch.stack(changes, 1)
    alike = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(found, changes, strict=True)]
    assert min(alike) > 0.5
    assert sum(alike) / 5 > 0.8


def test_an_oracle_counts_what_is_spent():
    oracle = Oracle(mlp())
    made = Source(oracle, cross_entropy, 1).fit(moved(oracle.fun, 2), 0.1, 5, rows())
    found = made.scores(rows(3))
    assert (found.extras["fit_cost"].nfev, found.extras["fit_cost"].ngrad) == (2 * 12 * 2, 2 * 12 * 3)
    assert (found.cost.nfev, found.cost.ngrad) == (2 * 15, 2 * 15)
    assert oracle.cost == found.cost + found.extras["fit_cost"]


def test_frozen_weights_are_left_out():
    net = mlp()
    net[0].requires_grad_(False)
    data, queries = rows(), rows(3, seed=2)
    found = Source(net, cross_entropy, 1, "kfac").fit([saved(net)], 0.1, 20, data).scores(queries)
    with torch.no_grad():
        inner = net.eval()[:2]
        features, asked = inner(data[0]), inner(queries[0])
    head = net[3]
    alone = Source(head, cross_entropy, 1, "kfac").fit([saved(head)], 0.1, 20, (features, data[1]))
    torch.testing.assert_close(found.values, alone.scores((asked, queries[1])).values, rtol=1e-9, atol=1e-12)


def test_datamodeling_score_is_scipys_rank_correlation():
    g = torch.Generator().manual_seed(0)
    scores, kept = torch.randn(3, 8, generator=g), torch.rand(30, 8, generator=g) < 0.5
    outputs = torch.randn(30, 3, generator=g)
    predicted = (~kept).float() @ scores.T
    expected = sum(spearmanr(predicted[:, j], outputs[:, j]).statistic for j in range(3)) / 3
    assert linear_datamodeling_score(scores, kept, outputs) == pytest.approx(expected, abs=1e-12)
    assert linear_datamodeling_score(scores, kept, predicted.exp()) == pytest.approx(1.0)
    assert linear_datamodeling_score(-scores, kept, predicted) == pytest.approx(-1.0)
    assert linear_datamodeling_score(scores, kept, torch.ones(30, 3)) == 0.0


def test_a_layer_after_which_is_written_in_place_has_the_same_factors():
    data = rows(8, 16)[0].reshape(8, 1, 4, 4), rows(8)[1]
    one, other = convolutional(), convolutional()
    other[1].inplace = False
    found, expected = (matrix("kfac", net.eval(), data)[1] for net in (one, other))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
