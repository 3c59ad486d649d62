"""Scores of 400 digits on 50 queries: the two ends of Source against captum's TracIn and Arnoldi influence functions.

A network of 64-32-10 (2410 weights) with 6 checkpoints. Source does at least what TracIn does, a gradient a row and checkpoint,
which is the floor, and adds a curvature a segment. The limit is retraining without each row.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from perturbkit.core.random import randn
from perturbkit.explain import Source

_ROWS, _QUERIES, _CHECKPOINTS = 400, 50, 6


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from captum.influence import TracInCP
    from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction

    from perturbkit.data import load_digits8

    data = load_digits8("train")
    x, y = data.x.flatten(1)[: _ROWS + _QUERIES], data.y[: _ROWS + _QUERIES]
    train, queries = (x[:_ROWS], y[:_ROWS]), (x[_ROWS:], y[_ROWS:])
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = randn(p.shape, generator=g) / 8
    states = _trained(net, train)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, target, reduction="none")

    def ours() -> object:
        return Source(net, loss, 3, "kfac").fit(states, 0.5, 300, train).scores(queries)

    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, state in enumerate(states):
            paths.append(str(Path(folder) / f"{i}.pt"))
            torch.save(state, paths[-1])

        def load(model: nn.Module, path: str) -> float:
            model.load_state_dict(torch.load(path, weights_only=True))
            return 0.5

        def tracin() -> object:
            made = TracInCP(
                net, TensorDataset(*train), paths, load, loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=100,
                sample_wise_grads_per_batch=True,
            )  # fmt: skip
            return made.influence(queries)

        def arnoldi() -> object:
            with torch.random.fork_rng(devices=[]):
                made = ArnoldiInfluenceFunction(
                    net, TensorDataset(*train), paths[-1], load, loss_fn=nn.CrossEntropyLoss(reduction="sum"),
                    batch_size=100, sample_wise_grads_per_batch=True, projection_dim=50, arnoldi_dim=100,
                )  # fmt: skip
                return made.influence(queries)

        def floor() -> None:
            def one(w: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
                return loss(torch.func.functional_call(net, w, (row[None],)), target[None]).sum()

            for state in states:
                torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(state, *train)

        ours(), tracin(), arnoldi(), floor()
        peers = {
            "Source, kfac; captum TracInCP": tracin,
            "Source, kfac; captum Arnoldi influence, 50 directions": arnoldi,
        }
        rows = compare(ours, peers, floor, rounds)
    print(table(rows))
    return rows


def _trained(net: nn.Module, train: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
    states, optimiser = [], torch.optim.SGD(net.parameters(), 0.5)
    for k in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(train[0]), train[1]).backward()
        optimiser.step()
        if (k + 1) % (300 // _CHECKPOINTS) == 0:
            states.append({n: v.clone() for n, v in net.state_dict().items()})
    return states


if __name__ == "__main__":
    main()
