"""Oracles of OSA-DAS: the cosine occlusion map as a limit, invariants, and scipy's subspace angles."""

import pytest
import torch
from scipy.linalg import subspace_angles
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import Oracle
from perturbkit.explain import minimal_size, osa_das, random_augmentations, subspace_distance


def network(seed=0, width=7, side=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * (side - 2) ** 2, width))
    net = net.to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def images(n=3, seed=1, dtype=torch.float64):
    return draw(n, 2, 6, 6, seed=seed, dtype=dtype)


def basis(*shape, seed):
    return torch.linalg.qr(draw(*shape, seed=seed))[0]


OPTIONS = {"n_augment": 5, "subspace_dim": 3}

EXAMPLE = Example(
    model=network,
    with_model=lambda model, generator, dtype: osa_das(
        model, images(dtype=dtype), window=3, stride=3, generator=generator, **OPTIONS
    ),
    chunked=lambda size: osa_das(
        Oracle(network(), chunk_size=size), images(), window=3, stride=3, generator=4, **OPTIONS
    ),
    refusals=(
        (lambda: osa_das(network(), images(), n_augment=3), "subspace_dim is 4"),
        (lambda: osa_das(network(width=2), images(), **OPTIONS), "subspace_dim is 3"),
        (lambda: osa_das(network(), images(), top_fraction=0.0), "top_fraction is 0"),
        (lambda: osa_das(network(), images(), window=7), "window is 7"),
        (lambda: osa_das(network(), images()[0]), "4 dimensions"),
        (lambda: random_augmentations(images(), n=0), "n is 0"),
        (lambda: subspace_distance(torch.eye(3), torch.eye(4)), "b has shape"),
        (lambda: minimal_size(network(), images(), images()[:1]), "explanation has shape"),
    ),
    stochastic=True,
)


def test_identity_alone_gives_the_cosine_occlusion_map():
    net, x = network(), images()
    found = osa_das(net, x, window=2, stride=2, augmentations=[lambda z: z], subspace_dim=1, baseline=0.3)
    with torch.no_grad():
        whole = net(x)
        for p in range(9):
            top, left = 2 * (p // 3), 2 * (p % 3)
            covered = x.clone()
            covered[:, :, top : top + 2, left : left + 2] = 0.3
            expected = 1 - functional.cosine_similarity(whole, net(covered)) ** 2
            torch.testing.assert_close(found.extras["distances"][:, p], expected, rtol=1e-9, atol=1e-9)
            block = found.values[:, :, top : top + 2, left : left + 2]
            share = expected / found.extras["distances"].amax(1)
            torch.testing.assert_close(block, share[:, None, None, None].expand_as(block), atol=1e-9, rtol=0)
    assert found.cost.nfev == 3 * (9 + 1)
    assert found.target is None


def test_a_pixel_averages_the_windows_that_cover_it():
    found = osa_das(network(), images(), window=3, stride=1, generator=0, **OPTIONS)
    distances = found.extras["distances"].reshape(3, 4, 4)
    total, count = torch.zeros(3, 6, 6).double(), torch.zeros(6, 6).double()
    for top in range(4):
        for left in range(4):
            total[:, top : top + 3, left : left + 3] += distances[:, top, left, None, None]
            count[top : top + 3, left : left + 3] += 1
    expected = total / count
    expected = expected / expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(found.values, expected[:, None].expand(-1, 2, -1, -1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_rotation_and_scale_of_the_features_do_not_matter(scale):
    net, x = network(), images()
    turn = basis(7, 7, seed=3)
    one, other = (
        osa_das(f, x, window=3, stride=3, generator=2, **OPTIONS)
        for f in (net, lambda z: scale * net(z) @ turn)
    )
    torch.testing.assert_close(one.extras["distances"], other.extras["distances"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_distance_agrees_with_scipy(seed):
    a, b = basis(9, 4, seed=seed), basis(9, 4, seed=seed + 50)
    expected = (torch.from_numpy(subspace_angles(a.numpy(), b.numpy())).sin() ** 2).mean()
    torch.testing.assert_close(subspace_distance(a, b), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(subspace_distance(a, a @ basis(4, 4, seed=9)), torch.zeros(()).double(), atol=1e-9, rtol=0)  # fmt: skip


def test_orthogonal_subspaces_are_at_distance_one():
    whole = basis(8, 8, seed=0)
    assert float(subspace_distance(whole[:, :3], whole[:, 3:6])) == pytest.approx(1.0, abs=1e-12)


def test_reference_basis_spans_the_leading_directions_of_the_augmented_features():
    net, x = network(), images(1)
    augmentations = random_augmentations(x, n=5, generator=3)
    found = osa_das(net, x, window=6, augmentations=augmentations, subspace_dim=2, stride=6)
    columns = torch.stack([functional.normalize(net(a(x)).detach(), dim=1)[0] for a in augmentations], 1)
    u = torch.linalg.svd(columns)[0][:, :2]
    torch.testing.assert_close(
        subspace_distance(found.extras["reference_basis"][0], u), torch.zeros(()).double(), atol=1e-10, rtol=0
    )


def test_what_the_features_ignore_scores_zero():
    x = images()
    found = osa_das(lambda z: z[:, :, :3].flatten(1), x, window=3, stride=3, subspace_dim=1, n_augment=1)
    assert float(found.values[:, :, 3:].abs().max()) < 1e-9
    assert float(found.values[:, :, :3].amax()) == 1.0


def test_fewer_windows_by_gradient():
    def f(z):
        return torch.cat([z[:, 0, :3, :3].flatten(1), 0.01 * z[:, 0, 3:, 3:].flatten(1)], 1)

    found = osa_das(f, images(), window=3, stride=3, top_fraction=0.5, generator=0, **OPTIONS)
    tried = ~found.extras["distances"].isnan()
    assert tried.sum(1).tolist() == [2, 2, 2]
    assert bool(tried[:, 0].all())
    assert bool(tried[:, 3].all())
    assert bool((found.values[:, :, :3, 3:] == 0).all())
    assert found.cost.ngrad == 3
    whole = osa_das(f, images(), window=3, stride=3, generator=0, **OPTIONS)
    torch.testing.assert_close(found.extras["distances"][tried], whole.extras["distances"][tried])


def test_augmentations_are_fixed_and_rotate_by_small_angles():
    x = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    x[0, 0, 16, 26] = 1.0  # ten pixels right of the centre
    made = random_augmentations(x, n=30, generator=0)
    assert torch.equal(made[0](x), x)
    for augment in made[1:]:
        assert torch.equal(augment(x), augment(x))
        assert augment(x).dtype == x.dtype
        row, column = divmod(int(augment(x).flatten().argmax()), 33)
        assert abs(row - 16) <= 10 * 0.26 + 33 / 8 + 1
        assert abs(column - 26) <= 10 * 0.04 + 33 / 8 + 1


def test_minimal_size_finds_the_share_that_decides():
    # The class is whether the first two of eight pixels are both there.
    def f(z):
        both = z[:, 0, 0, :2].prod(1)
        return torch.stack([both, 0.5 - 0 * both], 1)

    x = torch.ones(2, 1, 1, 8)
    scores = torch.stack([torch.arange(8.0, 0, -1), torch.arange(1.0, 9)]).reshape(2, 1, 1, 8)
    assert minimal_size(f, x, scores, n_steps=8).tolist() == [0.25, 1.0]
    assert minimal_size(f, x, scores, 1, n_steps=8).tolist() == [0.0, 0.0]
