"""Oracles of temperature scaling and neural clamping: convex fits by SciPy, limits, and the model left alone."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.utils import estimator_checks
from torch import nn

from _common import Example
from perturbkit.core import Oracle, checks
from perturbkit.uncertainty import NeuralClamping, TemperatureScaling


def network(d=5, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, k)).to(dtype)
    for p in net.parameters():
        p.data = 1.5 * torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def data(net, n=300, seed=1, scale=0.5):
    """Inputs and labels drawn from the network at another temperature, with a shift of the logits."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    x = torch.randn(n, 5, generator=g, dtype=dtype)
    z = scale * net(x).detach() + torch.tensor([0.5, 0.0, -0.5], dtype=dtype)
    return x, torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]


def nll(z, y):
    return float(nn.functional.cross_entropy(torch.as_tensor(z), torch.as_tensor(y)))


NET = network()
X, Y = data(NET)


def run(model, generator, dtype):
    x = X[:80].to(dtype)
    made = NeuralClamping(model.to(dtype), focal_gamma=1.0, epochs=3, generator=generator).fit(x, Y[:80])
    return made.predict_proba(x), TemperatureScaling(model).fit(x, Y[:80]).predict_proba(x)


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=run,
    chunked=lambda size: (
        NeuralClamping(Oracle(network(), chunk_size=size), epochs=2, generator=0)
        .fit(X[:40], Y[:40])
        .predict_proba(X[:40])
    ),
    stochastic=True,
    refusals=(
        (lambda: NeuralClamping().fit(X, Y), "model is a NoneType"),
        (lambda: NeuralClamping(NET).fit(X.numpy(), Y), "X is ndarray"),
        (lambda: NeuralClamping(NET).fit(X, Y[:5]), "y has shape"),
        (lambda: NeuralClamping(NET).fit(X, Y + 1), "y holds labels"),
        (lambda: NeuralClamping(NET, focal_gamma=-1.0).fit(X, Y), "focal_gamma is -1"),
        (lambda: NeuralClamping(NET, perturbation_weight=-1.0).fit(X, Y), "perturbation_weight is -1"),
        (lambda: NeuralClamping(NET, init="ones").fit(X, Y), "init is 'ones'"),
        (lambda: NeuralClamping(NET, epochs=0).fit(X, Y), "epochs is 0"),
        (lambda: NeuralClamping(NET, lr=0.0).fit(X, Y), "lr is 0"),
        (lambda: NeuralClamping(NET, batch_size=0).fit(X, Y), "batch_size is 0"),
        (lambda: NeuralClamping(NET, validation_share=1.0).fit(X, Y), "validation_share is 1"),
        (lambda: NeuralClamping(NET, generator="a").fit(X, Y), "generator is 'a'"),
        (lambda: TemperatureScaling().fit(torch.ones(3, 1), [0, 0, 0]), "1 column"),
        (lambda: TemperatureScaling().fit(X * torch.nan, Y), "NaN"),
        (lambda: TemperatureScaling(NET).fit(X, Y + 1), "y holds labels"),
    ),
)


@pytest.mark.parametrize("seed", range(4))
def test_temperature_is_the_minimum_by_scipy(seed):
    g = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(200, 4, generator=g, dtype=torch.float64)
    y = torch.multinomial((z / (1 + seed)).softmax(1), 1, generator=g)[:, 0]
    found = TemperatureScaling().fit(z, y).temperature_
    # Independently: convex in 1 / T, by another method.
    expected = 1 / minimize_scalar(lambda b: nll(b * z, y), bracket=(0.01, 5.0), method="brent", tol=1e-12).x
    assert found == pytest.approx(expected, rel=1e-5)
    slope = [nll(z / (found * (1 + e)), y) - nll(z / found, y) for e in (-0.01, 0.01)]
    assert min(slope) > 0


def test_temperature_recovers_the_scale_of_the_logits():
    g = torch.Generator().manual_seed(5)
    z = 2 * torch.randn(40_000, 3, generator=g, dtype=torch.float64)
    y = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    assert TemperatureScaling().fit(3 * z, y).temperature_ == pytest.approx(3, rel=0.03)


def test_ends_of_the_range():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert TemperatureScaling().fit(z, [0, 1]).temperature_ < 0.1
    wrong = TemperatureScaling().fit(z, [1, 0])
    assert wrong.temperature_ == pytest.approx(1000, rel=1e-3)
    torch.testing.assert_close(wrong.predict_proba(z), torch.full((2, 2), 0.5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("made", [TemperatureScaling(NET), NeuralClamping(NET, epochs=1, generator=0)])
def test_a_large_temperature_gives_the_uniform_answer(made):
    made.fit(X, Y)
    made.temperature_ = 1e9
    p = made.predict_proba(X)
    entropy = -(p * p.log()).sum(1)
    torch.testing.assert_close(entropy, torch.full_like(entropy, np.log(3)), atol=1e-6, rtol=0)


def test_without_a_perturbation_it_is_temperature_scaling():
    expected = TemperatureScaling(NET).fit(X, Y)
    # So heavy a norm that every move is worse: the start, zero, is kept.
    made = NeuralClamping(
        NET,
        focal_gamma=0.0,
        init="zero",
        perturbation_weight=1e6,
        validation_share=0.0,
        epochs=3,
        generator=0,
    ).fit(X, Y)
    assert made.epoch_ == 0
    assert not made.perturbation_.any()
    assert made.temperature_ == pytest.approx(expected.temperature_, rel=1e-6)
    torch.testing.assert_close(made.predict_proba(X), expected.predict_proba(X), rtol=1e-6, atol=1e-8)


def test_a_linear_model_gets_a_bias_and_a_temperature():
    """Full row rank, no penalty, no focus: the convex fit of bias and temperature, by SciPy."""
    g = torch.Generator().manual_seed(2)
    linear = nn.Linear(6, 3).double()
    linear.weight.data = 2 * torch.randn(3, 6, generator=g, dtype=torch.float64)
    linear.bias.data = torch.randn(3, generator=g, dtype=torch.float64)
    x = torch.randn(500, 6, generator=g, dtype=torch.float64)
    z = linear(x).detach()
    y = torch.multinomial((z / 3 + torch.tensor([1.0, 0.0, -1.0])).softmax(1), 1, generator=g)[:, 0]

    def loss(v):
        return nll(v[0] * z + torch.as_tensor(np.append(v[1:], 0.0)), y)

    fit = minimize(loss, np.array([1.0, 0.0, 0.0]), method="BFGS", tol=1e-10)
    made = NeuralClamping(
        linear, focal_gamma=0.0, perturbation_weight=0.0, init="zero", epochs=400, batch_size=None,
        validation_share=0.0, lr=0.02, generator=0,
    ).fit(x, y)  # fmt: skip
    assert nll(made.predict_proba(x).log(), y) == pytest.approx(fit.fun, abs=1e-6)
    assert made.temperature_ == pytest.approx(1 / fit.x[0], rel=1e-3)
    bias = (made.perturbation_ @ linear.weight.data.T) / made.temperature_
    np.testing.assert_allclose((bias - bias[2])[:2], fit.x[1:], atol=5e-3)


@pytest.mark.parametrize("init", ["random", "zero", "gradient"])
@pytest.mark.parametrize("seed", [3, 4])
def test_the_joint_objective_is_never_above_temperature_scaling(init, seed):
    x, y = data(NET, seed=seed)
    made = NeuralClamping(NET, focal_gamma=0.0, init=init, validation_share=0.0, epochs=20, generator=0).fit(
        x, y
    )
    scaled = TemperatureScaling(NET).fit(x, y)
    ours = nll(made.predict_proba(x).log(), y) + 0.01 * float(made.perturbation_.norm())
    assert ours < nll(scaled.predict_proba(x).log(), y) - 1e-4
    assert made.epoch_ > 0


def test_gradient_start_lowers_the_loss():
    made = NeuralClamping(NET, focal_gamma=2.0, init="gradient")
    z = NET(X).detach()
    start = made._start(Oracle(NET), X, Y, 2.0, torch.Generator())
    focal = [
        float((-((1 - (v / 2).softmax(1)[torch.arange(300), Y]) ** 2) * (v / 2).log_softmax(1)[torch.arange(300), Y]).mean())
        for v in (NET(X + start).detach(), z)
    ]  # fmt: skip
    assert start.norm() > 0
    assert focal[0] < focal[1]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_in_the_perturbation_against_autograd(gamma):
    delta = torch.full((5,), 0.3, dtype=torch.float64, requires_grad=True)
    p = (NET(X + delta) / 1.7).softmax(1)[torch.arange(300), Y]
    loss = (-((1 - p) ** gamma) * p.log()).mean() + 0.2 * delta.norm()
    (expected,) = torch.autograd.grad(loss, delta)
    made = NeuralClamping(NET, focal_gamma=gamma, perturbation_weight=0.2)
    found = made._gradient(Oracle(NET), X, Y, delta.detach(), 1.7)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_rows_kept_reject_a_perturbation_that_overfits():
    """Labels at the network's own odds: nothing to gain, and few rows to fit."""
    g = torch.Generator().manual_seed(6)
    wide = nn.Linear(200, 2).double()
    wide.weight.data = torch.randn(2, 200, generator=g, dtype=torch.float64) / 10
    x = torch.randn(40, 200, generator=g, dtype=torch.float64)
    y = torch.multinomial(wide(x).detach().softmax(1), 1, generator=g)[:, 0]
    options = {"init": "zero", "lr": 0.03, "focal_gamma": 0.0, "perturbation_weight": 0.0, "generator": 0}
    free = NeuralClamping(wide, validation_share=0.0, **options).fit(x, y)
    kept = NeuralClamping(wide, validation_share=0.5, **options).fit(x, y)
    assert kept.perturbation_.norm() < 0.5 * free.perturbation_.norm()


def test_bare_logits_sklearn_models_and_modules_agree():
    z = NET(X).detach()
    a, b = TemperatureScaling().fit(z, Y), TemperatureScaling(NET).fit(X, Y)
    assert a.temperature_ == b.temperature_
    np.testing.assert_allclose(
        TemperatureScaling().fit(z.numpy(), Y.numpy()).predict_proba(z.numpy()), a.predict_proba(z)
    )
    names = np.array(["c", "a", "b"])[Y]
    assert set(names[:150]) == set(names)
    model = LogisticRegression(C=100).fit(X[:150].numpy(), names[:150])
    made = TemperatureScaling(model).fit(X[150:].numpy(), names[150:])
    plain = TemperatureScaling().fit(
        np.log(model.predict_proba(X[150:].numpy())), np.searchsorted(model.classes_, names[150:])
    )
    assert made.temperature_ == pytest.approx(plain.temperature_, rel=1e-6)
    np.testing.assert_array_equal(made.predict(X.numpy()), model.predict(X.numpy()))
    np.testing.assert_array_equal(a.predict(z), z.argmax(1))
    with pytest.raises(checks.ArgumentError, match="among a, b, c"):
        made.fit(X.numpy(), np.where(names == "a", "z", names))


def test_images_keep_their_shape():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = NeuralClamping(net, epochs=2, generator=0, validation_share=0.0).fit(x, Y[:50])
    assert made.perturbation_.shape == (3, 2, 2)
    np.testing.assert_array_equal(made.predict(x), made.predict_proba(x).argmax(1))


@pytest.mark.parametrize("made", [TemperatureScaling(), NeuralClamping(NET, epochs=1, generator=0)])
def test_scikit_learn_checks_that_apply(made):
    """Those that need no feature matrix: X is logits, or what a network takes."""
    name = type(made).__name__
    estimator_checks.check_get_params_invariance(name, made)
    estimator_checks.check_set_params(name, made)
    estimator_checks.check_no_attributes_set_in_init(name, made)
    estimator_checks.check_mixin_order(name, made)
    before = copy.copy(made.get_params())
    assert made.fit(X, Y % 3) is made
    assert before == made.get_params()
    assert pickle.loads(pickle.dumps(made)).temperature_ == made.temperature_
    for method in ("predict_proba", "predict"):
        with pytest.raises(NotFittedError, match="not fitted; allowed"):
            getattr(clone(made), method)(X)
