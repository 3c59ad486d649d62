"""Oracles of max-sensitivity: constant and linear explanations, and captum."""

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Gaussian, Oracle, Uniform
from perturbkit.explain import integrated_gradients, max_sensitivity, smooth_explanation


def network(seed=0, d=5, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, k)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def inputs(n=4, d=5, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradient(oracle, x, target):
    return oracle.gradient(x, target)


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: max_sensitivity(
        model, inputs(dtype=dtype), gradient, 1, n_samples=4, generator=generator
    ),
    chunked=lambda size: max_sensitivity(
        Oracle(network(), chunk_size=size), inputs(), gradient, 0, n_samples=5, generator=3
    ),
    refusals=(
        (lambda: max_sensitivity(network(), inputs(), gradient, 0, radius=0.0), "radius is 0"),
        (lambda: max_sensitivity(network(), inputs(), gradient, 0, norm="l3"), "norm is 'l3'"),
        (lambda: max_sensitivity(network(), inputs(), gradient, 0, n_samples=0), "n_samples is 0"),
        (lambda: max_sensitivity(network(), inputs(), lambda m, x, t: x[:, :2], 0), "explanation has shape"),
        (lambda: smooth_explanation(network(), inputs(), gradient, 0, n_samples=0), "n_samples is 0"),
    ),
    stochastic=True,
)


def test_a_constant_explanation_does_not_move():
    found = max_sensitivity(network(), inputs(), lambda m, x, t: torch.ones_like(x), 0, generator=0)
    assert float(found.values.max()) == 0.0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_explanation_comes_near_to_its_norm_and_never_beyond(norm):
    # phi(x) = A x moves by at most radius times the operator norm of A.
    a = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    bound = 0.2 * (3.0 if norm == "l2" else 10**0.5)
    found = max_sensitivity(
        lambda x: x.sum(1), inputs(3, 2), lambda m, x, t: x @ a, radius=0.2, norm=norm, n_samples=2000,
        generator=1,
    )  # fmt: skip
    assert bool((found.values <= bound + 1e-12).all())
    assert bool((found.values >= 0.97 * bound).all())


def test_more_points_never_lower_it_and_it_counts_its_cost():
    net, x = network(), inputs()
    few, many = (max_sensitivity(net, x, gradient, 0, n_samples=m, generator=7) for m in (5, 50))
    # The first five points are the same only within one block; the maximum over more points is larger on average.
    assert float(many.values.mean()) > float(few.values.mean())
    assert (many.cost.ngrad, few.cost.ngrad) == (4 * 51, 4 * 6)


def test_relative_divides_by_the_norm_at_the_input():
    net, x = network(), inputs()
    options = {"n_samples": 10, "generator": 2}
    plain, relative = (max_sensitivity(net, x, gradient, 0, relative=r, **options) for r in (False, True))
    norm = Oracle(net).gradient(x, 0).norm(dim=1)
    torch.testing.assert_close(relative.values, plain.values / norm, rtol=1e-12, atol=1e-12)


def test_agrees_with_captum_on_the_same_points(monkeypatch):
    metrics = pytest.importorskip("captum.metrics", reason="captum is an extra of the tests")
    net, x, m = network(dtype=torch.float32), inputs(dtype=torch.float32), 10
    moves = (2 * torch.rand(m, 4, 5, generator=torch.Generator().manual_seed(5)) - 1) * 0.1

    class Points:
        def __init__(self, norm, radius):
            assert (norm, radius) == ("linf", 0.1)

        def sample(self, like, *, generator=None, n=None):
            return moves.reshape(like.shape)

    monkeypatch.setattr("perturbkit.explain.metrics.max_sensitivity.Ball", Points)
    expected = metrics.sensitivity_max(
        lambda inputs, target: (
            Oracle(net).gradient(inputs[0] if isinstance(inputs, tuple) else inputs, target),
        ),
        x,
        perturb_func=lambda given: given + moves.transpose(0, 1).reshape(given.shape),
        n_perturb_samples=m,
        max_examples_per_batch=40,
        target=1,
    )
    found = max_sensitivity(net, x, gradient, 1, n_samples=m, relative=True)
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)


def test_smoothing_a_linear_function_s_explanation_changes_nothing_and_is_smoothgrad_in_general():
    w, x = inputs(1, 5, seed=3)[0], inputs()
    found = smooth_explanation(lambda z: z @ w, x, gradient, n_samples=8, generator=0)
    torch.testing.assert_close(found.values, w.expand_as(x), rtol=1e-12, atol=1e-12)
    # The gradient of a quadratic is linear, so its mean under symmetric noise tends to the gradient itself.
    quadratic = smooth_explanation(
        lambda z: (z**2).sum(1), x, gradient, kernel=Uniform(-1.0, 1.0), n_samples=20000, generator=0
    )
    torch.testing.assert_close(quadratic.values, 2 * x, rtol=0, atol=0.05)


def test_smoothing_against_a_loop():
    net, x, target = network(), inputs(), torch.tensor([0, 1, 2, 0])
    moves = Gaussian(0.2).sample(x[:1], generator=4, n=6)
    expected = sum(Oracle(net).gradient(x + move, target) for move in moves) / 6
    found = smooth_explanation(net, x, gradient, target, kernel=Gaussian(0.2), n_samples=6, generator=4)
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=1e-12)
    alone = smooth_explanation(
        net, x[2:], gradient, target[2:], kernel=Gaussian(0.2), n_samples=6, generator=4
    )
    torch.testing.assert_close(alone.values, found.values[2:], rtol=1e-12, atol=1e-12)


def test_smoothing_lowers_the_sensitivity_of_a_jagged_gradient():
    def jagged(z):
        return (torch.sin(40 * z) / 40 + z).sum(1)

    def smooth(oracle, x, target):
        return smooth_explanation(oracle, x, gradient, kernel=Gaussian(0.3), n_samples=200, generator=0)

    x = inputs(2)
    raw = max_sensitivity(jagged, x, gradient, radius=0.05, n_samples=20, generator=1)
    smoothed = max_sensitivity(jagged, x, smooth, radius=0.05, n_samples=20, generator=1)
    assert bool((smoothed.values < 0.5 * raw.values).all())


def test_takes_a_method_of_the_library_as_it_is():
    found = max_sensitivity(network(), inputs(), integrated_gradients, 1, n_samples=3, generator=0)
    assert found.values.shape == (4,)
    assert bool((found.values > 0).all())
