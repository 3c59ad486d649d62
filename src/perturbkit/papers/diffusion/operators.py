"""A diffusion prior answers blur, lost resolution, missing pixels and lost phases better than inversion without a prior.

Digits of 8x8 and a photograph that were not trained on, each measurement with noise; diffusion posterior sampling through every
operator of the room, against the pseudo-inverse and, for lost phases, gradient descent on the misfit. The prior of photographs
is a mixture of Gaussians of patches, whose denoiser is exact and is averaged over overlapping patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import fold, pad, unfold

from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.core.random import as_generator, randint, randn, randperm, uniform
from perturbkit.diffusion import Blur, Downsample, Inpainting, LinearOperator, PhaseRetrieval, sample_psld
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import exact_denoiser
from perturbkit.papers.diffusion._networks import digits_denoiser8
from perturbkit.papers.diffusion._samples import draw_sheets, png

_IMAGES, _DRAWS, _NOISE = 40, 8, 0.05
_SIDE, _PATCH = 64, 8


@paper(
    number=0,
    title="Diffusion Posterior Sampling for General Noisy Inverse Problems",
    authors="Chung, Kim, McCann, Klasky, Ye",
    year=2023,
    arxiv="2209.14687",
    claim="One sampler, guided by the gradient of the misfit through the denoiser, solves noisy deblurring, super-resolution, inpainting "
    "and phase retrieval.",
    method="perturbkit.diffusion.LinearOperator",
    needs="gradient",
    input="image",
    cost="one application of the operator and of its transpose a step",
    seconds=70,
)
def reproduce(run: Run) -> Evidence:
    """Squared errors with and without the prior."""
    from perturbkit.data import load_digits8

    g = run.generator("digits")
    test = load_digits8("test").x.flatten(1).double() * 2 - 1
    x = test[randperm(len(test), generator=g)[:_IMAGES]].view(-1, 1, 8, 8)
    prior = _images(digits_denoiser8())
    tasks: dict[
        str, tuple[LinearOperator, float, float]
    ] = {  # operator, weight, share of the baseline's error
        "blur of one pixel": (Blur(1.0, rcond=0.1), 0.9, 0.8),
        "half the resolution": (Downsample(2), 2.0, 0.8),
        "three of five pixels missing": (Inpainting(uniform((8, 8), generator=g) < 0.4), 0.5, 0.5),
    }
    comparisons, sheets = [], {"digits that were not trained on": x}
    for name, (operator, weight, factor) in tasks.items():
        y = operator(x)
        y = y + _NOISE * randn(y.shape, generator=g, like=y)
        start = _start(g)
        draws = _sampled(prior, start, operator, y, weight)
        ours, inverse = _error(draws.mean(1), x), _error(operator.pinv(y), x)
        comparisons.append(
            Comparison(
                f"squared error, {name}, against the pseudo-inverse",
                ours,
                inverse,
                "lower",
                factor=factor,
                n=_IMAGES,
            )
        )
        if isinstance(operator, Blur):
            free = _error(_sampled(prior, start, operator, y, 0.0).mean(1), x)
            comparisons.append(
                Comparison(
                    f"squared error, {name}, without guidance", free, inverse, "lower", factor=factor, n=_IMAGES,
                    control=True, note="must fail: the mean of any digits",
                )
            )  # fmt: skip
        sheets[f"{name}: pseudo-inverse"] = operator.pinv(y)
        sheets[f"{name}: one draw"] = draws[:, 0]
    phase, without, picture = _phases(prior, x, g)
    comparisons.append(
        Comparison(
            "squared error, lost phases, against gradient descent on the misfit",
            phase,
            without,
            "lower",
            factor=0.5,
            n=_IMAGES,
        )
    )
    sheets["lost phases: the best of eight draws"] = picture
    photograph, restored = _photograph(run)
    sheets = {name: (images[:12] + 1) / 2 for name, images in sheets.items()}
    figure = Figure(figsize=(6, 8), layout="constrained")
    draw_sheets(figure.subplots(len(sheets), 1), sheets, columns=12)
    notes = (
        f"{_IMAGES} digits, pixels in [-1, 1], noise of deviation {_NOISE} (0.01 on magnitudes), 150 steps, the mean of {_DRAWS} draws as the estimate; "
        "weights chosen on digits of the train part. Phases: of eight tries each, the one with the smallest misfit; errors up to point "
        "reflection and shifts by a pixel, which magnitudes do not tell apart, and for gradient descent up to the sign. The photograph: the mean "
        "of 4 draws of 30 steps, noise of deviation 0.02; its picture has a row a task: the truth, without a prior, with it. "
        "A decibel was declared; at half the resolution it is not reached (0.1), the draws being sharper but also rougher than the squares."
    )
    samples = {
        "inverse-problems.png": png(torch.cat(list(sheets.values())), columns=12),
        "photograph.png": png(torch.cat(list(restored.values())), columns=3),
    }
    return Evidence([*comparisons, *photograph], figure, notes, samples)


def _images(flat: Denoiser) -> Denoiser:
    """The denoiser of flat digits as one of images."""
    return Denoiser(lambda x, t: flat(x.flatten(1), t).view(x.shape), flat.schedule, flat.predicts)


def _start(g: torch.Generator) -> Tensor:
    return 20 * randn((_IMAGES * _DRAWS, 1, 8, 8), generator=g, dtype=torch.float64)


def _sampled(
    prior: Denoiser, start: Tensor, forward: Callable[[Tensor], Tensor], y: Tensor, weight: float
) -> Tensor:
    """Return several draws an image, by DPS."""
    found = sample_psld(
        prior, start, prior.schedule.times(150, t_end=0.02), forward, y.repeat_interleave(_DRAWS, 0),
        measurement_weight=weight, gluing_weight=0.0, norm="squared",
    )  # fmt: skip
    return found.x.view(_IMAGES, _DRAWS, 1, 8, 8)


def _error(found: Tensor, x: Tensor) -> float:
    return float((found - x).square().mean())


def _phases(prior: Denoiser, x: Tensor, g: torch.Generator) -> tuple[float, float, Tensor]:
    """Errors from magnitudes with and without the prior, and the pictures with it."""
    magnitudes = PhaseRetrieval(2.0)

    def forward(z: Tensor) -> Tensor:
        return magnitudes((z + 1) / 2)

    y = forward(x)
    y = y + 0.01 * randn(y.shape, generator=g, like=y)
    ours = _aligned(_fittest(_sampled(prior, _start(g), forward, y, 2.0), forward, y), x)
    pixels, many = (
        uniform((_IMAGES * _DRAWS, 1, 8, 8), generator=as_generator(g), like=x),
        y.repeat_interleave(_DRAWS, 0),
    )
    for _ in range(600):
        # A step of one is the projection on the magnitudes.
        pixels = pixels - magnitudes.vjp(pixels, magnitudes(pixels) - many)
    alone = _fittest((2 * pixels - 1).view(_IMAGES, _DRAWS, 1, 8, 8), forward, y)
    signs = torch.stack([(_aligned(a, x) - x).square().flatten(1).mean(1) for a in (alone, -2 - alone)])
    return _error(ours, x), float(signs.min(0).values.mean()), ours


def _fittest(draws: Tensor, forward: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Return the draw of each image whose magnitudes fit best."""
    misfit = (
        (forward(draws.flatten(0, 1)).view(_IMAGES, _DRAWS, *y.shape[1:]) - y[:, None]).flatten(2).norm(dim=2)
    )
    return draws[torch.arange(_IMAGES), misfit.argmin(1)]


def _aligned(found: Tensor, x: Tensor) -> Tensor:
    """Return images reflected and shifted by at most a pixel to come as near to others as they can."""
    padded = [pad(f, (1, 1, 1, 1), value=-1.0) for f in (found, found.flip(2, 3))]  # black beyond the edge
    ways = torch.stack([p[..., i : i + 8, j : j + 8] for p in padded for i in range(3) for j in range(3)])
    nearest = (ways - x).square().flatten(2).sum(2).argmin(0)
    return ways[nearest, torch.arange(len(x))]


def _photograph(run: Run) -> tuple[list[Comparison], dict[str, Tensor]]:
    """A grey photograph restored with a prior of patches of seven others."""
    from perturbkit.data import load_photographs

    crops = load_photographs(4, size=_SIDE).x.mean(1, keepdim=True) - 0.5
    cat = list(range(8, 12))
    x = crops[cat[:1]]
    prior = _patch_denoiser(crops[[i for i in range(len(crops)) if i not in cat]], run)
    g = run.generator("photograph")
    tasks: dict[str, tuple[LinearOperator, float, float]] = {  # operator, weight, decibels
        "blur of 1.2 pixels": (Blur(1.2, rcond=0.1), 0.9, 1.0),
        "half the resolution": (Downsample(2), 3.6, 1.0),
        "seven of ten pixels missing": (Inpainting(uniform((_SIDE, _SIDE), generator=g) < 0.3), 0.9, 5.0),
    }
    comparisons, pictures = [], {}
    for name, (operator, weight, margin) in tasks.items():
        y = operator(x)
        y = y + 0.02 * randn(y.shape, generator=g, like=y)
        found = sample_psld(
            prior, 3 * randn((4, *x.shape[1:]), generator=g, like=x), prior.schedule.times(30, t_end=0.02, spacing="karras"),
            operator, y, measurement_weight=weight, gluing_weight=0.0, norm="squared",
        )  # fmt: skip
        ours, inverse = found.x.mean(0, keepdim=True), operator.pinv(y)
        comparisons.append(
            Comparison(
                f"peak signal to noise in dB, photograph, {name}, against the pseudo-inverse",
                _decibels(ours, x),
                _decibels(inverse, x),
                "higher",
                margin=margin,
            )
        )
        pictures[name] = torch.cat([x, inverse, ours]) + 0.5
    return comparisons, pictures


def _patch_denoiser(crops: Tensor, run: Run) -> Denoiser:
    """The exact denoiser of a mixture fitted to patches, averaged where they overlap."""
    from sklearn.mixture import GaussianMixture as Fitted

    from perturbkit.data import GaussianMixture

    patches = _patches(crops)
    g = run.generator("patches")
    chosen = patches[randint(0, len(patches), (6000,), generator=g)].double().numpy()
    fitted = Fitted(10, reg_covar=2e-4, max_iter=40, tol=1e-2, random_state=run.seeds(1)[0]).fit(chosen)
    world = GaussianMixture(
        torch.tensor(fitted.means_).float(),
        covs=torch.tensor(fitted.covariances_).float(),
        weights=torch.tensor(fitted.weights_).float(),
    )
    schedule = EDMSchedule(sigma_max=3.0)
    flat = exact_denoiser(world, schedule)
    count = _joined(_patches(torch.ones(1, 1, _SIDE, _SIDE)))

    def x0(x: Tensor, t: Tensor) -> Tensor:
        return _joined(flat.x0(_patches(x), float(t[0])), len(x)) / count

    return Denoiser(x0, schedule, predicts="x0")


def _patches(images: Tensor) -> Tensor:
    return unfold(images, _PATCH, stride=2).transpose(1, 2).flatten(0, 1)


def _joined(patches: Tensor, n: int = 1) -> Tensor:
    return fold(patches.unflatten(0, (n, -1)).transpose(1, 2), (_SIDE, _SIDE), _PATCH, stride=2)


def _decibels(found: Tensor, x: Tensor) -> float:
    return -10 * float((found - x).square().mean().log10())
