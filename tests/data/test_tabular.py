import pytest
import torch
from sklearn import datasets

from perturbkit.core import checks
from perturbkit.data import (
    load_breast_cancer,
    load_diabetes,
    load_lalonde,
    load_nhefs,
    load_wine,
    tabular_model,
)

SHAPES = {
    load_breast_cancer: (569, 30),
    load_wine: (178, 13),
    load_diabetes: (442, 10),
    load_lalonde: (445, 9),
    load_nhefs: (1566, 10),
}


@pytest.mark.parametrize("load", SHAPES)
def test_table(load):
    data, train, test = load(), load("train"), load("test")
    assert data.x.shape == SHAPES[load]
    assert data.y.shape == SHAPES[load][:1]
    assert data.x.dtype == torch.float32
    assert torch.isfinite(data.x).all()
    assert torch.isfinite(data.y.float()).all()
    assert len(data.feature_names) == len(data.units) == SHAPES[load][1]
    assert len(train) + len(test) == len(data)
    assert not set(train.index.tolist()) & set(test.index.tolist())
    assert (test.index % 5 == 4).all()
    assert torch.equal(test.x, data.x[4::5])
    assert torch.equal(load().x, data.x)
    assert data.licence
    assert data.source
    if data.class_names:
        assert data.y.dtype == torch.int64
        assert set(train.y.tolist()) == set(test.y.tolist()) == set(range(len(data.class_names)))
    else:
        assert data.y.dtype == torch.float32
    with pytest.raises(checks.ArgumentError, match="'train', 'test', 'all'"):
        load("both")


@pytest.mark.parametrize(
    ("load", "peer"),
    [(load_breast_cancer, datasets.load_breast_cancer), (load_wine, datasets.load_wine)],
)
def test_tables_are_those_of_scikit_learn(load, peer):
    bunch = peer()
    assert torch.equal(load().x, torch.from_numpy(bunch.data).float())
    assert torch.equal(load().y, torch.tensor(bunch.target).long())


def test_diabetes_is_in_original_units():
    age = load_diabetes().x[:, 0]
    assert 15 < age.min() < age.max() < 90


def test_lalonde_experiment():
    data = load_lalonde()
    treated = data.x[:, data.feature_names.index(data.treatment)] == 1
    assert treated.sum() == 185
    assert float(data.y[treated].mean() - data.y[~treated].mean()) == pytest.approx(1794.34, abs=0.01)


def test_nhefs_naive_and_adjusted_effect():
    """Hernán and Robins (2020): naive difference 2.5 kg; linear adjustment gives about 3.5 kg."""
    data = load_nhefs()
    frame = data.to_frame().astype("float64")
    naive = frame.groupby("qsmk")["wt82_71"].mean()
    assert naive[1] - naive[0] == pytest.approx(2.54, abs=0.01)
    assert set(frame["sex"]) == set(frame["race"]) == {0, 1}
    assert set(frame["exercise"]) == set(frame["active"]) == {0, 1, 2}
    x = data.x.double()
    square = x[:, [2, 5, 6, 7]] ** 2
    levels = [
        (x[:, [j]] == v).double()
        for j, values in ((4, (2, 3, 4, 5)), (8, (1, 2)), (9, (1, 2)))
        for v in values
    ]
    design = torch.cat([torch.ones(len(x), 1), x[:, [0, 1, 2, 3, 5, 6, 7]], square, *levels], 1)
    effect = torch.linalg.lstsq(design, data.y.double()[:, None]).solution[1, 0]
    assert float(effect) == pytest.approx(3.46, abs=0.03)


def test_model():
    state = torch.get_rng_state()
    model, test = tabular_model(), load_breast_cancer("test")
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        right = float((model.module(test.x).argmax(1) == test.y).float().mean())
    assert right >= 0.95
    assert right == pytest.approx(model.accuracy, abs=1e-3)
    train = load_breast_cancer("train").x
    scaled = model.module[0](train)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(30), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(0), torch.ones(30), atol=1e-4, rtol=0)
