"""A cheap proxy saves gradients of the target in proportion to how alike they are.

Quadratics of condition 100 that differ by one; a loss on few digits with blurred ones as the proxy; and a deconvolution whose
proxy is on a coarse grid. Gradient descent on the target alone is the baseline; the uncorrected proxy is the control.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import hessian
from perturbkit.core.random import randn
from perturbkit.optim import estimate_similarity, minimize_proxy_prox
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, load

Gradient = Callable[[Tensor], Tensor]


@paper(
    number=186,
    title="Two Losses Are Better Than One: Faster Optimization Using a Cheaper Proxy",
    authors="Woodworth, Mishchenko, Bach",
    year=2023,
    arxiv="2302.03542",
    claim="With a proxy, gradients of the target are needed as if its smoothness were that of the difference.",
    method="perturbkit.optim.minimize_proxy_prox",
    needs="weights",
    input="any",
    cost="one gradient of the target a round, and those of the proxy",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Distance after equal gradients, gradients until a tolerance, and the same against the difference."""
    g = run.generator("quadratics")
    beds = {delta: _quadratic(g, delta) for delta in (0.1, 1.0, 10.0)}
    ends = {delta: _compare(*bed, rounds=60) for delta, bed in beds.items()}
    digits = _logistic(load(run))
    signal = _deconvolution(g)
    calls = {name: _calls(*bed) for name, bed in (("digits", digits), ("deconvolution", signal))}
    grad, proxy, start, _, _ = digits
    alone = torch.func.grad(proxy)
    x = start
    for _ in range(2000):
        x = x - 0.5 * alone(x)
    comparisons = [
        Comparison("distance after 60 gradients, difference 1, against descent", ends[1.0][0], ends[1.0][1], "lower", factor=1e-3),
        Comparison("distance after 60 gradients, difference 0.1, against difference 10", ends[0.1][0], ends[10.0][0], "lower", factor=1e-3),
        Comparison("gradients of 200 digits to a norm of 0.001, against descent", calls["digits"][0], calls["digits"][1], "lower", factor=1 / 3),
        Comparison("gradients of a fine deconvolution to a norm of 0.001, against descent", calls["deconvolution"][0], calls["deconvolution"][1], "lower", factor=1 / 3),
        Comparison(
            "norm of the target's gradient where the proxy alone is minimised", float(grad(x).norm()), 1e-3, "lower", control=True,
            note="must fail: the proxy's minimum is another",
        ),
    ]  # fmt: skip
    shown = ", ".join(f"{name}: {ours} against {theirs}" for name, (ours, theirs) in calls.items())
    return Evidence(
        comparisons, _figure(ends), notes=f"Gradients of the target until the norm is 0.001. {shown}."
    )


Bed = tuple[Gradient, Callable[[Tensor], Tensor], Tensor, float, float]


def _quadratic(g: torch.Generator, delta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the target's and the proxy's Hessian, and the target's minimum."""
    d = 20
    turn = torch.linalg.qr(randn((d, d), generator=g, dtype=torch.float64)).Q
    h = turn @ torch.diag(torch.logspace(0, 2, d, dtype=torch.float64)) @ turn.T
    more = randn((d, d), generator=g, dtype=torch.float64)
    more = (more + more.T) / 2
    # Positive, so that the target stays convex; its largest eigenvalue is delta.
    more = more - torch.linalg.eigvalsh(more)[0] * torch.eye(d)
    return (
        h + delta * more / torch.linalg.eigvalsh(more)[-1],
        h,
        randn((d,), generator=g, dtype=torch.float64),
    )


def _compare(f: Tensor, h: Tensor, best: Tensor, *, rounds: int) -> tuple[float, float]:
    delta = float(torch.linalg.eigvalsh(f - h)[-1])
    found = minimize_proxy_prox(
        lambda x: f @ (x - best),
        lambda x: x @ h @ x / 2,
        torch.zeros_like(best),
        similarity=delta,
        rounds=rounds,
        inner_tol=0.01,
    )
    x, step = torch.zeros_like(best), 1 / float(torch.linalg.eigvalsh(f)[-1])
    for _ in range(rounds):
        x = x - step * f @ (x - best)
    return float((found.x - best).norm()), float((x - best).norm())


def _calls(
    grad: Gradient, proxy: Callable[[Tensor], Tensor], start: Tensor, similarity: float, smoothness: float
) -> tuple[int, int]:
    """Return the gradients of the target until its norm is 0.001, ours and by descent, 5000 at most."""
    ours = minimize_proxy_prox(grad, proxy, start, similarity=similarity, rounds=300, tol=1e-3)
    x = start
    for t in range(5000):
        g = grad(x)
        if float(g.norm()) <= 1e-3:
            return ours.target_calls, t + 1
        x = x - g / smoothness
    return ours.target_calls, 5000


def _logistic(data: Digits) -> Bed:
    """Return the regularised loss on 200 digits, that on 1200 blurred ones as its proxy, and their constants."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=torch.float64) / 16
    x = data.x.double()
    blurred = nn.functional.conv2d(x[200:1400].reshape(-1, 1, 8, 8), kernel[None, None], padding=1).flatten(1)

    def loss(w: Tensor, rows: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(rows @ w.reshape(64, 10), labels) + 5e-3 * w.square().sum()

    def target(w: Tensor) -> Tensor:
        return loss(w, x[:200], data.y[:200])

    def proxy(w: Tensor) -> Tensor:
        return loss(w, blurred, data.y[200:1400])

    start = torch.zeros(640, dtype=torch.float64)
    return (torch.func.grad(target), proxy, start, *_constants(target, proxy, start))


def _deconvolution(g: torch.Generator) -> Bed:
    """Return the least squares of a blurred signal on 128 points, and on every second measurement as its proxy."""
    n = 128
    place = torch.arange(n, dtype=torch.float64)
    blur = torch.exp(-((place[:, None] - place) ** 2) / 18)
    blur = blur / blur.sum(1, keepdim=True)
    truth = torch.zeros(n, dtype=torch.float64)
    truth[30:50], truth[80:90] = 1.0, -0.5
    seen = blur @ truth + 0.01 * randn((n,), generator=g, dtype=torch.float64)

    def target(w: Tensor) -> Tensor:
        return (blur @ w - seen).square().sum() / 2 + 5e-3 * w.square().sum()

    def proxy(w: Tensor) -> Tensor:
        return (blur[::2] @ w - seen[::2]).square().sum() + 5e-3 * w.square().sum()

    start = torch.zeros(n, dtype=torch.float64)
    return (torch.func.grad(target), proxy, start, *_constants(target, proxy, start))


def _constants(target: Gradient, proxy: Gradient, start: Tensor) -> tuple[float, float]:
    """Return the similarity at the start, and the target's smoothness there."""
    products = hessian(target, start), hessian(proxy, start)
    steps = 60
    return (
        estimate_similarity(*products, start, steps=steps, generator=0),
        estimate_similarity(products[0], torch.zeros_like, start, steps=steps, generator=0),
    )


def _figure(ends: dict[float, tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, colour) in enumerate((("ProxyProx", "tab:blue"), ("gradient descent", "tab:gray"))):
        axes.loglog(list(ends), [values[i] for values in ends.values()], "o-", color=colour, label=label)
    axes.set_xlabel("largest eigenvalue of the difference")
    axes.set_ylabel("distance after 60 gradients")
    axes.legend(frameon=False)
    return figure
