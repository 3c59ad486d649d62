"""One directional difference a step is enough for Frank-Wolfe, if the estimates are averaged.

Sparse least squares over the l1 ball, ten problems, and an attack on a digits classifier through its scores alone, against
differences along every coordinate. The method without the averaging is the baseline of the first and its control.
"""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Ball, Oracle
from perturbkit.core.random import randn
from perturbkit.optim import minimize_zo_frank_wolfe
from perturbkit.papers import Comparison, Evidence, Run, paper

STEPS = 5000


@paper(
    number=80,
    title="Towards Gradient Free and Projection Free Stochastic Optimization",
    authors="Sahu, Zaheer, Kar",
    year=2019,
    arxiv="1810.03233",
    claim="With averaged estimates, one directional difference a step closes the primal gap as fast as the cube root of steps.",
    method="perturbkit.optim.minimize_zo_frank_wolfe",
    needs="forward",
    input="any",
    cost="two evaluations and a linear problem over the set a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Decay of the primal gap, what averaging does, and evaluations until a classifier errs."""
    seeds = run.seeds(10)
    gaps = [_gaps(seed, averaging=True) for seed in seeds]
    raw = [_gaps(seed, averaging=False) for seed in seeds]
    mean, raw_mean = torch.stack(gaps).mean(0), torch.stack(raw).mean(0)
    slope, raw_slope = _slope(mean), _slope(raw_mean)
    ours, axes, solved = _attack(seeds[0])
    comparisons = [
        Comparison("slope of the mean primal gap, 100 to 5,000 steps", slope, -1 / 3, "lower", n=10),
        Comparison("last primal gap without averaging over that with it", float(raw_mean[-1] / mean[-1]), 5.0, "higher", n=10),
        Comparison("evaluations until the classifier errs, median, against all coordinates", ours, axes, "lower", n=solved),
        Comparison(
            "slope of the mean primal gap without averaging", raw_slope, -1 / 3, "lower", n=10, control=True,
            note="must fail: the variance of a single estimate does not vanish",
        ),
    ]  # fmt: skip
    return Evidence(comparisons, _figure(mean, raw_mean))


def _gaps(seed: int, *, averaging: bool) -> Tensor:
    """Return the values above the minimum, which is zero: the truth lies on the l1 ball's boundary."""
    g = torch.Generator().manual_seed(seed)
    a = randn((200, 50), generator=g, dtype=torch.float64)
    truth = torch.zeros(50, dtype=torch.float64)
    truth[:5] = 0.2
    b = a @ truth

    def fun(x: Tensor) -> Tensor:
        return (x @ a.T - b).square().sum(1) / 400

    start = torch.zeros(50, dtype=torch.float64)
    return minimize_zo_frank_wolfe(
        fun, start, Ball("l1", 1.0), averaging=averaging, max_iter=STEPS, generator=seed
    ).history


def _slope(gaps: Tensor) -> float:
    t = torch.arange(100, STEPS, dtype=torch.float64)
    design = torch.stack([torch.ones_like(t), t.log()], 1)
    return float(torch.linalg.lstsq(design, gaps[100:].log()[:, None]).solution[1, 0])


def _attack(seed: int) -> tuple[float, float, int]:
    """Return the median evaluations until the margin is negative, by one direction and by all coordinates, and the rows."""
    from perturbkit.data import digits_classifier, load_digits8

    model = digits_classifier(8).module
    test = load_digits8("test")
    rows = (model(test.x).argmax(1) == test.y).nonzero()[:20, 0]
    x, y = test.x[rows], test.y[rows]
    counts = []
    for estimator, per_step, steps in (("averaged", 11, 150), ("coordinate", 65, 60)):

        def margin(delta: Tensor) -> Tensor:
            scores = model(x.repeat_interleave(len(delta) // len(x), 0) + delta.reshape(-1, *x.shape[1:]))
            labels = y.repeat_interleave(len(delta) // len(x))
            own = scores.gather(1, labels[:, None])[:, 0]
            return own - scores.scatter(1, labels[:, None], -math.inf).amax(1)

        # In one piece: the rows of a batch belong to their images.
        oracle = Oracle(margin, chunk_size=10**6)
        start = torch.zeros(len(x), x[0].numel(), dtype=x.dtype)
        seen = minimize_zo_frank_wolfe(
            oracle, start, Ball("linf", 0.25), estimator=estimator, directions=10, max_iter=steps, generator=seed  # type: ignore[arg-type]
        ).history  # fmt: skip
        fooled = seen < 0
        first = torch.where(fooled.any(0), fooled.double().argmax(0), torch.inf)
        counts.append(float(first.median()) * per_step)
    return counts[0], counts[1], len(rows)


def _figure(mean: Tensor, raw: Tensor) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(raw, color="tab:gray", label="single estimates")
    axes.loglog(mean, color="tab:blue", label="averaged estimates")
    t = torch.arange(10, STEPS)
    axes.loglog(t, float(mean[100]) * (t / 100.0) ** (-1 / 3), "k:", label="slope -1/3")
    axes.set_xlabel("step")
    axes.set_ylabel("primal gap, mean of 10 problems")
    axes.legend(frameon=False, fontsize=8)
    return figure
