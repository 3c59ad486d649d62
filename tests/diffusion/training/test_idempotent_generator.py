"""Oracles of idempotent generation: projections are stationary, each loss moves one application, noise has its spectrum."""

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core.checks import ArgumentError, ModelError
from perturbkit.core.random import randn, seeded_init
from perturbkit.diffusion import IdempotentGenerator, idempotent_losses

F64 = torch.float64


def made(seed=0, dim=3, dtype=F64):
    with seeded_init(seed):
        return nn.Sequential(nn.Linear(dim, 7), nn.Tanh(), nn.Linear(7, dim)).to(dtype)


def data(n=9, dim=3, dtype=F64, seed=1):
    return randn((n, dim), generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Applications(nn.Module):
    """A network whose inner and outer applications can be told apart: it adds a parameter of its own each time."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.3, dtype=F64))

    def forward(self, x):
        return 0.5 * x + self.shift


EXAMPLE = Example(
    call=lambda generator, dtype: (
        IdempotentGenerator(made(dtype=dtype))
        .fit(data(dtype=dtype), 3, batch_size=4, generator=generator, progress=False)
        .sample(4, 2, generator=generator)
    ),
    stochastic=True,
    refusals=(
        (lambda: IdempotentGenerator(lambda x: x), "net is a function"),
        (lambda: IdempotentGenerator(made(), rec_weight=-1.0), "rec_weight is -1"),
        (lambda: IdempotentGenerator(made(), distance="l2"), "distance is 'l2'"),
        (lambda: IdempotentGenerator(made(), noise="white"), "noise is 'white'"),
        (lambda: IdempotentGenerator(made(), tight_clamp=0.0), "tight_clamp is 0"),
        (lambda: IdempotentGenerator(made()).sample(3), "has seen no data"),
        (lambda: IdempotentGenerator(made()).fit(data(1), 3), "at least 2 rows"),
        (lambda: IdempotentGenerator(made()).project(data(), 0), "n_applications is 0"),
        (lambda: idempotent_losses(made(), data(), data(8)), "z has shape"),
        (lambda: idempotent_losses(nn.Linear(3, 2).double(), data(), data()), r"answered shape \(9, 2\)"),
    ),
)


@pytest.mark.parametrize("distance", ["l1", "mse"])
@pytest.mark.parametrize("clamp", [None, 1.5], ids=["unbounded", "bounded"])
def test_a_projection_onto_the_data_has_no_loss_and_is_stationary(distance, clamp):
    # An oblique projection onto the plane that holds the data.
    basis = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.4, -0.3]], dtype=F64)
    dual = torch.tensor([[1.0, 0.2, 0.5], [0.1, 1.0, -0.2]], dtype=F64)
    net = nn.Linear(3, 3, bias=False).double()
    net.weight.data = basis @ torch.linalg.inv(dual @ basis) @ dual
    x = data(dim=2) @ basis.T
    losses = idempotent_losses(net, x, data(seed=5), tight_clamp=clamp, distance=distance)
    for value in losses.values():
        assert abs(float(value.detach())) < 1e-12
    if distance == "mse":
        gradient = torch.autograd.grad(sum(losses.values()), net.weight)[0]
        assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("distance", ["l1", "mse"])
def test_each_loss_moves_one_application(distance):
    # f(u) = u/2 + s: with s_in and s_out told apart, idem differentiates in s_in alone, tight in s_out alone.
    net, z = Applications(), data(40, seed=7)
    found = idempotent_losses(net, data(40, seed=8), z, tight_clamp=None, distance=distance)
    s = float(net.shift.detach())

    def gap(inner, outer):
        once = 0.5 * z + inner
        d = 0.5 * once + outer - once
        return float((d.abs() if distance == "l1" else d.square()).mean())

    h = 1e-6
    assert float(found["idem"]) == pytest.approx(gap(s, s))
    assert float(found["tight"]) == pytest.approx(-gap(s, s))
    by_inner = (gap(s + h, s) - gap(s - h, s)) / (2 * h)
    by_outer = (gap(s, s + h) - gap(s, s - h)) / (2 * h)
    assert float(torch.autograd.grad(found["idem"], net.shift, retain_graph=True)[0]) == pytest.approx(
        by_inner, abs=1e-6
    )
    assert float(torch.autograd.grad(found["tight"], net.shift)[0]) == pytest.approx(-by_outer, abs=1e-6)


def test_tightness_is_bounded_by_the_reconstruction_of_its_row():
    net, x, z = made(), data(50), data(50, seed=4)
    rec = (net(x) - x).abs().mean(1)
    loose = (net(net(z)) - net(z)).abs().mean(1)
    bound = 1.5 * rec
    expected = -(torch.tanh(loose / bound) * bound).mean()
    torch.testing.assert_close(idempotent_losses(net, x, z)["tight"], expected)
    tiny = idempotent_losses(net, x, z, tight_clamp=1e-6)["tight"]
    assert abs(float(tiny)) <= 1e-6 * float(rec.max())
    # The bound is a constant: scaling tightness alone does not pull on the reconstruction.
    inside = idempotent_losses(net, x, z, tight_clamp=1e9)["tight"]
    gradients = torch.autograd.grad(inside, list(net.parameters()))
    plain = torch.autograd.grad(
        idempotent_losses(net, x, z, tight_clamp=None)["tight"], list(net.parameters())
    )
    for a, b in zip(gradients, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_tightness_pushes_away_from_the_identity_to_first_order_and_idempotence_to_second():
    # f = I + c P with P the projection off the data.
    x = torch.cat([data(30, 2), torch.zeros(30, 1, dtype=F64)], 1)
    z, off = data(30), torch.diag(torch.tensor([0.0, 0.0, 1.0], dtype=F64))

    class Near(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.c = nn.Parameter(torch.tensor(c, dtype=F64))

        def forward(self, u):
            return u + self.c * u @ off

    slopes = {}
    for c in (1e-3, 2e-3):
        net = Near(c)
        losses = idempotent_losses(net, x, z, tight_clamp=None, distance="mse")
        assert float(losses["rec"]) == 0
        slopes[c] = {
            k: float(torch.autograd.grad(losses[k], net.c, retain_graph=True)[0]) for k in ("idem", "tight")
        }
        assert float(idempotent_losses(net, x, z, distance="mse")["tight"]) == pytest.approx(0, abs=1e-11)
    assert slopes[1e-3]["tight"] < 0  # descent makes c larger
    assert slopes[2e-3]["tight"] / slopes[1e-3]["tight"] == pytest.approx(2, rel=0.01)
    assert slopes[2e-3]["idem"] / slopes[1e-3]["idem"] == pytest.approx(4, rel=0.02)
    zero = Near(0.0)
    losses = idempotent_losses(zero, x, z, distance="mse")
    assert all(float(v) == pytest.approx(0, abs=1e-11) for v in losses.values())
    assert float(torch.autograd.grad(sum(losses.values()), zero.c)[0]) == 0


@pytest.mark.parametrize("shape", [(7,), (1, 6, 5)], ids=["flat", "images"])
def test_fourier_noise_has_the_spectrum_of_the_data(shape):
    g = torch.Generator().manual_seed(3)
    x = 2 + randn((500, *shape), generator=g, dtype=F64).cumsum(-1)
    model = IdempotentGenerator(nn.Identity()).watch(x)
    z = model.sample(20000, generator=4).x
    axes = tuple(range(1, x.ndim))
    ours, theirs = (torch.fft.rfftn(v, dim=axes) for v in (z, x))
    power = [(v - v.mean(0)).abs().square().mean(0).sqrt() for v in (ours, theirs)]
    assert float((ours.mean(0) - theirs.mean(0)).abs().max() / power[1].max()) < 0.05
    torch.testing.assert_close(power[0], power[1], rtol=0.05, atol=0.0)
    white = IdempotentGenerator(nn.Identity(), noise="gaussian").watch(x).sample(20000, generator=4).x
    assert abs(float(white.std()) - 1) < 0.02


def test_training_learns_a_line():
    g = torch.Generator().manual_seed(6)
    x = randn((400, 1), generator=g) * torch.tensor([[1.0, 0.5]])
    with seeded_init(2):
        net = nn.Linear(2, 2)
    model = IdempotentGenerator(net, noise="gaussian", lr=5e-3, distance="mse")
    model.fit(x, 600, generator=7, progress=False)
    assert model.losses_.shape == (600,)
    off = torch.tensor([-0.5, 1.0]) / 1.25**0.5
    found = model.sample(500, generator=8)
    assert found.cost.nfev == 500
    assert float((found.x @ off).std()) < 0.1
    assert float((model.project(x) - x).abs().max()) < 0.1
    torch.testing.assert_close(
        model.sample(20, 3, generator=8).x, model.project(model.sample(20, generator=8).x, 2)
    )
    assert not net.weight.grad_fn


def test_a_network_that_changes_the_shape_is_found_out():
    model = IdempotentGenerator(nn.Linear(3, 3).double()).watch(data())
    model.net = nn.Linear(3, 2).double()
    with pytest.raises(ModelError, match="Reshape what it answers"):
        model.sample(3)
    with pytest.raises(ArgumentError, match="n is 0"):
        model.sample(0)
