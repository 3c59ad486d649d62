"""What every optimizer that trains weights must stand: copies, resumed runs, odd parameters, failures and schedulers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from perturbkit import optim

P = nn.Parameter
MAKERS = {
    "mezo": lambda ps: optim.MeZO(ps, lr=1e-2),
    "zo_adamu": lambda ps: optim.ZOAdaMU(ps, lr=1e-2, total_steps=10, warmup=(0.0, 1.0)),
    "zero_order_sgd": lambda ps: optim.ZeroOrderSGD(ps, lr=1e-2, pairs=2),
    "one_byte": lambda ps: optim.OneByteSPSA(ps, lr=1e-2),
    "amp": lambda ps: optim.AMP(ps, lr=0.01, momentum=0.9),
    "amp_whole": lambda ps: optim.AMP(ps, torch.optim.Adam, lr=0.01, per_tensor=False, inner_steps=2),
    "sam": lambda ps: optim.SAM(ps, lr=0.01, momentum=0.9),
    "sam_adafactor": lambda ps: optim.SAM(ps, optim.Adafactor, lr=0.01, relative_step_size=False, beta1=0.9),
    "regularizer": lambda ps: optim.GradientRegularizer(ps, lr=0.01, momentum=0.9, scheme="central"),
    "double_backprop": lambda ps: optim.GradientRegularizer(ps, lr=0.01, weight_decay=0.1, scheme="double_backprop"),
    "flooding": lambda ps: optim.Flooding(ps, lr=0.01, level=50.0),
    "adafactor": lambda ps: optim.Adafactor(ps, lr=0.05, relative_step_size=False, beta1=0.9),
    "adagrad_norm": lambda ps: optim.AdaGradNorm(ps, lr=0.1),
    "median": lambda ps: optim.MedianSGD(ps, lr=0.05),
    "median_relative": lambda ps: optim.MedianSGD(ps, lr=0.05, relative=True),
    "model_building": lambda ps: optim.SMB(ps, lr=10.0),
    "clipped": lambda ps: optim.ClippedSGD(ps, lr=0.1, clip=[1.0, 0.5]),
    "upgd": lambda ps: optim.UPGD(ps, lr=0.2),
    "orthogonal": lambda ps: optim.OrthogonalGradient(ps, torch.optim.Adam, lr=0.01),
    "psgd": lambda ps: optim.PSGD(ps, lr=0.01, rate=0.5),
}  # fmt: skip
FORWARD_ONLY = ("mezo", "zo_adamu", "zero_order_sgd", "one_byte")
every = pytest.mark.parametrize("name", MAKERS)


class Net(nn.Module):
    """Parameters of all sorts: not contiguous, of no entries, of no dimensions, frozen, not used."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

        self.w, self.turned, self.nothing = P(draw(4, 3)), P(draw(5, 4).t()), P(draw(0, 3))
        self.scalar, self.frozen, self.unused = P(draw()), P(draw(3), requires_grad=False), P(draw(2))
        self.x = draw(8, 3)

    def forward(self) -> torch.Tensor:
        out = (self.x @ self.w.t() @ self.turned).float().square().mean()
        return out + (self.scalar.float() - 1) ** 2 + self.nothing.float().sum()


def problem(name, dtype=torch.float32):
    """Return a network, its optimizer of two groups, and the closure."""
    net = Net(dtype)
    groups = [
        {"params": [net.w, net.turned, net.nothing], "lr": 0.02},
        {"params": [net.scalar, net.frozen, net.unused]},
    ]
    return net, MAKERS[name](groups), closure_of(name, net)


def closure_of(name, net):
    def closure():
        net.zero_grad()
        loss = net()
        if name not in (*FORWARD_ONLY, "double_backprop", "psgd"):
            loss.backward()
        return loss

    return closure


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["single", "double", "bf16"]
)
def test_odd_parameters_are_trained_also_where_gradients_are_off(name, dtype):
    net, optimizer, closure = problem(name, dtype)
    before = copy.deepcopy(net)
    with torch.no_grad():
        for _ in range(3):
            optimizer.step(closure)
    assert not torch.equal(net.w, before.w)
    assert not torch.equal(net.turned, before.turned)
    assert torch.equal(net.frozen, before.frozen)
    assert all(p.dtype == dtype and p.isfinite().all() for p in net.parameters())
    if name not in FORWARD_ONLY:  # without a gradient, not even decay moves a parameter
        assert torch.equal(net.unused, before.unused)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["single", "bf16"])
def test_a_run_goes_on_bit_for_bit_from_a_file_and_from_copies(name, dtype):
    net, optimizer, closure = problem(name, dtype)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    for _ in range(3):
        optimizer.step(closure)
        schedule.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded, resumed, _ = problem(name, dtype)
    loaded.load_state_dict(net.state_dict())
    resumed.load_state_dict(torch.load(file))
    pairs = [(loaded, resumed)]
    pairs += [copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))]
    for _ in range(3):
        optimizer.step(closure)
    want = weights(net)
    for other_net, other in pairs:
        own = closure_of(name, other_net)
        for _ in range(3):
            other.step(own)
        assert equal(weights(other_net), want)


@every
def test_a_state_of_no_steps_can_be_loaded(name):
    net, optimizer, closure = problem(name)
    other_net, other, other_closure = problem(name)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        optimizer.step(closure)
        other.step(other_closure)
    assert equal(weights(net), weights(other_net))


@pytest.mark.parametrize(
    "name", [n for n in MAKERS if n in FORWARD_ONLY or n.startswith(("amp", "sam", "reg", "model"))]
)
def test_weights_come_back_where_the_second_evaluation_fails(name):
    net, optimizer, closure = problem(name)
    optimizer.step(closure)
    before, calls = weights(net), []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError
        return closure()

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert equal(weights(net), before)
    optimizer.step(closure)
    assert not torch.equal(net.w, before[0])


@every
def test_schedulers_and_late_groups(name):
    net, optimizer, closure = problem(name)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6, cycle_momentum=False)
    for _ in range(3):
        optimizer.step(closure)
        schedule.step()
    late = P(torch.ones(2))
    optimizer.add_param_group({"params": [late], "lr": 0.05})
    whole = net.forward
    net.forward = lambda: whole() + (late.square() * torch.tensor([1.0, 2.0])).sum()
    optimizer.zero_grad()
    optimizer.step(closure)
    assert not torch.equal(late, torch.ones(2))


@pytest.mark.parametrize(
    "name", [n for n in MAKERS if n not in (*FORWARD_ONLY, "double_backprop", "amp_whole", "psgd")]
)
def test_sparse_gradients_are_like_dense_ones(name):
    ends = []
    for sparse in (True, False):
        table = nn.Embedding.from_pretrained(
            torch.arange(12.0).reshape(4, 3) / 6, freeze=False, sparse=sparse
        )
        optimizer = MAKERS[name](list(table.parameters()))

        def closure(table=table, optimizer=optimizer):
            optimizer.zero_grad()
            rows = table(torch.tensor([1, 1, 2]))
            loss = rows.square().sum() + rows.sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        ends.append(table.weight.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("name", ["amp_whole", "sam", "regularizer", "double_backprop", "model_building"])
def test_a_parameter_may_lose_its_gradient_where_the_weights_are_moved_to(name):
    """As in a mixture of experts, whose routing depends on the weights."""
    gate, one, other = (P(torch.tensor([v])) for v in (0.01, 1.0, 2.0))
    optimizer = MAKERS[name]([gate, one, other])

    def closure():
        optimizer.zero_grad()
        loss = ((one if gate.item() > 0 else other) * (gate + 3)).sum()
        if name != "double_backprop":
            loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert gate.isfinite().all()
    assert one.item() != 1.0
