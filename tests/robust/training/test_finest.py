"""Oracles of FINEST: overlaps by hand and by another library, the loss and its invariance, changes of data, training."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import flatten
from perturbkit.core.random import randint, randn, randperm
from perturbkit.robust import (
    FINEST,
    NextItemModel,
    ReferenceLists,
    perturb_interactions,
    rank_biased_overlap,
    rank_preserving_loss,
    rank_stability,
    reference_lists,
)

F64 = torch.float64
ITEMS = 12


def rng(seed):
    return torch.Generator().manual_seed(seed)


def users(n=6, seed=0, length=5):
    return [randint(0, ITEMS, (length + i % 3,), generator=rng(seed + i)) for i in range(n)]


def network():
    return NextItemModel(ITEMS, 4, generator=3)


def with_model(model, generator, dtype):
    found = FINEST(model, k=3, n_negatives=5, epochs=2, lr=0.05, batch_size=4, perturb_ratio=0.2, generator=generator).fit(users())  # fmt: skip
    return {"weights": flatten(found.model_), "loss": found.history_.loss, "lists": found.reference_.lists}


def broken():
    model = network()
    model.bias.data[0] = torch.nan
    return model


def loss_of(scores=None, reference=None, negatives=None):
    rows = torch.zeros(2, 5) if scores is None else scores
    kept = torch.tensor([[0, 1], [2, 3]]) if reference is None else reference
    return rank_preserving_loss(rows, kept, torch.tensor([[4], [4]]) if negatives is None else negatives)


EXAMPLE = Example(
    model=network,
    with_model=with_model,
    refusals=(
        (lambda: FINEST(3), "model is a int"),
        (lambda: FINEST(network(), k=1), "k is 1"),
        (lambda: FINEST(network(), n_negatives=0), "n_negatives is 0"),
        (lambda: FINEST(network(), weight=-1.0), "weight is -1"),
        (lambda: FINEST(network(), margins=(0.1, -0.1)), "margins is -0.1"),
        (lambda: FINEST(network(), margins=0.1), "margins is 0.1"),
        (lambda: FINEST(network(), margins=(0.1,)), "margins is"),
        (lambda: FINEST(network(), kinds=[], perturb_ratio=0), "kinds is empty"),
        (lambda: FINEST(network(), k=3).fit(users(), "lists"), "reference is a str"),
        (lambda: FINEST(network(), k=3).fit(users(), reference_lists(NextItemModel(50, 4), [torch.tensor([40])], 3)), "reference names item"),
        (lambda: FINEST(network().requires_grad_(False), k=3).fit(users()), "no parameter to train"),
        (lambda: FINEST(network(), k=3).fit(7), "interactions are a int"),
        (lambda: reference_lists(None, users(), 3), "model is a NoneType"),
        (lambda: reference_lists(broken(), users(), 3), "scores that are not a number"),
        (lambda: rank_stability(None, users(), [users()], users(), k=3), "train is a NoneType"),
        (lambda: loss_of(reference=torch.tensor([[0, 5], [1, 2]])), "reference.flatten.. holds labels from 0 to 5"),
        (lambda: loss_of(negatives=torch.tensor([[-1], [2]])), "negatives.flatten.. holds labels from -1"),
        (lambda: loss_of(reference=torch.zeros(2, 2)), "reference.flatten.. has dtype"),
        (lambda: rank_preserving_loss(torch.zeros(1, 3), torch.tensor([[0]]), torch.tensor([[1]]), (-1.0, 0.1)), "margins is -1"),
        (lambda: rank_biased_overlap([[1, 2], [3]], [1, 2]), "a is .*rectangular"),
        (lambda: FINEST(network(), perturb_ratio=1.5), "perturb_ratio is 1.5"),
        (lambda: FINEST(network(), kinds=["swap"]), "kinds is 'swap'"),
        (lambda: FINEST(network(), epochs=0), "epochs is 0"),
        (lambda: FINEST(network(), k=ITEMS).fit(users()), "k is 12"),
        (lambda: FINEST(network()).fit([]), "interactions are empty"),
        (lambda: FINEST(network()).fit([torch.zeros(3)]), "the items of a user has dtype"),
        (lambda: FINEST(network(), k=3, weight=0).fit([torch.tensor([1]), torch.tensor([2])]), "no user has two"),
        (lambda: FINEST(nn.Embedding(ITEMS, 3), k=2).fit([torch.tensor([1, ITEMS + 3])]), "the items of a user holds labels from 1 to 15"),
        (lambda: NextItemModel(1), "n_items is 1"),
        (lambda: loss_of(scores=torch.zeros(5)), "scores has shape"),
        (lambda: loss_of(reference=torch.zeros(3, 2).long()), "reference has shape"),
        (lambda: loss_of(negatives=torch.zeros(3, 2).long()), "negatives has shape"),
        (lambda: perturb_interactions(users(), 2.0), "ratio is 2"),
        (lambda: perturb_interactions(users(), 0.1, kinds=[]), "kinds is empty"),
        (lambda: perturb_interactions(users(), 0.1, n_items=3), "n_items is 3"),
        (lambda: perturb_interactions(users(), 0.1, which="latest"), "which is 'latest'"),
        (lambda: rank_biased_overlap([1, 2], [1, 2, 3]), "b has shape"),
        (lambda: rank_biased_overlap([1, 1], [1, 2]), "a names an item twice"),
        (lambda: rank_biased_overlap([1, 2], [1, 2], p=1.0), "p is 1"),
        (lambda: reference_lists(network(), users(), k=0), "k is 0"),
        (lambda: rank_stability(lambda d: network(), users(), [], users(), k=3), "perturbations is empty"),
    ),
    stochastic=True,
)  # fmt: skip


def test_overlap_by_hand():
    """Agreements 1, 1/2, 2/3 of (1, 2, 3) and (1, 3, 4)."""
    p = 0.8
    by_hand = 0.2 * (1 + p / 2 + p**2 * 2 / 3) + p**3 * 2 / 3
    assert float(rank_biased_overlap([1, 2, 3], [1, 3, 4], p=p)) == pytest.approx(by_hand)


def by_definition(a, b, p):
    agreement = [len(set(a[:d]) & set(b[:d])) / d for d in range(1, len(a) + 1)]
    return (1 - p) * sum(p**i * x for i, x in enumerate(agreement)) + p ** len(a) * agreement[-1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 12), p=st.floats(0.05, 0.98))
def test_overlap_is_that_of_the_definition_symmetric_and_bounded(seed, k, p):
    g = rng(seed)
    a = torch.stack([randperm(15, generator=g)[:k] for _ in range(4)])
    b = torch.stack([randperm(15, generator=g)[:k] for _ in range(4)])
    found = rank_biased_overlap(a, b, p=p)
    wanted = [by_definition(u.tolist(), v.tolist(), p) for u, v in zip(a, b, strict=True)]
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    torch.testing.assert_close(found, rank_biased_overlap(b, a, p=p))
    torch.testing.assert_close(rank_biased_overlap(a, a, p=p), torch.ones(4, dtype=F64))
    assert float(rank_biased_overlap(a, a + 100, p=p).abs().max()) == 0
    assert bool(((found >= 0) & (found <= 1 + 1e-12)).all())


def test_overlap_agrees_with_another_library():
    rbo = pytest.importorskip("rbo")
    for seed in range(10):
        a, b = (randperm(30, generator=rng(2 * seed + i))[:20].tolist() for i in range(2))
        assert float(rank_biased_overlap(a, b)) == pytest.approx(rbo.RankingSimilarity(a, b).rbo_ext(p=0.9))


def test_the_loss_by_hand():
    s = torch.tensor([[1.0, 2.0, 0.5, 1.2, 0.45]], dtype=F64)
    # Within (0, 1, 2): 2 - 1 + 0.1, and 0.5 - 2 + 0.1 < 0. Others 3 and 4 to 2: 0.7 + 0.2 and -0.05 + 0.2; item 0 is listed.
    found = rank_preserving_loss(s, torch.tensor([[0, 1, 2]]), torch.tensor([[3, 4, 0]]), (0.1, 0.2))
    assert float(found) == pytest.approx(1.1 + (0.9 + 0.15) / 2)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_loss_is_zero_exactly_if_the_order_is_kept_with_the_margins(seed):
    g = rng(seed)
    order = randperm(8, generator=g)
    s = torch.empty(1, 8, dtype=F64)
    s[0, order] = 0.1001 * torch.arange(8, 0, -1, dtype=F64)
    reference, negatives = order[None, :4], order[None]
    assert float(rank_preserving_loss(s, reference, negatives)) == 0
    shifted = s + randn((1, 1), generator=g, dtype=F64)
    assert float(rank_preserving_loss(shifted, reference, negatives)) == 0
    a, b = sorted(randperm(5, generator=g)[:2].tolist())
    swapped = s.clone()
    swapped[0, order[[a, b]]] = s[0, order[[b, a]]]
    found = rank_preserving_loss(swapped, reference, negatives)
    assert float(found) > 0.02
    torch.testing.assert_close(found, rank_preserving_loss(swapped + 7, reference, negatives))
    closer = torch.where(s == s[0, order[0]], s - 0.01, s)
    assert float(rank_preserving_loss(closer, reference, negatives)) == pytest.approx(0.01 - 1e-4, abs=1e-9)


@pytest.mark.parametrize("kind", ["delete", "replace", "insert"])
def test_changes_are_as_many_and_of_the_kind_asked_for(kind):
    data = users(40)
    total = sum(map(len, data))
    found = perturb_interactions(data, 0.1, n_items=ITEMS, kinds=[kind], generator=0)
    n_changed = math.ceil(0.1 * total)
    size = sum(map(len, found)) - total
    assert size == {"delete": -n_changed, "replace": 0, "insert": n_changed}[kind]
    assert len(found) == len(data)
    if kind == "replace":
        assert int((torch.cat(found) != torch.cat(data)).sum()) == n_changed
    for before, after in zip(data, found, strict=True):
        short, long = sorted((before.tolist(), after.tolist()), key=len)
        if kind != "replace":
            rest = iter(long)
            assert all(item in rest for item in short), "the order of the others is kept"
    assert any(torch.equal(a, b) for a, b in zip(data, found, strict=True))
    assert all(int(u.min()) >= 0 and int(u.max()) < ITEMS for u in found)


def test_which_interactions_are_changed():
    data = users(30)
    early = perturb_interactions(data, 0.05, kinds=["replace"], which="earliest", generator=0)
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(data, early, strict=True))
    flat = torch.cat(data)
    common = flat.bincount().argmax()
    changed = (
        torch.cat(perturb_interactions(data, 0.05, kinds=["replace"], which="popular", generator=0)) != flat
    )
    assert bool((flat[changed] == common).all())
    assert int(changed.sum()) == math.ceil(0.05 * len(flat))


def test_nothing_is_changed_at_ratio_zero_and_every_user_keeps_one():
    data = users()
    assert all(torch.equal(a, b) for a, b in zip(data, perturb_interactions(data, 0.0), strict=True))
    rest = perturb_interactions(data, 1.0, kinds=["delete"], generator=0)
    assert [len(u) for u in rest] == [1] * len(data)
    assert all(int(a[0]) == int(b[0]) for a, b in zip(data, rest, strict=True))


def test_without_weight_it_is_ordinary_training_bit_for_bit():
    data = users()
    model = network().double()
    found = FINEST(model, weight=0, perturb_ratio=0, epochs=3, lr=0.01, batch_size=4, generator=5).fit(data)
    again = network().double()
    items = nn.utils.rnn.pad_sequence(data, batch_first=True, padding_value=-1)
    optimizer, g = torch.optim.Adam(again.parameters(), lr=0.01), rng(5)
    for _ in range(3):
        for rows in torch.randperm(6, generator=g).split(4):
            optimizer.zero_grad()
            scores, wanted = again(items[rows][:, :-1]), items[rows][:, 1:]
            functional.cross_entropy(scores.flatten(0, 1), wanted.flatten(), ignore_index=-1).backward()
            optimizer.step()
    torch.testing.assert_close(flatten(found.model_), flatten(again), rtol=0, atol=1e-14)
    assert torch.equal(flatten(model), flatten(network().double()))
    assert found.history_.reference_loss.numel() == 0


def test_padding_does_not_matter():
    model = network().double()
    long, short = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([7, 8])
    both, alone = reference_lists(model, [long, short], k=3), reference_lists(model, [short], k=3)
    assert torch.equal(both.lists[1, :2], alone.lists[0])
    assert torch.equal(both.lists[0], model(long[None])[0].topk(3).indices)
    assert both.items[1].tolist() == [7, 8, -1, -1, -1]


def test_the_rank_loss_leaves_padding_out():
    model, data = network().double(), users()
    kept = reference_lists(model, data, k=3)
    other = NextItemModel(ITEMS, 4, generator=8).double()
    rows = torch.tensor([2, 0])
    found = FINEST(model, k=3, n_negatives=6, generator=4)._rank_loss(other, kept, rows)
    scores = torch.cat([other(data[i][None])[0] for i in (2, 0)])
    lists = torch.cat([kept.lists[i, : len(data[i])] for i in (2, 0)])
    drawn = randint(0, ITEMS, (len(scores), 6), generator=rng(4))
    torch.testing.assert_close(found, rank_preserving_loss(scores, lists, drawn))


def test_a_reference_of_other_users_is_kept_too():
    kept = reference_lists(network(), users(9, seed=70), k=3)
    tuned = FINEST(network(), k=3, weight=5.0, lr=0.02, epochs=10, perturb_ratio=0, generator=0).fit(
        users(), kept
    )
    free = FINEST(network(), weight=0, lr=0.02, epochs=10, perturb_ratio=0, generator=0).fit(users())
    known = kept.items >= 0

    def overlap(model):
        return float(
            rank_biased_overlap(
                reference_lists(model, users(9, seed=70), 3).lists[known], kept.lists[known]
            ).mean()
        )

    assert overlap(tuned.model_) > overlap(free.model_) + 0.1


def test_fine_tuning_keeps_lists_that_ordinary_training_loses():
    data, other = users(20, length=6), users(20, seed=100, length=6)
    base = FINEST(network(), weight=0, perturb_ratio=0, epochs=30, lr=0.02, generator=0).fit(data).model_
    kept = reference_lists(base, data, k=4)
    known = kept.items >= 0

    def overlap(weight):
        tuned = FINEST(base, k=4, weight=weight, epochs=30, lr=0.02, generator=1).fit(other, kept)
        if weight > 0:
            assert tuned.reference_ is kept
            assert float(tuned.history_.reference_loss[-1]) < float(tuned.history_.reference_loss.max())
        lists = reference_lists(tuned.model_, data, k=4).lists
        return float(rank_biased_overlap(lists[known], kept.lists[known]).mean())

    assert overlap(5.0) > overlap(0.0) + 0.15


def test_the_reference_is_that_of_the_model_by_default_and_evaluate_is_called():
    model = network()
    seen = []

    def evaluate(net):
        seen.append(net.training)
        return len(seen)

    found = FINEST(model, k=3, epochs=2, generator=0).fit(users(), evaluate=evaluate)
    assert torch.equal(found.reference_.lists, reference_lists(model, users(), 3).lists)
    assert isinstance(found.reference_, ReferenceLists)
    assert seen == [False, False]
    assert found.history_.score.tolist() == [1, 2]


def test_stability_compares_two_pipelines():
    data, changed = users(), users(seed=50)
    nets = {len(torch.cat(data)): network(), -1: NextItemModel(ITEMS, 4, generator=9)}

    def train(given):
        return nets[-1] if given is changed else nets[len(torch.cat(data))]

    found = rank_stability(train, data, [data, changed], data, k=3, p=0.7)
    assert found.rbo.shape == found.jaccard.shape == (2, 6)
    assert bool((found.rbo[0] == 1).all())
    assert bool((found.jaccard[0] == 1).all())
    for i, context in enumerate(data):
        a, b = (net(context[None])[0, -1].topk(3).indices.tolist() for net in nets.values())
        assert float(found.rbo[1, i]) == pytest.approx(by_definition(a, b, 0.7))
        assert float(found.jaccard[1, i]) == pytest.approx(len({*a} & {*b}) / len({*a} | {*b}))


def test_a_share_of_a_hundred_is_a_whole_number():
    """0.07 times 100 is a little above 7 in binary."""
    data = [torch.zeros(10, dtype=torch.long)] * 10
    for percent in range(101):
        found = perturb_interactions(data, percent / 100, n_items=3, kinds=["insert"], generator=0)
        assert sum(map(len, found)) == 100 + percent


def test_training_goes_on_where_every_user_is_left_with_one_interaction():
    base = network()
    found = FINEST(base, k=3, epochs=2, lr=0.1, perturb_ratio=1, kinds=["delete"], generator=0).fit(users())
    assert found.history_.loss.isfinite().all()
    torch.testing.assert_close(found.history_.loss, found.history_.reference_loss)


class Counts(nn.Module):
    """The items that occur most, whatever came before; no weights."""

    def __init__(self, data, learned=False):
        super().__init__()
        counts = torch.cat(data).bincount(minlength=ITEMS).double()
        self.counts = counts + torch.arange(ITEMS) / 100
        if learned:
            self.register_buffer("kept", counts)

    def forward(self, items):
        return self.counts.expand(*items.shape, -1)


@pytest.mark.parametrize("learned", [False, True], ids=["bare", "buffers"])
def test_recommenders_without_weights_can_be_compared(learned):
    data, changed = users(20), users(20, seed=50)
    found = rank_stability(lambda d: Counts(d, learned), data, [data, changed], data, k=4)
    torch.testing.assert_close(found.rbo[0], torch.ones(20, dtype=F64))
    assert float(found.rbo[1].max()) < 0.99


def test_lists_are_the_same_in_chunks(monkeypatch):
    from perturbkit.core import Oracle

    model, data = network(), users(9)
    whole = reference_lists(model, data, 4)
    monkeypatch.setattr(Oracle, "_size", lambda self, rows, kind: 2)
    assert torch.equal(reference_lists(model, data, 4).lists, whole.lists)
    assert model.training
