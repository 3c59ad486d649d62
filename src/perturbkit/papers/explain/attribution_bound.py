"""A bound from the attribution's Jacobian holds against a thousand attacks a point, is nearly reached, and ranks points.

Softplus networks on digits and breast cancer, 100 test points each. The radius is the largest of a fixed list at which the
linearisation is off by less than 10 % in the median; then random changes, PGD and IFIA: at most 1 % of attacks may exceed the
bound without remainder, the strongest must reach 60 % of it in the median, and over points bound and strongest attack must
correlate by ranks at 0.7. A network trained with a penalty on its gradient's change must have a smaller bound and be moved less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

from perturbkit.core import Sphere
from perturbkit.core.random import as_generator, randint, randn, seeded_init
from perturbkit.explain import attack_attribution, attribution_deviation_bound, gradient_attribution
from perturbkit.papers import Comparison, Evidence, Run, paper

_RADII = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)


@paper(
    number=142,
    title="A Practical Upper Bound for the Worst-Case Attribution Deviations",
    authors="Wang, Kong",
    year=2023,
    arxiv="2303.00340",
    claim="No attack on the attribution exceeds the bound in millions of tries.",
    method="perturbkit.explain.attribution_deviation_bound",
    needs="gradient",
    input="any",
    cost="one pass back an element of the attribution",
    seconds=25,
)
def reproduce(run: Run) -> Evidence:
    """Violations, tightness, ranks, and a smoother network."""
    comparisons, found = [], {}
    for name, (x, y, test) in _data().items():
        plain, smooth = (_network(x, y, penalty, run) for penalty in (0.0, 0.1))
        first = _attacked(plain, test, None, run)
        second = _attacked(smooth, test, first.epsilon, run)
        found[name] = first
        ratio = first.best / first.bound
        comparisons += [
            Comparison(f"share of attacks above the bound, {name}", first.violations(1.0), 0.01, "lower", n=len(test)),
            Comparison(
                f"share of points moved beyond half the bound, {name}", float((ratio > 0.5).float().mean()), 0.01, "lower",
                n=len(test), control=True, note="must fail: half the bound bounds nothing",
            ),
            Comparison(f"strongest attack over bound, median, {name}", float(ratio.median()), 0.6, "higher", n=len(test)),
            Comparison(
                f"rank correlation of bound and strongest attack, {name}", float(spearmanr(first.bound, first.best)[0]), 0.7,
                "higher", n=len(test),
            ),
            Comparison.over_seeds(
                f"bound of the penalised network, {name}", second.bound.tolist(), first.bound.tolist(), "lower"
            ),
            Comparison.over_seeds(
                f"strongest attack on the penalised network, {name}", second.best.tolist(), first.best.tolist(), "lower"
            ),
        ]  # fmt: skip
    notes = "; ".join(
        f"{name}: radius {f.epsilon}, linearisation off by {f.error:.3f}, {f.moved.shape[0]} attacks a point, of the optimised ones "
        f"{float((f.moved[960:] > f.bound).float().mean()):.2f} exceed the bound, the strongest by "
        f"{float((f.best / f.bound).max() - 1):.2f}"
        for name, f in found.items()
    )
    return Evidence(
        comparisons,
        _figure(found),
        notes
        + ". Without the remainder the bound is the exact maximum of the linearisation, so that PGD can pass it by what is not linear.",
    )


@dataclass(frozen=True)
class _Found:
    epsilon: float
    error: float
    bound: Tensor
    moved: Tensor

    @property
    def best(self) -> Tensor:
        return self.moved.amax(0)

    def violations(self, factor: float) -> float:
        return float((self.moved > factor * self.bound).float().mean())


def _data() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return training inputs and labels, and 100 test inputs."""
    from perturbkit.data import load_breast_cancer, load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    rows, other = load_breast_cancer("train"), load_breast_cancer("test")
    mean, spread = rows.x.mean(0), rows.x.std(0)
    return {
        "digits": (train.x.flatten(1), train.y, test.x.flatten(1)[:100]),
        "breast cancer": ((rows.x - mean) / spread, rows.y, ((other.x - mean) / spread)[:100]),
    }


def _network(x: Tensor, y: Tensor, penalty: float, run: Run) -> nn.Module:
    """Train a network, with a penalty on the change of its loss's gradient along random directions."""
    with seeded_init(run.seeds(1)[0]):
        net = nn.Sequential(nn.Linear(x.shape[1], 32), nn.Softplus(beta=5), nn.Linear(32, int(y.max()) + 1))
    g, optimiser = as_generator(run.generator("batches")), torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(400):
        batch = randint(0, len(x), (64,), generator=g)
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        if penalty:
            attribute, z = gradient_attribution(net, y[batch]), x[batch]
            step = 0.1 * randn(z.shape, generator=g, like=z)
            loss = loss + penalty * (attribute(z + step) - attribute(z)).square().sum(1).mean() / 0.01
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval().requires_grad_(False).double()


def _attacked(net: nn.Module, x: Tensor, epsilon: float | None, run: Run) -> _Found:
    """Return the bound and what every attack moved, shape (attacks, points)."""
    x = x.double()
    with torch.no_grad():
        label = net(x).argmax(1)
    attribute = gradient_attribution(net, label)
    one = attribution_deviation_bound(attribute, x, epsilon=1.0)
    clean, errors = attribute(x).detach(), {}
    for radius in _RADII if epsilon is None else (epsilon,):
        moved = (attribute(x + radius * one.direction).detach() - clean).norm(dim=1)
        back = (attribute(x - radius * one.direction).detach() - clean).norm(dim=1)
        linear = radius * one.spectral_norm
        errors[radius] = float(((torch.stack((moved, back)) - linear).abs() / linear).amax(0).median())
    epsilon = epsilon or next((r for r in _RADII if errors[r] < 0.1), _RADII[-1])
    found = []
    for i in range(20):
        draws = Sphere(epsilon).sample(x, generator=run.generator(f"draws {i}"), n=48 * len(x))
        many = x.repeat(48, 1) + draws
        change = gradient_attribution(net, label.repeat(48))(many).detach() - clean.repeat(48, 1)
        found.append(change.norm(dim=1).reshape(48, len(x)))
    for i in range(20):
        for objective in ("euclidean", "topk"):
            attack = attack_attribution(
                attribute, x, epsilon=epsilon, objective=objective, steps=40, model=net,  # type: ignore[arg-type]
                generator=run.generator(f"{objective} {i}"),
            )  # fmt: skip
            found.append(attack.euclidean[None])
    return _Found(epsilon, errors[epsilon], epsilon * one.spectral_norm, torch.cat(found))


def _figure(found: dict[str, _Found]) -> Figure:
    figure = Figure(figsize=(6.5, 2.8), layout="constrained")
    for ax, (name, f) in zip(figure.subplots(1, 2), found.items(), strict=True):
        ax.plot(f.bound, f.best, ".", label="strongest of all attacks")
        ax.plot(f.bound, f.moved[:960].median(0).values, ".", label="median random change")
        ax.axline((0, 0), slope=1, color="0.5", lw=0.8)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("bound")
        ax.set_ylabel("change of the attribution")
        ax.legend(frameon=False, fontsize=6)
    return figure
