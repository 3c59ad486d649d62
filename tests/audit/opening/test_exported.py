"""Programs of torch.export: answers, layers that can be bounded, and what keeps some from having them."""

import pytest
import torch
from torch import nn

import perturbkit.audit as audit
from perturbkit.audit.opening._layers import NoLayerError, layers_of
from perturbkit.audit.opening.exported import open_exported
from perturbkit.core import around
from perturbkit.core.random import seeded_init
from perturbkit.robust import BoundedModule


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(12, 3)
        self.register_buffer("shift", torch.linspace(-1, 1, 6))

    def forward(self, x):
        a = torch.tanh(self.first(x - self.shift)) * 0.5 + x
        return self.last(torch.cat([a, torch.sigmoid(self.second(a))], 1))


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv1d(2, 4, 3, padding="same"), nn.Linear(12, 3)

    def forward(self, x):
        h = self.conv(x.view(x.shape[0], 2, 3)).relu()
        return self.last(h.reshape(h.shape[0], -1)).softmax(1)


NETWORKS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 3)), (6,)),
    "normalised": (lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.LeakyReLU(0.2), nn.Linear(9, 3)), (6,)),
    "residual": (Residual, (6,)),
    "viewed": (Viewed, (6,)),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Softplus(), nn.AvgPool2d(2, padding=1), nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        ),
        (1, 9, 9),
    ),
}  # fmt: skip


def network(name, seed=0):
    make, shape = NETWORKS[name]
    with seeded_init(seed):
        net = make()
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return net.eval(), shape


def saved(net, shape, path, n=2, dynamic=True):
    shapes = ({0: torch.export.Dim("rows")},) if dynamic else None
    example = torch.rand(n, *shape, generator=torch.Generator().manual_seed(9))
    torch.export.save(torch.export.export(net, (example,), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize("dynamic", [True, False], ids=["any rows", "fixed rows"])
@pytest.mark.parametrize("name", NETWORKS)
def test_layers_answer_as_the_network_does_on_any_number_of_rows(tmp_path, name, dynamic):
    net, shape = network(name)
    opened = open_exported(saved(net, shape, tmp_path / "m.pt2", n=3, dynamic=dynamic)).fun
    assert not hasattr(opened, "no_layers")
    for n in (1, 5):
        x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n)).requires_grad_()
        torch.testing.assert_close(opened(x), net(x), rtol=1e-5, atol=1e-6)
        one, other = (torch.autograd.grad(f(x)[:, 1].sum(), x)[0] for f in (opened, net))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["perceptron", "normalised", "residual", "convolutional"])
def test_bounds_are_those_of_the_network(tmp_path, name):
    net, shape = network(name, 3)
    opened = open_exported(saved(net, shape, tmp_path / "m.pt2")).fun
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))
    found, expected = (
        BoundedModule(f, x[:1]).bounds(x, around(x, "linf", 0.05), method="crown-ibp") for f in (opened, net)
    )
    torch.testing.assert_close(found.lower, expected.lower, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.upper, expected.upper, rtol=1e-4, atol=1e-5)


def test_the_audit_proves_the_model_itself(tmp_path):
    net, shape = network("perceptron", 5)
    x = torch.rand(40, *shape, generator=torch.Generator().manual_seed(2))
    report = audit.run(
        str(saved(net, shape, tmp_path / "m.pt2")), (x, net(x).argmax(1)), task="tabular",
        only=["attack", "certify", "sandwich"], progress=False,
    )  # fmt: skip
    assert report["certify"].series["of"] == "model"
    assert report["sandwich"].metric("alarm.share").value == 0


def refusal(net, shape, n=2):
    example = torch.rand(n, *shape, generator=torch.Generator().manual_seed(9))
    program = torch.export.export(net, (example,))
    with pytest.raises(NoLayerError) as caught:
        layers_of(program)
    return str(caught.value)


def test_what_is_no_layer_is_named_and_answered_all_the_same(tmp_path):
    with seeded_init(0):
        net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    assert "layer_norm" in refusal(net, (6,))
    opened = open_exported(saved(net, (6,), tmp_path / "m.pt2", n=2, dynamic=False)).fun
    assert "layer_norm" in opened.no_layers
    assert "module:function" in opened.no_layers
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(opened(x), net(x), rtol=1e-5, atol=1e-6)


def test_modes_and_reshapes_that_mix_rows_are_no_layers():
    class Mixed(nn.Module):
        def forward(self, x):
            return x.reshape(3, 4)

    assert "several rows" in refusal(Mixed(), (6,))
    assert "evaluation mode" in refusal(nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5)).train(), (6,))
    assert "evaluation mode" in refusal(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).train(), (6,))


def test_layers_that_answer_otherwise_are_not_taken():
    net, shape = network("perceptron")
    program = torch.export.export(net, (torch.rand(2, *shape, generator=torch.Generator().manual_seed(9)),))
    node = next(n for n in program.graph.nodes if "relu" in str(n.target))
    node.target = torch.ops.aten.tanh.default
    # The program that runs is the old one where its graph was not made anew, so that the two differ.
    fresh = torch.export.export(net, program.example_inputs[0])
    program.module = fresh.module
    with pytest.raises(NoLayerError, match="answer otherwise"):
        layers_of(program)
