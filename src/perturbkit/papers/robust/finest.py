"""Rank-preserving fine-tuning against plain training when one interaction in a hundred changes.

Sequences of 300 users over 200 items in ten clusters, five changed data sets, two seeds. Whole pipelines are compared, each on
its own data: a recurrent recommender, then as many epochs of plain training, of plain training with averaged weights, or of the
method; or plain training for all those epochs, stopped at its best. The method is tried in two ways: with its own lists as reference, which makes nothing of the
original data known to the pipeline on changed data, and anchored, with those of the recommender in service. Simulated changes
without the rank-preserving loss are the control.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randint, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.robust._digits import stream
from perturbkit.robust import (
    FINEST,
    NextItemModel,
    ReferenceLists,
    perturb_interactions,
    rank_stability,
    reference_lists,
)

_USERS, _ITEMS, _CLUSTERS, _LENGTH, _K = 300, 200, 10, 20, 20
_EPOCHS, _MORE, _RATE, _SLOWER = 20, 12, 5e-3, 2e-3
_CHANGES = ("random", "random", "random", "earliest", "popular")
_NAMES = ("FINEST", "anchored", "plain", "stopped", "averaged", "changes only")


@paper(
    number=219,
    title="FINEST: Stabilizing Recommendations by Rank-Preserving Fine-Tuning",
    authors="Oh, Ustun, McAuley, Kumar",
    year=2024,
    arxiv="2402.03481",
    claim="Fine-tuning that keeps reference lists in order under simulated changes makes recommendations stable under changes of "
    "the training data without losing accuracy of the next item.",
    method="perturbkit.robust.FINEST",
    needs="training",
    input="sequences",
    cost="about one more training",
    seconds=90,
)
def reproduce(run: Run) -> Evidence:
    """Train on the original and five changed data sets with two seeds."""
    measures = ("rbo", "jaccard", "mrr", "recall")
    found: dict[str, dict[str, list[float]]] = {name: {m: [] for m in measures} for name in _NAMES}
    for seed in run.seeds(2):
        sequences = _sequences(stream(seed, 0))
        data, wanted = [s[:-1] for s in sequences], torch.stack([s[-1] for s in sequences])
        changed = [
            perturb_interactions(data, 0.01, n_items=_ITEMS, which=which, generator=stream(seed, 1 + i))  # type: ignore[arg-type]
            for i, which in enumerate(_CHANGES)
        ]
        served: ReferenceLists | None = None
        models: list[dict[str, nn.Module]] = []
        for one in (data, *changed):
            base, trained = _pipelines(one, seed, served)
            served = reference_lists(base, data, _K) if served is None else served
            models.append(trained)
        for name in _NAMES:

            def train(given: Sequence[Tensor], name: str = name) -> nn.Module:
                place = next(i for i, one in enumerate((data, *changed)) if one is given)  # noqa: B023
                return models[place][name]  # noqa: B023

            stability = rank_stability(train, data, changed, data, k=_K)
            found[name]["rbo"].append(float(stability.rbo.mean()))
            found[name]["jaccard"].append(float(stability.jaccard.mean()))
            place = torch.cat([_places(trained[name], data, wanted) for trained in models])
            found[name]["mrr"].append(float((1 / place).mean()))
            found[name]["recall"].append(float((place <= 10).double().mean()))
    ours, plain, anchored = found["FINEST"], found["plain"], found["anchored"]
    over = Comparison.over_seeds
    comparisons = [
        over("own reference, rank-biased overlap: 0.05 above plain", ours["rbo"], plain["rbo"], "higher", margin=0.05),
        over("own reference, Jaccard index of the top 20: 0.05 above plain", ours["jaccard"], plain["jaccard"], "higher", margin=0.05),
        over("own reference, rank-biased overlap: above early stopping", ours["rbo"], found["stopped"]["rbo"], "higher"),
        over("own reference, rank-biased overlap: above averaged weights", ours["rbo"], found["averaged"]["rbo"], "higher"),
        over("own reference, mean reciprocal rank: 0.97 of plain", ours["mrr"], plain["mrr"], "higher", factor=0.97),
        over("own reference, recall at 10: 0.97 of plain", ours["recall"], plain["recall"], "higher", factor=0.97),
        over("anchored, rank-biased overlap: 0.05 above plain", anchored["rbo"], plain["rbo"], "higher", margin=0.05),
        over("anchored, Jaccard index of the top 20: 0.05 above plain", anchored["jaccard"], plain["jaccard"], "higher", margin=0.05),
        over("anchored, mean reciprocal rank: 0.97 of plain", anchored["mrr"], plain["mrr"], "higher", factor=0.97),
        over(
            "simulated changes without the loss, rank-biased overlap: 0.05 above plain", found["changes only"]["rbo"],
            plain["rbo"], "higher", margin=0.05, control=True, note="must fail: the loss is what keeps the order",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(found),
        notes=f"{_EPOCHS} epochs and {_MORE} more. Anchored pipelines share the reference lists of the first training on the "
        "original data, as where a service retrains; what is compared are the final lists, not the reference. Accuracies are means "
        "over the original and changed data.",
    )


def _pipelines(
    data: list[Tensor], seed: int, served: ReferenceLists | None
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Return the recommender after the first epochs, and what each way of going on makes of it."""
    first = NextItemModel(_ITEMS, 32, generator=stream(seed, 6))
    base = (
        FINEST(first, weight=0, perturb_ratio=0, epochs=_EPOCHS, lr=_RATE, generator=stream(seed, 7))
        .fit(data)
        .model_
    )

    def tuned(weight: float, ratio: float) -> FINEST:
        return FINEST(
            base, k=_K, weight=weight, perturb_ratio=ratio, epochs=_MORE, lr=_SLOWER, generator=stream(seed, 8)
        )  # fmt: skip

    # Early stopping holds a user's last interaction back.
    shorter, last = [u[:-1] for u in data], torch.stack([u[-1] for u in data])
    states: list[dict[str, Tensor]] = []
    scores: list[float] = []

    def remember(net: nn.Module) -> float:
        states.append(copy.deepcopy(net.state_dict()))
        return 0.0

    def judge(net: nn.Module) -> float:
        states.append(copy.deepcopy(net.state_dict()))
        scores.append(float((1 / _places(net, shorter, last)).mean()))
        return scores[-1]

    trained = {"plain": tuned(0, 0).fit(data, evaluate=remember).model_}
    late = states[-(_MORE // 2) :]
    trained["averaged"] = copy.deepcopy(base)
    trained["averaged"].load_state_dict({k: torch.stack([s[k] for s in late]).mean(0) for k in late[0]})
    states.clear()
    FINEST(first, weight=0, perturb_ratio=0, epochs=_EPOCHS + _MORE, lr=_RATE, generator=stream(seed, 7)).fit(shorter, evaluate=judge)  # fmt: skip
    trained["stopped"] = copy.deepcopy(base)
    trained["stopped"].load_state_dict(states[max(range(len(scores)), key=scores.__getitem__)])
    trained["FINEST"] = tuned(1.0, 0.01).fit(data).model_
    trained["anchored"] = trained["FINEST"] if served is None else tuned(1.0, 0.01).fit(data, served).model_
    trained["changes only"] = tuned(0, 0.01).fit(data).model_
    return base, trained


def _places(model: nn.Module, contexts: Sequence[Tensor], wanted: Tensor) -> Tensor:
    """Return the rank, from 1, of what came next."""
    items = nn.utils.rnn.pad_sequence(list(contexts), batch_first=True, padding_value=-1)
    with torch.no_grad():
        scores = model(items)[torch.arange(len(items)), (items >= 0).sum(1) - 1]
    own = scores.gather(1, wanted[:, None])
    return (scores > own).sum(1).double() + 1


def _sequences(generator: torch.Generator) -> list[Tensor]:
    """Draw users that walk among three likely successors of an item in its cluster, and jump now and then."""
    size = _ITEMS // _CLUSTERS
    successors = randint(0, size, (_ITEMS, 3), generator=generator)
    successors += (torch.arange(_ITEMS) // size * size)[:, None]
    homes = randint(0, _CLUSTERS, (_USERS, 2), generator=generator)
    at = homes[:, 0] * size + randint(0, size, (_USERS,), generator=generator)
    walk = [at]
    for _ in range(_LENGTH):
        u = uniform((_USERS, 2), generator=generator)
        likely = successors[at, (2 * u[:, 1] ** 2 * 1.5).long().clamp_max(2)]
        home = homes[torch.arange(_USERS), randint(0, 2, (_USERS,), generator=generator)]
        jump = home * size + randint(0, size, (_USERS,), generator=generator)
        at = torch.where(u[:, 0] < 0.75, likely, jump)
        walk.append(at)
    return list(torch.stack(walk, 1))


def _figure(found: dict[str, dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, numbers in found.items():
        ax.plot(numbers["mrr"], numbers["rbo"], "o", label=name)
    ax.set_xlabel("mean reciprocal rank of the next item")
    ax.set_ylabel("rank-biased overlap, original and changed")
    ax.legend(frameon=False, fontsize=8)
    return figure
