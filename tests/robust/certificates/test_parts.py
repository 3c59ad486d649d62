"""Interval arithmetic through networks: soundness on random and attacked points, exactness, and refusals by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from perturbkit.core import Oracle, checks
from perturbkit.core.random import randn, uniform
from perturbkit.robust import interval_bounds

F64 = torch.float64


def seeded(net, seed=0, scale=0.5):
    """Give a network weights and statistics of its own, in float64 and evaluation mode."""
    g = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    for name, p in net.named_parameters():
        p.data = scale * randn(p.shape, generator=g, dtype=F64) + (
            1.0 if "norm" in name and "weight" in name else 0.0
        )
    for name, b in net.named_buffers():
        if name.endswith("running_var"):
            b.copy_(0.5 + uniform(b.shape, generator=g, dtype=F64))
        elif name.endswith("running_mean"):
            b.copy_(randn(b.shape, generator=g, dtype=F64))
    return net


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 2, 3, padding=1),
        )
        self.out = nn.Linear(2 * 36, 3)

    def forward(self, x):
        h = functional.relu(self.norm(self.a(x)), inplace=True)
        h = self.b(h)
        h += x
        return self.out(h.view(h.shape[0], -1))


class Mixed(nn.Module):
    """Every kind of arithmetic the rules know."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.register_buffer("m", torch.linspace(-1, 1, 8 * 4).reshape(8, 4))

    def forward(self, x):
        a, b = torch.tanh(self.a(x)), functional.gelu(self.b(x))
        gated = a * torch.sigmoid(b) - 0.3 * b / -2.0
        both = torch.cat([gated @ self.m, (1 - a).mean(1, keepdim=True)], 1)
        return functional.leaky_relu(both) + functional.silu(-both).exp().clamp(max=3.0)


def networks():
    plain = {
        "fully connected": nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        ),
        "smooth": nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 3)),
        "gelu": nn.Sequential(
            nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8), nn.GELU("tanh"), nn.Linear(8, 3)
        ),
        "silu": nn.Sequential(nn.Linear(6, 16), nn.SiLU(inplace=True), nn.Linear(16, 3), nn.SiLU()),
        "layer norm": nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 3)),
        "batch norm": nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ELU(), nn.Dropout(0.5), nn.Linear(8, 3)
        ),
        "mixed": Mixed(),
    }
    images = {
        "convolutions": nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.LeakyReLU(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            nn.ReLU6(), nn.Flatten(), nn.Linear(36, 3),
        ),
        "pooling": nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Softplus(), nn.AvgPool2d(2, padding=1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(4, 3),
        ),
        "residual": Residual(),
        "grouped": nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2, dilation=2), nn.BatchNorm2d(4), nn.Hardtanh(), nn.Flatten(1), nn.Linear(16, 3)
        ),
    }  # fmt: skip
    return {**{k: (v, (6,)) for k, v in plain.items()}, **{k: (v, (2, 6, 6)) for k, v in images.items()}}


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("radius", [0.01, 0.3])
def test_no_point_of_the_box_leaves_the_bounds(name, radius):
    net, shape = networks()[name]
    net = seeded(net)
    g = torch.Generator().manual_seed(1)
    x = randn((1, *shape), generator=g, dtype=F64)
    lower, upper = interval_bounds(net, x - radius, x + radius)
    oracle = Oracle(net)
    inside = x + radius * uniform((5000, *shape), -1, 1, generator=g, dtype=F64)
    corners = x + radius * (2 * (uniform((5000, *shape), generator=g, dtype=F64) < 0.5).double() - 1)
    out = oracle(torch.cat([inside, corners]))
    assert bool(((out >= lower - 1e-9) & (out <= upper + 1e-9)).all())
    # Projected gradient on each output, up and down, from twenty starts.
    for k in range(out.shape[1]):
        for sign in (1, -1):
            z = inside[:20].clone()
            for _ in range(30):
                z = (z + sign * radius / 5 * oracle.gradient(z, k).sign()).clamp(x - radius, x + radius)
            reached = oracle.value(z, k)
            assert bool(((reached >= lower[:, k] - 1e-9) & (reached <= upper[:, k] + 1e-9)).all())
    assert bool((upper > lower).all())


@pytest.mark.parametrize("name", networks())
def test_a_box_of_one_point_gives_the_forward(name):
    net, shape = networks()[name]
    net = seeded(net)
    x = randn((4, *shape), generator=torch.Generator().manual_seed(2), dtype=F64)
    lower, upper = interval_bounds(net, x, x)
    torch.testing.assert_close(lower, net(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(upper, net(x), rtol=1e-10, atol=1e-10)


def test_affine_networks_are_exact_and_attained_at_a_corner():
    net = seeded(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)))
    x = randn((2, 2, 5, 5), generator=torch.Generator().manual_seed(3), dtype=F64)
    radius = uniform(x.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    lower, upper = interval_bounds(net, x - radius, x + radius)
    for place in ((0, 0, 0, 0), (1, 2, 3, 1)):
        slope = torch.func.grad(lambda z: net(z)[place])(x)  # noqa: B023
        for bound, sign in ((lower, -1), (upper, 1)):
            torch.testing.assert_close(net(x + sign * radius * slope.sign())[place], bound[place])


@pytest.mark.parametrize("kind", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()])
def test_bent_activations_are_exact_on_an_interval(kind):
    g = torch.Generator().manual_seed(5)
    ends = randn((200, 2), generator=g, dtype=F64).mul(2).sort(1).values
    lower, upper = interval_bounds(nn.Sequential(kind), ends[:, :1], ends[:, 1:])
    grid = ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * torch.linspace(0, 1, 20001, dtype=F64)
    values = kind(grid)
    torch.testing.assert_close(lower[:, 0], values.amin(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(upper[:, 0], values.amax(1), atol=1e-12, rtol=0)
    assert bool((values >= lower - 1e-15).all())


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (lambda x: x / -2, (-1.5, 0.5)),
        (lambda x: -x, (-3.0, 1.0)),
        (lambda x: 1 - x, (-2.0, 2.0)),
        (lambda x: x - 1, (-2.0, 2.0)),
        (lambda x: torch.sub(x, x), (-4.0, 4.0)),
        (lambda x: torch.add(x, x, alpha=-2), (-7.0, 5.0)),
        (lambda x: x * x, (-3.0, 9.0)),
        (lambda x: -2 * x + 0.1, (-5.9, 2.1)),
        (lambda x: x.mul(torch.tensor(-1.0, dtype=F64)).add(1.0), (-2.0, 2.0)),
        (lambda x: torch.cat([x, x + 10], 1)[:, 2:], (9.0, 13.0)),
    ],
)
def test_arithmetic_gives_the_interval_worked_by_hand(fun, expected):
    low = torch.full((1, 2), -1.0, dtype=F64)
    lower, upper = interval_bounds(Named(fun), low, low + 4)
    for bound, value in zip((lower, upper), expected, strict=True):
        torch.testing.assert_close(bound, torch.full((1, 2), value, dtype=F64), rtol=1e-14, atol=1e-14)


def test_layer_norm_that_hardly_divides_is_exact():
    net = nn.LayerNorm(4, eps=1e12, elementwise_affine=False).double()
    g = torch.Generator().manual_seed(6)
    low = randn((3, 4), generator=g, dtype=F64)
    high = low + uniform((3, 4), generator=g, dtype=F64)
    lower, _ = interval_bounds(net, low, high)
    corners = torch.stack([torch.where(torch.arange(4) == i, low, high) for i in range(4)])
    reached = 1e6 * torch.stack([net(corners[i])[:, i] for i in range(4)], 1)
    torch.testing.assert_close(1e6 * lower, reached, rtol=1e-9, atol=1e-9)


def test_layer_norm_never_exceeds_its_largest_value():
    lower, upper = interval_bounds(nn.LayerNorm(5).double(), -100 * torch.ones(1, 5, dtype=F64), 100 * torch.ones(1, 5, dtype=F64))  # fmt: skip
    torch.testing.assert_close(upper, torch.full((1, 5), 2.0, dtype=F64))
    torch.testing.assert_close(lower, -upper)


def test_inputs_and_modes_are_left_alone_and_gradients_flow_to_the_weights():
    net = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)
    )
    net.train()
    net[2].eval()
    low = -torch.ones(2, 3)
    lower, upper = interval_bounds(net, low, -low)
    assert torch.equal(low, -torch.ones(2, 3))
    assert [m.training for m in net] == [True, True, False, True, True]
    (upper - lower).sum().backward()
    assert float(net[1].weight.grad.abs().sum()) > 0


class Named(nn.Module):
    def __init__(self, fun):
        super().__init__()
        self.fun = fun

    def forward(self, x):
        return self.fun(x)


def added(x):
    h = x * 2
    h += 1
    return h + x


def activated(x):
    h = x * 2
    return functional.relu(h, inplace=True) - h


def overwritten(x):
    h = x * 2
    k = h
    h += 1
    return h + k


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Softmin(1)), "Softmin"),
        (nn.Sequential(nn.GroupNorm(1, 3)), "GroupNorm"),
        (nn.LeakyReLU(-0.5), "not monotone"),
        (nn.ELU(-1.0), "not monotone"),
        (Named(lambda x: functional.leaky_relu(x, -0.1)), "not monotone"),
        (Named(torch.sin), "sin"),
        (Named(lambda x: x.abs()), "abs"),
        (Named(lambda x: 1 / x), "division"),
        (Named(lambda x: torch.clamp(x, max=x * 2)), "depend on the input"),
        (Named(lambda x: functional.dropout(x)), "draws at random"),
        (Named(lambda x: x.T), "attribute T"),
        (Named(lambda x: torch.sub(x, x, alpha=2)), "the operation sub with these arguments"),
        (Named(overwritten), "overwritten"),
        (
            Named(lambda x: functional.max_pool2d(x[None, None], 2, return_indices=True)[0]),
            "no interval rule",
        ),
        (Named(lambda x: x if x.sum() > 0 else -x), "no fixed graph"),
        (Named(lambda x: torch.ones(2)), "depends on its input"),
        (nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)), "statistics of the batch"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(net, match):
    low = torch.zeros(3, 3)
    with pytest.raises(checks.ModelError, match=match):
        interval_bounds(net, low, low + 1)


def test_a_hook_is_refused_and_a_sum_in_place_that_harms_nothing_is_not():
    net = nn.Sequential(nn.Linear(3, 3))
    handle = net[0].register_forward_hook(lambda m, i, o: 2 * o)
    low = torch.zeros(1, 3)
    with pytest.raises(checks.ModelError, match="forward hooks"):
        interval_bounds(net, low, low + 1)
    handle.remove()
    interval_bounds(net, low, low + 1)
    lower, upper = interval_bounds(Named(added), low, low + 1)
    assert torch.equal(torch.cat([lower, upper]), torch.tensor([[1.0] * 3, [4.0] * 3]))


@pytest.mark.parametrize(
    "fun",
    [
        lambda x: torch.softmax(3 * x, 1),
        lambda x: (2 * x).softmax(-1),
        lambda x: (x.reshape(-1, 3, 2) @ x.reshape(-1, 2, 3)).flatten(1),
        nn.Softmax(1),
    ],
)
def test_boxes_of_softmax_and_products_hold_and_are_attained_at_a_point(fun):
    net = fun if isinstance(fun, nn.Module) else Named(fun)
    g = torch.Generator().manual_seed(0)
    centre = torch.randn(3, 6, generator=g, dtype=torch.float64)
    low, high = interval_bounds(net, centre - 0.2, centre + 0.2)
    x = (centre + 0.4 * torch.rand(4000, 3, 6, generator=g, dtype=torch.float64) - 0.2).flatten(0, 1)
    corners = (centre + 0.2 * torch.sign(torch.randn(4000, 3, 6, generator=g, dtype=torch.float64))).flatten(
        0, 1
    )
    for points in (x, corners):
        y = net(points).reshape(4000, 3, -1)
        assert bool(((y >= low - 1e-12) & (y <= high + 1e-12)).all())
    same, other = interval_bounds(net, centre, centre)
    torch.testing.assert_close(same, net(centre))
    torch.testing.assert_close(other, net(centre))


def test_a_softmax_of_independent_logits_is_bounded_exactly():
    centre = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64)
    low, high = interval_bounds(Named(lambda x: torch.softmax(x, 1)), centre - 0.5, centre + 0.5)
    for i in range(3):
        worst = centre + 0.5
        worst[0, i] = centre[0, i] - 0.5
        assert float(low[0, i]) == pytest.approx(float(worst.softmax(1)[0, i]))
        assert float(high[0, i]) == pytest.approx(float((2 * centre - worst).softmax(1)[0, i]))
