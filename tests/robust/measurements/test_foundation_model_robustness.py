"""Oracles of robustness beside an oracle: itself as oracle, no steps, no constraint, and steps worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from _common import Example
from perturbkit.core import Oracle, assign, flatten
from perturbkit.core.random import randn
from perturbkit.robust import (
    LatentPerturber,
    PixelPerturber,
    StylePerturber,
    foundation_model_robustness,
    oracle_vote,
)

F64 = torch.float64


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3))


def filled(seed=0, dtype=F64):
    with torch.random.fork_rng(devices=[]):
        net = network().to(dtype)
    g = torch.Generator().manual_seed(seed)
    assign(net, 0.5 * randn((len(flatten(net)),), generator=g, dtype=dtype))
    return net


def images(n=8, seed=1, dtype=F64):
    return randn((n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(model, x, wrong=2):
    """Give the model's own answers, but for the first rows."""
    y = Oracle(model)(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % 3
    return y


def projection(rank=6, seed=3, dtype=F64):
    """An autoencoder that loses what is outside a subspace."""
    basis = torch.linalg.qr(randn((16, rank), generator=torch.Generator().manual_seed(seed), dtype=dtype)).Q
    return LatentPerturber(lambda x: x.flatten(1) @ basis, lambda code: (code @ basis.T).reshape(-1, 1, 4, 4))


FREE = PixelPerturber("l2", 100.0, bounds=None)


def measured(model, dtype=F64, **options):
    x = images(dtype=dtype)
    given = {"oracles": [filled(5, dtype)], "perturber": FREE, "max_iter": 6, "step": 0.5, **options}
    return foundation_model_robustness(model, x=x, y=labels(model, x), **given)


def with_model(model, generator, dtype):
    return measured(model, dtype, perturber=projection(dtype=dtype), judges=[filled(6, dtype)], sparsity=0.5)


def chunked(size):
    return measured(
        Oracle(filled(), chunk_size=size), oracles=[Oracle(filled(5), chunk_size=size)], judges=[filled(6)]
    )


def call_one(**options):
    return lambda: measured(filled(), **options)


EXAMPLE = Example(
    model=network,
    with_model=with_model,
    chunked=chunked,
    refusals=(
        (lambda: foundation_model_robustness(filled(), [], images() * torch.nan, torch.zeros(8).long(), perturber=FREE), "x holds 128 NaN"),
        (lambda: foundation_model_robustness(filled(), [], images()[:0], torch.zeros(0).long(), perturber=FREE), "x is empty"),
        (lambda: foundation_model_robustness(filled(), [], images(), torch.full((8,), 3), perturber=FREE), "y holds labels from 3 to 3"),
        (lambda: foundation_model_robustness(filled(), [], images(), torch.zeros(7).long(), perturber=FREE), "y has shape"),
        (lambda: foundation_model_robustness(lambda x: x.sum((1, 2, 3)), [], images(), torch.zeros(8).long(), perturber=FREE), "the model answered shape"),
        (call_one(perturber=None), "perturber is a NoneType"),
        (call_one(max_iter=-1), "max_iter is -1"),
        (call_one(step=0.0), "step is 0"),
        (call_one(max_rejections=0), "max_rejections is 0"),
        (call_one(sparsity=0.0), "sparsity is 0"),
        (call_one(sparsity=1.5), "sparsity is 1.5"),
        (call_one(oracles=[lambda x: x.sum((1, 2, 3))]), "an oracle answered shape"),
        (call_one(oracles=[3]), "fun is a int"),
        (call_one(oracles=filled(5)), "oracles or judges are a Sequential"),
        (call_one(judges=filled(5)), "oracles or judges are a Sequential"),
        (call_one(perturber=LatentPerturber(lambda x: x.flatten(1), lambda code: code)), "perturber.render answered has shape"),
        (call_one(perturber=LatentPerturber(lambda x: x, lambda code: code.detach())), "has no gradient in the code"),
        (lambda: PixelPerturber(bounds=(1.0, 0.0)), r"bounds\[0\] is 1"),
        (lambda: PixelPerturber(bounds=(1.0,)), "bounds is"),
        (lambda: StylePerturber(bounds=3), "bounds is 3"),
        (lambda: oracle_vote([filled()], 3), "x is 3"),
        (lambda: oracle_vote([], images()), "there are no oracles"),
        (lambda: LatentPerturber(None, lambda code: code), "fun is a NoneType"),
        (lambda: PixelPerturber("l3"), "norm is 'l3'"),
        (lambda: PixelPerturber(epsilon=-1.0), "epsilon is -1"),
        (lambda: StylePerturber(bounds=(1.0, 0.0)), r"bounds\[0\] is 1"),
        (lambda: StylePerturber().start(torch.zeros(2, 5)), "x has shape"),
    ),
)  # fmt: skip


PERTURBERS = {
    "pixels": FREE,
    "latent": projection(),
    "style": StylePerturber(bounds=None),
}


@pytest.mark.parametrize("kind", PERTURBERS)
@pytest.mark.parametrize("sparsity", [None, 0.2])
def test_with_itself_as_oracle_a_model_loses_nothing(kind, sparsity):
    net = filled()
    report = measured(net, oracles=[net], perturber=PERTURBERS[kind], max_iter=30, sparsity=sparsity)
    assert report.standard_accuracy == report.perturbed_accuracy == report.oracle_accuracy == 0.75
    assert report.fmr == report.retained == 1.0
    assert bool((report.steps[2:] > 0).any())
    assert torch.equal(report.images[:2], images()[:2])  # what it does not know from the start
    assert bool((report.steps[:2] == 0).all())


def test_without_steps_the_images_are_those_given():
    report = measured(filled(), max_iter=0, judges=[filled(6)])
    assert torch.equal(report.images, images())
    assert report.perturbed_accuracy == report.standard_accuracy == 0.75
    assert math.isnan(report.validity)
    recognised = Oracle(filled(5))(images()).argmax(1) == labels(filled(), images())
    assert report.oracle_accuracy == float(recognised.double().mean())
    assert report.fmr == 0.75 / report.oracle_accuracy


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(sorted(PERTURBERS)))
def test_what_moves_is_still_known_and_no_constraint_is_worse_for_the_model(seed, kind):
    net, oracle, x = filled(seed), filled(seed + 1), images(12, seed + 2)
    y = Oracle(oracle)(x).argmax(1)
    options = {"perturber": PERTURBERS[kind], "max_iter": 15, "step": 0.3}
    held = foundation_model_robustness(net, [oracle], x, y, **options)
    free = foundation_model_robustness(net, [], x, y, **options)
    assert held.oracle_accuracy == 1.0
    assert held.fmr == held.perturbed_accuracy
    assert free.perturbed_accuracy <= held.perturbed_accuracy + 1 / 12
    again = Oracle(net)(held.images).argmax(1) == y
    assert torch.equal(held.correct, again)
    assert held.perturbed_accuracy == float(again.double().mean())


def test_the_steps_are_the_normalised_gradient_halved_at_each_refusal():
    # Classes by the sign of the first value for the model, and of the second for the oracle, which refuses beyond zero.
    def model(z):
        return torch.stack([-z[:, 0] - 0.5 * z[:, 1], z[:, 0] + 0.5 * z[:, 1]], 1)

    def oracle(z):
        return torch.stack([-z[:, 1], z[:, 1]], 1)

    x = torch.tensor([[2.0, 0.3]], dtype=F64)
    options = {"perturber": FREE, "step": 0.4, "max_rejections": 4}
    down = torch.tensor([1.0, 0.5], dtype=F64) / math.sqrt(1.25)
    position, stride, refused, accepted = x[0].clone(), 0.4, 0, 0
    for count in range(1, 12):
        if refused < 4:
            trial = position - stride * down
            if trial[1] > 0:
                position, accepted = trial, accepted + 1
            else:
                stride, refused = stride / 2, refused + 1
        report = foundation_model_robustness(model, [oracle], x, torch.tensor([1]), max_iter=count, **options)
        torch.testing.assert_close(report.images[0], position)
        assert int(report.steps[0]) == accepted
    assert (refused, accepted) == (4, 3)


def test_the_sparse_variant_moves_only_where_the_first_gradient_is_largest():
    net, x = filled(), images()
    y = labels(net, x)
    report = foundation_model_robustness(net, [], x, y, perturber=FREE, max_iter=5, step=0.2, sparsity=0.25)
    gradient = Oracle(net).value_and_gradient(
        x, y, objective=lambda out, t: nn.functional.cross_entropy(out, t, reduction="none")
    )[1]
    changed = (report.images != x).flatten(1)
    assert bool((changed.sum(1) == 4).all())
    largest = gradient.flatten(1).abs().topk(4, dim=1).indices.sort(1).values
    assert torch.equal(changed.nonzero()[:, 1].reshape(8, 4), largest)


def test_pixels_stay_in_the_ball_and_the_bounds():
    x = images().sigmoid()
    net = filled()
    ball = PixelPerturber("linf", 0.1)
    report = foundation_model_robustness(net, [], x, labels(net, x), perturber=ball, max_iter=40, step=0.5)
    change = (report.images - x).abs()
    assert 0.09 < float(change.max()) <= 0.1 + 1e-12
    assert float(report.images.min()) >= 0
    assert float(report.images.max()) <= 1


def test_latent_images_lie_in_the_decoders_range_and_style_keeps_what_is_shown():
    net, x, latent = filled(), images(), projection()
    y = labels(net, x)
    found = foundation_model_robustness(net, [], x, y, perturber=latent, max_iter=5).images
    torch.testing.assert_close(latent.render(x, latent.start(found)), found)
    found = foundation_model_robustness(
        net, [], x, y, perturber=StylePerturber(bounds=None), max_iter=9
    ).images
    standard = [(z - z.mean((2, 3), keepdim=True)) / z.std((2, 3), keepdim=True) for z in (x, found)]
    torch.testing.assert_close(*standard)
    assert float((found.mean((2, 3)) - x.mean((2, 3))).abs().min()) > 0.01


def test_votes_are_the_majority_and_ties_are_none():
    def fixed(*labels):
        return lambda z: nn.functional.one_hot(torch.tensor(labels)[z[:, 0].long()], 4).float()

    zoo = [fixed(0, 1, 2, 0), fixed(0, 1, 3, 1), fixed(1, 1, 0, 2), fixed(2, 0, 3, 1), fixed(0, 0, 2, 0)]
    assert oracle_vote(zoo, torch.arange(4.0)[:, None]).tolist() == [0, 1, -1, -1]
    assert oracle_vote(zoo[:1], torch.arange(4.0)[:, None]).tolist() == [0, 1, 2, 0]


def test_validity_is_what_the_judges_say_of_the_images_that_moved():
    net, judge, x = filled(), filled(6), images(40)
    y = labels(net, x)
    options = {"perturber": FREE, "judges": [judge], "max_iter": 10, "step": 0.5}
    report = foundation_model_robustness(net, [filled(5)], x, y, **options)
    moved = report.steps > 0
    before, after = (Oracle(judge)(z).argmax(1) == y for z in (x, report.images))
    assert 0 < int(moved.sum()) < 40
    assert report.validity == pytest.approx(float(after[moved].double().mean()))
    assert report.validity != pytest.approx(float(before[moved].double().mean()))


def test_ratios_are_not_a_number_where_there_is_nothing_to_divide_by():
    x = images()
    y = (Oracle(filled())(x).argmax(1) + 1) % 3
    report = foundation_model_robustness(filled(), [filled()], x, y, perturber=FREE, max_iter=3)
    assert report.standard_accuracy == report.oracle_accuracy == 0.0
    assert math.isnan(report.fmr)
    assert math.isnan(report.retained)


def test_costs_count_the_rows_that_move():
    net, oracle = filled(), filled(5)
    report = measured(net, oracles=[oracle], max_iter=4)
    once = measured(net, oracles=[oracle], max_iter=1)
    known = int((Oracle(oracle)(images()).argmax(1) == labels(net, images())).sum())
    assert (once.cost.ngrad, once.cost.nfev) == (known, 8 + known + 8)
    assert once.oracle_cost.nfev == 8 + known + 8
    assert report.cost.ngrad == 4 * known  # fewer than five refusals: all still move
    assert foundation_model_robustness(net, [], images()[:1], labels(net, images())[:1], perturber=FREE).images.shape == (1, 1, 4, 4)  # fmt: skip


def test_a_decoder_sees_few_rows_at_once():
    """As many as its memory allows, in forward and backward passes; the images are those of all at once."""
    seen, x = [], images(40)

    def decoder(code):
        seen.append(len(code))
        wide = code.repeat(1, 200_000)  # 12.8 MB a row in float64
        return wide[:, :16].reshape(-1, 1, 4, 4) + 0 * wide.mean(1)[:, None, None, None]

    options = {"oracles": [filled(5)], "max_iter": 2, "step": 0.5}
    latent = LatentPerturber(lambda z: z.flatten(1)[:, :8].repeat(1, 2), decoder)
    net = filled()
    found = foundation_model_robustness(net, x=x, y=labels(net, x), perturber=latent, **options)
    assert max(seen) < 10
    plain = LatentPerturber(
        lambda z: z.flatten(1)[:, :8].repeat(1, 2), lambda code: code.reshape(-1, 1, 4, 4)
    )
    wanted = foundation_model_robustness(net, x=x, y=labels(net, x), perturber=plain, **options)
    torch.testing.assert_close(found.images, wanted.images)


def test_an_image_that_is_not_finite_is_refused():
    class Edge(PixelPerturber):
        def render(self, x, code):
            return torch.where((code - x).abs().amax((1, 2, 3), keepdim=True) < 0.6, code, torch.inf)

    report = measured(filled(), oracles=[], perturber=Edge("l2", 100.0, bounds=None), max_iter=20)
    assert bool(report.images.isfinite().all())
    assert bool((report.steps > 0).all())


def test_a_graph_of_the_images_ends():
    x = images(3).requires_grad_()
    report = foundation_model_robustness(filled(), [], x, torch.zeros(3).long(), perturber=FREE, max_iter=1)
    assert not report.images.requires_grad


@pytest.mark.parametrize("kind", ["latent", "pixels", "style"])
def test_each_step_follows_the_gradient_where_the_image_is(kind):
    """Four steps on a network that is not linear, by automatic differentiation through the whole chain."""
    net, x, perturber = filled().eval(), images(5), PERTURBERS[kind]
    y = labels(net, x)
    code = perturber.start(x)
    for _ in range(4):
        leaf = code.detach().requires_grad_()
        nn.functional.cross_entropy(net(perturber.render(x, leaf)), y, reduction="sum").backward()
        unit = nn.functional.normalize(leaf.grad.flatten(1), dim=1).reshape(code.shape)
        code = leaf.detach() + 0.7 * unit
    report = foundation_model_robustness(net, [], x, y, perturber=perturber, max_iter=4, step=0.7)
    torch.testing.assert_close(report.images, perturber.render(x, code))
