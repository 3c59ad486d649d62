"""Oracles of the forward operators: transposes, dense matrices, the pseudo-inverse of NumPy, autograd, isometries."""

import pytest
import torch

from _common import Example
from perturbkit.diffusion import BlackBox, Blur, Downsample, Inpainting, LinearOperator, PhaseRetrieval


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Matrix(LinearOperator):
    """A dense matrix on flat rows: what a user would write."""

    def __init__(self, matrix):
        self.matrix = matrix

    def __call__(self, x):
        return x @ self.matrix.to(x).T

    def adjoint(self, y):
        return y @ self.matrix.to(y)


def box(x):
    return torch.stack([x.sum(1).sin(), x.prod(1)], 1)


KERNEL = draw(3, 5, seed=1)
EXAMPLE = Example(
    call=lambda generator, dtype: {
        "kept": Inpainting(torch.eye(6, dtype=torch.bool))(draw(2, 3, 6, 6, dtype=dtype)),
        "blurred": Blur(0.8)(draw(2, 3, 6, 6, dtype=dtype)),
        "sharp": Blur(0.4, boundary="reflect").pinv(draw(2, 1, 6, 6, dtype=dtype)),
        "small": Downsample(3)(draw(2, 3, 6, 6, dtype=dtype)),
        "magnitudes": PhaseRetrieval(1.5)(draw(2, 3, 6, 6, dtype=dtype)),
        "answers": BlackBox(box)(draw(4, 3, dtype=dtype)),
    },
    chunked=lambda size: BlackBox(box, chunk_size=size)(draw(11, 3)),
    refusals=(
        (lambda: Inpainting(torch.ones(3, 3)), "mask has dtype torch.float32"),
        (lambda: Inpainting(torch.zeros(3, dtype=torch.bool)), "0 measured entries"),
        (lambda: Inpainting(torch.ones(3, 3, dtype=torch.bool))(draw(2, 1, 3, 4)), "those of the mask"),
        (
            lambda: Inpainting(torch.ones(3, 3, dtype=torch.bool)).adjoint(draw(2, 8)),
            "one value a measured entry",
        ),
        (lambda: Blur(0.0), "kernel is 0"),
        (lambda: Blur(torch.ones(2, 3)), "odd sides"),
        (lambda: Blur(1.0, boundary="wrap"), "boundary is 'wrap'"),
        (lambda: Blur(1.0)(draw(4, 4)), "4 dimensions"),
        (lambda: Blur(2.0, boundary="reflect")(draw(1, 1, 5, 5)), "reaches 6 pixels beyond"),
        (lambda: Downsample(0), "factor is 0"),
        (lambda: Downsample(3)(draw(1, 1, 6, 7)), "sides that 3 divides"),
        (lambda: PhaseRetrieval(0.5), "oversampling is 0.5"),
        (lambda: PhaseRetrieval().vjp(draw(1, 3), draw(1, 3)), "that of the magnitudes"),
        (lambda: BlackBox(box)(draw(2, 3).requires_grad_()), "gradient through a black box"),
        (lambda: BlackBox(box, chunk_size=0), "chunk_size is 0"),
    ),
)

MASK = torch.rand(3, 6, 7, generator=torch.Generator().manual_seed(2)) > 0.4
LINEAR = {
    "inpainting": (Inpainting(MASK[0]), (2, 3, 6, 7)),
    "inpainting_channels": (Inpainting(MASK), (2, 3, 6, 7)),
    "inpainting_flat": (Inpainting(MASK[0, 0]), (5, 7)),
    "blur_circular": (Blur(KERNEL), (2, 3, 6, 7)),
    "blur_wrapped_twice": (Blur(draw(9, 11)), (2, 1, 3, 4)),
    "blur_reflect": (Blur(KERNEL, boundary="reflect"), (2, 3, 6, 7)),
    "blur_zero": (Blur(KERNEL, boundary="zero"), (2, 3, 6, 7)),
    "blur_gaussian": (Blur(0.7), (2, 3, 6, 7)),
    "downsample": (Downsample(3), (2, 3, 6, 9)),
    "matrix": (Matrix(draw(5, 8, seed=3)), (4, 8)),
    "matrix_singular": (Matrix(draw(6, 2, seed=4) @ draw(2, 8, seed=5)), (4, 8)),
}
linear = pytest.mark.parametrize("name", list(LINEAR))


@linear
@pytest.mark.parametrize("seed", [7, 8])
def test_adjoint(name, seed):
    operator, shape = LINEAR[name]
    x = draw(*shape, seed=seed)
    y = draw(*operator(x).shape, seed=seed + 100)
    left = (operator(x) * y).flatten(1).sum(1)
    right = (x * operator.adjoint(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@linear
def test_adjoint_is_what_autograd_finds(name):
    operator, shape = LINEAR[name]
    x = draw(*shape).requires_grad_()
    y = draw(*operator(x).shape, seed=9)
    (gradient,) = torch.autograd.grad(operator(x), x, y)
    torch.testing.assert_close(operator.adjoint(y), gradient, rtol=1e-12, atol=1e-12)


def dense(operator, shape):
    """The matrix of an operator on one row."""
    identity = torch.eye(int(torch.tensor(shape[1:]).prod()), dtype=torch.float64)
    return operator(identity.view(-1, *shape[1:])).flatten(1).T


@linear
def test_pinv_is_that_of_the_dense_matrix(name):
    operator, shape = LINEAR[name]
    y = draw(*operator(draw(*shape)).shape, seed=10)  # not in the range: least squares
    expected = y.flatten(1) @ torch.linalg.pinv(dense(operator, shape), rtol=1e-9).T
    torch.testing.assert_close(operator.pinv(y).flatten(1), expected, rtol=1e-7, atol=1e-8)


@linear
def test_applied_after_its_pinv_and_before(name):
    operator, shape = LINEAR[name]
    y = operator(draw(*shape, seed=11))
    torch.testing.assert_close(operator(operator.pinv(y)), y, rtol=1e-8, atol=1e-8)


@linear
def test_gradient_through_the_pinv(name):
    operator, shape = LINEAR[name]
    y = draw(*operator(draw(*shape)).shape, seed=12).requires_grad_()
    g = draw(*shape, seed=13)
    (found,) = torch.autograd.grad(operator.pinv(y), y, g)
    expected = g.flatten(1) @ torch.linalg.pinv(dense(operator, shape), rtol=1e-9)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-7, atol=1e-8)


def test_blur_is_a_convolution():
    # Against the sum over the kernel, one shift at a time: the kernel is not mirrored.
    x, (a, b) = draw(2, 2, 6, 7), (1, 2)
    for boundary in ("circular", "zero"):
        expected = torch.zeros_like(x)
        for i in range(3):
            for j in range(5):
                shifted = torch.roll(x, (i - a, j - b), (2, 3))
                if boundary == "zero":
                    rows, cols = torch.arange(6) - (i - a), torch.arange(7) - (j - b)
                    inside = ((rows >= 0) & (rows < 6))[:, None] & ((cols >= 0) & (cols < 7))
                    shifted = shifted * inside
                expected += KERNEL[i, j] * shifted
        torch.testing.assert_close(Blur(KERNEL, boundary=boundary)(x), expected, rtol=1e-12, atol=1e-12)
    row = draw(1, 1, 1, 4)
    mirrored = torch.cat([row[..., 1:2], row, row[..., 2:3]], 3)
    expected = (mirrored[..., :4] + mirrored[..., 2:]) / 2
    torch.testing.assert_close(
        Blur(torch.tensor([[0.5, 0.0, 0.5]]).double(), boundary="reflect")(row), expected
    )


def test_gaussian_blur_keeps_the_mean_and_has_its_variance():
    point = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    point[0, 0, 20, 20] = 1
    spread = Blur(2.0)(point)[0, 0]
    place = torch.arange(41.0).double() - 20
    assert abs(float(spread.sum()) - 1) < 1e-12
    assert abs(float((spread.sum(0) * place**2).sum()) - 4) < 0.15  # cut at three deviations


def test_rcond_leaves_out_weak_frequencies():
    x = draw(1, 1, 16, 16)
    strict, loose = Blur(1.5), Blur(1.5, rcond=0.1)
    noisy = strict(x) + 1e-3 * draw(1, 1, 16, 16, seed=1)
    assert float((strict.pinv(noisy) - x).norm()) > 10 * float((loose.pinv(noisy) - x).norm())


@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (4, 7)], ids=["images", "flat"])
def test_phase_retrieval(shape):
    operator, x = PhaseRetrieval(2.0), draw(*shape, seed=20).requires_grad_()
    y = operator(x)
    assert y.shape[-1] == 2 * shape[-1]
    torch.testing.assert_close(y.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))  # unitary
    torch.testing.assert_close(operator(-x), y)
    # A shift inside an empty frame changes no magnitude.
    inside = torch.nn.functional.pad(x.detach(), (1, 2))
    torch.testing.assert_close(operator(inside.roll(1, -1)), operator(inside))
    v = draw(*y.shape, seed=21)
    (gradient,) = torch.autograd.grad(y, x, v)
    torch.testing.assert_close(operator.vjp(x.detach(), v), gradient, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(operator.vjp(torch.zeros(shape).double(), v)).all()


def test_oversampled_magnitudes_give_the_autocorrelation():
    x = draw(1, 6, seed=22)
    power = PhaseRetrieval(2.0)(x).square()
    found = torch.fft.ifft(power * 12**0.5, norm="ortho").real[0, :6]
    expected = torch.stack([(x[0, k:] * x[0, : 6 - k]).sum() for k in range(6)])
    torch.testing.assert_close(found, expected)


def test_black_box_counts_and_chunks():
    seen = []

    def function(x):
        seen.append(len(x))
        return x[:, :2] ** 2

    operator, x = BlackBox(function, chunk_size=4), draw(10, 3)
    assert torch.equal(operator(x), x[:, :2] ** 2)
    assert operator.nfev == 10
    assert seen == [4, 4, 2]
    with torch.no_grad():
        operator(x.requires_grad_())
    assert operator.nfev == 20
