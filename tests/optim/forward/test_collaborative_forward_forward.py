"""Oracles of forward-forward training: gradients by autograd with the other layers held, one layer, entropies."""

import importlib

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator
from torch.nn.functional import softplus

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import (
    ForwardForwardClassifier,
    functional_entropy,
    information_flow,
    layer_goodness,
)

module = importlib.import_module("perturbkit.optim.forward.collaborative_forward_forward")


def blobs(seed=0, n=90, dtype=np.float64):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    centres = np.array([[-2.0, 0, 1], [2, 1, 0], [0, -2, -1]])
    return (centres[y] + 0.5 * rng.normal(size=(n, 3))).astype(dtype), y


def quick(**options):
    return ForwardForwardClassifier(**({"hidden": (12, 10, 8), "epochs": 3, "generator": 0} | options))


def goodness(generator, dtype):
    x, y = blobs(dtype=np.float64 if dtype == torch.float64 else np.float32)
    return quick(generator=generator).fit(x, y)._all_goodness(x)


X, Y = blobs()
EXAMPLE = Example(
    call=goodness,
    stochastic=True,
    refusals=(
        (lambda: quick(hidden=()).fit(X, Y), r"hidden is \(\)"),
        (lambda: quick(hidden=(3, 0)).fit(X, Y), "hidden is 0"),
        (lambda: quick(threshold=0.0).fit(X, Y), "threshold is 0"),
        (lambda: quick(label_scale=-1.0).fit(X, Y), "label_scale is -1"),
        (lambda: quick(lr=0.0).fit(X, Y), "lr is 0"),
        (lambda: quick(epochs=0).fit(X, Y), "epochs is 0"),
        (lambda: quick(batch_size=0).fit(X, Y), "batch_size is 0"),
        (lambda: quick().fit(X, np.zeros(len(X))), "y has one class"),
        (lambda: layer_goodness(torch.ones(2, 2), "max"), "reduction is 'max'"),
        (lambda: functional_entropy(torch.tensor([-1.0])), "goodness has the least value -1"),
        (lambda: functional_entropy(torch.ones(2), torch.zeros(2)), "reference has the least value 0"),
        (lambda: information_flow(3, X, Y), "model is a int"),
        (lambda: information_flow(quick().fit(X, Y), X, Y[:3]), r"y has shape \(3,\)"),
    ),
)


def activations(layers, x):
    found, h = [], x
    for layer in layers:
        h = torch.relu(layer(h.detach() / (h.detach().norm(dim=1, keepdim=True) + 1e-8)))
        found.append(h.square().mean(1))
    return found


@pytest.mark.parametrize("collaborate", [True, False])
def test_each_layers_gradient_is_that_of_its_own_loss_with_the_others_held(collaborate):
    g = torch.Generator().manual_seed(1)
    layers = module._layers([5, 7, 6, 4], g, torch.zeros(1, dtype=torch.float64))
    right, wrong = (torch.randn(9, 5, generator=g, dtype=torch.float64) for _ in range(2))
    module._loss(
        torch.stack(activations(layers, right)), torch.stack(activations(layers, wrong)), 0.3, collaborate
    ).backward()
    got = [layer.weight.grad.clone() for layer in layers]
    for i, layer in enumerate(layers):
        a, b = activations(layers, right), activations(layers, wrong)
        if collaborate:
            total_a = a[i] + sum(x.detach() for k, x in enumerate(a) if k != i)
            total_b = b[i] + sum(x.detach() for k, x in enumerate(b) if k != i)
            loss = (softplus(0.9 - total_a) + softplus(total_b - 0.9)).mean()
            # The gradient is the goodness's, times a gate that the whole network closes.
            gate_a, gate_b = torch.sigmoid(0.9 - total_a).detach(), torch.sigmoid(total_b - 0.9).detach()
            gated = torch.autograd.grad(
                (gate_b * b[i] - gate_a * a[i]).mean(), layer.weight, retain_graph=True
            )[0]
            torch.testing.assert_close(got[i], gated)
        else:
            loss = (softplus(0.3 - a[i]) + softplus(b[i] - 0.3)).mean()
        grads = torch.autograd.grad(loss, [layer.weight for layer in layers], allow_unused=True)
        torch.testing.assert_close(got[i], grads[i])
        # No gradient reaches another layer.
        assert [grad is not None for grad in grads] == [k == i for k in range(3)]


def test_with_one_layer_both_algorithms_are_one():
    one, two = (quick(hidden=(20,), collaborate=c, epochs=6).fit(X, Y) for c in (True, False))
    assert torch.equal(one.layers_[0].weight, two.layers_[0].weight)
    three, four = (quick(collaborate=c, epochs=6).fit(X, Y) for c in (True, False))
    assert not torch.equal(three.layers_[0].weight, four.layers_[0].weight)


@pytest.mark.parametrize("collaborate", [True, False])
def test_blobs_are_told_apart_by_any_labels(collaborate):
    names = np.array(["one", "two", "three"])[Y]
    made = quick(epochs=40, hidden=(40, 40), collaborate=collaborate).fit(X, names)
    test, labels = blobs(7)
    assert made.score(test, np.array(["one", "two", "three"])[labels]) > 0.9
    assert made.decision_function(test).shape == (90, 3)


def test_the_first_layer_can_be_left_out_of_the_prediction():
    made = quick(epochs=5, skip_first=True).fit(X, Y)
    goodness = made._all_goodness(X)
    assert goodness.shape == (90, 3, 3)
    np.testing.assert_allclose(made.decision_function(X), goodness[:, :, 1:].sum(2))
    np.testing.assert_allclose(made.set_params(skip_first=False).decision_function(X), goodness.sum(2))


def test_information_flow_ends_with_the_classifiers_accuracy():
    made = quick(epochs=15).fit(X, Y)
    flow = information_flow(made, X, Y)
    assert float(flow.accuracy[-1]) == pytest.approx(made.score(X, Y))
    assert flow.accuracy.shape == flow.entropy.shape == (3,)
    assert (flow.entropy >= 0).all()


def test_entropy_is_zero_for_constants_scales_and_is_that_of_the_definition():
    g = torch.Generator().manual_seed(0)
    f, w = (
        torch.rand(4, 9, generator=g, dtype=torch.float64),
        torch.rand(4, 9, generator=g, dtype=torch.float64),
    )
    p = w / w.sum(1, keepdim=True)
    mean = (p * f).sum(1)
    torch.testing.assert_close(functional_entropy(f, w), (p * f * f.log()).sum(1) - mean * mean.log())
    torch.testing.assert_close(functional_entropy(3 * f, w), 3 * functional_entropy(f, w))
    assert functional_entropy(torch.full((5,), 0.7)) < 1e-6
    assert functional_entropy(torch.tensor([0.0, 1.0])).item() == pytest.approx(0.5 * np.log(2))


def test_goodness():
    h = torch.tensor([[1.0, -2.0, 3.0]])
    assert layer_goodness(h, "sum").item() == 14
    assert layer_goodness(h).item() == pytest.approx(14 / 3)


def test_scikit_learn_accepts_the_estimator():
    found = check_estimator(quick(hidden=(40, 40), epochs=60), on_skip=None, on_fail=None)
    failed = [f"{c['check_name']}: {c['exception']!r}" for c in found if c["status"] == "failed"]
    assert failed == []
    with pytest.raises(NotFittedError):
        quick().predict(X)
    with pytest.raises(checks.ArgumentTypeError):
        quick(hidden=3).fit(X, Y)
