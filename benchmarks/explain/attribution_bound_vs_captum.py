"""How far the gradient of a digits classifier can move within an l2 ball, against captum's sampled sensitivity.

captum.metrics.sensitivity_max draws inputs from the ball and takes the largest change it meets: a lower estimate, which
no number of draws makes a bound. Ours is an upper bound: the linearised one with the Jacobian's largest singular value,
plus the remainder from a Lipschitz constant of that Jacobian, which a network of one softplus layer has in closed form.
Our attack gives a lower one, by ascent. The mean of each over 200 digits is printed, and that the order holds in each row
is asserted. captum is given as many gradients as the bound makes passes back (one a pixel and two more), and the attack
is compared with as many draws as it makes steps. The floor is that many gradients of the bare network in one batch.

At equal counts both of ours are slower. Nine tenths of the bound's time are the singular values of the Jacobians; a step
of the attack passes back through the gradient too, and steps follow one another where draws share a batch. In return the
bound is one, and twenty times as many draws do not find half of what the attack does.
"""

from __future__ import annotations

import math

import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor, nn

from perturbkit.core import Ball
from perturbkit.core.random import seeded_init
from perturbkit.explain import attack_attribution, attribution_deviation_bound, gradient_attribution

EPSILON, BETA, STEPS = 0.05, 5.0, 50


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    from captum.metrics import sensitivity_max

    from perturbkit.data import load_digits8

    model, x, label = _network(load_digits8)
    attribute = gradient_attribution(model, label)
    clean = attribute(x).detach().flatten(1).norm(dim=1)
    lipschitz, ball, passes = _hessian_lipschitz(model), Ball("l2", EPSILON), x[0].numel() + 2

    def explain(inputs: Tensor | tuple[Tensor], target: Tensor) -> tuple[Tensor]:
        return (gradient_attribution(model, target)(inputs if isinstance(inputs, Tensor) else inputs[0]),)

    def theirs(draws: int, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        share = sensitivity_max(
            explain,
            x,
            perturb_func=lambda given: given + ball.sample(given, generator=g),
            n_perturb_samples=draws,
            target=label,
        )
        return share * clean

    def bound() -> Tensor:
        return attribution_deviation_bound(attribute, x, epsilon=EPSILON, hessian_lipschitz=lipschitz).value

    def attack() -> Tensor:
        return attack_attribution(
            attribute, x, epsilon=EPSILON, objective="euclidean", steps=STEPS, generator=0
        ).euclidean

    def floor(n: int) -> None:
        leaf = x.repeat(n, 1).requires_grad_(True)
        torch.autograd.grad(model(leaf).gather(1, label.repeat(n)[:, None]).sum(), leaf)

    certified, reached, sampled = bound(), attack(), theirs(passes)
    assert bool((certified >= reached).all())
    assert bool((certified >= sampled).all())
    practical = attribution_deviation_bound(attribute, x, epsilon=EPSILON).value
    for name, value in {
        "certified bound, ours": certified,
        "bound without remainder, ours": practical,
        f"attack of {STEPS} steps, ours": reached,
        f"captum, {passes} draws": sampled,
        "captum, 20 times as many": theirs(20 * passes),
    }.items():
        print(f"  largest deviation, {name:<32}{float(value.mean()):.4f}")
    rows = compare(
        bound, {f"bound; captum, {passes} draws": lambda: theirs(passes)}, lambda: floor(passes), rounds
    )
    rows += compare(
        attack,
        {f"attack; captum, {STEPS + 3} draws": lambda: theirs(STEPS + 3)},
        lambda: floor(STEPS + 3),
        rounds,
    )
    print(table(rows))
    return rows


def _network(load: object) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Train one softplus layer on digits; return it with 200 test images and the classes it answers."""
    assert callable(load)
    data, test = load("train"), load("test").x[:200].flatten(1)
    with seeded_init(0):
        model = nn.Sequential(nn.Linear(64, 64), nn.Softplus(beta=BETA), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.x.flatten(1)), data.y).backward()
        optimizer.step()
    model.requires_grad_(False)
    return model, test, model(test).argmax(1)


def _hessian_lipschitz(model: nn.Sequential) -> float:
    """Return a Lipschitz constant of the Hessian of every output: ``|W|^2 max_j |v_j| |w_j| sup |softplus'''|``."""
    first, last = model[0].weight, model[2].weight
    third = BETA**2 / (6 * math.sqrt(3))
    return float(
        torch.linalg.matrix_norm(first, 2) ** 2 * (last.abs() * first.norm(dim=1)).max() * third  # type: ignore[operator]
    )


if __name__ == "__main__":
    main()
