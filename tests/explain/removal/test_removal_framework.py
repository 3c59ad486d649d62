"""Oracles of the removal framework: closed forms of linear models, identities between summaries, and the libraries."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import perturbkit.explain as explain
from _common import Example
from perturbkit.core import Oracle, all_masks
from perturbkit.explain import (
    RBX_METHODS,
    Banzhaf,
    Blur,
    ConditionalGaussian,
    DatasetLoss,
    DefaultRemoval,
    HighValueSubset,
    IncludeIndividual,
    LinearModel,
    LowValueSubset,
    MarginalRemoval,
    MeanLabel,
    MeanWhenIncluded,
    Output,
    PartitionedSubsets,
    Prediction,
    PredictionLoss,
    ProductMarginalRemoval,
    RemovalExplainer,
    RemoveIndividual,
    RetrainRemoval,
    Shapley,
    SurrogateRemoval,
    TreePathRemoval,
    UniformRemoval,
)
from perturbkit.explain.removal._parts import kernel_masks, shapley_kernel


def network(d=5, k=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, k), nn.Softmax(1)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def table(n=3, d=5, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(n, d, rho, seed):
    z = table(n, d, seed)
    return z @ torch.linalg.cholesky(torch.full((d, d), rho).double() + (1 - rho) * torch.eye(d).double()).T


def explainer(removal=None, behaviour=None, summary=None, **options):
    return RemovalExplainer(
        removal or MarginalRemoval(table(6, seed=9)),
        behaviour or Prediction(),
        summary or Shapley(),
        **options,
    )


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: explainer(
        ConditionalGaussian(table(20, dtype=dtype), n_samples=3), summary=Shapley(7)
    ).attribute(model, table(dtype=dtype), 1, generator=generator),
    chunked=lambda size: explainer().attribute(Oracle(network(), chunk_size=size), table(), 0, generator=3),
    refusals=(
        (lambda: explainer(Prediction()).attribute(network(), table(), 0), "removal is Prediction"),
        (
            lambda: explainer(MarginalRemoval(table(4, 3))).attribute(network(), table(), 0),
            "background has shape",
        ),
        (
            lambda: explainer(DefaultRemoval(torch.ones(4))).attribute(network(), table(), 0),
            "baseline has shape",
        ),
        (lambda: explainer().attribute(network(), table()), "target is None"),
        (lambda: explainer().attribute(network(), table(), 3), "target is 3"),
        (lambda: explainer(behaviour=PredictionLoss()).attribute(network(), table(), 1), "y is None"),
        (
            lambda: explainer(behaviour=MeanLabel()).attribute(network()[:-1], table(), 1),
            "outputs reach",
        ),
        (lambda: explainer(behaviour=MeanLabel("hinge")).attribute(network(), table()), "loss is 'hinge'"),
        (lambda: explainer(parts=torch.ones(4).long()).attribute(network(), table(), 0), "parts has shape"),
        (lambda: explainer(summary=Shapley(1)).attribute(network(), table(), 0), "n_samples is 1"),
        (
            lambda: explainer(summary=Shapley(estimator="x")).attribute(network(), table(), 0),
            "estimator is 'x'",
        ),
        (
            lambda: explainer(summary=LinearModel(weights="x")).attribute(network(), table(), 0),
            "weights is 'x'",
        ),
        (lambda: explainer(summary=LinearModel(ridge=-1)).attribute(network(), table(), 0), "ridge is -1"),
        (lambda: explainer(summary=MeanWhenIncluded(keep=0)).attribute(network(), table(), 0), "keep is 0"),
        (lambda: explainer(summary=LowValueSubset(6)).attribute(network(), table(), 0), "size is 6"),
        (lambda: explainer(summary=HighValueSubset(None)).attribute(network(), table(), 0), "size is None"),
        (
            lambda: explainer(DefaultRemoval(), summary=LowValueSubset(20)).attribute(
                network(40), table(1, 40), 0
            ),
            "size is 20 with 40 parts",
        ),
    ),
    stochastic=True,
)


def brute_shapley(u, d):
    """Average marginal contributions over all orders of parts, in plain Python."""
    phi = np.zeros(d)
    for order in itertools.permutations(range(d)):
        kept = []
        for i in order:
            phi[i] += u(frozenset([*kept, i])) - u(frozenset(kept))
            kept.append(i)
    return phi / math.factorial(d)


def mixed(net, x, background, label):
    """Return the set function of marginal removal, computed one subset at a time."""

    def u(kept):
        z = background.clone()
        z[:, list(kept)] = x[list(kept)]
        with torch.no_grad():
            return float(net(z)[:, label].mean())

    return u


@pytest.mark.parametrize("summary", [Shapley(), Shapley(estimator="kernel"), LinearModel(weights="shapley")])
def test_linear_model_under_marginal_removal(summary):
    w, background, x = table(1, 6, 2)[0], table(30, 6, 3), table(4, 6, 4)
    found = explainer(MarginalRemoval(background), summary=summary).attribute(lambda z: z @ w + 2, x)
    torch.testing.assert_close(found.values, w * (x - background.mean(0)), rtol=1e-9, atol=1e-9)
    assert found.cost.nfev >= 4 * 2**6 * 30


@pytest.mark.parametrize("seed", [0, 1])
def test_shapley_equals_orders_by_brute_force(seed):
    net, x, background = network(seed=seed), table(seed=seed + 3), table(6, seed=9)
    expected = np.stack([brute_shapley(mixed(net, row, background, 2), 5) for row in x])
    for summary in (Shapley(), Shapley(estimator="kernel")):
        found = explainer(summary=summary).attribute(net, x, 2)
        np.testing.assert_allclose(found.values.numpy(), expected, rtol=0, atol=1e-10)
        total = found.extras["full"] - found.extras["empty"]
        torch.testing.assert_close(found.values.sum(1), total, rtol=0, atol=1e-10)


def test_banzhaf_is_the_uniform_linear_model_and_the_mean_difference():
    net, x = network(seed=4), table(seed=5)
    banzhaf, linear = (
        explainer(summary=s).attribute(net, x, 1).values for s in (Banzhaf(), LinearModel(weights="uniform"))
    )
    torch.testing.assert_close(banzhaf, linear, rtol=0, atol=1e-8)
    u = mixed(net, x[0], table(6, seed=9), 1)
    others = [frozenset(s) for n in range(5) for s in itertools.combinations([0, 1, 3, 4], n)]
    by_hand = np.mean([u(s | {2}) - u(s) for s in others])
    assert float(banzhaf[0, 2]) == pytest.approx(by_hand, abs=1e-10)


@pytest.mark.parametrize("keep", [0.5, 0.2, 1.0])
def test_mean_when_included_by_hand(keep):
    net, x = network(), table(1)
    found = explainer(summary=MeanWhenIncluded(keep=keep)).attribute(net, x, 1).values[0]
    u = mixed(net, x[0], table(6, seed=9), 1)
    for i in range(5):
        others = [j for j in range(5) if j != i]
        subsets = [s for n in range(5) for s in itertools.combinations(others, n)]
        mean = sum(keep ** len(s) * (1 - keep) ** (4 - len(s)) * u({i, *s}) for s in subsets)
        assert float(found[i]) == pytest.approx(mean, abs=1e-10)


def test_individual_removal_and_inclusion_by_hand():
    net, x = network(), table(2)
    remove, include = (
        explainer(summary=s).attribute(net, x, 0).values for s in (RemoveIndividual(), IncludeIndividual())
    )
    u = mixed(net, x[1], table(6, seed=9), 0)
    for i in range(5):
        assert float(remove[1, i]) == pytest.approx(u(set(range(5))) - u(set(range(5)) - {i}), abs=1e-12)
        assert float(include[1, i]) == pytest.approx(u({i}) - u(set()), abs=1e-12)


def test_subset_searches_by_hand():
    net, x = network(seed=2), table(2, seed=7)
    u = mixed(net, x[0], table(6, seed=9), 1)
    whole = set(range(5))
    pairs = list(itertools.combinations(range(5), 2))
    cases = [
        (LowValueSubset(2), min(pairs, key=lambda s: u(whole - set(s)))),
        (HighValueSubset(2), max(pairs, key=lambda s: u(set(s)))),
        (PartitionedSubsets(2, 0.5), max(pairs, key=lambda s: u(set(s)) - 0.5 * u(whole - set(s)))),
    ]
    for summary, best in cases:
        found = explainer(summary=summary).attribute(net, x, 1).values[0]
        assert set(found.nonzero()[:, 0].tolist()) == set(best)
    subsets = [s for n in range(6) for s in itertools.combinations(range(5), n)]
    level = sorted(u(s) for s in subsets)[-6]
    good = [s for s in subsets if u(s) >= level - 1e-12]
    best = max((s for s in good if len(s) == min(map(len, good))), key=u)
    found = explainer(summary=HighValueSubset(None, level - 1e-12)).attribute(net, x, 1).values[0]
    assert set(found.nonzero()[:, 0].tolist()) == set(best)
    assert bool((explainer(summary=HighValueSubset(None, 2.0)).attribute(net, x, 1).values == 1).all())


@pytest.mark.parametrize(
    ("sampled", "exact"),
    [
        (Shapley(4000), Shapley()),
        (Shapley(4000, "kernel"), Shapley()),
        (Banzhaf(20000), Banzhaf()),
        (MeanWhenIncluded(20000, 0.3), MeanWhenIncluded(keep=0.3)),
        (LinearModel(20000), LinearModel()),
    ],
)
def test_sampling_approaches_enumeration(sampled, exact):
    net, x = network(seed=3), table(2, seed=6)
    a, b = (
        explainer(DefaultRemoval(), summary=s).attribute(net, x, 0, generator=4).values
        for s in (sampled, exact)
    )
    torch.testing.assert_close(a, b, rtol=0, atol=0.02)


def test_kernel_masks_follow_the_kernel_in_pairs():
    masks = kernel_masks(5, 40000, torch.Generator().manual_seed(0))
    assert bool((masks[::2] ^ masks[1::2]).all())
    every = all_masks(5).double()
    chance = shapley_kernel(every) / shapley_kernel(every).sum()
    number = (masks.long() * 2 ** torch.arange(5)).sum(1)
    share = torch.bincount(number, minlength=32) / 40000
    torch.testing.assert_close(share.double(), chance, rtol=0, atol=0.006)
    by_hand = [0 if s in (0, 5) else 4 / (math.comb(5, s) * s * (5 - s)) for s in map(int, every.sum(1))]
    torch.testing.assert_close(shapley_kernel(every), torch.tensor(by_hand).double())


@pytest.mark.parametrize("seed", [0, 2])
def test_marginal_shapley_agrees_with_shap(seed):
    shap = pytest.importorskip("shap", reason="shap is an extra of the benchmarks")
    net, x, background = network(seed=seed), table(3, seed=seed), table(12, seed=8)

    def ask(z):
        with torch.no_grad():
            return net(torch.as_tensor(z, dtype=torch.float64))[:, 1].numpy()

    exact = shap.explainers.Exact(ask, shap.maskers.Independent(background.numpy(), max_samples=12))(
        x.numpy()
    )
    for removal, behaviour, summary in (RBX_METHODS["KernelSHAP"], (MarginalRemoval, Prediction, Shapley())):
        found = (
            RemovalExplainer(removal(background), behaviour(), summary).attribute(net, x, 1).values.numpy()
        )
        np.testing.assert_allclose(found, exact.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("forest", [False, True])
@pytest.mark.parametrize("classes", [False, True])
def test_tree_paths_agree_with_shap(forest, classes):
    shap = pytest.importorskip("shap", reason="shap is an extra of the benchmarks")
    from sklearn import ensemble, tree

    x = table(60, 5, 3)
    y = (x[:, 0] * x[:, 1] + x[:, 2]).numpy()
    kind = {
        (False, False): tree.DecisionTreeRegressor, (False, True): tree.DecisionTreeClassifier,
        (True, False): ensemble.RandomForestRegressor, (True, True): ensemble.RandomForestClassifier,
    }[forest, classes]  # fmt: skip
    options = {"n_estimators": 4} if forest else {}
    fitted = kind(max_depth=4, random_state=0, **options).fit(x.numpy(), y > 0 if classes else y)
    expected = shap.TreeExplainer(fitted, feature_perturbation="tree_path_dependent").shap_values(
        x[:3].numpy()
    )
    if classes:
        expected = expected[..., 1]
    found = explainer(TreePathRemoval(fitted)).attribute(None, x[:3], 1 if classes else None)
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=0, atol=1e-6)
    assert found.cost.nfev == 0


def test_the_linear_model_agrees_with_lime_on_the_same_masks():
    base = pytest.importorskip("lime.lime_base", reason="lime is an extra of the benchmarks")
    net, x, d = network(), table(1), 5
    masks = all_masks(d)[1:].double()  # the empty mask has no cosine distance in scikit-learn
    with torch.no_grad():
        values = net(x * masks)[:, 1].numpy()
    distances = 1 - masks.mean(1).sqrt().numpy()
    lime = base.LimeBase(lambda t: np.sqrt(np.exp(-(t**2) / 0.25**2)), random_state=0)
    _, weights, _, _ = lime.explain_instance_with_data(
        masks.numpy(), values[:, None], distances, 0, d, feature_selection="none"
    )
    expected = torch.tensor([w for _, w in sorted(weights)])
    found = explainer(DefaultRemoval(), summary=LinearModel(ridge=1.0)).attribute(net, x, 1)
    # The empty mask, at distance 1, has weight exp(-8).
    torch.testing.assert_close(found.values[0], expected, rtol=0, atol=2e-4)


def test_permutation_test_and_its_library():
    from sklearn.inspection import permutation_importance
    from sklearn.linear_model import LinearRegression

    x = table(40, 3, 5)
    y = x @ torch.tensor([1.0, -2.0, 0.5]).double() + 0.1 * table(40, 1, 6)[:, 0]
    fitted = LinearRegression().fit(x.numpy(), y.numpy())
    w, b = torch.tensor(fitted.coef_), float(fitted.intercept_)
    expected = permutation_importance(
        fitted, x.numpy(), y.numpy(), n_repeats=400, random_state=0, scoring="neg_mean_squared_error"
    ).importances_mean
    # The loss of each replaced row, averaged after the loss as the test does, one background row at a time.
    found = torch.stack(
        [
            explainer(MarginalRemoval(x[i : i + 1]), DatasetLoss("squared"), RemoveIndividual())
            .attribute(lambda z: z @ w + b, x, y=y)
            .values[0]
            for i in range(len(x))
        ]
    ).mean(0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0.06)


def test_behaviours_by_hand():
    net, x, y = network(), table(4), torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        whole, none = net(x), net(torch.zeros(1, 5).double())[0]
    cases = [
        (PredictionLoss(), whole[range(4), y].log(), none[y].log()),
        (MeanLabel(), (whole * whole.log()).sum(1), (whole * none.log()).sum(1)),
        (MeanLabel("squared"), torch.zeros(4).double(), -(whole - none).square().sum(1)),
        (DatasetLoss(), whole[range(4), y].log().mean()[None], none[y].log().mean()[None]),
        (Output(), (whole * whole.log()).sum(1).mean()[None], (whole * none.log()).sum(1).mean()[None]),
    ]
    for behaviour, full, empty in cases:
        found = explainer(DefaultRemoval(), behaviour).attribute(net, x, y=y)
        torch.testing.assert_close(found.extras["full"], full)
        torch.testing.assert_close(found.extras["empty"], empty)
        assert found.values.shape == (len(full), 5)


def test_conditional_gaussian_is_the_conditional_distribution():
    background, x = correlated(300, 4, 0.7, 1), table(2, 4, 2)
    mean, cov = background.mean(0), torch.cov(background.T)
    known, unknown = [0, 2], [1, 3]
    gain = cov[unknown][:, known] @ torch.linalg.inv(cov[known][:, known])
    expected = mean[unknown] + gain @ (x[0, known] - mean[known])
    spread = cov[unknown][:, unknown] - gain @ cov[known][:, unknown]
    keep = torch.tensor([[True, False, True, False]])
    g = torch.Generator().manual_seed(0)
    exact = ConditionalGaussian(background, n_samples=0).drawn(x, g).copies(x[0], keep)[0]
    torch.testing.assert_close(exact[0, unknown], expected, rtol=1e-7, atol=1e-7)
    draws = ConditionalGaussian(background, n_samples=20000).drawn(x, g).copies(x[0], keep)[0]
    assert bool((draws[:, known] == x[0, known]).all())
    torch.testing.assert_close(draws[:, unknown].mean(0), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(draws[:, unknown].T), spread, rtol=0, atol=0.02)
    diagonal = ConditionalGaussian(background, n_samples=0, shrinkage=1.0).drawn(x, g).copies(x[0], keep)[0]
    torch.testing.assert_close(diagonal[0, unknown], mean[unknown])


def test_uniform_and_product_removals_have_their_means():
    w, x = table(1, 4, 3)[0], table(2, 4, 4)
    background = table(50, 4, 5)
    cases = [
        (
            UniformRemoval(-1.0, torch.tensor([1.0, 2, 3, 5]).double(), 20000),
            torch.tensor([0, 0.5, 1, 2]).double(),
        ),
        (ProductMarginalRemoval(background, 20000), background.mean(0)),
    ]
    for removal, mean in cases:
        found = explainer(removal, summary=RemoveIndividual()).attribute(lambda z: z @ w, x, generator=0)
        torch.testing.assert_close(found.values, w * (x - mean), rtol=0, atol=0.08)
    drawn = ProductMarginalRemoval(background, 20000).drawn(x, torch.Generator().manual_seed(1)).background
    paired = correlated(2000, 2, 0.95, 6)
    apart = (
        ProductMarginalRemoval(paired, 20000).drawn(paired[:1], torch.Generator().manual_seed(1)).background
    )
    assert abs(float(torch.corrcoef(apart.T)[0, 1])) < 0.03
    assert set(drawn[:, 0].tolist()) <= set(background[:, 0].tolist())


def test_retraining_decomposes_the_explained_variance():
    from sklearn.linear_model import LinearRegression

    x = correlated(50, 3, 0.6, 2)
    y = x @ torch.tensor([1.0, -1.0, 2.0]).double() + table(50, 1, 3)[:, 0]

    def explained(kept):
        design = np.column_stack([np.ones(50), x[:, sorted(kept)].numpy()])
        rest = y.numpy() - design @ np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
        return -np.mean(rest**2)

    for name in ("Shapley Net Effects", "SPVIM"):
        _, behaviour, summary = RBX_METHODS[name]
        found = explainer(RetrainRemoval(LinearRegression(), x, y), behaviour("squared"), summary)
        values = found.attribute(None, x, y=y).values[0].numpy()
        np.testing.assert_allclose(values, brute_shapley(explained, 3), rtol=0, atol=1e-9)
    left_out = explainer(RetrainRemoval(LinearRegression(), x, y), DatasetLoss("squared"), RemoveIndividual())
    assert float(left_out.attribute(None, x, y=y).values[0, 1]) == pytest.approx(
        explained({0, 1, 2}) - explained({0, 2}), abs=1e-9
    )


def test_retraining_a_classifier_answers_probabilities():
    from sklearn.linear_model import LogisticRegression

    x = table(60, 3, 1)
    y = (x[:, 0] > 0).long()
    found = explainer(RetrainRemoval(LogisticRegression(), x, y), DatasetLoss(), Shapley()).attribute(
        None, x, y=y
    )
    share = float(y.double().mean())
    assert float(found.extras["empty"]) == pytest.approx(
        share * math.log(share) + (1 - share) * math.log(1 - share)
    )
    assert int(found.values.argmax()) == 0


def test_surrogate_sees_the_mask():
    x = table(2, 3, 1)
    found = explainer(SurrogateRemoval(lambda z, m: (z + 10 * (1 - m)).sum(1)), summary=RemoveIndividual())
    torch.testing.assert_close(found.attribute(None, x).values, x - 10)


def test_blur_and_parts_on_images():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 8, 8, generator=g, dtype=torch.float64)
    parts = (torch.arange(8) // 4)[:, None] * 2 + torch.arange(8)[None] // 4
    found = explainer(Blur(1.5), summary=RemoveIndividual(), parts=parts).attribute(
        lambda z: z.flatten(1).sum(1), x
    )
    from scipy.ndimage import gaussian_filter

    blurred = gaussian_filter(x[0, 0].numpy(), 1.5, mode="mirror", radius=5)
    difference = torch.from_numpy(x[0, 0].numpy() - blurred)
    expected = torch.stack([difference[parts == i].sum() for i in range(4)])
    torch.testing.assert_close(found.values[0], expected, rtol=1e-9, atol=1e-9)
    flat = torch.full((1, 1, 8, 8), 0.3).double()
    assert (
        float(
            explainer(Blur(), parts=parts).attribute(lambda z: z.flatten(1).sum(1), flat).values.abs().max()
        )
        < 1e-12
    )


def test_conditional_and_marginal_removal_differ_for_correlated_features_only():
    w, x = torch.tensor([1.0, 0.0]).double(), torch.tensor([[1.0, 1.0]]).double()
    # With correlation rho, E[x_1 | x_2] = rho x_2: the Shapley values of x_1 are (1 - rho / 2, rho / 2).
    background = correlated(4000, 2, 0.9, 3)
    background = (background - background.mean(0)) @ torch.linalg.inv(
        torch.linalg.cholesky(torch.cov(background.T))
    ).T
    for rho in (0.0, 0.9):
        root = torch.linalg.cholesky(torch.tensor([[1, rho], [rho, 1]]).double())
        given = background @ root.T
        found = explainer(ConditionalGaussian(given, 0)).attribute(lambda z: z @ w, x).values[0]
        torch.testing.assert_close(found, torch.tensor([1 - rho / 2, rho / 2]).double(), rtol=0, atol=1e-7)


def test_every_registered_method_is_three_public_choices():
    assert len(RBX_METHODS) >= 26
    x = table(2, 4, 1).reshape(2, 1, 2, 2).abs()
    made = {
        MarginalRemoval: lambda: MarginalRemoval(x), ConditionalGaussian: lambda: ConditionalGaussian(x, 4),
        ProductMarginalRemoval: lambda: ProductMarginalRemoval(x, 4), UniformRemoval: UniformRemoval,
        DefaultRemoval: DefaultRemoval, Blur: lambda: Blur(0.5),
        SurrogateRemoval: lambda: SurrogateRemoval(lambda z, m: z.flatten(1).softmax(1)),
    }  # fmt: skip
    for name, (removal, behaviour, summary) in RBX_METHODS.items():
        for kind in (removal, behaviour, type(summary)):
            assert getattr(explain, kind.__name__) is kind
        if removal in made:
            found = RemovalExplainer(made[removal](), behaviour(), summary).attribute(
                lambda z: z.flatten(1).softmax(1), x, 1, y=torch.tensor([0, 1]), generator=0
            )
            assert bool(found.values.isfinite().all()), name


def test_values_have_the_shape_of_the_input_unless_parts_are_given():
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.arange(1.0, 5.0, dtype=torch.float64)

    def f(z):
        return z.flatten(1) @ w

    found = RemovalExplainer(DefaultRemoval(0.0), Prediction(), Shapley()).attribute(f, x)
    torch.testing.assert_close(found.values, w.reshape(1, 2, 2) * x)
    halves = torch.tensor([[[0, 0], [1, 1]]])
    found = RemovalExplainer(DefaultRemoval(0.0), Prediction(), Shapley(), parts=halves).attribute(f, x)
    torch.testing.assert_close(found.values, (w.reshape(1, 2, 2) * x).sum((1, 3)))
