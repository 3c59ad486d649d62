"""Stochastic interpolants between mixtures with exact fields, what errors of the fields do, and training with pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import TimeMLP, fit
from perturbkit.core.random import randint, randn, seeded_init, uniform
from perturbkit.data import GaussianMixture
from perturbkit.diffusion import StochasticInterpolant
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._quality import sliced_w2

_PATH = StochasticInterpolant()
_EPSILON = 2.0
_TRAINING = 1000

Field = Callable[[Tensor, Tensor], Tensor]


@paper(
    number=107,
    title="Stochastic Interpolants: A Unifying Framework for Flows and Diffusions",
    authors="Albergo, Boffi, Vanden-Eijnden",
    year=2023,
    arxiv="2303.08797",
    claim="One interpolant gives a flow and diffusions of any noise with the same end, errors of the fields bound the divergence of the diffusion but not that of the flow, and pairs of opposite noise tame the loss.",
    method="perturbkit.diffusion.StochasticInterpolant",
    needs="training",
    input="any",
    cost="two calls a step of one network (flow) or two (diffusion)",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Mixture to mixture in 2 and 16 dimensions, a wavy error in one, and a checkerboard learnt by a small network."""
    errors, divergences = _robustness(run)
    learning, drawn = _pairs(run)
    return Evidence([*_exact(run), *errors, *learning], _figure(divergences, drawn), _NOTES)


_NOTES = (
    "The divergences are those of histograms of 100 cells with half a draw added to each. The pair is compared at equal cost: with "
    "the mean of two independent draws, and in training with twice the rows."
)


def _exact(run: Run) -> list[Comparison]:
    """Flow and diffusions with the exact fields against the distance between two samples of the target."""
    comparisons = []
    for dim in (2, 16):
        g = run.generator(f"mixture {dim}")
        start, end = _mixture(4, dim, g), _mixture(3, dim, g)
        velocity, score = _fields(start, end)
        x0, goal = start.sample(1000, g), end.sample(1000, g)
        floor = sum(sliced_w2(end.sample(1000, g), end.sample(1000, g), g) for _ in range(5)) / 5
        for epsilon in (0.0, 0.5, 2.0):
            times = torch.linspace(1e-3, 1 - 1e-3, 101, dtype=torch.float64)
            x = _PATH.solve(velocity, x0, times, score=score, diffusion=epsilon, generator=g).x
            comparisons.append(
                Comparison(
                    f"sliced W2 to the target, {dim} dimensions, epsilon {epsilon:g}, against two samples",
                    sliced_w2(x, goal, g),
                    floor,
                    "lower",
                    factor=2.0,
                )
            )
    comparisons.append(
        Comparison(
            "sliced W2 of the start to the target, 16 dimensions",
            sliced_w2(x0, goal, g),
            floor,
            "lower",
            factor=2.0,
            control=True,
        )
    )
    return comparisons


def _robustness(run: Run) -> tuple[list[Comparison], dict[str, np.ndarray]]:
    """The divergence of the end from the target, in one dimension, with a wave of amplitude 1.5 added to the velocity."""
    g, n, amplitude = run.generator("errors"), 20_000, 1.5
    start = GaussianMixture(torch.tensor([[-1.0], [1.0]]).double(), stds=0.4)
    end = GaussianMixture(torch.tensor([[-2.0], [0.5], [2.0]]).double(), stds=0.5)
    velocity, score = _fields(start, end)

    def wrong(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t) + amplitude * (8 * x).sin()

    times = torch.linspace(1e-3, 1 - 1e-3, 201, dtype=torch.float64)
    x0 = start.sample(n, g)
    found, shares = {}, {}
    edges = np.linspace(-4.5, 4.5, 101)
    centres = torch.as_tensor((edges[1:] + edges[:-1]) / 2)[:, None]
    truth = end.log_density(centres).exp().numpy()
    truth = truth / truth.sum()
    for name, epsilon in (("flow", 0.0), ("diffusion", _EPSILON)):
        x = _PATH.solve(wrong, x0, times, score=score, diffusion=epsilon, generator=g).x
        counts = np.histogram(x[:, 0].clamp(-4.49, 4.49).numpy(), edges)[0] + 0.5
        shares[name] = counts / counts.sum()
        found[name] = float((truth * np.log(truth / shares[name])).sum())
    # Girsanov: a quarter of the squared error of the drift over epsilon, along the exact law.
    t = uniform((50_000,), 1e-3, 1 - 1e-3, generator=g, dtype=torch.float64)
    states, _, _ = _PATH.sample_path(start.sample(50_000, g), end.sample(50_000, g), t, g)
    bound = amplitude**2 * float((8 * states).sin().square().mean()) / (4 * _EPSILON)
    shares["target"] = truth
    return [
        Comparison("divergence of the diffusion, against its bound", found["diffusion"], bound, "lower", n=n),
        Comparison(
            "divergence of the diffusion, against the flow's", found["diffusion"], found["flow"], "lower", n=n
        ),
        Comparison(
            "divergence of the flow, against the diffusion's bound",
            found["flow"],
            bound,
            "lower",
            control=True,
            n=n,
        ),
    ], shares


def _pairs(run: Run) -> tuple[list[Comparison], Tensor]:
    """The variance of the loss of a fixed smooth net on the checkerboard, and networks trained with and without pairs."""
    g, n = run.generator("pairs"), 100_000

    def net(x: Tensor, t: Tensor) -> Tensor:
        return x.sin() + t[:, None] * x.flip(1).cos()

    # One row a loss: the rows of a batch are kept apart by their own losses.
    variance = {pairs: _row_losses(net, pairs, n, g).var().item() for pairs in (True, False)}
    found: dict[bool, list[float]] = {True: [], False: []}
    drawn = torch.zeros(1, 2)
    seeds = run.seeds(3)
    for seed in seeds:
        for pairs, distances in found.items():
            x = _sampled(_trained(pairs, seed), seed)
            drawn = x if pairs else drawn
            distances.append(sliced_w2(x, _checkerboard(2000, torch.Generator().manual_seed(seed + 1)), g))
    with seeded_init(0):
        untrained = _sampled(TimeMLP(2, hidden=128), 0)
    return [
        Comparison(
            "variance of the velocity loss, pairs against two draws",
            variance[True],
            variance[False] / 2,
            "lower",
            factor=0.5,
            n=n,
        ),
        Comparison.over_seeds(
            "sliced W2 to the checkerboard, trained with pairs", found[True], found[False], "lower"
        ),
        Comparison(
            "sliced W2 to the checkerboard, untrained network",
            sliced_w2(untrained, _checkerboard(2000, g), g),
            sum(found[False]) / len(seeds),
            "lower",
            control=True,
        ),
    ], drawn


def _row_losses(net: Field, pairs: bool, n: int, g: torch.Generator) -> Tensor:
    t = uniform((n,), generator=g, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    x0, x1 = randn((n, 2), generator=g, dtype=torch.float64), _checkerboard(n, g).double()
    z = randn((n, 2), generator=g, dtype=torch.float64)
    a, b, gamma, da, db, rate = (v[:, None] for v in _PATH.coefficients(t))
    total = torch.zeros(n, dtype=torch.float64)
    for sign in (1, -1) if pairs else (1,):
        answer = net(a * x0 + b * x1 + sign * gamma * z, t)
        total += (0.5 * answer.square() - (da * x0 + db * x1 + sign * rate * z) * answer).sum(1)
    return total / (2 if pairs else 1)


def _trained(pairs: bool, seed: int) -> TimeMLP:
    with seeded_init(seed):
        net = TimeMLP(2, hidden=128)
    rows = 96 if pairs else 192

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return randn((rows, 2), generator=generator), _checkerboard(rows, generator)

    def loss(model: TimeMLP, x0: Tensor, x1: Tensor, *, generator: torch.Generator) -> Tensor:
        return _PATH.velocity_loss(model, x0, x1, antithetic=pairs, generator=generator)

    fit(net, loss, batch, steps=_TRAINING, lr=3e-3, average=0.99, generator=seed, progress=False)
    return net.eval().requires_grad_(False)


def _sampled(net: TimeMLP, seed: int) -> Tensor:
    x0 = randn((2000, 2), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return _PATH.solve(net, x0, torch.linspace(1e-3, 1 - 1e-3, 51)).x


def _checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Draw from the dark squares of a board of 4 by 4 on [-2, 2]^2."""
    column = randint(0, 4, (n,), generator=generator)
    row = 2 * randint(0, 2, (n,), generator=generator) + column % 2
    return torch.stack((column, row), 1) + uniform((n, 2), generator=generator) - 2


def _mixture(k: int, dim: int, g: torch.Generator) -> GaussianMixture:
    return GaussianMixture(2 * randn((k, dim), generator=g, dtype=torch.float64), stds=0.4)


def _fields(start: GaussianMixture, end: GaussianMixture) -> tuple[Field, Field]:
    """Return the exact velocity and score: given the pair of components everything is Gaussian."""

    def parts(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, gamma, da, db, rate = (v[:, None, None, None] for v in _PATH.coefficients(t))
        m0, m1 = start.means[:, None], end.means[None]
        v0, v1 = start.variances[:, None], end.variances[None]
        variance = a**2 * v0 + b**2 * v1 + gamma**2
        away = x[:, None, None] - a * m0 - b * m1  # [n, k0, k1, d]
        logs = -0.5 * (away**2 / variance + variance.log()).sum(3)
        logs = logs + start.weights.log()[:, None] + end.weights.log()
        weights = logs.flatten(1).softmax(1).reshape(logs.shape)[..., None]
        slope = (a * da * v0 + b * db * v1 + gamma * rate) / variance
        return weights, da * m0 + db * m1 + slope * away, -away / variance

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        weights, each, _ = parts(x, t)
        return (weights * each).sum((1, 2))

    def score(x: Tensor, t: Tensor) -> Tensor:
        weights, _, each = parts(x, t)
        return (weights * each).sum((1, 2))

    return velocity, score


def _figure(divergences: dict[str, np.ndarray], drawn: Tensor) -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    at = np.linspace(-4.5, 4.5, 101)[:-1]
    for name, shares in divergences.items():
        left.step(at, shares, where="post", lw=1, label=name)
    left.set(title="a wave added to the velocity", xlabel="x", ylabel="share of a cell")
    left.legend(frameon=False)
    right.plot(drawn[:, 0], drawn[:, 1], ".", markersize=1.5)
    right.set(aspect="equal", title="checkerboard, trained with pairs")
    return figure
