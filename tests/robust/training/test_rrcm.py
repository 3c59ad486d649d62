"""Oracles of consistent representations: the contrast in closed form, the grid, the losses written out, and training."""

import math

import pytest
import torch
from scipy.stats import norm as normal
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import flatten
from perturbkit.core.random import randn, seeded_init
from perturbkit.robust import RobustRepresentationConsistency, info_nce, randomized_smoothing

F64 = torch.float64


class Encoder(nn.Module):
    """Takes the time in, so that what is asked at which time shows."""

    def __init__(self, features=6):
        super().__init__()
        self.first = nn.Linear(5, 16)
        self.last = nn.Linear(16, features)
        self.calls = []

    def forward(self, z, t):
        self.calls.append((z.detach().clone(), t.detach().clone(), torch.is_grad_enabled()))
        return self.last((self.first(z) + 0.001 * t[:, None]).tanh())


def method(generator=0, dtype=F64, encoder=Encoder, **options):
    with seeded_init(3):
        parts = encoder(), nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    return RobustRepresentationConsistency(*(p.to(dtype) for p in parts), generator=generator, **options)


def data(n=40, seed=1, dtype=F64):
    """Two well separated classes."""
    x = 0.2 * randn((n, 5), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    y = torch.arange(n) % 2
    x[:, 0] += y.to(dtype) - 0.5
    return x, y


def jitter(x, generator):
    return x + 0.1 * randn(x.shape, generator=generator, like=x)


def trained(generator=0, dtype=F64, **options):
    found, (x, y) = method(generator, dtype, **options), data(dtype=dtype)
    first = found.pretrain(x, steps=6, augment=jitter, batch_size=16, lr=1e-3)
    second = found.finetune(x, y, sigma=0.3, steps=6, batch_size=16)
    return found, first, second


def call(generator, dtype):
    found, first, second = trained(generator, dtype)
    return {
        "first": first,
        "second": second,
        "logits": found.predict(data(7, 2, dtype)[0], 0.3),
        "nce": info_nce(data(4, 3, dtype)[0], data(4, 4, dtype)[0], 0.5),
    }


def other_shape(x, generator):
    return x[:, :1]


class Picture(Encoder):
    def forward(self, z, t):
        return super().forward(z, t)[:, None]


def pretrain(**options):
    return method().pretrain(**{"x": data()[0], "steps": 1, "augment": jitter, **options})


def finetune(**options):
    return method().finetune(**{"x": data()[0], "y": data()[1], "sigma": 0.3, "steps": 1, **options})


EXAMPLE = Example(
    call=call,
    refusals=(
        (lambda: RobustRepresentationConsistency(lambda z, t: z, nn.Linear(6, 2)), "encoder is a function"),
        (lambda: RobustRepresentationConsistency(Encoder(), None), "projector is a NoneType"),
        (lambda: method(sigma_min=0.0), "sigma_min is 0"),
        (lambda: method(sigma_max=0.001), "sigma_max is 0.001"),
        (lambda: method(rho=0.0), "rho is 0"),
        (lambda: method(sigma_data=0.0), "sigma_data is 0"),
        (lambda: method(temperature=0.0), "temperature is 0"),
        (lambda: method(n_scales=(0, 80)), r"n_scales\[0\] is 0"),
        (lambda: method(n_scales=(20, 10)), r"n_scales\[1\] is 10"),
        (lambda: method(ema=(1.0, 1.0)), r"ema\[0\] is 1"),
        (lambda: method(ema=(0.9, 0.5)), r"ema\[1\] is 0.5"),
        (lambda: method(n_scales=20), "n_scales is 20"),
        (lambda: method(ema=(0.9,)), "ema is"),
        (lambda: method().schedule(0, 0), "steps is 0"),
        (lambda: method().schedule(11, 10), "step is 11"),
        (lambda: method().represent(3, 0.3), "x is 3"),
        (lambda: method().represent(data()[0], 0.0), "sigma has shape"),
        (lambda: method().represent(data()[0], torch.ones(3)), "sigma has shape"),
        (lambda: pretrain(augment=None), "augment is a NoneType"),
        (lambda: pretrain(augment=lambda x, g: 3), "what augment answered is 3"),
        (lambda: pretrain(augment=lambda x, g: x / 0), "what augment answered holds"),
        (lambda: finetune(augment="crop"), "augment is a str"),
        (lambda: method().times(1), "n is 1"),
        (lambda: pretrain(x=data()[1][:, None]), "x has dtype"),
        (lambda: pretrain(x=data(1)[0]), "the number of rows of x is 1"),
        (lambda: pretrain(steps=0), "steps is 0"),
        (lambda: pretrain(batch_size=1), "batch_size is 1"),
        (lambda: pretrain(lr=0.0), "lr is 0"),
        (lambda: pretrain(weight_decay=-1.0), "weight_decay is -1"),
        (lambda: pretrain(max_norm=0.0), "max_norm is 0"),
        (lambda: pretrain(augment=other_shape), "what augment answered has shape"),
        (lambda: method(encoder=Picture).pretrain(data()[0], steps=1, augment=jitter), "the encoder answered"),
        (lambda: finetune(y=data(3)[1]), "y has shape"),
        (lambda: finetune(x=data()[0] * torch.nan), "x holds 200 NaN"),
        (lambda: finetune(sigma=100.0), "sigma is 100"),
        (lambda: finetune(steps=0), "steps is 0"),
        (lambda: finetune(consistency=-1.0), "consistency is -1"),
        (lambda: finetune(entropy=-1.0), "entropy is -1"),
        (lambda: finetune(batch_size=0), "batch_size is 0"),
        (lambda: finetune(lr=0.0), "lr is 0"),
        (lambda: finetune(layer_decay=0.0), "layer_decay is 0"),
        (lambda: finetune(weight_decay=-1.0), "weight_decay is -1"),
        (lambda: finetune(augment=other_shape), "what augment answered has shape"),
        (lambda: method().predict(data()[0], 0.3), "there is no classifier yet"),
        (lambda: trained()[0].predict(data()[0], 1e-4), "sigma is 0.0001"),
        (lambda: trained()[0].predict(data()[0][:0], 0.3), "x is empty"),
        (lambda: info_nce(torch.ones(2, 3, 1), torch.ones(2, 3, 1), 0.2), "f has shape"),
        (lambda: info_nce(torch.ones(2, 3), torch.ones(3, 3), 0.2), "target has shape"),
        (lambda: info_nce(torch.ones(2, 3), torch.ones(2, 3), 0.0), "temperature is 0"),
    ),
    stochastic=True,
)  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_contrast_of_equal_targets_is_the_logarithm_of_their_number(n):
    f, _ = data(n, seed=n)
    found = info_nce(f, torch.ones_like(f), 0.2)
    torch.testing.assert_close(found, torch.full((n,), math.log(n), dtype=F64))


def test_the_contrast_is_the_cross_entropy_of_cosines():
    f, g = data(9, 5)[0], data(9, 6)[0]
    cosines = functional.cosine_similarity(f[:, None], g[None], dim=2)
    wanted = functional.cross_entropy(cosines / 0.3, torch.arange(9), reduction="none")
    torch.testing.assert_close(info_nce(f, 3 * g, 0.3), wanted)


@pytest.mark.parametrize("n", [2, 20, 81])
def test_the_grid_falls_between_its_exact_ends_evenly_in_a_root(n):
    grid = method(sigma_min=0.01, sigma_max=50.0, rho=5.0).times(n)
    assert (float(grid[0]), float(grid[-1]), len(grid)) == (50.0, 0.01, n)
    steps = (grid ** (1 / 5)).diff()
    assert bool((steps < 0).all())
    torch.testing.assert_close(steps, steps.mean().expand(n - 1), rtol=1e-9, atol=0)


def test_the_grid_doubles_in_equal_stages_and_the_averaging_slows():
    found = [method().schedule(step, 1000) for step in range(1000)]
    levels = [level for level, _ in found]
    assert sorted(set(levels)) == [21, 41, 81]
    assert levels == sorted(levels)
    assert [levels.count(n) for n in (21, 41, 81)] == [334, 333, 333]
    assert {method(n_scales=(20, 50)).schedule(step, 30)[0] for step in range(30)} == {21, 41, 51}
    rates = [rate for _, rate in found]
    assert rates == sorted(rates)
    assert rates[0] == 0.99
    assert 0.9998 < rates[-1] < 0.9999
    assert method(ema=(0.5, 0.5)).schedule(3, 10)[1] == 0.5
    assert {method(n_scales=(7, 7)).schedule(step, 10)[0] for step in range(10)} == {8}


def test_steps_descend_the_losses_of_the_notes():
    options = {"sigma_max": 2.0, "ema": (0.25, 0.25), "n_scales": (20, 20)}
    found, (x, _) = method(generator=8, **options), data(8)
    twin, target, g = method(), method(), torch.Generator().manual_seed(8)
    history = found.pretrain(x, steps=2, augment=jitter, batch_size=8, lr=0.01)
    both = nn.ModuleList([twin.encoder, twin.projector])
    averaged = nn.ModuleList([target.encoder, target.projector])
    optimizer = torch.optim.AdamW(both.parameters(), 0.01, weight_decay=0.0)

    def f(encoder, z, level):
        times = torch.full((8,), 250 * math.log(level), dtype=F64)
        return encoder(z / math.sqrt(level**2 + 0.25), times)

    def nce(left, right):
        cosines = functional.normalize(left) @ functional.normalize(right.detach()).T
        return functional.cross_entropy(cosines / 0.2, torch.arange(8))

    for step in range(2):
        batch = x[torch.randperm(8, generator=g)]
        a, b = jitter(batch, g), jitter(batch, g)
        noise = randn(batch.shape, generator=g, dtype=F64)
        i = int(torch.randint(0, 20, (), generator=g))
        ends = (2.0 ** (1 / 7), 0.002 ** (1 / 7))
        t, s = ((ends[0] + k / 20 * (ends[1] - ends[0])) ** 7 for k in (i, i + 1))
        views = [view + 0.002 * noise for view in (a, b)]
        online, held = (
            [projector(f(encoder, view, 0.002)) for view in views] for encoder, projector in (both, averaged)
        )
        agreement = nce(f(both[0], batch + t * noise, t), f(both[0], batch + s * noise, s))
        total = nce(online[0], held[1]) + nce(online[1], held[0]) + agreement
        torch.testing.assert_close(history.consistency[step], agreement.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(history.loss[step], total.detach(), rtol=1e-6, atol=1e-8)
        # The weights tell what was held without a gradient.
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 2.0)
        optimizer.step()
        with torch.no_grad():
            for kept, new in zip(averaged.parameters(), both.parameters(), strict=True):
                kept.copy_(0.25 * kept + 0.75 * new)
    torch.testing.assert_close(flatten(found.encoder), flatten(twin.encoder), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(flatten(found.projector), flatten(twin.projector), rtol=1e-5, atol=1e-7)


def test_a_pair_shares_its_noise_and_only_its_farther_point_is_trained():
    found, (x, _) = method(sigma_max=2.0), data(8)
    found.pretrain(x, steps=1, augment=jitter, batch_size=8)
    moving = [c for c in found.encoder.calls if float(c[1][0]) > 250 * math.log(0.0021)]
    (nearer, s, held), (farther, t, free) = sorted(moving, key=lambda c: float(c[1][0]))
    assert (held, free) == (False, True)
    sigmas = [float((level[0] / 250).exp()) for level in (s, t)]
    back = [z * math.sqrt(v**2 + 0.25) for z, v in ((nearer, sigmas[0]), (farther, sigmas[1]))]
    noise = (back[1] - back[0]) / (sigmas[1] - sigmas[0])
    clean = back[1] - sigmas[1] * noise
    assert all(bool((row - x).abs().sum(1).min() < 1e-9) for row in clean)


def test_the_classifier_descends_cross_entropy_and_consistency():
    found, (x, y) = method(generator=4), data(8)
    history = found.finetune(x, y, sigma=0.7, steps=1, batch_size=8, consistency=3.0, entropy=0.5)
    # A head of zeros answers log 2 with certainty of nothing: no divergence, the whole entropy.
    assert float(history.loss[0]) == pytest.approx(math.log(2) * 1.5)
    assert float(history.consistency[0]) == pytest.approx(0.5 * math.log(2))
    plain = method().finetune(x, y, sigma=0.7, steps=1, consistency=0.0, entropy=0.0)
    assert (float(plain.loss[0]), float(plain.consistency[0])) == (pytest.approx(math.log(2)), 0.0)


def test_the_consistency_is_the_divergence_from_the_mean_and_lower_layers_learn_slower():
    found, (x, y) = method(generator=4), data(8)
    history = found.finetune(x, y, sigma=0.7, steps=3, batch_size=8, consistency=3.0, entropy=0.5, lr=0.1)
    once = method(generator=4)
    head = nn.Linear(6, 2).double()
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    children = [once.encoder.first, once.encoder.last, head]
    for step in range(3):
        order = torch.randperm(8, generator=once.generator)
        noise = randn((16, 5), generator=once.generator, dtype=F64)
        logits = head(once.represent(x[order].repeat(2, 1) + 0.7 * noise, 0.7))
        p = logits.softmax(1).reshape(2, 8, 2)
        mean = p.mean(0)
        divergence = sum((mean * (mean / q).log()).sum(1) for q in p).mean() / 2
        agreement = 3 * divergence - 0.5 * (mean * mean.log()).sum(1).mean()
        total = functional.cross_entropy(logits, y[order].repeat(2)) + agreement
        torch.testing.assert_close(history.consistency[step], agreement.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(history.loss[step], total.detach(), rtol=1e-6, atol=1e-8)
        if step == 0:
            rates = [0.1 * 0.85 ** (2 - i) for i in range(3)]
            groups = [{"params": m.parameters(), "lr": r} for m, r in zip(children, rates, strict=True)]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / 3))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    torch.testing.assert_close(flatten(found.encoder), flatten(once.encoder), rtol=1e-6, atol=1e-8)


def test_training_aligns_the_paths_and_tells_the_classes():
    found, (x, y) = method(ema=(0.9, 0.99), sigma_max=1.0), data(60)
    history = found.pretrain(x, steps=200, augment=jitter, batch_size=32, lr=1e-2)
    for part in (history.consistency, history.loss - history.consistency):
        assert float(part[-20:].mean()) < 0.9 * float(part[:20].mean())
    found.finetune(x, y, sigma=0.1, steps=150, lr=0.02)
    assert float((found.predict(data(200, 9)[0], 0.1).argmax(1) == data(200, 9)[1]).double().mean()) > 0.95


def test_modes_and_gradients_are_as_before_and_both_networks_have_moved():
    found = method()
    found.encoder.eval()
    before = flatten(found.encoder), flatten(found.projector)
    found.pretrain(data()[0], steps=2, augment=jitter)
    assert (found.encoder.training, found.projector.training) == (False, True)
    assert all(p.grad is None and p.requires_grad for p in found.projector.parameters())
    assert not torch.equal(before[0], flatten(found.encoder))
    assert not torch.equal(before[1], flatten(found.projector))


def test_the_prediction_is_the_head_on_the_scaled_input():
    found, _, _ = trained()
    x, _ = data(5, 7)
    z = found.encoder(x / math.sqrt(0.3**2 + 0.25), torch.full((5,), 250 * math.log(0.3), dtype=F64))
    torch.testing.assert_close(found.predict(x, 0.3), found.head(z).detach())
    torch.testing.assert_close(found.predict(x[:1], 0.3), found.predict(x, 0.3)[:1])


def test_a_linear_classifier_is_certified_at_its_margin():
    class Linear(nn.Module):
        def forward(self, z, t):
            return z

    found = RobustRepresentationConsistency(Linear(), nn.Linear(2, 2), generator=0)
    x = torch.tensor([[0.5, 1.0]], dtype=F64)
    found.finetune(x, torch.tensor([1]), sigma=0.4, steps=1, lr=1e-9)
    with torch.no_grad():
        found.head.weight.copy_(torch.tensor([[-3.0, 0.0], [3.0, 0.0]]))
        found.head.bias.zero_()
    certificate = randomized_smoothing(found.classifier(0.4), x, sigma=0.4, n_samples=20_000, generator=0)
    assert int(certificate.prediction[0]) == 1
    assert float(certificate.share[0]) == pytest.approx(normal.cdf(0.5 / 0.4), abs=0.01)
    assert 0.47 < float(certificate.radius[0]) < 0.5


def test_modes_and_gradients_are_as_before_where_an_augmentation_fails():
    found, calls = method(), []

    def second(x, generator):
        calls.append(len(x))
        if len(calls) > 2:
            raise RuntimeError("no more pictures")
        return jitter(x, generator)

    found.encoder.eval()
    with pytest.raises(RuntimeError, match="no more pictures"):
        found.pretrain(data()[0], steps=3, augment=second)
    assert (found.encoder.training, found.projector.training) == (False, True)
    assert all(p.grad is None and p.requires_grad for p in found.encoder.parameters())
    assert all(p.grad is None and p.requires_grad for p in found.projector.parameters())
