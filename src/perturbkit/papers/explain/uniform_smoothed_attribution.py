"""No attack turns a uniformly smoothed attribution below its certificate, and attacks turn it less than the plain gradient.

Networks on digits (64 dimensions) and breast cancer (30), 50 test points each, changes of norm 0.05 to 0.5 by projected
gradient ascent on the angle, smoothing radii 0.5 to 2. The safe bound must hold in at least 99 % of cases, its confidence. At 0.5 the
cosine after an attack must be higher by 0.1 than that of the gradient. Bounds too wide to say anything are counted as such.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import Ball
from perturbkit.core.random import as_generator, randint, seeded_init
from perturbkit.explain import UniformSmoothedAttribution, attack_attribution, gradient_attribution
from perturbkit.papers import Comparison, Evidence, Run, paper

_POINTS, _NOISE, _SAMPLES = 50, 32, 4000
_EPSILONS, _RADII = (0.05, 0.1, 0.2, 0.5), (0.5, 1.0, 2.0)


@paper(
    number=40,
    title="Certified l2 Attribution Robustness via Uniformly Smoothed Attributions",
    authors="Wang, Kong",
    year=2024,
    arxiv="2405.06361",
    claim="Smoothing an attribution uniformly over a ball bounds from below the cosine that any l2 attack leaves.",
    method="perturbkit.explain.UniformSmoothedAttribution",
    needs="gradient",
    input="any",
    cost="n_samples attributions a row",
    seconds=35,
)
def reproduce(run: Run) -> Evidence:
    """Violations of the bound, and attacked cosines with and without smoothing."""
    comparisons, notes, curves = [], [], {}
    for name, (x, y, test) in _data().items():
        net = _network(x, y, run)
        with torch.no_grad():
            label = net(test).argmax(1)
        plain = gradient_attribution(net, label)
        attacked = {
            e: 1
            - attack_attribution(plain, test, epsilon=e, steps=20, generator=run.generator("plain")).cosine
            for e in _EPSILONS
        }
        cells = {(r, e): _cell(net, test, label, r, e, run) for r in _RADII for e in _EPSILONS}
        found = torch.cat([after for after, _, _ in cells.values()])
        lower = torch.cat([bound for _, bound, _ in cells.values()])
        proved = lower > -1
        held = float((found >= lower).float().mean())
        smooth = cells[1.0, 0.5][0]
        comparisons += [
            Comparison(f"share of attacked cosines at or above the bound, {name}", held, 0.99, "higher", n=len(found)),
            Comparison(
                f"share of the gradient's attacked cosines above 0.99, {name}",
                float((torch.cat(list(attacked.values())) >= 0.99).float().mean()), 0.99, "higher", control=True,
                n=_POINTS * len(_EPSILONS), note="must fail: without smoothing nothing is proved",
            ),
            Comparison.over_seeds(
                f"attacked cosine at 0.5, radius 1, against the gradient, {name}", smooth.tolist(),
                attacked[0.5].tolist(), "higher", margin=0.1,
            ),
        ]  # fmt: skip
        gap = float((found - lower)[proved].mean()) if bool(proved.any()) else float("nan")
        notes.append(
            f"{name}: {float(proved.float().mean()):.2f} of the bounds say something, and there the attacked cosine is "
            f"{gap:.3f} above them; the published form is violated in "
            f"{float(torch.cat([p for _, _, p in cells.values()]).float().mean()):.3f} of cases"
        )
        curves[name] = (attacked, {e: cells[1.0, e] for e in _EPSILONS})
    return Evidence(comparisons, _figure(curves), "; ".join(notes) + ".")


def _data() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return training inputs and labels, and test inputs, in double precision."""
    from perturbkit.data import load_breast_cancer, load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    rows, other = load_breast_cancer("train"), load_breast_cancer("test")
    low, high = rows.x.amin(0), rows.x.amax(0)
    return {
        "digits": (train.x.flatten(1), train.y, test.x.flatten(1)[:_POINTS]),
        "breast cancer": ((rows.x - low) / (high - low), rows.y, ((other.x - low) / (high - low))[:_POINTS]),
    }


def _network(x: Tensor, y: Tensor, run: Run) -> nn.Module:
    with seeded_init(run.seeds(1)[0]):
        net = nn.Sequential(nn.Linear(x.shape[1], 32), nn.Softplus(beta=10), nn.Linear(32, int(y.max()) + 1))
    g, optimiser = as_generator(run.generator("batches")), torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(400):
        batch = randint(0, len(x), (64,), generator=g)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


def _cell(
    net: nn.Module, x: Tensor, label: Tensor, radius: float, epsilon: float, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosine after an attack, the safe bound, and where the published bound is violated."""
    noise = Ball("l2", radius).sample(x, generator=run.generator("noise"), n=_NOISE)

    def smoothed(z: Tensor) -> Tensor:
        many = (z[:, None] + noise).flatten(0, 1)
        g = gradient_attribution(net, label.repeat_interleave(_NOISE))(many)
        return nn.functional.normalize(g, dim=1).reshape(len(z), _NOISE, -1).mean(1)

    attack = attack_attribution(smoothed, x, epsilon=epsilon, steps=20, generator=run.generator("attack"))
    method = UniformSmoothedAttribution(
        lambda z, target: gradient_attribution(net, target)(z).detach(), radius, _SAMPLES
    )
    before, after = (
        method.attribute(z, label, generator=run.generator("draws")).values for z in (x, attack.x)
    )
    cosine = nn.functional.cosine_similarity(before, after)
    bounds = [
        method.certify(x, label, epsilon=epsilon, mode=mode, generator=run.generator("draws")).cosine_lower  # type: ignore[arg-type]
        for mode in ("safe", "paper")
    ]
    return cosine, bounds[0], cosine < bounds[1]


def _figure(
    curves: dict[str, tuple[dict[float, Tensor], dict[float, tuple[Tensor, Tensor, Tensor]]]],
) -> Figure:
    figure = Figure(figsize=(6.5, 2.8), layout="constrained")
    for ax, (name, (plain, cells)) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        ax.plot(_EPSILONS, [float(plain[e].mean()) for e in _EPSILONS], "o-", label="gradient, attacked")
        ax.plot(_EPSILONS, [float(cells[e][0].mean()) for e in _EPSILONS], "o-", label="smoothed, attacked")
        ax.plot(
            _EPSILONS, [float(cells[e][1].clamp(min=0).mean()) for e in _EPSILONS], "o--", label="certified"
        )
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("norm of the change")
        ax.set_ylabel("cosine")
        ax.legend(frameon=False, fontsize=6)
    return figure
