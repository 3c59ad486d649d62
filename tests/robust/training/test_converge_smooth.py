"""Oracles of ConvergeSmooth: the gate by hand, the base method in the limit, and single-step training by hand."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import assign, flatten
from perturbkit.core.random import randn, randperm, uniform
from perturbkit.robust import ConvergeSmooth, WeightCentralization, fast_adversarial_train
from perturbkit.robust.training.converge_smooth import _Starts

F64 = torch.float64


def network(dtype=F64, norm=False):
    middle = [nn.BatchNorm1d(8)] if norm else []
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(5, 8), *middle, nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    assign(net, 0.5 * randn((len(flatten(net)),), generator=torch.Generator().manual_seed(0), dtype=dtype))
    return net


def data(n=40, dtype=F64):
    x = uniform((n, 5), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, (3 * x[:, 0]).long().clamp(max=2)


def call(generator, dtype):
    return fast_adversarial_train(
        network(dtype), *data(dtype=dtype), 0.1, epochs=3, smooth=ConvergeSmooth(stride=0), batch_size=20,
        evaluate=lambda m: 0.5, generator=generator,
    )  # fmt: skip


def train(**options):
    return fast_adversarial_train(network(), *data(), 0.1, **{"epochs": 1, "generator": 0, **options})


EXAMPLE = Example(
    call=call,
    refusals=(
        (lambda: ConvergeSmooth(gamma_max=0.0), "gamma_max is 0"),
        (lambda: ConvergeSmooth(ratio=0.5), "ratio is 0.5"),
        (lambda: ConvergeSmooth(stride=-1), "stride is -1"),
        (lambda: ConvergeSmooth(weight=-1.0), "weight is -1"),
        (lambda: ConvergeSmooth(stages=[0, 5, 5]), "stages is"),
        (lambda: ConvergeSmooth(stages=[3]), "stages is"),
        (lambda: ConvergeSmooth().end_epoch(-1.0), "mean_reference_loss is -1"),
        (lambda: WeightCentralization(lambda z: z), "module is a function"),
        (lambda: WeightCentralization(network(), -1.0), "coefficient is -1"),
        (lambda: fast_adversarial_train(network(), *data(), 0.0, epochs=1), "epsilon is 0"),
        (lambda: train(epochs=0), "epochs is 0"),
        (lambda: train(init="zero"), "init is 'zero'"),
        (lambda: train(reference="end"), "reference is 'end'"),
        (lambda: train(label_smoothing=1.0), "label_smoothing is 1"),
        (lambda: train(consistency=-1.0), "consistency is -1"),
        (lambda: train(reset=0), "reset is 0"),
        (lambda: train(attack_step=0.0), "attack_step is 0"),
        (lambda: train(max_norm=0.0), "max_norm is 0"),
    ),
    stochastic=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "epoch", "wanted"),
    [
        # After epochs of mean 2.0 and 1.9: previous 1.9, slope -0.1, threshold 0.2 / 2 = 0.1.
        (1.95, 4, 1.0),
        (1.85, 4, 1.0),
        (2.05, 4, 1.0 + 0.5 * 2.05),
        (1.75, 4, 1.0 - 0.5 * 1.75),
        (2.05, 1, 1.0),  # within the stride of the start
        (2.05, 2, 1.0 + 0.5 * 2.05),
        (2.05, 8, 1.0 + 0.5 * 2.05),
        (2.05, 9, 1.0),  # within the stride of the drop at 10
        (2.05, 10, 1.0),
        (2.05, 11, 1.0),
        (2.05, 12, 1.0 + 0.5 * 2.05),
        (2.05, 14, 1.0),
        (2.05, 99, 1.0),
    ],
)
def test_gate_and_sign_are_as_computed_by_hand(reference, epoch, wanted):
    smooth = ConvergeSmooth(gamma_max=0.2, ratio=2.0, stride=1, weight=0.5, stages=[0, 10, 15])
    smooth.end_epoch(2.0)
    smooth.end_epoch(1.9)
    found = smooth.step(torch.tensor(1.0, dtype=F64), torch.tensor(reference, dtype=F64), epoch)
    assert float(found) == pytest.approx(wanted)


def test_the_threshold_follows_the_rise_between_its_ends():
    smooth = ConvergeSmooth(gamma_max=0.2, ratio=4.0)
    for mean, threshold in ((1.0, 0.2), (1.1, 0.1), (1.12, 0.05), (1.0, 0.05), (1.15, 0.15)):
        smooth.end_epoch(mean)
        assert smooth.threshold == pytest.approx(threshold)
        assert smooth.previous == mean


def test_the_correction_has_a_gradient():
    smooth = ConvergeSmooth(gamma_max=0.1, stride=0)
    smooth.end_epoch(1.0)
    w = torch.tensor(2.0, dtype=F64, requires_grad=True)
    smooth.step(3 * w, w, 1).backward()
    assert float(w.grad) == 4.0
    low = torch.tensor(0.5, dtype=F64, requires_grad=True)
    smooth.step(3 * low, low, 1).backward()
    assert float(low.grad) == 2.0


def fitted(**options):
    net, (x, y) = network(), data()
    history = fast_adversarial_train(
        net, x, y, 0.1, **{"epochs": 8, "batch_size": 10, "generator": 3, "drops": (0.75,), **options}
    )
    return net, history


@pytest.mark.parametrize("init", ["random", "previous"])
def test_without_a_limit_training_is_the_base_method_bit_for_bit(init):
    base, first = fitted(init=init)
    free, second = fitted(init=init, smooth=ConvergeSmooth(gamma_max=math.inf))
    tied, _ = fitted(init=init, smooth=ConvergeSmooth(gamma_max=1e-6, stride=0))
    assert torch.equal(flatten(base), flatten(free))
    assert torch.equal(first.loss, second.loss)
    assert not torch.equal(flatten(base), flatten(tied))


def test_stages_follow_the_drops_of_the_rate():
    smooth = ConvergeSmooth()
    fitted(smooth=smooth, drops=(0.5, 0.75))
    assert smooth.stages == [0, 4, 6, 8]
    own = ConvergeSmooth(stages=[0, 3])
    fitted(smooth=own)
    assert own.stages == [0, 3]


def by_hand(x, y, start, stride, eps=0.1):
    """One epoch in one batch, as in the paper, with the library's start."""
    net = network()
    start = start.clamp(-eps, eps).clone().requires_grad_()
    before = net(x + start)
    loss = functional.cross_entropy(before, y)
    (g,) = torch.autograd.grad(loss, start, retain_graph=True)
    delta = (start.detach() + stride * g.sign()).clamp(-eps, eps)
    delta = (x + delta).clamp(0, 1) - x
    return net, before, net(x + delta), loss, g


def test_a_step_is_the_one_of_single_step_training():
    x, y = data()
    net = network()
    history = fast_adversarial_train(
        net, x, y, 0.1, epochs=1, lr=0.3, weight_decay=0.0, consistency=2.0, max_norm=None, generator=5
    )
    g = torch.Generator().manual_seed(5)
    order = randperm(40, generator=g)
    start = uniform((40, 5), -0.1, 0.1, generator=g, dtype=F64)
    start = (x[order] + start).clamp(0, 1) - x[order]
    copy, before, after, reference, _ = by_hand(x[order], y[order], start, 0.125)
    value = functional.cross_entropy(after, y[order]) + 2 * (after - before).square().mean()
    value.backward()
    torch.testing.assert_close(history.loss, value.detach()[None])
    torch.testing.assert_close(history.reference_loss, reference.detach()[None])
    for p, q in zip(net.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(p, (q - 0.3 * q.grad).detach())


def test_the_prior_start_goes_on_from_what_the_row_reached():
    bits = torch.arange(32)[:, None] >> torch.arange(5) & 1
    x, y = 0.2 + 0.6 * bits.double(), torch.arange(32) % 3
    seen = []

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, z):
            seen.append(z.detach().clone())
            return self.inner(z)

    fast_adversarial_train(
        Seen(), x, y, 0.1, epochs=3, init="previous", reset=2, lr=1e-30, weight_decay=0.0, batch_size=40, generator=0
    )  # fmt: skip

    def rows(i):
        """Undo the shuffle: the inputs seen are within 0.1 of the clean ones."""
        nearest = torch.cdist(seen[i], x, p=2).argmin(1)
        return seen[i][nearest.argsort()] - x[nearest.sort().values], sorted(nearest.tolist())

    (first, order), (reached, _), (second, again), (third, _) = rows(0), rows(1), rows(2), rows(4)
    assert order == again == list(range(32))
    # The mean of one gradient has its signs: the next epoch starts where the attack ended, until the reset.
    torch.testing.assert_close(second, reached)
    assert bool((first - third).abs().max() > 0.05)
    assert all(float((s - x[torch.cdist(s, x).argmin(1)]).abs().max()) <= 0.1 + 1e-12 for s in seen)


def test_the_prior_moves_along_a_decaying_mean_of_gradients():
    x, rows = torch.full((1, 2), 0.5, dtype=F64), torch.tensor([0])
    starts = _Starts(x, 0.1, (0.0, 1.0), True, 40, torch.Generator().manual_seed(0))
    starts.draw(rows, 0)
    zero = torch.zeros(1, 2, dtype=F64)
    starts.move(rows, zero, torch.tensor([[3.0, 1.0]], dtype=F64), 0.01)
    torch.testing.assert_close(starts.means, torch.tensor([[0.75, 0.25]], dtype=F64))
    end = starts.move(rows, zero, torch.tensor([[-0.1, 0.9]], dtype=F64), 0.01)
    torch.testing.assert_close(starts.means, torch.tensor([[0.125, 0.975]], dtype=F64))
    # The attack goes along the gradient, the next start along the mean.
    torch.testing.assert_close(end, torch.tensor([[-0.01, 0.01]], dtype=F64))
    torch.testing.assert_close(starts.draw(rows, 1), torch.tensor([[0.01, 0.01]], dtype=F64))


def test_the_clean_reference_is_the_loss_of_the_clean_inputs():
    x, y = data()
    clean = functional.cross_entropy(network()(x), y, label_smoothing=0.3).detach()
    history = fast_adversarial_train(
        network(), x, y, 0.1, epochs=1, reference="clean", label_smoothing=0.3, generator=0
    )
    torch.testing.assert_close(history.reference_loss, clean[None])


def test_the_gradient_is_clipped():
    start, x, y = flatten(network()), *data()
    for limit in (1e-3, 1e-2):
        net = network()
        fast_adversarial_train(
            net, x, y, 0.1, epochs=1, max_norm=limit, lr=1.0, weight_decay=0.0, generator=0
        )
        assert float((flatten(net) - start).norm()) == pytest.approx(limit, rel=1e-3)


def test_centralization_is_the_distance_from_the_mean_of_the_epochs():
    net = network()
    centre = WeightCentralization(net, 0.3)
    seen = []
    for i in range(3):
        assign(net, flatten(net) + i + 1.0)
        centre.end_epoch()
        seen.append(flatten(net))
    assign(net, flatten(net) * 2)
    value = centre.penalty()
    mean = torch.stack(seen).mean(0)
    torch.testing.assert_close(value.detach(), 0.3 * (flatten(net) - mean).square().sum())
    value.backward()
    torch.testing.assert_close(net[2].bias.grad, 0.6 * (flatten(net) - mean)[-3:])
    centre.restart()
    assert float(centre.penalty()) == 0.0


def test_centralization_holds_weights_together_until_the_rate_drops():
    def moved(coefficient):
        net, (x, y) = network(), data()
        centre, ends = WeightCentralization(net, coefficient), []
        fast_adversarial_train(
            net, x, y, 0.1, epochs=6, centre=centre, drops=(0.5,), evaluate=lambda m: ends.append(flatten(m)) or 0.0,
            generator=0, batch_size=10,
        )  # fmt: skip
        return centre._count, [float((b - a).norm()) for a, b in itertools.pairwise(ends)]

    (free, loose), (count, tight) = moved(0.0), moved(1.0)
    assert free == count == 3
    assert tight[1] < 0.7 * loose[1]
