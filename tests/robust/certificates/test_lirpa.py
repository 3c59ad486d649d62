"""Oracles of linear relaxation: soundness by search, exactness on affine networks, lines, words, weights, training."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import Ball, BallInBox, Box, around, checks
from perturbkit.robust import BoundedModule, Synonyms, interval_bounds, loss_fusion, projected_gradient
from perturbkit.robust.certificates._relaxations import relax

METHODS = ["ibp", "crown-ibp", "crown", "forward"]
BALLS = [Ball("linf", 0.05), Ball("l2", 0.2), Ball("l1", 0.3)]


def _seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make().double().eval()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.pool, self.mean, self.f = (
            nn.BatchNorm2d(4),
            nn.MaxPool2d(2, stride=1, padding=1),
            nn.AvgPool2d(2),
            nn.Linear(16, 3),
        )
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = functional.leaky_relu(h + self.bn(self.b(h)), 0.01)
        return self.f(torch.flatten(self.mean(self.pool(h)), 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.f, self.n = (
            *(nn.Linear(4, 4) for _ in range(3)),
            nn.Linear(4, 3),
            nn.LayerNorm(4),
        )

    def forward(self, x):
        w = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) * 0.5, -1)
        return self.f(torch.tanh(self.n(x + w @ self.v(x))).mean(1))


class Odd(nn.Module):
    """Products, differences, exponentials, concatenation and what has a box alone."""

    def __init__(self):
        super().__init__()
        self.a, self.f = nn.Linear(5, 6), nn.Linear(12, 3)

    def forward(self, x):
        h = functional.softplus(self.a(x))
        parts = [torch.exp(-h), h * torch.sigmoid(self.a(x))]
        return self.f(torch.cat(parts, 1) / 2 - functional.gelu(torch.cat(parts, 1)))


def _mlp():
    return nn.Sequential(
        nn.Linear(5, 12),
        nn.ReLU(),
        nn.Linear(12, 12),
        nn.Tanh(),
        nn.Linear(12, 8),
        nn.Sigmoid(),
        nn.Linear(8, 3),
    )


NETS = {
    "mlp": (_mlp, (5,)),
    "residual": (Residual, (2, 4, 4)),
    "attention": (Attention, (3, 4)),
    "odd": (Odd, (5,)),
}


def _normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _example_net():
    return _seeded(lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)))


def _bounds(model, generator, dtype):
    x = _normal(3, 5, dtype=dtype)
    model = model.to(dtype)
    return BoundedModule(model, x).bounds(x, Ball("l2", 0.1))


def _refused(**options):
    x = _normal(3, 5)
    given = {"x": x, "perturbation": Ball("l2", 0.1), **options}
    return lambda: BoundedModule(_example_net(), x).bounds(**given)


EXAMPLE = Example(
    call=lambda generator, dtype: _bounds(_example_net(), generator, dtype),
    refusals=(
        (lambda: BoundedModule(torch.relu, _normal(1, 5)), "model is a"),
        (lambda: BoundedModule(nn.Sequential(nn.Linear(5, 5), nn.Softmin(1)), _normal(1, 5).float()).bounds(_normal(1, 5).float(), Ball("l2", 0.1)), "Softmin"),
        (lambda: BoundedModule(nn.Conv2d(1, 1, 1).double(), _normal(1, 1, 2, 2)), "the network answers with shape"),
        (_refused(x=_normal(3, 4)), "x has shape"),
        (_refused(method="alpha"), "method is 'alpha'"),
        (_refused(perturbation=None), "neither an input nor a weight"),
        (_refused(perturbation="linf"), "perturbation is a str"),
        (_refused(perturbation=Box(-math.inf, 1.0)), "unbounded"),
        (_refused(C=_normal(3, 2, 7)), "C has shape"),
        (_refused(weights={"1.weight": Ball("l2", 0.1)}), "weights names '1.weight'"),
        (_refused(perturbation=Synonyms(_normal(3, 2, 2, 2), 1)), "candidates has shape"),
        (lambda: Synonyms(_normal(3, 2, 2, 2), 0), "budget is 0"),
        (lambda: loss_fusion(BoundedModule(_example_net(), _normal(3, 5)), _normal(3, 5), Ball("l2", 0.1), torch.tensor([0, 1, 2])), "y"),
    ),
)  # fmt: skip


def _searched(net, x, perturbation, n=2500):
    """Return outputs at random points and at the worst ones that gradients find."""
    if isinstance(perturbation, Ball):
        points = [x[:, None] + perturbation.sample(x, generator=1, n=n)]
    else:
        g = torch.Generator().manual_seed(1)
        points = [(x + perturbation.sample(x, generator=g))[:, None] for _ in range(n)]
    for sign in (1, -1):
        for k in range(3):
            leaf = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(sign * net(leaf)[:, k].sum(), leaf)
            points.append((x + perturbation.maximiser(slope))[:, None])
    return torch.stack([net(torch.cat(points, 1)[i]) for i in range(len(x))]).detach()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.norm)
def test_no_point_of_the_set_crosses_the_bounds(name, method, ball):
    make, shape = NETS[name]
    net, x = _seeded(make), _normal(4, *shape)
    found = BoundedModule(net, x).bounds(x, ball, method=method)
    y = _searched(net, x, ball)
    assert y.shape[0] * y.shape[1] > 10_000
    assert bool((y >= found.lower[:, None] - 1e-9).all())
    assert bool((y <= found.upper[:, None] + 1e-9).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ball", BALLS, ids=lambda b: b.norm)
def test_affine_networks_are_bounded_exactly(method, ball):
    net = _seeded(lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 2)))
    x = _normal(3, 2, 3, 3)
    rows = torch.stack([torch.autograd.functional.jacobian(lambda v: net(v[None])[0], row) for row in x])
    reach = torch.linalg.vector_norm(
        rows.flatten(2), ord={"linf": 1, "l2": 2, "l1": math.inf}[ball.norm], dim=2
    )
    found = BoundedModule(net, x).bounds(
        x, ball, method=method, C=torch.eye(2, dtype=x.dtype).expand(3, 2, 2)
    )
    torch.testing.assert_close(found.lower, net(x) - ball.radius * reach)
    torch.testing.assert_close(found.upper, net(x) + ball.radius * reach)


def test_one_rectifier_layer_by_hand():
    net = _seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        net[0].bias.copy_(torch.tensor([1.0, -0.5]))
        net[2].weight.copy_(torch.tensor([[1.0, -2.0]]))
        net[2].bias.zero_()
    x = torch.zeros(1, 2, dtype=torch.float64)
    # Pre-activations in [-1, 3] and [-2.5, 1.5]: lines above 3/4 (h + 1) and 3/8 (h + 2.5), below h (3 > 1) and 0.
    found = BoundedModule(net, x).bounds(x, Ball("linf", 1.0), method="crown")
    # upper: 3/4 (x1 + x2 + 2) - 0 = at most 3; lower: (x1 + x2 + 1) - 2 * 3/8 (x1 - x2 + 2), least at x1 = -1 or 1.
    assert found.upper.item() == pytest.approx(3.0)
    corners = [(a + b + 1) - 0.75 * (a - b + 2) for a in (-1, 1) for b in (-1, 1)]
    box = 0 - 2 * 1.5
    assert found.lower.item() == pytest.approx(max(min(corners), box))


def test_methods_are_ordered_in_the_mean_and_intersected_with_boxes():
    net, x = _seeded(_mlp), _normal(20, 5)
    width = {}
    for method in METHODS:
        found = BoundedModule(net, x).bounds(x, Ball("linf", 0.1), method=method)
        width[method] = float((found.upper - found.lower).mean())
        box = interval_bounds(net, x - 0.1, x + 0.1)
        assert bool((found.lower >= box[0] - 1e-12).all())
        assert bool((found.upper <= box[1] + 1e-12).all())
    assert width["crown"] <= width["crown-ibp"] <= width["ibp"]
    assert width["crown"] < 0.3 * width["ibp"]
    assert width["forward"] < 0.5 * width["ibp"]


def test_boxes_are_those_of_interval_propagation():
    net, x = _seeded(Residual), _normal(3, 2, 4, 4)
    found = BoundedModule(net, x).bounds(x, Ball("linf", 0.07), method="ibp")
    low, high = interval_bounds(net, x - 0.07, x + 0.07)
    torch.testing.assert_close(found.lower, low)
    torch.testing.assert_close(found.upper, high)


@pytest.mark.parametrize("method", METHODS)
def test_bounds_of_differences_are_not_differences_of_bounds(method):
    net, x = _seeded(_mlp), _normal(6, 5)
    bounded, ball = BoundedModule(net, x), Ball("l2", 0.3)
    c = _normal(6, 4, 3, seed=2)
    found, plain = bounded.bounds(x, ball, method=method, C=c), bounded.bounds(x, ball, method=method)
    naive = (c.clamp(min=0) * plain.lower[:, None] + c.clamp(max=0) * plain.upper[:, None]).sum(2)
    assert float((found.lower - naive).mean()) > 0
    y = torch.einsum("nsk,nmk->nms", c, _searched(net, x, ball, 500))
    assert bool((y >= found.lower[:, None] - 1e-9).all())
    assert bool((y <= found.upper[:, None] + 1e-9).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_sets_cut_by_the_range_of_inputs(norm):
    net = _seeded(_mlp)
    x = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    inside = around(x, norm, radius)
    bounded = BoundedModule(net, x)
    found, whole = bounded.bounds(x, inside), bounded.bounds(x, Ball(norm, radius))
    y = _searched(net, x, inside, 500)
    assert bool((y >= found.lower[:, None] - 1e-9).all())
    assert bool((y <= found.upper[:, None] + 1e-9).all())
    widths = [float((f.upper - f.lower).mean().detach()) for f in (found, whole)]
    assert widths[0] <= widths[1] + 1e-9
    if norm != "l1":  # a corner of the box is further than one coordinate of the ball can go
        assert widths[0] < widths[1]
    alone = bounded.bounds(x, Box(torch.zeros_like(x), 0.1))
    same = bounded.bounds(x + 0.05, Ball("linf", 0.05))
    torch.testing.assert_close(alone.lower, same.lower)
    assert isinstance(inside, BallInBox)


@pytest.mark.parametrize(
    "kind",
    [
        ("leaky", 0.0),
        ("leaky", 0.2),
        ("leaky", 1.7),
        ("tanh", 0.0),
        ("sigmoid", 0.0),
        ("exp", 0.0),
        ("softplus", 0.0),
    ],
)
def test_lines_hold_everywhere_and_touch(kind):
    curve = {
        "leaky": lambda x: functional.leaky_relu(x, kind[1]), "tanh": torch.tanh, "sigmoid": torch.sigmoid,
        "exp": torch.exp, "softplus": functional.softplus,
    }[kind[0]]  # fmt: skip
    g = torch.Generator().manual_seed(0)
    low = 6 * torch.rand(3000, generator=g, dtype=torch.float64) - 4
    high = low + 5 * torch.rand(3000, generator=g, dtype=torch.float64) ** 3
    high[:20] = low[:20]
    lines = relax(kind, low, high)
    u = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]
    x = low + u * (high - low)
    below, above = (lines.low_slope * x + lines.low_shift, lines.high_slope * x + lines.high_shift)
    gap_low, gap_high = curve(x) - below, above - curve(x)
    assert float(gap_low.min()) > -1e-9
    assert float(gap_high.min()) > -1e-9
    assert float(gap_high.amin(0).max()) < 1e-3  # each touches its curve
    assert float(gap_low.amin(0).max()) < 1e-3


def test_one_row_of_a_linear_layer_with_perturbed_weights():
    net = _seeded(lambda: nn.Sequential(nn.Linear(4, 1)))
    x = _normal(5, 4)
    for norm, dual in (("linf", 1), ("l2", 2), ("l1", math.inf)):
        found = BoundedModule(net, x).bounds(x, weights={"0.weight": Ball(norm, 0.3)})
        reach = 0.3 * torch.linalg.vector_norm(x, ord=dual, dim=1, keepdim=True)
        torch.testing.assert_close(found.lower, net(x) - reach)
        torch.testing.assert_close(found.upper, net(x) + reach)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("both", [False, True])
def test_no_perturbed_weights_cross_the_bounds(method, both):
    net, x = _seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))), _normal(3, 4)
    balls = {"0.weight": Ball("l2", 0.2), "2.weight": Ball("linf", 0.05)}
    inputs = Ball("linf", 0.02) if both else None
    found = BoundedModule(net, x).bounds(x, inputs, method=method, weights=balls)
    g = torch.Generator().manual_seed(4)
    for _ in range(400):
        moved = {}
        for name, ball in balls.items():
            weight = net.get_parameter(name).detach()
            step = ball.sample(weight[None], generator=g)[0]
            moved[name] = weight + step * ball.radius / max(
                float(torch.linalg.vector_norm(step.flatten(), ord={"l2": 2, "linf": math.inf}[ball.norm])),
                1e-12,
            )
        seen = x if inputs is None else x + inputs.sample(x, generator=g)
        y = torch.func.functional_call(net, moved, (seen,))
        assert bool((y >= found.lower - 1e-9).all())
        assert bool((y <= found.upper + 1e-9).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 2, 5])
def test_synonyms_by_enumeration(method, budget):
    net = _seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)))
    x = _normal(2, 3, 2)
    candidates = x[:, :, None] + 0.3 * _normal(2, 3, 2, 2, seed=1)
    found = BoundedModule(net, x).bounds(x, Synonyms(candidates, budget), method=method)
    linear = BoundedModule(_seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 2))), x)
    exact = linear.bounds(x, Synonyms(candidates, budget))
    every = []
    for choice in itertools.product(range(3), repeat=3):
        if sum(c > 0 for c in choice) <= budget:
            words = torch.cat([x[:, :, None], candidates], 2)
            every.append(torch.stack([words[:, i, c] for i, c in enumerate(choice)], 1))
    y = torch.stack([net(t) for t in every])
    assert bool((y >= found.lower - 1e-9).all())
    assert bool((y <= found.upper + 1e-9).all())
    z = torch.stack([linear.model(t) for t in every])
    torch.testing.assert_close(exact.lower, z.amin(0))
    torch.testing.assert_close(exact.upper, z.amax(0))


@pytest.mark.parametrize("method", METHODS)
def test_fused_loss_is_above_every_cross_entropy(method):
    net, x = _seeded(_mlp), _normal(6, 5)
    y, ball = torch.tensor([0, 1, 2, 0, 1, 2]), Ball("linf", 0.2)
    bound = loss_fusion(BoundedModule(net, x), x, ball, y, method=method)
    worst = projected_gradient(net, x, y, Ball("linf", 0.2), n_steps=20, generator=0)
    for points in (x, worst.x):
        assert bool((functional.cross_entropy(net(points), y, reduction="none") <= bound + 1e-9).all())
    tight = loss_fusion(BoundedModule(net, x), x, Ball("linf", 1e-7), y, method=method)
    torch.testing.assert_close(
        tight, functional.cross_entropy(net(x), y, reduction="none"), rtol=1e-4, atol=1e-5
    )


def test_fused_loss_has_the_gradient_of_its_numbers_and_trains():
    net, x = _seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))), _normal(4, 3)
    y = torch.tensor([0, 1, 2, 1])

    def loss():
        return loss_fusion(BoundedModule(net, x), x, Ball("linf", 0.1), y).mean()

    loss().backward()
    slope = float(net[0].weight.grad[1, 2])
    with torch.no_grad():
        net[0].weight[1, 2] += 1e-5
        above = float(loss())
        net[0].weight[1, 2] -= 2e-5
        below = float(loss())
    assert slope == pytest.approx((above - below) / 2e-5, rel=1e-4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    first = float(loss())
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss()) < 0.7 * first


def test_the_model_is_left_alone():
    net = _seeded(Residual).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = _normal(2, 2, 4, 4)
    BoundedModule(net, x).bounds(x, Ball("l2", 0.1), weights={"f.weight": Ball("l2", 0.1)})
    assert net.training
    assert net.bn.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_unsupported_operations_are_refused_by_name():
    class Sine(nn.Module):
        def forward(self, x):
            return torch.sin(x)

    x = _normal(1, 2)
    with pytest.raises(checks.ModelError, match="sin"):
        BoundedModule(Sine(), x).bounds(x, Ball("l2", 0.1))


class _Of(nn.Module):
    """A forward of its own over two layers."""

    def __init__(self, forward, width=4):
        super().__init__()
        self.a, self.o, self.run = nn.Linear(5, 4), nn.Linear(width, 3), forward

    def forward(self, x):
        return self.run(self, x)


def _square(net, x):
    h = net.a(x)
    return net.o(h * h)


def _gram(net, x):
    h = net.a(x)[:, :, None] + torch.tanh(net.a(x))[:, None]
    return net.o((h @ h).flatten(1))


def _numbers(net, x):
    h = net.a(x)
    first, total = torch.relu(h[:, 0]), torch.relu(h).sum(1)
    return net.o(torch.cat([first.unsqueeze(1), torch.relu(total - 1).view(-1, 1)], 1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("forward", "width"), [(_square, 4), (_gram, 16), (_numbers, 2)], ids=["square", "gram", "numbers"]
)
@pytest.mark.parametrize("ball", [Ball("linf", 0.3), Ball("l2", 0.8)], ids=lambda b: b.norm)
def test_squares_and_rows_of_one_number_are_bounded(forward, width, method, ball):
    net, x = _seeded(lambda: _Of(forward, width)), _normal(3, 5)
    found = BoundedModule(net, x).bounds(x, ball, method=method)
    y = _searched(net, x, ball, 500)
    assert bool((y >= found.lower[:, None] - 1e-9).all())
    assert bool((y <= found.upper[:, None] + 1e-9).all())
    assert bool((found.lower <= found.upper).all())


def test_pooling_of_rows_without_channels():
    net = _seeded(lambda: nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 2)))
    x, ball = _normal(3, 4, 4), Ball("linf", 0.5)
    found = BoundedModule(net, x).bounds(x, ball)
    y = (
        net(torch.cat([x + ball.sample(x, generator=k) for k in range(200)]))
        .unflatten(0, (200, 3))
        .transpose(0, 1)
    )
    assert bool((y >= found.lower[:, None]).all())
    assert bool((y <= found.upper[:, None]).all())


MIXING = {
    "the mean over the batch": lambda net, x: net.o(torch.relu(net.a(x) - net.a(x).mean(0, keepdim=True))),
    "tokens on the first axis": lambda net, x: net.o(
        torch.relu(x.reshape(-1, 1)).reshape(x.size(0), -1)[:, :4]
    ),
    "an axis of the same length": lambda net, x: net.o(torch.relu(net.a(x).transpose(0, 1)).transpose(0, 1)),
}


@pytest.mark.parametrize("mixing", list(MIXING))
@pytest.mark.parametrize("n", [1, 4])
def test_rows_that_leave_the_first_axis_are_refused(mixing, n):
    net, x = _seeded(lambda: _Of(MIXING[mixing])), _normal(n, 5)
    with pytest.raises(checks.ModelError, match="first axis"):
        BoundedModule(net, x).bounds(x, Ball("linf", 0.1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Softplus(1, 0.5),
        lambda: _Of(lambda net, x: net.o(functional.softplus(net.a(x), threshold=1.0))),
    ],
)
def test_softplus_with_a_step_is_refused(make):
    net = _seeded(lambda: nn.Sequential(nn.Linear(5, 5), make()))
    with pytest.raises(checks.ModelError, match="softplus with the threshold"):
        BoundedModule(net, _normal(2, 5)).bounds(_normal(2, 5), Ball("linf", 0.1))


def test_weights_that_are_used_elsewhere_are_refused():
    tied = _seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)))
    tied[2].weight = tied[0].weight
    read = _seeded(
        lambda: _Of(lambda net, x: net.o(functional.linear(net.a(x), net.o.weight.T @ net.o.weight)[:, :4]))
    )
    middle = _seeded(lambda: _Of(lambda net, x: net.o(net.a(x[:, None]))[:, 0]))
    x, ball = _normal(3, 5), Ball("l2", 0.5)
    for net, name, message in (
        (tied, "0.weight", "also used as 2.weight"),
        (read, "o.weight", "also used outside its layer"),
        (middle, "a.weight", "flat rows"),
    ):
        with pytest.raises(checks.ArgumentError, match=message):
            BoundedModule(net, x).bounds(x, weights={name: ball})


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_called_twice_has_one_weight(method):
    layer = _seeded(lambda: nn.Linear(4, 4))
    net, x = nn.Sequential(layer, nn.ReLU(), layer), _normal(3, 4)
    ball = Ball("l2", 0.5)
    found = BoundedModule(net, x).bounds(x, weights={"0.weight": ball}, method=method)
    weight, g = layer.weight.detach().clone(), torch.Generator().manual_seed(4)
    for _ in range(300):
        step = ball.sample(weight[None], generator=g)[0]
        layer.weight.data.copy_(weight + step * 0.5 / torch.linalg.vector_norm(step))
        y = net(x)
        assert bool((y >= found.lower - 1e-9).all())
        assert bool((y <= found.upper + 1e-9).all())


def test_the_lower_lines_are_the_near_ones():
    low, high = torch.tensor([-1.0, -2.5, -2.0]), torch.tensor([3.0, 1.5, 2.0])
    assert relax(("leaky", 0.0), low, high).low_slope.tolist() == [1.0, 0.0, 1.0]
    # An exponential is positive, and so is the line below it.
    lines = relax(("exp", 0.0), low, high + 5)
    assert bool((lines.low_slope * low + lines.low_shift > 0).all())


POOLS = [
    lambda: nn.MaxPool2d(3, stride=2, padding=1),
    lambda: nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0)),
    lambda: nn.MaxPool2d(2, stride=1, dilation=2),
    lambda: nn.MaxPool2d(2, ceil_mode=True),
]


@pytest.mark.parametrize("pool", range(len(POOLS)))
@pytest.mark.parametrize("method", ["crown", "forward"])
def test_maxima_of_any_windows_are_bounded_by_their_elements(pool, method):
    net = nn.Sequential(POOLS[pool](), nn.Flatten())
    # Below the zeros of a padding, near each other, and each with a width of its own.
    x = 0.02 * _normal(3, 2, 5, 5) - 1
    width = 0.04 * _normal(3, 2, 5, 5, seed=1).abs()
    bounded, box = BoundedModule(net, x), Box(-width, width)
    found = bounded.bounds(x, box, method=method)
    torch.testing.assert_close(found.upper, net(x + width))
    torch.testing.assert_close(found.lower, net(x - width))
    c = _normal(3, 4, bounded.n_outputs, seed=2)
    found = bounded.bounds(x, box, method=method, C=c)
    g = torch.Generator().manual_seed(5)
    for _ in range(200):
        side = torch.rand(x.shape, generator=g, dtype=x.dtype).round() * 2 - 1
        y = torch.einsum("nsk,nk->ns", c, net(x + side * width))
        assert bool((y >= found.lower - 1e-9).all())
        assert bool((y <= found.upper + 1e-9).all())
