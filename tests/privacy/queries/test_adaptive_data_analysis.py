"""Oracles of adaptive data analysis: exact means, closed forms of selection, potentials, and attacks on the privacy."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from _common import Example
from perturbkit.core import checks
from perturbkit.privacy import (
    PrivateMultiplicativeWeights,
    StatisticalQueryOracle,
    epsilon_lower_bound,
    freedman_attack,
    generalization_bound,
    max_adaptive_queries,
    zcdp_epsilon,
)
from perturbkit.privacy._noise import Noise, rational_above
from perturbkit.privacy.queries._sparse import RESOLUTION, AboveThreshold, Drawn, whole_values

ROWS = np.random.default_rng(0).uniform(size=(40, 3))
KINDS = np.random.default_rng(1).integers(0, 4, 40)
UNIVERSE = np.eye(4)


def first(rows):
    return rows[:, 0]


def oracle(mechanism="gaussian", n_queries=5, data=ROWS, **options):
    return StatisticalQueryOracle(data, mechanism, n_queries, **options)


def pmw(**options):
    return PrivateMultiplicativeWeights(4, KINDS, **{"alpha": 0.1, "rho": 1.0} | options)


def exhausted(made, query=first):
    for _ in range(made.n_queries + 1):
        made.answer(query)


def used_up():
    made = pmw(rho=math.inf, max_updates=1, alpha=1e-3)
    return [made.answer(query) for query in UNIVERSE]


def call(generator, dtype):
    made = [
        oracle(rho=1.0, generator=generator),
        oracle("laplace", epsilon=1.0, generator=generator),
        oracle("pmw", data=KINDS, universe=UNIVERSE, rho=5.0, generator=generator),
        oracle("thresholdout", train=ROWS[:20], epsilon=1.0, generator=generator),
    ]
    return [m.answer(first) for m in made]


EXAMPLE = Example(
    call=call,
    stochastic=True,
    refusals=(
        (lambda: oracle("median"), "mechanism is 'median'"),
        (lambda: oracle(n_queries=0, rho=1.0), "n_queries is 0"),
        (lambda: oracle("naive", data=np.zeros((0, 3))), "data has 0 rows"),
        (lambda: oracle("split", n_queries=41), "data has 40 rows"),
        (lambda: oracle("naive", rho=1.0), "not private"),
        (lambda: oracle(), "exactly one"),
        (lambda: oracle(rho=1.0, epsilon=1.0), "exactly one"),
        (lambda: oracle(rho=-1.0), "rho is -1"),
        (lambda: oracle(epsilon=1.0), "epsilon is 1.0 for 'gaussian'"),
        (lambda: oracle("laplace", epsilon=0.0), "epsilon is 0"),
        (lambda: oracle("thresholdout", epsilon=1.0), "train is not given"),
        (lambda: oracle("gaussian", rho=1.0, train=ROWS), "train is given"),
        (lambda: oracle("naive", train=ROWS), "train is given"),
        (lambda: oracle("thresholdout", epsilon=1.0, train=ROWS[:0]), "rows of train is 0"),
        (lambda: oracle("pmw", rho=1.0, data=KINDS, universe=[]), "rows of universe is 0"),
        (lambda: oracle("laplace", epsilon=1e-9), "Laplace noise of scale"),
        (lambda: oracle(rho=1e-30), "Gaussian noise of deviation"),
        (lambda: oracle("naive").answer(lambda rows: 0.5), "query answered shape"),
        (lambda: oracle("pmw", rho=1.0, data=KINDS), "universe is not given"),
        (lambda: oracle("pmw", rho=1.0, data=KINDS, universe=UNIVERSE[:2]), "data holds labels from 0 to 3"),
        (lambda: oracle("thresholdout", epsilon=1.0, train=ROWS, threshold=0.0), "threshold is 0"),
        (lambda: oracle("thresholdout", epsilon=1.0, train=ROWS, max_updates=0), "max_updates is 0"),
        (lambda: oracle(rho=1.0, generator="x"), "generator is 'x'"),
        (lambda: oracle(rho=1.0).answer(lambda rows: rows), "query answered shape"),
        (lambda: exhausted(oracle(rho=1.0)), "all 5 queries are answered"),
        (lambda: exhausted(oracle("thresholdout", 9, epsilon=math.inf, train=ROWS[:1] * 0, max_updates=3)), "all 3 times"),
        (lambda: pmw(alpha=0.0), "alpha is 0"),
        (lambda: pmw(max_updates=0), "max_updates is 0"),
        (lambda: pmw(learning_rate=0.0), "learning_rate is 0"),
        (lambda: pmw(rho=None), "exactly one"),
        (lambda: PrivateMultiplicativeWeights(1, KINDS * 0, alpha=0.1, rho=1.0), "n_universe is 1"),
        (lambda: used_up(), "corrections are used up"),
        (lambda: generalization_bound(0, epsilon=1.0), "n is 0"),
        (lambda: generalization_bound(10), "exactly one"),
        (lambda: generalization_bound(10, epsilon=1.0, delta=1.0), "delta is 1"),
        (lambda: generalization_bound(10, epsilon=1.0, failure=0.0), "failure is 0"),
        (lambda: generalization_bound(10, rho=1.0, failure=0.1), "failure is 0.1 with rho"),
        (lambda: max_adaptive_queries(0, 0.1, "naive"), "n is 0"),
        (lambda: max_adaptive_queries(10, 1.0, "naive"), "tau is 1"),
        (lambda: max_adaptive_queries(10, 0.1, "thresholdout"), "mechanism is 'thresholdout'"),
        (lambda: max_adaptive_queries(10, 0.1, "pmw"), "log_universe is None"),
        (lambda: max_adaptive_queries(10, 0.1, "naive", log_universe=3.0), "log_universe is 3"),
        (lambda: freedman_attack(oracle("naive", 3), 3), "oracle has 3 queries left"),
        (lambda: freedman_attack(oracle("naive", 3), 0), "n_features is 0"),
        (lambda: freedman_attack(oracle("naive", 3), 2, cutoff=-1.0), "cutoff is -1"),
    ),
)  # fmt: skip


@pytest.mark.parametrize("options", [
    {"mechanism": "naive"},
    {"mechanism": "laplace", "epsilon": math.inf},
    {"mechanism": "gaussian", "rho": math.inf},
])  # fmt: skip
def test_without_noise_answers_are_means(options):
    made = oracle(**options)
    for j in range(3):
        assert made.answer(lambda rows, j=j: rows[:, j]) == pytest.approx(
            ROWS[:, j].mean(), abs=1 / RESOLUTION
        )
    assert made.answer(lambda rows: rows[:, 0] > 0.5) == (ROWS[:, 0] > 0.5).mean()
    assert made.remaining == 1


def test_split_takes_fresh_rows():
    made = oracle("split", 4)
    for start in range(0, 40, 10):
        assert made.answer(first) == pytest.approx(ROWS[start : start + 10, 0].mean())


def test_values_outside_the_range_are_clipped_without_a_word():
    made = oracle(rho=math.inf)
    assert made.answer(lambda rows: np.full(40, 7.0)) == 1
    assert made.answer(lambda rows: np.full(40, -np.inf)) == 0
    assert made.answer(lambda rows: np.where(np.arange(40) < 10, np.nan, 1.0)) == 0.75
    np.testing.assert_array_equal(whole_values([0.5, 2.0], 2), [RESOLUTION // 2, RESOLUTION])


@pytest.mark.parametrize(("mechanism", "options", "deviation"), [
    ("laplace", {"epsilon": 2000.0}, math.sqrt(2) * 4000 / (40 * 2000.0)),
    ("laplace", {"rho": 1000.0}, math.sqrt(2) / (40 * math.sqrt(2 * 1000 / 4000))),
    ("gaussian", {"rho": 1000.0}, math.sqrt(4000 / (2 * 1000)) / 40),
])  # fmt: skip
def test_noise_has_the_right_size_and_is_never_used_twice(mechanism, options, deviation):
    made = oracle(mechanism, 4000, generator=3, **options)
    answers = np.array([made.answer(lambda rows: np.full(40, 0.5)) for _ in range(4000)])
    assert len(np.unique(answers[(answers > 0) & (answers < 1)])) > 3900
    kept = np.abs(answers - 0.5) < 0.499
    assert kept.mean() > 0.95
    assert answers.std() == pytest.approx(deviation, rel=0.06)


def test_stated_losses():
    made = oracle("laplace", 50, epsilon=2.0)
    assert made.epsilon == pytest.approx(2.0)
    assert made.rho == pytest.approx(50 * 0.04**2 / 2)
    made = oracle("laplace", 50, rho=2.0)
    assert made.rho == pytest.approx(2.0)
    assert made.epsilon == pytest.approx(50 * math.sqrt(2 * 2.0 / 50))
    assert (oracle(rho=0.3).rho, oracle(rho=0.3).epsilon) == (0.3, math.inf)
    for mechanism, options in (
        ("thresholdout", {"train": ROWS}),
        ("pmw", {"data": KINDS, "universe": UNIVERSE}),
    ):
        assert oracle(mechanism, epsilon=2.0, **options).epsilon == pytest.approx(2.0)
        assert oracle(mechanism, rho=0.5, **options).rho == pytest.approx(0.5)
        assert oracle(mechanism, epsilon=2.0, **options).rho < 2.0**2 / 2
    assert oracle("naive").epsilon == oracle("split").rho == math.inf


@pytest.mark.parametrize("mechanism", ["pmw", "thresholdout"])
@pytest.mark.parametrize("loss", ["epsilon", "rho"])
def test_losses_recomputed_from_the_noise_that_is_drawn(monkeypatch, mechanism, loss):
    laplace, gaussian = [], []

    def record(kept):
        def draw(source, scale, n):
            kept.append(float(scale))
            return np.zeros(n, dtype=np.int64)

        return draw

    monkeypatch.setattr(Noise, "discrete_laplace", record(laplace))
    monkeypatch.setattr(Noise, "discrete_gaussian", record(gaussian))
    given = {loss: 0.7, "threshold": 0.1, "max_updates": 6}
    if mechanism == "pmw":
        made = oracle("pmw", 50, data=np.zeros(40, dtype=int), universe=UNIVERSE, **given)
    else:
        made = oracle("thresholdout", 50, train=np.zeros((5, 3)), **given)
    # Without noise the first answer differs by more than the threshold, so that all noise is drawn.
    made.answer(lambda rows: np.where(rows[:, 0] > 0, 1.0, 0.0))
    offset, compared, *released = laplace
    # One row moves the sum by the resolution, the comparison counts twice, and there are six rounds of each.
    compare = RESOLUTION / offset + 2 * RESOLUTION / compared
    if mechanism == "pmw" and loss == "rho":
        assert released == []
        spent = 6 * (compare**2 / 2 + RESOLUTION**2 / (2 * gaussian[0]))
    else:
        assert gaussian == []
        release = RESOLUTION / released[0]
        spent = 6 * (compare + release) if loss == "epsilon" else 6 * (compare**2 + release**2) / 2
    assert 0.7 * (1 - 1e-4) < spent <= 0.7 * (1 + 1e-12)
    assert made.epsilon == pytest.approx(0.7) if loss == "epsilon" else made.rho == pytest.approx(0.7)


@pytest.mark.parametrize("mechanism", ["laplace", "gaussian"])
def test_attack_on_one_answer(mechanism):
    """Each of many answers to one query is a run of the mechanism with the loss of one query."""
    runs, delta = 20_000, 0.0 if mechanism == "laplace" else 1e-2
    total = {"epsilon": 0.8 * runs} if mechanism == "laplace" else {"rho": 0.3 * runs}
    scores = []
    for row in (0.0, 1.0):
        data = np.full(30, 0.5)
        data[0] = row
        made = StatisticalQueryOracle(data, mechanism, runs, generator=int(row), **total)
        scores.append([made.answer(lambda rows: rows) for _ in range(runs)])
    found = epsilon_lower_bound(*np.array(scores), delta=delta).epsilon
    stated = 0.8 if mechanism == "laplace" else zcdp_epsilon(0.3, delta)
    assert 0.5 * stated < found <= stated


@pytest.mark.parametrize("worst", [True, False])
def test_attack_on_above_threshold(worst):
    """Values that all fall but the last, which rises: the first answer "above" at the last place tells most."""
    epsilon, sensitivity, runs, k = 1.5, 40, 15_000, 4
    scores = []
    for side in (0, 1):
        made = AboveThreshold(Noise(side), 30, sensitivity, epsilon)
        shift = sensitivity * (side if worst else 0)
        found = []
        for _ in range(runs):
            values = [sensitivity - shift] * (k - 1) + [shift]
            hit = next((i for i, v in enumerate(values) if made.above(v)), k)
            if hit == k:
                made._start()
            found.append(float(hit == k - 1))
        scores.append(found)
    bound = epsilon_lower_bound(*np.array(scores)).epsilon
    assert bound <= epsilon
    assert (bound > 0.3) == worst


def test_above_threshold_noise_scales():
    scales = []

    class Source:
        def discrete_laplace(self, scale, n):
            scales.append(float(scale))
            return np.zeros(n, dtype=np.int64)

    made = AboveThreshold(Source(), 10, 7, 2.0)
    assert [made.above(v) for v in (9, 10, 3)] == [False, True, False]
    assert scales[0] == pytest.approx(7 / 0.5, rel=1e-3)
    assert scales[1] == pytest.approx(2 * 7 / 1.5, rel=1e-3)
    # Without noise the threshold itself counts as above.
    assert AboveThreshold(Noise(0), 10, 7, math.inf).above(10)
    assert Drawn.laplace(Noise(0), 0).next() == 0


def test_attack_on_multiplicative_weights():
    """The corrected hypothesis and the answers to it, from runs on two neighbouring samples."""
    runs, scores = 500, []
    for kind in (0, 1):
        data = np.array([kind] + [0] * 4 + [1] * 5)
        source, found = Noise(kind)._generator, []
        for _ in range(runs):
            made = PrivateMultiplicativeWeights(
                2, data, alpha=0.05, max_updates=2, epsilon=2.0, generator=source
            )
            answers = []
            for query in ([1, 0], [0, 1], [1, 0], [1, 0]):
                if made.updates < 2:
                    answers.append(made.answer(query))
            found.append(made.hypothesis[0] + 0.5 * answers[-1])
        scores.append(found)
    assert epsilon_lower_bound(*np.array(scores), confidence=0.99).epsilon <= 2.0


@pytest.mark.parametrize("rate", [None, 0.1])
def test_potential_falls_at_each_correction_without_noise(rate):
    rng = np.random.default_rng(4)
    kinds, alpha = 64, 0.2
    weights = rng.dirichlet(np.full(kinds, 0.1))
    data = rng.choice(kinds, 5000, p=weights)
    histogram = np.bincount(data, minlength=kinds) / 5000
    made = PrivateMultiplicativeWeights(
        kinds, data, alpha=alpha, max_updates=1000, rho=math.inf, learning_rate=rate
    )

    def divergence():
        seen = histogram > 0
        return float((histogram[seen] * np.log(histogram[seen] / made.hypothesis[seen])).sum())

    queries = (rng.random((3000, kinds)) < 0.5).astype(float)
    queries[:500] = weights > np.quantile(weights, rng.random((500, 1)))
    updates = 0
    for query in queries:
        before, guess = divergence(), made.hypothesis @ query
        answer = made.answer(query)
        gap = abs(histogram @ query - guess)
        if made.updates > updates:
            updates = made.updates
            assert answer == pytest.approx(histogram @ query, abs=1e-4)
            eta = 2 * gap if rate is None else rate
            assert before - divergence() >= eta * gap - eta**2 / 8 - 1e-4
            assert before - divergence() >= alpha**2 / 4
        else:
            assert answer == pytest.approx(guess)
            assert gap < alpha + 1e-4
    assert 1 <= updates <= 4 * math.log(kinds) / alpha**2
    assert made.hypothesis.sum() == pytest.approx(1)


def test_pmw_oracle_asks_the_universe():
    data = np.repeat([0, 1, 2, 3], [28, 4, 4, 4])
    made = oracle("pmw", 9, data=data, universe=np.arange(4.0)[:, None] / 3, rho=math.inf, threshold=0.05)
    exact = (data / 3).mean()
    assert made.answer(first) == pytest.approx(exact, abs=1e-4)
    again = made.answer(first)
    assert abs(again - exact) < 0.05


def test_thresholdout_tells_the_training_mean_until_it_is_wrong():
    train = ROWS.copy()
    train[:, 1] = 0.9
    made = oracle("thresholdout", 20, epsilon=math.inf, train=train, threshold=0.2, max_updates=3)
    other = oracle("thresholdout", 20, epsilon=math.inf, train=ROWS[:20], threshold=0.5)
    assert other.answer(first) == pytest.approx(ROWS[:20, 0].mean(), abs=1e-4)
    for _ in range(5):
        assert made.answer(first) == pytest.approx(ROWS[:, 0].mean(), abs=1e-4)
    assert made.updates == 0
    assert made.answer(lambda rows: rows[:, 1]) == pytest.approx(ROWS[:, 1].mean(), abs=1e-4)
    assert made.updates == 1


def exact_selection_bias(n, scale):
    """Return the bias of the better-looking of two fair coins' means, chosen by answers with Laplace noise."""
    chance = scipy.stats.binom.pmf(np.arange(n + 1), n, 0.5)
    total = 0.0
    for a, b in itertools.product(range(n + 1), repeat=2):
        d = abs(a - b) / n
        wrong = 0.0 if scale == 0 else (0.5 + d / (4 * scale)) * math.exp(-d / scale)
        wrong = 0.5 if d == 0 else wrong
        total += chance[a] * chance[b] * d * (0.5 - wrong)
    return total


@pytest.mark.parametrize("epsilon", [math.inf, 4.0, 0.5])
def test_bias_of_the_selected_query(epsilon):
    n, runs, rng = 20, 1500, np.random.default_rng(5)
    source = Noise(7)._generator
    biases = []
    for _ in range(runs):
        data = rng.integers(0, 2, (n, 2))
        made = StatisticalQueryOracle(data, "laplace", 2, epsilon=epsilon, generator=source)
        answers = [made._answer(lambda rows, j=j: rows[:, j]) for j in (0, 1)]
        biases.append(data[:, int(answers[1] > answers[0])].mean() - 0.5)
    wanted = exact_selection_bias(n, 0 if epsilon == math.inf else 2 / (n * epsilon))
    assert np.mean(biases) == pytest.approx(wanted, abs=4 * np.std(biases) / math.sqrt(runs))
    assert wanted <= generalization_bound(n, epsilon=epsilon) <= math.expm1(min(epsilon, 9))


def test_bounds():
    assert generalization_bound(50, epsilon=0.1, delta=0.01) == pytest.approx(math.expm1(0.1) + 0.01)
    assert generalization_bound(50, rho=0.02) == pytest.approx(0.1)
    assert generalization_bound(50, epsilon=0.2) == generalization_bound(50, rho=0.02)
    assert generalization_bound(50, rho=math.inf) == 1
    # Without a loss it is Hoeffding's bound, at half of the failure.
    assert generalization_bound(100, epsilon=1e-9, failure=0.1) == pytest.approx(
        math.sqrt(math.log(40) / 200), rel=1e-4
    )
    assert generalization_bound(10**6, epsilon=0.1, failure=0.1) == pytest.approx(0.05, rel=0.02)


def test_the_bound_holds_for_a_mechanism_that_leaks_as_much_as_it_may():
    """Randomised response on each row is epsilon-private; the analyst asks for rows that look like the answers."""
    n, epsilon, failure, runs = 60, 1.0, 0.1, 4000
    rng = np.random.default_rng(6)
    data = rng.integers(0, 2, (runs, n))
    kept = rng.random((runs, n)) < 1 / (1 + math.exp(-epsilon))
    told = np.where(kept, data, 1 - data)
    # The query is an arbitrary function of what was told; here it picks one bit or the other for all rows.
    distance = np.where(told.mean(1) > 0.5, data.mean(1), 1 - data.mean(1)) - 0.5
    assert distance.mean() <= generalization_bound(n, epsilon=epsilon)
    assert (np.abs(distance) > generalization_bound(n, epsilon=epsilon, failure=failure)).mean() <= failure


def test_predictions_scale_as_stated():
    for mechanism, power in (("naive", 1), ("split", 1), ("laplace", 1), ("gaussian", 2)):
        ratio = max_adaptive_queries(4000, 0.1, mechanism) / max_adaptive_queries(1000, 0.1, mechanism)
        assert math.log(ratio, 4) == pytest.approx(power)
    logs = [math.log(max_adaptive_queries(n, 0.2, "pmw", log_universe=7.0)) for n in (20_000, 40_000)]
    assert logs[1] == pytest.approx(2 * logs[0])
    assert max_adaptive_queries(10**9, 0.2, "pmw", log_universe=7.0) == math.inf
    # One deviation of the noise and the bias, at the best split of the error, make up tau.
    m, n = max_adaptive_queries(1000, 0.1, "gaussian"), 1000
    best = min(math.sqrt(r / 2) + math.sqrt(m / (2 * r)) / n for r in np.geomspace(1e-5, 1, 4001))
    assert best == pytest.approx(0.1, rel=1e-4)


def test_freedman_s_analyst_overfits_exact_answers_as_predicted():
    n, m, claimed, small = 400, 400, [], []
    for seed in range(6):
        rows = np.random.default_rng(seed).choice([-1, 1], (n, m + 1))
        claimed.append(freedman_attack(oracle("naive", m + 1, data=rows), m, cutoff=0.0).claimed)
        small.append(freedman_attack(oracle("naive", 41, data=rows), 40, cutoff=0.0).claimed)
    assert np.mean(claimed) == pytest.approx(scipy.stats.norm.cdf(math.sqrt(2 / math.pi)), abs=0.02)
    assert np.mean(small) == pytest.approx(0.5 + math.sqrt(0.1) / math.pi, abs=0.02)


def test_freedman_s_analyst_is_held_off_by_noise():
    rows = np.random.default_rng(8).choice([-1, 1], (500, 501))
    naive = freedman_attack(oracle("naive", 501, data=rows), 500)
    private = freedman_attack(oracle("gaussian", 501, data=rows, rho=0.1, generator=1), 500)
    assert naive.claimed > 0.7
    assert private.claimed < 0.65
    assert naive.true == private.true == 0.5
    assert 0 < naive.selected <= 500
    assert naive.worst >= naive.claimed - 0.5


def test_noise_of_the_largest_scale_allowed_does_not_overflow():
    drawn = Noise(0).discrete_laplace(rational_above(2.0**46), 20_000)
    assert np.abs(drawn).mean() == pytest.approx(2.0**46, rel=0.03)
    assert oracle("laplace", epsilon=1e300).rho == math.inf


def test_nothing_is_answered_after_the_last_query():
    made = oracle(n_queries=1, rho=1.0)
    made.answer(first)
    with pytest.raises(checks.ArgumentError, match="all 1 queries"):
        made.answer(first)
    assert made.n_answered == 1
