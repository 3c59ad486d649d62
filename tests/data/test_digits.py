from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits

from perturbkit.core import checks, ddim_step
from perturbkit.core.random import randn
from perturbkit.data import digits_classifier, digits_denoiser, load_digits8, load_digits28


@pytest.mark.parametrize(
    ("load", "n", "n_test", "side"), [(load_digits8, 1797, 360, 8), (load_digits28, 10_000, 2000, 28)]
)
def test_digits(load, n, n_test, side):
    data, train, test = load(), load("train"), load("test")
    assert data.x.shape == (n, 1, side, side)
    assert data.x.dtype == torch.float32
    assert data.x.min() == 0
    assert data.x.max() == 1
    assert set(data.y.tolist()) == set(range(10))
    assert (len(train), len(test)) == (n - n_test, n_test)
    assert not set(train.index.tolist()) & set(test.index.tolist())
    assert torch.equal(torch.cat([train.x, test.x]), data.x)
    assert torch.equal(torch.cat([train.y, test.y]), data.y)
    assert torch.equal(load().x, data.x)
    assert data.licence
    assert data.source


def test_digits8_are_those_of_scikit_learn():
    x, y = load_digits(return_X_y=True)
    data = load_digits8()
    assert torch.equal(data.x.reshape(1797, 64) * 16, torch.from_numpy(x).float())
    assert torch.equal(data.y, torch.from_numpy(y))


def test_digits28_class_counts_of_the_source():
    counts = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert load_digits28().y.bincount().tolist() == counts


def test_loaded_tensors_are_the_callers_own():
    load_digits28().x.zero_()
    load_digits8().x.zero_()
    assert load_digits28().x.sum() > 0
    assert load_digits8().x.sum() > 0


@pytest.mark.parametrize(("size", "load", "least"), [(8, load_digits8, 0.93), (28, load_digits28, 0.95)])
def test_classifier(size, load, least):
    state = torch.get_rng_state()
    model, test = digits_classifier(size), load("test")
    assert torch.equal(state, torch.get_rng_state())
    assert not model.module.training
    with torch.no_grad():
        right = float((model.module(test.x).argmax(1) == test.y).float().mean())
    assert right >= least
    assert right == pytest.approx(model.accuracy, abs=2e-3)
    assert model.class_names == test.class_names
    assert model.licence


def test_refusals():
    for load in (load_digits8, load_digits28):
        with pytest.raises(checks.ArgumentError, match="'train', 'test', 'all'"):
            load("valid")
    with pytest.raises(checks.ArgumentError, match="allowed: 28, 8"):
        digits_classifier(32)


def test_denoiser_denoises_held_out_digits_better_than_their_mean():
    state = torch.get_rng_state()
    denoiser = digits_denoiser()
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in denoiser.network.parameters())
    clean = 2 * load_digits28("test").x[:60] - 1
    g = torch.Generator().manual_seed(3)
    mean = 2 * load_digits28("train").x.mean(0) - 1
    for level, share in ((0.3, 0.05), (1.0, 0.25), (3.0, 0.9)):
        noisy = clean + level * randn(clean.shape, generator=g)
        error = (denoiser.x0(noisy, level) - clean).square().mean()
        assert float(error) < share * float((mean - clean).square().mean())


def test_denoiser_draws_digits():
    # Frechet distance of the last hidden layer of the classifier: of 40 samples, 40 digits and 40 blurred digits.
    denoiser, layers = digits_denoiser(), list(digits_classifier(28).module.children())
    x = 80 * randn((40, 1, 28, 28), generator=torch.Generator().manual_seed(4))
    times = denoiser.schedule.times(14, t_end=0.01, spacing="karras")
    for s, t in pairwise(times.tolist()):
        x = ddim_step(x, denoiser.eps(x, s), denoiser.schedule, s, t)
    digits = load_digits28("test").x
    blurred = torch.nn.functional.avg_pool2d(digits[:40], 5, 1, 2)
    with torch.no_grad():
        features = [
            torch.nn.Sequential(*layers[:-1])(v.clamp(0, 1))
            for v in ((x + 1) / 2, digits[:40], blurred, digits[40:1000])
        ]

    def distance(a, b):
        """Of means and deviations alone: forty rows say nothing of covariances."""
        return float((a.mean(0) - b.mean(0)).square().sum() + (a.std(0) - b.std(0)).square().sum())

    drawn, true, spoilt = (distance(f, features[-1]) for f in features[:3])
    assert drawn < 3 * true + 0.1 * spoilt
    assert spoilt > 3 * true
