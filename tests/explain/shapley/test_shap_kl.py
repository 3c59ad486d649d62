"""Oracles of SHAP-KL: brute force over orders, efficiency, dummies and twins, exact conditionals, and judges by hand."""

import itertools
import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from _common import Example
from perturbkit.core import Oracle
from perturbkit.explain import (
    FastSHAPKL,
    MaskedPredictor,
    inclusion_exclusion,
    leakage,
    shap_kl,
)


class Net(nn.Module):
    """A network of (x, mask), with random weights."""

    def __init__(self, d=4, k=3, seed=0, dtype=torch.float64):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(2 * d, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, k)).to(dtype)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g, dtype=dtype)

    def forward(self, x, mask):
        return self.body(torch.cat((x.flatten(1), mask.flatten(1)), 1)).softmax(1)


def rows(n=3, d=4, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def fast(x, generator, **options):
    made = FastSHAPKL(Net(x.shape[1], dtype=x.dtype), 8, epochs=2, generator=generator, **options)
    return made.fit(x).attribute(x)


def fitted(**options):
    return MaskedPredictor(4, epochs=1, generator=0, **options).fit(rows(), torch.tensor([0, 1, 1]))


def half(x, mask):
    return torch.full((len(x), 2), 0.5, dtype=x.dtype)


EXAMPLE = Example(
    model=lambda: Net(dtype=torch.float32),
    with_model=lambda model, generator, dtype: shap_kl(
        model, rows(dtype=dtype), n_samples=30, generator=generator
    ),
    chunked=lambda size: shap_kl(Oracle(Net(), chunk_size=size), rows()),
    refusals=(
        (lambda: shap_kl(lambda x, m: x, rows()), "the model's answer has values"),
        (lambda: shap_kl(half, rows().long()), "x has dtype"),
        (lambda: shap_kl(half, rows(), n_samples=1), "n_samples is 1"),
        (lambda: shap_kl(half, rows(), parts=torch.tensor([0, 1])), "parts has shape"),
        (lambda: shap_kl(half, rows(), parts=torch.tensor([0, 0, 2, 2])), "parts has shape"),
        (lambda: FastSHAPKL(half, 0), "hidden is 0"),
        (lambda: FastSHAPKL(half, n_masks=1), "n_masks is 1"),
        (lambda: FastSHAPKL(half, lr=0.0), "lr is 0"),
        (lambda: FastSHAPKL(half).attribute(rows()), "nothing is fitted"),
        (lambda: FastSHAPKL(half).fit(rows(d=1)), "number of parts is 1"),
        (
            lambda: fast(rows(), 0) and FastSHAPKL(half, epochs=1).fit(rows()).attribute(rows(d=3)),
            "x has shape",
        ),
        (lambda: MaskedPredictor(epochs=0), "epochs is 0"),
        (lambda: MaskedPredictor(weight_decay=-1.0), "weight_decay is -1"),
        (lambda: MaskedPredictor()(rows(), rows()), "nothing is fitted"),
        (lambda: fitted()(rows(), rows(2)), "mask has shape"),
        (lambda: MaskedPredictor().fit(rows(), rows()), "y has values"),
        (lambda: MaskedPredictor().fit(rows(), torch.tensor([0, 1])), "y has shape"),
        (lambda: inclusion_exclusion(half, rows(), rows(), torch.tensor([0, 1, 2])), "y holds labels"),
        (lambda: inclusion_exclusion(half, rows(), rows(d=3), torch.tensor([0, 1, 1])), "scores has shape"),
        (
            lambda: inclusion_exclusion(half, rows(), rows(), torch.tensor([0, 1, 1]), fractions=[0.0]),
            "fractions is 0",
        ),
        (lambda: leakage(lambda x, c: x, half, rows(), fraction=2.0), "fraction is 2"),
        (lambda: leakage(lambda x, c: x[:1], half, rows()), "the explanation has shape"),
    ),
    stochastic=True,
)


def value(net, x, keep):
    """-KL of one row, written out."""
    mask = torch.tensor([float(i in keep) for i in range(x.shape[1])], dtype=x.dtype)[None]
    with torch.no_grad():
        p, q = net(x, torch.ones_like(x))[0], net(x * mask, mask)[0]
    return -float((p * (p / q).log()).sum())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scores_are_averages_over_all_orders(seed):
    net, x = Net(seed=seed).eval(), rows(2, seed=seed + 5)
    found = shap_kl(net, x)
    for i in range(2):
        expected = torch.zeros(4, dtype=torch.float64)
        for order in itertools.permutations(range(4)):
            for place, part in enumerate(order):
                gain = value(net, x[i : i + 1], order[: place + 1]) - value(net, x[i : i + 1], order[:place])
                expected[part] += gain / 24
        torch.testing.assert_close(found.values[i], expected, rtol=1e-9, atol=1e-12)
        assert float(found.extras["empty"][i]) == pytest.approx(value(net, x[i : i + 1], ()), rel=1e-12)
    assert found.cost.nfev == 2 * (16 + 2)


@pytest.mark.parametrize(("d", "n_samples"), [(5, None), (13, None), (5, 50)])
def test_scores_add_up_to_the_divergence_from_the_empty_prediction(d, n_samples):
    net, x = Net(d).eval(), rows(3, d)
    found = shap_kl(net, x, n_samples=n_samples, generator=0)
    with torch.no_grad():
        p, q = net(x, torch.ones_like(x)), net(torch.zeros_like(x), torch.zeros_like(x))
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(found.values.sum(1), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-found.extras["empty"], expected, rtol=1e-9, atol=1e-12)
    assert found.extras["full"].abs().max() == 0


def test_dummies_get_nothing_and_twins_the_same():
    def model(x, mask):
        known = x * mask
        return torch.stack((known[:, 0] + known[:, 1], known[:, 2], 0 * known[:, 0]), 1).softmax(1)

    x = rows(4)
    x[:, 1] = x[:, 0]
    found = shap_kl(model, x).values
    torch.testing.assert_close(found[:, 0], found[:, 1], rtol=1e-10, atol=1e-12)
    assert float(found[:, 3].abs().max()) < 1e-12
    assert float(found[:, 2].abs().max()) > 1e-3


def test_the_scores_do_not_change_when_classes_are_renamed():
    net, x = Net().eval(), rows()
    other = shap_kl(lambda z, m: net(z, m)[:, [2, 0, 1]], x)
    torch.testing.assert_close(other.values, shap_kl(net, x).values, rtol=1e-9, atol=1e-12)


def test_drawn_subsets_come_near_all_of_them():
    net, x = Net(6).eval(), rows(3, 6)
    exact, errors = shap_kl(net, x).values, []
    for n in (100, 6400):
        found = [shap_kl(net, x, n_samples=n, generator=seed).values for seed in range(4)]
        errors.append(float(torch.stack([(f - exact).square().mean() for f in found]).mean().sqrt()))
    assert errors[1] < 0.25 * errors[0]  # 1/8 is expected
    assert errors[1] < 0.05 * float(exact.std())


def test_parts_are_masked_together():
    net, x = Net(6).eval(), rows(2, 6).reshape(2, 2, 3)
    parts = torch.tensor([0, 1, 1])
    found = shap_kl(net, x, parts=parts)
    for row, scores in zip(x, found.values, strict=True):

        def grouped(z, mask, row=row):
            keep = mask[:, [0, 1, 1, 0, 1, 1]]
            return net(row.flatten() * keep, keep)

        expected = shap_kl(grouped, torch.ones(1, 2, dtype=x.dtype)).values[0]
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-12)


def test_certain_predictions_have_finite_scores():
    def model(x, mask):
        p = (mask[:, 0] > 0).to(x.dtype)
        return torch.stack((1 - p, p), 1)

    found = shap_kl(model, rows()).values
    assert bool(found.isfinite().all())
    assert float(found[:, 0].min()) > 100  # from one certainty to the other


def test_the_predictor_learns_the_conditional_distribution():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (4000, 2), generator=g).double()
    x[:, 1] = torch.where(torch.rand(4000, generator=g) < 0.8, x[:, 0], 1 - x[:, 0])
    p = 0.1 + 0.5 * x[:, 0] + 0.3 * x[:, 1]
    soft = torch.stack((1 - p, p), 1)
    predictor = MaskedPredictor(32, epochs=60, lr=0.01, batch_size=256, generator=1).fit(x, soft)
    asked = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    masks = torch.tensor([[1.0, 1], [1, 0], [0, 1], [0, 0]], dtype=torch.float64)
    found = predictor(asked, masks)[:, 1]
    expected = torch.tensor([0.6, 0.6 + 0.3 * 0.8, 0.1 + 0.5 * 0.2, 0.5], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)
    hidden = torch.where(masks > 0, asked, torch.full_like(asked, 7.0))
    torch.testing.assert_close(predictor(hidden, masks)[:, 1], found, rtol=0, atol=0)


def test_labels_are_learned_like_their_shares():
    x = torch.zeros(300, 1)
    y = (torch.arange(300) % 3 == 0).long()
    p = MaskedPredictor(8, epochs=60, lr=0.01, generator=0).fit(x, y)(x[:1], x[:1])
    assert float(p[0, 1]) == pytest.approx(1 / 3, abs=0.02)


def test_fast_scores_learn_the_exact_ones():
    net, x = Net(4).eval(), rows(500, 4)
    made = FastSHAPKL(net, 64, epochs=150, lr=3e-3, batch_size=100, n_masks=6, generator=0).fit(x)
    for asked, most in ((x[:100], 0.1), (rows(200, 4, seed=9), 0.3)):
        exact, found = shap_kl(net, asked).values, made.attribute(asked).values
        error = (found - exact).square().mean() / (exact - exact.mean(0)).square().mean()
        assert float(error) < most
        torch.testing.assert_close(found.sum(1), exact.sum(1), rtol=1e-9, atol=1e-10)


def by_first(x, mask):
    """Class 1 with chance 0.9 where the first element is one, 0.1 where it is zero, 0.5 where it is not known."""
    p = torch.where(mask[:, 0] > 0, 0.1 + 0.8 * x[:, 0], torch.full_like(x[:, 0], 0.5))
    return torch.stack((1 - p, p), 1)


def test_curves_by_hand():
    x = torch.tensor([[1.0, 0.3], [0.0, 0.3], [1.0, 0.3], [0.0, 0.3]], dtype=torch.float64)
    y = torch.tensor([1, 0, 0, 0])
    first = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    found = inclusion_exclusion(by_first, x, first, y, fractions=[0.5, 1.0])
    known = -(3 * math.log(0.9) + math.log(0.1)) / 4
    assert found.inclusion["log_loss"].tolist() == pytest.approx([known, known])
    assert found.exclusion["log_loss"].tolist() == pytest.approx([math.log(2)] * 2)
    assert found.inclusion["accuracy"].tolist() == [0.75, 0.75]
    area = roc_auc_score(y, by_first(x, torch.ones_like(x))[:, 1])
    assert found.inclusion["auroc"].tolist() == pytest.approx([area, area])
    assert found.exclusion["auroc"].tolist() == pytest.approx([0.5, 0.5])
    second = inclusion_exclusion(by_first, x, 1 - first, y, fractions=[0.5])
    assert second.inclusion["log_loss"].tolist() == pytest.approx([math.log(2)])
    assert second.exclusion["log_loss"].tolist() == pytest.approx([known])
    assert found.cost.nfev == 4 * 5


def test_area_of_several_classes_is_scikit_learns():
    net, x = Net().eval(), rows(40)
    y = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(2))
    found = inclusion_exclusion(net, x, x, y, fractions=[1.0]).inclusion["auroc"]
    with torch.no_grad():
        p = net(x, torch.ones_like(x))
    expected = roc_auc_score(y, p, multi_class="ovr", average="macro")
    assert float(found) == pytest.approx(expected)


def test_leakage_by_hand():
    def evaluator(x, mask):  # each known element adds 2 to its own class
        return (2 * mask).softmax(1)

    x = torch.ones(3, 2, dtype=torch.float64)
    sure = math.exp(2) / (math.exp(2) + 1)

    def own(z, target):
        return nn.functional.one_hot(target, 2).double()

    assert leakage(own, evaluator, x, fraction=0.5) == pytest.approx(sure - 0.5)
    assert leakage(lambda z, c: 1 - own(z, c), evaluator, x, fraction=0.5) == 0.0
    same = leakage(lambda z, c: own(z, torch.zeros_like(c)), evaluator, x, fraction=0.5)
    assert same == pytest.approx((sure - 0.5) / 2)  # one class gains what the other loses
    assert leakage(own, evaluator, x, fraction=1.0) == 0.0
