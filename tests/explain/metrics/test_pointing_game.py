"""Oracles of the pointing game: planted objects, chance, invariants."""

import pytest
import torch

from _common import Example
from perturbkit.core import Attribution
from perturbkit.explain import pointing_game


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def box(n, side, top, left, size):
    mask = torch.zeros(n, side, side, dtype=torch.bool)
    mask[:, top : top + size, left : left + size] = True
    return mask


EXAMPLE = Example(
    call=lambda generator, dtype: pointing_game(draw(3, 2, 6, 6, dtype=dtype), box(3, 6, 1, 2, 3)),
    refusals=(
        (lambda: pointing_game(draw(3, 2, 6, 6), box(3, 5, 1, 2, 3)), "mask has shape"),
        (lambda: pointing_game(draw(3, 6), torch.zeros(3, 6, dtype=torch.bool)), "mask is empty in 3 rows"),
        (lambda: pointing_game(draw(3, 6), torch.ones(3, 6), tolerance=-1), "tolerance is -1"),
        (lambda: pointing_game(draw(3), torch.ones(3)), "dimensions"),
    ),
)


def test_a_maximum_on_the_object_hits_and_one_beside_it_misses():
    scores, mask = torch.zeros(2, 3, 6, 6), box(2, 6, 1, 2, 3)
    scores[0, :, 2, 3] = 1.0
    scores[1, :, 5, 5] = 1.0
    assert pointing_game(scores, mask).values.tolist() == [1.0, 0.0]
    assert pointing_game(scores, mask, tolerance=1).values.tolist() == [1.0, 0.0]
    assert pointing_game(scores, mask, tolerance=2).values.tolist() == [1.0, 1.0]


def test_channels_are_added_before_the_maximum():
    scores = torch.zeros(1, 2, 3, 3)
    scores[0, 0, 0, 0], scores[0, 1, 0, 0] = 5.0, -5.0
    scores[0, :, 1, 1] = 1.0
    assert pointing_game(scores, box(1, 3, 1, 1, 1)).values.tolist() == [1.0]


def test_random_scores_hit_by_chance():
    n, mask = 4000, box(4000, 8, 2, 2, 4)
    found = pointing_game(draw(n, 1, 8, 8), mask)
    assert float(found.values.mean()) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / n) ** 0.5)
    assert found.extras["chance"].unique().tolist() == [0.25]


def test_a_constant_map_scores_its_chance_wherever_the_object_is():
    for top in (0, 4):
        found = pointing_game(torch.ones(1, 1, 8, 8), box(1, 8, top, top, 2))
        assert found.values.tolist() == [4 / 64]


def test_energy_is_the_share_of_positive_scores():
    scores = torch.tensor([[3.0, 1.0, -9.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, False, True, False]] * 2)
    assert pointing_game(scores, mask).extras["energy"].tolist() == [0.75, 0.0]


def test_takes_an_attribution_of_a_sequence():
    values = draw(2, 5, 3)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[torch.arange(2), values.sum(2).argmax(1)] = True
    found = pointing_game(Attribution(values), mask)
    assert found.values.tolist() == [1.0, 1.0]
    assert pointing_game(Attribution(values), ~mask, tolerance=1).values.tolist() == [1.0, 1.0]
    assert pointing_game(Attribution(values), ~mask).values.tolist() == [0.0, 0.0]
