"""A denoiser's derivatives give the posterior's principal components, moments and marginals, without training.

Exact denoisers of Gaussian mixtures in 2, 8 and 64 dimensions, ten draws each, against the posterior in closed form; densities of
largest entropy for twenty skewed and twenty bimodal marginals. A small convolutional denoiser of digits: the components
must point where its errors are, and the eigenvalues be their size. Claimed beforehand: eigenvalues and second moments
within 1 %, third within 2 %, fourth within 5 %; median divergence of densities below 0.05; error along three components
at least three times that along random directions; error over eigenvalue between 0.5 and 2. Controls: the Gaussian of
the first two moments for bimodal marginals, and the components of an untrained network.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randint, randn, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.uncertainty import (
    DirectionalMoments,
    directional_moments,
    max_entropy_density,
    posterior_principal_components,
)

_SIGMA = 0.5


@paper(
    number=116,
    title="On the Posterior Distribution in Denoising: Application to Uncertainty Quantification",
    authors="Manor, Michaeli",
    year=2024,
    arxiv="2309.13598",
    claim="Derivatives of a denoiser give the principal components, higher moments and marginals of the posterior, with no "
    "training and no backward pass.",
    method="perturbkit.uncertainty.posterior_principal_components",
    needs="forward",
    input="any",
    cost="k rows an iteration and component; 21 rows a direction for its moments",
    seconds=40,
)
def reproduce(run: Run) -> Evidence:
    """Errors against closed forms, divergences of marginals, and a trained denoiser's errors."""
    comparisons = []
    for d in (2, 8, 64):
        worst = np.max([_mixture_errors(d, seed) for seed in run.seeds(10)], 0)
        for name, error, bound in zip(
            ("eigenvalue", "second moment", "third moment", "fourth moment"), worst, (0.01, 0.01, 0.02, 0.05), strict=True
        ):  # fmt: skip
            comparisons.append(
                Comparison(f"largest relative error of the {name}, d = {d}", error, bound, "lower", n=10)
            )
    curves = {}
    for kind in ("skewed", "bimodal"):
        found = [_divergence(kind, seed) for seed in run.seeds(20)]
        comparisons.append(
            Comparison(
                f"median divergence of four moments, {kind}", np.median([f[0] for f in found]), 0.05, "lower", n=20
            )
        )  # fmt: skip
        if kind == "bimodal":
            comparisons.append(
                Comparison(
                    "median divergence of two moments, bimodal", np.median([f[1] for f in found]), 0.05, "lower", n=20,
                    control=True, note="must fail: a Gaussian has one mode",
                )
            )  # fmt: skip
        curves[kind] = found[0][2]
    net = _denoiser(run, 1500)
    ours, other, ratio = _explained(net, run)
    comparisons.append(
        Comparison("squared error along three components over random directions", ours, other, "higher", factor=3.0, n=360)
    )  # fmt: skip
    comparisons += [
        Comparison(f"log2 of squared error over eigenvalue, component {i + 1}", math.log2(r), 0.0, "equal", margin=1.0, n=360)
        for i, r in enumerate(ratio)
    ]  # fmt: skip
    idle, chance, _ = _explained(net, run, _denoiser(run, 0))
    comparisons.append(
        Comparison(
            "squared error along an untrained denoiser's components over random directions", idle, chance, "higher",
            factor=3.0, n=360, control=True, note="must fail: its derivative knows nothing of digits",
        )
    )  # fmt: skip
    return Evidence(
        comparisons,
        _figure(curves, net, run),
        "Errors of third and fourth moments are in units of the standard deviation to that power, since a third moment may "
        "be zero. Up to 500 iterations for the mixtures: where eigenvalues are close, 50 leave the last one wrong by up to 4 % "
        "(the residuals say so). Digits of 8x8 pixels with noise 0.5, 360 test rows.",
    )


def _mixture_errors(d: int, seed: int) -> list[float]:
    """Return errors of the two largest eigenvalues and of the moments along the first component."""
    from perturbkit.data import GaussianMixture

    g = torch.Generator().manual_seed(seed)
    f64 = torch.float64
    means = (1 + 2 * uniform((1,), generator=g, dtype=f64)) * randn((3, d), generator=g, dtype=f64)
    means = means * math.sqrt(2 / d)
    a = randn((3, d, d), generator=g, dtype=f64) / math.sqrt(d)
    eye = torch.eye(d, dtype=f64)
    covs = 0.3 * a @ a.mT + 0.05 * eye
    world = GaussianMixture(means, covs=covs)
    y = world.sample(1, g) + randn((1, d), generator=g, dtype=f64)
    gain = covs @ torch.linalg.inv(covs + eye)
    weights = world.responsibilities(y, 1.0, 1.0)[0]
    centres = means + torch.einsum("kij,kj->ki", gain, y - means)
    off = centres - weights @ centres
    within = covs - gain @ covs
    exact = torch.einsum("k,ki,kj->ij", weights, off, off) + torch.einsum("k,kij->ij", weights, within)

    def denoiser(z: Tensor) -> Tensor:
        return world.posterior_mean(z, 1.0, 1.0)

    found = posterior_principal_components(denoiser, y, 1.0, n_components=2, iterations=500, generator=g)
    top = torch.linalg.eigvalsh(exact).flip(0)[:2]
    v = found.components[:, 0]
    moments = directional_moments(denoiser, y, 1.0, v)
    c, b = off @ v[0], torch.einsum("i,kij,j->k", v[0], within, v[0])
    second = weights @ (c**2 + b)
    third, fourth = weights @ (c**3 + 3 * c * b), weights @ (c**4 + 6 * c**2 * b + 3 * b**2)
    sizes = zip(moments.central[0], (second, third, fourth), (2, 3, 4), strict=True)
    return [
        float(((found.eigenvalues[0] - top) / top).abs().max()),
        *(float((m - e).abs() / second ** (k / 2)) for m, e, k in sizes),
    ]


def _divergence(kind: str, seed: int) -> tuple[float, float, tuple[np.ndarray, ...]]:
    """Return the divergences of densities from four and from two moments, and the curves."""
    from perturbkit.data import GaussianMixture

    g = torch.Generator().manual_seed(seed)
    f64 = torch.float64
    low, high = (1.0, 2.0) if kind == "skewed" else (3.5, 5.0)
    # Components of posterior deviation 1 at this distance, from a prior of variance 1.25 seen with noise of variance 5.
    distance = float(low + (high - low) * uniform((1,), generator=g, dtype=f64)) * 1.25
    share = float(0.2 + 0.3 * uniform((1,), generator=g, dtype=f64))
    means = torch.zeros(2, 8, dtype=f64)
    means[1, 0] = distance
    world = GaussianMixture(means, stds=math.sqrt(1.25), weights=torch.tensor([1 - share, share]))
    sigma = math.sqrt(5)
    # The row in the middle leaves the weights as they are.
    y = means.mean(0, keepdim=True)
    v = torch.eye(8, dtype=f64)[:1]
    moments = directional_moments(lambda z: world.posterior_mean(z, 1.0, sigma), y, sigma, v)
    centres = 0.8 * np.array([0.0, distance]) + 0.2 * distance / 2
    t = np.linspace(centres[0] - 6, centres[1] + 6, 2001)
    bells = np.exp(-((t - centres[:, None]) ** 2) / 2) / math.sqrt(2 * math.pi)
    p = np.array([1 - share, share]) @ bells
    two = DirectionalMoments(moments.mean, moments.central[:, :1], moments.cumulants[:, :1])
    q, gauss = (max_entropy_density(m, t)[0].numpy() for m in (moments, two))
    divergences = [float(np.trapezoid(p * np.log(p / np.maximum(r, 1e-12)), t)) for r in (q, gauss)]
    return divergences[0], divergences[1], (t, p, q, gauss)


def _denoiser(run: Run, steps: int) -> nn.Module:
    """Return a small residual convolutional denoiser of digits, trained for some steps."""
    from perturbkit.data import load_digits8

    g = run.generator("denoiser")
    layers: list[nn.Module] = []
    for a, b in ((1, 32), (32, 32), (32, 32), (32, 1)):
        conv = torch.nn.utils.skip_init(nn.Conv2d, a, b, 3, padding=1)
        conv.weight.data = randn(conv.weight.shape, generator=g) * math.sqrt(2 / (9 * a))
        conv.bias.data = torch.zeros(b)
        layers += [conv, nn.GELU()]
    net = nn.Sequential(*layers[:-1])
    x = load_digits8("train").x
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        clean = x[randint(0, len(x), (64,), generator=g)]
        noisy = clean + _SIGMA * randn(clean.shape, generator=g)
        optimizer.zero_grad()
        (net(noisy) - clean).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def _explained(
    net: nn.Module, run: Run, other_net: nn.Module | None = None
) -> tuple[float, float, list[float]]:
    """Return mean squared errors along (another network's) components and random directions, and over eigenvalues."""
    from perturbkit.data import load_digits8

    g = run.generator("test")
    x = load_digits8("test").x
    y = x + _SIGMA * randn(x.shape, generator=g)
    found = posterior_principal_components(other_net or net, y, _SIGMA, n_components=3, generator=g)
    error = (x - net(y)).flatten(1)
    along = torch.einsum("nkd,nd->nk", found.components.flatten(2), error).square().mean(0)
    other = torch.linalg.qr(randn((len(x), 64, 3), generator=g))[0]
    chance = torch.einsum("ndk,nd->nk", other, error).square().sum(1).mean()
    return float(along.sum()), float(chance), (along / found.eigenvalues.mean(0)).tolist()


def _figure(curves: dict[str, tuple[np.ndarray, ...]], net: nn.Module, run: Run) -> Figure:
    from perturbkit.data import load_digits8

    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    for ax, (kind, (t, p, q, gauss)) in zip(axes, curves.items(), strict=False):
        ax.plot(t, p, "k", lw=1, label="exact")
        ax.plot(t, q, "--", label="four moments")
        ax.plot(t, gauss, ":", label="two moments")
        ax.set_title(kind)
    axes[0].legend(frameon=False, fontsize=7)
    g = run.generator("picture")
    x = load_digits8("test").x[:1]
    y = x + _SIGMA * randn(x.shape, generator=g)
    found = posterior_principal_components(net, y, _SIGMA, n_components=3, generator=g)
    strip = [x[0, 0], y[0, 0], found.mean[0, 0], *(found.components[0, :, 0] + 0.5)]
    axes[2].imshow(torch.cat([s.clamp(-0.5, 1.5) for s in strip], 1).numpy(), cmap="gray")
    axes[2].set_title("clean, noisy, denoised, three components")
    axes[2].set_axis_off()
    return figure
