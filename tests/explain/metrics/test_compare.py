"""Oracles of the table of metrics: the metrics themselves, and functions whose best explanation is known."""

import functools

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Oracle
from perturbkit.explain import (
    SquareRemoval,
    SubsetToBaseline,
    compare,
    deletion_curve,
    infidelity,
    insertion_curve,
    integrated_gradients,
    max_sensitivity,
    occlusion,
    pointing_game,
)


def network(side=4, k=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(side**2, 6), nn.Tanh(), nn.Linear(6, k)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def images(n=3, seed=1, dtype=torch.float64):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Reports:
    def __init__(self):
        self.total = self.done = self.stopped = 0

    def start(self, description, total):
        self.total = total

    def advance(self, steps=1):
        self.done += steps

    def stop(self):
        self.stopped += 1


OPTIONS = {"n_samples": 20, "n_points": 3, "n_steps": 4, "progress": False}
METHODS = [integrated_gradients, functools.partial(occlusion, window=2)]


def _tensors(frame):
    return [torch.as_tensor(frame.to_numpy(float))]


EXAMPLE = Example(
    model=network,
    with_model=lambda model, generator, dtype: compare(
        model, images(dtype=dtype), 1, methods=METHODS, generator=generator, **OPTIONS
    ),
    chunked=lambda size: compare(
        Oracle(network(), chunk_size=size), images(), 0, methods=METHODS, generator=3, **OPTIONS
    ),
    read=_tensors,
    refusals=(
        (lambda: compare(network(), images(), 0, methods=[]), "methods is "),
        (lambda: compare(network(), images(), 0, methods=[occlusion, occlusion]), "occlusion, occlusion"),
        (lambda: compare(network(), images(), 0, methods={"random": occlusion}), "none named 'random'"),
        (
            lambda: compare(network(), images(), 0, methods={"a": lambda m, x, t: x[:1]}, progress=False),
            "explanation has shape",
        ),
        (lambda: compare(network(), images()[0, 0, 0], 0, methods=METHODS), "dimensions"),
    ),
    dtypes=(torch.float64,),  # a table of numbers is in double precision
    stochastic=True,
)


def test_columns_are_the_metrics_themselves():
    net, x, target = network(), images(), torch.tensor([0, 2, 1])
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, 1:3, 1:] = True
    frame = compare(net, x, target, methods=METHODS, mask=mask, baseline=0.2, generator=7, **OPTIONS)
    assert list(frame.index) == ["integrated_gradients", "occlusion", "random"]
    values = integrated_gradients(net, x, target).values
    expected = {
        "deletion": deletion_curve(net, x, values, target, baseline=0.2, n_steps=4).area,
        "insertion": insertion_curve(net, x, values, target, baseline=0.2, n_steps=4).area,
        "pointing": pointing_game(values, mask).values,
        "energy": pointing_game(values, mask).extras["energy"],
    }
    for name, numbers in expected.items():
        assert frame.loc["integrated_gradients", name] == pytest.approx(float(numbers.mean()), rel=1e-12)
    assert frame.loc["integrated_gradients", ["nfev", "ngrad"]].tolist() == [3 * (64 + 2), 3 * 64]
    assert frame.loc["occlusion", ["nfev", "ngrad"]].tolist() == [3 * 5, 0]
    assert frame.loc["random", ["nfev", "ngrad"]].tolist() == [0, 0]


def test_stochastic_metrics_come_near_to_their_own_values():
    net, x = network(), images()
    frame = compare(
        net, x, 1, methods=METHODS, generator=7, n_samples=3000, n_points=400, n_steps=2, progress=False
    )
    values = occlusion(net, x, 1, window=2).values
    squares = SquareRemoval((1, 2))
    score = infidelity(
        net, x, values, 1, perturbation=squares, baseline=0.0, n_samples=3000, normalize=True, generator=99
    )
    assert frame.loc["occlusion", "infidelity"] == pytest.approx(float(score.values.mean()), rel=0.15)
    moved = max_sensitivity(
        net, x, METHODS[1], 1, radius=0.05, n_samples=400, relative=True, generator=98
    ).values.mean()
    assert frame.loc["occlusion", "max_sensitivity"] == pytest.approx(float(moved), rel=0.15)


def test_the_terms_of_an_additive_function_win_every_metric():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1, -1.0], dtype=torch.float64)
    methods = {
        "terms": lambda model, x, target: w * x,
        "inputs": lambda model, x, target: x,
    }
    frame = compare(lambda z: z @ w, x, methods=methods, generator=0, **OPTIONS)
    assert frame.loc["terms", "infidelity"] < 1e-12
    for column, sign in (("infidelity", 1), ("deletion", 1), ("insertion", -1)):
        assert (sign * frame[column]).idxmin() == "terms"
    assert frame["max_sensitivity"].idxmax() == "random"


def test_the_long_table_has_the_means():
    net, x = network(), images()
    wide, long = (
        compare(net, x, 1, methods=METHODS, generator=5, long=form, **OPTIONS) for form in (False, True)
    )
    assert len(long) == 3 * 4 * 3
    means = long.groupby(["method", "metric"])["value"].mean()
    for method in wide.index:
        for metric in ("infidelity", "max_sensitivity", "deletion", "insertion"):
            assert wide.loc[method, metric] == pytest.approx(means[method, metric], rel=1e-12)


def test_a_perturbation_can_be_given_and_progress_is_reported():
    reports, x = Reports(), images().flatten(1)
    net = network()
    options = {**OPTIONS, "progress": reports}
    frame = compare(
        net, x, 1, methods=[integrated_gradients], perturbation=SubsetToBaseline(0.3), generator=0, **options
    )
    assert (reports.total, reports.done, reports.stopped) == (8, 8, 1)
    other = compare(net, x, 1, methods=[integrated_gradients], generator=0, **OPTIONS)
    assert frame.loc["integrated_gradients", "infidelity"] != other.loc["integrated_gradients", "infidelity"]
