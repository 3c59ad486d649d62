import dataclasses

import pytest
import torch

from perturbkit.core import checks
from perturbkit.data import Dataset, load_digits8, load_photographs, load_sentences, load_wine


def test_split_is_disjoint_complete_and_repeatable():
    data = load_wine()
    parts = data.split(5, (0.5, 0.3, 0.2))
    assert [len(p) for p in parts] == [89, 53, 36]
    together = torch.cat([p.index for p in parts])
    assert sorted(together.tolist()) == list(range(178))
    again = data.split(5, (0.5, 0.3, 0.2))
    assert all(torch.equal(a.x, b.x) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(data.split(6)[0].index, data.split(5)[0].index)
    for part in parts:
        assert torch.equal(part.x, data.x[part.index])
        assert torch.equal(part.y, data.y[part.index])


def test_split_advances_the_generator_and_leaves_the_global_one():
    state = torch.get_rng_state()
    g = torch.Generator().manual_seed(0)
    data = load_wine()
    assert not torch.equal(data.split(g)[0].index, data.split(g)[0].index)
    assert torch.equal(state, torch.get_rng_state())


def test_split_keeps_groups_together():
    photos = load_photographs(3, size=32)
    first, second = photos.split(0, (0.5, 0.5))
    assert len(first) == len(second) == 12
    assert not set(first.groups.tolist()) & set(second.groups.tolist())
    assert {photos.group_names[g] for g in first.groups.tolist()} == set(first.extras["photograph"])


def test_rows_keeps_columns_in_step():
    data = load_sentences()
    some = data.rows([7, 3])
    assert some.x == (data.x[7], data.x[3])
    assert some.extras["topic"] == (data.extras["topic"][7], data.extras["topic"][3])
    assert some.index.tolist() == [7, 3]
    assert some.rows([1]).index.tolist() == [3]


def test_to_frame():
    wine = load_wine()
    frame = wine.to_frame()
    assert list(frame.columns) == [*wine.feature_names, "cultivar"]
    assert frame["cultivar"].nunique() == 3
    assert torch.equal(torch.tensor(frame["alcohol"].to_numpy()), wine.x[:, 0])
    text = load_sentences("test").to_frame()
    assert list(text.columns) == ["text", "topic", "sentiment"]
    with pytest.raises(checks.DataError, match="holds images"):
        load_digits8().to_frame()


def test_frozen_and_shown_in_one_line():
    wine = load_wine()
    with pytest.raises(dataclasses.FrozenInstanceError):
        wine.name = "beer"
    assert "\n" not in repr(wine)
    assert wine.shape == (13,)
    assert isinstance(wine, Dataset)


def test_refusals():
    wine = load_wine()
    with pytest.raises(checks.ArgumentError, match=r"sum to 0\.8"):
        wine.split(0, (0.5, 0.3))
    with pytest.raises(checks.ArgumentError, match="empty"):
        wine.split(0, (0.999, 0.001))
    with pytest.raises(checks.ArgumentError, match=r"fractions is 0(\.0)?;"):
        wine.split(0, (1.0, 0.0))
    with pytest.raises(checks.ArgumentError, match="groups empty"):
        load_photographs(size=32).split(0, (0.99, 0.01))
    with pytest.raises(checks.ArgumentError, match="labels from 0 to 178"):
        wine.rows([0, 178])
    with pytest.raises(checks.ArgumentTypeError, match="generator"):
        wine.split("seed")
