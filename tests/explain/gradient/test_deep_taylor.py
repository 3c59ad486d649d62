"""Oracles of deep Taylor decomposition: hand-computed rules, conservation and positivity, dense algebra, and captum."""

import copy

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.explain import deep_taylor, relprop_box, relprop_w2, relprop_zplus


def network(seed=0, dtype=torch.float64, bias=-0.05, pool=None):
    g = torch.Generator().manual_seed(seed)
    side = 2 if pool else 4
    middle = [] if pool is None else [pool]
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()), nn.Conv2d(4, 6, 3), nn.ReLU(), *middle, nn.Flatten(),
        nn.Linear(6 * side * side, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3),
    ).to(dtype)  # fmt: skip
    for p in net.parameters():
        p.data = (
            torch.randn(p.shape, generator=g, dtype=dtype) / 3 if p.ndim > 1 else torch.full_like(p, bias)
        )
    net[-1].weight.data.abs_()  # so that outputs are positive
    return net


def images(n=3, seed=1, dtype=torch.float64):
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(inputs=4, outputs=3, seed=0):
    made = nn.Linear(inputs, outputs).double()
    made.weight.data = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).double()
    return made


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: deep_taylor(
        model, images(dtype=dtype), torch.tensor([0, 1, 2])
    ),
    refusals=(
        (lambda: deep_taylor(network(), images() * 2, 0), "x goes from"),
        (lambda: deep_taylor(network(), images(), 0, high=torch.ones(7)), "low or high"),
        (lambda: deep_taylor(network(), images() - 1, 0, input_rule="z+"), "x reaches -"),
        (lambda: deep_taylor(network(), images(), 0, input_rule="z"), "input_rule is 'z'"),
        (lambda: deep_taylor(network(), images(), 0, pooling="mean"), "pooling is 'mean'"),
        (lambda: deep_taylor(network(), images(), 3), "target is 3"),
        (lambda: deep_taylor(lambda z: z, images(), 0), "model is a function"),
        (
            lambda: deep_taylor(nn.Sequential(nn.Flatten(), nn.Linear(36, 2), nn.Tanh()), images(), 0),
            "the model has a Tanh",
        ),
        (
            lambda: deep_taylor(nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Linear(4, 2)), images(), 0),
            "the model has a Linear",
        ),
        (
            lambda: deep_taylor(nn.Sequential(nn.MaxPool2d(2), nn.Flatten()), images(), 0),
            "the model has a MaxPool2d",
        ),
        (lambda: deep_taylor(nn.Sequential(nn.Flatten()), images(), 0), "the model has no weighted"),
        (lambda: relprop_zplus(nn.ReLU(), images(), images()), "layer is a ReLU"),
    ),
)


def test_a_sum_shares_its_value_in_proportion():
    net = nn.Sequential(nn.Linear(4, 1, bias=False), nn.ReLU()).double()
    net[0].weight.data.fill_(1)
    x = torch.tensor([[0.1, 0.4, 0.0, 0.5], [1.0, 2.0, 3.0, 0.0]]).double()
    found = deep_taylor(net, x, 0, input_rule="z+")
    torch.testing.assert_close(found.values, x, rtol=1e-12, atol=1e-12)
    assert found.cost.nfev == 2


def test_two_layers_by_hand():
    first, second = layer(3, 2), nn.Linear(2, 1, bias=False).double()
    first.weight.data, first.bias.data = (
        torch.tensor([[1.0, -2, 3], [2, 1, -1]]).double(),
        torch.zeros(2).double(),
    )
    second.weight.data.fill_(1)
    x = torch.tensor([[1.0, 0.5, 0.25]]).double()
    # Hidden: 1 - 1 + 0.75 = 0.75 and 2 + 0.5 - 0.25 = 2.25, which are also their relevance under a sum.
    expected = [0.75 * 1 / 1.75 + 2.25 * 2 / 2.5, 2.25 * 0.5 / 2.5, 0.75 * 0.75 / 1.75]
    expected = torch.tensor([expected], dtype=torch.float64)
    found = deep_taylor(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()), x, 0, input_rule="z+")
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_rules_by_a_loop_over_weights(seed):
    made, g = layer(seed=seed), torch.Generator().manual_seed(seed + 5)
    a, relevance = torch.rand(2, 4, generator=g).double(), torch.rand(2, 3, generator=g).double()
    made.weight.data[:, 0].abs_()  # no neuron without a positive weight
    low, high = -0.5, torch.tensor([1.0, 2, 3, 4]).double()
    expected = {name: torch.zeros(2, 4).double() for name in ("z+", "w2", "box")}
    for row in range(2):
        for j in range(3):
            w = made.weight.data[j]
            box = a[row] * w - low * w.clamp(min=0) - high * w.clamp(max=0)
            for name, part in (("z+", a[row] * w.clamp(min=0)), ("w2", w**2), ("box", box)):
                expected[name][row] += part / part.sum() * relevance[row, j]
    torch.testing.assert_close(relprop_zplus(made, a, relevance), expected["z+"])
    torch.testing.assert_close(relprop_w2(made, a, relevance), expected["w2"])
    torch.testing.assert_close(relprop_box(made, a, relevance, low, high), expected["box"])


@pytest.mark.parametrize("rule", ["zplus", "w2", "box"])
def test_a_convolution_is_the_linear_layer_that_it_equals(rule):
    conv = nn.Conv2d(1, 2, 3, stride=2, padding=1).double()
    g = torch.Generator().manual_seed(3)
    conv.weight.data = torch.randn(2, 1, 3, 3, generator=g).double()
    dense = nn.Linear(36, 18, bias=False).double()
    with torch.no_grad():
        columns = nn.functional.conv2d(
            torch.eye(36).double().reshape(36, 1, 6, 6), conv.weight, stride=2, padding=1
        )
    dense.weight.data = columns.flatten(1).T.contiguous()
    x, relevance = images(2), torch.rand(2, 2, 3, 3, generator=g).double()
    share = {"zplus": relprop_zplus, "w2": relprop_w2, "box": relprop_box}[rule]
    expected = share(dense, x.flatten(1), relevance.flatten(1)).reshape(x.shape)
    torch.testing.assert_close(share(conv, x, relevance), expected)


@pytest.mark.parametrize("rule", ["box", "w2", "z+"])
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)])
@pytest.mark.parametrize("pooling", ["winner", "proportional"])
def test_scores_are_positive_and_sum_to_the_output(rule, pool, pooling):
    net, x, target = network(pool=pool).eval(), images(6), torch.arange(6) % 3
    found = deep_taylor(net, x, target, input_rule=rule, pooling=pooling)
    with torch.no_grad():
        output = net(x)[torch.arange(6), target].clamp(min=0)
    assert int((output > 0).sum()) >= 2
    assert float(found.values.min()) >= 0
    torch.testing.assert_close(found.values.flatten(1).sum(1), output, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.extras["conservation_gap"], torch.zeros(6).double(), rtol=0, atol=1e-8)
    for sums in found.extras["per_layer"]:
        torch.testing.assert_close(sums, output, rtol=1e-8, atol=1e-10)


def test_a_positive_bias_loses_relevance_and_says_so():
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1, bias=False)).double()
    net[0].weight.data, net[0].bias.data = torch.tensor([[-1.0, -1.0]]).double(), torch.tensor([3.0]).double()
    net[2].weight.data.fill_(1.0)
    found = deep_taylor(net, torch.tensor([[0.5, 0.5]]).double(), 0, input_rule="z+")
    assert float(found.extras["conservation_gap"]) == pytest.approx(-2.0)


def test_batch_norm_is_folded():
    g = torch.Generator().manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4)
    )
    net = net.double().train()
    for norm in (net[1], net[5]):
        norm.running_mean.uniform_(-1, 1, generator=g)
        norm.running_var.uniform_(0.5, 2, generator=g)
    found = deep_taylor(net, images(), 1)
    norm, conv = net[1], copy.deepcopy(net[0])
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    conv.weight.data *= scale[:, None, None, None]
    conv.bias.data = (conv.bias.data - norm.running_mean) * scale + norm.bias.data
    last, dense = net[5], copy.deepcopy(net[4])
    scale = last.weight.data / (last.running_var + last.eps).sqrt()
    dense.weight.data *= scale[:, None]
    dense.bias.data = (dense.bias.data - last.running_mean) * scale + last.bias.data
    expected = deep_taylor(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), dense), images(), 1)
    torch.testing.assert_close(found.values, expected.values)
    assert net.training


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_captum(seed):
    captum = pytest.importorskip("captum.attr", reason="captum is an extra of the tests")
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule

    net, x = network(seed=seed).eval(), images(4, seed=seed)
    with torch.no_grad():
        target = net(x).argmax(1)
        assert bool((net(x).amax(1) > 0).all())
    found = deep_taylor(net, x, target, input_rule="z+")
    again = copy.deepcopy(net)
    for module in again.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.rule = Alpha1_Beta0_Rule(set_bias_to_zero=True)
        elif isinstance(module, nn.Flatten):
            module.rule = EpsilonRule()
    expected = captum.LRP(again).attribute(x.clone().requires_grad_(), target=target)
    torch.testing.assert_close(found.values, expected.detach(), rtol=1e-5, atol=1e-7)


def test_winner_takes_all_and_shares():
    net = nn.Sequential(
        nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1, 1, bias=False)
    )
    net = net.double()
    net[0].weight.data.fill_(1)
    net[4].weight.data.fill_(2)
    x = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]]).double()
    winner = deep_taylor(net, x, 0, input_rule="z+").values
    torch.testing.assert_close(winner, torch.tensor([[[[0, 0], [0, 0.8]]]]).double())
    shared = deep_taylor(net, x, 0, input_rule="z+", pooling="proportional").values
    torch.testing.assert_close(shared, 0.8 * x)
