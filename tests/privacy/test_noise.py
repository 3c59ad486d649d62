"""The sources of noise: exact distributions from both, and which one is secure."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch

from perturbkit.privacy._noise import Noise, gaussian_variance, rational_above


def fits(drawn, mass):
    """A chi-squared test at 1e-6 of integer draws against unnormalised masses on -reach..reach.

    Cells too rare for the test's law (fewer than ten draws expected) are pooled with the rarest of the others: on their
    own, two draws where a tenth was expected would fail a correct sampler once in two hundred runs.
    """
    reach = (len(mass) - 1) // 2
    expected = mass / mass.sum() * len(drawn)
    observed = np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=len(mass))
    order = np.argsort(expected, kind="stable")
    pooled = max(np.searchsorted(expected[order], 10, side="right") + 1, 1)
    seen = np.append(observed[order[pooled:]], observed[order[:pooled]].sum())
    wanted = np.append(expected[order[pooled:]], expected[order[:pooled]].sum())
    return scipy.stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue > 1e-6


@pytest.mark.parametrize("generator", [None, 3])
@pytest.mark.parametrize("scale", [Fraction(1, 3), Fraction(5, 2), Fraction(7000, 1024)])
def test_discrete_laplace_has_its_distribution(generator, scale):
    y = Noise(generator).discrete_laplace(scale, 60000)
    k = np.arange(-400, 401)
    assert fits(y, np.exp(-np.abs(k) / float(scale)))
    assert not fits(y, np.exp(-np.abs(k) / float(scale) * 1.1))


@pytest.mark.parametrize("generator", [None, 4])
@pytest.mark.parametrize("variance", [Fraction(1, 7), Fraction(9, 4), Fraction(300, 1)])
def test_discrete_gaussian_has_its_distribution(generator, variance):
    y = Noise(generator).discrete_gaussian(variance, 60000)
    k = np.arange(-400, 401)
    assert fits(y, np.exp(-(k**2) / (2 * float(variance))))
    assert not fits(y, np.exp(-(k**2) / (2 * float(variance)) * 1.1))


def test_scales_beyond_machine_integers():
    y = Noise(5).discrete_gaussian(Fraction(10**13 + 1, 3), 400)
    assert scipy.stats.kstest(y / np.sqrt((10**13 + 1) / 3), "norm").pvalue > 1e-4


def test_both_paths_of_the_gaussian_sampler_agree():
    machine = Noise(6).discrete_gaussian(Fraction(40, 1), 4000)
    large = Noise(7)
    top = 10**30  # the same fraction, unreduced, in integers of any size
    kept = [large._bernoulli_exp_int(3 * top, 2 * top) for _ in range(4000)]
    assert abs(np.mean(kept) - np.exp(-1.5)) < 4 * np.sqrt(0.22 * 0.78 / 4000)
    assert abs(machine.var() / 40 - 1) < 0.12


@pytest.mark.parametrize("bound", [1, 3, 2**40 + 1, 2**62 + 1])
def test_uniform_integers(bound):
    source = Noise(8)
    drawn = source.below(np.full(20000, bound))
    assert drawn.min() >= 0
    assert drawn.max() < bound
    if bound > 3:
        assert scipy.stats.kstest(drawn / bound, "uniform").pvalue > 1e-4
    if bound == 3:
        assert fits(drawn, np.array([0.0, 0.0, 1.0, 1.0, 1.0]))
    large = [source.below_int(bound) for _ in range(200)]
    assert max(large) < bound
    assert len(set(large)) >= min(bound, 3)


def test_continuous_draws():
    source = Noise(9)
    assert scipy.stats.kstest(source.normal((50000,)), "norm").pvalue > 1e-4
    assert scipy.stats.kstest(source.laplace((50000,)), "laplace").pvalue > 1e-4
    assert scipy.stats.kstest(source.exponential((50000,)), "expon").pvalue > 1e-4
    u = source.uniform((5, 4))
    assert u.shape == (5, 4)
    assert ((u > 0) & (u < 1)).all()
    units = source.direction(4000, 3)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1)
    # On the sphere in three dimensions each coordinate is uniform.
    assert scipy.stats.kstest(units[:, 2], "uniform", args=(-1, 2)).pvalue > 1e-4


def test_the_secure_source_is_the_default_and_repeats_nothing():
    assert Noise().secure
    assert not Noise(0).secure
    assert not np.array_equal(Noise().words(8), Noise().words(8))
    assert np.array_equal(Noise(1).words(8), Noise(torch.Generator().manual_seed(1)).words(8))


def test_words_use_all_bits():
    for source in (Noise(), Noise(2)):
        words = source.words(4000)
        for bit in range(64):
            share = ((words >> np.uint64(bit)) & np.uint64(1)).mean()
            assert abs(share - 0.5) < 5 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize("value", [1e-9, 0.1, 1.0, 3.7, 12345.678, 1e9])
def test_scales_are_rounded_up(value):
    for found in (rational_above(value), gaussian_variance(value)):
        assert found >= Fraction(value)
        assert float(found) <= max(value * 1.001, value + 1 / 1024)
