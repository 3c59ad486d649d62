"""Oracles of PhotoGuard: least squares in a box, edits in closed form, masks, and measures by scikit-image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from _common import Example
from perturbkit.core import CosineSchedule, FlowSchedule, Oracle, VPSchedule, assign, flatten
from perturbkit.core.random import randn, uniform
from perturbkit.robust import LatentEditor, diffusion_immunize, editing_report, encoder_immunize

F64 = torch.float64


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


class Network(nn.Module):
    """A conditional network of flat latents."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 6)
        )

    def forward(self, z, t, condition):
        return self.body(torch.cat([z, t[:, None], nn.functional.one_hot(condition, 3).to(z)], 1))


def network():
    encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6))
    decode = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    return nn.Sequential(encode, decode, Network())


def editor_of(model, **options):
    options = {"strength": 0.6, "n_steps": 3, **options}
    return LatentEditor(model[0], model[1], model[2], VPSchedule(), predicts="v", **options)


def filled(seed=0):
    with torch.random.fork_rng(devices=[]):
        model = network().double()
    assign(model, 0.4 * randn((len(flatten(model)),), generator=stream(seed), dtype=F64))
    return model


def data(n=4, dtype=F64, seed=1, shape=(1, 8, 8)):
    return uniform((n, *shape), 0.2, 0.8, generator=stream(seed), dtype=dtype), torch.arange(n) % 3


def spatial(predict=lambda z, t: 0.5 * z, **options):
    """An editor of images themselves, with a network of one line."""
    return LatentEditor(lambda x: x, lambda z: z, predict, VPSchedule(), predicts="x0", **options)


def with_model(model, generator, dtype):
    x, y = data(dtype=dtype)
    editor = editor_of(model)
    first = encoder_immunize(model[0], x, n_steps=3, generator=generator)
    return {
        "encoder": first,
        "diffusion": diffusion_immunize(editor, x, y, n_steps=2, grad_reps=2, generator=generator),
        "edit": editor.edit(x, y, generator=generator),
        "report": editing_report(editor, x, first.x, y, generator=generator),
    }


def chunked(size):
    x, y = data(5)
    editor = editor_of(filled(), chunk_size=size)
    return [
        encoder_immunize(Oracle(filled()[0], chunk_size=size), x, n_steps=4, generator=0).x,
        diffusion_immunize(editor, x, y, n_steps=3, grad_reps=3, generator=0).x,
        editor.edit(x, y, generator=0),
    ]


X, Y = data()
NOISE = torch.zeros(4, 5, dtype=F64)

EXAMPLE = Example(
    model=network,
    with_model=with_model,
    chunked=chunked,
    refusals=(
        (lambda: encoder_immunize(filled()[0], X[0]), "x has shape"),
        (lambda: encoder_immunize(filled()[0], X, -0.1), "epsilon is -0.1"),
        (lambda: encoder_immunize(filled()[0], X, norm="l1"), "norm is 'l1'"),
        (lambda: encoder_immunize(filled()[0], X, n_steps=0), "n_steps is 0"),
        (lambda: encoder_immunize(filled()[0], X, step_size=0.0), "step_size is 0"),
        (lambda: encoder_immunize(filled()[0], X, target_latent=NOISE), "target_latent has shape"),
        (lambda: encoder_immunize(filled()[0], 3 * X), "the intersection is empty"),
        (lambda: encoder_immunize(filled()[0], X, bounds=(1.0, 0.0)), r"bounds\[0\] is 1"),
        (lambda: encoder_immunize(filled()[0], X, bounds=(1.0,)), "bounds is"),
        (lambda: diffusion_immunize(spatial(), X, bounds=0.5), "bounds is 0.5"),
        (lambda: diffusion_immunize(spatial(), X, target_image=0.5), "target_image is 0.5"),
        (lambda: editor_of(filled()).edit(X, [0, 1, 2, 0]), "condition is .*torch.Tensor"),
        (lambda: spatial().edit(X, mask=1), "mask is 1"),
        (lambda: spatial().edit(X, mask=2 * X[:1]), "the largest value of mask is"),
        (lambda: spatial().edit(X, mask=-X[:1]), "the least value of mask is"),
        (lambda: editing_report(spatial(), X, None), "immunized is None"),
        (lambda: editing_report(spatial(), X, X / 0), "immunized holds"),
        (lambda: editing_report(spatial(), 255 * X, X), "clean has values from"),
        (lambda: editing_report(spatial(), X, 2 * X - 1), "immunized has values from"),
        (lambda: editing_report(spatial(), X, X, classifier=lambda z: z.flatten(1).sum(1), wanted=Y), "the model answered shape"),
        (lambda: editing_report(spatial(), X, X, classifier=lambda z: z.flatten(1)[:, :2], wanted=Y), "y holds labels from 0 to 2"),
        (lambda: diffusion_immunize(filled(), X, Y), "editor is a Sequential"),
        (lambda: diffusion_immunize(editor_of(filled()), X, Y[1:]), "condition has shape"),
        (lambda: diffusion_immunize(editor_of(filled()), X, Y, grad_reps=0), "grad_reps is 0"),
        (lambda: diffusion_immunize(editor_of(filled()), X, Y, target_image=X[:3]), "target_image has shape"),
        (lambda: diffusion_immunize(editor_of(filled()), X, Y, mask=X), "a mask is given"),
        (lambda: spatial().edit(X, mask=X[..., 1:]), "mask has shape"),
        (lambda: editor_of(filled()).edit(X, Y, noise=NOISE), "noise has shape"),
        (lambda: editor_of(filled(), strength=0.0), "strength is 0"),
        (lambda: editor_of(filled(), n_steps=0), "n_steps is 0"),
        (lambda: editor_of(filled(), chunk_size=0), "chunk_size is 0"),
        (lambda: LatentEditor(nn.Flatten(), nn.Flatten(), nn.Flatten(), None), "schedule is a NoneType"),
        (lambda: editing_report(spatial(), X, X[1:]), "immunized has shape"),
        (lambda: editing_report(spatial(), X[..., 2:], X[..., 2:]), "the side of the images is 6"),
        (lambda: editing_report(spatial(), X, X, classifier=filled()[0]), "wanted is None"),
    ),
    stochastic=True,
)  # fmt: skip


# -- the editor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [VPSchedule(), CosineSchedule(), FlowSchedule()], ids=["vp", "cosine", "flow"]
)
@pytest.mark.parametrize("n_steps", [1, 4])
def test_an_edit_is_ddim_between_encoder_and_decoder(schedule, n_steps):
    """Against the recursion of DDIM as it is in its paper, for a network that answers the data."""
    guess = lambda z, t, c: 0.3 * z + c[:, None, None, None]
    editor = LatentEditor(
        lambda x: 2 * x, lambda z: z / 2 + 1, guess, schedule, predicts="x0", strength=0.7, n_steps=n_steps
    )
    x = data()[0]
    c, noise = randn((4,), generator=stream(2), dtype=F64), randn(x.shape, generator=stream(3), dtype=F64)
    times = [0.7 * schedule.t_max * (1 - i / n_steps) for i in range(n_steps)]
    z = float(schedule.alpha(times[0])) * 2 * x + float(schedule.sigma(times[0])) * noise
    for s, t in zip(times, [*times[1:], None], strict=True):
        x0 = guess(z, s, c)
        if t is None:
            z = x0
        else:
            eps = (z - float(schedule.alpha(s)) * x0) / float(schedule.sigma(s))
            z = float(schedule.alpha(t)) * x0 + float(schedule.sigma(t)) * eps
    torch.testing.assert_close(editor.edit(x, c, noise=noise), z / 2 + 1, rtol=1e-9, atol=1e-9)


def test_a_perfect_network_returns_the_image_and_a_point_mass_its_point():
    x, _ = data(1)
    noise = randn(x.shape, generator=stream(4), dtype=F64)
    knows = LatentEditor(lambda x: x, lambda z: z, lambda z, t: noise, VPSchedule(), strength=0.4)
    torch.testing.assert_close(knows.edit(x, noise=noise), x)
    point = spatial(lambda z, t: torch.full_like(z, 0.25))
    torch.testing.assert_close(point.edit(x, generator=0), torch.full_like(x, 0.25))


def test_an_edit_asks_the_network_once_a_step():
    calls = []
    editor = spatial(lambda z, t: (calls.append(len(z)), z)[1], n_steps=6, chunk_size=4)
    editor.edit(data()[0], generator=0)
    assert calls == 6 * [4]


def test_a_mask_keeps_the_rest_and_its_noise():
    x, _ = data(3)
    mask = torch.zeros(1, 1, 8, 8, dtype=F64)
    mask[..., :4] = 1
    seen = []
    schedule = VPSchedule()

    def predict(z, t):
        seen.append((z, t))
        return torch.full_like(z, 0.9)

    noise = randn(x.shape, generator=stream(5), dtype=F64)
    editor = LatentEditor(
        lambda x: x, lambda z: z + 0.05, predict, schedule, predicts="x0", n_steps=4, chunk_size=3
    )
    out = editor.edit(x, mask=mask, noise=noise)
    assert torch.equal(out[..., 4:], x[..., 4:])
    torch.testing.assert_close(out[..., :4], torch.full_like(x[..., :4], 0.95))
    for z, t in seen:
        torch.testing.assert_close(z[..., 4:], schedule.add_noise(x, noise, t[0])[..., 4:])
    torch.testing.assert_close(editor.edit(x, mask=mask.expand(3, 1, 8, 8), noise=noise), out)


# -- protection -----------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_linear_encoder_is_brought_to_the_least_squares_in_the_box(seed):
    g = stream(seed)
    w = randn((5, 16), generator=g, dtype=F64)
    x = uniform((3, 1, 4, 4), generator=g, dtype=F64)
    goal = 2 * randn((1, 5), generator=g, dtype=F64)
    found = encoder_immunize(lambda z: z.flatten(1) @ w.T, x, 0.08, target_latent=goal, generator=g)
    for row in range(3):
        flat = x[row].flatten().numpy()
        bounds = np.maximum(flat - 0.08, 0) - 1e-12, np.minimum(flat + 0.08, 1) + 1e-12
        best = 2 * lsq_linear(w.numpy(), goal[0].numpy(), bounds, tol=1e-12).cost
        assert best * (1 - 1e-6) <= float(found.distance[row]) <= 1.02 * best + 1e-3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_perturbation_stays_in_ball_and_bounds_and_survives_8_bits(norm):
    x = uniform((6, 1, 8, 8), generator=stream(6), dtype=F64)
    found = encoder_immunize(filled()[0], x, 0.06, n_steps=20, norm=norm, generator=0)
    delta = (found.x - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert float(size.max()) <= 0.06 + 1e-12
    assert norm == "l2" or float(size.min()) > 0.055
    assert float(found.x.min()) >= 0
    assert float(found.x.max()) <= 1
    rounded = (255 * found.x).round() / 255
    assert float((rounded - x).abs().max()) <= 0.06 + 1 / 510 + 1e-12
    with torch.no_grad():
        encode = filled()[0].eval()
        goal = encode(torch.full_like(x[:1], 0.5))
        final, kept, before = ((encode(z) - goal).square().sum(1) for z in (found.x, rounded, x))
    torch.testing.assert_close(final, found.distance)
    assert bool((kept < before).all())
    assert bool((final < before).all())


def test_wider_bounds_are_for_images_of_another_range():
    x = 2 * uniform((2, 1, 8, 8), generator=stream(7), dtype=F64) - 1
    found = encoder_immunize(
        lambda z: z.flatten(1), x, 0.1, target_latent=torch.full((64,), -5.0), bounds=(-1, 1), generator=0
    )
    torch.testing.assert_close(found.x, (x - 0.1).clamp(min=-1))
    # Without a target the middle of the bounds is: all of what is near enough is there.
    middle = encoder_immunize(lambda z: z.flatten(1), x, 0.1, bounds=(-1, 1), generator=0)
    torch.testing.assert_close(middle.x, x - x.clamp(-0.1, 0.1), rtol=0, atol=2e-3)


def test_no_radius_leaves_images_and_edits_as_they_are():
    x, y = data()
    editor = editor_of(filled())
    for found in (
        encoder_immunize(filled()[0], x, 0.0, n_steps=2),
        diffusion_immunize(editor, x, y, 0.0, n_steps=2, grad_reps=1),
    ):
        assert torch.equal(found.x, x)
        report = editing_report(editor, x, found.x, y, generator=1)
        assert torch.equal(report.clean_edit, report.immunized_edit)
        torch.testing.assert_close(report.similarity, torch.ones(4, dtype=F64))
        assert bool((report.edit_psnr == torch.inf).all())
        assert not bool(report.latent_shift.any())


def test_a_linear_editor_is_moved_to_the_corner_and_not_inside_the_mask():
    x, _ = data(3)
    target = torch.where(torch.arange(8) % 2 == 0, 9.0, -9.0).to(F64).expand(1, 1, 8, 8)
    editor = spatial(n_steps=2)
    found = diffusion_immunize(
        editor, x, None, 0.05, target_image=target, n_steps=60, grad_reps=3, generator=0
    )
    torch.testing.assert_close(found.x, x + 0.05 * target.sign())
    mask = torch.zeros(1, 1, 8, 8, dtype=F64)
    mask[..., 5:] = 1
    found = diffusion_immunize(
        editor, x, None, 0.05, target_image=target, mask=mask, n_steps=60, grad_reps=3, generator=0
    )
    torch.testing.assert_close(found.x, x + 0.05 * (1 - mask) * target.sign())


def test_noise_is_averaged_over_and_counted():
    """For an edit ``u^2`` of ``u = a x + s noise`` the mean of ``(u^2 - t)^2`` is least at ``(a x)^2 = t - 3 s^2``."""
    editor = LatentEditor(
        lambda x: x, torch.square, lambda z, t: z, VPSchedule(), predicts="x0", n_steps=1, strength=0.1
    )
    alpha, sigma = (float(f(0.1)) for f in (VPSchedule().alpha, VPSchedule().sigma))
    x = torch.full((2, 1, 2, 2), 0.5, dtype=F64)
    target = torch.full((1, 1, 2, 2), (alpha * 0.53) ** 2 + 3 * sigma**2, dtype=F64)
    found = diffusion_immunize(
        editor, x, None, 0.1, target_image=target, n_steps=60, grad_reps=1000, generator=0
    )
    torch.testing.assert_close(found.x, torch.full_like(x, 0.53), rtol=0, atol=0.025)
    u = alpha * 0.53 + sigma * randn((10**6,), generator=stream(10), dtype=F64)
    assert float(found.distance.mean()) == pytest.approx(
        4 * float((u**2 - target[0, 0, 0, 0]).square().mean()), rel=0.1
    )
    assert found.cost.ngrad == 2 * 60 * 1000
    assert found.cost.nfev == 2 * 61 * 1000


def test_the_first_step_is_a_twelfth_of_the_radius():
    x, _ = data()
    for norm in ("linf", "l2"):
        default, given = (
            encoder_immunize(filled()[0], x, 0.12, n_steps=1, step_size=step, norm=norm, generator=3).x
            for step in (None, 0.01)
        )
        assert torch.equal(default, given)


def test_checkpoints_change_nothing():
    x, y = data()
    plain, kept = (
        diffusion_immunize(editor_of(filled(), checkpointing=c), x, y, n_steps=3, grad_reps=2, generator=0)
        for c in (False, True)
    )
    torch.testing.assert_close(plain.x, kept.x, rtol=0, atol=1e-12)


def test_both_ways_disturb_edits_more_than_noise_of_that_size():
    x, y = data(8)
    editor = editor_of(filled(), strength=0.3)
    noise = x + 0.06 * uniform(x.shape, -1, 1, generator=stream(9), like=x).sign()
    goal = lambda z: editing_report(editor, x, z, y, generator=1).edit_psnr.mean()
    by_noise = float(goal(noise))
    assert float(goal(encoder_immunize(filled()[0], x, n_steps=50, generator=0).x)) < by_noise - 3
    found = diffusion_immunize(
        editor, x, y, target_image=torch.ones_like(x), n_steps=50, grad_reps=4, generator=0
    )
    assert float(goal(found.x)) < by_noise - 3


# -- the report -----------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_measures_are_those_of_scikit_image(seed):
    x, _ = data(3, seed=seed, shape=(2, 9, 12))
    other = (x + 0.2 * randn(x.shape, generator=stream(seed + 1), dtype=F64)).clamp(0, 1)
    same = spatial(lambda z, t: z, strength=1e-6, n_steps=1)
    report = editing_report(same, x, other, generator=0)
    for row in range(3):
        a, b = (z[row].numpy() for z in (report.clean_edit, report.immunized_edit))
        wanted = structural_similarity(a, b, win_size=7, channel_axis=0, data_range=1.0)
        assert float(report.similarity[row]) == pytest.approx(wanted, abs=1e-9)
        assert float(report.edit_psnr[row]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1.0))
        image = peak_signal_noise_ratio(x[row].numpy(), other[row].numpy(), data_range=1.0)
        assert float(report.image_psnr[row]) == pytest.approx(image)
        shift = np.linalg.norm(other[row] - x[row]) / np.linalg.norm(x[row])
        assert float(report.latent_shift[row]) == pytest.approx(float(shift))


def test_success_is_what_the_classifier_sees_in_each_edit():
    x = torch.stack([torch.full((1, 8, 8), v, dtype=F64) for v in (0.1, 0.9)])
    classifier = lambda z: torch.stack([1 - z.mean((1, 2, 3)), z.mean((1, 2, 3))], 1)
    same = spatial(lambda z, t: z, strength=1e-6, n_steps=1)
    report = editing_report(same, x, 1 - x, classifier=classifier, wanted=torch.tensor([0, 0]), generator=0)
    assert report.clean_success.tolist() == [True, False]
    assert report.immunized_success.tolist() == [False, True]
    asked = editing_report(
        spatial(lambda z, t, c: z, strength=1e-6, n_steps=1),
        x,
        x,
        torch.tensor([0, 1]),
        classifier=classifier,
    )
    assert asked.clean_success.tolist() == [True, True]


def test_both_edits_have_the_noise_of_the_generator():
    x, y = data()
    editor = editor_of(filled())
    for seed in (3, 4):
        report = editing_report(editor, x, 1 - x, y, generator=seed)
        torch.testing.assert_close(report.clean_edit, editor.edit(x, y, generator=seed))
        torch.testing.assert_close(report.immunized_edit, editor.edit(1 - x, y, generator=seed))


def test_bounds_are_the_peak_of_the_signal():
    x, _ = data(3, shape=(1, 9, 9))
    other = (x + 0.1 * randn(x.shape, generator=stream(3), dtype=F64)).clamp(0, 1)
    same = spatial(lambda z, t: z, strength=1e-6, n_steps=1)
    unit = editing_report(same, x, other, generator=0)
    wide = editing_report(same, 2 * x - 1, 2 * other - 1, bounds=(-1.0, 1.0), generator=0)
    for name in ("similarity", "edit_psnr", "image_psnr"):
        torch.testing.assert_close(getattr(wide, name), getattr(unit, name), rtol=1e-4, atol=1e-4)


def test_the_encoder_is_asked_as_often_as_is_said():
    rows = {"n": 0}

    def encode(x):
        rows["n"] += len(x)
        return x

    x, _ = data(2)
    editor = LatentEditor(
        encode, lambda z: z, lambda z, t: 0.5 * z, VPSchedule(), predicts="x0", n_steps=2, chunk_size=8
    )
    found = diffusion_immunize(editor, x, n_steps=10, grad_reps=3, generator=0)
    # Besides: one for the shape of latents, and one on which memory is measured.
    assert rows["n"] == found.cost.nfev + 2 == 2 * 3 * 11 + 2
    rows["n"] = 0
    found = encoder_immunize(Oracle(encode, chunk_size=8), x, n_steps=10, generator=0)
    assert rows["n"] == found.cost.nfev == 2 * 11 + 2


def test_graphs_of_images_end():
    x, y = data()
    leaf = x.clone().requires_grad_()
    assert not encoder_immunize(filled()[0], leaf, n_steps=1).x.requires_grad
    found = diffusion_immunize(editor_of(filled()), leaf, y, n_steps=1, grad_reps=1)
    assert not found.x.requires_grad
    assert not editing_report(editor_of(filled()), leaf, found.x, y).image_psnr.requires_grad


def test_networks_are_as_before_where_one_fails():
    def fail(*_):
        raise ValueError("no more memory for this")

    model = filled().train()
    model[1][2].register_forward_hook(fail)
    x, y = data()
    with pytest.raises(ValueError, match="no more memory"):
        diffusion_immunize(editor_of(model), x, y, n_steps=1, grad_reps=1)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
