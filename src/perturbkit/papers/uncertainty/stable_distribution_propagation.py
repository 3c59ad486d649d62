"""Linearised propagation of input noise is closer to sampling than matching moments layer by layer.

A ReLU network for digits: the distance of the predicted output laws to 100,000 samples, for three noise levels, against
moment matching; claimed beforehand to be at most half. Then intervals on diabetes from a network trained with the
propagated likelihood, 90 % within five points; and whether pairwise probabilities of a network trained under noise tell
digits from turned digits and from noise better by 0.02 than the entropy of a plain softmax. Control: the output without
any spread.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import norm
from torch import Tensor, nn

from perturbkit.core.random import randn, randperm, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.uncertainty._parts import mlp, train
from perturbkit.uncertainty import StableGaussian, pairwise_probability, propagate, sdp_loss

_SIGMAS = (0.01, 0.03, 0.1)


@paper(
    number=34,
    title="Uncertainty Quantification via Stable Distribution Propagation",
    authors="Petersen, Mishra, Kuehne, Borgelt, Deussen, Yurochkin",
    year=2024,
    arxiv="2402.08324",
    claim="Propagating stable distributions by local linearisation is closer to the true output distribution than "
    "moment matching, gives calibrated intervals, and detects other data by pairwise probabilities.",
    method="perturbkit.uncertainty.propagate",
    needs="gradient",
    input="any",
    cost="one gradient an output and row; two forward passes in marginal mode",
    seconds=35,
)
def reproduce(run: Run) -> Evidence:
    """Distances to sampling, coverage of intervals, and detection of other data."""
    comparisons = []
    distances = _distances(run)
    for sigma in _SIGMAS:
        found = distances[sigma]
        comparisons.append(
            Comparison.over_seeds(
                f"distance to samples at noise {sigma:g}, full against moment matching", found["full"], found["moments"],
                "lower", factor=0.5,
            )
        )  # fmt: skip
    last = distances[_SIGMAS[0]]
    comparisons.append(
        Comparison.over_seeds(
            f"distance of the output without spread at noise {_SIGMAS[0]:g}", last["point"], last["moments"], "lower",
            factor=0.5, control=True, note="must fail: it ignores the noise",
        )
    )  # fmt: skip
    coverage = [_interval_coverage(seed) for seed in run.seeds(5)]
    comparisons.append(
        Comparison.over_seeds(
            "coverage of 90 % intervals, diabetes", coverage, [0.9] * 5, "equal", margin=0.05
        )
    )
    for name, (ours, entropy) in _detection(run).items():
        comparisons.append(
            Comparison.over_seeds(
                f"AUROC of {name}, pairwise against entropy", ours, entropy, "higher", margin=0.02
            )
        )
    return Evidence(
        comparisons, _figure(distances),
        "Whether other data are detected better is left to the numbers: on these small digits both scores can find "
        "turned digits more certain than the digits themselves. The interval network has a weight decay of 1; with 0.01 "
        "it fits its 350 rows too closely, its noise is learned too small, and the intervals cover 80 %.",
    )  # fmt: skip


def _digits(seed: int, noisy: bool = False) -> tuple[nn.Module, Tensor]:
    """Return a network, trained by cross-entropy or under input noise, and the rows kept."""
    from perturbkit.data import load_digits8

    data, g = load_digits8(), torch.Generator().manual_seed(seed)
    order = randperm(len(data), generator=g)
    x, y = data.x.flatten(1)[order], data.y[order]
    net = mlp((64, 32, 32, 32, 10), g)
    if not noisy:
        return train(net, x[:1000], y[:1000], g, epochs=40), x[1000:]
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(15):
        for rows in randperm(1000, generator=g).split(100):
            optimizer.zero_grad()
            sdp_loss(net, x[rows], y[rows], input_std=0.1).backward()
            optimizer.step()
    return net.eval(), x[1000:]


def _distances(run: Run) -> dict[float, dict[str, list[float]]]:
    """Return the mean first Wasserstein distance of the marginals over 4 rows, a number a network and method."""
    level = (np.arange(100_000) + 0.5) / 100_000
    unit = torch.as_tensor(norm.ppf(level), dtype=torch.float32)[:, None]
    found: dict[float, dict[str, list[float]]] = {
        s: {"full": [], "moments": [], "point": []} for s in _SIGMAS
    }
    for seed in run.seeds(3):
        net, x = _digits(seed)
        g = torch.Generator().manual_seed(seed)
        for sigma in _SIGMAS:
            noise = StableGaussian(x[:4], torch.full_like(x[:4], sigma**2))
            laws = {"full": propagate(net, noise), "moments": propagate(net, noise, mode="moments")}
            off: dict[str, list[float]] = {name: [] for name in found[sigma]}
            for i in range(4):
                with torch.no_grad():
                    samples = net(x[i] + sigma * randn((100_000, 64), generator=g)).sort(0).values
                for name, law in laws.items():
                    assert isinstance(law, StableGaussian)
                    off[name].append(
                        float((samples - law.mean[i] - unit * law.variance[i].sqrt()).abs().mean())
                    )
                off["point"].append(float((samples - laws["full"].mean[i]).abs().mean()))  # type: ignore[union-attr]
            for name, values in off.items():
                found[sigma][name].append(float(np.mean(values)))
    return found


def _interval_coverage(seed: int) -> float:
    """Coverage on the fifth of diabetes kept, by a network trained with noise on its inputs."""
    from perturbkit.data import load_diabetes

    data, g = load_diabetes(), torch.Generator().manual_seed(seed)
    order = randperm(len(data), generator=g)
    x = ((data.x - data.x.mean(0)) / data.x.std(0))[order]
    y = ((data.y - data.y.mean()) / data.y.std())[order, None].float()
    net = mlp((10, 16, 1), g)
    log_std = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.AdamW([*net.parameters(), log_std], lr=1e-2, weight_decay=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        sdp_loss(net, x[:350], y[:350], input_std=0.3, output_std=log_std.exp()).backward()
        optimizer.step()
    law = propagate(net, StableGaussian(x[350:], torch.full_like(x[350:], 0.09)))
    assert isinstance(law, StableGaussian)
    spread = (law.variance + log_std.detach().exp() ** 2).sqrt()
    return float(((y[350:] - law.mean).abs() <= norm.ppf(0.95) * spread).float().mean())


def _detection(run: Run) -> dict[str, tuple[list[float], list[float]]]:
    """Return the area under the curve of both scores, for digits turned by 90 degrees and uniform noise."""
    from sklearn.metrics import roc_auc_score

    found: dict[str, tuple[list[float], list[float]]] = {"turned digits": ([], []), "noise": ([], [])}
    for seed in run.seeds(5):
        plain, x = _digits(seed)
        net, _ = _digits(seed, noisy=True)
        x = x[:400]
        turned = x.reshape(-1, 8, 8).rot90(1, (1, 2)).flatten(1)
        other = {
            "turned digits": turned,
            "noise": uniform(x.shape, generator=torch.Generator().manual_seed(seed)),
        }
        for name, z in other.items():
            both, label = torch.cat([x, z]), np.repeat([0, 1], len(x))
            law = propagate(net, StableGaussian(both, torch.full_like(both, 0.1**2)))
            assert isinstance(law, StableGaussian)
            doubt = 1 - pairwise_probability(law, law.mean.argmax(1)).double()
            p = plain(both).detach().double().softmax(1)
            entropy = -(p * p.clamp_min(1e-300).log()).sum(1)
            found[name][0].append(float(roc_auc_score(label, doubt.sum(1))))
            found[name][1].append(float(roc_auc_score(label, entropy)))
    return found


def _figure(distances: dict[float, dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name in ("full", "moments", "point"):
        values = [math.fsum(distances[s][name]) / len(distances[s][name]) for s in _SIGMAS]
        ax.loglog(_SIGMAS, values, marker="o", label=name)
    ax.set_xlabel("standard deviation of the input noise")
    ax.set_ylabel("Wasserstein distance to samples")
    ax.legend(frameon=False)
    return figure
