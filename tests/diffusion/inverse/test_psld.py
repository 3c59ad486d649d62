"""Oracles of PSLD: a step of DPS written out, a gluing term that vanishes, a Gaussian posterior by normal equations."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.diffusion import (
    BlackBox,
    Blur,
    Inpainting,
    LinearOperator,
    PhaseRetrieval,
    sample_ddim,
    sample_psld,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VP, gaussian, mixture
from _worlds import start as started

EDM = EDMSchedule(10.0)
TIMES = EDM.times(10, t_end=0.05)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Matrix(LinearOperator):
    def __init__(self, matrix):
        self.matrix = matrix

    def __call__(self, x):
        return x @ self.matrix.to(x).T

    def adjoint(self, y):
        return y @ self.matrix.to(y)


def frame(d, k, seed=0):
    """Orthonormal columns, the linear autoencoder."""
    return torch.linalg.qr(draw(d, k, seed=seed))[0]


def unit(matrix):
    """Scaled to a largest singular value of one: a squared norm's steps are stable for weights below one."""
    return Matrix(matrix / torch.linalg.matrix_norm(matrix, 2))


S, A = frame(6, 3), unit(draw(2, 6, seed=1))
CODE = {"encode": lambda x: x @ S.to(x), "decode": lambda z: z @ S.to(z).T}
PRIOR, START, Y = gaussian(EDM), 10 * draw(5, 3, seed=2), draw(5, 2, seed=3)


EXAMPLE = Example(
    # The decoder is trainable and has statistics that evaluation leaves alone.
    model=lambda: torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh()),
    with_model=lambda model, generator, dtype: sample_psld(
        PRIOR,
        START.to(dtype),
        TIMES,
        A,
        Y.to(dtype),
        encode=CODE["encode"],
        decode=model,
        base="ddpm",
        generator=generator,
    ),
    read=lambda result: [result.x, result.extras["latent"], result.extras["residual"]],
    stochastic=True,
    refusals=(
        (lambda: sample_psld(PRIOR, START, TIMES, A, Y[:3], **CODE), "one row for all"),
        (lambda: sample_psld(PRIOR, START, TIMES, A, Y[:, :1], **CODE), "y has shape"),
        (lambda: sample_psld(PRIOR, START, TIMES, lambda x: x, Y), "has no pseudo-inverse"),
        (lambda: sample_psld(PRIOR, START, TIMES, A, Y, measurement_weight=-1.0), "measurement_weight is -1"),
        (lambda: sample_psld(PRIOR, START, TIMES, A, Y, gluing_weight=-1.0), "gluing_weight is -1"),
        (lambda: sample_psld(PRIOR, START, TIMES, A, Y, norm="l1"), "norm is 'l1'"),
        (lambda: sample_psld(PRIOR, START, TIMES, A, Y, base="euler"), "base is 'euler'"),
        (
            lambda: sample_psld(PRIOR, START, TIMES, BlackBox(lambda x: x), START, gluing_weight=0.0),
            "gradient through a black box",
        ),
        (
            lambda: sample_psld(PRIOR, START, TIMES, lambda x: x.detach(), START, gluing_weight=0.0),
            "forward answers without a gradient",
        ),
        (
            lambda: sample_psld(PRIOR, START, TIMES, A, Y, encode=lambda x: x, decode=CODE["decode"]),
            "encode answered shape",
        ),
        (lambda: sample_psld(PRIOR, START, TIMES.flip(0), A, Y), "strictly decreasing"),
        (
            lambda: sample_psld(
                Denoiser(lambda x, t: x.detach(), EDM, predicts="x0"), START, TIMES, A, Y, **CODE
            ),
            "answers without a gradient",
        ),
    ),
)


@pytest.mark.parametrize("norm", ["plain", "squared"])
@pytest.mark.parametrize(
    "forward", [PhaseRetrieval(2.0), Matrix(draw(3, 8, seed=9))], ids=["phase", "matrix"]
)
def test_without_autoencoder_it_is_dps(norm, forward):
    prior, _ = mixture(schedule=EDM)
    x = 10 * draw(4, 8, seed=4)
    y = forward(draw(4, 8, seed=5))
    found = sample_psld(prior, x, TIMES, forward, y, gluing_weight=0.0, measurement_weight=0.3, norm=norm).x
    for s, t in itertools.pairwise(TIMES.tolist()):
        x = x.clone().requires_grad_()
        clean = prior.x0(x, s)
        squares = (y - forward(clean)).square().sum(1)
        loss = (squares if norm == "squared" else squares.sqrt()).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        x = (clean + (t / s) * (x - clean) - 0.3 * gradient).detach()
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("base", ["ddim", "ddpm"])
@pytest.mark.parametrize("schedule", [EDM, VP], ids=["edm", "vp"])
def test_without_weights_it_is_the_plain_sampler(schedule, base):
    prior, times = gaussian(schedule), schedule.times(8, t_end=0.01)
    x = started(5, 3, schedule)
    found = sample_psld(
        prior,
        x,
        times,
        A,
        Y,
        decode=CODE["decode"],
        measurement_weight=0.0,
        gluing_weight=0.0,
        base=base,
        generator=4,
    )
    expected = sample_ddim(prior, x, times, eta=float(base == "ddpm"), generator=4).x
    torch.testing.assert_close(found.extras["latent"], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.x, expected @ S.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.extras["residual"], (found.x @ A.matrix.T - Y).norm(dim=1))
    assert found.cost.nfev == 8 * 5


@pytest.mark.parametrize("norm", ["plain", "squared"])
def test_gluing_vanishes_where_all_agrees(norm):
    # The first latent is always 1, and it is all that is measured: z0 is a fixed point of decode, put in, encode.
    def x0(z, t):
        return torch.cat([torch.ones_like(z[:, :1]), (z / (1 + t[:, None]))[:, 1:]], 1)

    prior = Denoiser(x0, EDM, predicts="x0")
    first = Matrix(S[:, :1].T)

    def run(y, weight):
        options = {"measurement_weight": 0.0, "gluing_weight": weight, "norm": norm}
        return sample_psld(prior, START, TIMES, first, torch.full((1, 1), y).double(), **CODE, **options).x

    torch.testing.assert_close(run(1.0, 1.0), run(1.0, 0.0), rtol=1e-12, atol=1e-12)
    # An encoder that is not the decoder's inverse does not agree.
    CROOKED = {"encode": lambda x: 2 * (x @ S), "decode": CODE["decode"]}
    options = {"measurement_weight": 0.0, "gluing_weight": 0.1, "norm": norm}
    other = sample_psld(prior, START, TIMES, first, torch.ones(1, 1).double(), **CROOKED, **options).x
    assert float((other - run(1.0, 0.0)).norm()) > 0.1


def test_gluing_step_by_hand():
    # One step, written with matrices: x0 = g z, glued = S'(S z0 + A^+ (y - A S z0)), so z0 - glued = B z0 - S' A^+ y.
    times, gain = torch.tensor([2.0, 1.0]).double(), 0.5 / (0.5 + 4)
    plus = torch.linalg.pinv(A.matrix)
    b = S.T @ plus @ A.matrix @ S
    gap = gain * START @ b.T - Y @ plus.T @ S
    options = {"measurement_weight": 0.0, "gluing_weight": 0.2, "norm": "squared"}
    found = sample_psld(PRIOR, START, times, A, Y, **CODE, **options).extras["latent"]
    expected = (gain + (1 - gain) / 2) * START - 0.2 * 2 * gain * gap @ b
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", ["ddim", "ddpm"])
def test_gaussian_posterior_mean(base):
    # Two measurements of three latents. DPS is biased: its spread is not that of the posterior, its mean is within a tenth.
    mean, root = draw(3, seed=6), draw(3, 3, seed=7)
    c = root @ root.T + 0.3 * torch.eye(3).double()

    def x0(z, t):
        gain = c @ torch.linalg.inv(c + float(t[0]) ** 2 * torch.eye(3).double())
        return mean + (z - mean) @ gain.T

    schedule = EDMSchedule(20.0)
    m = A.matrix @ S
    y = m @ (mean + root @ draw(3, seed=8))
    posterior = mean + c @ m.T @ torch.linalg.solve(m @ c @ m.T, y - m @ mean)
    found = sample_psld(
        Denoiser(x0, schedule, predicts="x0"),
        20 * draw(300, 3, seed=9),
        schedule.times(200, t_end=0.01),
        A,
        y[None],
        **CODE,
        measurement_weight=0.7,
        gluing_weight=0.1,
        norm="squared",
        base=base,
        generator=1,
    )
    assert float((found.extras["latent"].mean(0) - posterior).norm() / posterior.norm()) < 0.1
    assert float(found.extras["residual"].mean() / y.norm()) < 0.05


def test_rows_do_not_see_each_other():
    many = sample_psld(PRIOR, START, TIMES, A, Y, **CODE).x
    one = sample_psld(PRIOR, START[2:3], TIMES, A, Y[2:3], **CODE).x
    torch.testing.assert_close(many[2:3], one, rtol=1e-9, atol=1e-9)


def test_a_given_pseudo_inverse_and_images():
    prior, x = gaussian(EDM), 10 * draw(2, 1, 6, 6)
    blur = Blur(0.8, boundary="zero")
    y = blur(draw(2, 1, 6, 6, seed=1))
    options = {"gluing_weight": 0.2, "norm": "squared"}
    plain = sample_psld(prior, x, TIMES, blur, y, **options).x
    same = sample_psld(prior, x, TIMES, lambda x: blur(x), y, pinv=blur.pinv, **options).x
    torch.testing.assert_close(plain, same)
    other = sample_psld(prior, x, TIMES, blur, y, pinv=blur.adjoint, **options).x
    assert float((plain - other).norm()) > 1e-3
    seen = []
    mask = Inpainting(torch.ones(6, 6, dtype=torch.bool))
    sample_psld(prior, x, TIMES, mask, mask(x), callback=lambda i, z: seen.append(i))
    assert seen == list(range(10))


def test_noiseless_measurements_are_met_at_a_solution():
    # Full column rank: the truth is the only latent that fits, and squared norms settle on it.
    matrix = unit(draw(5, 6, seed=11))
    z = draw(1, 3, seed=12)
    schedule = EDMSchedule(20.0)
    found = sample_psld(
        gaussian(schedule),
        20 * draw(4, 3, seed=13),
        schedule.times(300, t_end=0.005),
        matrix,
        matrix(CODE["decode"](z)),
        **CODE,
        measurement_weight=0.7,
        norm="squared",
    )
    assert float((found.extras["latent"] - z).norm(dim=1).max() / z.norm()) < 0.02
    assert math.isfinite(float(found.x.sum()))


@pytest.mark.parametrize("norm", ["plain", "squared"])
def test_a_step_with_a_crooked_autoencoder(norm):
    # Neither linear nor inverse to each other: signs and Jacobians of both terms show.
    def encode(x):
        return (x @ S).tanh() + 0.1

    def decode(z):
        return (z @ S.T).sin()

    times = torch.tensor([2.0, 1.0]).double()
    plus = torch.linalg.pinv(A.matrix)
    leaf = START.clone().requires_grad_()
    clean = leaf * 0.5 / (0.5 + 4)
    image = decode(clean)
    wrong = Y - image @ A.matrix.T
    gap = clean - encode(image @ (torch.eye(6) - plus @ A.matrix).T + Y @ plus.T)
    power = 1.0 if norm == "squared" else 0.5
    loss = 0.6 * wrong.square().sum(1) ** power + 0.3 * gap.square().sum(1) ** power
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    expected = (clean + (leaf - clean) / 2 - gradient).detach()
    options = {"measurement_weight": 0.6, "gluing_weight": 0.3, "norm": norm}
    found = sample_psld(PRIOR, START, times, A, Y, encode=encode, decode=decode, **options)
    torch.testing.assert_close(found.extras["latent"], expected, rtol=1e-9, atol=1e-9)
