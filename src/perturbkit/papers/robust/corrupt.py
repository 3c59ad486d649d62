"""Natural damage lowers accuracy the more, the heavier it is, and training on one kind of it helps against that kind.

Accuracy of a digits network at five severities of six kinds; the same for a small network trained on clean and on noisy
digits; and, as a control, an untrained network, which has nothing to lose.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Oracle
from perturbkit.core.random import randperm, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import IMAGE_CORRUPTIONS, corrupt


@paper(
    number=0,
    title="Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
    authors="Hendrycks, Dietterich",
    year=2019,
    arxiv="1903.12261",
    claim="Accuracy falls steadily with the severity of common corruptions, and training on noise helps against noise.",
    method="perturbkit.robust.corrupt",
    needs="forward",
    input="image, tabular",
    cost="one evaluation a row, kind and severity",
    seconds=20,
)
def reproduce(run: Run) -> Evidence:
    """Accuracy over kinds and severities."""
    from perturbkit.data import digits_classifier, load_digits28

    train, test = load_digits28("train").rows(range(3000)), load_digits28("test").rows(range(500))
    trained = Oracle(digits_classifier(28).module)
    curves = {kind: _curve(trained, test.x, test.y, kind, run) for kind in IMAGE_CORRUPTIONS}
    mean = torch.tensor(list(curves.values())).mean(0)
    falls = float((mean[1:] <= mean[:-1]).double().mean())
    plain, noisy = (_trained(train.x, train.y, severity, run) for severity in (0, 4))
    untrained = Oracle(_network(run))
    lost = _curve(untrained, test.x, test.y, "noise", run)
    pair = [_curve(Oracle(net), test.x, test.y, "noise", run)[-1] for net in (noisy, plain)]
    n = len(test)
    comparisons = [
        Comparison("steps of severity at which mean accuracy falls, share", falls, 1.0, "equal", n=5),
        Comparison("mean accuracy, severity 5 against clean", float(mean[-1]), float(mean[0]), "lower", margin=0.2, n=n),
        Comparison("accuracy under noise 5, trained on noise against plainly", pair[0], pair[1], "higher", margin=0.02, n=n),
        Comparison(
            "accuracy of an untrained network, noise 5 against clean", lost[-1], lost[0], "lower", margin=0.2, control=True, n=n,
            note="must fail: it knows nothing to lose",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(curves),
        notes="Six kinds that work on tensors of any size, of the paper's fifteen.",
    )


def _curve(oracle: Oracle, x: Tensor, y: Tensor, kind: str, run: Run) -> list[float]:
    """Accuracy, clean and at severities 1 to 5."""
    damaged = [x, *(corrupt(x, kind, s, generator=run.generator(kind)) for s in range(1, 6))]
    return [float((oracle(z).argmax(1) == y).double().mean()) for z in damaged]


def _network(run: Run) -> nn.Module:
    net = nn.Sequential(
        nn.Flatten(),
        nn.utils.skip_init(nn.Linear, 784, 128),
        nn.ReLU(),
        nn.utils.skip_init(nn.Linear, 128, 10),
    )
    generator = run.generator("weights")
    for p in net.parameters():
        p.data = uniform(p.shape, -0.04, 0.04, generator=generator)
    return net


def _trained(x: Tensor, y: Tensor, severity: int, run: Run) -> nn.Module:
    net, generator = _network(run), run.generator("batches")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(500):
        rows = randperm(len(x), generator=generator)[:100]
        shown = corrupt(x[rows], "noise", severity, generator=generator) if severity else x[rows]
        loss = functional.cross_entropy(net(shown), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def _figure(curves: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for kind, curve in curves.items():
        ax.plot(range(6), curve, marker="o", label=kind)
    ax.set_xlabel("severity")
    ax.set_ylabel("accuracy")
    ax.legend(frameon=False)
    return figure
