"""Where every model falls to the attack, sparsity still tells them apart.

Small digits networks trained plainly, with noise added, with moved digits and on attacked inputs, at a Euclidean radius where
nearly no row of any stands; the plain one once more from another seed, which must not differ; and the plain one behind a
quantiser that hides its gradient, whose adversarial accuracy is high while random perturbations break it as before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Oracle, Sphere
from perturbkit.core.random import randint, randn, randperm, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import Sparsity, adversarial_sparsity

_RADIUS, _ROWS = 3.5, 30


@paper(
    number=217,
    title="How many perturbations break this model? Evaluating robustness beyond adversarial accuracy",
    authors="Olivier, Raj",
    year=2023,
    arxiv="2207.04129",
    claim="Models of the same adversarial accuracy differ in adversarial sparsity: augmentation alone raises it, and so does "
    "training on attacked inputs.",
    method="perturbkit.robust.adversarial_sparsity",
    needs="gradient",
    input="any",
    cost="n_directions * search_steps * attack_steps gradients a vulnerable row",
    seconds=50,
)
def reproduce(run: Run) -> Evidence:
    """Sparsity of six networks."""
    from perturbkit.data import load_digits28

    train, test = load_digits28("train").rows(range(4000)), load_digits28("test").rows(range(_ROWS))
    change: dict[str, Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]] = {
        "plain": lambda net, x, y, g: x,
        "plain, other seed": lambda net, x, y, g: x,
        "noise": lambda net, x, y, g: (x + 0.3 * randn(x.shape, generator=g)).clamp(0, 1),
        "moved": lambda net, x, y, g: _moved(x, g),
        "attacked": _attacked,
    }
    nets: dict[str, nn.Module] = {
        name: _trained(train.x, train.y, fun, run, "other" if "other" in name else "first")
        for name, fun in change.items()
    }
    found = {
        name: adversarial_sparsity(
            net, test.x, test.y, _RADIUS, n_directions=15, search_steps=6, attack_steps=10, generator=run.generator("directions"),
            progress=run.progress,
        )
        for name, net in nets.items()
    }  # fmt: skip
    masked = Oracle(nn.Sequential(_Quantiser(), nets["plain"]))
    shielded = adversarial_sparsity(
        masked,
        test.x,
        test.y,
        _RADIUS,
        n_directions=1,
        search_steps=1,
        attack_steps=10,
        generator=run.generator("directions"),
    )
    standing = {name: float((s.correct & ~s.vulnerable).double().mean()) for name, s in found.items()}
    chance = {name: _random_share(Oracle(net), test.x, test.y, run) for name, net in nets.items()}
    plain = found["plain"]
    comparisons = [
        Comparison("adversarial accuracy, largest of plain and noise", max(standing["plain"], standing["noise"]), 0.1, "lower", n=_ROWS),
        _paired("sparsity, trained with noise against plainly, angle", found["noise"], plain, 1.1),
        _paired("sparsity, trained on attacked inputs against plainly, angle", found["attacked"], plain, 1.1),
        Comparison(
            "share broken by random directions, plainly trained against noise", chance["plain"], chance["noise"], "higher", n=_ROWS
        ),
        Comparison(
            "adversarial accuracy of the plain network behind a quantiser", float((shielded.correct & ~shielded.vulnerable).double().mean()),
            standing["plain"], "higher", margin=0.5, n=_ROWS,
        ),
        Comparison(
            "share broken by random directions, behind the quantiser", _random_share(masked, test.x, test.y, run), chance["plain"],
            "equal", margin=0.1, n=_ROWS, note="the quantiser hides the gradient and nothing else",
        ),
        _paired("sparsity, plain from another seed against plain, angle", found["plain, other seed"], plain, 1.1, control=True),
    ]  # fmt: skip
    other = _paired("attacked against noise", found["attacked"], found["noise"], 1.0)
    moved = float(found["moved"].mean.nanmean() / plain.mean.nanmean() - 1)
    return Evidence(
        comparisons,
        _figure(found),
        notes=f"Moving digits by up to two pixels changes the mean angle by {moved:+.0%}, and training on attacked inputs is at "
        f"{other.ours:.2f} against {other.baseline:.2f} for noise, standard error {other.spread:.2f}: that augmentation of any "
        f"kind helps, and attacked inputs most, is not shown here. {_ROWS} rows, 15 directions each.",
    )


def _paired(
    metric: str, ours: Sparsity, baseline: Sparsity, factor: float, control: bool = False
) -> Comparison:
    """Compare means over the rows that both networks lose."""
    both = ours.vulnerable & baseline.vulnerable
    a, b = ours.mean[both].double(), baseline.mean[both].double()
    spread = float((a - factor * b).std() / len(a) ** 0.5)
    # The interval of the paired difference must stay above zero too, two standard errors.
    margin = 0.0 if control else 2 * spread
    note = "must fail: nothing but the seed differs" if control else "margin of two standard errors"
    return Comparison(
        metric, float(a.mean()), float(b.mean()), "higher", factor=factor, margin=margin, spread=spread, n=len(a),
        control=control, note=note,
    )  # fmt: skip


class _Quantiser(nn.Module):
    """Rounds inputs to sixteenths: the gradient is zero, the image looks the same."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 16).round() / 16


def _random_share(oracle: Oracle, x: Tensor, y: Tensor, run: Run) -> float:
    wrong = []
    for row, label in zip(x, y, strict=True):
        delta = Sphere(2 * _RADIUS).sample(row[None], generator=run.generator("random"), n=50)
        wrong.append((oracle((row + delta).clamp(0, 1)).argmax(1) != label).double().mean())
    return float(torch.stack(wrong).mean())


def _trained(
    x: Tensor,
    y: Tensor,
    change: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor],
    run: Run,
    seed: str,
) -> nn.Module:
    net = nn.Sequential(
        nn.utils.skip_init(nn.Conv2d, 1, 8, 4, stride=2, padding=1), nn.ReLU(),
        nn.utils.skip_init(nn.Conv2d, 8, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.utils.skip_init(nn.Linear, 784, 64), nn.ReLU(), nn.utils.skip_init(nn.Linear, 64, 10),
    )  # fmt: skip
    generator = run.generator(seed)
    for p in net.parameters():
        bound = p[0].numel() ** -0.5 if p.ndim > 1 else 0.0
        p.data = uniform(p.shape, -bound, bound, generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(500):
        rows = randperm(len(x), generator=generator)[:100]
        loss = functional.cross_entropy(net(change(net, x[rows], y[rows], generator)), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    padded = functional.pad(x, (2, 2, 2, 2))
    places = randint(0, 5, (len(x), 2), generator=generator).tolist()
    return torch.stack([p[:, i : i + 28, j : j + 28] for p, (i, j) in zip(padded, places, strict=True)])


def _attacked(net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Three steps of projected gradient in a Euclidean ball of radius 2."""
    delta = torch.zeros_like(x)
    for _ in range(3):
        leaf = (x + delta).clamp(0, 1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(functional.cross_entropy(net(leaf), y), leaf)
        delta = delta + 1.2 * functional.normalize(gradient.flatten(1), dim=1, eps=1e-30).reshape(x.shape)
        size = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        delta = delta * (2.0 / size.clamp_min(1e-9)).clamp_max(1)
    return (x + delta).clamp(0, 1)


def _figure(found: dict[str, Sparsity]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, result in found.items():
        angles = result.per_direction[result.vulnerable].flatten().sort().values
        ax.plot(angles, torch.linspace(0, 1, len(angles)), label=name)
    ax.set_xlabel("angle from a random direction to an adversarial one")
    ax.set_ylabel("share of directions")
    ax.legend(frameon=False)
    return figure
