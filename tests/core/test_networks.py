"""The reference networks: shapes, the time, conditions and the scalings around them."""

import pytest
import torch
from torch import nn

from perturbkit.core import EDMSchedule, FlowSchedule, Preconditioned, SmallUNet, TimeMLP, VPSchedule, fit
from perturbkit.core.checks import ArgumentError, ArgumentTypeError
from perturbkit.core.random import randn, seeded_init


def made(build):
    with seeded_init(11):
        return build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_mlp(dtype):
    g = torch.Generator().manual_seed(2)
    net = made(lambda: TimeMLP(5, out_dim=3, hidden=9, depth=3, condition_dim=2)).to(dtype)
    x, c = randn((7, 5), generator=g, dtype=dtype), randn((7, 2), generator=g, dtype=dtype)
    out = net(x, 0.3, c)
    assert out.shape == (7, 3)
    assert out.dtype == dtype
    torch.testing.assert_close(out, net(x, torch.full((7,), 0.3, dtype=dtype), c))
    assert not torch.allclose(out, net(x, 0.31, c))
    assert not torch.allclose(out, net(x, 0.3, 2 * c))
    torch.testing.assert_close(net(x[2:4], 0.3, c[2:4]), out[2:4])


@pytest.mark.parametrize(("levels", "shape"), [(1, (6, 10)), (2, (8, 8)), (3, (16, 24))])
def test_unet(levels, shape):
    g = torch.Generator().manual_seed(3)
    net = made(lambda: SmallUNet(2, out_channels=3, width=8, levels=levels, condition_channels=1))
    x, c = randn((3, 2, *shape), generator=g), randn((3, 1, *shape), generator=g)
    t = torch.tensor([0.1, 0.5, 0.9])
    out = net(x, t, c)
    assert out.shape == (3, 3, *shape)
    torch.testing.assert_close(net(x[1:2], 0.5, c[1:2]), out[1:2])
    assert not torch.allclose(net(x, t.flip(0), c)[0], out[0])
    assert all(p.grad is not None for p in backward(net, out))


def backward(net, out):
    out.sum().backward()
    return net.parameters()


class Zero(nn.Module):
    def forward(self, x, t):
        self.seen = x, t
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    "schedule", [EDMSchedule(), VPSchedule(), FlowSchedule()], ids=lambda s: type(s).__name__
)
def test_scalings(schedule):
    g = torch.Generator().manual_seed(4)
    inner, s = Zero(), 0.7
    x0 = s * randn((4000, 6), generator=g, dtype=torch.float64)
    t = torch.full((4000,), 0.4, dtype=torch.float64)
    x = schedule.add_noise(x0, randn(x0.shape, generator=g, like=x0), t)
    model = Preconditioned(inner, schedule, s)
    # With a network that adds nothing, the answer is the posterior mean of Gaussian data.
    alpha, sigma = float(schedule.alpha(0.4)), float(schedule.sigma(0.4))
    torch.testing.assert_close(model(x, t), s**2 * alpha / (alpha**2 * s**2 + sigma**2) * x)
    assert abs(float(inner.seen[0].std()) - 1) < 0.02
    torch.testing.assert_close(inner.seen[1], torch.full_like(t, float(schedule.lam(0.4).log())))


@pytest.mark.parametrize(
    "schedule", [EDMSchedule(), VPSchedule(), FlowSchedule(1.0)], ids=lambda s: type(s).__name__
)
def test_ends_of_the_schedule(schedule):
    g = torch.Generator().manual_seed(5)
    model = made(lambda: Preconditioned(TimeMLP(3, hidden=8), schedule, 0.5))
    x = randn((4, 3), generator=g)
    torch.testing.assert_close(model(x, 0.0), x)  # no noise is left: nothing to take away
    assert bool(torch.isfinite(model(x, schedule.t_max)).all())
    assert bool(torch.isfinite(model.loss(x, generator=g)))


class Biased(nn.Module):
    def forward(self, x, t):
        return torch.ones_like(x)


def test_loss_counts_the_networks_own_answer_alike_at_every_level():
    # Gaussian data: the scalings alone leave the residual of the posterior, and an answer of ones adds one to each.
    x0 = 0.5 * randn((20000, 2), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    losses = []
    for net in (Zero(), Biased()):
        model = Preconditioned(net, EDMSchedule(), 0.5)
        losses.append(float(model.loss(x0, generator=torch.Generator().manual_seed(7))))
    assert abs(losses[0] - 1) < 0.03
    assert abs(losses[1] - losses[0] - 1) < 0.03


@pytest.mark.parametrize("levels", ["log-uniform", "log-normal", "uniform"])
def test_it_learns_a_gaussian_mean(levels):
    g = torch.Generator().manual_seed(8)
    x0 = 2.0 + 0.1 * randn((512, 1), generator=g)
    model = made(lambda: Preconditioned(TimeMLP(1, hidden=32), EDMSchedule(sigma_max=10.0), 1.0))

    def loss(model, x0, *, generator):
        return model.loss(x0, generator=generator, levels=levels)

    fit(model, loss, x0, steps=600, lr=5e-3, generator=g, progress=False)
    answer = model.denoiser().x0(torch.tensor([[3.0], [1.0]]), 1.0).detach()
    assert float((answer - 2.0).abs().max()) < 0.15


def test_conditions_reach_the_network():
    model = made(lambda: Preconditioned(TimeMLP(3, hidden=8, condition_dim=1), VPSchedule(), 1.0))
    x, c = torch.ones(2, 3), torch.tensor([[0.0], [1.0]])
    out = model(x, 0.5, c)
    assert not torch.allclose(out[0], out[1])
    model.loss(x, c, generator=torch.Generator().manual_seed(0)).backward()


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: TimeMLP(0), "dim"),
        (lambda: TimeMLP(2, depth=0), "depth"),
        (lambda: TimeMLP(2, condition_dim=-1), "condition_dim"),
        (lambda: TimeMLP(2, condition_dim=2)(torch.ones(3, 2), 0.5), "condition is None"),
        (lambda: TimeMLP(2)(torch.ones(3, 2), 0.5, torch.ones(3, 1)), "condition is of shape"),
        (lambda: TimeMLP(2)(torch.ones(3, 4), 0.5), r"x has shape \(3, 4\)"),
        (lambda: TimeMLP(2)(torch.ones(3, 2), torch.ones(3, 1)), r"t has shape \(3, 1\)"),
        (lambda: TimeMLP(2)(torch.ones(3, 2), torch.ones(2)), r"t has shape \(2,\)"),
        (lambda: SmallUNet(1, width=8)(torch.ones(1, 3, 8, 8), 0.5), r"x has shape \(1, 3, 8, 8\)"),
        (lambda: SmallUNet(1, width=12), "multiple of 8"),
        (lambda: SmallUNet(1, width=8)(torch.ones(1, 1, 6, 8), 0.5), "multiples of 4"),
        (lambda: SmallUNet(1, width=8, condition_channels=1)(torch.ones(2, 1, 8, 8), 0.5, torch.ones(1, 1, 8, 8)), "condition"),
        (lambda: Preconditioned(TimeMLP(2), VPSchedule(), 0.0), "data_std"),
        (
            lambda: Preconditioned(TimeMLP(2), VPSchedule(), 1.0).loss(
                torch.ones(2, 2), generator=torch.Generator(), levels="some"
            ),
            "levels",
        ),
        (
            lambda: Preconditioned(TimeMLP(2), VPSchedule(), 1.0).loss(
                torch.ones(2, 2), generator=torch.Generator(), t_end=0.0
            ),
            "t_end",
        ),
    ],
    ids=["dim", "depth", "condition_dim", "no condition", "condition unasked", "x", "t column", "t rows", "channels", "width", "sides", "condition shape", "data_std", "levels", "t_end"],
)  # fmt: skip
def test_refusals(build, match):
    with pytest.raises(ArgumentError, match=match):
        build()


def test_refused_types():
    with pytest.raises(ArgumentTypeError, match="Schedule"):
        Preconditioned(TimeMLP(2), 3, 1.0)
