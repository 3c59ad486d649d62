"""Oracles of stratified LIME: unbiased weights by enumeration, linear functions, and the lime package on the same masks."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Oracle, all_masks
from perturbkit.explain import deficit, lime_stratified, stratified_masks
from perturbkit.explain.removal.lime_stratified import _kernel, _weights


def network(channels=3, side=6, k=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * (side - 2) ** 2, k))
    net = nn.Sequential(net, nn.Softmax(1)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype) / 3
    return net


def images(n=2, channels=3, seed=1, dtype=torch.float64):
    return torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blocks(size=2):
    line = torch.arange(6) // size
    return line[:, None] * (6 // size) + line[None]


def linear(x, coefficients):
    """A function that is linear in the masks of 2x2 blocks: the share of each block's first pixel that is left."""
    first = x[:, 0, ::2, ::2].flatten(1)

    def f(z):
        return (z[:, 0, ::2, ::2].flatten(1) / first[0] * coefficients).sum(1) + 0.7

    return f


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: lime_stratified(
        model, images(dtype=dtype), 1, segments=blocks(), n_samples=40, generator=generator
    ),
    chunked=lambda size: lime_stratified(
        Oracle(network(), chunk_size=size), images(), 0, segments=blocks(), n_samples=30, generator=3
    ),
    refusals=(
        (lambda: lime_stratified(network(), images(), 0, segments=1), "segments is 1"),
        (lambda: lime_stratified(network(), images(), 0, segments=blocks()[:5]), "segments has shape"),
        (lambda: lime_stratified(network(), images(), 0, segments=blocks().float()), "segments has shape"),
        (lambda: lime_stratified(network(), images(), 0, sampling="halton"), "sampling is 'halton'"),
        (lambda: lime_stratified(network(), images(), 0, n_samples=1), "n_samples is 1"),
        (lambda: lime_stratified(network(), images(), 0, kernel_width=0.0), "kernel_width is 0"),
        (lambda: lime_stratified(network(), images(), 0, ridge=-1.0), "ridge is -1"),
        (
            lambda: lime_stratified(
                network(), images(), 0, segments=blocks(), n_samples=5, masks=torch.ones(5, 4)
            ),
            "masks has shape",
        ),
        (lambda: stratified_masks(0, 3), "n_features is 0"),
        (lambda: deficit(torch.ones(1)), "number of outputs in y is 1"),
    ),
    stochastic=True,
)


@pytest.mark.parametrize("n", [1, 4, 9, 12])
def test_weights_undo_the_strata_exactly(n):
    every = all_masks(n, like=torch.zeros((), dtype=torch.float64))
    size = every.sum(1)
    choose = torch.tensor([math.comb(n, int(k)) for k in size]).double()
    chance = 1 / ((n + 1) * choose)  # the integral of q^k (1 - q)^(n - k)
    g = torch.randn(2**n, generator=torch.Generator().manual_seed(n)).double()
    w = _weights(every > 0)
    torch.testing.assert_close((chance * w * g).sum(), g.mean(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((chance * w).sum(), torch.ones(()).double(), rtol=1e-10, atol=0)


def test_sizes_are_uniform_and_weights_have_mean_one():
    masks, weights = stratified_masks(6, 40000, generator=0)
    shares = torch.bincount(masks.sum(1).long(), minlength=7) / 40000
    torch.testing.assert_close(shares, torch.full((7,), 1 / 7), rtol=0, atol=0.01)
    assert float(weights.mean()) == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(masks.mean(0), torch.full((6,), 0.5), rtol=0, atol=0.015)
    expected = torch.tensor([7 * math.comb(6, int(k)) / 64 for k in masks.sum(1)])
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampling", ["stratified", "uniform"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_linear_function_is_recovered(sampling, legacy):
    x, c = images(1), torch.randn(9, generator=torch.Generator().manual_seed(5)).double()
    found = lime_stratified(
        linear(x, c), x, segments=blocks(), sampling=sampling, n_samples=200, ridge=0.0, hide=0.0, legacy=legacy,
        generator=1,
    )  # fmt: skip
    torch.testing.assert_close(found.extras["coefficients"][0], c, rtol=1e-8, atol=1e-8)
    assert float(found.extras["intercept"]) == pytest.approx(0.7, abs=1e-8)
    assert float(found.extras["score"]) == pytest.approx(1.0, abs=1e-10)
    torch.testing.assert_close(found.values, c[blocks()].expand_as(x), rtol=1e-8, atol=1e-8)
    assert found.cost.nfev == 200


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("hide", ["mean", 0.25])
def test_uniform_sampling_agrees_with_lime_on_the_same_masks(seed, hide):
    lime_image = pytest.importorskip("lime.lime_image", reason="lime is an extra of the benchmarks")
    net, x, n = network(seed=seed), images(1, seed=seed + 5), 60
    # The package's masks, as its explainer draws them.
    drawn = np.random.RandomState(seed).randint(0, 2, n * 9).reshape(n, 9)
    drawn[0] = 1

    def predict(batch):
        with torch.no_grad():
            return net(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)).numpy()

    explained = lime_image.LimeImageExplainer(random_state=seed, feature_selection="none").explain_instance(
        x[0].permute(1, 2, 0).numpy(), predict, labels=(1,), top_labels=None, num_samples=n, num_features=9,
        hide_color=None if hide == "mean" else hide, segmentation_fn=lambda image: blocks().numpy(),
        random_seed=seed,
    )  # fmt: skip
    expected = torch.tensor([weight for _, weight in sorted(explained.local_exp[1])])
    found = lime_stratified(
        net,
        x,
        1,
        segments=blocks(),
        sampling="uniform",
        n_samples=n,
        hide=hide,
        masks=torch.from_numpy(drawn),
    )
    torch.testing.assert_close(found.extras["coefficients"][0], expected, rtol=1e-6, atol=1e-8)
    assert float(found.extras["intercept"]) == pytest.approx(float(explained.intercept[1]), abs=1e-8)


def test_both_samplings_estimate_the_same_coefficients():
    net, x, found = network(seed=2), images(1, seed=3), {}
    for sampling in ("stratified", "uniform"):
        runs = [
            lime_stratified(
                net, x, 1, segments=blocks(3), sampling=sampling, n_samples=400, ridge=0.0, generator=seed
            ).extras["coefficients"][0]
            for seed in range(12)
        ]
        found[sampling] = torch.stack(runs)
    means = [found[s].mean(0) for s in ("stratified", "uniform")]
    error = sum(found[s].var(0) / 12 for s in found).sqrt()
    assert bool(((means[0] - means[1]).abs() < 4 * error).all())


def test_the_kernel_by_hand_and_for_the_empty_mask():
    z = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    w = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    # Cosines to the full mask: 1, 1/2 and, undefined, 0 by definition.
    expected = [w_ * math.exp(-(d**2) / 0.25**2) ** 0.5 for w_, d in zip((1, 2, 3), (0, 0.5, 1), strict=True)]
    assert _kernel(z, w, 0.25, False).tolist() == pytest.approx(expected, rel=1e-12)
    legacy = [
        math.exp(-((w_ * d) ** 2) / 0.25**2) ** 0.5 for w_, d in zip((1, 2, 3), (0, 0.5, 1), strict=True)
    ]
    assert _kernel(z, w, 0.25, True).tolist() == pytest.approx(legacy, rel=1e-12)


def test_hidden_superpixels_of_any_size_show_their_mean_colour():
    x, parts, seen = images(1), torch.zeros(6, 6, dtype=torch.int64), []
    parts[0, :2] = 7  # numbers need not follow one another

    def f(z):
        seen.append(z)
        return z.flatten(1).sum(1)

    masks = torch.tensor([[1, 1], [0, 1], [1, 0]])
    lime_stratified(f, x, segments=parts, n_samples=3, masks=masks)
    for shown, hidden in zip(torch.cat(seen)[-2:], (parts == 0, parts == 7), strict=True):
        expected = torch.where(hidden, x[0, :, hidden].mean(1)[:, None, None], x[0])
        torch.testing.assert_close(shown, expected, rtol=1e-12, atol=1e-12)


def test_legacy_weighs_distances():
    options = {"segments": blocks(), "n_samples": 100, "generator": 4}
    right, legacy = (
        lime_stratified(network(), images(), 1, legacy=flag, **options).extras["coefficients"][0]
        for flag in (False, True)
    )
    assert float((right - legacy).abs().max()) > 1e-4


def test_effective_samples_fall_as_the_paper_s_weights_do():
    found = lime_stratified(network(), images(1), 1, segments=36, n_samples=4000, generator=0)
    count = len(found.extras["coefficients"][0])
    share = float(found.extras["effective_samples"]) / 4000
    exact = 1 / sum(
        ((count + 1) * math.comb(count, k) / 2**count) ** 2 / (count + 1) for k in range(count + 1)
    )
    assert share == pytest.approx(exact, rel=0.1)


def test_slic_cuts_an_image_into_connected_numbers_from_zero():
    x = images(2)
    found = lime_stratified(network(), x, 1, segments=6, n_samples=20, generator=0)
    for values, coefficients in zip(found.values, found.extras["coefficients"], strict=True):
        assert 2 <= len(coefficients) <= 12
        assert set(values.unique().tolist()) <= set(coefficients.tolist())


def test_deficit_by_hand():
    found = deficit(torch.tensor([1.0, 0.0, 0.05, 0.5]))
    assert found["range"] == 1.0
    assert found["covered"] == pytest.approx(0.3)
    assert found["gap"] == pytest.approx(1 - 0.55 / 3, abs=1e-6)
    assert found["std"] == pytest.approx(float(torch.tensor([1.0, 0.0, 0.05, 0.5]).std()))
