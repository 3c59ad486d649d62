"""Oracles of consolidation: joint training on quadratic losses, plain training on one task, and curvature by differences."""

import copy
import json
import math

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from _common import Example
from perturbkit.core import checks, functional
from perturbkit.core.random import seeded_init
from perturbkit.optim import (
    ContinualAccuracy,
    NeuralConsolidation,
    QuadraticConsolidation,
    continual_evaluate,
)

CE = nn.CrossEntropyLoss(reduction="sum")
SMALL = {"hidden": (8,), "steps": 5, "samples": 16, "radius": 2.0}


def squared(outputs, y):
    return (outputs - y).square().sum() / 2


def head(n_in=2, n_out=3, dtype=torch.float64):
    with seeded_init(0):
        return nn.Linear(n_in, n_out).to(dtype)


def classes(n, seed, dtype=torch.float64, n_in=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_in, generator=g, dtype=dtype), torch.randint(0, 3, (n,), generator=g)


def targets(n, seed, n_in=4, n_out=2):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, k, generator=g, dtype=torch.float64) for k in (n_in, n_out))


def both(model, generator, dtype):
    found = []
    for learner in (
        QuadraticConsolidation(model, CE),
        NeuralConsolidation(model, CE, generator=generator, **SMALL),
    ):
        for seed in range(2):
            learner.fit_task(*classes(12, seed, dtype))
        found += [learner.weights_, learner.outputs(classes(3, 5, dtype)[0])]
    return found


def one(**options):
    return QuadraticConsolidation(head(), CE, **options)


EXAMPLE = Example(
    model=lambda: nn.Linear(2, 3),
    with_model=both,
    chunked=lambda n: one(chunk_size=n).fit_task(*classes(12, 0)).hessian_,
    stochastic=True,
    refusals=(
        (lambda: QuadraticConsolidation("net", CE), "model is a str"),
        (lambda: QuadraticConsolidation(head(), "mean"), "loss_fn is a str"),
        (lambda: one(strength=-1.0), "strength is -1"),
        (lambda: one(hessian="rows"), "hessian is 'rows'"),
        (lambda: one(prior_precision=0.0), "prior_precision is 0"),
        (lambda: one(chunk_size=0), "chunk_size is 0"),
        (lambda: one(max_iter=0), "max_iter is 0"),
        (lambda: NeuralConsolidation(head(), CE, radius=0.0), "radius is 0"),
        (lambda: NeuralConsolidation(head(), CE, samples=1), "samples is 1"),
        (lambda: NeuralConsolidation(head(), CE, hidden=(0,)), "hidden is 0"),
        (lambda: NeuralConsolidation(head(), CE, steps=0), "steps is 0"),
        (lambda: NeuralConsolidation(head(), CE, lr=0.0), "lr is 0"),
        (lambda: QuadraticConsolidation(head(), nn.CrossEntropyLoss()).fit_task(*classes(5, 0)), "twice"),
        (
            lambda: QuadraticConsolidation(head(), nn.CrossEntropyLoss(reduction="none")).fit_task(
                *classes(5, 0)
            ),
            "shape",
        ),
        (lambda: one().fit_task(classes(5, 0)[0], torch.tensor([1])), "y is of shape"),
        (lambda: one().fit_task([1.0], torch.tensor([1])), "x is"),
        (lambda: one().predict(classes(5, 0)[0]), "not fitted"),
        (lambda: continual_evaluate(one(), []), "tasks has 0"),
        (lambda: continual_evaluate(one(), [classes(5, 0)]), "tasks has 1"),
    ),
)


def ridge(x, y, precision):
    """Return the closed form of the weights, as a linear layer holds them."""
    wide = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    w = torch.linalg.solve(wide.T @ wide + precision * torch.eye(wide.shape[1], dtype=x.dtype), wide.T @ y)
    return torch.cat([w[:-1].T.flatten(), w[-1]])


def test_on_a_quadratic_loss_it_is_joint_training():
    tasks = [targets(n, n) for n in (6, 9, 3)]
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    want = ridge(x, y, 0.7)
    learners = [
        QuadraticConsolidation(head(4, 2), squared, prior_precision=0.7, hessian=h)
        for h in ("full", "diagonal")
    ]
    for learner in learners:
        for task in tasks:
            learner.fit_task(*task)
    torch.testing.assert_close(learners[0].weights_, want, rtol=0, atol=1e-8)
    assert (learners[1].weights_ - want).abs().max() > 0.05


@pytest.mark.parametrize("learner", ["full", "diagonal", "neural"])
def test_one_task_is_plain_training_with_the_prior(learner):
    x, y = classes(30, 1)
    call = functional(head())

    def total(w):
        v = torch.tensor(w, requires_grad=True)
        loss = CE(call(v, x), y) + 0.25 * v.square().sum()
        return loss.item(), torch.autograd.grad(loss, v)[0].numpy()

    want = torch.tensor(minimize(total, [0.0] * 9, jac=True, tol=1e-12).x)
    options = {"strength": 0.3, "prior_precision": 0.5}
    made = (
        NeuralConsolidation(head(), CE, generator=0, **SMALL, **options)
        if learner == "neural"
        else QuadraticConsolidation(head(), CE, hessian=learner, **options)
    )
    torch.testing.assert_close(made.fit_task(x, y).weights_, want, rtol=0, atol=1e-5)


def test_the_hessian_is_that_of_the_whole_loss_by_differences():
    learner = one(strength=0.6, chunk_size=4).fit_task(*classes(15, 2))
    before = copy.deepcopy(learner)
    x, y = classes(20, 3)
    learner.fit_task(x, y)
    call, w = functional(head()), learner.weights_

    def gradient(v):
        v = v.clone().requires_grad_()
        return torch.autograd.grad(before.penalty(v) + CE(call(v, x), y), v)[0]

    assert gradient(w).abs().max() < 1e-7
    eye = 1e-5 * torch.eye(9, dtype=torch.float64)
    differences = torch.stack([(gradient(w + e) - gradient(w - e)) / 2e-5 for e in eye])
    torch.testing.assert_close(learner.hessian_, differences, rtol=1e-5, atol=1e-5)
    v = w + 0.1 * torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(learner.penalty(v), 0.6 * (v - w) @ differences @ (v - w) / 2)


def test_the_diagonal_is_that_of_the_matrix_and_of_the_fisher_information():
    x, y = classes(25, 4)
    full, diagonal = (one(hessian=h, prior_precision=2.0).fit_task(x, y) for h in ("full", "diagonal"))
    torch.testing.assert_close(diagonal.hessian_, full.hessian_.diagonal())
    p = full.outputs(x).softmax(1)
    wide = torch.cat([x, torch.ones(25, 1, dtype=x.dtype)], 1)
    fisher = ((p * (1 - p)).T @ wide.square()) + 2.0
    torch.testing.assert_close(
        diagonal.hessian_, torch.cat([fisher[:, :2].flatten(), fisher[:, 2]]), rtol=1e-6, atol=1e-6
    )
    v = full.weights_ + 1
    torch.testing.assert_close(diagonal.penalty(v), diagonal.hessian_.sum() / 2)


def test_without_strength_the_past_is_forgotten():
    learner = QuadraticConsolidation(head(4, 2), squared, strength=0.0)
    learner.fit_task(*targets(9, 5)).fit_task(*targets(11, 6))
    torch.testing.assert_close(learner.weights_, ridge(*targets(11, 6), 0.0), rtol=0, atol=1e-6)


def neural(steps=600, **options):
    return NeuralConsolidation(
        head(1, 1),
        squared,
        radius=3.0,
        hidden=(32, 32),
        samples=128,
        steps=steps,
        lr=1e-2,
        generator=1,
        **options,
    )


def test_in_two_dimensions_the_network_knows_the_loss_of_the_past():
    tasks = [targets(8, seed, 1, 1) for seed in (7, 8)]
    learner = neural(prior_precision=0.5).fit_task(*tasks[0])
    assert learner.fit_error_ < 0.03
    call, w = functional(head(1, 1)), learner.weights_
    g = torch.Generator().manual_seed(0)
    steps = torch.randn(50, 2, generator=g, dtype=torch.float64)
    points = w + 2.5 * steps / steps.norm(dim=1).max()
    truth = torch.stack([squared(call(v, tasks[0][0]), tasks[0][1]) + v.square().sum() / 4 for v in points])
    torch.testing.assert_close(learner.penalty(points), truth, rtol=0.02, atol=0.05 * learner.scale_)
    learner.fit_task(*tasks[1])
    joint = ridge(torch.cat([t[0] for t in tasks]), torch.cat([t[1] for t in tasks]), 0.5)
    assert (learner.weights_ - joint).norm() < 0.05
    alone = ridge(*tasks[1], 0.5)
    assert (alone - joint).norm() > 0.2


def test_outside_the_ball_a_wall_is_added_to_the_nearest_point():
    learner = neural(20, strength=0.5).fit_task(*targets(8, 7, 1, 1))
    step = torch.tensor([3.0, -4.0], dtype=torch.float64) / 5
    edge, far = (learner.penalty(learner.weights_ + r * step) for r in (3.0, 4.5))
    assert float(far - edge) == pytest.approx(0.5 * 500 * learner.scale_ * 0.5**2)
    centre = learner.weights_.clone().requires_grad_()
    assert torch.autograd.grad(learner.penalty(centre), centre)[0].isfinite().all()


def test_the_network_is_drawn_from_the_generator():
    learners = [
        NeuralConsolidation(head(), CE, generator=s, **SMALL).fit_task(*classes(9, 1)) for s in (3, 3, 4)
    ]
    v = learners[0].weights_ + 0.5
    first, again, other = (float(learner.penalty(v)) for learner in learners)
    assert first == again != other


def test_points_of_the_ball_are_inside_and_half_of_them_uniform_in_it():
    from perturbkit.optim.plasticity.loss_consolidation import _ball

    u = _ball(4000, torch.zeros(5, dtype=torch.float64), torch.Generator().manual_seed(0))
    lengths = u.norm(dim=1)
    assert float(lengths.max()) <= 1
    assert float((lengths[::2] ** 5).mean()) == pytest.approx(0.5, abs=0.03)
    assert float(lengths[1::2].mean()) == pytest.approx(0.5, abs=0.03)
    assert (u.mean(0).abs() < 0.04).all()


def test_frozen_features_are_no_weights_and_modes_do_not_matter():
    with seeded_init(1):
        net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)).double()
    net[0].requires_grad_(False)
    x, y = classes(20, 9)
    first = QuadraticConsolidation(net, CE).fit_task(x, y)
    assert first.weights_.shape == (15,)
    alone = QuadraticConsolidation(copy.deepcopy(net[3]), CE).fit_task(net[0](x).tanh().detach(), y)
    torch.testing.assert_close(first.weights_, alone.weights_, rtol=0, atol=1e-6)
    assert torch.equal(first.predict(x), first.outputs(x).argmax(1))


def test_a_search_that_is_cut_off_warns():
    with pytest.warns(checks.PerturbkitWarning, match="not fitted to convergence"):
        one(max_iter=1).fit_task(*classes(12, 0))


def test_accuracies_are_those_of_each_task_after_each():
    class Last:
        """Knows the classes of its last task only, and of the first half the others."""

        def fit_task(self, x, y):
            self.known = set(y.tolist())

        def predict(self, x):
            return torch.tensor([int(v) if int(v) in self.known or v < 1 else -1 for v in x[:, 0]])

    def task(*labels):
        y = torch.tensor(labels)
        return y[:, None].double(), y, y[:, None].double(), y

    found = continual_evaluate(Last(), [task(0, 1), task(2, 3), task(4)])
    want = torch.tensor([[1.0, math.nan, math.nan], [0.5, 1.0, math.nan], [0.5, 0.0, 1.0]])
    torch.testing.assert_close(found.accuracy, want, equal_nan=True)
    assert found.average == pytest.approx(0.5)
    assert found.forgetting == pytest.approx((0.5 + 1.0) / 2)
    again = ContinualAccuracy.from_dict(json.loads(json.dumps(found.to_dict())))
    torch.testing.assert_close(again.accuracy, want, equal_nan=True)
    assert continual_evaluate(Last(), [task(0)]).forgetting == 0
