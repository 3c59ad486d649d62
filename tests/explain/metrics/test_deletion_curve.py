"""Oracles of deletion and insertion curves: additive functions, a plain loop, invariants."""

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Oracle
from perturbkit.explain import deletion_curve, insertion_curve


def network(channels=2, side=4, k=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(channels * side**2, 6), nn.Tanh(), nn.Linear(6, k)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(seed=1, dtype=torch.float64):
    return draw(3, 2, 4, 4, seed=seed, dtype=dtype)


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: deletion_curve(
        model, images(dtype=dtype), images(2, dtype), 1, n_steps=4
    ),
    chunked=lambda size: insertion_curve(
        Oracle(network(), chunk_size=size), images(), images(2), 0, n_steps=4
    ),
    refusals=(
        (lambda: deletion_curve(network(), images(), images()[:2], 0), "explanation has shape"),
        (lambda: deletion_curve(network(), images(), images(), 0, n_steps=0), "n_steps is 0"),
        (lambda: deletion_curve(network(), images(), images(), 0, up_to=0.0), "up_to is 0"),
        (lambda: insertion_curve(network(), images(), images(), 0, output="odds"), "output is 'odds'"),
        (lambda: insertion_curve(network(), images(), images(), 7), "target is 7"),
        (lambda: insertion_curve(network(), images(), images()), "target is None"),
        (
            lambda: insertion_curve(network(), images(), images(), 0, baseline=torch.ones(3)),
            "baseline has shape",
        ),
    ),
)


def test_an_additive_function_falls_by_its_sorted_terms():
    x, w, b = draw(4, 6), draw(6, seed=2), draw(6, seed=3)
    terms = w * (x - b)
    found = deletion_curve(lambda z: z @ w, x, terms, baseline=b, n_steps=6)
    removed = torch.cat([torch.zeros(4, 1).double(), terms.sort(1, descending=True).values.cumsum(1)], 1)
    torch.testing.assert_close(found.outputs, (x @ w)[:, None] - removed, rtol=1e-12, atol=1e-12)
    brought = insertion_curve(lambda z: z @ w, x, terms, baseline=b, n_steps=6)
    torch.testing.assert_close(brought.outputs, (b @ w) + removed, rtol=1e-12, atol=1e-12)
    assert found.cost.nfev == 4 * 7
    assert (found.better, brought.better) == ("lower", "higher")


def test_the_order_of_the_terms_is_the_best_for_an_additive_function():
    x, w = draw(5, 6), draw(6, seed=2)
    best = deletion_curve(lambda z: z @ w, x, w * x, n_steps=6).area
    for seed in range(10):
        other = deletion_curve(lambda z: z @ w, x, draw(5, 6, seed=seed + 10), n_steps=6).area
        assert bool((other >= best - 1e-12).all())


@pytest.mark.parametrize("output", ["probability", "logit"])
def test_images_against_a_loop(output):
    net, x, scores, target = network(), images(), images(5), torch.tensor([2, 0, 1])
    found = deletion_curve(net, x, scores, target, baseline=0.5, n_steps=4, up_to=0.5, output=output)
    assert found.fractions.tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]
    for i in range(3):
        order = scores[i].sum(0).flatten().argsort(descending=True).tolist()
        expected = []
        for count in (0, 2, 4, 6, 8):
            mixed = x[i].clone().flatten(1)
            mixed[:, order[:count]] = 0.5
            out = net(mixed.reshape(1, 2, 4, 4))[0].detach()
            expected.append((out.softmax(0) if output == "probability" else out)[target[i]])
        torch.testing.assert_close(found.outputs[i], torch.stack(expected), rtol=1e-12, atol=1e-12)
        area = sum((expected[j] + expected[j + 1]) / 2 for j in range(4)) / 4
        torch.testing.assert_close(found.area[i], area, rtol=1e-12, atol=1e-12)


def test_deletion_of_an_order_is_insertion_of_its_reverse():
    net, x, scores = network(), images(), images(5)
    cover = images(6)
    down = deletion_curve(net, x, scores, 1, baseline=cover, n_steps=16)
    up = insertion_curve(net, x, -scores, 1, baseline=cover, n_steps=16)
    torch.testing.assert_close(down.outputs, up.outputs.flip(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(down.area, up.area, rtol=1e-12, atol=1e-12)


def test_only_the_order_of_the_scores_matters():
    net, x, scores = network(), images(), images(5)
    one = deletion_curve(net, x, scores.sum(1, keepdim=True).expand_as(x), 1)
    other = deletion_curve(net, x, (0.5 * scores.sum(1, keepdim=True)).exp().expand_as(x), 1)
    assert torch.equal(one.outputs, other.outputs)


def test_positions_of_a_sequence_go_as_a_whole():
    x = draw(2, 5, 3)
    found = deletion_curve(lambda z: (z != 0).any(2).sum(1).double(), x, x, n_steps=5)
    assert found.outputs.tolist() == [[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]] * 2


def test_a_plot_has_the_mean_curve():
    found = deletion_curve(network(), images(), images(5), 1, n_steps=4)
    (line,) = found.plot().lines
    torch.testing.assert_close(torch.as_tensor(line.get_ydata()).double(), found.outputs.mean(0))
