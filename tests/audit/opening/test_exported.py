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


class Acting(nn.Module):
    """A linear layer and what is done to its answer."""

    def __init__(self, act, n_in=6, **buffers):
        super().__init__()
        with seeded_init(2):
            self.linear = nn.Linear(n_in, 6)
        self.act = act
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.act(self, x)


MIXING = {
    "mean over rows": lambda s, x: s.linear(x - x.mean(0, keepdim=True)),
    "mean over rows, from the end": lambda s, x: s.linear(x - x.mean(-2, keepdim=True)),
    "softmax over rows": lambda s, x: s.linear(x).softmax(0),
    "rows put together": lambda s, x: torch.cat([x, s.linear(x)], 0).mean(0, keepdim=True),
    "one more axis": lambda s, x: s.linear((x + s.shift).squeeze(0)),
}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", MIXING)
def test_what_runs_over_the_rows_is_no_layer_also_where_there_is_one(name, n):
    net = Acting(MIXING[name], shift=torch.linspace(-1, 1, 6).reshape(1, 1, 6))
    assert "several rows" in refusal(net, (6,), n)


def test_a_constant_a_row_is_no_layer():
    net = Acting(lambda s, x: s.linear(x + s.shift), shift=torch.arange(12.0).reshape(2, 6))
    assert "several rows" in refusal(net, (6,), 2)


def test_a_convolution_of_an_unbatched_image_is_no_layer():
    with seeded_init(0):
        net = nn.Sequential(nn.Conv2d(1, 1, 2), nn.Flatten())
    assert "for one row" in refusal(net, (4, 4), 1)


def test_what_is_written_in_place_elsewhere_is_no_layer():
    def viewed(s, x):
        h = s.linear(x)
        h.view(len(h), 2, 3).relu_()
        return h

    def counted(s, x):
        s.calls += 1
        return s.linear(x)

    # On zeros nothing is written that was not there, with a bias above zero.
    net = Acting(viewed)
    net.linear.bias.data = torch.linspace(0.5, 1.0, 6)
    program = torch.export.export(net, (torch.zeros(2, 6),))
    with pytest.raises(NoLayerError, match="writes into"):
        layers_of(program)
    assert "writes into" in refusal(Acting(counted, calls=torch.zeros(())), (6,))
    assert "writes into" in refusal(Acting(lambda s, x: s.linear(x.add_(1.0))), (6,))


def test_zeros_are_not_the_only_input_compared():
    net = Acting(lambda s, x: s.linear(x).relu())
    net.linear.bias.data.zero_()
    program = torch.export.export(net, (torch.zeros(2, 6),))
    bent = Acting(lambda s, x: s.linear(x).tanh())
    bent.linear.bias.data.zero_()
    other = torch.export.export(bent, (torch.zeros(2, 6),))
    program.module = other.module
    with pytest.raises(NoLayerError, match="answer otherwise"):
        layers_of(program)


@pytest.mark.parametrize("dynamic", [True, False], ids=["any rows", "fixed rows"])
@pytest.mark.parametrize("layered", [True, False], ids=["layers", "no layers"])
def test_answers_in_a_dictionary_or_to_a_named_input_are_taken(tmp_path, dynamic, layered):
    net = Acting(lambda s, x: {"logits": s.linear(x).relu() if layered else torch.cumsum(s.linear(x), 1)})
    rows = torch.export.Dim("rows")
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    for args, options in (((torch.zeros(2, 6),), {}), ((), {"x": torch.zeros(2, 6)})):
        shapes = ({"x": {0: rows}} if options else ({0: rows},)) if dynamic else None
        torch.export.save(torch.export.export(net, args, options, dynamic_shapes=shapes), tmp_path / "m.pt2")
        opened = open_exported(tmp_path / "m.pt2").fun
        assert hasattr(opened, "no_layers") != layered
        torch.testing.assert_close(opened(x), net(x)["logits"], rtol=1e-5, atol=1e-6)


def test_an_answer_that_is_no_layers_is_answered_all_the_same(tmp_path):
    net = Acting(lambda s, x: s.shift, shift=torch.arange(12.0).reshape(2, 6))
    torch.export.save(torch.export.export(net, (torch.zeros(2, 6),)), tmp_path / "m.pt2")
    opened = open_exported(tmp_path / "m.pt2").fun
    assert "not made of its input" in opened.no_layers
    assert torch.equal(opened(torch.ones(2, 6)), net.shift)


def test_answers_beyond_all_numbers_make_no_others_alike():
    """Where one answer is infinite the others are compared all the same, and where one is none it is no difference."""
    net = Acting(lambda s, x: torch.cat([s.linear(x), (x * 0 + 1e3).exp(), (x - x) / (x - x)], 1))
    program = torch.export.export(net, (torch.ones(2, 6),))
    assert layers_of(program)(torch.ones(3, 6)).shape == (3, 18)
    bent = Acting(lambda s, x: torch.cat([s.linear(x) + 1, (x * 0 + 1e3).exp(), (x - x) / (x - x)], 1))
    program.module = torch.export.export(bent, (torch.ones(2, 6),)).module
    with pytest.raises(NoLayerError, match="answer otherwise"):
        layers_of(program)
