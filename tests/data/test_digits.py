import pytest
import torch
from sklearn.datasets import load_digits

from perturbkit.core import checks
from perturbkit.data import digits_classifier, load_digits8, load_digits28


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
