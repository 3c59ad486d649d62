"""Oracles of SOInter: one output alone, features that do nothing, everything selected, draws and the hinge by hand."""

import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Oracle, random
from perturbkit.explain import SOInter


def rule(x):
    """Two outputs that both follow from the first two of the features."""
    first = (x[:, 0] > 0).to(x.dtype)
    return torch.stack((first, (x[:, 1] + 2 * first - 1 > 0).to(x.dtype)), 1)


def rows(n=400, p=6, seed=1, dtype=torch.float64):
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(model=rule, target=1, n_select=2, **options):
    return SOInter(
        model, target, n_select, **{"hidden": 8, "n_steps": 6, "batch_size": 16, "generator": 0, **options}
    )


def network(dtype=torch.float64):
    net = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


EXAMPLE = Example(
    model=lambda: network(torch.float32),
    with_model=lambda model, generator, dtype: (
        small(model, generator=generator).fit(rows(dtype=dtype)).attribute(rows(3, dtype=dtype))
    ),
    chunked=lambda size: small(Oracle(network(), chunk_size=size)).fit(rows(20)).attribute(rows(5)),
    refusals=(
        (lambda: small(target=-1), "target is -1"),
        (lambda: small(target=2).fit(rows()), "target is 2"),
        (lambda: small(n_select=0), "n_select is 0"),
        (lambda: small(n_select=7).fit(rows()), "n_select is 7"),
        (lambda: small(hidden=0), "hidden is 0"),
        (lambda: small(temperature=0.0), "temperature is 0"),
        (lambda: small(warm_up=1.0), "warm_up is 1"),
        (lambda: small(lr=-1.0), "lr is -1"),
        (lambda: small(n_steps=0), "n_steps is 0"),
        (lambda: small(batch_size=1), "batch_size is 1"),
        (lambda: small(baseline=torch.zeros(3)).fit(rows()), "baseline has shape"),
        (lambda: small().fit(rows()[0]), "x has shape"),
        (lambda: small().fit(rows(1)), "number of rows is 1"),
        (lambda: small(lambda x: x.sum(1)).fit(rows()), "the model's answer has shape"),
        (lambda: small().attribute(rows()), "nothing is fitted"),
        (lambda: small().fit(rows()).attribute(rows(p=5)), "x has shape"),
        (lambda: small().fit(rows()).energy(rows(3), torch.ones(3, 1).double()), "y has shape"),
    ),
    stochastic=True,
)


@pytest.fixture(scope="module", params=[True, False])
def trained(request):
    return SOInter(rule, 1, 2, hidden=40, n_steps=800, lr=3e-3, others=request.param, generator=2).fit(
        rows(2000)
    )


def test_the_features_of_an_easy_rule_are_found(trained):
    x = rows(500, seed=5)
    found = trained.attribute(x)
    agree = (rule(x * found.extras["selected"])[:, 1] == rule(x)[:, 1]).double().mean()
    assert float(agree) > 0.95
    # Features that do nothing are selected no more often than by chance.
    shares = found.extras["selected"].mean(0)
    chance = 2 / 6
    assert float(shares[2:].max()) <= chance + 3 * math.sqrt(chance * (1 - chance) / 500)
    assert float(shares[:2].mean()) > 0.7


def test_the_energy_tells_the_outputs_from_wrong_ones(trained):
    x = rows(500, seed=5)
    y = rule(x)
    wrong = y.clone()
    wrong[:, 1] = 1 - wrong[:, 1]
    assert float((trained.energy(x, y) < trained.energy(x, wrong)).double().mean()) > 0.9
    other = y.clone()
    other[:, 0] = 1 - other[:, 0]
    seen = (trained.energy(x, other) != trained.energy(x, y)).any()
    assert bool(seen) == trained.others


def test_with_one_output_there_are_no_others():
    one = lambda x: rule(x)[:, 1:]
    found = [small(one, 0, others=o, n_steps=40).fit(rows()).attribute(rows(5)).values for o in (True, False)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_selecting_everything_leaves_nothing_to_learn():
    made, x = small(n_steps=40).fit(rows()), rows(50, seed=4)
    whole = made._masked(x, torch.ones_like(x))
    torch.testing.assert_close(whole, x, rtol=0, atol=0)
    assert float(made._misfit(whole, rule(x), rule(whole))) == 0.0
    # One more feature hidden changes the answer of some rows, and then there is something.
    hidden = x.clone()
    hidden[:, 0] = 0
    assert float(made._misfit(hidden, rule(x), rule(hidden))) != 0.0


def test_the_misfit_swaps_the_target_alone():
    made, x = small(n_steps=20).fit(rows()), rows(50, seed=4)
    masked = x * (torch.arange(6) > 0)
    y, answered = rule(x), rule(masked)
    true = torch.stack((answered[:, 0], y[:, 1]), 1)
    expected = (made.energy(masked, true) - made.energy(masked, answered)).mean()
    torch.testing.assert_close(made._misfit(masked, y, answered), expected, rtol=1e-12, atol=1e-12)


def test_draws_are_zeros_and_ones_with_the_chances_of_the_logits():
    made = small(n_select=1)
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).expand(20000, 3)
    z = made._draw(logits, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), logits[0].softmax(0), rtol=0, atol=0.012)
    torch.testing.assert_close(z.round(), z, rtol=0, atol=1e-12)
    assert z.sum(1).tolist() == pytest.approx([1.0] * 20000)


def test_several_draws_select_at_most_as_many():
    z = small(n_select=3)._draw(torch.zeros(5000, 4, dtype=torch.float64), torch.Generator().manual_seed(0))
    count = z.sum(1).round()
    assert (float(count.min()), float(count.max())) == (1.0, 3.0)
    # A feature is missed by three independent draws with chance (3/4)^3.
    assert float(z.mean()) == pytest.approx(1 - 0.75**3, abs=0.01)


def test_draws_have_the_gradient_of_the_relaxed_ones():
    made, g = small(n_select=1, temperature=0.7), torch.Generator().manual_seed(3)
    logits = torch.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, 5, generator=g, dtype=torch.float64)
    (made._draw(logits, torch.Generator().manual_seed(0)) * weight).sum().backward()
    u = random.uniform((1, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0]
    soft = ((logits.detach() - (-u.log()).log()) / 0.7).softmax(1)
    expected = soft * (weight - (soft * weight).sum(1, keepdim=True)) / 0.7
    torch.testing.assert_close(logits.grad, expected, rtol=1e-9, atol=1e-12)


def test_the_hinge_by_hand():
    made, x = small().fit(rows()), rows(64, seed=4)
    y = rule(x)
    made._energies = lambda rows, outputs: outputs[:, 1]  # an energy that is the second output
    found = made._hinge(x, y, torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    swap = random.uniform((64, 2), generator=g) < 0.5
    other = y[random.randint(0, 64, (64,), generator=g)]
    spread = rule(rows()).std(0, unbiased=False)
    total = 0.0
    for i in range(64):
        wrong = [float(other[i, j] if swap[i, j] else y[i, j]) for j in range(2)]
        distance = sum(((wrong[j] - float(y[i, j])) / float(spread[j])) ** 2 for j in range(2)) / 4
        total += max(0.0, distance + float(y[i, 1]) - wrong[1])
    assert float(found) == pytest.approx(total / 64, rel=1e-9)


def test_hidden_features_take_the_baseline():
    seen, base = [], torch.arange(6.0, dtype=torch.float64) + 10

    def watched(x):
        seen.append(x)
        return rule(x)

    x = rows()
    small(watched, baseline=base).fit(x)
    asked = torch.cat(seen[-3:])
    hidden = asked == base
    assert bool(hidden.any())
    assert bool((hidden | torch.isin(asked, x)).all())
    assert int((~hidden).sum(1).max()) <= 2


def test_weights_add_up_and_the_black_box_is_counted():
    oracle = Oracle(rule)
    made = small(oracle).fit(rows())
    spent = 400 + 2 * 16 + 4 * 32  # two steps of warm-up
    assert oracle.nfev == made.cost_.nfev == spent
    found = made.attribute(rows(7))
    torch.testing.assert_close(found.values.sum(1), torch.ones(7).double(), rtol=1e-9, atol=0)
    assert found.extras["selected"].sum(1).tolist() == [2.0] * 7
    best = found.values.topk(2, 1).indices
    assert bool((found.extras["selected"].gather(1, best) == 1).all())
    assert found.target.tolist() == [1] * 7
    assert oracle.nfev == spent


def test_a_blind_selector_does_not_learn():
    made = small(warm_up=0.99, n_steps=5).fit(rows())
    torch.testing.assert_close(
        made.attribute(rows(4)).values, torch.full((4, 6), 1 / 6, dtype=torch.float64), rtol=1e-9, atol=0
    )
    learned = small(warm_up=0.0, n_steps=5).fit(rows()).attribute(rows(4)).values
    assert float((learned - 1 / 6).abs().max()) > 1e-4
